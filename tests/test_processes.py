"""Functions in several processes: their answers, and the error when one fails, dies, or is too late."""

import linecache
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from gpt3lib.processes import RankError, source_of, together


def answer(number):
    """What a rank sees: its number, how many there are, what all of them sum to."""
    total = torch.tensor([number + dist.get_rank()])
    dist.all_reduce(total)
    return {"rank": dist.get_rank(), "n": dist.get_world_size(), "sum": total, "threads": torch.get_num_threads()}


def early():
    """Rank 0 is done long before rank 1, which needs it no more."""
    number = torch.tensor([1.0])
    dist.all_reduce(number)
    time.sleep(dist.get_rank())
    return number


def wrong(how, rank, note=None):
    """One rank goes wrong, the others wait for it."""
    if note:
        with open(f"{note}-{dist.get_rank()}", "w") as file:
            file.write(str(os.getpid()))
    if dist.get_rank() == rank:
        if how == "raise":
            raise ValueError("no, thanks")
        if how == "exit":
            os._exit(3)
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "hang":
            time.sleep(60)
        if how == "unpackable":
            return answer
    dist.barrier()
    return 1


def gone(pid):
    """Whether a process has ended; one that nobody has asked about since is a zombie, Z."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z"


def test_answers_come_by_rank():
    for n in (1, 2, 3):
        answers = together(n, answer, 10)
        assert [found["rank"] for found in answers] == [*range(n)]
        total = sum(10 + rank for rank in range(n))
        assert all(found["sum"] == total and found["n"] == n and found["threads"] == 1 for found in answers)


def test_a_rank_may_be_done_early():
    assert together(2, early) == [torch.tensor([2.0])] * 2


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("how, words", [("kill", "died without an answer"), ("raise", "ValueError: no, thanks")])
def test_the_rank_that_fails_is_named(how, words, rank):
    with pytest.raises(RankError, match=rf"(?s)^rank {rank} .*{words}"):
        together(2, wrong, how, rank, timeout=30)


def test_an_exit_code_is_told():
    with pytest.raises(RankError, match="rank 1 died without an answer, exit code 3"):
        together(2, wrong, "exit", 1, timeout=30)


def test_an_answer_that_cannot_be_read_is_an_error():
    with pytest.raises(RankError, match=r"(?s)^rank 1 failed.*test_processes.answer"):
        together(2, wrong, "unpackable", 1, timeout=30)


def test_a_rank_that_hangs_is_named_and_no_process_stays(tmp_path):
    before = time.monotonic()
    with pytest.raises(RankError, match="after 3 s no answer of rank 0, 1; all ranks were ended"):
        together(2, wrong, "hang", 1, tmp_path / "pid", timeout=3)
    assert time.monotonic() - before < 20
    assert all(gone(int(path.read_text())) for path in tmp_path.iterdir()) and len([*tmp_path.iterdir()]) == 2


def test_ranks_leave_with_the_process_that_started_them(tmp_path):
    start = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_processes as t; "
    start += f"t.together(2, t.wrong, 'hang', 0, {str(tmp_path / 'pid')!r}, timeout=60)"
    parent = subprocess.Popen([sys.executable, "-c", start])
    try:
        end = time.monotonic() + 60
        while len([path for path in tmp_path.iterdir() if path.read_text()]) < 2 and time.monotonic() < end:
            time.sleep(0.1)
        ranks = [int(path.read_text()) for path in tmp_path.iterdir()]
        assert len(ranks) == 2 and not any(map(gone, ranks))
    finally:
        parent.kill()
        parent.wait()
    end = time.monotonic() + 20
    while not all(map(gone, ranks)) and time.monotonic() < end:
        time.sleep(0.1)
    assert all(map(gone, ranks))


def test_a_number_of_ranks_must_be_whole():
    for n in (0, -1, 1.5, None):
        with pytest.raises(RankError, match="n is .*; it must be a whole number, 1 or more"):
            together(n, answer, 1)


def test_a_script_that_starts_ranks_while_they_read_it_is_told_so(tmp_path):
    script = tmp_path / "script.py"
    tests = str(Path(__file__).parent)
    lines = [f"import sys; sys.path.insert(0, {tests!r})", "import test_processes as t", "t.together(2, t.answer, 1)"]
    script.write_text("\n".join(lines))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=100)
    assert done.returncode
    assert "RankError: a script starts its processes below `if __name__ == '__main__':`" in done.stderr
    assert "bootstrapping" not in done.stderr  # Python's own words, which come with eighty lines


FIRST = """
import math
import torch.nn.functional as F
from dataclasses import dataclass
from gpt3lib.files import is_whole

FACTOR = 10
small = 3

class Base:
    pass

@dataclass
class Pair(Base):
    x: float

    def larger(self) -> float:
        return FACTOR * self.x

def inner(x):
    return 0
"""
SECOND = """
def inner(pair: Pair) -> list:
    return [math.floor(y) for y in F.relu(torch.tensor([pair.larger()]))]

def outer(pair):
    assert is_whole(3)
    return inner(pair), dist.get_rank()
"""


def test_a_notebooks_function_travels_with_what_it_needs(monkeypatch):
    main = sys.modules["__main__"]
    space = {"__name__": "__main__", "dist": dist, "torch": torch}
    for name in "math F dataclass is_whole FACTOR small Base Pair inner outer".split():
        monkeypatch.setattr(main, name, None, raising=False)  # so that it is taken away again
    for cell in (FIRST, SECOND):
        exec(cell, space)
    for name, thing in space.items():
        if name not in ("__name__", "__builtins__"):
            monkeypatch.setattr(main, name, thing, raising=False)
    for i, cell in enumerate((FIRST, SECOND)):
        entry = (len(cell), None, cell.splitlines(keepends=True), f"/ipykernel_1/{i}.py")
        monkeypatch.setitem(linecache.cache, f"/ipykernel_1/{i}.py", entry)
    source = source_of(["outer"], space, [FIRST, SECOND])
    lines = source.splitlines()
    assert "import torch.nn.functional as F" in lines and "FACTOR = 10" in lines
    assert "from gpt3lib.files import is_whole as is_whole" in lines
    assert source.count("def inner(") == 1 and "return 0" not in source and "small" not in source
    assert (
        source.index("class Base") < source.index("@dataclass") < source.index("def inner") < source.index("def outer")
    )
    assert together(2, main.outer, main.Pair(0.25)) == [([2], 0), ([2], 1)]


def test_a_function_that_was_run_again_is_the_one_that_travels(monkeypatch):
    old, new = "def f():\n    return 1\n", "def f():\n    return 2\n"
    space = {"__name__": "__main__"}
    for i, cell in enumerate((old, new, old)):  # the first cell is run a third time, and its place stays
        name = f"/ipykernel_1/{i % 2}.py"
        monkeypatch.setitem(linecache.cache, name, (len(cell), None, cell.splitlines(keepends=True), name))
        exec(compile(cell, name, "exec"), space)
    assert "return 1" in source_of(["f"], space, [old, new])
