"""A run that one can kill: checkpoints, exact resume, logs, and what to do when a
loss explodes."""

# Made from book/15_long_runs.ipynb by tools/export.py; edit the chapter.
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import nn

from gpt3lib.cache import generate
from gpt3lib.checkpoints import Checkpoint, Logs, RunError, Stopping, Store, say, show
from gpt3lib.files import as_float, unwrapped
from gpt3lib.model import GPT, GPTConfig
from gpt3lib.recipe import update
from gpt3lib.training import device_of, loss_of


# What a run refuses; the workshop at the end of this page has a table of it.
def check_options(options: "Options") -> None:
    """Raise RunError, saying what would be right, for options that make no sense."""
    for name in ("save_every", "micro_batch", "sync_every", "sample_every"):
        RunError.unless_whole(name, getattr(options, name), int(name != "sample_every"))
    words = f"on_spike is {options.on_spike!r}; it must be 'stop', 'skip' or 'rollback'"
    RunError.unless(options.on_spike in ("stop", "skip", "rollback"), words)
    words = f"spike is {options.spike!r}; it must be nats above 0, math.inf for never"
    RunError.unless(as_float(options.spike) > 0, words)
    words = f"prompt is {options.prompt!r}; it must be text"
    RunError.unless(isinstance(options.prompt, str), words)


def check_start(model, optimizer, on_step, options: dict) -> None:
    """Raise RunError, saying what would be right, unless a run can begin with these."""
    words = f"on_step is {on_step!r}; it must be a function, or None"
    RunError.unless(on_step is None or callable(on_step), words)
    known = Options.__dataclass_fields__
    odd = ", ".join(name for name in options if name not in known)
    RunError.unless(not odd, f"{odd} is no option; these are: {', '.join(known)}")
    ours = isinstance(getattr(model, "config", None), GPTConfig)
    RunError.unless(ours, f"model is a {type(model).__name__}; it must be a GPT")
    own = {*model.parameters()}
    words = "the model is on meta, where it has no numbers; make it on a device"
    RunError.unless(not any(p.is_meta for p in own), words)
    learn = {p for p in own if p.requires_grad}
    RunError.unless(learn, "all parameters are frozen; one at least must require_grad")
    held = {p for g in getattr(optimizer, "param_groups", ()) for p in g["params"]}
    what = "none of" if held.isdisjoint(own) else "not exactly"
    words = f"the optimizer holds {what} this model's parameters; make it with "
    RunError.unless(learn <= held <= own, words + "recipe.optimizer(model)")


def run_tensors(model: nn.Module, optimizer) -> dict[str, dict[str, torch.Tensor]]:
    """All tensors of a run: "model" -> name, "optimizer" -> exp_avg/name and others."""
    weights = {unwrapped(name): t for name, t in model.state_dict().items()}
    names, memory = {p: unwrapped(name) for name, p in model.named_parameters()}, {}
    for p, kept in optimizer.state.items():
        memory |= {f"{key}/{names[p]}": tensor for key, tensor in kept.items()}
    return {"model": weights, "optimizer": memory}


@dataclass
class State:
    """Where a run is: all that it needs besides the tensors, as JSON holds it.

    step: steps taken; tokens: the clock; passed: sequences that a rollback left out;
    losses: the latest, in nats; sizes: bytes of each log, see Journal; tries: rollbacks
    to the last checkpoint; finished: no step is left.
    """

    step: int = 0
    tokens: int = 0
    passed: int = 0
    losses: list[float] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)
    tries: int = 0
    finished: bool = False


@torch.no_grad()
def put_back(checkpoint: Checkpoint, model: nn.Module, optimizer) -> State:
    """Give model and optimizer the numbers of a checkpoint; returns its State."""
    stored = checkpoint.tensors("model")
    for name, tensor in model.state_dict().items():
        tensor.copy_(stored[unwrapped(name)])
    stored, kept = checkpoint.tensors("optimizer"), {}
    names = {p: unwrapped(name) for name, p in model.named_parameters()}
    order = [names[p] for group in optimizer.param_groups for p in group["params"]]
    for name, tensor in stored.items():
        key, parameter = name.split("/")
        kept.setdefault(order.index(parameter), {})[key] = tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": kept, "param_groups": groups})
    return State(**checkpoint.state["state"])


WATCHED = 32  # the losses that a spike is compared with


def is_spike(loss: float, norm: float, before: list[float], spike: float) -> bool:
    """Whether a step is not finite, or its loss `spike` nats above the mean before."""
    high = len(before) == WATCHED and loss > statistics.fmean(before) + spike
    return high or not math.isfinite(loss + norm)


def first_bad(model: nn.Module, batches: list) -> str:
    """The first tensor that is not finite when a step is made again, in words.

    Parameters come first, then what leaves each part on the way up, then gradients.
    When all are finite, it is the largest gradient.
    """
    weights = model.named_parameters()
    found = [f"parameter {n} is not finite" for n, p in weights if bad(p)]

    def look(name, part, arguments, output):
        if isinstance(output, torch.Tensor) and bad(output):
            found.append(f"the output of {name} is not finite")

    parts = [pair for pair in model.named_modules() if pair[0]]
    hooks = [p.register_forward_hook(partial(look, name)) for name, p in parts]
    model.zero_grad()
    for inputs, targets in batches:
        if not found:
            loss_of(model, inputs, targets).backward()
    for hook in hooks:
        hook.remove()
    slopes = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    found += [f"the gradient of {n} is not finite" for n, g in slopes.items() if bad(g)]
    if not found:
        largest = max(slopes, key=lambda name: slopes[name].norm())
        found = [f"the largest gradient is that of {largest}"]
    model.zero_grad()
    return found[0]


def bad(tensor: torch.Tensor) -> bool:
    """Whether a number of it is not finite."""
    return not tensor.isfinite().all()


@dataclass(frozen=True)
class Options:
    """How a run is made; none of it changes what is learned, but in the last digits.

    on_spike: "stop", "skip" or "rollback", for a step that is not finite or whose loss
    is `spike` nats above the mean of the latest. Every save_every steps there is a
    checkpoint, every sample_every steps (0: never) a text that goes on from `prompt`.
    micro_batch: sequences at a time. bf16, compile: faster on a GPU. sync_every: losses
    are read so seldom; a step that is not finite is left out all the same, a spike is
    noticed late. progress, tensorboard: None shows them where they can be shown.
    """

    on_spike: str = "stop"
    spike: float = 1.0
    save_every: int = 100
    micro_batch: int = 8
    sample_every: int = 0
    prompt: str = ""
    bf16: bool = False
    compile: bool = False
    sync_every: int = 1
    progress: bool | None = None
    tensorboard: bool | None = None

    def __post_init__(self):
        check_options(self)


def description(model, optimizer, loader, recipe) -> dict:
    """What must be the same when a run goes on: model, recipe, data and optimizer."""
    facts = {"model": asdict(model.config), "recipe": asdict(recipe)}
    facts |= {"data": loader.identity(), "optimizer": type(optimizer).__name__}
    return json.loads(json.dumps(facts))


def restore(store: Store, model, optimizer, about: dict) -> State | None:
    """Go on from the newest whole checkpoint; None when there is no checkpoint.

    Those after it are damaged, and get another name. Raises RunError.
    """
    found = store.latest()
    if found is None:
        return None
    found.check(about)
    store.set_aside(after=found.number)
    return put_back(found, model, optimizer)


def follow(job: "Run", stopping: Stopping, on_step=None) -> str | None:
    """Make the steps that are left. Returns who stopped it before the end, or None."""
    job.begin()
    stop = None
    while not job.state.finished and not stop:
        step = next(job.steps)
        first = step.tokens // job.loader.n_ctx + job.state.passed
        batches = job.batches(first, step.n_sequences)
        loss, norm = job.learn(batches, step.rate, accept=job.calm)
        job.advance(step)
        job.journal.wait(step, first, loss, norm)
        job.extras(on_step)
        stop, kept = (
            job.agreed(stopping.asked),
            job.store.keeps(step.tokens, job.state.tokens),
        )
        number, finished = job.state.step, job.state.finished
        due = stop or kept or finished or number % job.options.save_every == 0
        if due or number % job.options.sync_every == 0:
            due = job.settle() and due
        if due:
            job.save(kept)
    return stop


def run(model, optimizer, loader, store, recipe, on_step=None, **options) -> State:
    """Train by a recipe; the same call again goes on where an earlier one was cut off.

    on_step(number, model), called after each step, may return a dictionary for
    extra.jsonl. options: see Options. Ctrl-C, a closed terminal and a polite kill
    finish the step, save and come back: then `finished` is not set. Raises RunError.
    """
    check_start(model, optimizer, on_step, options)
    options = Options(**options)
    with store.locked(), Stopping() as stopping, Journal(store.folder) as journal:
        job = Run(model, optimizer, loader, store, recipe, journal, options)
        stop = follow(job, stopping, on_step)
    model.eval()
    if stop:
        say(f"{stop}: saved after step {job.state.step}; the same run again goes on")
    return job.state


def flops_per_token(config: GPTConfig) -> int:
    """Floating-point operations to learn from one token, forward and backward.

    Six for each number of a matrix, and attention to the keys that masks let through.
    """
    matrices = 12 * config.n_layers * config.d_model**2
    matrices += config.vocab_size * config.d_model  # the way out
    band, n_ctx = min(config.bandwidth, config.n_ctx), config.n_ctx
    most = [band if kind == "banded" else n_ctx for kind in config.kinds]
    keys = sum(n - n * (n - 1) / (2 * n_ctx) for n in most)  # a mean over the window
    return 6 * matrices + round(12 * config.d_model * keys)


@torch.no_grad()
def measured_peak(device: torch.device, bf16: bool = False, seconds=0.2) -> float:
    """The most floating-point operations a second of a matrix product here, now."""
    n = {"cuda": 8192, "mps": 4096}.get(device.type, 1024)
    a = torch.ones(n, n, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
    best, end = math.inf, time.perf_counter() + seconds
    while best == math.inf or time.perf_counter() < end:
        start = time.perf_counter()
        (a @ a)[0, 0].item()  # reading a number waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def portions(count: int, size: int, halves: bool = False) -> list[int]:
    """How many sequences go into each micro-batch: size, and at last what is left.

    halves: what is left is cut into halves of size, quarters …, so that a compiler
    meets few shapes.
    """
    whole, left = divmod(count, size)
    found = [size] * whole
    while left:
        found.append(min(left, 1 << left.bit_length() - 1 if halves else left))
        left -= found[-1]
    return found


def tokenizer_of(loader):
    """The tokenizer of a loader's tokens. Raises RunError when they have none."""
    for source in loader.sources.values():
        if hasattr(source, "tokenizer"):
            return source.tokenizer
    raise RunError("no samples without a tokenizer; write the tokens with write_tokens")


def speak(model: GPT, tokenizer, prompt: str, n_tokens: int = 60) -> str:
    """How the model goes on from a prompt; the dice fall alike every time."""
    ids = tokenizer.encode(prompt)[-model.config.n_ctx :] or [tokenizer.end_of_text]
    device = device_of(model)
    dice, tokens = torch.Generator(device).manual_seed(0), torch.tensor([ids])
    text = generate(model, tokens.to(device), n_tokens, generator=dice)
    return tokenizer.decode(text[0].tolist())


class Journal(Logs):
    """What a run tells: log.csv, samples.txt, extra.jsonl and notes.txt.

    A step waits here until `read` asks the device for its loss. shows: a Bar, a Board
    or others with tell(row).
    """

    FILES = ("log.csv", "samples.txt", "extra.jsonl", "notes.txt")
    COLUMNS = (*"step tokens loss bits_per_byte rate norm tokens_per_s mfu".split(),)

    def __init__(self, folder: Path):
        super().__init__(folder, self.FILES)
        self.waiting, self.since, self.shows = [], time.perf_counter(), []
        self.bytes_per_token, self.share = None, 0.0  # of the peak, per token/s

    def begin(self, sizes: dict[str, int]) -> None:
        """Cut the files as a checkpoint says, or begin them."""
        self.waiting, self.since = [], time.perf_counter()
        self.cut(dict.fromkeys(self.FILES, 0) | sizes)
        if not sizes:
            self.write("log.csv", ",".join(self.COLUMNS))

    def wait(self, step, first: int, loss, norm) -> None:
        """Note a step and its first sequence, without asking for the numbers."""
        self.waiting.append((step, first, torch.stack([loss, norm])))

    def read(self, n_ctx: int) -> Iterator[dict]:
        """The steps that wait, as rows of numbers. Reading waits for the device."""
        waiting, self.waiting = self.waiting, []
        pairs = torch.stack([pair for *_, pair in waiting]).tolist()
        before, self.since = self.since, time.perf_counter()
        new = sum(step.n_sequences for step, *_ in waiting) * n_ctx
        speed = round(new / max(self.since - before, 1e-9))
        for (step, first, _), (loss, norm) in zip(waiting, pairs):
            bits = loss / math.log(2) / (self.bytes_per_token or math.nan)
            tokens = step.tokens + step.n_sequences * n_ctx
            values = (step.number + 1, tokens, loss, round(bits, 5), step.rate, norm)
            values += (speed, round(speed * self.share, 4), first, step.n_sequences)
            yield dict(zip((*self.COLUMNS, "first", "n_sequences"), values))

    def tell(self, row: dict) -> None:
        """Write a row to log.csv, and show it."""
        self.write("log.csv", ",".join(f"{row[name]}" for name in self.COLUMNS))
        for shown in self.shows:
            with suppress(OSError, ValueError):  # a closed terminal, a full disk
                shown.tell(row)


class Run:
    """A run that has its folder for itself, and where it is: state."""

    def __init__(self, model, optimizer, loader, store, recipe, journal, options):
        self.model, self.optimizer, self.loader = model, optimizer, loader
        self.store, self.recipe, self.journal = store, recipe, journal
        self.options, self.device = options, device_of(model)
        self.config, self.bf16, self.n_ranks = model.config, options.bf16, 1
        self.about = description(model, optimizer, loader, recipe)
        self.tokenizer = tokenizer_of(loader) if options.sample_every else None
        loss = torch.compile(loss_of, dynamic=False) if options.compile else loss_of
        ways = {"clip": recipe.clip, "bf16": options.bf16, "loss_of": loss}
        self.learn = partial(update, model, optimizer, **ways)

    def begin(self) -> None:
        """Go on from the newest checkpoint, or make the first. Raises RunError."""
        found = self.restored()
        self.state = found or State()
        self.journal.begin(self.state.sizes)
        self.steps = self.recipe.steps(self.loader.n_ctx, self.state.step)
        if not found:
            self.save()
        self.present()

    def present(self) -> None:
        """Tell the journal what its rows need, and have them shown. RunError."""
        peak = self.n_ranks * measured_peak(self.device, self.bf16)
        self.journal.share = flops_per_token(self.config) / peak
        self.journal.bytes_per_token = self.loader.bytes_per_token
        show(self.journal, self.store, self.recipe, self.state, self.options)

    def restored(self) -> State | None:
        """Back to the newest whole checkpoint, if there is one. Raises RunError."""
        found = restore(self.store, self.model, self.optimizer, self.about)
        if not found:  # before anything is saved: can it read these tokens?
            self.model.check(self.loader.sequences(0, 1)[0].to(self.device))
        self.model.train()
        return found

    def agreed(self, asked: str | None) -> str | None:
        """Whether somebody asked to stop; where there are many, all must hear of it."""
        return asked

    def advance(self, step) -> None:
        """Count a step that was made."""
        n_ctx, state = self.loader.n_ctx, self.state
        state.step = step.number + 1
        state.tokens = step.tokens + step.n_sequences * n_ctx
        state.finished = self.recipe.n_tokens - state.tokens < n_ctx

    def batches(self, first: int, count: int) -> list:
        """These sequences as micro-batches (inputs, targets), on the device."""
        sizes = portions(count, self.options.micro_batch, self.options.compile)
        pair, home = self.loader.sequences(first, count), self.device
        if home.type == "cuda":  # from pinned memory, while the device still computes
            pair = [part.pin_memory().to(home, non_blocking=True) for part in pair]
        return list(zip(*(part.to(home).split(sizes) for part in pair)))

    def calm(self, loss: torch.Tensor, norm: torch.Tensor) -> bool:
        """Whether a step may be made; yes, if losses are to be read later."""
        before, spike = self.state.losses, self.options.spike
        later = self.options.sync_every > 1
        return later or not is_spike(loss.item(), norm.item(), before, spike)

    def extras(self, on_step: Callable | None) -> None:
        """What a run tells besides its losses: on_step's findings, and samples."""
        step, every = self.state.step, self.options.sample_every
        found = on_step(step, self.model) if on_step is not None else None
        if found is not None:
            try:
                self.journal.write("extra.jsonl", json.dumps({"step": step} | found))
            except (TypeError, ValueError) as error:
                right = "a dict of plain numbers and texts, or None"
                raise RunError(f"on_step gave {found!r:.60}; give {right}") from error
        if every and step % every == 0:
            text = speak(self.model, self.tokenizer, self.options.prompt)
            self.journal.write("samples.txt", f"--- after step {step}\n{text}\n")

    def settle(self) -> bool:
        """Write the rows that wait, by policy; False after a rollback. RunError."""
        for row in self.journal.read(self.loader.n_ctx):
            loss, norm, before = row["loss"], row["norm"], self.state.losses
            if math.isfinite(loss):
                self.state.losses = [*before, loss][-WATCHED:]
            if is_spike(loss, norm, before, self.options.spike):
                what = f"step {row['step']}: loss {loss:.4g}, gradient {norm:.4g}; "
                if not self.goes_on(what + self.first_bad(row)):
                    return False
            self.journal.tell(row)
        return True

    def first_bad(self, row: dict) -> str:
        """What is wrong with the step of a row, in words."""
        batches = self.batches(row["first"], row["n_sequences"])
        return first_bad(self.model, batches)

    def goes_on(self, what: str) -> bool:
        """Skip, roll back (then False) or stop with a RunError, by policy."""
        if self.options.on_spike == "rollback":
            self.roll_back(what)
            return False
        skip = self.options.on_spike == "skip" and "parameter" not in what
        words = f"{what}. Go on with on_spike='skip' or 'rollback', or begin in "
        RunError.unless(skip, words + "another folder with a lower peak")
        self.journal.write("notes.txt", f"{what}; skipped")
        return True

    def roll_back(self, why: str) -> None:
        """Back to the newest checkpoint, but on with the data behind the bad step.

        Raises RunError after three times to the same one.
        """
        old, n_ctx = self.state, self.loader.n_ctx
        self.state = self.restored()
        self.state.passed = old.passed + (old.tokens - self.state.tokens) // n_ctx
        self.state.tries = old.tries + 1
        why = f"{why}; rolled back to step {self.state.step}"
        words = f"{why} three times, in vain; lower the peak"
        RunError.unless(self.state.tries <= 3, words)
        notes = self.journal.sizes()["notes.txt"]  # they stay
        self.journal.begin(self.state.sizes | {"notes.txt": notes})
        self.journal.write("notes.txt", why)
        self.steps = self.recipe.steps(n_ctx, self.state.step)

    def save(self, kept: bool = False) -> None:
        """A checkpoint of everything, once its logs are on the disk. RunError."""
        self.state.sizes, self.state.tries = self.journal.sizes(), 0
        told = {"state": asdict(self.state), "about": self.about}
        tensors = run_tensors(self.model, self.optimizer)
        self.store.save(self.state.step, tensors, told, kept)


def load(folder: str | Path, device="cpu") -> GPT:
    """The model of a run's newest whole checkpoint, in eval mode. Raises RunError."""
    found = Store(folder).latest()
    RunError.unless(found, f"{folder} holds no checkpoint; give the folder of a run")
    config = found.state["about"]["model"]
    with torch.device("meta"):
        model = GPT(GPTConfig(**config | {"attention": tuple(config["attention"])}))
    model.load_state_dict(dict(found.tensors("model")), assign=True)
    return model.eval().to(device)
