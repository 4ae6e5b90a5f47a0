"""Run the notebooks as other processors would, and say for each whether every stored output came out again.

python tools/elsewhere.py                    all of PROCESSORS, every chapter
python tools/elsewhere.py avx2               one of them
python tools/elsewhere.py --chapters 04_attention 13_training

The switches are those of the three libraries that choose their instructions by the processor: ATen (torch's own
loops), MKL (matrix products) and oneDNN (products in half precision). The number of threads decides how sums are cut.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import execute

ROOT = Path(__file__).resolve().parent.parent
# name -> (ATEN_CPU_CAPABILITY, MKL_CBWR, ONEDNN_MAX_CPU_ISA, threads)
PROCESSORS = {
    "sse": ("default", "COMPATIBLE", "SSE41", 1),
    "avx": ("default", "AVX", "AVX", 2),
    "avx2": ("avx2", "AVX2", "AVX2", 4),
    "own": (None, None, None, 2),  # whatever this processor has
}
SWITCHES = ("ATEN_CPU_CAPABILITY", "MKL_CBWR", "ONEDNN_MAX_CPU_ISA", "BOOK_THREADS")


def environment(name: str) -> dict[str, str]:
    """This process's variables with the switches of one of PROCESSORS."""
    kept = {key: value for key, value in os.environ.items() if key not in SWITCHES}
    # four threads on two cores: MKL must not make two of them, and they must not wait in circles
    kept |= {"MKL_DYNAMIC": "FALSE", "OMP_WAIT_POLICY": "passive"}
    return kept | {key: str(value) for key, value in zip(SWITCHES, PROCESSORS[name]) if value is not None}


def command(chapters: list[str], jobs: int) -> list[str]:
    """pytest on these notebooks; each is one unit of work, so the longest decides."""
    paths = [f"book/{chapter}.ipynb" for chapter in chapters]
    return [sys.executable, "-m", "pytest", "-q", "-n", str(jobs), "-p", "no:cacheprovider", *paths]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("processors", nargs="*", metavar="processor", help=", ".join(PROCESSORS))
    parser.add_argument("--chapters", nargs="+", default=execute.chapters(), help="by default all")
    parser.add_argument("--jobs", type=int, default=2, help="notebooks at once")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.processors if name not in PROCESSORS]
    if unknown:
        parser.error(f"no processor {', '.join(unknown)}; there are {', '.join(PROCESSORS)}")
    red = []
    for name in options.processors or PROCESSORS:
        switches = " ".join(f"{key}={value}" for key, value in environment(name).items() if key in SWITCHES)
        print(f"==> {name}: {switches}", flush=True)
        start = time.monotonic()
        done = subprocess.run(
            command(options.chapters, options.jobs), cwd=ROOT, env=environment(name), capture_output=True, text=True
        )
        last = done.stdout.strip().rsplit("\n", 1)[-1]
        if done.returncode:
            red.append(name)
            print(done.stdout + done.stderr)
        print(f"    {last.strip('= ')} ({time.monotonic() - start:.0f} s)", flush=True)
    print(f"red: {', '.join(red)}" if red else "every output came out again, everywhere")
    return int(bool(red))


if __name__ == "__main__":
    sys.exit(main())
