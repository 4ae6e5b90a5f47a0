"""What a model can do, in numbers one can trust: likelihoods, choices, exact match,
intervals."""

# Made from book/22_evaluation.ipynb by tools/export.py; edit the chapter.
import hashlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from gpt3lib.cache import Reader, stream
from gpt3lib.decoding import beam_search, generate_many, until, whole_characters
from gpt3lib.files import Refusal, write_beside
from gpt3lib.prompting import wilson
from gpt3lib.tasks import TASKS, Dice, find, problem, render
from gpt3lib.training import device_of


# What is refused; the workshop at the end of this page has a table of it.
class EvaluationError(Refusal, ValueError):
    """Problems that cannot be asked, or results that belong to others."""


check = EvaluationError.unless
LINE = '{"context": "a text", "completion": "a text"}'  # a line of a file of problems


def check_asked(problems: list, tokenizer, by: str, beams: int | None) -> None:
    """Raise EvaluationError for a call of `examine` that cannot be."""
    check(problems, "there are no problems; give one at least")
    words = "a model without tokenizer reads no text; give the one that it learned by"
    check(hasattr(tokenizer, "encode"), words)
    check(by in NORMS, f"by is {by!r}; it must be {' or '.join(map(repr, NORMS))}")
    EvaluationError.unless_whole("beams", 1 if beams is None else beams)


def as_pair(tokenizer, context: str, completion: str) -> tuple[list[int], list[int]]:
    """The ids of a context, behind the end-of-text token, and of its completion.

    Both are encoded as one text, as a model reads it. The completion begins with the
    first token that the context alone has not: a space that ends the context goes with
    the word behind it. Raises EvaluationError when there is no such token.
    """
    alone, whole = tokenizer.encode(context), tokenizer.encode(context + completion)
    n = len(os.path.commonprefix([alone, whole]))
    check(len(whole) > n, f"{completion!r} has no tokens; there is nothing to score")
    return [tokenizer.end_of_text, *whole[:n]], whole[n:]


class Likelihood(NamedTuple):
    """Nats, summed over n_tokens, and whether each of them was the likeliest."""

    log_p: float
    n_tokens: int
    is_greedy: bool


@torch.no_grad()
def look_at(model, pairs: list[tuple]) -> list[Likelihood]:
    """The likelihoods of one batch, padded behind, where no token looks."""
    rows = [context + completion for context, completion in pairs]
    longest = max(map(len, rows)) - 1  # the last token is only predicted
    tokens = torch.tensor([ids[:-1] + [0] * (longest + 1 - len(ids)) for ids in rows])
    home = device_of(model)
    h, found = model.hidden(tokens.to(home)), []  # (B, T, d_model)
    for track, (context, completion) in zip(h, pairs):
        places = track[len(context) - 1 :][: len(completion)]
        logits = model.embeddings.unembed(places).float()  # (n, vocab_size)
        right = torch.tensor(completion).to(home)
        log_p = logits.log_softmax(dim=-1).gather(1, right[:, None]).sum().item()
        greedy = bool((logits.argmax(dim=-1) == right).all())
        found.append(Likelihood(log_p, len(completion), greedy))
    return found


def fitted(context: list[int], completion: list[int], n_ctx: int) -> tuple:
    """A pair without the first tokens of the context that do not fit the window.

    Raises EvaluationError for a completion that alone is longer than the window.
    """
    words = f"an answer has {len(completion)} tokens, and the window only {n_ctx}"
    check(len(completion) <= n_ctx, f"{words}; give a shorter one")
    return context[len(completion) - n_ctx - 1 :], completion


def likelihoods(model, pairs: Iterable[tuple], batch: int = 16) -> list[Likelihood]:
    """The Likelihood of each (context, completion); similar lengths share a batch.

    A context that is too long loses its beginning. Raises EvaluationError.
    """
    pairs = [fitted(*pair, model.config.n_ctx) for pair in pairs]
    order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0] + pairs[i][1]))
    found = {}
    for some in (order[i : i + batch] for i in range(0, len(order), batch)):
        found |= zip(some, look_at(model, [pairs[i] for i in some]))
    return [found[i] for i in range(len(pairs))]


NORMS = ("token", "answer", "sum")


def choice_scores(model, tokenizer, asked: list[tuple], by: str) -> list[float]:
    """For each (context, choice) a log-probability that can be compared.

    by: "token", the mean of its tokens; "answer", minus that behind a bare "Answer: ";
    "sum", as it is.
    """
    found = likelihoods(model, [as_pair(tokenizer, *pair) for pair in asked])
    if by == "answer":
        alone = [as_pair(tokenizer, bare(choice), choice) for _, choice in asked]
        both = zip(found, likelihoods(model, alone))
        return [given.log_p - without.log_p for given, without in both]
    return [f.log_p / (f.n_tokens if by == "token" else 1) for f in found]


def bare(choice: str) -> str:
    """The context of an answer without its question; one space before the choice."""
    return "Answer:" if choice[:1].isspace() else "Answer: "


def best_of(scores: list[float], dice: Dice) -> int:
    """The place of the highest score; among equal ones the dice decide."""
    top = max(scores) - 1e-6
    return dice.pick([i for i, score in enumerate(scores) if score >= top])


@dataclass(frozen=True)
class Question:
    """A text to go on from, and its right answers; with choices, one is to choose.

    description and examples stand before the context, separators between them.
    """

    context: str
    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()
    description: str = ""
    examples: tuple[str, ...] = ()
    separator: str = "\n"

    def prompt(self, shots: int | None = None) -> str:
        """The text before the answer, with all or only the first examples."""
        first = [self.description] if self.description else []
        return self.separator.join([*first, *self.examples[:shots], self.context])


def bootstrap(right: list[bool], seed: int = 0, n_draws: int = 1000) -> list[float]:
    """Between which bounds 95 % of the accuracies lie on problems drawn from these.

    As many as there are, with repetition, n_draws times.
    """
    dice, values = torch.Generator().manual_seed(seed), torch.tensor(right).double()
    n = len(values)
    draws = (torch.randint(n, (n,), generator=dice) for _ in range(n_draws))
    shares = torch.stack([values[places].mean() for places in draws])
    return shares.quantile(torch.tensor([0.025, 0.975]).double()).tolist()


def write_answers(model, tokenizer, prompts: list[str], n_new, beams=None) -> list[str]:
    """What a model writes behind each prompt, to the line's end, n_new tokens at most.

    Greedily, or the best of so many beams, length penalty 0.6. A text may end before
    its line does. A prompt that is too long loses its beginning.
    """
    most, end = model.config.n_ctx + 1 - n_new, tokenizer.encode("\n")[0]
    ids = [[tokenizer.end_of_text, *tokenizer.encode(prompt)] for prompt in prompts]
    ids, home = [row[-most:] for row in ids], device_of(model)
    if beams is None:
        new = generate_many(model, ids, n_new, temperature=0, stop=end) if ids else []
    else:
        rows = (torch.tensor([row]).to(home) for row in ids)
        new = [beam_search(model, row, n_new, beams, stop=end)[0][0] for row in rows]
    new = [tokenizer.decode(until(row, tokenizer.end_of_text)) for row in new]
    return [text.split("\n")[0].strip() for text in new]


def task_problems(name: str, shots: int, n: int, seed: int | str = 0) -> list[Question]:
    """n held-out questions of a task, each behind `shots` examples of its own."""
    task, found = find(name), []
    for i in range(n):
        examples, asked = problem(task, Dice(seed, name, shots, i), shots)
        lines = render(task, examples, asked, described=False).split("\n")
        answers, shown = (f" {asked.answer}",), tuple(lines[:-1])
        found.append(Question(lines[-1], answers, (), task.description, shown))
    return found


def with_shots(problems: list, shots: int, seed: int | str = 0, pool=None) -> list:
    """Each problem behind `shots` others, drawn by the seed; never behind itself.

    pool: where to draw from, else the problems themselves. An empty line separates them
    when a context has line breaks of its own. Raises EvaluationError for too few.
    """
    pool = list({p.context: p for p in pool or problems}.values())
    several, found = any("\n" in p.context for p in pool), []
    for i, asked in enumerate(problems):
        order = Dice(seed, "shots", i).some(range(len(pool)), min(shots + 1, len(pool)))
        others = [pool[j] for j in order if pool[j].context != asked.context][:shots]
        words = f"{shots} examples, but beside problem {i + 1} there are only "
        check(len(others) == shots, f"{words}{len(others)}; ask for so many at most")
        lines = tuple(p.context + p.answers[0].rstrip() for p in others)
        separator = "\n\n" if several else "\n"
        found.append(replace(asked, examples=lines, separator=separator))
    return found


def no_twins(pairs: list[tuple]) -> dict:
    """A JSON object; ValueError when a name stands in it twice."""
    for i, (name, _) in enumerate(pairs):
        if name in dict(pairs[:i]):
            raise ValueError(f"{name!r} stands in it twice")
    return dict(pairs)


def right_texts(value) -> tuple[str, ...]:
    """One text or a list of them; nothing when one is blank or no text."""
    texts = value if isinstance(value, list) else [value]
    fine = all(isinstance(text, str) and text.strip() for text in texts)
    return tuple(texts) if fine else ()


def as_problem(line: bytes, where: str) -> tuple[Question, object]:
    """A line of a JSONL, and its id. Raises EvaluationError."""
    try:
        raw = json.loads(line.decode("utf-8-sig"), object_pairs_hook=no_twins)
    except UnicodeDecodeError:
        raise EvaluationError(f"{where} is no UTF-8; save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:
        why = re.sub(r"( at)?: line 1 column (\d+) .*", r" at character \2", str(error))
        raise EvaluationError(f"{where} is no JSON: {why}; write {LINE}") from None
    fine = isinstance(raw, dict) and isinstance(raw.get("context"), str)
    check(fine and "completion" in raw, f"{where} must be {LINE}")
    answers, choices = map(right_texts, (raw["completion"], raw.get("choices") or []))
    check(answers, f"{where}: the completion is empty, or no text; nothing to score")
    if raw.get("choices") is not None:
        fine = len(set(choices)) == len(choices) > 1
        check(fine, f"{where}: choices must be different texts, two at least")
        words = f"{where}: the completion must be one of the choices, to the letter"
        check(set(answers) <= set(choices), words)
    return Question(raw["context"], answers, choices), raw.get("id")


def read_problems(path: str | Path) -> list[Question]:
    """The problems of a JSONL of {"context", "completion"}, a line each.

    A completion may be a list of right ones. "choices" make it multiple choice; an "id"
    stands there once. Blank lines are none. EvaluationError tells a line by its number.
    """
    check(not os.path.isdir(path), f"{path} is a folder; give a file, .jsonl")
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise EvaluationError(f"{path} cannot be read ({error.strerror})") from None
    found, places = [], {}
    for number, line in enumerate(lines, start=1):
        if line.strip():
            own, name = as_problem(line, f"{path}, line {number}")
            before = places.setdefault(json.dumps(name), number)
            words = f"{path}, line {number}: the id {name!r} is that of line {before}"
            check(name is None or before == number, words)
            found.append(own)
    check(found, f"{path} has no problems; give a line at least")
    return found


def find_problems(name: str, shots: int = 0, n: int | None = None, seed=0) -> list:
    """The problems of a task (100, or n) or of a JSONL (all, or the first n)."""
    EvaluationError.unless_whole("shots", shots, 0)
    n = n if n is None else EvaluationError.unless_whole("n", n)
    if name in TASKS:
        return task_problems(name, shots, n or 100, seed)
    words = f"no task and no file {name!r}; the tasks are {', '.join(TASKS)}"
    check(os.path.exists(name) or Path(name).suffix, words)
    pool = read_problems(name)
    return with_shots(pool[:n], shots, seed, pool)


def answers_of(model, tokenizer, problems, n_new, beams=None, by="token") -> list[str]:
    """What a model answers to each problem: the best choice, or words of its own."""
    free = [p.prompt() for p in problems if not p.choices]
    asked = [(p.prompt(), choice) for p in problems for choice in p.choices]
    words = iter(write_answers(model, tokenizer, free, n_new, beams))
    rated, said = iter(choice_scores(model, tokenizer, asked, by)), []
    for p in problems:
        own = [next(rated) for _ in p.choices]
        best = p.choices[best_of(own, Dice("tie", p.context))] if own else next(words)
        said.append(best.strip())
    return said


def check_room(problems: list, tokenizer, n_ctx: int, name="") -> tuple[int, int]:
    """The most tokens of a written answer; how many questions alone are too long.

    Raises EvaluationError, the name in front, when examples are what does not fit.
    """
    size = lambda text: len(tokenizer.encode(text))
    free = [answer for p in problems for answer in p.answers if not p.choices]
    n_new = 1 + max(map(size, free), default=0)
    shots = most = max(len(p.examples) for p in problems)
    n_cut = worst = 0
    for i, p in enumerate(problems, start=1):
        room = n_ctx - max(map(size, p.choices), default=n_new)
        words = f"an answer has {n_ctx - room} tokens, and the window only {n_ctx}"
        check(room >= 0, f"{name}{words}; give a shorter one")
        while most and size(p.prompt(most)) > room:
            most, worst = most - 1, i
        n_cut += size(p.prompt(most)) > room
    if most == shots:
        return n_new, n_cut
    sizes = [size(p.context) for p in problems]
    words = f"{name}problem {worst}, its examples and an answer do not fit into "
    words += f"{n_ctx:,} tokens: ask for fewer --shots ({most} would do), or shorten "
    words += f"the longest, problem {1 + sizes.index(max(sizes))} with {max(sizes):,}"
    raise EvaluationError(words)


def fingerprint(model, tokenizer) -> str:
    """A hash of all that answers: the config, the tokens, the weights."""
    about = [repr(model.config), tokenizer.decode(range(tokenizer.vocab_size))]
    digest = hashlib.sha256(json.dumps(about).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def earlier_rows(path: Path, header: dict) -> list[dict]:
    """The rows in a file of results; a new one begins with the header.

    A last line that is not whole is dropped. Raises EvaluationError for a file that
    answers something else.
    """
    first = json.dumps(header).encode() + b"\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        open(path, "ab").close()  # may one write there?
        data = path.read_bytes()
    except OSError as error:
        words = f"results cannot be written: {error.filename} ({error.strerror}); "
        raise EvaluationError(f"{words}give --out a folder to write into") from None
    if first.startswith(data):  # nothing yet, or half a header
        path.write_bytes(first)
        return []
    try:
        whole = data[: data.rfind(b"\n") + 1]
        found, *rows = map(json.loads, whole.splitlines())
        other = next((name for name in header if found.get(name) != header[name]), None)
    except (ValueError, AttributeError):
        raise EvaluationError(f"{path} holds no results; give another place") from None
    now, then = (told.get(other) for told in (header, found))
    words = f"{path} was begun with {other} {then!r}, and now it is {now!r}"
    check(other is None, f"{words}; ask that again, or give another place")
    os.truncate(path, len(whole))
    return rows


def examine(
    model, tokenizer, problems, out=None, about=None, beams=None, by="token", batch=16
) -> dict:
    """Ask a model all problems; how many are right, and between which bounds.

    out: a JSONL that gets a line for each answer; the same call goes on where it ends,
    and writes its summary beside it, .json. about: what the results should say besides.
    Raises EvaluationError.
    """
    check_asked(problems, tokenizer, by, beams)
    n_new, n_cut = check_room(problems, tokenizer, model.config.n_ctx)
    header = {**(about or {}), "beams": beams, "by": by, "cut": n_cut}
    header["problems"] = hashlib.sha256(repr(problems).encode()).hexdigest()[:16]
    header["model"] = fingerprint(model, tokenizer)
    path = Path(out or os.devnull)
    rows = earlier_rows(path, header) if out else []
    bar = tqdm(total=len(problems), initial=len(rows), disable=None, leave=False)
    for i in range(len(rows), len(problems), batch):
        some = problems[i : i + batch]
        for p, said in zip(some, answers_of(model, tokenizer, some, n_new, beams, by)):
            right = said in [answer.strip() for answer in p.answers]
            rows.append({"said": said, "right": right})
        with open(path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows[i:])
        bar.update(len(some))
    bar.close()
    right = [row["right"] for row in rows]
    n, n_right = len(right), sum(right)
    found = header | {"n": n, "right": n_right, "accuracy": n_right / n}
    found |= {"wilson": wilson(n_right, n), "bootstrap": bootstrap(right)}
    if out:
        write_beside(path.with_suffix(".json"), json.dumps(found, indent=1).encode())
    return found


def examine_all(model, tokenizer, names, shots=(0,), n=None, seed=0, out=None, **ways):
    """Examine on tasks and files, with each number of shots; prints a table.

    Returns the summaries. out: a folder for NAME-K-shots.jsonl and .json; ways: beams,
    by and batch, see examine. Raises EvaluationError.
    """
    exams = [(a, k, find_problems(a, k, n, seed)) for a in names for k in shots]
    for name, k, problems in exams:  # all of them, before the first question
        check_asked(problems, tokenizer, ways.get("by", "token"), ways.get("beams"))
        check_room(problems, tokenizer, model.config.n_ctx, f"{name}, {k} shots: ")
    results = []
    for name, k, problems in exams:
        name = Path(name).stem
        path = Path(out) / f"{name}-{k}-shots.jsonl" if out else None
        about = {"task": name, "shots": k, "seed": seed}
        found = examine(model, tokenizer, problems, path, about, **ways)
        low, high = (f"{bound:.1%}" for bound in found["wilson"])
        cut = f"; {found['cut']} too long, cut on the left" if found["cut"] else ""
        print(f"{name:12} {k:3} shots {found['n']:6,} problems", end=" ")
        print(f"{found['accuracy']:6.1%} right, 95 %: {low} to {high}{cut}", flush=True)
        results.append(found)
    return results


class Harness:
    """What lm-evaluation-harness asks of a model; `harness` makes one of its LMs of it.

    Requests have args: (context, continuation), (text,) or (context, settings).
    """

    def __init__(self, model, tokenizer, batch: int = 16, max_new_tokens: int = 256):
        super().__init__()
        self.model, self.own, self.batch = model.eval(), tokenizer, batch
        self.n_ctx, self.max_new_tokens = model.config.n_ctx, max_new_tokens
        self.end = tokenizer.decode([self.eot_token_id])

    @property
    def eot_token_id(self) -> int:
        """The id with which texts begin and end."""
        return self.own.end_of_text

    def tok_encode(self, string: str, add_special_tokens=None, **ways) -> list[int]:
        """The ids of a text, in which <|endoftext|> is the token of that name."""
        first, *more = map(self.own.encode, string.split(self.end))
        return first + [i for ids in more for i in (self.eot_token_id, *ids)]

    def _loglikelihood_tokens(self, requests, **ways) -> list[tuple[float, bool]]:
        pairs = [(list(context), list(new)) for _, context, new in requests]
        found = likelihoods(self.model, pairs, self.batch)
        return [(f.log_p, f.is_greedy) for f in found]

    def loglikelihood_rolling(self, requests, disable_tqdm=False) -> list[float]:
        """The log-probability of whole texts, in windows that do not overlap."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        totals = []
        for (text,) in (request.args for request in requests):
            ids = self.tok_encode(text)
            pairs = get_rolling_token_windows(ids, self.eot_token_id, self.n_ctx, 1)
            windows = [(None, *make_disjoint_window(pair)) for pair in pairs]
            totals.append(sum(f[0] for f in self._loglikelihood_tokens(windows)))
        return totals

    def generate_until(self, requests, disable_tqdm=False) -> list[str]:
        """What the model writes behind each context, up to the first stop text."""
        from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

        texts = []
        for context, settings in (request.args for request in requests):
            ways = normalize_gen_kwargs(settings, self.max_new_tokens)
            stops = handle_stop_sequences(ways.pop("until", None), eos=self.end)
            texts.append(self.write(context, [s for s in stops if s], **ways))
        return texts

    def write(self, context, stops, max_gen_toks, temperature=0.0, **ways) -> str:
        """One text. A context that is too long loses its beginning."""
        ids = self.tok_encode(context) or [self.eot_token_id]
        check(max_gen_toks < self.n_ctx, f"{max_gen_toks} new tokens fill the window")
        ids = ids[max_gen_toks - self.n_ctx :]
        read = Reader(self.model, len(ids) + max_gen_toks)
        tokens = torch.tensor([ids]).to(device_of(self.model))
        how = (temperature, ways.get("top_k"), ways.get("top_p"), None)
        steps = stream(read, tokens, max_gen_toks, *how, self.eot_token_id)
        new, text = (chosen.item() for chosen in steps), ""
        for piece in whole_characters(self.own, iter(new.__next__, self.eot_token_id)):
            text += piece
            if any(stop in text for stop in stops):
                break
        for stop in stops:
            text = text.split(stop)[0]
        return text


def harness(model, tokenizer, **ways):
    """A model as an LM of lm-evaluation-harness: lm_eval.simple_evaluate(model=…).

    ways: batch, max_new_tokens. Raises EvaluationError where lm_eval is not installed.
    """
    try:
        from lm_eval.api.model import TemplateLM
    except ImportError as error:
        raise EvaluationError(f"{error}; pip install 'gpt3lib[eval]'") from None
    return type("GPT3LM", (Harness, TemplateLM), {})(model, tokenizer, **ways)
