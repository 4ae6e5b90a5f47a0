"""A word becomes a vector, and a vector a word: the token table, the position table,
and the way back."""

# Made from book/03_embeddings.ipynb by tools/export.py; edit the chapter.
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from gpt3lib.tokenization import TokenError


class ContextError(ValueError):
    """A text with more tokens than the model has tracks."""


def is_transformed(tensor: torch.Tensor) -> bool:
    """Whether a transform (vmap, grad, jvp …) has wrapped it, or it has a tangent."""
    if torch.compiler.is_compiling():
        return False
    wrapped = torch.func.debug_unwrap(tensor) is not tensor
    return wrapped or forward_ad.unpack_dual(tensor).tangent is not None


def is_recorded() -> bool:
    """Whether torch writes down the steps now, to take them for other sizes later."""
    return torch.jit.is_tracing() or torch.compiler.is_exporting()


def is_traced(tensor: torch.Tensor) -> bool:
    """Whether torch only follows what is done with a tensor: no numbers to look at.

    So it is under torch.compile, torch.export, torch.jit.trace, make_fx, the transforms
    of torch.func, forward_ad, and FakeTensorMode.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    plain = type(tensor) in (torch.Tensor, nn.Parameter)
    return not plain or is_in_torch_dispatch_mode() or is_transformed(tensor)


def check_tokens(tokens: torch.Tensor, vocab_size: int) -> None:
    """Raise TokenError unless `tokens` is (B, T) ids, B · T ≥ 1, below vocab_size.

    Looking at numbers costs a copy from an accelerator, so tensors that live elsewhere
    are left to the device's own check; so are those without numbers, see is_traced.
    """
    kind = tokens.dtype if isinstance(tokens, torch.Tensor) else type(tokens).__name__
    if kind not in (torch.int64, torch.int32):
        raise TokenError(
            f"token ids must be integers in a tensor (torch.int64), not {kind}"
        )
    if tokens.dim() != 2 or tokens.numel() == 0:
        raise TokenError(
            "tokens must be (B, T) with at least one id, not "
            f"{tuple(tokens.shape)}; for one text use tokens[None]"
        )
    if tokens.device.type != "cpu" or is_traced(tokens):
        return
    low, high = (number.item() for number in tokens.aminmax())
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise TokenError(
            f"token id {wrong} is not in the vocabulary; "
            f"ids go from 0 to {vocab_size - 1}"
        )


def check_length(n_tokens: int, n_ctx: int) -> None:
    """Raise ContextError when more tokens than n_ctx want tracks."""
    if n_tokens > n_ctx:
        raise ContextError(
            f"{n_tokens} tokens do not fit into a context of {n_ctx}; "
            f"pass at most {n_ctx}"
        )


class Embeddings(nn.Module):
    """Token and position embeddings; the token table is the way out too ([B20], [R19]).

    wte: (vocab_size, d_model), one row a token; wpe: (n_ctx, d_model), one row a track.
    It checks nothing: check_tokens and check_length are for whoever calls it.
    """

    def __init__(self, vocab_size: int, n_ctx: int, d_model: int):
        super().__init__()
        self.wte = nn.Embedding(vocab_size, d_model)
        self.wpe = nn.Embedding(n_ctx, d_model)

    def forward(
        self, tokens: torch.Tensor, tracks: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(B, T) ids -> (B, T, d_model).

        tracks: where each token sits, (T,) or (B, T); 0, 1, 2 … if not said.
        """
        if tracks is None:
            tracks = torch.arange(tokens.shape[-1], device=tokens.device)  # (T,)
        return self.wte(tokens) + self.wpe(tracks)

    def unembed(self, h: torch.Tensor) -> torch.Tensor:
        """(..., d_model) -> logits (..., vocab_size): how well h fits each row."""
        return F.linear(h, self.wte.weight)
