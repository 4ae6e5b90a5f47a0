"""README and front page keep their word: examples run, links lead somewhere, commands exist, chapters are all there."""

import json
import re
import shlex
from pathlib import Path

import nbformat
import pytest
import yaml

import export
from gpt3lib.cli import main

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
FRONT = nbformat.read(ROOT / "book" / "index.ipynb", 4)
ARTICLE = "(https://jalammar.github.io/how-gpt3-works-visualizations-animations/)"


def test_the_example_prints_what_it_says(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})
    text, count = capsys.readouterr().out.rsplit("\n", 2)[:2]
    assert text.startswith(re.search(r"tolist\(\)\)\)  # (.+) …", example)[1]) and len(text) > 60
    assert int(count) == 174_604_259_328 == int(re.search(r"num_params\(\)\)  # (\d+)", example)[1])


def test_the_pairs_become_the_model_that_it_says(tmp_path, monkeypatch, capsys):
    part = README[README.index("### Fine-tune a model on your own pairs") :].partition("\n### ")[0]
    pairs, commands = re.findall(r"```(?:json)?\n(.*?)```", part, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    Path("mine.jsonl").write_text(pairs, encoding="utf-8")
    assert len(commands.splitlines()) == 4
    for line in commands.splitlines():
        command, _, said = line.partition("#")
        assert command.startswith("gpt3 ") and main(shlex.split(command)[1:]) == 0
        out = capsys.readouterr().out
        assert "generate" not in command or out == f"{said.strip()}\n"
    assert (tmp_path / "theirs" / "model.safetensors").is_file()


def test_links_to_files_lead_somewhere():
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", README) if "://" not in target]
    assert len(targets) >= 20
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_make_targets_exist():
    named = set(re.findall(r"\bmake (\w+)", README)) - {"it"}
    assert named >= {"book", "test", "lab", "help"}
    assert [target for target in named if not re.search(rf"^{target}:", MAKEFILE, re.MULTILINE)] == []


def test_the_ratios_are_those_of_the_stored_race():
    race = json.loads((ROOT / "data" / "experiments" / "race.json").read_text())
    parts = [race["step"], race["step"], race["bf16"], race["long"]["2048"], race["long"]["8192"], race["decode"]]
    rows = re.findall(r"^\| [^|]+ \| ((?:transformers|plain) [^|]+) \| ([\d.]+) \|$", README, re.MULTILINE)
    expected = [(name, f"{part['ms'][name] / part['ms']['gpt3lib']:.2f}") for part, (name, _) in zip(parts, rows)]
    assert rows == expected and len(rows) == len(parts)
    assert race["about"]["processor"] in README and race["about"]["date"] in README


# --- the chapters ---


def parts_of_the_book():
    """What a table of the chapters must show: the parts' captions, and below each its notebooks with their titles."""
    rows = []
    for part in yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))["parts"]:
        rows.append(part["caption"])
        for name in (Path(chapter["file"]).name for chapter in part["chapters"]):
            if (path := ROOT / "book" / f"{name}.ipynb").exists() or name[0].isdigit():
                title = nbformat.read(path, 4).cells[0].source.splitlines()[0].removeprefix("# ")
                rows.append((title, f"{name}.ipynb"))
    return rows


def table_rows(text):
    """The parts and chapters of a table of chapters, in its order."""
    found = re.findall(r"^\| (?:\*\*(.+?)\*\* \| \| \||\[([^]]+)\]\((?:book/)?(\w+\.ipynb)\) \|)", text, re.MULTILINE)
    return [part or (title, name) for part, title, name in found]


def front_table():
    """The front page's table, as its cell stored it."""
    outputs = [output for cell in FRONT.cells for output in cell.get("outputs", [])]
    (table,) = [output.data["text/markdown"] for output in outputs if "text/markdown" in output.get("data", {})]
    return table


def test_the_tables_have_every_chapter_in_the_order_of_the_book():
    assert len(parts_of_the_book()) > 20
    assert table_rows(README) == parts_of_the_book()
    assert table_rows(front_table()) == parts_of_the_book()


def test_a_table_that_lacks_or_swaps_a_row_is_seen():
    lines = README.splitlines()
    place = next(i for i, line in enumerate(lines) if line.startswith("| [Attention]"))
    assert table_rows("\n".join(lines[:place] + lines[place + 1 :])) != parts_of_the_book()
    lines[place], lines[place + 1] = lines[place + 1], lines[place]
    assert table_rows("\n".join(lines)) != parts_of_the_book()


def test_each_row_names_the_module_that_its_chapter_makes():
    rows = re.findall(r"^\| \[[^]]+\]\(book/(\w+)\.ipynb\) \| `gpt3lib\.(\w+)` \|", README, re.MULTILINE)
    assert dict(rows) == export.CHAPTERS


# --- the front page ---


def test_the_article_is_linked_in_the_first_sentence():
    assert ARTICLE in FRONT.cells[0].source and "[A20]" in FRONT.cells[0].source
    assert ARTICLE in README[:400].replace("\n", " ")


def test_the_front_page_ends_with_what_is_missing():
    texts = [cell.source for cell in FRONT.cells if cell.cell_type == "markdown"]
    assert texts[-1].split("\n\n")[-1].startswith("Still to come")
    assert not any("Still to come" in text or "missing" in text for text in texts[:-1])


def test_three_ways_in():
    headings = re.findall(r"^### (.+)", "\n".join(cell.source for cell in FRONT.cells), re.MULTILINE)
    assert headings == ["Read", "Run", "Import"] == re.findall(r"^- \*\*(\w+)\*\* ", README, re.MULTILINE)


# --- the commands for Windows, which has no make ---


def windows_commands():
    """The README's commands without make, in the words of the Makefile."""
    (block,) = re.findall(r"```\n *(py -m venv.*?)\n *```", README, re.DOTALL)
    return [
        line.replace(".venv\\Scripts\\", "$(BIN)/").replace('"', "'").replace("py -m", "$(PYTHON) -m")
        for line in map(str.strip, block.splitlines())
    ]


@pytest.mark.parametrize("line", windows_commands())
def test_the_commands_without_make_are_those_of_the_makefile(line):
    recipes = MAKEFILE.replace(" --quiet --disable-pip-version-check", "").replace(" -q > ", " > ")
    recipes = recipes.replace("$(JOBS)", re.search(r"^JOBS \?= (\d+)$", MAKEFILE, re.MULTILINE)[1])
    command = line.removesuffix(" book") if "pytest" in line else line  # on Windows the chapters alone
    assert command in recipes


def test_the_commands_without_make_are_complete():
    assert len(windows_commands()) == 5
