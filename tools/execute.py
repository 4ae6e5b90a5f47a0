"""Run chapters from top to bottom and store their outputs in normal form.

python tools/execute.py                 every chapter, in the order of the book, the front page last
python tools/execute.py 04_attention …  these chapters only

A second run leaves an empty diff: no timestamps, no random ids, no paths of this machine, run times only when they
moved by more than half. Threads are fixed to one, because the number of threads changes the seventh digit of a sum.
The seed of Python's string hashes is left alone: what depends on it would differ on the reader's machine.
"""

import base64
import io
import json
import os
import re
import sys
import time
from pathlib import Path

import nbformat
import yaml
from nbclient import NotebookClient
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
TIMES = ROOT / "book" / "run_times.json"
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "GPT3LIB_DEVICE": "cpu",  # stored outputs are a processor's
    "HF_HUB_OFFLINE": "1",  # a chapter that would fetch a model shows what it says without a network
    "PYTHONWARNINGS": "ignore:IProgress not found",  # tqdm asks for widgets; the book prints plain text
}
COLOURS = 96  # of a stored PNG; the lines and letters of a plot need no more
SETUP_TAGS = ["remove-cell", "setup"]
HIDDEN_TAGS = {"hide-input", "remove-input", "hide-cell", "remove-cell"}
SETUP = """\
# Colab has no gpt3lib: install it there. Elsewhere this does nothing.
import importlib.util

if importlib.util.find_spec("gpt3lib") is None:
    %pip install --quiet "gpt3lib @ git+{url}@{branch}\""""


def settings() -> dict:
    """The contents of _config.yml."""
    return yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))


def chapters() -> list[str]:
    """The notebooks that _toc.yml lists, in its order, the front page last (it shows the others' run times)."""
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    files = [entry["file"] for part in toc["parts"] for entry in part["chapters"]] + [toc["root"]]
    return [Path(file).name for file in files if not (ROOT / f"{file}.md").exists()]


def setup_source() -> str:
    """The setup cell: the address it installs from is the one in _config.yml."""
    return SETUP.format(**settings()["repository"])


def put_setup_cell(notebook) -> None:
    """Make the setup cell the first code cell, below the title, of a notebook that imports gpt3lib."""
    cells = [cell for cell in notebook.cells if "setup" not in cell.metadata.get("tags", [])]
    old = [cell for cell in notebook.cells if "setup" in cell.metadata.get("tags", [])]
    code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    if re.search(r"^\s*(import|from) gpt3lib\b", code, flags=re.MULTILINE):
        cell = old[0] if old else nbformat.v4.new_code_cell()
        cell.source, cell.metadata["tags"] = setup_source(), list(SETUP_TAGS)
        cells.insert(1 if cells[0].cell_type == "markdown" else 0, cell)
    notebook.cells = cells


def without_places(text: str) -> str:
    """A traceback without the paths of this machine and without addresses in memory."""
    for place in (str(ROOT), sys.prefix, sys.base_prefix, str(Path.home())):
        text = text.replace(place.rstrip("/") + "/", "") if len(place) > 4 else text
    return re.sub(r"0x[0-9a-f]{6,}", "0x…", text)


def small_png(encoded: str) -> str:
    """A PNG with a palette, a third of the bytes; one that has a palette stays as it is. Both in base64."""
    image = Image.open(io.BytesIO(base64.b64decode(encoded)))
    if image.mode == "P":
        return encoded
    stored = io.BytesIO()
    image.convert("RGBA").quantize(COLOURS, Image.Quantize.FASTOCTREE).save(stored, "PNG", optimize=True)
    return base64.b64encode(stored.getvalue()).decode()


def fold(cell) -> None:
    """Let JupyterLab and Colab fold what the page folds: cells with hidden input, and solutions."""
    tags = set(cell.metadata.get("tags", []))
    for key in ("jupyter", "cellView", "jp-MarkdownHeadingCollapsed"):
        cell.metadata.pop(key, None)
    if cell.cell_type == "code" and tags & HIDDEN_TAGS:
        cell.metadata["jupyter"] = {"source_hidden": True}
        cell.metadata["cellView"] = "form"  # Colab's word for it
        if "remove-cell" in tags:
            cell.metadata["jupyter"]["outputs_hidden"] = True
    if cell.cell_type == "markdown" and cell.source.split("\n")[0].rstrip() == "#### Solution":
        cell.metadata["jp-MarkdownHeadingCollapsed"] = True


def normal_form(notebook) -> None:
    """Drop what differs from run to run or machine to machine, fold what is to be folded; keep outputs and counts."""
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    put_setup_cell(notebook)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        for key in ("execution", "collapsed", "scrolled", "lines_to_next_cell"):
            cell.metadata.pop(key, None)
        fold(cell)
        for output in cell.get("outputs", []):
            output.get("metadata", {}).clear()
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = small_png(output.data["image/png"])
            if output.output_type == "error":
                output.traceback = [without_places(line) for line in output.traceback]


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
    """Run one notebook in a fresh kernel and store it. Returns the seconds it took.

    Raises nbclient's CellExecutionError when a cell fails; the stored notebook is then as it was.
    """
    notebook = nbformat.read(path, as_version=4)
    normal_form(notebook)
    started = time.perf_counter()
    client = NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        extra_arguments=["--log-level=ERROR"],
        resources={"metadata": {"path": str(path.parent)}},
    )
    client.execute()
    seconds = time.perf_counter() - started
    normal_form(notebook)
    save(notebook, path)
    return seconds


def main() -> int:
    """The command line."""
    os.environ.update(ENVIRONMENT)
    names = [Path(name).stem for name in sys.argv[1:]] or chapters()
    unknown = set(names) - set(chapters())
    if unknown:
        print(f"no chapter {', '.join(sorted(unknown))}; there are {', '.join(chapters())}", file=sys.stderr)
        return 1
    missing = [name for name in names if not (ROOT / "book" / f"{name}.ipynb").exists()]
    if missing:
        print(f"_toc.yml lists {', '.join(missing)}, and book/ has no such notebook", file=sys.stderr)
        return 1
    total = 0.0
    for name in names:
        print(f"{name} … ", end="", flush=True)
        seconds = execute(ROOT / "book" / f"{name}.ipynb")
        keep_time(name, seconds)
        total += seconds
        print(f"{seconds:.0f} s", flush=True)
    print(f"{len(names)} notebooks in {total:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
