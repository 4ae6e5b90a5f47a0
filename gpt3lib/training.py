"""Predict, compare, update: from one sentence to a model that learns to write before
your eyes."""

# Made from book/13_training.ipynb by tools/export.py; edit the chapter.
import math

import torch
from torch import nn


# What training refuses; the workshop at the end of this page has a table of it.
class TrainingError(ValueError):
    """A run that cannot start, or must stop because its numbers are none any more."""


def check_windows(tokens: torch.Tensor, n_ctx: int) -> None:
    """Raise TrainingError unless `tokens` holds a window: n_ctx inputs, and targets."""
    if len(tokens) <= n_ctx:
        raise TrainingError(
            f"{len(tokens)} tokens hold no window of {n_ctx} + 1; "
            "use a longer text or a smaller n_ctx"
        )


def check_run(n_steps: int, batch_size: int, warmup: int) -> None:
    """Raise TrainingError for a number of steps or texts that makes no sense."""
    if n_steps < 1 or batch_size < 1:
        raise TrainingError(
            f"n_steps is {n_steps} and batch_size {batch_size}; both must be at least 1"
        )
    if not 0 <= warmup <= n_steps:
        raise TrainingError(
            f"warmup is {warmup}, but there are {n_steps} steps; choose 0 to {n_steps}"
        )


def check_finite(step: int, loss: float, norm: float) -> None:
    """Raise TrainingError when a loss or the length of a gradient is not finite."""
    if not math.isfinite(loss + norm):
        raise TrainingError(
            f"step {step}: loss {loss}, gradient {norm}; "
            "lower peak, or look at the data"
        )


def products_in(bf16: bool, tokens: torch.Tensor):
    """A context in which matrix products are made in bfloat16, or as ever."""
    return torch.autocast(tokens.device.type, torch.bfloat16, enabled=bf16)


def pack(tokenizer, documents: list[str]) -> torch.Tensor:
    """All documents as one long tensor of ids (int64), each after an end-of-text token.

    That is how GPT-3's training text was laid out ([B20] App. B).
    """
    encode = tokenizer.to_tiktoken("packing").encode_ordinary
    ids = []
    for document in documents:
        ids += [tokenizer.end_of_text, *encode(document)]
    return torch.tensor(ids, dtype=torch.int64)


HELD_OUT = 26  # every 26th document is kept for validation


def training_and_validation(
    tokenizer, documents: list[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two long tensors: documents to train on, and every 26th, which is held out."""
    kept = [document for i, document in enumerate(documents) if i % HELD_OUT]
    return pack(tokenizer, kept), pack(tokenizer, documents[::HELD_OUT])


def windows(
    tokens: torch.Tensor, n_ctx: int, starts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets (B, n_ctx) of the windows at `starts` (B,).

    A target is the next token.
    """
    offsets = torch.arange(n_ctx + 1)
    chunk = tokens[starts[:, None] + offsets]  # (B, n_ctx + 1)
    return chunk[:, :-1], chunk[:, 1:]


def batch(tokens: torch.Tensor, batch_size: int, n_ctx: int, seed: int, step: int):
    """The inputs and targets of one step, (batch_size, n_ctx) each.

    A pure function of (seed, step). Windows start anywhere, also twice in the same
    place. Raises TrainingError for a text without a window.
    """
    check_windows(tokens, n_ctx)
    dice = torch.Generator().manual_seed(seed * 1_000_003 + step)
    starts = torch.randint(len(tokens) - n_ctx, (batch_size,), generator=dice)
    return windows(tokens, n_ctx, starts)


def bigram_loss(
    train: torch.Tensor, validation: torch.Tensor, vocab_size: int, weight: float = 0.9
) -> float:
    """Loss in nats of the best guess from one token alone, by counting.

    P(b | a) = weight · count(ab) / count(a·)
             + (1 - weight) · (count(b) + 1) / (N + vocab_size).
    weight=0 counts single tokens only. Pairs are kept in a sorted list, so any
    vocabulary fits into memory.
    """
    single = torch.bincount(train, minlength=vocab_size).double()
    followed = torch.bincount(train[:-1], minlength=vocab_size).double()
    names = train[:-1] * vocab_size + train[1:]  # a number for each pair
    pairs, counts = torch.unique(names, return_counts=True)
    a, b = validation[:-1], validation[1:]
    wanted = a * vocab_size + b
    place = torch.searchsorted(pairs, wanted).clamp(max=len(pairs) - 1)
    seen = torch.where(pairs[place] == wanted, counts[place], 0).double()
    unigram = (single[b] + 1) / (len(train) + vocab_size)
    chance = weight * seen / followed[a].clamp(min=1) + (1 - weight) * unigram
    return -chance.log().mean().item()


def make_optimizer(model: nn.Module, weight_decay: float = 0.1) -> torch.optim.AdamW:
    """AdamW with the paper's betas and epsilon ([B20] App. B).

    Matrices decay, biases and gains do not.
    """
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-8, fused=True)


def learning_rate(step: int, n_steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up to `peak`, a cosine down to a tenth of it, then level.

    The shape is [B20]'s (App. B), which counts tokens where we count steps.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    if step >= n_steps:
        return peak * 0.1
    progress = (step - warmup) / (n_steps - warmup)
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


@torch.no_grad()
def evaluate(model: nn.Module, tokens: torch.Tensor, n_windows: int = 32) -> float:
    """Mean loss in nats over windows spread evenly over `tokens`, always the same.

    The model is put into eval mode meanwhile. Raises TrainingError for a text without
    a window.
    """
    n_ctx, was_training = model.config.n_ctx, model.training
    check_windows(tokens, n_ctx)
    last = len(tokens) - n_ctx - 1
    starts = torch.arange(n_windows) * last // max(1, n_windows - 1)
    inputs, targets = windows(tokens, n_ctx, starts)
    model.eval()
    total = sum(
        model.loss(x, y) * len(x) for x, y in zip(inputs.split(8), targets.split(8))
    )
    model.train(was_training)
    return total.item() / n_windows


def train(
    model,
    tokens,
    n_steps,
    batch_size=16,
    peak=3e-3,
    warmup=50,
    seed=0,
    on_step=None,
    bf16=False,
) -> list[float]:
    """Train a model in place on a long tensor of ids; returns each step's loss in nats.

    on_step(step, loss), if given, is called after each update. bf16: matrix products
    in bfloat16; weights and their averages stay float32. Raises TrainingError, before
    any work for settings that make no sense, and at once when a loss or gradient is
    not finite.
    """
    check_run(n_steps, batch_size, warmup)
    check_windows(tokens, model.config.n_ctx)
    optimizer = make_optimizer(model)
    model.train()
    losses = []
    for step in range(n_steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, n_steps, peak, warmup)
        inputs, targets = batch(tokens, batch_size, model.config.n_ctx, seed, step)
        with products_in(bf16, tokens):
            loss = model.loss(inputs, targets)  # predict and compare
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        losses.append(loss.item())
        check_finite(step, losses[-1], norm.item())
        optimizer.step()  # update
        if on_step is not None:
            on_step(step, losses[-1])
    model.eval()
    return losses
