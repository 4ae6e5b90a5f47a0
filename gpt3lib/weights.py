"""Other people's models in our class, and ours in theirs: GPT-2, GPT-Neo, OPT and Cerebras-GPT on disk."""

# Made from book/13_real_weights.ipynb by tools/export.py; edit the chapter, not this file.
import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from gpt3lib.model import GPT, ConfigError, GPTConfig, read_model, write_folder

# our name of a tensor, and those of GPT-2 (and Cerebras-GPT), GPT-Neo and OPT; # is the number of a layer
NAMES = """
embeddings.wte         wte              wte                           embed_tokens
embeddings.wpe         wpe              wpe                           embed_positions
blocks.#.ln_1          h.#.ln_1         h.#.ln_1                      layers.#.self_attn_layer_norm
blocks.#.attention.wq  h.#.attn.c_attn  h.#.attn.attention.q_proj     layers.#.self_attn.q_proj
blocks.#.attention.wk  h.#.attn.c_attn  h.#.attn.attention.k_proj     layers.#.self_attn.k_proj
blocks.#.attention.wv  h.#.attn.c_attn  h.#.attn.attention.v_proj     layers.#.self_attn.v_proj
blocks.#.attention.wo  h.#.attn.c_proj  h.#.attn.attention.out_proj   layers.#.self_attn.out_proj
blocks.#.ln_2          h.#.ln_2         h.#.ln_2                      layers.#.final_layer_norm
blocks.#.mlp.up        h.#.mlp.c_fc     h.#.mlp.c_fc                  layers.#.fc1
blocks.#.mlp.down      h.#.mlp.c_proj   h.#.mlp.c_proj                layers.#.fc2
ln_f                   ln_f             ln_f                          final_layer_norm
"""


# our field of a config, and their words for it in config.json
FIELDS = """
vocab_size  vocab_size   vocab_size               vocab_size
n_ctx       n_positions  max_position_embeddings  max_position_embeddings
n_layers    n_layer      num_layers               num_hidden_layers
d_model     n_embd       hidden_size              hidden_size
n_heads     n_head       num_heads                num_attention_heads
d_ff        n_inner      intermediate_size        ffn_dim
"""


@dataclass(frozen=True)
class Layout:
    """How one family of models stands on disk.

    prefixes: what may stand before its names, first what we write; fixed: config fields with one value in it;
    turned: what marks its matrices that are stored as (in, out); masks: endings of stored masks, which are no weights.
    """

    column: int
    architecture: str
    prefixes: tuple[str, ...]
    fixed: dict
    dropouts: tuple[str, ...] = ()
    activation: str = "gelu_new"
    banded: bool = False
    turned: str = "\n"  # in no name
    masks: tuple[str, ...] = ()

    def words(self, table: str) -> dict[str, str]:
        """Ours -> theirs, from one of the two tables."""
        rows = (line.split() for line in table.strip().splitlines())
        return {row[0]: row[self.column] for row in rows}


LAYOUTS = {
    "gpt2": Layout(
        column=1,
        architecture="GPT2LMHeadModel",
        prefixes=("transformer.", ""),
        fixed={"qkv_bias": True, "position_offset": 0},
        dropouts=("embd_pdrop", "attn_pdrop", "resid_pdrop"),
        turned=".c_",
        masks=(".attn.bias", ".attn.masked_bias"),
    ),
    "gpt_neo": Layout(
        column=2,
        architecture="GPTNeoForCausalLM",
        prefixes=("transformer.", ""),
        fixed={"qkv_bias": False, "scaled": False, "position_offset": 0},
        dropouts=("embed_dropout", "attention_dropout", "resid_dropout"),
        banded=True,
        masks=(".attn.attention.bias", ".attn.attention.masked_bias"),
    ),
    "opt": Layout(
        column=3,
        architecture="OPTForCausalLM",
        prefixes=("model.decoder.", "decoder.", ""),
        fixed={"qkv_bias": True, "scaled": True, "position_offset": 2},
        dropouts=("dropout", "attention_dropout", "layerdrop"),
        activation="relu",
    ),
    "gpt3lib": Layout(column=0, architecture="GPT", prefixes=("",), fixed={}, banded=True),  # ours: holds every config
}


def pairs(layout: Layout, config: GPTConfig, ours) -> dict[str, list[str]]:
    """Their names, without prefix, with our names for each: three for c_attn. ours: the names that our model has."""
    found = {}
    for own, theirs in layout.words(NAMES).items():
        for i in range(config.n_layers if "#" in own else 1):
            for part in ("weight", "bias"):
                name, key = (f"{text}.{part}".replace("#", str(i)) for text in (own, theirs))
                if name in ours:
                    found.setdefault(key, []).append(name)
    return found


def turn(layout: Layout, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """(in, out) -> (out, in) or back, if this layout stores this matrix the other way round."""
    return tensor.T if layout.turned in name and tensor.dim() == 2 else tensor


def to_theirs(layout: Layout, config: GPTConfig, ours: dict) -> dict[str, torch.Tensor]:
    """Our tensors under their names, without prefix, as they are stored."""
    return {
        theirs: turn(layout, theirs, torch.cat([ours[name] for name in own]) if own[1:] else ours[own[0]]).contiguous()
        for theirs, own in pairs(layout, config, ours).items()
    }


def to_ours(layout: Layout, config: GPTConfig, wanted, theirs: dict) -> dict[str, torch.Tensor]:
    """Their tensors, without prefix, under the wanted names and in float32; each with memory of its own."""
    found = {}
    for name, own in pairs(layout, config, wanted).items():
        parts = turn(layout, name, theirs[name].float()).chunk(len(own))
        found |= {name: part.clone(memory_format=torch.contiguous_format) for name, part in zip(own, parts)}
    return found


# theirs -> ours; we write the first one that means ours
BENDS = dict(gelu_new="gelu_tanh", gelu="gelu", relu="relu", gelu_fast="gelu_tanh", gelu_pytorch_tanh="gelu_tanh")


# a word of some config.json -> (the only value that our GPT can be, why); what is absent has that value
MUSTS = {
    "tie_word_embeddings": (True, "our way out is the token table"),
    "layer_norm_epsilon": (1e-5, "our LayerNorm adds 1e-5"),
    "scale_attn_by_inverse_layer_idx": (False, "our scores do not depend on the layer's number"),
    "add_cross_attention": (False, "our layers look at one text"),
    "do_layer_norm_before": (True, "our layers normalise before they compute, not after"),
    "_remove_final_layer_norm": (False, "our last layer is followed by a LayerNorm"),
    "enable_bias": (True, "our matrices have biases"),
    "layer_norm_elementwise_affine": (True, "our LayerNorms have gains and biases"),
}


def our_kinds(raw: dict, n_layers: int) -> tuple[str, ...]:
    """GPT-Neo's kinds of layers in our words, as the shortest tuple that repeats. Raises ValueError."""
    types = raw.get("attention_types")
    layers = [kind for kinds, times in types for kind in kinds * times] if types else raw.get("attention_layers")
    if not layers or len(layers) != n_layers or set(layers) - {"global", "local"}:
        raise ValueError(f"attention_types gives {layers}; it must give 'global' or 'local' to {n_layers} layers")
    n = next(n for n in range(1, n_layers + 1) if all(layers[i] == layers[i % n] for i in range(n_layers)))
    return tuple("dense" if kind == "global" else "banded" for kind in layers[:n])


def config_from(layout: Layout, raw: dict) -> GPTConfig:
    """Their config.json as our config. Raises ValueError for what our GPT does not compute."""
    for name, (right, why) in MUSTS.items():
        if raw.get(name, right) != right:
            raise ValueError(f"{name} is {raw[name]!r}; it must be {right}: {why}")
    words = layout.words(FIELDS)
    hidden, shape = words.pop("d_ff"), {}
    for ours, name in words.items():
        shape[ours] = raw.get(name)
        if type(shape[ours]) is not int or shape[ours] < 1:
            raise ValueError(f"{name} is {shape[ours]!r}; it must be a whole number of at least 1")
    for name, times in ((hidden, 4), ("word_embed_proj_dim", 1)):
        right = times * shape["d_model"]
        if raw.get(name) not in (None, right):
            raise ValueError(f"{name} is {raw[name]!r}; it must be {right}, {times} times the width")
    bend = raw.get("activation_function", layout.activation)
    if bend not in BENDS:
        raise ValueError(f"activation_function is {bend!r}; there are {', '.join(BENDS)}")
    others = {"attention": ("dense",), "scaled": raw.get("scale_attn_weights", True), "activation": BENDS[bend]}
    if layout.banded:
        others |= {"attention": our_kinds(raw, shape["n_layers"]), "bandwidth": raw.get("window_size", 256)}
    return GPTConfig(**shape, d_head=shape["d_model"] // shape["n_heads"], **(others | layout.fixed))


class WeightsError(ConfigError):
    """A model that is damaged, incomplete, out of reach, or of a kind that GPT cannot be; the message says which."""


def scan(path: Path) -> tuple[dict, dict]:
    """What a safetensors file says before a number is read: name -> (file, shape, type), and its metadata."""
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            found = {name: (path, tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
            return found, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} is damaged ({error}); copy or save it again") from error


INDEX, HEAD = "model.safetensors.index.json", "lm_head.weight"  # HEAD: the token table a second time, in some files


def scan_shards(index: Path) -> tuple[dict, dict]:
    """The same for a model in several files, whose index says which tensor lies where."""
    try:
        raw = json.loads(index.read_text())
        places, about = dict(raw["weight_map"]), dict(raw.get("metadata") or {})
        files = {Path(file).name: {} for file in places.values()}
    except (ValueError, TypeError, KeyError) as error:
        raise WeightsError(f"{index} is damaged ({error!r}); copy or save the model again") from error
    for file in files:
        if not (index.parent / file).is_file():
            raise WeightsError(f"{index.parent} has no {file}, which its index names; copy or download that file too")
        files[file] = scan(index.parent / file)[0]
    for name, file in places.items():
        if name not in files.get(file, {}):
            raise WeightsError(f"{index} says that {name} lies in {file}, but it does not; copy or save them again")
    return {name: files[file][name] for name, file in places.items()}, about


def check_tensors(folder: Path, wanted: dict, found: dict, masks: tuple[str, ...]) -> None:
    """Raise WeightsError, in the file's own names, unless exactly the wanted shapes are there, as plain floats."""
    for name in sorted(wanted | found):
        if name not in wanted and (name == HEAD or name.endswith(masks)):
            continue
        _, shape, dtype = found.get(name, (None, "missing", "F32"))
        if shape != wanted.get(name):
            expected = wanted.get(name, "no such tensor")
            raise WeightsError(f"{folder}: {name} is {shape}, expected {expected}; its config is another model's")
        if dtype not in ("F64", "F32", "F16", "BF16"):
            raise WeightsError(f"{folder}: {name} holds {dtype}; it must be F64, F32, F16 or BF16, not quantised")


def find_config(folder: Path, about: dict) -> tuple[str, GPTConfig | None]:
    """The kind of layout and the config, from the tensors' metadata, else from config.json; None: it has none."""
    source = folder / "config.json"
    try:
        if "config" in about:  # written by us, in one go with the tensors; config.json came a moment later
            source = f"{folder}: the config among the tensors"
            kind, config = about.get("layout", "gpt3lib"), GPTConfig(**json.loads(about["config"]))
        else:
            raw = json.loads(source.read_text()) if source.is_file() else {}
            kind = raw.get("model_type", "gpt3lib") if isinstance(raw, dict) else "gpt3lib"
            config = config_from(LAYOUTS[kind], raw) if kind in LAYOUTS and kind != "gpt3lib" else None
        if kind not in LAYOUTS:
            raise ValueError(f"the model_type is {kind!r}; we can read {', '.join(LAYOUTS)}")
        return kind, config
    except (ValueError, TypeError) as error:
        raise WeightsError(f"{source}: {error}") from error


PICKLED = (
    "has no safetensors but pickles ({}), which can run any code when opened; if you trust it, load it once "
    "with transformers and save it with save_pretrained, which writes safetensors"
)


def find_folder(path_or_name: str | Path) -> Path:
    """The folder of this name; else, for a text like "gpt2" or "owner/name", the hub's, downloaded or in its cache."""
    folder, name = Path(path_or_name), str(path_or_name)
    if folder.is_file():
        raise WeightsError(f"{folder} is a file; give the folder that it lies in")
    if folder.is_dir() or isinstance(path_or_name, Path) or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        return folder
    try:
        from huggingface_hub import snapshot_download  # only here: whoever reads folders needs no hub

        few = snapshot_download(name, allow_patterns=["config.json"], etag_timeout=10)
        find_config(Path(few), {})  # may refuse, before gigabytes come
        found = Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"], etag_timeout=10))
    except WeightsError:
        raise
    except Exception as error:  # the hub's client raises a dozen kinds, and others in each version
        kind, unknown = type(error).__name__, ("RepositoryNotFoundError", "GatedRepoError")
        says = "has no such model, or not for everybody" if kind in unknown else "could not be reached"
        raise WeightsError(
            f"{name!r} is no folder here, and the Hugging Face hub {says} ({kind}); give the path of a folder, "
            f"or run `hf download {name}` where there is a network (it fills the cache in $HF_HOME)"
        ) from error
    if not any(found.glob("*.safetensors")):
        raise WeightsError(f"{name!r} on the hub {PICKLED.format('or nothing at all')}")
    return found


def read_any(path_or_name: str | Path) -> tuple[GPTConfig, dict[str, torch.Tensor]]:
    """The config and the float32 tensors of a folder, or of a model on the Hugging Face hub; what GPT.read is."""
    folder = find_folder(path_or_name)
    single, index = folder / "model.safetensors", folder / INDEX
    if not single.is_file() and not index.is_file():
        files = [path.name for path in sorted(folder.glob("*")) if path.suffix in (".bin", ".pt", ".pth", ".ckpt")]
        if files:
            raise WeightsError(f"{folder} {PICKLED.format(', '.join(files[:3]))}")
        return read_model(folder)  # which says what is missing
    found, about = scan(single) if single.is_file() else scan_shards(index)
    kind, config = find_config(folder, about)
    if kind == "gpt3lib" and single.is_file():
        return read_model(folder)
    if config is None:
        raise WeightsError(f"{folder} has no config.json with a model_type; add the one that belongs to its tensors")
    layout = LAYOUTS[kind]
    with torch.device("meta"):
        state = GPT(config).state_dict()
    bare = {name: tuple(tensor.shape) for name, tensor in to_theirs(layout, config, state).items()}
    first, second, *_ = bare  # the two tables
    prefix = next((prefix for prefix in layout.prefixes if prefix + second in found), layout.prefixes[0])
    if HEAD in found:  # of two names for one table, some programs keep only this one
        found.setdefault(prefix + first, found[HEAD])
    check_tensors(folder, {prefix + name: shape for name, shape in bare.items()}, found, layout.masks)
    theirs = {}
    for path in {path for path, _, _ in found.values()}:
        theirs |= {name: tensor for name, tensor in load_file(path).items() if found.get(name, "-")[0] == path}
    if HEAD in theirs and not torch.equal(theirs[HEAD], theirs.setdefault(prefix + first, theirs[HEAD])):
        raise WeightsError(f"{folder}: {HEAD} differs from {prefix + first}; our way out is the token table itself")
    return config, to_ours(layout, config, state, {name: theirs[prefix + name] for name in bare})


def layout_for(config: GPTConfig) -> str:
    """The first layout that can say exactly what the config says. A band as long as the context is dense."""
    dense = "banded" not in config.kinds or config.bandwidth >= config.n_ctx
    fits = lambda layout: all(getattr(config, name) == value for name, value in layout.fixed.items())
    return next(name for name, layout in LAYOUTS.items() if (dense or layout.banded) and fits(layout))


def config_for(kind: str, config: GPTConfig, dtype: torch.dtype) -> dict:
    """Our config as a config.json of this layout. Ids: a text ends with the last token, as in GPT-2; in OPT with 2."""
    if kind == "gpt3lib":
        return asdict(config)
    layout, end = LAYOUTS[kind], 2 if kind == "opt" and config.vocab_size > 2 else config.vocab_size - 1
    raw = {"architectures": [layout.architecture], "model_type": kind, "dtype": str(dtype).removeprefix("torch.")}
    raw |= {theirs: getattr(config, ours) for ours, theirs in layout.words(FIELDS).items()}
    raw["activation_function"] = next(theirs for theirs, ours in BENDS.items() if ours == config.activation)
    if layout.banded:
        kinds = ["global" if kind == "dense" else "local" for kind in config.kinds]
        raw |= {"attention_types": [[kinds, 1]], "window_size": config.bandwidth}
    if "scaled" not in layout.fixed:
        raw["scale_attn_weights"] = config.scaled
    raw |= {"bos_token_id": end, "eos_token_id": end, "pad_token_id": None, "tie_word_embeddings": True}
    return raw | dict.fromkeys(layout.dropouts, 0.0)


def shards(tensors: dict, shard_bytes: int) -> list[dict]:
    """The tensors in groups of at most shard_bytes; a larger tensor has a group of its own. Raises WeightsError."""
    if type(shard_bytes) is not int or shard_bytes < 1:
        raise WeightsError(f"shard_bytes is {shard_bytes!r}; it must be a whole number of at least 1")
    groups, room = [], 0
    for name, tensor in tensors.items():
        if not groups or tensor.nbytes > room:
            groups, room = [*groups, {}], shard_bytes
        groups[-1][name] = tensor
        room -= tensor.nbytes
    return groups


def write_shards(folder: Path, tensors: dict, about: dict, config_text: str, shard_bytes: int) -> dict[str, str]:
    """Write shards named by their hashes, then the index that makes them the model; returns tensor -> file."""
    groups, places, part = shards(tensors, shard_bytes), {}, folder / "model.part"

    def write(name: str, data: bytes) -> None:
        part.write_bytes(data)
        os.replace(part, folder / name)

    folder.mkdir(parents=True, exist_ok=True)
    for i, group in enumerate(groups, start=1):
        data = save({name: tensor.cpu() for name, tensor in group.items()}, {"format": "pt"})
        file = f"model-{i:05}-of-{len(groups):05}-{hashlib.sha256(data).hexdigest()[:16]}.safetensors"
        write(file, data)
        places |= dict.fromkeys(group, file)
    about = about | {"total_size": sum(tensor.nbytes for tensor in tensors.values())}
    write(INDEX, json.dumps({"metadata": about, "weight_map": places}, indent=1).encode())
    if (folder / "model.safetensors").exists():
        os.unlink(folder / "model.safetensors")  # it would be read first; from here on the shards are the model
    write("config.json", config_text.encode())
    return places


def write_any(folder: Path, config: GPTConfig, tensors: dict, shard_bytes: int | None = None) -> None:
    """Write a model in the first layout that can hold it; what GPT.write is. Always leaves a model that loads.

    shard_bytes: if given, split the tensors into files of at most that size, except for larger tensors.
    """
    kind = layout_for(config)  # the metadata tell it and our config, so that reading gives back the very same
    layout, about = LAYOUTS[kind], {"format": "pt", "layout": kind, "config": json.dumps(asdict(config))}
    named = {layout.prefixes[0] + name: tensor for name, tensor in to_theirs(layout, config, tensors).items()}
    text = json.dumps(config_for(kind, config, next(iter(named.values())).dtype), indent=1) + "\n"
    places = {}
    if shard_bytes is not None:
        places = write_shards(folder, named, about, text, shard_bytes)
    else:
        write_folder(folder, named, about, text)
        (folder / INDEX).unlink(missing_ok=True)
    for path in {*folder.glob("model-*-of-*.safetensors")} - {folder / name for name in places.values()}:
        os.unlink(path)


def save_sharded(model: GPT, path: str | Path, shard_bytes: int = 5_000_000_000) -> None:
    """Like model.save_pretrained(path), in files of at most shard_bytes and an index, as large models are kept."""
    write_any(Path(path), model.config, model.state_dict(), shard_bytes)


GPT.read, GPT.write = staticmethod(read_any), staticmethod(write_any)  # from_pretrained and save_pretrained use them
