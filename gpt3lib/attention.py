"""How a token looks back: dense causal multi-head attention, from a loop over three words to the class."""

# Made from book/03_attention.ipynb by tools/export.py; edit the chapter, not this file.
import math

import torch
from torch import nn
from torch.nn import functional as F


def causal_mask(n_queries: int, n_keys: int, device=None) -> torch.Tensor:
    """(n_queries, n_keys) booleans: True where a query may look. The queries are the last of the keys.

    Raises ValueError for more queries than keys: the first of them would have nothing to look at.
    """
    if n_queries > n_keys:
        raise ValueError(f"{n_queries} queries but only {n_keys} keys; a query needs at least its own key")
    ones = torch.ones(n_queries, n_keys, dtype=torch.bool, device=device)
    return ones.tril(n_keys - n_queries)


def attention_weights(q: torch.Tensor, k: torch.Tensor, mask=None, scale: float | None = None) -> torch.Tensor:
    """(..., Tq, d_head), (..., Tk, d_head) -> (..., Tq, Tk): how much each query takes from each key.

    Each row is softmax(q kᵀ · scale) over the keys that its row of the mask shows ([V17]).
    mask: booleans that fit (..., Tq, Tk), by default the causal mask; scale: by default 1 / √d_head.
    Raises ValueError for more queries than keys.
    """
    scores = q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)  # (..., Tq, Tk)
    if mask is None:
        mask = causal_mask(q.shape[-2], k.shape[-2], q.device)
    return scores.masked_fill(~mask, -math.inf).softmax(dim=-1)


def attend_slowly(q, k, v, mask=None, scale: float | None = None) -> torch.Tensor:
    """Attention as it is drawn: the whole (Tq, Tk) matrix of weights, then a matrix product."""
    return attention_weights(q, k, mask, scale) @ v  # (..., Tq, d_head)


def attend(q, k, v, mask=None, scale: float | None = None) -> torch.Tensor:
    """The same as attend_slowly through torch's fused kernel, which never stores the (Tq, Tk) weights."""
    n_queries, n_keys = q.shape[-2], k.shape[-2]
    # torch's is_causal lines up the first query with the first key; ours are the last ones
    square = mask is None and n_queries == n_keys
    if mask is None and not square and n_queries > 1:
        mask = causal_mask(n_queries, n_keys, q.device)
    if q.device.type == "cpu" and torch.is_autocast_enabled("cpu"):  # this kernel's backward is faster in float32
        with torch.autocast("cpu", enabled=False):
            q, k, v = q.float(), k.float(), v.float()
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=square, scale=scale)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=square, scale=scale)


def hide_padding(mask: torch.Tensor, pad: torch.Tensor) -> torch.Tensor:
    """(Tq, Tk) mask, (B,) numbers of empty tracks before each text -> (B, 1, Tq, Tk): nobody looks at those.

    A query on an empty track has nothing left to look at, so it looks at itself; nobody reads what it finds.
    """
    n_queries, n_keys = mask.shape
    columns = torch.arange(n_keys, device=mask.device)
    own = columns == (torch.arange(n_queries, device=mask.device) + n_keys - n_queries)[:, None]  # (Tq, Tk)
    filled = columns >= pad[:, None, None, None]  # (B, 1, 1, Tk)
    return mask & filled | own


class CausalSelfAttention(nn.Module):
    """Dense causal multi-head self-attention, as in GPT-2 and in GPT-3's dense layers. No dropout.

    wq, wk, wv: d_model -> n_heads · d_head; wo: back again.
    qkv_bias=False and scaled=False (scores not divided by √d_head) are for GPT-Neo, which has neither.
    """

    def __init__(self, d_model: int, n_heads: int, d_head: int, qkv_bias: bool = True, scaled: bool = True):
        super().__init__()
        self.d_head = d_head
        self.scale = None if scaled else 1.0  # None is 1 / √d_head
        self.wq = nn.Linear(d_model, n_heads * d_head, bias=qkv_bias)
        self.wk = nn.Linear(d_model, n_heads * d_head, bias=qkv_bias)
        self.wv = nn.Linear(d_model, n_heads * d_head, bias=qkv_bias)
        self.wo = nn.Linear(n_heads * d_head, d_model)

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, n_heads · d_head) -> (B, n_heads, T, d_head)."""
        return x.unflatten(-1, (-1, self.d_head)).transpose(1, 2)

    def mix(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pad=None) -> torch.Tensor:
        """(B, n_heads, Tq, d_head) and two (B, n_heads, Tk, d_head) -> (B, n_heads, Tq, d_head)."""
        mask = None if pad is None else hide_padding(causal_mask(q.shape[2], k.shape[2], q.device), pad)
        return attend(q, k, v, mask, self.scale)

    def forward(self, x: torch.Tensor, cache=None, pad=None) -> torch.Tensor:
        """(B, T, d_model) -> (B, T, d_model).

        cache: keys and values of earlier tokens, an object whose append(k, v) stores the new ones and returns
        those to look at (the chapter on generation has one); pad: (B,) empty tracks before each text, or None.
        """
        q, k, v = self.heads(self.wq(x)), self.heads(self.wk(x)), self.heads(self.wv(x))  # (B, n_heads, T, d_head)
        if cache is not None:
            k, v = cache.append(k, v)
            if pad is not None:
                pad = pad - (cache.length - k.shape[2])  # a cache may have forgotten the first tracks
        mixed = self.mix(q, k, v, pad).transpose(1, 2).flatten(2)  # (B, T, n_heads · d_head)
        return self.wo(mixed)


def attention_flops(n_tokens: int, d_model: int) -> dict[str, int]:
    """Floating-point operations of one dense layer on `n_tokens` tokens, a multiply-add counted as two.

    The four projections grow with T, the two products with T². Both products count in
    full: the mask saves nothing here. Biases and softmax are left out, and
    n_heads · d_head is d_model. ([K20] Table 1 counts half of the second entry.)
    """
    return {
        "projections": 4 * 2 * n_tokens * d_model**2,
        "scores and mix": 2 * 2 * n_tokens**2 * d_model,
    }
