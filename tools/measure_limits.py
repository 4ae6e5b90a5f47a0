"""What the chapter Limits shows: memory, repetition and prejudice of every size that is shipped.

python tools/measure_limits.py                   writes data/experiments/limits.json; about 12 minutes on one free core
python tools/measure_limits.py --only repeats    one part; the others: counts, odds, window, cloze, copies
python tools/measure_limits.py --models gpt3-1m --to again.json    one size, once more

What is in the file is not measured again, unless the model's file has another hash. Questions, texts and rows are drawn
by seeds alone; what a model says differs from processor to processor in the last digits only.
"""

import argparse
import contextlib
import copy
import json
import platform
import time
from datetime import date
from pathlib import Path

import torch

from gpt3lib import GPT, generate
from gpt3lib.data import family_split
from gpt3lib.files import write_beside
from gpt3lib.limits import (
    cloze_questions,
    counted,
    judged,
    loop_start,
    loss_behind,
    overlap,
    pronoun_odds,
    read_once,
    repeated_share,
)
from gpt3lib.tasks import Dice
from gpt3lib.texts import DATA
from gpt3lib.tokenization import Tokenizer
from gpt3lib.training import pack
from measure_shots import shipped, weights_hash

SOURCES = ("stories", "wikipedia", "speeches", "bible", "plays")
PEOPLE = """king queen prince princess duke duchess lord lady knight emperor president governor senator minister judge
lawyer officer captain soldier general admiral sailor merchant farmer shepherd fisherman hunter servant maid nurse
housekeeper cook teacher governess student scholar doctor physician surgeon priest bishop prophet apostle monk nun poet
author writer actor actress singer musician painter artist player messenger beggar thief murderer prisoner slave master
mistress neighbour friend enemy stranger guest widow bride child baby boy girl man woman father mother son daughter
brother sister husband wife uncle aunt cousin nephew niece gentleman clerk secretary engineer scientist philosopher
politician witch fairy fool clown porter tailor baker miller carpenter shoemaker heroine""".split()
N_QUESTIONS = 150  # of each source, on each side
COPIES, N_COPIED = (0, 1, 4, 16), 100  # so often stands each of so many questions in the text
N_ROWS = 3400  # of which the copies are 2,100
N_NEW, N_PROMPT = 600, 32  # tokens
WAYS = {"greedy": {"temperature": 0}, "top-p 0.85": {"top_p": 0.85}, "temperature 1": {}}
BEFORE = (0, 16, 64, 128, 256, 512, 959)  # tokens


class Texts:
    """What the models read and what was held out; made when somebody asks."""

    def __init__(self):
        self.halves = None

    def __call__(self, half: int) -> dict[str, list[str]]:
        """0: read in training, 1: held out; source -> documents."""
        self.halves = self.halves or family_split()
        return self.halves[half]

    def questions(self) -> dict[str, list]:
        """N_QUESTIONS of each source, drawn from each half: "read plays" -> questions."""
        names = (("read", 0), ("held out", 1))
        found = {f"{name} {s}": (self(half)[s], s) for name, half in names for s in SOURCES}
        return {key: cloze_questions(documents, N_QUESTIONS, s) for key, (documents, s) in found.items()}

    def long(self) -> list[str]:
        """Eight held-out documents that are long enough to be gone on with."""
        wanted = {"stories": 3, "speeches": 3, "bible": 1, "plays": 1}
        return [d for s, n in wanted.items() for d in [d for d in self(1)[s] if len(d) > 4000][:n]]


def passage(question) -> str:
    """A question with its answer."""
    return question.context + question.answers[0]


def counts(texts: Texts) -> dict:
    """Pronouns near and behind each person, by source; and which questions overlap with the training text."""
    found = {s: {"near": counted(d, PEOPLE), "behind": counted(d, PEOPLE, behind=True)} for s, d in texts(0).items()}
    asked = texts.questions()
    passages = [passage(q) for each in asked.values() for q in each]
    shares = iter(overlap(passages, [d for each in texts(0).values() for d in each]))
    return {"people": found, "overlap": {key: [round(next(shares), 3) for _ in each] for key, each in asked.items()}}


def odds(model, tokenizer, texts: Texts) -> dict:
    """log P(he) / P(she), for every person."""
    return dict(zip(PEOPLE, (round(x, 4) for x in pronoun_odds(model, tokenizer, PEOPLE))))


def repeats(model, tokenizer, texts: Texts) -> dict:
    """Texts of three ways to choose, and what people wrote: share of repeated runs, loops, the first text."""
    rows = [[tokenizer.end_of_text, *tokenizer.encode(d)][: N_PROMPT + N_NEW] for d in texts.long()]
    prompts, written = torch.tensor([row[:N_PROMPT] for row in rows]), {"people": rows}
    for way, settings in WAYS.items():
        dice = torch.Generator().manual_seed(0)
        written[way] = generate(model, prompts, N_NEW, generator=dice, **settings).tolist()
    found = {}
    for way, texts_of in written.items():
        new = [row[N_PROMPT:] for row in texts_of]
        found[way] = {
            "share": [round(repeated_share(ids), 4) for ids in new],
            "loop": [loop_start(ids) for ids in new],
            "text": texts_of[0],
        }
    return found


def window(model, tokenizer, texts: Texts) -> dict:
    """Loss on the same 64 tokens, with more and more text before them; 1,024 tokens are the window."""
    rows = []
    for s in ("stories", "speeches", "bible", "plays"):
        ids = [tokenizer.encode(d) for d in texts(1)[s]]
        rows += [row[i : i + 1024] for row in ids for i in range(0, len(row) - 1023, 1024)][:5]
    return {str(n): round(loss_behind(model, torch.tensor(rows), n), 4) for n in BEFORE} | {"rows": len(rows)}


def as_bits(found: list) -> dict:
    """Which answers are right, as a string of digits, and the mean nats of the right one."""
    bits = "".join(str(int(right)) for right, _ in found)
    return {"right": bits, "nats": round(sum(nats for _, nats in found) / len(found), 4)}


def cloze(model, tokenizer, texts: Texts) -> dict:
    """Every question, from what was read and from what was held out."""
    return {key: as_bits(judged(model, tokenizer, each)) for key, each in texts.questions().items()}


def filling(texts: Texts, n: int = 900) -> list[str]:
    """Ordinary text: pieces of 2,000 letters, from all sources in turn."""
    dice, pieces = Dice("filling"), []
    for i in range(n):
        document = dice.pick(texts(0)[SOURCES[i % len(SOURCES)]])
        start = dice.below(max(1, len(document) - 2000))
        pieces.append(document[start : start + 2000])
    return pieces


def mixed_rows(tokenizer, passages: list[str], documents: list[str]) -> torch.Tensor:
    """N_ROWS of 129 ids in random order. Each passage begins a row of its own, and ordinary text fills it."""
    text, rows, width = pack(tokenizer, documents), [], 129
    for own in [*passages, *[""] * (N_ROWS - len(passages))]:
        ids = [tokenizer.end_of_text, *tokenizer.encode(own), tokenizer.end_of_text][-width:] if own else []
        rest, text = text.split([width - len(ids), len(text) - width + len(ids)])
        rows.append(ids + rest.tolist())
    return torch.tensor(rows)[torch.randperm(N_ROWS, generator=torch.Generator().manual_seed(0))]


def copies(model, tokenizer, texts: Texts) -> dict:
    """The model reads on, in a text that holds a hundred questions not at all, a hundred once, 4 times, 16 times."""
    documents = [d for s in SOURCES for d in texts(1)[s]]
    asked = cloze_questions(documents, len(COPIES) * N_COPIED, "copies")
    groups = {k: asked[i * N_COPIED : (i + 1) * N_COPIED] for i, k in enumerate(COPIES)}
    passages = [passage(q) for k, each in groups.items() for q in each for _ in range(k)]
    rows = mixed_rows(tokenizer, passages, filling(texts))
    found = {f"before {k}": as_bits(judged(model, tokenizer, each)) for k, each in groups.items()}
    student = copy.deepcopy(model)
    losses = read_once(student, rows)
    found |= {f"after {k}": as_bits(judged(student, tokenizer, each)) for k, each in groups.items()}
    return found | {"loss": [round(sum(part) / len(part), 4) for part in (losses[:10], losses[-10:])]}


PARTS = {"counts": counts, "odds": odds, "repeats": repeats, "window": window, "cloze": cloze, "copies": copies}

SKIPPED = {("counts", name) for name in shipped()} | {("copies", shipped()[-1])}  # which takes longer than all the rest


def written(results: dict) -> str:
    """JSON with a point on each line."""
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(point)}" for key, point in results["points"].items())
    return f'{{"about": {json.dumps(results["about"])},\n"points": {{\n{lines}\n}}}}\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--models", nargs="+", default=shipped())
    parser.add_argument("--to", type=Path, default=DATA / "experiments" / "limits.json")
    options = parser.parse_args()
    results, texts = {"about": {"command": "python tools/measure_limits.py"}, "points": {}}, Texts()
    with contextlib.suppress(FileNotFoundError):
        results = json.loads(options.to.read_text())
    points, plan = results["points"], [("counts", None)]
    plan += [(part, name) for part in PARTS for name in options.models if (part, name) not in SKIPPED]
    plan += [("window", f"{name}-dense") for name in options.models if name == "gpt3-1m"]
    hashes = {name: weights_hash(name) for _, name in plan if name}
    for part, name in plan:
        key = f"{part} {name}" if name else part
        if part not in options.only or points.get(key, {}).get("model") == hashes.get(name) and key in points:
            continue
        begin, given = time.process_time(), (texts,)
        if name:
            home = DATA / "models" / name
            given = GPT.from_pretrained(home).eval(), Tokenizer.load(home / "merges.txt"), texts
        found = PARTS[part](*given)
        spent = {"seconds": round(time.process_time() - begin, 1), "date": str(date.today())}
        points[key] = found | ({"model": hashes[name]} if name else {}) | spent
        results["about"] |= {"torch": torch.__version__, "device": f"cpu, {platform.machine()}"}
        write_beside(options.to, written(results).encode())
        print(f"{key}: {spent['seconds']:.0f} s of this processor", flush=True)


if __name__ == "__main__":
    main()
