"""A decoder layer, a stack of them, the eight sizes of GPT-3, and where the 175 billion numbers live."""

# Made from book/05_decoder.ipynb by tools/export.py; edit the chapter, not this file.
import functools
import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from gpt3lib.attention import CausalSelfAttention
from gpt3lib.embeddings import Embeddings, check_tokens
from gpt3lib.sparse_attention import BandedSelfAttention
from gpt3lib.tokenization import TokenError


class ConfigError(ValueError):
    """A model configuration that contradicts itself, a name that no model has, or a folder that holds no model."""


ACTIVATIONS = {"gelu_tanh": functools.partial(F.gelu, approximate="tanh"), "gelu": F.gelu, "relu": F.relu}


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a model, in the paper's symbols. Raises ConfigError when it contradicts itself.

    vocab_size: number of token ids; n_ctx: tracks, the longest text it can see;
    n_layers: depth; d_model: width of a track; n_heads heads of width d_head.
    attention: the kinds of the layers, "dense" or "banded", from the first layer up and then over again;
    bandwidth: keys that a query of a banded layer sees, itself included.
    The last four are GPT-3's unless said otherwise. With them GPT-Neo (no qkv_bias, scores not scaled),
    OPT (activation "relu", position_offset 2) and Cerebras-GPT (activation "gelu", the exact one) are configs too.
    """

    vocab_size: int
    n_ctx: int
    n_layers: int
    d_model: int
    n_heads: int
    d_head: int
    attention: tuple[str, ...] = ("dense", "banded")
    bandwidth: int = 256
    qkv_bias: bool = True
    scaled: bool = True
    activation: str = "gelu_tanh"
    position_offset: int = 0

    def __post_init__(self):
        for name in ("vocab_size", "n_ctx", "n_layers", "d_model", "n_heads", "d_head", "bandwidth", "position_offset"):
            value, least = getattr(self, name), 0 if name == "position_offset" else 1
            if type(value) is not int or value < least:  # isinstance would let True pass as 1
                raise ConfigError(f"{name} is {value!r}; it must be a whole number of at least {least}")
        if self.n_heads * self.d_head != self.d_model:
            raise ConfigError(
                f"n_heads · d_head = {self.n_heads} · {self.d_head} = {self.n_heads * self.d_head} "
                f"is not d_model = {self.d_model}; the heads must share out the width exactly"
            )
        if isinstance(self.attention, list):  # JSON has no tuples
            object.__setattr__(self, "attention", tuple(self.attention))
        kinds = self.attention
        if type(kinds) is not tuple or not kinds or any(kind not in ("dense", "banded") for kind in kinds):
            raise ConfigError(f"attention is {kinds!r}; it must be a tuple of 'dense' and 'banded', one at least")
        if self.activation not in list(ACTIVATIONS):  # a dict would stumble over what has no hash
            raise ConfigError(f"activation is {self.activation!r}; there are {', '.join(ACTIVATIONS)}")
        for name in ("qkv_bias", "scaled"):
            if type(getattr(self, name)) is not bool:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it must be True or False")

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of each layer, from the first up."""
        return tuple(self.attention[i % len(self.attention)] for i in range(self.n_layers))

    @property
    def d_ff(self) -> int:
        """Width of the hidden layer of the MLP, four times d_model in every size ([B20] §2.1)."""
        return 4 * self.d_model

    @classmethod
    def from_name(cls, name: str, vocab_size: int | None = None, n_ctx: int | None = None) -> "GPTConfig":
        """One of the paper's eight sizes (gpt3-125m … gpt3-175b) or of our five (gpt3-100k … gpt3-10m).

        The paper's have a vocabulary of 50,257 and a context of 2,048, ours 4,353 and 256,
        unless said otherwise. Raises ConfigError for any other name.
        """
        sizes = TABLE_2_1 | ERRATA | EXTRA_SMALL
        if name not in sizes:
            raise ConfigError(f"no model is called {name!r}; there are {', '.join(sizes)}")
        usual_vocab, usual_ctx = (4353, 256) if name in EXTRA_SMALL else (50257, 2048)
        vocab_size = usual_vocab if vocab_size is None else vocab_size
        return cls(vocab_size, usual_ctx if n_ctx is None else n_ctx, *sizes[name])


class MLP(nn.Module):
    """Each track thinks for itself: d_model -> d_ff -> d_model with GPT-2's tanh form of GELU, or another bend."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.up = nn.Linear(config.d_model, config.d_ff)
        self.down = nn.Linear(config.d_ff, config.d_model)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, d_model) -> (B, T, d_model)."""
        return self.down(self.activation(self.up(x)))


class Block(nn.Module):
    """One decoder layer: attention, then MLP, each normalised before and added to the stream ([R19] §2.3).

    kind: "dense", or "banded" for a layer that sees the last config.bandwidth tracks only.
    """

    def __init__(self, config: GPTConfig, kind: str = "dense"):
        super().__init__()
        shape = (config.d_model, config.n_heads, config.d_head)
        options = {"qkv_bias": config.qkv_bias, "scaled": config.scaled}
        self.ln_1 = nn.LayerNorm(config.d_model)
        if kind == "banded":
            self.attention = BandedSelfAttention(*shape, config.bandwidth, **options)
        else:
            self.attention = CausalSelfAttention(*shape, **options)
        self.ln_2 = nn.LayerNorm(config.d_model)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, cache=None, pad=None) -> torch.Tensor:
        """(B, T, d_model) -> (B, T, d_model)."""
        x = x + self.attention(self.ln_1(x), cache, pad)
        return x + self.mlp(self.ln_2(x))


def initialise(blocks: nn.ModuleList) -> None:
    """Fill the layers of a model in place: matrices N(0, 0.02²), biases 0, gains 1.

    The two matrices of a layer that write to the stream get 0.02 / √(2 · n_layers), see [R19] §2.3.
    """
    for name, parameter in blocks.named_parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.02)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
        else:
            nn.init.ones_(parameter)
    for block in blocks:
        for linear in (block.attention.wo, block.mlp.down):
            nn.init.normal_(linear.weight, std=0.02 / math.sqrt(2 * len(blocks)))


def loss_slowly(h: torch.Tensor, wte: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The loss in two lines: all logits at once, (B, T, vocab_size), then their cross-entropy with (B, T) targets."""
    logits = F.linear(h, wte)
    return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten())


def chunked_loss(h: torch.Tensor, wte: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The same as loss_slowly, with the logits of 256 tracks at a time and never more."""
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=256)
    return F.linear_cross_entropy(h.flatten(0, -2), wte, targets.flatten(), options=options)


class GPT(nn.Module):
    """A GPT-3: embeddings, n_layers blocks, a last LayerNorm, and the token table again as the way out."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config.vocab_size, config.n_ctx, config.d_model, config.position_offset)
        self.blocks = nn.ModuleList(Block(config, kind) for kind in config.kinds)
        self.ln_f = nn.LayerNorm(config.d_model)
        initialise(self.blocks)

    def hidden(self, tokens: torch.Tensor, cache=None, pad: torch.Tensor | None = None) -> torch.Tensor:
        """(B, T) ids -> (B, T, d_model): what leaves the last LayerNorm.

        cache: one cache per layer with a common `length`, or None;
        pad: (B,) empty tracks before each text, or None when the texts have one length.
        """
        if tokens.dim() != 2 or tokens.numel() == 0:
            shape = tuple(tokens.shape)
            raise TokenError(f"tokens must be (B, T) with at least one id, not {shape}; for one text use tokens[None]")
        x = self.embeddings(tokens, 0 if cache is None else cache.length, pad)
        for i, block in enumerate(self.blocks):
            x = block(x, None if cache is None else cache.layers[i], pad)
        return self.ln_f(x)

    def forward(self, tokens: torch.Tensor, cache=None, pad: torch.Tensor | None = None) -> torch.Tensor:
        """(B, T) int64 ids -> logits (B, T, vocab_size). Raises TokenError, ContextError."""
        return self.embeddings.unembed(self.hidden(tokens, cache, pad))

    def loss(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Mean next-token cross-entropy in nats; tokens and targets are (B, T). Raises TokenError, ContextError."""
        if tokens.shape != targets.shape:
            raise TokenError(f"tokens {tuple(tokens.shape)} and targets {tuple(targets.shape)} must have one shape")
        check_tokens(targets, self.config.vocab_size)
        return chunked_loss(self.hidden(tokens), self.embeddings.wte.weight, targets)

    def num_params(self) -> int:
        """The exact number of parameters; the token table is counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def save_pretrained(self, path: str | Path) -> None:
        """Write model.safetensors and config.json into a folder; a kill at any moment leaves a model that loads.

        Once gpt3lib.weights is imported (gpt3lib does that): in Hugging Face's format for GPT-2, GPT-Neo or OPT
        where the model is one of these.
        """
        self.write(Path(path), self.config, self.state_dict())

    @classmethod
    def from_pretrained(cls, path_or_name: str | Path) -> "GPT":
        """Read a model in float32, ready to use. Raises ConfigError when there is none, or one of another kind.

        path_or_name: a folder that save_pretrained wrote or, once gpt3lib.weights is imported (gpt3lib does that),
        a Hugging Face folder or the name of one on their hub.
        """
        config, tensors = cls.read(path_or_name)
        with torch.device("meta"):
            model = cls(config)
        check_shapes(path_or_name, model, tensors)
        model.load_state_dict(tensors, assign=True)
        return model.eval()


def write_folder(folder: Path, tensors: dict[str, torch.Tensor], header: dict[str, str], config_text: str) -> None:
    """Write model.safetensors, with a header, and config.json, each beside its place and renamed."""
    folder.mkdir(parents=True, exist_ok=True)
    weights_part, config_part = folder / "model.safetensors.part", folder / "config.json.part"
    config_part.write_text(config_text)
    save_file(tensors, weights_part, metadata=header)
    os.chmod(weights_part, config_part.stat().st_mode)  # safetensors lets only the owner read; do as for other files
    os.replace(weights_part, folder / "model.safetensors")
    os.replace(config_part, folder / "config.json")


def write_model(folder: Path, config: GPTConfig, tensors: dict[str, torch.Tensor]) -> None:
    """Write a model in the book's own format: our names, and the config also in the header of the tensors."""
    text = json.dumps(asdict(config), indent=1) + "\n"
    write_folder(folder, tensors, {"config": text}, text)


def read_model(path: str | Path) -> tuple[GPTConfig, dict[str, torch.Tensor]]:
    """The config and the float32 tensors of a saved model. Raises ConfigError, naming the file and what to do.

    The config is the one in the header of model.safetensors, which was renamed together with
    the tensors; a file without one, made by another program, needs config.json.
    """
    folder = Path(path)
    path, source = folder / "model.safetensors", folder / "config.json"
    if not path.is_file():
        raise ConfigError(f"{folder} has no model.safetensors; save_pretrained writes one")
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
        tensors = {name: tensor.float() for name, tensor in load_file(path).items()}
    except SafetensorError as error:
        raise ConfigError(f"{path} is damaged ({error}); copy or save it again") from error
    if "config" in header:
        source = path
    elif not source.is_file():
        raise ConfigError(f"{folder} has no config.json, and {path.name} has no config in its header; add config.json")
    try:
        config = GPTConfig(**json.loads(header.get("config") or source.read_text()))
    except (ValueError, TypeError) as error:
        wanted = ", ".join(GPTConfig.__dataclass_fields__)
        raise ConfigError(f"{source} holds no config ({error}); it must give {wanted}") from error
    return config, tensors


def check_shapes(path: str | Path, model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Raise ConfigError unless the tensors have the names and shapes of the model's."""
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(wanted | found):
        if wanted.get(name) != found.get(name):
            raise ConfigError(
                f"{path}: the tensors do not fit the config: {name} is {found.get(name, 'missing')}, "
                f"expected {wanted.get(name, 'no such tensor')}; save the model again with its own config"
            )


GPT.write, GPT.read = staticmethod(write_model), staticmethod(read_model)  # gpt3lib.weights puts wider ones here


# name: (n_layers, d_model, n_heads, d_head) as printed in [B20] Table 2.1
TABLE_2_1 = {
    "gpt3-125m": (12, 768, 12, 64),
    "gpt3-350m": (24, 1024, 16, 64),
    "gpt3-760m": (24, 1536, 16, 96),
    "gpt3-1.3b": (24, 2048, 24, 128),
    "gpt3-2.7b": (32, 2560, 32, 80),
    "gpt3-6.7b": (32, 4096, 32, 128),
    "gpt3-13b": (40, 5140, 40, 128),
    "gpt3-175b": (96, 12288, 96, 128),
}


# two rows contradict themselves (heads times head width is not the width); Table D.1 settles both
ERRATA = {"gpt3-1.3b": (24, 2048, 16, 128), "gpt3-13b": (40, 5120, 40, 128)}


# our own extra-small models, named by the parameters of their layers, as [B20] Fig. 3.1 counts
EXTRA_SMALL = {
    "gpt3-100k": (2, 64, 4, 16),
    "gpt3-300k": (4, 80, 5, 16),
    "gpt3-1m": (5, 128, 4, 32),
    "gpt3-3m": (6, 192, 6, 32),
    "gpt3-10m": (8, 320, 10, 32),
}
