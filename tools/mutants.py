"""Break the library on purpose and see whether the tests notice.

python tools/mutants.py                    twenty mutants of all, drawn at random; the seed is printed
python tools/mutants.py attention --own    twenty of one module, judged by its own test file alone (quick)
python tools/mutants.py texts --sample 0   every mutant of a module

A mutant is one small change in one place of gpt3lib, found in the syntax tree and made in a copy of the project. It is
caught when a test turns red or runs out of time; more than one in ten alive is an error. The tests of the book would
see any change, so they are left out: what counts is that a test sees the wrong numbers.
"""

import argparse
import ast
import builtins
import contextlib
import importlib
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from itertools import accumulate, pairwise
from pathlib import Path
from typing import NamedTuple

import pytest

from mutant_list import BY_HAND

ROOT = Path(__file__).resolve().parent.parent
MEMORY = 6 << 30  # bytes; a mutant that asks for more is caught
PAIRS = """<:<= >:>= ==:!= in:not_in is:is_not +:- *:/ &:| +=:-= *=:/= and:or max:min argmax:argmin amax:amin any:all
    maximum:minimum tril:triu ones:zeros ones_like:zeros_like sum:mean floor:ceil sin:cos cumsum:cumprod add:discard
    softmax:log_softmax startswith:endswith removeprefix:removesuffix append:extend lstrip:rstrip keys:values"""
OTHER = {"//": "/", "%": "//", "**": "*", "@": "*"}
for one, two in (pair.replace("_in", " in").replace("is_", "is ").split(":") for pair in PAIRS.split()):
    OTHER |= {one: two, two: one}

# What no test could see, or every test would.
SAME_WITHOUT = {"cpu", "to", "contiguous", "detach", "item", "fetchall", "close"}  # methods
OPTIONS = {"device", "encoding", "newline", "maxsize", "typed"}  # keywords
EITHER_WAY = {"max", "min", "maximum", "minimum", "equal", "allclose", "isinstance", "transpose"}  # order of arguments
UNTOUCHED = set(dir(builtins)) - {"sorted", "reversed", "abs", "round"}  # functions that are not taken away
BARE = (ast.Name, ast.Attribute, ast.Call, ast.Subscript, ast.Constant, ast.Tuple, ast.List, ast.Dict, ast.JoinedStr)


class MutantError(RuntimeError):
    """A mutant that fits nowhere, or tests that are red without one."""


class Mutant(NamedTuple):
    """Put `new` in the place of bytes start … stop of a module."""

    module: str
    start: int
    stop: int
    new: str

    def apply(self, source: bytes) -> bytes:
        return source[: self.start] + self.new.encode() + source[self.stop :]

    def describe(self, source: bytes) -> str:
        """`module:line  old -> new`, both with the rest of their lines."""
        left, right = source.rfind(b"\n", 0, self.start) + 1, source.find(b"\n", self.stop)
        old, changed = source[left:right], source[left : self.start] + self.new.encode() + source[self.stop : right]
        old, new = (" ".join(words.decode().split()) for words in (old, changed))
        return f"{self.module}:{source[: self.start].count(10) + 1}  {old}  ->  {new}"


class Mutator:
    """Finds the mutants of one module; each is ((start, stop), new text)."""

    def __init__(self, source: bytes):
        self.source, self.tree = source, ast.parse(source)
        self.lines = [0, *accumulate(len(line) for line in source.splitlines(keepends=True))]
        imports = [node for node in ast.walk(self.tree) if isinstance(node, ast.Import | ast.ImportFrom)]
        self.no_values = {"self", "cls"} | {(a.asname or a.name).split(".")[0] for node in imports for a in node.names}

    def span(self, node) -> tuple[int, int]:
        return self.lines[node.lineno - 1] + node.col_offset, self.lines[node.end_lineno - 1] + node.end_col_offset

    def text(self, node) -> str:
        words = self.source[slice(*self.span(node))].decode()
        return words if isinstance(node, BARE) else f"({words})"

    def operator(self, left, right):
        """Another operator between two operands."""
        start, stop = self.span(left)[1], self.span(right)[0]
        between = self.source[start:stop].decode()
        words = between.strip("() \n")
        if words in OTHER:
            start += len(between[: between.index(words)].encode())
            yield (start, start + len(words)), OTHER[words]

    def walk(self, node, parent=None):
        """The mutants of a node and all below it, but not of types, strings and error messages."""
        yield from self.changes(node, parent)
        if isinstance(node, ast.Raise | ast.JoinedStr) or getattr(node, "name", "") == "__repr__":
            return
        for field, value in ast.iter_fields(node):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST) and field not in ("annotation", "returns", "decorator_list"):
                    yield from self.walk(child, node)

    def changes(self, node, parent):
        """The mutants of one node."""
        span, text = self.span, self.text
        match node:
            case ast.Constant(value=bool(value)):
                yield span(node), str(not value)
            case ast.Constant(value=int(n)) if not isinstance(parent, ast.UnaryOp):
                yield from ((span(node), str(m)) for m in ([n // 10] if n > 999 else [n + 1, n - 1] if n else [1]))
            case ast.Constant(value=float(x)):
                yield span(node), repr(2 * x or 1.0)
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int(n))):
                yield from ((span(node), str(m)) for m in (1 - n, -1 - n))
            case ast.UnaryOp(operand=operand):
                yield span(node), text(operand)
            case ast.Compare(left=left, comparators=others):
                for one, two in pairwise([left, *others]):
                    yield from self.operator(one, two)
            case ast.BinOp(left=left, right=right) if not any("'" in text(n) or '"' in text(n) for n in (left, right)):
                yield from self.operator(left, right)
                yield span(node), text(left)
            case ast.BoolOp(values=values):
                yield from self.operator(*values[:2])
                word = " and " if isinstance(node.op, ast.And) else " or "
                yield from ((span(node), word.join(text(v) for v in values if v is not one)) for one in values)
            case ast.If(test=test) | ast.IfExp(test=test) | ast.While(test=test):
                yield span(test), "False"
                if not isinstance(node, ast.While):
                    yield span(test), "True"
            case ast.comprehension(ifs=conditions):
                yield from ((span(test), "True") for test in conditions)
            case ast.Slice(lower=lower, upper=upper, step=None) if lower or upper:
                start, stop = span(node)
                yield (span(lower), f"{text(lower)} + 1") if lower else ((start, start), "1")
                yield (span(upper), f"{text(upper)} - 1") if upper else ((stop, stop), "-1")
            case ast.Call():
                yield from self.calls(node, parent)
            case ast.Return(value=ast.AST() as value) if not isinstance(value, ast.Constant):
                yield span(value), "None"
            case ast.AugAssign(target=target, value=value):
                yield from self.operator(target, value)
                yield span(node), "pass"
            case ast.Raise() if not (isinstance(parent, ast.If) and len(parent.body) == 1):  # else it is `if False`
                yield span(node), "pass"
            case ast.Expr(value=ast.Call(func=ast.Attribute(attr="close"))):
                pass
            case ast.Expr(value=ast.Call()) | ast.Assign(targets=[ast.Subscript()]) | ast.Break() | ast.Continue():
                yield span(node), "pass"
            case ast.With(items=[ast.withitem(context_expr=context, optional_vars=None)]):
                yield span(context), "__import__('contextlib').nullcontext()"
            case ast.FunctionDef(decorator_list=decorators):
                yield from ((span(d), "(lambda same: same)") for d in decorators if isinstance(d, ast.Call))

    def calls(self, node, parent):
        """A twin called instead, the call left out, two arguments exchanged, a keyword dropped."""
        span, text, function = self.span, self.text, node.func
        owner = getattr(function, "value", None)
        name = getattr(function, "attr", getattr(function, "id", ""))
        if name in OTHER:
            yield (span(function)[1] - len(name), span(function)[1]), OTHER[name]
        if not isinstance(parent, ast.Expr) and name not in SAME_WITHOUT and not name[:1].isupper():
            if owner and getattr(owner, "id", "") not in self.no_values and text(owner) != "super()":
                yield span(node), text(owner)
            if len(node.args) == 1 and (owner or name not in UNTOUCHED) and not isinstance(node.args[0], ast.Starred):
                yield span(node), text(node.args[0])
        for one, two in pairwise(node.args):
            if {type(one), type(two)} <= {ast.Name, ast.Attribute} and name not in EITHER_WAY:
                yield (span(one)[0], span(two)[1]), f"{text(two)}, {text(one)}"
        given = sorted([*node.args, *node.keywords], key=span)
        for before, one in pairwise([None, *given]):
            if isinstance(one, ast.keyword) and one.arg and one.arg not in OPTIONS:
                start = self.source.index(b",", span(before)[1]) if before else span(one)[0]
                yield (start, span(given[1])[0] if one is given[0] and len(given) > 1 else span(one)[1]), ""


def mutants_of(module: str, source: bytes) -> list[Mutant]:
    """All mutants of a module, from its tree and by hand. Raises MutantError for one by hand that fits nowhere."""
    mutator = Mutator(source)
    found = [Mutant(module, *span, new) for span, new in mutator.walk(mutator.tree)]
    for old, new in ((old.encode(), new) for where, old, new in BY_HAND if where == module):
        if source.count(old) != 1:
            raise MutantError(f"{module}.py holds {old.decode()!r} {source.count(old)} times, a mutant needs one place")
        found.append(Mutant(module, source.index(old), source.index(old) + len(old), new))
    return [mutant for mutant in dict.fromkeys(found) if mutant.apply(source) != source]


def copy_project(folder: Path) -> None:
    """The library and its tests, without the tests of the book; what no mutant changes is linked."""
    skipped = shutil.ignore_patterns("__pycache__", "test_book*", "test_site*", "test_race*", "test_lab*")
    for name in ("gpt3lib", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=skipped)
    for name in ("book", "data", "tools"):
        (folder / name).symlink_to(ROOT / name)


def tests_pass(folder: Path, tests: list[str], limit: int) -> bool:
    """True when the tests pass, file by file, within `limit` seconds, in a fork of this process."""
    child = os.fork()
    if child == 0:
        os.setsid()  # a group of its own: whatever it starts ends with it
        signal.alarm(limit)
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        sys.path[:0] = [str(folder), str(folder / "tests")]
        sys.dont_write_bytecode = True
        os.environ.update(PYTHONPATH=str(folder), PYTHONDONTWRITEBYTECODE="1")  # for the processes that tests start
        os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # nbval, xdist and the like cost a second a mutant
        os.chdir(folder)
        silent = os.open(os.devnull, os.O_RDWR)
        for stream in range(3):
            os.dup2(silent, stream)
        flags = ["-x", "-q", "-o", "addopts=", "-p", "no:cacheprovider", f"--rootdir={folder}"]
        os._exit(int(pytest.main([*flags, *(f"tests/{name}" for name in tests)]) != 0))
    try:
        return os.waitpid(child, 0)[1] == 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)


def judge(folder: Path, chosen: list[Mutant], own: bool, limit: int | None) -> int:
    """Run the tests of the copy in `folder` against each mutant, print the verdicts, and return how many live."""
    every = [] if own else sorted(path.name for path in folder.glob("tests/test_*.py"))
    firsts = {mutant.module: f"test_{mutant.module}.py" for mutant in chosen}
    started = time.perf_counter()
    if not tests_pass(folder, every or sorted(firsts.values()), 24 * 3600):
        raise MutantError("the tests are red without any mutant; mend that first")
    limit = limit or 20 + 2 * int(time.perf_counter() - started)
    alive = 0
    for mutant in chosen:
        started = time.perf_counter()
        path = folder / "gpt3lib" / f"{mutant.module}.py"
        source = path.read_bytes()
        path.write_bytes(mutant.apply(source))
        compile(path.read_bytes(), path, "exec")  # what is no Python proves nothing
        lives = tests_pass(folder, list(dict.fromkeys([firsts[mutant.module], *every])), limit)
        path.write_bytes(source)
        alive += lives
        verdict = "LIVES " if lives else "caught"
        print(f"{verdict} {time.perf_counter() - started:4.0f} s  {mutant.describe(source)}", flush=True)
    print(f"{len(chosen) - alive} of {len(chosen)} mutants caught")
    return alive


def main() -> int:
    """The command line."""
    known = sorted(path.stem for path in (ROOT / "gpt3lib").glob("[a-z]*.py"))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="*", choices=[*known, []], help="only the mutants of these modules")
    parser.add_argument("--sample", type=int, default=20, help="so many, drawn at random (20); 0 is all")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10_000, help="the seed of the draw")
    parser.add_argument("--own", action="store_true", help="run only the test file of the module that is changed")
    parser.add_argument("--limit", type=int, help="seconds for the tests of one mutant (twice those of none, and 20)")
    options = parser.parse_args()
    for name in ("hypothesis", "matplotlib.pyplot", "tiktoken", "transformers", "torch"):
        importlib.import_module(name)  # once, before the forks: every test needs them and no mutant changes them
    sys.modules["torch"].set_num_threads(1)  # a fork must not inherit a pool of threads
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_project(folder)
        modules = options.modules or known
        found = [m for module in modules for m in mutants_of(module, (folder / f"gpt3lib/{module}.py").read_bytes())]
        chosen = random.Random(options.seed).sample(found, min(options.sample or len(found), len(found)))
        print(f"{len(chosen)} of {len(found)} mutants, seed {options.seed}", flush=True)
        alive = judge(folder, chosen, options.own, options.limit)
    return int(10 * alive > len(chosen))


if __name__ == "__main__":
    sys.exit(main())
