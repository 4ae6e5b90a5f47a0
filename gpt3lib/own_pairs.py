"""A model learns your own answers from a file of pairs, in a run that may be killed,
and is asked."""

# Made from book/j_own_pairs.ipynb by tools/export.py; edit the chapter.
import json
import math
import shlex
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from gpt3lib.decoding import generate_many
from gpt3lib.evaluation import Question, read_problems
from gpt3lib.files import sha256, write_beside
from gpt3lib.finetuning import (
    Pairs,
    TuningError,
    add_lora,
    answer_loss_of,
    as_row,
    learns_answers,
    merge_lora,
    save_adapter,
)
from gpt3lib.model import GPT
from gpt3lib.own_text import (
    HELD_SHARE,
    LOSSLESS,
    MOST_THREADS,
    duration,
    given,
    memory_of,
    room,
    threads,
)
from gpt3lib.prompting import Problem, n_tracks
from gpt3lib.recipe import Recipe, peak_by_size
from gpt3lib.runs import Options, Store, run
from gpt3lib.tokenization import Tokenizer
from gpt3lib.training import device_of, loss_of, pack
from gpt3lib.using import find_model, whole_texts, write_model


class Pair(NamedTuple):
    """A context, what is to be written behind it, and both as ids."""

    context: str
    completion: str
    row: Problem
    asked: Question | None = None  # the line, with all that is right

    def right(self) -> tuple[str, ...]:
        """All right completions of the line; the first is the one that is learned."""
        return self.asked.answers if self.asked else (self.completion,)


def numbered_pairs(path: str | Path) -> list[tuple[int, Question]]:
    """The problems of a JSONL, each with the number of its line. EvaluationError."""
    problems = read_problems(path)
    lines = enumerate(Path(path).read_bytes().splitlines(), start=1)
    return list(zip((number for number, line in lines if line.strip()), problems))


def as_pairs(problems, tokenizer: Tokenizer, n_ctx: int) -> list[Pair]:
    """Numbered problems as pairs, each once; the first right completion is learned.

    Raises TuningError, with the numbers of the lines that do not fit the window.
    """
    found, long = {}, []
    for number, asked in problems:
        both = asked.context, asked.answers[0]
        row = as_row(tokenizer, *both)
        found.setdefault(both, Pair(*both, row, asked))
        if n_tracks(row) > n_ctx:
            long.append(f"line {number} has {n_tracks(row):,}")
    which, more = ", ".join(long[:3]), f" and {len(long) - 3:,} more" * (len(long) > 3)
    words = f"{n_ctx:,} tokens fit into the model's window, but {which}{more}"
    TuningError.unless(not long, f"{words}; make these pairs shorter")
    return [*found.values()]


def hold_out(pairs: list[Pair]) -> tuple[list[Pair], list[Pair]]:
    """What is learned, and what is held out: contexts, chosen by their hashes.

    A twentieth of them, but three at least where there are twelve.
    """
    contexts = {pair.context: sha256(pair.context.encode(*LOSSLESS)) for pair in pairs}
    order = sorted(contexts, key=contexts.get)
    held = {*order[: max(min(3, len(order) // 4), len(order) // HELD_SHARE)]}
    learned = [pair for pair in pairs if pair.context not in held]
    return learned, [pair for pair in pairs if pair.context in held]


def replies(model: GPT, tokenizer: Tokenizer, pairs: list[Pair]) -> list[str]:
    """What a model writes behind the contexts of pairs, to its end of text."""
    end, n_new = tokenizer.end_of_text, 8 + max(len(p.row.answer) for p in pairs)
    asked = [[end, *tokenizer.encode(pair.context)] for pair in pairs]
    found = generate_many(model, asked, n_new, temperature=0, stop=end)
    return [tokenizer.decode(ids) for ids in found]


# What is refused; the workshop at the end of this page has a table of it.
def check_tune(config) -> None:
    """Raise TuningError unless there is a model, and something to learn."""
    words = "--pairs for which model? Give --from MODEL, such as --from gpt3-3m"
    TuningError.unless(config.start, words)
    words = "--from a model, to learn what? Give --pairs FILE.jsonl"
    TuningError.unless(config.pairs, words)
    words = "--share is of the texts of --replay; give that too"
    TuningError.unless(config.share is None or config.replay, words)
    fine = config.share is None or 0 < config.share < 1
    words = f"share is {config.share}; it must be above 0 and below 1"
    TuningError.unless(fine, words)
    n = config.n_threads
    words = f"n_threads is {n}; it must be 1 to {MOST_THREADS:,}"
    TuningError.unless(n is None or 1 <= n <= MOST_THREADS, words)


def check_memory(model: GPT, name: str) -> str:
    """What a run needs of the memory; TuningError when there is less."""
    n, free = model.num_params(), memory_of(device_of(model))
    n_learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    wanted, least = 4 * n + 12 * n_learned, 4 * n
    words = f"{name} needs {room(wanted)} of memory (there are {room(free or 0)})"
    right = f"LoRA, --rank 8, takes little more than {room(least)}"
    TuningError.unless(free is None or wanted <= free, f"{words}; {right}")
    return f"{room(wanted)} for weights, gradients and Adam"


BATCH, SHARE = 16, 0.25  # pairs of a step; and how much of it is replayed
STEPS, FEWEST, MOST_STEPS = 100, 3, 20  # so many steps, and epochs from 3 to 20
FULL, LORA = 0.3, 3.0  # times the rate by which the model was trained


def settled_tuning(config, model: GPT, n_pairs: int):
    """The config with what it leaves open chosen, but the threads. TuningError."""
    batch = config.batch or min(BATCH, max(2, n_pairs))
    epochs = min(MOST_STEPS, max(FEWEST, math.ceil(STEPS * batch / n_pairs)))
    part = LORA if config.rank else FULL
    peak = float(f"{part * peak_by_size(model.num_params()):.2g}")
    ours = {"rank": 0, "seed": 0, "save_every": 100}
    ours |= {"batch": batch, "epochs": epochs, "peak": peak}
    config = replace(config, **ours | given(config, ours))
    TuningError.unless_whole("epochs", config.epochs)
    return config


def plan_tuning(config, pairs: Pairs) -> Recipe:
    """So many epochs: a tenth to warm up, then a cosine; the batch does not grow."""
    n_steps = math.ceil(config.epochs * len(pairs.rows) / pairs.n_own)
    batch = pairs.batch_size * pairs.n_ctx
    n, fixed = n_steps * batch, {"first_batch_tokens": batch, "ramp_tokens": 0}
    ends = {"warmup_tokens": n // 10, "decay_tokens": n}
    return Recipe.scaled(n, config.peak, batch, **fixed, **ends)


LOOKS, HELD_MOST = 10, 500  # how often, and at how many pairs, a run looks


@dataclass
class Tuning:
    """All that a run on pairs needs; before: the loss of what is held out."""

    model: GPT
    tokenizer: Tokenizer
    learned: list[Pair]
    held: list[Pair]
    pairs: Pairs
    recipe: Recipe
    store: Store
    before: float


def dealt(config, tokenizer: Tokenizer, learned: list[Pair]) -> Pairs:
    """A loader of the pairs, with what is replayed among them. TuningError."""
    texts = pack(tokenizer, whole_texts(config.replay)) if config.replay else None
    n_replay = (
        max(1, round((config.share or SHARE) * config.batch)) if config.replay else 0
    )
    rows = [pair.row for pair in learned]
    found = Pairs(rows, config.batch, config.seed, texts, n_replay)
    ids = [i for row in rows for i in row.answer if i != tokenizer.end_of_text]
    found.bytes_per_token = len(tokenizer.decode_bytes(ids)) / len(ids)
    return found


def check_begun(config, pairs: Pairs) -> bool:
    """Whether a run on these pairs has begun in the folder, which knows them then.

    Raises TuningError for a folder that holds another run, or a model.
    """
    out, told = Path(config.out), pairs.identity()
    if begun := any(out.glob("step-*")):
        known = (
            (out / "pairs.json").read_bytes() if (out / "pairs.json").exists() else b"0"
        )
        words = f"{config.pairs}: not the pairs, or not the --replay, with which the "
        words += f"run in {out} began; give another --out"
        TuningError.unless(json.loads(known) == told, words)
    else:
        taken = any((out / name).exists() for name in ("model", "config.json"))
        words = f"{out} holds a model already; give another --out"
        TuningError.unless(not taken, words)
        n, most = len(pairs.rows), max(2, len(pairs.rows))
        words = f"batch is {pairs.batch_size:,}, and {n:,} pairs are to be learned"
        TuningError.unless(pairs.batch_size <= most, f"{words}; give {most:,} at most")
        out.mkdir(parents=True, exist_ok=True)
        write_beside(out / "pairs.json", json.dumps(told, indent=1).encode())
    return begun


def step_seconds(model: GPT, batch: tuple) -> float:
    """How long a step on this batch (inputs, targets) takes, tried once."""
    for _ in range(2):  # the first one is slower
        start = time.perf_counter()
        loss_of(model, *batch).backward()
        slopes = [p.grad for p in model.parameters() if p.grad is not None]
        slopes[0].sum().item()  # waits for the device
        model.zero_grad()
    return time.perf_counter() - start


def tried(model: GPT, batch: tuple, n: int | None = None) -> tuple[int, float]:
    """Threads, n or else the better of one and all, and the seconds of a step."""
    most = torch.get_num_threads() if device_of(model).type == "cpu" else 1
    times = {}
    for n_threads in {n} if n else {1, most}:
        with threads(n_threads):
            times[n_threads] = step_seconds(model, batch)
    best = min(times, key=times.get)
    return best, times[best]


def oddities(pairs: list[Pair]) -> str:
    """What somebody may not have meant, with how often it is there; else nothing."""
    seen = Counter(pair.context for pair in pairs)
    told = {
        "several completions: {} (the first is learned)": sum(
            len(pair.right()) > 1 for pair in pairs
        ),
        "no space before the completion: {}": sum(
            not pair.completion[:1].isspace() for pair in pairs
        ),
        "contexts of more than one line: {}": sum(n > 1 for n in seen.values()),
    }
    return "; ".join(words.format(f"{n:,}") for words, n in told.items() if n)


def tuning_needs(config, tuning: Tuning, twice: int) -> dict[str, str]:
    """What a run on pairs is and needs, a few lines, each with its name."""
    model, pairs, n = tuning.model, tuning.pairs, tuning.model.num_params()
    parts = [p.numel() for p in model.parameters() if p.requires_grad]
    which = f"{sum(parts):,} of them, by LoRA" if config.rank else "all of them"
    n_steps, n_held = tuning.recipe.n_steps(pairs.n_ctx), len(tuning.held)
    n_ids = sum(len(pair.row.answer) for pair in tuning.learned)
    repeated = f"; {twice} stood there twice" if twice else ""
    replayed = f", {pairs.batch_size - pairs.n_own} of them replay"
    odd = oddities([*tuning.learned, *tuning.held])
    return {
        "pairs": f"{len(pairs.rows):,} to learn, {n_held:,} held out{repeated}",
        **({"lines": odd} if odd else {}),
        "tokens": f"{n_ids:,} in completions; the longest pair has {pairs.n_ctx:,}",
        "model": f"{n:,} parameters, trained are {which}",
        "steps": f"{n_steps:,} of {pairs.batch_size} sequences"
        + replayed * (pairs.replay is not None)
        + f": each pair {config.epochs} times",
        "rate": f"{config.peak:.2g} at most",
        "memory": check_memory(model, config.start),
    }


def prepare_tuning(config) -> tuple:
    """A config with nothing open, and the Tuning of its run. Prints what it needs.

    Raises TuningError, and what reading the pairs and the model raises.
    """
    problems = numbered_pairs(config.pairs)  # before a large model is read
    model, tokenizer = find_model(config.start, config.device)
    found = as_pairs(problems, tokenizer, model.config.n_ctx)
    learned, held = hold_out(found)
    config = settled_tuning(config, model, len(learned))
    pairs, before = dealt(config, tokenizer, learned), math.nan
    if held:
        before = answer_loss_of(model.float(), [pair.row for pair in held[:HELD_MOST]])
    if config.rank:
        add_lora(model.float(), config.rank)
    recipe, store = plan_tuning(config, pairs), Store(config.out)
    learns_answers(model.float())
    Options(save_every=config.save_every)
    tuning = Tuning(model, tokenizer, learned, held, pairs, recipe, store, before)
    if not check_begun(config, pairs):
        twice = len(problems) - len(found)
        for name, words in tuning_needs(config, tuning, twice).items():
            print(f"{name:9}{words}", flush=True)
        batch = pairs.sequences(0, pairs.batch_size)
        n_threads, seconds = tried(model, batch, config.n_threads)
        seconds *= recipe.n_steps(pairs.n_ctx)
        print(f"time     about {duration(seconds)} on {device_of(model)}", flush=True)
        config = replace(config, n_threads=n_threads)
    return config, tuning


def learn_pairs(config, tuning: Tuning):
    """Run it, from where it is: model, State. Ten times it looks at what is held."""
    pairs, rows = tuning.pairs, [pair.row for pair in tuning.held[:HELD_MOST]]
    n_steps = tuning.recipe.n_steps(pairs.n_ctx)

    def look(number: int, model) -> dict | None:
        if not rows or number * LOOKS // n_steps == (number - 1) * LOOKS // n_steps:
            return None
        loss, epoch = (
            answer_loss_of(model, rows),
            number * pairs.n_own / len(pairs.rows),
        )
        tqdm.write(f"epoch {epoch:4.1f}: held-out loss {loss:.3f}")
        return {"epoch": epoch, "held_out": loss}

    ways = {"micro_batch": pairs.batch_size, "save_every": config.save_every}
    ways |= {"bf16": config.bf16, "on_spike": "rollback", "spike": math.inf}
    optimizer = tuning.recipe.optimizer(tuning.model)
    what = tuning.model, optimizer, pairs, tuning.store, tuning.recipe, look
    with threads(config.n_threads):
        return tuning.model, run(*what, **ways)


def looks(out: Path) -> list[tuple[float, float]]:
    """What a run has seen of its held-out pairs: (epoch, loss), in order."""
    lines = map(json.loads, (out / "extra.jsonl").read_text().splitlines())
    return [(told["epoch"], told["held_out"]) for told in lines]


def verdict(before: float, seen: list[tuple[float, float]]) -> str:
    """The held-out loss before and after, and a warning when it had been lower."""
    if not seen:
        return (
            "No pair is held out, so nobody knows whether more than these is learned."
        )
    epoch, low = min(seen, key=lambda look: look[1])
    said = f"held-out loss: {before:.2f} before, {seen[-1][1]:.2f} now"
    if seen[-1][1] > 1.1 * low + 0.05:
        said += f". It was {low:.2f} after epoch {epoch:.1f}: from there on the pairs "
        said += "are learned by heart; "
        said += f"--epochs {math.ceil(epoch)}, with another --out, may be better"
    return said


def write_held(pairs: list[Pair], path: Path) -> None:
    """Pairs as a JSONL, which `gpt3 eval` reads: all that is right, and the choices."""
    text = ""
    for pair in pairs:
        several = len(pair.right()) > 1
        completion = pair.right() if several else pair.completion
        told = {"context": pair.context, "completion": completion}
        if pair.asked and pair.asked.choices:
            told["choices"] = pair.asked.choices
        text += json.dumps(told, ensure_ascii=True) + "\n"
    write_beside(path, text.encode())


def finish_tuning(config, tuning: Tuning) -> None:
    """Write the model that was tuned, ask it what was held out, say how to go on."""
    model, out, held = tuning.model, Path(config.out), tuning.held
    vars(model).pop("loss", None)  # the whole text's again
    if config.rank:
        save_adapter(model, out / "adapter")
        merge_lora(model)
    write_model(model.eval(), tuning.tokenizer, out / "model")
    print(verdict(tuning.before, looks(out)))
    some = (held or tuning.learned)[:3]
    for pair, said in zip(some, replies(model, tuning.tokenizer, some)):
        right = " or ".join(map(repr, pair.right()))
        print(f"\n{pair.context}\n  it says  {said!r}\n  right is {right}")
    texts = (pair.context for pair in (*held, *tuning.learned))
    ask = next((shlex.quote(text) for text in texts if text[:1] != "-"), "")
    run = shlex.quote(config.out)  # a text that begins with - would be an option
    print(f"\nAsk it: gpt3 generate {run} {ask} --temperature 0")
    if held:
        write_held(held, out / "held_out.jsonl")
        task = shlex.quote(str(out / "held_out.jsonl"))
        print(f"Count: gpt3 eval {run} --task {task}")
