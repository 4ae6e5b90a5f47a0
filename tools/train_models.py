"""Train the models that data/ ships, with the code of the training chapter.

python tools/train_models.py shakespeare-1m           about 40 minutes on one core; writes data/models/shakespeare-1m
python tools/train_models.py shakespeare-1m FOLDER    the same run into another folder, to compare

The weights are stored as float16, half the size. The last lines printed are the model's entry for data/manifest.toml.
Another processor or number of threads rounds differently, so its file differs in the last digits, and so in its hash.
"""

import sys
from pathlib import Path

import torch

from gpt3lib import GPT, GPTConfig
from gpt3lib.files import sha256
from gpt3lib.texts import DATA, corpus
from gpt3lib.tokenization import Tokenizer
from gpt3lib.training import evaluate, train, training_and_validation

CONFIGS = {"shakespeare-1m": GPTConfig.from_name("gpt3-1m", n_ctx=256, bandwidth=256)}
RECIPES = {"shakespeare-1m": {"n_steps": 6000, "batch_size": 8, "peak": 3e-3, "warmup": 200, "seed": 0}}
EVERY = 100  # steps between two lines of the log


def train_model(name: str) -> GPT:
    """Train one model of RECIPES from its seed, on one thread so that sums keep their order."""
    torch.set_num_threads(1)
    tokenizer = Tokenizer.load(DATA / "tokenizer-4353.bpe")
    training, validation = training_and_validation(tokenizer, corpus())
    model = GPT(CONFIGS[name], seed=RECIPES[name]["seed"])

    def log(step: int, loss: float) -> None:
        if (step + 1) % EVERY == 0:
            print(f"step {step + 1}: loss {loss:.3f}, held out {evaluate(model, validation):.3f}", flush=True)

    train(model, training, on_step=log, **RECIPES[name])
    return model


def manifest_entry(name: str, folder: Path) -> str:
    """The lines of data/manifest.toml that name a trained model's files."""
    lines = [f"[models.{name}]", f'command = "python tools/train_models.py {name}"']
    for file in ("model.safetensors", "config.json"):
        lines.append(f'"{file}" = "{sha256(folder / file)}"')
    return "\n".join(lines)


def main() -> int:
    """The command line."""
    name, *rest = sys.argv[1:] or [""]
    if name not in RECIPES or len(rest) > 1:
        print(f"usage: python tools/train_models.py {' | '.join(RECIPES)} [FOLDER]", file=sys.stderr)
        return 2
    folder = Path(rest[0]) if rest else DATA / "models" / name
    train_model(name).half().save_pretrained(folder)
    print(manifest_entry(name, folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
