"""The cache against the plain loop: every kind of layer, every length, and a step that goes round the modules."""

import functools
import math
import re
from dataclasses import replace
from types import MethodType, SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from gpt3lib.attention import CausalSelfAttention
from gpt3lib.cache import (
    KVCache,
    LayerCache,
    OneStep,
    Reader,
    RingCache,
    cache_numbers,
    generate,
    is_plain,
    may_cache,
    stream,
)
from gpt3lib.decoding import beam_search, generate_many
from gpt3lib.embeddings import ContextError
from gpt3lib.generation import PromptError, generate_slowly, last_logits
from gpt3lib.model import GPT, MLP, Block, GPTConfig
from gpt3lib.tokenization import TokenError
from gpt3lib.weights import OtherConfig, OtherGPT, ShiftedTable
from oracles import to_gpt2

quick = settings(deadline=None, max_examples=30, derandomize=True)
INF = float("inf")


def lively(n_ctx=8, n_layers=2, n_heads=2, d_head=4, vocab_size=23, seed=0, make=GPT, shape=GPTConfig, **options):
    """A random model whose logits are far from equal, so that a wrong number changes a token."""
    torch.manual_seed(seed)
    model = make(shape(vocab_size, n_ctx, n_layers, n_heads * d_head, n_heads, d_head, **options)).eval()
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


# ---- whole texts ----


@quick
@given(models, st.integers(1, 3), st.integers(1, 10), st.integers(0, 15), ways, st.integers(0, 99))
def test_generate_is_its_slow_twin(model, b, t, n, way, seed):
    start = prompts(model, b, min(t, model.config.n_ctx), seed)
    fast = generate(model, start, n, **way, generator=dice(seed))
    assert fast.equal(generate_slowly(model, start, n, **way, generator=dice(seed)))
    assert fast.shape == (b, start.shape[1] + n) and fast.dtype == torch.int64
    assert fast[:, : start.shape[1]].equal(start)


def test_greedy_by_brute_force_across_the_end_of_the_window():
    model, text = lively(n_ctx=6, d_head=8, vocab_size=50, seed=5), [3, 1, 4]
    for _ in range(12):
        with torch.no_grad():
            text.append(model(torch.tensor([text[-6:]]))[0, -1].argmax().item())
    assert generate(model, torch.tensor([[3, 1, 4]]), 12, temperature=0).tolist() == [text]
    assert len(set(text[3:])) > 3  # a text of one token would prove nothing


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
    text = generate(model.train(), prompts(model, 2, 3), 4)
    hook.remove()
    assert graphs == [False] * 4 and not text.requires_grad and not text.is_inference()
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
def test_the_work_that_is_done(monkeypatch, n, calls):
    """The prompt once, then one token a step; past the end of the window all of it."""
    model, seen = lively(n_ctx=8), []
    model.ln_f = nn.Sequential(model.ln_f)  # through the modules
    embed = torch.nn.functional.embedding
    monkeypatch.setattr(torch.nn.functional, "embedding", lambda *a: seen.append(a[0].shape[-1]) or embed(*a))
    generate(model, prompts(model, 2, 5), n)
    assert seen[::2] == seen[1::2]
    seen = seen[::2]
    assert seen == calls


def test_generate_on_half_precision_weights():
    model = lively(n_ctx=16).to(torch.bfloat16)
    assert generate(model, prompts(model, 2, 3), 12, 0.8, 10, 0.9, dice()).shape == (2, 15)


# ---- the cache ----


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


def test_last_logits_through_a_cache():
    model = lively()
    tokens = prompts(model, 3, 5)
    cache = KVCache(model.config, 5)
    last_logits(model, tokens[:, :4], cache)
    torch.testing.assert_close(last_logits(model, tokens[:, 4:], cache), model(tokens)[:, -1])


def test_a_layer_cache_returns_all_that_came():
    cache, k = LayerCache(6), torch.randn(2, 3, 6, 4, generator=dice())
    for start, stop in ((0, 2), (2, 3), (3, 6)):
        keys, values, mask = cache.append(k[:, :, start:stop], -k[:, :, start:stop])
        assert mask is None and keys.equal(k[:, :, :stop]) and values.equal(-k[:, :, :stop])
    with pytest.raises(ContextError, match="7 tokens do not fit into a cache of 6 slots; make a larger one"):
        cache.append(k[:, :, :1], k[:, :, :1])
    assert cache.length == 6 and cache.keys.equal(k)


def test_slots_born_in_inference_mode_may_be_written_to_outside():
    cache, k = LayerCache(2), torch.randn(1, 1, 1, 2)
    with torch.inference_mode():
        cache.append(k, k)
    cache.append(k, k)
    assert not cache.keys.is_inference() and cache.length == 2


@pytest.mark.parametrize("t, n, slots", [(3, 2, 5), (3, 40, 8), (8, 1, 8)])
def test_the_cache_is_no_longer_than_the_text_or_the_window(monkeypatch, t, n, slots):
    made = []
    monkeypatch.setattr("gpt3lib.cache.KVCache", lambda *a, **b: made.append(KVCache(*a, **b)) or made[-1])
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
        keys, values, mask = ring.append(text[:, :, at : at + size], -text[:, :, at : at + size])
        at += size
        wanted = text[:, :, max(0, at - size - n_slots + 1) : at]
        assert mask is None and keys.equal(-values) and keys.shape == wanted.shape
        if size == 1 and not in_order:  # a stable order by what was stored
            assert keys.data_ptr() == ring.keys.data_ptr()  # the slots themselves, no copy
            keys, wanted = (x[:, :, x[0, 0, :, 0].argsort()] for x in (keys, wanted))
        assert keys.equal(wanted)
        assert ring.length == at and ring.keys.shape[2] == n_slots
        for c in range(max(0, at - n_slots), at):  # token c lies in slot c mod n_slots
            assert ring.keys[:, :, c % n_slots].equal(text[:, :, c])


def test_a_ring_does_not_hand_out_what_the_next_token_overwrites_too_early():
    ring, text = RingCache(3), torch.randn(1, 1, 8, 2, generator=dice())
    ring.append(text[:, :, :3], text[:, :, :3])
    keys, values, _ = ring.append(text[:, :, 3:8], text[:, :, 3:8])
    assert keys.equal(text[:, :, 1:]) and values.equal(text[:, :, 1:])  # token 3 still sees 1 and 2


def test_each_layer_has_the_cache_of_its_kind():
    config = GPTConfig(23, 64, 3, 8, 2, 4, attention=("banded", "dense"), bandwidth=5)
    kinds = [(type(held), held.n_slots) for held in KVCache(config, 20).layers]
    assert kinds == [(RingCache, 5), (LayerCache, 20), (RingCache, 5)]
    assert [(type(held), held.n_slots) for held in KVCache(config, 5).layers] == [(LayerCache, 5)] * 3
    assert [held.in_order for held in KVCache(config, 9, in_order=True).layers[::2]] == [True, True]
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


def test_new_tokens_sit_on_the_tracks_after_those_seen():
    model = lively()
    cache, tokens = KVCache(model.config, 8), prompts(model, 2, 5)
    assert cache.tracks(tokens).tolist() == [0, 1, 2, 3, 4]
    model.hidden(tokens, cache)
    assert cache.tracks(tokens[:, :2]).tolist() == [5, 6]


# ---- one step, written out ----

OTHERS = [
    {},
    {"qkv_bias": False, "scaled": False},
    {"scaled": False},
    {"activation": "relu", "position_offset": 2},
    {"activation": "gelu", "attention": ("banded", "dense"), "bandwidth": 3},
    {"attention": ("banded",), "bandwidth": 1},
]


@pytest.mark.parametrize("options", OTHERS)
def test_one_step_is_last_logits(options):
    """With all that other people's models have, see gpt3lib.weights, and with eps as the norms say."""
    model = lively(n_ctx=12, n_layers=3, make=OtherGPT, shape=OtherConfig, **options)
    tokens = prompts(model, 3, 12)
    fast, slow = (KVCache(model.config, 12) for _ in range(2))
    with torch.no_grad():
        for norm in (model.blocks[1].ln_1, model.blocks[2].ln_2, model.ln_f):
            norm.eps = 0.1  # whatever the norms say
        for cache in (fast, slow):
            model.hidden(tokens[:, :3], cache)
        step = OneStep(model)
        for t in range(3, 12):
            ours = step(tokens[:, t : t + 1], fast)
            torch.testing.assert_close(ours, last_logits(model, tokens[:, t : t + 1], slow), atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(ours, model(tokens[:, : t + 1])[:, -1], atol=1e-5, rtol=1e-4)


def test_one_step_copies_no_weight():
    model = lively()
    step = OneStep(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)  # a step made before sees the weights of now
        cache, tokens = KVCache(model.config, 4), prompts(model, 2, 1)
        torch.testing.assert_close(step(tokens, cache), last_logits(model, tokens))


class Twice(nn.Module):
    """A part of somebody else's, around the part that was there, or alone."""

    def __init__(self, inner=None):
        super().__init__()
        self.inner = inner or nn.Identity()

    def forward(self, x):
        return 2 * self.inner(x)


class Deaf(nn.Module):
    """A layer, or an attention, that never looks at its past: each track sees the mean of those before."""

    def forward(self, x, past=None):
        return x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]


class Sums(nn.Module):
    def forward(self, x):
        return x.cumsum(1)


class Mixed(nn.Embedding):
    def forward(self, tokens):
        return super().forward(tokens).cumsum(1)


class Mirrored(GPT):
    def hidden(self, tokens, past=None):
        return super().hidden(tokens, past).flip(-1)


class Louder(CausalSelfAttention):
    def look(self, q, k, v, mask=None):
        return 2 * super().look(q, k, v, mask)


def put(name, value):
    """A change: value(what is there) in the place of `name`, a path from the model."""

    def change(model):
        *path, last = name.split(".")
        part = functools.reduce(getattr, path, model)
        setattr(part, last, value(getattr(part, last)))

    return change


def hook(name, function=lambda part, inputs, out: out.flip(-1), kind="register_forward_hook"):
    """A change: a hook on the part `name`."""
    return lambda model: getattr(model.get_submodule(name), kind)(function)


def mlp_changes(kind, **named):
    return lambda model: kind(model.blocks[0].mlp.up, "weight", **named)


PLAIN = {  # the step says exactly what these do
    "untouched": lambda model: None,
    "down has no bias": put("blocks.0.mlp.down.bias", lambda old: None),
    "nobody has a bias": lambda model: [setattr(m, "bias", None) for m in model.modules() if isinstance(m, nn.Linear)],
    "norms without numbers": put("blocks.0.ln_1", lambda old: nn.LayerNorm(8, elementwise_affine=False)),
    "norm without bias": put("ln_f", lambda old: nn.LayerNorm(8, bias=False)),
    "eps": put("blocks.1.ln_2.eps", lambda old: 0.5),
    "scale": put("blocks.0.attention.scale", lambda old: 2.0),
    "relu": put("blocks.0.mlp.activation", lambda old: nn.ReLU()),
    "another GELU": put("blocks.0.mlp.activation", lambda old: nn.GELU()),
    "another activation": put("blocks.0.mlp.activation", lambda old: nn.Sequential(old, nn.Tanh())),
    "shared MLP": lambda model: setattr(model.blocks[1], "mlp", model.blocks[0].mlp),
    "a note": lambda model: setattr(model, "note", "mine") or setattr(model.blocks[0], "name", "first"),
    "other forward, unused": lambda model: setattr(model, "forward", None),
    "double": lambda model: model.double(),
    "training": lambda model: model.train(),
}
CACHED = {  # through the modules, with the cache
    "mlp in a row": put("blocks.0.mlp", lambda old: nn.Sequential(old.up, old.activation, old.down)),
    "no norm": put("ln_f", lambda old: nn.Identity()),
    "another norm": put("blocks.0.ln_1", lambda old: nn.RMSNorm(8)),
    "compiled layer": lambda model: model.blocks.__setitem__(0, torch.compile(model.blocks[0], backend="eager")),
    "dropout": put("blocks.0.mlp.up", lambda old: nn.Sequential(old, nn.Dropout(0.5)).eval()),
    "compiled part": lambda model: model.blocks[0].mlp.compile(backend="eager"),
}
SLOW = {  # tokens may meet anywhere: the whole text for each token
    "hook that takes the mean": hook("blocks.0", lambda part, inputs, out: out - out.mean(1, keepdim=True)),
    "hook that takes the mean at the end": hook("ln_f", lambda part, inputs, out: out - out.mean(1, keepdim=True)),
    "hook on the last track": hook("blocks.0", lambda part, inputs, out: torch.cat([out[:, :-1], -out[:, -1:]], 1)),
    "hook on track 2": hook("blocks.1", lambda part, inputs, out: torch.cat([out[:, :2], -out[:, 2:3], out[:, 3:]], 1)),
    "hook on a compiled layer": lambda model: hook("blocks.0", lambda part, inputs, out: out - out.mean(1, True))(
        model.blocks.__setitem__(0, torch.compile(model.blocks[0], backend="eager")) or model
    ),
    "sums for a norm": put("ln_f", lambda old: Sums()),
    "sums for an MLP": put("blocks.0.mlp", lambda old: Sums()),
    "sums for a query": put("blocks.0.attention.wq", lambda old: Sums()),
    "sums in a row": put("blocks.0.mlp.activation", lambda old: nn.Sequential(old, Sums())),
    "a function for a norm": lambda model: (
        delattr(model, "ln_f") or setattr(model, "ln_f", lambda x: x - x.mean(1, True))
    ),
    "a table that mixes": put("embeddings.wte", lambda old: Mixed(*old.weight.shape, _weight=old.weight.data)),
    "int8": lambda model: setattr(
        model, "blocks", torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8).blocks
    ),
    "positions by formula": put("embeddings.wpe", lambda old: Twice(old)),
    "a table by formula": put(
        "embeddings.wte", lambda old: parametrize.register_parametrization(old, "weight", Twice())
    ),
    "mlp": put("blocks.1.mlp", lambda old: Twice()),
    "LoRA": put("blocks.0.attention.wq", Twice),
    "activation": put("blocks.0.mlp.activation", lambda old: Twice(nn.Sigmoid())),
    "its forward": put("blocks.0.mlp.activation.forward", lambda old: torch.sin),
    "forward of a linear": put("blocks.0.mlp.down.forward", lambda old: lambda x: 3 * old(x)),
    "forward of a table": put("embeddings.wte.forward", lambda old: lambda x: 3 * old(x)),
    "parametrization": mlp_changes(parametrize.register_parametrization, parametrization=Twice()),
    "weight norm": lambda model: parametrizations.weight_norm(model.blocks[0].mlp.up),
    "pruning": mlp_changes(prune.l1_unstructured, amount=0.5),
    "hook on a block": hook("blocks.0"),
    "hook on a linear": hook("blocks.0.attention.wv"),
    "hook on a norm": hook("blocks.1.ln_2"),
    "hook on ln_f": hook("ln_f"),
    "hook on the embeddings": hook("embeddings"),
    "hook on a table": hook("embeddings.wpe"),
    "backward hook": hook("blocks.0", lambda *_: None, "register_full_backward_hook"),
    "pre-hook": hook("blocks.0.mlp", lambda part, inputs: (2 * inputs[0],), "register_forward_pre_hook"),
    "hook on one neuron": hook("blocks.0.mlp.activation", lambda part, inputs, out: out[:, :, :16].repeat(1, 1, 2)),
    "hidden": put("hidden", lambda old: lambda tokens, past=None: old(tokens, past).flip(-1)),
    "hidden, deaf": put("hidden", lambda old: lambda tokens, past=None: old(tokens).flip(-1)),
    "hidden, a method": put(
        "hidden", lambda old: MethodType(lambda self, *a: GPT.hidden(self, *a).flip(-1), old.__self__)
    ),
    "hidden of another": lambda model: setattr(model, "hidden", lively(seed=9).hidden),
    "subclass": lambda model: setattr(model, "__class__", Mirrored),
    "embeddings": put("embeddings.forward", lambda old: lambda tokens, tracks=None: old(tokens)),
    "way out": put("embeddings.unembed", lambda old: lambda h: old(h).flip(-1)),
    "block": lambda model: model.blocks.__setitem__(0, Deaf()),
    "forward of a block": put("blocks.1.forward", lambda old: lambda x, past=None: old(x, past).flip(-1)),
    "attention": lambda model: setattr(model.blocks[0], "attention", Deaf()),
    "attention's class": lambda model: setattr(model.blocks[0].attention, "__class__", Louder),
    "look": put("blocks.1.attention.look", lambda old: lambda q, k, v, mask=None: old(q, k, 2 * v, mask)),
    "heads": put("blocks.0.attention.heads", lambda old: lambda x: old(x).flip(1)),
    "band": lambda model: setattr(model.blocks[1].attention, "bandwidth", 1),
    "swapped layers": lambda model: setattr(model, "blocks", model.blocks[::-1]),
    "fewer layers": lambda model: setattr(model, "blocks", model.blocks[:1]),
    "more layers": lambda model: model.blocks.append(model.blocks[0]),
}
CHANGES = {
    f"{way}: {name}": (way, c)
    for way, cs in (("plain", PLAIN), ("cached", CACHED), ("slow", SLOW))
    for name, c in cs.items()
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_model_says_what_the_plain_loop_says(name):
    """Whatever was exchanged, hung on or taken away; and the fast step is taken for what it is right for."""
    way, change = CHANGES[name]
    model = lively(bandwidth=3, seed=1)
    change(model)
    assert (is_plain(model), may_cache(model)) == (way == "plain", way != "slow")
    start, prompts_ = torch.tensor([[3, 1, 4], [1, 5, 9]]), [[3], [1, 5, 9, 2], [2, 6]]
    slow = generate_slowly(model, start, 9, temperature=0)
    assert generate(model, start, 9, temperature=0).equal(slow)
    hot = {"temperature": 5.0}  # every logit counts
    assert generate(model, start, 9, **hot, generator=dice()).equal(
        generate_slowly(model, start, 9, **hot, generator=dice())
    )
    alone = [generate_slowly(model, torch.tensor([ids]), 9, temperature=0)[0, len(ids) :].tolist() for ids in prompts_]
    assert generate_many(model, prompts_, 9, temperature=0) == alone
    assert beam_search(model, start[:1], 9, width=1)[0] == [slow[0, 3:].tolist()]


@torch.no_grad()
def test_the_changes_change_something():
    start, same = torch.tensor([[3, 1, 4], [1, 5, 9]]), []
    before = last_logits(lively(bandwidth=3, seed=1), start)
    for name, (_, change) in CHANGES.items():
        model = lively(bandwidth=3, seed=1)
        change(model)
        same += [name] if (last_logits(model, start).float() - before).abs().max() < 1e-4 else []
    silent = "untouched, norms without numbers, norm without bias, a note, other forward, unused, double, training"
    silent += ", mlp in a row, dropout, weight norm, backward hook, compiled part, compiled layer, band, embeddings"
    assert all(name.split(": ")[1] in silent for name in same), same


EXCHANGED = [(cls, "forward") for cls in (nn.Linear, nn.LayerNorm, nn.GELU, MLP, Block)]
EXCHANGED += [(cls, "__call__") for cls in (nn.Module, MLP, Block)] + [(GPT, "hidden"), (nn.Module, "_call_impl")]


@pytest.mark.parametrize("cls, name", EXCHANGED)
def test_functions_exchanged_in_a_class_are_heard(monkeypatch, cls, name):
    model, start, old = lively(), torch.tensor([[3, 1, 4]]), getattr(cls, name)
    before = generate(model, start, 9, temperature=0)

    def mixed(part, *inputs):
        out = old(part, *inputs)
        return out - out.mean(1, keepdim=True) if cls is not nn.Module or isinstance(part, nn.GELU) else out

    monkeypatch.setattr(cls, name, mixed)
    assert not is_plain(model) and not may_cache(model)
    after = generate(model, start, 9, temperature=0)
    assert after.equal(generate_slowly(model, start, 9, temperature=0)) and not after.equal(before)


def test_the_tables_of_other_models_are_known(monkeypatch):
    """OPT's stays fast; a class that inherits from it and mixes is another, and an exchanged function is heard."""
    options = {"make": OtherGPT, "shape": OtherConfig, "position_offset": 2}
    model, table = lively(**options), ShiftedTable.forward
    assert is_plain(model)
    monkeypatch.setattr(ShiftedTable, "forward", lambda part, tracks: table(part, tracks).cumsum(0))
    assert not may_cache(model)
    slow = generate_slowly(model, torch.tensor([[3, 1, 4]]), 9, temperature=0)
    assert generate(model, torch.tensor([[3, 1, 4]]), 9, temperature=0).equal(slow)


@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook", "full_backward_hook"])
def test_global_hooks_are_heard(kind):
    model, seen = lively(), []
    handle = getattr(nn.modules.module, f"register_module_{kind}")(lambda part, *_: seen.append(type(part)))
    assert not is_plain(model) and not may_cache(model)
    generate(model, torch.tensor([[3, 1, 4]]), 4, temperature=0)
    handle.remove()
    assert is_plain(model) and ("backward" in kind or seen.count(nn.LayerNorm) == 5 * 4)


def test_autocast_goes_through_the_modules():
    with torch.autocast("cpu"):
        assert not is_plain(lively()) and may_cache(lively())


def test_compiled_models_are_looked_into():
    model, start = lively(), torch.tensor([[3, 1, 4]])
    slow = generate_slowly(model, start, 4, temperature=0)
    whole = torch.compile(model, backend="eager")
    assert may_cache(whole) and generate(whole, start, 4, temperature=0).equal(slow)
    model.blocks = nn.ModuleList(torch.compile(block, backend="eager") for block in model.blocks)
    assert may_cache(model) and not is_plain(model)
    assert generate(model, start, 4, temperature=0).equal(slow)


def test_a_plain_model_does_not_go_through_its_modules(monkeypatch):
    model, calls = lively(n_ctx=16), []
    norm = torch.nn.functional.layer_norm  # what the module calls, and the step does not
    monkeypatch.setattr(torch.nn.functional, "layer_norm", lambda *a: calls.append(1) or norm(*a))
    generate(model, prompts(model, 1, 3), 10)
    assert len(calls) == 5  # two layers and the end, for the prompt only


# ---- the reader, and where texts end ----


@quick
@given(models, st.integers(1, 3), st.integers(0, 99))
def test_a_reader_at_every_length(model, b, seed):
    """Against each text without a cache: before and after the window slides."""
    n_ctx = model.config.n_ctx
    read, text = Reader(model, n_ctx + 5), prompts(model, b, n_ctx + 5, seed)
    with torch.no_grad():
        for t in range(1, n_ctx + 5):
            whole = last_logits(model, text[:, :t][:, -n_ctx:])
            torch.testing.assert_close(read(text[:, :t]), whole, atol=1e-4, rtol=1e-4)


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
    for chosen in stream(Reader(model, 12), prompts(model, 1, 3), 9, 0, None, None, None, sign):
        steps.append(chosen.tolist())
    assert steps == [[i] for i in text[: text.index(sign) + 1]]


def test_a_stream_is_lazy_and_its_tokens_are_those_of_generate():
    model, seen = lively(), []
    model.embeddings.register_forward_hook(lambda module, inputs, out: seen.append(1))
    steps = stream(Reader(model, 10), prompts(model, 2, 3), 7, 0, None, None, None, None)
    assert not seen
    first = next(steps)
    assert len(seen) == 1 and first.shape == (2,)
    columns = torch.stack([first, *steps], dim=1)
    assert columns.equal(generate(model, prompts(model, 2, 3), 7, temperature=0)[:, 3:])


# ---- errors ----


class Untouchable:
    """A model that fails the test when it is asked to work."""

    config = GPTConfig(vocab_size=23, n_ctx=8, n_layers=2, d_model=8, n_heads=2, d_head=4)
    embeddings = SimpleNamespace(wte=SimpleNamespace(weight=torch.zeros(23, 8)), wpe=None)  # its device is looked at

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
    ((OK, -1), {}, PromptError, "max_new_tokens is -1; it must be a whole number, 0 or more"),
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
    ((OK, 3), {"generator": 7}, PromptError, "generator is 7; it must be a torch.Generator"),
    ((OK, 3), {"top_k": 50.0}, PromptError, "top_k is 50.0; at least 1 token must stay, a whole number"),
    ((OK, 3), {"temperature": "1"}, PromptError, "temperature is '1'"),
    ((OK, 3), {"top_p": True}, PromptError, "top_p is True"),
    ((np.zeros((1, 3), int), 3), {}, PromptError, "got a ndarray"),
]
ENDED = [
    ({"stop": stop}, f"stop is {stop!r}; it must be one token id, 0 to 22") for stop in (23, -1, True, "a", 1.0, {1})
]


@pytest.mark.parametrize("named, message", ENDED)
def test_wrong_stops(named, message):
    with pytest.raises(PromptError, match=re.escape(message)):
        generate(Untouchable(), OK, 3, **named)


@pytest.mark.parametrize("arguments, named, error, message", WRONG)
def test_errors_come_before_any_work(arguments, named, error, message):
    with pytest.raises(error, match=message):
        generate(Untouchable(), *arguments, **named)


def test_the_edges_that_are_allowed():
    model = lively()
    for named in ({"top_k": 1}, {"top_k": 23}, {"top_k": 999}, {"top_p": 1.0}, {"top_p": 1e-9}, {"temperature": 1e-40}):
        assert generate(model, prompts(model, 1, 8), 2, **named).shape == (1, 10)
    assert issubclass(PromptError, ValueError)


def test_numbers_of_numpy_and_small_ids():
    model = lively()
    start = prompts(model, 2, 3)
    right = generate(model, start, 20, top_k=4, generator=dice(), stop=1)
    ours = generate(model, start.int(), np.uint8(20), top_k=np.int64(4), generator=dice(), stop=np.int64(1))
    assert ours.equal(right) and ours.dtype == torch.int64
    assert generate(model, start.int(), 0).dtype == torch.int64


@pytest.mark.parametrize("wrong", [5.0, -1, True, "5", None, math.nan, np.float32(3), np.int64(-1)])
def test_the_number_of_new_tokens_is_a_whole_number(wrong):
    model = lively()
    with pytest.raises(PromptError, match="max_new_tokens is"):
        generate(model, prompts(model, 1, 3), wrong)


def test_tokens_and_model_on_two_devices_are_refused():
    model = lively()
    with pytest.raises(PromptError, match="the tokens are on meta, the model on cpu; use tokens.to"):
        generate(model, prompts(model, 1, 3).to("meta"), 2)
