"""Other people's models in our class, and ours in theirs: GPT-2, GPT-Neo, OPT and
Cerebras-GPT."""

# Made from book/24_real_weights.ipynb by tools/export.py; edit the chapter.
import functools
import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from gpt3lib.files import (
    NoDice,
    Stored,
    WeightsError,
    as_path,
    check_dtype,
    check_same,
    check_tensors,
    copied,
    find_folder,
    parse,
    scan_folder,
    unwrapped,
    write_folder,
    write_shards,
)
from gpt3lib.model import FORMATS, GPT, ConfigError, GPTConfig, initialise


# What is refused; the workshop at the end of this page has a table of it.
def check_other(config: "OtherConfig") -> None:
    """Raise ConfigError, saying what would be right, unless a model can be so."""
    choice = ", ".join(ACTIVATIONS)
    words = f"activation is {config.activation!r}; there are {choice}"
    ConfigError.unless(config.activation in list(ACTIVATIONS), words)
    for name in ("qkv_bias", "scaled"):
        value = getattr(config, name)
        words = f"{name} is {value!r}; it must be True or False"
        ConfigError.unless(type(value) is bool, words)
    ConfigError.unless_whole("position_offset", config.position_offset, least=0)


# an activation function's names -> ours; we write the first one that means ours
BENDS = {"gelu_new": "gelu_tanh", "gelu": "gelu", "relu": "relu"}
BENDS.update(gelu_fast="gelu_tanh", gelu_pytorch_tanh="gelu_tanh")

# a word of some config.json -> (the only value that our GPT can be, why)
MUSTS = {
    "tie_word_embeddings": (True, "our way out is the token table"),
    "layer_norm_epsilon": (1e-5, "our LayerNorm adds 1e-5"),
    "scale_attn_by_inverse_layer_idx": (False, "no score depends on its layer here"),
    "add_cross_attention": (False, "our layers look at one text"),
    "do_layer_norm_before": (True, "our layers normalise before they compute"),
    "_remove_final_layer_norm": (False, "a LayerNorm follows our last layer"),
    "enable_bias": (True, "our matrices have biases"),
    "layer_norm_elementwise_affine": (True, "our LayerNorms have gains and biases"),
}


def check_raw(layout: "FileForm", raw: dict) -> None:
    """Raise ConfigError if a config.json tells of a model that our GPT cannot be."""
    for name, (right, why) in MUSTS.items():
        if raw.get(name, right) != right:
            raise ConfigError(f"{name} is {raw[name]!r}; it must be {right}: {why}")
    fields = layout.words(FIELDS)
    hidden = fields.pop("d_ff")
    for name in fields.values():
        ConfigError.unless_whole(name, raw.get(name))
    for name, times in ((hidden, 4), ("word_embed_proj_dim", 1)):
        value, right = raw.get(name), times * raw[fields["d_model"]]
        words = f"{name} is {value!r}; it must be {right}, {times} × width"
        ConfigError.unless(value in (None, right), words)
    bend = raw.get("activation_function", layout.activation)
    words = f"activation_function is {bend!r}; there are {', '.join(BENDS)}"
    ConfigError.unless(bend in list(BENDS), words)


HEAD = "lm_head.weight"  # the token table a second time, in some files
# old files of GPT-2 and GPT-Neo store their masks, which are no weights
MASKS = (".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias")


def known(kind: str) -> str:
    """The kind, if there is a layout of that name. Raises ConfigError."""
    words = f"the model_type is {kind!r}; we can read {', '.join(LAYOUTS)}"
    ConfigError.unless(kind in list(LAYOUTS), words)
    return kind


NAMES = """
embeddings.wte  wte            wte                        embed_tokens
embeddings.wpe  wpe            wpe                        embed_positions
#.ln_1          #.ln_1         #.ln_1                     #.self_attn_layer_norm
#.attention.wq  #.attn.c_attn  #.attn.attention.q_proj    #.self_attn.q_proj
#.attention.wk  #.attn.c_attn  #.attn.attention.k_proj    #.self_attn.k_proj
#.attention.wv  #.attn.c_attn  #.attn.attention.v_proj    #.self_attn.v_proj
#.attention.wo  #.attn.c_proj  #.attn.attention.out_proj  #.self_attn.out_proj
#.ln_2          #.ln_2         #.ln_2                     #.final_layer_norm
#.mlp.up        #.mlp.c_fc     #.mlp.c_fc                 #.fc1
#.mlp.down      #.mlp.c_proj   #.mlp.c_proj               #.fc2
ln_f            ln_f           ln_f                       final_layer_norm
"""


@dataclass(frozen=True)
class FileForm:
    """How one family of models stands on disk; LAYOUTS has it under its model_type.

    column: of NAMES and FIELDS; layers: what # begins with; prefixes: what may stand
    before a name, first what we write; turned: endings of names whose matrices are
    stored as (in, out); fixed: fields of our config with one value in this family.
    """

    architecture: str
    column: int
    fixed: dict
    layers: str = "h"
    prefixes: tuple[str, ...] = ("",)
    turned: tuple[str, ...] = ()
    dropouts: tuple[str, ...] = ()
    activation: str = "gelu_new"
    banded: bool = False

    def words(self, table: str) -> dict[str, str]:
        """Ours -> theirs, from NAMES or FIELDS."""
        rows = [line.split() for line in table.strip().splitlines()]
        return {row[0]: row[self.column] for row in rows}


LAYOUTS = {}
LAYOUTS["gpt2"] = FileForm(
    "GPT2LMHeadModel",
    column=1,
    prefixes=("transformer.", ""),
    turned=("c_attn.weight", "c_proj.weight", "c_fc.weight"),
    fixed={"qkv_bias": True, "position_offset": 0},
    dropouts=("embd_pdrop", "attn_pdrop", "resid_pdrop"),
)


def pairs(layout: FileForm, n_layers: int, names) -> dict[str, list[str]]:
    """Their names, without prefix, each with ours for it: three for c_attn.

    names: those that our model has, since GPT-Neo has no biases of q, k and v.
    """
    found = {}
    for own, other in layout.words(NAMES).items():
        for i in range(n_layers if own.startswith("#") else 1):
            for part in ("weight", "bias"):
                name = f"{own}.{part}".replace("#", f"blocks.{i}")
                key = f"{other}.{part}".replace("#", f"{layout.layers}.{i}")
                if name in names:
                    found.setdefault(key, []).append(name)
    return found


def turn(layout: FileForm, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """(in, out) -> (out, in) or back, if this layout stores this matrix turned."""
    return tensor.T if name.endswith(layout.turned) else tensor


def to_theirs(layout: FileForm, n_layers: int, ours: dict) -> dict[str, torch.Tensor]:
    """Our tensors under their names, without prefix, as they are stored."""
    theirs = {}
    for name, own in pairs(layout, n_layers, ours).items():
        parts = [ours[part] for part in own]
        whole = torch.cat(parts) if len(parts) > 1 else parts[0]
        theirs[name] = turn(layout, name, whole)
    return theirs


def to_ours(layout: FileForm, n_layers: int, names, theirs, dtype=None) -> dict:
    """Their tensors, without prefix, under our names; dtype None keeps their type."""
    ours = {}
    for name, own in pairs(layout, n_layers, names).items():
        parts = turn(layout, name, theirs[name]).chunk(len(own))
        ours |= {part: copied(tensor, dtype) for part, tensor in zip(own, parts)}
    return ours


LAYOUTS["gpt_neo"] = FileForm(
    "GPTNeoForCausalLM",
    column=2,
    prefixes=("transformer.", ""),
    fixed={"qkv_bias": False, "scaled": False, "position_offset": 0},
    dropouts=("embed_dropout", "attention_dropout", "resid_dropout"),
    banded=True,
)


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
        check_other(self)


ACTIVATIONS = {"gelu_tanh": nn.GELU("tanh"), "gelu": nn.GELU(), "relu": nn.ReLU()}


class OtherGPT(GPT):
    """A GPT with other people's differences, as an OtherConfig lists them."""

    def __init__(self, config: OtherConfig, seed: int = 0):
        super().__init__(config, seed)
        if config.position_offset:
            shape = (config.n_ctx, config.d_model, config.position_offset)
            self.embeddings.wpe = ShiftedTable(*shape)
        for block in self.blocks:
            block.mlp.activation = ACTIVATIONS[config.activation]
            attention = block.attention
            if not config.scaled:
                attention.scale = 1.0
            if not config.qkv_bias:
                for linear in (attention.wq, attention.wk, attention.wv):
                    linear.bias = None
        initialise(self, config.n_layers, seed)


LAYOUTS["opt"] = FileForm(
    "OPTForCausalLM",
    column=3,
    layers="layers",
    prefixes=("model.decoder.", "decoder.", ""),
    fixed={"qkv_bias": True, "scaled": True, "position_offset": 2},
    dropouts=("dropout", "attention_dropout", "layerdrop"),
    activation="relu",
)


class ShiftedTable(nn.Embedding):
    """A table whose first rows belong to no track: track t has row offset + t."""

    def __init__(self, n_rows: int, width: int, offset: int):
        super().__init__(offset + n_rows, width)
        self.offset = offset

    def forward(self, tracks: torch.Tensor) -> torch.Tensor:
        """(..., T) tracks -> (..., T, width)."""
        return super().forward(tracks + self.offset)


FIELDS = """
vocab_size  vocab_size   vocab_size               vocab_size
n_ctx       n_positions  max_position_embeddings  max_position_embeddings
n_layers    n_layer      num_layers               num_hidden_layers
d_model     n_embd       hidden_size              hidden_size
n_heads     n_head       num_heads                num_attention_heads
d_ff        n_inner      intermediate_size        ffn_dim
"""


def our_kinds(raw: dict, n_layers: int) -> tuple[str, ...]:
    """GPT-Neo's kinds as the shortest tuple that repeats. Raises ValueError."""
    layers, types = raw.get("attention_layers"), raw.get("attention_types")
    with suppress(TypeError, ValueError):
        if types:
            # no model is 1009 layers deep
            layers = [k for kinds, times in types for k in kinds * min(times, 1009)]
        if len(layers) == n_layers and not set(layers) - {"global", "local"}:
            lengths = range(1, n_layers + 1)
            n = next(n for n in lengths if layers == (layers[:n] * n_layers)[:n_layers])
            return tuple("dense" if k == "global" else "banded" for k in layers[:n])
    words = f"it must give 'global' or 'local' to {n_layers} layers"
    raise ValueError(f"attention_types is {types}; {words}, as [[['global'], 2]] does")


# the fields that OtherConfig adds, with GPT-3's values
EXTRA = {name: getattr(OtherConfig, name) for name in OtherConfig.__annotations__}


def make_config(given: dict) -> GPTConfig:
    """The config with these fields, an OtherConfig only where one differs from GPT-3's.

    Raises ConfigError, and TypeError for a field too many or too few.
    """
    usual = [name for name in EXTRA if given.get(name) == EXTRA[name]]
    given = {name: value for name, value in given.items() if name not in usual}
    if isinstance(given.get("attention"), list):  # JSON has no tuples
        given["attention"] = tuple(given["attention"])
    return OtherConfig(**given) if given.keys() & EXTRA else GPTConfig(**given)


def config_from(layout: FileForm, raw: dict) -> GPTConfig:
    """Their config.json as our config. Raises ValueError for what our GPT is not."""
    check_raw(layout, raw)
    words = layout.words(FIELDS)
    given = {ours: raw[word] for ours, word in words.items() if ours != "d_ff"}
    given["d_head"] = given["d_model"] // given["n_heads"]
    given["scaled"] = raw.get("scale_attn_weights", True)
    given["activation"] = BENDS[raw.get("activation_function", layout.activation)]
    given["attention"] = ("dense",)
    if layout.banded:
        given["attention"] = our_kinds(raw, given["n_layers"])
        given["bandwidth"] = raw.get("window_size", 256)
    return make_config(given | layout.fixed)


LAYOUTS["gpt3lib"] = FileForm("GPT", column=0, layers="blocks", fixed={}, banded=True)


def find_config(folder: Path, about: dict) -> tuple[str, GPTConfig, dict]:
    """FileForm, config and extras, from the tensors' metadata, else from config.json.

    Raises WeightsError.
    """
    path = source = folder / "config.json"
    try:
        if "config" in about:  # written by us, in one go with the tensors
            source = f"{folder}: the config among the tensors"
            kind = known(about.get("layout", "gpt3lib"))
            config = make_config(parse(about["config"]))
            more = parse(about.get("extras", "{}"))
            with suppress(ValueError, OSError, RecursionError):
                more |= extras(LAYOUTS[kind], parse(path.read_text("utf-8-sig")))
            return kind, config, more
        raw = parse(path.read_text("utf-8-sig"))  # some editors begin with a mark
        if "model_type" not in raw and "d_model" not in raw:
            raise ValueError("it has no model_type; add gpt2, gpt_neo or opt to it")
        kind = known(raw.get("model_type", "gpt3lib"))
        if kind == "gpt3lib":
            return kind, make_config(raw), {}
        return kind, config_from(LAYOUTS[kind], raw), extras(LAYOUTS[kind], raw)
    except FileNotFoundError:
        words = f"{folder} has no config.json, and its tensors carry no config"
        right = "add the config.json that belongs to them"
        raise WeightsError(f"{words}; {right}") from None
    except (ValueError, TypeError, OSError, RecursionError) as error:
        raise WeightsError(f"{source}: {error}") from error


def extras(layout: FileForm, raw: dict) -> dict:
    """What stays of a config.json though our config has no word for it: ids, dropout.

    read_pretrained hangs it on the model as `extras`, for write_pretrained.
    """
    kept = [word for word in raw if word.endswith("_token_id")]
    return {word: raw[word] for word in [*kept, *layout.dropouts] if word in raw}


def find_tensors(folder: Path, layout: FileForm, found: dict, wanted: dict) -> Stored:
    """The wanted tensors of a folder, without prefix, to be read. Raises WeightsError.

    found: what scan_folder finds; wanted: name -> the right shape.
    """
    bare = {unwrapped(name): name for name in found}
    if len(bare) < len(found):  # two names for one tensor: one of them is too much
        bare = {name: name for name in found}
    table, positions, *_ = wanted
    prefixes = [prefix for prefix in layout.prefixes if prefix + positions in bare]
    prefix, *_ = *prefixes, layout.prefixes[0]
    names = {name: prefix + name for name in wanted}
    if HEAD in bare and names[table] not in bare:
        names[table] = HEAD  # of two names for one table some programs keep this one
    shapes = {names[name]: shape for name, shape in wanted.items()}
    kept = [n for n in bare if n in shapes or n != HEAD and not n.endswith(MASKS)]
    check_tensors(folder, shapes, {name: found[bare[name]] for name in kept})
    stored = Stored(found, bare)
    same = HEAD not in bare or torch.equal(stored[HEAD], stored[names[table]])
    words = f"{folder}: {HEAD} differs from {names[table]}"
    WeightsError.unless(same, f"{words}; our way out is the token table itself")
    return Stored(found, {name: bare[names[name]] for name in wanted})


def make_model(config: GPTConfig, seed: int = 0) -> GPT:
    """The class that a config needs: GPT, or OtherGPT."""
    kind = OtherGPT if isinstance(config, OtherConfig) else GPT
    return kind(config, seed)


def read_pretrained(path_or_name: str | Path, dtype=torch.float32) -> GPT:
    """The model in a folder or on the Hugging Face hub; what GPT.from_pretrained does.

    dtype: the numbers' type in memory; None keeps the file's. Raises WeightsError.
    """
    check_dtype(dtype)
    folder = find_folder(path_or_name, check=lambda folder: find_config(folder, {}))
    found, about = scan_folder(folder)
    kind, config, more = find_config(folder, about)
    try:
        if config.n_layers > len(found):
            raise OverflowError("a layer has tensors")
        with torch.device("meta"), NoDice():
            model = make_model(config)
    except (RuntimeError, TypeError, OverflowError) as error:
        raise WeightsError(f"{folder}: too few numbers for {config}") from error
    layout, state, n = LAYOUTS[kind], model.state_dict(), config.n_layers
    stored = to_theirs(layout, n, state)  # on meta: shapes without numbers
    wanted = {name: tuple(tensor.shape) for name, tensor in stored.items()}
    theirs = find_tensors(folder, layout, found, wanted)
    model.load_state_dict(to_ours(layout, n, state, theirs, dtype), assign=True)
    model.extras = more
    return model.eval()


def layout_for(config: GPTConfig) -> str:
    """The first layout that can say what the config says; a band of n_ctx is dense."""
    dense = "banded" not in config.kinds or config.bandwidth >= config.n_ctx
    ours = (EXTRA | asdict(config)).items()
    fitting = [kind for kind in LAYOUTS if LAYOUTS[kind].fixed.items() <= ours]
    return next(kind for kind in fitting if dense or LAYOUTS[kind].banded)


def config_for(kind: str, config: GPTConfig, dtype: torch.dtype, more) -> dict:
    """Our config as a config.json of this layout; more: extras of the model.

    None: a text ends with the last token, be it padding, as in GPT-2; in OPT with 2.
    """
    if kind == "gpt3lib":
        return asdict(config)
    layout, ours = LAYOUTS[kind], EXTRA | asdict(config) | {"d_ff": config.d_ff}
    bends = [theirs for theirs, own in BENDS.items() if own == ours["activation"]]
    end = 2 if kind == "opt" and config.vocab_size > 2 else config.vocab_size - 1
    raw = {
        "architectures": [layout.architecture],
        "model_type": kind,
        "dtype": str(dtype).removeprefix("torch."),
        "activation_function": bends[0],
        "tie_word_embeddings": True,
    }
    if more is None:
        raw |= {"bos_token_id": end, "eos_token_id": end, "pad_token_id": None}
    raw |= {word: ours[name] for name, word in layout.words(FIELDS).items()}
    raw |= dict.fromkeys(layout.dropouts, 0.0)
    if layout.banded:
        kinds = ["global" if kind == "dense" else "local" for kind in config.kinds]
        raw |= {"attention_types": [[kinds, 1]], "window_size": config.bandwidth}
    if "scaled" not in layout.fixed:
        raw["scale_attn_weights"] = ours["scaled"]
    return raw | (more or {})


def write_pretrained(model: GPT, path: str | Path, shard_bytes: int | None = None):
    """Write a model in the first layout that can hold it; what save_pretrained does.

    shard_bytes: if given, split the tensors into files of at most that size, larger
    tensors aside. A kill at any moment leaves a model that loads. Raises WeightsError,
    before anything is written, if tensors, classes or settings are not the config's.
    """
    folder, config = as_path(path), getattr(model, "config", None)
    if not isinstance(config, GPTConfig):
        raise WeightsError(f"a {type(model).__name__} is no GPT; save the GPT in it")
    with torch.device("meta"), NoDice():
        twin = make_model(config)
    check_same(model, twin)
    state = {unwrapped(name): t for name, t in model.state_dict().items()}
    kind, more = layout_for(config), getattr(model, "extras", None)
    try:
        more = more if more is None else parse(json.dumps(more))
    except (TypeError, ValueError) as error:
        raise WeightsError(f"extras {more!r} are no words for JSON: {error}") from error
    theirs = to_theirs(LAYOUTS[kind], config.n_layers, state)
    named = {LAYOUTS[kind].prefixes[0] + name: t for name, t in theirs.items()}
    # the metadata tell our config, so that reading gives back the very same
    about = {"format": "pt", "layout": kind, "config": json.dumps(asdict(config))}
    about |= {"extras": json.dumps(more)} if more else {}
    dtype = functools.reduce(torch.promote_types, [t.dtype for t in state.values()])
    text = json.dumps(config_for(kind, config, dtype, more), indent=1) + "\n"
    if shard_bytes is None:
        write_folder(folder, named, about, text)
    else:
        write_shards(folder, named, about, text, shard_bytes)


FORMATS.update(read=read_pretrained, write=write_pretrained)
