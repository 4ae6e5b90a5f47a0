"""Ranks that die or hang, and a run that goes on: signs of life, checkpoints for any
layout, torchrun."""

# Made from book/19_many_machines.ipynb by tools/export.py; edit the chapter.
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace

import torch
import torch.distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.elastic.multiprocessing.errors import record

from gpt3lib.checkpoints import Checkpoint, RunError, Stopping, Store, say, writes
from gpt3lib.files import sha256, unwrapped
from gpt3lib.parallel import local
from gpt3lib.pipeline import Team
from gpt3lib.processes import RankError
from gpt3lib.ranks import is_echo, joined, same_for_all
from gpt3lib.runs import Journal, Options, Run, State, bad, description, follow, load


# What is refused; the workshop at the end of this page has a table of it.
def check_together(options: dict) -> None:
    """Raise RunError for options of a run that one process alone can have."""
    right = "`gpt3 generate` reads the run's newest checkpoint meanwhile"
    words = f"sample_every is for a run in one process; {right}"
    RunError.unless(not options.get("sample_every"), words)


class ShardWriter(dcp.HuggingFaceStorageWriter):
    """Writes what this rank holds into a store's next checkpoint, and rank 0 seals it.

    number: steps taken; state: what JSON can hold; kept: it is never deleted.
    """

    def __init__(self, store: Store, number: int, state: dict, kept: bool = False):
        self.store, self.part, self.state = store, store.part(number, kept), state
        super().__init__(str(self.part), save_distributed=True)

    def write_data(self, plan, planner):
        """Write this rank's pieces, and send the hash of its file along."""
        with writes(self.part):
            results = super().write_data(plan, planner).wait()
            names = {result.storage_data.relative_path for result in results}
            hashes = {name: sha256(self.part / name) for name in names}
        done = torch.futures.Future()
        done.set_result([replace(r, storage_data=hashes) for r in results])
        return done

    def finish(self, metadata, results) -> None:
        """All pieces of all ranks lie on the disk: the folder gets its name."""
        hashes = [r.storage_data for of_rank in results for r in of_rank]
        files = sorted({pair for found in hashes for pair in found.items()})
        with writes(self.part):
            self.store.seal(self.part, self.state, dict(files))


def team_names(team) -> dict:
    """Parameter -> its name in the whole model, of those that this rank holds."""
    return {p: unwrapped(name) for name, p in team.named_parameters().items()}


def team_tensors(team, optimizer) -> dict[str, torch.Tensor]:
    """All tensors of a run by name, each as far as this rank holds it."""
    names = team_names(team)
    found = {name: p.detach() for p, name in names.items()}
    for p, kept in optimizer.state.items():
        found |= {f"{key}/{names[p]}": tensor for key, tensor in kept.items()}
    return found


class Saver:
    """Writes checkpoints of a team while it goes on, one at a time."""

    def __init__(self, store: Store):
        self.store, self.group = store, dist.new_group(backend="gloo")
        self.running = None

    def save(self, team, optimizer, number: int, state: dict, kept=False) -> None:
        """Copy now, write meanwhile. Raises RunError, also for the one before."""
        self.wait()
        writer = ShardWriter(self.store, number, state, kept)
        ways = {"storage_writer": writer, "process_group": self.group}
        with named_errors():
            self.running = dcp.async_save(team_tensors(team, optimizer), **ways)

    def wait(self) -> None:
        """Until the last checkpoint lies on the disk. Raises RunError."""
        running, self.running = self.running, None
        if running is not None:
            with named_errors():
                running.result()


@contextmanager
def named_errors() -> Iterator[None]:
    """CheckpointException, which no `except Exception` catches, becomes a RunError."""
    try:
        yield
    except CheckpointException as error:
        if error.failures and is_echo(error):
            words = f"a rank was lost while a checkpoint was made: {error}"
            raise RankError(words) from error
        rank, (first, _) = next(iter(error.failures.items()), (0, (error, None)))
        raise RunError(f"rank {rank}: {first}") from error


def newest(store: Store) -> Checkpoint | None:
    """The newest checkpoint that is whole, on which all ranks agree; None for none.

    Each rank compares the hashes of a share of the files. Raises RunError.
    """
    rank, n_ranks = dist.get_rank(), dist.get_world_size()
    paths, faults = [store.checkpoints() if rank == 0 else None], []
    dist.broadcast_object_list(paths)
    for path in reversed(paths[0]):
        found, told = None, [""] * n_ranks
        try:
            found, fault = Checkpoint(path, rank, n_ranks), ""
        except RunError as error:
            fault = f"{error}"
        dist.all_gather_object(told, fault)
        if not any(told):
            for fault in faults if rank == 0 else ():
                say(f"{fault}; {path.name} is used instead")
            return found
        faults.append(next(filter(None, told)))
    words = f"no checkpoint is whole: {'; '.join(faults)}. "
    RunError.unless(not faults, words + "Copy one back, or begin in another folder")
    return None


@torch.no_grad()
def lay_out(checkpoint: Checkpoint, team, optimizer) -> State:
    """Give a team the numbers of a checkpoint, whoever wrote it; returns its State."""
    names, stored = team_names(team), checkpoint.tensors("optimizer")
    wanted, kept = {name: p.detach() for p, name in names.items()}, {}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    for key in sorted({name.split("/")[0] for name in stored}):
        for i, p in enumerate(held):
            if (name := f"{key}/{names[p]}") in stored:  # a number, or laid out as p is
                empty = torch.zeros_like(p) if stored.shape(name) else torch.zeros(())
                wanted[name] = kept.setdefault(i, {})[key] = empty
    with named_errors():
        reader = dcp.HuggingFaceStorageReader(str(checkpoint.folder))
        dcp.load(wanted, storage_reader=reader)
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": kept, "param_groups": groups})
    return State(**checkpoint.state["state"])


class Silent(Journal):
    """The journal of the ranks that write none; rank 0 does."""

    FILES = ()

    def write(self, name: str, text: str) -> None:
        """Nothing."""

    def sizes(self) -> dict[str, int]:
        """Of no file."""
        return dict.fromkeys(Journal.FILES, 0)

    def cut(self, sizes: dict[str, int]) -> None:
        """Nothing."""


def worst(team) -> tuple[float, str]:
    """How bad the worst of this rank's tensors is, and what to say of it."""
    found = [(0.0, "no gradient")]
    for name, p in team.named_parameters().items():
        if bad(local(p)):
            return math.inf, f"parameter {name} is not finite"
        if p.grad is not None and bad(local(p.grad)):
            found.append((sys.float_info.max, f"the gradient of {name} is not finite"))
        elif p.grad is not None:
            size = local(p.grad).norm().item()
            found.append((size, f"the largest gradient is that of {name}"))
    return max(found)


class TeamRun(Run):
    """A run of many ranks, each of which makes the same calls. heart: may be None."""

    def __init__(self, team, optimizer, loader, store, recipe, journal, options, heart):
        self.model = self.team = team
        self.optimizer, self.loader, self.store = optimizer, loader, store
        self.recipe, self.journal, self.options = recipe, journal, options
        self.about = description(team, optimizer, loader, recipe)
        self.heart, self.state = heart, State()
        self.saver, self.device = Saver(store), team.grid.device
        self.config, self.bf16 = team.config, team.layout.bf16
        self.n_ranks = dist.get_world_size()

    def mark(self, what: str) -> None:
        """Tell the heart of progress, in the step that is not made yet."""
        if self.heart is not None:
            self.heart.at(self.state.step + 1, what)

    def batches(self, first: int, count: int) -> tuple:
        """This rank's rows as micro-batches, and how many rows all ranks read."""
        self.mark("reads its rows")
        rows = self.team.rows(count)
        pair = self.loader.sequences(first + rows.start, rows.stop - rows.start)
        return self.team.batches(*pair, count), count

    def learn(self, batches: tuple, rate: float, accept: Callable) -> tuple:
        """One step of the team: the loss and the gradient's norm of all ranks."""
        self.mark("computes")
        ways = {"clip": self.recipe.clip, "accept": accept}
        return self.team.update(self.optimizer, *batches, rate, **ways)

    def calm(self, loss: torch.Tensor, norm: torch.Tensor) -> bool:
        """Whether all ranks find a step calm."""
        return not same_for_all(not super().calm(loss, norm))

    def agreed(self, asked: str | None) -> str | None:
        """The signal that some rank has heard, if any."""
        names = ["", *Stopping.NAMES]
        return names[same_for_all(names.index(asked or ""))] or None

    def save(self, kept: bool = False) -> None:
        """A checkpoint, written while the ranks go on. RunError."""
        self.mark("saves")
        self.state.sizes, self.state.tries = self.journal.sizes(), 0
        told = {"state": asdict(self.state), "about": self.about}
        self.saver.save(self.team, self.optimizer, self.state.step, told, kept)

    def restored(self) -> State | None:
        """Back to the newest checkpoint that all ranks find whole. RunError."""
        self.mark("looks for a checkpoint")
        self.saver.wait()
        found = newest(self.store)
        if found is None:
            return None
        found.check(self.about)
        if dist.get_rank() == 0:
            self.store.set_aside(after=found.number)
        return lay_out(found, self.team, self.optimizer)

    def present(self) -> None:
        """The first rank has the journal that is shown. RunError."""
        if dist.get_rank() == 0:
            super().present()

    def extras(self, on_step: Callable | None) -> None:
        """What on_step finds, which is called on every rank and written by rank 0."""
        if self.heart is not None:
            self.heart.at(self.state.step, "is in on_step")
        super().extras(on_step)

    def first_bad(self, row: dict) -> str:
        """The worst tensor of all ranks, in words."""
        told = [None] * dist.get_world_size()
        dist.all_gather_object(told, worst(self.team))
        rank = max(range(len(told)), key=lambda rank: told[rank][0])
        return f"{told[rank][1]}, says rank {rank}"


def run_together(
    config, layout, loader, store, recipe, seed=0, heart=None, on_step=None, **options
) -> State:
    """runs.run for many ranks: each calls it with the same, inside `joined`.

    config, seed: of the model; layout: of the ranks, which may be another when a run
    goes on; on_step(number, team): on every rank. options: see runs.Options; those
    of the layout go before. Raises LayoutError, RunError, RankError.
    """
    check_together(options)
    options, first = Options(**options), dist.get_rank() == 0
    team = Team(config, layout, heart.device if heart else "cpu", seed)
    optimizer = team.optimizer(recipe)
    alone, paper = (store.locked(), Journal) if first else (nullcontext(), Silent)
    with alone, Stopping() as stopping, paper(store.folder) as journal:
        parts = loader, store, recipe, journal, options, heart
        job = TeamRun(team, optimizer, *parts)
        stop = follow(job, stopping, on_step)
        job.saver.wait()
    if stop and first:
        say(f"{stop}: saved after step {job.state.step}; the same run again goes on")
    return job.state


@record
def learn_together(config, parts: tuple, layout) -> tuple:
    """own_text.learn for one of torchrun's ranks; each calls it.

    parts: device, shape, recipe, loader and store. Returns the trained model (on rank
    0, else None) and the State.
    """
    device, shape, recipe, loader, store = parts
    ways = {name: getattr(config, name, None) for name in Options.__dataclass_fields__}
    ways = {name: way for name, way in ways.items() if way is not None}
    torch.set_num_threads(config.n_threads or 1)
    told = "GPT3LIB_PATIENCE" in os.environ
    patience = 600 if layout.compile and not told else None  # a compiler takes its time
    with joined(device.type, patience) as heart:
        ways |= {"heart": heart, "seed": config.seed or 0}
        state = run_together(shape, layout, loader, store, recipe, **ways)
    return load(store.folder) if int(os.environ["RANK"]) == 0 else None, state
