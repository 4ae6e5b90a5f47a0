"""What no processor can show, measured on one GPU, the most valuable part first.

python benchmarks/on_gpu.py --data DIR                check, family, band, steps, decode, race: nine minutes
python benchmarks/on_gpu.py check band --out DIR      these parts; DIR/gpu_check.json, DIR/gpu_band.json
python benchmarks/on_gpu.py family --data DIR --names gpt3-100k gpt3-1m:dense --tokens 100e6
python benchmarks/on_gpu.py speed --data DIR          how fast each size of the family learns, and whether to compile
python benchmarks/on_gpu.py tune --data DIR DIR …     the two smallest sizes on each folder of shards, all at once
python benchmarks/on_gpu.py parallel                  many ranks' engine on one: NCCL, memory beside the plan, MFU
python benchmarks/on_gpu.py check --cpu               the same code on tiny sizes, on a processor

Every part is a few jobs, each a process of its own, some side by side. A part that is not done at its limit is
stopped, and the next one goes on; what was measured until then is kept. Each figure is written as soon as it is
known, with device, torch, date and command.
"""

import argparse
import datetime
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import on_gpu_check as checking
import on_gpu_family as family
import on_gpu_parallel as together
import on_gpu_parts as parts
from gpt3lib.files import write_beside
from gpt3lib.texts import DATA
from machine import processor
from on_gpu_parts import Results, say


@dataclass(frozen=True)
class Part:
    """labels(options) -> the names of its jobs; work(label, results, options) does one of them.

    limit: seconds for the whole part; at_once: how many jobs may run side by side (0: all).
    """

    labels: Callable
    work: Callable
    limit: float
    at_once: int = 1


PARTS = {
    "check": Part(checking.check_labels, checking.check, 90, at_once=0),
    "family": Part(family.family_labels, family.train_one, 180, at_once=0),
    "band": Part(parts.band_labels, parts.band, 50),
    "steps": Part(parts.steps_labels, parts.steps, 110),
    "decode": Part(parts.decode_labels, parts.decode, 60),
    "race": Part(parts.race_labels, parts.race_part, 50),
    "speed": Part(family.speed_labels, family.speed, 120),
    "tune": Part(family.tune_labels, family.train_one, 150, at_once=0),
    "parallel": Part(together.parallel_labels, together.parallel, 240),
}
BY_DEFAULT = [name for name in PARTS if name not in ("speed", "tune", "parallel")]


# ---- processes, and their end ----


def start(command: list[str], threads: int) -> subprocess.Popen:
    """A process with a group of its own, so that it can be stopped with all that it started."""
    env = {"OMP_NUM_THREADS": str(threads), "TORCHINDUCTOR_COMPILE_THREADS": str(max(4, threads))} | os.environ
    return subprocess.Popen(command, env=env, start_new_session=True)


def stop(process: subprocess.Popen, patience: float = 3.0) -> None:
    """Ask a process and its group to end, then make them."""
    if not hasattr(os, "killpg"):
        return process.kill()
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
            process.wait(patience)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue
    return None


def run_jobs(commands: dict[str, list[str]], at_once: int, seconds: float) -> Iterator[tuple[str, str, float]]:
    """Run the commands in their order, so many side by side; yields (name, how it ended, after how many seconds).

    Whatever runs after `seconds` is stopped, whatever has not begun is left out.
    """
    begin, waiting, running = time.monotonic(), list(commands), {}
    at_once = at_once or len(commands)
    threads = max(1, (os.cpu_count() or 1) // at_once)
    try:
        while waiting or running:
            late = time.monotonic() - begin > seconds
            if late:
                yield from ((name, f"left out: {seconds:.0f} s were over", 0.0) for name in waiting)
                waiting = []
            while waiting and len(running) < at_once:
                name = waiting.pop(0)
                running[name] = start(commands[name], threads), time.monotonic()
            for name, (process, since) in list(running.items()):
                if process.poll() is None and late:
                    stop(process)
                if process.poll() is not None:
                    del running[name]
                    how = "done" if process.returncode == 0 else f"failed ({process.returncode})"
                    how = f"stopped after {seconds:.0f} s" if late and process.returncode else how
                    yield name, how, time.monotonic() - since
            time.sleep(0.02)
    finally:
        for process, _ in running.values():
            stop(process)


# ---- one part ----


def job_file(out: Path, part: str, label: str) -> Path:
    """Where one job keeps what it found."""
    return out / "jobs" / f"{part}.{re.sub('[^A-Za-z0-9.-]+', '_', label)}.json"


def run_part(name: str, options) -> bool:
    """All jobs of a part; after each of them the part's file is written anew. Whether all of them were done."""
    part, out = PARTS[name], options.out
    seconds = options.limit or part.limit
    labels, begin = part.labels(options), time.monotonic()
    say(f"\n== {name}: {len(labels)} jobs, at most {seconds:.0f} s")
    found = {"about": about(options, name), "seconds": 0.0, "jobs": {}}
    commands, ends = {}, time.time() + seconds
    for label in labels:
        job_file(out, name, label).unlink(missing_ok=True)
        commands[label] = [sys.executable, __file__, *sys.argv[1:], "--job", name, label, "--until", str(ends)]
    at_once = options.at_once if options.at_once is not None else part.at_once
    for label, how, took in run_jobs(commands, at_once, seconds):
        path = job_file(out, name, label)
        kept = json.loads(path.read_text()) if path.exists() else {}
        found["jobs"][label] = {"state": how, "seconds": round(took, 1), **kept}
        found["seconds"] = round(time.monotonic() - begin, 1)
        write_beside(out / f"gpu_{name}.json", (json.dumps(found, indent=1) + "\n").encode())
        say(f"   {label}: {how}, {took:.1f} s")
    say(f"== {name}: {found['seconds']} s")
    return all(job["state"] == "done" for job in found["jobs"].values())


def about(options, part: str) -> dict:
    """What the figures of a part were measured on, and how to repeat it."""
    import torch

    own = [word for word in sys.argv[1:] if word not in PARTS]
    if "--out" in own:  # a folder of that machine
        place = own.index("--out")
        del own[place : place + 2]
    device = parts.device_of(options)
    name = torch.cuda.get_device_name() if device == "cuda" else processor()
    return {
        "device": name,
        "torch": torch.__version__,
        "date": str(datetime.date.today()),
        "command": " ".join(["python benchmarks/on_gpu.py", part, *own]),
    }


def whole_number(text: str) -> int:
    """A whole number, also written as 100e6."""
    value = float(text)
    if not math.isfinite(value) or value != int(value) or value < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number above 0")
    return int(value)


def read_options(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=", ".join(PARTS))
    parser.add_argument("--out", type=Path, default=DATA / "experiments", help="folder for results and models")
    parser.add_argument("--cpu", action="store_true", help="tiny sizes on a processor: a test of this script")
    parser.add_argument("--limit", type=float, help="seconds for each part, instead of its own limit")
    parser.add_argument("--at-once", type=int, help="jobs side by side, instead of the part's own number; 0: all")
    family.add_options(parser, whole_number)
    parser.add_argument("--job", nargs=2, metavar=("part", "label"), help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, default=math.inf, help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    unknown = [name for name in options.parts if name not in PARTS]
    if unknown:
        parser.error(f"there is no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    return options


def main() -> int:
    """Run the parts, each in processes of its own; 1 when one of them was not done."""
    options = read_options()
    if options.job:
        part, label = options.job
        results = Results(job_file(options.out, part, label), label)
        PARTS[part].work(label, results, options)
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what runs is stopped too
    if not options.cpu:
        parts.need_gpu()
    options.out.mkdir(parents=True, exist_ok=True)
    done = [run_part(name, options) for name in options.parts or BY_DEFAULT]
    return 0 if all(done) else 1


if __name__ == "__main__":
    sys.exit(main())
