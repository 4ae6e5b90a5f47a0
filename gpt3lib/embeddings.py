"""A word becomes a vector, and a vector a word: the token table, the position table, and the way back."""

# Made from book/02_embeddings.ipynb by tools/export.py; edit the chapter, not this file.
import torch
from torch import nn
from torch.nn import functional as F

from gpt3lib.tokenization import TokenError


class ContextError(ValueError):
    """A text with more tokens than the model has tracks."""


def check_tokens(tokens: torch.Tensor, vocab_size: int) -> None:
    """Raise TokenError unless `tokens` is a tensor of ids, each in 0 … vocab_size - 1.

    Looking costs a copy from an accelerator, so tensors that live elsewhere are
    left to the device's own check; so is the data-free "meta" device.
    """
    kind = tokens.dtype if isinstance(tokens, torch.Tensor) else type(tokens).__name__
    if kind not in (torch.int64, torch.int32):
        raise TokenError(f"token ids must be integers in a tensor (torch.int64), not {kind}")
    if tokens.device.type != "cpu" or tokens.numel() == 0:
        return
    low, high = tokens.min().item(), tokens.max().item()
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise TokenError(f"token id {wrong} is not in the vocabulary; ids go from 0 to {vocab_size - 1}")


class Embeddings(nn.Module):
    """Token and position embeddings, with the token table used again on the way out ([B20] §2.1, [R19]).

    wte: (vocab_size, d_model), one row a token, N(0, 0.02²);
    wpe: (offset + n_ctx, d_model), track t has row offset + t, N(0, 0.01²), as in GPT-2's released code.
    offset: rows before the first track's, 0 in the GPT family and 2 in OPT.
    """

    def __init__(self, vocab_size: int, n_ctx: int, d_model: int, offset: int = 0):
        super().__init__()
        self.vocab_size, self.n_ctx, self.offset = vocab_size, n_ctx, offset
        self.wte = nn.Embedding(vocab_size, d_model)
        self.wpe = nn.Embedding(offset + n_ctx, d_model)
        nn.init.normal_(self.wte.weight, std=0.02)
        nn.init.normal_(self.wpe.weight, std=0.01)

    def forward(self, tokens: torch.Tensor, start: int = 0, pad: torch.Tensor | None = None) -> torch.Tensor:
        """(B, T) ids -> (B, T, d_model); the first token sits on track `start`.

        pad: (B,) empty places before each text of the batch, whose own first token still sits on track 0.
        Raises TokenError for an id outside the vocabulary, ContextError for a track outside 0 … n_ctx - 1.
        """
        check_tokens(tokens, self.vocab_size)
        stop = start + tokens.shape[-1]
        if start < 0:
            raise ContextError(f"start is {start}; the first track is 0")
        if stop > self.n_ctx:
            raise ContextError(f"{stop} tokens do not fit into a context of {self.n_ctx}; pass at most {self.n_ctx}")
        tracks = torch.arange(start, stop, device=tokens.device)  # (T,)
        if pad is not None:
            tracks = (tracks - pad[:, None]).clamp(min=0)  # (B, T)
        return self.wte(tokens) + self.wpe(tracks + self.offset)  # (B, T, d_model)

    def unembed(self, h: torch.Tensor) -> torch.Tensor:
        """(B, T, d_model) -> logits (B, T, vocab_size): how well each vector fits each row of wte."""
        return F.linear(h, self.wte.weight)
