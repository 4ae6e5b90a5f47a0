"""The form of the book: every chapter keeps the rules, every rule finds a chapter that breaks it."""

import base64
import functools
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

import execute
import export
import form
import form_package
import measure

ROOT = Path(__file__).resolve().parent.parent
ORDER = execute.chapters()
MODULES = sorted(path.stem for path in (ROOT / "gpt3lib").glob("[a-z]*.py"))


@functools.cache
def notebook(name):
    return form.read(ROOT / "book" / f"{name}.ipynb")


# --- every chapter keeps the rules ---


@pytest.mark.parametrize("name, rule", [(name, rule) for name in ORDER for rule in form.rules(name)])
def test_a_chapter_has_the_form_of_the_book(name, rule):
    assert rule(notebook(name)) == []


@pytest.mark.parametrize("name", ORDER)
def test_a_chapter_imports_earlier_chapters_only(name):
    assert form_package.forward_imports(notebook(name), name, ORDER) == []


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_earlier_chapters_only(name):
    source = (ROOT / "gpt3lib" / f"{name}.py").read_text(encoding="utf-8")
    assert form_package.module_imports(name, source, ORDER) == []
    assert form_package.replacements(source) == []
    assert form_package.wide_lines(source) == []


def test_modules_are_small():
    lines = {name: len((ROOT / "gpt3lib" / f"{name}.py").read_text().splitlines()) for name in MODULES}
    assert form_package.large_package(lines) == []


def test_the_book_runs_in_twenty_minutes():
    times = json.loads(execute.TIMES.read_text())
    assert set(times) == set(ORDER)
    assert form_package.slow(times) == []


# --- a notebook that breaks no rule ---


def png():
    """A stored image of four pixels."""
    raw = io.BytesIO()
    Image.new("RGBA", (2, 2)).save(raw, "PNG")
    return base64.b64encode(raw.getvalue()).decode()


def code(source, text=None, tags=(), **metadata):
    """A code cell that has run, with what it printed."""
    outputs = [new_output("stream", name="stdout", text=text)] if text else []
    metadata |= {"tags": list(tags)} if tags else {}
    return new_code_cell(source, execution_count=1, outputs=outputs, metadata=metadata)


def drawn(source, data, **metadata):
    """A hidden cell that has drawn."""
    cell = code(source, tags=["hide-input"], **metadata)
    cell.outputs = [new_output("display_data", data)]
    return cell


def exercise(number):
    return [
        new_markdown_cell(f"### Exercise {number}: Add\n\nAdd one and one."),
        new_markdown_cell("#### Solution", metadata={"jp-MarkdownHeadingCollapsed": True}),
        code("1 + 1", "2\n"),
    ]


def good():
    """A chapter: 0 title, 1 setup, 2 map, 3 text, 4 story, 5 plot, 6 text, 7 definition, 8 workshop, 9 check, 10 …"""
    svg = '<svg class="p" role="img" aria-label="a dot"></svg>'
    cells = [
        new_markdown_cell("# Title\n\nBuilds a thing,\nfrom nothing."),
        drawn('scenes.whole_model("attention")', {"text/html": svg}),
        new_markdown_cell("Said in 2020 [B20], and `{True}` or `f({x})` is code.\n\n1. one ![a dot](dot.svg)\n2. two"),
        code("from gpt3lib import scenes\n\nprint(len('word'))", "4\n"),
        drawn("plt.show()", {"image/png": png(), "text/plain": "<Figure>"}, mystnb={"image": {"alt": "a line"}}),
        new_markdown_cell("> **Where we deviate.** Here.\n\n```\n1. in a fence {cite}`B20`\n:::\n```"),
        code("def add(a, b):\n    if a < 0:\n        raise ValueError('no')\n    return a + b", tags=["export"]),
        new_markdown_cell("## The workshop\n\nSkip it at first.\n\n### More"),
        code("print(add(1, 2))", "3\n"),
        new_markdown_cell("## Exercises"),
        *sum((exercise(number) for number in range(1, 6)), []),
    ]
    book = new_notebook(cells=cells)
    execute.normal_form(book)
    book.cells[1].execution_count = 1
    return book


STORY, PLOT, DEFINITION, WORKSHOP, CHECK, EXERCISES = 4, 5, 7, 8, 9, 10


def failing(book):
    return {rule.__name__ for rule in form.rules("04_attention") if rule(book)}


def test_a_good_notebook_breaks_no_rule():
    assert {rule.__name__: rule(good()) for rule in form.rules("04_attention") if rule(good())} == {}


def test_every_rule_is_shown_a_bad_notebook():
    (mark,) = test_a_rule_finds_what_breaks_it.pytestmark
    shown = {rule for rule, _ in mark.args[1]}
    assert {rule.__name__ for rule in form.rules("04_attention")} == shown


# --- notebooks that break one ---


def source(place, text):
    """Another source for a cell."""
    return lambda book: book.cells[place].update(source=text)


def prints(text, place=STORY):
    """Another text for an output."""
    return lambda book: book.cells[place].update(outputs=[new_output("stream", name="stdout", text=text)])


def tagged(place, *names):
    return lambda book: book.cells[place].metadata.update(tags=list(names))


def metadata(place, **entries):
    return lambda book: book.cells[place].metadata.update(entries)


def html(text):
    return lambda book: book.cells[2].outputs[0].data.update({"text/html": text})


def insert(place, *cells):
    """Cells put before a place."""

    def action(book):
        book.cells[place:place] = list(cells)

    return action


def remove(*doomed):
    return lambda book: [book.cells.pop(place) for place in doomed]


def error(book):
    book.cells[STORY].outputs = [new_output("error", ename="ValueError", evalue="no", traceback=["no"])]


def uncompare(text):
    return lambda book: [cell.update(source=text) for cell in book.cells if cell.get("outputs")]


def text(words):
    return insert(6, new_markdown_cell(words))


def change(action):
    book = good()
    action(book)
    return book


SILENT = [code("x = 1") for _ in range(3)]
LOUD = [code("print(2)", "2\n") for _ in range(30)]
STEPS = [code("def f(): ...") if i else code("y = 2") for i in range(5)]


@pytest.mark.parametrize(
    "rule, action",
    [
        ("uncounted", lambda book: book.cells[STORY].update(execution_count=None)),
        ("uncounted", lambda book: book.cells[1].update(execution_count=None)),
        ("not_normal", metadata(STORY, execution={"started": "now"})),
        ("not_normal", lambda book: book.cells[STORY].update(id="a1b2")),
        ("not_normal", lambda book: book.metadata.update(widgets={})),
        ("not_normal", lambda book: book.metadata.language_info.update(version="3.11.2")),
        ("not_normal", remove(1)),
        ("not_normal", source(1, "%pip install gpt3lib")),
        ("stored_errors", error),
        ("warned", lambda book: book.cells[STORY].update(outputs=[new_output("stream", name="stderr", text="W")])),
        ("uncompared", tagged(STORY, "nbval-ignore-output")),
        ("uncompared", uncompare("# NBVAL_IGNORE_OUTPUT\nf()")),
        ("uncompared", uncompare("# NBVAL_SKIP\nf()  # times differ")),
        ("without_words", lambda book: book.cells[PLOT].metadata.pop("mystnb")),
        ("without_words", lambda book: book.cells[PLOT].metadata.mystnb.image.update(alt=" ")),
        ("without_words", html('<svg role="img" aria-label="">')),
        ("without_words", html('<svg aria-label="a dot">')),
        ("without_words", html('<img src="a.png">')),
        ("without_words", source(3, "![](dot.svg)")),
        ("too_wide", source(STORY, "x = 1  # " + "w" * 80)),
        ("too_wide", source(PLOT, "x = 1  # " + "w" * 80)),
        ("too_long", text("word " * 3500)),
        ("too_long", source(STORY, "f()\n" * 450)),
        ("too_long", lambda book: book.cells[PLOT].outputs[0].data.update({"text/plain": "x" * 500_000})),
        ("long_cells", lambda book: [book.cells[place].update(source="f()\n" * 7) for place in (STORY, DEFINITION)]),
        ("long_cells", source(STORY, "f()\n" * 21)),
        ("drawing_in_sight", source(STORY, "pictures.tokens(['a'], alt='a')")),
        ("drawing_in_sight", source(STORY, "alt = 'a'\nf(alt)")),
        ("drawing_in_sight", source(STORY, "def draw(x, alt): ...")),
        ("drawing_in_sight", source(-1, "alt = 'in a solution'")),
        ("drawing_in_sight", lambda book: book.cells[PLOT].metadata.pop("tags")),
        ("drawing_in_sight", lambda book: book.cells[2].metadata.pop("tags")),
        ("bare_booleans", prints("True\n")),
        ("bare_booleans", prints("largest error below 0.02: True\n")),
        ("bare_booleans", prints("tensor([True, True])")),
        ("bare_booleans", prints("right False", place=-1)),
        ("bare_booleans", html("<table><tr><td>True</td></tr></table>")),
        (
            "bare_booleans",
            lambda book: book.cells[STORY].update(
                outputs=[new_output("execute_result", {"text/plain": "(True, 3)"}, execution_count=1)]
            ),
        ),
        ("silence", lambda book: [book.cells[place].update(outputs=[]) for place in (STORY, CHECK)]),
        ("silence", insert(DEFINITION, *SILENT, *LOUD)),
        ("silence", insert(DEFINITION, *SILENT[:2], code("def f(): ..."), *SILENT[2:], *LOUD)),
        ("silence", insert(DEFINITION, *STEPS, *LOUD)),
        ("machinery", source(STORY, "f()  # noqa: E501")),
        ("machinery", source(STORY, "f()  # fmt: skip")),
        ("machinery", source(STORY, "os.environ['KINETO_LOG_LEVEL'] = '5'")),
        ("machinery", source(STORY, "torch.set_num_threads(1)")),
        ("machinery", source(STORY, "# NBVAL_IGNORE_OUTPUT\nf()")),
        ("machinery", source(STORY, "f()  # not compared: it varies")),
        ("raw_markup", text("As [B20] says: {cite}`B20`.")),
        ("raw_markup", text("```{note}\nA note.\n```")),
        ("raw_markup", text(":::{note}\nA note.\n:::")),
        ("raw_markup", text("(the-label)=\n## Title")),
        ("raw_markup", text("Token\n: a piece of text")),
        ("number_begins_line", text("The gain of the residual stream is at most\n1. That is why it stays.")),
        ("number_begins_line", text("> **A box.** The year was\n> 2020. Then more.")),
        ("opening", source(0, "# Title\n\nBuilds a thing. And another.")),
        ("opening", source(0, "# Title\n\nBuilds a thing.\n\nMore.")),
        ("opening", source(0, "# Title\n\n" + "long " * 22 + ".")),
        ("opening", source(0, "# Title")),
        ("opening", source(0, "Builds a thing.")),
        ("opening", source(0, "# Title\n\nBuilds a thing")),
        ("without_map", remove(2)),
        ("without_map", lambda book: book.cells[2].metadata.pop("tags")),
        ("without_map", insert(2, *LOUD[:3])),
        ("exercises_last", insert(100, new_markdown_cell("## Further reading"))),
        ("exercises_last", insert(100, new_markdown_cell("### Further reading"))),
        ("exercises_last", source(EXERCISES, "Exercises")),
        ("exercises_last", insert(3, *exercise(1))),
        ("exercises_last", remove(-3, -2, -1)),
        ("unsolved", remove(-1)),
        ("unsolved", remove(-2)),
        ("unsolved", source(-1, "")),
        ("unsolved", lambda book: book.cells[-1].update(execution_count=None)),
        ("unsolved", source(-2, "#### Solution\n\n### Another heading")),
        ("unsolved", source(-2, "##### Solution")),
        ("unsolved", lambda book: book.cells[-2].metadata.clear()),
        ("unsolved", source(-3, "### Exercise 4: Add\n\nAdd.")),
        ("unsolved", source(-3, "### Exercise 5\n\nAdd.")),
        ("unsolved", source(-3, "### Exercise 5: Add")),
        ("unsolved", source(-3, "Now:\n\n### Exercise 5: Add\n\nAdd.")),
        ("workshop", source(WORKSHOP, "## More\n\nSkip it.")),
        ("workshop", source(WORKSHOP, "## The workshop\n\nWhat a library needs.\n\nSkip it.")),
        ("workshop", insert(100, new_markdown_cell("## The workshop\n\nSkip it."))),
        ("workshop_in_story", source(DEFINITION, "def f(x):\n    raise A\n    raise B")),
        ("workshop_in_story", source(STORY, "with torch.autocast('cpu'):\n    f()")),
        ("workshop_in_story", source(STORY, "torch.ones(3, device=device)")),
        ("workshop_in_story", source(STORY, "model.to(device)")),
    ],
)
def test_a_rule_finds_what_breaks_it(rule, action):
    assert rule in failing(change(action))


@pytest.mark.parametrize(
    "action",
    [
        prints("tensor([[ True, False],\n        [ True,  True]])\n"),
        prints("tensor([[[True]], [[False]]], device='cpu')\n"),
        prints("GPTConfig(n_ctx=16, attention=('dense', 'banded'), scaled=True)\n"),
        prints("Trueness is no verdict\n"),
        source(STORY, "x = torch.arange(3, device=self.wpe.weight.device)"),
        source(STORY, "with torch.device('meta'):\n    f()"),
        source(CHECK, "torch.ones(3, device=device)"),
        source(-1, "f()\n" * 500),
        source(-2, "#### Solution\n\n" + "word " * 4000),
        source(PLOT, "f()\n" * 500),
        text("1. one\n2. two\n   goes on\n3. three"),
        text("- one\n- two\n\n2,048 tokens and\n175 billion numbers, 3.5 each"),
        text("| a | b |\n|---|---|\n| 1. | 2. |"),
        insert(DEFINITION, *SILENT[:2], *LOUD),
        insert(DEFINITION, *SILENT[:2], drawn("f()", {"text/plain": "a"}), *SILENT[:2], *LOUD),
        insert(DEFINITION, *[code("import a") for _ in range(3)], *LOUD),
        insert(PLOT, code("x = 1")),
        html('<svg role="group" aria-label="a map"></svg>'),
    ],
)
def test_what_a_rule_allows(action):
    book = change(action)
    assert failing(book) <= {"not_normal", "long_cells"}  # cell ids of what was inserted


def test_an_announced_error_is_allowed():
    book = change(error)
    book.cells[STORY].metadata["tags"] = ["raises-exception"]
    assert form.stored_errors(book) == []


def test_rules_follow_the_kind_of_chapter():
    assert form.drawing_in_sight not in form.rules("a_pictures") + form.rules("b_scenes")
    assert form.drawing_in_sight in form.rules("c_texts") and form.opening in form.rules("c_texts")
    assert form.opening not in form.rules("index") and form.too_long in form.rules("index")
    assert form.workshop not in form.rules("01_one_parameter") and form.without_map in form.rules("01_one_parameter")
    assert form.without_map not in form.rules("00_overview") and form.exercises_last in form.rules("00_overview")


# --- the table ---


def test_a_chapter_is_measured():
    book = good()
    assert measure.parts(book)[3:15] == ["story"] * 5 + ["workshop"] * 2 + ["exercises"] * 2 + ["solution"] * 2 + [
        "exercises"
    ]
    assert measure.lengths(book) == [2, 4, 1]
    numbers = dict(zip(measure.HEADS, measure.row(book)))
    assert numbers["lines"] == "7" and numbers["median"] == "2" and numbers["p90"] == "4"
    assert numbers["pics/code"] == "0.67" and numbers["silent"] == "0%" and numbers["exercises"] == "5"
    assert numbers["widest"] == str(len("from gpt3lib import scenes")) or int(numbers["widest"]) < 40
    assert measure.words(change(text("four words and more — [x](y)."))) == measure.words(book) + 5


def test_the_size_is_that_of_the_file():
    name = ORDER[0]
    assert measure.size(notebook(name)) == (ROOT / "book" / f"{name}.ipynb").stat().st_size


def test_the_command_prints_a_row_and_what_is_broken(tmp_path):
    command = [sys.executable, str(ROOT / "tools" / "form.py")]
    done = subprocess.run([*command, "no_chapter"], capture_output=True, text=True)
    assert done.returncode == 1 and "no such notebook" in done.stdout
    name = ORDER[0]
    done = subprocess.run([*command, name], capture_output=True, text=True)
    assert done.returncode == bool(form.chapter_faults(name, ORDER))
    lines = done.stdout.splitlines()
    assert lines[1].split()[0] == name and lines[2].split()[:3] == ["limits", "3,500", "450"]


# --- who may import whom ---


@pytest.mark.parametrize(
    "source, late",
    [
        ("from gpt3lib.embeddings import Embedding", False),
        ("from gpt3lib import pictures, texts\nfrom gpt3lib.scenes import whole_model", False),
        ("from gpt3lib import Tokenizer", False),
        ("import gpt3lib\ngpt3lib.Tokenizer", False),
        ("from gpt3lib.attention import Attention", True),
        ("from gpt3lib import GPT", True),
        ("import gpt3lib\ngpt3lib.GPT", True),
        ("import gpt3lib.generation as g", True),
        ("importlib.import_module('gpt3lib.generation')", True),
        ("from . import model", True),
        ("from .model import GPT", True),
        ("if True:\n    %time from gpt3lib import GPT", False),  # inside a magic: not seen, not an error
        ("def f():\n    from gpt3lib import model", True),
    ],
)
def test_an_import_of_a_later_chapter_is_found(source, late):
    order = ["02_tokenization", "03_embeddings", "04_attention", "06_decoder", "08_generation"]
    book = new_notebook(cells=[new_code_cell(source)])
    assert bool(form_package.forward_imports(book, "04_attention", order)) == late
    assert bool(form_package.module_imports("embeddings", source.replace("embeddings", "texts"), order)) == late


@pytest.mark.parametrize("tags", [[], ["export"]])
def test_appendices_import_appendices_only(tags):
    for module, wrong in (("attention", True), ("texts", False)):
        book = new_notebook(cells=[new_code_cell(f"from gpt3lib import {module}", metadata={"tags": tags})])
        assert bool(form_package.forward_imports(book, "a_pictures", ["04_attention", "a_pictures"])) == wrong
        assert not form_package.forward_imports(book, "index", ["index"])


@pytest.mark.parametrize(
    "source, wrong",
    [
        ("from gpt3lib.model import GPT\nGPT.read = read", True),
        ("from gpt3lib.model import GPT as G\nG.read, x = read, 1", True),
        ("from gpt3lib.model import GPT\nsetattr(GPT, 'read', read)", True),
        ("from gpt3lib import model\ndef f():\n    model.GPT.read = 1", True),
        ("import gpt3lib.model\ngpt3lib.model.LIMIT += 1", True),
        ("import gpt3lib.model as m\nm.LIMIT = 1", True),
        ("from gpt3lib.model import READERS\nREADERS['opt'] = read", False),
        ("from gpt3lib.model import GPT\nmodel = GPT()\nmodel.training = False", False),
        ("class A:\n    x = 1\nA.x = 2", False),
    ],
)
def test_a_module_that_changes_another_is_found(source, wrong):
    assert bool(form_package.replacements(source)) == wrong


# --- sizes and times ---


def test_wide_lines_of_a_module_are_found():
    head = f'"""{"d" * 110}"""\n\n{export.origin("05_sparse_attention.ipynb")}'
    assert form_package.wide_lines(head + "x = 1\n") == []
    assert form_package.wide_lines(head + "w" * 89) == ["line 4: 89 characters"]


def test_large_modules_and_packages_are_found():
    assert form_package.large_package({"a": 500, "b": 500}) == []
    assert form_package.large_package({"a": 501})
    assert form_package.large_package({f"{i}": 500 for i in range(29)})


def test_slow_chapters_and_books_are_found():
    assert form_package.slow({f"{i}": 90 for i in range(13)}) == []
    assert form_package.slow({"a": 91})
    assert form_package.slow({f"{i}": 90 for i in range(14)})
