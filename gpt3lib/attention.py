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


def attention_weights(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """(..., Tq, d_head), (..., Tk, d_head) -> (..., Tq, Tk): how much each query takes from each key.

    Each row is softmax(q kᵀ / √d_head) over the keys that are not in its future ([V17]).
    Raises ValueError for more queries than keys.
    """
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # (..., Tq, Tk)
    mask = causal_mask(q.shape[-2], k.shape[-2], q.device)
    return scores.masked_fill(~mask, -math.inf).softmax(dim=-1)


def attend_slowly(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention as it is drawn: the whole (Tq, Tk) matrix of weights, then a matrix product."""
    return attention_weights(q, k) @ v  # (..., Tq, d_head)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The same as attend_slowly through torch's fused kernel, which never stores the (Tq, Tk) matrix."""
    n_queries, n_keys = q.shape[-2], k.shape[-2]
    if n_queries == n_keys:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    # torch's is_causal lines up the first query with the first key; ours are the last ones
    mask = None if n_queries == 1 else causal_mask(n_queries, n_keys, q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class CausalSelfAttention(nn.Module):
    """Dense causal multi-head self-attention with biases, as in GPT-2 and in GPT-3's dense layers.

    wq, wk, wv: d_model -> n_heads · d_head; wo: back again. No dropout.
    """

    def __init__(self, d_model: int, n_heads: int, d_head: int):
        super().__init__()
        self.d_head = d_head
        self.wq = nn.Linear(d_model, n_heads * d_head)
        self.wk = nn.Linear(d_model, n_heads * d_head)
        self.wv = nn.Linear(d_model, n_heads * d_head)
        self.wo = nn.Linear(n_heads * d_head, d_model)

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, n_heads · d_head) -> (B, n_heads, T, d_head)."""
        return x.unflatten(-1, (-1, self.d_head)).transpose(1, 2)

    def forward(self, x: torch.Tensor, cache=None) -> torch.Tensor:
        """(B, T, d_model) -> (B, T, d_model).

        cache: keys and values of earlier tokens, an object whose append(k, v)
        stores the new ones and returns all of them (the chapter on generation has one).
        """
        q, k, v = self.heads(self.wq(x)), self.heads(self.wk(x)), self.heads(self.wv(x))  # (B, n_heads, T, d_head)
        if cache is not None:
            k, v = cache.append(k, v)
        mixed = attend(q, k, v).transpose(1, 2).flatten(2)  # (B, T, n_heads · d_head)
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
