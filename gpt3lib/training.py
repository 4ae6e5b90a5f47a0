"""Predict, compare, update: from one sentence to a model that learns to write before
your eyes."""

# Made from book/13_training.ipynb by tools/export.py; edit the chapter.
import math
from collections.abc import Iterable
from contextlib import nullcontext

import torch
from torch import nn

from gpt3lib.embeddings import check_tokens
from gpt3lib.files import Refusal, as_float, is_whole


# What training refuses; the workshop at the end of this page has a table of it.
class TrainingError(Refusal, ValueError):
    """A run that cannot start, or must stop because its numbers are none any more."""


def check_text(tokens: torch.Tensor, vocab_size: int | None = None) -> None:
    """Raise TrainingError unless `tokens` is one long tensor of ids.

    Raises TokenError for an id that a vocabulary of this size does not have.
    """
    kind, fine = type(tokens).__name__, isinstance(tokens, torch.Tensor)
    if fine:
        kind = f"{tuple(tokens.shape)} {tokens.dtype}"
        fine = tokens.dim() == 1 and tokens.dtype in (torch.int64, torch.int32)
    words = f"tokens must be one long tensor of ids, (N,) torch.int64, not {kind}"
    TrainingError.unless(fine, f"{words}; use torch.tensor(ids), or pack")
    if vocab_size is not None and len(tokens):
        check_tokens(tokens[None], vocab_size)


def check_windows(tokens, n_ctx: int, n_windows: int = 1) -> tuple[int, int]:
    """Raise TrainingError unless `tokens` holds a window: n_ctx inputs, and targets.

    n_windows, how many of them are wanted, and n_ctx must be whole numbers from 1 on;
    both come back as Python's, which never overflow.
    """
    check_text(tokens)
    n_ctx = TrainingError.unless_whole("n_ctx", n_ctx)
    n_windows = TrainingError.unless_whole("the number of windows", n_windows)
    words = f"{len(tokens)} tokens hold no window of {n_ctx} + 1"
    right = "use a longer text or a smaller n_ctx"
    TrainingError.unless(len(tokens) > n_ctx, f"{words}; {right}")
    return n_ctx, n_windows


def check_starts(starts: torch.Tensor, n_places: int) -> None:
    """Raise TrainingError unless `starts` are places in 0 … n_places - 1."""
    check_text(starts)
    if len(starts) and not 0 <= starts.min() <= starts.max() < n_places:
        words = f"starts go from {starts.min()} to {starts.max()}"
        raise TrainingError(f"{words}; windows start at 0 to {n_places - 1}")


def check_learner(model: nn.Module) -> None:
    """Raise TrainingError unless this can be trained: it has a config and a loss."""
    words = f"model is a {type(model).__name__}; it must be a GPT"
    TrainingError.unless(hasattr(model, "config") and hasattr(model, "loss"), words)


def check_seed(seed: int, name: str = "seed") -> None:
    """Raise TrainingError for a seed that is no whole number, or a gigantic one."""
    words = f"{name} is {seed!r}; choose a whole number of 12 digits"
    TrainingError.unless(is_whole(seed, -(2**43)) and seed <= 2**43, words)


def check_run(n_steps, batch_size, warmup, peak) -> tuple:
    """The four as Python's numbers; TrainingError for what makes no sense."""
    n_steps = TrainingError.unless_whole("n_steps", n_steps)
    batch_size = TrainingError.unless_whole("batch_size", batch_size)
    right = f"choose 0 to {n_steps}, a whole number"
    words = f"warmup is {warmup!r}, but there are {n_steps} steps; {right}"
    TrainingError.unless(is_whole(warmup, 0) and warmup <= n_steps, words)
    words = f"peak is {peak!r}; it must be a number, 0 or more"
    TrainingError.unless(0 <= as_float(peak) < math.inf, words)  # nan is not
    return n_steps, batch_size, int(warmup), float(peak)


def check_ways(on_step, bf16: bool) -> None:
    """Raise TrainingError unless on_step can be called, or is None; bf16 is a bool."""
    words = f"on_step is {on_step!r}; it must be a function, or None"
    TrainingError.unless(on_step is None or callable(on_step), words)
    words = f"bf16 is {bf16!r}; it must be True or False"
    TrainingError.unless(isinstance(bf16, bool), words)


def check_documents(tokenizer, documents: Iterable[str]) -> list[str]:
    """The documents as a list. TrainingError for other things, or another tokenizer."""
    words = f"tokenizer is a {type(tokenizer).__name__}; it must be a Tokenizer"
    TrainingError.unless(hasattr(tokenizer, "to_tiktoken"), words)
    if isinstance(documents, str | bytes) or not isinstance(documents, Iterable):
        kind = type(documents).__name__
        raise TrainingError(f"documents is a {kind}; for one text use [text]")
    documents = list(documents)
    for i, document in enumerate(documents):
        if not isinstance(document, str):
            kind = type(document).__name__
            raise TrainingError(f"document {i} is a {kind}; it must be a text, str")
    return documents


def check_bigrams(train, validation, vocab_size: int, weight: float) -> None:
    """Raise TrainingError or TokenError for what bigram_loss cannot count."""
    words = f"vocab_size is {vocab_size!r}; it must be a whole number, 1 to 2**31 - 1"
    TrainingError.unless(is_whole(vocab_size) and vocab_size < 2**31, words)
    for tokens in (train, validation):
        check_text(tokens, vocab_size)
    words = f"{len(validation)} validation tokens hold no pair; 2 are the least"
    TrainingError.unless(len(validation) >= 2, words)
    words = f"weight is {weight!r}; it must be a share, 0 to 1"
    TrainingError.unless(0 <= as_float(weight) <= 1, words)


def check_finite(step: int, loss: float, norm: float) -> None:
    """Raise TrainingError when a loss or the length of a gradient is not finite."""
    right = "lower peak, or look at the data"
    words = f"step {step}: loss {loss}, gradient {norm}; {right}"
    TrainingError.unless(math.isfinite(loss + norm), words)


def device_of(model: nn.Module) -> torch.device:
    """Where a model's numbers are, and its tokens must be."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def loss_of(model, inputs, targets, bf16: bool = False) -> torch.Tensor:
    """The model's loss of a batch, which goes to the model's device first.

    bf16: matrix products are made in bfloat16.
    """
    device = device_of(model)
    with torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext():
        return model.loss(inputs.to(device), targets.to(device))


def pack(tokenizer, documents: Iterable[str]) -> torch.Tensor:
    """All documents as one long tensor of ids (int64), each after an end-of-text token.

    That is how GPT-3's training text was laid out ([B20] App. B). Raises TrainingError
    for one text instead of a list of them, and for a tokenizer that is none.
    """
    documents, ids = check_documents(tokenizer, documents), []
    encode = tokenizer.to_tiktoken("packing").encode_ordinary
    for document in documents:
        ids += [tokenizer.end_of_text, *encode(document)]
    return torch.tensor(ids, dtype=torch.int64)


HELD_OUT = 26  # every 26th document is kept for validation


def training_and_validation(tokenizer, documents: Iterable[str]) -> tuple:
    """Two long tensors: documents to train on, and every 26th, which is held out."""
    documents = check_documents(tokenizer, documents)
    kept = [document for i, document in enumerate(documents) if i % HELD_OUT]
    return pack(tokenizer, kept), pack(tokenizer, documents[::HELD_OUT])


def windows(tokens, n_ctx: int, starts) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets (B, n_ctx) of the windows of (N,) tokens at `starts` (B,).

    A target is the next token. Raises TrainingError for a text without such windows.
    """
    n_ctx, _ = check_windows(tokens, n_ctx)
    check_starts(starts, len(tokens) - n_ctx)
    offsets = torch.arange(n_ctx + 1)
    chunk = tokens[starts[:, None] + offsets]  # (B, n_ctx + 1)
    return chunk[:, :-1], chunk[:, 1:]


def batch(tokens: torch.Tensor, batch_size: int, n_ctx: int, seed: int, step: int):
    """The inputs and targets of one step, (batch_size, n_ctx) each.

    A pure function of (seed, step). Windows start anywhere, also twice in the same
    place. Raises TrainingError for a text without a window.
    """
    n_ctx, batch_size = check_windows(tokens, n_ctx, batch_size)
    check_seed(seed), check_seed(step, "step")
    dice = torch.Generator().manual_seed(int(seed) * 1_000_003 + int(step))
    starts = torch.randint(len(tokens) - n_ctx, (batch_size,), generator=dice)
    return windows(tokens, n_ctx, starts)


def bigram_loss(
    train: torch.Tensor, validation: torch.Tensor, vocab_size: int, weight: float = 0.9
) -> float:
    """Loss in nats of the best guess from one token alone, by counting.

    P(b | a) = weight · count(ab) / count(a·)
             + (1 - weight) · (count(b) + 1) / (N + vocab_size).
    weight=0 counts single tokens only. Pairs are kept in a sorted list: memory grows
    with the text and the vocabulary, not with its square. Raises TrainingError for a
    validation text without a pair, TokenError for an id that the vocabulary lacks.
    """
    check_bigrams(train, validation, vocab_size, weight)
    vocab_size = int(vocab_size)
    train, validation = train.long(), validation.long()
    single = torch.bincount(train, minlength=vocab_size).double()
    followed = torch.bincount(train[:-1], minlength=vocab_size).double()
    names = train[:-1] * vocab_size + train[1:]  # a number for each pair
    names = torch.cat([names, names.new_tensor([vocab_size**2])])  # larger than any
    pairs, counts = torch.unique(names, return_counts=True)
    a, b = validation[:-1], validation[1:]
    wanted = a * vocab_size + b
    place = torch.searchsorted(pairs, wanted)
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

    The model is put into eval mode meanwhile; tokens go to its device by themselves.
    Raises TrainingError for a text without a window.
    """
    check_learner(model)
    n_ctx, n_windows = check_windows(tokens, model.config.n_ctx, n_windows)
    last = len(tokens) - n_ctx - 1
    starts = torch.arange(n_windows) * last // max(1, n_windows - 1)
    pairs = [part.split(8) for part in windows(tokens, n_ctx, starts)]
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        total = sum(loss_of(model, x, y).item() * len(x) for x, y in zip(*pairs))
    finally:
        for part, mode in modes:
            part.training = mode
    return total / n_windows


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
    in bfloat16; weights and their averages stay float32. Each batch goes to the model's
    device. At the end the model is in eval mode. Raises TrainingError or TokenError,
    before any work for settings or ids that make no sense, and at once when a loss or
    gradient is not finite.
    """
    n_steps, batch_size, warmup, peak = check_run(n_steps, batch_size, warmup, peak)
    check_ways(on_step, bf16), check_seed(seed), check_learner(model)
    check_windows(tokens, model.config.n_ctx)
    check_text(tokens, model.config.vocab_size)
    optimizer = make_optimizer(model)
    model.train()
    losses = []
    for step in range(n_steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, n_steps, peak, warmup)
        inputs, targets = batch(tokens, batch_size, model.config.n_ctx, seed, step)
        loss = loss_of(model, inputs, targets, bf16)  # predict and compare
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
