"""The decoder against an independent GPT-2, a forward pass of this file's own, counts, and broken folders."""

import itertools
import json
import math
import os
import random
from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from gpt3lib import model as module
from gpt3lib.embeddings import ContextError
from gpt3lib.model import (
    ERRATA,
    EXTRA_SMALL,
    GPT,
    MLP,
    TABLE_2_1,
    Block,
    ConfigError,
    GPTConfig,
    chunked_loss,
    loss_slowly,
    read_model,
    write_model,
)
from gpt3lib.texts import DATA
from gpt3lib.tokenization import TokenError
from mortal import Mortal
from oracles import named_like_ours, to_gpt2

SMALL = {"vocab_size": 61, "n_ctx": 12, "n_layers": 2, "d_model": 24, "n_heads": 3, "d_head": 8}
REST = {"attention": ["dense", "banded"], "bandwidth": 256, "qkv_bias": True, "scaled": True}
REST |= {"activation": "gelu_tanh", "position_offset": 0}


@pytest.fixture(autouse=True)
def own_format():
    """This file tests the book's own format; gpt3lib.weights puts wider hooks there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GPT, "write", staticmethod(write_model))
        patch.setattr(GPT, "read", staticmethod(read_model))
        yield


def make(seed=0, shake=0.2, **changes):
    """A small model whose every parameter is random: biases, gains and the tanh of GELU all matter."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**SMALL | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(shake * torch.randn_like(parameter))
    return model


def ids(model, batch, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, (batch, length), generator=generator)


# ---- an independent GPT-2 ----


@pytest.mark.parametrize("seed", range(28))
def test_logits_loss_and_gradients_equal_transformers(seed):
    rng = random.Random(seed)
    heads, d_head = rng.randint(1, 4), rng.randint(4, 16)
    model = make(
        seed,
        vocab_size=rng.randint(11, 300),
        n_ctx=rng.randint(8, 64),
        n_layers=rng.randint(1, 4),
        d_model=heads * d_head,
        n_heads=heads,
        d_head=d_head,
    )
    length = model.config.n_ctx if seed % 5 == 0 else rng.randint(1, model.config.n_ctx)
    tokens = ids(model, rng.randint(1, 3), length + 1, seed)
    tokens, targets = tokens[:, :-1], tokens[:, 1:]
    theirs = to_gpt2(model, "sdpa" if seed % 2 else "eager")
    logits = theirs(tokens).logits
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(model(tokens), logits, rtol=1e-5, atol=1e-5)
    our_loss = model.loss(tokens, targets)
    torch.testing.assert_close(our_loss, loss, rtol=1e-5, atol=1e-5)
    our_loss.backward()
    loss.backward()
    wanted = named_like_ours(theirs)
    assert wanted.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, wanted[name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_the_oracle_copies_every_weight_and_notices_a_wrong_one():
    model = make()
    theirs, tokens = to_gpt2(model), ids(model, 2, 9)
    back = named_like_ours(theirs, get=lambda parameter: parameter.detach())
    assert all(torch.equal(back[name], parameter) for name, parameter in model.named_parameters())
    for parameter in model.parameters():
        with torch.no_grad():
            old = parameter.clone()
            parameter.add_(0.05 * torch.randn_like(parameter))
            noticed = (model(tokens) - theirs(tokens).logits).abs().max() > 1e-4
            parameter.copy_(old)
        bias_of_keys = parameter is model.blocks[0].attention.wk.bias or parameter is model.blocks[1].attention.wk.bias
        assert noticed or bias_of_keys  # a softmax does not see what is added to all of its scores


# ---- a forward pass written once more ----


BENDS = {
    "gelu_tanh": lambda h: 0.5 * h * (1 + torch.tanh((2 / math.pi) ** 0.5 * (h + 0.044715 * h**3))),
    "gelu": lambda h: 0.5 * h * (1 + torch.erf(h / 2**0.5)),
    "relu": lambda h: h * (h > 0),
}


def forward_by_hand(model, tokens):
    """Pre-norm GPT in float64 from the state dict, with loops over texts, heads and tracks; layers may be banded."""
    w, c = {name: t.double() for name, t in model.state_dict().items()}, model.config

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        return centred / ((centred**2).mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    def attention(x, layer):
        name = f"blocks.{layer}.attention"
        banded = c.attention[layer % len(c.attention)] == "banded"
        q, k, v = (linear(x, f"{name}.w{letter}") for letter in "qkv")
        mixed = torch.zeros_like(v)
        for h in range(c.n_heads):
            part = slice(h * c.d_head, (h + 1) * c.d_head)
            for i in range(len(x)):
                first = max(0, i - c.bandwidth + 1) if banded else 0
                scores = (k[first : i + 1, part] @ q[i, part]) / (c.d_head**0.5 if c.scaled else 1)
                weights = (scores - scores.max()).exp()
                mixed[i, part] = weights / weights.sum() @ v[first : i + 1, part]
        return linear(mixed, f"{name}.wo")

    def mlp(x, name):
        return linear(BENDS[c.activation](linear(x, f"{name}.up")), f"{name}.down")

    rows = []
    for text in tokens:
        x = w["embeddings.wte.weight"][text] + w["embeddings.wpe.weight"][c.position_offset :][: len(text)]
        for i in range(c.n_layers):
            x = x + attention(norm(x, f"blocks.{i}.ln_1"), i)
            x = x + mlp(norm(x, f"blocks.{i}.ln_2"), f"blocks.{i}.mlp")
        rows.append(norm(x, "ln_f") @ w["embeddings.wte.weight"].T)
    return torch.stack(rows)


@pytest.mark.parametrize("length", [1, 2, 12])
def test_forward_is_pre_norm_gpt2(length):
    model = make(3)
    tokens = ids(model, 2, length)
    torch.testing.assert_close(model(tokens).double(), forward_by_hand(model, tokens), rtol=1e-4, atol=1e-5)


# ---- layers of two kinds, and other people's options ----

OPTIONS = [
    {},
    {"attention": ("dense",)},
    {"attention": ("banded", "dense")},
    {"attention": ("banded", "banded", "dense")},
    {"qkv_bias": False},
    {"scaled": False},
    {"activation": "gelu"},
    {"activation": "relu"},
    {"position_offset": 2},
    {"qkv_bias": False, "scaled": False, "activation": "relu", "position_offset": 3, "attention": ("banded",)},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("bandwidth", [1, 3, 11, 12, 13])
def test_every_option_is_what_a_loop_computes(options, bandwidth):
    model = make(4, n_layers=3, bandwidth=bandwidth, **options).double()
    tokens = ids(model, 2, 12)
    torch.testing.assert_close(model(tokens), forward_by_hand(model, tokens), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("bandwidth", [2, 31, 33, 40])
def test_a_long_text_through_narrow_bands(bandwidth):
    model = make(5, n_ctx=90, bandwidth=bandwidth, n_layers=2).double()
    tokens = ids(model, 1, 85)
    torch.testing.assert_close(model(tokens), forward_by_hand(model, tokens), rtol=1e-9, atol=1e-9)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.sampled_from(["dense", "banded"]), min_size=1, max_size=7), st.integers(1, 12))
def test_the_pattern_is_repeated_from_the_first_layer_up(pattern, n_layers):
    config = GPTConfig(**SMALL | {"n_layers": n_layers, "attention": tuple(pattern)})
    assert config.kinds == tuple(itertools.islice(itertools.cycle(pattern), n_layers))
    with torch.device("meta"):
        blocks = GPT(config).blocks
    for kind, block in zip(config.kinds, blocks, strict=True):
        assert getattr(block.attention, "bandwidth", None) == (256 if kind == "banded" else None)


def test_gpt3_alternates_and_starts_dense():
    config = GPTConfig.from_name("gpt3-175b")
    assert config.kinds == ("dense", "banded") * 48 and config.bandwidth == 256
    assert config == GPTConfig(50257, 2048, 96, 12288, 96, 128, ("dense", "banded"), 256, True, True, "gelu_tanh", 0)


@pytest.mark.parametrize("attention", [("dense",), ("banded",), ("banded", "dense")])
def test_a_band_as_wide_as_the_context_hides_nothing(attention):
    """So the shipped model, and every extra-small one, is the same under any pattern."""
    usual = GPT(GPTConfig.from_name("gpt3-100k")).eval()
    other = GPT(replace(usual.config, attention=attention)).eval()
    other.load_state_dict(usual.state_dict())
    assert all(GPTConfig.from_name(name).n_ctx == GPTConfig.from_name(name).bandwidth for name in EXTRA_SMALL)
    tokens = ids(usual, 1, 256)
    assert torch.equal(other(tokens), usual(tokens))


def test_the_options_cost_what_they_should():
    base = make().num_params()
    for pattern in (("dense",), ("banded",), ("banded", "dense")):
        assert make(attention=pattern, bandwidth=2).num_params() == base
    assert make(scaled=False, activation="relu").num_params() == base
    assert base - make(qkv_bias=False).num_params() == 2 * 3 * 24
    assert make(position_offset=2).num_params() - base == 2 * 24


@pytest.mark.parametrize("options", [{}, {"attention": ("banded",), "position_offset": 2}, {"scaled": False}], ids=str)
def test_padding_changes_no_text(options):
    """Three texts of different lengths in one batch, against each of them alone."""
    model = make(6, n_layers=3, bandwidth=4, **options).double()
    lengths = (12, 5, 1)
    texts = [ids(model, 1, length, seed=length) for length in lengths]
    batch = torch.cat([F.pad(text, (12 - text.shape[1], 0), value=7) for text in texts])
    together = model(batch, pad=torch.tensor([12 - length for length in lengths]))
    assert torch.isfinite(together).all()
    for text, row in zip(texts, together):
        torch.testing.assert_close(row[-text.shape[1] :], forward_by_hand(model, text)[0], rtol=1e-9, atol=1e-9)


def test_a_block_that_writes_nothing_changes_nothing():
    block = make().blocks[0]
    for linear in (block.attention.wo, block.mlp.down):
        torch.nn.init.zeros_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
    x = torch.randn(2, 5, 24)
    assert torch.equal(block(x), x)


def test_the_mlp_works_on_each_track_alone():
    mlp, x = MLP(GPTConfig(**SMALL)), torch.randn(2, 7, 24)
    alone = torch.stack([mlp(x[:, i : i + 1])[:, 0] for i in range(7)], dim=1)
    torch.testing.assert_close(mlp(x), alone)
    assert mlp.up.weight.shape == (96, 24)


def test_hidden_is_what_the_logits_are_made_of():
    model = make()
    tokens = ids(model, 2, 5)
    hidden = model.hidden(tokens)
    assert hidden.shape == (2, 5, 24)
    torch.testing.assert_close(model(tokens), hidden @ model.embeddings.wte.weight.T)


def test_no_output_depends_on_a_later_token():
    model, tokens = make(), ids(make(), 1, 12)
    before = model(tokens)[0]
    for j in range(12):
        changed = tokens.clone()
        changed[0, j] = (changed[0, j] + 7) % 61
        moved = (model(changed)[0] - before).abs().amax(dim=-1)
        assert (moved[:j] == 0).all() and (moved[j:] > 0).all()


def test_a_cache_of_its_own_for_each_layer():
    class Layer:
        keys = values = None

        def append(self, k, v):
            self.keys = k if self.keys is None else torch.cat([self.keys, k], dim=2)
            self.values = v if self.values is None else torch.cat([self.values, v], dim=2)
            return self.keys, self.values

    class Cache:
        length, layers = 0, [Layer(), Layer()]

    model, cache = make(), Cache()
    tokens, parts = ids(make(), 2, 9), []
    for part in tokens.split([4, 1, 4], dim=1):
        parts.append(model(part, cache))
        cache.length += part.shape[1]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens), rtol=1e-5, atol=1e-5)


# ---- loss ----


def test_loss_is_the_mean_of_minus_log_p():
    model = make()
    tokens, targets = ids(model, 3, 8), ids(model, 3, 8, seed=1)
    p = model(tokens).detach().double().softmax(dim=-1)
    total = sum(-math.log(p[b, t, targets[b, t]]) for b in range(3) for t in range(8))
    assert abs(model.loss(tokens, targets).item() - total / 24) < 1e-5


def by_hand(h, wte, targets):
    """The mean of -ln p and its gradients in float64, one track at a time."""
    h, wte = h.detach().double().flatten(0, -2), wte.detach().double()
    loss, grad_h, grad_wte = 0.0, torch.zeros_like(h), torch.zeros_like(wte)
    for t, right in enumerate(targets.flatten().tolist()):
        p = torch.softmax(wte @ h[t], dim=0)
        loss -= p[right].log().item() / len(h)
        p[right] -= 1
        grad_h[t] = p @ wte / len(h)
        grad_wte += torch.outer(p, h[t]) / len(h)
    return loss, grad_h, grad_wte


def head(batch, length, vocab_size=37, width=6, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(batch, length, width, generator=generator, dtype=dtype).requires_grad_()
    wte = torch.randn(vocab_size, width, generator=generator, dtype=dtype).requires_grad_()
    return h, wte, torch.randint(vocab_size, (batch, length), generator=generator)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (2, 128), (1, 257), (3, 171), (4, 255)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("f", [loss_slowly, chunked_loss])
def test_both_losses_are_the_mean_of_minus_log_p(f, shape, dtype):
    h, wte, targets = head(*shape, dtype=dtype)
    loss = f(h, wte, targets)
    grads = torch.autograd.grad(3 * loss, (h, wte))  # the gradient from above must arrive
    wanted, grad_h, grad_wte = by_hand(h, wte, targets)
    close = {"rtol": 1e-5, "atol": 1e-6}
    if dtype == torch.float64 and f is chunked_loss:  # the slow one takes its logarithms in float32
        assert loss.dtype == torch.float64
        close = {"rtol": 1e-11, "atol": 1e-12}
    assert loss.shape == () and math.isclose(loss.item(), wanted, rel_tol=close["rtol"])
    torch.testing.assert_close(grads[0].double(), 3 * grad_h.view(h.shape), **close)
    torch.testing.assert_close(grads[1].double(), 3 * grad_wte, **close)


@pytest.mark.parametrize("f", [loss_slowly, chunked_loss])
def test_a_loss_under_autocast_is_nearly_the_loss(f):
    h, wte, targets = head(3, 171)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = f(h, wte, targets)
    grads = torch.autograd.grad(loss, (h, wte))
    wanted, grad_h, grad_wte = by_hand(h, wte, targets)
    assert math.isclose(loss.item(), wanted, rel_tol=5e-3) and not math.isclose(loss.item(), wanted, rel_tol=1e-9)
    for grad, right in zip(grads, (grad_h.view(h.shape), grad_wte)):
        assert grad.dtype == torch.float32
        assert (grad.double() - right).norm() < 0.02 * right.norm()


def test_without_gradients_a_loss_is_the_same():
    h, wte, targets = head(2, 200)
    with torch.no_grad():
        without = chunked_loss(h, wte, targets)
    torch.testing.assert_close(without, chunked_loss(h, wte, targets).detach())


def held(f):
    """The bytes that f() holds at most, and its largest single piece, from torch's list of allocations."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        f()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(sizes)), max(sizes)


def test_the_loss_never_holds_all_logits():
    h, wte, targets = head(2, 1024, vocab_size=3000)
    everything = 2048 * 3000 * 4  # bytes of all logits
    peak, largest = held(lambda: torch.autograd.grad(loss_slowly(h, wte, targets), (h, wte)))
    assert largest == everything and peak > 2.9 * everything
    peak, largest = held(lambda: torch.autograd.grad(chunked_loss(h, wte, targets), (h, wte)))
    assert largest == everything * 256 // 2048 and peak < everything / 4


def test_the_model_uses_the_light_loss():
    config = GPTConfig(vocab_size=5000, n_ctx=512, n_layers=1, d_model=16, n_heads=2, d_head=8)
    model = GPT(config)
    tokens = ids(model, 2, 512)
    for f in (lambda: model.loss(tokens, tokens), lambda: model.loss(tokens, tokens).backward()):
        assert held(f)[1] < 2 * 512 * 5000 * 4 / 3


def test_a_fresh_model_knows_nothing():
    torch.manual_seed(0)
    model = GPT(GPTConfig.from_name("gpt3-100k"))
    loss = model.loss(ids(model, 4, 64), ids(model, 4, 64, seed=1)).item()
    assert abs(loss - math.log(4353)) < 0.08


# ---- counts ----

# typed from [B20] Table 2.1 (layers, width, heads, head width), two rows corrected, with the counts they imply
SIZES = {
    "gpt3-125m": (12, 768, 12, 64, 125_226_240),
    "gpt3-350m": (24, 1024, 16, 64, 355_871_744),
    "gpt3-760m": (24, 1536, 16, 96, 760_300_032),
    "gpt3-1.3b": (24, 2048, 16, 128, 1_315_723_264),
    "gpt3-2.7b": (32, 2560, 32, 80, 2_651_553_280),
    "gpt3-6.7b": (32, 4096, 32, 128, 6_658_404_352),
    "gpt3-13b": (40, 5120, 40, 128, 12_853_386_240),
    "gpt3-175b": (96, 12288, 96, 128, 174_604_259_328),
}


def closed_formula(c):
    """12 L d² + 13 L d + (V + n_ctx + 2) d."""
    return (12 * c.d_model + 13) * c.n_layers * c.d_model + (c.vocab_size + c.n_ctx + 2) * c.d_model


@pytest.mark.parametrize("name", SIZES)
def test_the_eight_sizes(name):
    *shape, count = SIZES[name]
    config = GPTConfig.from_name(name)
    assert [config.n_layers, config.d_model, config.n_heads, config.d_head] == shape
    assert (config.vocab_size, config.n_ctx, config.d_ff) == (50257, 2048, 4 * shape[1])
    with torch.device("meta"):
        model = GPT(config)
    assert model.num_params() == count == closed_formula(config)
    assert all(parameter.is_meta for parameter in model.parameters())
    for pattern in (("dense",), ("banded",), ("banded", "banded", "dense")):
        with torch.device("meta"):
            assert GPT(replace(config, attention=pattern, bandwidth=100)).num_params() == count
    if name == "gpt3-175b":
        assert sum(p.numel() for p in model.blocks[95].parameters()) == 1_812_099_072
        assert sum(p.dim() == 2 for p in model.parameters()) == 578


def test_the_printed_table_is_kept_beside_the_errata():
    assert TABLE_2_1["gpt3-1.3b"] == (24, 2048, 24, 128) and TABLE_2_1["gpt3-13b"] == (40, 5140, 40, 128)
    assert TABLE_2_1.keys() == SIZES.keys() and ERRATA.keys() == {"gpt3-1.3b", "gpt3-13b"}
    for name in TABLE_2_1.keys() - ERRATA.keys():
        assert TABLE_2_1[name] == SIZES[name][:4]


@pytest.mark.parametrize("name, wanted", [("100k", 1e5), ("300k", 3e5), ("1m", 1e6), ("3m", 3e6), ("10m", 1e7)])
def test_extra_small_models_are_named_by_their_layers(name, wanted):
    config = GPTConfig.from_name(f"gpt3-{name}")
    with torch.device("meta"):
        model = GPT(config)
    layers = model.num_params() - (config.vocab_size + config.n_ctx) * config.d_model
    assert abs(layers / wanted - 1) < 0.25
    assert (config.vocab_size, config.n_ctx) == (4353, 256) and len(EXTRA_SMALL) == 5


def test_counts_are_the_numbers_that_exist():
    model = make()
    assert model.num_params() == closed_formula(model.config) == sum(t.numel() for t in model.state_dict().values())


# ---- initialisation ----


def test_initialisation():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=1000, n_ctx=500, n_layers=3, d_model=192, n_heads=4, d_head=48))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif parameter.dim() == 1:
            assert (parameter == 1).all(), name
        else:
            std = 0.01 if "wpe" in name else 0.02
            std = 0.02 / 6**0.5 if name.endswith(("wo.weight", "down.weight")) else std
            assert abs(parameter.std().item() / std - 1) < 0.02, name
            assert abs(parameter.mean().item()) < 0.02 * std * 3, name
            flat = (parameter / std).abs().flatten()
            assert abs((flat > 2).float().mean().item() - 0.0455) < 0.006, name  # normal, neither cut nor uniform


def test_the_stream_of_a_deep_model_stays_small():
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=97, n_ctx=16, n_layers=24, d_model=128, n_heads=4, d_head=32)
    model = GPT(config)
    start = x = model.embeddings(ids(model, 2, 16))
    for block in model.blocks:
        x = block(x)
    assert x.std() < 3 * start.std()


def test_two_models_of_one_seed_are_one_model():
    a, b, c = make(5, 0), make(5, 0), make(6, 0)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    assert not torch.equal(a.blocks[0].mlp.up.weight, c.blocks[0].mlp.up.weight)
    assert not torch.equal(a.blocks[0].mlp.up.weight, a.blocks[1].mlp.up.weight)


# ---- configuration ----


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"n_heads": 4}, "n_heads · d_head = 4 · 8 = 32 is not d_model = 24"),
        ({"n_layers": 0}, "n_layers is 0; it must be a whole number of at least 1"),
        ({"vocab_size": -5}, "vocab_size is -5"),
        ({"n_ctx": 12.0}, "n_ctx is 12.0"),
        ({"n_layers": True}, "n_layers is True"),
        ({"d_model": "24"}, "d_model is '24'"),
        ({"d_head": None}, "d_head is None"),
        ({"bandwidth": 0}, "bandwidth is 0; it must be a whole number of at least 1"),
        ({"bandwidth": 2.0}, "bandwidth is 2.0"),
        ({"attention": ()}, "attention is (); it must be a tuple of 'dense' and 'banded', one at least"),
        ({"attention": []}, "attention is ()"),
        ({"attention": "dense"}, "attention is 'dense'; it must be a tuple"),
        ({"attention": ("dense", "sparse")}, "attention is ('dense', 'sparse')"),
        ({"attention": (["dense"],)}, "attention is (['dense'],)"),
        ({"attention": None}, "attention is None"),
        ({"activation": "gelu_new"}, "activation is 'gelu_new'; there are gelu_tanh, gelu, relu"),
        ({"activation": None}, "activation is None"),
        ({"activation": ["gelu"]}, "activation is ['gelu']"),
        ({"position_offset": -1}, "position_offset is -1; it must be a whole number of at least 0"),
        ({"position_offset": False}, "position_offset is False"),
        ({"qkv_bias": 1}, "qkv_bias is 1; it must be True or False"),
        ({"scaled": "yes"}, "scaled is 'yes'; it must be True or False"),
    ],
)
def test_configs_that_contradict_themselves(changes, words):
    with pytest.raises(ConfigError) as caught:
        GPTConfig(**SMALL | changes)
    assert words in str(caught.value)


def test_a_list_of_kinds_from_json_becomes_a_tuple():
    config = GPTConfig(**SMALL | {"attention": ["banded", "dense"]})
    assert config == GPTConfig(**SMALL | {"attention": ("banded", "dense")}) and hash(config)
    assert GPTConfig(**json.loads(json.dumps(asdict(config)))) == config


def test_from_name():
    assert GPTConfig.from_name("gpt3-1m") == GPTConfig(4353, 256, 5, 128, 4, 32)
    assert GPTConfig.from_name("gpt3-125m", vocab_size=999, n_ctx=77) == GPTConfig(999, 77, 12, 768, 12, 64)
    with pytest.raises(ConfigError, match="no model is called 'gpt3-2b'; there are gpt3-125m, .*gpt3-10m"):
        GPTConfig.from_name("gpt3-2b")
    with pytest.raises(ConfigError, match="n_ctx is 0"):
        GPTConfig.from_name("gpt3-1m", n_ctx=0)
    with pytest.raises(ConfigError, match="vocab_size is 0"):
        GPTConfig.from_name("gpt3-1m", vocab_size=0)


# ---- input of the wrong kind ----


@pytest.mark.parametrize("shape", [(5,), (0,), (1, 0), (0, 5), (1, 2, 3), ()])
def test_tokens_of_a_wrong_shape(shape):
    with pytest.raises(TokenError, match="must be \\(B, T\\) with at least one id, not .*use tokens\\[None\\]"):
        make()(torch.zeros(shape, dtype=torch.long))


def test_tokens_and_targets_that_cannot_be():
    model = make()
    tokens = ids(model, 2, 6)
    with pytest.raises(TokenError, match="61 is not in the vocabulary"):
        model(torch.full((1, 3), 61))
    with pytest.raises(ContextError, match="13 tokens"):
        model(torch.zeros(1, 13, dtype=torch.long))
    with pytest.raises(TokenError, match=r"tokens \(2, 6\) and targets \(3, 4\) must have one shape"):
        model.loss(tokens, ids(model, 3, 4))  # as many, so flattened they would fit
    for wrong in (61, -1, -100):  # -100 would be skipped in silence
        with pytest.raises(TokenError, match=f"{wrong} is not in the vocabulary"):
            model.loss(tokens, torch.full((2, 6), wrong))


# ---- the disk ----


def same(a, b):
    return a.config == b.config and all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_out_and_in_again_is_the_same_to_the_bit(tmp_path):
    model = make()
    model.save_pretrained(tmp_path / "a" / "b")
    again = GPT.from_pretrained(str(tmp_path / "a" / "b"))
    assert same(again, model) and not again.training
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == ["config.json", "model.safetensors"]
    assert json.loads((tmp_path / "a" / "b" / "config.json").read_text()) == SMALL | REST
    tokens = ids(model, 2, 12)
    assert torch.equal(again(tokens), model(tokens))
    again.loss(tokens, tokens).backward()  # it can be trained further
    assert all(parameter.grad is not None and parameter.is_leaf for parameter in again.parameters())


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_survives_the_disk(tmp_path, options):
    model = make(7, bandwidth=3, **options)
    model.save_pretrained(tmp_path)
    again = GPT.from_pretrained(tmp_path)
    assert same(again, model)
    tokens = ids(model, 2, 12)
    assert torch.equal(again(tokens), model(tokens))


def test_a_folder_with_the_six_numbers_only_still_loads(tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    without_header(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    assert same(GPT.from_pretrained(tmp_path), model)


def test_reading_and_writing_go_through_the_hooks(tmp_path, monkeypatch):
    model, calls = make(), []
    monkeypatch.setattr(GPT, "write", staticmethod(lambda *arguments: calls.append(arguments)))
    monkeypatch.setattr(GPT, "read", staticmethod(lambda path: (model.config, model.state_dict())))
    model.save_pretrained(str(tmp_path))
    ((folder, config, tensors),) = calls
    assert folder == tmp_path and config == model.config and tensors.keys() == model.state_dict().keys()
    assert same(GPT.from_pretrained("a/name"), model)


def test_half_precision_on_disk_is_float32_in_memory(tmp_path):
    model = make().half()
    model.save_pretrained(tmp_path)
    again = GPT.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in again.parameters()} == {torch.float32}
    assert same(again, model.float())
    assert (tmp_path / "model.safetensors").stat().st_size < 2 * model.num_params() + 8000


def test_others_may_read_the_file_if_they_may_read_its_neighbour(tmp_path):
    make().save_pretrained(tmp_path)
    modes = {(tmp_path / name).stat().st_mode for name in ("config.json", "model.safetensors")}
    assert len(modes) == 1


@pytest.mark.parametrize("calls", range(4))
@pytest.mark.parametrize("over", [False, True])
def test_killed_anywhere_a_whole_model_loads(tmp_path, monkeypatch, calls, over):
    """Die at the n-th write: the folder holds the old model or the new one, never a mixture."""
    old, new = make(1), make(2, n_layers=3)
    if over:
        old.save_pretrained(tmp_path)
    mortal = Mortal(calls).wrap
    with monkeypatch.context() as patch:
        patch.setattr(module.os, "replace", mortal(os.replace))
        patch.setattr(module, "save_file", mortal(module.save_file))
        if calls < 3:
            with pytest.raises(KeyboardInterrupt):
                new.save_pretrained(tmp_path)
        else:
            new.save_pretrained(tmp_path)
    if calls < 2 and not over:
        with pytest.raises(ConfigError):
            GPT.from_pretrained(tmp_path)
    else:
        assert same(GPT.from_pretrained(tmp_path), new if calls >= 2 else old)
    new.save_pretrained(tmp_path)  # what was left behind does not stand in the way
    assert same(GPT.from_pretrained(tmp_path), new)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def without_header(folder):
    """Take the config out of the header, as in a file that another program wrote."""
    path = folder / "model.safetensors"
    module.save_file(module.load_file(path), path)


def test_a_file_without_a_config_in_its_header_uses_config_json(tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    without_header(tmp_path)
    assert same(GPT.from_pretrained(tmp_path), model)


def complaint(folder):
    with pytest.raises(ConfigError) as caught:
        GPT.from_pretrained(folder)
    return str(caught.value)


def test_folders_that_hold_no_model(tmp_path):
    assert f"{tmp_path / 'nowhere'} has no model.safetensors" in complaint(tmp_path / "nowhere")
    make().save_pretrained(tmp_path)
    without_header(tmp_path)
    (tmp_path / "config.json").unlink()
    assert "has no config.json" in complaint(tmp_path) and "add config.json" in complaint(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 100, 2000, -1])
def test_files_cut_short(tmp_path, keep):
    make().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert f"{path} is damaged" in complaint(tmp_path) and "again" in complaint(tmp_path)


@pytest.mark.parametrize(
    "text, words",
    [
        ("{", "Expecting property name"),
        ("[1, 2]", "must be a mapping"),
        ("", "Expecting value"),
        (json.dumps(SMALL | {"n_heads": 5}), "n_heads · d_head = 5 · 8 = 40"),
        (json.dumps(SMALL | {"colour": 1}), "colour"),
        (json.dumps({k: v for k, v in SMALL.items() if k != "n_ctx"}), "n_ctx"),
        ("\udcff", "decode"),
    ],
)
def test_configs_that_cannot_be_read(tmp_path, text, words):
    make().save_pretrained(tmp_path)
    without_header(tmp_path)
    path = tmp_path / "config.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    message = complaint(tmp_path)
    assert message.startswith(f"{path} holds no config") and words in message
    assert message.endswith(f"it must give {', '.join(SMALL | REST)}")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"vocab_size": 62}, "embeddings.wte.weight is (61, 24), expected (62, 24)"),
        ({"n_layers": 3}, "blocks.2.attention.wk.bias is missing, expected (24,)"),
        ({"n_layers": 1}, "blocks.1.attention.wk.bias is (24,), expected no such tensor"),
    ],
)
def test_tensors_that_do_not_fit_the_config(tmp_path, changes, words):
    make().save_pretrained(tmp_path)
    without_header(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(SMALL | changes))
    assert words in complaint(tmp_path) and str(tmp_path) in complaint(tmp_path)


def test_the_shipped_model_loads():
    model = GPT.from_pretrained(DATA / "models" / "gpt3-1m")
    assert model.config == GPTConfig.from_name("gpt3-1m") and model.num_params() == 1_581_568
    stored = module.load_file(DATA / "models" / "gpt3-1m" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_names_in_a_file_do_not_change():
    """Files outlive code: these names are what models on disk are made of."""
    linears = [f"attention.w{letter}" for letter in "qkvo"] + ["mlp.up", "mlp.down"]
    wanted = {f"{name}.{part}" for name in [*linears, "ln_1", "ln_2"] for part in ("weight", "bias")}
    assert set(Block(GPTConfig(**SMALL)).state_dict()) == wanted
    others = {"embeddings.wte.weight", "embeddings.wpe.weight", "ln_f.weight", "ln_f.bias"}
    assert {name for name in make().state_dict() if not name.startswith("blocks.")} == others
