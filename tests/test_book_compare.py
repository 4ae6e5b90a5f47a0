"""Outputs of another processor agree with the stored ones; everything else that changes is red."""

import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import nbformat
import pytest
from hypothesis import given
from hypothesis import strategies as st

import compare

ROOT = Path(__file__).resolve().parent.parent
BAR = '<svg width="{}" height="9"><rect x="1" width="{}"/><path d="M12.5,3L{},4z"/></svg>'

SAME = [
    ("tensor([1., 1.])", "tensor([1.000, 1.000])"),
    ("tensor([1., 1.])", "tensor([0.999, 1.001])"),
    ("tensor([[ 0.5, -0.0]])", "tensor([[0.5, 0.0]])"),
    ("tensor([ 1.0, -0.0])\n", "tensor([1.0, 0.0])\n"),
    ("-0.00 and +0.00", "0.00 and -0.00"),
    ("0.123", "0.1235"),
    ("0.12", "0.13"),
    ("loss 2.00", "loss 1.99"),
    ("-0.1", "0.0"),
    (".65", ".66"),
    ("0.5", "0.50000"),
    ("1.2e-05", "1.3e-05"),
    ("9.9e-06", "1.0e-05"),
    ("1.25e-05", "0.0000125"),
    ("4e-36", "5e-36"),
    ("1e-05", "9e-06"),
    ("0.0000e+00", "-0.e+00"),
    ("1,235.1", "1,235.2"),
    ("47.9%", "48.0%"),
    ("(0.1,0.2)", "(0.2,0.1)"),
    ("the value is 0.1.", "the value is 0.2."),
    ("x=-1.34;", "x=-1.35;"),
    ("ln_1.bias  0.25   ok", "ln_1.bias 0.26 ok"),
    ("the    9 cats", "the  9 cats"),
    ("0.5 nan", "0.4 nan"),
    ("9" * 40 + ".1", "9" * 40 + ".2"),
]
OTHER = [
    ("0.12", "0.14"),
    ("0.123", "0.1251"),
    ("1.", "1.002 "),
    ("1.", "1.2"),
    ("tensor([6., 0.])", "tensor([7., 0.])"),
    ("tensor(0.)", "tensor(1.2e-07)"),
    ("1.2e-05", "1.4e-05"),
    ("1.2e-05", "1.2e-06"),
    ("1.2e-05", "1.2e+05"),
    ("1e-05", "1e-09"),
    ("0.0e+00", "1.2e-07"),
    ("41", "42"),
    ("1", "1.0"),
    ("tensor([1, 2])", "tensor([1., 2.])"),
    ("1,999", "2,000"),
    ("0.5", "-0.5"),
    ("-0.1", "0.1"),
    ("-3", "3"),
    ("0.5", "nan"),
    ("nan", "inf"),
    ("inf", "-inf"),
    ("0.5", ""),
    ("0.5", "0.5, 0.5"),
    ("0.5", "0.5 0.5"),
    ("0.5\n0.6", "0.5 0.6"),
    ("0.5\n0.6\n", "0.5\n"),
    ("0.5\n", "0.5"),
    ("0.5\n\n0.6", "0.5\n0.6"),
    ("a cat", "a cot"),
    ("a cat", "acat"),
    ("True", "False"),
    ("w1", "w2"),
    ("gpt3-1m", "gpt3-2m"),
    ("gpt3-1.3b", "gpt3-1.4b"),
    ("1.3b", "1.4b"),
    ("3.5-turbo", "3.6-turbo"),
    ("x-1.5", "x-1.6"),
    ("x1.5", "x1.6"),
    ("x1.5", "x 1.5"),
    ("iambic-3.0.0", "iambic-3.1.0"),
    ("iambic==3.0.0", "iambic==3.0.1"),
    ("p3fa2", "p3fa3"),
    ("#4e-30f63e", "#5e-30f63e"),
    ("1.2e5", "1.3e5"),
    ("1.5e-05f", "1.6e-05f"),
    ("0.5 kg", "0.5 g"),
    ("[0.5]", "(0.5)"),
]
SAME_PICTURE = [
    (BAR.format(80, 20, 7.1), BAR.format(80, 20, 7.2)),
    (BAR.format(80, 20, 7), BAR.format(80, 20, 7.1)),
    (BAR.format(80, 20.5, 7), BAR.format(80, 20.6, "6.9")),
    (BAR.format(80, 20, "0"), BAR.format(80, 20, "-0.1")),
    (BAR.format("80", 20, 7), BAR.format("80.0", 20, 7)),
    ('<path d="M1.5-2.5"/>', '<path d="M1.4-2.6"/>'),
    ("<style>.p1{transform:translate(3px,4.5px)}</style>", "<style>.p1{transform:translate(3.1px,4.4px)}</style>"),
    ("<title>-1.5</title>", "<title>-1.6</title>"),
    ('<g aria-label="loss 0.25 at step 3">', '<g aria-label="loss 0.26 at step 3">'),
]
OTHER_PICTURE = [
    (BAR.format(80, 20, 7), BAR.format(80, 30, 7)),
    (BAR.format(80, 20, 7), BAR.format(80, 21, 7)),
    (BAR.format(80, 20.5, 7), BAR.format(80, 30.5, 7)),
    (BAR.format(80, 20.5, 7), BAR.format(80, 20.7, 7)),
    (BAR.format(80, 20, 7), BAR.format(80, 20.2, 7)),
    (BAR.format(80, 20, 7), BAR.format(80, 20, 17.1)),
    (BAR.format(80, 20, 7), BAR.format(80, 20, -7)),
    (BAR.format(80, 20, "7"), BAR.format(80, 20, "nan")),
    (BAR, BAR.replace("L", "l")),
    (BAR, BAR.replace('x="1" ', "")),
    ('<g class="p3fa2-1.5"/>', '<g class="p3fa2-1.6"/>'),
    ('<g id="a1"/>', '<g id="a2"/>'),
    ('<g fill="#2f9e44"/>', '<g fill="#2f9e45"/>'),
    ("<text>step 3</text>", "<text>step 4</text>"),
    ("<text>step 3</text>", "<text>step 3.0</text>"),
    ("<text>gpt3-1.3b</text>", "<text>gpt3-1.4b</text>"),
    ('<g aria-label="gpt3-1.3b, step 3">', '<g aria-label="gpt3-1.4b, step 3">'),
    ('<g aria-label="loss 0.25 at step 3">', '<g aria-label="loss 0.25 at step 3.0">'),
]


@pytest.mark.parametrize("pairs, markup, same", [
    (SAME, False, True), (OTHER, False, False), (SAME_PICTURE, True, True), (OTHER_PICTURE, True, False),
])  # fmt: skip
def test_pairs(pairs, markup, same):
    for one, other in pairs:
        assert bool(compare.difference(one, other, markup)) != same, (one, other)
        assert bool(compare.difference(other, one, markup)) != same, (other, one)
        assert not compare.difference(one, one, markup) and not compare.difference(other, other, markup)


def test_text_rules_hold_in_pictures():
    for one, other in OTHER:
        assert compare.difference(f"<text>{one}</text>", f"<text>{other}</text>", markup=True), (one, other)
    for one, other in SAME:
        assert not compare.difference(f"<text>{one}</text>", f"<text>{other}</text>", markup=True), (one, other)


def test_a_difference_is_named():
    assert compare.difference("a 0.5\nb 0.25, c", "a 0.5\nb 0.27, c") == "line 2: stored ' 0.25, c', fresh ' 0.27, c'"
    assert compare.difference("a\n0.5\nabc", "a\n0.5\nabd") == "line 3: stored '\\nabc', fresh '\\nabd'"
    assert compare.difference("a 0.5  0.6 b", "a 0.5  0.6 c") == "line 1: stored 'b', fresh 'c'"
    assert compare.difference("a 0.5  0.6 b", "a 0.8  0.6 b") == "line 1: stored ' 0.5 0.6 b', fresh ' 0.8 0.6 b'"
    assert compare.difference("0.5", "0.5 0.5") == "line 1: stored '', fresh '0.5'"


def test_outputs_are_paired_in_their_order_and_left_as_they_were():
    def outputs(*texts):
        return [nbformat.v4.new_output("display_data", data={"text/plain": text, "image/png": text}) for text in texts]

    fresh = outputs("1.1", "2.1", "9.9")
    settled, found = compare.settle(fresh, outputs("1.0", "2.2"))
    assert [output.data["text/plain"] for output in settled] == ["1.0", "2.2", "9.9"] and not found
    assert [output.data["image/png"] for output in settled] == ["1.1", "2.1", "9.9"]
    assert fresh == outputs("1.1", "2.1", "9.9")
    assert compare.settle(fresh, outputs("1.0", "2.5"))[1] == ["text/plain, line 1: stored '2.5', fresh '2.1'"]
    assert compare.settle([], fresh) == ([], [])


@given(st.integers(-(10**6), 10**6), st.integers(0, 6), st.integers(-5, 5))
def test_one_in_the_last_digit_is_the_limit(value, places, off):
    one, other = (f"{number / 10**places:.{places}f}" for number in (value, value + off))
    assert bool(compare.difference(f"w1 = {one}, 7", f"w1 = {other}, 7")) == (abs(off) > (1 if places else 0))


@given(st.floats(-1e6, 1e6), st.integers(1, 5), st.integers(1, 5))
def test_the_same_float_agrees_at_any_two_precisions(value, few, many):
    assert not compare.difference(f"{value:.{few}f}", f"{value:.{many}f}")
    assert not compare.difference(f"{value:.{few}e}", f"{value:.{many}e}")
    assert not compare.difference(f"[{value:12.{few}f} ]", f"[{value:<9.{many}f}]")


@given(st.text(st.sampled_from('aL1.5-+e, \n<>="'), max_size=30), st.booleans())
def test_any_text_agrees_with_itself_and_not_when_all_its_digits_change(text, markup):
    assert not compare.difference(text, text, markup)
    if re.search(r"\d", text):
        assert compare.difference(text, re.sub(r"\d", lambda digit: str(6 - int(digit[0])), text), markup)


# one cell each: what the kernel shows, what is stored; the first word is the kind of output
GREEN = {
    "stream": ("0.124 1.000\n", "0.123 1.\n"),
    "svg": (BAR.format(80, 20.5, 7.1), BAR.format(80, 20.6, 7)),
    "html": ("<b>0.124</b>", "<b>0.123</b>"),
    "result": ("tensor([1.000, 1.000])", "tensor([1., 1.])"),
    "error": ("worth 0.124", "worth 0.123"),
}
RED = {
    "stream, decimal off by two": ("0.125\n", "0.123\n"),
    "stream, whole number": ("step 4\n", "step 3\n"),
    "stream, word": ("a cot\n", "a cat\n"),
    "stream, missing line": ("0.5\n", "0.5\n0.6\n"),
    "stream, second of two": ("0.5\n0.8\n", "0.5\n0.6\n"),
    "svg, bar of a whole width": (BAR.format(80, 30, 7), BAR.format(80, 20, 7)),
    "svg, bar with a decimal": (BAR.format(80, 30.5, 7), BAR.format(80, 20.5, 7)),
    "html, decimal off by two": ("<b>0.125</b>", "<b>0.123</b>"),
    "html, whole number": ("<b>4</b>", "<b>3</b>"),
    "result, decimal off by two": ("tensor([1.002])", "tensor([1.])"),
    "result, dtype": ("tensor([1.])", "tensor([1])"),
    "error, decimal off by two": ("worth 0.125", "worth 0.123"),
}
CLASS = """class Shown:
    def _repr_mimebundle_(self, include=None, exclude=None):
        return {bundle!r}
Shown()"""


def cell(kind: str, shown: str, stored: str):
    """A code cell that shows one text, with another stored."""
    new = nbformat.v4.new_output
    mime = {"svg": "image/svg+xml", "html": "text/html", "result": "text/plain"}.get(kind)
    if kind == "stream":
        source, output = f"print({shown!r}, end='')", new("stream", text=stored)
    elif kind == "error":
        source, output = f"raise ValueError({shown!r})", new("error", ename="ValueError", evalue=stored)
    else:
        source = CLASS.format(bundle={"text/plain": "Shown", mime: shown})
        output = new("execute_result", data={"text/plain": "Shown", mime: stored}, execution_count=1)
    tags = ["raises-exception"] if kind == "error" else []
    return nbformat.v4.new_code_cell(source, outputs=[output], execution_count=1, metadata={"tags": tags})


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """What pytest says of two notebooks beside a copy of this repository's settings: {notebook: [failure or ""]}."""
    folder = tmp_path_factory.mktemp("book")
    (folder / "tools").mkdir()
    for name in ("conftest.py", "pyproject.toml", "tools/compare.py", "tools/execute.py"):
        shutil.copy(ROOT / name, folder / name)
    for name, cells in {"green": GREEN, "red": RED}.items():
        cells = [cell(re.split(r"\W", kind)[0], *texts) for kind, texts in cells.items()]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / f"{name}.ipynb")
    command = [sys.executable, "-m", "pytest", "-q", "--color=no", "-p", "no:cacheprovider", "--junitxml=report.xml"]
    done = subprocess.run([*command, "green.ipynb", "red.ipynb"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    found = {"green": [], "red": []}
    for case in ET.parse(folder / "report.xml").iter("testcase"):
        failure = case.find("failure")
        found[re.search("green|red", case.get("classname") + case.get("name"))[0]].append(
            "" if failure is None else failure.text
        )
    return found


def test_nbval_lets_the_last_digit_differ(report):
    assert dict(zip(GREEN, report["green"])) == dict.fromkeys(GREEN, "")


def test_nbval_is_red_for_everything_else_and_says_where(report):
    assert len(report["red"]) == len(RED)
    for name, failure in zip(RED, report["red"]):
        assert "Cell outputs differ" in failure and " mismatch " in failure, name
        assert re.search(r"\nfirst difference: [\w/+]+, line \d: stored '.*', fresh '.*'\n", failure), (name, failure)
