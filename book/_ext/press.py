"""What the site needs beyond Jupyter Book.

A chapter is plain Markdown, so that it reads well in JupyterLab, Colab and on GitHub.
Here its page gets more: a citation becomes a link, a quotation with a title a box, an
exercise a box with a folded solution, a link inside a drawing leads to a page. A form
that is nearly right is a warning, and warnings are errors.
"""

import posixpath
import re
import subprocess
import tomllib
from pathlib import Path

from docutils import nodes
from public_names import page_of_names
from pybtex.plugin import register_plugin
from pybtex.style.formatting.plain import Style as PlainStyle
from pybtex.style.labels import BaseLabelStyle
from sphinx import addnodes
from sphinx.transforms import SphinxTransform
from sphinx.util import logging
from sphinxcontrib.bibtex.roles import CiteRole

log = logging.getLogger(__name__)
CITATION = re.compile(r"\[([A-Z]{1,3}\d\d)\]")
NOT_TEXT = (
    nodes.literal,
    nodes.math,
    nodes.reference,
    addnodes.pending_xref,
    nodes.FixedTextElement,
    nodes.raw,
)
EXERCISE = re.compile(r"Exercise \d+: \S")
# what the theme's pages get for readers who hear them or use no mouse: before, after
MENDED = {
    # a name begins with the words that are seen
    r'(<button class="btn search-button-field[^>]*?) aria-label="[^"]*"': r"\1",
    r'<summary aria-label="[^"]*">': "<summary>",
    # everything stands in a landmark, and every dialog has a name
    r'(<div id="pst-primary-sidebar")': r'\1 role="navigation" aria-label="Book"',
    r'(<dialog id="pst-primary-sidebar-modal")': r'\1 aria-label="Book"',
    r'(<dialog id="pst-secondary-sidebar-modal")': r'\1 aria-label="Contents"',
    r'(<dialog id="pst-search-dialog")': r'\1 aria-label="Search"',
    # an entry of a list is a list's entry
    'role="doc-biblioentry"': 'role="listitem"',
    # the icon script weighs 1.5 MB; the theme's style sheet draws the icons
    r"\s*<(script|link)\b[^>]*fontawesome\.js[^>]*>(</script>)?": "",
}
NOTEBOOK_LINK = re.compile(r'(<a\b[^>]*?\bhref=")([\w./-]+)\.ipynb\b')


class KeyLabels(BaseLabelStyle):
    """The label of a source is its key, such as [B20]."""

    def format_labels(self, sorted_entries):
        """One label per entry."""
        return [entry.key for entry in sorted_entries]


class KeyStyle(PlainStyle):
    """Plain formatting with keys as labels."""

    default_label_style = KeyLabels


class Citations(SphinxTransform):
    """`[B20]` in a text becomes a link to the source.

    A key that is not in references.bib is a warning of sphinxcontrib-bibtex.
    """

    default_priority = 400

    def apply(self):
        """Go through the texts that are not code, formulas, links or outputs."""
        for text in list(self.document.findall(nodes.Text)):
            if CITATION.search(text) and not inside(text, NOT_TEXT):
                new = [nodes.Text(part) for part in CITATION.split(text)]
                for i in range(1, len(new), 2):  # words, key, words, key, …, words
                    new[i] = self.link(new[i], text)
                text.parent.replace(text, new)

    def link(self, key: str, text: nodes.Text) -> nodes.Node:
        """What the role {cite} makes of a key."""
        target = {
            "refdomain": "cite",
            "reftype": "p",
            "reftarget": key,
            "refdoc": self.env.docname,
            "refwarn": True,
        }
        link = addnodes.pending_xref("", nodes.inline("", f"[{key}]"), **target)
        link.source, link.line = self.document["source"], text.parent.line
        role = CiteRole()
        role.target = key
        return role.result_nodes(self.document, self.env, link, True)[0][0]


class Boxes(SphinxTransform):
    """A quotation with a title, `> **Title.** Text`, becomes a box."""

    default_priority = 410

    def apply(self):
        """Go through the quotations."""
        for quote in list(self.document.findall(nodes.block_quote)):
            first = quote[0]
            words = [
                node for node in first if node.astext()
            ]  # the parser leaves empty texts
            strong = words[0] if isinstance(words[0], nodes.strong) else None
            if strong and strong.astext().endswith("."):
                title = nodes.title("", "", *strong.children)
                title[-1] = nodes.Text(title[-1].astext().removesuffix("."))
                if isinstance(words[1] if words[1:] else None, nodes.Text):
                    words[1] = nodes.Text(words[1].lstrip())
                text = [nodes.paragraph("", "", *words[1:])] if words[1:] else []
                box = nodes.admonition("", title, *text, *quote[1:], classes=["note"])
                quote.replace_self(box)
            elif strong or first.astext().startswith("**"):
                message = "a box begins with a title: > **Title.** Text"
                log.warning(message, location=quote)


class Exercises(SphinxTransform):
    """`### Exercise 3: Title` becomes a box, `#### Solution` a folded one.

    A section holds what stands below its heading up to the next: text, code, outputs.
    """

    default_priority = 420

    def apply(self):
        """Go through the sections."""
        for section in list(self.document.findall(nodes.section)):
            if named(section, "Exercise "):
                self.fold(section)
            elif named(section, "Solution") and not named(section.parent, "Exercise "):
                log.warning("a solution stands below no exercise", location=section)

    def fold(self, section: nodes.section) -> None:
        """Make two boxes of an exercise."""
        heading = section[0].astext()
        below = [child for child in section if isinstance(child, nodes.section)]
        if not EXERCISE.match(heading):
            message = f"an exercise is named '### Exercise 3: Title', not {heading!r}"
            log.warning(message, location=section)
        if [solution[0].astext() for solution in below] != ["Solution"]:
            message = f"{heading!r} has not one heading '#### Solution' below it"
            log.warning(message, location=section)
        for solution in below:
            section.remove(solution)
        solutions = [box(solution, ["solution", "dropdown"]) for solution in below]
        section.replace_self([box(section, ["exercise"]), *solutions])


class DrawnLinks(SphinxTransform):
    """`<a href="04_attention.ipynb">` inside a drawing leads to the chapter's page.

    In an SVG it is `xlink:href`: JupyterLab replaces an SVG link's `href` by an error.
    """

    default_priority = 430

    def apply(self):
        """Go through the outputs that are HTML or SVG."""
        for raw in self.document.findall(nodes.raw):
            html = raw.astext()
            for _, name in NOTEBOOK_LINK.findall(html):
                page = posixpath.join(posixpath.dirname(self.env.docname), name)
                if posixpath.normpath(page) not in self.env.found_docs:
                    message = f"a drawing links {name}.ipynb, which is no chapter"
                    log.warning(message, location=raw)
            if NOTEBOOK_LINK.search(html):
                raw[0] = nodes.Text(NOTEBOOK_LINK.sub(r"\1\2.html", html))


def inside(node: nodes.Node, kinds: tuple) -> bool:
    """Whether a node stands inside one of these kinds."""
    while node := node.parent:
        if isinstance(node, kinds):
            return True
    return False


def named(section: nodes.Element, beginning: str) -> bool:
    """Whether the heading of a section begins with these words."""
    return section[0].astext().startswith(beginning)


def box(section: nodes.section, classes: list[str]) -> nodes.admonition:
    """A section as a box: its heading is the title, its addresses stay."""
    return nodes.admonition("", *section.children, ids=section["ids"], classes=classes)


def complete(app, docname, source) -> None:
    """Two pages are more than their files: the sources and the library's names."""
    if docname == "book/references":
        source[0] += "\n```{bibliography}\n```\n"
    if docname == "book/names":
        source[0] += "\n" + page_of_names(Path(app.srcdir) / "gpt3lib")


def version_line(root: Path) -> str:
    """The version of the library and, in a git checkout, the commit of the site."""
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=root,
        capture_output=True,
        text=True,
    )
    commit = f" · {git.stdout.strip()}" if git.returncode == 0 else ""
    name = f"{project['name']} {project['version']}{commit}"
    return f"<p>{name} · code MIT, words and pictures CC BY 4.0</p>"


def leave_out_live_code(app) -> None:
    """Disconnect sphinx-thebe: it needs other hosts, and the book does not use it."""
    for listeners in app.events.listeners.values():
        listeners[:] = [
            entry
            for entry in listeners
            if not entry.handler.__module__.startswith("sphinx_thebe")
        ]
    app.registry.css_files[:] = [
        entry for entry in app.registry.css_files if entry[0] != "sphinx-thebe.css"
    ]


def leave_out_unused_math(app, pagename, templatename, context, doctree) -> None:
    """Load MathJax only where a formula stands."""
    if not app.env.get_domain("math").data["has_equations"].get(pagename):
        context["script_files"] = [
            script
            for script in context["script_files"]
            if "mathjax/" not in str(getattr(script, "filename", script))
            and "window.MathJax"
            not in getattr(script, "attributes", {}).get("body", "")
        ]


def mend_pages(app, exception) -> None:
    """Change what MENDED names on every page of the theme; the icon script goes."""
    for path in Path(app.outdir).rglob("*.html"):
        page = path.read_text(encoding="utf-8")
        for before, after in MENDED.items():
            page = re.sub(before, after, page)
        path.write_text(page, encoding="utf-8")
    static = Path(app.outdir) / "_static"
    for path in (static / "scripts").glob("fontawesome.js*"):
        path.unlink()
    button = static / "togglebutton.js"  # its words "Show" and "Hide" are in its name
    if button.is_file():
        words = button.read_text(encoding="utf-8")
        words = words.replace("Toggle hidden content", "Show or Hide the solution")
        button.write_text(words, encoding="utf-8")


def print_version(app, config) -> None:
    """Put the version line below every page."""
    config.html_theme_options["extra_footer"] = version_line(Path(app.srcdir))


def setup(app):
    """Register with Sphinx."""
    register_plugin("pybtex.style.formatting", "keys", KeyStyle)
    leave_out_live_code(app)
    for transform in (Citations, Boxes, Exercises, DrawnLinks):
        app.add_transform(transform)
    app.connect("source-read", complete)
    app.connect("config-inited", print_version)
    app.connect("build-finished", mend_pages)
    app.connect("html-page-context", leave_out_unused_math, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
