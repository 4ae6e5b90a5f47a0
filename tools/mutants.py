"""Break the library on purpose and see whether the tests notice.

python tools/mutants.py             every mutant; exits 1 when more than one in twenty lives
python tools/mutants.py attention   the mutants of one module

Each mutant is one change of one line of gpt3lib, made in a copy of the project. The test that compares gpt3lib
with the chapters would see any change, so it is left out: what counts is that a test sees the wrong numbers.
"""

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mutant_list import MUTANTS

ROOT = Path(__file__).resolve().parent.parent


def copy_project(folder: Path) -> None:
    """The library and its tests, without the tests of the book; data/ is linked, not copied."""
    shutil.copytree(ROOT / "gpt3lib", folder / "gpt3lib", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__", "test_book*"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    (folder / "data").symlink_to(ROOT / "data")


def run_tests(folder: Path, module: str) -> bool:
    """True when the tests of the module, then those of all modules, pass."""
    tests = [folder / "tests" / f"test_{module}.py"]
    tests += sorted(set(folder.glob("tests/test_*.py")) - {*tests, *folder.glob("tests/test_s*.py")})
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-o", "addopts=", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, *map(str, tests)], cwd=folder, capture_output=True, text=True, timeout=900)
    if done.returncode not in (0, 1, 2):  # 2: the mutant does not even import
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-2000:])
    return done.returncode == 0


def survives(module: str, old: str, new: str) -> bool:
    """Apply one mutant to a fresh copy; True when every test still passes."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_project(folder)
        path = folder / "gpt3lib" / f"{module}.py"
        source = path.read_text()
        if source.count(old) != 1:
            raise RuntimeError(f"{module}.py holds {old!r} {source.count(old)} times; a mutant needs exactly one place")
        path.write_text(source.replace(old, new))
        return run_tests(folder, module)


def main() -> int:
    """The command line."""
    chosen = [mutant for mutant in MUTANTS if not sys.argv[1:] or mutant[0] in sys.argv[1:]]
    alive = []
    for module, old, new in chosen:
        started = time.perf_counter()
        lives = survives(module, old, new)
        alive += [(module, old, new)] if lives else []
        verdict = "LIVES " if lives else "caught"
        print(
            f"{verdict} {time.perf_counter() - started:4.0f} s  {module}: {old.strip()!r} -> {new.strip()!r}",
            flush=True,
        )
    print(f"{len(chosen) - len(alive)} of {len(chosen)} mutants caught")
    return int(20 * len(alive) > len(chosen))


if __name__ == "__main__":
    sys.exit(main())
