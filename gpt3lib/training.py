"""Predict, compare, update, repeat: sliding windows, cross-entropy, AdamW, and a model trained before your eyes."""

import math

import torch
from torch import nn


HELD_OUT = 26  # every 26th document is kept for validation


def pack(tokenizer, documents: list[str]) -> torch.Tensor:
    """All documents as one long tensor of ids, each after an end-of-text token ([B20] App. B)."""
    encode = tokenizer.to_tiktoken("packing").encode_ordinary
    return torch.tensor([i for document in documents for i in (tokenizer.end_of_text, *encode(document))])


def training_and_validation(tokenizer, documents: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Two tensors of ids: the documents to train on, and every 26th, which training never sees."""
    kept = [document for i, document in enumerate(documents) if i % HELD_OUT]
    return pack(tokenizer, kept), pack(tokenizer, documents[::HELD_OUT])


def windows(tokens: torch.Tensor, n_ctx: int, starts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets (B, n_ctx) of the windows that begin at `starts` (B,); a target is the next token."""
    offsets = torch.arange(n_ctx + 1)
    chunk = tokens[starts[:, None] + offsets]  # (B, n_ctx + 1)
    return chunk[:, :-1], chunk[:, 1:]


def batch(tokens: torch.Tensor, batch_size: int, n_ctx: int, seed: int, step: int):
    """The inputs and targets of one step, a pure function of (seed, step): nothing to save, nothing to lose."""
    if len(tokens) <= n_ctx:
        raise ValueError(f"{len(tokens)} tokens hold no window of {n_ctx} + 1; use a longer text or a smaller n_ctx")
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    starts = torch.randint(len(tokens) - n_ctx, (batch_size,), generator=generator)
    return windows(tokens, n_ctx, starts)


def bigram_loss(train: torch.Tensor, validation: torch.Tensor, vocab_size: int, weight: float = 0.9) -> float:
    """Loss in nats of the best guess from one token alone: counted pairs, mixed with counted tokens.

    P(b | a) = weight · count(ab) / count(a) + (1 - weight) · (count(b) + 1) / (N + vocab_size).
    """
    single = torch.bincount(train, minlength=vocab_size).float()
    pairs = torch.bincount(train[:-1] * vocab_size + train[1:], minlength=vocab_size**2).float()
    a, b = validation[:-1], validation[1:]
    unigram = (single[b] + 1) / (len(train) + vocab_size)
    bigram = pairs[a * vocab_size + b] / single[a].clamp(min=1)
    return -(weight * bigram + (1 - weight) * unigram).log().mean().item()


def learning_rate(step: int, n_steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up to `peak`, then a cosine down to a tenth of it ([B20] App. B, there counted in tokens)."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, n_steps - warmup)
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


def make_optimizer(model: nn.Module, weight_decay: float = 0.1) -> torch.optim.AdamW:
    """AdamW with the paper's betas and epsilon ([B20] App. B); matrices decay, biases and gains do not."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-8, fused=True)


@torch.no_grad()
def evaluate(model: nn.Module, tokens: torch.Tensor, n_windows: int = 32) -> float:
    """Mean loss in nats over windows spread evenly over `tokens`; the same ones every time."""
    n_ctx = model.config.n_ctx
    starts = torch.linspace(0, len(tokens) - n_ctx - 1, n_windows).long()
    inputs, targets = windows(tokens, n_ctx, starts)
    losses = [model.loss(x, y) for x, y in zip(inputs.split(8), targets.split(8))]
    return torch.stack(losses).mean().item()


def train(model, tokens, n_steps, batch_size=16, peak=3e-3, warmup=50, seed=0, on_step=None) -> list[float]:
    """Train a model in place on a long tensor of ids; returns the loss of each step, in nats.

    on_step(step, loss), if given, is called after each update.
    """
    optimizer = make_optimizer(model)
    model.train()
    losses = []
    for step in range(n_steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, n_steps, peak, warmup)
        inputs, targets = batch(tokens, batch_size, model.config.n_ctx, seed, step)
        loss = model.loss(inputs, targets)  # predict and compare
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()  # update
        losses.append(loss.item())
        if on_step is not None:
            on_step(step, losses[-1])
    model.eval()
    return losses
