"""What on_gpu.py measures: training steps, bands, decoding, a race; and the tools that its other files share.

A function of each part lists its jobs, another does one of them. options.cpu: tiny sizes, the same code.
"""

import itertools
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from gpt3lib import GPT, GPTConfig, generate
from gpt3lib.attention import attend
from gpt3lib.cache import cache_numbers
from gpt3lib.files import NoDice, write_beside
from gpt3lib.sparse_attention import WAYS, BandedSelfAttention, banded_flops
from gpt3lib.training import make_optimizer
from plain_gpt import PlainGPT

PUBLISHED = {"H100 80GB": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16 FLOP/s of their data sheets


# ---- tools ----


def say(*words: str, end: str = "\n") -> None:
    """Print at once: whoever waits sees what is being measured."""
    print(*words, end=end, flush=True)


def device_of(options) -> str:
    """Where the options measure."""
    return "cpu" if options.cpu else "cuda"


def need_gpu() -> None:
    """Stop, with the reason, where there is none."""
    if not torch.cuda.is_available():
        sys.exit("torch sees no GPU here; --cpu runs the same code on tiny sizes")


class Results:
    """What a job has found so far, in a file that is whole at any moment."""

    def __init__(self, path: Path, label: str = ""):
        self.path, self.label, self.found = path, label, {}
        path.parent.mkdir(parents=True, exist_ok=True)

    def keep(self, **found) -> None:
        """Add figures, and write."""
        self.found |= found
        write_beside(self.path, (json.dumps(self.found, indent=1) + "\n").encode())

    def say(self, *words: str) -> None:
        """Print with the job's name: others print beside it."""
        say(f"   {self.label:20}", *words)


def wait(device: str) -> None:
    """Until the device has done all that it was told."""
    if device == "cuda":
        torch.cuda.synchronize()


def clock(function: Callable, device: str, times: int = 1) -> float:
    """Seconds of one call, over so many in a row."""
    wait(device)
    start = time.perf_counter()
    for _ in range(times):
        function()
    wait(device)
    return (time.perf_counter() - start) / times


def race(contestants: dict[str, Callable], device: str, rounds: int = 5, least: float = 0.02) -> dict[str, float]:
    """Median seconds of each, turn by turn in changing order; a turn repeats until `least` seconds are full.

    Two calls come before: the first compiles, the second tells how often to repeat.
    """
    times, seconds, dice = {}, {name: [] for name in contestants}, random.Random(0)
    for name, function in contestants.items():
        function()
        times[name] = max(1, math.ceil(least / clock(function, device)))
    for _ in range(rounds):
        for name in dice.sample(list(contestants), len(contestants)):
            seconds[name].append(clock(contestants[name], device, times[name]))
    return {name: statistics.median(values) for name, values in seconds.items()}


def peaks(device: str) -> dict[str, float]:
    """This device's own ceilings: FLOP/s of a bf16 matrix product, bytes/s of a copy, read and written."""
    n, size = (8192, 2**30) if device == "cuda" else (256, 2**20)
    a, b = (torch.randn(n, n, device=device).bfloat16() for _ in range(2))
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = race({"product": lambda: a @ b, "copy": lambda: target.copy_(source)}, device)
    return {"matmul FLOP/s": 2 * n**3 / seconds["product"], "copy B/s": 2 * size / seconds["copy"]}


def step_flops(config: GPTConfig, n_texts: int, n_tokens: int) -> dict[str, float]:
    """FLOPs of a training step, backward being twice forward, by three conventions.

    6N: parameters alone, without the position table; dense: 12 L d T more for each token, whatever the layers do;
    actual: only the scores that a causal or banded query has.
    """
    with torch.device("meta"), NoDice():
        n = GPT(config).num_params() - config.n_ctx * config.d_model
    tokens = n_texts * n_tokens
    width = {"dense": n_tokens, "banded": config.bandwidth}
    scores = sum(banded_flops(n_tokens, config.d_model, width[kind])["scores and mix"] for kind in config.kinds)
    return {
        "6N": 6.0 * n * tokens,
        "dense": 6.0 * n * tokens + 12.0 * config.n_layers * config.d_model * n_tokens * tokens,
        "actual": 6.0 * n * tokens + 3.0 * n_texts * scores,
    }


def blank_model(config: GPTConfig, device: str, dtype=torch.float32) -> GPT:
    """A model with random numbers made on the device: for timing, where which numbers does not matter."""
    with torch.device("meta"), NoDice():
        model = GPT(config)
    model = model.to(dtype).to_empty(device=device)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(std=0.02) if p.dim() > 1 else p.fill_(0.0 if name.endswith("bias") else 1.0)
    return model


def set_way(model: nn.Module, how: str) -> None:
    """Choose the way in which all banded layers compute."""
    for part in model.modules():
        if isinstance(part, BandedSelfAttention):
            part.how = how


def way_of(options) -> str:
    """The way of banded layers where nothing chooses by itself: FlexAttention has no gradient on a processor."""
    return "blocks" if options.cpu else "flex"


def compiled(function: Callable, options) -> Callable:
    """torch.compile; on a processor all but the last step of it, which would want a C++ compiler and minutes."""
    return torch.compile(function, dynamic=False, backend="aot_eager" if options.cpu else "inductor")


class Replay(torch.autograd.Function):
    """A loss whose forward and backward were recorded: running both is one call for the GPU."""

    @staticmethod
    def forward(ctx, recorded, x, y, *parameters):
        """The loss of other tokens; the recorded gradients are of them, too."""
        graph, places, loss, ctx.grads = recorded
        for place, tokens in zip(places, (x, y)):
            place.copy_(tokens)
        graph.replay()
        return loss.clone()

    @staticmethod
    def backward(ctx, above):
        """The gradients, copied: the next replay writes over them."""
        return None, None, None, *torch._foreach_mul(ctx.grads, above)


class Recorded:
    """A loss as training's loss_of, recorded once for each shape as a CUDA graph.

    Small models launch hundreds of kernels of a few microseconds: without this the GPU waits for Python.
    """

    def __init__(self, loss: Callable):
        self.loss, self.kept, self.pool = loss, {}, None

    def record(self, model, x, y, parameters: list):
        """The graph, where its tokens lie, its loss and gradients."""
        places = x.clone(), y.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # compiles, and makes what is made once
                torch.autograd.grad(self.loss(model, *places, True), parameters)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            loss = self.loss(model, *places, True)
            grads = torch.autograd.grad(loss, parameters)
            loss = loss.detach()
        self.pool = graph.pool()
        return graph, places, loss, grads

    def __call__(self, model, x, y, bf16: bool = False) -> torch.Tensor:
        """The loss in bf16; in float32 it is the plain one."""
        if not bf16 or not torch.is_grad_enabled():
            return self.loss(model, x, y, bf16)
        parameters = list(model.parameters())
        if x.shape not in self.kept:
            self.kept[x.shape] = self.record(model, x, y, parameters)
        return Replay.apply(self.kept[x.shape], x, y, *parameters)


def tokens_for(vocab_size: int, n_texts: int, n_tokens: int, device: str, seed=0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random inputs and targets."""
    dice = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocab_size, (n_texts, n_tokens + 1), generator=dice).to(device)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def graphs_made() -> dict[str, int]:
    """How many graphs torch.compile has made so far, and how often it had to give up inside a function."""
    counters = torch._dynamo.utils.counters
    return {
        "graphs": int(counters["stats"].get("unique_graphs", 0)),
        "breaks": sum(counters["graph_break"].values()),
    }


# ---- steps ----


def steps_labels(options) -> list[str]:
    """Two of the paper's sizes, as they are and compiled; the plain ones first."""
    names = ["gpt3-100k"] if options.cpu else ["gpt3-125m", "gpt3-1.3b"]
    return [*names, *(f"{name} compiled" for name in names)]


BATCHES = {"gpt3-125m": (32, 16, 8, 4), "gpt3-1.3b": (8, 4, 2, 1), "gpt3-100k": (2,)}


def updater(model, optimizer, loss, x, y, bf16: bool = True) -> Callable:
    """A function that does one training step."""

    def step():
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            value = loss(x, y)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def steps(label: str, results: Results, options) -> None:
    """Tokens a second, both kinds of MFU and peak memory of one size's training step in bf16."""
    name, *words = label.split()
    device = device_of(options)
    config = GPTConfig.from_name(name)
    peak = peaks(device)
    results.keep(peaks={key: round(value / 1e12, 3) for key, value in peak.items()}, n_ctx=config.n_ctx)
    model = blank_model(config, device)
    if words:
        set_way(model, way_of(options))
    optimizer = make_optimizer(model)
    for n_texts in BATCHES[name]:
        try:
            x, y = tokens_for(config.vocab_size, n_texts, config.n_ctx, device)
            loss = compiled(model.loss, options) if words else model.loss
            step = updater(model, optimizer, loss, x, y)
            first = clock(step, device)
            step()
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            seconds = statistics.median(clock(step, device) for _ in range(5))
        except torch.OutOfMemoryError:
            results.say(f"{n_texts} texts do not fit")
            optimizer.zero_grad()
            torch.cuda.empty_cache()
            continue
        gib = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0
        report_step(results, config, n_texts, seconds, first, gib, peak)
        return


def report_step(results, config, n_texts, seconds, first, gib, peak) -> None:
    """Keep and print what one size's steps took; MFU by two conventions, of two peaks."""
    flops = step_flops(config, n_texts, config.n_ctx)
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    sheet = next((value for part, value in PUBLISHED.items() if part in name), None)
    against = {"measured peak": peak["matmul FLOP/s"]} | ({"data sheet": sheet} if sheet else {})
    mfu = {of: {kind: round(n / seconds / top, 4) for kind, n in flops.items()} for of, top in against.items()}
    results.keep(
        sequences=n_texts, ms=round(1e3 * seconds, 2), tokens_per_second=round(n_texts * config.n_ctx / seconds),
        TFLOPs={kind: round(n / seconds / 1e12, 1) for kind, n in flops.items()},
        mfu=mfu, peak_GiB=round(gib, 2), first_step_s=round(first, 1), **graphs_made(),
    )  # fmt: skip
    results.say(json.dumps(results.found))


# ---- band ----


def band_labels(options) -> list[str]:
    """Heads × their width, as in gpt3-125m and gpt3-1.3b."""
    return ["2 x 16"] if options.cpu else ["12 x 64", "16 x 128"]


def band(label: str, results: Results, options) -> None:
    """Milliseconds of dense attention and of the band's ways, forward, and forward with backward."""
    device, (n_heads, width) = device_of(options), map(int, label.split(" x "))
    lengths, bandwidth, tokens = ((64, 128), 16, 128) if options.cpu else ((2048, 8192), 256, 16384)
    ways = {"dense": attend}
    for how in ("blocks",) if options.cpu else ("flex", "blocks"):
        ways[how] = lambda q, k, v, how=how: WAYS[how](q, k, v, bandwidth)
    results.keep(bandwidth=bandwidth, tokens=tokens)
    for n, backward in itertools.product(lengths, (False, True)):
        shape = (tokens // n, n_heads, n, width)
        kind = torch.float32 if options.cpu else torch.bfloat16
        *qkv, weight = (torch.randn(shape, device=device, dtype=kind) for _ in range(4))
        qkv = [x.requires_grad_(backward) for x in qkv]
        seconds = race({name: attention_call(way, qkv, weight, backward) for name, way in ways.items()}, device)
        ratios = {name: round(seconds["dense"] / s, 2) for name, s in seconds.items()}
        ms = {name: round(1e3 * s, 4) for name, s in seconds.items()}
        title = f"T = {n}, forward{' and backward' if backward else ''}"
        results.keep(**{title: {"ms": ms, "dense / it": ratios}})
        results.say(f"{title}: ms {ms}, dense / it {ratios}")


def attention_call(way: Callable, qkv: list, weight: torch.Tensor, backward: bool) -> Callable:
    """A function that attends once, with the three gradients if wished."""
    if backward:
        return lambda: torch.autograd.grad(way(*qkv), qkv, weight)
    return lambda: way(*qkv)


# ---- decode ----


def decode_labels(options) -> list[str]:
    """Two of the paper's sizes."""
    return ["gpt3-100k"] if options.cpu else ["gpt3-125m", "gpt3-1.3b"]


def decode(label: str, results: Results, options) -> None:
    """Tokens a second of cached greedy text in bf16, and how near that is to reading all bytes once."""
    device = device_of(options)
    config, speed = GPTConfig.from_name(label), peaks(device)["copy B/s"]
    model = blank_model(config, device, torch.bfloat16).eval()
    n_prompt, (few, many) = 64, ((2, 6) if options.cpu else (8, 72))
    weights = 2 * (model.num_params() - config.n_ctx * config.d_model)
    results.keep(copy_TB_per_s=round(speed / 1e12, 3), weights_MB=round(weights / 1e6, 1))
    for n_texts in (1, 8, 64):
        prompt = tokens_for(config.vocab_size, n_texts, n_prompt, device)[0]
        runs = {n: lambda n=n, prompt=prompt: generate(model, prompt, n, temperature=0) for n in (few, many)}
        seconds = race(runs, device, rounds=3, least=0.0)
        step = (seconds[many] - seconds[few]) / (many - few)
        n_bytes = weights + 2 * n_texts * cache_numbers(config, n_prompt + (few + many) // 2)
        found = {
            "ms a step": round(1e3 * step, 3), "tokens/s": round(n_texts / step), "MB a step": round(n_bytes / 1e6, 1),
            "of the bound": round(n_bytes / speed / step, 3),
        }  # fmt: skip
        results.keep(**{f"B = {n_texts}": found})
        results.say(f"B = {n_texts}: {found}")


# ---- race ----


def race_labels(options) -> list[str]:
    """As they are, and compiled."""
    return ["eager", "compiled"]


def race_models(options, vocab_size: int, n_ctx: int, shape: dict) -> dict:
    """name -> (model, its loss), all of one shape; transformers' GPT-2 where it is installed."""
    n_layers, width, n_heads = shape["n_layers"], shape["d_model"], shape["n_heads"]
    ours = GPTConfig(vocab_size, n_ctx, n_layers, width, n_heads, width // n_heads, ("dense",), n_ctx // 8)
    found = {"gpt3lib": GPT(ours), "plain PyTorch": PlainGPT(vocab_size, n_ctx, **shape)}
    banded = GPTConfig(vocab_size, n_ctx, n_layers, width, n_heads, width // n_heads, bandwidth=n_ctx // 8)
    found["gpt3lib, alternating"] = GPT(banded)
    losses = {name: model.loss for name, model in found.items()}
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        return {name: (model, losses[name]) for name, model in found.items()}
    config = GPT2Config(
        vocab_size=vocab_size, n_positions=n_ctx, n_embd=width, n_layer=n_layers, n_head=n_heads,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=None,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    theirs = GPT2LMHeadModel(config).train()
    found["transformers GPT-2"] = theirs
    losses["transformers GPT-2"] = lambda x, y: F.cross_entropy(
        theirs(x, use_cache=False).logits.flatten(0, 1).float(), y.flatten()
    )
    return {name: (model, losses[name]) for name, model in found.items()}


def race_part(label: str, results: Results, options) -> None:
    """A training step of gpt3-125m's shape: ours, a plain PyTorch GPT, transformers' GPT-2, turn by turn."""
    device = device_of(options)
    shape = {"n_layers": 12, "d_model": 768, "n_heads": 12}
    vocab_size, n_ctx, n_texts = 50257, 1024, 8
    if options.cpu:
        shape, vocab_size, n_ctx, n_texts = {"n_layers": 2, "d_model": 64, "n_heads": 4}, 300, 64, 2
    x, y = tokens_for(vocab_size, n_texts, n_ctx, device)
    steps, seconds_to_compile = {}, {}
    for name, (model, loss) in race_models(options, vocab_size, n_ctx, shape).items():
        model.to(device)
        if label == "compiled":
            set_way(model, way_of(options))
            loss = compiled(loss, options)
        steps[name] = updater(model, make_optimizer(model), loss, x, y)
        seconds_to_compile[name] = round(clock(steps[name], device), 1)
        results.keep(first_step_s=seconds_to_compile)
    seconds = race(steps, device, rounds=2 if options.cpu else 7)
    ratios = {name: round(s / seconds["gpt3lib"], 3) for name, s in seconds.items()}
    ms = {name: round(1e3 * s, 2) for name, s in seconds.items()}
    results.keep(ms=ms, **{"times gpt3lib": ratios}, sequences=n_texts, n_ctx=n_ctx, vocab_size=vocab_size)
    results.say(f"{ms}, times ours: {ratios}")
