"""How a token looks back: self-attention, from one dot product to a layer of heads."""

# Made from book/04_attention.ipynb by tools/export.py; edit the chapter.
import math

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpt3lib.embeddings import is_recorded, is_transformed


def fused(q, k, v, mask, causal: bool, scale: float | None) -> torch.Tensor:
    """torch's fused kernel; autocast on a CPU leaves it float32: a faster backward."""
    how = {"attn_mask": mask, "is_causal": causal, "scale": scale}
    if q.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        exact = torch.promote_types(q.dtype, torch.float32)  # float64 stays
        with torch.autocast("cpu", enabled=False):
            return fused(q.to(exact), k.to(exact), v.to(exact), mask, causal, scale)
    if any(map(is_transformed, (q, k, v))):  # no kernel knows vmap and jvp; products do
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v, **how)
    return F.scaled_dot_product_attention(q, k, v, **how)


def causal_mask(n_queries: int, n_keys: int, device: torch.device | None = None):
    """(n_queries, n_keys) booleans: True where a query may look at a key.

    The queries are the last of the keys. Raises ValueError for more queries than keys:
    the first of them would have nothing to look at.
    """
    if n_queries > n_keys:
        counts = f"{n_queries} queries but only {n_keys} keys"
        raise ValueError(f"{counts}; a query needs at least its own key")
    kind = {"dtype": torch.bool, "device": device}
    return torch.ones(n_queries, n_keys, **kind).tril(n_keys - n_queries)


def attention_weights(q, k, mask=None, scale: float | None = None) -> torch.Tensor:
    """(..., Tq, d_head), (..., Tk, d_head) -> (..., Tq, Tk): a query's share of a key.

    Each row is softmax(q kᵀ · scale) over the keys that its mask row shows ([V17]).
    mask: booleans that fit (..., Tq, Tk), by default the causal mask; scale: by default
    1 / √d_head. Raises ValueError for more queries than keys.
    """
    if mask is None:
        mask = causal_mask(q.shape[-2], k.shape[-2], q.device)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    scores = q @ k.transpose(-2, -1) * scale  # (..., Tq, Tk)
    return scores.masked_fill(~mask, -math.inf).softmax(dim=-1)


def attend_slowly(q, k, v, mask=None, scale: float | None = None) -> torch.Tensor:
    """Attention as it is drawn: the whole (Tq, Tk) matrix of weights, times values."""
    return attention_weights(q, k, mask, scale) @ v  # (..., Tq, d_head)


def attend(q, k, v, mask=None, scale: float | None = None) -> torch.Tensor:
    """attend_slowly through torch's fused kernel: it stores no (Tq, Tk) weights.

    The kernel has no second derivative on a CPU; `with sdpa_kernel(SDPBackend.MATH):`
    (torch.nn.attention) takes one that has.
    """
    n_queries, n_keys = q.shape[-2], k.shape[-2]
    if mask is None and n_queries == n_keys and not is_recorded():
        return fused(q, k, v, None, True, scale)
    # is_causal lines up the first query with the first key; ours are the last ones
    if mask is None and (n_queries > 1 or is_recorded()):
        mask = causal_mask(n_queries, n_keys, q.device)
    return fused(q, k, v, mask, False, scale)


class CausalSelfAttention(nn.Module):
    """Dense causal multi-head self-attention, as in GPT-2 and half of GPT-3's layers.

    wq, wk, wv: d_model -> n_heads · d_head; wo: back again. No dropout.
    """

    def __init__(self, d_model: int, n_heads: int, d_head: int):
        super().__init__()
        self.d_head = d_head
        self.scale = d_head**-0.5
        self.wq = nn.Linear(d_model, n_heads * d_head)
        self.wk = nn.Linear(d_model, n_heads * d_head)
        self.wv = nn.Linear(d_model, n_heads * d_head)
        self.wo = nn.Linear(n_heads * d_head, d_model)

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, n_heads · d_head) -> (B, n_heads, T, d_head)."""
        return x.unflatten(-1, (-1, self.d_head)).transpose(1, 2)

    def look(self, q, k, v, mask=None) -> torch.Tensor:
        """Three (B, n_heads, T, d_head) -> one; without a mask, all of the past."""
        return attend(q, k, v, mask, self.scale)

    def forward(self, x: torch.Tensor, past=None) -> torch.Tensor:
        """(B, T, d_model) -> (B, T, d_model).

        past: an object whose append(k, v) stores the new tokens' keys and values and
        returns those to look at and a mask or None (the chapter Cache has one).
        """
        q, k, v = self.heads(self.wq(x)), self.heads(self.wk(x)), self.heads(self.wv(x))
        mask = None
        if past is not None:
            k, v, mask = past.append(k, v)
        mixed = self.look(q, k, v, mask)  # (B, n_heads, T, d_head)
        return self.wo(mixed.transpose(1, 2).flatten(2))


def attention_flops(n_tokens: int, d_model: int) -> dict[str, int]:
    """Floating-point operations of one dense layer; a multiply-add counts as two.

    The projections grow with T, scores and mix with T², counted in full: the mask saves
    nothing here. Biases and softmax are left out; n_heads · d_head is d_model.
    ([K20] Table 1 counts half of the second entry.)
    """
    return {
        "projections": 4 * 2 * n_tokens * d_model**2,
        "scores and mix": 2 * 2 * n_tokens**2 * d_model,
    }
