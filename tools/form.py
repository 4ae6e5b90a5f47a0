"""The form of a chapter: one function per rule, each returns the list of what is wrong (empty when nothing is).

tests/test_book.py applies them to every notebook of the book, and shows each of them a bad notebook.
"""

import ast
import copy
import re
import statistics

import nbformat
from IPython.core.inputtransformer2 import TransformerManager

import execute
import export

LONGEST_MEDIAN, LONG_CELL = 6, 20  # lines of code
LONG_SHARE, UNCOMPARED_SHARE = 0.10, 0.10
MIN_EXERCISES = 5
COMMON = {"pictures", "texts"}  # appendices that every chapter may import
UNCOMPARED = re.compile(r"#\s*NBVAL_(IGNORE_OUTPUT|SKIP)")
EXERCISE = re.compile(r"^(?:```+|:::+)\{exercise(?:-start)?\}.*\n:label:\s*(\S+)", re.MULTILINE)
SOLUTION = re.compile(r"^(?:```+|:::+)\{solution-start\}\s*(\S+)", re.MULTILINE)
SOLUTION_END = re.compile(r"^(?:```+|:::+)\{solution-end\}", re.MULTILINE)
PLACES = re.compile("/(work/(main|shared)|tmp/w|root|home/[a-z]+|Users/[A-Za-z]+)/")


def tags(cell) -> list[str]:
    """The tags of a cell."""
    return cell.metadata.get("tags", [])


def code_cells(notebook) -> list[tuple[int, dict]]:
    """The code cells that are not empty, with their places, without the setup cell."""
    cells = [(place, cell) for place, cell in enumerate(notebook.cells) if cell.cell_type == "code"]
    return [(place, cell) for place, cell in cells if cell.source.strip() and "setup" not in tags(cell)]


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
            if 'role="img"' not in tag or not re.search(r'aria-label="[^"]*\w', tag):
                wrong.append(f"cell {place}: an SVG without role=img and aria-label")
        wrong += [
            f"cell {place}: an <img> without alt"
            for tag in re.findall(r"<img[^>]*>", html)
            if not re.search(r'alt="[^"]*\w', tag)
        ]
        if cell.cell_type == "markdown" and re.search(r"!\[\s*\]\(", cell.source):
            wrong.append(f"cell {place}: an image without alternative text")
    return wrong


def long_cells(notebook) -> list[str]:
    """A median above 6 lines, or more than a tenth of the cells above 20."""
    lines = [sum(bool(line.strip()) for line in cell.source.splitlines()) for _, cell in code_cells(notebook)]
    wrong = []
    if lines and statistics.median(lines) > LONGEST_MEDIAN:
        wrong.append(f"the median code cell has {statistics.median(lines):g} lines; {LONGEST_MEDIAN} at most")
    long = sum(count > LONG_CELL for count in lines)
    if long > LONG_SHARE * len(lines):
        wrong.append(f"{long} of {len(lines)} code cells have more than {LONG_CELL} lines; a tenth may have")
    return wrong


def exercise_labels(notebook) -> list[str]:
    """The labels of a notebook's exercises."""
    return [label for cell in notebook.cells if cell.cell_type == "markdown" for label in EXERCISE.findall(cell.source)]


def unsolved(notebook) -> list[str]:
    """Too few exercises, and those without a solution in which code has run."""
    labels, solved, current = exercise_labels(notebook), set(), None
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            current = current if not SOLUTION_END.search(cell.source) else None
            current = ([current] + SOLUTION.findall(cell.source))[-1]
        elif current and cell.source.strip() and cell.execution_count:
            solved.add(current)
    wrong = [f"exercise {label}: no solution with executed code" for label in labels if label not in solved]
    if len(labels) < MIN_EXERCISES:
        wrong.append(f"{len(labels)} exercises; at least {MIN_EXERCISES}")
    return wrong


def imported_modules(source: str) -> set[str]:
    """The modules of gpt3lib that a piece of Python uses, by import or as gpt3lib.name."""
    owner = {name: module for module, names in export.PUBLIC.items() for name in names}
    found = set()
    for node in ast.walk(ast.parse(TransformerManager().transform_cell(source))):
        if isinstance(node, ast.ImportFrom) and node.module == "gpt3lib":
            found |= {owner.get(alias.name, alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gpt3lib."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("gpt3lib.")}
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "gpt3lib":
            found.add(owner.get(node.attr, node.attr))
    return found - {"__version__", "__all__", "__file__"}


def forward_imports(notebook, chapter: str, order: list[str]) -> list[str]:
    """Imports of gpt3lib modules that an earlier chapter does not make. The appendices' modules import none."""
    before = order[: order.index(chapter)]
    allowed = COMMON | {export.CHAPTERS[name] for name in before if name in export.CHAPTERS}
    wrong = []
    for place, cell in code_cells(notebook):
        own = export.CHAPTERS.get(chapter) in COMMON and "export" in tags(cell)
        late = imported_modules(cell.source) - (set() if own else allowed)
        wrong += [f"cell {place}: imports {module}, which no earlier chapter makes" for module in sorted(late)]
    return wrong


def places(text: str) -> list[str]:
    """Paths of one machine in a text that goes to every machine."""
    found = [match[0] for match in PLACES.finditer(text)] + [str(execute.ROOT)] * (f"{execute.ROOT}/" in text)
    return [f"names a place on one machine: {place}" for place in found]


def read(path) -> nbformat.NotebookNode:
    """A notebook from disk."""
    return nbformat.read(path, as_version=4)
