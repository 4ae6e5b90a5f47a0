"""Train the same small model with dense, alternating and banded layers, three seeds each, and store what came out.

python tools/compare_bands.py    writes data/experiments/bands.json; about twenty minutes on one core

A run that was cut goes on: what is in the file is not computed again.
"""

import json
import platform
import time
from datetime import date
from pathlib import Path

import torch

from gpt3lib import GPT, GPTConfig
from gpt3lib.files import write_beside
from gpt3lib.texts import DATA, corpus
from gpt3lib.tokenization import Tokenizer
from gpt3lib.training import evaluate, train, training_and_validation

STACKS = {
    "dense": ("dense",),
    "dense first": ("dense", "banded"),
    "band first": ("banded", "dense"),
    "banded": ("banded",),
}
SEEDS, N_STEPS, BANDWIDTH = (0, 1, 2), 600, 16
PLACE = Path(DATA) / "experiments" / "bands.json"


def one_run(attention, seed: int, training, validation, vocab_size: int) -> dict:
    """Held-out loss in nats and the median CPU seconds of a step."""
    shape = {"n_ctx": 256, "n_layers": 4, "d_model": 96, "n_heads": 4, "d_head": 24}
    model = GPT(GPTConfig(vocab_size, **shape, attention=attention, bandwidth=BANDWIDTH), seed)
    clock = [time.process_time()]
    train(model, training, N_STEPS, batch_size=8, seed=seed, on_step=lambda *_: clock.append(time.process_time()))
    steps = sorted(later - earlier for earlier, later in zip(clock, clock[1:]))
    return {"loss": round(evaluate(model, validation, 64), 4), "step": round(steps[len(steps) // 2], 4)}


def main() -> None:
    torch.set_num_threads(1)
    tokenizer = Tokenizer.load(DATA / "tokenizer-4353.bpe")
    training, validation = training_and_validation(tokenizer, corpus())
    about = {"command": "python tools/compare_bands.py", "date": str(date.today()), "machine": platform.machine()}
    about |= {"torch": torch.__version__, "steps": N_STEPS, "bandwidth": BANDWIDTH, "tokens": N_STEPS * 8 * 256}
    results = json.loads(PLACE.read_text()) if PLACE.exists() else {"about": about, "runs": {}}
    for seed in SEEDS:
        for name, attention in STACKS.items():
            if f"{name}, seed {seed}" not in results["runs"]:
                run = one_run(attention, seed, training, validation, tokenizer.vocab_size)
                results["runs"][f"{name}, seed {seed}"] = run
                write_beside(PLACE, (json.dumps(results, indent=1) + "\n").encode())
                print(f"{name}, seed {seed}: {run}", flush=True)


if __name__ == "__main__":
    main()
