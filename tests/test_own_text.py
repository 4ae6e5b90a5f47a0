"""Your own text: what is chosen for it, what a run needs, and why it should not begin."""

import json
import math

import pytest
import torch

from gpt3lib import own_text
from gpt3lib.checkpoints import RunError
from gpt3lib.commands import TrainConfig
from gpt3lib.loading import LoadingError, Tokens
from gpt3lib.model import ConfigError, GPTConfig
from gpt3lib.own_text import (
    StartError,
    count,
    duration,
    fastest,
    fit,
    learn,
    learn_tokenizer,
    needs,
    obstacles,
    open_data,
    plan_model,
    plan_recipe,
    prepare_text,
    room,
    settled,
    threads,
)
from gpt3lib.recipe import TABLE_BATCHES, Recipe
from gpt3lib.sizes import EXTRA_SMALL
from samples import text


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text(text(6000))
    return path


# --- tokens ---


@pytest.mark.parametrize("n, size", [(1_000, 257), (40_000, 512), (400_000, 1024)])
def test_longer_texts_get_more_tokens(n, size):
    from gpt3lib.texts import shakespeare

    assert learn_tokenizer(["".join(shakespeare()[:4])[:n]]).vocab_size == size
    assert learn_tokenizer([text(2000)], 300).vocab_size <= 300


def test_a_text_is_cut_into_what_is_learned_and_what_is_held_out(mine, tmp_path):
    tokens = prepare_text([mine], tmp_path / "run")
    held = Tokens(tmp_path / "run" / "data" / "held_out")
    whole = tokens.tokenizer.decode([*tokens[1:].tolist(), *held[1:].tolist()])
    assert whole == mine.read_text() and held.n_bytes == 300
    assert held.tokenizer_sha256 == tokens.tokenizer_sha256
    assert prepare_text([mine], tmp_path / "run").sha256 == tokens.sha256


def test_what_was_cut_short_while_preparing_is_made_whole(mine, tmp_path):
    whole = prepare_text([mine], tmp_path / "run")
    held = tmp_path / "run" / "data" / "held_out" / "manifest.json"
    held.unlink()
    assert prepare_text([mine], tmp_path / "run").sha256 == whole.sha256 and held.exists()


def test_a_text_that_changed_is_refused(mine, tmp_path):
    prepare_text([mine], tmp_path / "run")
    mine.write_text(text(6000, seed=2))
    with pytest.raises(StartError, match="mine.txt: not the text .* another --out"):
        prepare_text([mine], tmp_path / "run")


@pytest.mark.parametrize(
    "content, words",
    [(b"", "no text"), (b" \n\t", "no text"), (b"short", "5 characters are too few"), (b"\0" * 5000, "binary")],
)
def test_texts_that_are_none(content, words, tmp_path):
    (tmp_path / "x.txt").write_bytes(content)
    with pytest.raises((StartError, LoadingError), match=words):
        prepare_text([tmp_path / "x.txt"], tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_of_many_short_texts_some_are_held_out_whole(tmp_path):
    lines = [f"a line, {i}" for i in range(500)]
    rows = "".join(json.dumps({"text": line}) + "\n" for line in [*lines, "", " "])
    (tmp_path / "short.jsonl").write_text(rows)
    tokens = prepare_text([tmp_path / "short.jsonl"], tmp_path / "run")
    held = Tokens(tmp_path / "run" / "data" / "held_out")
    assert (tokens.n_documents, held.n_documents) == (475, 25)
    told = [tokens.tokenizer.decode(part[:].tolist()) for part in (tokens, held)]
    assert sorted("".join(told).split("<|endoftext|>")[1:]) == sorted(lines)


def test_of_few_or_long_texts_the_end_is_held_out():
    assert own_text.parted(["a" * 40, "b" * 60]) == (["a" * 38, "b" * 57], ["aa", "bbb"])
    train, held = own_text.parted(["x" * 1000] * 20)
    assert [len(part) for part in train] == [950] * 20 and [len(part) for part in held] == [50] * 20
    assert len(own_text.parted(["x" * 999] * 20)[1]) == 1


def test_what_runs_have_written_is_no_text(mine, tmp_path):
    run = tmp_path / "runs" / "one"
    (run / "model").mkdir(parents=True)
    (run / "step-0000000000").mkdir()
    for name in ("step-0000000000/state.json", "samples.txt", "notes.txt", "model/merges.txt"):
        (run / name).write_text("x")
    (tmp_path / "more.md").write_text("y")
    assert own_text.texts_of(tmp_path) == [mine, tmp_path / "more.md"]
    assert own_text.texts_of(run / "samples.txt") == [run / "samples.txt"]


def test_a_folder_is_for_one_run_alone_and_leaves_nothing_when_refused(tmp_path):
    run = tmp_path / "new" / "run"
    with pytest.raises(ZeroDivisionError), own_text.alone(run):
        1 / 0  # noqa: B018
    assert not (tmp_path / "new").exists()
    with pytest.raises(RunError, match="in use"), own_text.alone(run), own_text.alone(run):
        pass
    with pytest.raises(ZeroDivisionError), own_text.alone(run):
        (run / "mine").touch()
        1 / 0  # noqa: B018
    assert (run / "mine").exists()


# --- the plan ---


@pytest.mark.parametrize("name", TABLE_BATCHES)
def test_a_size_of_the_paper_is_its_row(name):
    config = TrainConfig(name)
    assert plan_model(config) == GPTConfig.from_name(name)
    assert plan_recipe(config, plan_model(config), n_data=5) == Recipe.from_name(name)


def test_options_go_before_the_row_and_before_what_is_chosen():
    config = TrainConfig("gpt3-125m", n_tokens=10**9, peak=1e-3, n_ctx=512, attention=("dense",))
    shape = plan_model(config, vocab_size=300)
    assert (shape.n_ctx, shape.attention, shape.vocab_size) == (512, ("dense",), 300)
    recipe = plan_recipe(config, shape)
    assert recipe == Recipe.scaled(10**9, 1e-3, 524288)
    ours = TrainConfig("gpt3-1m", warmup_tokens=7, clip=2.0)
    recipe = plan_recipe(ours, plan_model(ours), n_data=10**8)
    assert (recipe.n_tokens, recipe.warmup_tokens, recipe.clip) == (10**8, 7, 2.0)
    assert recipe.batch_tokens <= 32768 and recipe.batch_tokens % plan_model(ours).n_ctx == 0
    with pytest.raises(ConfigError, match="no model is called 'gpt3-2m'"):
        plan_model(TrainConfig("gpt3-2m"))


def test_needs_of_the_largest():
    config = TrainConfig("gpt3-175b")
    shape = plan_model(config)
    told = needs("gpt3-175b", shape, plan_recipe(config, shape))
    assert told["gpt3-175b"].startswith("174,604,259,328 parameters, 96 layers of 12,288")
    assert told["tokens"].startswith("300,000,000,000") and told["batch"].startswith("3,145,728")
    assert told["rate"].startswith("6e-05") and told["work"].startswith("3.14e+23")
    assert told["memory"].startswith("2,794 GB")  # 16 bytes each


def test_obstacles():
    config = TrainConfig("gpt3-125m", n_tokens=10**6)
    shape = plan_model(config)
    recipe, memory = plan_recipe(config, shape), 16 * count(shape)
    assert obstacles(shape, recipe, memory, 1e15) == ""
    assert obstacles(shape, recipe, None, 1e15) == ""
    assert "needs 2,004 MB of memory (there are 2,004 MB)" in obstacles(shape, recipe, memory - 1, 1e15)
    work = own_text.flops_per_token(shape) * 10**6
    month = 30 * 24 * 3600
    assert obstacles(shape, recipe, memory, work / month * 1.01) == ""
    assert obstacles(shape, recipe, memory, work / month * 0.99) == "would take 30 days here"


def test_seconds_and_bytes_as_people_say_them():
    seconds = (5, 119, 120, 7200, 2 * 86400, 2 * 31_557_600)
    assert [duration(s) for s in seconds] == ["5 seconds", "119 seconds", "2 minutes", "2 hours", "2 days", "2 years"]
    assert (room(5e6), room(9.99e9), room(1e10)) == ("5 MB", "9,990 MB", "10 GB")


# --- a size for a text ---


def chosen(n_text, speed, **fields):
    config = TrainConfig(text=("t",), vocab_size=512, **fields)
    return fit(config, n_text, lambda shape: speed / shape.d_model)


def test_more_text_and_a_faster_machine_never_get_a_smaller_model():
    names = list(EXTRA_SMALL)
    rank = [
        [names.index(chosen(n, speed).size) for speed in (1e4, 1e6, 1e8, 1e10)]
        for n in (10**4, 10**5, 10**6, 10**7, 10**8)
    ]
    assert all(row == sorted(row) for row in rank) and all(list(c) == sorted(c) for c in zip(*rank))
    assert rank[0][0] == 0 and rank[-1][-1] == len(names) - 1


def test_neither_time_nor_text_is_used_beyond_its_limit():
    config = chosen(10**5, 64e4, minutes=2)  # 10,000 tokens a second for gpt3-100k
    assert config.size == "gpt3-100k" and config.n_tokens == 10 * 10**5
    config = chosen(10**6, 64e4, minutes=2)
    assert config.n_tokens == 2 * 60 * 10_000


def test_what_is_given_stays(mine):
    config = chosen(10**6, 1e9, size="gpt3-300k", n_tokens=777, n_ctx=40, bandwidth=3, on_spike="stop")
    assert (config.size, config.n_tokens, config.n_ctx, config.bandwidth) == ("gpt3-300k", 777, 40, 3)
    assert config.on_spike == "stop" and config.minutes == 3


@pytest.mark.parametrize("n_text, n_ctx", [(20, 8), (300, 32), (3000, 256), (10**7, 256)])
def test_windows_fit_the_text(n_text, n_ctx):
    assert chosen(n_text, 1e5).n_ctx == n_ctx


def test_a_text_without_a_window_is_refused():
    with pytest.raises(StartError, match="hold no window of 64"):
        chosen(50, 1e5, n_ctx=64)


def test_threads_are_tried_and_put_back():
    before = torch.get_num_threads()
    shape = GPTConfig(257, 16, 1, 8, 1, 8)
    rate, n = fastest(shape, torch.device("cpu"))
    assert rate > 0 and n in (1, before) and torch.get_num_threads() == before
    with pytest.raises(ZeroDivisionError), threads(before + 1):
        assert torch.get_num_threads() == before + 1
        1 / 0  # noqa: B018
    assert torch.get_num_threads() == before


# --- a run ---


def test_a_run_on_a_text_settles_learns_and_is_repeatable(mine, tmp_path, capsys):
    few = {"n_tokens": 4096, "n_ctx": 32, "batch_tokens": 512, "n_threads": 1}
    config = settled(TrainConfig("gpt3-100k", (str(mine),), out=str(tmp_path / "run"), **few))
    assert "parameters" in capsys.readouterr().out
    open_fields = ("size", "n_tokens", "peak", "warmup_tokens", "decay_tokens", "n_ctx", "bandwidth", "vocab_size")
    assert all(getattr(config, name) for name in open_fields) and config.seed == 0
    model, state = learn(config)
    assert state.finished and state.tokens == 4096
    rows = (tmp_path / "run" / "log.csv").read_text().splitlines()[1:]
    losses = [float(row.split(",")[2]) for row in rows]
    assert losses[0] == pytest.approx(math.log(257), abs=0.1) and losses[-1] < losses[0] - 1
    again, state = learn(config)  # nothing is left to do
    assert state.finished and all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))


def test_runs_that_should_not_begin(tmp_path, monkeypatch):
    with pytest.raises(StartError, match="which size"):
        settled(TrainConfig())
    with pytest.raises(StartError, match="gpt3-175b needs 2,794 GB .* would take .* --go_ahead"):
        settled(TrainConfig("gpt3-175b", device="cpu"))
    with pytest.raises(StartError, match="nothing to learn from"):
        settled(TrainConfig("gpt3-175b", device="cpu", go_ahead=True))


def test_several_folders_are_mixed_by_weight_or_length(mine, tmp_path):
    tokenizer = learn_tokenizer([text(3000)])
    for name, n in (("a", 2000), ("b", 1000)):
        own_text.write_tokens([text(n)], tmp_path / name, tokenizer)
    paths = (str(tmp_path / "a"), str(tmp_path / "b"))
    sources, weights = open_data(TrainConfig(data=paths))
    assert weights == {"a": 2001, "b": 1001} and [*sources] == ["a", "b"]
    assert open_data(TrainConfig(data=paths, weights=(1.0, 3.0)))[1] == {"a": 1.0, "b": 3.0}
    assert len(open_data(TrainConfig(data=(paths[0], paths[0] + "/../a")))[0]) == 2
