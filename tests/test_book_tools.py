"""The machinery around the book: the package that others install, the commands, the settings of the site."""

import email
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import execute

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
VERSION = PROJECT["version"]
WHOLE = ["gpt3lib", "data", "pyproject.toml", "README.md", "LICENSE"]
PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
ALONE = ["--no-deps", "--no-index"]  # nothing else, and no network


# --- the package that others install ---


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of gpt3lib, made from a copy of the sources that holds what a checkout holds besides."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in WHOLE:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    for stray in ("tests/test_stray.py", "gpt3lib/stray.part", "data/cache/stray.whl", "data/models/stray.zip"):
        (source / stray).parent.mkdir(exist_ok=True)
        (source / stray).write_text("no part of the package\n")
    subprocess.run(
        [*PIP, "wheel", *ALONE, "--no-build-isolation", "--wheel-dir", folder, source], check=True, cwd=folder
    )
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder of its own with the wheel's package, far from the checkout."""
    target = tmp_path_factory.mktemp("installed")
    subprocess.run([*PIP, "install", *ALONE, "--target", target, wheel], check=True)
    return target


def test_the_wheel_holds_the_package_its_data_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name: archive.read(name) for name in archive.namelist()}
    expected = {f"gpt3lib/{path.name}": path for path in (ROOT / "gpt3lib").glob("*.py")}
    data = ROOT / "data"
    for pattern in ("manifest.toml", "*.bpe", "*.txt", "models/*/*", "experiments/*.json"):
        expected |= {f"gpt3lib/_data/{path.relative_to(data).as_posix()}": path for path in data.glob(pattern)}
    info = f"gpt3lib-{VERSION}.dist-info/"
    described = {name for name in names if name.startswith(info)}
    assert set(names) - described == set(expected)
    assert {name for name, path in expected.items() if names[name] != path.read_bytes()} == set()
    assert {info + "METADATA", info + "licenses/LICENSE"} <= described
    assert len(expected) > 20 and wheel.stat().st_size < 45e6


def test_the_wheel_asks_for_the_base_dependencies_alone(wheel):
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(f"gpt3lib-{VERSION}.dist-info/METADATA").decode()
    metadata = email.message_from_string(text)
    base = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert sorted(map(Requirement, base), key=str) == sorted(map(Requirement, PROJECT["dependencies"]), key=str)
    assert metadata["Requires-Python"] == PROJECT["requires-python"] and metadata["Version"] == VERSION


def run_elsewhere(code, package, home):
    """What a script prints as JSON that knows the package from its folder alone, in a home of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "GPT3LIB_CACHE"}
    environment |= {"PYTHONPATH": str(package), "HOME": str(home)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=home, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_an_installed_package_works_elsewhere(installed, tmp_path):
    code = """if True:
        import importlib.metadata, json, gpt3lib, torch
        from gpt3lib import texts
        tokenizer = gpt3lib.Tokenizer.load(texts.DATA / "tokenizer-4353.bpe")
        model = gpt3lib.GPT.from_pretrained(texts.DATA / "models" / "shakespeare-1m")
        prompt = torch.tensor([tokenizer.encode("And it came to pass")])
        tokens = gpt3lib.generate(model, prompt, max_new_tokens=8, temperature=0)
        model.save_pretrained("copy")
        again = gpt3lib.generate(gpt3lib.GPT.from_pretrained("copy"), prompt, max_new_tokens=8, temperature=0)
        print(json.dumps({
            "places": [gpt3lib.__file__, str(texts.DATA)],
            "cache": str(texts.cache_folder()),
            "packages": len(texts.manifest()["packages"]),
            "versions": [gpt3lib.__version__, importlib.metadata.version("gpt3lib")],
            "texts": [tokenizer.decode(made[0].tolist()) for made in (tokens, again)],
        }))
    """
    found = run_elsewhere(code, installed, tmp_path)
    assert all(Path(place).is_relative_to(installed) for place in found["places"])
    assert Path(found["cache"]) == tmp_path / ".cache" / "gpt3lib"
    assert found["packages"] == 12 and found["versions"] == [VERSION, VERSION]
    assert found["texts"] == ["And it came to pass, and came to the king's house"] * 2


def test_every_module_of_an_installed_package_imports(installed, tmp_path):
    code = """if True:
        import importlib, json, pathlib, sys, gpt3lib
        names = sorted(path.stem for path in pathlib.Path(gpt3lib.__file__).parent.glob("*.py"))
        for name in names:
            importlib.import_module("gpt3lib" if name == "__init__" else f"gpt3lib.{name}")
        heavy = {"transformers", "IPython", "pytest", "nbformat"} & set(sys.modules)
        print(json.dumps([names, sorted(heavy)]))
    """
    names, heavy = run_elsewhere(code, installed, tmp_path)
    assert names == sorted(path.stem for path in (ROOT / "gpt3lib").glob("*.py")) and heavy == []


def test_one_version_in_all_papers():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"] == VERSION
    assert re.search(
        rf"^## \[{re.escape(VERSION)}\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE
    )


# --- the commands and the settings ---


def test_every_command_is_explained():
    makefile = (ROOT / "Makefile").read_text()
    commands = next(line for line in makefile.splitlines() if line.startswith(".PHONY:")).split()[2:]
    shown = subprocess.run(["make", "-s"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert commands and all(f"make {command} " in shown for command in commands)


def test_a_python_that_is_too_old_is_refused(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()
    (tmp_path / "book" / "_static").mkdir(parents=True)
    old = tmp_path / "old-python"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done = subprocess.run(["make", "book", f"PYTHON={old}"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode and "needs Python 3.11 or later" in done.stdout
    assert not (tmp_path / ".venv").exists()


def test_pages_show_stored_outputs_and_warnings_are_errors():
    settings = execute.settings()
    assert settings["execute"] == {"execute_notebooks": "off", "stderr_output": "error"}
    assert settings["sphinx"]["config"]["nb_execution_raise_on_error"] is True
    assert "-W -n --keep-going" in (ROOT / "Makefile").read_text()


def test_the_continuous_build_runs_the_two_commands():
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert (ROOT / ".ci" / "run").read_text().split("\n\n")[-1].split() == ["make", "book", "make", "test"]
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "book.yml").read_text())
    assert {"run": ".ci/run"} in workflow["jobs"]["test"]["steps"]
    assert workflow["jobs"]["test"]["strategy"]["matrix"]["os"] == ["ubuntu-latest", "macos-latest"]


def test_the_continuous_build_tries_the_commands_without_make():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```\n *(py -m venv.*?)\n *```", readme, re.DOTALL)
    lines = [line.strip().replace("py -m venv", "python -m venv") for line in block.splitlines()]
    told = [line for line in lines if not line.endswith("lab book")]
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "book.yml").read_text(encoding="utf-8"))
    steps = workflow["jobs"]["windows"]["steps"]
    assert [step["run"] for step in steps if "run" in step] == told


def test_the_torches_that_are_claimed_are_those_that_are_tried():
    """pyproject's bounds are the oldest and the newest of the workflow's job, and CONTRIBUTING tells how it went."""
    (claimed,) = (Requirement(line) for line in PROJECT["dependencies"] if Requirement(line).name == "torch")
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "book.yml").read_text(encoding="utf-8"))
    job = workflow["jobs"]["torch"]
    oldest, newest = map(Version, job["strategy"]["matrix"]["torch"])
    assert {str(part) for part in claimed.specifier} == {
        f">={oldest.major}.{oldest.minor}",
        f"<{newest.major}.{newest.minor + 1}",
    }
    assert {"run": "make test-torch TORCH=${{ matrix.torch }}"} in job["steps"]
    told = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for version in (oldest, newest):
        assert re.search(rf"^make test-torch TORCH={version} +# \d+ passed", told, re.MULTILINE)


def test_other_processors_are_tried_every_week():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "book.yml").read_text(encoding="utf-8"))
    job = workflow["jobs"]["elsewhere"]
    assert "schedule" in job["if"] and {"run": "make test-elsewhere"} in job["steps"]
    assert set(workflow["jobs"]["report"]["needs"]) == set(workflow["jobs"]) - {"report"}


@pytest.mark.parametrize("tool", ["execute", "export"])
def test_a_chapter_that_is_not_there_is_refused(tool):
    command = [sys.executable, str(ROOT / "tools" / f"{tool}.py"), "99_nothing"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "99_nothing; " in done.stderr and "04_attention" in done.stderr and "Traceback" not in done.stderr
