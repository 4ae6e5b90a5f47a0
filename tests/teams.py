"""What teams of ranks do in the tests of pipelines: train on a layout, and say how far they are from one process."""

import functools
import math
from functools import partial

import torch

from gpt3lib.files import sha256
from gpt3lib.model import GPT, GPTConfig
from gpt3lib.parallel import plain
from gpt3lib.pipeline import Team, Watched
from gpt3lib.recipe import update
from gpt3lib.training import make_optimizer
from ranks import RATE, ROWS, SEED, STEPS, batch, furthest

CLIP = 0.5  # below the length of any gradient here, so that each step is clipped


@functools.cache
def alone(shape: GPTConfig, rows: int = ROWS, n_steps: int = STEPS) -> dict:
    """One process: losses and gradient lengths, the first step's clipped gradients, weights before and behind."""
    model = GPT(shape, SEED)
    born = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer, told, gradients = make_optimizer(model), [], {}
    for step in range(n_steps):
        told.append([x.item() for x in update(model, optimizer, [batch(step, rows=rows)], RATE, CLIP)])
        gradients = gradients or {name: p.grad.clone() for name, p in model.named_parameters()}
    weights = {name: p.detach() for name, p in model.named_parameters()}
    return {"told": told, "gradients": gradients, "born": born, "weights": weights}


def step_of(team, optimizer, step: int, rows: int = ROWS, **ways) -> list[float]:
    """One update of a team: loss, gradient length."""
    mine = team.rows(rows)
    batches = team.batches(*(x[mine] for x in batch(step, team.config.n_ctx, rows)), rows)
    return [x.item() for x in team.update(optimizer, batches, rows, RATE, CLIP, **ways)]


def some(right: dict, names) -> dict:
    """Only what a rank has."""
    return {name: right[name] for name in names}


def train(layout, shape: GPTConfig, right: dict, rows: int = ROWS) -> dict:
    """How far a layout is from one process, and hashes of the token table after each step."""
    team = Team(shape, layout, seed=SEED)
    here = team.named_parameters()
    far = {"names": [*here], "born": furthest(here, some(right["born"], here))}
    optimizer, told, tables = team.optimizer(), [], []
    for step in range(len(right["told"])):
        told.append(step_of(team, optimizer, step, rows))
        if step == 0:
            gradients = {name: p.grad for name, p in here.items()}
            far["gradients"] = furthest(gradients, some(right["gradients"], here))
        tables += [sha256(plain(p.detach()).numpy().tobytes()) for p in team.tables()]
    far["losses"], far["norms"] = (gap(told, right["told"], column) for column in (0, 1))
    far["weights"] = furthest(here, some(right["weights"], here))
    return far | {"tables": tables}


def gap(found: list, right: list, column: int) -> float:
    """The largest relative difference of a column."""
    return max(abs(a[column] - b[column]) / b[column] for a, b in zip(found, right, strict=True))


def train_all(cases: list[tuple]) -> list[dict]:
    """A worker: train on each (layout, config, what one process found, rows)."""
    return [train(*case) for case in cases]


def orders_of(cases: list[tuple]) -> list[list]:
    """A worker: the boxes (kind, part, micro-batch) of one step on each (layout, config, rows)."""
    found = []
    for layout, shape, rows in cases:
        team, notes = Team(shape, layout, seed=SEED), []
        team.stage = partial(Watched, notes)
        step_of(team, team.optimizer(), 0, rows)
        assert all(began <= ended for *_, began, ended in notes)
        found.append([note[:3] for note in notes])
    return found


def refusals(layout, shape) -> dict:
    """A worker: what is left as it was, and what raises, on a team of two stages."""
    team = Team(shape, layout, seed=SEED)
    optimizer, here, said = team.optimizer(), team.named_parameters(), {}
    before = {name: p.detach().clone() for name, p in here.items()}
    step_of(team, optimizer, 0, accept=lambda loss, norm: False)
    said["not accepted"] = furthest(here, before)
    with torch.no_grad():
        here[next(iter(here))][0, 0] = math.nan
    loss, _ = step_of(team, optimizer, 0)
    said["nan"] = math.isnan(loss), sum(int((p != before[name]).sum()) for name, p in here.items())
    calls = {
        "clip": lambda: team.update(optimizer, [], ROWS, RATE, 0.0),
        "rows": lambda: team.batches(*(x[:3] for x in batch(0)), ROWS),
        "world": lambda: Team(shape, layout.__class__(pp=4)),
        "layers": lambda: Team(shape, layout.__class__(pp=2, chunks=3)),
    }
    return said | said_of(calls)


FROZEN = ("embeddings.wte.weight", "blocks.0.mlp.up.weight", "ln_f.bias")


def freeze(named) -> None:
    """No gradient for some parameters: of the token table, of a block, of what stands behind the blocks."""
    for name, p in named:
        p.requires_grad_(name not in FROZEN)


def frozen(cases: list[tuple]) -> list[dict]:
    """A worker: how far teams with frozen parameters are from one process, on each (layout, config)."""
    found = []
    for layout, shape in cases:
        model, team = GPT(shape, SEED), Team(shape, layout, seed=SEED)
        freeze(model.named_parameters())
        freeze(team.named_parameters().items())
        one, all_of_us = make_optimizer(model), team.optimizer()
        told = [[x.item() for x in update(model, one, [batch(step)], RATE, CLIP)] for step in range(3)]
        here = team.named_parameters()
        far = {"told": furthest_told([step_of(team, all_of_us, step) for step in range(3)], told)}
        right = {name: p.detach() for name, p in model.named_parameters()}
        found.append(far | {"weights": furthest(here, some(right, here))})
    return found


def furthest_told(found: list, right: list) -> float:
    """The largest relative difference of losses and of gradient lengths."""
    return max(gap(found, right, column) for column in (0, 1))


def said_of(calls: dict) -> dict:
    """What each call raises, by its name."""
    said = {}
    for name, call in calls.items():
        try:
            call()
            said[name] = "no error"
        except ValueError as error:
            said[name] = f"{type(error).__name__}: {error}"
    return said


def bad_steps(layout, shape) -> dict:
    """A worker: what a team says to batches, counts, seeds and shapes that are none."""
    team = Team(shape, layout, seed=SEED)
    optimizer, mine, pair = team.optimizer(), team.rows(ROWS), batch(0)
    inputs, targets = (x[mine] for x in pair)
    good, before = team.batches(inputs, targets, ROWS), plain(team.tables()[0].detach()).clone()
    counts = {f"count {n!r}": partial(team.update, optimizer, good, n, RATE) for n in (0, -8, 2.5, None, 6, 80)}
    rows = {f"rows {n!r}": partial(team.rows, n) for n in (0, -8, 2.5, "8")}
    shares = {f"batches {n!r}": partial(team.batches, inputs, targets, n) for n in (0, 8.0)}
    said = said_of(counts | rows | shares) | said_of(
        {
            "empty": lambda: team.update(optimizer, [], ROWS, RATE),
            "part": lambda: team.update(optimizer, good[:1], ROWS, RATE),
            "wide": lambda: team.batches(inputs, targets[:, :-1], ROWS),
            "flat": lambda: team.batches(inputs[:, 0], targets[:, 0], ROWS),
            "lists": lambda: team.batches(inputs.tolist(), targets.tolist(), ROWS),
            "seed": lambda: Team(shape, layout, seed="one"),
            "seed 1.5": lambda: Team(shape, layout, seed=1.5),
            "config": lambda: Team("gpt3-1m", layout),
            "layout": lambda: Team(shape, {"pp": 2}),
        }
    )
    return said | {"moved": furthest({"table": team.tables()[0].detach()}, {"table": before})}


def unsummed(layout, shape, n_steps: int) -> list[torch.Tensor]:
    """A worker: the token tables after each step, when nobody adds up their gradients."""
    team = Team(shape, layout, seed=SEED)
    (table,), optimizer, tables = team.tables(), team.optimizer(), []
    team.tables = list  # nothing to add up
    for step in range(n_steps):
        step_of(team, optimizer, step)
        tables.append(table.detach().clone())
    return tables


def on_meta(layout, shape) -> list:
    """A worker: names and places of a team without numbers."""
    return [[name, p.is_meta] for name, p in Team(shape, layout, seed=None).named_parameters().items()]
