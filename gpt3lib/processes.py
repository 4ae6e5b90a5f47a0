"""A function runs in several processes at once; their answers come back, or an error
that names the rank."""

# Made from book/n_processes.ipynb by tools/export.py; edit the chapter.
import inspect
import io
import multiprocessing
import os
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from datetime import timedelta
from importlib import import_module
from multiprocessing import connection

import torch
import torch.distributed as dist

from gpt3lib.files import Refusal


class RankError(Refusal, RuntimeError):
    """A rank that failed, died, or did not answer in time."""


PRELOAD = "fsdp tensor.parallel pipelining".split()  # of torch.distributed


def starter():
    """How processes begin: where it works, as copies of one that knows torch."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([f"torch.distributed.{name}" for name in PRELOAD])
    return context


def names_in(code) -> Iterator[str]:
    """The names that a function's code looks up, those of inner functions too."""
    yield from code.co_names
    for inner in code.co_consts:
        if inspect.iscode(inner):
            yield from names_in(inner)


def import_of(name: str, thing) -> str | None:
    """The line that imports a thing by this name; None when no module has it."""
    home, own = getattr(thing, "__module__", None), getattr(thing, "__qualname__", None)
    if inspect.ismodule(thing):
        return f"import {thing.__name__} as {name}"
    return f"from {home} import {own} as {name}" if home and own else None


def source_of(function) -> str:
    """The source of a notebook's function, with all that it needs of the notebook.

    Classes and values of the notebook do not come along: give values as arguments.
    """
    found, todo = {}, [function]
    while todo:
        here = todo.pop()
        found[here.__name__] = inspect.getsource(here)
        for name in set(names_in(here.__code__)) - set(found):
            thing = here.__globals__.get(name)
            if getattr(thing, "__module__", None) != "__main__":
                found[name] = import_of(name, thing) or ""
            elif inspect.isfunction(thing):
                todo.append(thing)
    return "\n\n".join(text for text in reversed(found.values()) if text)


def as_function(worker):
    """The function, also of one that travelled as (name, source)."""
    if callable(worker):
        return worker
    name, source = worker
    space = {"torch": torch, "dist": dist}
    exec(source, space)
    return space[name]


LOOPBACK = {"linux": "lo", "darwin": "lo0"}


def as_bytes(answer) -> bytes:
    """An answer as torch.save packs it."""
    buffer = io.BytesIO()
    torch.save(answer, buffer)
    return buffer.getvalue()


def from_bytes(packed: bytes):
    """The answer again; nothing in it is run."""
    return torch.load(io.BytesIO(packed), weights_only=True)


def leave_with_parent() -> None:
    """End this process when the one that started it is gone."""
    connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def join_ranks(folder: str, rank: int, n: int, timeout: float) -> None:
    """Meet the other ranks through a file in the folder."""
    if sys.platform in LOOPBACK:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK[sys.platform])
    store = dist.FileStore(os.path.join(folder, "meeting"), n)
    ways = {"store": store, "rank": rank, "world_size": n}
    patience = timedelta(seconds=timeout + 60)  # the parent is the judge
    dist.init_process_group("gloo", timeout=patience, **ways)


def one_rank(pipe, worker, arguments: tuple, *meeting) -> None:
    """What a rank does: meet the others, work, answer, and wait to be ended."""
    threading.Thread(target=leave_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    try:
        join_ranks(*meeting)
        packed = as_bytes((True, as_function(worker)(*arguments)))
        from_bytes(packed)  # what nobody could read is an error of ours
    except BaseException:
        packed = as_bytes((False, traceback.format_exc()))
    sys.stdout.flush(), sys.stderr.flush()
    pipe.send_bytes(packed)
    connection.wait([pipe])  # others may still need us; the parent ends us all
    os._exit(0)  # at once: threads of gloo may still hold tensors


def answer_of(pipe, process, rank: int):
    """What one rank answered. Raises RankError for an error, or for nothing."""
    try:
        fine, answer = from_bytes(pipe.recv_bytes())
    except (EOFError, ConnectionError):
        process.join(5)
        words = f"rank {rank} died without an answer, exit code {process.exitcode}"
        raise RankError(words) from None
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
            answers[rank] = answer_of(pipes[rank], processes[rank], rank)
    return [answers[rank] for rank in range(len(pipes))]


def together(n: int, worker, *arguments, timeout: float = 120) -> list:
    """worker(*arguments) in n new processes that can talk; their answers, by rank.

    worker: a function of a module or of a notebook; inside it torch.distributed is
    ready (gloo, one thread each). It returns numbers, strings, tensors, or lists,
    tuples and dicts of them. Raises RankError when a rank fails, dies, or has not
    answered after `timeout` seconds. No process stays behind.
    """
    n, context = RankError.unless_whole("n", n), starter()
    begin = import_module("gpt3lib.processes").one_rank  # a page's own has no address
    if worker.__module__ == "__main__":
        worker = (worker.__name__, source_of(worker))
    pipes, processes = [], []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        try:
            for rank in range(n):
                ours, theirs = context.Pipe()
                inputs = (theirs, worker, arguments, folder, rank, n, timeout)
                process = context.Process(target=begin, args=inputs, daemon=True)
                process.start()
                theirs.close()
                pipes.append(ours), processes.append(process)
            return gathered(pipes, processes, timeout)
        finally:
            for process in processes:
                process.kill()
                process.join()
