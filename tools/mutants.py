"""Break the library on purpose and see whether the tests notice.

python tools/mutants.py                every mutant; exits 1 when more than one in twenty lives
python tools/mutants.py attention      the mutants of one module
python tools/mutants.py --sample 20    twenty of all, drawn at random; the seed is printed

Each mutant is one change in one place of gpt3lib, made in a copy of the project. The test that compares gpt3lib with
the chapters would see any change, so it is left out: what counts is that a test sees the wrong numbers.
"""

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

from mutant_list import MUTANTS

ROOT = Path(__file__).resolve().parent.parent


class MutantError(RuntimeError):
    """A mutant that fits nowhere, or tests that are red without one."""


def copy_project(folder: Path) -> None:
    """The library and its tests, without the tests of the book; what no mutant changes is linked."""
    shutil.copytree(ROOT / "gpt3lib", folder / "gpt3lib", ignore=shutil.ignore_patterns("__pycache__"))
    book_tests = ("__pycache__", "test_book*", "test_site*", "test_race*")
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns(*book_tests))
    for linked in ("data", "book"):
        (folder / linked).symlink_to(ROOT / linked)


def apply(folder: Path, module: str, old: str, new: str) -> None:
    """Make one change in the copy. Raises MutantError unless there is exactly one place for it."""
    path = folder / "gpt3lib" / f"{module}.py"
    source = path.read_text()
    if source.count(old) != 1:
        raise MutantError(f"{module}.py holds {old!r} {source.count(old)} times; a mutant needs exactly one place")
    path.write_text(source.replace(old, new))


def preload() -> None:
    """Import what every test needs and no mutant changes, once; each mutant then runs in a fork."""
    import hypothesis  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import pytest  # noqa: F401
    import tiktoken  # noqa: F401
    import torch
    import transformers  # noqa: F401

    torch.set_num_threads(1)  # a fork must not inherit a pool of threads


def tests_pass(folder: Path, module: str) -> bool:
    """True when the tests of the module, then those of the other modules, pass in a fork of this process."""
    import pytest

    own = folder / "tests" / f"test_{module}.py"
    others = sorted(set((folder / "tests").glob("test_*.py")) - {own})
    child = os.fork()
    if child == 0:
        sys.dont_write_bytecode = True
        sys.path[:0] = [str(folder), str(folder / "tests")]
        os.chdir(folder)
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        flags = ["-x", "-q", "-o", "addopts=", "-p", "no:cacheprovider", f"--rootdir={folder}"]
        os._exit(int(pytest.main([*flags, str(own), *map(str, others)]) != 0))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def survives(mutant: tuple[str, str, str] | None) -> bool:
    """Apply one mutant (or none) to a fresh copy; True when every test still passes."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_project(folder)
        if mutant:
            apply(folder, *mutant)
        return tests_pass(folder, mutant[0] if mutant else "texts")


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="*", choices=[*MUTANTS, []], help="only the mutants of these modules")
    parser.add_argument("--sample", type=int, help="only so many of them, drawn at random")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10_000, help="the seed of the draw")
    options = parser.parse_args()
    chosen = [(m, *change) for m in options.modules or MUTANTS for change in MUTANTS[m]]
    if options.sample:
        print(f"{options.sample} of {len(chosen)} mutants, seed {options.seed}")
        chosen = random.Random(options.seed).sample(chosen, options.sample)
    preload()
    if not survives(None):
        raise MutantError("the tests are red without any mutant; mend that first")
    alive = 0
    for mutant in chosen:
        started = time.perf_counter()
        lives = survives(mutant)
        alive += lives
        module, old, new = mutant
        verdict = "LIVES " if lives else "caught"
        print(f"{verdict} {time.perf_counter() - started:4.0f} s  {module}: {old!r} -> {new!r}", flush=True)
    print(f"{len(chosen) - alive} of {len(chosen)} mutants caught")
    return int(20 * alive > len(chosen))


if __name__ == "__main__":
    sys.exit(main())
