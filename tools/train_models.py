"""Train the models that data/ ships, with the code of the training chapter.

python tools/train_models.py gpt3-1m     about 40 minutes on one core; writes data/models/gpt3-1m

The weights are stored as float16, half the size; the hash of the file goes into data/manifest.toml by hand.
"""

import hashlib
import sys
from pathlib import Path

import torch

from gpt3lib.model import GPT, GPTConfig
from gpt3lib.texts import DATA, corpus
from gpt3lib.tokenization import Tokenizer
from gpt3lib.training import evaluate, train, training_and_validation

STEPS = {"gpt3-1m": 6000}


def main(name: str) -> None:
    """Train one model and store it."""
    torch.set_num_threads(1)
    tokenizer = Tokenizer.load(DATA / "tokenizer-4353.bpe")
    training, validation = training_and_validation(tokenizer, corpus())
    torch.manual_seed(0)
    model = GPT(GPTConfig.from_name(name))

    def log(step: int, loss: float) -> None:
        if step % 100 == 99:
            print(
                f"step {step + 1} of {STEPS[name]}: loss {loss:.3f}, validation {evaluate(model, validation):.3f}",
                flush=True,
            )

    train(model, training, STEPS[name], batch_size=8, peak=3e-3, warmup=200, on_step=log)
    folder = DATA / "models" / name
    model.half().save_pretrained(folder)
    print(folder, hashlib.sha256(Path(folder / "model.safetensors").read_bytes()).hexdigest())


if __name__ == "__main__":
    main(sys.argv[1])
