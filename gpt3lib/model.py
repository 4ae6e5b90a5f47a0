"""The decoder: a block, a stack of them, the eight sizes of GPT-3, and where the 175 billion numbers live."""

import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from gpt3lib.attention import CausalSelfAttention
from gpt3lib.embeddings import Embeddings


class ConfigError(ValueError):
    """A model configuration that contradicts itself, or a name that no model has."""


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
            if not isinstance(value, int) or value < 1:
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
        small = name in EXTRA_SMALL
        vocab_size = vocab_size or (4353 if small else 50257)
        return cls(vocab_size, n_ctx or (256 if small else 2048), *sizes[name])


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


class GPT(nn.Module):
    """A GPT-3: embeddings, n_layers blocks, a last LayerNorm, and the token table again as the way out."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config.vocab_size, config.n_ctx, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.ln_f = nn.LayerNorm(config.d_model)
        self.blocks.apply(self.init_linear)
        for block in self.blocks:  # the two that write to the stream: [R19] §2.3
            for linear in (block.attention.wo, block.mlp.down):
                nn.init.normal_(linear.weight, std=0.02 / math.sqrt(2 * config.n_layers))

    @staticmethod
    def init_linear(module: nn.Module) -> None:
        """Weights N(0, 0.02²) and biases 0, as in GPT-2's released code."""
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)

    def hidden(self, tokens: torch.Tensor, cache=None) -> torch.Tensor:
        """(B, T) ids -> (B, T, d_model): what leaves the last LayerNorm.

        cache: one cache per layer with a common `length`, or None.
        """
        x = self.embeddings(tokens, start=0 if cache is None else cache.length)
        for i, block in enumerate(self.blocks):
            x = block(x, None if cache is None else cache.layers[i])
        return self.ln_f(x)

    def forward(self, tokens: torch.Tensor, cache=None) -> torch.Tensor:
        """(B, T) int64 ids -> logits (B, T, vocab_size). Raises TokenError, ContextError."""
        return self.embeddings.unembed(self.hidden(tokens, cache))

    def loss(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Mean next-token cross-entropy in nats; tokens and targets are (B, T)."""
        return F.cross_entropy(self(tokens).flatten(0, 1), targets.flatten())

    def num_params(self) -> int:
        """The exact number of parameters; the token table is counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def save_pretrained(self, path: str | Path) -> None:
        """Write config.json and model.safetensors into a folder, each beside its place and then renamed."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.state_dict(), folder / "model.safetensors.part")
        (folder / "config.json.part").write_text(json.dumps(asdict(self.config), indent=1) + "\n")
        for name in ("model.safetensors", "config.json"):
            os.replace(folder / f"{name}.part", folder / name)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "GPT":
        """Read a model that save_pretrained wrote. Raises ConfigError when the folder holds none."""
        folder = Path(path)
        for name in ("config.json", "model.safetensors"):
            if not (folder / name).exists():
                raise ConfigError(f"{folder} has no {name}; save_pretrained writes both")
        config = GPTConfig(**json.loads((folder / "config.json").read_text()))
        with torch.device("meta"):
            model = cls(config)
        weights = {name: w.float() for name, w in load_file(folder / "model.safetensors").items()}
        model.load_state_dict(weights, assign=True)
        return model.eval()
