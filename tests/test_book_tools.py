"""The machinery around the book: the package that others install, the commands, the settings of the site."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import execute

ROOT = Path(__file__).resolve().parent.parent
WHOLE = ["gpt3lib", "data", "pyproject.toml", "README.md", "LICENSE"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """gpt3lib as a wheel installs it, in a folder of its own, made from a copy of the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    source, target = folder / "source", folder / "target"
    source.mkdir()
    for name in WHOLE:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, source / name)
    quiet = ["--quiet", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    subprocess.run([sys.executable, "-m", "pip", "install", *quiet, "--target", target, source], check=True)
    return target


def test_an_installed_package_carries_its_data(installed, tmp_path):
    code = """if True:
        import gpt3lib, json
        from gpt3lib import GPT, Tokenizer, texts
        tokenizer = Tokenizer.load(texts.DATA / "tokenizer-4353.bpe")
        model = GPT.from_pretrained(texts.DATA / "models" / "gpt3-1m")
        places = [gpt3lib.__file__, str(texts.DATA), str(texts.cache_folder())]
        print(json.dumps([*places, len(texts.manifest()["packages"])]))
        assert tokenizer.decode(tokenizer.encode("a word")) == "a word" and model.num_params() > 1e6
    """
    environment = {name: value for name, value in os.environ.items() if name != "GPT3LIB_CACHE"}
    environment |= {"PYTHONPATH": str(installed), "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    package, data, cache, packages = yaml.safe_load(done.stdout)
    assert Path(package).is_relative_to(installed) and Path(data).is_relative_to(installed)
    assert Path(cache) == tmp_path / ".cache" / "gpt3lib"
    assert packages == 3


def test_an_installed_package_is_small_and_holds_no_cache(installed):
    files = [path for path in installed.rglob("*") if path.is_file()]
    assert not [path for path in files if path.suffix == ".whl" or "cache" in path.parts]
    assert sum(path.stat().st_size for path in files) < 20e6


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


@pytest.mark.parametrize("tool", ["execute", "export"])
def test_a_chapter_that_is_not_there_is_refused(tool):
    command = [sys.executable, str(ROOT / "tools" / f"{tool}.py"), "99_nothing"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "99_nothing; " in done.stderr and "04_attention" in done.stderr and "Traceback" not in done.stderr
