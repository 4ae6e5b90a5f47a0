"""Tokenizing beside tiktoken, and the loader beside the model it feeds: turn by turn, the fastest of some turns.

python benchmarks/loading.py            print what is measured, some minutes
python benchmarks/loading.py --store    also write data/experiments/loading.json, which the book shows
"""

import argparse
import datetime
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from gpt3lib import GPT, GPTConfig
from gpt3lib.files import write_beside
from gpt3lib.loading import Loader, read_documents, write_tokens
from gpt3lib.texts import DATA, corpus
from gpt3lib.tokenization import Tokenizer
from gpt3lib.training import make_optimizer
from machine import processor

GIGABYTE = 10**9


def seconds(work) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def tokenizing(folder: Path, tokenizer, turns: int, n_threads: int) -> list[str]:
    """Megabytes a second of tiktoken's own batches and of write_tokens, for long and for short documents."""
    encoding, lines = tokenizer.to_tiktoken("race"), []
    long = corpus()
    for name, texts in {"104 long": long, "39,000 short": [p for text in long for p in text.split("\n\n")]}.items():
        size, times = sum(len(text.encode()) for text in texts), {"tiktoken": [], "gpt3lib": []}
        for turn in range(turns):
            place = folder / f"{len(texts)}-{turn}"
            ours = lambda: write_tokens(texts, place, tokenizer, n_threads=n_threads)  # noqa: B023
            theirs = lambda: encoding.encode_ordinary_batch(texts, num_threads=n_threads)  # noqa: B023
            times["tiktoken"].append(seconds(theirs))
            times["gpt3lib"].append(seconds(ours))
        rates = {who: size / min(times[who]) / 1e6 for who in times}
        ratio = statistics.median(b / a for a, b in zip(times["gpt3lib"], times["tiktoken"]))
        lines.append(
            f"{name} documents: tiktoken alone {rates['tiktoken']:.1f} MB/s, "
            f"written as shards {rates['gpt3lib']:.1f} MB/s, ratio {ratio:.2f}"
        )
        print(lines[-1], flush=True)
    return lines


def one_gigabyte(folder: Path, tokenizer, n_threads: int) -> list[str]:
    """How far the memory of this process grows for a file of a gigabyte that is one document."""
    import resource  # Linux and macOS only

    text, size = "\n\n".join(corpus()), 0
    with open(folder / "big.txt", "w", encoding="utf-8") as file:
        while size < GIGABYTE:
            size += file.write(text)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tokens = write_tokens(read_documents(folder / "big.txt"), folder / "big", tokenizer, n_threads=n_threads)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * (1 if sys.platform == "darwin" else 1024)
    line = f"one document of {size / 1e9:.1f} GB: {len(tokens):,} tokens, memory grew by {grown / 1e6:.0f} MB"
    print(line, flush=True)
    return [line]


def feeding(folder: Path, tokenizer, turns: int) -> list[str]:
    """Tokens a second that the loader gives and that the smallest of the book's models learns from."""
    loader = Loader({"a": write_tokens(corpus(), folder / "a", tokenizer)}, {"a": 1}, n_ctx=1024)
    model = GPT(GPTConfig.from_name("gpt3-100k", n_ctx=1024))
    optimizer, times = make_optimizer(model), {"loader": [], "model": []}

    def step(inputs, targets):
        optimizer.zero_grad()
        model.loss(inputs, targets).backward()
        optimizer.step()

    for turn in range(turns):
        times["loader"].append(seconds(lambda: loader.sequences(8 * turn, 8)))  # noqa: B023
        times["model"].append(seconds(lambda: step(*loader.sequences(8 * turn, 8))))  # noqa: B023
    rates = {who: 8 * 1024 / min(times[who]) for who in times}
    line = (
        f"the loader gives {rates['loader']:,.0f} tokens/s, gpt3-100k learns from {rates['model']:,.0f}: "
        f"{rates['loader'] / rates['model']:,.0f} times as many"
    )
    print(line, flush=True)
    return [line]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", action="store_true")
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args()
    tokenizer, threads = Tokenizer.load(DATA / "tokenizer-4353.bpe"), torch.get_num_threads()
    folder = Path(tempfile.mkdtemp())
    try:
        big = one_gigabyte(folder, tokenizer, threads)  # first: memory that was used stays counted
        lines = tokenizing(folder, tokenizer, arguments.turns, threads)
        lines += feeding(folder, tokenizer, arguments.turns) + big
    finally:
        shutil.rmtree(folder)
    if arguments.store:
        about = {"processor": processor(), "threads": threads, "date": datetime.date.today().isoformat()}
        about |= {"command": "python benchmarks/loading.py --store"}
        data = json.dumps({"about": about, "lines": lines}, indent=1) + "\n"
        write_beside(DATA / "experiments" / "loading.json", data.encode())


if __name__ == "__main__":
    main()
