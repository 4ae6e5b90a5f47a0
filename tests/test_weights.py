"""Other people's models against their own code (transformers), our own format, refusals, kills, and the hub."""

import copy
import json
import math
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.algorithms._checkpoint import checkpoint_wrapper
from torch.nn import functional as F

from gpt3lib import files, weights
from gpt3lib.cache import generate
from gpt3lib.files import INDEX, WeightsError, write_folder
from gpt3lib.model import FORMATS, GPT, ConfigError, GPTConfig
from gpt3lib.texts import DATA
from gpt3lib.weights import LAYOUTS, OtherConfig, OtherGPT, layout_for, make_config, make_model, write_pretrained
from mortal import Mortal
from oracles import named_like_ours

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

MANY = settings(max_examples=200, derandomize=True, deadline=None)
SMALL = {"vocab_size": 37, "n_ctx": 10, "n_layers": 3, "d_model": 24, "n_heads": 3, "d_head": 8}
BENDS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu": "gelu"}
BENDS["relu"] = "relu"
CLASSES = {
    "gpt2": (transformers.GPT2Config, transformers.GPT2LMHeadModel),
    "gpt_neo": (transformers.GPTNeoConfig, transformers.GPTNeoForCausalLM),
    "opt": (transformers.OPTConfig, transformers.OPTForCausalLM),
}
# typed once more, independent of the library's table: their part of a name -> ours
NEO_NAMES = {
    "transformer.": "",
    "h.": "blocks.",
    "attn.attention.out_proj": "attention.wo",
    "attn.attention.q_proj": "attention.wq",
    "attn.attention.k_proj": "attention.wk",
    "attn.attention.v_proj": "attention.wv",
    "mlp.c_fc": "mlp.up",
    "mlp.c_proj": "mlp.down",
    "wte": "embeddings.wte",
    "wpe": "embeddings.wpe",
}
OPT_NAMES = {
    "model.decoder.": "",
    "self_attn_layer_norm": "ln_1",
    "self_attn.out_proj": "attention.wo",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "fc1": "mlp.up",
    "fc2": "mlp.down",
    "embed_tokens": "embeddings.wte",
    "embed_positions": "embeddings.wpe",
}


def shaken(model, seed=0, shake=0.2):
    """Every parameter random, biases and gains too; logits stay of order 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += shake * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def ours(seed=0, **changes):
    return shaken(make_model(make_config(SMALL | changes)), seed)


def tokens_for(vocab_size, length, seed=0):
    return torch.randint(vocab_size, (2, length), generator=torch.Generator().manual_seed(seed))


def gradients(kind, theirs):
    """Their gradients under our names, without the library's table."""
    if kind == "gpt2":
        return named_like_ours(theirs)
    found = {}
    for name, parameter in theirs.named_parameters():
        if kind == "opt" and "layers." in name:
            name = name.replace("final_layer_norm", "ln_2").replace("layers.", "blocks.")
        for old, new in (NEO_NAMES if kind == "gpt_neo" else {**OPT_NAMES, "final_layer_norm": "ln_f"}).items():
            name = name.replace(old, new)
        found[name] = parameter.grad
    return found


def same(a, b):
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return a.config == b.config and all(m == n and torch.equal(p, q) for (m, p), (n, q) in pairs)


def clear_greedy(model, tokens, n):
    """Their greedy text, and whether each step was clear."""
    clear = True
    with torch.no_grad():
        for _ in range(n):
            logits = model(tokens).logits[:, -1]
            best = logits.topk(2).values
            clear &= bool((best[:, 0] - best[:, 1] > 1e-4).all())
            tokens = torch.cat([tokens, logits.argmax(dim=-1, keepdim=True)], dim=1)
    return tokens, clear


# ---- two hundred of each family ----


def check(kind, theirs, folder, seed):
    """Theirs -> disk -> ours -> disk -> theirs: logits, loss, gradients, greedy text; no bit is lost."""
    theirs = shaken(theirs, seed)
    theirs.save_pretrained(folder / "in")
    model = GPT.from_pretrained(folder / "in")
    c = model.config
    assert layout_for(c) == kind and not model.training
    tokens = tokens_for(c.vocab_size, c.n_ctx + 1, seed)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    logits = theirs(inputs).logits
    torch.testing.assert_close(model(inputs), logits, rtol=1e-5, atol=1e-5)
    # in float64: a LayerNorm on four nearly equal numbers makes rounding large. GPT-Neo's scores stay float32
    exact, their_exact = copy.deepcopy(model).double(), copy.deepcopy(theirs).double()
    near = 1e-5 if kind == "gpt_neo" else 1e-9
    loss = F.cross_entropy(their_exact(inputs).logits.flatten(0, 1), targets.flatten())
    our_loss = exact.loss(inputs, targets)
    torch.testing.assert_close(our_loss, loss, rtol=near, atol=near)
    loss.backward()
    our_loss.backward()
    wanted = gradients(kind, their_exact)
    assert wanted.keys() == dict(exact.named_parameters()).keys()
    for name, parameter in exact.named_parameters():
        room = near * max(1.0, wanted[name].abs().max().item())
        torch.testing.assert_close(
            parameter.grad, wanted[name], rtol=near, atol=room, msg=lambda m, n=name: f"{n}: {m}"
        )
    n = min(3, c.n_ctx - 1)
    greedy, clear = clear_greedy(theirs, inputs[:, : c.n_ctx - n], n)
    assert not clear or torch.equal(generate(model, inputs[:, : c.n_ctx - n], n, temperature=0), greedy)
    model.save_pretrained(folder / "out")
    assert same(GPT.from_pretrained(folder / "out"), model)
    back, report = CLASSES[kind][1].from_pretrained(folder / "out", output_loading_info=True)
    assert not any(report.values()), report
    for (name, tensor), (other, original) in zip(back.state_dict().items(), theirs.state_dict().items(), strict=True):
        assert name == other and tensor.dtype == original.dtype and torch.equal(tensor, original)
    torch.testing.assert_close(back.eval()(inputs).logits, logits, rtol=1e-5, atol=1e-5)


shapes = st.fixed_dictionaries(
    {
        "vocab_size": st.integers(3, 60),
        "max_position_embeddings": st.integers(2, 12),
        "num_attention_heads": st.integers(1, 3),
        "hidden_size": st.integers(4, 8),  # of one head; in two numbers a LayerNorm only knows which is larger
        "num_hidden_layers": st.integers(1, 3),
    }
)
seeds = st.integers(0, 10_000)


def widened(shape):
    return shape | {"hidden_size": shape["hidden_size"] * shape["num_attention_heads"]}


@MANY
@given(shapes, st.sampled_from(list(BENDS)), st.booleans(), seeds)
def test_gpt2_and_cerebras_gpt(tmp_path_factory, shape, bend, scaled, seed):
    config = transformers.GPT2Config(**widened(shape), activation_function=bend, scale_attn_weights=scaled)
    check("gpt2", transformers.GPT2LMHeadModel(config), tmp_path_factory.getbasetemp(), seed)


@MANY
@given(
    shapes, st.sampled_from(list(BENDS)), st.lists(st.sampled_from(["global", "local"]), min_size=3, max_size=3), seeds
)
def test_gpt_neo(tmp_path_factory, shape, bend, kinds, seed):
    kinds = kinds[: shape["num_hidden_layers"]]
    config = transformers.GPTNeoConfig(
        **widened(shape), activation_function=bend, attention_types=[[kinds, 1]], window_size=1 + seed % 14
    )
    check("gpt_neo", transformers.GPTNeoForCausalLM(config), tmp_path_factory.getbasetemp(), seed)


@MANY
@given(shapes, st.sampled_from(list(BENDS)), seeds)
def test_opt(tmp_path_factory, shape, bend, seed):
    shape = widened(shape)
    config = transformers.OPTConfig(
        **shape, activation_function=bend, ffn_dim=4 * shape["hidden_size"], pad_token_id=None
    )
    check("opt", transformers.OPTForCausalLM(config), tmp_path_factory.getbasetemp(), seed)


# ---- what config becomes what ----


def theirs_in(folder, kind="gpt2", **changes):
    """A small model of theirs on disk."""
    shape = {"vocab_size": 37, "max_position_embeddings": 10, "num_attention_heads": 3, "hidden_size": 24}
    shape |= {"num_hidden_layers": 2, "ffn_dim": 96} if kind == "opt" else {"num_hidden_layers": 2}
    if kind == "gpt_neo":
        shape |= {"attention_types": [[["global", "local"], 1]], "window_size": 4}
    make_config, make = CLASSES[kind]
    theirs = shaken(make(make_config(**shape | changes)))
    theirs.save_pretrained(folder)
    return theirs


def rewrite(folder, drop=(), **changes):
    """Change words of a config.json."""
    path = folder / "config.json"
    raw = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in raw.items() if name not in drop}))


def edit(folder, change):
    """Change the tensors of a folder."""
    tensors = load_file(folder / "model.safetensors")
    save_file(change(dict(tensors)), folder / "model.safetensors", {"format": "pt"})


def complaint(path):
    with pytest.raises(WeightsError) as caught:
        GPT.from_pretrained(path)
    return str(caught.value)


def test_the_four_families_as_configs(tmp_path):
    theirs_in(tmp_path / "a")
    assert GPT.from_pretrained(tmp_path / "a").config == GPTConfig(37, 10, 2, 24, 3, 8, ("dense",))
    theirs_in(tmp_path / "b", activation_function="gelu", n_inner=96)  # Cerebras-GPT
    assert GPT.from_pretrained(tmp_path / "b").config == OtherConfig(37, 10, 2, 24, 3, 8, ("dense",), activation="gelu")
    theirs_in(tmp_path / "u", scale_attn_weights=False)
    assert GPT.from_pretrained(tmp_path / "u").config == OtherConfig(37, 10, 2, 24, 3, 8, ("dense",), scaled=False)
    theirs_in(tmp_path / "c", "gpt_neo")
    neo = OtherConfig(37, 10, 2, 24, 3, 8, ("dense", "banded"), 4, qkv_bias=False, scaled=False)
    assert GPT.from_pretrained(tmp_path / "c").config == neo
    theirs_in(tmp_path / "d", "opt")
    opt = OtherConfig(37, 10, 2, 24, 3, 8, ("dense",), activation="relu", position_offset=2)
    assert GPT.from_pretrained(tmp_path / "d").config == opt


@pytest.mark.parametrize(
    "types, layers, kinds",
    [
        ([[["global", "local"], 2]], 4, ("dense", "banded")),
        ([[["local", "global"], 2]], 4, ("banded", "dense")),
        ([[["global"], 3]], 3, ("dense",)),
        ([[["global"], 2], [["local"], 1]], 3, ("dense", "dense", "banded")),
        ([[["global", "local"], 1], [["global"], 1]], 3, ("dense", "banded")),
        ([[["local"], 1], [["global", "local"], 1]], 3, ("banded", "dense")),
    ],
)
def test_layer_kinds_become_the_shortest_tuple(types, layers, kinds):
    assert weights.our_kinds({"attention_types": types}, layers) == kinds
    unfolded = [kind for pattern, times in types for kind in pattern * times]
    assert weights.our_kinds({"attention_layers": unfolded}, layers) == kinds


@pytest.mark.parametrize("types", [[[["global"], 1]], [[["global", "sparse"], 1]], None])
def test_layer_kinds_that_fit_no_model(types):
    with pytest.raises(ValueError, match="it must give 'global' or 'local' to 2 layers"):
        weights.our_kinds({"attention_types": types}, 2)


@pytest.mark.parametrize(
    "changes, kind",
    [
        ({}, "gpt2"),  # its band of 256 covers all 10 tracks
        ({"bandwidth": 10}, "gpt2"),
        ({"bandwidth": 9}, "gpt3lib"),
        ({"bandwidth": 3, "attention": ("dense",)}, "gpt2"),
        ({"bandwidth": 3, "attention": ("dense", "dense", "dense", "banded")}, "gpt2"),  # the fourth never comes
        ({"scaled": False, "activation": "gelu"}, "gpt2"),
        ({"qkv_bias": False, "scaled": False, "bandwidth": 3}, "gpt_neo"),
        ({"qkv_bias": False, "scaled": False, "activation": "relu"}, "gpt_neo"),
        ({"qkv_bias": False}, "gpt3lib"),
        ({"position_offset": 2}, "opt"),
        ({"position_offset": 2, "activation": "gelu_tanh", "bandwidth": 3}, "gpt3lib"),
        ({"position_offset": 2, "scaled": False}, "gpt3lib"),
        ({"position_offset": 1}, "gpt3lib"),
    ],
)
@pytest.mark.parametrize("sharded", [False, True])
def test_each_config_goes_out_and_comes_back(tmp_path, changes, kind, sharded):
    model = ours(**changes)
    assert layout_for(model.config) == kind
    if sharded:
        write_pretrained(model, tmp_path, 9000)
    else:
        model.save_pretrained(tmp_path)
    again = GPT.from_pretrained(tmp_path)
    assert same(again, model)  # and the very same config
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw.get("model_type", "gpt3lib") == kind
    tokens = tokens_for(37, 10)
    torch.testing.assert_close(again(tokens), model(tokens))
    if kind == "gpt3lib":
        assert make_config(raw) == model.config
        return
    back, report = CLASSES[kind][1].from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    torch.testing.assert_close(back.eval()(tokens).logits, model(tokens), rtol=1e-5, atol=1e-5)
    c = back.config
    assert (
        c.tie_word_embeddings
        and c.bos_token_id == c.eos_token_id == (2 if kind == "opt" else 36)
        and c.pad_token_id is None
    )
    assert not any(value for name, value in c.to_dict().items() if name in LAYOUTS[kind].dropouts)
    assert c.architectures == [CLASSES[kind][1].__name__]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("changes", [{}, {"position_offset": 2}, {"bandwidth": 3}])
def test_precision_stays_on_disk_and_is_float32_in_memory(tmp_path, dtype, changes):
    model = ours(**changes).to(dtype)
    model.save_pretrained(tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {dtype}
    again = GPT.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in again.parameters()} == {torch.float32}
    assert same(again, model.float())
    if not changes.get("bandwidth"):
        assert transformers.AutoConfig.from_pretrained(tmp_path).dtype == dtype


def test_no_two_tensors_share_memory(tmp_path):
    theirs_in(tmp_path)
    model = GPT.from_pretrained(tmp_path)
    assert len({p.untyped_storage().data_ptr() for p in model.parameters()}) == len(list(model.parameters()))
    assert all(p.is_contiguous() and p.requires_grad for p in model.parameters())


def test_the_shipped_model_travels(tmp_path):
    model = GPT.from_pretrained(DATA / "models" / "shakespeare-1m")
    model.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(theirs).__name__ == "GPT2LMHeadModel"
    tokens = torch.arange(100)[None] * 40
    torch.testing.assert_close(theirs(tokens).logits, model(tokens), rtol=1e-4, atol=1e-4)
    assert same(GPT.from_pretrained(tmp_path), model)


# ---- files as the hub has them ----


def test_names_without_prefix_and_with_masks(tmp_path):
    theirs = theirs_in(tmp_path)

    def as_on_the_hub(tensors):
        tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        for i in range(2):
            tensors[f"h.{i}.attn.bias"] = torch.ones(10, 10).tril()[None, None]
            tensors[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
        return tensors

    edit(tmp_path, as_on_the_hub)
    tokens = tokens_for(37, 10)
    torch.testing.assert_close(GPT.from_pretrained(tmp_path)(tokens), theirs(tokens).logits, rtol=1e-5, atol=1e-5)
    edit(tmp_path, lambda tensors: {name: t for name, t in tensors.items() if name != "h.1.ln_2.bias"})
    assert "h.1.ln_2.bias is missing, expected (24,)" in complaint(tmp_path)


def test_opt_and_neo_as_others_wrote_them(tmp_path):
    theirs = theirs_in(tmp_path / "opt", "opt", pad_token_id=1)
    edit(tmp_path / "opt", lambda tensors: {name.removeprefix("model."): t for name, t in tensors.items()})
    tokens = tokens_for(37, 10)
    model = GPT.from_pretrained(tmp_path / "opt")
    torch.testing.assert_close(model(tokens), theirs(tokens).logits, rtol=1e-5, atol=1e-5)
    theirs = theirs_in(tmp_path / "neo", "gpt_neo")
    masks = {"transformer.h.0.attn.attention.bias": torch.ones(1, 1, 10, 10, dtype=torch.bool)}
    masks["transformer.h.1.attn.attention.masked_bias"] = torch.tensor(-1e9)
    edit(tmp_path / "neo", lambda tensors: tensors | masks)
    model = GPT.from_pretrained(tmp_path / "neo")
    torch.testing.assert_close(model(tokens), theirs(tokens).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_second_copy_of_the_token_table(tmp_path, dtype):
    theirs_in(tmp_path)
    table = load_file(tmp_path / "model.safetensors")["transformer.wte.weight"]
    edit(tmp_path, lambda tensors: tensors | {"lm_head.weight": table.clone()})
    GPT.from_pretrained(tmp_path)
    edit(tmp_path, lambda tensors: tensors | {"lm_head.weight": (table + 1).to(dtype)})
    words = "lm_head.weight differs from transformer.wte.weight; our way out is the token table itself"
    assert words in complaint(tmp_path)


def test_words_that_old_configs_lack(tmp_path):
    theirs = theirs_in(tmp_path)
    keep = ("model_type", "vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
    rewrite(tmp_path, drop=[name for name in json.loads((tmp_path / "config.json").read_text()) if name not in keep])
    tokens = tokens_for(37, 10)
    torch.testing.assert_close(GPT.from_pretrained(tmp_path)(tokens), theirs(tokens).logits, rtol=1e-5, atol=1e-5)
    theirs_in(tmp_path / "opt", "opt")
    rewrite(tmp_path / "opt", drop=["activation_function", "enable_bias", "word_embed_proj_dim", "ffn_dim"])
    assert GPT.from_pretrained(tmp_path / "opt").config.activation == "relu"


# ---- refusals ----

REFUSALS = [
    ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before is False; it must be True: our layers normalise"),
    ("opt", {"_remove_final_layer_norm": True}, "_remove_final_layer_norm is True; it must be False"),
    ("opt", {"enable_bias": False}, "enable_bias is False; it must be True"),
    ("opt", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine is False; it must be True"),
    ("opt", {"word_embed_proj_dim": 12}, "word_embed_proj_dim is 12; it must be 24, 1 × width"),
    ("opt", {"ffn_dim": 100}, "ffn_dim is 100; it must be 96, 4 × width"),
    ("opt", {"activation_function": "swish"}, "activation_function is 'swish'; there are gelu_new, gelu, relu"),
    ("opt", {"tie_word_embeddings": False}, "tie_word_embeddings is False; it must be True"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True; it must be False"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention is True; it must be False"),
    ("gpt2", {"n_inner": 50}, "n_inner is 50; it must be 96, 4 × width"),
    ("gpt2", {"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon is 1e-06; it must be 1e-05: our LayerNorm adds 1e-5"),
    ("gpt2", {"activation_function": "quick_gelu"}, "activation_function is 'quick_gelu'"),
    ("gpt2", {"tie_word_embeddings": False}, "tie_word_embeddings is False; it must be True"),
    ("gpt2", {"n_embd": None}, "n_embd is None; it must be a whole number, 1 or more"),
    ("gpt2", {"n_head": 0}, "n_head is 0; it must be a whole number, 1 or more"),
    ("gpt2", {"n_head": 5}, "n_heads · d_head = 5 · 4 = 20 is not d_model = 24"),
    ("gpt2", {"model_type": "llama"}, "the model_type is 'llama'; we can read gpt2, gpt_neo, opt, gpt3lib"),
    ("gpt_neo", {"intermediate_size": 50}, "intermediate_size is 50; it must be 96"),
    ("gpt_neo", {"attention_types": [[["global"], 1]]}, "to 2 layers"),
    ("gpt_neo", {"window_size": 0}, "bandwidth is 0"),
    ("gpt_neo", {"attention_types": [[["global"], 10**10]]}, "to 2 layers, as [[['global'], 2]] does"),
    ("gpt_neo", {"attention_types": [[[], 10**10]]}, "to 2 layers"),
    ("gpt_neo", {"attention_types": 5}, "attention_types is 5; it must give 'global' or 'local' to 2 layers"),
    ("gpt_neo", {"attention_types": [[[["global"]], 2]]}, "to 2 layers"),
    ("gpt_neo", {"attention_types": None, "attention_layers": [["global"], "local"]}, "to 2 layers"),
    ("gpt_neo", {"num_layers": 10**9, "attention_types": [[["global"], 10**9]]}, "to 1000000000 layers"),
    ("gpt2", {"activation_function": ["gelu"]}, "activation_function is ['gelu']; there are gelu_new"),
    ("gpt2", {"n_layer": 10**9}, "too few numbers for GPTConfig(vocab_size=37, n_ctx=10, n_layers=1000000000"),
    ("gpt2", {"vocab_size": 10**19}, "too few numbers for GPTConfig(vocab_size=10000000000000000000"),
    ("gpt2", {"n_positions": 10**30}, "too few numbers for"),
    ("gpt2", {"n_embd": 10**9, "n_head": 1, "n_inner": None}, "too few numbers for"),
    ("gpt2", {"n_embd": 10**400, "n_head": 1, "n_inner": None}, "too few numbers for"),
    ("gpt_neo", {"tie_word_embeddings": False}, "tie_word_embeddings is False"),
    ("gpt_neo", {"layer_norm_epsilon": 1e-12}, "layer_norm_epsilon is 1e-12"),
]


@pytest.mark.parametrize("kind, changes, words", REFUSALS, ids=[f"{k}-{next(iter(c))}" for k, c, _ in REFUSALS])
def test_models_that_we_cannot_be(tmp_path, monkeypatch, kind, changes, words):
    theirs_in(tmp_path, kind)
    rewrite(tmp_path, **changes)
    monkeypatch.setattr(files.Stored, "__getitem__", lambda *_: pytest.fail("a tensor was read"))
    message = complaint(tmp_path)
    assert words in message and str(tmp_path) in message
    assert not issubclass(WeightsError, ConfigError) and issubclass(WeightsError, ValueError)


@pytest.mark.parametrize(
    "kind, change, words",
    [
        (
            "gpt2",
            lambda t: t.pop("transformer.h.1.attn.c_attn.bias"),
            "h.1.attn.c_attn.bias is missing, expected (72,)",
        ),
        (
            "gpt2",
            lambda t: t.update({"transformer.h.2.ln_1.bias": torch.ones(24)}),
            "h.2.ln_1.bias is (24,), expected no",
        ),
        (
            "gpt2",
            lambda t: t.update({"transformer.wpe.weight": torch.ones(9, 24)}),
            "wpe.weight is (9, 24), expected (10, 24)",
        ),
        (
            "gpt2",
            lambda t: t.update({"transformer.h.0.mlp.c_fc.weight": torch.ones(96, 24)}),
            "transformer.h.0.mlp.c_fc.weight is (96, 24), expected (24, 96)",
        ),
        (
            "gpt_neo",
            lambda t: t.update({"transformer.h.0.attn.attention.q_proj.bias": torch.ones(24)}),
            "transformer.h.0.attn.attention.q_proj.bias is (24,), expected no such tensor",
        ),
        (
            "opt",
            lambda t: t.pop("model.decoder.final_layer_norm.bias"),
            "model.decoder.final_layer_norm.bias is missing",
        ),
        ("opt", lambda t: t.pop("model.decoder.embed_tokens.weight"), "model.decoder.embed_tokens.weight is missing"),
        (
            "gpt2",
            lambda t: t.update({"transformer.ln_f.bias": torch.ones(24, dtype=torch.int8)}),
            "transformer.ln_f.bias holds I8; it must be F64, F32, F16 or BF16, not quantised",
        ),
    ],
)
def test_tensors_are_named_as_the_file_names_them(tmp_path, monkeypatch, kind, change, words):
    theirs_in(tmp_path, kind)

    def changed(tensors):
        change(tensors)
        return tensors

    edit(tmp_path, changed)
    monkeypatch.setattr(files.Stored, "__getitem__", lambda *_: pytest.fail("a tensor was read"))
    assert words in complaint(tmp_path)


def test_names_with_something_before_them_and_a_mark_before_the_config(tmp_path):
    theirs_in(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text(), encoding="utf-8-sig")
    GPT.from_pretrained(tmp_path)
    edit(tmp_path, lambda tensors: tensors | {"score.weight": torch.ones(2, 24)})
    assert complaint(tmp_path).endswith("score.weight is (2, 24), expected no such tensor in a GPT of this config")
    edit(
        tmp_path, lambda tensors: {f"base_model.model.{name}": t for name, t in tensors.items() if "score" not in name}
    )
    assert "; all names begin with 'base_model.model.transformer.'" in complaint(tmp_path)


@pytest.mark.parametrize("text", ['{"vocab_size": ', '{"layout": 1}', "[]", "{}", "[" * 200_000])
def test_a_config_among_the_tensors_that_is_broken(tmp_path, text):
    model = ours()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt", "layout": "gpt2", "config": text})
    assert "the config among the tensors" in complaint(tmp_path)
    about = {"layout": "tomorrow's", "config": json.dumps(asdict(model.config))}
    save_file(tensors, tmp_path / "model.safetensors", about)
    assert '"tomorrow\'s"; we can read gpt2' in complaint(tmp_path)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_files_cut_short(tmp_path, keep):
    theirs_in(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert f"{path} is damaged" in complaint(tmp_path) and "again" in complaint(tmp_path)


def test_pickles_are_refused(tmp_path):
    theirs_in(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    message = complaint(tmp_path)
    assert "has no safetensors but pickles (pytorch_model.bin), which can run any code" in message
    assert "load it once with transformers and save it with save_pretrained" in message


def test_a_file_is_no_folder_and_a_folder_may_be_empty(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"")
    assert "x.safetensors is a file; give the folder that it lies in" in complaint(tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match="has no model.safetensors"):
        GPT.from_pretrained(tmp_path)


# ---- what no file can hold ----


def on(path, value):
    """A change of a model: the attribute at this path becomes this value, or what it makes of the old one."""

    def change(model):
        *places, last = path.split(".")
        for place in places:
            model = getattr(model, place)
        setattr(
            model, last, value(getattr(model, last)) if callable(value) and not isinstance(value, nn.Module) else value
        )

    return change


def typed(dtype):
    return lambda p: nn.Parameter(p.detach().to(dtype), requires_grad=False)


HALF = "blocks.0.mlp.up.weight"
LOST = {
    "value_head.bias": lambda m: setattr(m, "value_head", nn.Linear(24, 1)),
    "blocks.1.mlp.up.0.bias": on("blocks.1.mlp.up", lambda up: nn.Sequential(up)),
    "embeddings.wte.weight": on("embeddings.wte", nn.Embedding(128, 24)),
    "blocks.2.mlp.down.bias": lambda m: setattr(m.blocks[2].mlp.down, "bias", None),
    "blocks.2.attention.wk.bias": lambda m: m.blocks.__delitem__(2),
    "blocks.3.attention.wk.bias": lambda m: m.blocks.append(make_model(m.config).blocks[0]),
    "mask": lambda m: m.register_buffer("mask", torch.ones(3)),
    "blocks.0.attention.lora": lambda m: setattr(m.blocks[0].attention, "lora", nn.Parameter(torch.ones(3))),
    "blocks.0.mlp.up.parametrizations.weight.original": lambda m: nn.utils.parametrize.register_parametrization(
        m.blocks[0].mlp.up, "weight", nn.Identity()
    ),
    "blocks.1.ln_1.eps": on("blocks.1.ln_1.eps", 1e-6),
    "blocks.1.attention.scale": on("blocks.1.attention.scale", 1.0),
    "blocks.1.attention.bandwidth": on("blocks.1.attention.bandwidth", 5),
    "blocks.0.mlp.activation.__class__": on("blocks.0.mlp.activation", nn.ReLU()),
    "blocks.0.mlp.activation.approximate": on("blocks.0.mlp.activation", nn.GELU()),
    "blocks.0.attention.wq.weight": on("blocks.0.attention.wq.weight", typed(torch.int8)),
    "blocks.0.attention.wo.weight": on("blocks.0.attention.wo.weight", typed(torch.complex64)),
    HALF: on(HALF, typed(torch.float8_e4m3fn)),
    "ln_f.weight": lambda m: setattr(m, "ln_f", nn.LayerNorm(24, device="meta")),
    # classes of one's own, whatever they are called, and wrapped or not
    "blocks.1.mlp.up.__class__": lambda m: become(m.blocks[1].mlp.up),
    "blocks.1.mlp.__class__": lambda m: m.blocks[1].__setattr__("mlp", Doubled(m.blocks[1].mlp)),
    "hidden": lambda m: become(m, hidden=lambda *_: 0),
    "forward": lambda m: become(m, forward=lambda *_: 0),
    "loss": lambda m: setattr(m, "loss", print),
    "blocks.2.mlp.forward": lambda m: setattr(m.blocks[2].mlp, "forward", print),
    "embeddings.wte.max_norm": on("embeddings.wte.max_norm", 1.0),
    "number of tensors": lambda m: m.register_buffer("mask", torch.ones(3), persistent=False),
    "number of tensors ": lambda m: setattr(m.blocks[2], "mlp", m.blocks[0].mlp),
}


def become(part, **methods):
    """Give a part a class of its own with the old one's name."""
    part.__class__ = type(type(part).__name__, (type(part),), methods)


class Doubled(nn.Module):
    """A wrapper of one's own: what is in it has the names of the twin's."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return 2 * self.module(x)


class Talkative(GPT):
    def talk(self):
        return self.config.n_ctx


def test_a_child_that_computes_the_same_is_written(tmp_path):
    model, wrap = Talkative(GPTConfig(**SMALL)), checkpoint_wrapper.checkpoint_wrapper
    model.blocks[0].register_forward_hook(lambda *_: None)
    model.blocks[1], model.blocks[2].mlp = wrap(model.blocks[1]), torch.compile(model.blocks[2].mlp)
    write_pretrained(torch.compile(model), tmp_path)
    assert same(GPT.from_pretrained(tmp_path), GPT(model.config))


@pytest.mark.parametrize("extras", [{"eos_token_id": torch.tensor(3)}, {"x": {1, 2}}, {"x": np.int64(3)}, [1], 5, "x"])
def test_extras_that_json_has_not(tmp_path, extras):
    model = ours()
    model.extras = extras
    with pytest.raises(WeightsError, match="extras .* are no words for JSON"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("shard_bytes", [None, 9000])
@pytest.mark.parametrize("name", LOST)
def test_what_would_not_come_back_is_not_written(tmp_path, name, shard_bytes):
    """The message names the part, and a good folder stays as it is, byte for byte."""
    model = ours(bandwidth=3)
    write_pretrained(model, tmp_path, shard_bytes)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    LOST[name](model)
    with pytest.raises(WeightsError) as caught:
        write_pretrained(model, tmp_path, shard_bytes)
    assert str(caught.value).startswith(f"{name.strip()} ")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    with pytest.raises(WeightsError):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_config_that_is_not_the_models(tmp_path):
    model = OtherGPT(OtherConfig(**SMALL, activation="relu"))
    model.config = replace(model.config, activation="gelu")
    with pytest.raises(
        WeightsError, match="activation.__class__ is <.*ReLU'>; made again from the model's config, it is <.*GELU'>"
    ):
        model.save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match="a Linear is no GPT"):
        write_pretrained(nn.Linear(2, 2), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neo", "opt", "gpt3lib"])
def test_odd_tensors_that_a_file_can_hold(tmp_path, kind):
    options = {"gpt_neo": {"qkv_bias": False, "scaled": False, "bandwidth": 3}, "opt": {"position_offset": 2}}
    model = ours(**options.get(kind, {"bandwidth": 3} if kind == "gpt3lib" else {}))
    with torch.no_grad():
        model.ln_f.bias[3] = math.nan
        model.blocks[0].mlp.up.weight = nn.Parameter(torch.randn(24, 96).T)
        model.blocks[1].mlp.up.weight.data = model.blocks[0].mlp.up.weight.data  # two layers, one memory
    model.blocks[0].bfloat16()
    model.save_pretrained(tmp_path)
    again = GPT.from_pretrained(tmp_path).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again[name].nan_to_num(), tensor.float().nan_to_num())
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw.get("dtype", "float32") == "float32"  # the type that holds them all
    with torch.inference_mode():
        write_pretrained(ours().bfloat16(), tmp_path, 9000)


def test_compiled_models_and_their_files(tmp_path):
    model = ours()
    write_pretrained(torch.compile(model), tmp_path / "a")
    assert same(GPT.from_pretrained(tmp_path / "a"), model)
    model.blocks[1] = torch.compile(model.blocks[1])
    model.save_pretrained(tmp_path / "b")
    right = GPT.from_pretrained(tmp_path / "a").state_dict()
    for prefix in ("_orig_mod.", "module.", "module._orig_mod."):
        edit(tmp_path / "b", lambda tensors, p=prefix: {p + name: t for name, t in tensors.items()})
        (tmp_path / "b" / "config.json").write_text((tmp_path / "a" / "config.json").read_text())
        found = GPT.from_pretrained(tmp_path / "b").state_dict()
        assert found.keys() == right.keys() and all(torch.equal(found[name], right[name]) for name in right)
        edit(tmp_path / "b", lambda tensors, p=prefix: {name.removeprefix(p): t for name, t in tensors.items()})
    edit(tmp_path / "b", lambda tensors: tensors | {"module.transformer.ln_f.bias": torch.ones(24)})
    assert "module.transformer.ln_f.bias is (24,), expected no such tensor" in complaint(tmp_path / "b")


# ---- ids that end a text, and the type of the numbers ----


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neo", "opt"])
@pytest.mark.parametrize("eos", [5, [5, 7], None])
def test_token_ids_survive_the_way_through_us(tmp_path, kind, eos):
    ids = {"bos_token_id": 3, "eos_token_id": eos, "pad_token_id": 1}
    theirs_in(tmp_path / "a", kind, **ids)
    GPT.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    write_pretrained(GPT.from_pretrained(tmp_path / "b"), tmp_path / "c", 9000)
    for folder in ("b", "c"):
        back = CLASSES[kind][1].from_pretrained(tmp_path / folder)
        assert {word: getattr(back.config, word) for word in ids} == ids
        assert back.generation_config.eos_token_id == eos
        old = transformers.AutoConfig.from_pretrained(tmp_path / "a").to_dict()
        assert {word: back.config.to_dict()[word] for word in LAYOUTS[kind].dropouts}.items() <= old.items()


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neo", "opt"])
def test_a_word_that_is_edited_or_missing(tmp_path, kind):
    theirs_in(tmp_path / "a", kind)
    rewrite(tmp_path / "a", drop=["bos_token_id", "eos_token_id", "pad_token_id"])
    for old, new in ("ab", "bc"):
        GPT.from_pretrained(tmp_path / old).save_pretrained(tmp_path / new)
        assert "_token_id" not in (tmp_path / new / "config.json").read_text()
    rewrite(tmp_path / "c", eos_token_id=7)
    GPT.from_pretrained(tmp_path / "c").save_pretrained(tmp_path / "d")
    assert json.loads((tmp_path / "d" / "config.json").read_text())["eos_token_id"] == 7
    (tmp_path / "d" / "config.json").write_text("[" * 200_000)
    assert GPT.from_pretrained(tmp_path / "d").extras["eos_token_id"] == 7


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float32])
def test_the_type_of_the_numbers_in_memory(tmp_path, dtype):
    model = ours().to(dtype)
    model.save_pretrained(tmp_path)
    for wanted in (None, torch.bfloat16, torch.float32, torch.float64):
        again = GPT.from_pretrained(tmp_path, dtype=wanted)
        assert {parameter.dtype for parameter in again.parameters()} == {wanted or dtype}
        for name, tensor in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor.to(wanted or dtype))


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.float8_e4m3fn, "auto", "float32", float, 3])
def test_types_that_no_model_has(tmp_path, dtype):
    with pytest.raises(WeightsError, match="it must be torch.float32, float16, bfloat16, float64, or None"):
        GPT.from_pretrained(tmp_path, dtype=dtype)


MEASURE = """
import re, sys, torch
from gpt3lib import GPT
from gpt3lib.weights import write_pretrained
def most():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
GPT.from_pretrained(sys.argv[1])
before = most()
model = GPT.from_pretrained(sys.argv[2])
print((most() - before) / sum(p.nbytes for p in model.parameters()))
open("/proc/self/clear_refs", "w").write("5")
before = most()
write_pretrained(model, sys.argv[2], eval(sys.argv[3]))
print((most() - before) / sum(p.nbytes for p in model.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells a process its peak of memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard_bytes, bound", [(None, 1.45), (8_400_000, 0.95)])
def test_memory_of_loading_and_saving(tmp_path, dtype, shard_bytes, bound):
    """Of 100 MB: little more than the model to read it; a copy to write it, in shards what c_attn joins, and two."""
    ours().save_pretrained(tmp_path / "small")
    config = GPTConfig(4000, 128, 8, 512, 8, 64, ("dense",))
    GPT(config).to(dtype).save_pretrained(tmp_path / "large")
    command = [sys.executable, "-c", MEASURE, tmp_path / "small", tmp_path / "large", str(shard_bytes)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    loading, saving = map(float, run.stdout.split())
    assert loading < 1.35 and saving < bound


# ---- shards ----


def listing(folder):
    return sorted(path.name.split("-")[0] for path in folder.iterdir() if not path.name.startswith("model-"))


@pytest.mark.parametrize("size, n", [(1, 43), (9000, 17), (10**9, 1)])
def test_shards_hold_every_tensor_once(tmp_path, size, n):
    model = ours(scaled=False, qkv_bias=False)
    write_pretrained(model, tmp_path, size)
    index = json.loads((tmp_path / INDEX).read_text())
    files = set(index["weight_map"].values())
    found = [name for file in files for name in load_file(tmp_path / file)]
    assert sorted(found) == sorted(index["weight_map"]) and index["metadata"]["total_size"] == 4 * model.num_params()
    assert len(files) == n
    for file in files:
        parts = load_file(tmp_path / file)
        assert sum(part.nbytes for part in parts.values()) <= size or len(parts) == 1
    assert listing(tmp_path) == ["config.json", INDEX]


def test_transformers_writes_shards_that_we_read(tmp_path):
    theirs = theirs_in(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    theirs.save_pretrained(tmp_path, max_shard_size=8000)
    assert (tmp_path / INDEX).is_file() and not (tmp_path / "model.safetensors").exists()
    tokens = tokens_for(37, 10)
    torch.testing.assert_close(GPT.from_pretrained(tmp_path)(tokens), theirs(tokens).logits, rtol=1e-5, atol=1e-5)
    (tmp_path / "config.json").unlink()
    assert "has no config.json, and its tensors carry no config" in complaint(tmp_path)


@pytest.mark.parametrize("size", [0, -1, 2.5, "1GB", True])
def test_a_size_that_is_none(tmp_path, size):
    with pytest.raises(WeightsError, match="shard_bytes is .*; it must be a whole number, 1 or more"):
        write_pretrained(ours(), tmp_path, size)


def test_shards_that_are_missing_damaged_or_misnamed(tmp_path):
    write_pretrained(ours(), tmp_path, 9000)
    index = json.loads((tmp_path / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    good = (tmp_path / files[1]).read_bytes()
    (tmp_path / files[1]).write_bytes(good[:-9])
    assert f"{tmp_path / files[1]} is damaged" in complaint(tmp_path)
    (tmp_path / files[1]).unlink()
    assert f"has no {files[1]}, which its index names" in complaint(tmp_path)
    (tmp_path / files[1]).write_bytes(good)
    moved = index["weight_map"] | {"transformer.wpe.weight": files[-1]}
    (tmp_path / INDEX).write_text(json.dumps(index | {"weight_map": moved}))
    assert f"says that transformer.wpe.weight lies in {files[-1]}, but it does not" in complaint(tmp_path)
    moved = index["weight_map"] | {"transformer.wpe.weight": f"../{tmp_path.name}/{files[0]}"}
    (tmp_path / INDEX).write_text(json.dumps(index | {"weight_map": moved}))
    assert "but it does not" in complaint(tmp_path)  # an index may not lead out of its folder
    fewer = {name: file for name, file in index["weight_map"].items() if name != "transformer.wpe.weight"}
    (tmp_path / INDEX).write_text(json.dumps(index | {"weight_map": fewer}))
    assert "transformer.wpe.weight is missing, expected (10, 24)" in complaint(tmp_path)
    for text in ("{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "[" * 200_000):
        (tmp_path / INDEX).write_text(text)
        assert f"{tmp_path / INDEX} is damaged" in complaint(tmp_path)


# ---- kills ----


def save(model, folder, way):
    if way == "shards":
        write_pretrained(model, folder, 25_000)
    elif way == "theirs":
        theirs_in(folder, "opt")
    elif way == "their shards":
        theirs_in(folder, max_position_embeddings=11).save_pretrained(folder, max_shard_size=25_000)
        (folder / "model.safetensors").unlink()
    elif way == "book":
        about = {"layout": "gpt3lib", "config": json.dumps(asdict(model.config))}
        write_folder(folder, model.state_dict(), about, json.dumps(asdict(model.config)))
    elif way != "nothing":
        model.save_pretrained(folder)


@pytest.mark.parametrize("before", ["nothing", "single", "shards", "theirs", "their shards", "book"])
@pytest.mark.parametrize("after", ["single", "shards"])
@pytest.mark.parametrize("changes", [{}, {"bandwidth": 3}])
def test_killed_anywhere_a_whole_model_loads(tmp_path, monkeypatch, before, after, changes):
    """Die at the n-th rename or removal, for every n: what loads is the old model or the new one, and new stays new."""
    new, states = ours(2, **changes), []
    for calls in range(100):
        folder = tmp_path / str(calls)
        folder.mkdir()
        save(ours(1, activation="gelu"), folder, before)
        old = GPT.from_pretrained(folder) if before != "nothing" else None
        mortal = Mortal(calls).wrap
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", mortal(os.replace))
            patch.setattr(os, "unlink", mortal(os.unlink))
            patch.setattr(Path, "unlink", mortal(Path.unlink))
            patch.setattr(files, "save_file", mortal(files.save_file))
            patch.setattr(Path, "write_bytes", mortal(Path.write_bytes))
            try:
                save(new, folder, after)
                finished = True
            except KeyboardInterrupt:
                finished = False
        try:
            found = GPT.from_pretrained(folder)
            states.append("new" if same(found, new) else "old" if old and same(found, old) else "mixture")
        except WeightsError:
            states.append("none" if before == "nothing" else "broken")
        if finished:
            break
        save(new, folder, after)  # what was left behind does not stand in the way
        assert same(GPT.from_pretrained(folder), new)
    assert states[-1] == "new" and states[0] in ("old", "none")
    assert states == sorted(states, key=["none", "old", "new"].index)  # never back, no mixture, never broken
    left = {path.name for path in folder.iterdir()} - {"generation_config.json"}
    places = set() if after == "single" else set(json.loads((folder / INDEX).read_text())["weight_map"].values())
    assert left == {"config.json", *(["model.safetensors"] if after == "single" else [INDEX]), *places}


def test_a_file_of_ones_own_beside_the_model_stays(tmp_path):
    (tmp_path / "model-of-mine.safetensors").write_bytes(b"x")
    write_pretrained(ours(), tmp_path, 9000)
    ours().save_pretrained(tmp_path)
    assert (tmp_path / "model-of-mine.safetensors").exists()


# ---- our own format ----


REST = {"attention": ["dense", "banded"], "bandwidth": 256}
OPTIONS = [
    {"bandwidth": 3},
    {"attention": ("dense",), "bandwidth": 3},
    {"attention": ("banded", "banded", "dense"), "bandwidth": 3},
    {"qkv_bias": False, "bandwidth": 3},
    {"scaled": False, "bandwidth": 3},
    {"activation": "gelu", "bandwidth": 3},
    {"activation": "relu", "bandwidth": 3},
    {"position_offset": 2, "bandwidth": 3},
    {"qkv_bias": False, "scaled": False, "activation": "relu", "position_offset": 3, "attention": ("banded",)},
]


def in_our_format(folder, **changes):
    """A model in the book's own layout, its band too narrow for GPT-2's."""
    model = ours(bandwidth=3, **changes)
    model.save_pretrained(folder)
    return model


def without_header(folder):
    """Take the config out of the header, as in a file that another program wrote."""
    path = folder / "model.safetensors"
    save_file(load_file(path), path)


def test_out_and_in_again_is_the_same_to_the_bit(tmp_path):
    folder = tmp_path / "a" / "b"
    model = in_our_format(folder)
    again = GPT.from_pretrained(str(folder))
    assert same(again, model) and type(again) is GPT and not again.training
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert json.loads((folder / "config.json").read_text()) == SMALL | REST | {"bandwidth": 3}
    assert load_file(folder / "model.safetensors").keys() == model.state_dict().keys()
    tokens = tokens_for(37, 10)
    assert torch.equal(again(tokens), model(tokens))
    again.loss(tokens, tokens).backward()  # it can be trained further
    assert all(parameter.grad is not None and parameter.is_leaf for parameter in again.parameters())


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_survives_the_disk(tmp_path, options):
    model = ours(7, **options)
    model.save_pretrained(tmp_path)
    again = GPT.from_pretrained(tmp_path)
    assert same(again, model) and type(again) is type(model)
    tokens = tokens_for(37, 10)
    assert torch.equal(again(tokens), model(tokens))


def test_a_folder_with_the_six_numbers_only_still_loads(tmp_path):
    model = ours()
    weights.write_folder(tmp_path, model.state_dict(), {}, json.dumps(SMALL))
    assert same(GPT.from_pretrained(tmp_path), model)


def test_reading_and_writing_go_through_the_registry(tmp_path, monkeypatch):
    assert FORMATS["read"] is weights.read_pretrained and FORMATS["write"] is write_pretrained
    model, calls = ours(), []
    monkeypatch.setitem(FORMATS, "write", lambda *arguments: calls.append(arguments))
    monkeypatch.setitem(FORMATS, "read", lambda *arguments: (*arguments, model))
    model.save_pretrained(str(tmp_path))
    assert calls == [(model, str(tmp_path))]
    assert GPT.from_pretrained("a/name") == ("a/name", torch.float32, model)
    assert GPT.from_pretrained("a/name", dtype=None) == ("a/name", None, model)


def test_half_precision_on_disk_takes_half_the_room(tmp_path):
    model = ours().half()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size < 2 * model.num_params() + 8000


def test_a_file_without_a_config_in_its_header_uses_config_json(tmp_path):
    model = in_our_format(tmp_path)
    without_header(tmp_path)
    assert same(GPT.from_pretrained(tmp_path), model)


def test_the_header_counts_not_the_config_json_beside_it(tmp_path):
    model = in_our_format(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(SMALL | {"n_layers": 2}))
    assert same(GPT.from_pretrained(tmp_path), model)


def test_folders_that_hold_no_model(tmp_path):
    assert f"{tmp_path / 'nowhere'} has no model.safetensors" in complaint(tmp_path / "nowhere")
    in_our_format(tmp_path)
    without_header(tmp_path)
    (tmp_path / "config.json").unlink()
    assert "has no config.json" in complaint(tmp_path) and "add the config.json" in complaint(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 100, 2000, -1])
def test_our_files_cut_short(tmp_path, keep):
    in_our_format(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert f"{path} is damaged" in complaint(tmp_path) and "again" in complaint(tmp_path)


@pytest.mark.parametrize(
    "text, words",
    [
        ("{", "Expecting property name"),
        ("[1, 2]", "it holds a list, not names with values"),
        ("", "Expecting value"),
        (json.dumps(SMALL | {"n_heads": 5}), "n_heads · d_head = 5 · 8 = 40"),
        (json.dumps(SMALL | {"colour": 1}), "colour"),
        (json.dumps({k: v for k, v in SMALL.items() if k != "n_ctx"}), "n_ctx"),
        ("\udcff", "decode"),
        ("[" * 200_000, "recursion"),
        ('{"n_embd": 24, "vocab_size": 37}', "it has no model_type; add gpt2, gpt_neo or opt to it"),
        ("{}", "it has no model_type"),
        (json.dumps(SMALL | {"model_type": ["gpt2"]}), "the model_type is ['gpt2']; we can read gpt2"),
    ],
)
def test_configs_that_cannot_be_read(tmp_path, text, words):
    in_our_format(tmp_path)
    without_header(tmp_path)
    path = tmp_path / "config.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    message = complaint(tmp_path)
    assert message.startswith(f"{path}: ") and words in message


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"vocab_size": 38}, "embeddings.wte.weight is (37, 24), expected (38, 24)"),
        ({"n_layers": 4}, "blocks.3.attention.wk.bias is missing, expected (24,)"),
        ({"n_layers": 1}, "blocks.1.attention.wk.bias is (24,), expected no such tensor"),
    ],
)
def test_tensors_that_do_not_fit_the_config(tmp_path, changes, words):
    in_our_format(tmp_path)
    without_header(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(SMALL | changes))
    assert words in complaint(tmp_path) and str(tmp_path) in complaint(tmp_path)


def test_the_shipped_model_loads():
    model = GPT.from_pretrained(DATA / "models" / "shakespeare-1m")
    assert model.config == GPTConfig.from_name("gpt3-1m", n_ctx=256, bandwidth=256) and model.num_params() == 1_581_568
    stored = load_file(DATA / "models" / "shakespeare-1m" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


# ---- the config of other people's models, and the model that it makes ----


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"activation": "gelu_new"}, "activation is 'gelu_new'; there are gelu_tanh, gelu, relu"),
        ({"activation": None}, "activation is None"),
        ({"activation": ["gelu"]}, "activation is ['gelu']"),
        ({"position_offset": -1}, "position_offset is -1; it must be a whole number, 0 or more"),
        ({"position_offset": False}, "position_offset is False"),
        ({"position_offset": 2.0}, "position_offset is 2.0"),
        ({"qkv_bias": 1}, "qkv_bias is 1; it must be True or False"),
        ({"scaled": "yes"}, "scaled is 'yes'; it must be True or False"),
        ({"n_heads": 4}, "n_heads · d_head = 4 · 8 = 32 is not d_model = 24"),
    ],
)
def test_configs_that_contradict_themselves(changes, words):
    with pytest.raises(ConfigError) as caught:
        OtherConfig(**SMALL | changes)
    assert words in str(caught.value)


def test_a_config_is_an_other_one_only_where_it_differs():
    usual = {"qkv_bias": True, "scaled": True, "activation": "gelu_tanh", "position_offset": 0}
    assert make_config(SMALL | usual) == GPTConfig(**SMALL) and type(make_config(SMALL | usual)) is GPTConfig
    for name, value in {"qkv_bias": False, "scaled": False, "activation": "relu", "position_offset": 2}.items():
        assert make_config(SMALL | usual | {name: value}) == OtherConfig(**SMALL, **{name: value})
        assert type(make_model(make_config(SMALL | {name: value}))) is OtherGPT
    listed = make_config(json.loads(json.dumps(SMALL | {"attention": ["banded", "dense"]})))
    assert listed == GPTConfig(**SMALL | {"attention": ("banded", "dense")}) and hash(listed)
    with pytest.raises(TypeError, match="colour"):
        make_config(SMALL | {"colour": 1})


def test_the_options_cost_what_they_should():
    base = ours().num_params()
    assert ours(scaled=False, activation="relu").num_params() == base
    assert base - ours(qkv_bias=False).num_params() == 3 * 3 * 24
    assert ours(position_offset=2).num_params() - base == 2 * 24


def test_what_two_models_of_one_seed_share():
    """Numbers depend on seed, name and shape, so a difference elsewhere changes none of them."""
    usual, other = GPT(GPTConfig(**SMALL), seed=5), OtherGPT(OtherConfig(**SMALL, activation="relu"), seed=5)
    assert all(torch.equal(p, q) for p, q in zip(usual.parameters(), other.parameters(), strict=True))
    one, two = (OtherGPT(OtherConfig(**SMALL, position_offset=2), seed=5) for _ in range(2))
    assert torch.equal(one.embeddings.wpe.weight, two.embeddings.wpe.weight)
    assert 0.008 < one.embeddings.wpe.weight.std() < 0.012  # the shifted table begins as small as ours


FORMULAS = {
    "gelu_tanh": lambda h: 0.5 * h * (1 + torch.tanh((2 / math.pi) ** 0.5 * (h + 0.044715 * h**3))),
    "gelu": lambda h: 0.5 * h * (1 + torch.erf(h / 2**0.5)),
    "relu": lambda h: h * (h > 0),
}


def forward_by_hand(model, tokens):
    """Pre-norm GPT in float64 from the state dict, with loops over texts, heads and tracks; layers may be banded."""
    w, c = {name: t.double() for name, t in model.state_dict().items()}, OtherConfig(**asdict(model.config))

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
                shares = (scores - scores.max()).exp()
                mixed[i, part] = shares / shares.sum() @ v[first : i + 1, part]
        return linear(mixed, f"{name}.wo")

    rows = []
    for text in tokens:
        x = w["embeddings.wte.weight"][text] + w["embeddings.wpe.weight"][c.position_offset :][: len(text)]
        for i in range(c.n_layers):
            x = x + attention(norm(x, f"blocks.{i}.ln_1"), i)
            hidden = FORMULAS[c.activation](linear(norm(x, f"blocks.{i}.ln_2"), f"blocks.{i}.mlp.up"))
            x = x + linear(hidden, f"blocks.{i}.mlp.down")
        rows.append(norm(x, "ln_f") @ w["embeddings.wte.weight"].T)
    return torch.stack(rows)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("bandwidth", [1, 3, 9, 10, 11])
def test_every_option_is_what_a_loop_computes(options, bandwidth):
    model = ours(4, **options | {"bandwidth": bandwidth}).double()
    tokens = tokens_for(37, 10)
    torch.testing.assert_close(model(tokens), forward_by_hand(model, tokens), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "options", [{"position_offset": 2, "bandwidth": 4}, {"scaled": False, "qkv_bias": False}], ids=str
)
def test_the_cache_writes_the_same_text(options):
    model = ours(6, **options)
    tokens, slow = tokens_for(37, 3), tokens_for(37, 3)
    for _ in range(6):
        slow = torch.cat([slow, model(slow)[:, -1].argmax(dim=-1, keepdim=True)], dim=1)
    assert torch.equal(generate(model, tokens, 6, temperature=0), slow)


def test_row_zero_of_opt_is_never_read():
    model = ours(position_offset=2)
    tokens = tokens_for(37, 10)
    before = model(tokens)
    with torch.no_grad():
        model.embeddings.wpe.weight[:2] = 1e6
    assert torch.equal(model(tokens), before)
    wrong = OtherGPT(replace(model.config, position_offset=0, n_ctx=12))
    wrong.load_state_dict(model.state_dict())
    assert not torch.allclose(wrong(tokens), before, atol=0.1)


# ---- the hub ----


@pytest.fixture
def hub(monkeypatch):
    """A hub that does what its first answer says: a folder to return, or an error to raise."""
    calls, answers = [], []

    def snapshot_download(name, **options):
        calls.append((name, options))
        if isinstance(answers[0], Exception):
            raise answers[0]
        return str(answers[0])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls, answers


@pytest.mark.parametrize("name", ["gpt2", "facebook/opt-125m", "EleutherAI/gpt-neo-1.3B"])
def test_a_name_is_looked_up_on_the_hub(tmp_path, monkeypatch, hub, name):
    monkeypatch.chdir(tmp_path)
    calls, answers = hub
    theirs_in(tmp_path / "cache")
    answers.append(tmp_path / "cache")
    assert GPT.from_pretrained(name).config.n_ctx == 10
    assert [options["allow_patterns"] for _, options in calls] == [["config.json"], ["*.json", "*.safetensors"]]
    assert all(called == name for called, _ in calls)


def test_a_model_of_another_kind_is_refused_before_its_weights_are_fetched(tmp_path, monkeypatch, hub):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "config.json").write_text('{"model_type": "llama"}')
    hub[1].append(tmp_path / "cache")
    assert "the model_type is 'llama'; we can read gpt2" in complaint("owner/name")
    assert [options["allow_patterns"] for _, options in hub[0]] == [["config.json"]]


def test_a_folder_comes_before_the_hub(tmp_path, monkeypatch, hub):
    monkeypatch.chdir(tmp_path)
    ours().save_pretrained(tmp_path / "gpt2")
    assert GPT.from_pretrained("gpt2").config.vocab_size == 37 and hub[0] == []


@pytest.mark.parametrize("path", ["./gpt2", "/nowhere/gpt2", "../gpt2", "a/b/c", "~/gpt2", ".hidden", "a//b", "a/", ""])
def test_paths_never_go_to_the_network(tmp_path, monkeypatch, hub, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WeightsError, match="has no model.safetensors" if path else "'' is no path"):
        GPT.from_pretrained(path)
    with pytest.raises(WeightsError, match="has no model.safetensors"):
        GPT.from_pretrained(Path("gpt2"))
    assert hub[0] == []


@pytest.mark.parametrize(
    "name, words",
    [
        ("LocalEntryNotFoundError", "could not be reached (LocalEntryNotFoundError)"),
        ("ConnectTimeout", "could not be reached (ConnectTimeout)"),
        ("RepositoryNotFoundError", "has no such model, or not for everybody (RepositoryNotFoundError)"),
        ("GatedRepoError", "has no such model, or not for everybody"),
    ],
)
def test_the_hub_is_away_or_does_not_know(tmp_path, monkeypatch, hub, name, words):
    monkeypatch.chdir(tmp_path)
    hub[1].append(type(name, (OSError,), {})("…"))
    message = complaint("owner/name")
    assert message.startswith("'owner/name' is no folder here, and the Hugging Face hub") and words in message
    assert "give the path of a folder, or run `hf download owner/name`" in message and "$HF_HOME" in message


def test_a_repository_of_pickles(tmp_path, monkeypatch, hub):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "config.json").write_text(json.dumps(asdict(ours().config)))
    hub[1].append(tmp_path / "cache")
    message = complaint("owner/name")
    assert "'owner/name' on the hub has no safetensors but pickles" in message and "save_pretrained" in message


# ---- the sizes of the real ones ----


@pytest.mark.parametrize(
    "config, count",
    [
        (GPTConfig(50257, 1024, 12, 768, 12, 64, ("dense",)), 124_439_808),
        (OtherConfig(50272, 2048, 12, 768, 12, 64, ("dense",), activation="relu", position_offset=2), 125_239_296),
        (OtherConfig(50257, 2048, 12, 768, 12, 64, qkv_bias=False, scaled=False), 125_198_592),
    ],
)
def test_published_sizes(config, count):
    with torch.device("meta"):
        assert make_model(config).num_params() == count


def test_a_file_that_kept_only_the_second_name_of_the_token_table(tmp_path):
    model = ours()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("transformer.wte.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again = GPT.from_pretrained(tmp_path)
    assert all(again.state_dict()[name].equal(tensor) for name, tensor in model.state_dict().items())
