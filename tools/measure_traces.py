"""What the chapter The dry run shows: one rank's step, three sizes in three layouts each, on ranks that are not there.

python tools/measure_traces.py                  writes data/experiments/traces.json; about four minutes on one free core
python tools/measure_traces.py --only gpt3-1.3b one size; the others stay as they are

Bytes, FLOPs and messages are the same on every machine with this torch; seconds and the process's own memory are not.
"""

import argparse
import json
import platform
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from datetime import date

import torch

from gpt3lib.dry_run import dry_step
from gpt3lib.files import write_beside
from gpt3lib.model import GPTConfig
from gpt3lib.parallel import AXES, Layout
from gpt3lib.plan import Rank, ledger
from gpt3lib.processes import starter
from gpt3lib.texts import DATA

ONE = {"micro_batch": 1, "bf16": True}
CASES = [  # size, layout, micro-batches; the first rank of the first stage
    ("gpt3-1.3b", Layout(fsdp=8, **ONE), 8),
    ("gpt3-1.3b", Layout(pp=2, tp=4, **ONE), 8),
    ("gpt3-1.3b", Layout(dp=2, fsdp=4, recompute="selective", **ONE), 8),
    ("gpt3-13b", Layout(fsdp=8, tp=8, **ONE), 2),
    ("gpt3-13b", Layout(pp=4, fsdp=4, tp=4, **ONE), 8),
    ("gpt3-13b", Layout(fsdp=64, recompute="full", **ONE), 2),
    ("gpt3-175b", Layout(pp=8, dp=16, tp=8, **ONE), 8),
    ("gpt3-175b", Layout(pp=8, fsdp=16, tp=8, **ONE), 8),
    ("gpt3-175b", Layout(pp=16, fsdp=8, tp=8, recompute="selective", **ONE), 16),
]


def timed(config, layout, rank: int, n_micro: int) -> tuple[dict, float, float]:
    """A trace, the seconds of one core that it took, and the GiB that its process held at most."""
    began = time.process_time()
    trace = asdict(dry_step(config, layout, rank, n_micro))
    seconds = time.process_time() - began
    try:
        import resource
    except ImportError:  # Windows
        return trace, seconds, 0.0
    unit = 1 if sys.platform == "darwin" else 1024
    return trace, seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def trace_case(size: str, layout: Layout, n_micro: int, rank: int = 0) -> dict:
    """One row: a rank's step as the real model has it, in a process of its own."""
    config = GPTConfig.from_name(size)
    with ProcessPoolExecutor(1, mp_context=starter()) as pool:
        trace, seconds, resident = pool.submit(timed, config, layout, rank, n_micro).result()
    told = {name: value for name, value in asdict(layout).items() if name in (*AXES, "recompute", *ONE)}
    row = {"size": size, "layout": told, "stage": rank * layout.pp // layout.world, "n_micro": n_micro, "trace": trace}
    return row | {"cpu_seconds": round(seconds, 1), "resident_gib": round(resident, 2)}


def off(row: dict) -> dict[str, float]:
    """How far the plan's bytes are from the traced ones, as shares."""
    config, layout, trace = GPTConfig.from_name(row["size"]), Layout(**row["layout"]), row["trace"]
    rank = Rank(config, layout, row["stage"], blocks=True)
    peak = sum(ledger(config, layout, row["n_micro"], row["stage"], blocks=True).values())
    planned = {"parameters": 4 * rank.held, "optimizer": 8 * rank.held, "activations": rank.activations, "peak": peak}
    return {name: value / trace[name] - 1 for name, value in planned.items()}


def nine_traces(cases=CASES, say=print, keep=lambda row: None) -> list[dict]:
    """All cases, each said with how far the plan is off, and kept; what the weekly check runs too."""
    rows = []
    for case in cases:
        row = trace_case(*case)
        told = ", ".join(f"{name} {share:+.2%}" for name, share in off(row).items())
        say(f"{case[0]} {case[1]} {case[1].recompute}: {told}; {row['cpu_seconds']} s", flush=True)
        rows.append(row), keep(row)
    return rows


def same_case(a: dict, b: dict) -> bool:
    """Whether two rows are of one size and layout."""
    return (a["size"], a["layout"]) == (b["size"], b["layout"])


def store(row: dict) -> None:
    """Put a row into the file, in the place of an older one."""
    path = DATA / "experiments" / "traces.json"
    rows = json.loads(path.read_text())["traces"] if path.exists() else []
    rows = [old for old in rows if not same_case(old, row)] + [row]
    order = [size for size, *_ in CASES]
    rows.sort(key=lambda row: (order.index(row["size"]), json.dumps(row["layout"])))
    about = {"torch": torch.__version__.split("+")[0], "date": str(date.today()), "machine": platform.machine()}
    about["command"] = "python tools/measure_traces.py"
    write_beside(path, (json.dumps({"about": about, "traces": rows}, indent=1) + "\n").encode())


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = sorted({size for size, *_ in CASES})
    parser.add_argument("--only", metavar="SIZE", nargs="+", choices=sizes, default=sizes)
    wanted = parser.parse_args().only
    nine_traces([case for size in wanted for case in CASES if case[0] == size], keep=store)


if __name__ == "__main__":
    main()
