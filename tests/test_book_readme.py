"""The README keeps its word: its example runs, its links lead somewhere, its make targets exist."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_the_example_prints_what_it_says(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})
    text, count = capsys.readouterr().out.rsplit("\n", 2)[:2]
    assert text.startswith("In the beginning") and len(text) > 60
    assert int(count) == 174_604_259_328 == int(re.search(r"print\(GPT\(.*# (\d+)", example)[1])


def test_links_to_files_lead_somewhere():
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", README) if "://" not in target]
    assert len(targets) >= 8
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    named = set(re.findall(r"\bmake (\w+)", README))
    assert named >= {"book", "test", "lab", "help"}
    assert [target for target in named if not re.search(rf"^{target}:", makefile, re.MULTILINE)] == []


def test_the_ratios_are_those_of_the_stored_race():
    race = json.loads((ROOT / "data" / "experiments" / "race.json").read_text())
    parts = [race["step"], race["step"], race["bf16"], race["long"]["2048"], race["long"]["8192"], race["decode"]]
    rows = re.findall(r"^\| [^|]+ \| ((?:transformers|plain) [^|]+) \| ([\d.]+) \|$", README, re.MULTILINE)
    expected = [(name, f"{part['ms'][name] / part['ms']['gpt3lib']:.2f}") for part, (name, _) in zip(parts, rows)]
    assert rows == expected and len(rows) == len(parts)
    assert race["about"]["processor"] in README and race["about"]["date"] in README
