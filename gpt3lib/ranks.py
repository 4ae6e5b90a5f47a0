"""torchrun's processes: how they meet, give signs of life, and say which of them is
at fault."""

# Made from book/o_ranks.ipynb by tools/export.py; edit the chapter.
import gc
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from gpt3lib.files import Refusal, as_float
from gpt3lib.processes import RankError


# What is refused.
def check_patience(patience) -> float:
    """How long a rank may make no progress, in seconds. Raises RankError."""
    words = f"patience is {patience!r}; it must be seconds above 0"
    RankError.unless(as_float(patience) > 0, words)
    return as_float(patience)


def check_launched() -> None:
    """Raise RankError unless torchrun has told this process its place."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = ", ".join(name for name in names if name not in os.environ)
    right = "start it with torchrun --nproc-per-node N"
    RankError.unless(not missing, f"the environment has no {missing}; {right}")


def meet(store, rank: int, n_ranks: int, seconds: float = 600) -> str:
    """A name that all ranks of this start have, and that no earlier start had.

    Raises RankError, which names those who did not come within so many seconds.
    """
    mine, end = uuid4().hex, time.monotonic() + seconds
    if rank:
        store.set(f"call/{rank}", mine)
        while not store.check([f"answer/{mine}"]):
            words = f"rank 0 of {n_ranks} did not come within {seconds:g} s"
            RankError.unless(time.monotonic() < end, words)
            time.sleep(0.02)
        name = store.get(f"answer/{mine}").decode()
        store.set(f"{name}/{rank}", "here")
        return name
    missing, answered = {*range(1, n_ranks)}, {}
    while missing:
        late = ", ".join(map(str, sorted(missing)))
        words = f"of {n_ranks} ranks these did not come within {seconds:g} s: {late}"
        RankError.unless(time.monotonic() < end, words)
        for other in missing:
            if store.check([f"call/{other}"]):
                word = store.get(f"call/{other}").decode()
                if answered.get(other) != word:
                    store.set(f"answer/{word}", mine)
                    answered[other] = word
        missing = {r for r in missing if not store.check([f"{mine}/{r}"])}
        time.sleep(0.02)
    return mine


class Beat(NamedTuple):
    """One sign of life of a rank."""

    count: int  # so many came before it
    step: int
    what: str  # what it does there, such as "computes"
    age: float  # for so many seconds
    limit: float  # so many may be
    place: str  # the line at which it is
    waits: bool  # there, for other ranks


SILENT = 12  # seconds without a sign of life


def blame(beats: dict[int, Beat], silent: dict[int, float]) -> str:
    """What is wrong with which rank, in words; "" as long as nothing is.

    beats: the last of each rank; silent: the seconds since it came.
    """
    for rank, seconds in silent.items():
        if seconds > SILENT:
            _, step, what, *_ = beats[rank]
            told = f"no sign of life for {seconds:.0f} s; at step {step} it {what}"
            return f"rank {rank} has given {told}"
    if not beats or any(beat.age <= beat.limit for beat in beats.values()):
        return ""
    busy = [rank for rank, beat in beats.items() if not beat.waits]
    rank = min(busy or beats, key=lambda rank: beats[rank].step)
    _, step, what, age, _, place, _ = beats[rank]
    return f"rank {rank} hangs: for {age:.0f} s it {what} at step {step}, in {place}"


def where_now(thread: int) -> tuple[str, bool]:
    """The line at which a thread is, and whether it waits there for other ranks."""
    frame, lines = sys._current_frames().get(thread), []
    while frame is not None:
        code = frame.f_code
        lines.append((code.co_filename, f"{code.co_name}, {{}}:{frame.f_lineno}"))
        frame = frame.f_back
    waits = any(f"{os.sep}distributed{os.sep}" in path for path, _ in lines[:3])
    own = [line for line in lines if f"{os.sep}torch{os.sep}" not in line[0]]
    path, words = next(iter(own or lines), ("?", "{}"))
    return words.format(Path(path).name), waits


class Heart:
    """A thread that gives signs of life of a rank, hears others', and tells a fault.

    store: where all ranks read and write; patience: seconds without progress. After a
    fault the main thread has `grace` seconds to end, then the process is ended.
    """

    def __init__(self, store, rank: int, n_ranks: int, patience=40.0, grace=5.0):
        self.store, self.rank, self.n_ranks = store, rank, n_ranks
        self.patience, self.grace = check_patience(patience), grace
        self.main, self.count, self.heard = threading.get_ident(), 0, {}
        self.step, self.what, self.since = 0, "starts", time.monotonic()
        self.slowest, self.fault, self.ended = 0.0, "", threading.Event()
        self.thread = threading.Thread(target=self.live, daemon=True)
        self.thread.start()

    def at(self, step: int, what: str) -> None:
        """Progress: this rank is at a step, and does something there."""
        now = time.monotonic()
        self.slowest = max(self.slowest, now - self.since)
        self.step, self.what, self.since = step, what, now

    def live(self) -> None:
        """What the thread does, once a second, until the rank ends."""
        while not self.ended.wait(1):
            try:
                self.tell()
                self.listen()
                if self.store.check(["fault"]):
                    self.fault = self.store.get("fault").decode()
            except RuntimeError:  # of the network
                self.fault = "rank 0, or the node that it is on, is gone"
            if self.fault and not self.ended.wait(self.grace):
                words = f"RankError: rank {self.rank} ends: {self.fault}"
                print(words, file=sys.stderr, flush=True)
                os._exit(1)

    def tell(self) -> None:
        """Give a sign of life."""
        self.count += 1
        age = time.monotonic() - self.since
        limit = max(self.patience, 3 * self.slowest)  # a long step is no hang
        place, waits = where_now(self.main)
        beat = Beat(self.count, self.step, self.what, age, limit, place, waits)
        self.store.set(f"beat/{self.rank}", json.dumps(beat))

    def listen(self) -> None:
        """Hear the others, and accuse the one that is silent, or hangs."""
        now, beats = time.monotonic(), {}
        for rank in range(self.n_ranks if self.rank == 0 else 1):
            beats[rank] = Beat(0, 0, "starts", 0, math.inf, "?", False)
            if self.store.check([f"beat/{rank}"]):
                beats[rank] = Beat(*json.loads(self.store.get(f"beat/{rank}")))
            if self.heard.get(rank, (None,))[0] != beats[rank].count:
                self.heard[rank] = beats[rank].count, now
        silent = {rank: now - self.heard[rank][1] for rank in beats}
        if self.rank:  # it hears one only, and cannot tell who waits for whom
            beats = {rank: beat._replace(age=0) for rank, beat in beats.items()}
        if found := blame(beats, silent):
            self.accuse(found)

    def accuse(self, fault: str) -> None:
        """Tell all ranks of a fault; the first one that is told stays."""
        with suppress(RuntimeError):  # nobody can be told any more
            self.store.compare_set("fault", "", fault)

    def why(self, seconds: float = SILENT + 8) -> str:
        """The fault, as soon as somebody has found it; "" if nobody does."""
        end = time.monotonic() + seconds
        while not self.fault and time.monotonic() < end:
            time.sleep(0.1)
        return self.fault


@cache
def open_store(seconds: float = 60) -> dist.Store:
    """The table of words that torchrun's ranks share; some torchruns leave it to us."""
    check_launched()
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    ours = not hosted and os.environ["RANK"] == "0"
    return dist.TCPStore(*place, is_master=ours, timeout=timedelta(seconds=seconds))


def common_store(seconds: float = 600) -> dist.Store:
    """The store of torchrun's ranks, without the words of an earlier start."""
    store, names = open_store(), ("RANK", "WORLD_SIZE")
    name = meet(store, *(int(os.environ[name]) for name in names), seconds)
    return dist.PrefixStore(name, store)


NETWORK = ("gloo", "peer", "nccl", "timed out", "connection", "broken pipe")


def is_echo(error: BaseException) -> bool:
    """Whether an error only says that some other rank is gone."""
    if isinstance(error, CheckpointException):
        return all(is_echo(inner) for inner, _ in error.failures.values())
    known = isinstance(error, RuntimeError) and not isinstance(error, Refusal)
    text = str(error).lower()
    return known and any(word in text for word in NETWORK)


@contextmanager
def joined(device: str = "cpu", patience=None, seconds: float = 600) -> Iterator[Heart]:
    """Inside, this process is one of torchrun's ranks; gives its Heart.

    patience: seconds without progress, after which a rank hangs; else GPT3LIB_PATIENCE
    or 40. seconds: how long to wait for the others at the start. Raises RankError.
    """
    patience = check_patience(patience or float(os.environ.get("GPT3LIB_PATIENCE", 40)))
    store, cuda = common_store(seconds), device == "cuda"
    rank, n_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    ways = {"rank": rank, "world_size": n_ranks}
    ways |= {"timeout": timedelta(seconds=10 * patience)}  # the heart is faster
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, store=dist.PrefixStore("group", store), **ways)
    heart = Heart(dist.PrefixStore("heart", store.clone()), rank, n_ranks, patience)
    heart.device = "cuda" if cuda else "cpu"
    try:
        yield heart
    except BaseException as error:
        fault = heart.why() if is_echo(error) else ""
        told = f"rank {rank}, step {heart.step}: {type(error).__name__}: {error}"
        heart.accuse(fault or told)
        time.sleep(2.5 * (rank == 0))  # the store may end with it: let all hear first
        if fault:
            raise RankError(fault) from error
        raise
    finally:
        heart.ended.set()
        heart.thread.join(5)
    same_for_all(0)  # the store may live in rank 0, which must not be the first to go
    gc.collect()
    dist.destroy_process_group()


def same_for_all(number: int) -> int:
    """The largest of the numbers that the ranks give."""
    told = torch.tensor(number)
    dist.all_reduce(told, dist.ReduceOp.MAX)
    return int(told)


def from_first(work: Callable[[], str]) -> str:
    """What work() says on rank 0; the other ranks wait for it, however long it takes.

    What it raises is raised on rank 0; the others then leave without a word.
    """
    store = common_store()
    if int(os.environ["RANK"]):
        while not store.check(["first"]):
            time.sleep(0.1)
        told = json.loads(store.get("first"))
        if told is None:
            time.sleep(2)  # let the one that knows why say so
            raise SystemExit(2)
        return told
    told = None
    try:
        told = work()
        return told
    finally:
        store.set("first", json.dumps(told))
