"""gpt3lib beside transformers and a plain PyTorch GPT: one process, turn by turn in changing order, medians and ratios.

python benchmarks/race.py                all parts, some minutes
python benchmarks/race.py step decode    these parts: step, bf16, long, decode, flat, memory, compile
python benchmarks/race.py --store        also write data/experiments/race.json, which the book shows

Each line is printed as soon as it is known. What a processor cannot do is left out, with the reason.
Every contestant has the same shape and gets the same tokens; dropout is off, AdamW is fused for all.
FLOPs are counted twice: `dense` is the usual 6 N + 12 L d T for each token, whatever the layers do; `actual`
counts the scores that a causal or banded query really has. The second is what is compared with the matmul peak.
"""

import argparse
import datetime
import functools
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoConfig, GPTNeoForCausalLM
from transformers.utils import logging

from gpt3lib import GPT, GPTConfig, generate
from gpt3lib.cache import KVCache, OneStep
from gpt3lib.model import chunked_loss, loss_slowly
from gpt3lib.sparse_attention import banded_flops
from gpt3lib.texts import DATA
from gpt3lib.training import make_optimizer
from machine import processor
from plain_gpt import PlainGPT

SHAPE = {"n_layers": 6, "d_model": 384, "n_heads": 6}
RESULTS = DATA / "experiments" / "race.json"


# ---- measuring ----


def race(contestants: dict, rounds: int) -> dict[str, float]:
    """Median seconds of each function over rounds in which each runs once, so that a busy moment hits all of them.

    The order is another one in each round: whoever runs next inherits caches and memory from whoever ran before.
    """
    seconds, dice = {name: [] for name in contestants}, random.Random(0)
    for turn in range(rounds + 1):  # the first round warms up and is not counted
        for name in dice.sample(list(contestants), len(contestants)):
            start = time.perf_counter()
            contestants[name]()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


class Peak:
    """The most FLOP/s that a matrix product reached: a guest in a race, as a processor's speed changes by the minute.

    Called once in each round, it multiplies square matrices of some sizes, a few times each.
    """

    def __init__(self, dtype: torch.dtype = torch.float32, sizes=(512, 1024, 1536)):
        self.pairs = [(torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)) for n in sizes]
        self.flops = 0.0  # per second

    def __call__(self) -> None:
        for a, b in self.pairs:
            for _ in range(4):
                start = time.perf_counter()
                a @ b
                self.flops = max(self.flops, 2 * len(a) ** 3 / (time.perf_counter() - start))


def slow_bf16(n: int = 512, limit: float = 4.0) -> str:
    """Why bfloat16 is left out on this processor: its products are emulated. Empty where they are not."""
    products = {}
    for name, kind in {"float32": torch.float32, "bfloat16": torch.bfloat16}.items():
        a, b = torch.randn(n, n).to(kind), torch.randn(n, n).to(kind)
        products[name] = functools.partial(torch.mm, a, b)
    seconds = race(products, 5)
    ratio = seconds["bfloat16"] / seconds["float32"]
    return (
        f"a product in bfloat16 takes {ratio:.0f} × one in float32 here: no bf16 instructions" if ratio > limit else ""
    )


def race_with_peak(contestants: dict, rounds: int, dtype: torch.dtype = torch.float32) -> tuple[dict, float]:
    """The race, and the FLOP/s of a matrix product between the contestants' turns."""
    peak = Peak(dtype)
    seconds = race(contestants | {"": peak}, rounds)
    return {name: seconds[name] for name in contestants}, peak.flops


def step_flops(config: GPTConfig, n_texts: int, n_tokens: int) -> tuple[float, float]:
    """FLOPs of one training step by both conventions: (dense-equivalent, actual). Backward is twice forward."""
    with torch.device("meta"):
        n = GPT(config).num_params() - config.n_ctx * config.d_model  # the position table is only looked up
    tokens = n_texts * n_tokens
    dense = 6 * n * tokens + 12 * config.n_layers * config.d_model * n_tokens * tokens
    width = {"dense": n_tokens, "banded": config.bandwidth}
    scores = sum(banded_flops(n_tokens, config.d_model, width[kind])["scores and mix"] for kind in config.kinds)
    return dense, 6 * n * tokens + 3 * n_texts * scores


def say(*words: str, end: str = "\n") -> None:
    """Print at once: whoever waits sees what is being measured."""
    print(*words, end=end, flush=True)


def report(seconds: dict, us: str = "gpt3lib", flops=None, peak: float | None = None) -> dict:
    """Print one part as a table, ratios to `us`, and return it for the file."""
    for name, s in seconds.items():
        line = f"  {name:34} {1e3 * s:9.1f} ms   {s / seconds[us]:5.2f} × {us}"
        if flops and name == us:
            dense, actual = flops
            line += f"   {actual / s / 1e9:.0f} GFLOP/s actual, {dense / s / 1e9:.0f} dense-equivalent"
            line += f", {actual / s / peak:.0%} of the matmul peak of {peak / 1e9:.0f}"
        say(line)
    return {"ms": {name: round(1e3 * s, 2) for name, s in seconds.items()}}


# ---- contestants ----


def without_dropout(model: nn.Module) -> nn.Module:
    """The same model, in training mode, with every dropout off."""
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    return model.train()


def gpt2(vocab_size: int, n_ctx: int) -> nn.Module:
    """transformers' GPT-2 with torch's fused attention, the fastest it has."""
    c = GPT2Config(
        vocab_size=vocab_size, n_positions=n_ctx, n_embd=SHAPE["d_model"], n_layer=SHAPE["n_layers"],
        n_head=SHAPE["n_heads"], resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=None,
    )  # fmt: skip
    c._attn_implementation = "sdpa"
    return without_dropout(GPT2LMHeadModel(c))


def gpt_neo(vocab_size: int, n_ctx: int, n_layers: int, window: int = 256) -> nn.Module:
    """transformers' GPT-Neo, alternating; it has no fused attention."""
    c = GPTNeoConfig(
        vocab_size=vocab_size, max_position_embeddings=n_ctx, hidden_size=SHAPE["d_model"], num_layers=n_layers,
        num_heads=SHAPE["n_heads"], attention_types=[[["global", "local"], n_layers // 2]], window_size=window,
        resid_dropout=0.0, embed_dropout=0.0, attention_dropout=0.0, bos_token_id=0, eos_token_id=None,
    )  # fmt: skip
    return without_dropout(GPTNeoForCausalLM(c))


def ours(vocab_size: int, n_ctx: int, attention=("dense", "banded"), n_layers: int = SHAPE["n_layers"]) -> GPT:
    """gpt3lib's GPT of the same shape, bandwidth 256."""
    d_head = SHAPE["d_model"] // SHAPE["n_heads"]
    return GPT(GPTConfig(vocab_size, n_ctx, n_layers, SHAPE["d_model"], SHAPE["n_heads"], d_head, attention))


def their_loss(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The loss of a transformers model on targets that are already shifted."""
    return F.cross_entropy(model(x, use_cache=False).logits.flatten(0, 1).float(), y.flatten())


def training_step(model: nn.Module, x: torch.Tensor, y: torch.Tensor, bf16: bool = False):
    """A function that does one step: loss, gradients, AdamW."""
    loss_of = model.loss if hasattr(model, "loss") else lambda x, y: their_loss(model, x, y)
    optimizer = make_optimizer(model)

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = loss_of(x, y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def text(vocab_size: int, n_texts: int, n_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random inputs and targets."""
    tokens = torch.randint(vocab_size, (n_texts, n_tokens + 1), generator=torch.Generator().manual_seed(0))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


# ---- the parts ----


def step(rounds: int = 12, bf16: bool = False) -> dict:
    """A training step, 6 layers × 384, T = 256, vocabulary 4,096, 8 texts."""
    kind = "bf16 autocast" if bf16 else "float32"
    say(f"\ntraining step, 6 × 384, B = 8, T = 256, V = 4096, {kind}: {rounds} rounds")
    models = {"gpt3lib": ours(4096, 256, ("dense",)), "plain PyTorch": PlainGPT(4096, 256, **SHAPE)}
    models["transformers GPT-2"] = gpt2(4096, 256)
    x, y = text(4096, 8, 256)
    steps = {name: training_step(model, x, y, bf16) for name, model in models.items()}
    seconds, peak = race_with_peak(steps, rounds, torch.bfloat16 if bf16 else torch.float32)
    flops = step_flops(models["gpt3lib"].config, 8, 256)
    found = report(seconds, flops=flops, peak=peak)
    return found | {"peak": round(peak), "flops": {"dense": flops[0], "actual": flops[1]}}


def bf16() -> dict:
    """The same under bfloat16 autocast, where the processor can."""
    reason = slow_bf16()
    if reason:
        say(f"\ntraining step, bf16 autocast: left out; {reason}")
        return {"left out": reason}
    return step(bf16=True)


def long() -> dict:
    """Training steps of alternating stacks: T = 2,048 with 6 layers, T = 8,192 with 2 (theirs needs 14 GB there)."""
    found = {}
    for n_tokens, n_layers, rounds in ((2048, 6, 3), (8192, 2, 2)):
        title = f"training step, alternating, {n_layers} × 384, B = 1, T = {n_tokens}, band 256"
        say(f"\n{title}: {rounds} rounds")
        x, y = text(4096, 1, n_tokens)
        runs = {
            "gpt3lib": ours(4096, n_tokens, n_layers=n_layers),
            "gpt3lib, all dense": ours(4096, n_tokens, ("dense",), n_layers),
            "transformers GPT-Neo": gpt_neo(4096, n_tokens, n_layers),
        }
        flops = step_flops(runs["gpt3lib"].config, 1, n_tokens)
        steps = {name: training_step(model, x, y) for name, model in runs.items()}
        seconds, peak = race_with_peak(steps, rounds)
        found[n_tokens] = report(seconds, flops=flops, peak=peak)
    return found


def decode(n_new: int = 256) -> dict:
    """Greedy text with a cache, one text, 16 tokens in and 256 out."""
    say(f"\ncached greedy decoding, 6 × 384, V = 4096, {n_new} new tokens: 5 rounds")
    models = {"gpt3lib": ours(4096, 512, ("dense",)).eval(), "transformers GPT-2": gpt2(4096, 512).eval()}
    prompt = text(4096, 1, 16)[0]
    theirs = {"max_new_tokens": n_new, "min_new_tokens": n_new, "do_sample": False, "pad_token_id": 0}
    seconds = race(
        {
            "gpt3lib": lambda: generate(models["gpt3lib"], prompt, n_new, temperature=0),
            "transformers GPT-2": lambda: models["transformers GPT-2"].generate(prompt, **theirs),
        },
        5,
    )
    weights = 4 * models["gpt3lib"].num_params()
    found = report(seconds)
    say(f"  each token reads {weights / 1e6:.0f} MB of weights: {weights * n_new / seconds['gpt3lib'] / 1e9:.1f} GB/s")
    return found


@torch.no_grad()
def flat() -> dict:
    """Milliseconds for one more token after 256 … 8,192, dense and banded layers."""
    found = {}
    say("\none more token, 6 × 384, milliseconds after n tokens")
    for name, kinds in {"dense": ("dense",), "alternating": ("dense", "banded"), "banded": ("banded",)}.items():
        model, times = ours(4096, 8200, kinds).eval(), {}
        new, take = torch.zeros(1, 1, dtype=torch.int64), OneStep(model)
        say(f"  {name:12}", end="")
        for n in (256, 1024, 4096, 8192):
            cache = KVCache(model.config, 8200)
            model.hidden(torch.zeros(1, n - 60, dtype=torch.int64), cache)
            times[n] = 1e3 * race({"": functools.partial(take, new, cache)}, 25)[""]
            say(f"  {n}: {times[n]:.2f}", end="")
        say()
        found[name] = {str(n): round(ms, 3) for n, ms in times.items()}
    return found


def peak_of(which: str, kinds: str) -> tuple[float, float]:
    """(MiB added to the memory of a fresh process at its peak, seconds) of one case of one_peak."""
    command = [sys.executable, __file__, "--one-peak", which, kinds]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    mib, seconds = done.stdout.split()
    return float(mib), float(seconds)


def resident(which: str) -> float:
    """MiB of this process as Linux counts them: VmRSS is now, VmHWM the most since the mark was last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(which)) / 1024


def one_peak(which: str, kinds: str) -> None:
    """Run in a process of its own: print the growth of the memory in MiB at its peak, and the seconds of a second step.

    kinds: "dense" or "dense,banded" for a whole step with four texts, "gpt3-1m" for one of the book's model with one,
    "" for the loss alone, from given vectors.
    """
    n_texts, n_tokens, vocab_size = (4 if "dense" in kinds else 1), 2048, 50257
    loss_of = {"naive": loss_slowly, "gpt3lib": chunked_loss}[which]
    x, y = text(vocab_size, n_texts, n_tokens)
    if kinds == "gpt3-1m":
        model = GPT(GPTConfig.from_name(kinds, vocab_size=vocab_size, n_ctx=n_tokens))
    else:
        model = ours(vocab_size, n_tokens, tuple(kinds.split(",")) if kinds else ("dense",))
    optimizer = make_optimizer(model)
    h = torch.randn(n_texts, n_tokens, SHAPE["d_model"], requires_grad=True)

    def run():
        loss_of(model.hidden(x) if kinds else h, model.embeddings.wte.weight, y).backward()
        if kinds:
            optimizer.step()
        optimizer.zero_grad()

    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of building the model
    before = resident("VmRSS")
    run()
    start = time.perf_counter()
    run()
    print(resident("VmHWM") - before, time.perf_counter() - start)


def memory() -> dict:
    """Peak memory and time of the loss alone, and of whole steps with four texts, naive and ours. Linux only."""
    if sys.platform != "linux":
        say("\npeak memory: left out; it is measured on Linux only")
        return {"left out": "measured on Linux only"}
    found = {}
    say("\npeak memory at V = 50,257, T = 2,048: MiB above the model, seconds")
    cases = {"the loss alone": "", "a step of gpt3-1m": "gpt3-1m"}
    cases |= {"a step, dense, B = 4": "dense", "a step, alternating, B = 4": "dense,banded"}
    for title, kinds in cases.items():
        naive = peak_of("naive", kinds)
        say(f"  {title:28} naive {naive[0]:6.0f}, {naive[1]:.2f} s", end="")
        our = peak_of("gpt3lib", kinds)
        say(f"   gpt3lib {our[0]:6.0f}, {our[1]:.2f} s   memory {our[0] / naive[0]:.2f}, time {our[1] / naive[1]:.2f}")
        found[title] = {"naive": [round(v, 2) for v in naive], "gpt3lib": [round(v, 2) for v in our]}
    return found


def compiled() -> dict:
    """A training step with torch.compile; it needs a C++ compiler, and a minute first."""
    compilers = [os.environ.get("CXX", "g++"), "clang++", "cl"]
    if not any(map(shutil.which, compilers)):
        say("\ntraining step, compiled: left out; there is no C++ compiler")
        return {"left out": "no C++ compiler"}
    say("\ntraining step, float32, eager and compiled: compiling")
    model = ours(4096, 256, ("dense",))
    x, y = text(4096, 8, 256)
    fast = ours(4096, 256, ("dense",))
    fast.blocks = nn.ModuleList(torch.compile(block) for block in fast.blocks)
    start = time.perf_counter()
    runs = {"gpt3lib": training_step(model, x, y), "gpt3lib, blocks compiled": training_step(fast, x, y)}
    runs["gpt3lib, blocks compiled"]()
    say(f"  compiling took {time.perf_counter() - start:.0f} s")
    return report(race(runs, 5))


PARTS = {"step": step, "bf16": bf16, "long": long, "decode": decode, "flat": flat, "memory": memory}
PARTS["compile"] = compiled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], metavar="part", help=", ".join(PARTS))
    parser.add_argument("--store", action="store_true", help="write the figures for the book")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="processor cores to use")
    parser.add_argument("--one-peak", nargs=2, metavar=("which", "kinds"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.one_peak:
        return one_peak(*options.one_peak)
    about = {"processor": processor(), "threads": options.threads, "torch": torch.__version__}
    about["date"] = str(datetime.date.today())
    say(", ".join(f"{name} {value}" for name, value in about.items()))
    found = {name: PARTS[name]() for name in options.parts or PARTS}
    if options.store:
        part = RESULTS.with_suffix(".part")
        part.write_text(json.dumps({"about": about, **found}, indent=1) + "\n")
        os.replace(part, RESULTS)
    return None


if __name__ == "__main__":
    main()
