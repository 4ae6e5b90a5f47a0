"""Small runs of several ranks that die: `torchrun … tests/deadly_ranks.py FOLDER AXES [HOW RANK STEP] …`.

AXES is a layout as JSON, such as '{"fsdp": 2}'. HOW is what happens to RANK at STEP, once in the folder:
step    SIGKILL between its gradient and its update
save    SIGKILL when it has written its pieces of a checkpoint, and not yet told the others
hang    it sleeps for ten minutes
raise   it raises a ValueError
stop    it gets SIGTERM, a polite kill

`python tests/deadly_ranks.py kills FOLDER N` shoots a random rank at N random moments, in a run each.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from gpt3lib import elastic, pipeline, ranks, runs
from gpt3lib.checkpoints import Store
from gpt3lib.loading import Loader
from gpt3lib.model import GPT, GPTConfig
from gpt3lib.parallel import Layout
from gpt3lib.recipe import Recipe

CONFIG = GPTConfig(vocab_size=61, n_ctx=16, n_layers=4, d_model=16, n_heads=4, d_head=4, bandwidth=8)
elastic.measured_peak = lambda *_: 1e9  # measuring takes longer than these runs
NUMBERS = torch.arange(4001)
SOURCES = {"squares": NUMBERS * NUMBERS % 61, "steps": NUMBERS * 7 % 60}
QUIET = {"tensorboard": False, "progress": False}


def parts(n_steps=12):
    """A recipe of about n_steps batches of 8 sequences, the first ones smaller and uneven, and a loader."""
    batch = 8 * CONFIG.n_ctx
    ramp = {"first_batch_tokens": 3 * CONFIG.n_ctx, "ramp_tokens": 3 * batch, "warmup_tokens": 2 * batch}
    recipe = Recipe.scaled(n_steps * batch, 1e-2, batch, **ramp)
    return recipe, Loader(SOURCES, {"squares": 2, "steps": 1}, CONFIG.n_ctx, seed=3)


def alone(folder, n_steps=12, **options):
    """The same run in one process. Returns its state and model."""
    recipe, loader = parts(n_steps)
    model = GPT(CONFIG, 1)
    keep = Store(folder, keep_last=100)
    return runs.run(model, recipe.optimizer(model), loader, keep, recipe, save_every=2, **QUIET | options), model


class Overheard(Loader):
    """A loader that remembers which sequences were asked for."""

    asked = ()

    def sequences(self, first, count):
        """Loader's, and a note."""
        self.asked = [*self.asked, *range(first, first + count)]
        return super().sequences(first, count)


def share(folder, axes, n_steps=12, heart=None, on_step=None, **options):
    """What each rank does: its share of the run. Returns its losses and the sequences that it read."""
    recipe, loader = parts(n_steps)
    loader = Overheard(loader.sources, {"squares": 2, "steps": 1}, loader.n_ctx, loader.seed)
    options = {"save_every": 2} | QUIET | options
    store = Store(folder, keep_last=100)
    ways = {"seed": 1, "heart": heart, "on_step": on_step}
    state = elastic.run_together(CONFIG, Layout(**axes), loader, store, recipe, **ways, **options)
    return {"losses": state.losses, "step": state.step, "read": [*loader.asked], "passed": state.passed}


def bad_luck(folder, strokes):
    """What befalls this rank: strokes are (how, rank, step), each once in the folder. Returns an on_step."""
    now, mine = [0], [stroke for stroke in strokes if int(stroke[1]) == int(os.environ["RANK"])]

    def strike(kinds):
        for how, rank, step in mine:
            told = Path(folder) / f"struck-{how}-{rank}"
            if how in kinds and now[0] >= int(step) and not told.exists():
                told.write_text(f"{now[0]}")
                if how == "hang":
                    time.sleep(600)
                if how == "raise":
                    raise ValueError("a bad day")
                os.kill(os.getpid(), signal.SIGTERM if how == "stop" else signal.SIGKILL)

    def before(function, kind):
        def wrapped(*arguments, **named):
            strike([kind])
            return function(*arguments, **named)

        return wrapped

    pipeline.step_if_finite = before(pipeline.step_if_finite, "step")
    elastic.sha256 = before(elastic.sha256, "save")

    def on_step(number, team):
        now[0] = number
        if "PAUSE" in os.environ:  # so that there is time to shoot
            time.sleep(float(os.environ["PAUSE"]))
        strike(["hang", "raise", "stop"])

    return on_step


def main(folder, axes, *strokes):
    """What torchrun starts."""
    torch.set_num_threads(1)
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / f"pid-{os.environ['RANK']}").write_text(f"{os.getpid()}")
    on_step = bad_luck(folder, [*zip(*[iter(strokes)] * 3)])
    with ranks.joined("cpu") as heart:
        share(folder, json.loads(axes), heart=heart, on_step=on_step)


TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def torchrun(n, *arguments, restarts=0, timeout=240, **environment):
    """Start n ranks of this file; wait for their end. Returns the finished process with its output."""
    command = [*TORCHRUN, "--nproc-per-node", str(n), "--max-restarts", str(restarts), "--standalone"]
    process = subprocess.Popen([*command, __file__, *map(str, arguments)], **as_text(environment))
    return finished(process, timeout)


def as_text(environment):
    """How Popen starts a group of its own, whose output is one text."""
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    own |= {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    ways = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    return ways | {"env": os.environ | own | environment}


def finished(process, timeout):
    """Wait for a process; end all of its group when it takes too long."""
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        for pid in descendants(process.pid):
            os.kill(pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"not done after {timeout} s:\n{output[-3000:]}") from None
    return subprocess.CompletedProcess(process.args, process.returncode, output)


def descendants(pid):
    """A process and all that it has started."""
    found = [pid]
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            continue
        if parent == pid:
            found += descendants(int(path.parent.name))
    return found


def kill_at_random(folder, seed, n=2, axes=None, timeout=240):
    """Shoot a random rank of a run at a random moment; torchrun starts all again. Returns rank and step of the shot."""
    dice, folder = random.Random(seed), Path(folder)
    command = [*TORCHRUN, "--nproc-per-node", str(n), "--max-restarts", "2", "--standalone"]
    command += [__file__, str(folder), json.dumps(axes or {"fsdp": n})]
    process = subprocess.Popen(command, **as_text({"PAUSE": "0.1"}))
    rank, log, end = dice.randrange(n), folder / "log.csv", time.monotonic() + timeout
    while not log.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(dice.uniform(0, 2))
    step = len(log.read_text().splitlines())
    os.kill(int((folder / f"pid-{rank}").read_text()), signal.SIGKILL)
    result = finished(process, timeout)
    assert result.returncode == 0, result.stdout[-3000:]
    return rank, step


def differences(folder, right) -> list[str]:
    """What a run left that another did not: rows of the log, tensors; empty when all is equal to the last bit."""
    rows = [[r.split(",")[:6] for r in (Path(f) / "log.csv").read_text().splitlines()] for f in (folder, right)]
    found = [] if rows[0] == rows[1] else ["log.csv"]
    ends = [Store(f).latest() for f in (folder, right)]
    for kind in ("model", "optimizer"):
        ours, theirs = (end.tensors(kind) for end in ends)
        found += [name for name in {*ours} | {*theirs} if not torch.equal(ours[name], theirs[name])]
    return found


if __name__ == "__main__":
    if sys.argv[1] == "kills":
        place = Path(sys.argv[2])
        torchrun(2, place / "right", '{"fsdp": 2}')
        for seed in range(int(sys.argv[3])):
            shot = kill_at_random(place / f"{seed}", seed)
            print(json.dumps({"seed": seed, "shot": shot, "wrong": differences(place / f"{seed}", place / "right")}))
    else:
        main(*sys.argv[1:])
