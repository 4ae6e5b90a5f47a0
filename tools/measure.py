"""What can be counted in a chapter: its parts, words, lines, pictures, silent cells. tools/form.py sets the limits."""

import ast
import functools
import math
import re
import statistics

import nbformat
from IPython.core.inputtransformer2 import TransformerManager

WIDTH = 88  # characters of a line of code
HIDDEN = {"hide-input", "remove-input", "hide-cell", "remove-cell"}
NOT_SHOWN = {"remove-cell", "remove-output"}  # their outputs are on no page
SECTIONS = {"The workshop": "workshop", "Exercises": "exercises"}
PICTURE = re.compile(r"<(?:svg|img)\b")


def tags(cell) -> list[str]:
    """The tags of a cell."""
    return cell.metadata.get("tags", [])


@functools.lru_cache(maxsize=4096)
def tree(source: str) -> ast.Module:
    """A cell's Python, magics translated; nothing where it is no Python."""
    try:
        return ast.parse(TransformerManager().transform_cell(source))
    except SyntaxError:
        return ast.Module([], [])


def prose(source: str) -> list[str]:
    """The lines of a markdown cell; those inside a fence of code are empty."""
    lines, fence = [], None
    for line in source.splitlines():
        mark = re.match(r"\s*(```+|~~~+)", line)
        if fence:
            fence = None if mark and mark[1].startswith(fence) else fence
            lines.append("")
        else:
            fence = mark[1] if mark else None
            lines.append(line)
    return lines


def headings(cell) -> list[tuple[int, str]]:
    """Level and title of each heading of a cell."""
    if cell.cell_type != "markdown":
        return []
    found = [re.match(r"(#{1,6})\s+(.*\S)", line) for line in prose(cell.source)]
    return [(len(match[1]), match[2]) for match in found if match]


def parts(notebook) -> list[str]:
    """For each cell where it belongs: story, workshop, exercises or solution.

    A solution begins at its heading and ends at the next one of level 3 or above.
    """
    section, solution, found = "story", False, []
    for cell in notebook.cells:
        for level, title in headings(cell):
            section = SECTIONS.get(title, section) if level == 2 else section
            solution = level > 3 and (solution or title.startswith("Solution"))
        found.append("solution" if solution else section)
    return found


def code_cells(notebook, *without: str) -> list[tuple[int, dict]]:
    """The code cells with their places: not the empty ones, not the setup cell, not those in the parts named."""
    return [
        (place, cell)
        for place, (cell, part) in enumerate(zip(notebook.cells, parts(notebook)))
        if cell.cell_type == "code" and cell.source.strip() and "setup" not in tags(cell) and part not in without
    ]


def visible_cells(notebook, *without: str) -> list[tuple[int, dict]]:
    """The code cells whose code a reader sees without opening anything."""
    return [(place, cell) for place, cell in code_cells(notebook, *without) if not HIDDEN & set(tags(cell))]


def shown(cell) -> list:
    """The outputs of a cell that a reader sees."""
    return [] if cell.cell_type != "code" or NOT_SHOWN & set(tags(cell)) else cell.outputs


def is_picture(output) -> bool:
    """Whether an output is an image or HTML that holds one."""
    data = output.get("data", {})
    return any(kind.startswith("image/") for kind in data) or bool(PICTURE.search("".join(data.get("text/html", ""))))


def defines(source: str) -> bool:
    """Whether a cell defines a function or class, or does nothing but import."""
    body = tree(source).body
    definitions = any(isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) for node in body)
    return definitions or bool(body) and all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in body)


def has_its_picture_below(notebook, place: int) -> bool:
    """Whether the next cell is a hidden one with an output: the reader sees it below this cell's code."""
    below = notebook.cells[place + 1] if place + 1 < len(notebook.cells) else None
    return below is not None and bool(HIDDEN & set(tags(below))) and bool(shown(below))


def silent_cells(notebook) -> tuple[list[int], int]:
    """The places of the visible cells that neither define nor show anything, and how many cells define nothing."""
    cells = visible_cells(notebook, "solution")
    cells = [(place, cell) for place, cell in cells if not defines(cell.source) and "export" not in tags(cell)]
    silent = [place for place, cell in cells if not shown(cell) and not has_its_picture_below(notebook, place)]
    return silent, len(cells)


def words(notebook) -> int:
    """Words of Markdown, solutions aside; a word holds a letter or a digit."""
    pairs = zip(notebook.cells, parts(notebook))
    texts = [cell.source for cell, part in pairs if cell.cell_type == "markdown" and part != "solution"]
    return sum(bool(re.search(r"\w", word)) for text in texts for word in text.split())


def lengths(notebook) -> list[int]:
    """The lines of each visible cell, blank ones and solutions aside."""
    sources = [cell.source for _, cell in visible_cells(notebook, "solution")]
    return [sum(bool(line.strip()) for line in source.splitlines()) for source in sources]


def exercises(notebook) -> list[str]:
    """The headings of the exercises, in order."""
    return [title for cell in notebook.cells for _, title in headings(cell) if title.startswith("Exercise ")]


def size(notebook) -> int:
    """The bytes of the notebook's file."""
    return len(nbformat.writes(notebook).encode()) + 1


def row(notebook) -> list[str]:
    """One chapter's numbers, in the order of the table's columns."""
    counts, written = sorted(lengths(notebook)), words(notebook)
    silent, counted = silent_cells(notebook)
    pairs = [(cell, part) for cell, part in zip(notebook.cells, parts(notebook)) if part != "solution"]
    text = sum(cell.cell_type == "markdown" for cell, _ in pairs)
    pictures = sum(is_picture(output) for cell, _ in pairs for output in shown(cell))
    widest = max((len(line) for _, cell in code_cells(notebook) for line in cell.source.splitlines()), default=0)
    code = max(1, len(counts))
    return [
        f"{written:,}",
        f"{sum(counts):,}",
        f"{widest}",
        f"{statistics.median(counts or [0]):g}",
        f"{counts[math.ceil(0.9 * len(counts)) - 1] if counts else 0}",
        f"{written / max(1, sum(counts)):.1f}",
        f"{text / code:.2f}",
        f"{pictures / code:.2f}",
        f"{len(silent) / max(1, counted):.0%}",
        f"{len(exercises(notebook))}",
        f"{size(notebook) / 1000:.0f}",
    ]


HEADS = [
    "words",
    "lines",
    "widest",
    "median",
    "p90",
    "words/line",
    "text/code",
    "pics/code",
    "silent",
    "exercises",
    "KB",
]


def table(rows: dict[str, list[str]]) -> str:
    """The rows under their heads, numbers to the right. A row that is too short says something else."""
    widths = [max(6, len(head)) for head in HEADS]
    first = max([len("chapter"), *map(len, rows)])
    lines = []
    for name, cells in {"chapter": HEADS, **rows}.items():
        numbers = len(cells) == len(HEADS)
        lines.append(
            f"{name:<{first}}  "
            + ("  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths)) if numbers else " ".join(cells))
        )
    return "\n".join(lines)
