"""Predict, compare, update, repeat: from one sentence to a model that is trained before your eyes."""

# Made from book/08_training.ipynb by tools/export.py; edit the chapter, not this file.
import math

import torch
from torch import nn


class TrainingError(ValueError):
    """A run that cannot start, or one that must stop because its numbers have left the road."""


def pack(tokenizer, documents: list[str]) -> torch.Tensor:
    """All documents as one long tensor of ids (int64), each after an end-of-text token ([B20] App. B)."""
    encode = tokenizer.to_tiktoken("packing").encode_ordinary
    ids = [
        i for document in documents for i in (tokenizer.end_of_text, *encode(document))
    ]
    return torch.tensor(ids, dtype=torch.int64)


HELD_OUT = 26  # every 26th document is kept for validation


def training_and_validation(
    tokenizer, documents: list[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two tensors of ids: the documents to train on, and every 26th, which training never sees."""
    kept = [document for i, document in enumerate(documents) if i % HELD_OUT]
    return pack(tokenizer, kept), pack(tokenizer, documents[::HELD_OUT])


def windows(
    tokens: torch.Tensor, n_ctx: int, starts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets (B, n_ctx) of the windows that begin at `starts` (B,); a target is the next token."""
    offsets = torch.arange(n_ctx + 1)
    chunk = tokens[starts[:, None] + offsets]  # (B, n_ctx + 1)
    return chunk[:, :-1], chunk[:, 1:]


def check_length(tokens: torch.Tensor, n_ctx: int) -> None:
    """Raise TrainingError unless `tokens` holds at least one window of n_ctx inputs and their targets."""
    if len(tokens) <= n_ctx:
        raise TrainingError(
            f"{len(tokens)} tokens hold no window of {n_ctx} + 1; use a longer text or a smaller n_ctx"
        )


def batch(tokens: torch.Tensor, batch_size: int, n_ctx: int, seed: int, step: int):
    """The inputs and targets of one step, (batch_size, n_ctx) each: a pure function of (seed, step).

    Windows start anywhere, also twice in the same place. Raises TrainingError for a text without a window.
    """
    check_length(tokens, n_ctx)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    starts = torch.randint(len(tokens) - n_ctx, (batch_size,), generator=generator)
    return windows(tokens, n_ctx, starts)


def bigram_loss(
    train: torch.Tensor, validation: torch.Tensor, vocab_size: int, weight: float = 0.9
) -> float:
    """Loss in nats of the best guess from one token alone: counted pairs, mixed with counted tokens.

    P(b | a) = weight · count(ab) / count(a·) + (1 - weight) · (count(b) + 1) / (N + vocab_size).
    weight=0 counts single tokens only. Pairs are kept in a sorted list, so any vocabulary fits into memory.
    """
    single = torch.bincount(train, minlength=vocab_size).double()
    followed = torch.bincount(train[:-1], minlength=vocab_size).double()
    pairs, counts = torch.unique(
        train[:-1] * vocab_size + train[1:], return_counts=True
    )
    a, b = validation[:-1], validation[1:]
    wanted = a * vocab_size + b
    place = torch.searchsorted(pairs, wanted).clamp(max=len(pairs) - 1)
    seen = torch.where(pairs[place] == wanted, counts[place], 0).double()
    unigram = (single[b] + 1) / (len(train) + vocab_size)
    return (
        -(weight * seen / followed[a].clamp(min=1) + (1 - weight) * unigram)
        .log()
        .mean()
        .item()
    )


def make_optimizer(model: nn.Module, weight_decay: float = 0.1) -> torch.optim.AdamW:
    """AdamW with the paper's betas and epsilon ([B20] App. B); matrices decay, biases and gains do not."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-8, fused=True)


def learning_rate(step: int, n_steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up to `peak`, a cosine down to a tenth of it, then level ([B20] App. B, which counts tokens)."""
    if step < warmup:
        return peak * (step + 1) / warmup
    if step >= n_steps:
        return peak * 0.1
    progress = (step - warmup) / (n_steps - warmup)
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


@torch.no_grad()
def evaluate(model: nn.Module, tokens: torch.Tensor, n_windows: int = 32) -> float:
    """Mean loss in nats over windows spread evenly over `tokens`; the same ones every time.

    The model is put into eval mode meanwhile. Raises TrainingError for a text without a window.
    """
    n_ctx, was_training = model.config.n_ctx, model.training
    check_length(tokens, n_ctx)
    starts = (
        torch.arange(n_windows) * (len(tokens) - n_ctx - 1) // max(1, n_windows - 1)
    )
    inputs, targets = windows(tokens, n_ctx, starts)
    model.eval()
    losses = [
        model.loss(x, y) * len(x) for x, y in zip(inputs.split(8), targets.split(8))
    ]
    model.train(was_training)
    return torch.stack(losses).sum().item() / n_windows


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
    """Train a model in place on a long tensor of ids; returns the loss of each step, in nats.

    on_step(step, loss), if given, is called after each update. bf16: matrix products in bfloat16 (autocast),
    weights and their averages stay float32. Raises TrainingError, before any work for settings that make
    no sense, and at once when a loss or gradient is not finite.
    """
    if n_steps < 1 or batch_size < 1:
        raise TrainingError(
            f"n_steps is {n_steps} and batch_size {batch_size}; both must be at least 1"
        )
    if not 0 <= warmup <= n_steps:
        raise TrainingError(
            f"warmup is {warmup}, but there are {n_steps} steps; choose 0 to {n_steps}"
        )
    check_length(tokens, model.config.n_ctx)
    optimizer = make_optimizer(model)
    model.train()
    losses = []
    for step in range(n_steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, n_steps, peak, warmup)
        inputs, targets = batch(tokens, batch_size, model.config.n_ctx, seed, step)
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=bf16):
            loss = model.loss(inputs, targets)  # predict and compare
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        losses.append(loss.item())
        if not math.isfinite(losses[-1] + norm.item()):
            raise TrainingError(
                f"step {step}: loss {losses[-1]}, gradient {norm.item()}; lower peak, or look at the data"
            )
        optimizer.step()  # update
        if on_step is not None:
            on_step(step, losses[-1])
    model.eval()
    return losses
