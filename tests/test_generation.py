"""Generation against independent judges: brute force, the slow twin, transformers, and chi-square."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from gpt3lib.embeddings import ContextError
from gpt3lib.generation import (
    KVCache,
    LayerCache,
    OneStep,
    PromptError,
    Reader,
    RingCache,
    cache_numbers,
    choose,
    generate,
    generate_slowly,
    is_plain,
    keep_top_k,
    keep_top_p,
    last_logits,
    read_in_portions,
    scale,
    stream,
)
from gpt3lib.model import GPT, GPTConfig
from gpt3lib.tokenization import TokenError
from oracles import to_gpt2

quick = settings(deadline=None, max_examples=30, derandomize=True)
INF = float("inf")


def lively(n_ctx=8, n_layers=2, n_heads=2, d_head=4, vocab_size=23, seed=0, **options):
    """A random model whose logits are far from equal, so that a wrong number changes a token."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(vocab_size, n_ctx, n_layers, n_heads * d_head, n_heads, d_head, **options)).eval()
    for name, parameter in model.named_parameters():
        if "ln_" not in name:  # a bias before the unembedding would give every text the same favourite
            torch.nn.init.normal_(parameter, std=0.7)
    return model


def dice(seed=0):
    return torch.Generator().manual_seed(seed)


def prompts(model, b, t, seed=0):
    return torch.randint(model.config.vocab_size, (b, t), generator=dice(seed))


models = st.builds(
    lively,
    n_ctx=st.integers(2, 10),
    n_layers=st.integers(1, 3),
    n_heads=st.integers(1, 3),
    d_head=st.sampled_from([2, 4, 8]),
    vocab_size=st.integers(2, 40),
    seed=st.integers(0, 99),
    attention=st.lists(st.sampled_from(["dense", "banded"]), min_size=1, max_size=3).map(tuple),
    bandwidth=st.integers(1, 6),
)
ways = st.sampled_from([{"temperature": 0}, {}, {"temperature": 0.6, "top_k": 3}, {"top_p": 0.85}, {"top_k": 1}])
# few different values, so that ties are common
rows = st.lists(st.sampled_from([-3.0, -1.0, 0.0, 0.5, 2.0, 4.0]), min_size=1, max_size=12)


# one step -----------------------------------------------------------------------------------------------------------


@quick
@given(rows, st.floats(0.05, 50))
def test_scale_is_the_softmax_with_a_temperature(row, t):
    weights = [math.exp(x / t - max(row) / t) for x in row]
    expected = torch.tensor([w / sum(weights) for w in weights])
    torch.testing.assert_close(scale(torch.tensor(row), t).softmax(-1), expected)


def test_scale_survives_tiny_temperatures_and_large_logits():
    logits = torch.tensor([[1e4, 1e4 - 1, -1e4], [3.0, 5.0, 5.0]])
    for t in (1e-3, 1e-30, 1e-45, 1e-300):
        assert scale(logits, t).softmax(-1).tolist() == [[1, 0, 0], [0, 0.5, 0.5]]
    assert scale(logits[1:], 1e30).softmax(-1).allclose(torch.full((1, 3), 1 / 3))


@quick
@given(rows, st.integers(1, 15))
def test_top_k_by_sorting(row, k):
    limit = sorted(row)[-min(k, len(row))]
    kept = keep_top_k(torch.tensor([row, row[::-1]]), k)
    assert kept[0].tolist() == [x if x >= limit else -INF for x in row]
    assert kept[1].tolist() == kept[0].tolist()[::-1]


@quick
@given(rows, st.floats(0.01, 1.0))
def test_top_p_by_sorting(row, p):
    total = sum(math.exp(x) for x in row)
    order = sorted(range(len(row)), key=lambda i: -row[i])  # stable: of tied tokens the first comes first
    kept = keep_top_p(torch.tensor([row]), p)[0].tolist()
    ahead = 0.0
    for i in order:
        if abs(ahead - p) > 1e-5 or p == 1:  # at the very boundary rounding decides
            assert kept[i] == (row[i] if ahead < p or p == 1 else -INF)
        ahead += math.exp(row[i]) / total
    assert kept[order[0]] == row[order[0]]


def test_top_p_at_the_boundary():
    half = torch.tensor([0.25, 0.5, 0.125, 0.125]).log()  # sums of these are exact in binary
    for p, stay in ((1e-300, [1]), (0.4, [1]), (0.5, [1]), (0.51, [0, 1]), (0.75, [0, 1]), (0.8, [0, 1, 2]), (0.9, 4)):
        kept = keep_top_p(half, p).isfinite().nonzero().flatten().tolist()
        assert kept == stay or len(kept) == stay
    far = torch.tensor([[0.0, -40.0]])  # in float32 the first already holds 1
    assert keep_top_p(far, 1.0).equal(far)


def test_top_p_in_half_precision_keeps_what_float32_keeps():
    logits = (2 * torch.randn(1, 20_000, generator=dice())).half()
    assert keep_top_p(logits, 0.85).isfinite().equal(keep_top_p(logits.float(), 0.85).isfinite())


@quick
@given(st.integers(0, 999), st.sampled_from([0.2, 0.5, 0.85, 0.99]), st.integers(1, 30), st.sampled_from([0.5, 1, 2.0]))
def test_the_cuts_of_transformers(seed, p, k, t):
    """Same rules, ties included for top-k. At top-p ties they may keep another of the tied tokens: none here."""
    logits = 3 * torch.randn(4, 30, generator=dice(seed))
    assert keep_top_k(logits, k).equal(TopKLogitsWarper(k)(None, logits))
    assert keep_top_p(logits, p).equal(TopPLogitsWarper(p)(None, logits))
    theirs = TopPLogitsWarper(p)(None, TopKLogitsWarper(k)(None, TemperatureLogitsWarper(float(t))(None, logits)))
    ours = keep_top_p(keep_top_k(scale(logits, t), k), p)
    torch.testing.assert_close(ours.softmax(-1), theirs.softmax(-1))


def test_choose_scales_then_cuts_by_k_then_by_p():
    row = torch.tensor([0.4, 0.25, 0.15, 0.1, 0.06, 0.04]).log()
    for t, k, p in ((2.0, None, 0.85), (0.5, None, 0.9), (1.0, 4, 0.85), (2.0, 4, 0.85)):
        weights = [math.exp(x / t) for x in row.tolist()][:k]  # already in descending order
        stay = sum(sum(weights[:i]) < p * sum(weights) for i in range(len(weights)))
        drawn = choose(row.expand(4000, -1), t, k, p, dice())
        assert drawn.unique().tolist() == list(range(stay)), (t, k, p)


@pytest.mark.parametrize("t, k, p", [(1.0, None, None), (0.5, None, None), (2.0, 4, None), (1.0, None, 0.85)])
def test_frequencies_by_chi_square(t, k, p):
    row = torch.tensor([1.0, 0.0, 2.0, -1.0, 0.5, -3.0])
    weights = [math.exp(x / t) for x in row.tolist()]
    order = sorted(range(6), key=lambda i: -weights[i])
    allowed = order[:k] if k else order
    if p:
        allowed = [i for n, i in enumerate(order) if sum(weights[j] for j in order[:n]) < p * sum(weights)]
    n, total = 20_000, sum(weights[i] for i in allowed)
    counts = choose(row.expand(n, -1), t, k, p, dice(4)).bincount(minlength=6).tolist()
    expected = {i: n * weights[i] / total for i in allowed}
    assert sum(counts[i] for i in allowed) == n
    chi_square = sum((counts[i] - e) ** 2 / e for i, e in expected.items())
    assert chi_square < 20.5  # at most 5 degrees of freedom: one in a thousand


def test_greedy_takes_the_likeliest_and_leaves_the_dice_alone():
    logits, generator = torch.randn(9, 30, generator=dice()), dice(1)
    state = generator.get_state()
    assert choose(logits, temperature=0, generator=generator).tolist() == [
        row.index(max(row)) for row in logits.tolist()
    ]
    assert generator.get_state().equal(state)
    assert choose(logits, temperature=1e-9, generator=generator).equal(logits.argmax(-1))


def test_half_precision_logits_are_drawn_in_float32():
    logits = torch.randn(2000, 500, generator=dice()).to(torch.bfloat16)
    for way in ({}, {"temperature": 0.7, "top_k": 50}, {"top_p": 0.9}):
        assert choose(logits, **way, generator=dice(1)).equal(choose(logits.float(), **way, generator=dice(1)))


@pytest.mark.parametrize("bad", [math.nan, INF])
@pytest.mark.parametrize("t", [0, 1.0])
def test_logits_that_are_no_numbers(bad, t):
    logits = torch.zeros(2, 5)
    logits[1, 3] = bad
    with pytest.raises(FloatingPointError, match="logits are not finite"):
        choose(logits, t)
    forbidden = torch.tensor([[-INF, 1.0, -INF]])  # forbidding tokens is fine
    assert choose(forbidden, t).tolist() == [1]


# whole texts --------------------------------------------------------------------------------------------------------


@quick
@given(models, st.integers(1, 3), st.integers(1, 10), st.integers(0, 15), ways, st.integers(0, 99))
def test_generate_is_its_slow_twin(model, b, t, n, way, seed):
    start = prompts(model, b, min(t, model.config.n_ctx), seed)
    fast = generate(model, start, n, **way, generator=dice(seed))
    assert fast.equal(generate_slowly(model, start, n, **way, generator=dice(seed)))
    assert fast.shape == (b, start.shape[1] + n) and fast.dtype == torch.int64
    assert fast[:, : start.shape[1]].equal(start)


def test_greedy_by_brute_force_across_the_end_of_the_window():
    model, text = lively(n_ctx=6, d_head=8, vocab_size=50, seed=3), [3, 1, 4]
    for _ in range(12):
        with torch.no_grad():
            text.append(model(torch.tensor([text[-6:]]))[0, -1].argmax().item())
    assert generate(model, torch.tensor([[3, 1, 4]]), 12, temperature=0).tolist() == [text]
    assert len(set(text[3:])) > 3  # a text of one token would prove nothing


@quick
@given(models, st.lists(st.integers(1, 4), min_size=1, max_size=6))
def test_cached_logits_at_every_position(model, portions):
    tokens = prompts(model, 2, model.config.n_ctx)
    cache, at = KVCache(model.config, model.config.n_ctx), 0
    with torch.no_grad():
        full = model(tokens)
        for size in [*portions, model.config.n_ctx]:
            part = tokens[:, at : at + size]
            if part.shape[1]:
                torch.testing.assert_close(model(part, cache), full[:, at : at + size], atol=1e-5, rtol=1e-4)
            at = min(at + size, model.config.n_ctx)
            assert cache.length == at and all(layer.length == at for layer in cache.layers)


def test_last_logits_are_the_last_row():
    model = lively()
    tokens = prompts(model, 3, 5)
    torch.testing.assert_close(last_logits(model, tokens), model(tokens)[:, -1])
    cache = KVCache(model.config, 5)
    last_logits(model, tokens[:, :4], cache)
    torch.testing.assert_close(last_logits(model, tokens[:, 4:], cache), model(tokens)[:, -1])


@pytest.mark.parametrize("seed", range(3))
def test_greedy_is_transformers_greedy(seed):
    model = lively(n_ctx=24, n_layers=3, seed=seed, attention=("dense",))
    start = prompts(model, 3, 4, seed)
    judge = to_gpt2(model)
    judge.generation_config.eos_token_id = None  # go on to the end
    everything = torch.ones_like(start)
    theirs = judge.generate(start, attention_mask=everything, max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert generate(model, start, 20, temperature=0).equal(theirs)


def test_same_seed_same_text_and_rows_differ():
    model = lively(n_ctx=16)
    start = prompts(model, 1, 2).expand(5, -1)
    one, two, other = (generate(model, start, 12, generator=dice(seed)) for seed in (1, 1, 2))
    assert one.equal(two) and not one.equal(other)
    assert len(one.unique(dim=0)) == 5


def test_what_has_left_the_window_is_forgotten():
    model = lively(n_ctx=4)
    text = generate(model, prompts(model, 2, 4), 10, temperature=0)
    for t in range(4, 14):
        assert generate(model, text[:, t - 4 : t], 1, temperature=0)[:, -1].equal(text[:, t])


def test_a_text_is_useful_for_training():
    """no_grad, not inference_mode: what comes out may go into a loss, and no graph is kept."""
    model, graphs = lively(n_ctx=8), []
    hook = model.ln_f.register_forward_hook(lambda module, inputs, out: graphs.append(out.requires_grad))
    for function in (generate_slowly, generate):
        text = function(model.train(), prompts(model, 2, 3), 4)
    hook.remove()
    assert graphs == [False] * 8 and not text.requires_grad and not text.is_inference()
    assert not Reader(model, 5)(prompts(model, 2, 3)).is_inference()
    model.loss(text[:, :-1], text[:, 1:]).backward()
    assert model.training and all(parameter.grad is not None for parameter in model.parameters())


def test_nothing_new_is_the_prompt():
    model = lively()
    start = prompts(model, 2, 8)
    assert generate(model, start, 0).equal(start) and generate_slowly(model, start, 0).equal(start)


def test_the_prompt_is_not_changed():
    model = lively()
    start = prompts(model, 2, 3)
    copy = start.clone()
    generate(model, start, 9)
    assert start.equal(copy)


@pytest.mark.parametrize("n, calls", [(0, []), (1, [5]), (4, [5, 1, 1, 1]), (6, [5, 1, 1, 1, 8, 8])])
def test_the_work_that_is_done(n, calls):
    """The prompt once, then one token a step; past the end of the window all of it."""
    model, seen = lively(n_ctx=8), []
    model.embeddings.register_forward_hook(
        lambda module, args, kwargs, out: seen.append(out.shape[1]), with_kwargs=True
    )
    generate(model, prompts(model, 2, 5), n)
    assert seen == calls


def test_generate_on_half_precision_weights():
    model = lively(n_ctx=16).to(torch.bfloat16)
    assert generate(model, prompts(model, 2, 3), 12, 0.8, 10, 0.9, dice()).shape == (2, 15)


# the cache ----------------------------------------------------------------------------------------------------------


def test_a_layer_cache_returns_all_that_came():
    cache, k = LayerCache(6), torch.randn(2, 3, 6, 4, generator=dice())
    for start, stop in ((0, 2), (2, 3), (3, 6)):
        keys, values = cache.append(k[:, :, start:stop], -k[:, :, start:stop])
        assert keys.equal(k[:, :, :stop]) and values.equal(-k[:, :, :stop])
    with pytest.raises(ContextError, match="7 tokens do not fit into a cache of 6 slots; make a larger one"):
        cache.append(k[:, :, :1], k[:, :, :1])
    assert cache.length == 6 and cache.keys.equal(k)


@pytest.mark.parametrize("t, n, slots", [(3, 2, 5), (3, 40, 8), (8, 1, 8)])
def test_the_cache_is_no_longer_than_the_text_or_the_window(monkeypatch, t, n, slots):
    made = []
    monkeypatch.setattr("gpt3lib.generation.KVCache", lambda *a, **b: made.append(KVCache(*a, **b)) or made[-1])
    generate(lively(n_ctx=8), prompts(lively(), 1, t), n)
    assert [len(made), made[0].layers[0].n_slots, made[0].layers[0].keys.shape[2]] == [1, slots, slots]
    assert made[0].layers[0].keys.numel() * 2 * 2 == 2 * 2 * 8 * slots  # 2 · n_layers · d_model a token


@quick
@given(st.integers(1, 7), st.lists(st.integers(1, 9), min_size=1, max_size=8), st.booleans())
def test_a_ring_returns_the_end_of_the_text(n_slots, portions, in_order):
    """All that the new tokens may look at; for a single token nothing else, and its order is free."""
    text = torch.randn(2, 3, sum(portions), 4, generator=dice())
    ring, at = RingCache(n_slots, in_order), 0
    for size in portions:
        keys, values = ring.append(text[:, :, at : at + size], -text[:, :, at : at + size])
        at += size
        wanted = text[:, :, max(0, at - size - n_slots + 1) : at]
        assert keys.equal(-values) and keys.shape == wanted.shape
        if size == 1 and not in_order:  # a stable order by what was stored
            keys, wanted = (x[:, :, x[0, 0, :, 0].argsort()] for x in (keys, wanted))
        assert keys.equal(wanted)
        assert ring.length == at and ring.keys.shape[2] == n_slots
        for c in range(max(0, at - n_slots), at):  # token c lies in slot c mod n_slots
            assert ring.keys[:, :, c % n_slots].equal(text[:, :, c])


def test_a_ring_does_not_hand_out_what_the_next_token_overwrites_too_early():
    ring, text = RingCache(3), torch.randn(1, 1, 8, 2, generator=dice())
    ring.append(text[:, :, :3], text[:, :, :3])
    keys, values = ring.append(text[:, :, 3:8], text[:, :, 3:8])
    assert keys.equal(text[:, :, 1:]) and values.equal(text[:, :, 1:])  # token 3 still sees 1 and 2


def test_each_layer_has_the_cache_of_its_kind():
    config = GPTConfig(23, 64, 3, 8, 2, 4, attention=("banded", "dense"), bandwidth=5)
    kinds = [(type(held), held.n_slots) for held in KVCache(config, 20).layers]
    assert kinds == [(RingCache, 5), (LayerCache, 20), (RingCache, 5)]
    assert [(type(held), held.n_slots) for held in KVCache(config, 5).layers] == [(LayerCache, 5)] * 3
    assert [held.in_order for held in KVCache(config, 9, padded=True).layers[::2]] == [True, True]
    assert [held.in_order for held in KVCache(config, 9).layers[::2]] == [False, False]


def test_a_band_wider_than_the_cache_forgets_nothing_in_silence():
    config = GPTConfig(23, 64, 1, 8, 2, 4, attention=("banded",), bandwidth=9)
    model, cache = GPT(config), KVCache(config, 4)
    model.hidden(torch.zeros(1, 4, dtype=torch.int64), cache)
    with pytest.raises(ContextError, match="5 tokens do not fit into a cache of 4 slots"):
        model.hidden(torch.zeros(1, 1, dtype=torch.int64), cache)


@quick
@given(models, st.integers(1, 40))
def test_cache_numbers_are_those_of_a_cache(model, n):
    cache, n = KVCache(model.config, min(n, model.config.n_ctx)), min(n, model.config.n_ctx)
    model.hidden(prompts(model, 1, n), cache)
    assert cache_numbers(model.config, n) == sum(2 * held.keys.numel() for held in cache.layers)


def test_cache_numbers_of_gpt3():
    config = GPTConfig.from_name("gpt3-175b")
    assert cache_numbers(replace(config, attention=("dense",)), 2048) == 2 * 96 * 12288 * 2048
    assert cache_numbers(config, 2048) == 2 * 48 * 12288 * (2048 + 256)
    assert cache_numbers(replace(config, attention=("banded",)), 2048) == 2 * 96 * 12288 * 256


@quick
@given(models, st.integers(1, 4), st.lists(st.integers(0, 2), min_size=1, max_size=4), st.booleans())
def test_selected_rows_go_on_as_themselves(model, t, rows, in_order):
    tokens, rows = prompts(model, 3, min(t, model.config.n_ctx - 1)), torch.tensor(rows)
    new = prompts(model, len(rows), 1, seed=1)
    cache = KVCache(model.config, model.config.n_ctx, in_order)
    with torch.no_grad():
        model.hidden(tokens, cache)
        cache.select(rows)
        full = last_logits(model, torch.cat([tokens[rows], new], dim=1))
        torch.testing.assert_close(last_logits(model, new, cache), full, atol=1e-5, rtol=1e-4)


# one step, written out ----------------------------------------------------------------------------------------------

OTHERS = [
    {},
    {"qkv_bias": False, "scaled": False},
    {"scaled": False},
    {"activation": "relu", "position_offset": 2},
    {"activation": "gelu", "attention": ("banded", "dense"), "bandwidth": 3},
    {"attention": ("banded",), "bandwidth": 1},
]


@pytest.mark.parametrize("options", OTHERS)
@pytest.mark.parametrize("pad", [None, torch.tensor([2, 0, 1])])
def test_one_step_is_last_logits(options, pad):
    model = lively(n_ctx=12, n_layers=3, **options)
    tokens = prompts(model, 3, 12)
    fast, slow = (KVCache(model.config, 12, padded=pad is not None) for _ in range(2))
    with torch.no_grad():
        for norm in (model.blocks[1].ln_1, model.blocks[2].ln_2, model.ln_f):
            norm.eps = 0.1  # whatever the norms say
        for cache in (fast, slow):
            model.hidden(tokens[:, :3], cache, pad)
        step = OneStep(model)
        for t in range(3, 12):
            ours = step(tokens[:, t : t + 1], fast, pad)
            torch.testing.assert_close(ours, last_logits(model, tokens[:, t : t + 1], slow, pad), atol=1e-5, rtol=1e-5)
            if pad is None:
                torch.testing.assert_close(ours, model(tokens[:, : t + 1])[:, -1], atol=1e-5, rtol=1e-4)


def test_one_step_copies_no_weight():
    model = lively()
    step = OneStep(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)  # a step made before sees the weights of now
        cache, tokens = KVCache(model.config, 4), prompts(model, 2, 1)
        torch.testing.assert_close(step(tokens, cache), last_logits(model, tokens))


class OwnMLP(torch.nn.Module):
    def forward(self, x):
        return torch.zeros_like(x)


def test_a_model_with_a_foreign_part_is_not_plain():
    assert is_plain(lively()) and is_plain(lively(attention=("banded",), bandwidth=2))
    model = lively()
    hook = model.blocks[1].ln_2.register_forward_hook(lambda *_: None)
    assert not is_plain(model)
    hook.remove()
    hook = model.blocks[0].register_forward_pre_hook(lambda *_: None)
    assert not is_plain(model)
    hook.remove()
    assert is_plain(model)
    with torch.autocast("cpu"):
        assert not is_plain(model)
    model.blocks[0].mlp.up = torch.nn.Sequential(model.blocks[0].mlp.up)
    assert not is_plain(model)


@pytest.mark.parametrize("t, n", [(3, 4), (3, 9)])
def test_foreign_parts_are_heard(t, n):
    """A replaced MLP, a hook that changes what flows: generate says what the slow twin says."""
    model = lively(seed=1)
    start = prompts(model, 2, t)
    before = generate(model, start, n, temperature=0)
    model.blocks[1].mlp = OwnMLP()
    other = generate(model, start, n, temperature=0)
    assert other.equal(generate_slowly(model, start, n, temperature=0)) and not other.equal(before)
    model = lively(seed=1)
    model.blocks[0].attention.register_forward_hook(lambda module, inputs, out: -out)
    other = generate(model, start, n, temperature=0)
    assert other.equal(generate_slowly(model, start, n, temperature=0)) and not other.equal(before)


def test_a_plain_model_does_not_go_through_its_modules(monkeypatch):
    model, calls = lively(n_ctx=16), []
    forward = torch.nn.LayerNorm.forward
    monkeypatch.setattr(torch.nn.LayerNorm, "forward", lambda *a: calls.append(1) or forward(*a))
    generate(model, prompts(model, 1, 3), 10)
    assert len(calls) == 5  # two layers and the end, for the prompt only


# the reader, and where texts end ------------------------------------------------------------------------------------


@quick
@given(models, st.lists(st.integers(0, 5), min_size=1, max_size=3), st.integers(0, 99))
def test_a_reader_at_every_length(model, empty, seed):
    """Against each text alone, without a cache: before and after the window slides."""
    n_ctx = model.config.n_ctx
    longest = min(n_ctx, max(empty) + 1)
    pad = torch.tensor(empty).clamp(max=longest - 1)
    read = Reader(model, n_ctx + 5, pad if pad.any() else None)
    text = prompts(model, len(empty), n_ctx + 5, seed)
    for t in range(longest, n_ctx + 5):
        logits = read(text[:, :t])
        for row, n in enumerate(pad.tolist()):
            alone = last_logits(model, text[row : row + 1, n:t][:, -n_ctx:])
            torch.testing.assert_close(logits[row : row + 1], alone, atol=1e-4, rtol=1e-4)


@quick
@given(models, st.integers(1, 4), st.integers(1, 9))
def test_portions_of_a_padded_prompt(model, size, t):
    t = min(t, model.config.n_ctx)
    tokens, pad = prompts(model, 3, t), torch.tensor([0, t - 1, t // 2])
    with torch.no_grad():
        caches = [KVCache(model.config, t, padded=True) for _ in range(2)]
        logits = read_in_portions(model, tokens, caches[0], pad, size)
        torch.testing.assert_close(logits, last_logits(model, tokens, caches[1], pad), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(logits, last_logits(model, tokens, pad=pad), atol=1e-5, rtol=1e-4)
    assert caches[0].length == t


def test_a_padded_prompt_is_read_in_portions_of_256_a_plain_one_at_once():
    model, seen = lively(n_ctx=600), []
    model.embeddings.register_forward_hook(lambda module, inputs, out: seen.append(out.shape[1]))
    for pad in (None, torch.tensor([1])):
        read_in_portions(model, prompts(model, 1, 520), KVCache(model.config, 600, pad is not None), pad)
    assert seen == [520, 256, 256, 8]


@quick
@given(models, st.integers(1, 4), st.integers(1, 10), st.integers(0, 15), ways, st.integers(0, 99))
def test_stop(model, b, t, n, way, seed):
    """Against the text without a stop: the same up to each row's first stop, then the stop, to the longest row."""
    start = prompts(model, b, min(t, model.config.n_ctx), seed)
    t, stop = start.shape[1], seed % model.config.vocab_size
    out = generate(model, start, n, **way, generator=dice(seed), stop=stop)[:, t:].tolist()
    if way.get("temperature") != 0 and b > 1:  # ended rows still throw, and read other tokens: only greedy compares
        free = out
    else:
        free = generate(model, start, n, **way, generator=dice(seed))[:, t:].tolist()
    longest = max((row.index(stop) + 1 if stop in row else n) for row in free) if n else 0
    for ended, row in zip(out, free):
        wanted = row[: row.index(stop)] if stop in row else row
        assert ended == wanted + [stop] * (longest - len(wanted))


def test_stop_saves_the_work():
    model = lively()
    text = generate(model, prompts(model, 1, 3), 9, temperature=0)[0, 3:].tolist()
    sign, steps = text[4], []
    for chosen in stream(model, prompts(model, 1, 3), 9, temperature=0, stop=sign):
        steps.append(chosen.tolist())
    assert steps == [[i] for i in text[: text.index(sign) + 1]]


def test_a_stream_is_lazy_and_its_tokens_are_those_of_generate():
    model, seen = lively(), []
    model.embeddings.register_forward_hook(lambda module, inputs, out: seen.append(1))
    steps = stream(model, prompts(model, 2, 3), 7, temperature=0)
    assert not seen
    first = next(steps)
    assert len(seen) == 1 and first.shape == (2,)
    columns = torch.stack([first, *steps], dim=1)
    assert columns.equal(generate(model, prompts(model, 2, 3), 7, temperature=0)[:, 3:])


@quick
@given(models, st.lists(st.integers(0, 7), min_size=1, max_size=4), st.integers(0, 12), st.integers(0, 99))
def test_padded_texts_are_what_they_are_alone(model, empty, n, seed):
    t = min(model.config.n_ctx, max(empty) + 1)
    pad = torch.tensor(empty).clamp(max=t - 1)
    start = prompts(model, len(empty), t, seed)
    out = generate(model, start, n, temperature=0, pad=pad)
    for row, gone in zip(range(len(empty)), pad.tolist()):
        alone = generate_slowly(model, start[row : row + 1, gone:], n, temperature=0)
        assert out[row, gone:].equal(alone[0])
    fillers = start.clone()
    for row, gone in enumerate(pad.tolist()):
        fillers[row, :gone] = (fillers[row, :gone] + 1) % model.config.vocab_size
    assert generate(model, fillers, n, temperature=0, pad=pad)[:, t:].equal(out[:, t:])


# errors -------------------------------------------------------------------------------------------------------------


class Untouchable:
    """A model that fails the test when it is asked to work."""

    config = GPTConfig(vocab_size=23, n_ctx=8, n_layers=2, d_model=8, n_heads=2, d_head=4)
    embeddings = SimpleNamespace(wte=SimpleNamespace(weight=torch.zeros(23, 8)))  # its device is looked at

    def __getattr__(self, name):
        raise AssertionError(f"{name} was used before the request was checked")


OK = torch.zeros(1, 3, dtype=torch.int64)
WRONG = [
    (([1, 2], 3), {}, PromptError, r"\(B, T\), got a list; for one prompt use torch.tensor\(\[ids\]\)"),
    ((OK[0], 3), {}, PromptError, r"\(B, T\), got shape \(3,\); for one prompt"),
    ((OK[None], 3), {}, PromptError, r"got shape \(1, 1, 3\)"),
    ((OK[:, :0], 3), {}, PromptError, "the prompt is empty; start a text from nothing with the end-of-text token"),
    ((OK.expand(3, 3).reshape(1, 9), 3), {}, ContextError, "the prompt has 9 tokens, the context 8; shorten it"),
    ((OK + 23, 3), {}, TokenError, "token id 23 is not in the vocabulary; ids go from 0 to 22"),
    ((OK - 1, 3), {}, TokenError, "token id -1 "),
    ((OK.float(), 3), {}, TokenError, "must be integers"),
    ((OK, -1), {}, PromptError, "max_new_tokens is -1; it must be 0 or more"),
    ((OK, 3), {"temperature": -0.1}, PromptError, "temperature is -0.1; use 0 for greedy, or a positive number"),
    ((OK, 3), {"temperature": math.nan}, PromptError, "temperature is nan"),
    ((OK, 3), {"temperature": INF}, PromptError, "temperature is inf"),
    ((OK, 3), {"top_k": 0}, PromptError, "top_k is 0; at least 1 token must stay"),
    ((OK, 3), {"top_p": 0}, PromptError, "top_p is 0; it must be above 0 and at most 1"),
    ((OK, 3), {"top_p": 1.01}, PromptError, "top_p is 1.01"),
    ((OK, 3), {"top_p": math.nan}, PromptError, "top_p is nan"),
    (
        (OK, 3),
        {"generator": SimpleNamespace(device=torch.device("cuda"))},
        PromptError,
        "the generator is on cuda, the tokens on cpu; put both on one device",
    ),
]
PADS = ([0], torch.tensor([3]), torch.tensor([-1]), torch.tensor([0, 0]), torch.tensor(0), torch.tensor([0.5]))
ENDED = [({"stop": stop}, f"stop is {stop!r}; it must be one token id, 0 to 22") for stop in (23, -1, True, "a", 1.0)]
ENDED += [({"pad": pad}, "pad must be a tensor of 1 whole numbers from 0 to 2, one for each prompt") for pad in PADS]


@pytest.mark.parametrize("named, message", ENDED)
def test_wrong_stops_and_pads(named, message):
    with pytest.raises(PromptError, match=message):
        generate(Untouchable(), OK, 3, **named)


@pytest.mark.parametrize("arguments, named, error, message", WRONG)
@pytest.mark.parametrize("function", [generate, generate_slowly])
def test_errors_come_before_any_work(function, arguments, named, error, message):
    with pytest.raises(error, match=message):
        function(Untouchable(), *arguments, **named)


@pytest.mark.parametrize("named", [{"temperature": -1}, {"top_k": 0}, {"top_p": 0}, {"temperature": 0, "top_p": 2}])
def test_choose_checks_its_settings(named):
    with pytest.raises(PromptError):
        choose(torch.zeros(1, 5), **named)


def test_the_edges_that_are_allowed():
    model = lively()
    for named in ({"top_k": 1}, {"top_k": 23}, {"top_k": 999}, {"top_p": 1.0}, {"top_p": 1e-9}, {"temperature": 1e-40}):
        assert generate(model, prompts(model, 1, 8), 2, **named).shape == (1, 10)
    assert issubclass(PromptError, ValueError)


def test_a_forward_put_on_a_part_is_not_gone_round():
    model = lively(n_ctx=32)
    down = model.blocks[0].mlp.down
    assert is_plain(model)
    down.forward = lambda x: torch.nn.functional.linear(x, down.weight, down.bias) * 3
    assert not is_plain(model)
    tokens = prompts(model, 2, 5)
    assert generate(model, tokens, 8, temperature=0).equal(generate_slowly(model, tokens, 8, temperature=0))


@pytest.mark.parametrize("wrong", [5.0, -1, True, "5"])
def test_the_number_of_new_tokens_is_a_whole_number(wrong):
    model = lively()
    with pytest.raises(PromptError, match="max_new_tokens is"):
        generate(model, prompts(model, 1, 3), wrong)


def test_tokens_and_model_on_two_devices_are_refused():
    model = lively()
    with pytest.raises(PromptError, match="the tokens are on meta, the model on cpu; use tokens.to"):
        generate(model, prompts(model, 1, 3).to("meta"), 2)
