"""What several ranks do in the tests: train a small model on a layout, and say how far it is from one process."""

import functools
import os
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch.distributed.tensor.parallel import loss_parallel

from gpt3lib import parallel
from gpt3lib.model import GPT, GPTConfig
from gpt3lib.parallel import Grid, Sequence, materialise, parallelize, plain
from gpt3lib.training import make_optimizer

WHOLE_GRID = os.environ.get("GPT3LIB_WHOLE_GRID") == "1"  # every mix with every switch; the suite has covering pairs
STEPS, SEED, RATE, ROWS = 20, 3, 1e-3, 8
KINDS = {"dense": ("dense",), "banded": ("dense", "banded")}
LOSS, WEIGHTS, GRADIENTS = 1e-5, 1e-4, 1e-5  # how far a layout may be from one process


def config(kind: str = "banded", **changes) -> GPTConfig:
    """A small model: a vocabulary that no number of ranks divides, a band that is narrower than the text."""
    fields = {"vocab_size": 257, "n_ctx": 32, "n_layers": 4, "d_model": 32, "n_heads": 4, "d_head": 8, "bandwidth": 6}
    return GPTConfig(**fields | {"attention": KINDS[kind]} | changes)


def batch(step: int, n_ctx: int = 32, rows: int = ROWS) -> tuple[torch.Tensor, torch.Tensor]:
    """The inputs and targets of a step."""
    tokens = torch.randint(257, (rows, n_ctx + 1), generator=torch.Generator().manual_seed(step))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


@functools.cache
def alone(shape: GPTConfig, n_steps: int = STEPS) -> dict:
    """One process: the losses, the first step's gradients, the weights before and behind, the logits before."""
    model = GPT(shape, SEED)
    optimizer, losses, gradients = make_optimizer(model), [], {}
    for group in optimizer.param_groups:
        group["lr"] = RATE
    born = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        logits = model(batch(0)[0])
    for step in range(n_steps):
        optimizer.zero_grad()
        loss = model.loss(*batch(step))
        loss.backward()
        gradients = gradients or {name: p.grad.clone() for name, p in model.named_parameters()}
        optimizer.step()
        losses.append(loss.item())
    weights = {name: p.detach() for name, p in model.named_parameters()}
    return {"losses": losses, "gradients": gradients, "born": born, "weights": weights, "logits": logits}


def furthest(found: dict, right: dict) -> float:
    """The largest difference of a number between two dicts of tensors, which must have the same names."""
    assert [*found] == [*right], set(found) ^ set(right)
    return max((plain(found[name]) - right[name]).abs().max().item() for name in right)


def share(layout, grid, pair) -> list[torch.Tensor]:
    """The rows and the columns of a batch that are this rank's."""
    rows = [x.chunk(layout.data)[grid.data] for x in pair]
    return [x.chunk(layout.cp, dim=1)[grid.cp] for x in rows]


def train(layout, shape: GPTConfig, right: dict, n_steps: int = STEPS) -> dict:
    """How far a layout is from one process: losses relative, gradients of step one, weights at last."""
    grid = Grid(layout)
    with torch.device("meta"):
        model = GPT(shape, SEED)
    materialise(parallelize(model, grid), "cpu", SEED)
    far = {"born": furthest(dict(model.named_parameters()), right["born"])}
    held = sum(parallel.local(p).numel() for p in model.parameters())
    optimizer, losses = make_optimizer(model), []
    for group in optimizer.param_groups:
        group["lr"] = RATE
    for step in range(n_steps):
        inputs, targets = share(layout, grid, batch(step))
        past = Sequence(shape, grid.long, inputs.shape[1]) if layout.cp > 1 else None
        optimizer.zero_grad()
        with loss_parallel() if layout.tp > 1 else nullcontext():
            loss = plain(model.loss(inputs, targets, past))
            loss.backward()
        if step == 0:
            far["gradients"] = furthest({name: p.grad for name, p in model.named_parameters()}, right["gradients"])
        optimizer.step()
        losses.append(loss.detach() / (layout.data * layout.cp))
    losses = torch.stack(losses)
    for axis in ("dp", "shard"):
        dist.all_reduce(losses, group=grid.mesh[axis].get_group())
    far["losses"] = max(abs(a - b) / b for a, b in zip(losses.tolist(), right["losses"]))
    far["weights"] = furthest(dict(model.named_parameters()), right["weights"])
    return far | {"held": held}


def train_all(cases: list[tuple]) -> list[dict]:
    """A worker: train on each (layout, config, what one process found)."""
    return [train(*case) for case in cases]


def logits_of(cases: list[tuple]) -> list[float]:
    """A worker: how far the logits of this rank's piece of a text are from one process's."""
    found = []
    for layout, shape, right in cases:
        grid = Grid(layout)
        with torch.device("meta"):
            model = GPT(shape, SEED)
        materialise(parallelize(model, grid), "cpu", SEED)
        (mine,) = share(layout, grid, [batch(0)[0]])
        (piece,) = share(layout, grid, [right["logits"]])
        with torch.no_grad():
            logits = model(mine, Sequence(shape, grid.long, mine.shape[1]))
        found.append((plain(logits) - piece).abs().max().item())
    return found
