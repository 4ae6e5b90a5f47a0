r"""The data that on_gpu.py trains the family on: token shards of the book's text and of its tasks, and their mixture.

python benchmarks/on_gpu_data.py OUT                          OUT/train/NAME, OUT/held_out/NAME, OUT/mixture.json
python benchmarks/on_gpu_data.py OUT --pack                   for a machine without a network: OUT/text.json.xz and
                                                              OUT/merges.txt, which another call reads with --packed
python benchmarks/on_gpu_data.py OUT --packed FOLDER          the same shards, from there
python benchmarks/on_gpu_data.py OUT --vocab 2049 --plain     other ids; digits and letters not written apart

What the models in data/models were trained on:
python benchmarks/on_gpu_data.py data/cache/family \
    --weights stories=.25 wikipedia=.26 plays=.13 bible=.13 speeches=.22 crawl=.01

Tasks are documents 0, 1, 2 … of gpt3lib.tasks with seed 0; those held out have seed 1. One tokenizer is learned from
all text and a tenth as much of the tasks, with a line break between digits, so that each digit is a token of its own.
"""

import argparse
import functools
import json
import lzma
import multiprocessing
import os
import re
import sys
from pathlib import Path

from gpt3lib import Tokenizer, tasks
from gpt3lib.files import write_beside
from gpt3lib.loading import write_tokens

TASK_BYTES = 1200  # of a document, about


def family_text() -> dict:
    """The text to train on, that held out, and the weights of its sources."""
    from gpt3lib import data

    train, held_out = data.family_split()
    return {"train": train, "held_out": held_out, "weights": data.FAMILY_WEIGHTS}


def learn(texts: dict[str, list[str]], vocab_size: int, spaced: bool) -> Tokenizer:
    """The family's tokenizer; with 257 ids it knows bytes alone."""
    whole = "\n".join(document for each in texts.values() for document in each)
    n = int(len(whole) * 0.1 / TASK_BYTES)
    whole = "\n".join([whole, *(tasks.numbered(0, i, spaced) for i in range(n))])
    return Tokenizer.train(re.sub(r"(?<=\d)(?=\d)", "\n", whole), vocab_size)


def pack(folder: Path, text: dict, tokenizer: Tokenizer) -> None:
    """Write text and tokenizer for another machine."""
    folder.mkdir(parents=True, exist_ok=True)
    write_beside(folder / "text.json.xz", lzma.compress(json.dumps(text).encode()))
    tokenizer.save(folder / "merges.txt")


def unpack(folder: Path) -> tuple[dict, Tokenizer]:
    """What `pack` wrote."""
    return json.loads(lzma.decompress((folder / "text.json.xz").read_bytes())), Tokenizer.load(folder / "merges.txt")


def mixture(weights: dict[str, float], task_share: float) -> dict[str, float]:
    """Shares of all sources, tasks among them; they add up to 1."""
    total = sum(weights.values())
    return {name: weight / total * (1 - task_share) for name, weight in weights.items()} | {"tasks": task_share}


def write(out: Path, text: dict, tokenizer, n_tasks: int, task_share: float, spaced: bool, n_held_out: int) -> None:
    """Write all shards, then mixture.json, without which on_gpu.py takes the folder for unfinished."""
    numbered = functools.partial(tasks.numbered, 0, spaced=spaced)
    with multiprocessing.get_context("spawn").Pool(min(8, os.cpu_count() or 1)) as pool:
        lines = {"train": list(pool.imap(numbered, range(n_tasks), chunksize=500))}
    lines["held_out"] = [tasks.numbered(1, i, spaced) for i in range(n_held_out)]
    for part, more in lines.items():
        for name, documents in (text[part] | {"tasks": more}).items():
            found = write_tokens(documents, out / part / name, tokenizer)
            print(f"{part}/{name}: {len(found):,} tokens, {found.bytes_per_token:.3f} bytes each", flush=True)
    shares = {"weights": mixture(text["weights"], task_share), "spaced": spaced}
    write_beside(out / "mixture.json", (json.dumps(shares, indent=1) + "\n").encode())


def weight(word: str) -> tuple[str, float]:
    """NAME=SHARE."""
    name, _, share = word.partition("=")
    return name, float(share)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--pack", action="store_true", help="write text and tokenizer only")
    parser.add_argument("--packed", type=Path, help="folder that an earlier --pack wrote")
    parser.add_argument("--vocab", type=int, default=4353, help="ids; 257 are bytes")
    parser.add_argument("--plain", action="store_true", help="digits and letters as in running text")
    parser.add_argument("--task-documents", type=int, default=104_166, help="about 1,200 bytes each")
    parser.add_argument("--held-out-tasks", type=int, default=600)
    parser.add_argument("--task-share", type=float, default=0.6, help="of all sequences")
    parser.add_argument("--weights", type=weight, nargs="+", metavar="NAME=SHARE", help="of the sources of text")
    given = parser.parse_args(words)
    if (given.out / "mixture.json").exists():
        sys.exit(f"{given.out} holds data already; choose another folder")
    if given.packed:
        text, tokenizer = unpack(given.packed)
    else:
        text = family_text()
        tokenizer = learn(text["train"], given.vocab, not given.plain)
    if given.weights:
        text["weights"] = dict(given.weights)
    unknown = text["weights"].keys() ^ text["train"].keys()
    if unknown:
        sys.exit(f"--weights: {sorted(unknown)[0]}; give one weight for each of {', '.join(text['train'])}")
    if given.pack:
        return pack(given.out, text, tokenizer)
    n, n_held_out = given.task_documents, given.held_out_tasks
    return write(given.out, text, tokenizer, n, given.task_share, not given.plain, n_held_out)


if __name__ == "__main__":
    main()
