"""The form of a chapter: one function per rule, each returns the list of what is wrong (empty when nothing is).

python tools/form.py                 measure every chapter, then say which rules are broken
python tools/form.py 04_attention …  these chapters only

Exit 1 when a rule is broken. tests/test_book_form.py applies the rules too, and shows each of them a bad notebook.
"""

import ast
import copy
import json
import re
import statistics
import sys
from pathlib import Path

import nbformat

import execute
import export
from form_package import forward_imports, package_faults, slow
from measure import (
    WIDTH,
    code_cells,
    exercises,
    headings,
    is_picture,
    lengths,
    parts,
    prose,
    row,
    shown,
    silent_cells,
    size,
    table,
    tags,
    tree,
    visible_cells,
    words,
)

WORDS, LINES = 3500, 450  # of a chapter, solutions aside
LONGEST_MEDIAN, LONG_CELL, LONG_SHARE = 6, 20, 0.10  # lines of a cell
SILENT_SHARE, SILENT_RUN, QUIET_RUN = 0.15, 2, 4  # the first two without definitions
UNCOMPARED_SHARE = 0.10
MIN_EXERCISES = 5
BYTES = 500_000

DRAWING = {"a_pictures", "b_scenes"}  # where drawing is the subject
OVERVIEW = "00_overview"  # begins with text and ends with the map
UNCOMPARED = re.compile(r"#\s*NBVAL_(IGNORE_OUTPUT|SKIP)")
EXERCISE = re.compile(r"### Exercise (\d+): \S.*\n\n\s*\S")
INLINE_CODE = re.compile(r"(`+)(?!`).+?(?<!`)\1(?!`)", re.DOTALL)
RAW = {
    "a role": re.compile(r"\{[a-z][\w:+.-]*\}`"),
    "a directive": re.compile(r"^\s*(```+|~~~+)\s*\{", re.MULTILINE),
    "a colon fence": re.compile(r"^\s*:{3,}", re.MULTILINE),
    "a label": re.compile(r"^\([\w-]+\)=\s*$", re.MULTILINE),
    "a definition list": re.compile(r"^:\s+\S", re.MULTILINE),
}
MACHINERY = re.compile(r"noqa|fmt:|KINETO|os\.environ\[|set_num_threads|nbval|not compared", re.IGNORECASE)
BOOLEAN = re.compile(r"\b(True|False)\b")
NOT_VERDICTS = re.compile(r"tensor\(\[\[[\s\S]*?\]\][^()]*\)|(?<=\w)=(?:True|False)\b")  # masks, fields of a config
ENGINEERING = re.compile(r"autocast|\.cuda\(|\.to\(\"?(?:device|cuda)|device=(?!\w+(?:\.\w+)*\.device\b)")
PLACES = re.compile("/(work/(main|shared)|tmp/w|root|home/[a-z]+|Users/[A-Za-z]+)/")


# --- stored as a run leaves it ---


def uncounted(notebook) -> list[str]:
    """Cells without an execution count: nbval would compare nothing."""
    cells = [(place, cell) for place, cell in enumerate(notebook.cells) if cell.cell_type == "code"]
    return [f"cell {place}: not executed" for place, cell in cells if cell.source.strip() and not cell.execution_count]


def not_normal(notebook) -> list[str]:
    """What `make execute` would store differently, outputs aside."""
    normal = copy.deepcopy(notebook)
    execute.normal_form(normal)
    if normal.metadata != notebook.metadata:
        return ["the notebook's metadata are not in normal form"]
    if len(normal.cells) != len(notebook.cells):
        return ["the setup cell is missing or superfluous"]
    pairs = enumerate(zip(notebook.cells, normal.cells))
    return [f"cell {place}: not in normal form" for place, (old, new) in pairs if old != new]


def stored_errors(notebook) -> list[str]:
    """Cells with a stored error that is not announced by the tag raises-exception."""
    return [
        f"cell {place}: stored error {output.ename}"
        for place, cell in code_cells(notebook)
        for output in cell.outputs
        if output.output_type == "error" and "raises-exception" not in tags(cell)
    ]


def warned(notebook) -> list[str]:
    """Cells that wrote to stderr: a warning is cured in the cell, not printed on the page."""
    return [
        f"cell {place}: writes to stderr: {output.text[:60]}"
        for place, cell in code_cells(notebook)
        for output in cell.outputs
        if output.output_type == "stream" and output.name == "stderr"
    ]


def uncompared(notebook) -> list[str]:
    """Too many cells whose output is not compared, and those that do not say why in a comment."""
    cells = [(place, cell) for place, cell in code_cells(notebook) if cell.outputs]
    free = [
        (place, cell)
        for place, cell in cells
        if {"nbval-ignore-output", "nbval-skip"} & set(tags(cell)) or UNCOMPARED.search(cell.source)
    ]
    comments = re.compile(r"#(?!\s*NBVAL_)\s*\w")
    wrong = [
        f"cell {place}: output not compared, and no comment says why"
        for place, cell in free
        if not comments.search(cell.source)
    ]
    if len(free) > UNCOMPARED_SHARE * len(cells):
        wrong.append(f"{len(free)} of {len(cells)} cells with output are not compared; a tenth may be")
    return wrong


# --- size ---


def too_wide(notebook) -> list[str]:
    """Lines of code, hidden ones too, that would make a cell scroll sideways."""
    return [
        f"cell {place}: a line of {len(line)} characters; {WIDTH} at most: {line.strip()[:40]}…"
        for place, cell in code_cells(notebook)
        for line in cell.source.splitlines()
        if len(line) > WIDTH
    ]


def too_long(notebook) -> list[str]:
    """More words, more visible lines of code or more bytes than a chapter may have, solutions aside."""
    counts = {"words": (words(notebook), WORDS), "visible lines of code": (sum(lengths(notebook)), LINES)}
    counts["bytes"] = size(notebook), BYTES
    return [f"{count:,} {what}; {limit:,} at most" for what, (count, limit) in counts.items() if count > limit]


def long_cells(notebook) -> list[str]:
    """A median above 6 lines, or more than a tenth of the visible cells above 20."""
    lines, wrong = lengths(notebook), []
    if lines and statistics.median(lines) > LONGEST_MEDIAN:
        wrong.append(f"the median code cell has {statistics.median(lines):g} lines; {LONGEST_MEDIAN} at most")
    long = sum(count > LONG_CELL for count in lines)
    if long > LONG_SHARE * len(lines):
        wrong.append(f"{long} of {len(lines)} code cells have more than {LONG_CELL} lines; a tenth may have")
    return wrong


# --- what a reader sees ---


def without_words(notebook) -> list[str]:
    """Pictures without alternative text: images in outputs, SVG and <img> in outputs, images in Markdown."""
    wrong = []
    for place, cell in enumerate(notebook.cells):
        html = cell.source if cell.cell_type == "markdown" else ""
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if any(kind.startswith("image/") and kind != "image/svg+xml" for kind in data):
                alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
                if not alt.strip():
                    wrong.append(f"cell {place}: an image without mystnb.image.alt")
            html += "".join(data.get("text/html", "")) + "".join(data.get("image/svg+xml", ""))
        for tag in re.findall(r"<svg[^>]*>", html):
            if not re.search('role="(img|group)"', tag) or not re.search(r'aria-label="[^"]*\w', tag):
                wrong.append(f"cell {place}: an SVG without a role and aria-label")
        wrong += [
            f"cell {place}: an <img> without alt"
            for tag in re.findall(r"<img[^>]*>", html)
            if not re.search(r'alt="[^"]*\w', tag)
        ]
        if cell.cell_type == "markdown" and re.search(r"!\[\s*\]\(", cell.source):
            wrong.append(f"cell {place}: an image without alternative text")
    return wrong


def drawing_in_sight(notebook) -> list[str]:
    """Visible cells that draw, or hold the alternative text of a picture."""
    wrong = []
    for place, cell in visible_cells(notebook):
        nodes = ast.walk(tree(cell.source))
        if any("alt" in (getattr(node, "id", ""), getattr(node, "arg", "")) for node in nodes):
            wrong.append(f"cell {place}: alternative text in sight; tag the cell hide-input")
        if any(is_picture(output) or "text/html" in output.get("data", {}) for output in cell.outputs):
            wrong.append(f"cell {place}: draws in sight; tag the cell hide-input")
    return wrong


def seen_text(output) -> str:
    """What an output lets a reader read: the text of HTML and drawings, else the plain text."""
    data = output.get("data", {})
    html = "".join(data.get("text/html", "")) + "".join(data.get("image/svg+xml", ""))
    plain = "" if html else "".join(data.get("text/plain", ""))
    return "".join([*output.get("text", ""), re.sub(r"<[^>]*>", " ", html), plain, *data.get("text/markdown", "")])


def bare_booleans(notebook) -> list[str]:
    """Outputs with the word True or False: a number convinces, a verdict does not. Masks and configs are free."""
    return [
        f"cell {place}: prints {found[0]}: {text.strip()[:60]!r}"
        for place, cell in code_cells(notebook)
        for text in map(seen_text, shown(cell))
        if (found := BOOLEAN.search(NOT_VERDICTS.sub("", text)))
    ]


def silence(notebook) -> list[str]:
    """Too many cells, or too many in a row, that show the reader nothing."""
    silent, count = silent_cells(notebook)
    wrong, quiet, mute = [], 0, 0
    if len(silent) > SILENT_SHARE * count:
        wrong.append(f"{len(silent)} of {count} visible cells are silent; {SILENT_SHARE:.0%} may be: cells {silent}")
    seen = {place for place, _ in visible_cells(notebook, "solution")}
    for place, cell in code_cells(notebook, "solution"):
        if shown(cell):
            quiet = mute = 0
        elif place in seen:
            quiet, mute = quiet + 1, mute + (place in silent)
            if mute == SILENT_RUN + 1 and place in silent:
                wrong.append(f"cell {place}: more than {SILENT_RUN} silent cells in a row")
            if quiet == QUIET_RUN + 1:
                wrong.append(f"cell {place}: more than {QUIET_RUN} cells in a row without an output")
    return wrong


def machinery(notebook) -> list[str]:
    """Visible cells that talk to the tests, the formatter or the processor."""
    found = [(place, MACHINERY.search(cell.source)) for place, cell in visible_cells(notebook)]
    return [f"cell {place}: {match[0]} in sight" for place, match in found if match]


# --- Markdown that reads the same everywhere ---


def raw_markup(notebook) -> list[str]:
    """Markup that only the site understands: roles, directives, labels, definition lists."""
    wrong = []
    for place, cell in enumerate(notebook.cells):
        if cell.cell_type == "markdown":
            text = INLINE_CODE.sub("`", "\n".join(prose(cell.source)))
            wrong += [f"cell {place}: {what}" for what, pattern in RAW.items() if pattern.search(text)]
    return wrong


def number_begins_line(notebook) -> list[str]:
    """Lines inside a paragraph that begin with a number and a dot: Markdown makes a list of them."""
    wrong = []
    for place, cell in enumerate(notebook.cells):
        inside = listed = False
        for line in prose(cell.source) if cell.cell_type == "markdown" else []:
            line = re.sub(r"^\s*(>\s?)+", "", line)
            if not line.strip() or re.match(r"#{1,6}\s|\||\s*(```|~~~)", line):
                inside = listed = False
            elif re.match(r" {0,3}\d+[.)](\s|$)", line):
                listed = listed or not inside
                wrong += [f"cell {place}: a list by accident: {line[:40]}"] * inside
            elif re.match(r"\s*[-*+]\s|\s{2,}", line):
                listed = True
            else:
                inside = not listed
    return wrong


# --- the order of a chapter ---


def opening(notebook) -> list[str]:
    """A first cell that is not a title and one short sentence."""
    first = notebook.cells[0]
    blocks = first.source.strip().split("\n\n")
    if first.cell_type != "markdown" or len(blocks) != 2 or not re.fullmatch(r"# .+", blocks[0]):
        return ["cell 0: not a title, a blank line and one paragraph"]
    sentence = " ".join(blocks[1].split())
    wrong = [] if len(sentence) <= export.DOCSTRING else [f"cell 0: {len(sentence)} characters below the title"]
    if not sentence.endswith(".") or re.search(r"[.?!] +[A-Z]", sentence):
        wrong.append("cell 0: not one sentence below the title")
    return wrong


def without_map(notebook) -> list[str]:
    """No map of the model, drawn by a hidden cell among the first five."""
    hidden = {place for place, _ in code_cells(notebook)} - {place for place, _ in visible_cells(notebook)}
    found = any("whole_model(" in notebook.cells[place].source for place in hidden if place < 5)
    return [] if found else ["none of the first five cells is hidden and calls whole_model()"]


def exercises_last(notebook) -> list[str]:
    """Anything but exercises below the last heading of level 2, or fewer than five of them."""
    titles = [(place, *title) for place, cell in enumerate(notebook.cells) for title in headings(cell)]
    large = [title for _, level, title in titles if level == 2]
    wrong = (
        [] if large[-1:] == ["Exercises"] and large.count("Exercises") == 1 else ["the last part is not ## Exercises"]
    )
    below = parts(notebook)
    for place, level, title in titles:
        if title.startswith("Exercise ") != (level == 3 and below[place] == "exercises"):
            wrong.append(f"cell {place}: {title} is in the wrong place")
    if len(exercises(notebook)) < MIN_EXERCISES:
        wrong.append(f"{len(exercises(notebook))} exercises; at least {MIN_EXERCISES}")
    return wrong


def unsolved(notebook) -> list[str]:
    """Exercises that are not numbered 1, 2, 3 …, and those without a solution in which code has run."""
    wrong, solved = [], {}  # number of the exercise -> whether its solution has run code
    number = 0
    for place, (cell, part) in enumerate(zip(notebook.cells, parts(notebook))):
        titles = [title for _, title in headings(cell)]
        if any(title.startswith("Exercise ") for title in titles):
            number += 1
            solved[number] = None
            match = EXERCISE.match(cell.source)
            if not match or int(match[1]) != number or len(titles) > 1:
                wrong.append(f"cell {place}: not '### Exercise {number}: Title' with a text below")
        elif any(title.startswith("Solution") for title in titles):
            if (
                not cell.source.startswith("#### Solution")
                or titles != ["Solution"]
                or solved.get(number, 0) is not None
            ):
                wrong.append(f"cell {place}: not the '#### Solution' of one exercise")
            if cell.metadata.get("jp-MarkdownHeadingCollapsed") is not True:
                wrong.append(f"cell {place}: the solution is not collapsed")
            solved[number] = False
        elif part == "solution" and cell.cell_type == "code" and cell.source.strip() and cell.execution_count:
            solved[number] = True
    return wrong + [f"exercise {number}: no solution with executed code" for number, done in solved.items() if not done]


def workshop(notebook) -> list[str]:
    """No workshop between the story and the exercises, or one that does not say it can be skipped."""
    titles = [title for cell in notebook.cells for level, title in headings(cell) if level == 2]
    if titles.count("The workshop") != 1 or "Exercises" in titles[: titles.index("The workshop")]:
        return ["no heading ## The workshop, once, before ## Exercises"]
    pairs = zip(notebook.cells, parts(notebook))
    text = "\n\n".join(cell.source for cell, part in pairs if part == "workshop" and cell.cell_type == "markdown")
    paragraphs = text.split("## The workshop", 1)[1].strip().split("\n\n")
    return (
        [] if "skip" in paragraphs[0].lower() else ["the first words of the workshop do not say that it can be skipped"]
    )


def workshop_in_story(notebook) -> list[str]:
    """What belongs into the workshop, found before it: argument checks, devices, half precision."""
    wrong = []
    for place, cell in visible_cells(notebook, "workshop", "exercises", "solution"):
        raised = sum(isinstance(node, ast.Raise) for node in ast.walk(tree(cell.source)))
        if raised > 1 and "export" in tags(cell):
            wrong.append(f"cell {place}: {raised} argument checks in the story; one at most")
        wrong += [f"cell {place}: {match[0]} in the story" for match in ENGINEERING.finditer(cell.source)]
    return wrong


# --- all of them ---


def places(text: str) -> list[str]:
    """Paths of one machine in a text that goes to every machine."""
    found = [match[0] for match in PLACES.finditer(text)] + [str(execute.ROOT)] * (f"{execute.ROOT}/" in text)
    return [f"names a place on one machine: {place}" for place in found]


def rules(chapter: str) -> list:
    """The rules that a chapter must keep."""
    found = [uncounted, not_normal, stored_errors, warned, uncompared, without_words]
    found += [too_wide, too_long, bare_booleans, machinery, raw_markup, number_begins_line, unsolved]
    if chapter not in DRAWING:
        found.append(drawing_in_sight)
    if chapter != "index":
        found += [opening, long_cells, silence]
    if chapter[0].isdigit():
        found += [exercises_last] if chapter == OVERVIEW else [without_map, exercises_last]
    if chapter[0].isdigit() and chapter in export.CHAPTERS:
        found += [workshop, workshop_in_story]
    return found


def read(path) -> nbformat.NotebookNode:
    """A notebook from disk."""
    return nbformat.read(path, as_version=4)


def chapter_faults(chapter: str, order: list[str]) -> list[str]:
    """Everything that is wrong with a chapter, with the name of the rule."""
    notebook = read(execute.ROOT / "book" / f"{chapter}.ipynb")
    wrong = [f"{rule.__name__}: {fault}" for rule in rules(chapter) for fault in rule(notebook)]
    return wrong + [f"forward_imports: {fault}" for fault in forward_imports(notebook, chapter, order)]


def main() -> int:
    """The command line."""
    order = execute.chapters()
    names = [Path(name).stem for name in sys.argv[1:]] or [order[-1], *order[:-1]]
    there = [name for name in names if (execute.ROOT / "book" / f"{name}.ipynb").exists()]
    rows = {name: row(read(execute.ROOT / "book" / f"{name}.ipynb")) for name in there}
    limits = [f"{WORDS:,}", f"{LINES}", f"{WIDTH}", f"{LONGEST_MEDIAN}", f"{LONG_CELL}", "", "", ""]
    limits += [f"{SILENT_SHARE:.0%}", f"{MIN_EXERCISES}+", f"{BYTES // 1000}"]
    print(table(rows | {"limits": limits}))
    faults = {name: chapter_faults(name, order) if name in there else ["no such notebook"] for name in names}
    if not sys.argv[1:]:
        faults["gpt3lib"] = package_faults(order)
        faults["run times"] = slow(json.loads(execute.TIMES.read_text()))
    for name, wrong in faults.items():
        if wrong:
            print(f"\n{name}", *wrong, sep="\n  ")
    count = sum(map(len, faults.values()))
    print(f"\n{count} faults" if count else "\nevery limit is kept")
    return int(bool(count))


if __name__ == "__main__":
    sys.exit(main())
