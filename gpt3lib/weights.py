"""Other people's models in our class, and ours in theirs: GPT-2, GPT-Neo, OPT and Cerebras-GPT on disk."""

# Made from book/24_real_weights.ipynb by tools/export.py; edit the chapter, not this file.
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import nn

from gpt3lib.files import (
    WeightsError,
    find_folder,
    read_tensors,
    scan_folder,
    write_folder,
    write_shards,
)
from gpt3lib.model import FORMATS, GPT, ConfigError, GPTConfig, initialise

ACTIVATIONS = {
    "gelu_tanh": nn.GELU(approximate="tanh"),
    "gelu": nn.GELU(),
    "relu": nn.ReLU(),
}


@dataclass(frozen=True)
class OtherConfig(GPTConfig):
    """A config with what other people's models have and GPT-3 has not.

    qkv_bias, scaled: both False in GPT-Neo, whose scores are not divided by √d_head;
    activation: "relu" in OPT, "gelu" (the exact one) in Cerebras-GPT;
    position_offset: rows of wpe before the first track's, 2 in OPT. Raises ConfigError.
    """

    qkv_bias: bool = True
    scaled: bool = True
    activation: str = "gelu_tanh"
    position_offset: int = 0

    def __post_init__(self):
        super().__post_init__()
        if self.activation not in list(
            ACTIVATIONS
        ):  # a dict would stumble over what has no hash
            raise ConfigError(
                f"activation is {self.activation!r}; there are {', '.join(ACTIVATIONS)}"
            )
        for name in ("qkv_bias", "scaled"):
            if type(getattr(self, name)) is not bool:
                raise ConfigError(
                    f"{name} is {getattr(self, name)!r}; it must be True or False"
                )
        offset = self.position_offset
        if type(offset) is not int or offset < 0:
            raise ConfigError(
                f"position_offset is {offset!r}; it must be a whole number of at least 0"
            )


class ShiftedTable(nn.Embedding):
    """A table whose first `offset` rows belong to no track: track t has row offset + t."""

    def __init__(self, n_rows: int, width: int, offset: int):
        super().__init__(offset + n_rows, width)
        self.offset = offset

    def forward(self, tracks: torch.Tensor) -> torch.Tensor:
        """(..., T) tracks -> (..., T, width)."""
        return super().forward(tracks + self.offset)


class OtherGPT(GPT):
    """A GPT with other people's differences, as an OtherConfig lists them."""

    def __init__(self, config: OtherConfig, seed: int = 0):
        super().__init__(config, seed)
        if config.position_offset:
            shape = (config.n_ctx, config.d_model, config.position_offset)
            self.embeddings.wpe = ShiftedTable(*shape)
        for block in self.blocks:
            block.mlp.activation = ACTIVATIONS[config.activation]
            if not config.scaled:
                block.attention.scale = 1.0
            if not config.qkv_bias:
                for linear in (
                    block.attention.wq,
                    block.attention.wk,
                    block.attention.wv,
                ):
                    linear.bias = None
        initialise(self, config.n_layers, seed)


def make_model(config: GPTConfig, seed: int = 0) -> GPT:
    """The class that a config needs: GPT, or OtherGPT."""
    return (
        OtherGPT(config, seed) if isinstance(config, OtherConfig) else GPT(config, seed)
    )


def make_config(given: dict) -> GPTConfig:
    """The config with these fields, an OtherConfig only where one differs from GPT-3's.

    Raises ConfigError, and TypeError for a field that no config has.
    """
    usual = {field.name: field.default for field in fields(OtherConfig)}
    ours = {field.name for field in fields(GPTConfig)}
    given = {
        name: value
        for name, value in given.items()
        if name in ours or name not in usual or value != usual[name]
    }
    if isinstance(given.get("attention"), list):  # JSON has no tuples
        given["attention"] = tuple(given["attention"])
    return GPTConfig(**given) if set(given) <= ours else OtherConfig(**given)


def all_fields(config: GPTConfig) -> dict:
    """The fields of any config, those of OtherConfig included."""
    usual = {field.name: field.default for field in fields(OtherConfig)}
    return usual | asdict(config)


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
    "gpt3lib": Layout(
        column=0, architecture="GPT", prefixes=("",), fixed={}, banded=True
    ),  # ours: holds every config
}


def pairs(layout: Layout, config: GPTConfig, ours) -> dict[str, list[str]]:
    """Their names, without prefix, with our names for each: three for c_attn. ours: the names that our model has."""
    found = {}
    for own, theirs in layout.words(NAMES).items():
        for i in range(config.n_layers if "#" in own else 1):
            for part in ("weight", "bias"):
                name, key = (
                    f"{text}.{part}".replace("#", str(i)) for text in (own, theirs)
                )
                if name in ours:
                    found.setdefault(key, []).append(name)
    return found


def turn(layout: Layout, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """(in, out) -> (out, in) or back, if this layout stores this matrix the other way round."""
    return tensor.T if layout.turned in name and tensor.dim() == 2 else tensor


def to_theirs(layout: Layout, config: GPTConfig, ours: dict) -> dict[str, torch.Tensor]:
    """Our tensors under their names, without prefix, as they are stored."""
    return {
        theirs: turn(
            layout, theirs, torch.cat([ours[name] for name in own])
        ).contiguous()
        for theirs, own in pairs(layout, config, ours).items()
    }


def to_ours(
    layout: Layout, config: GPTConfig, wanted, theirs: dict
) -> dict[str, torch.Tensor]:
    """Their tensors, without prefix, under the wanted names and in float32; each with memory of its own."""
    found = {}
    for name, own in pairs(layout, config, wanted).items():
        parts = turn(layout, name, theirs[name].float()).chunk(len(own))
        found |= {
            name: part.clone(memory_format=torch.contiguous_format)
            for name, part in zip(own, parts)
        }
    return found


# theirs -> ours; we write the first one that means ours
BENDS = dict(
    gelu_new="gelu_tanh",
    gelu="gelu",
    relu="relu",
    gelu_fast="gelu_tanh",
    gelu_pytorch_tanh="gelu_tanh",
)


# a word of some config.json -> (the only value that our GPT can be, why); what is absent has that value
MUSTS = {
    "tie_word_embeddings": (True, "our way out is the token table"),
    "layer_norm_epsilon": (1e-5, "our LayerNorm adds 1e-5"),
    "scale_attn_by_inverse_layer_idx": (
        False,
        "our scores do not depend on the layer's number",
    ),
    "add_cross_attention": (False, "our layers look at one text"),
    "do_layer_norm_before": (
        True,
        "our layers normalise before they compute, not after",
    ),
    "_remove_final_layer_norm": (False, "our last layer is followed by a LayerNorm"),
    "enable_bias": (True, "our matrices have biases"),
    "layer_norm_elementwise_affine": (True, "our LayerNorms have gains and biases"),
}


def our_kinds(raw: dict, n_layers: int) -> tuple[str, ...]:
    """GPT-Neo's kinds of layers in our words, as the shortest tuple that repeats. Raises ValueError."""
    types = raw.get("attention_types")
    layers = (
        [kind for kinds, times in types for kind in kinds * times]
        if types
        else raw.get("attention_layers")
    )
    if not layers or len(layers) != n_layers or set(layers) - {"global", "local"}:
        raise ValueError(
            f"attention_types gives {layers}; it must give 'global' or 'local' to {n_layers} layers"
        )
    n = next(
        n
        for n in range(1, n_layers + 1)
        if all(layers[i] == layers[i % n] for i in range(n_layers))
    )
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
            raise ValueError(
                f"{name} is {shape[ours]!r}; it must be a whole number of at least 1"
            )
    for name, times in ((hidden, 4), ("word_embed_proj_dim", 1)):
        right = times * shape["d_model"]
        if raw.get(name) not in (None, right):
            raise ValueError(
                f"{name} is {raw[name]!r}; it must be {right}, {times} times the width"
            )
    bend = raw.get("activation_function", layout.activation)
    if bend not in BENDS:
        raise ValueError(
            f"activation_function is {bend!r}; there are {', '.join(BENDS)}"
        )
    others = {
        "attention": ("dense",),
        "scaled": raw.get("scale_attn_weights", True),
        "activation": BENDS[bend],
    }
    if layout.banded:
        others |= {
            "attention": our_kinds(raw, shape["n_layers"]),
            "bandwidth": raw.get("window_size", 256),
        }
    return make_config(
        shape | {"d_head": shape["d_model"] // shape["n_heads"]} | others | layout.fixed
    )


HEAD = "lm_head.weight"  # the token table a second time, in some files


def check_tensors(
    folder: Path, wanted: dict, found: dict, masks: tuple[str, ...]
) -> None:
    """Raise WeightsError, in the file's own names, unless exactly the wanted shapes are there, as plain floats."""
    for name in sorted(wanted | found):
        if name not in wanted and (name == HEAD or name.endswith(masks)):
            continue
        _, shape, dtype = found.get(name, (None, "missing", "F32"))
        if shape != wanted.get(name):
            expected = wanted.get(name, "no such tensor")
            raise WeightsError(
                f"{folder}: {name} is {shape}, expected {expected}; its config is another model's"
            )
        if dtype not in ("F64", "F32", "F16", "BF16"):
            raise WeightsError(
                f"{folder}: {name} holds {dtype}; it must be F64, F32, F16 or BF16, not quantised"
            )


def find_config(folder: Path, about: dict) -> tuple[str, GPTConfig]:
    """The kind of layout and the config, from the tensors' metadata, else from config.json.

    Raises WeightsError.
    """
    source = folder / "config.json"
    try:
        if "config" in about:  # written by us, in one go with the tensors
            source = f"{folder}: the config among the tensors"
            kind, raw = about.get("layout", "gpt3lib"), json.loads(about["config"])
            return known(kind), make_config(raw)
        if not source.is_file():
            raise WeightsError(
                f"{folder} has no config.json, and its tensors carry no config; "
                "add the config.json that belongs to them"
            )
        raw = json.loads(source.read_text())
        if not isinstance(raw, dict):
            raise ValueError(f"it holds {type(raw).__name__}, not names with values")
        kind = known(raw.get("model_type", "gpt3lib"))
        return kind, make_config(raw) if kind == "gpt3lib" else config_from(
            LAYOUTS[kind], raw
        )
    except WeightsError:
        raise
    except (ValueError, TypeError) as error:
        raise WeightsError(f"{source}: {error}") from error


def known(kind: str) -> str:
    """The kind, if there is a layout of that name. Raises ValueError."""
    if kind not in LAYOUTS:
        raise ValueError(
            f"the model_type is {kind!r}; we can read {', '.join(LAYOUTS)}"
        )
    return kind


def read_pretrained(path_or_name: str | Path) -> GPT:
    """The model in a folder, or on the Hugging Face hub, in float32; what GPT.from_pretrained does.

    Raises WeightsError.
    """
    folder = find_folder(path_or_name, check=lambda folder: find_config(folder, {}))
    found, about = scan_folder(folder)
    kind, config = find_config(folder, about)
    layout = LAYOUTS[kind]
    with torch.device("meta"):
        model = make_model(config)
    state = model.state_dict()
    bare = {
        name: tuple(t.shape) for name, t in to_theirs(layout, config, state).items()
    }
    first, second, *_ = bare  # the two tables
    prefixes = (prefix for prefix in layout.prefixes if prefix + second in found)
    prefix = next(prefixes, layout.prefixes[0])
    if HEAD in found:  # of two names for one table, some programs keep only this one
        found.setdefault(prefix + first, found[HEAD])
    wanted = {prefix + name: shape for name, shape in bare.items()}
    check_tensors(folder, wanted, found, layout.masks)
    theirs = read_tensors(
        {name: place for name, place in found.items() if name in wanted or name == HEAD}
    )
    if HEAD in theirs and not torch.equal(theirs[HEAD], theirs[prefix + first]):
        raise WeightsError(
            f"{folder}: {HEAD} differs from {prefix + first}; our way out is the token table itself"
        )
    ours = to_ours(
        layout, config, state, {name: theirs[prefix + name] for name in bare}
    )
    model.load_state_dict(ours, assign=True)
    return model.eval()


def layout_for(config: GPTConfig) -> str:
    """The first layout that can say exactly what the config says. A band as long as the context is dense."""
    dense = "banded" not in config.kinds or config.bandwidth >= config.n_ctx
    fits = lambda layout: all(
        all_fields(config)[name] == value for name, value in layout.fixed.items()
    )
    return next(
        name
        for name, layout in LAYOUTS.items()
        if (dense or layout.banded) and fits(layout)
    )


def config_for(kind: str, config: GPTConfig, dtype: torch.dtype) -> dict:
    """Our config as a config.json of this layout. Ids: a text ends with the last token, as in GPT-2; in OPT with 2."""
    if kind == "gpt3lib":
        return asdict(config)
    layout, end = (
        LAYOUTS[kind],
        2 if kind == "opt" and config.vocab_size > 2 else config.vocab_size - 1,
    )
    raw = {
        "architectures": [layout.architecture],
        "model_type": kind,
        "dtype": str(dtype).removeprefix("torch."),
    }
    raw |= {
        theirs: {**all_fields(config), "d_ff": config.d_ff}[ours]
        for ours, theirs in layout.words(FIELDS).items()
    }
    raw["activation_function"] = next(
        theirs
        for theirs, ours in BENDS.items()
        if ours == all_fields(config)["activation"]
    )
    if layout.banded:
        kinds = ["global" if kind == "dense" else "local" for kind in config.kinds]
        raw |= {"attention_types": [[kinds, 1]], "window_size": config.bandwidth}
    if "scaled" not in layout.fixed:
        raw["scale_attn_weights"] = all_fields(config)["scaled"]
    raw |= {
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": None,
        "tie_word_embeddings": True,
    }
    return raw | dict.fromkeys(layout.dropouts, 0.0)


def write_pretrained(
    model: GPT, path: str | Path, shard_bytes: int | None = None
) -> None:
    """Write a model in the first layout that can hold it; what model.save_pretrained does.

    shard_bytes: if given, split the tensors into files of at most that size, larger tensors
    aside. A kill at any moment leaves a model that loads. Raises WeightsError.
    """
    folder, config = Path(path), model.config
    kind = layout_for(config)
    layout = LAYOUTS[kind]
    # the metadata tell our config, so that reading gives back the very same
    about = {"format": "pt", "layout": kind, "config": json.dumps(asdict(config))}
    theirs = to_theirs(layout, config, model.state_dict())
    named = {layout.prefixes[0] + name: tensor for name, tensor in theirs.items()}
    dtype = next(iter(named.values())).dtype
    text = json.dumps(config_for(kind, config, dtype), indent=1) + "\n"
    if shard_bytes is None:
        write_folder(folder, named, about, text)
    else:
        write_shards(folder, named, about, text, shard_bytes)


FORMATS.update(read=read_pretrained, write=write_pretrained)
