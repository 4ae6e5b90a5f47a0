"""Layers that look at a part of the past: strided, fixed and banded patterns, and a
fast band."""

# Made from book/05_sparse_attention.ipynb by tools/export.py; edit the chapter.
import functools
import importlib.util
import warnings

import torch
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from gpt3lib.attention import CausalSelfAttention, attend, causal_mask
from gpt3lib.embeddings import is_recorded
from gpt3lib.files import is_whole


class PatternError(ValueError):
    """A pattern of attention that cannot be: a band without keys, a way unheard of."""


def check_whole(**numbers: int) -> None:
    """Raise PatternError unless every number is a whole number of at least 1."""
    for name, value in numbers.items():
        if not is_whole(value):
            words = f"{name} is {value!r}; it must be a whole number of at least 1"
            raise PatternError(words)


def check_summary(block: int, summary: int) -> None:
    """Raise PatternError when the summaries do not divide the block."""
    if block % summary:
        wrong = f"summaries of {summary} do not divide a block of {block}"
        raise PatternError(f"{wrong}; choose a divisor")


def check_band(q, k, bandwidth: int, how: str) -> None:
    """Raise PatternError for what attend_in_band cannot do."""
    check_whole(bandwidth=bandwidth)
    if q.shape[2] > k.shape[2]:
        counts = f"{q.shape[2]} queries but only {k.shape[2]} keys"
        raise PatternError(f"{counts}; a query needs at least its own key")
    if how not in (*WAYS, "auto"):
        raise PatternError(f"how is {how!r}; there are {', '.join(WAYS)} and auto")


def banded_mask(
    n_queries: int, n_keys: int, bandwidth: int, device: torch.device | None = None
) -> torch.Tensor:
    """(n_queries, n_keys) booleans: 0 <= i - j < bandwidth, so query i sees itself too.

    The queries are the last of the keys, as in causal_mask. Raises PatternError for a
    band without keys.
    """
    check_whole(bandwidth=bandwidth)
    mask = causal_mask(n_queries, n_keys, device)
    return mask.triu(n_keys - n_queries - bandwidth + 1)


def strided_masks(n: int, stride: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two (n, n) masks of the strided pattern, for two heads or layers ([C19] §4.2).

    Query i sees the keys i - stride … i in the first, every stride-th key back from i
    in the second.
    """
    check_whole(n=n, stride=stride)
    back = torch.arange(n)[:, None] - torch.arange(n)  # how far key j lies behind i
    return (back >= 0) & (back <= stride), (back >= 0) & (back % stride == 0)


def fixed_masks(n: int, block: int, summary: int, head: int = 0) -> tuple:
    """Two (n, n) masks of the fixed pattern, l = block and c = summary ([C19] §4.2).

    A query sees its own block so far in the first, `summary` places of every block so
    far in the second: the last ones for head 0, those before them for head 1, and so on
    round the block. Raises PatternError when the summaries do not divide the block.
    """
    check_whole(n=n, block=block, summary=summary)
    check_summary(block, summary)
    places, causal, n_groups = torch.arange(n), causal_mask(n, n), block // summary
    own = places[:, None] // block == places // block
    group = places % block // summary  # which group of its block a place belongs to
    return causal & own, causal & (group == (n_groups - 1 - head) % n_groups)


def reach(n_layers: int, bandwidth: int) -> int:
    """How many tracks can influence one, itself included: n_layers · (W - 1) + 1."""
    return n_layers * (bandwidth - 1) + 1


def band_by_mask(q, k, v, bandwidth: int, scale=None) -> torch.Tensor:
    """Banded attention as it is drawn: a (Tq, Tk) mask. The slow twin of the others."""
    mask = banded_mask(q.shape[-2], k.shape[-2], bandwidth, q.device)
    return attend(q, k, v, mask, scale)


def look_in_blocks(q, k, v, bandwidth: int, scale=None) -> torch.Tensor:
    """(N, n, size, d) three times -> the same: a block sees itself and the one before.

    size: at least the bandwidth, so no query sees further back than one block.
    """
    size = q.shape[2]
    alone = banded_mask(size, size, bandwidth, q.device)
    first = attend(q[:, :1], k[:, :1], v[:, :1], alone, scale)
    if q.shape[1] == 1:
        return first
    pair = banded_mask(size, 2 * size, bandwidth, q.device)
    k, v = (torch.cat([x[:, :-1], x[:, 1:]], dim=2) for x in (k, v))
    return torch.cat([first, attend(q[:, 1:], k, v, pair, scale)], dim=1)


SHORTEST_BLOCK = 32  # tiny matrix products are slow, so blocks are no shorter


def in_blocks(x: torch.Tensor, size: int) -> torch.Tensor:
    """(B, H, T, d) -> (B · H, n, size, d), zeros behind until T is n · size."""
    x = F.pad(x, (0, 0, 0, -x.shape[2] % size))
    return x.unflatten(2, (-1, size)).flatten(0, 1)


def band_by_blocks(q, k, v, bandwidth: int, scale=None) -> torch.Tensor:
    """Banded attention in blocks: time and memory grow with T."""
    check_whole(bandwidth=bandwidth)
    n_queries = q.shape[2]
    if bandwidth > k.shape[2]:  # min() would not be a whole number while torch traces
        bandwidth = k.shape[2]
    recent = n_queries + bandwidth - 1  # nobody sees the keys before these
    k, v = k[:, :, -recent:], v[:, :, -recent:]
    before = k.shape[2] - n_queries  # keys of earlier tokens, from a cache
    size = max(bandwidth, SHORTEST_BLOCK)
    cut = [in_blocks(x, size) for x in (F.pad(q, (0, 0, before, 0)), k, v)]
    mixed = look_in_blocks(*cut, bandwidth, scale).flatten(1, 2)  # (B · H, T', d)
    return mixed[:, before : before + n_queries].unflatten(0, q.shape[:2])


WAYS = {"mask": band_by_mask, "blocks": band_by_blocks}


def pick_way(q: torch.Tensor) -> str:
    """The fastest way for these queries: on a GPU with Triton flex, else blocks."""
    if q.shape[2] == 1:
        return "mask"
    wide_enough = q.is_cuda and q.shape[-1] >= 16  # flex takes heads of 16 or more
    return "flex" if wide_enough and importlib.util.find_spec("triton") else "blocks"


def attend_in_band(q, k, v, bandwidth: int, scale=None, how="auto") -> torch.Tensor:
    """(B, H, Tq, d), two (B, H, Tk, d) -> (B, H, Tq, d): i sees i - bandwidth + 1 … i.

    The queries are the last of the keys. scale: by default 1 / √d. how: a name in WAYS,
    all equal, or "auto"; under torch.export and torch.jit.trace it is "mask". Raises
    PatternError for any other, for a band without keys, and for more queries than keys.
    """
    check_band(q, k, bandwidth, how)
    if is_recorded():  # the others cut by the sizes of today
        how = "mask"
    if how == "auto" and bandwidth >= k.shape[2]:  # the band covers everything
        return attend(q, k, v, scale=scale)
    return WAYS[pick_way(q) if how == "auto" else how](q, k, v, bandwidth, scale)


class BandedSelfAttention(CausalSelfAttention):
    """CausalSelfAttention in which a track sees the last `bandwidth`, itself too.

    Same parameters, same names. how: the way to compute it, see attend_in_band.
    """

    def __init__(self, d_model: int, n_heads: int, d_head: int, bandwidth: int):
        super().__init__(d_model, n_heads, d_head)
        check_whole(bandwidth=bandwidth)
        self.bandwidth, self.how = bandwidth, "auto"

    def look(self, q, k, v, mask=None) -> torch.Tensor:
        """(B, n_heads, Tq, d_head), two (B, n_heads, Tk, d_head) -> as the first.

        mask: what the queries may see, for whoever knows it better than the band does.
        """
        if mask is not None:
            return attend(q, k, v, mask, self.scale)
        return attend_in_band(q, k, v, self.bandwidth, self.scale, self.how)


@functools.lru_cache(maxsize=32, typed=True)
def flex_mask(n_queries: int, n_keys: int, bandwidth: int, device: str):
    """FlexAttention's own banded_mask: which tiles to skip, a rule for the others."""
    check_whole(bandwidth=bandwidth)
    before = n_keys - n_queries

    def rule(batch, head, i, j):
        back = i + before - j
        return (back >= 0) & (back < bandwidth)

    return create_block_mask(rule, None, None, n_queries, n_keys, device=device)


@functools.cache
def compiled_flex():
    """FlexAttention, compiled once; uncompiled it fills the whole (Tq, Tk) matrix."""
    return torch.compile(flex_attention)


def band_by_flex(q, k, v, bandwidth: int, scale=None) -> torch.Tensor:
    """FlexAttention: one fused kernel on a GPU, the plain formula elsewhere.

    Raises PatternError for a gradient off the GPU, where torch has none for it.
    """
    mask = flex_mask(q.shape[2], k.shape[2], bandwidth, str(q.device))
    if q.is_cuda:
        return compiled_flex()(q, k, v, block_mask=mask, scale=scale)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        words = f"FlexAttention has no gradient on {q.device.type}"
        raise PatternError(f"{words}; use how='blocks' there")
    q, k, v = (x.detach() for x in (q, k, v))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is not compiled is the point here
        return flex_attention(q, k, v, block_mask=mask, scale=scale)


WAYS["flex"] = band_by_flex


def banded_flops(n_tokens: int, d_model: int, bandwidth: int) -> dict[str, int]:
    """Like attention_flops, for a banded layer: only scores inside the band count."""
    check_whole(bandwidth=bandwidth)
    width = min(bandwidth, n_tokens)
    pairs = n_tokens * width - width * (width - 1) // 2
    return {
        "projections": 4 * 2 * n_tokens * d_model**2,
        "scores and mix": 2 * 2 * pairs * d_model,
    }
