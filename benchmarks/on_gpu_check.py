"""Whether a GPU computes what a processor does: FlexAttention, whole models, compiled ones, text, files.

Every comparison is printed and stored; one that fails does not stop the others.
"""

import tempfile
import time
from collections.abc import Callable

import torch

from gpt3lib import GPT, GPTConfig, generate
from gpt3lib.decoding import generate_many
from gpt3lib.generation import generate_slowly
from gpt3lib.sparse_attention import WAYS, band_by_mask
from gpt3lib.training import loss_of, train
from on_gpu_parts import Recorded, Results, compiled, device_of, graphs_made, set_way, tokens_for, way_of


class Checks:
    """Comparisons, each printed and stored; one that fails is stored as failing, and the next one goes on."""

    def __init__(self, results: Results):
        self.results, self.rows = results, []

    def note(self, what: str, passes: bool, **numbers) -> None:
        """Keep one comparison."""
        self.rows.append({"what": what, "passes": bool(passes), **numbers})
        self.results.keep(checks=self.rows, failed=sum(not row["passes"] for row in self.rows))
        told = ", ".join(f"{key} {value:.2g}" if isinstance(value, float) else f"{key} {value}"
                         for key, value in numbers.items())  # fmt: skip
        self.results.say(f"{'fine  ' if passes else 'FAILED'} {what}: {told}")

    def near(self, what: str, got: torch.Tensor, expected: torch.Tensor, limit: float) -> None:
        """|got - expected| / |expected| over all numbers is at most the limit; nan is not."""
        got, expected = (x.detach().double().cpu().flatten() for x in (got, expected))
        apart = got - expected
        error = (apart.norm() / expected.norm()).item()
        self.note(what, error <= limit, difference=error, limit=limit, largest=apart.abs().max().item())

    def same(self, what: str, got: torch.Tensor, expected: torch.Tensor) -> None:
        """Equal to the last bit."""
        got, expected = got.detach().cpu(), expected.detach().cpu()
        if got.shape != expected.shape:
            return self.note(what, False, shapes=f"{tuple(got.shape)}, {tuple(expected.shape)}")
        return self.note(what, torch.equal(got, expected), different=int((got != expected).sum()), of=got.numel())

    def run(self, what: str, function: Callable, *arguments) -> None:
        """Do some comparisons; an error is a failing one."""
        try:
            function(self, *arguments)
        except Exception as error:  # whatever it is, the others go on
            self.note(what, False, error=f"{type(error).__name__}: {str(error)[:300]}")


BANDS = [(128, 16), (1000, 100), (1024, 128), (2048, 256)]  # (n_tokens, bandwidth)


def check_labels(options) -> list[str]:
    """FlexAttention for each width of a head, whole models, compiled ones, text, files."""
    kinds = ["float32"] if options.cpu else ["bfloat16", "float32"]
    flex = [f"flex {d} {kind}" for kind in kinds for d in (16, 32, 64, 128)]
    recorded = [] if options.cpu else ["recorded"]  # a processor has no CUDA graphs
    return ["compiled", *recorded, *flex, "many bands", "models", "text"]


def check(label: str, results: Results, options) -> None:
    """One group of comparisons."""
    checks, device = Checks(results), device_of(options)
    if label.startswith("flex"):
        _, width, kind = label.split()
        for n, bandwidth in [(40, 7)] if options.cpu else BANDS:
            what = f"band {bandwidth} of {n}, heads of {width}, {kind}"
            torch._dynamo.reset()  # each shape is compiled for itself
            checks.run(what, check_flex, what, device, getattr(torch, kind), n, bandwidth, int(width))
    elif label == "many bands":
        checks.run(label, check_many, device, options)
    elif label == "models":
        for kinds, width in ((("dense",), 16), (("dense", "banded"), 16), (("banded",), 32)):
            checks.run(f"model of {kinds}", check_model, device, kinds, width)
    elif label == "recorded":
        checks.run(label, check_recorded, device)
    elif label == "compiled":
        checks.run("compiled", check_compiled, device, options)
    else:
        kinds = [("dense", "banded")] if options.cpu else [("dense",), ("dense", "banded"), ("banded",)]
        for layers in kinds:
            checks.run("text", check_text, device, layers)
        checks.run("files", check_files, device)


def check_flex(checks, what, device, dtype, n, bandwidth, width) -> None:
    """FlexAttention's band against the mask in float64: forward, and the three gradients."""
    dice = torch.Generator().manual_seed(n + width)
    x = [torch.randn(2, 3, n, width, generator=dice).to(dtype) for _ in range(4)]
    limit = 2e-2 if dtype == torch.bfloat16 else 1e-4
    learns = device == "cuda"
    *qkv, weight = (t.double() for t in x)
    exact = [t.requires_grad_() for t in qkv]
    expected = band_by_mask(*exact, bandwidth)
    slopes = torch.autograd.grad((expected * weight).sum(), exact)
    *own, weight = (t.to(device) for t in x)
    own = [t.requires_grad_(learns) for t in own]
    got = WAYS["flex"](*own, bandwidth)
    checks.near(what, got, expected, limit)
    last = WAYS["flex"](own[0][:, :, -5:].detach(), *(t.detach() for t in own[1:]), bandwidth)
    checks.near(f"{what}, the last 5 queries", last, expected[:, :, -5:], limit)
    if learns:
        grads = torch.autograd.grad((got * weight).sum(), own)
        for name, grad, slope in zip("qkv", grads, slopes):
            checks.near(f"{what}, gradient of {name}", grad, slope, 2 * limit)


def check_many(checks, device, options) -> None:
    """One process that meets many lengths, as prompts have: right each time, and no matrix of all scores at the end."""
    lengths = (20, 33, 47) if options.cpu else (130, 200, 257, 300, 415, 512, 700, 901, 1024, 1500)
    learns = device == "cuda"
    for n in lengths:
        dice = torch.Generator().manual_seed(n)
        exact = [torch.randn(1, 2, n, 32, generator=dice).double().requires_grad_() for _ in range(3)]
        own = [x.detach().to(device, torch.float32).requires_grad_(learns) for x in exact]
        expected, got = band_by_mask(*exact, 16), WAYS["flex"](*own, 16)
        checks.near(f"band 16 of {n}, after the others", got, expected, 1e-4)
        if learns:
            slopes, grads = (torch.autograd.grad(y.square().sum(), x) for y, x in ((expected, exact), (got, own)))
            both = [torch.cat([grad.flatten().cpu().double() for grad in each]) for each in (grads, slopes)]
            checks.near(f"band 16 of {n}, after the others: gradients", *both, 1e-4)
    if learns:
        check_memory(checks, device)


def check_memory(checks, device) -> None:
    """At T = 8,192 a fused kernel needs far less than the scores of eight heads."""
    q, k, v = (torch.randn(1, 8, 8192, 64, device=device, dtype=torch.bfloat16) for _ in range(3))
    WAYS["flex"](q, k, v, 256)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    WAYS["flex"](q, k, v, 256)
    mib = (torch.cuda.max_memory_allocated() - before) / 2**20
    checks.note("no matrix of all scores", mib < 8 * 128, MiB=round(mib, 1), all_scores=8 * 128)


def loss_and_slopes(model, x, y, bf16: bool = False, loss=None) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss, and all gradients in one row."""
    model.zero_grad()
    with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
        value = (loss or model.loss)(x, y)
    value.backward()
    return value.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])


def check_model(checks, device, kinds, width) -> None:
    """Logits, loss, gradients, and five updates: on the device as on a processor."""
    config = GPTConfig(300, 256, 4, 64, 64 // width, width, kinds, bandwidth=32)
    here, there = GPT(config, seed=1), GPT(config, seed=1).to(device)
    what = f"{' and '.join(kinds)}, heads of {width}"
    x, y = tokens_for(300, 4, 256, "cpu")
    loss, slopes = loss_and_slopes(here, x, y)
    moved = x.to(device), y.to(device)
    for bf16, limit in ((False, 1e-5), (True, 2e-2)):
        name = f"{what}, {'bfloat16' if bf16 else 'float32'}"
        with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=bf16):
            checks.near(f"{name}: logits", there(moved[0]), here(x), limit)
        found = loss_and_slopes(there, *moved, bf16)
        checks.near(f"{name}: loss", found[0], loss, limit)
        checks.near(f"{name}: gradients", found[1], slopes, 10 * limit if bf16 is False else 3 * limit)
    text = torch.randint(300, (4000,), generator=torch.Generator().manual_seed(2))
    losses = [torch.tensor(train(model, text, 5, batch_size=4, warmup=1)) for model in (here, there)]
    checks.near(f"{what}: losses of five updates", losses[1], losses[0], 1e-4)


def check_compiled(checks, device, options) -> None:
    """The whole loss compiled, as the family is trained, against the same without."""
    vocab_size, n_ctx, n_texts = (300, 64, 2) if options.cpu else (4096, 1024, 8)
    config = GPTConfig(vocab_size, n_ctx, 4, 128, 4, 32, bandwidth=n_ctx // 8)
    model = GPT(config, seed=3).to(device)
    x, y = tokens_for(vocab_size, n_texts, n_ctx, device)
    for bf16 in (True, False):
        kind, limit = ("bfloat16", 2e-2) if bf16 else ("float32", 1e-4)
        set_way(model, "mask")
        expected = loss_and_slopes(model, x, y, bf16)
        set_way(model, way_of(options))
        eager = loss_and_slopes(model, x, y, bf16)
        checks.near(f"{way_of(options)} as the mask, {kind}: gradients", eager[1], expected[1], limit)
        begin = time.perf_counter()
        found = loss_and_slopes(model, x, y, bf16, compiled(model.loss, options))
        seconds = time.perf_counter() - begin
        checks.near(f"compiled, {kind}: loss", found[0], expected[0], limit)
        checks.near(f"compiled, {kind}: gradients", found[1], expected[1], limit)
        checks.note(f"compiled, {kind}: graphs", True, seconds=round(seconds, 1), **graphs_made())


def check_recorded(checks, device) -> None:
    """A loss recorded as a CUDA graph, replayed on other tokens, against the plain one."""
    model = GPT(GPTConfig(4096, 1024, 4, 128, 4, 32, bandwidth=128), seed=3).to(device)
    recorded = Recorded(loss_of)
    for n_texts, seed in ((4, 1), (4, 2), (2, 3), (4, 4)):
        x, y = tokens_for(4096, n_texts, 1024, device, seed)
        expected = loss_and_slopes(model, x, y, True)
        found = loss_and_slopes(model, x, y, False, lambda x, y: recorded(model, x, y, True))
        checks.near(f"recorded, {n_texts} texts, {seed}: loss", found[0], expected[0], 1e-3)
        checks.near(f"recorded, {n_texts} texts, {seed}: gradients", found[1], expected[1], 2e-2)


def check_text(checks, device, kinds) -> None:
    """Cache, rings, padding and the sliding window on the device write what the plain loop writes."""
    config = GPTConfig(61, 64, 4, 64, 4, 16, kinds, bandwidth=12)
    model = GPT(config, seed=4)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3 if p.dim() > 1 else 1)  # far from ties, where rounding would choose
    prompt = torch.randint(61, (3, 20), generator=torch.Generator().manual_seed(5))
    here = generate_slowly(model.eval(), prompt, 60, temperature=0)
    model, prompt, what = model.to(device), prompt.to(device), " and ".join(kinds)
    slowly = generate_slowly(model, prompt, 60, temperature=0)
    checks.same(f"{what}: the plain loop, as on a processor", slowly, here)
    checks.same(f"{what}: cache, ring, window", generate(model, prompt, 60, temperature=0), slowly)
    dice = [torch.Generator(device).manual_seed(6) for _ in range(2)]
    drawn = generate(model, prompt, 30, top_k=5, generator=dice[0])
    checks.same(f"{what}: drawn", drawn, generate_slowly(model, prompt, 30, top_k=5, generator=dice[1]))
    rows = [prompt[i, : 20 - 6 * i].tolist() for i in range(3)]
    alone = [generate(model, torch.tensor([row], device=device), 30, temperature=0)[0, len(row) :] for row in rows]
    many = torch.tensor(generate_many(model, rows, 30, temperature=0))
    checks.same(f"{what}: prompts of three lengths", many, torch.stack(alone))


def check_files(checks, device) -> None:
    """What the device saves, a processor and the device read back to the last bit."""
    model = GPT(GPTConfig(61, 64, 2, 64, 4, 16, bandwidth=12), seed=7).to(device)
    x = tokens_for(61, 2, 64, device)[0]
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        read = GPT.from_pretrained(folder)
    for name, p in read.named_parameters():
        if not torch.equal(p, model.get_parameter(name).cpu()):
            checks.note(f"saved and read: {name}", False)
    with torch.no_grad():
        checks.same("saved and read: logits", read.to(device)(x), model(x))
