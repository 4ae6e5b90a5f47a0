"""The press: what the page makes of a chapter's plain Markdown, and what it refuses."""

import json
import re
import sys
from pathlib import Path

import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from sphinx.application import Sphinx
from sphinx.util.console import strip_colors
from sphinx.util.docutils import docutils_namespace

import export

ROOT = Path(__file__).resolve().parent.parent
BOOK = ROOT / "book"
sys.path.insert(0, str(BOOK / "_ext"))

from public_names import module_section, page_of_names  # noqa: E402

SOURCES = "@misc{B20, title={Few}, year={2020}}\n@misc{KB15, title={Adam}, year={2015}}\n"
PLAIN = "WARNING: unsupported theme option 'extra_footer' given\n"  # the plain theme has no such line
EXERCISE = ["## Exercises", "### Exercise 1: Count\n\nHow many?", "#### Solution\n\nThree:"]


def press(folder, *cells):
    """A chapter of these cells through Sphinx with the press: the page's HTML and the warnings."""
    book = folder / "book"
    book.mkdir()
    (folder / "pyproject.toml").write_text("[project]\nname = 'n'\nversion = '1'\n")
    (folder / "conf.py").write_text(
        "extensions = ['myst_nb', 'sphinxcontrib.bibtex', 'press']\n"
        "bibtex_bibfiles = ['r.bib']\nbibtex_reference_style = 'label'\nbibtex_default_style = 'keys'\n"
        "nb_execution_mode = 'off'\nmyst_enable_extensions = ['dollarmath']\nmyst_heading_anchors = 3\n"
        "mathjax_path = 'm.js'\nhtml_theme = 'basic'\nroot_doc = 'book/04_it'\nnb_mime_priority_overrides = []\n"
    )
    (folder / "r.bib").write_text(SOURCES)
    (book / "references.md").write_text("---\norphan: true\n---\n# References\n\nThe sources.\n")
    cells = [new_markdown_cell(cell) if isinstance(cell, str) else cell for cell in cells]
    notebook = new_notebook(cells=[new_markdown_cell("# It\n\nA chapter."), *cells])
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "p", "language": "python"}}
    (book / "04_it.ipynb").write_text(json.dumps(notebook))
    with docutils_namespace(), open(folder / "log", "w+") as log:
        app = Sphinx(folder, folder, folder / "out", folder / "trees", "html", status=None, warning=log, freshenv=True)
        app.build()
        log.seek(0)
        warnings = strip_colors(log.read()).replace(PLAIN, "")
    return (folder / "out" / "book" / "04_it.html").read_text(), warnings


def drawing(html):
    """A code cell that drew some HTML."""
    output = new_output("execute_result", {"text/html": html, "text/plain": "it"}, execution_count=1)
    return new_code_cell("draw()", execution_count=1, outputs=[output])


# --- citations ---


def test_a_key_becomes_a_link_to_its_source(tmp_path):
    page, warnings = press(tmp_path, "Said in [B20] §2.1, and [KB15], [B20]. *So [B20]*\n\n- a list [B20]")
    assert warnings == ""
    assert re.findall(
        r'<a class="reference internal" href="references.html#\S+" title="[^"]*">\[?([A-Z]+\d\d)', page
    ) == [
        "B20",
        "KB15",
        "B20",
        "B20",
        "B20",
    ]
    assert "</span> §2.1" in page or "</a>] §2.1" in page or "</a> §2.1" in page
    assert "Few" in (tmp_path / "out" / "book" / "references.html").read_text()


@pytest.mark.parametrize(
    "text",
    [
        "`a[B20]`",
        "```python\na[B20]\n```",
        "$a[B20]$",
        "$$\na[B20]\n$$",
        "[see [B20] there](https://example.org)",
        "a[0], [b20], [BX], [B2020], [1]",
    ],
)
def test_what_only_looks_like_a_key_stays(tmp_path, text):
    page, warnings = press(tmp_path, text)
    assert "references.html#" not in page
    assert warnings == ""


def test_a_key_that_no_source_has_is_an_error(tmp_path):
    assert 'could not find bibtex key "Q99"' in press(tmp_path, "As [Q99] says.")[1]


def test_what_a_cell_prints_is_no_citation(tmp_path):
    printed = new_code_cell(
        "x[B20]", execution_count=1, outputs=[new_output("stream", name="stdout", text="[B20] [Q99]\n")]
    )
    page, warnings = press(tmp_path, printed)
    assert "[B20] [Q99]" in page and warnings == ""


# --- for readers who hear a page ---


def test_sources_are_the_entries_of_a_list_and_folded_code_is_named_by_its_words(tmp_path):
    folded = new_code_cell("x = 1", execution_count=1, metadata={"tags": ["hide-input"]})
    page, warnings = press(tmp_path, "Said in [B20] and [KB15], and [B20].", folded)
    sources = (tmp_path / "out" / "book" / "references.html").read_text()
    assert warnings == "" and sources.count('role="list"') == 1 and sources.count('role="listitem"') == 2
    assert "doc-biblioentry" not in sources
    assert re.search(r'<summary>\s*<p class="collapsed admonition-title">Show', page)


# --- boxes ---


def test_a_quotation_with_a_title_becomes_a_box(tmp_path):
    page, warnings = press(
        tmp_path, "> **What the paper does not say [B20].** Nothing of *this*,\n> nor\nthat.\n>\n> - more"
    )
    box = re.search(r'<div class="note admonition">\s*(.*?)</div>', page, re.DOTALL)[1]
    assert warnings == ""
    assert (
        re.sub(r"<[^>]*>", "", box).split()
        == "What the paper does not say [B20] Nothing of this, nor that. more".split()
    )
    assert box.startswith('<p class="admonition-title">What') and "<li>" in box
    assert "blockquote" not in page


def test_a_box_may_have_its_text_in_the_next_paragraph(tmp_path):
    page, warnings = press(tmp_path, "> **Where we deviate.**\n>\n> Here.")
    assert warnings == "" and re.search(r'admonition-title">Where we deviate</p>\s*<p>Here.</p>', page)


def test_a_plain_quotation_stays_one(tmp_path):
    page, warnings = press(tmp_path, "> Let there be **light.**")
    assert warnings == "" and "<blockquote>" in page and "admonition" not in page


@pytest.mark.parametrize("text", ["> **Title** without a stop", "> **Title\n> never closed."])
def test_a_box_without_a_proper_title_is_an_error(tmp_path, text):
    assert "a box begins with a title" in press(tmp_path, text)[1]


# --- exercises ---


def test_an_exercise_becomes_a_box_and_its_solution_a_folded_one(tmp_path):
    cells = [*EXERCISE, new_code_cell("1 + 2", execution_count=7), "Said.", "### Exercise 2: More\n\nDo."]
    page, warnings = press(tmp_path, *cells, "#### Solution", drawing("<b>drawn</b>"), "### After\n\nThe end.")
    boxes = re.split(r'(?=<div class="(?:exercise|solution)[^"]*admonition")', page)[1:]
    assert warnings == ""
    assert [re.match(r'<div class="([^"]*)"', box)[1] for box in boxes] == [
        "exercise admonition",
        "solution dropdown admonition",
    ] * 2
    assert 'admonition-title">Exercise 1: Count</p>' in boxes[0] and "How many?" in boxes[0]
    assert 'admonition-title">Solution</p>' in boxes[1]
    assert all(words in boxes[1] for words in ("Three:", "+", "Said.")) and "More" not in boxes[1]
    assert "<b>drawn</b>" in boxes[3]
    assert re.search(r"</div>\s*</div>\s*<section id=\"after\"", page)  # what comes next is outside


def test_an_exercise_can_be_linked(tmp_path):
    page, warnings = press(tmp_path, "[that](#exercise-1-count)", *EXERCISE)
    assert warnings == "" and 'href="#exercise-1-count"' in page
    assert re.search(r'<div class="exercise admonition" id="exercise-1-count">', page)


@pytest.mark.parametrize(
    "cells, message",
    [
        (["## Exercises", "#### Solution\n\nThree."], "a solution stands below no exercise"),
        (["## Exercises", "### Exercise 1: Count", "### Next"], "has not one heading '#### Solution'"),
        ([*EXERCISE, "#### Solution"], "has not one heading '#### Solution'"),
        ([*EXERCISE, "#### Another way"], "has not one heading '#### Solution'"),
        (["## Exercises", "### Exercise one\n\nDo.", "#### Solution"], "an exercise is named"),
        (["## Exercises", "### Exercise 1 Count\n\nDo.", "#### Solution"], "an exercise is named"),
    ],
)
def test_an_exercise_of_another_form_is_an_error(tmp_path, cells, message):
    assert message in press(tmp_path, *cells)[1]


# --- links in drawings ---


def test_a_link_in_a_drawing_leads_to_the_page(tmp_path):
    svg = '<svg><a class="part" xlink:href="04_it.ipynb"><text>it</text></a></svg><a href="04_it.ipynb#top">t</a>'
    page, warnings = press(tmp_path, drawing(svg))
    assert warnings == ""
    assert '<a class="part" xlink:href="04_it.html">' in page and '<a href="04_it.html#top">' in page


def test_a_link_in_a_drawing_to_no_chapter_is_an_error(tmp_path):
    assert "a drawing links 05_gone.ipynb" in press(tmp_path, drawing('<a href="05_gone.ipynb">gone</a>'))[1]


# --- the list of public names ---

MODULE = '''"""What it is for."""

# Made from book/04_it.ipynb by tools/export.py; edit the chapter.
from dataclasses import dataclass

SIZE = 3


def add(
    a: int,
    b: int = SIZE,
) -> int:
    """The sum."""
    return secret(a) + b


def _hidden():
    """Not shown."""


def bare(x): return x


@dataclass(frozen=True)
class Thing:
    """A thing.

    Two lines.
    """

    width: int  # of it

    def __post_init__(self):
        """Not shown either."""

    def turn(self) -> "Thing":
        """Turned."""
        return self
'''


def test_a_module_is_listed_as_its_source_has_it():
    section = module_section("it", MODULE)
    assert section.startswith(
        "## gpt3lib.it\n\nWhat it is for. Made in [04_it](04_it.ipynb).\n\n### add\n\n```python\ndef add("
    )
    assert re.findall(r"^### (\w+)", section, re.MULTILINE) == ["add", "bare", "Thing"]
    assert '    b: int = SIZE,\n) -> int:\n    """The sum."""\n```' in section
    assert "def bare(x): return x" in section
    assert (
        '@dataclass(frozen=True)\nclass Thing:\n    """A thing.\n\n    Two lines.\n    """\n\n    width: int  # of it\n'
        in section
    )
    assert '    def turn(self) -> "Thing":\n        """Turned."""\n```' in section
    assert "secret" not in section and "hidden" not in section and "either" not in section


def test_every_public_name_of_the_library_is_listed():
    page = page_of_names(ROOT / "gpt3lib")
    listed = set(re.findall(r"^### (\w+)$", page, re.MULTILINE))
    names = {name for public in export.PUBLIC.values() for name in public}
    assert names <= listed
    assert all(f"| `gpt3lib.{name}` | [" in page for name in names)
    assert all(f"## gpt3lib.{module}\n" in page for module in export.CHAPTERS.values())


# --- the glossary ---

GLOSSARY = (BOOK / "glossary.md").read_text(encoding="utf-8")
TERMS = dict(re.findall(r"^### (.+)\n\n((?:[^#\n].*\n)+)", GLOSSARY, re.MULTILINE))


def slug(heading):
    """The address of a heading, as myst makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_the_glossary_is_in_the_order_of_the_alphabet_and_has_each_term_once():
    headings = re.findall(r"^### (.+)$", GLOSSARY, re.MULTILINE)
    assert len(headings) >= 70 and headings == list(TERMS)
    assert [heading.lower() for heading in headings] == sorted({heading.lower() for heading in headings})
    letter = ""
    for level, heading in re.findall(r"^(##+) (.+)$", GLOSSARY, re.MULTILINE):
        letter = heading if level == "##" else letter
        assert heading[0].upper() == letter


def test_a_term_is_short_and_names_the_chapter_that_explains_it():
    wrong = []
    for term, words in TERMS.items():
        match = re.search(r"Explained in \[([^\]]+)\]\((\w+)\.ipynb\)\.$", " ".join(words.split()))
        path = BOOK / f"{match[2]}.ipynb" if match else BOOK
        if not path.is_file() or f'"# {match[1]}' not in path.read_text(encoding="utf-8") or len(words.split()) > 60:
            wrong.append(term)
    assert wrong == []


def test_every_link_to_a_term_hits_one():
    addresses = {slug(term) for term in TERMS}
    linked = set(re.findall(r"\]\(#([^)]+)\)", GLOSSARY))
    for path in BOOK.glob("*.ipynb"):
        linked |= set(re.findall(r"glossary\.md#([^)\s\"\\]+)", path.read_text(encoding="utf-8")))
    assert linked <= addresses, linked - addresses
