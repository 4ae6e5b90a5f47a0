"""A decoder layer, a stack of them, the eight sizes of GPT-3, and where the 175 billion numbers live."""

# Made from book/05_decoder.ipynb by tools/export.py; edit the chapter, not this file.
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
from gpt3lib.tokenization import TokenError


class ConfigError(ValueError):
    """A model configuration that contradicts itself, a name that no model has, or a folder that holds no model."""


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a model, in the paper's symbols. Raises ConfigError when it contradicts itself.

    vocab_size: number of token ids; n_ctx: tracks, the longest text it can see;
    n_layers: depth; d_model: width of a track; n_heads heads of width d_head.
    """

    vocab_size: int
    n_ctx: int
    n_layers: int
    d_model: int
    n_heads: int
    d_head: int

    def __post_init__(self):
        for name, value in asdict(self).items():
            if type(value) is not int or value < 1:  # isinstance would let True pass as 1
                raise ConfigError(f"{name} is {value!r}; it must be a whole number of at least 1")
        if self.n_heads * self.d_head != self.d_model:
            raise ConfigError(
                f"n_heads · d_head = {self.n_heads} · {self.d_head} = {self.n_heads * self.d_head} "
                f"is not d_model = {self.d_model}; the heads must share out the width exactly"
            )

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
    """Each track thinks for itself: d_model -> d_ff -> d_model with GPT-2's tanh form of GELU."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.up = nn.Linear(config.d_model, config.d_ff)
        self.down = nn.Linear(config.d_ff, config.d_model)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, d_model) -> (B, T, d_model)."""
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Block(nn.Module):
    """One decoder layer: attention, then MLP, each normalised before and added to the stream ([R19] §2.3)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.d_model)
        self.attention = CausalSelfAttention(config.d_model, config.n_heads, config.d_head)
        self.ln_2 = nn.LayerNorm(config.d_model)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, cache=None) -> torch.Tensor:
        """(B, T, d_model) -> (B, T, d_model)."""
        x = x + self.attention(self.ln_1(x), cache)
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


class GPT(nn.Module):
    """A GPT-3: embeddings, n_layers blocks, a last LayerNorm, and the token table again as the way out."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config.vocab_size, config.n_ctx, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.ln_f = nn.LayerNorm(config.d_model)
        initialise(self.blocks)

    def hidden(self, tokens: torch.Tensor, cache=None) -> torch.Tensor:
        """(B, T) ids -> (B, T, d_model): what leaves the last LayerNorm.

        cache: one cache per layer with a common `length`, or None.
        """
        if tokens.dim() != 2 or tokens.numel() == 0:
            shape = tuple(tokens.shape)
            raise TokenError(f"tokens must be (B, T) with at least one id, not {shape}; for one text use tokens[None]")
        x = self.embeddings(tokens, start=0 if cache is None else cache.length)
        for i, block in enumerate(self.blocks):
            x = block(x, None if cache is None else cache.layers[i])
        return self.ln_f(x)

    def forward(self, tokens: torch.Tensor, cache=None) -> torch.Tensor:
        """(B, T) int64 ids -> logits (B, T, vocab_size). Raises TokenError, ContextError."""
        return self.embeddings.unembed(self.hidden(tokens, cache))

    def loss(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Mean next-token cross-entropy in nats; tokens and targets are (B, T). Raises TokenError, ContextError."""
        if tokens.shape != targets.shape:
            raise TokenError(f"tokens {tuple(tokens.shape)} and targets {tuple(targets.shape)} must have one shape")
        check_tokens(targets, self.config.vocab_size)
        return F.cross_entropy(self(tokens).flatten(0, 1), targets.flatten())

    def num_params(self) -> int:
        """The exact number of parameters; the token table is counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def save_pretrained(self, path: str | Path) -> None:
        """Write model.safetensors and config.json into a folder; a kill at any moment leaves a model that loads."""
        write_model(Path(path), self.config, self.state_dict())

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "GPT":
        """Read a model that save_pretrained wrote, in float32. Raises ConfigError when the folder holds none."""
        config, tensors = read_model(Path(path))
        with torch.device("meta"):
            model = cls(config)
        check_shapes(path, model, tensors)
        model.load_state_dict(tensors, assign=True)
        return model.eval()


def write_model(folder: Path, config: GPTConfig, tensors: dict[str, torch.Tensor]) -> None:
    """Write model.safetensors, with the config in its header, and config.json, each beside its place and renamed."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(asdict(config), indent=1) + "\n"
    weights_part, config_part = folder / "model.safetensors.part", folder / "config.json.part"
    config_part.write_text(text)
    save_file(tensors, weights_part, metadata={"config": text})
    os.chmod(weights_part, config_part.stat().st_mode)  # safetensors lets only the owner read; do as for other files
    os.replace(weights_part, folder / "model.safetensors")
    os.replace(config_part, folder / "config.json")


def read_model(folder: Path) -> tuple[GPTConfig, dict[str, torch.Tensor]]:
    """The config and the float32 tensors of a saved model. Raises ConfigError, naming the file and what to do.

    The config is the one in the header of model.safetensors, which was renamed together with
    the tensors; a file without one, made by another program, needs config.json.
    """
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
