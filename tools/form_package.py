"""The form of the package and of the book as a whole: who may import whom, sizes of modules, run times."""

import ast
import re
from pathlib import Path

import execute
import export
from measure import WIDTH, code_cells, tree

MODULE_LINES, PACKAGE_LINES = 500, 14_000
CHAPTER_SECONDS, BOOK_SECONDS = 90, 20 * 60
# may use everything, and no chapter uses them
ON_TOP = {"index", "00_overview", "f_command_line", "h_using_models", "i_own_text", "j_own_pairs"}
APPENDICES = {module for name, module in export.CHAPTERS.items() if not name[0].isdigit() and name not in ON_TOP}


# --- who may import whom ---


def imported_modules(source: str) -> set[str]:
    """The modules of gpt3lib that a piece of Python uses, by import, as gpt3lib.name or as "gpt3lib.name"."""
    owner = {name: module for module, names in export.PUBLIC.items() for name in names}
    found = set()
    for node in ast.walk(tree(source)):
        if isinstance(node, ast.ImportFrom) and (node.module == "gpt3lib" or node.level and not node.module):
            found |= {owner.get(alias.name, alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.level or node.module.startswith("gpt3lib.")):
            found.add(node.module.removeprefix("gpt3lib.").split(".")[0])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("gpt3lib.")}
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "gpt3lib":
            found.add(owner.get(node.attr, node.attr))
        elif isinstance(node, ast.Constant) and re.fullmatch(r"gpt3lib\.[a-z]\w*", str(node.value)):
            found.add(node.value.split(".")[1])
    return found - {"__version__", "__all__", "__file__"}


def allowed_modules(chapter: str, order: list[str]) -> set[str]:
    """The modules that a chapter may import: the appendices', and those of earlier chapters unless it is one itself."""
    if chapter in ON_TOP:
        return set(export.CHAPTERS.values())
    before = order[: order.index(chapter)] if chapter[0].isdigit() else []
    return APPENDICES | {export.CHAPTERS[name] for name in before if name in export.CHAPTERS}


def forward_imports(notebook, chapter: str, order: list[str]) -> list[str]:
    """Imports of gpt3lib modules that no earlier chapter makes."""
    return [
        f"cell {place}: imports {module}, which no earlier chapter makes"
        for place, cell in code_cells(notebook)
        for module in sorted(imported_modules(cell.source) - allowed_modules(chapter, order))
    ]


def module_imports(module: str, source: str, order: list[str]) -> list[str]:
    """Imports of a module of a later chapter by a module of gpt3lib, inside functions too."""
    chapter = next(name for name, made in export.CHAPTERS.items() if made == module)
    late = imported_modules(source) - allowed_modules(chapter, order) - {module}
    return [f"{module} imports {name}, which no earlier chapter makes" for name in sorted(late)]


def replacements(source: str) -> list[str]:
    """Assignments to a name inside another module or its class: whoever reads that module would be misled."""
    nodes, wrong = list(ast.walk(tree(source))), []
    names = {"gpt3lib"}
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == "gpt3lib"):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.asname for alias in node.names if alias.name.startswith("gpt3lib.") and alias.asname}
    for node in nodes:
        stored = isinstance(node, ast.Attribute) and isinstance(node.ctx, (ast.Store, ast.Del))
        setter = isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("setattr", "delattr")
        root = node.value if stored else node.args[0] if setter else None
        while isinstance(root, ast.Attribute):
            root = root.value
        if isinstance(root, ast.Name) and root.id in names:
            wrong.append(f"line {node.lineno}: replaces {ast.unparse(node)}")
    return wrong


# --- sizes and times ---


def wide_lines(source: str) -> list[str]:
    """Too wide lines of a module, without the two lines that the exporter writes on top."""
    body = re.sub(r'\A"""[^\n]*"""\n\n# Made from [^\n]*\n', "\n\n\n", source)
    numbered = enumerate(body.splitlines(), 1)
    return [f"line {number}: {len(line)} characters" for number, line in numbered if len(line) > WIDTH]


def large_package(lines: dict[str, int]) -> list[str]:
    """Modules, or a package, with too many lines."""
    wrong = [f"{name}: {count} lines; {MODULE_LINES} at most" for name, count in lines.items() if count > MODULE_LINES]
    total = sum(lines.values())
    return wrong + [f"gpt3lib: {total} lines; {PACKAGE_LINES} at most"] * (total > PACKAGE_LINES)


def slow(times: dict[str, int]) -> list[str]:
    """Chapters that run longer than they may, and a book that does."""
    wrong = [f"{name}: {time} s; {CHAPTER_SECONDS} at most" for name, time in times.items() if time > CHAPTER_SECONDS]
    total = sum(times.values())
    return wrong + [f"the book: {total} s; {BOOK_SECONDS} at most"] * (total > BOOK_SECONDS)


def package_faults(order: list[str], package: Path = execute.ROOT / "gpt3lib") -> list[str]:
    """Everything that is wrong with the modules."""
    sources = {path.stem: path.read_text(encoding="utf-8") for path in sorted(package.glob("[a-z]*.py"))}
    wrong = large_package({name: len(source.splitlines()) for name, source in sources.items()})
    for name, source in sources.items():
        wrong += [f"{name}: {fault}" for fault in wide_lines(source) + replacements(source)]
        wrong += module_imports(name, source, order)
    return wrong
