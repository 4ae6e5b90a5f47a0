"""What the chapter Scaling laws fits: how well every shipped size knows text that none of them has read.

python tools/measure_scaling.py              writes data/experiments/scaling.json; about ten minutes on one free core
python tools/measure_scaling.py --runs DATA  adds a short run that reaches its own end; ten minutes more

Each window of 1,024 held-out tokens has its loss stored, so that a fit can be made again with other windows. DATA are
the shards that the sizes were trained on (`benchmarks/on_gpu_data.py`); a run that is in DATA/runs already is not made
again. What is measured differs from processor to processor in the last digits only.
"""

import argparse
import json
import platform
import subprocess
import sys
from datetime import date
from pathlib import Path

import torch

from gpt3lib import GPT
from gpt3lib.data import family_split
from gpt3lib.files import write_beside
from gpt3lib.texts import DATA
from gpt3lib.tokenization import Tokenizer
from gpt3lib.training import pack, windows
from measure_shots import shipped, weights_hash

PLACE = DATA / "experiments" / "scaling.json"
N_WINDOWS, N_CTX = 32, 1024  # of each source, spread evenly; one shorter one where there is less text
# tokens, a little more than where the long run was looked at. Until then it had the same warm-up and batches of 8
# sequences, too: what differs is that this one ends, and so its learning rate falls
WARMUP = 1.8e6
SHORT = [("gpt3-100k", 5e6)]
TRAIN = "benchmarks/on_gpu.py family --cpu --n-ctx 1024 --bandwidth 128 --batch 8 --first 8 --micro 8 --peak 1.5"


def in_windows(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets of windows spread evenly over a text; none overlap. A short text is one window."""
    n_ctx = min(N_CTX, len(tokens) - 1)
    n = min(N_WINDOWS, (len(tokens) - 1) // n_ctx)
    return windows(tokens, n_ctx, torch.tensor([i * (len(tokens) - n_ctx - 1) // max(1, n - 1) for i in range(n)]))


def bytes_per_token(texts: dict[str, list[str]], tokenizer) -> dict[str, float]:
    """How many bytes of text a token of this tokenizer holds, source by source."""
    whole = {name: "\n".join(documents) for name, documents in texts.items()}
    return {name: round(len(t.encode()) / len(tokenizer.encode(t)), 4) for name, t in whole.items()}


@torch.no_grad()
def losses(model: GPT, tokens: torch.Tensor) -> list[float]:
    """Nats a token of each window."""
    rows = zip(*in_windows(tokens))
    return [round(model.loss(x[None].long(), y[None].long()).item(), 4) for x, y in rows]


def measure(found: dict) -> None:
    """The windows' losses for every size, and the length of tokens; what is there stays."""
    exam, ours = family_split()[1], Tokenizer.load(DATA / "models" / "gpt3-1m" / "merges.txt")
    text = {name: pack(ours, documents) for name, documents in exam.items()}
    for name in shipped():
        told = found["sizes"].get(name, {})
        if told.get("model") != weights_hash(name):
            model = GPT.from_pretrained(DATA / "models" / name)
            told = {"model": weights_hash(name), "losses": {source: losses(model, t) for source, t in text.items()}}
            found["sizes"][name] = told
            save(found)
            print(name, {source: round(sum(some) / len(some), 4) for source, some in told["losses"].items()})
    if "bytes" not in found:
        found["bytes"] = {"ours": bytes_per_token(exam, ours), "GPT-2": bytes_per_token(exam, Tokenizer.gpt2())}
        save(found)


def train(found: dict, data: Path) -> None:
    """The short runs, by the code that trained the family, on the same shards."""
    for name, n in SHORT:
        out = data / "runs" / f"{name}-{n:g}"
        if not (out / "gpu_family.json").exists():
            asked = f"--problems 1 --limit 10000 --tokens {n:g} --warmup {WARMUP / n:.4f} --names {name}"
            command = [*f"{TRAIN} {asked}".split(), "--data", data, "--out", out]
            subprocess.run([sys.executable, *map(str, command)], check=True)
        (job,) = json.loads((out / "gpu_family.json").read_text())["jobs"].values()
        tokens, last = [*job["curve"].items()][-1]
        found["runs"].setdefault(name, {})[tokens] = last
        save(found)
    found["about"]["train"] = TRAIN


def save(found: dict) -> None:
    """One line for each size and run."""
    lines = [f'"about": {json.dumps(found["about"])}']
    for part in ("sizes", "runs"):
        inside = ",\n".join(f'"{name}": {json.dumps(told)}' for name, told in found[part].items())
        lines.append(f'"{part}": {{\n{inside}\n}}')
    if "bytes" in found:
        lines.append(f'"bytes": {json.dumps(found["bytes"])}')
    write_beside(PLACE, ("{" + ",\n".join(lines) + "}\n").encode())


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, metavar="DATA", help="shards, for the short runs")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = {"sizes": {}, "runs": {}} | (json.loads(PLACE.read_text()) if PLACE.exists() else {})
    about = {"command": "python tools/measure_scaling.py", "date": f"{date.today()}", "torch": torch.__version__}
    found["about"] = found.get("about", {}) | about | {"device": f"cpu, {platform.machine()}"}
    measure(found)
    if given.runs:
        train(found, given.runs)
    save(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
