"""Attention against a triple loop, torch, transformers' GPT-2, and the rule that no track sees its future."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from gpt3lib.attention import (
    CausalSelfAttention,
    attend,
    attend_slowly,
    attention_flops,
    attention_weights,
    causal_mask,
)


def normal(*shape, seed=0):
    """Random numbers in float64, so that an oracle's rounding is not in the way."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_hand(q, k, v, mask=None, scale=None):
    """Attention in plain Python: three nested loops over lists, and nothing of torch."""
    q, k, v = q.tolist(), k.tolist(), v.tolist()
    past, out = len(k) - len(q), []
    for i, query in enumerate(q):
        seen, scores = [j for j in range(len(k)) if (mask[i][j] if mask else j <= past + i)], []
        for j in seen:
            score = sum(query[c] * k[j][c] for c in range(len(query)))
            scores.append(score / math.sqrt(len(query)) if scale is None else score * scale)
        powers = [math.exp(score - max(scores)) for score in scores]
        out.append([sum(p * v[j][c] for j, p in zip(seen, powers)) / sum(powers) for c in range(len(v[0]))])
    return torch.tensor(out, dtype=torch.float64)


class Kept:
    """The least that forward's past must be; with rule, it brings a mask of its own."""

    def __init__(self, rule=None):
        self.pairs, self.rule = [], rule

    def append(self, k, v):
        self.pairs.append((k, v))
        k, v = (torch.cat(parts, dim=2) for parts in zip(*self.pairs))
        return k, v, self.rule and self.rule(k.shape[2])


sizes = st.tuples(st.integers(1, 9), st.integers(0, 7), st.integers(1, 5), st.integers(0, 2**31))


@pytest.mark.parametrize("n_keys", range(1, 17))
def test_mask_is_the_definition(n_keys):
    for n_queries in range(1, n_keys + 1):
        past = n_keys - n_queries
        rule = [[j <= past + i for j in range(n_keys)] for i in range(n_queries)]
        mask = causal_mask(n_queries, n_keys)
        assert mask.dtype == torch.bool
        assert mask.tolist() == rule


def test_mask_on_a_device_and_its_error():
    assert causal_mask(3, 5, "meta").device.type == "meta"
    for look in (causal_mask, lambda n, m: attend(normal(n, 2), normal(m, 2), normal(m, 2))):
        with pytest.raises(ValueError, match="3 queries but only 2 keys; a query needs at least its own key"):
            look(3, 2)


@settings(max_examples=60, deadline=None)
@given(sizes)
def test_both_equal_the_triple_loop(size):
    n_queries, past, d_head, seed = size
    q = normal(n_queries, d_head, seed=seed)
    k, v = normal(2, n_queries + past, d_head, seed=seed + 1)
    wanted = by_hand(q, k, v)
    torch.testing.assert_close(attend_slowly(q, k, v), wanted)
    torch.testing.assert_close(attend(q[None, None], k[None, None], v[None, None])[0, 0], wanted)


@settings(max_examples=60, deadline=None)
@given(sizes, st.one_of(st.none(), st.floats(0.1, 2)), st.data())
def test_any_mask_and_any_scale(size, scale, data):
    n_queries, past, d_head, seed = size
    q = normal(n_queries, d_head, seed=seed)
    k, v = normal(2, n_queries + past, d_head, seed=seed + 1)
    rows = st.lists(st.booleans(), min_size=n_queries + past, max_size=n_queries + past).filter(any)
    rule = data.draw(st.one_of(st.none(), st.lists(rows, min_size=n_queries, max_size=n_queries)))
    mask, wanted = None if rule is None else torch.tensor(rule), by_hand(q, k, v, rule, scale)
    torch.testing.assert_close(attend_slowly(q, k, v, mask, scale), wanted)
    torch.testing.assert_close(attend(q[None, None], k[None, None], v[None, None], mask, scale)[0, 0], wanted)
    weights = attention_weights(q, k, mask, scale)
    torch.testing.assert_close(weights @ v, wanted)
    assert mask is None or not weights[~mask].any()


@pytest.mark.parametrize("n_queries", [1, 2, 7, 8])
def test_batch_and_heads_are_independent(n_queries):
    q, (k, v) = normal(2, 3, n_queries, 4), normal(2, 2, 3, 8, 4, seed=1)
    for function in (attend, attend_slowly):
        out = function(q, k, v)
        assert out.shape == (2, 3, n_queries, 4)
        for b in range(2):
            for h in range(3):
                torch.testing.assert_close(out[b, h], by_hand(q[b, h], k[b, h], v[b, h]))


def test_values_may_have_another_width():
    q, k, v = normal(5, 4), normal(5, 4, seed=1), normal(5, 7, seed=2)
    torch.testing.assert_close(attend_slowly(q, k, v), by_hand(q, k, v))


@settings(max_examples=40, deadline=None)
@given(sizes)
def test_weights_are_a_distribution_over_the_past(size):
    n_queries, past, d_head, seed = size
    weights = attention_weights(
        30 * normal(n_queries, d_head, seed=seed), normal(n_queries + past, d_head, seed=seed + 1)
    )
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(n_queries, dtype=torch.float64))
    assert weights.min() >= 0
    assert not weights[~causal_mask(n_queries, n_queries + past)].any()


def test_huge_scores_stay_finite():
    q, k, v = 1e4 * normal(6, 4), normal(6, 4, seed=1), normal(6, 4, seed=2)
    assert attend_slowly(q, k, v).isfinite().all()
    torch.testing.assert_close(attend(q[None, None], k[None, None], v[None, None])[0, 0], attend_slowly(q, k, v))


@pytest.mark.parametrize("n_queries", [1, 3, 12])
def test_torch_with_an_explicit_mask(n_queries):
    q, (k, v) = normal(2, 4, n_queries, 8), normal(2, 2, 4, 12, 8, seed=1)
    mask = torch.tensor([[j - i <= 12 - n_queries for j in range(12)] for i in range(n_queries)])
    wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(attend(q, k, v), wanted)
    torch.testing.assert_close(attend_slowly(q, k, v), wanted)


def test_no_matrix_of_weights_is_kept_for_the_backward_pass():
    """The reason for attend: what autograd stores must grow with T, not with T²."""
    kept = {}
    for T in (64, 128):
        q, k, v = (torch.randn(1, 1, T, 8, requires_grad=True) for _ in range(3))
        stored = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=stored: s.append(x.numel()) or x, lambda x: x):
            attend(q, k, v)
        kept[T] = sum(stored)
    assert kept[128] < 2.5 * kept[64]


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 12), st.sampled_from([(1, 8), (2, 4), (4, 2), (3, 5)]), st.data())
def test_the_future_leaves_the_past_alone(T, heads, data):
    n_heads, d_head = heads
    change = data.draw(st.integers(1, T - 1))
    torch.manual_seed(T)
    attention = CausalSelfAttention(16, n_heads, d_head).double()
    x = normal(2, T, 16)
    other = x.clone()
    other[:, change] += 1
    moved = (attention(x) - attention(other)).abs().amax(dim=(0, 2))
    assert (moved[:change] <= 1e-12).all()
    assert (moved[change:] > 1e-9).all()  # and everybody from there on does see it


def test_past_keys_and_values_are_a_set():
    q, k, v = normal(1, 8), normal(6, 8, seed=1), normal(6, 8, seed=2)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    torch.testing.assert_close(attend_slowly(q, k, v), attend_slowly(q, k[order], v[order]))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.sampled_from([(1, 8), (4, 4), (2, 3)]))
def test_in_bites_with_a_past_equals_all_at_once(bites, heads):
    attention = CausalSelfAttention(16, *heads).double()
    x, past = normal(2, sum(bites), 16), Kept()
    pieces = [attention(piece, past) for piece in x.split(bites, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), attention(x))
    k, v = past.pairs[0]
    assert k.shape == v.shape == (2, heads[0], bites[0], heads[1])


def layer_by_hand(attention, x, scale=None, rule=None):
    """A whole layer from the triple loop: head by head, text by text."""
    cut = (len(x), x.shape[1], -1, attention.d_head)
    q, k, v = (w(x).reshape(cut).transpose(1, 2) for w in (attention.wq, attention.wk, attention.wv))
    mixed = [[by_hand(*qkv, rule, scale) for qkv in zip(*text)] for text in zip(q, k, v)]
    mixed = torch.stack([torch.stack(text) for text in mixed])  # (B, n_heads, T, d_head)
    return attention.wo(mixed.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("scale", [None, 1.0, 0.3])
def test_the_layer_equals_the_triple_loop_at_any_scale(scale):
    """`scale` is an attribute that foreign models overwrite: GPT-Neo's scores are not divided."""
    attention, x = CausalSelfAttention(12, 3, 4).double(), normal(2, 7, 12)
    assert attention.scale == 0.5
    if scale is not None:
        attention.scale = scale
    torch.testing.assert_close(attention(x), layer_by_hand(attention, x, scale))


def test_what_look_does_decides_and_nothing_else():
    """A layer of another pattern overrides `look` alone."""

    class Itself(CausalSelfAttention):
        def look(self, q, k, v, mask=None):
            return v

    attention, x = Itself(12, 3, 4).double(), normal(2, 7, 12)
    torch.testing.assert_close(attention(x), attention.wo(attention.wv(x)))


def test_a_mask_from_the_past_goes_through():
    """Every second key is hidden by the past's own mask, as a batch of unequal texts does."""

    def rule(n):
        return causal_mask(n, n) & (torch.arange(n) % 2 == 0)

    attention, x = CausalSelfAttention(12, 3, 4).double(), normal(2, 7, 12)
    wanted = layer_by_hand(attention, x, rule=rule(7).tolist())
    torch.testing.assert_close(attention(x, Kept(rule)), wanted)
    assert (attention(x) - wanted).abs().max() > 1e-3


@pytest.mark.parametrize("n_queries", [1, 3, 6])
def test_under_autocast_attention_itself_stays_in_float32(n_queries):
    q, k, v = (normal(2, 2, n, 8).bfloat16().requires_grad_() for n in (n_queries, 6, 6))
    wanted = attend_slowly(q.double(), k.double(), v.double())
    for mask in (None, causal_mask(n_queries, 6)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = attend(q, k, v, mask)
        assert out.dtype == torch.float32
        torch.testing.assert_close(out.double(), wanted, atol=1e-6, rtol=1e-5)  # no 16 bits in between
        out.sum().backward()
        assert q.grad.dtype == torch.bfloat16
    assert attend(q, k, v).dtype == torch.bfloat16
    layer, x = CausalSelfAttention(16, 2, 8), torch.randn(1, 5, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


def test_heads_cut_the_width_and_keep_the_tracks():
    attention = CausalSelfAttention(6, 2, 3)
    x = torch.tensor([[[0, 1, 2, 3, 4, 5], [10, 11, 12, 13, 14, 15]]])
    assert attention.heads(x).tolist() == [[[[0, 1, 2], [10, 11, 12]], [[3, 4, 5], [13, 14, 15]]]]


def test_parameters_and_names():
    attention = CausalSelfAttention(16, 3, 5)
    shapes = {name: tuple(p.shape) for name, p in attention.named_parameters()}
    wanted = {"wo.weight": (16, 15), "wo.bias": (16,)}
    for name in ("wq", "wk", "wv"):
        wanted |= {f"{name}.weight": (15, 16), f"{name}.bias": (15,)}
    assert shapes == wanted
    x = torch.randn(1, 4, 16)
    assert torch.equal(attention.train()(x), attention.eval()(x))  # no dropout


def test_gpt3_sizes_on_meta():
    with torch.device("meta"):
        attention, x = CausalSelfAttention(12288, 96, 128), torch.empty(1, 2048, 12288)
    assert attention(x).shape == x.shape
    assert attention(x[:, :3], Kept()).shape == (1, 3, 12288)
    assert sum(p.numel() for p in attention.parameters()) == 604_028_928
    q, k = torch.empty(1, 2, 3, 8, device="meta"), torch.empty(1, 2, 7, 8, device="meta")
    for function in (attend, attend_slowly):
        out = function(q, k, k)
        assert out.shape == q.shape and out.device.type == "meta"


@pytest.mark.parametrize(("d_model", "n_heads", "T"), [(32, 4, 9), (48, 3, 17)])
def test_transformers_gpt2_outputs_and_gradients(d_model, n_heads, T):
    from transformers import GPT2Config
    from transformers.models.gpt2.modeling_gpt2 import GPT2Attention

    config = GPT2Config(n_embd=d_model, n_head=n_heads, n_positions=64, attn_pdrop=0.0, resid_pdrop=0.0)
    config._attn_implementation = "eager"
    torch.manual_seed(1)
    theirs, ours = GPT2Attention(config, layer_idx=0), CausalSelfAttention(d_model, n_heads, d_model // n_heads)
    three = (ours.wq, ours.wk, ours.wv)
    with torch.no_grad():
        theirs.c_attn.weight.copy_(torch.cat([w.weight for w in three]).T)  # Conv1D keeps the transpose
        theirs.c_attn.bias.copy_(torch.cat([w.bias for w in three]))
        theirs.c_proj.weight.copy_(ours.wo.weight.T)
        theirs.c_proj.bias.copy_(ours.wo.bias)
    x = torch.randn(2, T, d_model)
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    mask = torch.zeros(T, T).masked_fill(torch.ones(T, T).triu(1).bool(), torch.finfo(torch.float32).min)
    y1, y2 = ours(x1), theirs(x2, attention_mask=mask[None, None])[0]
    torch.testing.assert_close(y1, y2, atol=1e-5, rtol=1e-5)
    push = torch.randn_like(y1)
    y1.backward(push)
    y2.backward(push)
    close = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(x1.grad, x2.grad, **close)
    torch.testing.assert_close(torch.cat([w.weight.grad for w in three]), theirs.c_attn.weight.grad.T, **close)
    torch.testing.assert_close(torch.cat([w.bias.grad for w in three]), theirs.c_attn.bias.grad, **close)
    torch.testing.assert_close(ours.wo.weight.grad, theirs.c_proj.weight.grad.T, **close)
    torch.testing.assert_close(ours.wo.bias.grad, theirs.c_proj.bias.grad, **close)


@pytest.mark.parametrize(("d_model", "n_heads", "T"), [(64, 4, 32), (768, 12, 100), (12288, 96, 2048)])
def test_flops_equal_torchs_own_count(d_model, n_heads, T):
    with torch.device("meta"):
        attention, x = CausalSelfAttention(d_model, n_heads, d_model // n_heads), torch.empty(1, T, d_model)
        q = torch.empty(1, n_heads, T, d_model // n_heads)
    counted = attention_flops(T, d_model)
    assert list(counted) == ["projections", "scores and mix"]
    with FlopCounterMode(display=False) as counter:
        attention(x)
    assert counter.get_total_flops() == sum(counted.values())
    with FlopCounterMode(display=False) as counter:
        attend_slowly(q, q, q)
    assert counter.get_total_flops() == counted["scores and mix"]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("example", [(1, 1), (1, 5), (3, 3), (3, 5)])
def test_traced_attention_holds_for_other_sizes(example):
    q, k = normal(1, 2, 9, 4), normal(1, 2, 9, 4, seed=1)
    traced = torch.jit.trace(attend, (q[:, :, : example[0]], *[k[:, :, : example[1]]] * 2), check_trace=False)
    for queries, keys in ((1, 1), (1, 5), (3, 3), (3, 9), (9, 9)):
        now = q[:, :, :queries], k[:, :, :keys], k[:, :, :keys]
        torch.testing.assert_close(traced(*now), attend_slowly(*now))
