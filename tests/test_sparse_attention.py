"""Patterns against plain Python, bands against one softmax per query, GPT-Neo, and what the blocks hold."""

import math
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from gpt3lib import sparse_attention
from gpt3lib.attention import CausalSelfAttention, attend, attention_flops
from gpt3lib.sparse_attention import (
    WAYS,
    BandedSelfAttention,
    PatternError,
    attend_in_band,
    band_by_blocks,
    banded_flops,
    banded_mask,
    check_whole,
    fixed_masks,
    flex_mask,
    in_blocks,
    look_in_blocks,
    pick_way,
    reach,
    strided_masks,
)


def normal(*shape, seed=0, dtype=torch.float64):
    """Random numbers in float64, so that an oracle's rounding is not in the way."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def inputs(B=1, H=1, n_queries=5, n_keys=5, d=4, seed=0, dtype=torch.float64):
    q = normal(B, H, n_queries, d, seed=seed, dtype=dtype)
    return q, *normal(2, B, H, n_keys, d, seed=seed + 1, dtype=dtype)


def by_hand(q, k, v, W, scale=None):
    """One softmax per query over a list of keys; no mask, no fill, nothing of the library."""
    past, scale = k.shape[2] - q.shape[2], 1 / math.sqrt(q.shape[3]) if scale is None else scale
    rows = []
    for i in range(q.shape[2]):
        keys = [j for j in range(k.shape[2]) if j <= past + i and j > past + i - W]
        powers = ((q[:, :, i, None] * k[:, :, keys]).sum(dim=-1) * scale).exp()  # (B, H, keys)
        rows.append((powers[..., None] * v[:, :, keys]).sum(dim=2) / powers.sum(dim=2, keepdim=True))
    return torch.stack(rows, dim=2)


class Kept:
    """The least that forward's past must be; `most`: how many tracks it remembers; rule: makes a mask for its keys."""

    def __init__(self, most=10**6, rule=None):
        self.pairs, self.most, self.rule = [], most, rule

    def append(self, k, v):
        self.pairs.append((k, v))
        recent = self.most + k.shape[2] - 1
        k, v = (torch.cat(parts, dim=2)[:, :, -recent:] for parts in zip(*self.pairs))
        return k, v, self.rule and self.rule(k.shape[2])


# --- the masks ---


@pytest.mark.parametrize("n", range(1, 65))
def test_a_band_is_its_definition(n):
    for W in range(1, n + 3):
        mask = banded_mask(n, n, W)
        assert mask.dtype == torch.bool
        assert mask.tolist() == [[0 <= i - j < W for j in range(n)] for i in range(n)]


@pytest.mark.parametrize("n_keys", [1, 2, 5, 16, 23])
def test_the_last_queries_of_a_band(n_keys):
    for n_queries in range(1, n_keys + 1):
        for W in range(1, n_keys + 3):
            past = n_keys - n_queries
            rule = [[0 <= past + i - j < W for j in range(n_keys)] for i in range(n_queries)]
            assert banded_mask(n_queries, n_keys, W).tolist() == rule


@pytest.mark.parametrize("W", [1, 4, 16, 99])
def test_others_count_the_query_itself_too(W):
    """GPT-Neo and gpt-oss, as transformers has them, mean by a window of W what we mean by a band of W."""
    from transformers import GPTNeoConfig
    from transformers.masking_utils import sliding_window_causal_mask_function
    from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoSelfAttention

    config = GPTNeoConfig(window_size=W, max_position_embeddings=16, hidden_size=16, num_heads=2)
    assert GPTNeoSelfAttention(config, "local", 0).bias[0, 0].equal(banded_mask(16, 16, W))
    places = torch.arange(16)
    assert sliding_window_causal_mask_function(W)(0, 0, places[:, None], places).equal(banded_mask(16, 16, W))


@pytest.mark.parametrize("n", range(1, 25))
def test_the_strided_pattern_is_the_papers(n):
    for stride in range(1, n + 3):
        first, second = strided_masks(n, stride)
        assert first.tolist() == [[max(0, i - stride) <= j <= i for j in range(n)] for i in range(n)]
        assert second.tolist() == [[j <= i and (i - j) % stride == 0 for j in range(n)] for i in range(n)]


@pytest.mark.parametrize("n", range(1, 21))
def test_the_fixed_pattern_is_the_papers(n):
    for block in range(1, n + 3):
        for summary in (c for c in range(1, block + 1) if block % c == 0):
            for head in range(block // summary + 2):
                start = block - summary * (head % (block // summary) + 1)  # head 0: the last places
                places = range(start, start + summary)
                first, second = fixed_masks(n, block, summary, head)
                assert first.tolist() == [[j <= i and j // block == i // block for j in range(n)] for i in range(n)]
                assert second.tolist() == [[j <= i and j % block in places for j in range(n)] for i in range(n)]


def test_heads_of_the_fixed_pattern_read_the_past_once():
    for block, summary in ((4, 1), (6, 2), (8, 8)):
        counts = sum(fixed_masks(20, block, summary, head)[1].long() for head in range(block // summary))
        assert counts.equal(torch.ones(20, 20, dtype=torch.long).tril())


def joined(masks):
    """Who reaches whom, by walking: sets of tracks, layer by layer from the top. A track always keeps itself."""
    reached = []
    for i in range(len(masks[0])):
        here = {i}
        for mask in reversed(masks):
            here |= {j for t in here for j in mask[t].nonzero().flatten().tolist()}
        reached.append(here)
    return reached


def test_two_layers_of_a_factorised_pattern_join_everything():
    for n, size in ((16, 4), (25, 5), (30, 6)):
        everything = [set(range(i + 1)) for i in range(n)]
        (near, far), (own, summaries) = strided_masks(n, size), fixed_masks(n, size, 1)
        assert joined([near, far]) == joined([far, near]) == joined([own, summaries]) == everything
        assert joined([summaries, own]) != everything
        assert all(joined([mask]) != everything for mask in (near, far, own, summaries, near | far, own | summaries))


@pytest.mark.parametrize("W", [1, 2, 3, 7, 40])
def test_reach_is_what_walking_finds(W):
    for n_layers in range(5):
        assert len(joined([banded_mask(40, 40, W)] * n_layers or [torch.eye(40)])[-1]) == min(40, reach(n_layers, W))
    assert reach(48, 256) == 12_241


# --- the three ways ---

cases = st.tuples(
    st.integers(1, 2),  # B
    st.integers(1, 3),  # H
    st.integers(1, 80),  # queries
    st.integers(0, 70),  # keys of earlier tokens
    st.integers(1, 9),  # d
    st.one_of(st.integers(1, 40), st.integers(1, 200)),  # W
    st.one_of(st.none(), st.floats(0.05, 1.5)),  # scale
    st.integers(0, 2**31),
)


@settings(max_examples=60, deadline=None)
@given(cases)
def test_all_ways_equal_one_softmax_per_query(case):
    B, H, n_queries, past, d, W, scale, seed = case
    q, k, v = inputs(B, H, n_queries, n_queries + past, d, seed)
    wanted = by_hand(q, k, v, W, scale)
    for how in ("mask", "blocks", "auto"):
        torch.testing.assert_close(attend_in_band(q, k, v, W, scale, how=how), wanted, msg=lambda m, h=how: f"{h}: {m}")


@settings(max_examples=12, deadline=None)
@given(cases)
def test_flex_equals_one_softmax_per_query(case):
    B, H, n_queries, past, d, W, scale, seed = case
    q, k, v = inputs(B, H, n_queries, n_queries + past, d, seed)
    torch.testing.assert_close(attend_in_band(q, k, v, W, scale, how="flex"), by_hand(q, k, v, W, scale))


@pytest.mark.parametrize("shortest", [1, 2, 32])
@pytest.mark.parametrize("n_queries", [1, 7, 12, 13])
def test_short_blocks_too(monkeypatch, shortest, n_queries):
    monkeypatch.setattr(sparse_attention, "SHORTEST_BLOCK", shortest)
    q, k, v = inputs(2, 2, n_queries, 13)
    for W in range(1, 16):
        torch.testing.assert_close(band_by_blocks(q, k, v, W), by_hand(q, k, v, W))


@pytest.mark.parametrize("how", ["mask", "blocks", "auto"])
@pytest.mark.parametrize(("T", "W"), [(1, 1), (70, 1), (97, 32), (97, 33), (64, 64), (65, 64), (50, 90)])
def test_gradients_equal_those_of_the_formula(how, T, W):
    ours, theirs = ([x.requires_grad_() for x in inputs(1, 2, T, T, 3, seed=T)] for _ in range(2))
    push = normal(1, 2, T, 3, seed=9)
    found = torch.autograd.grad(attend_in_band(*ours, W, how=how), ours, push)
    wanted = torch.autograd.grad(by_hand(*theirs, W), theirs, push)
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("W", [1, 16, 100, 300])
def test_float32_and_bfloat16(dtype, close, W):
    q, k, v = inputs(2, 2, 131, 131, 16)
    wanted = by_hand(q, k, v, W)
    grown = [x.to(dtype).requires_grad_() for x in (q, k, v)]
    for how in (*WAYS, "auto"):
        with torch.no_grad():
            out = attend_in_band(*grown, W, how=how)  # inputs that want a gradient: flex must cope
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), wanted, atol=close, rtol=close)
    slow, fast = (torch.autograd.grad(attend_in_band(*grown, W, how=how).sum(), grown) for how in ("mask", "blocks"))
    for a, b in zip(slow, fast):
        torch.testing.assert_close(a, b, atol=close, rtol=close)


@pytest.mark.parametrize("how", [*WAYS, "auto"])
def test_a_token_moves_its_band_and_nobody_else(how):
    q, k, v = inputs(1, 1, 90, 90, 8)
    k2, v2 = k.clone(), v.clone()
    k2[:, :, 40], v2[:, :, 40] = normal(2, 8, seed=5)
    moved = (attend_in_band(q, k, v, 7, how=how) - attend_in_band(q, k2, v2, 7, how=how)).abs().amax(dim=-1).flatten()
    assert moved.gt(1e-9).nonzero().flatten().tolist() == list(range(40, 47))


def test_one_key_is_the_value_itself():
    q, k, v = inputs(2, 2, 70, 70)
    for how in (*WAYS, "auto"):
        torch.testing.assert_close(attend_in_band(q, k, v, 1, how=how), v)


def test_a_band_over_everything_is_dense():
    q, k, v = inputs(1, 2, 9, 40)
    for how in (*WAYS, "auto"):
        for W in (40, 41, 1000):
            torch.testing.assert_close(attend_in_band(q, k, v, W, how=how), attend(q, k, v))


# --- which way is taken ---


def note_ways(monkeypatch):
    taken = []
    for name, way in list(WAYS.items()):
        monkeypatch.setitem(WAYS, name, lambda *inputs, n=name, w=way: taken.append(n) or w(*inputs))
    return taken


def test_how_is_obeyed_and_auto_picks(monkeypatch):
    taken, (q, k, v) = note_ways(monkeypatch), inputs(1, 1, 50, 50)
    for how in ("mask", "blocks", "flex", "auto"):
        attend_in_band(q, k, v, 4, how=how)
    assert taken == ["mask", "blocks", "flex", "blocks"]
    taken.clear()
    attend_in_band(q[:, :, -1:], k, v, 4)
    attend_in_band(q[:, :, -2:], k, v, 49)
    attend_in_band(q, k, v, 50)  # covers everything: plain attend
    assert taken == ["mask", "blocks"]
    monkeypatch.setattr(sparse_attention, "pick_way", lambda q: "flex")
    attend_in_band(q, k, v, 4)
    assert taken[-1] == "flex"


@pytest.mark.parametrize(
    ("cuda", "triton", "way"), [(0, 0, "blocks"), (0, 1, "blocks"), (1, 0, "blocks"), (1, 1, "flex")]
)
def test_flex_is_for_gpus_that_can_compile_it(monkeypatch, cuda, triton, way):
    found = object() if triton else None
    monkeypatch.setattr(sparse_attention.importlib.util, "find_spec", lambda name: found if name == "triton" else None)
    assert pick_way(types.SimpleNamespace(is_cuda=bool(cuda), shape=(1, 1, 5, 64))) == way
    assert (
        pick_way(types.SimpleNamespace(is_cuda=bool(cuda), shape=(1, 1, 5, 8))) == "blocks"
    )  # its heads are too narrow


def test_one_new_query_takes_the_mask():
    assert pick_way(torch.empty(2, 2, 1, 64)) == "mask"  # one row of scores: nothing to cut


@pytest.mark.parametrize(("n", "size", "W"), [(1, 4, 4), (2, 4, 1), (5, 4, 3), (3, 8, 8)])
def test_blocks_see_themselves_and_the_one_before(n, size, W):
    q, k, v = inputs(2, 3, n * size, n * size)
    cut = (x.reshape(6, n, size, 4) for x in (q, k, v))  # (B · H, n, size, d)
    torch.testing.assert_close(look_in_blocks(*cut, W).reshape(q.shape), by_hand(q, k, v, W))


@pytest.mark.parametrize("T", [1, 5, 8, 9])
def test_cut_into_blocks_with_zeros_behind(T):
    x = normal(2, 3, T, 4)
    cut = in_blocks(x, 4)
    assert cut.shape == (6, -(-T // 4), 4, 4)
    row = cut.reshape(2, 3, -1, 4)
    assert row[:, :, :T].equal(x) and not row[:, :, T:].any()


class Sizes(TorchDispatchMode):
    """Notes the number of elements of every tensor that an operation makes."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.numel())
        return out


def largest(how, T, W=16, H=1, d=4):
    """Elements of the largest tensor of a forward and backward pass."""
    grown = [x.requires_grad_() for x in inputs(1, H, T, T, d, dtype=torch.float32)]
    with Sizes() as sizes:
        attend_in_band(*grown, W, how=how).sum().backward()
    return sizes.largest


def test_blocks_never_make_a_square():
    assert largest("mask", 512) >= 512**2  # the ruler works
    assert largest("blocks", 512) < 512**2 / 16
    assert largest("blocks", 2048) <= 4.3 * largest("blocks", 512)
    assert largest("auto", 2048) == largest("blocks", 2048)
    assert largest("blocks", 64, W=10**4) == 64**2  # a band wider than the text is cut to the text


def test_flex_skips_what_lies_outside_the_band():
    mask = flex_mask(1024, 1024, 256, "cpu")
    kept = mask.to_dense()[0, 0]
    size = 1024 // len(kept)
    wanted = banded_mask(1024, 1024, 256).unflatten(0, (-1, size)).unflatten(2, (-1, size)).any(dim=3).any(dim=1)
    assert kept.bool().equal(wanted)
    assert flex_mask(1024, 1024, 256, "cpu") is mask  # built once
    flex_mask(3, 3, 1, "cpu")
    with pytest.raises(PatternError):
        flex_mask(3, 3, True, "cpu")  # True == 1, but a cache must not take it for 1


def test_flex_has_no_gradient_here_and_says_so():
    q, k, v = inputs(1, 1, 6, 6)
    for x in (q, k, v):
        x.requires_grad_()
        with pytest.raises(PatternError, match="FlexAttention has no gradient on cpu; use how='blocks' there"):
            attend_in_band(q, k, v, 3, how="flex")
        with torch.no_grad():
            torch.testing.assert_close(attend_in_band(q, k, v, 3, how="flex"), by_hand(q, k, v, 3))
        x.requires_grad_(False)


# --- errors ---


@pytest.mark.parametrize("wrong", [0, -1, 2.0, True, "3", None])
def test_what_is_no_width_is_refused(wrong):
    q, k, v = inputs()
    message = f"is {wrong!r}; it must be a whole number of at least 1"
    with pytest.raises(PatternError, match="size " + message):
        check_whole(size=wrong)
    for how in (*WAYS, "auto"):
        with pytest.raises(PatternError, match="bandwidth " + message):
            attend_in_band(q, k, v, wrong, how=how)
    for refuse in (
        lambda: banded_mask(3, 3, wrong),
        lambda: band_by_blocks(q, k, v, wrong),
        lambda: flex_mask(3, 3, wrong, "cpu"),
        lambda: BandedSelfAttention(8, 2, 4, wrong),
        lambda: banded_flops(3, 8, wrong),
    ):
        with pytest.raises(PatternError, match="bandwidth " + message):
            refuse()
    for name, refuse in {
        "n": lambda: strided_masks(wrong, 2),
        "stride": lambda: strided_masks(4, wrong),
        "block": lambda: fixed_masks(4, wrong, 1),
        "summary": lambda: fixed_masks(4, 2, wrong),
    }.items():
        with pytest.raises(PatternError, match=f"^{name} {message}"):
            refuse()


def test_other_named_errors():
    q, k, v = inputs()
    with pytest.raises(PatternError, match="summaries of 3 do not divide a block of 4; choose a divisor"):
        fixed_masks(8, 4, 3)
    with pytest.raises(PatternError, match="how is 'fast'; there are mask, blocks, flex and auto"):
        attend_in_band(q, k, v, 2, how="fast")
    with pytest.raises(ValueError, match="3 queries but only 2 keys"):
        banded_mask(3, 2, 1)
    assert issubclass(PatternError, ValueError)


# --- the layer ---


@pytest.mark.parametrize("scale", [None, 1.0])
@pytest.mark.parametrize("W", [1, 5, 32, 40])
def test_the_layer_is_its_formula(scale, W):
    torch.manual_seed(W)
    layer = BandedSelfAttention(12, 2, 4, W).double()
    layer.scale = scale or layer.scale
    x = normal(2, 37, 12)
    q, k, v = (w(x).reshape(2, 37, 2, 4).transpose(1, 2) for w in (layer.wq, layer.wk, layer.wv))
    wanted = layer.wo(by_hand(q, k, v, W, scale).transpose(1, 2).reshape(2, 37, 8))
    for how in ("auto", "mask", "blocks"):
        layer.how = how
        torch.testing.assert_close(layer(x), wanted)
    layer.how = "flex"
    with pytest.raises(PatternError, match="no gradient"):
        layer(x)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), wanted)


def test_the_layer_has_the_dense_layers_parameters():
    dense, banded = CausalSelfAttention(12, 3, 4).double(), BandedSelfAttention(12, 3, 4, 5).double()
    banded.load_state_dict(dense.state_dict())
    x = normal(1, 9, 12)
    moved = (dense(x) - banded(x)).abs().amax(dim=-1)[0] > 1e-7
    assert moved.tolist() == [False] * 5 + [True] * 4


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=6), st.integers(1, 9), st.booleans())
def test_in_bites_with_a_cache_equals_all_at_once(bites, W, forgets):
    layer = BandedSelfAttention(8, 2, 4, W).double()
    x, cache = normal(2, sum(bites), 8), Kept(W if forgets else 10**6)
    pieces = [layer(piece, cache) for piece in x.split(bites, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), layer(x))


def test_a_mask_from_the_past_takes_the_bands_place():
    """Whoever keeps the past may know better than the band: here every second key is hidden, however far."""
    torch.manual_seed(0)
    layer, x = BandedSelfAttention(8, 2, 4, 2).double(), normal(2, 6, 8)
    rule = lambda n_keys: torch.ones(6, n_keys, dtype=torch.bool).tril() & (torch.arange(n_keys) % 2 == 0)
    dense = CausalSelfAttention(8, 2, 4).double()
    dense.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x, Kept(rule=rule)), dense(x, Kept(rule=rule)))
    assert (layer(x, Kept(rule=rule)) - layer(x)).abs().amax() > 1e-3


@pytest.mark.parametrize(("n_layers", "W"), [(1, 1), (1, 6), (2, 6), (3, 6), (4, 2)])
def test_gradients_flow_as_far_as_reach_says(n_layers, W):
    torch.manual_seed(0)
    layers = [BandedSelfAttention(8, 2, 4, W) for _ in range(n_layers)]
    x = torch.randn(1, 40, 8, requires_grad=True)
    y = x
    for layer in layers:
        y = layer(y)
    y[0, -1].sum().backward()
    touched = x.grad[0].abs().amax(dim=-1) > 0
    assert touched.nonzero().flatten().tolist() == list(range(40 - reach(n_layers, W), 40))


@pytest.mark.parametrize(("kind", "T"), [("local", 29), ("global", 29), ("local", 5)])
def test_transformers_gpt_neo_outputs_and_gradients(kind, T):
    from transformers import GPTNeoConfig
    from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoAttention

    config = GPTNeoConfig(
        hidden_size=24, num_heads=3, num_layers=1, attention_types=[[[kind], 1]], window_size=7,
        max_position_embeddings=64, attention_dropout=0.0, resid_dropout=0.0, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(2)
    theirs = GPTNeoAttention(config, layer_id=0)
    ours = BandedSelfAttention(24, 3, 8, 7) if kind == "local" else CausalSelfAttention(24, 3, 8)
    ours.scale = 1.0  # GPT-Neo does not divide, and has no biases on queries, keys and values
    names = {"wq": "q_proj", "wk": "k_proj", "wv": "v_proj", "wo": "out_proj"}
    state = {f"{a}.weight": getattr(theirs.attention, b).weight for a, b in names.items()}
    state |= {f"{a}.bias": torch.zeros(24) for a in ("wq", "wk", "wv")} | {"wo.bias": theirs.attention.out_proj.bias}
    ours.load_state_dict(state)
    x1, x2 = (torch.randn(2, T, 24, generator=torch.Generator().manual_seed(3)).requires_grad_() for _ in range(2))
    y1, y2 = ours(x1), theirs(x2)[0]
    torch.testing.assert_close(y1, y2, atol=1e-5, rtol=1e-5)
    push = torch.randn_like(y1)
    y1.backward(push)
    y2.backward(push)
    torch.testing.assert_close(x1.grad, x2.grad, atol=1e-5, rtol=1e-5)
    for a, b in names.items():
        wanted = getattr(theirs.attention, b).weight.grad
        torch.testing.assert_close(getattr(ours, a).weight.grad, wanted, atol=1e-4, rtol=1e-4)


# --- what it costs ---


def test_flops_count_the_pairs_of_the_band():
    for T in (1, 2, 17, 64):
        for W in (1, 2, 16, 17, 18, 100):
            pairs = sum(0 <= i - j < W for i in range(T) for j in range(T))
            counted = banded_flops(T, 24, W)
            assert list(counted) == ["projections", "scores and mix"]
            assert counted["scores and mix"] == 4 * pairs * 24
            assert counted["projections"] == attention_flops(T, 24)["projections"]


@pytest.mark.parametrize("how", [*WAYS, "auto"])
def test_more_queries_than_keys_are_refused(how):
    q, k = torch.randn(1, 1, 40, 8), torch.randn(1, 1, 36, 8)
    with pytest.raises(PatternError, match="40 queries but only 36 keys"):
        attend_in_band(q, k, k, 4, how=how)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("how", ["auto", *WAYS])
@pytest.mark.parametrize("example", [1, 3, 9])
def test_a_traced_band_holds_for_other_lengths(how, example):
    x = torch.randn(2, 2, 40, 4, generator=torch.Generator().manual_seed(0))
    traced = torch.jit.trace(
        lambda q, k: attend_in_band(q, k, k, 4, how=how), (x[:, :, :example],) * 2, check_trace=False
    )
    for queries, keys in ((1, 1), (1, 9), (3, 3), (9, 9), (7, 40), (40, 40)):
        q, k = x[:, :, :queries], x[:, :, :keys]
        torch.testing.assert_close(traced(q, k), attend_in_band(q, k, k, 4, how="mask"))
