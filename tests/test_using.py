"""Using models: found by name, measured, and the same function in other programs' parts."""

import io
import json
import math
import re
from contextlib import redirect_stdout
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt3lib.files import WeightsError
from gpt3lib.loading import LoadingError, write_tokens
from gpt3lib.model import GPT, GPTConfig
from gpt3lib.texts import DATA
from gpt3lib.tokenization import Tokenizer
from gpt3lib.using import (
    as_neo,
    convert,
    find_device,
    find_model,
    loss_of_text,
    measure,
    whole_texts,
    write_model,
    write_text,
)

TEXT = "The quick brown fox jumps over the lazy dog, and the dog sleeps on. "
TOKENIZER = Tokenizer.train(TEXT * 9, 300)
CONFIG = GPTConfig(TOKENIZER.vocab_size, 32, 3, 24, 3, 8, bandwidth=5)


def shaken(config=CONFIG, seed=0):
    """A model none of whose numbers is what it was at the beginning, biases and gains included."""
    model, dice = GPT(config, seed), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn(p.shape, generator=dice)
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a banded model and its tokenizer."""
    path = tmp_path_factory.mktemp("models") / "fox"
    write_model(shaken(), TOKENIZER, path)
    return path


def ids(n=32):
    dice = torch.Generator().manual_seed(n)
    return torch.randint(TOKENIZER.vocab_size, (2, n), generator=dice)


# --- found by its name ---


def test_a_folder_holds_model_and_tokenizer(folder):
    model, tokenizer = find_model(str(folder), "cpu")
    assert torch.equal(model(ids()), shaken()(ids()))
    assert tokenizer.merges == TOKENIZER.merges


def test_the_model_of_a_run_is_found_by_the_runs_name(folder, tmp_path):
    write_model(shaken(seed=3), TOKENIZER, tmp_path / "run" / "model")
    model, _ = find_model(str(tmp_path / "run"), "cpu")
    assert torch.equal(model(ids()), shaken(seed=3)(ids()))


def test_a_shipped_model_is_found_by_name():
    name = next((DATA / "models").iterdir()).name
    model, tokenizer = find_model(name, "cpu")
    assert model.config.vocab_size == tokenizer.vocab_size


def test_no_model_no_tokenizer_no_device(folder, tmp_path):
    for name in (str(tmp_path / "no" / "where" / "here"), "runs/nowhere", "no/where/here", "./nowhere"):
        with pytest.raises(WeightsError, match="no run and no model there"):
            find_model(name, "cpu")
    shaken().save_pretrained(tmp_path / "alone")
    with pytest.raises(WeightsError, match="no merges.txt"):
        find_model(str(tmp_path / "alone"), "cpu")
    with pytest.raises(WeightsError, match="no device 'warp'"):
        find_device("warp")


@pytest.mark.parametrize("name", ["gpt3-125m", "gpt3-9m"])
def test_an_untrained_size_names_the_trained_ones(name):
    trained = "gpt3-100k, gpt3-300k, gpt3-1m, gpt3-3m, gpt3-10m"
    with pytest.raises(WeightsError, match=f"no {name} comes trained; there are {trained}"):
        find_model(name, "cpu")


def test_an_adapter_tells_of_its_merged_model(folder, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(WeightsError, match="is an adapter; merge it first"):
        find_model(str(tmp_path / "adapter"), "cpu")
    write_model(shaken(), TOKENIZER, tmp_path / "model")
    with pytest.raises(WeightsError, match=f"adapter; the merged model is {re.escape(str(tmp_path))}$"):
        find_model(str(tmp_path / "adapter"), "cpu")


def test_gpt2s_number_of_ids_means_gpt2s_tokenizer(tmp_path):
    GPT(GPTConfig(50257, 8, 1, 4, 1, 4)).save_pretrained(tmp_path / "m")
    assert find_model(str(tmp_path / "m"), "cpu")[1].vocab_size == 50257


# --- it writes ---


def written(model, tokenizer, prompt, n, **ways):
    out = io.StringIO()
    with redirect_stdout(out):
        write_text(model, tokenizer, prompt, n, **ways)
    return out.getvalue()


def test_a_text_begins_with_its_prompt_and_a_seed_repeats_it():
    model = shaken()
    one = written(model, TOKENIZER, "The quick", 12, seed=5)
    assert one.startswith("The quick") and one == written(model, TOKENIZER, "The quick", 12, seed=5)
    assert one != written(model, TOKENIZER, "The quick", 12, seed=6)
    assert written(model, TOKENIZER, "", 3, seed=5)  # nothing to go on from is a new line


# --- it is measured ---


@settings(max_examples=8, deadline=None)
@given(st.integers(2, 80))
def test_every_token_but_the_first_costs_once(n):
    model, row = shaken(), ids(150)[0, :n]
    by_hand = 0.0
    with torch.no_grad():
        for place in range(1, n):  # a token sees its window up to itself
            start = (place - 1) // 32 * 32
            logits = model(row[None, start:place])[0, -1]
            by_hand -= logits.log_softmax(-1)[row[place]].item()
    assert loss_of_text(model, row) == pytest.approx(by_hand, rel=1e-4)


def test_bits_per_byte_of_a_model_that_knows_nothing(tmp_path):
    model = GPT(CONFIG)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    (tmp_path / "t.txt").write_text(TEXT)
    found = measure(model, TOKENIZER, tmp_path / "t.txt")
    n = len(TOKENIZER.encode(TEXT))
    assert found["n_tokens"] == n and found["loss"] == pytest.approx(math.log(300))
    assert found["bits_per_byte"] == pytest.approx(math.log2(300) * n / len(TEXT.encode()))


def test_a_text_and_its_shards_measure_alike(tmp_path):
    (tmp_path / "t.txt").write_text(TEXT * 3)
    write_tokens([TEXT * 3], tmp_path / "shards", TOKENIZER)
    text, shards = (measure(shaken(), TOKENIZER, tmp_path / name) for name in ("t.txt", "shards"))
    assert text["loss"] == shards["loss"] and text["n_tokens"] == shards["n_tokens"]
    few = measure(shaken(), TOKENIZER, tmp_path / "shards", limit=10)
    assert few["n_tokens"] == 10


def test_what_cannot_be_measured_is_refused(tmp_path):
    write_tokens([TEXT], tmp_path / "shards", Tokenizer.train(TEXT, 270))
    with pytest.raises(LoadingError, match="another tokenizer"):
        measure(shaken(), TOKENIZER, tmp_path / "shards")
    (tmp_path / "blank.txt").write_text(" \n")
    with pytest.raises(LoadingError, match="no text"):
        measure(shaken(), TOKENIZER, tmp_path / "blank.txt")


def test_lines_end_alike_and_a_limit_cuts(tmp_path):
    (tmp_path / "dos.txt").write_bytes(b"one\r\ntwo\r\n")
    (tmp_path / "two.jsonl").write_text('{"text": "three"}\n{"text": "four"}\n')
    assert whole_texts([tmp_path / "dos.txt", tmp_path / "two.jsonl"]) == ["one\ntwo\n", "three", "four"]
    assert whole_texts([tmp_path / "dos.txt"], limit=5) == ["one\nt"]


# --- the same function, other parts ---


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 3), st.sampled_from([(1, 8), (2, 4), (3, 8)]), st.integers(1, 40), st.integers(0, 99))
def test_a_gpt_neo_computes_the_same(n_layers, heads, bandwidth, seed):
    n_heads, d_head = heads
    config = GPTConfig(60, 32, n_layers, n_heads * d_head, n_heads, d_head, bandwidth=bandwidth)
    model = shaken(config, seed).double()
    twin = as_neo(model).double()
    names = set(twin.state_dict())
    assert not names & {f"blocks.0.attention.w{x}.bias" for x in "qkv"}
    tokens = ids()[:, :20] % 60
    torch.testing.assert_close(twin(tokens), model(tokens), rtol=1e-3, atol=1e-3)


def test_a_matrix_without_inverse_is_named():
    model = shaken()
    with torch.no_grad():
        model.blocks[1].attention.wq.weight.zero_()
    with pytest.raises(WeightsError, match=r"blocks\.1: Wq has no inverse"):
        as_neo(model)


@pytest.mark.parametrize("kind", ["gpt_neo", "gpt3lib", "gpt2"])
def test_transformers_reads_what_is_converted(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    dense = replace(CONFIG, attention=("dense",))
    model = shaken(dense if kind == "gpt2" else CONFIG)
    convert(model, TOKENIZER, tmp_path / "out", kind)
    again, tokenizer = find_model(str(tmp_path / "out"), "cpu")
    torch.testing.assert_close(again(ids()), model(ids()), rtol=1e-3, atol=1e-3)
    assert tokenizer.merges == TOKENIZER.merges
    if kind == "gpt3lib":
        assert "model_type" not in json.loads((tmp_path / "out" / "config.json").read_text())
        return
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids()).logits, model(ids()), rtol=1e-3, atol=1e-3)
    speaks = transformers.pipeline("text-generation", str(tmp_path / "out"))
    told = speaks("The quick", max_new_tokens=8, do_sample=False)[0]["generated_text"]
    assert told.rstrip() == written(model, TOKENIZER, "The quick", 8, temperature=0).rstrip()
    ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert ours(TEXT)["input_ids"] == TOKENIZER.encode(TEXT)
    assert ours.eos_token_id == TOKENIZER.end_of_text


@pytest.mark.parametrize(
    "taken",
    ["config.json", "config.yaml", "model-00001-of-00002.safetensors", "model/config.json", "step-0000000010/x"],
)
def test_what_is_there_is_not_converted_over(taken, tmp_path):
    path = tmp_path / "out" / taken
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    with pytest.raises(WeightsError, match="already; give another folder"):
        convert(shaken(), TOKENIZER, tmp_path / "out", "gpt_neo")
    assert path.read_text() == "mine" and len([p for p in (tmp_path / "out").rglob("*") if p.is_file()]) == 1


def test_kinds_that_cannot_hold_a_model_are_refused(tmp_path):
    with pytest.raises(WeightsError, match="dense layers only"):
        convert(shaken(), TOKENIZER, tmp_path / "out", "gpt2")
    with pytest.raises(WeightsError, match="there are gpt2, gpt_neo and gpt3lib"):
        convert(shaken(), TOKENIZER, tmp_path / "out", "gpt5")
    assert not (tmp_path / "out").exists()
