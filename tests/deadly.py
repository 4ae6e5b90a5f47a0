"""Small runs that die: `python tests/deadly.py TASK FOLDER …`, a process of its own, so that a kill kills nothing else.

whole FOLDER [STEPS]      run to the end, or go on to it
random FOLDER SEED KILLS  SIGKILL a run after random times, start it again, KILLS times; then run it to the end
events FOLDER FIRST STRIDE   a run that kills itself at its operation FIRST on files, then goes on to the end; another
                          at operation FIRST + STRIDE, and so on, until one lives
signal FOLDER NAME        run, and get this signal in the middle, after the terminal was closed
limit FOLDER BYTES        run where no file can grow beyond so many bytes
"""

import importlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from gpt3lib import checkpoints, runs
from gpt3lib.loading import Loader
from gpt3lib.model import GPT, GPTConfig
from gpt3lib.recipe import Recipe

CONFIG = GPTConfig(vocab_size=61, n_ctx=16, n_layers=2, d_model=16, n_heads=2, d_head=8, bandwidth=8)
measured_peak, runs.measured_peak = runs.measured_peak, lambda *_: 1e9  # measuring takes longer than these runs
NUMBERS = torch.arange(4001)
SOURCES = {"squares": NUMBERS * NUMBERS % 61, "steps": NUMBERS * 7 % 60}


def parts(n_steps=30, seed=1, weights=None, **changes):
    """A model, its optimizer, a loader and a recipe: n_steps batches of 4 sequences, the first ones smaller."""
    model = GPT(CONFIG, seed)
    batch = 4 * CONFIG.n_ctx
    ramp = {"first_batch_tokens": 2 * CONFIG.n_ctx, "ramp_tokens": 3 * batch, "warmup_tokens": 2 * batch}
    recipe = Recipe.scaled(n_steps * batch, 1e-2, batch, **ramp | changes)
    loader = Loader(SOURCES, weights or {"squares": 2, "steps": 1}, CONFIG.n_ctx, seed=3)
    return model, recipe.optimizer(model), loader, recipe


def go(folder, n_steps=30, save_every=3, on_step=None, store=None, **options):
    """A run of these parts in a folder, begun or gone on with. Returns its state and model."""
    model, optimizer, loader, recipe = parts(n_steps)
    options = {"micro_batch": 3, "tensorboard": False, "progress": False} | options
    store = store or checkpoints.Store(folder)
    on_step = on_step or (lambda number, model: {"odd": number % 3} if number % 2 else None)
    return runs.run(model, optimizer, loader, store, recipe, on_step, save_every=save_every, **options), model


def remains(folder) -> dict:
    """What a run left that must be the same each time: the log without its speed, the other logs, all tensors."""
    folder = Path(folder)
    rows = [line.split(",")[:6] for line in (folder / "log.csv").read_text().splitlines()]
    found = checkpoints.Store(folder).latest()
    tensors = {
        f"{kind} {name}": t.tolist() for kind in ("model", "optimizer") for name, t in found.tensors(kind).items()
    }
    texts = {name: (folder / name).read_text() for name in ("extra.jsonl", "notes.txt", "samples.txt")}
    state = {name: value for name, value in found.state["state"].items() if name != "sizes"}
    return {"rows": rows, "tensors": tensors, "texts": texts, "state": state}


def forked(work) -> int:
    """The process id of a copy of this process that does the work and ends. This one must not have used autograd."""
    child = os.fork()
    if not child:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return child


def kill_at_random(folder, seed, kills):
    """Kill a run after random times, `kills` times. Returns at which steps."""
    dice, died = random.Random(seed), []
    importlib.import_module("torch._dynamo")  # else each copy does so at its first step
    for _ in range(kills):
        child = forked(lambda: go(folder, 60, save_every=2, on_step=lambda *_: time.sleep(0.004)))
        time.sleep(dice.uniform(0.05, 0.4))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        log = Path(folder) / "log.csv"
        died.append(len(log.read_text().splitlines()) if log.exists() else 0)
    finish(lambda: go(folder, 60, save_every=2, on_step=lambda *_: None))
    return died


def finish(work) -> int:
    """Do the work in a copy of this process, and wait. Returns its exit code, below 0 for a signal."""
    _, status = os.waitpid(forked(work), 0)
    return os.waitstatus_to_exitcode(status)


def deadly(last):
    """Let this process kill itself at its operation number `last` on files, half-written ones among them."""
    count = [0]

    def operation():
        if count[0] == last:
            os.kill(os.getpid(), signal.SIGKILL)
        count[0] += 1

    def half_first(function, place):
        def wrapped(*arguments, **named):
            operation()
            function(*arguments, **named)
            path = Path(arguments[place])
            whole = path.read_bytes()
            if count[0] == last:
                path.write_bytes(whole[: len(whole) // 2])
            operation()

        return wrapped

    def counted(function):
        def wrapped(*arguments, **named):
            operation()
            return function(*arguments, **named)

        return wrapped

    checkpoints.save_file = half_first(checkpoints.save_file, 1)
    Path.write_text = half_first(Path.write_text, 0)
    for home, name in ((os, "replace"), (os, "fsync"), (os, "mkdir"), (os, "unlink"), (os, "rmdir")):
        setattr(home, name, counted(getattr(home, name)))
    checkpoints.Logs.write = torn(checkpoints.Logs.write, operation)
    checkpoints.Logs.cut = counted(checkpoints.Logs.cut)


def torn(write, operation):
    """Logs.write, which may die after half a line."""

    def wrapped(self, name, text):
        operation()
        self.files[name].write(text[: len(text) // 2].encode())
        self.files[name].flush()
        operation()
        there = os.fstat(self.files[name].fileno()).st_size
        self.files[name].truncate(there - len(text[: len(text) // 2].encode()))
        write(self, name, text)

    return wrapped


def kill_at_events(folder, first, stride):
    """Runs killed at their operations, then gone on with. Returns how many died, and where something differs."""
    importlib.import_module("torch._dynamo")
    os.fsync = lambda handle: None  # slow, and against power cuts only
    folder, wrong, n = Path(folder), [], first
    finish(lambda: go(folder / "whole", 3, 2))
    right = remains(folder / "whole")
    while True:
        place = folder / f"{n}"
        store = checkpoints.Store(place, keep_last=1)
        if finish(lambda: (deadly(n), go(place, 3, 2, store=store))) == 0:  # noqa: B023
            return {"died": (n - first) // stride, "wrong": wrong}
        finish(lambda: go(place, 3, 2, store=store))  # noqa: B023
        left = {path.name.split("-")[0] for path in place.iterdir()}
        if remains(place) != right or left != {"step", "lock", *runs.Journal.FILES}:
            wrong.append([n, sorted(left)])
        n += stride


def get_signal(folder, name):
    """A run that gets a signal after its 7th step, while its terminal is gone."""
    signal.signal(getattr(signal, name), signal.SIG_DFL)  # nohup, under which the tests may run, ignores SIGHUP
    ours, terminal = os.openpty()
    for stream in (1, 2):
        os.dup2(terminal, stream)
    os.close(ours)
    os.close(terminal)  # from now on whoever writes there gets an error

    def on_step(number, model):
        if number == 7:
            os.kill(os.getpid(), getattr(signal, name))

    state, _ = go(folder, save_every=5, on_step=on_step, progress=True)
    (Path(folder) / "ended").write_text(json.dumps([state.step, state.finished]))
    os._exit(0)


def limit(folder, size):
    """A run under a limit of bytes for each file. Prints the error's kind and text."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    try:
        go(folder)
    except runs.RunError as error:
        print(json.dumps(f"{error}"))


def main(task, folder, *more):
    """The command line."""
    torch.set_num_threads(1)
    if task == "whole":
        go(folder, *map(int, more))
    elif task == "random":
        print(json.dumps(kill_at_random(folder, *map(int, more))))
    elif task == "events":
        print(json.dumps(kill_at_events(folder, *map(int, more))))
    elif task == "signal":
        get_signal(folder, *more)
    elif task == "limit":
        limit(folder, *map(int, more))


if __name__ == "__main__":
    main(*sys.argv[1:])
