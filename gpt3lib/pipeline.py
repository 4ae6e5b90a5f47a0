"""Layers on different ranks: micro-batches, the bubble, one table in two places,
proven equal to one process."""

# Made from book/18_pipelines.ipynb by tools/export.py; edit the chapter.
import math
import time
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleInterleaved1F1B,
)
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import loss_parallel

from gpt3lib.files import as_float
from gpt3lib.hooks import needs_torch
from gpt3lib.model import GPT, check_beginning, chunked_loss
from gpt3lib.parallel import (
    Grid,
    LayoutError,
    Sequence,
    check_axes,
    check_layout,
    local,
    materialise,
    parallelize,
    plain,
    ranks_met,
)
from gpt3lib.recipe import check_clip, make_optimizer, step_if_finite


# What is refused; the workshop at the end of this page has a table of it.
def check_plan(p: int, m: int, v: int = 1) -> None:
    """Raise LayoutError unless there are ranks, micro-batches and chunks."""
    for name, value in (("p", p), ("m", m), ("v", v)):
        LayoutError.unless_whole(name, value)


def check_cuts(n_layers: int, n: int, way_out: float) -> None:
    """Raise LayoutError unless each of n parts gets a layer."""
    LayoutError.unless_whole("n_layers", n_layers)
    LayoutError.unless_whole("the number of parts", n)
    words = f"{n_layers} layers do not fill {n} parts; each needs one at least"
    LayoutError.unless(n <= n_layers, words)
    words = f"way_out is {way_out!r}; it must be a number of layers, 0 or more"
    LayoutError.unless(0 <= as_float(way_out) < math.inf, words)


def check_boxes(orders: list) -> None:
    """Raise LayoutError unless a rank has a box."""
    LayoutError.unless(any(orders), "no rank has a box; give a list of them for each")


def check_moved(before: int, now: int) -> None:
    """Raise LayoutError when no rank could do a box: each waits for another."""
    words = f"{now} boxes are left, and each waits for one that comes later in a list"
    LayoutError.unless(now < before, words)


def check_team_rows(inputs, targets, wanted: int, layout) -> None:
    """Raise LayoutError unless these are this rank's rows, and their columns divide."""
    pair = inputs, targets
    shapes = [tuple(x.shape) if isinstance(x, torch.Tensor) else () for x in pair]
    words = f"inputs {shapes[0]} and targets {shapes[1]} must have one shape, (B, T)"
    LayoutError.unless(shapes[0] == shapes[1] and len(shapes[0]) == 2, words)
    words = f"{len(inputs)} rows of inputs and {len(targets)} of targets; "
    words += f"this rank's share is {wanted}, see Team.rows"
    LayoutError.unless(len(inputs) == wanted, words)
    n, pieces = inputs.shape[1], layout.cp * layout.tp
    words = f"cp · tp = {pieces} does not divide a sequence of {n} tokens"
    LayoutError.unless(n % pieces == 0, words)


def check_held(batches: list, rows: slice) -> None:
    """Raise LayoutError unless micro-batches hold this rank's share of the rows."""
    held, wanted = sum(len(x) * w for x, _, w in batches), rows.stop - rows.start
    words = f"{len(batches)} micro-batches hold {held:g} rows; this rank's share is "
    LayoutError.unless(batches and held == wanted, f"{words}{wanted}, see Team.rows")


class Table(nn.Module):
    """A token table alone, under the name that it has in Embeddings."""

    def __init__(self, wte: nn.Embedding):
        super().__init__()
        self.wte = wte


class Part(nn.Module):
    """Layers first … last - 1 of a GPT, taken from it under the names they have there.

    past: what other ranks hold of the sequences, see gpt3lib.parallel; here None.
    """

    def __init__(self, model: GPT, first: int, last: int):
        super().__init__()
        self.config, self.past = model.config, None
        self.is_first, self.is_last = first == 0, last == model.config.n_layers
        if self.is_first:
            self.embeddings = model.embeddings
        elif self.is_last:
            self.embeddings = Table(model.embeddings.wte)
        layers = {str(i): model.blocks[i] for i in range(first, last)}
        self.blocks = nn.ModuleDict(layers)
        if self.is_last:
            self.ln_f = model.ln_f

    def forward(self, x: torch.Tensor, targets=None) -> torch.Tensor:
        """(B, T) ids or (B, T, d_model) -> (B, T, d_model); from the last, the loss."""
        past = self.past
        if self.is_first:
            x = self.embeddings(x, None if past is None else past.tracks(x))
        for i, block in self.blocks.items():
            x = block(x, None if past is None else past.layers[int(i)])
        if not self.is_last:
            return x
        return plain(chunked_loss(self.ln_f(x), self.embeddings.wte.weight, targets))


class Box(NamedTuple):
    """A piece of work: forward ("F") or backward ("B") of a part on a micro-batch."""

    kind: str
    part: int
    micro: int

    def needs(self, n_parts: int) -> "Box | None":
        """The box that must be done before, wherever that is; None for tokens."""
        if self.kind == "F":
            return self._replace(part=self.part - 1) if self.part else None
        if self.part == n_parts - 1:
            return self._replace(kind="F")
        return self._replace(part=self.part + 1)


def gpipe(rank: int, p: int, m: int) -> list[Box]:
    """GPipe: all forwards, then all backwards ([H19])."""
    return [Box(kind, rank, i) for kind in "FB" for i in range(m)]


SLOTS = {"F": 1, "B": 1}  # how long a box takes


def timetable(orders: list[list[Box]], cost: dict = SLOTS) -> dict[Box, tuple]:
    """Box -> (begin, end), when every rank does its list as early as it can."""
    check_boxes(orders)
    n_parts = 1 + max(box.part for order in orders for box in order)
    times, todo = {}, [list(order) for order in orders]
    free = [0] * len(orders)  # from when on a rank has nothing to do
    while any(todo):
        left = sum(map(len, todo))
        for rank, order in enumerate(todo):
            needed = order[0].needs(n_parts) if order else None
            if order and (needed is None or needed in times):
                begin = max(free[rank], times.get(needed, (0, 0))[1])
                free[rank] = begin + cost[order[0].kind]
                times[order.pop(0)] = begin, free[rank]
        check_moved(left, sum(map(len, todo)))
    return times


def bubble_share(p: int, m: int, v: int = 1) -> float:
    """The idle share of p ranks, m micro-batches, v parts in each rank ([N21] §2.2).

    Raises LayoutError for what is no whole number above 0.
    """
    check_plan(p, m, v)
    return (p - 1) / (v * m + p - 1)


def alternating(forward: list, backward: list, ahead: int) -> list[Box]:
    """Some forwards ahead, then a backward and a forward in turn, then what is left."""
    order = forward[:ahead]
    for pair in zip(backward, forward[ahead:]):
        order += pair
    return order + backward[len(forward) - ahead :]


def one_f_one_b(rank: int, p: int, m: int) -> list[Box]:
    """1F1B: a rank runs as many micro-batches ahead as there are ranks from it on."""
    order = gpipe(rank, p, m)
    return alternating(order[:m], order[m:], min(m, p - rank))


def most_held(order: list[Box]) -> int:
    """How many boxes at most are forward and not yet backward."""
    held = most = 0
    for box in order:
        held += 1 if box.kind == "F" else -1
        most = max(most, held)
    return most


def interleaved(rank: int, p: int, m: int, v: int) -> list[Box]:
    """1F1B with v parts in each rank: rank, rank + p, rank + 2 p … ([N21] §2.2).

    Micro-batches go in rounds of p; a round passes all parts of a rank.
    """
    size = m // max(1, m // p)  # of a round
    rounds = [range(start, start + size) for start in range(0, m, size)]
    parts = range(rank, v * p, p)
    forward = [Box("F", k, i) for some in rounds for k in parts for i in some]
    backward = [Box("B", k, i) for some in rounds for k in parts[::-1] for i in some]
    ahead = 2 * (p - 1 - rank) + (v - 1) * size + 1
    return alternating(forward, backward, min(ahead, v * m))


def blank(*shape: int, dtype=torch.float32) -> torch.Tensor:
    """A tensor without numbers: what torch is told about one that will come."""
    with torch.device("meta"):
        return torch.empty(shape, dtype=dtype, requires_grad=dtype.is_floating_point)


def make_schedule(parts: dict, grid, size, n_tokens, n_micro, stage=PipelineStage):
    """torch's 1F1B for the parts of this rank, interleaved when it has several.

    size, n_tokens: of a micro-batch. What comes back of a part is a micro-batch's loss;
    its target is a weight for each row, all equal.
    """
    layout, n = grid.layout, n_parts(grid.layout)
    d_model = next(iter(parts.values())).config.d_model
    kind = torch.bfloat16 if layout.bf16 else torch.float32
    ids, loss = blank(size, n_tokens, dtype=torch.int64), blank()
    h = blank(size, n_tokens // layout.tp, d_model, dtype=kind)
    group, stages = grid.mesh["pp"].get_group(), []
    for i, part in parts.items():
        ways = {"input_args": h if i else ids, "output_args": h if i < n - 1 else loss}
        stages.append(stage(part, i, n, grid.device, group=group, **ways))
    ways = {"loss_fn": lambda loss, weight: loss * weight[0], "scale_grads": False}
    if layout.chunks == 1:
        return Schedule1F1B(stages[0], n_micro, **ways)
    return ScheduleInterleaved1F1B(stages, n_micro, **ways)


def cuts(n_layers: int, n: int, way_out: float = 0.0) -> list[tuple[int, int]]:
    """The layers (first, one past the last) of n parts, as evenly as can be.

    way_out: what the last part does besides, in layers. Raises LayoutError.
    """
    check_cuts(n_layers, n, way_out)
    if n == 1:
        return [(0, n_layers)]

    def slowest(last: int) -> float:
        """The work of the slowest part, when the last one has so many layers."""
        return max(math.ceil((n_layers - last) / (n - 1)), last + way_out)

    last = min(range(1, n_layers - n + 2), key=slowest)
    ends = [-(-(n_layers - last) * i // (n - 1)) for i in range(n)] + [n_layers]
    return [*zip(ends, ends[1:])]


def n_parts(layout) -> int:
    """In how many parts a layout cuts a model: `chunks` on each of `pp` ranks."""
    return layout.pp * layout.chunks


def parts_of(model: GPT, grid) -> dict[int, nn.Module]:
    """Number -> part, of this rank; the whole model where it is not cut."""
    n, c = n_parts(grid.layout), model.config
    if n == 1:
        return {0: model}
    bounds = cuts(c.n_layers, n, c.vocab_size / (12 * c.d_model))
    return {i: Part(model, *bounds[i]) for i in range(grid.pp, n, grid.layout.pp)}


TABLE = "embeddings.wte.weight"


@torch.no_grad()
def sum_tables(tables: list, grid) -> None:
    """The two ends of a pipeline swap the gradients of their tables and add them up."""
    group, n = grid.mesh["pp"].get_group(), grid.layout.pp
    if n == 1 or grid.pp not in (0, n - 1):
        return
    other = dist.get_global_rank(group, n - 1 - grid.pp)
    for mine in (local(table.grad) for table in tables if table.grad is not None):
        theirs = torch.empty_like(mine)
        both = (dist.isend, mine.contiguous()), (dist.irecv, theirs)
        swap = [dist.P2POp(way, tensor, other, group) for way, tensor in both]
        for work in dist.batch_isend_irecv(swap):
            work.wait()
        mine += theirs


@torch.no_grad()
def clip_whole(parts: dict, grid, clip: float) -> torch.Tensor:
    """Shorten the gradient of the whole model to `clip`; returns its length before."""
    counted, everything = [], []
    for stage, part in parts.items():
        for name, p in part.named_parameters():
            if p.grad is None:  # frozen
                continue
            everything.append(p)
            if name != TABLE or stage == 0:  # the last part's table is the same one
                counted.append(p.grad)
    square = plain(nn.utils.get_total_norm(counted)).to(grid.device).square()
    dist.all_reduce(square, group=grid.mesh["pp"].get_group())
    nn.utils.clip_grads_with_norm_(everything, clip, square.sqrt())
    return square.sqrt()


def through_stages(team, batches: list, scale: float, past) -> torch.Tensor:
    """The weighted loss, where the last part is, of micro-batches in a pipeline."""
    for part in team.parts.values():
        part.past = past
    size, n_tokens = batches[0][0].shape
    inputs, targets = (torch.cat([b[i] for b in batches]) for i in (0, 1))
    weights = inputs.new_tensor([b[2] * scale for b in batches], dtype=torch.float32)
    losses, ways = [], {"return_outputs": False}
    if n_parts(team.layout) - 1 in team.parts:
        weights = weights.repeat_interleave(size)  # one for each row
        ways |= {"targets": targets, "target": weights, "losses": losses}
    schedule = team.schedule(size, n_tokens, len(batches))
    schedule.step(*[inputs] if 0 in team.parts else [], **ways)
    none = torch.zeros((), device=inputs.device)
    return sum((loss.detach() for loss in losses), none)


def share(n: int, size: int) -> list[tuple[int, int]]:
    """n rows among so many ranks, as evenly as can be: (first, one past the last)."""
    n = LayoutError.unless_whole("the number of rows", n)
    ends = [n * i // size for i in range(size + 1)]
    return [*zip(ends, ends[1:])]


def micro_size(counts: list[int], most: int) -> int:
    """The largest micro-batch, up to `most`, that cuts each share without a rest."""
    whole = math.gcd(*counts) or 1
    return max(n for n in range(1, max(1, most) + 1) if whole % n == 0)


def micro_batches_of(grid, inputs, targets, count: int) -> list[tuple]:
    """This rank's rows as micro-batches (inputs, targets, weight).

    Each rank has as many, of one size; those that fill up have weight 0. In a pipeline
    there are as many as stages at least, and interleaved a multiple of that. Raises
    LayoutError for other rows than this rank's.
    """
    layout = grid.layout
    counts = [stop - start for start, stop in share(count, layout.data)]
    check_team_rows(inputs, targets, counts[grid.data], layout)
    most = min(layout.micro_batch, max(counts) // layout.pp)
    size = micro_size(counts, most)
    n = max(max(counts) // size, layout.pp)
    n += -n % layout.pp if layout.chunks > 1 else 0
    width = inputs.shape[1] // layout.cp
    mine = slice(grid.cp * width, (grid.cp + 1) * width)
    x, y = (part[:, mine].to(grid.device) for part in (inputs, targets))
    found = [(a, b, 1.0) for a, b in zip(x.split(size), y.split(size)) if len(a)]
    nothing = x.new_zeros(size, width), y.new_zeros(size, width), 0.0
    return found + [nothing] * (n - len(found))


class Crew:
    """What one rank has of a model that is shared out: its parts, rows, optimizer.

    seed: of the first numbers; None leaves the parts on "meta", without any.
    """

    def __init__(self, config, layout, device="cpu", seed: int | None = 0):
        check_axes(layout)
        if n_parts(layout) > 1:  # torch's stages change from version to version
            needs_torch("A pipeline")
        check_layout(layout, config, ranks_met())
        check_beginning(config, 0 if seed is None else seed)
        self.config, self.layout, self.grid = config, layout, Grid(layout, device)
        with torch.device("meta"):
            self.parts = parts_of(GPT(config), self.grid)
        for part in self.parts.values():
            parallelize(part, self.grid)
            if seed is not None:
                materialise(part, self.grid.device, seed)
        self.schedules, self.stage = {}, PipelineStage  # or a class that does more

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Name in the whole model -> parameter, of those that this rank has."""
        return {
            n: p for part in self.parts.values() for n, p in part.named_parameters()
        }

    def tables(self) -> list[nn.Parameter]:
        """The token table of this rank, if it has the first part or the last."""
        return [p for name, p in self.named_parameters().items() if name == TABLE]

    def optimizer(self, recipe=None) -> torch.optim.AdamW:
        """AdamW for the parts of this rank, the recipe's or Training's."""
        parts = nn.ModuleList(self.parts.values())
        return recipe.optimizer(parts) if recipe else make_optimizer(parts)

    def rows(self, count: int) -> slice:
        """Which rows of a batch of so many this rank reads."""
        return slice(*share(count, self.layout.data)[self.grid.data])

    def batches(self, inputs, targets, count: int) -> list[tuple]:
        """This rank's rows of a batch as micro-batches (inputs, targets, weight)."""
        return micro_batches_of(self.grid, inputs, targets, count)

    def schedule(self, size: int, n_tokens: int, n_micro: int):
        """torch's schedule for micro-batches of this shape, made once."""
        key = size, n_tokens, n_micro
        if key not in self.schedules:
            made = make_schedule(self.parts, self.grid, *key, self.stage)
            self.schedules[key] = made
        return self.schedules[key]


def before(config, grid, n_tokens: int):
    """What the ranks before hold of a sequence that is cut in pieces, or None."""
    if grid.layout.cp == 1:
        return None
    return Sequence(config, grid.long, n_tokens)


def one_by_one(team, batches: list, scale: float, past) -> torch.Tensor:
    """The weighted loss of a model that is not cut; micro-batches one after another."""
    model, losses = team.parts[0], []
    for i, (inputs, targets, weight) in enumerate(batches):
        if hasattr(model, "set_requires_all_reduce"):  # replicas: sum at the end only
            model.set_requires_all_reduce(i == len(batches) - 1)
        loss = plain(model.loss(inputs, targets, past)) * (weight * scale)
        loss.backward()
        losses.append(loss.detach())
    return torch.stack(losses).sum()


@torch.no_grad()
def lay_out_gradients(parameters) -> None:
    """Each gradient is laid out over the ranks as its parameter is."""
    for p in parameters:
        if isinstance(p.grad, DTensor) and p.grad.placements != p.placements:
            p.grad = p.grad.redistribute(placements=p.placements)


class Team(Crew):
    """A model that many ranks train together: recipe.update for any layout."""

    def accumulate(self, batches: list, count: int) -> torch.Tensor:
        """The mean loss of all rows of all ranks; its gradient goes to each .grad."""
        check_held(batches, self.rows(count))
        layout, (size, width) = self.layout, batches[0][0].shape
        scale = size * layout.data / count  # of the mean that FSDP takes over ranks
        past = before(self.config, self.grid, width)
        with loss_parallel() if layout.tp > 1 else nullcontext():
            cut = n_parts(layout) > 1
            loss = (through_stages if cut else one_by_one)(self, batches, scale, past)
        for axis in ("dp", "shard", "pp"):
            dist.all_reduce(loss, group=self.grid.mesh[axis].get_group())
        return loss / (layout.data * layout.cp)

    def update(self, optimizer, batches, count, rate, clip=1.0, accept=None) -> tuple:
        """One step; returns loss and gradient norm, the same on all ranks.

        batches: of this rank, see Crew.batches; count: rows of the whole batch. All
        else is as in recipe.update. Raises RecipeError for a wrong clip.
        """
        check_clip(clip)
        optimizer.zero_grad()
        loss = self.accumulate(batches, count)
        lay_out_gradients(self.named_parameters().values())
        sum_tables(self.tables(), self.grid)
        norm = clip_whole(self.parts, self.grid, clip)
        for group in optimizer.param_groups:
            group["lr"] = rate
        if accept is None or accept(loss, norm):
            step_if_finite(optimizer, loss + norm)
        return loss, norm


class Watched(PipelineStage):
    """A stage that notes what it does: (kind, part, micro-batch, begin, end)."""

    def __init__(self, notes: list, *arguments, **named):
        super().__init__(*arguments, **named)
        self.notes = notes

    def note(self, kind: str, i: int, work, *arguments, **named):
        """work(…), and a line in the notes."""
        began = time.perf_counter()
        result = work(i, *arguments, **named)
        times = began, time.perf_counter()
        self.notes.append((kind, self.stage_index, i, *times))
        return result

    def forward_one_chunk(self, fwd_chunk_id: int, *arguments, **named):
        """torch's own, noted."""
        work = super().forward_one_chunk
        return self.note("F", fwd_chunk_id, work, *arguments, **named)

    def backward_one_chunk(self, bwd_chunk_id: int, *arguments, **named):
        """torch's own, noted."""
        work = super().backward_one_chunk
        return self.note("B", bwd_chunk_id, work, *arguments, **named)
