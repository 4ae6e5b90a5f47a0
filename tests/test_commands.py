"""The options of every command: each explained, none that can be changed by accident, and no torch to read them."""

import dataclasses
import subprocess
import sys
from dataclasses import asdict, fields

import pytest

from gpt3lib.commands import (
    FREE,
    LAYOUT_ASKED,
    ConvertConfig,
    EvalConfig,
    GenerateConfig,
    PlanConfig,
    TokenizeConfig,
    TrainConfig,
    TuneConfig,
    torchrun_rank,
    torchrun_ranks,
)
from gpt3lib.options import FIRST, ask, called

CONFIGS = [TrainConfig, TuneConfig, GenerateConfig, EvalConfig, TokenizeConfig, PlanConfig, ConvertConfig]


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_field_is_explained(kind, capsys):
    with pytest.raises(SystemExit) as end:
        ask(kind, ["--help"])
    shown = capsys.readouterr().out
    assert end.value.code == 0
    for field in fields(kind):
        words = next(mark.help for mark in field.type.__metadata__ if hasattr(mark, "help"))
        assert words and words.split()[0] in shown
        positional = FIRST in field.type.__metadata__
        assert positional or f"--{called(field)}" in shown


def test_free_fields_are_fields():
    assert {field.name for field in fields(TrainConfig)} > FREE > set(LAYOUT_ASKED)


def test_configs_are_frozen():
    for kind in CONFIGS:
        assert dataclasses.is_dataclass(kind) and kind.__dataclass_params__.frozen and kind.__doc__
    assert asdict(TrainConfig())["size"] is None


@pytest.mark.parametrize("module", ["cli", "commands"])
def test_no_torch_is_needed_to_know_the_options(module):
    code = f"import sys, gpt3lib.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_layout_is_typed_after_a_dot():
    layout = {called(field): field.name for field in fields(TrainConfig) if field.name in LAYOUT_ASKED}
    assert layout == {f"parallel.{name}": name for name in LAYOUT_ASKED}
    same = {called(field) for field in fields(PlanConfig) if field.name in LAYOUT_ASKED}
    assert same == {*layout} - {"parallel.chunks"}
    assert ask(TrainConfig, ["--parallel.dp", "2", "--parallel.recompute=full"]) == TrainConfig(dp=2, recompute="full")


def test_torchrun_tells_which_rank_this_is(monkeypatch):
    assert (torchrun_ranks(), torchrun_rank()) == (0, 0)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert torchrun_ranks() == 0  # somebody else's word
    monkeypatch.setenv("RANK", "3")
    assert (torchrun_ranks(), torchrun_rank()) == (0, 0)  # torchrun would tell all three
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert (torchrun_ranks(), torchrun_rank()) == (4, 3)
    monkeypatch.setenv("RANK", "abc")
    assert (torchrun_ranks(), torchrun_rank()) == (0, 0)
