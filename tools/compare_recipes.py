"""Train gpt3-1m by the recipe and with a constant batch on the same tokens, three seeds each, and store the losses.

python benchmarks/on_gpu_data.py data/cache/recipes --task-documents 12000 --held-out-tasks 300 \
    --weights stories=.25 wikipedia=.26 plays=.13 bible=.13 speeches=.22 crawl=.01
python tools/compare_recipes.py data/cache/recipes      writes data/experiments/recipes.json; half an hour on two cores

A pair of runs that is in the folder already is not trained again.
"""

import json
import subprocess
import sys
from pathlib import Path

from gpt3lib.files import write_beside
from gpt3lib.texts import DATA

SEEDS = (0, 1, 2)
SHAPE = "--tokens 4e6 --n-ctx 256 --bandwidth 64 --batch 32 --first 2 --micro 8 --ramp 0.1 --peak 1.5"
TRAIN = f"benchmarks/on_gpu.py family --cpu {SHAPE} --problems 8 --limit 5400"


def names(seed: int) -> dict[str, str]:
    """What is compared -> the name that on_gpu.py has for the run."""
    if seed == 0:
        return {"ramp": "gpt3-1m", "constant": "gpt3-1m:constant"}
    return {"ramp": f"gpt3-1m:seed{seed}", "constant": f"gpt3-1m:constant,seed{seed}"}


def results(data: Path, seed: int) -> dict:
    """What on_gpu.py found for the pair of one seed; it is asked to train what is not there."""
    out = data / f"pair-{seed}"
    if not (out / "gpu_family.json").exists():
        asked = [*TRAIN.split(), "--data", data, "--names", *names(seed).values(), "--out", out]
        subprocess.run([sys.executable, *map(str, asked)], check=True)
    return json.loads((out / "gpu_family.json").read_text())


def mixed(losses: dict, weights: dict) -> float:
    """The held-out loss of the mixture, in nats a token: each source counts as it does in training."""
    return sum(weights[name] * found["nats"] for name, found in losses.items())


def summary(data: Path) -> dict:
    """The losses of all runs, and how they were made."""
    weights, runs = json.loads((data / "mixture.json").read_text())["weights"], {}
    for seed in SEEDS:
        found = results(data, seed)
        for way, name in names(seed).items():
            job = found["jobs"][f"{name}@1.5"]
            if not job["finished"]:
                sys.exit(f"{name} did not reach its end; remove {data / f'pair-{seed}'} and call again")
            loss = round(mixed(job["held_out"], weights), 4)
            runs[f"{way}, seed {seed}"] = {"loss": loss, "steps": job["steps"], "tokens": job["tokens"]}
    about = {key: found["about"][key] for key in ("device", "torch", "date")}
    return {"about": about | {"command": "python tools/compare_recipes.py DATA", "train": TRAIN}, "runs": runs}


def main() -> int:
    """The command line."""
    data = Path(sys.argv[1]) if len(sys.argv) == 2 else None
    if data is None or not (data / "mixture.json").is_file():
        print(__doc__.split("\n\n")[1], file=sys.stderr)
        return 2
    found = json.dumps(summary(data), indent=1) + "\n"
    write_beside(DATA / "experiments" / "recipes.json", found.encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
