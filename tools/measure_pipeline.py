"""A pipeline with a stopwatch: torch's 1F1B on two processes, each box of work as long as it took.

python tools/measure_pipeline.py                 writes data/experiments/pipeline.json; a minute on two free cores
python tools/measure_pipeline.py --to again.json

The same batch goes through in 2, 4, 8 and 16 micro-batches, and on one process alone. Each way is timed twenty times,
and the fastest is kept: what disturbs a machine makes it slower, never faster.
"""

import argparse
import json
import platform
import time
from dataclasses import asdict
from datetime import date
from functools import partial

import torch
import torch.distributed as dist

from gpt3lib import GPT, GPTConfig
from gpt3lib.files import write_beside
from gpt3lib.parallel import Layout
from gpt3lib.pipeline import Team, Watched
from gpt3lib.processes import together
from gpt3lib.recipe import accumulate, micro_batches
from gpt3lib.texts import DATA

CONFIG = GPTConfig(256, 64, n_layers=8, d_model=256, n_heads=4, d_head=64, bandwidth=32)
N_SEQUENCES, REPEATS = 16, 20
COUNTS = (2, 4, 8, 16)  # micro-batches


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Any tokens; how long a step takes does not depend on them."""
    tokens = torch.randint(256, (N_SEQUENCES, CONFIG.n_ctx + 1), generator=torch.Generator().manual_seed(0))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def watched(config, micro_batch, inputs, targets, repeats):
    """One rank's boxes (kind, part, micro-batch, begin, end) of each repeat, in seconds."""
    team = Team(config, Layout(pp=2, micro_batch=micro_batch))
    found, notes, count = [], [], len(inputs)
    team.stage = partial(Watched, notes)
    batches = team.batches(inputs, targets, count)
    for _ in range(repeats):
        notes.clear()
        dist.barrier()
        team.accumulate(batches, count)
        found.append(list(notes))
    return found[1:]  # the first one meets cold memory


def fastest(answers: list) -> list:
    """The boxes of each rank in the shortest repeat, from 0 on, in seconds."""

    def span(repeat):
        times = [time for boxes in repeat for box in boxes for time in box[3:]]
        return min(times), max(times)

    best = min(zip(*answers), key=lambda repeat: span(repeat)[1] - span(repeat)[0])
    zero = span(best)[0]
    return [[[*box[:3], *(round(t - zero, 5) for t in box[3:])] for box in boxes] for boxes in best]


def alone(micro_batch: int, inputs, targets) -> float:
    """The seconds of the same on one process, the fastest."""
    model, times = GPT(CONFIG), []
    for _ in range(REPEATS // 3):
        began = time.perf_counter()
        accumulate(model, micro_batches(inputs, targets, micro_batch))
        times.append(time.perf_counter() - began)
    return round(min(times), 5)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", default=str(DATA / "experiments" / "pipeline.json"), metavar="FILE")
    to = parser.parse_args().to
    torch.set_num_threads(1)
    inputs, targets = batch()
    runs = {}
    for m in COUNTS:
        size = N_SEQUENCES // m
        boxes = fastest(together(2, watched, CONFIG, size, inputs, targets, REPEATS, timeout=600))
        seconds = max(box[4] for rank in boxes for box in rank)
        busy = sum(box[4] - box[3] for rank in boxes for box in rank)
        runs[m] = {"seconds": seconds, "alone": alone(size, inputs, targets), "boxes": boxes}
        idle = 1 - busy / (2 * seconds)
        print(f"{m:2} micro-batches: {seconds:.3f} s, alone {runs[m]['alone']:.3f} s, idle {idle:.1%}")
    told = {
        "command": "python tools/measure_pipeline.py",
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, two processes with one core each",
        "torch": torch.__version__.split("+")[0],
        "config": asdict(CONFIG),
        "n_sequences": N_SEQUENCES,
        "runs": runs,
    }
    write_beside(to, (json.dumps(told) + "\n").encode())


if __name__ == "__main__":
    main()
