"""The whole grid of layouts beside one process, ten kills, nine traces: what the suite has no time for.

python tools/measure_parallel.py                     writes data/experiments/parallel.json; an hour on two cores
python tools/measure_parallel.py --only stages       one check; the others keep what the file has of them
python tools/measure_parallel.py --to again.json

The test suite has each mix once or twice, in covering pairs, and one kill and one trace. Exit 1 when a check fails.
A check is a function in CHECKS: it returns rows, dicts of numbers and words, and raises AssertionError.
"""

import argparse
import itertools
import json
import platform
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import torch

from gpt3lib.files import write_beside
from gpt3lib.parallel import RECOMPUTE, Layout
from gpt3lib.processes import together
from gpt3lib.texts import DATA

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import deadly_ranks
import measure_traces
import ranks
import teams

WITHOUT = [*({axis: n} for n in (2, 4) for axis in ("cp", "dp", "fsdp", "tp"))]
WITHOUT += [dict.fromkeys(pair, 2) for pair in itertools.combinations(("cp", "dp", "fsdp", "tp"), 2)]
WITH = [{"pp": 2}, {"pp": 4}, *({"pp": 2, axis: 2} for axis in ("cp", "dp", "fsdp", "tp"))]
LIMITS = {"losses": ranks.LOSS, "norms": ranks.LOSS, "gradients": ranks.GRADIENTS, "weights": ranks.WEIGHTS}


def row(layout, shape, found: list[dict], seconds: float) -> dict:
    """What a launch found, the worst of its ranks."""
    tables = [far["tables"] for far in found if far["tables"]]
    return {
        "layout": str(layout),
        "parts a rank": layout.chunks,
        "recompute": layout.recompute,
        "attention": list(shape.attention),
        **{name: float(f"{max(far[name] for far in found):.1e}") for name in LIMITS},
        "born": max(far["born"] for far in found),
        "copies equal": all(held == tables[0] for held in tables),
        "seconds": round(seconds, 1),
    }


def grid(mixes: list[dict], chunks: tuple) -> list[dict]:
    """Twenty steps of each mix with every switch, a launch for each mix."""
    rows = []
    for mix in mixes:
        for n, kind in itertools.product(chunks, ranks.KINDS):
            shape = ranks.config(kind, n_layers=8 if mix.get("pp", 1) * n == 8 else 4)
            for recompute in RECOMPUTE:
                layout, began = Layout(**mix, chunks=n, recompute=recompute, micro_batch=2), time.perf_counter()
                case = (layout, shape, teams.alone(shape), ranks.ROWS)
                found = [far for (far,) in together(layout.world, teams.train_all, [case], timeout=300)]
                rows.append(row(layout, shape, found, time.perf_counter() - began))
                print(rows[-1], flush=True)
    for found in rows:
        far = [name for name, limit in LIMITS.items() if found[name] > limit]
        assert not far and found["born"] == 0 and found["copies equal"], f"{found}: {', '.join(far)}"
    return rows


def without_stages() -> list[dict]:
    """Replicas, shards, parts of matrices and of texts."""
    return grid(WITHOUT, chunks=(1,))


def with_stages() -> list[dict]:
    """The same inside the stages of a pipeline, 1F1B and interleaved."""
    return grid(WITH, chunks=(1, 2))


def ten_kills() -> list[dict]:
    """A random rank of two is shot at a random moment: the run ends as the one that nobody touched, to the last bit."""
    rows = []
    with tempfile.TemporaryDirectory() as place:
        right = Path(place) / "right"
        calm = deadly_ranks.torchrun(2, right, '{"fsdp": 2}')
        assert calm.returncode == 0, calm.stdout[-3000:]
        for seed in range(10):
            rank, step = deadly_ranks.kill_at_random(Path(place) / str(seed), seed)
            wrong = deadly_ranks.differences(Path(place) / str(seed), right)
            assert not wrong, f"seed {seed}, rank {rank} shot behind step {step}: {', '.join(wrong)} differ"
            rows.append({"seed": seed, "rank": rank, "behind step": step})
            print(rows[-1], flush=True)
    return rows


TRACED = {"parameters": 0.01, "optimizer": 0.01, "activations": 0.01, "peak": 0.05}  # how far the plan may be off


def nine_traces() -> list[dict]:
    """Three sizes in three layouts each, traced on ranks that are not there, beside the plan's bytes."""
    rows = []
    for found in measure_traces.nine_traces():
        off = {name: round(share, 4) for name, share in measure_traces.off(found).items()}
        layout = str(Layout(**found["layout"]))
        rows.append({"size": found["size"], "layout": layout, "cpu seconds": found["cpu_seconds"], "off": off})
        far = [name for name, limit in TRACED.items() if abs(off[name]) > limit]
        assert not far, f"{rows[-1]}: {', '.join(far)}"
    return rows


CHECKS = {"mixes": without_stages, "stages": with_stages, "kills": ten_kills, "traces": nine_traces}


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[*CHECKS], action="append", metavar="CHECK", help=", ".join(CHECKS))
    parser.add_argument("--to", default=str(DATA / "experiments" / "parallel.json"), metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(1)
    to, wrong = Path(options.to), []
    told = json.loads(to.read_text()) if to.exists() else {}
    for name in options.only or CHECKS:
        began = time.perf_counter()
        try:
            rows = CHECKS[name]()
        except AssertionError as error:
            wrong.append(f"{name}: {error}")
            continue
        told[name] = {
            "command": "python tools/measure_parallel.py",
            "date": date.today().isoformat(),
            "machine": platform.machine(),
            "torch": torch.__version__.split("+")[0],
            "seconds": round(time.perf_counter() - began),
            "rows": rows,
        }
        write_beside(to, (json.dumps(told, indent=1) + "\n").encode())
        print(f"{name}: {len(rows)} rows in {told[name]['seconds']} s", flush=True)
    print(*wrong, sep="\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
