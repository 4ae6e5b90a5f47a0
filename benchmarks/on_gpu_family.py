"""The extra-small family's training for on_gpu.py: many runs side by side on one GPU, each a process.

A folder of data holds train/NAME and held_out/NAME, token shards as gpt3lib.loading writes them, and mixture.json:
{"weights": {NAME: share}, "spaced": whether digits and letters are written apart}. A run is named size[:words],
words being dense, constant (batch) and seedN, with commas: gpt3-1m:constant,seed2.
"""

import contextlib
import copy
import functools
import json
import math
import re
import shutil
import signal
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

import gpt3lib.model
from gpt3lib import GPT, GPTConfig, prompting, runs
from gpt3lib.files import sha256
from gpt3lib.loading import Loader, Tokens
from gpt3lib.model import loss_slowly
from gpt3lib.recipe import Recipe, micro_batches, peak_by_size, update
from gpt3lib.tasks import TASKS, Dice, problem, render
from gpt3lib.training import loss_of
from gpt3lib.weights import write_pretrained
from on_gpu_parts import Recorded, Results, clock, device_of, graphs_made, set_way, step_flops, tokens_for, way_of

SIZES = ["gpt3-10m", "gpt3-3m", "gpt3-1m", "gpt3-300k", "gpt3-100k"]
VARIANTS = ["dense", "seed1", "seed2", "constant", "constant,seed1", "constant,seed2"]
FAMILY = [*SIZES[:3], *(f"gpt3-1m:{words}" for words in VARIANTS), *SIZES[3:]]
PROBED = ["copy", "reverse", "recall", "meaning", "phrase", "category", "code", "2D+", "3D+", "A1", "html", "jsx"]
SHARD_BYTES = 14_000_000
RESERVE = 25.0  # seconds before the end of the part in which a run stops training, measures and saves


def add_options(parser, whole_number) -> None:
    """What the parts speed, tune and family may be told."""
    add = parser.add_argument_group("speed, tune and family").add_argument
    add("--data", type=Path, nargs="+", default=[], help="folders of token shards; family takes the first")
    add("--names", nargs="+", default=[], help="runs, such as gpt3-100k gpt3-1m:constant,seed2")
    add("--tokens", type=whole_number, help="tokens of each run")
    add("--n-ctx", type=whole_number, help="window, 1,024")
    add("--bandwidth", type=whole_number, help="band, 128")
    add("--batch", type=whole_number, default=64, help="sequences of the full batch")
    add("--first", type=whole_number, default=16, help="sequences of the first batch")
    add("--micro", type=whole_number, default=32, help="sequences at a time")
    add("--warmup", type=float, default=0.02, help="share of the tokens")
    add("--ramp", type=float, default=0.1, help="share of the tokens in which the batch grows")
    add("--decay", type=float, default=260 / 300, help="share of the tokens at which the rate is a tenth")
    add("--peak", type=float, nargs="+", default=[2.0], help="learning rates, as factors of recipe.peak_by_size")
    add("--compile", choices=["auto", "yes", "no"], default="auto", help="auto: as speed found, else from gpt3-3m up")
    add("--patience", type=float, default=110.0, help="seconds for compiling, before a run begins without")
    add("--how", choices=["flex", "blocks", "mask"], help="how banded layers compute in training")
    add("--graphs", choices=["yes", "no"], default="yes", help="whether to record each micro-batch as a CUDA graph")
    add("--problems", type=whole_number, help="problems of a task for each number of shots, 200")


@dataclass(frozen=True)
class Spec:
    """One run: a size, all its layers dense or not, the batch constant or growing, the seed, a factor of the rate."""

    size: str
    dense: bool = False
    constant: bool = False
    seed: int = 0
    peak: float = 1.0

    @classmethod
    def parse(cls, text: str, peak: float = 1.0) -> "Spec":
        """gpt3-1m:constant,seed2. Raises ValueError."""
        size, _, words = text.partition(":")
        found = {"peak": peak}
        for word in filter(None, words.split(",")):
            if word in ("dense", "constant"):
                found[word] = True
            elif word.startswith("seed") and word[4:].isdigit():
                found["seed"] = int(word[4:])
            else:
                raise ValueError(f"{text}: no run is {word!r}; there are dense, constant and seedN")
        return cls(size, **found)


def config_of(spec: Spec, vocab_size: int, options) -> GPTConfig:
    """The run's model."""
    n_ctx, bandwidth = (64, 16) if options.cpu else (1024, 128)
    shape = {"n_ctx": options.n_ctx or n_ctx, "bandwidth": options.bandwidth or bandwidth}
    kinds = ("dense",) if spec.dense else ("dense", "banded")
    return GPTConfig.from_name(spec.size, vocab_size=vocab_size, attention=kinds, **shape)


def recipe_of(spec: Spec, model: GPT, options) -> Recipe:
    """The paper's recipe for the run's number of tokens, cut so that its last batch is a whole one."""
    n, n_ctx = options.tokens or (2560 if options.cpu else 100_000_000), model.config.n_ctx
    full = max(1, min(options.batch, n // n_ctx))
    first = full if spec.constant else min(options.first, full)
    recipe = Recipe.scaled(
        n, spec.peak * peak_by_size(model.num_params()), full * n_ctx, first_batch_tokens=first * n_ctx,
        ramp_tokens=1 if spec.constant else max(1, int(options.ramp * n)), ramp_step=first,
        warmup_tokens=max(1, int(options.warmup * n)), decay_tokens=max(2, int(options.decay * n)),
    )  # fmt: skip
    *_, last = recipe.steps(n_ctx)
    n = last.tokens + last.n_sequences // first * first * n_ctx
    return replace(recipe, n_tokens=n, decay_tokens=min(n, recipe.decay_tokens))


class Data:
    """A folder of shards: the loader's sources and weights, what is held out, how letters are written."""

    def __init__(self, folder: Path):
        self.train, self.held_out = (
            {path.name: Tokens(path, verify=False) for path in sorted((folder / part).iterdir())}
            for part in ("train", "held_out")
        )
        about = json.loads((folder / "mixture.json").read_text())
        self.weights, self.spaced = about["weights"], about["spaced"]
        self.tokenizer = next(iter(self.train.values())).tokenizer

    def loader(self, n_ctx: int, seed: int) -> Loader:
        """The run's sequences."""
        return Loader({name: self.train[name] for name in self.weights}, self.weights, n_ctx, seed)


# ---- training ----


class Ahead:
    """A loader that reads its sequences by the thousand, and the next ones before they are asked for."""

    def __init__(self, loader: Loader, n: int = 1024):
        self.loader, self.n, self.reader, self.kept = loader, n, ThreadPoolExecutor(1), {}

    def __getattr__(self, name: str):
        return getattr(self.loader, name)

    def block(self, i: int):
        """The inputs and targets of sequences i · n … i · n + n - 1."""
        for j in (i, i + 1):
            if j not in self.kept:
                self.kept[j] = self.reader.submit(self.loader.sequences, j * self.n, self.n)
        self.kept = {j: kept for j, kept in self.kept.items() if j >= i}
        return self.kept[i].result()

    def sequences(self, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """As the loader's."""
        parts = []
        while count:
            i, start = divmod(first, self.n)
            size = min(count, self.n - start)
            parts.append([x[start : start + size] for x in self.block(i)])
            first, count = first + size, count - size
        return tuple(map(torch.cat, zip(*parts)))


def wants_compile(size: str, options) -> bool:
    """Whether to compile: as told; else where `speed` found a gain, or from gpt3-3m up."""
    if options.compile != "auto" or options.cpu:
        return options.compile == "yes"
    try:
        jobs = json.loads((options.out / "gpu_speed.json").read_text())["jobs"]
        plain, compiled = (jobs[f"{size}{end}"]["tokens_per_second"] for end in ("", " compiled"))
        return compiled > 1.2 * plain
    except (OSError, KeyError, ValueError):
        return size in ("gpt3-3m", "gpt3-10m")


@contextlib.contextmanager
def at_most(seconds: float):
    """TimeoutError when what is done meanwhile takes longer, where the system has such a clock."""
    if seconds == math.inf or not hasattr(signal, "setitimer"):
        yield
        return

    def ring(*_):
        raise TimeoutError(f"not done after {seconds:.0f} s")

    old = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def prepare(model, options, results: Results, compiled: bool):
    """The fastest loss that works here and is right: recorded, perhaps compiled; else without one or the other.

    Each way is tried on the two sizes of micro-batch that a run will have, so that nothing compiles later, and its
    gradients compared with those of the plain loss. On a GPU the loss in many small pieces would cost more time than
    the memory of all logits is worth.
    """
    device, how, n_ctx = device_of(options), options.how or way_of(options), model.config.n_ctx
    records = options.graphs == "yes" and device == "cuda"
    if device == "cuda":
        gpt3lib.model.chunked_loss = loss_slowly
        torch._dynamo.config.automatic_dynamic_shapes = False  # two shapes, each compiled for itself
    sizes = list(dict.fromkeys([options.micro, min(options.first, options.micro)]))
    ways = [(compiled, how, records), (False, how, records), (False, how, False), (False, "blocks", False)]
    for compiles, way, record in dict.fromkeys(ways):
        told = f"compiled {compiles}, {way}, recorded {record}"
        set_way(model, way)
        begin = time.perf_counter()
        try:
            loss = torch.compile(loss_of, dynamic=False) if compiles else loss_of
            loss = Recorded(loss) if record else loss
            with at_most(options.patience if compiles else math.inf):
                apart = max(difference(model, loss, n, n_ctx, device) for n in sizes)
            took = round(time.perf_counter() - begin, 1)
            results.keep(compiled=compiles, how=way, recorded=record, first_steps_s=took, apart=apart, **graphs_made())
            if apart < 0.02:
                return loss
            raise ArithmeticError(f"gradients differ by {apart:.1%}")
        except Exception as error:  # whatever it is, a slower way may work
            results.say(f"{told}: {type(error).__name__}: {str(error)[:300]}")
            results.keep(**{f"failed: {told}": f"{type(error).__name__}: {str(error)[:300]}"})
    raise RuntimeError("no way to compute the loss works here")


def difference(model, loss, n: int, n_ctx: int, device: str) -> float:
    """How far the gradients of three micro-batches, added up, are from the plain loss's, as a share of their length."""
    rows, plain = [], loss_of
    for of in (loss, plain):
        model.zero_grad()
        for seed in (0, 1, 2):
            of(model, *tokens_for(model.config.vocab_size, n, n_ctx, device, seed), True).backward()
        rows.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    model.zero_grad()
    return round(((rows[0] - rows[1]).norm() / rows[1].norm()).item(), 6)


def train(model, loader, recipe, folder: Path, options, loss, on_step, deadline: float):
    """A whole run, or what of it is done at the deadline; returns its State."""

    def watched(number, model):
        if time.time() > deadline:
            signal.raise_signal(signal.SIGTERM)  # which finishes the step, saves and comes back
        return on_step(number, model)

    ways = {"bf16": True, "micro_batch": options.micro, "sync_every": 20, "on_spike": "skip"}
    ways |= {"save_every": 10**9, "progress": False, "tensorboard": False}
    shutil.rmtree(folder, ignore_errors=True)
    store = runs.Store(folder, keep_last=1)
    runs.loss_of = loss  # the one that was prepared
    return runs.run(model, recipe.optimizer(model), Ahead(loader), store, recipe, watched, **ways)


def log_spaced(n_steps: int, n: int = 30) -> set[int]:
    """About n numbers of steps from 1 to n_steps, evenly spaced on a logarithmic axis."""
    return {round(n_steps ** (i / (n - 1))) for i in range(n)}


# ---- what a model can do ----


@contextlib.contextmanager
def measuring(model):
    """Meanwhile the model is in eval mode, its bands in blocks, exact, and nothing is kept for gradients."""
    ways = [(part, part.how) for part in model.modules() if hasattr(part, "how")]
    was, _ = model.training, set_way(model, "blocks")
    with torch.no_grad():
        yield model.eval()
    model.train(was)
    for part, how in ways:
        part.how = how


def held_out_loss(model, tokens, n_windows: int) -> dict[str, float]:
    """Nats a token and bits a byte over windows spread evenly over held-out tokens."""
    n_ctx, device = min(model.config.n_ctx, len(tokens) - 1), model.embeddings.wte.weight.device
    n_windows = min(n_windows, (len(tokens) - 1) // n_ctx)
    last = len(tokens) - n_ctx - 1
    starts = [i * last // max(1, n_windows - 1) for i in range(n_windows)]
    rows = torch.stack([tokens[start : start + n_ctx + 1].long() for start in starts])
    total = 0.0
    with measuring(model):
        for part in rows.split(16):
            total += model.loss(part[:, :-1].to(device), part[:, 1:].to(device)).item() * len(part)
    nats = total / n_windows
    return {"nats": round(nats, 4), "bits_per_byte": round(nats / math.log(2) / tokens.bytes_per_token, 4)}


def induction_scores(model, **options) -> dict:
    """The chapter Prompting's, with bands in blocks."""
    with measuring(model):
        return prompting.induction_scores(model, **options)


def questions(task, tokenizer, shots: int, n: int, spaced: bool, n_ctx: int) -> list[tuple[list[int], list[int]]]:
    """(ids of a prompt, ids of its answer and the end of its line), n times; those that do not fit are left out."""
    encode, rows = tokenizer.to_tiktoken("probes").encode_ordinary, []
    for i in range(n):
        examples, question = problem(task, Dice("probe", task.name, shots, i), shots, spaced)
        prompt = [tokenizer.end_of_text, *encode(render(task, examples, question))]
        answer = encode(f" {question.answer}\n")
        if len(prompt) + len(answer) <= n_ctx + 1:
            rows.append((prompt, answer))
    return rows


def share_right(model, rows: list, batch: int = 32) -> float:
    """How many answers greedy decoding would write, exactly, up to the end of the line.

    It writes an answer exactly when each of its tokens is the likeliest one after those before it: one look at
    prompt and answer together tells, without writing.
    """
    device, right = model.embeddings.wte.weight.device, 0
    with measuring(model):
        for some in (rows[i : i + batch] for i in range(0, len(rows), batch)):
            length = max(len(prompt) + len(answer) for prompt, answer in some) - 1
            texts = [(prompt + answer)[:-1] for prompt, answer in some]
            tokens = torch.tensor([text + [0] * (length - len(text)) for text in texts])
            h = model.hidden(tokens.to(device))
            for i, (prompt, answer) in enumerate(some):
                logits = model.embeddings.unembed(h[i, len(prompt) - 1 : len(prompt) - 1 + len(answer)])
                right += logits.argmax(dim=-1).tolist() == answer
    return right / len(rows)


def probes(model, data: Data, options, deadline: float) -> dict:
    """Task -> number of shots -> share of right answers; what the time does not allow is left out."""
    names, shots = (PROBED[:2], (0, 1)) if options.cpu else (PROBED, (0, 1, 8, 32))
    found, n = {}, options.problems or (8 if options.cpu else 200)
    for name in names:
        for k in shots:
            if time.time() < deadline:
                rows = questions(TASKS[name], data.tokenizer, k, n, data.spaced, model.config.n_ctx)
                if len(rows) > n // 2:
                    found.setdefault(name, {})[k] = round(share_right(model, rows), 4)
    return found


# ---- the parts ----


def tune_labels(options) -> list[str]:
    """Each folder with each of the runs (the two smallest sizes) at each learning rate; the large ones first."""
    check_data(options)
    return [
        f"{folder.name}/{name}@{peak:g}"
        for name in options.names or ["gpt3-300k", "gpt3-100k"]
        for folder in options.data
        for peak in options.peak
    ]


def family_labels(options) -> list[str]:
    """The runs, the longest first."""
    check_data(options)
    names = options.names or (["gpt3-100k", "gpt3-100k:dense,seed1"] if options.cpu else FAMILY)
    return [f"{name}@{options.peak[0]:g}" for name in names]


def check_data(options) -> None:
    """Stop, with the reason, without data."""
    folders = [*options.data, *([] if options.data else [None])]
    missing = [folder for folder in folders if folder is None or not (folder / "mixture.json").is_file()]
    if missing:
        raise SystemExit(f"--data: {missing[0] or 'none given'}; give folders that hold train, held_out, mixture.json")


def train_one(label: str, results: Results, options) -> None:
    """One run: train, save, measure on what was held out, each written as soon as it is known."""
    *place, text = label.split("/")
    text, peak = text.split("@")
    spec = Spec.parse(text, float(peak))
    folder = next(f for f in options.data if not place or f.name == place[0])
    data = Data(folder)
    config = config_of(spec, data.tokenizer.vocab_size, options)
    model = GPT(config, spec.seed).to(device_of(options))
    recipe, loader = recipe_of(spec, model, options), data.loader(config.n_ctx, spec.seed)
    results.keep(run=asdict(spec), config=asdict(config), recipe=asdict(recipe), data=loader.identity())
    home = options.out / "models" / Path(*place) / re.sub("[:,@/]", "-", f"{text}@{peak}" if place else text)
    home.mkdir(parents=True, exist_ok=True)
    loss = prepare(model, options, results, wants_compile(spec.size, options))
    counted = [step.tokens + step.n_sequences * config.n_ctx for step in recipe.steps(config.n_ctx)]
    watched = log_spaced(len(counted)) if text == "gpt3-1m" or options.cpu else set()
    every, curve, begin = max(1, len(counted) // 10), {}, time.perf_counter()

    def on_step(number, model):
        tokens, found = counted[number - 1], {}
        if number in watched:
            found["induction"] = induction_scores(model)
        if number % every == 0:
            curve[tokens] = {name: held_out_loss(model, part, 16)["nats"] for name, part in data.held_out.items()}
            found["held_out"] = curve[tokens]
            results.say(f"{tokens / 1e6:.1f}M tokens in {time.perf_counter() - begin:.0f} s: {curve[tokens]}")
            results.keep(curve=curve, tokens=tokens)
        return found or None

    state = train(model, loader, recipe, home / "run", options, loss, on_step, options.until - RESERVE)
    seconds = time.perf_counter() - begin
    results.keep(
        tokens=state.tokens, steps=state.step, finished=state.finished, train_s=round(seconds, 1),
        tokens_per_second=round(state.tokens / seconds), curve=curve,
        last_losses=statistics.fmean(state.losses) if state.losses else None,
        epochs={name: round(value, 3) for name, value in loader.epochs(state.tokens // config.n_ctx).items()},
    )  # fmt: skip
    keep_logs(home)
    if not place:
        results.keep(files=save(model, data, home))
    n_windows = 8 if options.cpu else 256
    results.keep(held_out={name: held_out_loss(model, part, n_windows) for name, part in data.held_out.items()})
    results.keep(accuracy=probes(model, data, options, options.until - 5))
    results.say(f"{results.found['held_out']} {results.found['accuracy']}")


def keep_logs(home: Path) -> None:
    """Of a run's folder keep what it told; its checkpoint, with the optimizer, is too large to ship."""
    for name in ("log.csv", "extra.jsonl", "notes.txt"):
        if (home / "run" / name).is_file():
            (home / "run" / name).replace(home / name)
    shutil.rmtree(home / "run")


def save(model, data: Data, home: Path) -> dict[str, str]:
    """The model as float16 safetensors, its tokenizer and its log; returns name -> SHA-256."""
    small = copy.deepcopy(model).half().cpu()
    large = 2 * small.num_params() > SHARD_BYTES
    write_pretrained(small, home, SHARD_BYTES if large else None)
    data.tokenizer.save(home / "merges.txt")
    return {path.name: sha256(path) for path in sorted(home.iterdir()) if path.is_file()}


# ---- speed ----


def speed_labels(options) -> list[str]:
    """Each size as it is, then compiled."""
    names = options.names or (["gpt3-100k"] if options.cpu else SIZES)
    sizes = list(dict.fromkeys(name.partition(":")[0] for name in names))
    return sizes if options.cpu else [*sizes, *(f"{size} compiled" for size in sizes)]


@contextlib.contextmanager
def alone(options):
    """Meanwhile no other job of this folder measures."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with open(options.out / "jobs" / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def speed(label: str, results: Results, options) -> None:
    """Tokens a second of one size's training steps at the family's micro-batch, two of them a step."""
    size, *compiled = label.split()
    device, spec = device_of(options), Spec(size)
    vocab_size = Data(options.data[0]).tokenizer.vocab_size if options.data else (300 if options.cpu else 4096)
    config = config_of(spec, vocab_size, options)
    model = GPT(config).to(device).train()
    loss = prepare(model, options, results, bool(compiled))
    optimizer, n = Recipe.scaled(1e9, 1e-4, 2**16).optimizer(model), 2 * options.micro
    x, y = tokens_for(vocab_size, n, config.n_ctx, device)
    step = functools.partial(
        update, model, optimizer, micro_batches(x, y, options.micro), 1e-4, bf16=True, loss_of=loss
    )
    step(), step()
    with alone(options):
        seconds = statistics.median(clock(step, device, 3) for _ in range(5))
    flops = step_flops(config, n, config.n_ctx)
    found = {"ms": round(1e3 * seconds, 2), "tokens_per_second": round(n * config.n_ctx / seconds)}
    if device == "cuda":
        found["peak_GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    results.keep(micro=options.micro, TFLOPs=round(flops["actual"] / seconds / 1e12, 2), **found, **graphs_made())
    results.say(str(found))
