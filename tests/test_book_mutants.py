"""The tool that breaks the library on purpose: what it changes, and what it calls caught."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mutants

ROOT = Path(__file__).resolve().parent.parent

TOY = '''"""A toy: 1 + 1 in words is not touched."""
import torch


def area(width: "1 + 1", height=2, *, scale=1.5) -> "a < b":
    if width < 0 and height != 0:
        raise ValueError(f"width is {width + 1}, " + "not 1")
    # é: positions count bytes
    return torch.sum(width * height, dim=-1) + scale


def walk(values, first):
    total = 0
    while total not in values[first:]:
        total += 1
    return (values.clamp(min=0)).tril().transpose(0, 1)
'''
EXPECTED = """height=2 -> height=3
scale=1.5 -> scale=3.0
width < 0 -> width <= 0
width < 0 -> width < 1
!= 0 -> == 0
if width < 0 and height != 0: -> if width < 0 or height != 0:
if width < 0 and height != 0: -> if (width < 0):
if width < 0 and height != 0: -> if (height != 0):
if width < 0 and height != 0: -> if False:
width * height -> width / height
torch.sum -> torch.mean
dim=-1 -> dim=0
dim=-1 -> dim=-2
height, dim=-1) -> height)
return torch.sum(width * height, dim=-1) + scale -> return torch.sum(width * height, dim=-1)
return torch.sum(width * height, dim=-1) + scale -> return None
not in values -> in values
[first:] -> [first + 1:]
[first:] -> [first:-1]
total += 1 -> total -= 1
total += 1 -> pass
tril -> triu
transpose(0, 1) -> transpose(0, 2)
.transpose(0, 1) -> 
clamp(min=0) -> clamp(min=1)
(values.clamp(min=0)) -> (values)"""


def found_in(source: str) -> list[mutants.Mutant]:
    return mutants.mutants_of("toy", source.encode())


def test_every_kind_of_change_is_found():
    changed = {m.apply(TOY.encode()).decode() for m in found_in(TOY)}
    for line in EXPECTED.splitlines():
        old, new = line.split(" -> ")
        assert any(TOY.replace(old, new) == one for one in changed), line


@pytest.mark.parametrize("source", [TOY, (ROOT / "gpt3lib" / "texts.py").read_text(encoding="utf-8")])
def test_a_mutant_is_one_change_that_python_reads(source):
    found, tree = found_in(source), ast.dump(ast.parse(source))
    assert len(found) == len(set(found)) > 40
    for mutant in found:
        changed = mutant.apply(source.encode())
        assert ast.dump(ast.parse(changed)) != tree, mutant
        assert changed.startswith(source.encode()[: mutant.start]) and changed.endswith(source.encode()[mutant.stop :])


def test_words_types_and_messages_stay():
    lines = {number for number, line in enumerate(TOY.splitlines(), 1) if '"' in line and "def" not in line}
    touched = {int(m.describe(TOY.encode()).split()[0].split(":")[1]) for m in found_in(TOY)}
    assert not lines & touched
    assert all('width: "1 + 1"' in m.apply(TOY.encode()).decode() for m in found_in(TOY))


def test_a_verdict_names_module_line_and_both_texts():
    (said,) = {m.describe(TOY.encode()) for m in found_in(TOY) if m.new == "triu"}
    assert said == (
        "toy:16  return (values.clamp(min=0)).tril().transpose(0, 1)"
        "  ->  return (values.clamp(min=0)).triu().transpose(0, 1)"
    )


def test_mutants_by_hand_fit_their_modules():
    for module in {module for module, _, _ in mutants.BY_HAND}:
        mutants.mutants_of(module, (ROOT / "gpt3lib" / f"{module}.py").read_bytes())


def test_a_mutant_by_hand_that_fits_nowhere_is_an_error(monkeypatch):
    monkeypatch.setattr(mutants, "BY_HAND", [("toy", "no such text", "")])
    with pytest.raises(mutants.MutantError, match="toy.py holds 'no such text' 0 times"):
        found_in(TOY)


@pytest.fixture
def project(tmp_path):
    """A project of three modules: tests that see everything, tests that see nothing, and one to hang by hand."""
    for name in ("gpt3lib", "tests", "book", "data"):
        (tmp_path / name).mkdir()
    shutil.copytree(ROOT / "tools", tmp_path / "tools", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "tools" / "mutant_list.py").write_text('BY_HAND = [("endless", "pass", "while True: pass")]\n')
    (tmp_path / "gpt3lib" / "__init__.py").touch()
    for name, body, test in [
        ("strong", "return a + b", "assert strong.f(3, 5) == 8"),
        ("weak", "return a + b", "weak.f(3, 5)"),
        ("endless", "pass", "endless.f(3, 5)"),
    ]:
        (tmp_path / "gpt3lib" / f"{name}.py").write_text(f"def f(a, b):\n    {body}\n")
        test = f"from gpt3lib import {name}\n\n\ndef test_f():\n    {test}\n"
        (tmp_path / "tests" / f"test_{name}.py").write_text(test)
    return tmp_path


def run(project, *options):
    command = [sys.executable, "tools/mutants.py", *options]
    return subprocess.run(command, cwd=project, capture_output=True, text=True)


def test_strong_tests_catch_and_weak_ones_do_not(project):
    done = run(project, "strong", "weak")
    assert done.returncode == 1, done.stderr
    verdicts = [line for line in done.stdout.splitlines() if "->" in line]
    assert [line[:6] for line in verdicts if "strong:2  return" in line] == ["caught"] * 3
    assert [line[:6] for line in verdicts if "weak:2  return" in line] == ["LIVES "] * 3
    assert (project / "gpt3lib" / "weak.py").read_text().endswith("return a + b\n")  # only the copy was changed


def test_time_ends_a_loop_and_that_is_caught(project):
    done = run(project, "endless", "--own", "--limit", "5")
    assert done.returncode == 0 and "1 of 1 mutants caught" in done.stdout, done.stderr
    assert "endless:2  pass  ->  while True: pass" in done.stdout


def test_red_tests_are_an_error_before_any_mutant(project):
    (project / "tests" / "test_weak.py").write_text("def test_f():\n    assert False\n")
    done = run(project, "weak", "--own")
    assert done.returncode == 1 and "mend that first" in done.stderr and "LIVES" not in done.stdout
