"""Layers that look at a part of the past: strided, fixed and banded patterns, and a band without a T × T matrix."""

# Made from book/05_sparse_attention.ipynb by tools/export.py; edit the chapter, not this file.
import functools
import importlib.util
import warnings

import torch
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from gpt3lib.attention import CausalSelfAttention, attend, causal_mask


class PatternError(ValueError):
    """A pattern of attention that nobody can compute: a band without keys, a block without a place for its summary."""


def check_whole(**numbers: int) -> None:
    """Raise PatternError unless every number is a whole number of at least 1."""
    for name, value in numbers.items():
        if type(value) is not int or value < 1:
            raise PatternError(
                f"{name} is {value!r}; it must be a whole number of at least 1"
            )


def banded_mask(
    n_queries: int, n_keys: int, bandwidth: int, device=None
) -> torch.Tensor:
    """(n_queries, n_keys) booleans: query i sees the last `bandwidth` keys, itself included: 0 <= i - j < bandwidth.

    The queries are the last of the keys, as in causal_mask. Raises PatternError for a band without keys.
    """
    check_whole(bandwidth=bandwidth)
    mask = causal_mask(n_queries, n_keys, device)
    return mask.triu(n_keys - n_queries - bandwidth + 1)


def strided_masks(n: int, stride: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two (n, n) masks of the Sparse Transformer's strided pattern, for two heads or two layers ([C19] §4.2).

    The first shows query i the keys i - stride … i, the second every stride-th key back from i.
    """
    check_whole(n=n, stride=stride)
    back = torch.arange(n)[:, None] - torch.arange(
        n
    )  # how far key j lies behind query i
    return (back >= 0) & (back <= stride), (back >= 0) & (back % stride == 0)


def fixed_masks(
    n: int, block: int, summary: int, head: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two (n, n) masks of the Sparse Transformer's fixed pattern, l = block and c = summary ([C19] §4.2).

    The first shows a query its own block so far, the second `summary` places of every block so far: the last
    ones for head 0, those before them for head 1, and so on round the block, so that heads read distinct places.
    Raises PatternError when the summaries do not divide the block.
    """
    check_whole(n=n, block=block, summary=summary)
    if block % summary:
        raise PatternError(
            f"summaries of {summary} do not divide a block of {block}; choose a divisor"
        )
    places, causal = torch.arange(n), causal_mask(n, n)
    group = (block // summary - 1 - head) % (block // summary)
    return causal & (places[:, None] // block == places // block), causal & (
        places % block // summary == group
    )


def reach(n_layers: int, bandwidth: int) -> int:
    """How many tracks, itself included, can influence one track through n banded layers: n · (W - 1) + 1."""
    return n_layers * (bandwidth - 1) + 1


def band_by_mask(q, k, v, bandwidth: int, scale=None) -> torch.Tensor:
    """Banded attention as it is drawn: a (Tq, Tk) mask. The slow twin of the two others."""
    return attend(
        q, k, v, banded_mask(q.shape[-2], k.shape[-2], bandwidth, q.device), scale
    )


SHORTEST_BLOCK = (
    32  # a narrower band still works in blocks of 32: tiny matrix products are slow
)


def in_blocks(x: torch.Tensor, size: int) -> torch.Tensor:
    """(B, H, T, d) -> (B, H, T / size, size, d), zeros added behind until T is a multiple of size."""
    return F.pad(x, (0, 0, 0, -x.shape[2] % size)).unflatten(2, (-1, size))


def band_by_blocks(q, k, v, bandwidth: int, scale=None) -> torch.Tensor:
    """Banded attention in blocks that look at themselves and at the block before: time and memory grow with T.

    A block is at least as long as the band, so no query of it sees further back than one block.
    """
    check_whole(bandwidth=bandwidth)
    bandwidth = min(bandwidth, k.shape[2])
    n_queries, size = q.shape[2], max(bandwidth, SHORTEST_BLOCK)
    k, v = (
        k[:, :, -(n_queries + bandwidth - 1) :],
        v[:, :, -(n_queries + bandwidth - 1) :],
    )  # the others see nobody
    before = k.shape[2] - n_queries  # keys of earlier tokens, from a cache
    q, k, v = (
        in_blocks(x, size) for x in (F.pad(q, (0, 0, before, 0)), k, v)
    )  # (B, H, n, size, d)
    first = attend(
        q[:, :, 0],
        k[:, :, 0],
        v[:, :, 0],
        banded_mask(size, size, bandwidth, q.device),
        scale,
    )
    if q.shape[2] == 1:
        return first[:, :, before : before + n_queries]
    pairs = [
        torch.cat([x[:, :, :-1], x[:, :, 1:]], dim=3).flatten(1, 2) for x in (k, v)
    ]  # (B, H · (n-1), 2 size, d)
    mask = banded_mask(
        size, 2 * size, bandwidth, q.device
    )  # the same for all blocks but the first
    others = attend(
        q[:, :, 1:].flatten(1, 2), *pairs, mask, scale
    )  # (B, H · (n-1), size, d)
    mixed = torch.cat(
        [first, others.unflatten(1, (q.shape[1], -1)).flatten(2, 3)], dim=2
    )
    return mixed[:, :, before : before + n_queries]


@functools.lru_cache(maxsize=32, typed=True)
def flex_mask(n_queries: int, n_keys: int, bandwidth: int, device: str):
    """FlexAttention's own form of banded_mask: which tiles to skip, and a rule for the others."""
    check_whole(bandwidth=bandwidth)
    before = n_keys - n_queries

    def rule(batch, head, i, j):
        back = i + before - j
        return (back >= 0) & (back < bandwidth)

    return create_block_mask(rule, None, None, n_queries, n_keys, device=device)


@functools.cache
def compiled_flex():
    """FlexAttention, compiled once; uncompiled it would fill the whole (Tq, Tk) matrix."""
    return torch.compile(flex_attention)


def band_by_flex(q, k, v, bandwidth: int, scale=None) -> torch.Tensor:
    """Banded attention by torch's FlexAttention: one fused kernel on a GPU, the plain formula elsewhere.

    Raises PatternError where a gradient is wanted off the GPU: torch 2.13 has none there.
    """
    mask = flex_mask(q.shape[2], k.shape[2], bandwidth, str(q.device))
    if q.is_cuda:
        return compiled_flex()(q, k, v, block_mask=mask, scale=scale)
    if torch.is_grad_enabled() and (
        q.requires_grad or k.requires_grad or v.requires_grad
    ):
        raise PatternError(
            f"FlexAttention has no gradient on {q.device.type}; use how='blocks' there"
        )
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # it warns that it is not compiled, which is the point here
        return flex_attention(
            q.detach(), k.detach(), v.detach(), block_mask=mask, scale=scale
        )


WAYS = {"mask": band_by_mask, "blocks": band_by_blocks, "flex": band_by_flex}


def pick_way(q: torch.Tensor) -> str:
    """The way for these queries: "flex" on a GPU that can compile it, for heads of 16 or more; else "blocks"."""
    return (
        "flex"
        if q.is_cuda and q.shape[-1] >= 16 and importlib.util.find_spec("triton")
        else "blocks"
    )


def attend_in_band(
    q, k, v, bandwidth: int, scale=None, how: str = "auto"
) -> torch.Tensor:
    """(B, H, Tq, d), (B, H, Tk, d) twice -> (B, H, Tq, d): query i sees keys i - bandwidth + 1 … i.

    The queries are the last of the keys. scale: by default 1 / √d.
    how: "mask", "blocks", "flex", all equal, or "auto". Raises PatternError for any other, for a band without keys,
    and for more queries than keys.
    """
    check_whole(bandwidth=bandwidth)
    if q.shape[2] > k.shape[2]:
        raise PatternError(
            f"{q.shape[2]} queries but only {k.shape[2]} keys; a query needs at least its own key"
        )
    if how not in (*WAYS, "auto"):
        raise PatternError(f"how is {how!r}; there are {', '.join(WAYS)} and auto")
    if how == "auto":
        n_queries, n_keys = q.shape[2], k.shape[2]
        if bandwidth >= n_keys:  # the band covers everything
            return attend(q, k, v, scale=scale)
        how = "mask" if n_queries == 1 else pick_way(q)
    return WAYS[how](q, k, v, bandwidth, scale)


class BandedSelfAttention(CausalSelfAttention):
    """CausalSelfAttention whose tracks see the last `bandwidth` tracks only, themselves included.

    Same parameters, same names. how: the way to compute it, see attend_in_band.
    """

    def __init__(self, d_model: int, n_heads: int, d_head: int, bandwidth: int):
        super().__init__(d_model, n_heads, d_head)
        check_whole(bandwidth=bandwidth)
        self.bandwidth, self.how = bandwidth, "auto"

    def look(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask=None):
        """(B, n_heads, Tq, d_head) and two (B, n_heads, Tk, d_head) -> (B, n_heads, Tq, d_head).

        mask: what the queries may see, for whoever knows it better than the band does.
        """
        if mask is not None:
            return attend(q, k, v, mask, self.scale)
        return attend_in_band(q, k, v, self.bandwidth, self.scale, self.how)


def banded_flops(n_tokens: int, d_model: int, bandwidth: int) -> dict[str, int]:
    """Like attention_flops, for a banded layer: only the scores inside the band count."""
    check_whole(bandwidth=bandwidth)
    width = min(bandwidth, n_tokens)
    pairs = n_tokens * width - width * (width - 1) // 2
    return {
        "projections": 4 * 2 * n_tokens * d_model**2,
        "scores and mix": 2 * 2 * pairs * d_model,
    }
