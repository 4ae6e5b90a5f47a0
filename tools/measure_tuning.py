"""Fine-tuning, measured: English to French by several sizes and ways, what is forgotten, examples against updates.

python tools/measure_tuning.py                  writes data/experiments/tuning.json; about an hour on one free core
python tools/measure_tuning.py --minutes 40     stops after the experiment that is running then; another call goes on
python tools/measure_tuning.py --only "shots"   the experiments whose names begin so

An experiment is a function of its name and of the models, whose hashes are stored. What is in the file is not measured
again, unless a model has another hash.
"""

import argparse
import contextlib
import json
import platform
import time
from datetime import date
from pathlib import Path

import sacrebleu
import torch

from gpt3lib import GPT, Tokenizer, generate_many
from gpt3lib.data import family_split
from gpt3lib.files import pick_device, sha256, write_beside
from gpt3lib.finetuning import (
    TWINS,
    Nearest,
    Pairs,
    add_lora,
    answer_loss_of,
    as_row,
    finetune,
    french_pairs,
    merge_lora,
)
from gpt3lib.prompting import are_right, few_shot_prompts
from gpt3lib.tasks import Dice, find, render
from gpt3lib.texts import DATA
from gpt3lib.training import evaluate, pack

PLACE = DATA / "experiments" / "tuning.json"
LARGEST, BATCH, NEW = "gpt3-10m", 16, 64
FULL, LOW, RANK = 2e-3, 3e-3, 16  # the peaks of full fine-tuning and of LoRA, and its rank
GENTLE = 5e-4  # the peak where a model is to keep what it can
SOURCES = "stories wikipedia plays bible speeches".split()
KEPT = ("RW", "sort", "affix")  # tasks that the models knew before
LINES = (0, 1, 4, 16)
UPDATES = (10, 100, 1000)
TOLD = "copy reverse sort last A2 who".split()  # with instructions alone
UNTOLD_TASKS = "CL odd sequence 2D+".split()


class Book:
    """What the experiments share, each made when it is first asked for."""

    def __init__(self):
        self.home, self.made = pick_device(), {}

    def once(self, name, make):
        if name not in self.made:
            self.made[name] = make()
        return self.made[name]

    @property
    def french(self):
        return self.once("french", french_pairs)

    def model(self, name: str) -> tuple[GPT, Tokenizer]:
        """A fresh copy of a model, and its tokenizer; "scratch NAME": its shape, born anew."""
        home = DATA / "models" / name.removeprefix("scratch ")
        model = GPT.from_pretrained(home)
        model = GPT(model.config) if name.startswith("scratch ") else model
        return model.to(self.home).eval(), Tokenizer.load(home / "merges.txt")

    def texts(self, tokenizer) -> dict:
        """The held-out text of each source, and under "replay" a mixture of what training saw."""

        def make():
            clean, exam = family_split()
            found = {name: pack(tokenizer, exam[name])[:40_000] for name in SOURCES}
            pieces = [pack(tokenizer, [d[:20_000] for d in clean[name][:40]]) for name in SOURCES]
            return found | {"replay": torch.cat(pieces)}

        return self.once("texts", make)


def contexts(book, pairs, beside: bool) -> list[str]:
    """The context of each pair; beside: behind the nearest pair of training that is no twin."""
    if not beside:
        return [f"{english} =>" for english, _ in pairs]
    nearest = book.once("nearest", lambda: Nearest(book.french[0]))
    near = (nearest.find(english, TWINS)[1] for english, _ in pairs)
    return [f"{e} => {f}\n{english} =>" for (e, f), (english, _) in zip(near, pairs)]


def rows_of(tokenizer, contexts, pairs) -> list:
    return [as_row(tokenizer, context, f" {french}") for context, (_, french) in zip(contexts, pairs)]


def write_on(model, tokenizer, prompts: list[str], stop: int) -> list[str]:
    """What a model writes behind each prompt, the likeliest tokens, up to a token."""
    rows, said = [[tokenizer.end_of_text, *tokenizer.encode(prompt)] for prompt in prompts], []
    for i in range(0, len(rows), 32):
        new = generate_many(model, rows[i : i + 32], NEW, temperature=0, stop=stop)
        said += [tokenizer.decode([t for t in ids if t != stop]).strip() for ids in new]
    return said


def chrf(said: list[str], pairs) -> float:
    return round(sacrebleu.corpus_chrf(said, [[french for _, french in pairs]]).score, 2)


def memory(book, model, tokenizer) -> dict:
    """What a model still knows: its loss on the old texts, and three tasks with eight examples."""
    texts = book.texts(tokenizer)
    found = {name: round(evaluate(model, texts[name].to("cpu"), 4), 3) for name in SOURCES}
    for task in KEPT:
        found[task] = sum(are_right(model, few_shot_prompts(tokenizer, task, 8, 100)))
    return found


def before(book, name) -> dict:
    model, tokenizer = book.model(name)
    return {"memory": memory(book, model, tokenizer)}


def tuned(book, name, epochs, peak=FULL, rank=0, n_replay=0, beside=False, quick=False) -> dict:
    """English to French by one model in one way; beside: with the nearest pair in the prompt."""
    train, held = book.french
    model, tokenizer = book.model(name)
    asked = contexts(book, held, beside)
    rows, exam = rows_of(tokenizer, contexts(book, train, beside), train), rows_of(tokenizer, asked, held)
    replay = book.texts(tokenizer)["replay"] if n_replay else None
    pairs = Pairs(rows, BATCH, replay=replay, n_replay=n_replay)
    if rank:
        add_lora(model, rank)
    n_learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    n_steps, curve = round(epochs * len(rows) / pairs.n_own), []
    each = max(1, n_steps // 12)

    def look(step, loss):
        if (step + 1) % each == 0:
            model.eval()
            curve.append([step + 1, round(answer_loss_of(model, exam), 3)])
            model.train()

    losses = finetune(model, pairs, n_steps, peak, look)
    if rank:
        merge_lora(model)
    some = held[::3] if quick else held
    said = write_on(model, tokenizer, asked[::3] if quick else asked, tokenizer.end_of_text)
    found = {"steps": n_steps, "learned": n_learned, "curve": curve, "chrf": chrf(said, some)}
    found |= {"held": round(answer_loss_of(model, exam), 3), "train": round(sum(losses[-50:]) / 50, 3)}
    found["exact"] = sum(a == b for a, (_, b) in zip(said, some))
    if not quick:
        found |= {"memory": memory(book, model, tokenizer), "said": said}
    return found


def shots(book, name, n) -> dict:
    """English to French by examples in the prompt, drawn anew for each question."""
    train, held = book.french
    model, tokenizer = book.model(name)
    (line,) = tokenizer.encode("\n")
    some, prompts = held[::3], []
    for i, (english, _) in enumerate(some):
        examples = [f"{e} => {f}" for e, f in Dice("french", n, i).some(train, n)]
        prompts.append("\n".join(["Translate English to French:", *examples, f"{english} =>"]))
    said = write_on(model, tokenizer, prompts, line)
    return {"chrf": chrf(said, some), "n": len(some), "said": said[:12]}


def few(book, name, n) -> dict:
    """English to French by n pairs and updates; each pair is seen some twenty times, or 300 steps are made."""
    train, held = book.french
    model, tokenizer = book.model(name)
    some, asked = Dice("few", n).some(train, n), held[::3]
    rows = rows_of(tokenizer, contexts(book, some, False), some)
    finetune(model, Pairs(rows, BATCH), max(30, min(300, 20 * n // BATCH)), FULL)
    said = write_on(model, tokenizer, contexts(book, asked, False), tokenizer.end_of_text)
    return {"chrf": chrf(said, asked), "n": len(said), "said": said[:12]}


def updates(book, name, task, n) -> dict:
    """One of the tasks by n questions and updates, asked without examples or description."""
    model, tokenizer = book.model(name)
    examples = [find(task).example(Dice("updates", task, i)) for i in range(n)]
    rows = [as_row(tokenizer, f"{e.prompt} =>", f" {e.answer}\n") for e in examples]
    finetune(model, Pairs(rows, BATCH), max(30, min(300, 20 * n // BATCH)), FULL)
    exam = few_shot_prompts(tokenizer, task, 0, 200, described=False)
    return {"right": sum(are_right(model, exam)), "n": 200}


def instructed(book, name, n=200) -> dict:
    """Six tasks by their descriptions alone, before and after n examples of each; and four others."""
    model, tokenizer = book.model(name)
    ask = lambda: {
        task: sum(are_right(model, few_shot_prompts(tokenizer, task, 0, 100))) for task in (*TOLD, *UNTOLD_TASKS)
    }
    found, rows = {"before": ask()}, []
    for task in TOLD:
        for i in range(n):
            dice = Dice("instructions", task, i)
            example = find(task).example(dice)
            rows.append(as_row(tokenizer, render(find(task), [], example), f" {example.answer}\n"))
    finetune(model, Pairs(rows, BATCH), 3 * len(rows) // BATCH, GENTLE)
    return found | {"after": ask(), "n": 100, "examples": len(rows)}


def experiments() -> dict:
    """name -> what measures it, what matters most first."""
    found, small = {}, "gpt3-3m"
    for peak in (3e-4, 1e-3, 3e-3, 1e-2):
        found[f"rate full {peak:g}"] = ("gpt3-1m", lambda b, m, p=peak: tuned(b, m, 2, p, quick=True))
    for peak in (1e-3, 3e-3, 1e-2):
        found[f"rate LoRA {peak:g}"] = ("gpt3-1m", lambda b, m, p=peak: tuned(b, m, 2, p, RANK, quick=True))
    found[f"before {small}"] = (small, before)
    found[f"full {small}"] = (small, lambda b, m: tuned(b, m, 4))
    found[f"LoRA {small}"] = (small, lambda b, m: tuned(b, m, 4, LOW, RANK))
    found[f"replay {small}"] = (small, lambda b, m: tuned(b, m, 4, n_replay=4))
    found[f"scratch {small}"] = (f"scratch {small}", lambda b, m: tuned(b, m, 4))
    found[f"beside {small}"] = (small, lambda b, m: tuned(b, m, 4, beside=True))
    found["full gpt3-1m"] = ("gpt3-1m", lambda b, m: tuned(b, m, 4))
    found["full gpt3-10m"] = (LARGEST, lambda b, m: tuned(b, m, 4))
    for n in LINES:
        found[f"shots {n}"] = (small, lambda b, m, n=n: shots(b, m, n))
    for n in UPDATES:
        found[f"pairs {n}"] = (small, lambda b, m, n=n: few(b, m, n))
        found[f"updates {n}"] = (small, lambda b, m, n=n: updates(b, m, "RW", n))
    found[f"instructed {small}"] = (small, instructed)
    return found


def weights_hash(name: str) -> str:
    return sha256(DATA / "models" / name.removeprefix("scratch ") / "model.safetensors")[:16]


def written(results: dict) -> bytes:
    """JSON with an experiment on each line."""
    lines = ",\n".join(f"{json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in results["found"].items())
    return f'{{"about": {json.dumps(results["about"])},\n"found": {{\n{lines}\n}}}}\n'.encode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""])
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--to", type=Path, default=PLACE)
    options = parser.parse_args()
    torch.set_num_threads(1)
    begin, book = time.time(), Book()
    results = {"about": {"command": "python tools/measure_tuning.py"}, "found": {}}
    with contextlib.suppress(FileNotFoundError):
        results = json.loads(options.to.read_text())
    train, held = book.french
    nearest = Nearest(train)
    results["about"] |= {"copy": chrf([e for e, _ in held], held), "torch": torch.__version__}
    results["about"] |= {"nearest": chrf([nearest.find(e)[1][1] for e, _ in held], held)}
    results["about"] |= {"train": len(train), "held": len(held), "full": FULL, "LoRA": LOW, "rank": RANK}
    results["about"] |= {"device": f"{book.home.type}, {platform.machine()}"}
    for name, (model, measure) in experiments().items():
        stored = results["found"].get(name, {})
        if not name.startswith(tuple(options.only)) or stored.get("model") == weights_hash(model):
            continue
        start = time.time()
        found = measure(book, model) | {"model": weights_hash(model), "date": str(date.today())}
        with contextlib.suppress(FileNotFoundError):  # another call may have written meanwhile
            results["found"] = json.loads(options.to.read_text())["found"]
        results["found"][name] = found
        write_beside(options.to, written(results))
        shown = {k: v for k, v in found.items() if k not in ("said", "curve", "model", "date")}
        print(f"{time.time() - start:5.0f} s  {name}: {shown}", flush=True)
        if time.time() - begin > 60 * options.minutes:
            return


if __name__ == "__main__":
    main()
