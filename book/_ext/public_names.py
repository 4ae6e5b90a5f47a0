"""The public names of the library, read from its sources: nothing is imported."""

import ast
import re
from pathlib import Path

ORIGIN = re.compile(r"^# Made from book/(\w+)\.ipynb", re.MULTILINE)


def is_public(node: ast.stmt) -> bool:
    """Whether a statement defines a public function or class; no check_… is one."""
    return isinstance(
        node, (ast.FunctionDef, ast.ClassDef)
    ) and not node.name.startswith(("_", "check_"))


def head(node: ast.FunctionDef | ast.ClassDef, lines: list[str]) -> str:
    """The lines of a definition, to the end of its docstring, without its body."""
    start = min(part.lineno for part in [node, *node.decorator_list])
    first = node.body[0]
    end = first.lineno - 1 if ast.get_docstring(node) is None else first.end_lineno
    end = max(end, node.lineno)  # the body may stand on the line of the name
    return "\n".join(lines[start - 1 : end]).rstrip()


def outline(node: ast.FunctionDef | ast.ClassDef, lines: list[str]) -> str:
    """A function's head; of a class also its fields and its public methods' heads."""
    if isinstance(node, ast.FunctionDef):
        return head(node, lines)
    fields = [part for part in node.body if isinstance(part, ast.AnnAssign)]
    own = "\n".join("\n".join(lines[f.lineno - 1 : f.end_lineno]) for f in fields)
    methods = [head(part, lines) for part in node.body if is_public(part)]
    return "\n\n".join(filter(None, [head(node, lines), own, *methods]))


def module_section(name: str, source: str) -> str:
    """A module's part of the page: purpose, chapter, functions and classes."""
    tree, lines = ast.parse(source), source.splitlines()
    made = ORIGIN.search(source)
    link = f" Made in [{made[1]}]({made[1]}.ipynb)." if made else ""
    parts = [f"## gpt3lib.{name}", f"{ast.get_docstring(tree) or ''}{link}"]
    for node in filter(is_public, tree.body):
        parts += [f"### {node.name}", f"```python\n{outline(node, lines)}\n```"]
    return "\n\n".join(parts)


def package_table(source: str) -> str:
    """The names that `import gpt3lib` gives, with the module each comes from."""
    homes = next(
        ast.literal_eval(node.value)
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and node.targets[0].id == "HOMES"
    )
    lines = [
        f"| `gpt3lib.{name}` | [{home}](#gpt3lib{home}) |"
        for name, home in homes.items()
    ]
    return "\n".join(["| name | from |", "|---|---|", *sorted(lines)])


def page_of_names(package: Path) -> str:
    """The page's Markdown: the names of the package, then each module's."""
    paths = sorted(package.glob("*.py"))
    sources = {path.stem: path.read_text(encoding="utf-8") for path in paths}
    top = package_table(sources.pop("__init__"))
    return "\n\n".join([top, *map(module_section, sources, sources.values())]) + "\n"
