"""Files that a kill cannot spoil: written beside, then renamed; hashes; folders of
tensors."""

# Made from book/d_files.ipynb by tools/export.py; edit the chapter.
import hashlib
import json
import numbers
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import get_ident

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file
from torch import nn
from torch.overrides import TorchFunctionMode


@contextmanager
def beside(path: str | Path) -> Iterator[Path]:
    """Gives a place beside `path` to write to, and renames it to `path` at the end.

    A reader sees all of the old or all of the new. What fails half way is removed.
    """
    part = Path(f"{path}.part")
    try:
        yield part
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_beside(path: str | Path, data: bytes) -> None:
    """Write bytes beside, then rename."""
    with beside(path) as part:
        part.write_bytes(data)


def sha256(source: bytes | Path) -> str:
    """The SHA-256 of bytes, or of a file, in hexadecimal."""
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    with open(source, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def copied(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A copy in one piece, in the processor's memory; dtype None keeps the type."""
    return torch.empty(tensor.shape, dtype=dtype or tensor.dtype).copy_(tensor)


def is_whole(value, least: int = 1) -> bool:
    """Whether a value is a whole number, Python's or numpy's, of at least `least`."""
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    return whole and value >= least


def as_float(value) -> float:
    """A real number, Python's or numpy's, as a float; nan for all else, and for bools.

    A number that is too large for a float is nan too.
    """
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    try:
        return float(value if real else "nan")
    except OverflowError:
        return float("nan")


class Refusal(Exception):
    """The base of errors for bad input: they say what is wrong and what is right."""

    @classmethod
    def unless(cls, fine, problem: str) -> None:
        """Raise this error with these words unless all is fine."""
        if not fine:
            raise cls(problem)

    @classmethod
    def unless_whole(cls, name: str, value, least: int = 1) -> int:
        """The value as Python's int, which never overflows, if it is whole enough."""
        problem = f"{name} is {value!r}; it must be a whole number, {least} or more"
        cls.unless(is_whole(value, least), problem)
        return int(value)


MODEL, INDEX = "model.safetensors", "model.safetensors.index.json"


class WeightsError(Refusal, ValueError):
    """A model that is damaged, incomplete, out of reach, or none that GPT can be.

    The message names the file and says what to do.
    """


def remove_shards(folder: Path) -> None:
    """Remove the shards that no index in the folder names, and unfinished ones."""
    index = folder / INDEX  # it may be damaged, so its text is searched
    text = index.read_text(errors="replace") if index.is_file() else ""
    name = r"model-\d{5,}-of-\d{5,}(-[0-9a-f]{16})?\.safetensors(\.part)?"
    for path in folder.glob("model-*"):
        if re.fullmatch(name, path.name) and path.name not in text:
            os.unlink(path)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Makes the folder; whatever cannot be written is a WeightsError that says why."""
    if os.path.isfile(folder):  # unlike Path's, it takes a path that is too long
        raise WeightsError(f"{folder} is a file; give a folder to write into")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("config.json", MODEL, INDEX):
            if (folder / name).is_dir():
                raise OSError(f"{name} is a folder")
        yield
    except (OSError, SafetensorError) as error:
        right = "make room there, or choose another"
        raise WeightsError(f"{folder} cannot be written ({error}); {right}") from error


def in_order(path: Path) -> None:
    """Sort a safetensors header, whose words come in another order each time.

    So equal models make files of equal bytes. The header keeps its length.
    """
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        look = {"sort_keys": True, "ensure_ascii": False, "separators": (",", ":")}
        header = json.dumps(json.loads(file.read(length)), **look).encode()
        file.seek(8)
        file.write(header.ljust(length))


def write_folder(folder: Path, tensors: dict, header: dict, config: str) -> None:
    """Write model.safetensors and config.json; a kill leaves a model that loads.

    Raises WeightsError.
    """
    copies = {name: copied(tensor) for name, tensor in tensors.items()}
    with writing(folder):
        with beside(folder / "config.json") as part:
            part.write_text(config)
            with beside(folder / MODEL) as weights:
                save_file(copies, weights, metadata=header)
                in_order(weights)
                # safetensors lets only the owner read; do as for other files
                weights.chmod(part.stat().st_mode)
        (folder / INDEX).unlink(missing_ok=True)
        remove_shards(folder)


def shards(tensors: dict, shard_bytes: int) -> list[dict]:
    """The tensors in groups of at most shard_bytes; a larger one is a group of its own.

    Raises WeightsError for a size below 1.
    """
    shard_bytes = WeightsError.unless_whole("shard_bytes", shard_bytes)
    groups, room = [], 0
    for name, tensor in tensors.items():
        if not groups or tensor.nbytes > room:
            groups, room = [*groups, {}], shard_bytes
        groups[-1][name] = tensor
        room -= tensor.nbytes
    return groups


def write_shards(
    folder: Path, tensors: dict, header: dict, config: str, shard_bytes: int
) -> None:
    """Write shards named by their hashes, then the index that makes them the model.

    Raises WeightsError, for shard_bytes below 1 before anything is written.
    """
    groups, places = shards(tensors, shard_bytes), {}
    about = header | {"total_size": sum(tensor.nbytes for tensor in tensors.values())}
    with writing(folder):
        try:
            for i, group in enumerate(groups, start=1):
                copies = {name: copied(tensor) for name, tensor in group.items()}
                data = save(copies, {"format": "pt"})
                stem = f"model-{i:05}-of-{len(groups):05}"
                file = f"{stem}-{sha256(data)[:16]}.safetensors"
                write_beside(folder / file, data)
                places |= dict.fromkeys(group, file)
            index = json.dumps({"metadata": about, "weight_map": places}, indent=1)
            write_beside(folder / INDEX, index.encode())
            (folder / MODEL).unlink(missing_ok=True)  # it would be read first
            write_beside(folder / "config.json", config.encode())
        finally:
            remove_shards(folder)  # the old ones, or after a failure the new ones


def scan(path: Path) -> tuple[dict, dict]:
    """What a safetensors file says before a number is read.

    Returns name -> (file, shape, type), and the file's metadata. Raises WeightsError.
    """
    try:
        with safe_open(path, "pt") as file:
            found, names = {}, file.keys()
            for name in names:
                part = file.get_slice(name)
                found[name] = (path, tuple(part.get_shape()), part.get_dtype())
            return found, file.metadata() or {}
    except OSError as error:
        raise WeightsError(f"{path} cannot be read ({error})") from error
    except SafetensorError as error:
        words = f"{path} is damaged ({error}); copy or save it again"
        raise WeightsError(words) from error


def scan_shards(index: Path) -> tuple[dict, dict]:
    """The same for a model in several files, whose index says what lies where."""
    try:
        raw = json.loads(index.read_text())
        places, about = dict(raw["weight_map"]), dict(raw.get("metadata") or {})
        files = {Path(file).name: {} for file in places.values()}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        words = f"{index} is damaged ({error!r}); copy or save the model again"
        raise WeightsError(words) from error
    for file in files:
        place, right = index.parent / file, "copy or download that file too"
        words = f"{index.parent} has no {file}, which its index names; {right}"
        WeightsError.unless(place.is_file(), words)
        files[file] = scan(place)[0]
    for name, file in places.items():
        there, right = name in files.get(file, {}), "copy or save them again"
        words = f"{index} says that {name} lies in {file}, but it does not; {right}"
        WeightsError.unless(there, words)
    return {name: files[file][name] for name, file in places.items()}, about


PICKLED = (
    "has no safetensors but pickles ({}), which can run any code when opened; "
    "if you trust it, load it once with transformers and save it with "
    "save_pretrained, which writes safetensors"
)


def scan_folder(folder: Path) -> tuple[dict, dict]:
    """name -> (file, shape, type) of a folder's tensors, and their metadata.

    Raises WeightsError when there are none, naming what is there instead.
    """
    if not os.path.isdir(folder):
        raise WeightsError(f"{folder} has no {MODEL}; there is no such folder here")
    if (folder / MODEL).is_dir():
        raise WeightsError(f"{folder / MODEL} is a folder; it must be a file")
    if (folder / MODEL).is_file():
        return scan(folder / MODEL)
    if (folder / INDEX).is_file():
        return scan_shards(folder / INDEX)
    kinds = (".bin", ".pt", ".pth", ".ckpt")
    pickles = [path.name for path in sorted(folder.glob("*")) if path.suffix in kinds]
    if pickles:
        raise WeightsError(f"{folder} {PICKLED.format(', '.join(pickles[:3]))}")
    raise WeightsError(f"{folder} has no {MODEL}; save_pretrained writes one")


class Stored(Mapping):
    """The tensors that a scan found, by name; each is read when it is asked for.

    found: name -> (file, shape, type); names: those of them, if the files have others.
    """

    def __init__(self, found: dict[str, tuple], names: dict[str, str] | None = None):
        self.found = found
        self.names = names or {name: name for name in found}

    def __getitem__(self, name: str) -> torch.Tensor:
        # opened and closed each time: an open file's pages would stay in memory
        with safe_open(self.found[self.names[name]][0], "pt") as file:
            return file.get_tensor(self.names[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


# torch's types of a model's numbers -> the format's words for them
FLOATS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}


def check_tensors(folder: Path, wanted: dict, found: dict) -> None:
    """Raise WeightsError unless exactly the wanted shapes are found, as plain floats.

    wanted: name in the file -> shape; found: name -> (file, shape, type).
    """
    why = " in a GPT of this config"
    if found and not wanted.keys() & found.keys():
        why += f"; all names begin with {os.path.commonprefix([*found])!r}"
    for name in sorted(wanted | found):
        _, shape, dtype = found.get(name, (None, "missing", "F32"))
        expected = wanted.get(name, "no such tensor")
        if shape != expected:
            raise WeightsError(f"{folder}: {name} is {shape}, expected {expected}{why}")
        right = "it must be F64, F32, F16 or BF16, not quantised"
        words = f"{folder}: {name} holds {dtype}; {right}"
        WeightsError.unless(dtype in FLOATS.values(), words)


def check_dtype(dtype) -> None:
    """Raise WeightsError for a type that no model's numbers have; None is fine."""
    if dtype is not None and dtype not in FLOATS:
        right = "torch.float32, float16, bfloat16, float64, or None for the file's own"
        raise WeightsError(f"dtype is {dtype!r}; it must be {right}")


def parse(text: str) -> dict:
    """JSON's names with their values. Raises ValueError for any other JSON."""
    raw = json.loads(text)
    if not isinstance(raw, dict):
        raise ValueError(f"it holds a {type(raw).__name__}, not names with values")
    return raw


@contextmanager
def impatient(seconds: float = 7, tries: int = 2) -> Iterator[None]:
    """Meanwhile the hub's client waits so long, and asks so often without progress.

    HF_HUB_DOWNLOAD_TIMEOUT, its own variable, goes before seconds. All threads that use
    the client meanwhile are as impatient. Raises TimeoutError.
    """
    from huggingface_hub.utils import get_session  # reading folders needs no hub

    asked, hooks = Counter(), get_session().event_hooks
    seconds = float(os.environ.get("HF_HUB_DOWNLOAD_TIMEOUT", seconds))
    limits = {"READ_TIMEOUT": f"{seconds:g}s", "RETRY_MAX_ATTEMPTS": "1"}
    for name, value in limits.items():
        os.environ.setdefault(f"HF_XET_CLIENT_{name}", value)  # its other client's

    def place(asks):  # other threads may ask the same at the same time
        return get_ident(), asks.method, str(asks.url), asks.headers.get("range")

    def limit(request):
        asked[place(request)] += 1
        if asked[place(request)] > tries:
            raise TimeoutError(f"{request.url} stays silent")
        kinds = ("connect", "read", "write", "pool")
        request.extensions["timeout"] = dict.fromkeys(kinds, seconds)

    def forgive(response):  # an error is an answer; how often to ask is the client's
        if response.status_code >= 400:
            asked[place(response.request)] = 0

    hooks["request"].append(limit)
    hooks["response"].append(forgive)
    try:
        yield
    finally:
        hooks["request"].remove(limit)
        hooks["response"].remove(forgive)


def find_on_hub(name: str, check: Callable[[Path], object]) -> Path:
    """The folder of a hub's model, downloaded or from its cache. Raises WeightsError.

    check(folder) may refuse it when only config.json is there, before gigabytes come.
    """
    try:
        from huggingface_hub import snapshot_download

        with impatient():
            found = snapshot_download(name, allow_patterns=["config.json"])
        check(Path(found))
        with impatient():
            wanted = ["*.json", "*.safetensors"]
            found = Path(snapshot_download(name, allow_patterns=wanted))
    except WeightsError:
        raise
    except Exception as error:  # its client has a dozen kinds, others in each version
        kind = type(error).__name__
        unknown = kind in ("RepositoryNotFoundError", "GatedRepoError")
        no = "has no such model, or not for everybody"
        says = no if unknown else "could not be reached"
        raise WeightsError(
            f"{name!r} is no folder here, and the Hugging Face hub {says} ({kind}); "
            f"give the path of a folder, or run `hf download {name}` where there is a "
            "network (it fills the cache in $HF_HOME)"
        ) from error
    if not any(found.glob("*.safetensors")):
        raise WeightsError(f"{name!r} on the hub {PICKLED.format('or nothing at all')}")
    return found


def as_path(path: str | Path) -> Path:
    """A text or a path as a Path, ~ being one's home. Raises WeightsError."""
    if not isinstance(path, str | os.PathLike) or path == "" or "\0" in str(path):
        raise WeightsError(f"{path!r} is no path; give the path of a folder, as text")
    if "://" in str(path):
        raise WeightsError(f"{path} is an address; give a folder, or owner/name")
    return Path(os.path.expanduser(path))


def find_folder(path_or_name: str | Path, check: Callable[[Path], object]) -> Path:
    """The folder of this name; else, for a text like "owner/name", the hub's model.

    check: see find_on_hub. Raises WeightsError.
    """
    folder, name = as_path(path_or_name), str(path_or_name)
    if os.path.isfile(folder):
        raise WeightsError(f"{folder} is a file; give the folder that it lies in")
    is_name = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name)
    if os.path.isdir(folder) or isinstance(path_or_name, os.PathLike) or not is_name:
        return folder
    return find_on_hub(name, check)


class NoDice(TorchFunctionMode):
    """Meanwhile layers are made without rolling the dice for their first numbers.

    On meta the dice have no numbers, but torch reads 800 modules to roll them.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", "") == nn.init.__name__:
            return kwargs["tensor"]
        return function(*args, **(kwargs or {}))


# what torch.compile, DistributedDataParallel and others put into names
WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def unwrapped(name: str) -> str:
    """A tensor's name without the parts that wrappers of a model add to it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


SETTINGS = (bool, int, float, str, tuple, type(None))
# not settings: train or eval, and by which of two equal ways a layer computes
PASSING = {"training", "how"}
# by these our modules compute
METHODS = ("forward", "hidden", "loss", "look", "heads", "unembed")


def facts(module: nn.Module) -> dict[str, object]:
    """The shapes of a module's tensors; classes, methods and settings of its parts."""
    state = module.state_dict().items()  # a quantised one holds more than tensors
    told = {unwrapped(name): tuple(getattr(t, "shape", ())) for name, t in state}
    told["number of tensors"] = len([*module.parameters(), *module.buffers()])
    for name, part in module.named_modules(remove_duplicate=False):
        kind, own, inside = type(part), vars(part), part._modules.keys()
        if kind.__module__.startswith("torch.") and inside and inside <= WRAPPERS:
            continue  # a wrapper: what is in it goes by its name
        name = unwrapped(name)
        known = {"__class__": kind} if name else {}  # the whole may have more methods
        known |= {key: own.get(key, getattr(kind, key, None)) for key in METHODS}
        known |= {k: v for k, v in own.items() if type(v) in SETTINGS and k[0] != "_"}
        for key in sorted(known.keys() - PASSING):
            told.setdefault(f"{name}.{key}".lstrip("."), known[key])
    return told


def check_same(module: nn.Module, twin: nn.Module) -> None:
    """Raise WeightsError unless a module is its twin with plain numbers in it."""
    told, wanted, nothing = facts(module), facts(twin), "not there"
    tensors = {unwrapped(name): t for name, t in module.state_dict().items()}
    for name in [*sorted({*tensors, *twin.state_dict()}), *wanted]:
        fact, right = told.get(name, nothing), wanted.get(name, nothing)
        if fact != right:
            raise WeightsError(
                f"{name} is {fact}; made again from the model's config, it is {right}. "
                "Give the model a config that fits, or save a model made from its "
                "config, and what is your own beside it, with safetensors or torch.save"
            )
    for name, t in tensors.items():
        plain = type(t) is torch.Tensor and t.layout == torch.strided and not t.is_meta
        if not plain or t.dtype not in FLOATS:
            raise WeightsError(
                f"{name} holds {type(t).__name__} of {t.dtype} on {t.device}; "
                f"a file holds plain numbers of type {', '.join(FLOATS.values())}"
            )


def pick_device() -> torch.device:
    """A CUDA card, else Apple's MPS, else the CPU; GPT3LIB_DEVICE names another."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    best = "cuda" if cuda else "mps" if mps else "cpu"
    return torch.device(os.environ.get("GPT3LIB_DEVICE", best) or "cpu")
