"""Bring the models that were trained on a GPU into data/.

python tools/family.py RESULTS    what `benchmarks/on_gpu.py family --out RESULTS` wrote -> data/models, experiments

Prints the entries of the manifest. The data they are trained on is made by `benchmarks/on_gpu_data.py`, the command of
the training stands in each entry; the training takes six minutes on one H100.
"""

import csv
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from gpt3lib import GPT
from gpt3lib.files import sha256, write_beside
from gpt3lib.texts import DATA

KEPT = ("model.safetensors", "config.json", "merges.txt", "log.csv", "extra.jsonl")
EVERY = 50  # of the log's rows, one in so many is shipped


def thin(log: str) -> str:
    """Every 50th row of a log, and the last one."""
    head, *rows = csv.reader(log.splitlines())
    kept = rows[EVERY - 1 :: EVERY] + ([rows[-1]] if len(rows) % EVERY else [])
    return "".join(",".join(row) + "\n" for row in [head, *kept])


def keep(source: Path, folder: Path, command: str, job: dict, device: str) -> str:
    """Copy one trained model, its weights as one file, its log thinned; returns its entry of the manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    GPT.from_pretrained(source, dtype=None).save_pretrained(folder)
    for name in ("merges.txt", "extra.jsonl"):
        shutil.copy(source / name, folder / name)
    write_beside(folder / "log.csv", thin((source / "log.csv").read_text()).encode())
    losses = ", ".join(f"{name} = {found['nats']}" for name, found in job["held_out"].items())
    lines = [
        f"[models.{folder.name}]",
        f"command = {json.dumps(command)}",
        f'device = "{device}"',
        f"seconds = {job['train_s']}",
        f"tokens = {job['tokens']}",
        f"held_out = {{ {losses} }}  # nats a token",
        *(f'"{name}" = "{sha256(folder / name)}"' for name in KEPT),
    ]
    return "\n".join(lines) + "\n"


def keep_all(results: Path) -> Iterator[str]:
    """Copy every model of a training; yields their entries."""
    shutil.copy(results / "gpu_family.json", DATA / "experiments")
    found = json.loads((results / "gpu_family.json").read_text())
    about = found["about"]
    for label, job in found["jobs"].items():
        name = label.partition("@")[0].replace(":", "-")
        device = f"{about['device']}, torch {about['torch']}, {about['date']}"
        yield keep(results / "models" / name, DATA / "models" / name, about["command"], job, device)


def main() -> int:
    """The command line."""
    if len(sys.argv) != 2:
        print(__doc__.split("\n\n")[1], file=sys.stderr)
        return 2
    for entry in keep_all(Path(sys.argv[1])):
        print(entry)
    return 0


if __name__ == "__main__":
    sys.exit(main())
