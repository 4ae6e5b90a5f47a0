"""torchrun's ranks: that they meet, also after others died, and that a fault has a name on every one of them."""

import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from gpt3lib.checkpoints import RunError
from gpt3lib.processes import RankError
from gpt3lib.ranks import SILENT, Beat, Heart, blame, check_launched, is_echo, joined, meet, where_now


def all_meet(store, n, seconds=20):
    """n threads, as ranks, meet in a store, the first one last. Returns their names."""
    with ThreadPoolExecutor() as pool:
        return [*pool.map(lambda rank: meet(store, rank, n, seconds), reversed(range(n)))]


# --- meeting ---


@pytest.mark.parametrize("n", [1, 2, 5])
def test_all_ranks_of_a_start_get_one_name(n):
    assert len({*all_meet(dist.HashStore(), n)}) == 1


def test_each_start_has_a_name_of_its_own_and_words_of_the_dead_do_no_harm():
    store, names = dist.HashStore(), set()
    for start in range(4):
        if start:  # one rank called and died before anybody answered
            store.set("call/2", f"dead {start}")
        found = {*all_meet(store, 3)}
        assert len(found) == 1 and not found & names
        names |= found


def test_a_rank_that_calls_again_while_rank_0_waits_is_answered():
    store = dist.HashStore()
    store.set("call/1", "a dead rank's word")
    with ThreadPoolExecutor() as pool:
        first = pool.submit(meet, store, 0, 2, 20)
        time.sleep(0.3)  # by now it has answered the dead one
        assert pool.submit(meet, store, 1, 2, 20).result() == first.result()


def test_who_does_not_come_is_named():
    store = dist.HashStore()
    with ThreadPoolExecutor() as pool:
        there = pool.submit(meet, store, 2, 4, 0.6)
        with pytest.raises(RankError, match="of 4 ranks these did not come within 0.5 s: 1, 3"):
            meet(store, 0, 4, 0.5)
        there.result()
    with pytest.raises(RankError, match="rank 0 of 2 did not come within 0.1 s"):
        meet(dist.HashStore(), 1, 2, 0.1)


# --- who is to blame ---


def beats(**changes):
    """Three ranks that wait for each other at step 7, for longer than they may; changes: rank_1={…}."""
    beat = Beat(9, 7, "computes", 50.0, 40.0, "all_reduce, comm.py:1", True)
    return {rank: beat._replace(**changes.get(f"rank_{rank}", {})) for rank in range(3)}


def test_nobody_is_to_blame_as_long_as_somebody_makes_progress():
    calm = dict.fromkeys(range(3), 1.0)
    assert blame(beats(rank_2={"age": 39.0}), calm) == ""
    assert blame(beats(rank_0={"limit": math.inf}), calm) == ""
    assert blame({}, {}) == ""


def test_a_silent_rank_is_to_blame_first():
    found = blame(beats(rank_1={"waits": False}), {0: 1.0, 1: 1.0, 2: SILENT + 1.0})
    assert found == "rank 2 has given no sign of life for 13 s; at step 7 it computes"
    assert blame(beats(rank_1={"age": 0.0}), {0: 1.0, 1: 1.0, 2: float(SILENT)}) == ""


def test_of_those_that_hang_it_is_the_one_that_does_not_wait():
    calm, busy = dict.fromkeys(range(3), 1.0), {"waits": False, "what": "reads", "place": "read, disk.py:3"}
    assert blame(beats(rank_1=busy), calm) == "rank 1 hangs: for 50 s it reads at step 7, in read, disk.py:3"
    assert blame(beats(rank_1=busy, rank_2=busy | {"step": 6}), calm).startswith(
        "rank 2 hangs: for 50 s it reads at step 6"
    )
    assert blame(beats(rank_2={"step": 6}), calm).startswith("rank 2 hangs")  # all wait: who is behind


def test_where_a_thread_is():
    def asleep():
        time.sleep(0.8)

    thread = threading.Thread(target=asleep)
    thread.start()
    time.sleep(0.2)
    place, waits = where_now(thread.ident)
    thread.join()
    assert place.startswith("asleep, test_ranks.py:") and not waits
    assert where_now(-1) == ("?", False)


def test_an_echo_is_told_from_an_error_of_ones_own():
    gloo = RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:3")
    assert is_echo(gloo) and not is_echo(RuntimeError("size mismatch")) and not is_echo(ValueError("gloo"))
    assert not is_echo(RunError("Connection of the disk is gone"))
    assert is_echo(CheckpointException("save", {1: (gloo, None)}))
    assert not is_echo(CheckpointException("save", {0: (gloo, None), 1: (OSError("full"), None)}))


# --- the heart ---


def test_a_heart_beats_and_the_first_fault_stays():
    store = dist.HashStore()
    heart = Heart(store, 0, 1, patience=40, grace=60)
    heart.at(3, "computes")
    heart.accuse("rank 5 hangs"), heart.accuse("rank 6 hangs")
    assert heart.why() == "rank 5 hangs"
    heart.ended.set(), heart.thread.join(5)
    told = Beat(*json.loads(store.get("beat/0")))
    assert (told.count, told.step, told.what, told.limit) == (heart.count, 3, "computes", 40.0)


def test_a_silent_rank_is_noticed_by_rank_0_and_a_silent_rank_0_by_all(monkeypatch):
    monkeypatch.setattr("gpt3lib.ranks.SILENT", 1.5)
    for listener, dead in ((0, 1), (1, 0)):
        store = dist.HashStore()
        store.set(f"beat/{dead}", json.dumps(Beat(4, 8, "saves", 0, 40, "x", False)))
        heart = Heart(store, listener, 2, grace=60)
        assert heart.why(10).startswith(f"rank {dead} has given no sign of life for"), heart.fault
        assert heart.fault.endswith("at step 8 it saves")
        heart.ended.set(), heart.thread.join(5)


def test_a_step_may_take_three_times_as_long_as_the_slowest_before():
    store = dist.HashStore()
    heart = Heart(store, 0, 1, patience=0.1, grace=60)
    heart.ended.set(), heart.thread.join(5)
    heart.since -= 7
    heart.at(1, "computes")
    heart.tell()
    assert 21 <= Beat(*json.loads(store.get("beat/0"))).limit < 22


@pytest.mark.parametrize("patience", ["soon", 0, -1, math.nan])
def test_patience_that_makes_no_sense(patience):
    with pytest.raises(RankError, match="patience is .*; it must be seconds above 0"):
        Heart(dist.HashStore(), 0, 1, patience)


def test_a_process_that_torchrun_did_not_start(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RankError, match="the environment has no RANK, LOCAL_RANK.*torchrun"):
        check_launched()
    with pytest.raises(RankError, match="the environment has no RANK"), joined():
        pass


# --- real processes, with the environment that torchrun gives ---


def free_port():
    """A port that nobody uses."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return place.getsockname()[1]


def start(n, program, *arguments):
    """n ranks of a program, without torchrun: then rank 0 keeps the store."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    place |= {"WORLD_SIZE": str(n), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    place |= {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    ways = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", program, *arguments]
    own = ({"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(n))
    return [subprocess.Popen(command, env=os.environ | place | rank, **ways) for rank in own]


def ends(processes, timeout=90):
    """Exit code and output of each; all are ended when it takes too long."""
    try:
        return [(*p.communicate(timeout=timeout), p.returncode) for p in processes]
    finally:
        for process in processes:
            process.kill()


FIRST = """
import os, sys
from gpt3lib.ranks import from_first, joined, same_for_all
def work():
    print("working")
    return "seven"
print(from_first(work))
with joined() as heart:
    print(same_for_all(10 + heart.rank), heart.device)
def fail():
    raise ValueError("no such text")
from_first(fail)
"""


def test_rank_0_works_first_and_what_it_raises_is_raised_there_alone():
    (out, error, code), (other, silence, second) = ends(start(2, FIRST))
    assert out.split() == ["working", "seven", "11", "cpu"] and other.split() == ["seven", "11", "cpu"]
    assert "ValueError: no such text" in error and code == 1
    assert "Traceback" not in silence and second == 2


SHOT = """
import sys, time, torch, torch.distributed as dist
from gpt3lib import ranks
ranks.SILENT = 6
with ranks.joined(patience=6) as heart:
    heart.at(5, "computes")
    print("ready", flush=True)
    if heart.rank == int(sys.argv[2]):
        if sys.argv[1] == "hang":
            time.sleep(600)
        if sys.argv[1] == "raise":
            raise ValueError("a bad day")
    if sys.argv[1] != "kill" or heart.rank != int(sys.argv[2]):
        dist.all_reduce(torch.ones(1))
    time.sleep(600)
"""


@pytest.mark.parametrize("how", ["hang", "kill", "raise"])
def test_every_rank_says_who_was_lost(how):
    processes = start(2 if how == "raise" else 3, SHOT, how, "1")
    if how == "kill":
        for process in processes:
            assert process.stdout.readline() == "ready\n"
        time.sleep(4)  # so that a sign of life has told of the step
        os.kill(processes[1].pid, signal.SIGKILL)
    right = {
        "hang": "RankError: .*rank 1 hangs: for [0-9]+ s it computes at step 5, in <module>, <string>:10",
        "kill": "RankError: .*rank 1 has given no sign of life for [0-9]+ s; at step 5 it computes",
        "raise": "RankError: .*rank 1, step 5: ValueError: a bad day",
    }[how]
    for rank, (_, error, code) in enumerate(ends(processes)):
        if rank != 1:
            assert code == 1
            assert re.search(right, error), error


def test_the_loss_of_rank_0_has_a_name_too():
    processes = start(2, SHOT, "kill", "0")
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    processes[0].kill()
    _, error, code = ends(processes)[1]
    assert "RankError: " in error and "rank 0" in error and code == 1


def test_torch_is_left_as_it_was():
    assert not dist.is_initialized() and torch.get_num_threads() >= 1
