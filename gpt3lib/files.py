"""Files that a kill cannot spoil: written beside, then renamed; hashes; folders of
tensors."""

# Made from book/d_files.ipynb by tools/export.py; edit the chapter.
import hashlib
import json
import numbers
import os
import re
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save, save_file


def write_beside(path: str | Path, data: bytes) -> None:
    """Write beside, then rename: a reader sees all of the old or all of the new."""
    part = Path(f"{path}.part")
    part.write_bytes(data)
    os.replace(part, path)


def sha256(source: bytes | Path) -> str:
    """The SHA-256 of bytes, or of a file, in hexadecimal."""
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    with open(source, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class WeightsError(ValueError):
    """A model that is damaged, incomplete, out of reach, or none that GPT can be.

    The message names the file and says what to do.
    """


def remove_shards(folder: Path, keep) -> None:
    """Remove an older model's shards from a folder, all but those in `keep`."""
    for path in folder.glob("model-*-of-*.safetensors"):
        if path.name not in keep:
            os.unlink(path)


MODEL, INDEX = "model.safetensors", "model.safetensors.index.json"


def write_folder(
    folder: Path, tensors: dict, header: dict[str, str], config: str
) -> None:
    """Write model.safetensors and config.json; a kill leaves a model that loads."""
    folder.mkdir(parents=True, exist_ok=True)
    weights_part, config_part = folder / f"{MODEL}.part", folder / "config.json.part"
    config_part.write_text(config)
    save_file(tensors, weights_part, metadata=header)
    # safetensors lets only the owner read; do as for other files
    os.chmod(weights_part, config_part.stat().st_mode)
    os.replace(weights_part, folder / MODEL)
    os.replace(config_part, folder / "config.json")
    (folder / INDEX).unlink(missing_ok=True)
    remove_shards(folder, keep=())


def shards(tensors: dict, shard_bytes: int) -> list[dict]:
    """The tensors in groups of at most shard_bytes; a larger one is a group of its own.

    Raises WeightsError for a size below 1.
    """
    if type(shard_bytes) is not int or shard_bytes < 1:
        raise WeightsError(
            f"shard_bytes is {shard_bytes!r}; it must be at least 1, a whole number"
        )
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

    Raises WeightsError for shard_bytes below 1, before anything is written.
    """
    groups, places = shards(tensors, shard_bytes), {}
    folder.mkdir(parents=True, exist_ok=True)
    for i, group in enumerate(groups, start=1):
        data = save({name: t.cpu() for name, t in group.items()}, {"format": "pt"})
        file = f"model-{i:05}-of-{len(groups):05}-{sha256(data)[:16]}.safetensors"
        write_beside(folder / file, data)
        places |= dict.fromkeys(group, file)
    about = header | {"total_size": sum(tensor.nbytes for tensor in tensors.values())}
    index = json.dumps({"metadata": about, "weight_map": places}, indent=1)
    write_beside(folder / INDEX, index.encode())
    (folder / MODEL).unlink(missing_ok=True)  # it would be read first
    write_beside(folder / "config.json", config.encode())
    remove_shards(folder, keep=set(places.values()))


def scan(path: Path) -> tuple[dict, dict]:
    """What a safetensors file says before a number is read.

    Returns name -> (file, shape, type), and the file's metadata. Raises WeightsError.
    """
    try:
        with safe_open(path, "pt") as file:
            names = file.keys()
            slices = {name: file.get_slice(name) for name in names}
            found = {
                name: (path, tuple(part.get_shape()), part.get_dtype())
                for name, part in slices.items()
            }
            return found, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"{path} is damaged ({error}); copy or save it again"
        ) from error


def scan_shards(index: Path) -> tuple[dict, dict]:
    """The same for a model in several files, whose index says what lies where."""
    try:
        raw = json.loads(index.read_text())
        places, about = dict(raw["weight_map"]), dict(raw.get("metadata") or {})
        files = {Path(file).name: {} for file in places.values()}
    except (ValueError, TypeError, KeyError) as error:
        raise WeightsError(
            f"{index} is damaged ({error!r}); copy or save the model again"
        ) from error
    for file in files:
        if not (index.parent / file).is_file():
            raise WeightsError(
                f"{index.parent} has no {file}, which its index names; "
                "copy or download that file too"
            )
        files[file] = scan(index.parent / file)[0]
    for name, file in places.items():
        if name not in files.get(file, {}):
            raise WeightsError(
                f"{index} says that {name} lies in {file}, but it does not; "
                "copy or save them again"
            )
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
    if (folder / MODEL).is_file():
        return scan(folder / MODEL)
    if (folder / INDEX).is_file():
        return scan_shards(folder / INDEX)
    kinds = (".bin", ".pt", ".pth", ".ckpt")
    pickles = [path.name for path in sorted(folder.glob("*")) if path.suffix in kinds]
    if pickles:
        raise WeightsError(f"{folder} {PICKLED.format(', '.join(pickles[:3]))}")
    raise WeightsError(f"{folder} has no {MODEL}; save_pretrained writes one")


def read_tensors(found: dict) -> dict[str, torch.Tensor]:
    """The tensors that a scan found, by name."""
    tensors = {}
    for path in {path for path, _, _ in found.values()}:
        here = load_file(path)
        tensors |= {
            name: here[name] for name, place in found.items() if place[0] == path
        }
    return tensors


def find_on_hub(name: str, check: Callable[[Path], object]) -> Path:
    """The folder of a hub's model, downloaded or from its cache. Raises WeightsError.

    check(folder) may refuse it when only config.json is there, before gigabytes come.
    """
    try:
        from huggingface_hub import snapshot_download  # reading folders needs no hub

        check(
            Path(
                snapshot_download(name, allow_patterns=["config.json"], etag_timeout=10)
            )
        )
        wanted = ["*.json", "*.safetensors"]
        found = Path(snapshot_download(name, allow_patterns=wanted, etag_timeout=10))
    except WeightsError:
        raise
    except (
        Exception
    ) as error:  # its client raises a dozen kinds, others in each version
        kind, unknown = (
            type(error).__name__,
            ("RepositoryNotFoundError", "GatedRepoError"),
        )
        no = "has no such model, or not for everybody"
        says = no if kind in unknown else "could not be reached"
        raise WeightsError(
            f"{name!r} is no folder here, and the Hugging Face hub {says} ({kind}); "
            f"give the path of a folder, or run `hf download {name}` where there is a "
            "network (it fills the cache in $HF_HOME)"
        ) from error
    if not any(found.glob("*.safetensors")):
        raise WeightsError(f"{name!r} on the hub {PICKLED.format('or nothing at all')}")
    return found


def find_folder(path_or_name: str | Path, check: Callable[[Path], object]) -> Path:
    """The folder of this name; else, for a text like "owner/name", the hub's model.

    check: see find_on_hub. Raises WeightsError.
    """
    folder, name = Path(path_or_name), str(path_or_name)
    if folder.is_file():
        raise WeightsError(f"{folder} is a file; give the folder that it lies in")
    is_name = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name)
    if folder.is_dir() or isinstance(path_or_name, Path) or not is_name:
        return folder
    return find_on_hub(name, check)


def is_whole(value, least: int = 1) -> bool:
    """Whether a value is a whole number, Python's or numpy's, of at least `least`."""
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    return whole and value >= least


def pick_device() -> torch.device:
    """A CUDA card, else Apple's MPS, else the CPU; GPT3LIB_DEVICE names another."""
    name = os.environ.get("GPT3LIB_DEVICE")
    if name is None and torch.cuda.is_available():
        name = "cuda"
    elif name is None and torch.backends.mps.is_available():
        name = "mps"
    return torch.device(name or "cpu")
