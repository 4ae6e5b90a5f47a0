"""A text becomes a model: which tokens and size, how long, and what a run needs."""

# Made from book/i_own_text.ipynb by tools/export.py; edit the chapter.
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from math import prod
from pathlib import Path

import torch

from gpt3lib.commands import AXES_ASKED, torchrun_ranks
from gpt3lib.files import NoDice, Refusal, sha256, write_beside
from gpt3lib.loading import MANIFEST, MERGES, Loader, Tokens, text_files, write_tokens
from gpt3lib.model import GPT, GPTConfig
from gpt3lib.recipe import TABLE_BATCHES, Recipe, peak_by_size
from gpt3lib.runs import Options, Store, flops_per_token, measured_peak, run
from gpt3lib.sizes import EXTRA_SMALL
from gpt3lib.tokenization import Tokenizer
from gpt3lib.using import find_device, whole_texts

# characters of text: tokens to learn, the 256 bytes and end-of-text among them
VOCABULARIES = {30_000: 257, 300_000: 512, 2_000_000: 1024, 4_000_000: 2048}


def learn_tokenizer(documents: list[str], vocab_size: int | None = None) -> Tokenizer:
    """BPE learned from the first 4M characters; their number says how many tokens."""
    text = "\n".join(documents)[:4_000_000]
    if vocab_size is None:
        fits = (size for n, size in VOCABULARIES.items() if len(text) < n)
        vocab_size = next(fits, 4096)
    return Tokenizer.train(text, vocab_size)


def choose_tokenizer(config) -> Tokenizer:
    """GPT-2's tokenizer, one learned from the files, or that of a file or folder."""
    name, path = config.tokenizer, Path(config.tokenizer).expanduser()
    if name == "learn":
        limit = max(10_000, 4_000_000 // len(config.files))
        documents = whole_texts(config.files, config.field, limit)
        return learn_tokenizer(documents, config.vocab_size)
    words = "--vocab_size is for --tokenizer learn; others have theirs"
    StartError.unless(config.vocab_size is None, words)
    if name == "gpt2":
        return Tokenizer.gpt2()
    return Tokenizer.load(path / MERGES if (path / MERGES).is_file() else path)


class StartError(Refusal, ValueError):
    """A run that cannot, or should not, begin; the message says what would help."""


HELD_SHARE = 20  # a twentieth is held out
LOSSLESS = "utf-8", "surrogatepass"


def texts_of(path) -> list[Path]:
    """A file, or the texts below a folder, but none that a run has written there."""
    runs = {state.parents[1] for state in Path(path).rglob("step-*/state.json")}
    return [file for file in text_files(path) if runs.isdisjoint(file.parents)]


def parted(documents: list[str]) -> tuple[list[str], list[str]]:
    """What is learned from, and what is held out: of each text the last twentieth.

    Of texts that are short, and many, every twentieth is held out whole.
    """
    texts = [text for text in documents if text.strip()]
    if len(texts) >= HELD_SHARE and sum(map(len, texts)) < 1000 * len(texts):
        held = texts[HELD_SHARE - 1 :: HELD_SHARE]
        return [t for i, t in enumerate(texts, 1) if i % HELD_SHARE], held
    ends = [len(text) - len(text) // HELD_SHARE for text in texts]
    held = [text[end:] for text, end in zip(texts, ends) if text[end:]]
    return [text[:end] for text, end in zip(texts, ends)], held


def prepare_text(paths, folder: Path, vocab_size: int | None = None) -> Tokens:
    """Texts as shards in a run's folder, and the last of each held out beside them.

    What is there already stays. Raises StartError, also for texts that have changed
    since, and LoadingError.
    """
    files = [file for path in paths for file in texts_of(path)]
    names = ", ".join(map(str, paths))
    StartError.unless(files, f"{names}: only what runs have written; give a text")
    documents, place = whole_texts(files), folder / "data"
    n = sum(map(len, documents))
    few = f"{names}: {n} characters are too few to learn from"
    StartError.unless(n >= 1000, f"{few}; 1,000 are the least, 100,000 a beginning")
    mark, told = sha256("\0".join(documents).encode(*LOSSLESS)), place / "texts.sha256"
    if not told.exists():
        place.mkdir(parents=True, exist_ok=True)
        write_beside(told, mark.encode())
    other = f"{names}: not the text with which the run in {folder} began"
    StartError.unless(told.read_text() == mark, f"{other}; give it another --out")
    train, held = parted(documents)
    if not (place / "train" / MANIFEST).exists():
        write_tokens(train, place / "train", learn_tokenizer(train, vocab_size))
    tokens = Tokens(place / "train")
    if not (place / "held_out" / MANIFEST).exists():
        write_tokens(held, place / "held_out", tokens.tokenizer)
    return tokens


OPEN = {"minutes": 3.0, "on_spike": "rollback"}  # of a text, if nobody says otherwise
SHAPE = ("n_ctx", "attention", "bandwidth")
RATES = (
    "n_tokens peak batch_tokens first_batch_tokens ramp_tokens warmup_tokens "
    "decay_tokens weight_decay clip".split()
)


def given(config, names) -> dict:
    """Those of the fields that are not left open."""
    values = {name: getattr(config, name) for name in names}
    return {name: value for name, value in values.items() if value not in (None, ())}


def plan_model(config, vocab_size: int | None = None) -> GPTConfig:
    """The model of a run; vocab_size: that of its data. Raises ConfigError."""
    size = {} if vocab_size is None else {"vocab_size": vocab_size}
    return GPTConfig.from_name(config.size, **given(config, SHAPE) | size)


def count(shape: GPTConfig) -> int:
    """The number of parameters of a model that is not made."""
    with torch.device("meta"), NoDice():
        return GPT(shape).num_params()


def plan_recipe(config, shape: GPTConfig, n_data: int = 0) -> Recipe:
    """Table 2.1's row for the paper's sizes; for others the same in proportion.

    n_data: tokens of the data, learned from once if not told; 0 for no data yet.
    Raises RecipeError.
    """
    fields = given(config, RATES)
    if config.size in TABLE_BATCHES:
        if "n_tokens" not in fields:
            return Recipe.from_name(config.size, **fields)
        batch, peak, _ = TABLE_BATCHES[config.size]
        return Recipe.scaled(**{"peak": peak, "batch_tokens": batch} | fields)
    n = fields.setdefault("n_tokens", n_data or 20 * count(shape))
    batch = max(2, min(32768, n // 1000) // shape.n_ctx) * shape.n_ctx
    ours = {"peak": peak_by_size(count(shape)), "batch_tokens": batch}
    return Recipe.scaled(**ours | {"warmup_tokens": n // 10} | fields)


def room(n_bytes: float) -> str:
    """Bytes as people say them."""
    return f"{n_bytes / 1e9:,.0f} GB" if n_bytes >= 1e10 else f"{n_bytes / 1e6:,.0f} MB"


def duration(seconds: float) -> str:
    """Seconds in a unit that can be felt."""
    units = {"years": 31_557_600, "days": 86_400, "hours": 3600, "minutes": 60}
    for unit, size in units.items():
        if seconds >= 2 * size:
            return f"{seconds / size:,.0f} {unit}"
    return f"{seconds:.0f} seconds"


TRAINING_BYTES = 16  # of a parameter: itself, its gradient, Adam's two averages


def needs(name: str, shape: GPTConfig, recipe: Recipe) -> dict[str, str]:
    """What a run needs, whoever runs it: a few lines, each with its name."""
    n, ends = count(shape), (0, recipe.n_tokens)
    first, full = (shape.n_ctx * recipe.batch_size(end, shape.n_ctx) for end in ends)
    return {
        name: f"{n:,} parameters, {shape.n_layers} layers of {shape.d_model:,}",
        "tokens": f"{recipe.n_tokens:,}, in windows of {shape.n_ctx:,}",
        "batch": f"{full:,} tokens, at first {first:,}",
        "rate": f"{recipe.peak:.2g}, reached after {recipe.warmup_tokens:,} tokens",
        "work": f"{6 * n * recipe.n_tokens:.3g} operations: 6 · parameters · tokens",
        "memory": f"{room(TRAINING_BYTES * n)} for weights, gradients and Adam",
    }


def memory_of(device: torch.device) -> int | None:
    """Bytes of memory of a device; None where nobody tells."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    with suppress(AttributeError, ValueError, OSError):  # Windows has no sysconf
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def on_all_ranks(memory: int | None, peak: float, device: torch.device) -> tuple:
    """Memory and speed of all of torchrun's ranks; a machine's share its memory."""
    n = max(1, torchrun_ranks())
    machines = n // int(os.environ.get("LOCAL_WORLD_SIZE", n))
    memory = memory and memory * (machines if device.type == "cpu" else n)
    return memory, n * peak


MONTH = 30 * 86_400  # seconds


def obstacles(shape: GPTConfig, recipe: Recipe, memory: int | None, peak: float) -> str:
    """Why a run should not begin, "" for nothing: no room, or more than a month.

    memory: bytes, None for unknown; peak: operations a second of the machine.
    """
    wanted, why = TRAINING_BYTES * count(shape), []
    seconds = flops_per_token(shape) * recipe.n_tokens / peak
    if memory is not None and wanted > memory:
        why.append(f"needs {room(wanted)} of memory (there are {room(memory)})")
    if seconds > MONTH:
        why.append(f"would take {duration(seconds)} here")
    return " and ".join(why)


EPOCHS, PER_PARAMETER = 10, 8


def fit(config, n_text: int, speed_of: Callable[[GPTConfig], float]):
    """The config with what a text of n_text tokens leaves open: window, size, length.

    The largest size that learns from PER_PARAMETER tokens for each number of its layers
    within config.minutes, from the text EPOCHS times at most. Raises StartError.
    """
    n_ctx = 2 ** min(8, max(3, n_text.bit_length() - 4))  # 8 … 256
    ours = OPEN | {"n_ctx": n_ctx, "bandwidth": n_ctx // 4}
    config = replace(config, **ours | given(config, ours))
    few = f"{n_text:,} tokens of text hold no window of {config.n_ctx:,} and one more"
    StartError.unless(n_text > config.n_ctx, f"{few}; give more, or a smaller n_ctx")
    best = None
    for size in [config.size] if config.size else EXTRA_SMALL:
        shape = plan_model(replace(config, size=size), config.vocab_size)
        affordable = 60 * config.minutes * speed_of(shape)
        n_tokens = max(config.n_ctx, int(min(EPOCHS * n_text, affordable)))
        if best and n_tokens < PER_PARAMETER * 12 * shape.n_layers * shape.d_model**2:
            break
        best = replace(config, size=size, n_tokens=n_tokens)
    return replace(best, **given(config, ["n_tokens"]))


def speed(shape: GPTConfig, device: torch.device) -> float:
    """Tokens a second that a model of this shape learns from here, tried once."""
    model, n = GPT(shape).to(device), 2 if device.type == "cpu" else 16
    tokens = torch.zeros(n, shape.n_ctx, dtype=torch.int64, device=device)
    for _ in range(2):  # the first one is slower
        start = time.perf_counter()
        model.loss(tokens, tokens).backward()
        model.ln_f.bias.grad.sum().item()  # waits for the device
    return tokens.numel() / (time.perf_counter() - start)


@contextmanager
def threads(n: int) -> Iterator[None]:
    """Meanwhile the processor computes with n threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def fastest(shape: GPTConfig, device: torch.device) -> tuple[float, int]:
    """The tokens a second, and the threads that reach them: one, or all there are.

    A tiny model is faster with one: more of them wait for each other.
    """
    tried = {}
    for n in {1, torch.get_num_threads()} if device.type == "cpu" else {1}:
        with threads(n):
            tried[n] = speed(shape, device)
    best = max(tried, key=tried.get)
    return tried[best], best


def open_data(config) -> tuple[dict[str, Tokens], dict[str, float]]:
    """The folders of tokens by name, and the share of each. Raises LoadingError."""
    own = Path(config.out).glob("data/train") if config.out else []
    paths = [str(path) for path in config.data or own]
    names = [Path(path).name for path in paths]
    names = paths if len(set(names)) < len(names) else names
    sources = {name: Tokens(path) for name, path in zip(names, paths)}
    weights = config.weights or [len(source) for source in sources.values()]
    return sources, dict(zip(sources, weights))


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """A run's folder for this call alone, made if need be."""
    StartError.unless(not folder.is_file(), f"{folder} is a file; give a folder")
    with Store(folder).locked():
        try:
            yield
        finally:
            with suppress(OSError):  # a refused start leaves no empty folder
                if os.listdir(folder) == ["lock"]:
                    (folder / "lock").unlink()
                    os.removedirs(folder)


def begin_text(config, device: torch.device):
    """The config of a run on texts, which lie as shards in its folder from then on."""
    names = ", ".join(Path(os.path.abspath(path)).name for path in config.text)
    print(f"{names}: learning how to cut it into tokens …", flush=True)
    out, old = Path(config.out), ("train/" + MANIFEST, "held_out/" + MANIFEST)
    begun = (out / "config.yaml").exists() or any(out.glob("step-*"))
    for name in () if begun else ("texts.sha256", *old):  # a refused start left them
        (out / "data" / name).unlink(missing_ok=True)
    tokens = prepare_text(config.text, out, config.vocab_size)
    found = f"{len(tokens):,} tokens to learn from, {tokens.vocab_size:,} different"
    print(f"{found} ones, {tokens.bytes_per_token:.1f} bytes each", flush=True)
    wanted = config.vocab_size or tokens.vocab_size  # a text may yield fewer
    config = replace(config, vocab_size=tokens.vocab_size)
    config = fit(config, len(tokens), lambda shape: fastest(shape, device)[0])
    return replace(config, vocab_size=wanted)


def settled(config):
    """A config in which nothing is open: by the data, the machine and the paper.

    Prints what the run needs. Raises StartError when it does not fit.
    """
    device = find_device(config.device)
    if config.text:
        config = begin_text(config, device)
    if config.size is None:
        raise StartError("which size? gpt3-100k … gpt3-175b; with --text it is chosen")
    sources, _ = open_data(config)
    sizes = [source.vocab_size for source in sources.values()]
    shape = plan_model(config, max(sizes, default=None))
    recipe = plan_recipe(config, shape, sum(map(len, sources.values())))
    for name, words in needs(config.size, shape, recipe).items():
        print(f"{name:12}{words}", flush=True)
    here = memory_of(device), measured_peak(device, config.bf16)
    why = obstacles(shape, recipe, *on_all_ranks(*here, device))
    if why and not config.go_ahead:
        raise StartError(f"{config.size} {why}; --go_ahead begins all the same")
    if not sources:
        raise StartError("nothing to learn from; give --data FOLDER or --text FILE")
    fields = {name: getattr(recipe, name) for name in RATES}
    fields |= {name: getattr(shape, name) for name in SHAPE}
    n = fastest(shape, device)[1] if config.n_threads is None else config.n_threads
    return replace(config, **fields, n_threads=n, seed=config.seed or 0)


MOST_THREADS = 1024  # torch ends without a word when there are too many
RUN_WAYS = "on_spike save_every micro_batch sample_every prompt bf16 compile".split()


def ready(config):
    """Device, shape, recipe, Loader and Store of a run; each says what is wrong."""
    sources, weights = open_data(config)
    n, sizes = config.n_threads, [source.vocab_size for source in sources.values()]
    words = f"n_threads is {n}; it must be 1 to {MOST_THREADS:,}"
    StartError.unless(1 <= n <= MOST_THREADS, words)
    shape = plan_model(config, max(sizes, default=None))
    recipe = plan_recipe(config, shape)
    recipe.steps(shape.n_ctx)  # is there one?
    loader = Loader(sources, weights, shape.n_ctx, config.seed)
    store = Store(config.out, **given(config, ("keep_last", "keep_at")))
    Options(**given(config, RUN_WAYS))
    return find_device(config.device), shape, recipe, loader, store


def learn(config, parts=None):
    """Run a settled config, which may be `ready`, from where it is: model, State."""
    device, shape, recipe, loader, store = parts or ready(config)
    model, ways = GPT(shape, config.seed).to(device), given(config, RUN_WAYS)
    with threads(config.n_threads):
        state = run(model, recipe.optimizer(model), loader, store, recipe, **ways)
    return model, state


def layout_of(config, shape: GPTConfig, world: int):
    """How a config lays a model out over `world` ranks. Raises LayoutError."""
    from gpt3lib.parallel import Layout, check_layout

    sizes = {name: getattr(config, name) or 1 for name in (*AXES_ASKED, "chunks")}
    if config.dp is None:
        sizes["dp"] = max(1, world // prod(sizes[name] for name in AXES_ASKED))
    ways = given(config, ("recompute", "micro_batch", "bf16", "compile"))
    layout = Layout(**sizes, **ways)
    check_layout(layout, shape, world)
    return layout
