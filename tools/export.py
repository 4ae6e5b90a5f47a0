"""Write gpt3lib from the chapters: the cells tagged `export` of a notebook become its module.

python tools/export.py          write the modules that changed
python tools/export.py --check  write nothing; say what differs and exit 1
"""

import argparse
import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = {
    "b_texts": "texts",
    "01_tokenization": "tokenization",
    "02_embeddings": "embeddings",
    "03_attention": "attention",
    "05_decoder": "model",
    "06_generation": "generation",
    "08_training": "training",
    "a_pictures": "pictures",
}
PUBLIC = {
    "embeddings": ["ContextError"],
    "generation": ["PromptError", "generate"],
    "model": ["GPT", "ConfigError", "GPTConfig"],
    "texts": ["DataError"],
    "tokenization": ["TokenError", "Tokenizer"],
}


class ExportError(ValueError):
    """A chapter that cannot become a module."""


def first_paragraph(notebook) -> str:
    """The first paragraph below the title, as one line: the chapter's promise and the module's docstring."""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            for paragraph in cell.source.split("\n\n"):
                if paragraph.strip() and not paragraph.startswith(("#", "(", ":::", "```", "<")):
                    return " ".join(paragraph.split())
    raise ExportError("no paragraph of text")


def exported_cells(notebook) -> list[str]:
    """The sources of the code cells tagged `export`, in order."""
    cells = (cell for cell in notebook.cells if cell.cell_type == "code")
    return [cell.source.strip() for cell in cells if "export" in cell.metadata.get("tags", [])]


def defined_names(statement: ast.stmt) -> list[str]:
    """The names that a top-level statement gives a value to."""
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)):
        return [statement.name]
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    return [node.id for target in targets if target for node in ast.walk(target) if isinstance(node, ast.Name)]


def module_source(path: Path) -> str:
    """The module a chapter makes: docstring, imports lifted to the top, then its cells in order."""
    notebook = nbformat.read(path, as_version=4)
    imports, bodies, names = [], [], Counter()
    for source in exported_cells(notebook):
        lines, drop = source.splitlines(), set()
        for statement in ast.parse(source).body:
            if isinstance(statement, (ast.Import, ast.ImportFrom)):
                imports.append(ast.unparse(statement))
                drop.update(range(statement.lineno - 1, statement.end_lineno))
            else:
                names.update(defined_names(statement))
        bodies.append("\n".join(line for i, line in enumerate(lines) if i not in drop).strip())
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise ExportError(f"{path.name} exports {', '.join(twice)} twice; a name lives in one cell")
    head = f'"""{first_paragraph(notebook)}"""\n\n{origin(path.name)}' + "\n".join(dict.fromkeys(imports))
    return format_source("\n\n\n".join([head, *filter(None, bodies)]) + "\n")


def origin(chapter: str) -> str:
    """The line that tells a reader of a module where to edit it."""
    return f"# Made from book/{chapter} by tools/export.py; edit the chapter, not this file.\n"


def package_source() -> str:
    """gpt3lib/__init__.py: the public names, and nothing else."""
    names = [name for public in PUBLIC.values() for name in public]
    lines = ['"""How GPT-3 works, in code: the library that the book is made of."""\n']
    lines.append("# Made by tools/export.py from its table of public names; edit that.\n")
    lines += [f"from gpt3lib.{module} import {', '.join(public)}" for module, public in PUBLIC.items()]
    lines.append(f"__all__ = {sorted(names)!r}\n")
    return format_source("\n".join(lines))


def format_source(source: str) -> str:
    """Sort the imports and format, as ruff does for the whole project."""
    config = ["--config", str(ROOT / "pyproject.toml"), "--stdin-filename", "module.py", "-"]
    for command in (["check", "--select", "I", "--fix", "--quiet", *config], ["format", "--quiet", *config]):
        done = subprocess.run([sys.executable, "-m", "ruff", *command], input=source, capture_output=True, text=True)
        if done.returncode:
            raise ExportError(done.stderr or done.stdout)
        source = done.stdout
    return source


def all_modules() -> dict[Path, str]:
    """Every module's path and the source it should have. Raises ExportError when two chapters share a name."""
    modules, owners = {}, {}
    for chapter, module in CHAPTERS.items():
        source = module_source(ROOT / "book" / f"{chapter}.ipynb")
        for statement in ast.parse(source).body:
            for name in defined_names(statement) if not isinstance(statement, (ast.Import, ast.ImportFrom)) else []:
                if owners.setdefault(name, chapter) != chapter:
                    raise ExportError(f"{name} is exported by {owners[name]} and by {chapter}; keep one definition")
        modules[ROOT / "gpt3lib" / f"{module}.py"] = source
    modules[ROOT / "gpt3lib" / "__init__.py"] = package_source()
    return modules


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 when a module differs")
    check = parser.parse_args().check
    stale = {p: s for p, s in all_modules().items() if not p.exists() or p.read_text() != s}
    for path, source in stale.items():
        print(f"{'differs from its chapter' if check else 'written'}: {path.relative_to(ROOT)}")
        if not check:
            path.write_text(source)
    if not stale:
        print(f"gpt3lib: {len(CHAPTERS)} modules, each as its chapter has it")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
