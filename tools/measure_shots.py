"""How many answers of each task are right, by the number of examples in the prompt, for every size that is shipped.

python tools/measure_shots.py                writes data/experiments/shots.json; about two hours on one free core
python tools/measure_shots.py --minutes 40   stops after that; another call goes on, and makes the points finer
python tools/measure_shots.py --models gpt3-1m --tasks jsx --to again.json    one curve, once more

Each point is a number of problems, 100 at first and more in later rounds. Problem i of a point is a function of the
seed, the task, the number of examples and i, so a point of 300 is the point of 200 and 100 problems more. What is in
the file is not measured again, unless the model's file has another hash.
"""

import argparse
import contextlib
import json
import platform
import time
from datetime import date
from pathlib import Path

import torch

from gpt3lib import GPT
from gpt3lib.files import find_folder, pick_device, sha256, write_beside
from gpt3lib.prompting import SHOTS, few_shot_prompts, look, n_tracks
from gpt3lib.sizes import SIZES
from gpt3lib.tasks import TASKS
from gpt3lib.texts import DATA, manifest
from gpt3lib.tokenization import Tokenizer

CURVES = "copy reverse sort RW A2 affix jsx meaning".split()  # tasks with all numbers of examples
SHOWN = "CL A1 RI 2D+ category recall".split()  # of the others, those that the chapter shows
FEW = (0, 1, 32)
SEED, BATCH = 0, 8192  # tokens at a time


def shipped() -> list[str]:
    """The sizes of the family whose weights the manifest lists, the smallest first."""
    return sorted((name for name in manifest()["models"] if name in SIZES), key=lambda name: SIZES[name]["d_model"])


def weights_hash(name: str) -> str:
    """The first 16 digits of the hash of a model's weights."""
    folder = find_folder(DATA / "models" / name, lambda folder: None)
    files = sorted(folder.glob("*.safetensors"))
    return sha256("".join(map(sha256, files)).encode() if len(files) > 1 else files[0])[:16]


def plan(models: list[str]) -> list[tuple[str, str, int, bool, int]]:
    """(model, task, number of examples, described, problems), what matters most first."""
    rest, largest, points = [*SHOWN, *(name for name in TASKS if name not in (*CURVES, *SHOWN))], models[-1], []
    small = [name for name in models if SIZES[name]["d_model"] < 100]  # so fast that all problems come at once
    for n_curve, n_rest in ((100, 0), (100, 50), (200, 50), (300, 100), (400, 200), (500, 200)):
        points += [(m, t, k, True, 500 if m in small else n_curve) for m in models for t in CURVES for k in SHOTS]
        points += [(largest, t, k, False, n_curve) for t in CURVES for k in (0, 1, 8, 32) if n_rest]
        points += [(m, t, k, True, n_rest) for m in models[::-1] for t in rest for k in FEW if n_rest]
    return points


def count_right(model, tokenizer, task: str, shots: int, described: bool, first: int, n: int) -> int:
    """Right answers among problems first … first + n - 1, in batches of similar lengths."""
    rows = few_shot_prompts(tokenizer, task, shots, n, SEED, n_ctx=model.config.n_ctx, first=first, described=described)
    rows, right = sorted(rows, key=n_tracks), 0
    while rows:
        size = max(1, BATCH // n_tracks(rows[-1]))
        rows, some = rows[:-size], rows[-size:]
        right += sum(look(model, some))
    return right


def written(results: dict) -> str:
    """JSON with a point on each line."""
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(point)}" for key, point in results["points"].items())
    return f'{{"about": {json.dumps(results["about"])},\n"points": {{\n{lines}\n}}}}\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=shipped())
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--shots", nargs="+", type=int, default=list(SHOTS))
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--to", type=Path, default=DATA / "experiments" / "shots.json")
    options = parser.parse_args()
    results = {"about": {"command": "python tools/measure_shots.py", "seed": SEED}, "points": {}}
    with contextlib.suppress(FileNotFoundError):
        results = json.loads(options.to.read_text())
    begin, device, points = time.time(), pick_device(), results["points"]
    hashes, models = {name: weights_hash(name) for name in options.models}, {}
    for name, task, shots, described, n in plan(options.models):
        if task not in options.tasks or shots not in options.shots:
            continue
        if name not in models:
            home = DATA / "models" / name
            models[name] = GPT.from_pretrained(home).to(device).eval(), Tokenizer.load(home / "merges.txt")
        key = f"{name} {task} {shots}" + ("" if described else " plain")
        point = points.get(key, {})
        if point.get("model") != hashes[name]:
            point = {"right": 0, "n": 0}
        if point["n"] >= n:
            continue
        with torch.no_grad():
            right = count_right(*models[name], task, shots, described, point["n"], n - point["n"])
        points[key] = {"right": point["right"] + right, "n": n, "model": hashes[name], "date": str(date.today())}
        results["about"] |= {"torch": torch.__version__, "device": f"{device.type}, {platform.machine()}"}
        write_beside(options.to, written(results).encode())
        print(f"{time.time() - begin:6.0f} s  {key}: {points[key]['right']} of {n}", flush=True)
        if time.time() - begin > 60 * options.minutes:
            return


if __name__ == "__main__":
    main()
