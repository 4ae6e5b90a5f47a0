"""Additional training for one task: English becomes French, and LoRA leaves the
model as it is."""

# Made from book/23_finetuning.ipynb by tools/export.py; edit the chapter.
import json
import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn
from torch.nn import functional as F

from gpt3lib.evaluation import as_pair
from gpt3lib.files import Refusal, as_float, check_dtype, sha256, write_beside
from gpt3lib.model import chunked_loss, normal
from gpt3lib.prompting import Problem
from gpt3lib.tasks import Dice
from gpt3lib.texts import check_same_text, french_messages
from gpt3lib.training import (
    check_finite,
    check_learner,
    check_seed,
    check_text,
    check_ways,
    device_of,
    learning_rate,
    make_optimizer,
)


# What is refused; the workshop at the end of this page has a table of it.
class TuningError(Refusal, ValueError):
    """Pairs that cannot be learned, or an adapter that does not fit; says what does."""


def check_pairs(rows: list, batch_size, n_replay, replay) -> None:
    """Raise TuningError unless these rows and texts can be dealt out."""
    TuningError.unless(rows, "there are no pairs to learn from; give one at least")
    for i, (prompt, answer) in enumerate(rows, 1):
        words = f"pair {i} has an empty context or completion; both need a token"
        TuningError.unless(prompt and answer, words)
    size = TuningError.unless_whole("batch_size", batch_size)
    n_replay = TuningError.unless_whole("n_replay", n_replay, 0)
    words = f"n_replay is {n_replay} of a batch of {size}; leave one for the pairs"
    TuningError.unless(n_replay < size, words)
    if n_replay:
        TuningError.unless(replay is not None, "n_replay needs a text; give replay=ids")
        check_text(replay)
        need = max(len(prompt) + len(answer) for prompt, answer in rows)
        words = f"replay has {len(replay)} tokens, the longest pair {need}"
        TuningError.unless(len(replay) > need, f"{words}; give a longer text")


def check_window(rows: list, config) -> None:
    """Raise TuningError for a pair that the model's window or vocabulary lacks."""
    for number, (prompt, answer) in enumerate(rows, 1):
        n, ids = len(prompt) + len(answer) - 1, [*prompt, *answer]
        words = f"pair {number} has {n} tokens, and the window only {config.n_ctx}"
        TuningError.unless(n <= config.n_ctx, f"{words}; shorten it")
        odd = next((i for i in ids if not 0 <= i < config.vocab_size), None)
        words = f"pair {number} has id {odd}; ids go from 0 to {config.vocab_size - 1}"
        TuningError.unless(odd is None, words)


def check_tuning(n_steps, peak) -> None:
    """Raise TuningError for a length or a rate that makes no sense."""
    TuningError.unless_whole("n_steps", n_steps)
    words = f"peak is {peak!r}; it must be a number above 0, such as 1e-3"
    TuningError.unless(0 < as_float(peak) < math.inf, words)


def check_lora(model, rank, alpha, where) -> None:
    """Raise TuningError unless a model can get adapters of this rank."""
    check_learner(model)
    rank = TuningError.unless_whole("rank", rank)
    words = "the model has LoRA already; merge it first"
    TuningError.unless(not linear_layers(model, LoRA), words)
    names = {name.rpartition(".")[2] for name, *_ in linear_layers(model, nn.Linear)}
    odd = ", ".join(sorted(set(where) - names))
    words = f"no linear layer is called {odd}; there are {', '.join(sorted(names))}"
    TuningError.unless(not odd, words)
    most = model.config.d_model
    words = f"rank is {rank}, and the matrices have only {most}; choose a smaller one"
    TuningError.unless(rank <= most, words)
    fine = alpha is None or 0 < as_float(alpha) < math.inf
    TuningError.unless(fine, f"alpha is {alpha!r}; it must be a number above 0")


def tidy(text: str) -> str:
    """One kind of space, of apostrophe and of é: the same letters, the same bytes."""
    text = unicodedata.normalize("NFC", text).replace("’", "'").replace("…", "...")
    return " ".join(text.split())  # a non-breaking space is a space


HOLES = r"%\(?\w*\)?[a-z]|\{.*?\}|<.*?>|&\w+;"  # %s, {name}, <b>, &nbsp;


def skeleton(text: str) -> str:
    """What makes two texts the same one: words, but no holes, case or plural s."""
    words = re.findall(r"[^\W\d_]+", re.sub(HOLES, " ", text.lower()))
    return " ".join(w[:-1] if len(w) > 3 and w.endswith("s") else w for w in words)


def trigrams(text: str) -> set[str]:
    """All runs of three characters, with a space at both ends."""
    text = f" {text.lower()} "
    return {text[i : i + 3] for i in range(len(text) - 2)}


class Nearest:
    """Finds of many pairs the one whose English shares most trigrams with a text."""

    def __init__(self, pairs: list[tuple[str, str]]):
        self.pairs, self.having = pairs, defaultdict(list)
        self.grams = [trigrams(english) for english, _ in pairs]
        for i, grams in enumerate(self.grams):
            for gram in grams:
                self.having[gram].append(i)

    def find(self, text: str, below: float = 2.0) -> tuple[float, tuple[str, str]]:
        """How alike, 0 to 1 (Jaccard: shared by all), and the pair.

        below: only pairs that are less alike than that.
        """
        grams = trigrams(text)
        shared = Counter(i for gram in grams for i in self.having[gram])
        both = {i: len(grams) + len(self.grams[i]) - n for i, n in shared.items()}
        alike = {i: n / both[i] for i, n in shared.items() if n < below * both[i]}
        best = min(alike, key=lambda i: (-alike[i], i), default=0)
        return alike.get(best, 0.0), self.pairs[best]


LONGEST, TWINS = 60, 0.5


def french_pairs() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Pairs (English, French) to learn from, and held out, of at most 60 letters.

    One in six is held out by the hash of its skeleton; of those, the ones with a twin
    among the others, in English or in French, are dropped. Raises DataError.
    """
    found = {}
    for english, french in french_messages():
        found.setdefault(tidy(english), tidy(french))
    whole = {e: f for e, f in found.items() if e != f and len(e) <= LONGEST}
    keys = {e: skeleton(e) for e, f in whole.items() if skeleton(e) and skeleton(f)}
    exam = {e for e, key in keys.items() if int(sha256(key.encode()), 16) % 6 == 0}
    train = [(e, whole[e]) for e in sorted(keys.keys() - exam)]
    known, nearest = {skeleton(french) for _, french in train}, Nearest(train)
    held = [
        (e, whole[e])
        for e in sorted(exam)
        if skeleton(whole[e]) not in known and nearest.find(e)[0] < TWINS
    ]
    check_same_text("french", ["\t".join(pair) for pair in train + held])
    return train, held


def as_row(tokenizer, context: str, completion: str) -> Problem:
    """A pair as ids: end-of-text and the context; the completion and end-of-text.

    Raises TuningError without a tokenizer, EvaluationError for an empty completion.
    """
    words = "a model without tokenizer reads no text; give the one that it learned by"
    TuningError.unless(hasattr(tokenizer, "encode"), words)
    prompt, answer = as_pair(tokenizer, context, completion)
    return Problem(prompt, [*answer, tokenizer.end_of_text])


UNTOLD = -1  # a target that nothing is learned from


def as_batch(rows: list[Problem]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows -> inputs and targets (B, T); where no answer is said, the target is -1."""
    longest = max(len(prompt) + len(answer) for prompt, answer in rows) - 1
    inputs = torch.zeros(len(rows), longest, dtype=torch.int64)
    targets = torch.full_like(inputs, UNTOLD)
    for i, (prompt, answer) in enumerate(rows):
        ids = torch.tensor(prompt + answer)
        inputs[i, : len(ids) - 1] = ids[:-1]
        targets[i, len(prompt) - 1 : len(ids) - 1] = ids[len(prompt) :]
    return inputs, targets


def answer_loss(model, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean nats of the told targets (B, T), those from 0 on."""
    told = targets >= 0
    h = model.hidden(inputs)[told]  # (n, d_model)
    return chunked_loss(h, model.embeddings.wte.weight, targets[told])


@torch.no_grad()
def answer_loss_of(model, rows: list[Problem], most: int = 64) -> float:
    """Mean nats of a token of all answers, `most` rows at a time. TuningError."""
    rows = [Problem(*row) for row in rows]
    check_pairs(rows, most, 0, None), check_window(rows, model.config)
    total, home = 0.0, device_of(model)
    for i in range(0, len(rows), most):
        inputs, targets = (part.to(home) for part in as_batch(rows[i : i + most]))
        n_told = sum(len(row.answer) for row in rows[i : i + most])
        total += answer_loss(model, inputs, targets).item() * n_told
    return total / sum(len(row.answer) for row in rows)


POOL = 32  # so many batches are sorted by length at a time


class Pairs:
    """Rows without end, in an order that is a pure function of the seed.

    Each epoch has another order; a batch holds rows of similar lengths. Its last
    n_replay sequences are windows of `replay`, one long tensor of ids, all of whose
    targets are told. It is a loader for gpt3lib.runs. Raises TuningError.
    """

    def __init__(self, rows, batch_size=16, seed=0, replay=None, n_replay=0):
        self.rows = [Problem(*row) for row in rows]
        check_pairs(self.rows, batch_size, n_replay, replay), check_seed(seed)
        self.batch_size, self.n_own = int(batch_size), int(batch_size - n_replay)
        self.seed, self.epoch, self.now = int(seed), None, []
        self.replay = replay.cpu() if n_replay else None
        self.n_ctx = max(map(self.length, self.rows)) - 1
        self.sources, self.bytes_per_token = {}, None  # padding has no bytes

    @staticmethod
    def length(row: Problem) -> int:
        """The tokens of a row."""
        return len(row.prompt) + len(row.answer)

    def order(self, epoch: int) -> list[Problem]:
        """The rows of an epoch; the first ones fill the last batch of the last one."""
        dice = Dice("pairs", self.seed, epoch)
        rows = [self.rows[i] for i in dice.some(range(len(self.rows)), len(self.rows))]
        size, batches = self.n_own, []
        begun = -epoch * len(rows) % size
        first, rows = rows[:begun], rows[begun:]
        for i in range(0, len(rows), POOL * size):
            pool = sorted(rows[i : i + POOL * size], key=self.length)
            batches += [pool[k : k + size] for k in range(0, len(pool), size)]
        n_full = len(rows) // size  # only the last batch can be smaller
        mixed = [batches[k] for k in dice.some(range(n_full), n_full)]
        return sum(mixed + batches[n_full:], first)

    def row(self, number: int) -> Problem:
        """The row of this number, counted on through all epochs."""
        epoch, place = divmod(number, len(self.rows))
        if epoch != self.epoch:
            self.epoch, self.now = epoch, self.order(epoch)
        return self.now[place]

    def window(self, number: int, n: int) -> torch.Tensor:
        """n + 1 ids of the replayed text, (1, n + 1)."""
        start = Dice("replay", self.seed, number).below(len(self.replay) - n)
        return self.replay[None, start : start + n + 1].long()

    def sequences(self, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets (count, T) of sequences `first` … first + count - 1.

        T is the longest of these rows. TuningError unless `first` begins a batch.
        """
        words = f"first is {first}; it must begin a batch of {self.batch_size}"
        TuningError.unless(first % self.batch_size == 0, words)
        places = [divmod(i, self.batch_size) for i in range(first, first + count)]
        own = [b * self.n_own + slot for b, slot in places if slot < self.n_own]
        inputs, targets = as_batch([self.row(number) for number in own])
        if windows := range(first + len(own), first + count):
            text = torch.cat([self.window(i, inputs.shape[1]) for i in windows])
            inputs = torch.cat([inputs, text[:, :-1]])
            targets = torch.cat([targets, text[:, 1:]])
        return inputs, targets

    def identity(self) -> dict:
        """What must be the same when a run goes on."""
        text = b"" if self.replay is None else self.replay.long().numpy().tobytes()
        ways = f"{self.batch_size} {self.n_own} {self.seed}"
        rows = sha256(json.dumps(self.rows).encode())
        return {"pairs": rows, "replay": sha256(text), "order": ways}


def finetune(
    model, pairs, n_steps: int, peak: float, on_step: Callable | None = None
) -> list[float]:
    """Train a model in place on Pairs; returns each step's loss in nats.

    A tenth of the steps is warm-up. on_step(step, loss), if given, is called after each
    update. Parameters that are frozen stay as they are. Raises TuningError before any
    work, TrainingError when a loss is not finite.
    """
    check_tuning(n_steps, peak), check_learner(model), check_ways(on_step, False)
    TuningError.unless(isinstance(pairs, Pairs), "pairs must be Pairs(rows)")
    check_window(pairs.rows, model.config)
    optimizer, losses, home = make_optimizer(model), [], device_of(model)
    learned = [p for p in model.parameters() if p.requires_grad]
    TuningError.unless(learned, "all parameters are frozen; one at least must learn")
    model.train()
    for step in range(n_steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, n_steps, peak, n_steps // 10)
        inputs, targets = pairs.sequences(step * pairs.batch_size, pairs.batch_size)
        loss = answer_loss(model, inputs.to(home), targets.to(home))
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(learned, 1.0)
        losses.append(loss.item())
        check_finite(step, losses[-1], norm.item())
        optimizer.step()
        if on_step is not None:
            on_step(step, losses[-1])
    model.eval()
    return losses


class LoRA(nn.Module):
    """A frozen linear layer and what is learned beside it: W x + b + scale · B (A x).

    A is (rank, d_in) and random, B is (d_out, rank) and zero: at first nothing changes.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, name: str = ""):
        super().__init__()
        self.base, self.scale = base.requires_grad_(False), alpha / rank
        start = normal(torch.Size((rank, base.in_features)), 1.0, 0, name)
        self.a = nn.Parameter(start.to(base.weight) / math.sqrt(base.in_features))
        self.b = nn.Parameter(base.weight.new_zeros(base.out_features, rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, d_in) -> (…, d_out)."""
        return self.base(x) + self.scale * F.linear(F.linear(x, self.a), self.b)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The layer with the change added to its matrix: plain, and as fast."""
        self.base.weight += self.scale * self.b @ self.a
        return self.base.requires_grad_()


def linear_layers(model, kind: type, where=None) -> list[tuple]:
    """(name, parent, child) of all layers of this type; where: the last of the name."""
    parts, found = dict(model.named_modules()), []
    for name, part in parts.items():
        above, _, last = name.rpartition(".")
        if isinstance(part, kind) and (where is None or last in where):
            found.append((name, parts[above], last))
    return found


def layer_names(where) -> tuple[str, ...]:
    """Names of layers as a tuple; a text is one name. Raises TuningError."""
    names = (where,) if isinstance(where, str) else where
    fine = isinstance(names, list | tuple | set) and names
    fine = fine and all(isinstance(name, str) for name in names)
    words = f"where is {where!r}; it must be names of layers, such as ('wq', 'wv')"
    TuningError.unless(fine, words)
    return tuple(names)


EVERYWHERE = ("wq", "wk", "wv", "wo", "up", "down")


def add_lora(model, rank: int = 8, alpha: float | None = None, where=EVERYWHERE):
    """Freeze a model in place and give its linear layers a LoRA each; the model.

    alpha: scale · rank, else 2 · rank. where: which layers. Raises TuningError.
    """
    where = layer_names(where)
    check_lora(model, rank, alpha, where)
    model.requires_grad_(False)
    for name, parent, child in linear_layers(model, nn.Linear, where):
        base = getattr(parent, child)
        setattr(parent, child, LoRA(base, rank, alpha or 2 * rank, name))
    return model


def merge_lora(model):
    """Merge every LoRA of a model, in place: a plain model, all of it learning."""
    for _, parent, child in linear_layers(model, LoRA):
        setattr(parent, child, getattr(parent, child).merged())
    return model.requires_grad_()


def learns_answers(model):
    """The same model, whose own loss counts only told targets, for gpt3lib.runs.

    `del model.loss` gives it back its loss; do so before it is saved.
    """
    check_learner(model)
    model.loss = partial(answer_loss, model)
    return model


ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
OTHER_KINDS = ("alpha_pattern", "rank_pattern", "use_rslora", "use_dora")


PEFT_NAME = "base_model.model.{}.lora_{}.weight"  # of a layer's matrix A or B


def adapter_tensors(model) -> dict[str, torch.Tensor]:
    """The matrices of all LoRAs, by the names that peft gives them."""
    found = {}
    for name, parent, child in linear_layers(model, LoRA):
        part = getattr(parent, child)
        found[PEFT_NAME.format(name, "A")] = part.a
        found[PEFT_NAME.format(name, "B")] = part.b
    return found


def save_adapter(model, folder: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write what LoRA learned, without the model, in peft's format. TuningError.

    dtype: of the numbers in the file, None for their own.
    """
    layers = linear_layers(model, LoRA)
    TuningError.unless(layers, "the model has no LoRA; add_lora gives it one")
    check_dtype(dtype)
    part, names = getattr(*layers[0][1:]), {child for *_, child in layers}
    rank = part.a.shape[0]
    about = {"peft_type": "LORA", "task_type": None, "r": rank, "bias": "none"}
    about |= {"lora_alpha": part.scale * rank, "lora_dropout": 0.0}
    about |= {"target_modules": sorted(names), "inference_mode": True}
    told = {k: t.detach().to("cpu", dtype) for k, t in adapter_tensors(model).items()}
    folder = Path(folder)
    TuningError.unless(not folder.is_file(), f"{folder} is a file; give a folder")
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in told.items()}
    write_beside(folder / ADAPTER, save(tensors, {"format": "pt"}))
    write_beside(folder / ADAPTER_CONFIG, json.dumps(about, indent=1).encode())


def read_adapter(folder: str | Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """The config and the matrices of an adapter. TuningError when it cannot be read."""
    try:
        about = json.loads((Path(folder) / ADAPTER_CONFIG).read_bytes())
        tensors = load_file(Path(folder) / ADAPTER)
        fine = {"r", "lora_alpha", "target_modules"} <= about.keys()
    except (OSError, ValueError, AttributeError, SafetensorError) as error:
        raise TuningError(
            f"{folder} holds no adapter that can be read ({error})"
        ) from None
    TuningError.unless(fine, f"{folder}: {ADAPTER_CONFIG} lacks r, alpha or the layers")
    odd = ", ".join(key for key in OTHER_KINDS if about.get(key))
    words = f"{folder}: {odd} is set, another kind of LoRA; merge it with peft"
    TuningError.unless(not odd, words)
    return about, tensors


def load_adapter(model, folder: str | Path):
    """Give a model the LoRA that save_adapter, or peft, has written; the model.

    Raises TuningError, and leaves the model as it was, for one of another shape.
    """
    about, tensors = read_adapter(folder)
    rank, alpha = about["r"], as_float(about["lora_alpha"])
    where = layer_names(about["target_modules"])
    wanted = expected_shapes(model, rank, alpha, where)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    odd = next((n for n in wanted | shapes if wanted.get(n) != shapes.get(n)), None)
    now, has = (d.get(odd, "no such matrix") for d in (wanted, shapes))
    words = f"{folder}: {odd} is {has}, and this model needs {now}"
    TuningError.unless(odd is None, f"{words}; take the model that it was made for")
    add_lora(model, rank, alpha, where)
    with torch.no_grad():
        for name, place in adapter_tensors(model).items():
            place.copy_(tensors[name])
    return model


def expected_shapes(model, rank, alpha, where) -> dict[str, tuple[int, int]]:
    """The shapes of an adapter of this kind for this model, by peft's names."""
    check_lora(model, rank, alpha, where)
    found = {}
    for name, parent, child in linear_layers(model, nn.Linear, where):
        d_out, d_in = getattr(parent, child).weight.shape
        found[PEFT_NAME.format(name, "A")] = (rank, d_in)
        found[PEFT_NAME.format(name, "B")] = (d_out, rank)
    return found
