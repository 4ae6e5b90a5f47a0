"""Choosing and the plain loop against independent judges: brute force, transformers, chi-square."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from gpt3lib.generation import (
    PromptError,
    check_logits,
    check_settings,
    choose,
    generate_slowly,
    keep_top_k,
    keep_top_p,
    last_logits,
    scale,
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


# few different values, so that ties are common
rows = st.lists(st.sampled_from([-3.0, -1.0, 0.0, 0.5, 2.0, 4.0]), min_size=1, max_size=12)


# ---- one step ----


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


SHARES = [(3, 1, 1, 5), (1, 2, 7), (2, 2, 2, 2, 2), (6, 3, 1), (45, 30, 15, 9, 1), (7, 5, 4, 2, 1, 1), (1,) * 3000]


@pytest.mark.parametrize("shares", SHARES)
@pytest.mark.parametrize("shift", [0.0, 3.0, -20.0])
def test_top_p_at_sums_that_binary_cannot_hold(shares, shift):
    """p is each sum of the likeliest tokens, exactly: as many stay. The judge counts in fractions."""
    total, ordered = sum(shares), sorted(shares, reverse=True)
    logits = (torch.tensor(shares) / total).log() + shift
    for n, held in list(enumerate(itertools.accumulate(ordered), start=1))[:: max(1, len(shares) // 7)]:
        p = Fraction(held, total)
        ahead = [Fraction(sum(ordered[:i]), total) for i in range(n + 1) if i < len(ordered)]
        assert sum(a < p for a in ahead) == n
        assert keep_top_p(logits, float(p)).isfinite().sum() == n, (shares, p)


def test_top_p_of_the_report():
    kept = keep_top_p(torch.tensor([0.3, 0.1, 0.1, 0.5]).log(), 0.8)
    assert kept.isfinite().tolist() == [True, False, False, True]


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


# ---- whole texts ----


def test_last_logits_are_the_last_row():
    model = lively()
    tokens = prompts(model, 3, 5)
    torch.testing.assert_close(last_logits(model, tokens), model(tokens)[:, -1])


def test_greedy_by_brute_force_across_the_end_of_the_window():
    model, text = lively(n_ctx=6, d_head=8, vocab_size=50, seed=5), [3, 1, 4]
    for _ in range(12):
        with torch.no_grad():
            text.append(model(torch.tensor([text[-6:]]))[0, -1].argmax().item())
    assert generate_slowly(model, torch.tensor([[3, 1, 4]]), 12, temperature=0).tolist() == [text]
    assert len(set(text[3:])) > 3  # a text of one token would prove nothing


@pytest.mark.parametrize("seed", range(3))
def test_greedy_is_transformers_greedy(seed):
    model = lively(n_ctx=24, n_layers=3, seed=seed, attention=("dense",))
    start = prompts(model, 3, 4, seed)
    judge = to_gpt2(model)
    judge.generation_config.eos_token_id = None  # go on to the end
    everything = torch.ones_like(start)
    theirs = judge.generate(start, attention_mask=everything, max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert generate_slowly(model, start, 20, temperature=0).equal(theirs)


def test_same_seed_same_text_and_rows_differ():
    model = lively(n_ctx=16)
    start = prompts(model, 1, 2).expand(5, -1)
    one, two, other = (generate_slowly(model, start, 12, generator=dice(seed)) for seed in (1, 1, 2))
    assert one.equal(two) and not one.equal(other)
    assert len(one.unique(dim=0)) == 5


def test_what_has_left_the_window_is_forgotten():
    model = lively(n_ctx=4)
    text = generate_slowly(model, prompts(model, 2, 4), 10, temperature=0)
    for t in range(4, 14):
        assert generate_slowly(model, text[:, t - 4 : t], 1, temperature=0)[:, -1].equal(text[:, t])


def test_nothing_new_is_the_prompt():
    model = lively()
    start = prompts(model, 2, 8)
    assert generate_slowly(model, start, 0).equal(start)


def test_the_prompt_is_not_changed():
    model = lively()
    start = prompts(model, 2, 3)
    copy = start.clone()
    generate_slowly(model, start, 9)
    assert start.equal(copy)


def test_generate_on_half_precision_weights():
    model = lively(n_ctx=16).to(torch.bfloat16)
    assert generate_slowly(model, prompts(model, 2, 3), 12, 0.8, 10, 0.9, dice()).shape == (2, 15)


def test_sampled_texts_by_brute_force_across_the_end_of_the_window():
    model, text, ours, theirs = lively(n_ctx=6, vocab_size=50, seed=3), [3, 1, 4], dice(5), dice(5)
    out = generate_slowly(model, torch.tensor([text]), 12, 0.8, 20, 0.9, ours)
    for _ in range(12):
        with torch.no_grad():
            logits = keep_top_p(keep_top_k(scale(model(torch.tensor([text[-6:]]))[:, -1], 0.8), 20), 0.9)
        text.append(torch.multinomial(logits.softmax(-1), 1, generator=theirs).item())
    assert out.tolist() == [text] and len(set(text[3:])) > 3


def test_a_slow_text_is_useful_for_training():
    """no_grad, not inference_mode: what comes out may go into a loss, and no graph is kept."""
    model, graphs = lively(n_ctx=8), []
    hook = model.ln_f.register_forward_hook(lambda module, inputs, out: graphs.append(out.requires_grad))
    text = generate_slowly(model.train(), prompts(model, 2, 3), 4)
    hook.remove()
    assert graphs == [False] * 4 and not text.requires_grad and not text.is_inference()
    model.loss(text[:, :-1], text[:, 1:]).backward()
    assert model.training and all(parameter.grad is not None for parameter in model.parameters())


def test_the_slow_loop_reads_the_whole_window_each_time():
    model, seen = lively(n_ctx=8), []
    model.embeddings.register_forward_hook(lambda module, inputs, out: seen.append(out.shape[1]))
    generate_slowly(model, prompts(model, 2, 5), 6)
    assert seen == [5, 6, 7, 8, 8, 8]


# ---- errors ----

WRONG = [
    ({"temperature": -0.1}, "temperature is -0.1; use 0 for greedy, or a positive number"),
    ({"temperature": math.nan}, "temperature is nan"),
    ({"temperature": 10**400}, "temperature is 1000"),
    ({"temperature": INF}, "temperature is inf"),
    ({"top_k": 0}, "top_k is 0; at least 1 token must stay"),
    ({"top_p": 0}, "top_p is 0; it must be above 0 and at most 1"),
    ({"top_p": 1.01}, "top_p is 1.01"),
    ({"top_p": math.nan}, "top_p is nan"),
    ({"temperature": 0, "top_p": 2}, "top_p is 2"),
    *(({"temperature": bad}, "temperature is ") for bad in ("1", None, True, torch.tensor(1.0), [1.0], 1j)),
    *(({"top_k": bad}, "top_k is .*; at least 1 token must stay, a whole") for bad in (50.0, True, "5", math.nan, -1)),
    *(({"top_p": bad}, "top_p is ") for bad in ("0.9", True, [0.9], torch.tensor(0.9), -0.1, INF)),
    *(({"generator": bad}, r"generator is .*; it must be a torch\.Generator") for bad in (0, "cpu", torch.Generator)),
]


def test_numbers_of_numpy_are_numbers():
    logits = torch.randn(50, 30, generator=dice())
    ours = choose(logits, np.float32(0.5), np.int64(5), np.float64(0.9), dice(1))
    assert ours.equal(choose(logits, 0.5, 5, 0.9, dice(1)))
    assert choose(logits, np.int32(0), np.uint8(3)).equal(logits.argmax(-1))


@pytest.mark.parametrize(
    "tokens, error, message",
    [
        ([1, 2], PromptError, r"\(B, T\), got a list; for one prompt use torch.tensor\(\[ids\]\)"),
        (torch.tensor([1]), PromptError, r"got shape \(1,\)"),
        (torch.zeros(1, 0, dtype=torch.int64), PromptError, "the prompt is empty"),
        (torch.zeros(1, 2), TokenError, "must be integers"),
        (torch.tensor([[23]]), TokenError, "token id 23"),
    ],
)
def test_a_prompt_that_is_none(tokens, error, message):
    with pytest.raises(error, match=message):
        generate_slowly(lively(), tokens, 2)


def test_a_model_that_is_none():
    start = torch.tensor([[1, 2]])
    with pytest.raises(PromptError, match="the model is a Linear; it must be a GPT"):
        generate_slowly(torch.nn.Linear(2, 2), start, 2)
    with pytest.raises(PromptError, match="on the meta device and has no numbers"):
        generate_slowly(lively().to("meta"), start, 2)
    grown = lively()
    grown.embeddings.wte = torch.nn.Embedding(32, 8)
    with pytest.raises(PromptError, match="token table has 32 rows, its config says vocab_size = 23"):
        generate_slowly(grown, start, 2)
    short = lively()
    short.embeddings.wpe = torch.nn.Embedding(6, 8)
    with pytest.raises(PromptError, match="position table has 6 rows, its config says n_ctx = 8"):
        generate_slowly(short, start, 2)


@pytest.mark.parametrize("named, message", WRONG)
def test_wrong_settings(named, message):
    with pytest.raises(PromptError, match=message):
        choose(torch.zeros(1, 5), **named)
    with pytest.raises(PromptError, match=message):
        check_settings(**{"temperature": 1.0, "top_k": None, "top_p": None} | named)
    with pytest.raises(PromptError, match=message):
        generate_slowly(lively(), torch.zeros(1, 3, dtype=torch.int64), 0, **named)  # even for no token
    assert issubclass(PromptError, ValueError)


@pytest.mark.parametrize("wrong", [-1, 2.0, True, "2", None])
def test_the_number_of_new_tokens_is_a_whole_number(wrong):
    with pytest.raises(PromptError, match="max_new_tokens is .*; it must be a whole number, 0 or more"):
        generate_slowly(lively(), torch.tensor([[1]]), wrong)


@pytest.mark.parametrize("wrong", [[1.0, 2.0], torch.randn(4), torch.randn(1, 2, 4), np.zeros((1, 4)), None])
def test_logits_that_are_none(wrong):
    for temperature in (0, 1.0):
        with pytest.raises(PromptError, match=r"logits must be a tensor \(B, vocab_size\)"):
            choose(wrong, temperature)


def test_the_knives_look_at_their_settings():
    for knife, bad in ((keep_top_k, (0, 50.0, -1)), (keep_top_p, (0, math.nan, 1.5, "1"))):
        for value in bad:
            with pytest.raises(PromptError, match=f"top_. is {value!r}"):
                knife(torch.randn(2, 5), value)


def test_double_logits_stay_double():
    logits = torch.tensor([[1e300, 1.0, -1e300]], dtype=torch.float64)
    assert choose(logits, 0).tolist() == choose(logits, 1.0, generator=dice()).tolist() == [0]
    assert choose(logits, 1.0, 2, 0.9).tolist() == [0]
    near = torch.tensor([[1.0, 1.0 + 1e-12]], dtype=torch.float64)  # one number in float32
    assert choose(near, 0).tolist() == [1]


def test_logits_on_a_device_are_not_read_back():
    check_logits(torch.full((2, 5), math.nan, device="meta"))


def test_the_settings_that_are_allowed():
    model = lively()
    for named in ({"top_k": 1}, {"top_k": 23}, {"top_k": 999}, {"top_p": 1.0}, {"top_p": 1e-9}, {"temperature": 1e-40}):
        assert generate_slowly(model, prompts(model, 1, 8), 2, **named).shape == (1, 10)
