"""The command line: options and files of them, runs that are stopped and go on, errors in one line."""

import csv
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from gpt3lib import cli, own_text, using
from gpt3lib.checkpoints import Store
from gpt3lib.cli import COMMANDS, asked, main, parse_train, read_config, retyped, with_stored
from gpt3lib.commands import ConvertConfig, EvalConfig, TokenizeConfig, TrainConfig, TuneConfig
from gpt3lib.loading import Tokens
from gpt3lib.options import CommandError, ask, called, write_yaml
from samples import text

PROGRAM = [sys.executable, "-c", "import sys; from gpt3lib.cli import main; sys.exit(main())"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder of one's own, with a text in it."""
    monkeypatch.chdir(tmp_path)
    Path("mine.txt").write_text(text(6000))
    return tmp_path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder in which `gpt3 train --text` has been done once."""
    folder = tmp_path_factory.mktemp("trained")
    before = Path.cwd()
    os.chdir(folder)
    try:
        Path("mine.txt").write_text(text(6000))
        assert main(shlex.split("train --text mine.txt " + SMALL)) == 0
    finally:
        os.chdir(before)
    return folder


SMALL = "--n_tokens 8k --n_ctx 32 --batch_tokens 256 --n_threads 1 --save_every 4"


def gpt3(line, capfd):
    """Exit code, stdout and stderr of a command."""
    capfd.readouterr()
    code = main(shlex.split(line))
    out = capfd.readouterr()
    return code, out.out, out.err


def losses(run):
    with open(Path(run) / "log.csv", newline="") as file:
        return [(row["step"], row["tokens"], row["loss"]) for row in csv.DictReader(file)]


# --- options ---


def test_hyphens_and_underscores_are_the_same():
    assert ask(TrainConfig, ["--n-tokens", "5"]) == ask(TrainConfig, ["--n_tokens=5"])


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--lr", "3"], "Unrecognized options: --lr, 3"),
        (["--micro_bach", "3"], "perhaps you meant --micro_batch"),
        (["--n_tokens", "many"], "'many' is no whole number"),
        (["--peak", "high"], "--peak"),
        (["--on_spike", "panic"], "invalid choice 'panic'"),
        (["--seed"], "seed"),
    ],
)
def test_wrong_options_become_one_line(arguments, words):
    with pytest.raises(CommandError, match=re.escape(words)) as error:
        ask(TrainConfig, arguments)
    assert "\n" not in str(error.value) and "─" not in str(error.value) and "---" not in str(error.value)


# --- files of options ---


def test_what_is_typed_goes_before_the_file(tmp_path):
    (tmp_path / "run.yaml").write_text("size: gpt3-3m\ndata: [a, b]\nn_tokens: 2e7\npeak: 1e-3\nbf16: true\n")
    config = parse_train(["--config", str(tmp_path / "run.yaml"), "--n_tokens", "5M", "--seed", "3"])
    assert (config.size, config.data, config.n_tokens, config.peak) == ("gpt3-3m", ("a", "b"), 5_000_000, 1e-3)
    assert config.bf16 and config.seed == 3
    assert parse_train(["gpt3-1m", "--config", str(tmp_path / "run.yaml")]).size == "gpt3-1m"


@pytest.mark.parametrize(
    "content, words",
    [
        ("lr: 3", "no field 'lr'; there are size, text"),
        ("config: other.yaml", "no field 'config'"),
        ("- a\n- b", "must hold lines"),
        ("", "must hold lines"),
        ("a: [", "is no YAML"),
        ("n_tokens: {a: 1}", "n_tokens must be plain"),
        ("n_tokens: soon", "'soon' is no whole number"),
        ("n_tokens: [1, 2]", "n_tokens must be one value"),
        ("!!python/object/apply:os.system ['true']", "must hold lines"),
        ("seed: 1\npeak: 1\nseed: 2", "seed stands there twice"),
        ("n_tokens: false", "--n_tokens: 'false' is no whole number"),
        ("seed: No", "--seed is No; it must be a whole number"),
        ("bf16: 3", "bf16 is 3, not true or false"),
    ],
)
def test_files_that_are_refused(content, words, tmp_path):
    (tmp_path / "run.yaml").write_text(content)
    with pytest.raises(CommandError, match=re.escape(words)):
        parse_train(["--config", str(tmp_path / "run.yaml")])
    with pytest.raises(CommandError, match="is no YAML that can be read"):
        parse_train(["--config", str(tmp_path / "none.yaml")])


def test_what_a_file_says_is_read_as_it_stands(tmp_path):
    """YAML would make a False of No, 8 of 010, 90 of 1:30, and 1 of 1.0."""
    for words in ("No", "010", "1:30", "1.0", "off", "2020-01-01"):
        (tmp_path / "run.yaml").write_text(f"prompt: {words}\nbf16: 'yes'\ncompile: off\nseed:\nn_ctx: ~\n")
        config = parse_train(["--config", str(tmp_path / "run.yaml")])
        assert config == TrainConfig(prompt=words, bf16=True, config=config.config)


def test_an_infinite_clip_is_written_and_read(tmp_path):
    write_yaml(TrainConfig(clip=float("inf")), tmp_path / "c.yaml")
    assert parse_train(["--config", str(tmp_path / "c.yaml")]).clip == float("inf")


def test_home_is_home_wherever_it_stands(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text("out: ~/x\ntext: [~/a, b]\nprompt: ~/p\n")
    config = parse_train(["--config=~/run.yaml"])
    home = str(tmp_path)
    assert (config.out, config.text, config.prompt) == (f"{home}/x", (f"{home}/a", "b"), "~/p")
    assert parse_train(["--data", "~/d", "--out=~/y"]).data == (f"{home}/d",)
    assert ask(TokenizeConfig, ["~/a", "--out=~/t"]).out == f"{home}/t"
    assert ask(EvalConfig, ["m", "--task", "2D+", "~/q.jsonl"]).task == ("2D+", f"{home}/q.jsonl")
    assert ask(ConvertConfig, ["~/m", "~/o", "--to", "gpt2"]) == ConvertConfig(f"{home}/m", f"{home}/o", "gpt2")


PLAIN = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1).filter(
    lambda s: s.strip() == s
)
VALUES = {
    "size": st.sampled_from(["gpt3-1m", "gpt3-175b"]),
    "data": st.lists(st.sampled_from(["a", "b/c", "ü"]), min_size=1).map(tuple),
    "weights": st.lists(st.floats(0, 1e9), min_size=1).map(tuple),
    "n_tokens": st.integers(0, 10**12),
    "peak": st.floats(0, 1, exclude_min=True),
    "bf16": st.booleans(),
    "prompt": PLAIN,
    "keep_at": st.lists(st.integers(1, 10**9), min_size=1).map(tuple),
    "on_spike": st.sampled_from(["stop", "skip", "rollback"]),
    "dp": st.integers(1, 1024),
    "recompute": st.sampled_from(["none", "selective", "full"]),
}


@settings(max_examples=20, deadline=None)
@given(st.fixed_dictionaries({}, optional=VALUES))
def test_a_config_is_typed_again(given):
    assert parse_train(shlex.split(retyped(TrainConfig(**given)))) == TrainConfig(**given)


@settings(max_examples=20, deadline=None)
@given(st.fixed_dictionaries({}, optional=VALUES))
def test_a_config_that_was_written_is_read_again(tmp_path_factory, given):
    path = tmp_path_factory.mktemp("c") / "config.yaml"
    config = TrainConfig(**given)
    write_yaml(config, path)
    assert read_config(TrainConfig, path) == config
    assert parse_train(["--config", str(path)]) == replace(config, config=str(path))


# --- what may change ---


def test_what_makes_another_model_may_not_change(tmp_path):
    path = tmp_path / "config.yaml"
    write_yaml(TrainConfig("gpt3-1m", n_tokens=100, seed=2, save_every=7), path)
    assert with_stored(TrainConfig(), path).n_tokens == 100
    changed = with_stored(TrainConfig("gpt3-1m", n_tokens=100, save_every=9, on_spike="skip"), path)
    assert (changed.save_every, changed.on_spike, changed.seed) == (9, "skip", 2)
    for fault in ({"n_tokens": 101}, {"seed": 3}, {"size": "gpt3-3m"}, {"data": ("x",)}, {"peak": 0.1}):
        (name,) = fault
        with pytest.raises(CommandError, match=f"{name} is .* began with .* another --out"):
            with_stored(TrainConfig(**fault), path)


def test_an_axis_that_is_typed_replaces_the_whole_layout(tmp_path):
    path = tmp_path / "config.yaml"
    write_yaml(TrainConfig("gpt3-1m", n_tokens=100, fsdp=2, pp=2, chunks=2), path)
    layout = lambda config: (config.dp, config.fsdp, config.tp, config.pp, config.chunks)
    assert layout(with_stored(TrainConfig(tp=2), path)) == (None, None, 2, None, None)
    assert layout(with_stored(TrainConfig(fsdp=1), path)) == (None, 1, None, None, None)
    for other in ({}, {"save_every": 9}, {"recompute": "full"}):
        assert layout(with_stored(TrainConfig(**other), path)) == (None, 2, None, 2, 2)


def test_what_somebody_asked_for():
    assert asked(TrainConfig()) == {} and asked(TrainConfig("x", bf16=True)) == {"size": "x", "bf16": True}


def test_a_file_says_which_of_the_two_kinds_of_training_it_is_of(tmp_path):
    (tmp_path / "run.yaml").write_text("from: gpt3-1m\npairs: qa.jsonl\nrank: 4\n")
    config = parse_train(["--config", str(tmp_path / "run.yaml"), "--epochs", "2"])
    assert config == TuneConfig("gpt3-1m", "qa.jsonl", rank=4, epochs=2, config=config.config)
    write_yaml(config, tmp_path / "config.yaml")
    assert read_config(TuneConfig, tmp_path / "config.yaml") == replace(config, config=None)
    out = f"--out={tmp_path}"
    assert parse_train([out]) == TuneConfig(out=str(tmp_path)) and type(parse_train(["gpt3-1m", out])) is TrainConfig
    assert parse_train([out, "--device", "cpu"]).device == "cpu"
    assert type(parse_train(["--pairs=x"])) is type(parse_train(["--from=x"])) is TuneConfig


@pytest.mark.parametrize(
    "line, words",
    [
        ("train --text a --data b", "not both"),
        ("train gpt3-1m --data a b --weights 1", "1 --weights for 2 --data"),
        ("train gpt3-1m --minutes 3", "--minutes chooses something for --text"),
        ("train gpt3-1m --vocab_size 300", "--vocab_size chooses something for --text"),
        ("train --text mine.txt --minutes -1", "--minutes is -1.0"),
        ("train", "which size?"),
        ("train --text mine.txt gpt3-1m", "gpt3-1m is a size: put it first"),
        ("train --text mine.txt --out mine.txt", "mine.txt is a file; give a folder"),
        ("train --text mine.txt --device meta", "no device 'meta'"),
        ("train --text mine.txt --n_tokens 1e400", "no whole number that fits; write 20000000, 2e7 or 20M"),
        ("train --text mine.txt --n_tokens 0", "n_tokens is 0"),
        ("eval nowhere --data mine.txt --n_tokens 0", "--n_tokens is 0; it must be 1 or more"),
        ("train gpt3-2m --data nowhere", "nowhere"),
        ("train gpt3-1m --data mine.txt", "mine.txt"),
        ("train gpt3-1m --device warp", "no device 'warp'"),
        ("train --text nowhere.txt", "nowhere.txt"),
        ("train gpt3-175b --device cpu", "needs 2,794 GB of memory"),
        ("train gpt3-175b --device cpu --go_ahead", "nothing to learn from"),
        ("generate nowhere/at/all hello", "no run and no model there"),
        ("eval nowhere", "on which text?"),
        ("eval nowhere --shots 3", "are for --task"),
        ("eval nowhere --task 2D+ --by luck", "invalid choice 'luck'"),
        ("tokenize nowhere.txt --out t", "nowhere.txt"),
        ("tokenize mine.txt --out t --tokenizer nowhere", "nowhere"),
        ("tokenize mine.txt --out t --vocab_size 300", "--vocab_size is for --tokenizer learn"),
        ("tokenize mine.txt --out t --tokenizer learn --vocab_size 9", "257 or more"),
        ("tokenize mine.txt", "--out"),
        ("convert a b --to gpt5", "invalid choice 'gpt5'"),
        ("trian", "no command 'trian'"),
    ],
)
def test_errors_are_one_line_and_the_code_2(line, words, here, capfd):
    code, _, error = gpt3(line, capfd)
    assert code == 2 and error.startswith("gpt3: ") and words in error
    assert error.count("\n") == 1 and "Traceback" not in error
    assert not Path("runs").exists() or [*Path("runs").rglob("texts.sha256")]  # no folder without anything


def test_the_unforeseen_is_one_line_too_and_tells_on_request(here, capfd, monkeypatch):
    monkeypatch.setattr(own_text, "settled", lambda config: 1 / 0)
    code, _, error = gpt3("train gpt3-1m", capfd)
    assert code == 2 and error == "gpt3: ZeroDivisionError: division by zero (GPT3LIB_TRACEBACK=1 tells where)\n"
    monkeypatch.setenv("GPT3LIB_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        main(["train", "gpt3-1m"])


def test_the_module_is_the_command_too(here):
    ran = subprocess.run([sys.executable, "-m", "gpt3lib.cli", "trian"], capture_output=True, text=True)
    assert ran.returncode == 2 and "no command 'trian'" in ran.stderr


def test_ctrl_c_outside_a_run(here, capfd, monkeypatch):
    def stop(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(own_text, "settled", stop)
    code, _, error = gpt3("train gpt3-1m", capfd)
    assert code == 130 and error == "\ngpt3: stopped\n"


# --- help ---


def test_help_begins_with_examples_and_names_every_command(capfd):
    for line in ("--help", "-h", "help", ""):
        code, out, _ = gpt3(line, capfd)
        assert code == 0 and all(f"  gpt3 {name} " in out for name in COMMANDS)
    examples = [line.split("  ")[1].strip() for line in out.splitlines() if line.startswith("  gpt3 ")]
    assert len(examples) >= 7
    assert "Perplexity 9 means" in out  # a word that nobody knows
    for example in examples:  # each can be read
        name, *options = shlex.split(example)[1:]
        COMMANDS[name][0](options)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name, capfd):
    code, out, error = gpt3(f"{name} --help", capfd)
    assert code == 0 and f"usage: gpt3 {name}" in out and not error


# --- from a text to a model ---


def test_one_command_makes_a_model_of_a_text(trained, capfd, monkeypatch):
    monkeypatch.chdir(trained)
    run = trained / "runs" / "mine"
    assert {"config.yaml", "data", "model", "log.csv"} <= {path.name for path in run.iterdir()}
    used = yaml.safe_load((run / "config.yaml").read_text())
    given = {called(field) for field in fields(TrainConfig)} - {"config"}
    assert set(used) == given and used["size"] and used["peak"] and used["vocab_size"] == 257
    assert losses(run)[-1][1] == "8000"
    code, out, _ = gpt3("eval runs/mine", capfd)
    loss, bits = map(float, re.search(r"loss ([\d.]+), .* ([\d.]+) bits per byte", out).groups())
    assert code == 0 and loss < 4 and bits < 6
    model, tokenizer = using.find_model("runs/mine", "cpu")
    exact = using.measure(model, tokenizer, run / "data" / "held_out")
    assert loss == pytest.approx(exact["loss"], abs=6e-4)


def test_a_model_goes_on_with_a_prompt(trained, capfd, monkeypatch):
    monkeypatch.chdir(trained)
    line = "generate runs/mine 'the cat' --n_tokens 12 --seed 4"
    code, out, _ = gpt3(line, capfd)
    assert code == 0 and out.startswith("the cat") and gpt3(line, capfd)[1] == out
    assert gpt3("generate runs/mine 'the cat' --n_tokens 12 --seed 5", capfd)[1] != out


def test_a_prompt_comes_through_a_pipe_or_is_asked_for(trained, capfd, monkeypatch):
    monkeypatch.chdir(trained)
    (trained / "in").write_text("the dog\n")
    with open(trained / "in") as pipe:
        monkeypatch.setattr(sys, "stdin", pipe)
        assert gpt3("generate runs/mine --n_tokens 3 --seed 1", capfd)[1].startswith("the dog")

    class Terminal:
        def isatty(self):
            return True

    typed = iter(["the old", "the red"])

    def answer(prompt):
        for words in typed:
            return words
        raise EOFError

    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr("builtins.input", answer)
    code, out, _ = gpt3("generate runs/mine --n_tokens 3 --seed 1", capfd)
    assert code == 0 and "the old" in out and "the red" in out


def test_ctrl_c_ends_one_text_only_when_there_are_more(trained, capfd, monkeypatch):
    monkeypatch.chdir(trained)
    prompts = []

    def stop(model, tokenizer, prompt, *more, **ways):
        prompts.append(prompt)
        if prompt == "one":
            raise KeyboardInterrupt

    monkeypatch.setattr(using, "write_text", stop)
    monkeypatch.setattr(cli, "prompts", lambda config: ["one", "two"])
    assert gpt3("generate runs/mine", capfd)[0] == 0 and prompts == ["one", "two"]
    monkeypatch.setattr(cli, "prompts", lambda config: ["one"])
    assert gpt3("generate runs/mine one", capfd)[0] == 130


def test_tokens_are_written_and_trained_on(here, capfd):
    Path("two.jsonl").write_text('{"words": "the rain"}\n{"words": "the dog"}\n')
    code, out, _ = gpt3("tokenize mine.txt --out a --tokenizer learn --vocab_size 270", capfd)
    assert code == 0 and "1 document," in out and "270 ids" in out
    code, out, _ = gpt3("tokenize two.jsonl --field words --out b --tokenizer a", capfd)
    assert code == 0 and "2 documents" in out
    assert Tokens("a").tokenizer.merges == Tokens("b").tokenizer.merges
    code, _, error = gpt3("tokenize mine.txt --out a", capfd)
    assert code == 2 and "a holds tokens already" in error
    line = "train gpt3-100k --data a --out run --n_tokens 2k --n_ctx 32 --batch_tokens 256 --n_threads 1"
    assert gpt3(line, capfd)[0] == 0
    code, out, _ = gpt3("eval run --data a two.jsonl", capfd)
    assert code == 2 and "a: loss" in out  # the second has no field "text"
    assert gpt3("convert run neo --to gpt_neo --dtype float16", capfd)[0] == 0
    assert gpt3("eval neo --data mine.txt", capfd)[0] == 0


def test_a_resolved_config_makes_the_same_run_again(trained, capfd, monkeypatch):
    monkeypatch.chdir(trained)
    assert gpt3("train --config runs/mine/config.yaml --out again", capfd)[0] == 0
    assert losses("again") == losses("runs/mine")


def test_a_finished_run_and_one_with_another_text(trained, capfd, monkeypatch):
    monkeypatch.chdir(trained)
    before = losses("runs/mine")
    code, out, _ = gpt3("train --text mine.txt " + SMALL, capfd)
    assert code == 0 and "going on" in out and losses("runs/mine") == before
    assert gpt3("train --out runs/mine", capfd)[0] == 0
    own = Path("mine.txt").read_text()
    Path("mine.txt").write_text(text(6000, seed=9))
    code, _, error = gpt3("train --text mine.txt", capfd)
    Path("mine.txt").write_text(own)
    assert code == 2 and "not the text with which the run" in error
    code, _, error = gpt3("train --out runs/mine --n_tokens 9k", capfd)
    assert code == 2 and "n_tokens is 9000, but the run in runs/mine began with 8000" in error


# --- starts that are refused ---


QUICK = "train gpt3-100k --text mine.txt --out run --n_tokens 512 --n_ctx 32 --batch_tokens 256"


@pytest.mark.parametrize(
    "wrong, words",
    [
        ("--seed 1T", "seed"),
        ("--seed 2e18", "seed is 2000000000000000000"),
        ("--save_every 0", "save_every is 0"),
        ("--micro_batch 0", "micro_batch is 0"),
        ("--keep_last 0", "keep_last is 0"),
        ("--keep_at 0", "keep_at is 0"),
        ("--n_threads 0", "n_threads is 0; it must be 1 to 1,024"),
        ("--n_threads 100000", "n_threads is 100000"),
        ("--n_tokens 10", "n_tokens is 10, less than a sequence of 32"),
        ("--n_ctx 100000", "hold no window"),
    ],
)
def test_a_wrong_value_is_refused_and_leaves_no_trace(wrong, words, here, capfd):
    code, _, error = gpt3(f"{QUICK} --n_threads 1 {wrong}", capfd)
    assert code == 2 and words in error and not Path("run/config.yaml").exists()
    assert gpt3(f"{QUICK} --n_threads 1", capfd)[0] == 0


def test_wrong_weights_are_refused_and_leave_no_trace(trained, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(trained)
    line = f"train gpt3-100k --data runs/mine/data/train runs/mine/data/held_out --out {tmp_path}/new/run"
    code, _, error = gpt3(f"{line} {SMALL} --weights -1 2", capfd)
    assert code == 2 and "the weight of" in error and not (tmp_path / "new").exists()


def test_a_refused_start_does_not_change_the_next_one(here, capfd):
    assert gpt3("train --text mine.txt --n_ctx 100000", capfd)[0] == 2
    Path("mine.txt").write_text(text(7000))  # lengthened
    code, _, error = gpt3(f"train --text mine.txt --vocab_size 270 {SMALL}", capfd)
    assert (code, error) == (0, "") or "it/s" in error or "tok" in error
    assert Tokens("runs/mine/data/train").vocab_size == 270


def test_the_same_command_goes_on_though_the_text_yielded_fewer_tokens(here, capfd):
    Path("mine.txt").write_text("the cat sat on the mat\n" * 100)
    line = f"train --text mine.txt --vocab_size 20000 {SMALL}"
    assert gpt3(line, capfd)[0] == 0 and Tokens("runs/mine/data/train").vocab_size < 1000
    code, out, _ = gpt3(line, capfd)
    assert code == 0 and "going on" in out


def test_what_goes_on_is_checked_before_it_is_stored(trained, capfd, monkeypatch):
    monkeypatch.chdir(trained)
    before = Path("runs/mine/config.yaml").read_text()
    for wrong, words in [("--micro_batch 0", "micro_batch is 0"), ("--device warp", "no device 'warp'")]:
        code, _, error = gpt3(f"train --out runs/mine {wrong}", capfd)
        assert code == 2 and words in error and Path("runs/mine/config.yaml").read_text() == before
    with Store("runs/mine").locked():
        code, _, error = gpt3("train --out runs/mine --save_every 7", capfd)
    assert code == 2 and "in use by another run" in error and Path("runs/mine/config.yaml").read_text() == before


def test_a_folder_of_texts_is_a_text_of_that_name_and_goes_on(tmp_path, capfd, monkeypatch):
    (tmp_path / "plays").mkdir()
    monkeypatch.chdir(tmp_path / "plays")
    Path("mine.txt").write_text(text(6000))
    assert gpt3(f"train --text . {SMALL} --sample_every 4", capfd)[0] == 0
    assert Path("runs/plays/samples.txt").stat().st_size and Path("runs/plays/model/merges.txt").exists()
    code, out, _ = gpt3(f"train --text . {SMALL} --sample_every 4", capfd)
    assert code == 0 and "going on" in out
    code, _, error = gpt3("train --text runs --out other", capfd)
    assert code == 2 and "runs: only what runs have written" in error


def test_home_holds_the_whole_run(here, capfd, monkeypatch):
    monkeypatch.setenv("HOME", str(here / "home"))
    assert gpt3(f"train --text mine.txt --out=~/x {SMALL}", capfd)[0] == 0
    assert {"config.yaml", "model", "log.csv"} <= {path.name for path in (here / "home/x").iterdir()}
    assert not Path("~").exists()


def test_no_input_is_an_empty_prompt(trained, capfd, monkeypatch):
    monkeypatch.chdir(trained)
    monkeypatch.setattr(sys, "stdin", None)
    assert gpt3("generate runs/mine --n_tokens 3 --seed 1", capfd)[0] == 0


def test_convert_counts_what_it_writes(trained, capfd, monkeypatch):
    monkeypatch.chdir(trained)
    code, out, _ = gpt3("convert runs/mine neo --to gpt_neo", capfd)
    n = sum(t.numel() for t in load_file("neo/model.safetensors").values())
    assert code == 0 and f"neo: {n:,} parameters" in out


# --- stopped, and on: real processes ---


def begin(folder, line):
    """Start a command, and wait until it has taken some steps."""
    log = open(folder / "said.txt", "w")  # noqa: SIM115
    process = subprocess.Popen([*PROGRAM, *shlex.split(line)], cwd=folder, stdout=log, stderr=log)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline and not [*folder.glob("runs/*/step-*4")]:
        time.sleep(0.01)
    return process


@pytest.mark.skipif(os.name == "nt", reason="other signals")
def test_killed_then_stopped_then_whole(trained, tmp_path, capfd, monkeypatch):
    """kill -9, then Ctrl-C, then to the end: the losses of the run that nobody disturbed."""
    (tmp_path / "mine.txt").write_text((trained / "mine.txt").read_text())
    line = "train --text mine.txt " + SMALL
    process = begin(tmp_path, line)
    process.kill()
    process.wait()
    process = begin(tmp_path, line)
    while "goes on" not in (tmp_path / "said.txt").read_text() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    code = process.wait(timeout=120)
    said = (tmp_path / "said.txt").read_text()
    assert code in (0, 130) and "Traceback" not in said  # 0: it was at its end already
    assert code == 0 or "go on with: gpt3 train --out runs/mine" in said
    monkeypatch.chdir(tmp_path)
    assert gpt3(line, capfd)[0] == 0
    assert losses("runs/mine") == losses(trained / "runs" / "mine")
    one, other = (load_file(Path(f) / "runs/mine/model/model.safetensors") for f in (trained, tmp_path))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- questions ---


def test_questions_become_a_table_and_files(trained, capfd, monkeypatch):
    monkeypatch.chdir(trained)
    lines = [{"context": f"the {w}", "completion": " dog", "choices": [" dog", " cat"]} for w in ("old", "red", "wet")]
    Path("mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    line = "eval runs/mine --task mine.jsonl last --shots 0 1 --n 3 --seed 2 --by sum"
    code, _, error = gpt3(line, capfd)
    assert code == 2 and "do not fit into 32 tokens" in error  # before any question is asked
    line = line.replace(" last", "")
    code, out, _ = gpt3(line, capfd)
    assert code == 0 and [row.split()[:3] for row in out.splitlines()[:2]] == [["mine", k, "shots"] for k in "01"]
    assert "evals/mine: each answer" in out
    told = json.loads(Path("evals/mine/mine-1-shots.json").read_text())
    assert (told["n"], told["shots"], told["by"], told["seed"]) == (3, 1, "sum", 2)
    before = Path("evals/mine/mine-1-shots.jsonl").read_bytes()
    assert gpt3(line, capfd)[1] == out and Path("evals/mine/mine-1-shots.jsonl").read_bytes() == before
    code, _, error = gpt3(line + " --beams 2", capfd)
    assert code == 2 and "begun with beams None" in error
    Path("mine.jsonl").write_text('{"context": "a"}\n')
    code, _, error = gpt3(line, capfd)
    assert code == 2 and "mine.jsonl, line 1 must be" in error
    code, out, _ = gpt3("eval runs/mine --data mine.txt --task last --n 2 --out e", capfd)
    assert code == 0 and "mine.txt: loss" in out and "last" in out and Path("e/last-0-shots.json").exists()


# --- several ranks ---


@pytest.mark.parametrize(
    "line, words",
    [
        ("--parallel.cp 0", "--parallel.cp is 0; it must be 1 or more"),
        ("--parallel.dp 2 --parallel.chunks 0", "--parallel.chunks is 0; it must be 1 or more"),
        ("--parallel.dp many", "--parallel.dp is many; it must be a whole number"),
        ("--parallel.recompute some", "invalid choice 'some'"),
        (
            "b --parallel.dp 2 --parallel.tp 2 --bf16",
            "--parallel.dp 2 --parallel.tp 2 needs 4 processes of torchrun: torchrun --nproc-per-node 4 "
            "-m gpt3lib.cli train gpt3-1m --data a b --bf16 --parallel.dp=2 --parallel.tp=2\n",
        ),
        ("--parallel.recompute full", "--parallel.recompute full needs a process of torchrun: torchrun --nproc"),
        ("--parallel.chunks 2", "--parallel.chunks 2 needs --parallel.pp 2 or more"),
    ],
)
@pytest.mark.parametrize("world", ["", "1"])
def test_a_layout_without_its_processes_is_refused_and_the_line_for_it_told(
    line, words, world, here, capfd, monkeypatch
):
    if world:
        monkeypatch.setenv("WORLD_SIZE", world)
    code, _, error = gpt3(f"train gpt3-1m --data a {line}", capfd)
    assert code == 2 and words in error and error.count("\n") == 1 and not Path("runs").exists()


@pytest.fixture
def torchrun(monkeypatch):
    """A function that makes this process rank `rank` of `world`; what the engine does is played, and noted."""
    played = types.SimpleNamespace(calls=[])

    def from_first(work):
        played.calls.append("first")
        return work() if os.environ["RANK"] == "0" else "False"

    def learn_together(config, parts, layout):
        played.calls.append((config, layout))
        model, state = own_text.learn(config, parts) if os.environ["RANK"] == "0" else (None, None)
        return model, state or types.SimpleNamespace(finished=True)

    played.from_first, played.learn_together = from_first, learn_together
    monkeypatch.setattr("gpt3lib.ranks.from_first", lambda work: played.from_first(work))
    monkeypatch.setattr("gpt3lib.elastic.learn_together", lambda *parts, layout: played.learn_together(*parts, layout))

    def begin(rank, world):
        for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}.items():
            monkeypatch.setenv(name, str(value))
        return played

    return begin


def test_the_first_rank_settles_writes_and_speaks_and_the_others_read(here, torchrun, capfd):
    line = f"train --text mine.txt {SMALL} --parallel.tp 2"
    played = torchrun(0, 4)
    code, out, error = gpt3(line, capfd)
    assert code == 0 and "ranks       4: dp 2 tp 2" in out and "More of it" in out, error
    (config, layout) = played.calls[1]
    assert (layout.dp, layout.tp, layout.world) == (2, 2, 4) and config.dp is None and config.n_ctx == 32
    stored = yaml.safe_load(Path("runs/mine/config.yaml").read_text())
    assert (stored["parallel.tp"], stored["parallel.dp"]) == (2, None)
    played = torchrun(3, 4)
    assert gpt3(line, capfd) == (0, "", "")
    assert played.calls[3][0] == config and played.calls[3][1] == layout


def test_a_layout_that_does_not_fit_is_refused_by_the_first_before_anything(here, torchrun, capfd):
    played = torchrun(0, 3)
    code, _, error = gpt3("train gpt3-1m --text mine.txt --parallel.tp 2", capfd)
    assert code == 2 and "tp=2 needs 2 ranks, and there are 3" in error and " dp=3" in error
    assert played.calls == ["first"] and not Path("runs").exists()  # no text was read
    code, _, error = gpt3("train --text mine.txt --parallel.tp 2", capfd)
    assert code == 2 and "there are 3" in error and not Path("runs/mine/config.yaml").exists()


def test_a_rank_that_is_not_the_first_says_only_what_is_its_own(here, torchrun, capfd, monkeypatch):
    played = torchrun(1, 2)
    assert gpt3("train --lr 3", capfd) == (2, "", "")
    assert gpt3("--help", capfd) == (0, "", "")
    played.from_first = lambda work: 1 / 0
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "error.json")
    code, out, error = gpt3("train gpt3-1m --data a", capfd)
    assert (code, out) == (2, "") and error.startswith("gpt3: rank 1: ZeroDivisionError")
    told = json.loads(Path("error.json").read_text())["message"]  # torchrun's table shows it
    assert told["message"] == error.strip() and 0 <= time.time() - int(told["extraInfo"]["timestamp"]) < 60

    def stop(work):
        raise KeyboardInterrupt

    played.from_first = stop
    assert gpt3("train gpt3-1m --data a", capfd) == (130, "", "")


def test_a_run_goes_on_under_another_layout(trained, torchrun, capfd, monkeypatch, tmp_path):
    shutil.copytree(trained / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    played = torchrun(0, 2)
    assert gpt3("train --out runs/mine --parallel.tp 2 --parallel.recompute full", capfd)[0] == 0
    assert (played.calls[1][1].tp, played.calls[1][1].recompute) == (2, "full")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name)
    code, _, error = gpt3("train --out runs/mine", capfd)
    assert code == 2 and "train --out runs/mine; or, in this one, --parallel.tp 1 --parallel.recompute none" in error
    code, out, _ = gpt3("train --out runs/mine --parallel.tp 1 --parallel.recompute none", capfd)
    assert code == 0 and "going on" in out


def test_several_ranks_that_are_stopped_tell_the_line_of_torchrun(here, torchrun, capfd, monkeypatch):
    played = torchrun(0, 2)
    played.learn_together = lambda *parts: (None, types.SimpleNamespace(finished=False))
    code, out, _ = gpt3(f"train --text mine.txt {SMALL}", capfd)
    assert code == 130 and "go on with: torchrun --nproc-per-node 2 -m gpt3lib.cli train --out runs/mine" in out
    code, _, error = gpt3("train --from gpt3-1m --pairs x", capfd)
    assert code == 2 and "--from trains in one process" in error


def test_all_ranks_together_have_more_memory_and_are_faster(torchrun, monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert own_text.on_all_ranks(8, 2.0, cpu) == own_text.on_all_ranks(8, 2.0, gpu) == (8, 2.0)
    torchrun(0, 6)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert own_text.on_all_ranks(8, 2.0, cpu) == (3 * 8, 6 * 2.0) and own_text.on_all_ranks(8, 2.0, gpu) == (48, 12.0)
    assert own_text.on_all_ranks(None, 2.0, cpu) == (None, 12.0)


def test_several_ranks_refuse_samples_before_any_text_is_read(trained, torchrun, capfd, monkeypatch, tmp_path):
    shutil.copytree(trained / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    torchrun(0, 2)
    code, _, error = gpt3("train --text no.txt --sample_every 5", capfd)
    assert code == 2 and "give --sample_every 0" in error and not Path("runs/no").exists()
    code, _, error = gpt3("train --out runs/mine --sample_every 5", capfd)
    assert code == 2 and "give --sample_every 0" in error
    assert gpt3("train --out runs/mine --sample_every 0", capfd)[0] == 0


def test_other_commands_run_in_one_process(torchrun, capfd):
    torchrun(0, 2)
    for name in ("generate", "eval", "tokenize", "plan", "convert"):
        code, _, error = gpt3(name, capfd)
        assert code == 2 and error == f"gpt3: gpt3 {name} runs in one process; leave torchrun away\n"


def test_a_file_that_is_started_as_a_script_says_how_to_start_it():
    done = subprocess.run([sys.executable, cli.__file__, "train"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == "gpt3: start it as python -m gpt3lib.cli\n"


def test_a_plan_says_what_a_run_would_take(capfd, monkeypatch):
    code, out, error = gpt3("plan gpt3-1.3b --gpus 8 --parallel.tp 2 --price 3 --top 1", capfd)
    assert (code, error) == (0, "") and "tp=2" in out and re.search(r"days +[\d,.]+ ", out) and "$3.00 an hour" in out
    assert gpt3("plan gpt3-1.3b --gpus 8", capfd)[1] != out
    for wrong, words in [
        ("--gpu h100", "no GPU 'h100'"),
        ("--parallel.tp 5", "tp=5"),
        ("--efficiency 50", "efficiency"),
    ]:
        code, _, error = gpt3(f"plan gpt3-175b {wrong}", capfd)
        assert code == 2 and words in error and error.count("\n") == 1
    traced = []
    monkeypatch.setattr(
        "gpt3lib.dry_run.check_plan_of", lambda shape, one: traced.append((shape.d_model, one.layout.tp))
    )
    assert gpt3("plan gpt3-1.3b --gpus 8 --parallel.tp 2 --dry_run", capfd)[0] == 0 and traced == [(2048, 2)]


@pytest.mark.skipif(os.name == "nt", reason="torchrun wants another network there")
def test_torchrun_learns_what_one_process_does(trained, tmp_path):
    """The same command on two ranks, then on one again: the losses of one process."""
    (tmp_path / "mine.txt").write_text((trained / "mine.txt").read_text())
    line = f"-m torch.distributed.run --standalone --nproc-per-node 2 -m gpt3lib.cli train --text mine.txt {SMALL}"
    done = subprocess.run(
        [sys.executable, *shlex.split(line), "--parallel.tp", "2"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0 and "ranks       2: tp 2" in done.stdout, done.stderr
    assert done.stdout.count("More of it") == 1  # one rank speaks
    ours, theirs = losses(trained / "runs" / "mine"), losses(tmp_path / "runs" / "mine")
    assert [row[:2] for row in ours] == [row[:2] for row in theirs]
    assert [float(row[2]) for row in ours] == pytest.approx([float(row[2]) for row in theirs], rel=1e-5)
