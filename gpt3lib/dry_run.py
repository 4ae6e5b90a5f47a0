"""The real model, split over a thousand ranks that are not there: one rank's step,
counted."""

# Made from book/20b_dry_run.ipynb by tools/export.py; edit the chapter.
import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module
from unittest import mock
from weakref import ref

import torch
from torch.utils.flop_counter import (
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from gpt3lib import hooks, model
from gpt3lib.files import Refusal, is_whole
from gpt3lib.parallel import Layout, blocks_of, check_layout, local
from gpt3lib.pipeline import Team
from gpt3lib.plan import Rank, ledger
from gpt3lib.processes import starter


# What is refused; the workshop at the end of this page has a table of it.
class TraceError(Refusal, ValueError):
    """A dry run that cannot be: no such rank, or too few micro-batches."""


def check_trace(layout: Layout, rank: int, n_micro: int) -> None:
    """Raise TraceError unless the rank is there and all stages have work."""
    fine = is_whole(rank, 0) and rank < layout.world
    words = f"rank is {rank!r}; the layout has ranks 0 to {layout.world - 1}"
    TraceError.unless(fine, words)
    least = layout.pp * layout.chunks
    TraceError.unless_whole("n_micro", n_micro, least)


SDPA = "_scaled_dot_product_flash_attention_for_cpu"  # torch's table lacks it


def product_flops(operation, arguments, named, result) -> int:
    """FLOPs of a matrix product or of attention; everything else counts nothing."""
    name, known = operation._opname, flop_registry.get(operation._overloadpacket)
    if name == SDPA:
        return sdpa_flop_count(*(x.shape for x in arguments[:3]))
    if name == f"{SDPA}_backward":
        return sdpa_backward_flop_count(*(x.shape for x in arguments[:4]))
    return known(*arguments, **named, out_val=result) if known else 0


class Away:
    """Meanwhile a meter looks away."""

    def __init__(self, meter: "Meter"):
        self.meter = meter

    def __enter__(self):
        self.meter.away = True

    def __exit__(self, *error):
        self.meter.away = False


class Meter(hooks.private("TorchDispatchMode")):
    """Counts what a rank holds, computes and sends, with real tensors or with fake.

    groups: name -> (axis, ranks).
    """

    def __init__(self, groups: dict):
        super().__init__()
        self.groups, self.away = groups, False
        self.sizes, self.now, self.peak = {}, 0, 0
        self.flops, self.sent, self.messages = 0, Counter(), Counter()

    def restart(self) -> None:
        """Count from here on; what is held stays."""
        self.peak, self.flops = self.now, 0
        self.sent.clear(), self.messages.clear()

    def see(self, storage) -> None:
        """A storage is there, or has another size."""
        key, size = storage._cdata, storage.nbytes()
        if key not in self.sizes:
            self.sizes[key] = 0, ref(storage, lambda _: self.forget(key))
        old, alive = self.sizes[key]
        self.sizes[key] = size, alive
        self.now += size - old
        self.peak = max(self.peak, self.now)

    def forget(self, key: int) -> None:
        """A storage is gone."""
        self.now -= self.sizes.pop(key)[0]

    def resized(self, storage) -> None:
        """A storage has another size, perhaps one that is not counted."""
        if storage._cdata in self.sizes:
            self.see(storage)

    def hold(self, tree) -> None:
        """See the memory behind all tensors in a nest."""
        for tensor in hooks.bare_tensors(tree):
            self.see(tensor.untyped_storage())

    def hear(self, message) -> None:
        """Count a message: what a ring lets this rank send."""
        axis, n = self.groups.get(message.group, ("other", 1))
        sent = round(message.bytes * hooks.share_sent(message.kind, n))
        self.sent[axis] += sent
        self.messages[axis] += sent > 0

    @contextmanager
    def watching(self) -> Iterator["Meter"]:
        """Meanwhile everything is counted, but what torch only tries out."""
        away = hooks.while_trying_shapes(Away(self))
        with hooks.hearing_resizes(self.resized), away, self:
            yield self

    def __torch_dispatch__(self, operation, types, arguments=(), named=None):
        if any(issubclass(kind, hooks.wrappers()) for kind in types):
            return NotImplemented  # it comes back with what is inside
        result = operation(*arguments, **(named or {}))
        if self.away:
            return result
        self.hold(result)
        self.flops += product_flops(operation, arguments, named or {}, result)
        if message := hooks.message_of(operation, arguments, result):
            self.hear(message)
        return result


@dataclass(frozen=True)
class Trace:
    """One step of one rank: bytes held, FLOPs of products, bytes sent on each axis.

    activations: what a micro-batch leaves for the backward pass in all layers.
    """

    parameters: int
    optimizer: int
    activations: int
    peak: int
    flops: int
    sent: dict
    messages: dict


def groups_of(team: Team) -> dict[str, tuple[str, int]]:
    """Name -> (axis, ranks) of the groups in which a rank talks."""
    mesh = team.grid.mesh
    axes = {axis: mesh[axis].get_group() for axis in ("pp", "dp", "shard", "tp")}
    if team.grid.long is not None:
        axes["cp"] = team.grid.long.get_group()
    return {group.group_name: (axis, group.size()) for axis, group in axes.items()}


def note_layers(team: Team, meter: Meter, notes: list) -> None:
    """Note what is held before the first layer of each part, and after its last."""
    for part in team.parts.values():
        blocks = blocks_of(part)
        note = lambda *_: notes.append(meter.now)
        # FSDP's own hooks are outside of these: both times one layer is gathered
        blocks[0].register_forward_pre_hook(note)
        blocks[-1].register_forward_hook(note, prepend=True)


def is_spread(tensor) -> bool:
    """model.is_traced for tensors that only the meter follows: real runs look so."""
    return isinstance(tensor, hooks.wrappers())


def two_steps(team: Team, optimizer, n_micro: int, before_each) -> None:
    """Two updates, on tokens that are all 0."""
    n = n_micro * team.layout.micro_batch
    shape = n, team.config.n_ctx
    ids = torch.zeros(shape, dtype=torch.long, device=team.grid.device)
    for _ in range(2):
        before_each()
        count = n * team.layout.data
        team.update(optimizer, team.batches(ids, ids, count), count, 1e-4)


def measured_step(team: Team, n_micro: int) -> Trace:
    """The second step of a rank whose team has no numbers yet (seed None)."""
    meter, notes, parts = Meter(groups_of(team)), [], team.parts.values()
    with meter.watching(), mock.patch.object(model, "is_traced", is_spread):
        for part in parts:
            part.to_empty(device=team.grid.device)
            meter.hold([*part.parameters()])
        held = meter.now
        with torch.no_grad():
            for parameter in team.named_parameters().values():
                local(parameter).zero_()
        note_layers(team, meter, notes)
        optimizer = team.optimizer()
        fresh = lambda: (notes.clear(), meter.restart())
        two_steps(team, optimizer, n_micro, fresh)
    kept = [after - before for before, after in zip(notes[::2], notes[1::2])]
    kept = kept[-len(parts) :]  # of the last micro-batch
    moments = [local(t) for state in optimizer.state.values() for t in state.values()]
    sizes = held, sum(t.nbytes for t in moments), sum(kept), meter.peak
    return Trace(*sizes, meter.flops, dict(meter.sent), dict(meter.messages))


def dry_step(config, layout: Layout, rank: int, n_micro: int) -> Trace:
    """What dry_run does, in this process; torch knows the groups of one world only."""
    with hooks.fake_ranks(layout.world, rank):
        team = Team(config, layout, seed=None)  # cut on "meta", by the real functions
        with hooks.no_votes(), hooks.fake_tensors():
            return measured_step(team, n_micro)


def be_quiet() -> None:
    """In a dry run nobody needs torch's advice on speed."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


def dry_run(config, layout: Layout, rank: int = 0, n_micro: int = 8) -> Trace:
    """One rank's step of the real model on layout.world ranks that are not there.

    It runs in a process of its own. Raises LayoutError, TraceError, and TorchError for
    a torch that it was not tried with.
    """
    hooks.needs_torch("The dry run")
    check_layout(layout, config, layout.world)
    check_trace(layout, rank, n_micro)
    # by its module's name: the other process does not know this page
    there = import_module(".dry_run", hooks.__package__)
    quiet = {"mp_context": starter(), "initializer": there.be_quiet}
    with ProcessPoolExecutor(1, **quiet) as pool:
        return pool.submit(there.dry_step, config, layout, rank, n_micro).result()


def real_step(config, layout: Layout, n_micro: int) -> dict:
    """The same, by one of several real processes; for processes.together."""
    be_quiet()
    return asdict(measured_step(Team(config, layout, seed=None), n_micro))


def check_plan_of(config, proposal) -> Trace:
    """Trace the fastest layout of a plan with the real code, print both numbers.

    Eight micro-batches, or as many as there are stages; a rank of the first stage.
    """
    layout, n_micro = proposal.layout, max(8, proposal.layout.pp)
    trace = dry_run(config, layout, 0, n_micro)
    rank = Rank(config, layout, blocks=True)
    peak = sum(ledger(config, layout, n_micro, blocks=True).values())
    rows = {
        "parameters": (4 * rank.held, trace.parameters),
        "optimizer": (8 * rank.held, trace.optimizer),
        "activations": (rank.activations, trace.activations),
        "peak": (peak, trace.peak),
    }
    print(f"a dry run of rank 0, {n_micro} micro-batches, in GiB: planned, traced")
    for name, sizes in rows.items():
        print(f"  {name:12}", *(f"{size / 2**30:8.3f}" for size in sizes))
    return trace
