"""The whole model: one layer, the stack of them, how its numbers begin, and the
loss."""

# Made from book/06_decoder.ipynb by tools/export.py; edit the chapter.
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from gpt3lib.attention import CausalSelfAttention
from gpt3lib.embeddings import Embeddings, check_length, check_tokens, is_traced
from gpt3lib.files import Refusal, is_whole
from gpt3lib.sparse_attention import BandedSelfAttention
from gpt3lib.tokenization import TokenError


# What a model refuses; the workshop at the end of this page has a table of it.
class ConfigError(Refusal, ValueError):
    """A model configuration that contradicts itself, or a name that no model has."""


def check_config(config: "GPTConfig") -> None:
    """Raise ConfigError, saying what would be right, unless a model can be so."""
    for name in "vocab_size n_ctx n_layers d_model n_heads d_head bandwidth".split():
        value = ConfigError.unless_whole(name, getattr(config, name))
        object.__setattr__(config, name, value)  # numpy's too; JSON wants Python's
    n_heads, d_head, d_model = config.n_heads, config.d_head, config.d_model
    width, right = n_heads * d_head, "the heads must share out the width exactly"
    words = f"n_heads · d_head = {n_heads} · {d_head} = {width} is not d_model = "
    ConfigError.unless(width == d_model, f"{words}{d_model}; {right}")
    kinds, right = config.attention, "a tuple of 'dense' and 'banded', one at least"
    fine = type(kinds) is tuple and all(kind in ("dense", "banded") for kind in kinds)
    words = f"attention is {kinds!r}; it must be {right}"
    ConfigError.unless(fine and kinds, words)


def check_targets(tokens: torch.Tensor, targets: torch.Tensor, vocab_size: int) -> None:
    """Raise TokenError unless every token has one target, an id of the vocabulary."""
    check_tokens(targets, vocab_size)
    if tokens.shape != targets.shape:
        both = f"tokens {tuple(tokens.shape)} and targets {tuple(targets.shape)}"
        raise TokenError(f"{both} must have one shape")


def check_beginning(config: "GPTConfig", seed: int) -> None:
    """Raise ConfigError unless a model can be made of these two."""
    right = "a GPTConfig, such as GPTConfig.from_name('gpt3-1m')"
    words = f"config is {config!r}; it must be {right}"
    ConfigError.unless(isinstance(config, GPTConfig), words)
    words = f"seed is {seed!r}; it must be a whole number"
    ConfigError.unless(is_whole(seed, -math.inf), words)


def check_table(table: torch.Tensor, vocab_size: int) -> None:
    """Raise ConfigError unless the token table has a row for each id of the config."""
    if table.shape[0] != vocab_size:
        says = f"but config.vocab_size is {vocab_size}; make them equal"
        raise ConfigError(f"the token table has {table.shape[0]} rows, {says}")


NO_TARGET = -(2**63)  # torch would skip -100, its ignore_index; we skip nothing


def filled(registry: dict, module: str) -> dict:
    """The registry, once the module of gpt3lib that fills it has been imported."""
    import_module(f"gpt3lib.{module}")
    return registry


SIZES: dict[str, dict] = {}  # name -> fields of GPTConfig; the module `sizes` fills it


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a model, in the paper's symbols; a contradiction raises ConfigError.

    vocab_size: number of token ids; n_ctx: tracks, the longest text it can see;
    n_layers: depth; d_model: width of a track; n_heads heads of width d_head.
    attention: the kinds of the layers, from the first up and then over again;
    bandwidth: keys that a query of a banded layer sees, itself included.
    """

    vocab_size: int
    n_ctx: int
    n_layers: int
    d_model: int
    n_heads: int
    d_head: int
    attention: tuple[str, ...] = ("dense", "banded")
    bandwidth: int = 256

    def __post_init__(self):
        check_config(self)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of each layer, from the first up."""
        return (self.attention * self.n_layers)[: self.n_layers]

    @property
    def d_ff(self) -> int:
        """Width of the hidden layer of the MLP ([B20] §2.1)."""
        return 4 * self.d_model

    @classmethod
    def from_name(cls, name: str, **changes) -> "GPTConfig":
        """A size of the paper's (gpt3-125m … gpt3-175b) or of ours (gpt3-100k …).

        changes: fields that are to differ, such as n_ctx. Raises ConfigError.
        """
        sizes = filled(SIZES, "sizes")
        words = f"no model is called {name!r}; there are {', '.join(sizes)}"
        ConfigError.unless(name in sizes, words)
        return cls(**sizes[name] | changes)


class MLP(nn.Module):
    """Each track thinks for itself: d_model -> d_ff -> d_model, GELU between."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.up = nn.Linear(config.d_model, config.d_ff)
        self.activation = nn.GELU(approximate="tanh")
        self.down = nn.Linear(config.d_ff, config.d_model)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, d_model) -> (B, T, d_model)."""
        return self.down(self.activation(self.up(x)))


class Block(nn.Module):
    """One decoder layer: attention, then MLP, each normalised before and added after.

    kind: "dense", or "banded" for one that sees config.bandwidth tracks ([R19] §2.3).
    """

    def __init__(self, config: GPTConfig, kind: str = "dense"):
        super().__init__()
        shape = (config.d_model, config.n_heads, config.d_head)
        self.ln_1 = nn.LayerNorm(config.d_model)
        if kind == "dense":
            self.attention = CausalSelfAttention(*shape)
        else:
            self.attention = BandedSelfAttention(*shape, config.bandwidth)
        self.ln_2 = nn.LayerNorm(config.d_model)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, past=None) -> torch.Tensor:
        """(B, T, d_model) -> (B, T, d_model). past: kept of earlier tokens, or None."""
        x = x + self.attention(self.ln_1(x), past)
        return x + self.mlp(self.ln_2(x))


def normal(shape: torch.Size, std: float, seed: int, name: str) -> torch.Tensor:
    """N(0, std²) numbers that depend on (seed, name, shape) and on nothing else."""
    key = hashlib.sha256(f"{seed} {name} {list(shape)}".encode()).digest()
    dice = torch.Generator().manual_seed(int.from_bytes(key[:7], "big"))
    return torch.randn(shape, generator=dice, device=dice.device) * std


@torch.no_grad()
def initialise(model, n_layers: int, seed: int = 0, fill=torch.Tensor.copy_) -> None:
    """Fill a model: matrices N(0, 0.02²), positions N(0, 0.01²), biases 0, gains 1.

    The two matrices of a layer that write to the stream get 0.02 / √(2 · n_layers), see
    [R19] §2.3. Parameters on the "meta" device have no numbers and stay without.
    fill(parameter, numbers): how they get in, for whoever keeps only a piece of them.
    """
    small = 0.02 / math.sqrt(2 * n_layers)
    stds = {"wpe.weight": 0.01, "wo.weight": small, "down.weight": small}
    for name, p in model.named_parameters():
        if p.dim() == 1:
            p.fill_(0.0 if name.endswith("bias") else 1.0)
        elif not p.is_meta:
            std = next((std for end, std in stds.items() if name.endswith(end)), 0.02)
            fill(p, normal(p.shape, std, seed, name))


def loss_slowly(h, wte, targets) -> torch.Tensor:
    """(B, T, d_model), the token table, (B, T) ids -> loss, all logits at once."""
    logits = F.linear(h, wte).flatten(0, -2)  # (B · T, vocab_size)
    exact = torch.promote_types(logits.dtype, torch.float32)  # float16 adds badly
    targets = targets.flatten().long()
    return F.cross_entropy(logits.to(exact), targets, ignore_index=NO_TARGET)


def cost_and_slope(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """(n, vocab_size), (n,) ids -> the sum of -ln p; the logits become its gradient."""
    right = targets[:, None]
    logits -= logits.amax(dim=-1, keepdim=True)  # so that no power overflows
    chosen = logits.gather(1, right)
    total = logits.exp_().sum(dim=-1, keepdim=True)
    logits /= total  # softmax: all the probabilities
    logits.scatter_add_(1, right, -torch.ones_like(chosen))
    return (total.log() - chosen).sum()


def as_in_products(x: torch.Tensor) -> torch.Tensor:
    """A tensor as a product takes it now: cast under autocast, detached in no_grad."""
    where = x.device.type
    if where != "meta" and torch.is_autocast_enabled(where) and x.dtype != torch.double:
        x = x.to(torch.get_autocast_dtype(where))
    return x if torch.is_grad_enabled() else x.detach()


def add_in_place(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a @ b; when all have one type, the product itself is never stored."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def in_pieces(h, wte, targets, wanted) -> tuple[torch.Tensor, list]:
    """(N, d_model), the token table, (N,) ids -> summed loss, gradients of h and wte.

    wanted: whether each of the two is; None stands for one that is not.
    """
    exact = torch.promote_types(h.dtype, torch.float32)  # half precision adds badly
    grads = [
        torch.zeros_like(x, dtype=exact) if want else None
        for x, want in zip((h, wte), wanted)
    ]
    loss = h.new_zeros((), dtype=exact)
    for rows in (slice(i, i + 256) for i in range(0, len(h), 256)):
        slope = F.linear(h[rows], wte).to(exact)  # the logits, (256, vocab_size)
        loss += cost_and_slope(slope, targets[rows])
        slope = slope.to(h.dtype)
        if wanted[0]:
            add_in_place(grads[0][rows], slope, wte)
        if wanted[1]:
            add_in_place(grads[1], slope.T, h[rows])
        del slope  # before the next ones are made
    return loss, grads


class LossInPieces(torch.autograd.Function):
    """loss_slowly for autograd, 256 rows at a time."""

    @staticmethod
    def forward(ctx, h, wte, targets):
        """The mean loss; the gradients are made on the way and kept."""
        ctx.save_for_backward(h, wte, targets)
        loss, ctx.grads = in_pieces(h, wte, targets, ctx.needs_input_grad)
        return loss / len(h)

    @staticmethod
    def backward(ctx, above):
        """The kept gradients, or new ones; slowly, if they are to have gradients."""
        (h, wte, targets), grads, ctx.grads = ctx.saved_tensors, ctx.grads, None
        if torch.is_grad_enabled():
            _, pull = torch.func.vjp(lambda *x: loss_slowly(*x, targets), h, wte)
            return *pull(above), None
        if grads is None:  # handed over already
            grads = in_pieces(h, wte, targets, ctx.needs_input_grad)[1]
        share = above / len(h)
        # many at a time (is_grads_batched) have no storage, and do not fit into g
        times = torch.Tensor.mul_ if torch._C._has_storage(share) else torch.mul
        return *(g if g is None else times(g, share).to(h.dtype) for g in grads), None


def chunked_loss(h, wte, targets) -> torch.Tensor:
    """The same as loss_slowly, with the logits of 256 tracks at a time.

    Where torch traces or transforms (see is_traced) it is loss_slowly.
    """
    if is_traced(h) or is_traced(wte):
        return loss_slowly(h, wte, targets)
    h, wte = map(as_in_products, (h, wte))
    return LossInPieces.apply(h.flatten(0, -2), wte, targets.flatten().long())


FORMATS: dict[str, Callable] = {}  # "read" and "write"; the module `weights` fills it


class GPT(nn.Module):
    """A GPT-3: embeddings, blocks, a last LayerNorm, the token table as the way out.

    seed: which random numbers it begins with, the same on every machine.
    """

    def __init__(self, config: GPTConfig, seed: int = 0):
        super().__init__()
        check_beginning(config, seed)
        self.config = config
        self.embeddings = Embeddings(config.vocab_size, config.n_ctx, config.d_model)
        self.blocks = nn.ModuleList(Block(config, kind) for kind in config.kinds)
        self.ln_f = nn.LayerNorm(config.d_model)
        initialise(self, config.n_layers, seed)

    def hidden(self, tokens: torch.Tensor, past=None) -> torch.Tensor:
        """(B, T) ids -> (B, T, d_model): what leaves the last LayerNorm.

        past: what the layers kept of earlier tokens, see gpt3lib.cache; it grows.
        Raises TokenError, ContextError.
        """
        self.check(tokens, past)
        x = self.embeddings(tokens, None if past is None else past.tracks(tokens))
        for i, block in enumerate(self.blocks):
            x = block(x, None if past is None else past.layers[i])
        return self.ln_f(x)

    def forward(self, tokens: torch.Tensor, past=None) -> torch.Tensor:
        """(B, T) ids -> logits (B, T, vocab_size). Raises TokenError, ContextError."""
        return self.embeddings.unembed(self.hidden(tokens, past))

    def loss(self, tokens, targets, past=None) -> torch.Tensor:
        """Mean cross-entropy in nats of (B, T) ids and targets. Raises TokenError.

        past: see hidden. For second derivatives see attend.
        """
        check_targets(tokens, targets, self.config.vocab_size)
        h = self.hidden(tokens, past)
        return chunked_loss(h, self.embeddings.wte.weight, targets)

    def check(self, tokens: torch.Tensor, past=None) -> None:
        """Raise Token-, Config- or ContextError unless the model can read these."""
        check_tokens(tokens, self.config.vocab_size)
        check_table(self.embeddings.wte.weight, self.config.vocab_size)
        before = 0 if past is None else past.length
        check_length(before + tokens.shape[1], self.config.n_ctx)

    def num_params(self) -> int:
        """The exact number of parameters; the token table is counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def save_pretrained(self, path: str | Path) -> None:
        """Write model.safetensors and config.json, see gpt3lib.weights."""
        filled(FORMATS, "weights")["write"](self, path)

    @staticmethod
    def from_pretrained(path_or_name: str | Path, dtype=torch.float32) -> "GPT":
        """The model in a folder, or of a name on Hugging Face's hub.

        dtype: the type of its numbers, None for that of the file. Raises WeightsError
        when there is none that fits, see gpt3lib.weights.
        """
        return filled(FORMATS, "weights")["read"](path_or_name, dtype)
