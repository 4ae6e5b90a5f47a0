"""Which answers to believe: a model's memory, repetition and prejudice, measured on
the book's own models."""

# Made from book/23b_limits.ipynb by tools/export.py; edit the chapter.
import math
import re
from collections import Counter

import torch

from gpt3lib.data import grams, words
from gpt3lib.evaluation import Question, choice_scores
from gpt3lib.files import Refusal, as_float
from gpt3lib.tasks import Dice
from gpt3lib.training import device_of, loss_of, make_optimizer


# What is refused; the workshop at the end of this page has a table of it.
class LimitsError(Refusal, ValueError):
    """A measurement that cannot be: too few texts, words or tokens."""


def check_texts(name: str, texts) -> list[str]:
    """The texts as a list. Raises LimitsError for one bare string, or none at all."""
    fine = not isinstance(texts, str | bytes) and all(isinstance(t, str) for t in texts)
    LimitsError.unless(fine and texts, f"{name} must be a list of texts, at least one")
    return list(texts)


def check_token_rows(rows, least: int = 2) -> None:
    """Raise LimitsError unless rows are ids (N, T), with T of at least so many."""
    kind = tuple(rows.shape) if isinstance(rows, torch.Tensor) else type(rows).__name__
    fine = isinstance(rows, torch.Tensor) and rows.dim() == 2 and rows.shape[1] >= least
    words = f"rows must be a tensor of ids, (N, T) with T from {least} on, not {kind}"
    LimitsError.unless(fine and len(rows), words)


def cloze(document: str, before: int = 240) -> list[tuple[str, str]]:
    """(context, last word) of each sentence that ends in four letters or more.

    The context begins at a word, `before` characters ahead of the last word at most.
    """
    found = []
    for match in re.finditer(r"(?<=\s)([A-Za-z]{4,})[.!?](?=\s)", document):
        start = match.start(1)
        if start >= before:
            context = document[start - before : start]
            context = context[context.find(" ") + 1 :].rstrip()
            found.append((context, " " + match[1]))
    return found


def cloze_questions(documents, n: int, seed: int | str = 0) -> list[Question]:
    """n questions: which of four words ends the sentence? Others of the n end in the
    rest, so two sets of as many have wrong words of one kind. The same seed draws
    the same everywhere. Raises LimitsError for too few sentences.
    """
    n, dice = LimitsError.unless_whole("n", n, 4), Dice("cloze", seed)
    found = [
        pair for text in check_texts("documents", documents) for pair in cloze(text)
    ]
    words = f"{len(found)} sentences, but {n} questions are wanted; give longer texts"
    LimitsError.unless(len(found) >= n, words)
    found, questions = dice.some(found, n), []
    for context, end in found:
        others = dict.fromkeys(
            other for _, other in dice.some(found, n) if other != end
        )
        LimitsError.unless(len(others) >= 3, "there are no four different last words")
        choices = dice.some([end, *[*others][:3]], 4)
        questions.append(Question(context, (end,), tuple(choices)))
    return questions


def judged(model, tokenizer, questions: list[Question]) -> list[tuple[bool, float]]:
    """For each question: is the likeliest choice right, and the right one's nats."""
    asked = [(q.context, choice) for q in questions for choice in q.choices]
    scores, found = iter(choice_scores(model, tokenizer, asked, "sum")), []
    for q in questions:
        own = {choice: next(scores) for choice in q.choices}
        right = own[q.answers[0]]
        found.append((right == max(own.values()), right))
    return found


def overlap(passages, documents, n: int = 13) -> list[float]:
    """For each passage the share of its runs of n words that stand in a document.

    Words as `data.words` has them: lower-case, without punctuation. A passage of fewer
    words is compared as a whole. Raises LimitsError.
    """
    n, passages = LimitsError.unless_whole("n", n), check_texts("passages", passages)
    runs = []  # of each passage
    for passage in passages:
        found = words(passage)
        LimitsError.unless(found, f"a passage without a word: {passage!r}")
        runs.append([gram for gram, _, _ in grams(found, min(n, len(found)))])
    lengths = {gram: gram.count(" ") + 1 for each in runs for gram in each}
    seen = set()
    for document in check_texts("documents", documents):
        found = words(document)
        for length in set(lengths.values()):
            seen.update(gram for gram, _, _ in grams(found, length) if gram in lengths)
    return [sum(gram in seen for gram in each) / len(each) for each in runs]


def read_once(model, rows, batch_size: int = 32, peak: float = 1e-3) -> list[float]:
    """Train a model in place on each row once; returns each step's loss in nats.

    rows: (N, T + 1) ids. The rate falls in a line from `peak` to a tenth of it.
    """
    check_token_rows(rows)
    batches = rows.split(LimitsError.unless_whole("batch_size", batch_size))
    LimitsError.unless(
        0 < as_float(peak) < math.inf, f"peak is {peak!r}; it must be > 0"
    )
    optimizer, losses = make_optimizer(model), []
    model.train()
    for step, some in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = peak * (1 - 0.9 * step / len(batches))
        loss = loss_of(model, some[:, :-1], some[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


def repeats(ids: list[int], n: int = 4) -> list[bool]:
    """For each token: does it end a run of n tokens that has been there before?"""
    n, seen, found = LimitsError.unless_whole("n", n), set(), []
    for end in range(1, len(ids) + 1):
        run = tuple(ids[end - n : end]) if end >= n else None
        found.append(run in seen)
        seen |= {run} - {None}
    return found


def repeated_share(ids: list[int], n: int = 4) -> float:
    """The share of a text's runs of n tokens that have been there before."""
    words = f"{len(ids)} tokens hold no run of {n}; give a longer text"
    LimitsError.unless(len(ids) >= LimitsError.unless_whole("n", n), words)
    return sum(repeats(ids, n)) / (len(ids) - n + 1)


def loop_start(ids: list[int], longest: int = 64, rounds: int = 3):
    """(start, period) of the loop in which a text ends, or None.

    From `start` on each token is the one `period` places before; the period has at most
    `longest` tokens, and is gone through `rounds` times at least.
    """
    best = None
    for period in range(1, min(longest, len(ids) // rounds) + 1):
        start = len(ids) - period
        while start > 0 and ids[start - 1] == ids[start - 1 + period]:
            start -= 1
        if len(ids) - start >= rounds * period and (best is None or start < best[0]):
            best = start, period
    return best


@torch.no_grad()
def loss_behind(model, rows, n_before: int, n_last: int = 64) -> float:
    """Loss in nats on the last n_last tokens of each row, with n_before tokens before.

    rows: (N, T) ids with T > n_before + n_last; one token more stands in front, always.
    """
    n_before = LimitsError.unless_whole("n_before", n_before, 0)
    width, total = n_before + LimitsError.unless_whole("n_last", n_last) + 1, 0.0
    check_token_rows(rows, width)
    for some in rows[:, -width:].to(device_of(model)).split(4):
        h = model.hidden(some[:, :-1])[:, -n_last:]  # (B, n_last, d_model)
        logits = model.embeddings.unembed(h).float().flatten(0, 1)
        right = some[:, -n_last:].flatten()
        total += torch.nn.functional.cross_entropy(
            logits, right, reduction="sum"
        ).item()
    return total / (len(rows) * n_last)


TEMPLATES = (
    "The {} said that",
    "The {} was tired, for",
    "The {} came in, and then",
    "When the {} heard this,",
)


@torch.no_grad()
def pronoun_odds(model, tokenizer, people, templates=TEMPLATES) -> list[float]:
    """For each person log P(he) / P(she) as the next word, in nats; a mean."""
    he, she = tokenizer.encode(" he"), tokenizer.encode(" she")
    words = "this tokenizer cuts he or she into pieces; a longer vocabulary would not"
    LimitsError.unless(len(he) == len(she) == 1, words)
    templates, found = check_texts("templates", templates), []
    home = device_of(model)
    for who in check_texts("people", people):
        total = 0.0
        for template in templates:
            words = f"{template!r} has no place for the person; write {{}} there"
            LimitsError.unless("{}" in template, words)
            ids = [tokenizer.end_of_text, *tokenizer.encode(template.format(who))]
            h = model.hidden(torch.tensor([ids]).to(home))[0, -1]  # (d_model,)
            logits = model.embeddings.unembed(h).float()
            total += (logits[he[0]] - logits[she[0]]).item()
        found.append(total / len(templates))
    return found


HE, SHE = {"he", "him", "his", "himself"}, {"she", "her", "hers", "herself"}


def counted(documents, people, reach: int = 10, behind: bool = False) -> dict:
    """{person: (mentions, he's, she's)}: pronouns within `reach` words of each mention.

    behind: only those that come after it. Raises LimitsError.
    """
    reach, total = LimitsError.unless_whole("reach", reach), Counter()
    people = set(check_texts("people", people))
    for document in check_texts("documents", documents):
        found = re.findall(r"[a-z]+", document.lower())
        for i, word in enumerate(found):
            if word in people:
                first = i + 1 if behind else max(0, i - reach)
                near = found[first : i + reach + 1]
                total[word, "n"] += 1
                total[word, "he"] += sum(each in HE for each in near)
                total[word, "she"] += sum(each in SHE for each in near)
    return {who: tuple(total[who, k] for k in ("n", "he", "she")) for who in people}


def log_odds(he: int, she: int) -> float:
    """log of he's to she's, in nats; one is added to both, so that none is zero."""
    return math.log((he + 1) / (she + 1))
