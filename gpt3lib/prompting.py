"""Zero, one or many examples in the prompt: what a model learns from them, and how."""

# Made from book/21_prompting.ipynb by tools/export.py; edit the chapter.
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch.nn import functional as F

from gpt3lib.attention import attention_weights
from gpt3lib.decoding import generate_many
from gpt3lib.files import Refusal
from gpt3lib.sparse_attention import banded_mask
from gpt3lib.tasks import Dice, Task, find, problem, render
from gpt3lib.training import device_of


# What is refused; the workshop at the end of this page has a table of it.
class ShotError(Refusal, ValueError):
    """A prompt that does not fit, or a measurement that cannot be; says what can."""


def n_tracks(row) -> int:
    """How many tokens a model reads before it has said all of a Problem's answer."""
    return len(row.prompt) + len(row.answer) - 1


def check_fits(lengths: list[int], n_ctx: int | None) -> None:
    """Raise ShotError unless the last length fits; lengths: with 0, 1, 2 … examples."""
    shots = len(lengths) - 1
    fitting = [k for k in range(shots + 1) if n_ctx is None or lengths[k] <= n_ctx]
    most = f"at most {fitting[-1]} would" if fitting else "not even the question would"
    words = (
        f"{shots} examples, question and answer have {lengths[-1]} tokens and do not"
    )
    ShotError.unless(shots in fitting, f"{words} fit into n_ctx = {n_ctx}; {most}")


def check_rows(rows: list) -> None:
    """Raise ShotError for no problems at all, and for an empty prompt or answer."""
    ShotError.unless(rows, "there are no problems; ask for at least 1")
    for i, row in enumerate(rows):
        words = f"problem {i} has an empty prompt or answer; both need a token at least"
        ShotError.unless(row.prompt and row.answer, words)


def check_heads(model, heads: list[tuple[int, int]]) -> None:
    """Raise ShotError unless the model has all these (layer, head)."""
    config = model.config
    for layer, head in heads:
        words = f"no head {head} in layer {layer}; both count from 0, and there are "
        words += f"{config.n_layers} layers of {config.n_heads} heads"
        fine = layer in range(config.n_layers) and head in range(config.n_heads)
        ShotError.unless(fine, words)


def answer(model, tokenizer, prompt: str, most: int = 64) -> str:
    """What the model writes behind a prompt: the likeliest tokens, to the line's end.

    most: tokens at most. Raises the errors of generate.
    """
    ids = [tokenizer.end_of_text, *tokenizer.encode(prompt)]
    (end,) = tokenizer.encode("\n")
    new = generate_many(model, [ids], most, temperature=0, stop=end)[0]
    return tokenizer.decode(new).strip()


class Problem(NamedTuple):
    """A prompt, and the answer that belongs behind it, as ids."""

    prompt: list[int]
    answer: list[int]


def as_problem_row(
    encode, start: int, task: Task, examples, question, **looks
) -> Problem:
    """A text begins with the token `start`; an answer ends with its line."""
    text = render(task, examples, question, **looks)
    return Problem([start, *encode(text)], encode(f" {question.answer}\n"))


def few_shot_prompts(
    tokenizer,
    task: Task | str,
    shots: int,
    n: int,
    seed: int | str = 0,
    n_ctx: int | None = None,
    first: int = 0,
    spaced: bool = True,
    **looks,
) -> list[Problem]:
    """Problems first … first + n - 1: a held-out question behind `shots` examples.

    Each draws examples of its own; the same seed gives the same ones everywhere. looks:
    described, separator, layout, see tasks.render. Raises ShotError for a problem of
    more than n_ctx tokens, and TaskError.
    """
    task = find(task) if isinstance(task, str) else task
    encode, start = (
        tokenizer.to_tiktoken("shots").encode_ordinary,
        tokenizer.end_of_text,
    )
    rows = []
    for i in range(first, first + ShotError.unless_whole("n", n)):
        dice = Dice(seed, task.name, shots, i)
        examples, question = problem(task, dice, shots, spaced)
        row = partial(as_problem_row, encode, start, task, question=question, **looks)
        rows.append(row(examples))
        if n_ctx and n_tracks(rows[-1]) > n_ctx:
            fewer = [examples[:k] for k in range(shots + 1)]
            check_fits([n_tracks(row(some)) for some in fewer], n_ctx)
    return rows


@torch.no_grad()
def look(model, rows: list[Problem]) -> list[bool]:
    """are_right in one batch; what stands behind a short text nobody looks at."""
    home, texts = device_of(model), [(prompt + answer)[:-1] for prompt, answer in rows]
    longest = max(map(len, texts))
    tokens = torch.tensor([ids + [0] * (longest - len(ids)) for ids in texts])
    h = model.hidden(tokens.to(home))  # (B, T, d_model)
    right = []
    for track, (prompt, answer) in zip(h, rows):
        said = model.embeddings.unembed(track[len(prompt) - 1 :][: len(answer)])
        right.append(said.argmax(dim=-1).tolist() == answer)
    return right


def are_right(model, rows: list[Problem], most: int = 8192) -> list[bool]:
    """Whether the model would write each answer, exactly, to the end of its line.

    It would if each token of it is the likeliest behind those before it, so one look
    at prompt and answer together tells. most: tokens in a batch. Raises ShotError.
    """
    check_rows(rows)
    order = sorted(range(len(rows)), key=lambda i: -n_tracks(rows[i]))
    found = {}
    while order:  # similar lengths together, the longest first
        size = max(1, most // n_tracks(rows[order[0]]))
        some, order = order[:size], order[size:]
        found |= zip(some, look(model, [rows[i] for i in some]))
    return [found[i] for i in range(len(rows))]


def share_right(model, rows: list[Problem], most: int = 8192) -> float:
    """The share of right answers; see are_right."""
    return sum(are_right(model, rows, most)) / len(rows)


def wilson(right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Where the true share lies, in 95 of 100 measurements: Wilson's interval, 1927.

    All shares p with |right / n - p| ≤ z √(p (1 - p) / n). Raises ShotError.
    """
    fine = ShotError.unless_whole("n", n) >= ShotError.unless_whole("right", right, 0)
    ShotError.unless(fine, f"{right} right of {n}; there cannot be more than all")
    middle, spread = (
        right + z * z / 2,
        z * math.sqrt(right * (n - right) / n + z * z / 4),
    )
    low, high = ((middle + sign * spread) / (n + z * z) for sign in (-1, 1))
    return max(0.0, low), min(1.0, high)


class Score(NamedTuple):
    """How many of n problems were right."""

    right: int
    n: int

    @property
    def share(self) -> float:
        """The accuracy, from 0 to 1."""
        return self.right / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """Where the true share lies, see wilson."""
        return wilson(self.right, self.n)


def measure_task(model, tokenizer, task, shots: int, n=500, seed=0, **options) -> Score:
    """The Score on n problems; options: see few_shot_prompts. Raises ShotError."""
    options = {"n_ctx": model.config.n_ctx} | options
    rows = few_shot_prompts(tokenizer, task, shots, n, seed, **options)
    return Score(sum(are_right(model, rows)), n)


SHOTS = (0, 1, 2, 4, 8, 16, 32)


def shots_curve(model, tokenizer, task, shots=SHOTS, n=500, seed=0, **options) -> dict:
    """The Score for each number of examples."""
    return {
        k: measure_task(model, tokenizer, task, k, n, seed, **options) for k in shots
    }


@torch.no_grad()
def gaze(model, tokens: torch.Tensor) -> Iterator[torch.Tensor]:
    """(B, T) ids -> for each layer (B, n_heads, T, T): how much each looks at which."""
    n, x = tokens.shape[1], model.embeddings(tokens)
    for block, kind in zip(model.blocks, model.config.kinds):
        a, y = block.attention, block.ln_1(x)
        mask = banded_mask(n, n, n if kind == "dense" else a.bandwidth, tokens.device)
        yield attention_weights(a.heads(a.wq(y)), a.heads(a.wk(y)), mask)
        x = block(x)


def copying_scores(model, rows: list[Problem]) -> list[list[float]]:
    """Of each head, how much it looks at the very token that is to be said next.

    A mean over the tokens of the answers that stand in the text already.
    [layer][head].
    """
    home, looked, n = device_of(model), [0.0] * model.config.n_layers, 0
    for prompt, answer in rows:
        ids = torch.tensor(prompt + answer).to(home)
        now = torch.arange(len(prompt) - 1, len(ids) - 1)  # tracks that say the answer
        holds = (ids[:-1] == ids[now + 1, None]).tril(
            len(prompt) - 1
        )  # (tracks, tracks before)
        n += holds.any(dim=1).sum().item()
        for layer, weights in enumerate(gaze(model, ids[None, :-1])):
            looked[layer] += (weights[0, :, now] * holds).sum(dim=(1, 2))  # (n_heads,)
    return [(sums / n).tolist() for sums in looked]


@contextmanager
def silenced(model, heads: list[tuple[int, int]]) -> Iterator[None]:
    """Meanwhile these heads, (layer, head) counted from 0, say nothing.

    What a head has found is set to zero before Wo. Raises ShotError.
    """
    check_heads(model, heads)

    def hush(layer):
        mute = [head for number, head in heads if number == layer]

        def hook(wo, inputs):
            x = model.blocks[layer].attention.heads(inputs[0]).clone()
            x[:, mute] = 0  # (B, n_heads, T, d_head)
            return x.transpose(1, 2).flatten(2)

        return model.blocks[layer].attention.wo.register_forward_pre_hook(hook)

    hooks = [hush(layer) for layer in {layer for layer, _ in heads}]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def induction_scores(model, n: int = 50, n_texts: int = 16) -> dict:
    """Of each head, how much a token of a random row's second copy looks at what
    followed its first copy; and the loss in nats on both copies.

    {"scores": [layer][head], "first copy", "second copy"}; n: tokens in a row.
    """
    config, home = model.config, device_of(model)
    n = min(n, config.n_ctx // 2, config.bandwidth - 1)
    dice = torch.Generator().manual_seed(0)
    row = torch.randint(config.vocab_size - 1, (n_texts, n), generator=dice)
    tokens = torch.cat([row, row], dim=1).to(home)  # (n_texts, 2n)
    places = torch.arange(n, 2 * n - 1).to(home)
    found = [
        w[:, :, places, places - n + 1].mean(dim=(0, 2)) for w in gaze(model, tokens)
    ]
    logits, targets = model(tokens)[:, :-1], tokens[:, 1:]
    pair = logits.flatten(0, 1), targets.flatten()
    losses = F.cross_entropy(*pair, reduction="none").view(n_texts, -1).mean(dim=0)
    first, second = losses[: n - 1].mean(), losses[n:].mean()
    scores = [[round(score, 4) for score in layer.tolist()] for layer in found]
    return {"scores": scores, "first copy": first.item(), "second copy": second.item()}
