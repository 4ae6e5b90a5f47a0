"""A function runs in several processes at once; their answers come back, or an error
that names the rank."""

# Made from book/n_processes.ipynb by tools/export.py; edit the chapter.
import ast
import faulthandler
import inspect
import io
import linecache
import multiprocessing
import os
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterable
from datetime import timedelta
from importlib import import_module
from multiprocessing import connection

import torch
import torch.distributed as dist

from gpt3lib.files import Refusal


class RankError(Refusal, RuntimeError):
    """A rank that failed, died, or did not answer in time."""


def check_guarded() -> None:
    """Raise RankError in a rank that is still reading the script that started it."""
    reads = getattr(multiprocessing.current_process(), "_inheriting", False)
    words = "a script starts its processes below `if __name__ == '__main__':`"
    RankError.unless(not reads, words)


PRELOAD = "fsdp tensor.parallel pipelining".split()  # of torch.distributed


def starter():
    """How processes begin: where it works, as copies of one that knows torch."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([f"torch.distributed.{name}" for name in PRELOAD])
    return context


def cells_run() -> list[str]:
    """The sources of a notebook's cells, as Python keeps them for its tracebacks."""
    kept = linecache.cache.items()
    marks = ("ipykernel_", "<ipython-input")
    cells = [entry for name, entry in kept if any(mark in name for mark in marks)]
    return ["".join(entry[2]) for entry in cells if len(entry) == 4]


def own_cell(thing) -> list[str]:
    """The cell that a function, or a class with one, comes from; none for others."""
    parts = [thing, *vars(thing).values()] if inspect.isclass(thing) else [thing]
    names = [part.__code__.co_filename for part in parts if inspect.isfunction(part)]
    found = ["".join(linecache.getlines(name)) for name in names]
    return [text for text in found if text][:1]


def definition_of(name: str, cells: list[str]) -> ast.stmt | None:
    """The latest definition of a name in cells: a function, a class, a CONSTANT."""
    for cell in reversed(cells):
        for node in reversed(ast.parse(cell).body):
            targets = getattr(node, "targets", []) if name.isupper() else []
            if name in [getattr(x, "id", None) for x in targets]:
                return node
            if getattr(node, "name", None) == name:
                return node
    return None


def import_of(name: str, thing) -> str | None:
    """The line that imports a thing by this name; None when no module has it."""
    home, own = getattr(thing, "__module__", None), getattr(thing, "__qualname__", None)
    if inspect.ismodule(thing):
        return f"import {thing.__name__} as {name}"
    known = home and own and home != "__main__"
    return f"from {home} import {own} as {name}" if known else None


def source_of(names: Iterable[str], space: dict, cells: list[str]) -> str:
    """The source of what has these names in a notebook, and of all that it needs.

    space: the notebook's names and what they stand for. Values do not come along, but
    CONSTANTS do: give values as arguments.
    """
    seen, parts = set(), ["from __future__ import annotations"]

    def take(name: str) -> None:
        if name in seen or name not in space:
            return
        seen.add(name)
        line = import_of(name, space[name])
        places = [*cells, *own_cell(space[name])]
        node = None if line else definition_of(name, places)
        for inner in ast.walk(node) if node else ():
            if isinstance(inner, ast.Name):
                take(inner.id)
        if line or node:
            parts.append(line or ast.unparse(node))

    for name in names:
        take(name)
    return "\n".join(parts)


def as_bytes(answer) -> bytes:
    """An answer as torch.save packs it."""
    buffer = io.BytesIO()
    torch.save(answer, buffer)
    return buffer.getvalue()


def from_bytes(packed: bytes):
    """The answer again; nothing in it is run."""
    return torch.load(io.BytesIO(packed), weights_only=True)


def is_there(pid: int) -> bool:
    """Whether a process lives; True where one cannot ask."""
    try:
        return os.name != "posix" or os.kill(pid, 0) is None
    except ProcessLookupError:
        return False


def leave_with_parent() -> None:
    """End this process when the one that started it is gone."""
    parent = multiprocessing.parent_process()
    while is_there(parent.pid) and not connection.wait([parent.sentinel], 1):
        pass
    os._exit(1)


LOOPBACK = {"linux": "lo", "darwin": "lo0"}


def join_ranks(folder: str, rank: int, n: int, timeout: float) -> None:
    """Meet the other ranks through a file in the folder."""
    if sys.platform in LOOPBACK:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK[sys.platform])
    store = dist.FileStore(os.path.join(folder, "meeting"), n)
    ways = {"store": store, "rank": rank, "world_size": n}
    patience = timedelta(seconds=timeout + 60)  # the parent is the judge
    dist.init_process_group("gloo", timeout=patience, **ways)


def one_rank(pipe, source: str, task: bytes, *meeting) -> None:
    """What a rank does: meet the others, work, answer, and wait to be ended.

    source: what the task needs of a notebook; task: a function and its arguments.
    """
    threading.Thread(target=leave_with_parent, daemon=True).start()
    # and where no thread of Python gets its turn any more, this one does
    faulthandler.dump_traceback_later(meeting[-1] + 120, exit=True)
    torch.set_num_threads(1)
    try:
        exec(source, vars(sys.modules["__main__"]))
        worker, arguments = torch.load(io.BytesIO(task), weights_only=False)  # ours
        join_ranks(*meeting)
        packed = as_bytes((True, worker(*arguments)))
        from_bytes(packed)  # what nobody could read is an error of ours
    except BaseException:
        packed = as_bytes((False, traceback.format_exc()))
    sys.stdout.flush(), sys.stderr.flush()
    pipe.send_bytes(packed)
    connection.wait([pipe])  # others may still need us; the parent ends us all
    os._exit(0)  # at once: threads of gloo may still hold tensors


def answer_of(rank: int, pipes: list, processes: list):
    """What one rank answered. Raises RankError for an error, or for nothing."""
    try:
        (fine, answer), patience = from_bytes(pipes[rank].recv_bytes()), 0.3
    except (EOFError, ConnectionError):
        fine, answer, patience = False, "", 5
    ends = [process.sentinel for process in processes]
    # a death breaks connections, so that others fail: the one that died is at fault
    for end in [] if fine else connection.wait(ends, patience):
        dead = ends.index(end)
        processes[dead].join()
        words = f"rank {dead} died without an answer, exit code"
        raise RankError(f"{words} {processes[dead].exitcode}")
    RankError.unless(fine, f"rank {rank} failed:\n{answer}")
    return answer


def gathered(pipes: list, processes: list, timeout: float) -> list:
    """The answers of all ranks. Raises RankError at the first that has none."""
    answers, end = {}, time.monotonic() + timeout
    while len(answers) < len(pipes):
        late = [rank for rank in range(len(pipes)) if rank not in answers]
        left = max(0, end - time.monotonic())
        ready = connection.wait([pipes[rank] for rank in late], left)
        words = f"after {timeout:g} s no answer of rank {', '.join(map(str, late))}"
        RankError.unless(ready, f"{words}; all ranks were ended")
        for rank in [rank for rank in late if pipes[rank] in ready]:
            answers[rank] = answer_of(rank, pipes, processes)
    return [answers[rank] for rank in range(len(pipes))]


def from_notebook(worker, arguments: tuple) -> str:
    """What a task needs of a notebook, as source; nothing for a module's function."""
    main = sys.modules["__main__"]
    if worker.__module__ != "__main__":
        return ""
    names = [worker.__name__, *(type(argument).__name__ for argument in arguments)]
    return source_of(names, vars(main), cells_run())


def together(n: int, worker, *arguments, timeout: float = 120) -> list:
    """worker(*arguments) in n new processes that can talk; their answers, by rank.

    worker: a function of a module or of a notebook; inside it torch.distributed is
    ready (gloo, one thread each). It returns numbers, strings, tensors, or lists,
    tuples and dicts of them. Raises RankError when a rank fails, dies, or has not
    answered after `timeout` seconds. No process stays behind.
    """
    check_guarded()
    n, context = RankError.unless_whole("n", n), starter()
    begin = import_module("gpt3lib.processes").one_rank  # a page's own has no address
    source, task = from_notebook(worker, arguments), as_bytes((worker, arguments))
    pipes, processes = [], []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        try:
            for rank in range(n):
                ours, theirs = context.Pipe()
                inputs = (theirs, source, task, folder, rank, n, timeout)
                process = context.Process(target=begin, args=inputs, daemon=True)
                process.start()
                theirs.close()
                pipes.append(ours), processes.append(process)
            return gathered(pipes, processes, timeout)
        finally:
            for process in processes:
                process.kill()
                process.join()
