"""The engine of many ranks on one GPU: NCCL with a single rank, memory beside the plan, speed and MFU.

A job is named size way[ compiled], such as "gpt3-1.3b full": the same Team as on a thousand ranks, in bfloat16, one
update of a few micro-batches. The peak that torch's allocator saw stands beside the plan's.
"""

import contextlib
import statistics
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

from gpt3lib import GPTConfig
from gpt3lib.parallel import Layout
from gpt3lib.pipeline import Team
from gpt3lib.plan import LINES, ledger
from on_gpu_parts import PUBLISHED, Results, clock, device_of, peaks, say, step_flops, tokens_for, wait

N_MICRO = 3  # micro-batches of an update
LIMIT = 0.05  # how far the plan's peak may be from the allocator's
ROWS = {"gpt3-125m": 16, "gpt3-1.3b": 4, "gpt3-2.7b": 2, "gpt3-100k": 1}  # texts of a micro-batch
JOBS = ["gpt3-1.3b none", "gpt3-1.3b full", "gpt3-125m none", "gpt3-125m full", "gpt3-2.7b full", "gpt3-1.3b selective"]
COMPILED = ["gpt3-1.3b none compiled", "gpt3-125m none compiled"]


def parallel_labels(options) -> list[str]:
    """The sizes, with and without recomputation, the most valuable first; small ones on a processor."""
    return ["gpt3-100k none", "gpt3-100k full"] if options.cpu else [*JOBS, *COMPILED]


@contextlib.contextmanager
def alone(device: str):
    """A process group of one rank: NCCL on a GPU, gloo on a processor."""
    backend = "nccl" if device == "cuda" else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(backend, init_method=(Path(folder) / "meet").as_uri(), rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


def layout_of(label: str) -> tuple[str, Layout]:
    """A job's size, and its layout: one rank."""
    size, way, *words = label.split()
    return size, Layout(micro_batch=ROWS[size], recompute=way, bf16=True, compile="compiled" in words)


def planned_bytes(config, layout: Layout, device: str) -> dict[str, float]:
    """The plan's ledger at the fullest moment; on a GPU a band is one kernel, elsewhere it is computed in blocks."""
    return ledger(config, layout, N_MICRO, blocks=device != "cuda")


def peak_of(step, device: str) -> int:
    """The most bytes of tensors during one step, 0 where nobody counts; steps have been made before."""
    if device != "cuda":
        step()
        return 0
    wait(device)
    torch.cuda.reset_peak_memory_stats()
    step()
    wait(device)
    return torch.cuda.max_memory_allocated()


def parallel(label: str, results: Results, options) -> None:
    """One job: a Team's update on one rank, its time, its peak, the plan's peak."""
    device, (size, layout) = device_of(options), layout_of(label)
    config = GPTConfig.from_name(size)
    lines = planned_bytes(config, layout, device)
    results.keep(planned={name: round(lines[name] / 2**30, 3) for name in LINES}, n_micro=N_MICRO)
    with alone(device):
        team = Team(config, layout, device)
        optimizer = team.optimizer()
        n_texts = N_MICRO * layout.micro_batch
        x, y = tokens_for(config.vocab_size, n_texts, config.n_ctx, device)
        seen = []

        def step():
            seen.append(team.update(optimizer, team.batches(x, y, n_texts), n_texts, 1e-4)[0])

        first = clock(step, device)
        step()
        peak, plan = peak_of(step, device), sum(lines.values())
        results.keep(backend=dist.get_backend(), peak_GiB=round(peak / 2**30, 3), planned_GiB=round(plan / 2**30, 3))
        if peak:
            results.keep(plan_off=round(plan / peak - 1, 4), within=abs(plan / peak - 1) <= LIMIT)
        seconds = statistics.median(clock(step, device) for _ in range(1 if options.cpu else 5))
        report(label, results, config, n_texts, seconds, first, device)
        losses = [loss.item() for loss in seen]
        results.keep(losses=[round(losses[0], 4), round(losses[-1], 4)], learns=losses[-1] < losses[0])


def report(label, results: Results, config, n_texts: int, seconds: float, first: float, device: str) -> None:
    """Keep and print tokens a second, and MFU by the conventions of step_flops, of the data sheet and as measured."""
    name = torch.cuda.get_device_name() if device == "cuda" else ""
    sheet = next((value for part, value in PUBLISHED.items() if part in name), None)
    against = {"measured peak": peaks(device)["matmul FLOP/s"]} | ({"data sheet": sheet} if sheet else {})
    flops = step_flops(config, n_texts, config.n_ctx)
    mfu = {of: {kind: round(n / seconds / top, 4) for kind, n in flops.items()} for of, top in against.items()}
    speed = round(n_texts * config.n_ctx / seconds)
    results.keep(ms=round(1e3 * seconds, 2), first_step_s=round(first, 1), tokens_per_second=speed, mfu=mfu)
    say(f"{label}: {results.found}")
