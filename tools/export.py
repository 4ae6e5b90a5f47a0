"""Write gpt3lib from the chapters: the cells tagged `export` of a notebook become its module.

python tools/export.py               write the modules that changed
python tools/export.py 04_attention  write this chapter's module only
python tools/export.py --check       write nothing; say what differs and exit 1
"""

import argparse
import ast
import os
import subprocess
import sys
import textwrap
import tomllib
from collections import Counter
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
DOCSTRING = 110  # characters of a chapter's first paragraph
CHAPTERS = {
    "a_pictures": "pictures",
    "b_scenes": "scenes",
    "c_texts": "texts",
    "d_files": "files",
    "e_tasks": "tasks",
    "k_options": "options",
    "m_commands": "commands",
    "g_checkpoints": "checkpoints",
    "l_torch_hooks": "hooks",
    "n_processes": "processes",
    "o_ranks": "ranks",
    "02_tokenization": "tokenization",
    "03_embeddings": "embeddings",
    "04_attention": "attention",
    "05_sparse_attention": "sparse_attention",
    "06_decoder": "model",
    "07_sizes": "sizes",
    "08_generation": "generation",
    "09_cache": "cache",
    "10_decoding": "decoding",
    "11_data": "data",
    "12_loading": "loading",
    "13_training": "training",
    "14_recipe": "recipe",
    "15_long_runs": "runs",
    "16_scaling_laws": "scaling",
    "17_parallelism": "parallel",
    "18_pipelines": "pipeline",
    "19_many_machines": "elastic",
    "20_planning": "plan",
    "20b_dry_run": "dry_run",
    "21_prompting": "prompting",
    "22_evaluation": "evaluation",
    "23_finetuning": "finetuning",
    "23b_limits": "limits",
    "24_real_weights": "weights",
    "h_using_models": "using",
    "i_own_text": "own_text",
    "j_own_pairs": "own_pairs",
    "f_command_line": "cli",
}
PUBLIC = {
    "cache": ["generate"],
    "decoding": ["beam_search", "generate_many", "write_on"],
    "embeddings": ["ContextError"],
    "files": ["WeightsError"],
    "generation": ["PromptError", "generate_slowly"],
    "model": ["GPT", "ConfigError", "GPTConfig"],
    "sizes": [],
    "sparse_attention": ["PatternError"],
    "texts": ["DataError"],
    "tokenization": ["TokenError", "Tokenizer"],
    "weights": [],
}


class ExportError(ValueError):
    """A chapter that cannot become a module."""


def first_paragraph(notebook) -> str:
    """The first paragraph below the title, as one line: the chapter's promise and the module's docstring."""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            for paragraph in cell.source.split("\n\n"):
                if paragraph.strip() and not paragraph.startswith(("#", "(", ":::", "```", "<")):
                    line = " ".join(paragraph.split())
                    if len(line) > DOCSTRING:
                        raise ExportError(
                            f"the first paragraph becomes the module's docstring and has {len(line)} characters; "
                            f"say it in {DOCSTRING}: {line[:40]}…"
                        )
                    return line
    raise ExportError("no paragraph of text below the title")


def exported_cells(notebook) -> list[str]:
    """The sources of the code cells tagged `export`, in order."""
    cells = (cell for cell in notebook.cells if cell.cell_type == "code")
    return [cell.source.strip() for cell in cells if "export" in cell.metadata.get("tags", [])]


def defined_names(statement: ast.stmt) -> list[str]:
    """The names that a top-level statement gives a value to."""
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)):
        return [statement.name]
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    nodes = [node for target in targets if target for node in ast.walk(target)]
    return [node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]


def exported_names(source: str) -> list[str]:
    """The names that a module's source defines at its top level, once per definition; imports do not count."""
    return [name for statement in ast.parse(source).body for name in defined_names(statement)]


def module_source(path: Path) -> str:
    """The module a chapter makes: docstring, imports lifted to the top, then its cells in order.

    Raises ExportError when a cell is not plain Python or a name is defined twice.
    """
    if not path.exists():
        raise ExportError(f"no chapter {path.name} in {path.parent.name}/")
    try:
        return source_of(nbformat.read(path, as_version=4), path.name)
    except (ExportError, SyntaxError) as error:
        raise ExportError(f"{path.name}: {error}") from error


def source_of(notebook, name: str) -> str:
    """The source of the module that a notebook called `name` makes."""
    imports, bodies, names = [], [], Counter()
    for source in exported_cells(notebook):
        lines, drop = source.splitlines(), set()
        names.update(exported_names(source))
        for statement in ast.parse(source).body:
            if isinstance(statement, (ast.Import, ast.ImportFrom)):
                imports.append(ast.unparse(statement))
                drop.update(range(statement.lineno - 1, statement.end_lineno))
        bodies.append("\n".join(line for i, line in enumerate(lines) if i not in drop).strip())
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise ExportError(f"exports {', '.join(twice)} twice; a name lives in one cell")
    docstring = textwrap.fill(first_paragraph(notebook), 82)
    head = f'"""{docstring}"""\n\n{origin(name)}' + "\n".join(dict.fromkeys(imports))
    return format_source("\n\n\n".join([head, *filter(None, bodies)]) + "\n")


def origin(chapter: str) -> str:
    """The line that tells a reader of a module where to edit it."""
    return f"# Made from book/{chapter} by tools/export.py; edit the chapter.\n"


def package_source() -> str:
    """gpt3lib/__init__.py: the public names and the version. Each is fetched when somebody asks for it."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    homes = {name: module for module, public in PUBLIC.items() for name in public}
    silent = [module for module, public in PUBLIC.items() if not public]  # they fill registries of `model`
    lines = ['"""How GPT-3 works, in code: the library that the book is made of."""\n']
    lines.append("# Made by tools/export.py from its table of public names; edit that.")
    lines.append("from importlib import import_module\n")
    lines.append(f"HOMES = {homes!r}  # public name: its module")
    lines.append(f"__all__ = {sorted([*homes, *silent])!r}\n__version__ = {version!r}\n")
    lines.append(LAZY)
    return format_source("\n".join(lines))


LAZY = '''
def __getattr__(name: str):
    """A public name or a module, at its first use: torch takes a second to import."""
    module = f"gpt3lib.{HOMES.get(name, name)}"
    try:
        if name.startswith("_"):
            raise ModuleNotFoundError(name=module)
        value = import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        message = f"module 'gpt3lib' has no attribute {name!r}"
        raise AttributeError(message) from None
    globals()[name] = getattr(value, name) if name in HOMES else value
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
'''


def format_source(source: str) -> str:
    """Sort the imports and format, as ruff does for the whole project."""
    config = ["--stdin-filename", str(ROOT / "gpt3lib" / "module.py"), "-"]  # its ruff.toml counts
    for command in (["check", "--select", "I", "--fix", "--quiet", *config], ["format", "--quiet", *config]):
        done = subprocess.run([sys.executable, "-m", "ruff", *command], input=source, capture_output=True, text=True)
        if done.returncode:
            raise ExportError(done.stderr or done.stdout)
        source = done.stdout
    return source


def all_modules(book: Path = ROOT / "book") -> dict[str, str]:
    """Every module's file name and the source it should have.

    Raises ExportError when two chapters share a name, or a public name is defined nowhere.
    """
    modules, owners = {}, {}
    for chapter, module in CHAPTERS.items():
        source = module_source(book / f"{chapter}.ipynb")
        names = exported_names(source)
        for name in names:
            if owners.setdefault(name, chapter) != chapter:
                raise ExportError(f"{name} is exported by {owners[name]} and by {chapter}; keep one definition")
        missing = [name for name in PUBLIC.get(module, []) if name not in names]
        if missing:
            raise ExportError(f"{chapter} exports no {', '.join(missing)}, which the package promises")
        modules[f"{module}.py"] = source
    modules["__init__.py"] = package_source()
    return modules


def stale_modules(modules: dict[str, str], package: Path = ROOT / "gpt3lib") -> list[str]:
    """What in the package is not as its chapter has it: modules that differ or are missing, files without a chapter."""
    differ = [
        name
        for name, source in modules.items()
        if not (package / name).exists() or (package / name).read_text(encoding="utf-8") != source
    ]
    return differ + sorted(path.name for path in package.glob("*.py") if path.name not in modules)


def write(path: Path, source: str) -> None:
    """Write a module beside its place and rename it."""
    beside = path.with_suffix(".part")
    beside.write_text(source, encoding="utf-8")
    os.replace(beside, path)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("chapters", nargs="*", help="only these, such as 04_attention")
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 when a module differs")
    arguments = parser.parse_args()
    try:
        if arguments.chapters:
            names = [Path(chapter).stem for chapter in arguments.chapters]
            unknown = [name for name in names if name not in CHAPTERS]
            if unknown:
                raise ExportError(f"no module is made from {', '.join(unknown)}; from {', '.join(CHAPTERS)} one is")
            modules = {f"{CHAPTERS[name]}.py": module_source(ROOT / "book" / f"{name}.ipynb") for name in names}
        else:
            modules = all_modules()
    except ExportError as error:
        print(f"export: {error}", file=sys.stderr)
        return 1
    stale = [name for name in stale_modules(modules) if name in modules or not arguments.chapters]
    for name in stale:
        if name in modules and not arguments.check:
            write(ROOT / "gpt3lib" / name, modules[name])
            print(f"written: gpt3lib/{name}")
        elif name in modules:
            print(f"gpt3lib/{name} is not what its chapter makes; edit the chapter and run `make export`")
        else:
            print(f"gpt3lib/{name} belongs to no chapter; remove it")
    if not stale:
        print(f"gpt3lib: {len(modules)} modules, each as its chapter has it")
    left = stale if arguments.check else [name for name in stale if name not in modules]
    return int(bool(left))


if __name__ == "__main__":
    sys.exit(main())
