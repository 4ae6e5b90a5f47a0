"""GPT-3's recipe, with tokens as the clock: rate, batch, optimizer, and a step that
fits into memory."""

# Made from book/14_recipe.ipynb by tools/export.py; edit the chapter.
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from gpt3lib.files import Refusal, as_float, is_whole
from gpt3lib.training import loss_of, make_optimizer


# What a recipe refuses; the workshop at the end of this page has a table of it.
class RecipeError(Refusal, ValueError):
    """A recipe that contradicts itself, or a step that cannot be made."""


def as_tokens(name: str, value, least: int = 1) -> int:
    """A number of tokens as Python's int; 375e6 will do. Raises RecipeError."""
    huge = is_whole(value) and as_float(value) != as_float(value)  # nan
    RecipeError.unless(not huge, f"{name} is too large for a float; take a smaller one")
    whole = int(value) if as_float(value).is_integer() else value
    return RecipeError.unless_whole(name, whole, least)


def check_above_zero(name: str, value) -> None:
    """Raise RecipeError unless a value is a finite number above 0."""
    fine = 0 < as_float(value) < math.inf
    RecipeError.unless(fine, f"{name} is {value!r}; it must be a number above 0")


def check_recipe(recipe: "Recipe") -> None:
    """Raise RecipeError, saying what would be right, unless one can train by it."""
    least = {"n_tokens": 1, "batch_tokens": 1, "first_batch_tokens": 1, "ramp_step": 1}
    for name in (*least, "warmup_tokens", "decay_tokens", "ramp_tokens"):
        value = as_tokens(name, getattr(recipe, name), least.get(name, 0))
        object.__setattr__(recipe, name, value)
    order = ("first_batch_tokens", "batch_tokens"), ("warmup_tokens", "decay_tokens")
    for low, high in (*order, ("decay_tokens", "n_tokens")):
        a, b = getattr(recipe, low), getattr(recipe, high)
        right = f"it can be {b:,} at most. Recipe.scaled makes the paper's proportions"
        RecipeError.unless(a <= b, f"{low} is {a:,}, but {high} is {b:,}; {right}")
    check_rules(recipe)


def check_rules(recipe: "Recipe") -> None:
    """Raise RecipeError unless rate, decay, clip, betas and eps make sense."""
    check_above_zero("peak", recipe.peak)
    check_clip(recipe.clip)
    for name in ("weight_decay", "eps"):
        value = getattr(recipe, name)
        words = f"{name} is {value!r}; it must be a number, 0 or more"
        RecipeError.unless(0 <= as_float(value) < math.inf, words)
    betas = tuple(recipe.betas) if isinstance(recipe.betas, Iterable) else ()
    words = f"betas is {recipe.betas!r}; it must be two numbers, such as (0.9, 0.95)"
    RecipeError.unless(len(betas) == 2, words)
    fine = all(0 <= as_float(beta) < 1 for beta in betas)
    RecipeError.unless(fine, f"betas is {betas}; both must be from 0 to below 1")
    object.__setattr__(recipe, "betas", betas)


def check_clip(clip: float) -> None:
    """Raise RecipeError unless a gradient can be clipped to this length."""
    words = f"clip is {clip!r}; it must be a length above 0, or math.inf for none"
    RecipeError.unless(as_float(clip) > 0, words)


def check_position(tokens: int) -> None:
    """Raise RecipeError unless `tokens` can be a place on the clock."""
    fine = 0 <= as_float(tokens) < math.inf
    RecipeError.unless(fine, f"tokens is {tokens!r}; the clock starts at 0")


def check_context(n_ctx: int, n_tokens: float = math.inf) -> None:
    """Raise RecipeError unless n_ctx is a whole number, and n_tokens are as many."""
    RecipeError.unless_whole("n_ctx", n_ctx)
    right = f"a sequence of {n_ctx}; train on more, or with a smaller n_ctx"
    words = f"n_tokens is {n_tokens:,}, less than {right}"
    RecipeError.unless(n_ctx <= n_tokens, words)


def check_row(name: str, rows: dict) -> None:
    """Raise RecipeError unless the table has a row of this name."""
    right = "For another model or another number of tokens take Recipe.scaled"
    words = f"Table 2.1 has no {name!r}; there are {', '.join(rows)}. {right}"
    RecipeError.unless(name in [*rows], words)


def check_recomputed(model: nn.Module, every: int) -> None:
    """Raise RecipeError unless every so many blocks of it can be recomputed."""
    blocks = getattr(model, "blocks", None)
    words = f"model is a {type(model).__name__}; it must be a GPT"
    RecipeError.unless(isinstance(blocks, nn.ModuleList), words)
    RecipeError.unless_whole("every", every)
    words = "the model's blocks are recomputed already; once is enough"
    RecipeError.unless(not any("forward" in vars(block) for block in blocks), words)


def check_batches(batches: Iterable, equal: bool = False) -> list:
    """The micro-batches as a list. Raises RecipeError unless each is a pair.

    equal: there must be two at least, all of one size.
    """
    batches, least = list(batches), 1 + equal
    words = f"{len(batches)} micro-batches; {least} are the least"
    RecipeError.unless(len(batches) >= least, words)
    for pair in batches:
        right = "a pair (inputs, targets)"
        words = f"a micro-batch must be {right}, not a {type(pair).__name__}"
        fine = isinstance(pair, tuple | list) and len(pair) == 2
        RecipeError.unless(fine, f"{words}; for a single one use [(inputs, targets)]")
    sizes = {targets.numel() for _, targets in batches}
    words = "micro-batches of different sizes; make them equally large"
    RecipeError.unless(not equal or len(sizes) == 1, words)
    return batches


def check_sizes(b_small: float, b_big: float) -> None:
    """Raise RecipeError unless the second batch is larger than the first."""
    words = f"b_small is {b_small}, b_big {b_big}; the first must be the smaller one"
    RecipeError.unless(0 < b_small < b_big, words)


def step_if_finite(optimizer: torch.optim.Optimizer, number: torch.Tensor) -> None:
    """optimizer.step(), unless a number is nan or infinite.

    A fused optimizer looks at the number on the device, so that nobody waits for it:
    found_inf is the flag by which torch's GradScaler, too, makes it skip a step.
    """
    if not all(group.get("fused") for group in optimizer.param_groups):
        if number.isfinite():
            optimizer.step()
        return
    optimizer.found_inf = (~number.isfinite()).float()
    try:
        optimizer.step()
    finally:
        del optimizer.found_inf


def warm_up_and_cosine(tokens, peak: float, warmup: int, decay: int) -> float:
    """The learning rate after so many tokens.

    Linear to `peak` at `warmup`, half a cosine to a tenth of it at `decay`, then level.
    """
    if tokens < warmup:
        return peak * tokens / warmup
    if tokens >= decay:
        return peak * 0.1
    progress = (tokens - warmup) / (decay - warmup)  # 0 … 1
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


# name: (batch in tokens, peak) of [B20] Table 2.1, and our length of the batch ramp
TABLE_BATCHES = {
    "gpt3-125m": (256 * 2048, 6.0e-4, 4_000_000_000),
    "gpt3-350m": (256 * 2048, 3.0e-4, 4_000_000_000),
    "gpt3-760m": (256 * 2048, 2.5e-4, 4_000_000_000),
    "gpt3-1.3b": (512 * 2048, 2.0e-4, 6_000_000_000),
    "gpt3-2.7b": (512 * 2048, 1.6e-4, 6_000_000_000),
    "gpt3-6.7b": (1024 * 2048, 1.2e-4, 8_000_000_000),
    "gpt3-13b": (1024 * 2048, 1.0e-4, 8_000_000_000),
    "gpt3-175b": (1536 * 2048, 0.6e-4, 12_000_000_000),
}


def growing_batch(tokens, first: int, full: int, ramp: int) -> int:
    """The batch in tokens after so many tokens: linear from `first` to `full`."""
    if tokens >= ramp:
        return full
    return first + (full - first) * int(tokens) // ramp


class Step(NamedTuple):
    """One update of a run: what it reads and how far it goes."""

    number: int  # from 0
    tokens: int  # read before it
    n_sequences: int  # read by it
    rate: float  # the learning rate


def walk(recipe: "Recipe", n_ctx: int) -> Iterator[Step]:
    """All steps of a run, one after the other: each begins where the last one ended."""
    number, taken, end = 0, 0, recipe.n_tokens // n_ctx
    while taken < end:
        size = min(recipe.batch_size(taken * n_ctx, n_ctx), end - taken)
        rate = recipe.learning_rate((taken + size) * n_ctx)
        yield Step(number, taken * n_ctx, size, rate)
        number, taken = number + 1, taken + size


@dataclass(frozen=True)
class Recipe:
    """How a model is trained ([B20] App. B); the clock counts tokens.

    n_tokens: the length of the run; peak: of the learning rate; batch_tokens: the full
    batch. warmup_tokens, decay_tokens and ramp_tokens: where on the clock the warm-up,
    the cosine and the growth of the batch from first_batch_tokens end; ramp_step: by
    how many sequences it grows at a time. The rest is AdamW's and the clipping's.
    Raises RecipeError for what contradicts itself.
    """

    n_tokens: int
    peak: float
    batch_tokens: int
    first_batch_tokens: int = 16 * 2048
    warmup_tokens: int = 375_000_000
    decay_tokens: int = 260_000_000_000
    ramp_tokens: int = 4_000_000_000
    ramp_step: int = 1
    weight_decay: float = 0.1
    clip: float = 1.0
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8

    def __post_init__(self):
        check_recipe(self)

    @classmethod
    def from_name(cls, name: str, **changes) -> "Recipe":
        """A row of [B20] Table 2.1, gpt3-125m … gpt3-175b, over 300 billion tokens.

        changes: fields that are to differ. Raises RecipeError for another name.
        """
        check_row(name, TABLE_BATCHES)
        batch, peak, ramp = TABLE_BATCHES[name]
        fields = {"n_tokens": 300_000_000_000, "peak": peak, "batch_tokens": batch}
        return cls(**fields | {"ramp_tokens": ramp} | changes)

    @classmethod
    def scaled(cls, n_tokens, peak: float, batch_tokens, **changes) -> "Recipe":
        """The proportions of the paper's smallest row for another number of tokens.

        Of 300 parts the warm-up takes 0.375, the ramp 4 and the cosine 260; the first
        batch is a sixteenth. changes: fields that are to differ. Raises RecipeError.
        """
        n = as_tokens("n_tokens", n_tokens)
        fields = {
            "batch_tokens": batch_tokens,
            "first_batch_tokens": max(1, as_tokens("batch_tokens", batch_tokens) // 16),
            "warmup_tokens": n * 375 // 300_000,
            "decay_tokens": n * 260 // 300,
            "ramp_tokens": n * 4 // 300,
        }
        return cls(n_tokens=n, peak=peak, **fields | changes)

    def learning_rate(self, tokens) -> float:
        """The rate after so many tokens. Raises RecipeError for a negative number."""
        check_position(tokens)
        end = self.decay_tokens
        return warm_up_and_cosine(tokens, self.peak, self.warmup_tokens, end)

    def batch_size(self, tokens, n_ctx: int) -> int:
        """How many sequences of n_ctx the step after so many tokens reads, at least 1.

        A multiple of ramp_step, or of what the full batch is if that is less.
        Raises RecipeError.
        """
        check_position(tokens), check_context(n_ctx)
        full = self.batch_tokens
        now = growing_batch(tokens, self.first_batch_tokens, full, self.ramp_tokens)
        if now == full:
            return max(1, full // n_ctx)
        whole = now // n_ctx // self.ramp_step * self.ramp_step
        return max(1, min(max(whole, self.ramp_step), full // n_ctx))

    def steps(self, n_ctx: int, first: int = 0) -> Iterator[Step]:
        """The steps of the run, from number `first` on.

        The last is cut, so that every run reads n_tokens // n_ctx sequences. A step has
        the rate of the moment when its batch has been read. Raises RecipeError.
        """
        check_context(n_ctx, self.n_tokens), as_tokens("first", first, 0)
        return islice(walk(self, n_ctx), int(first), None)

    def n_steps(self, n_ctx: int) -> int:
        """The number of steps. Raises RecipeError."""
        return sum(1 for _ in self.steps(n_ctx))

    def optimizer(self, model: nn.Module) -> torch.optim.AdamW:
        """AdamW for this model: matrices decay, biases and gains do not."""
        optimizer = make_optimizer(model, self.weight_decay)
        for group in optimizer.param_groups:
            group.update(betas=self.betas, eps=self.eps)
        return optimizer


def squared_length(gradients: Iterable[torch.Tensor]) -> torch.Tensor:
    """The squared length of all tensors as one long vector, in float32 at least."""
    exact = (g.to(torch.promote_types(g.dtype, torch.float32)) for g in gradients)
    return torch.stack([g.square().sum() for g in exact]).sum()


def micro_batches(inputs: torch.Tensor, targets: torch.Tensor, size: int) -> list:
    """A batch (B, n_ctx) in pieces of `size` sequences, the last with what is left."""
    RecipeError.unless_whole("size", size)
    return list(zip(inputs.split(size), targets.split(size)))


def accumulate(model, batches: Iterable, bf16=False, loss_of=loss_of) -> torch.Tensor:
    """The mean loss of micro-batches, a tensor; its gradient is added to each .grad.

    Each micro-batch (inputs, targets) counts by its targets that are told, from 0 on.
    """
    batches = check_batches(batches)
    told = [(targets >= 0).sum() for _, targets in batches]
    losses = []
    for (inputs, targets), n in zip(batches, told):
        loss = loss_of(model, inputs, targets, bf16) * n / sum(told)
        loss.backward()  # what it made of memory is free again
        losses.append(loss.detach())
    return torch.stack(losses).sum()


def update(
    model, optimizer, batches, rate, clip=1.0, bf16=False, loss_of=loss_of, accept=None
) -> tuple[torch.Tensor, torch.Tensor]:
    """One step on micro-batches (inputs, targets); returns loss and gradient norm.

    Both are tensors on the model's device: reading them waits for it, nothing else
    here does. The norm is that before clipping. loss_of(model, inputs, targets, bf16):
    what computes a loss, such as a compiled one. A step whose loss or norm is not
    finite, or that accept(loss, norm), if given, refuses, leaves model and optimizer as
    they were. Raises RecipeError without a micro-batch, or for a wrong clip.
    """
    check_clip(clip)
    optimizer.zero_grad()
    loss = accumulate(model, batches, bf16, loss_of)
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
    for group in optimizer.param_groups:
        group["lr"] = rate
    if accept is None or accept(loss, norm):
        step_if_finite(optimizer, loss + norm)
    return loss, norm


def noise_scale(small: float, big: float, b_small: float, b_big: float) -> float:
    """The gradient noise scale tr(Σ) / |G|² ([M18] App. A.1), in the unit of b.

    small, big: mean squared lengths of the gradients of batches of b_small and b_big.
    Infinite when the noise hides the gradient. Raises RecipeError for wrong sizes.
    """
    check_sizes(b_small, b_big)
    signal = (b_big * big - b_small * small) / (b_big - b_small)  # |G|²
    noise = (small - big) / (1 / b_small - 1 / b_big)  # tr(Σ)
    return max(0.0, noise) / signal if signal > 0 else math.inf


def squared_lengths(
    model: nn.Module, batches: Iterable, bf16: bool = False, loss_of=loss_of
) -> tuple[float, float]:
    """Mean squared length of micro-batches' gradients, and that of their mean.

    batches: at least two micro-batches (inputs, targets) of one size. The gradients
    that the model holds are dropped. Raises RecipeError.
    """
    batches = check_batches(batches, equal=True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    mean = [torch.zeros_like(p) for p in parameters]
    small = []
    for inputs, targets in batches:
        loss = loss_of(model, inputs, targets, bf16)
        gradients = torch.autograd.grad(loss, parameters)
        small.append(squared_length(gradients))
        torch._foreach_add_(mean, gradients, alpha=1 / len(batches))
    return torch.stack(small).mean().item(), squared_length(mean).item()


def forward_twice(block: nn.Module, x: torch.Tensor, past=None) -> torch.Tensor:
    """A block whose inside is forgotten, and computed again when gradients need it."""
    run = partial(type(block).forward, block)
    if past is not None or not torch.is_grad_enabled():
        return run(x, past)
    # nothing in a block is drawn by chance, so no random state needs to be kept
    return checkpoint(run, x, use_reentrant=False, preserve_rng_state=False)


@contextmanager
def recomputed(model: nn.Module, every: int = 1) -> Iterator[nn.Module]:
    """Inside `with recomputed(model):` its blocks keep nothing but what goes in.

    The backward pass computes a block again before it needs it. every=2: only every
    second block does so. Gradients stay the same. Raises RecipeError for a model
    without blocks, and for one that is recomputed already.
    """
    check_recomputed(model, every)
    chosen = model.blocks[:: int(every)]
    for block in chosen:
        block.forward = partial(forward_twice, block)
    try:
        yield model
    finally:
        for block in chosen:
            del block.forward


def peak_by_size(n_params: float) -> float:
    """A learning rate for a model of so many parameters, by the line below.

    Beyond Table 2.1 it is a guess. Raises RecipeError unless n_params is above 0.
    """
    check_above_zero("n_params", n_params)
    return 0.134 * n_params**-0.306
