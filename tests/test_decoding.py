"""Decoding against independent judges: each text alone, all texts there are, a search with lists, transformers."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt3lib import decoding
from gpt3lib.attention import CausalSelfAttention, causal_mask
from gpt3lib.cache import LayerCache, OneStep, Reader, RingCache, generate, stream
from gpt3lib.decoding import (
    PaddedCache,
    PaddedLayer,
    PaddedReader,
    beam_search,
    generate_many,
    hide_padding,
    pad_left,
    penalise,
    read_in_portions,
    until,
    whole_characters,
    write_on,
)
from gpt3lib.embeddings import ContextError
from gpt3lib.generation import PromptError, generate_slowly, last_logits
from gpt3lib.model import GPT, GPTConfig
from gpt3lib.sparse_attention import BandedSelfAttention
from gpt3lib.tokenization import TokenError, Tokenizer
from gpt3lib.weights import OtherConfig, OtherGPT
from oracles import to_gpt2

quick = settings(deadline=None, max_examples=40, derandomize=True)
TOKENIZER = Tokenizer.train("the king said be still and the sea was still, said the king; é é é", 280)


def lively(n_ctx=8, n_layers=2, n_heads=2, d_head=4, vocab_size=23, seed=0, make=GPT, shape=GPTConfig, **options):
    """A random model whose logits are far from equal, so that a wrong number changes a token."""
    torch.manual_seed(seed)
    model = make(shape(vocab_size, n_ctx, n_layers, n_heads * d_head, n_heads, d_head, **options)).eval()
    for name, parameter in model.named_parameters():
        if "ln_" not in name:
            torch.nn.init.normal_(parameter, std=0.7)
    return model


def dice(seed=0):
    return torch.Generator().manual_seed(seed)


def some_models(vocab_size):
    kinds = st.lists(st.sampled_from(["dense", "banded"]), min_size=1, max_size=3).map(tuple)
    return st.builds(
        lively,
        n_ctx=st.integers(2, 10),
        n_layers=st.integers(1, 3),
        vocab_size=vocab_size,
        seed=st.integers(0, 99),
        attention=kinds,
        bandwidth=st.integers(1, 6),
    )


models = some_models(st.integers(2, 30))
tiny_models = some_models(st.integers(2, 4))


# many prompts -------------------------------------------------------------------------------------------------------


@quick
@given(st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=9), min_size=1, max_size=5), st.integers(0, 9))
def test_padding_is_in_front(prompts, fill):
    tokens, pad = pad_left(prompts, fill)
    assert tokens.dtype == pad.dtype == torch.int64
    assert tokens.shape == (len(prompts), max(map(len, prompts)))
    for row, empty, ids in zip(tokens.tolist(), pad.tolist(), prompts):
        assert row[empty:] == ids and row[:empty] == [fill] * empty


def test_until():
    assert until([3, 1, 4, 1], 1) == [3] and until([3, 1], 5) == [3, 1]
    assert until([1, 3], 1) == [] and until([0, 3], None) == [0, 3] and until([], 1) == []


@quick
@given(
    models, st.lists(st.integers(1, 10), min_size=1, max_size=4), st.integers(0, 14), st.booleans(), st.integers(0, 99)
)
def test_many_prompts_are_each_as_alone(model, lengths, n, ends, seed):
    vocab_size, n_ctx = model.config.vocab_size, model.config.n_ctx
    prompts = [torch.randint(vocab_size, (min(t, n_ctx),), generator=dice(seed + t)).tolist() for t in lengths]
    stop = seed % vocab_size if ends else None
    together = generate_many(model, prompts, n, temperature=0, stop=stop)
    for ids, new in zip(prompts, together, strict=True):
        alone = generate_slowly(model, torch.tensor([ids]), n, temperature=0)[0, len(ids) :].tolist()
        assert new == (alone[: alone.index(stop)] if stop in alone else alone)


@pytest.mark.parametrize("seed", range(3))
def test_many_prompts_are_those_of_transformers(seed):
    model = lively(n_ctx=32, n_layers=3, seed=seed, attention=("dense",))
    prompts = [[5], [3, 1, 4, 1, 5, 9, 2], [6, 5, 3], [5, 8, 9, 7]]
    tokens = torch.tensor([[0] * (7 - len(ids)) + ids for ids in prompts])
    there = torch.tensor([[0] * (7 - len(ids)) + [1] * len(ids) for ids in prompts])
    judge = to_gpt2(model)
    judge.generation_config.eos_token_id = None  # go on to the end
    theirs = judge.generate(tokens, attention_mask=there, max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert generate_many(model, prompts, 20, temperature=0) == theirs[:, 7:].tolist()


def test_many_prompts_take_the_ways_of_generate():
    model, prompts = lively(vocab_size=60), [[3, 1], [7, 2], [5, 5]]
    for way in ({}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.5}, {"temperature": 2.0, "top_k": 9, "top_p": 0.9}):
        expected = generate(model, torch.tensor(prompts), 6, **way, generator=dice(1))[:, 2:].tolist()
        assert generate_many(model, prompts, 6, **way, generator=dice(1)) == expected
    twins = generate_many(model, [[3], [3, 1], [3], [3, 1]], 6, generator=dice(2))
    assert twins[0] != twins[2] and twins[1] != twins[3]


def test_prompts_of_one_length_need_no_mask(monkeypatch):
    made = []
    for name in ("Reader", "PaddedReader"):
        real = getattr(decoding, name)
        monkeypatch.setattr(decoding, name, lambda *a, real=real: made.append(real.__name__) or real(*a))
    generate_many(lively(), [[1, 2], [3, 4]], 2)
    generate_many(lively(), [[1, 2], [3]], 2)
    assert made == ["Reader", "PaddedReader"]


@pytest.mark.parametrize(
    "prompts, error, message",
    [
        ([], PromptError, "there are no prompts; start a text from nothing with the end-of-text token"),
        ([[1], [], [2]], PromptError, "prompt 1 is empty; start a text"),
        (["a"], PromptError, "prompts must be a list of lists of ids; encode each text first"),
        ("text", PromptError, "prompts must be a list of lists"),
        *((bad, PromptError, "prompts must be a list of lists of ids") for bad in ([1, 2], None, 3, b"ab", {1: [2]})),
        *(
            ([[1], bad], PromptError, "prompts must be a list of lists of ids")
            for bad in ("a", [1.0], [True], 3, [[1]])
        ),
        (torch.zeros(1, 2), PromptError, "prompts must be a list of lists"),
        ([[2**70]], PromptError, "prompts must be a list of lists"),
        ([[1], [-1]], TokenError, "token id -1"),
        ([[1], [23]], TokenError, "token id 23"),
        ([[1] * 9, [1]], ContextError, "the prompt has 9 tokens, the context 8"),
    ],
)
def test_wrong_prompts(prompts, error, message):
    with pytest.raises(error, match=message):
        generate_many(lively(), prompts, 3)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_each_text_is_as_alone_up_to_rounding(kind):
    """The logits, not only the tokens: their distance is rounding, so only near-ties can fall otherwise."""
    model = lively(n_ctx=16, n_layers=3, bandwidth=3).to(kind)
    tokens, pad = pad_left([[5], [3, 1, 4, 1, 5, 9, 2], [6, 5, 3]])
    read = PaddedReader(model, 16, pad)
    while tokens.shape[1] < 16:
        together = read(tokens)
        with torch.no_grad():
            for row, n in enumerate(pad.tolist()):
                alone = last_logits(model, tokens[row : row + 1, n:])[0]
                assert (together[row] - alone).abs().max() < 200 * torch.finfo(kind).eps * alone.abs().max()
        tokens = torch.cat([tokens, together.argmax(-1, keepdim=True)], dim=1)


def test_prompts_of_many_kinds():
    model, ids = lively(), [[3, 1], [7]]
    expected = generate_many(model, ids, 6, temperature=0)
    for prompts in (
        tuple(map(tuple, ids)),
        [torch.tensor(row) for row in ids],
        [torch.tensor(row, dtype=torch.int32) for row in ids],
        [np.array(row) for row in ids],
        [[np.int64(i) for i in row] for row in ids],
        (iter(row) for row in ids),
    ):
        assert generate_many(model, prompts, np.int64(6), temperature=0) == expected
    both = generate_many(model, [[3, 1], [7, 2]], 6, temperature=0)
    assert generate_many(model, torch.tensor([[3, 1], [7, 2]]), 6, temperature=0) == both
    assert all(type(i) is int for row in both for i in row)


# padded caches ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_keys", range(1, 8))
def test_padding_hides_the_empty_tracks_and_leaves_nobody_alone(n_keys):
    for n_queries in range(1, n_keys + 1):
        past, pad = n_keys - n_queries, list(range(n_keys + 1))
        for inner in (causal_mask(n_queries, n_keys), torch.eye(n_keys, dtype=torch.bool)[past:]):
            mask = hide_padding(inner, torch.tensor(pad))
            assert mask.shape == (len(pad), 1, n_queries, n_keys)
            for b, empty in enumerate(pad):
                wanted = [
                    [(bool(inner[i, j]) and j >= empty) or j == past + i for j in range(n_keys)]
                    for i in range(n_queries)
                ]
                assert mask[b, 0].tolist() == wanted
    assert hide_padding(causal_mask(3, 3), torch.tensor([-2])).equal(causal_mask(3, 3)[None, None])


def normal(*shape):
    """Random numbers in float64, so that rounding is not in the way."""
    return torch.randn(*shape, generator=dice(), dtype=torch.float64)


LAYERS = [
    (lambda: CausalSelfAttention(8, 2, 4), None),
    (lambda: BandedSelfAttention(8, 2, 4, 3), 3),
    (lambda: BandedSelfAttention(8, 2, 4, 1), 1),
]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.sampled_from(LAYERS),
    st.lists(st.integers(0, 6), min_size=1, max_size=4),
    st.lists(st.integers(1, 5), min_size=1, max_size=5),
    st.booleans(),
)
def test_a_padded_batch_equals_each_text_alone(kind, pad, bites, scaled):
    """In one piece and in portions, dense and in bands, from slots and from a ring, with either scale."""
    make, bandwidth = kind
    attention, n = make().double(), max(pad) + sum(bites)
    attention.scale = attention.scale if scaled else 1.0
    x = normal(len(pad), n, 8)
    kept = [LayerCache(n)] if bandwidth is None else [LayerCache(n), RingCache(bandwidth, in_order=True)]
    for cache in kept:
        past = PaddedLayer(cache, torch.tensor(pad), bandwidth)
        parts = [attention(part, past) for part in x.split([max(pad) + bites[0], *bites[1:]], dim=1)]
        out = torch.cat(parts, dim=1)
        assert out.isfinite().all() and past.length == n
        for b, empty in enumerate(pad):
            torch.testing.assert_close(out[b : b + 1, empty:], attention(x[b : b + 1, empty:]))


@quick
@given(models, st.lists(st.integers(0, 5), min_size=1, max_size=3), st.integers(0, 99))
def test_a_padded_reader_at_every_length(model, empty, seed):
    """Against each text alone, without a cache: before and after the window slides."""
    n_ctx = model.config.n_ctx
    longest = min(n_ctx, max(empty) + 1)
    pad = torch.tensor(empty).clamp(max=longest - 1)
    read = PaddedReader(model, n_ctx + 5, pad)
    text = torch.randint(model.config.vocab_size, (len(empty), n_ctx + 5), generator=dice(seed))
    with torch.no_grad():
        for t in range(longest, n_ctx + 5):
            logits = read(text[:, :t])
            for row, n in enumerate(pad.tolist()):
                alone = last_logits(model, text[row : row + 1, n:t][:, -n_ctx:])
                torch.testing.assert_close(logits[row : row + 1], alone, atol=1e-4, rtol=1e-4)


@quick
@given(models, st.integers(1, 4), st.integers(1, 9))
def test_portions_of_a_padded_prompt(model, size, t):
    t = min(t, model.config.n_ctx)
    tokens = torch.randint(model.config.vocab_size, (3, t), generator=dice())
    pad = torch.tensor([0, t - 1, t // 2])
    with torch.no_grad():
        caches = [PaddedCache(model.config, t, pad) for _ in range(2)]
        logits = read_in_portions(model, tokens, caches[0], size)
        torch.testing.assert_close(logits, last_logits(model, tokens, caches[1]), atol=1e-5, rtol=1e-4)
        for row, n in enumerate(pad.tolist()):
            alone = last_logits(model, tokens[row : row + 1, n:])
            torch.testing.assert_close(logits[row : row + 1], alone, atol=1e-5, rtol=1e-4)
    assert caches[0].length == t


def test_a_padded_prompt_is_read_in_portions_of_256_a_plain_one_at_once(monkeypatch):
    model, seen, embed = lively(n_ctx=600), [], torch.nn.functional.embedding
    monkeypatch.setattr(torch.nn.functional, "embedding", lambda *a: seen.append(a[0].shape[-1]) or embed(*a))
    tokens = torch.ones(1, 520, dtype=torch.int64)
    Reader(model, 600)(tokens)
    PaddedReader(model, 600, torch.tensor([1]))(tokens)
    assert seen[::2] == seen[1::2] == [520, 256, 256, 8]


@pytest.mark.parametrize("n", [0, 5, 12])
def test_what_stands_on_empty_tracks_is_never_read(n):
    model, pad = lively(attention=("banded", "dense"), bandwidth=2), torch.tensor([2, 0, 3])
    tokens, other = torch.randint(23, (3, 4), generator=dice()), None
    for fill in (0, 22):
        start = tokens.where(torch.arange(4) >= pad[:, None], fill)
        steps = stream(PaddedReader(model, 4 + n, pad), start, n, 0, None, None, None, None)
        new = [step.tolist() for step in steps]
        assert other is None or new == other
        other = new


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"qkv_bias": False, "scaled": False},
        {"activation": "relu", "position_offset": 2},
        {"activation": "gelu", "attention": ("banded", "dense"), "bandwidth": 3},
        {"attention": ("banded",), "bandwidth": 1},
    ],
)
def test_one_step_of_padded_texts_is_last_logits(options):
    model = lively(n_ctx=12, n_layers=3, make=OtherGPT, shape=OtherConfig, **options)
    tokens, pad = torch.randint(23, (3, 12), generator=dice()), torch.tensor([2, 0, 1])
    fast, slow = (PaddedCache(model.config, 12, pad) for _ in range(2))
    with torch.no_grad():
        for cache in (fast, slow):
            model.hidden(tokens[:, :3], cache)
        step = OneStep(model)
        for t in range(3, 12):
            new = tokens[:, t : t + 1]
            torch.testing.assert_close(step(new, fast), last_logits(model, new, slow), atol=1e-5, rtol=1e-5)


def test_a_padded_cache_knows_its_tracks_and_keeps_order():
    config = GPTConfig(23, 64, 3, 8, 2, 4, attention=("banded", "dense"), bandwidth=5)
    cache = PaddedCache(config, 20, torch.tensor([2, 0]))
    assert cache.tracks(torch.zeros(2, 4)).tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]
    assert [layer.bandwidth for layer in cache.layers] == [5, None, 5]
    assert [layer.cache.in_order for layer in cache.layers[::2]] == [True, True]
    lively(n_ctx=64, n_layers=3, attention=("banded", "dense"), bandwidth=5).hidden(torch.ones(2, 9).long(), cache)
    assert cache.length == 9 and cache.tracks(torch.zeros(2, 1)).tolist() == [[7], [9]]


# reading along ------------------------------------------------------------------------------------------------------


@quick
@given(st.lists(st.integers(0, TOKENIZER.vocab_size - 1), max_size=20))
def test_pieces_of_any_tokens_are_the_decoded_text(ids):
    assert "".join(whole_characters(TOKENIZER, ids)) == TOKENIZER.decode(ids)


@quick
@given(st.text(max_size=12))
def test_pieces_of_a_text_are_whole_characters(text):
    text = text.encode("utf-8", "replace").decode()
    pieces = [*whole_characters(TOKENIZER, TOKENIZER.encode(text))]
    assert "".join(pieces) == text and all(pieces)
    assert all(piece in text for piece in pieces)


def test_a_letter_is_held_back_until_it_is_whole():
    shown, asked = [], []
    ids = TOKENIZER.encode("a好b")
    pieces = whole_characters(TOKENIZER, (asked.append(i) or i for i in ids))
    for piece in pieces:
        shown.append((piece, len(asked)))
    assert len(ids) == 5 and shown == [("a", 1), ("好", 4), ("b", 5)]
    assert [*whole_characters(TOKENIZER, ids[:3])] == ["a", "\ufffd"]


@pytest.mark.parametrize("way", [{"temperature": 0}, {}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.5}])
def test_writing_on_is_generate_decoded(way):
    model = lively(n_ctx=16, vocab_size=TOKENIZER.vocab_size)
    ids = TOKENIZER.encode("the king é")
    expected = generate(model, torch.tensor([ids]), 25, **way, generator=dice(3))[0, len(ids) :].tolist()
    pieces = [*write_on(model, TOKENIZER, "the king é", 25, **way, generator=dice(3))]
    assert "".join(pieces) == TOKENIZER.decode(expected) and len(pieces) > 3
    stop = expected[5]
    pieces = [*write_on(model, TOKENIZER, "the king é", 25, **way, generator=dice(3), stop=stop)]
    assert "".join(pieces) == TOKENIZER.decode(expected[: expected.index(stop)])


def test_writing_on_is_lazy_but_its_errors_are_not(monkeypatch):
    model, read = lively(n_ctx=16, vocab_size=TOKENIZER.vocab_size), []
    call = Reader.__call__
    monkeypatch.setattr(Reader, "__call__", lambda *a: read.append(1) or call(*a))
    pieces = write_on(model, TOKENIZER, "the", 9, temperature=0)
    assert not read
    next(pieces)
    assert 1 <= len(read) < 9
    for prompt, named, error, message in (
        ("", {}, PromptError, "the prompt is empty"),
        ("the", {"top_k": 0}, PromptError, "top_k is 0"),
        ("the", {"temperature": -1}, PromptError, "temperature is -1"),
        ("the", {"top_p": 2}, PromptError, "top_p is 2"),
        ("the", {"stop": 9999}, PromptError, "stop is 9999"),
        ("x" * 20, {}, ContextError, "the prompt has 20 tokens, the context 16"),
    ):
        with pytest.raises(error, match=message):
            write_on(model, TOKENIZER, prompt, 5, **named)
    with pytest.raises(TypeError, match="a tokenizer reads a string, not list"):
        write_on(model, TOKENIZER, [1, 2], 5)
    with pytest.raises(PromptError, match="the tokenizer is a str without decode_bytes, vocab_size"):
        write_on(model, "gpt2", "the", 5)
    with pytest.raises(TokenError, match="is not in the vocabulary; ids go from 0 to 22"):
        write_on(lively(), TOKENIZER, "the", 5)


@pytest.mark.parametrize("extra", [0, 1, 40])
@pytest.mark.parametrize("way", [{"temperature": 0}, {}, {"top_k": 3}, {"top_p": 0.5}])
def test_ids_without_a_text_are_never_written(extra, way):
    """A model with more rows than its tokenizer has ids writes what it writes with those rows taken away."""
    n = TOKENIZER.vocab_size
    model, small = lively(n_ctx=16, vocab_size=n + extra), lively(n_ctx=16, vocab_size=n)
    weights = model.state_dict() | {"embeddings.wte.weight": model.embeddings.wte.weight[:n].clone()}
    small.load_state_dict(weights)
    if extra:
        model.embeddings.wte.weight.data[n:] *= 9  # the favourites
        start = torch.tensor([TOKENIZER.encode("the king")])
        assert generate(model, start, 20, temperature=0).max() >= n
    written = "".join(write_on(model, TOKENIZER, "the king", 20, **way, generator=dice(1)))
    assert written == "".join(write_on(small, TOKENIZER, "the king", 20, **way, generator=dice(1)))


@pytest.mark.parametrize("none", [None, "gpt2", torch.nn.Linear(2, 2), GPT])
def test_models_that_are_none(none):
    message = f"the model is a {type(none).__name__}; it must be a GPT"
    with pytest.raises(PromptError, match=message):
        generate_many(none, [[1]], 2)
    with pytest.raises(PromptError, match=message):
        write_on(none, TOKENIZER, "the", 2)
    with pytest.raises(PromptError, match=message):
        beam_search(none, torch.tensor([[1]]), 2)


def test_small_numbers_of_numpy_do_not_overflow():
    model, start = lively(), torch.tensor([[1]])
    right = beam_search(model, start, 255, 2, 1.0, stop=5)
    assert beam_search(model, start, np.uint8(255), np.uint8(2), np.float16(1), np.uint8(5)) == right
    texts, scores = beam_search(model, start, 9, 2, 1e308)  # a penalty that hides everything, not an overflow
    assert len(texts) == 2 and scores == [0, 0]
    assert beam_search(model, start, 0, 2, 1e308) == ([[]], [0])


def test_numbers_of_numpy_in_searches():
    model, start = lively(), torch.tensor([[3, 1]])
    expected = beam_search(model, start, 5, 3, 0.5, stop=2)
    assert beam_search(model, start.int(), np.int64(5), np.uint8(3), np.float64(0.5), stop=np.int32(2)) == expected


# beams --------------------------------------------------------------------------------------------------------------


def log_probability(model, prompt, new):
    """log p of the new ids, one window at a time."""
    text, total = prompt + new, 0.0
    for t in range(len(prompt), len(text)):
        seen = torch.tensor([text[:t][-model.config.n_ctx :]])
        total += model(seen)[0, -1].log_softmax(-1)[text[t]].item()
    return total


def every_answer(model, prompt, n, alpha, stop):
    """(score, ids, whether it ended) of all answers of at most n tokens, best first, by brute force."""
    vocabulary = [i for i in range(model.config.vocab_size) if i != stop]
    found = []
    for length in range(n + 1):
        for ids in itertools.product(vocabulary, repeat=length):
            if length == n:
                found.append([*ids])
            elif stop is not None:
                found.append([*ids, stop])
    scored = [(log_probability(model, prompt, ids) / ((5 + len(ids)) / 6) ** alpha, ids) for ids in found]
    return [(score, until(ids, stop)) for score, ids in sorted(scored, reverse=True)]


def search_with_lists(model, prompt, n_new, width, alpha, stop):
    """Beam search from its definition: no cache, no tensors of beams, nothing finished is thrown away."""
    live, finished = [(0.0, [])], []
    for n in range(1, n_new + 1):
        grown = []
        for total, ids in live:
            row = model(torch.tensor([(prompt + ids)[-model.config.n_ctx :]]))[0, -1].log_softmax(-1).tolist()
            grown += [(total + step, [*ids, i]) for i, step in enumerate(row)]
        finished += [(total / ((5 + n) / 6) ** alpha, ids[:-1]) for total, ids in grown if ids[-1] == stop]
        live = sorted((beam for beam in grown if beam[1][-1] != stop), reverse=True)[:width]
    finished += [(total / ((5 + n_new) / 6) ** alpha, ids) for total, ids in live]
    return sorted(finished, reverse=True)[:width]


def agree(found, expected):
    texts, scores = found
    assert len(texts) == len(scores) == len(expected)
    torch.testing.assert_close(torch.tensor(scores), torch.tensor([s for s, _ in expected]), atol=1e-4, rtol=1e-4)
    gaps = [a - b for (a, _), (b, _) in itertools.pairwise(expected)]
    if min(gaps, default=1.0) > 1e-4:  # a tie may fall either way
        assert texts == [ids for _, ids in expected]


@quick
@given(tiny_models, st.integers(0, 4), st.sampled_from([0.0, 0.6, 1.0, 2.0]), st.integers(-1, 3))
def test_beams_that_keep_everything_find_the_best(model, n, alpha, stop):
    stop = None if stop < 0 else stop % model.config.vocab_size
    prompt = [1, 0][: model.config.n_ctx]
    with torch.no_grad():
        expected = every_answer(model, prompt, n, alpha, stop)
    width = model.config.vocab_size**n
    agree(beam_search(model, torch.tensor([prompt]), n, width, alpha, stop), expected[:width])


@quick
@given(models, st.integers(1, 6), st.integers(0, 10), st.sampled_from([0.0, 0.6, 1.0, 3.0]), st.integers(-1, 30))
def test_beams_are_those_of_a_search_with_lists(model, width, n, alpha, stop):
    stop = None if stop < 0 else stop % model.config.vocab_size
    prompt = [1, 0, 1][: model.config.n_ctx]
    with torch.no_grad():
        expected = search_with_lists(model, prompt, n, width, alpha, stop)
    agree(beam_search(model, torch.tensor([prompt]), n, width, alpha, stop), expected)


@pytest.mark.parametrize("width", [1, 2, 4, 7])
def test_beams_are_those_of_transformers(width):
    model = lively(n_ctx=24, n_layers=3, attention=("dense",))
    start, judge = torch.tensor([[3, 1, 4]]), to_gpt2(model)
    judge.generation_config.eos_token_id = None
    settings = {"num_beams": width, "num_return_sequences": width, "length_penalty": 0.0, "do_sample": False}
    settings |= {"return_dict_in_generate": True, "output_scores": True, "pad_token_id": 0, "max_new_tokens": 12}
    theirs = judge.generate(start, attention_mask=torch.ones_like(start), **settings)
    texts, scores = beam_search(model, start, 12, width, length_penalty=0.0)
    assert texts == theirs.sequences[:, 3:].tolist()
    if width > 1:
        torch.testing.assert_close(torch.tensor(scores), theirs.sequences_scores, atol=1e-4, rtol=1e-4)


def test_one_beam_is_greedy_and_four_find_likelier_texts():
    found, start = [], torch.tensor([[3, 1]])
    for seed in range(8):
        model = lively(n_ctx=6, vocab_size=50, seed=seed)
        greedy = generate(model, start, 12, temperature=0)[0, 2:].tolist()
        assert beam_search(model, start, 12, width=1)[0] == [greedy]
        found.append(beam_search(model, start, 12)[1][0] > beam_search(model, start, 12, width=1)[1][0] + 1e-3)
    assert any(found)


def test_the_defaults_are_the_papers():
    model, start = lively(), torch.tensor([[3, 1]])
    assert beam_search(model, start, 5, stop=2) == beam_search(model, start, 5, width=4, length_penalty=0.6, stop=2)
    assert len(beam_search(model, start, 5)[0]) == 4


def test_a_score_by_hand():
    assert penalise(-6.0, 7, 1.0) == -3 and penalise(-6.0, 1, 0.6) == -6 and penalise(-6.0, 99, 0) == -6
    assert math.isclose(penalise(-5.0, 10, 0.6), -5 / 2.5**0.6)
    assert penalise(0.0, 0, 0.6) == 0


def test_a_sure_end_ends_the_search(monkeypatch):
    """Once `width` answers have ended and nobody alive can catch up, no step is made."""
    model, read = lively(vocab_size=5), []
    call = Reader.__call__

    def ends(self, tokens):  # the stop is nearly certain at every step
        read.append(len(tokens))
        return call(self, tokens) * 0 + torch.tensor([9.0, 0, 0, 0, 0])

    monkeypatch.setattr(Reader, "__call__", ends)
    texts, _ = beam_search(model, torch.tensor([[1]]), 50, width=1, stop=0)
    assert texts == [[]] and read == [1]
    read.clear()
    texts, scores = beam_search(model, torch.tensor([[1]]), 50, width=3, stop=0, length_penalty=0.0)
    assert read == [1, 3] and texts[0] == [] and scores == sorted(scores, reverse=True)


def test_a_search_goes_on_while_a_longer_text_can_still_win(monkeypatch):
    """The end has 0.6, going on 0.4 and then certainty: the end wins when short, not when divided by 2."""
    first, later = torch.tensor([[0.6, 0.4, 1e-9]]).log(), torch.tensor([[-99.0, 0.0, -99.0]])
    monkeypatch.setattr(Reader, "__call__", lambda self, tokens: later if tokens.shape[1] > 1 else first)
    monkeypatch.setattr("gpt3lib.cache.KVCache.select", lambda self, rows: None)
    model, start, settings = lively(vocab_size=3), torch.tensor([[2]]), {"width": 1, "length_penalty": 1.0, "stop": 0}
    assert beam_search(model, start, 4, **settings)[0] == [[]]
    texts, scores = beam_search(model, start, 7, **settings)
    assert texts == [[1] * 7] and math.isclose(scores[0], math.log(0.4) / 2, rel_tol=1e-5)


def test_nothing_new_and_nothing_left():
    model, start = lively(vocab_size=3), torch.tensor([[1]])
    assert beam_search(model, start, 0) == ([[]], [0.0])
    one = lively(vocab_size=1)
    assert beam_search(one, torch.tensor([[0]]), 4, stop=0)[0] == [[]]  # the end is all there is
    texts, scores = beam_search(model, start, 2, width=50)
    assert len(texts) == len(scores) == 9


def test_the_prompt_is_not_changed_and_no_graph_is_kept():
    model, start = lively(), torch.tensor([[3, 1]])
    texts, scores = beam_search(model, start, 4)
    assert start.tolist() == [[3, 1]] and all(type(score) is float for score in scores)
    assert all(type(i) is int for ids in texts for i in ids)


def test_beams_of_broken_weights():
    model = lively()
    model.ln_f.weight.data[:] = math.nan
    with pytest.raises(FloatingPointError, match="logits are not finite"):
        beam_search(model, torch.tensor([[1]]), 3)


@pytest.mark.parametrize(
    "tokens, named, error, message",
    [
        (torch.tensor([[1], [2]]), {}, PromptError, r"beam search takes one prompt \(1, T\), got 2; call it for each"),
        (torch.tensor([1]), {}, PromptError, r"tokens must be a tensor \(B, T\)"),
        (torch.tensor([[23]]), {}, TokenError, "token id 23"),
        (torch.ones(1, 9, dtype=torch.int64), {}, ContextError, "the prompt has 9 tokens"),
        (torch.tensor([[1]]), {"width": 0}, PromptError, "width is 0; at least 1 text must be kept"),
        *((torch.tensor([[1]]), {"width": bad}, PromptError, "width is ") for bad in (1.5, True, "4", None)),
        *((torch.tensor([[1]]), {"length_penalty": bad}, PromptError, "penalty is ") for bad in (None, "1", True)),
        (torch.tensor([[1]]), {"length_penalty": -0.1}, PromptError, "length_penalty is -0.1; use 0 for none"),
        (torch.tensor([[1]]), {"length_penalty": 10**400}, PromptError, "length_penalty is 1000"),
        (torch.tensor([[1]]), {"length_penalty": math.nan}, PromptError, "length_penalty is nan"),
        (torch.tensor([[1]]), {"length_penalty": math.inf}, PromptError, "length_penalty is inf"),
        (torch.tensor([[1]]), {"stop": 23}, PromptError, "stop is 23; it must be one token id, 0 to 22"),
        (torch.tensor([[1]]), {"max_new_tokens": -1}, PromptError, "max_new_tokens is -1"),
    ],
)
def test_wrong_searches(tokens, named, error, message):
    with pytest.raises(error, match=message):
        beam_search(lively(), tokens, **({"max_new_tokens": 3} | named))
