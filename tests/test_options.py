"""The options: words and files become a dataclass, and it becomes a file; what cannot be is one line."""

import re
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt3lib.options import (
    FIRST,
    PATHS,
    CommandError,
    amount,
    as_arguments,
    ask,
    called,
    option,
    read_yaml,
    write_yaml,
)


@dataclass(frozen=True)
class TryConfig:
    """Try it."""

    what: option(str | None, "WHAT", "goes first", FIRST) = None
    start: option(str | None, "MODEL", "a model", name="from") = None
    n: option(int, "N", "how many") = None
    rate: option(float | None, "RATE", "how fast") = None
    files: option(tuple[str, ...], "FILE …", "which") = ()
    words: option(tuple[str, ...], "WORD …", "what") = ()
    loud: option(bool, "", "aloud") = False
    config: option(str | None, "FILE.yaml", "these, as YAML") = None


def read(path):
    return ask(TryConfig, as_arguments(TryConfig, read_yaml(path), path))


@pytest.mark.parametrize(
    "words, number",
    [("20000000", 2e7), ("20_000_000", 2e7), ("2e7", 2e7), ("20M", 2e7), ("1.5k", 1500), ("300B", 3e11), (".5k", 500)],
)
def test_amounts(words, number):
    assert amount(words) == number and type(amount(words)) is int
    assert amount(f" {words}\n") == number


def test_large_amounts_are_exact():
    assert amount("9007199254740993") == 2**53 + 1 and amount("9_007_199_254_740.993k") == 2**53 + 1


@pytest.mark.parametrize(
    "words", ["", "x", "1.5", "-3", "1e-3", "0.1k5", "2 M", "nan", "inf", "1e400", "1e30", "__1", "_1", "1__0", "²"]
)
def test_what_is_no_amount(words):
    with pytest.raises(ValueError, match="no whole number"):
        amount(words)


def test_words_become_a_config():
    config = ask(TryConfig, ["it", "--from", "m", "--n", "2k", "--files", "a", "b", "--loud", "--rate=1e-3"])
    assert config == TryConfig("it", "m", 2000, 1e-3, ("a", "b"), (), True)
    assert ask(TryConfig, ["--n", "3"], config).n == 3 and ask(TryConfig, [], config) == config


def test_an_option_may_have_another_name_than_its_field(tmp_path, capsys):
    names = [called(field) for field in TryConfig.__dataclass_fields__.values()]
    assert names == ["what", "from", "n", "rate", "files", "words", "loud", "config"]
    with pytest.raises(SystemExit):
        ask(TryConfig, ["--help"])
    shown = capsys.readouterr().out
    assert "--from MODEL" in shown and "--start" not in shown and "usage: gpt3 try" in shown
    (tmp_path / "x.yaml").write_text("from: m\n")
    assert read(tmp_path / "x.yaml") == TryConfig(start="m")
    (tmp_path / "x.yaml").write_text("start: m\n")
    with pytest.raises(CommandError, match="no field 'start'; there are what, from, n"):
        read(tmp_path / "x.yaml")


def test_a_command_may_have_another_name_than_its_config(capsys):
    with pytest.raises(SystemExit):
        ask(TryConfig, ["--help"], name="other")
    assert "usage: gpt3 other" in capsys.readouterr().out
    with pytest.raises(CommandError, match="`gpt3 other --help` tells"):
        ask(TryConfig, ["--x"], name="other")


def test_home_is_where_a_path_may_stand(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = ask(TryConfig, ["~/w", "--from=~/m", "--files", "~/a", "b", "--words", "~/c"])
    assert config == TryConfig("~/w", f"{tmp_path}/m", files=(f"{tmp_path}/a", "b"), words=("~/c",))
    assert "MODEL" in PATHS and "WORD" not in PATHS


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--lr", "3"], "Unrecognized options: --lr, 3"),
        (["--rat", "3"], "perhaps you meant --rate"),
        (["--n", "many"], "--n is many; it must be a whole number without a sign, such as 3; `gpt3 try"),
        (["--rate", "high"], "--rate"),
        (["--from"], "from"),
    ],
)
def test_wrong_options_become_one_line(arguments, words):
    with pytest.raises(CommandError, match=re.escape(words)) as error:
        ask(TryConfig, arguments)
    assert "\n" not in str(error.value) and "─" not in str(error.value) and "---" not in str(error.value)


@pytest.mark.parametrize(
    "content, words",
    [
        ("lr: 3", "no field 'lr'; there are what, from"),
        ("config: other.yaml", "no field 'config'"),
        ("- a\n- b", "must hold lines"),
        ("", "must hold lines"),
        ("a: [", "is no YAML"),
        ("n: {a: 1}", "n must be plain"),
        ("n: soon", "--n is soon; it must be a whole number"),
        ("n: [1, 2]", "n must be one value"),
        ("!!python/object/apply:os.system ['true']", "must hold lines"),
        ("n: 1\nrate: 1\nn: 2", "n stands there twice"),
        ("loud: 3", "loud is 3, not true or false"),
    ],
)
def test_files_that_are_refused(content, words, tmp_path):
    (tmp_path / "x.yaml").write_text(content)
    with pytest.raises(CommandError, match=re.escape(words)):
        read(tmp_path / "x.yaml")


def test_what_a_file_says_is_read_as_it_stands(tmp_path):
    """YAML would make a False of No, 8 of 010, 90 of 1:30, and 1 of 1.0."""
    for words in ("No", "010", "1:30", "1.0", "off", "2020-01-01"):
        (tmp_path / "x.yaml").write_text(f"what: {words}\nloud: 'Yes'\nn:\nrate: ~\n")
        assert read(tmp_path / "x.yaml") == TryConfig(words, loud=True)


PLAIN = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1).filter(
    lambda s: s.strip() == s and s[0] not in "-~"
)
VALUES = {
    "what": PLAIN.filter(lambda s: s != "null"),
    "start": PLAIN.filter(lambda s: s != "null"),
    "n": st.integers(0, 10**12),
    "rate": st.floats(0, exclude_min=True),
    "files": st.lists(st.sampled_from(["a", "b/c", "ü"]), min_size=1).map(tuple),
    "loud": st.booleans(),
}


@settings(max_examples=50, deadline=None)
@given(st.fixed_dictionaries({}, optional=VALUES))
def test_a_config_that_was_written_is_read_again(tmp_path_factory, given):
    path = tmp_path_factory.mktemp("c") / "config.yaml"
    config = TryConfig(**given, config="elsewhere.yaml")
    write_yaml(config, path)
    assert read(path) == TryConfig(**given) and "config" not in read_yaml(path)
