"""Run chapters from top to bottom and store their outputs in normal form.

python tools/execute.py                 every chapter, in the order of the book
python tools/execute.py 03_attention …  these chapters only

A second run leaves an empty diff: no timestamps, no random ids, run times only
when they moved by more than half. Threads are fixed to one, because the number
of threads changes the seventh digit of a sum.
"""

import json
import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
TIMES = ROOT / "book" / "run_times.json"
THREADS = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def normal_form(notebook) -> None:
    """Drop what differs from run to run or machine to machine; keep outputs and execution counts."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        for key in ("execution", "collapsed", "scrolled"):
            cell.metadata.pop(key, None)
        for output in cell.get("outputs", []):
            output.get("metadata", {}).clear()


def save(notebook, path: Path) -> None:
    """Write a notebook beside its place and rename it."""
    beside = path.with_suffix(".part")
    beside.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")
    os.replace(beside, path)


def keep_time(name: str, seconds: float) -> None:
    """Store a chapter's run time, rounded to seconds, when it is new or moved by more than half."""
    times = json.loads(TIMES.read_text()) if TIMES.exists() else {}
    old, new = times.get(name), max(1, round(seconds))
    if old is None or abs(new - old) > max(5, old / 2):
        times[name] = new
        TIMES.write_text(json.dumps(times, indent=1, sort_keys=True) + "\n")


def execute(path: Path) -> float:
    """Run one notebook in a fresh kernel and store it. Returns the seconds it took; raises when a cell does."""
    notebook = nbformat.read(path, as_version=4)
    started = time.perf_counter()
    client = NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(path.parent)}},
    )
    client.execute()
    seconds = time.perf_counter() - started
    normal_form(notebook)
    save(notebook, path)
    keep_time(path.stem, seconds)
    return seconds


def main() -> int:
    """The command line."""
    os.environ.update(THREADS)
    names = sys.argv[1:] or sorted(path.stem for path in (ROOT / "book").glob("*.ipynb"))
    total = 0.0
    for name in names:
        print(f"{name} … ", end="", flush=True)
        seconds = execute(ROOT / "book" / f"{Path(name).stem}.ipynb")
        total += seconds
        print(f"{seconds:.0f} s")
    print(f"{len(names)} chapters in {total:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
