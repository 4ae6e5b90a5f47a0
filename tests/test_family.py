"""The book's own family of models: what data/ ships is what the manifest says, and does what was measured."""

import csv
import json
import math
import tomllib

import pytest
import torch

import family
from gpt3lib import GPT, GPTConfig, Tokenizer, tasks
from gpt3lib.files import sha256
from gpt3lib.texts import DATA
from gpt3lib.training import evaluate, pack

SIZES = ["gpt3-100k", "gpt3-300k", "gpt3-1m", "gpt3-3m", "gpt3-10m"]
MODELS = tomllib.loads((DATA / "manifest.toml").read_text())["models"]
FAMILY = [*SIZES, "gpt3-1m-dense"]
TEXT = ("bible", "crawl", "plays", "speeches", "stories", "wikipedia")


@pytest.mark.parametrize("name", FAMILY)
def test_the_files_are_those_of_the_manifest(name):
    for file in family.KEPT:
        assert sha256(DATA / "models" / name / file) == MODELS[name][file]


def test_all_of_it_is_small():
    sizes = [path.stat().st_size for name in FAMILY for path in (DATA / "models" / name).iterdir()]
    assert sum(sizes) <= 40_000_000


@pytest.mark.parametrize("name", FAMILY)
def test_a_model_is_what_its_name_says(name):
    model = GPT.from_pretrained(DATA / "models" / name)
    kinds = ("dense",) if name.endswith("dense") else ("dense", "banded")
    assert model.config == GPTConfig.from_name(name.removesuffix("-dense"), attention=kinds)
    assert Tokenizer.load(DATA / "models" / name / "merges.txt").vocab_size == model.config.vocab_size


def test_every_digit_is_a_token_of_its_own():
    tokenizer = Tokenizer.load(DATA / "models" / "gpt3-1m" / "merges.txt")
    assert all(sum(c.isdigit() for c in tokenizer.decode([i])) <= 1 for i in range(tokenizer.vocab_size))
    digits = tokenizer.encode("1234567890 2026")
    assert [tokenizer.decode([i]) for i in digits] == [*"1234567890", " 2", "0", "2", "6"]


def test_larger_models_predict_every_kind_of_text_better():
    for source in (*TEXT, "tasks"):
        losses = [MODELS[name]["held_out"][source] for name in SIZES]
        assert losses == sorted(losses, reverse=True) and len(set(losses)) == 5


def test_the_losses_fall_along_a_line():
    """On logarithmic axes, against the parameters of the layers: straight to two hundredths."""
    x = [math.log(GPTConfig.from_name(name).d_model ** 2 * GPTConfig.from_name(name).n_layers) for name in SIZES]
    y = [math.log(sum(MODELS[name]["held_out"][source] for source in TEXT)) for name in SIZES]
    n, mean_x, mean_y = len(x), sum(x) / 5, sum(y) / 5
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y)) / sum((a - mean_x) ** 2 for a in x)
    assert -0.09 < slope < -0.03 and n == 5
    assert all(abs(mean_y + slope * (a - mean_x) - b) < 0.02 for a, b in zip(x, y))


@pytest.mark.parametrize("name", ["gpt3-100k", "gpt3-1m"])
def test_the_loss_on_tasks_is_the_one_that_was_logged(name):
    """At the last tenth of the training, over the same sixteen windows, on another kind of machine in bfloat16."""
    folder = DATA / "models" / name
    lines = [json.loads(line) for line in (folder / "extra.jsonl").read_text().splitlines()]
    logged = [line["held_out"]["tasks"] for line in lines if "held_out" in line][-1]
    documents = [tasks.numbered(1, i) for i in range(600)]
    tokens = pack(Tokenizer.load(folder / "merges.txt"), documents)
    assert evaluate(GPT.from_pretrained(folder), tokens, n_windows=16) == pytest.approx(logged, abs=0.01)


def test_the_log_is_thinned_and_ends_with_the_last_step():
    rows = "".join(f"{i},x\n" for i in range(1, 106))
    assert family.thin("step,loss\n" + rows) == "step,loss\n50,x\n100,x\n105,x\n"
    with open(DATA / "models" / "gpt3-1m" / "log.csv") as file:
        logged = list(csv.DictReader(file))
    assert int(logged[-1]["tokens"]) == MODELS["gpt3-1m"]["tokens"]
    assert float(logged[0]["loss"]) > 5 > 3 > float(logged[-1]["loss"])


def test_keep_makes_an_entry_of_the_manifest(tmp_path):
    source = tmp_path / "source"
    model = GPT(GPTConfig(300, 16, 1, 8, 2, 4)).half()
    model.save_pretrained(source)
    (source / "merges.txt").write_text("#version: 0.2\n")
    (source / "extra.jsonl").write_text("")
    (source / "log.csv").write_text("step,loss\n1,7.0\n")
    job = {"train_s": 1.5, "tokens": 640, "held_out": {"tasks": {"nats": 5.1}}}
    entry = family.keep(source, tmp_path / "gpt3-0k", "make it", job, "a machine")
    found = tomllib.loads(entry)["models"]["gpt3-0k"]
    assert found["held_out"] == {"tasks": 5.1} and found["command"] == "make it" and found["tokens"] == 640
    assert all(found[file] == sha256(tmp_path / "gpt3-0k" / file) for file in family.KEPT)
    kept = GPT.from_pretrained(tmp_path / "gpt3-0k", dtype=None)
    assert all(torch.equal(a, b) for a, b in zip(kept.parameters(), model.parameters()))


def test_the_family_was_trained_as_the_chapter_training_says():
    """Two fifths text; batches from 8 to 16 windows; where warm-up, ramp and cosine ended; the minutes."""
    jobs = json.loads((DATA / "experiments" / "gpu_family.json").read_text())["jobs"]
    for label, job in jobs.items():
        recipe, parts = job["recipe"], job["data"]["parts"]
        assert label.endswith("@1.5") and job["config"]["n_ctx"] == 1024
        assert (recipe["first_batch_tokens"], recipe["batch_tokens"]) == (8 * 1024, 16 * 1024)
        ends = [recipe[f"{name}_tokens"] / 1e6 for name in ("warmup", "ramp", "decay")]
        assert ends == pytest.approx([1.8, 9, 78], rel=0.01)
        assert parts["tasks"] / sum(parts.values()) == pytest.approx(0.6, abs=1e-5)
        assert 2 < job["train_s"] / 60 < 5 and job["tokens"] / 1e6 == pytest.approx(
            82 if "10m" in label else 90, abs=0.1
        )
