"""The book's machinery: modules in step with chapters, stored outputs, environment, repository."""

import base64
import copy
import io
import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution, requires
from pathlib import Path

import nbformat
import pytest
import yaml
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image

import execute
import export
import form

ROOT = Path(__file__).resolve().parent.parent
BOOK = ROOT / "book"
ORDER = execute.chapters()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def png(image):
    """An image as a notebook stores it."""
    raw = io.BytesIO()
    image.save(raw, "PNG")
    return base64.b64encode(raw.getvalue()).decode()


# --- the table of contents ---


def test_every_notebook_is_in_the_table_of_contents():
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    listed = [entry["file"] for part in toc["parts"] for entry in part["chapters"]] + [toc["root"]]
    assert {path.stem for path in BOOK.glob("*.ipynb")} == set(ORDER)
    assert set(export.CHAPTERS) <= set(ORDER)
    assert all(any((ROOT / f"{file}{end}").exists() for end in (".ipynb", ".md")) for file in listed)


# --- the package is what the chapters make ---


def test_every_module_is_as_its_chapter_has_it():
    assert export.stale_modules(export.all_modules()) == []


def test_a_module_edited_by_hand_is_found(tmp_path):
    modules = {"attention.py": "x = 1\n", "model.py": "y = 2\n", "__init__.py": ""}
    for name, source in modules.items():
        export.write(tmp_path / name, source)
    assert export.stale_modules(modules, tmp_path) == []
    (tmp_path / "attention.py").write_text("x = 2\n")
    (tmp_path / "model.py").unlink()
    (tmp_path / "stray.py").write_text("")
    assert export.stale_modules(modules, tmp_path) == ["attention.py", "model.py", "stray.py"]


def chapter(*sources, title="# T\n\nBuilds a thing."):
    cells = [new_code_cell(source, metadata={"tags": ["export"]}) for source in sources]
    return new_notebook(cells=[new_markdown_cell(title), *cells, new_code_cell("left_out = 1")])


def test_a_module_reads_as_if_written_by_hand():
    sources = [
        "import torch\nimport math\n\nSIZE = 3  # why",
        "def f(x):\n  return torch.sin(x)*math.pi",
        "from math import tau",
    ]
    assert export.source_of(chapter(*sources), "03_x.ipynb") == (
        '"""Builds a thing."""\n\n# Made from book/03_x.ipynb by tools/export.py; edit the chapter.\n'
        "import math\nfrom math import tau\n\nimport torch\n\nSIZE = 3  # why\n\n\n"
        "def f(x):\n    return torch.sin(x) * math.pi\n"
    )


@pytest.mark.parametrize(
    "book, message",
    [
        (chapter("def f(): ...", "class g: ...\nf = 3"), "exports f twice"),
        (chapter("a, b = 1, 2", "b: int = 3"), "exports b twice"),
        (chapter("%matplotlib inline"), "04_attention.ipynb"),
        (chapter("x = 1", title="# Title alone"), "no paragraph"),
        (chapter("x = 1", title="# T\n\n" + "long " * 30), "docstring"),
    ],
)
def test_a_chapter_that_cannot_become_a_module_is_refused(tmp_path, book, message):
    nbformat.write(book, tmp_path / "04_attention.ipynb")
    with pytest.raises(export.ExportError, match=message):
        export.module_source(tmp_path / "04_attention.ipynb")


def test_a_name_that_two_chapters_export_is_refused(tmp_path):
    for name, module in export.CHAPTERS.items():
        nbformat.write(
            chapter(*(f"def {public}(): ..." for public in export.PUBLIC.get(module, []))), tmp_path / f"{name}.ipynb"
        )
    assert set(export.all_modules(tmp_path)) == {f"{module}.py" for module in export.CHAPTERS.values()} | {
        "__init__.py"
    }
    nbformat.write(chapter("def GPT(): ..."), tmp_path / "04_attention.ipynb")
    with pytest.raises(export.ExportError, match="GPT is exported by 04_attention and by 06_decoder"):
        export.all_modules(tmp_path)
    nbformat.write(chapter("x = 1"), tmp_path / "08_generation.ipynb")
    nbformat.write(chapter("y = 2"), tmp_path / "04_attention.ipynb")
    with pytest.raises(export.ExportError, match="08_generation exports no PromptError, generate"):
        export.all_modules(tmp_path)


# --- running and storing ---


def test_normal_form_is_reached_in_one_step():
    once = chapter("from gpt3lib import GPT")
    once.cells[0].metadata["execution"] = {"started": "now"}
    execute.normal_form(once)
    twice = copy.deepcopy(once)
    execute.normal_form(twice)
    assert once == twice


def test_a_stored_picture_is_small_and_looks_the_same():
    drawn = Image.effect_noise((200, 100), 3).convert("RGBA")
    drawn.paste((0, 0, 0, 0), (50, 20, 90, 60))
    encoded = png(drawn)
    small = execute.small_png(encoded)
    assert len(small) < len(encoded) / 2
    assert execute.small_png(small) == small
    again = Image.open(io.BytesIO(base64.b64decode(small))).convert("RGBA")
    assert again.getpixel((60, 30))[3] == 0
    assert max(abs(a - b) for a, b in zip(again.getpixel((0, 0)), drawn.getpixel((0, 0)))) < 12


def test_the_setup_cell_goes_where_gpt3lib_is_imported():
    book = new_notebook(cells=[new_markdown_cell("# T"), new_code_cell("import torch")])
    execute.normal_form(book)
    assert len(book.cells) == 2
    book.cells[1].source = "from gpt3lib import GPT"
    execute.normal_form(book)
    assert [cell.cell_type for cell in book.cells] == ["markdown", "code", "code"]
    assert book.cells[1].metadata.tags == ["remove-cell", "setup"]
    book.cells[1].source = "an old address"
    execute.normal_form(book)
    assert book.cells[1].source == execute.setup_source()
    assert f"git+{execute.settings()['repository']['url']}@main" in execute.setup_source()


def test_a_run_that_fails_leaves_the_notebook_as_it_was(tmp_path):
    path = tmp_path / "x.ipynb"
    nbformat.write(new_notebook(cells=[new_code_cell("print(1)"), new_code_cell("1 / 0")]), path)
    before = path.read_bytes()
    with pytest.raises(CellExecutionError, match="division by zero"):
        execute.execute(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["x.ipynb"]


def test_a_second_run_stores_the_same_bytes(tmp_path):
    path = tmp_path / "x.ipynb"
    cells = [
        new_code_cell("import sys\nprint(1)\nprint(2)"),
        new_code_cell("1 / 0", metadata={"tags": ["raises-exception"]}),
    ]
    nbformat.write(new_notebook(cells=[*cells, new_code_cell("object")]), path)
    execute.execute(path)
    once = path.read_bytes()
    execute.execute(path)
    assert path.read_bytes() == once
    assert form.uncounted(form.read(path)) == form.not_normal(form.read(path)) == []


def test_a_traceback_names_no_place():
    text = f"File {ROOT}/gpt3lib/model.py:3 <object at 0x7f00aa11bb22>"
    assert execute.without_places(text) == "File gpt3lib/model.py:3 <object at 0x…>"


# --- the environment ---


def pins(text):
    """Package -> version, of the lines of constraints.txt."""
    return {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in text.split()}


def needed(project):
    """Every distribution that the installed project needs with its extras book and test, by their metadata."""
    found, queue = set(), [(project, "book"), (project, "test")]
    while queue:
        name, extra = queue.pop()
        if (name, extra) in found:
            continue
        found.add((name, extra))
        try:
            requirements = requires(name) or []
        except PackageNotFoundError:
            continue
        for requirement in map(Requirement, requirements):
            environment = default_environment() | {"extra": extra}
            if requirement.marker is None or requirement.marker.evaluate(environment):
                queue += [(canonicalize_name(requirement.name), extra) for extra in ["", *requirement.extras]]
    return {name for name, _ in found} - {project}


def test_constraints_pin_every_dependency():
    pinned = pins((ROOT / "constraints.txt").read_text())
    assert needed("gpt3lib") - set(pinned) == set()
    assert "torch" in pinned and "sphinx" in needed("gpt3lib")


def test_the_environment_has_the_pinned_versions():
    pinned = pins((ROOT / "constraints.txt").read_text())
    found = {name: distribution(name).version.split("+")[0] for name in needed("gpt3lib")}
    assert {name: version for name, version in found.items() if pinned.get(name) != version} == {}


def conda_problems(environment, project):
    """What in environment.yml does not follow from pyproject.toml."""
    python, pip = environment["dependencies"][0], environment["dependencies"][-1]
    least = project["requires-python"].removeprefix(">=")
    wrong = [] if python == f"python={least}" else [f"{python}, but the project asks for {least}"]
    if pip != {"pip": ["-c constraints.txt", f"-e .[{','.join(project['optional-dependencies'])}]"]}:
        wrong.append("pip does not install the project with its extras and its constraints")
    return wrong


def test_environment_yml_is_in_step_with_pyproject():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert conda_problems(environment, PROJECT) == []
    assert conda_problems(environment, PROJECT | {"requires-python": ">=3.12"})
    assert conda_problems({"dependencies": ["python=3.11", {"pip": ["-e ."]}]}, PROJECT)


# --- the repository ---


def test_no_file_names_a_place_on_one_machine():
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True
    )
    wrong = []
    for name in filter(None, listed.stdout.split("\0")):
        try:
            text = (ROOT / name).read_text(encoding="utf-8")
        except (UnicodeDecodeError, FileNotFoundError):
            continue
        wrong += [f"{name} {problem}" for problem in form.places(text)]
    assert wrong == []


def test_a_place_on_one_machine_is_found():
    for place in ("/ro" + "ot/x", "/ho" + "me/anna/x", "/Us" + "ers/Anna/y", f"{ROOT}/gpt3lib"):
        assert form.places(f"see {place}")
    assert form.places("see /usr/bin/env and the root/home of it") == []


def test_the_repository_address_stands_in_one_place():
    url = execute.settings()["repository"]["url"]
    listed = subprocess.run(
        ["git", "grep", "-l", "--untracked", "-F", url.removeprefix("https://")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode > 1:
        pytest.skip("not a git checkout")
    by_hand = [name for name in listed.stdout.split() if not re.fullmatch(r"book/\w+\.ipynb", name)]
    assert by_hand == ["_config.yml"]


def test_the_exporter_says_what_it_finds():
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "export.py"), "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "each as its chapter has it" in done.stdout
