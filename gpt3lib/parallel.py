"""No single GPU can hold GPT-3: data, numbers and products are shared out, and the
result stays the same."""

# Made from book/17_parallelism.ipynb by tools/export.py; edit the chapter.
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn import functional as F
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from gpt3lib.files import Refusal
from gpt3lib.model import GPT, GPTConfig, initialise


# What a layout refuses; the workshop at the end of this page has a table of it.
class LayoutError(Refusal, ValueError):
    """A layout that a model, a batch or a number of ranks does not allow."""


AXES = ("pp", "dp", "fsdp", "cp", "tp")
RECOMPUTE = ("none", "selective", "full")


def faults(layout: "Layout", config, n_sequences=None, n_ctx=None) -> list[str]:
    """What does not divide; n_sequences: of a batch, n_ctx: of a sequence."""
    pieces, length = layout.cp * layout.tp, config.n_ctx if n_ctx is None else n_ctx
    heads, n_layers, data = config.n_heads, config.n_layers, layout.data
    n_stages = layout.pp * layout.chunks
    stages = f"pp={layout.pp}" + f" · chunks={layout.chunks}" * (layout.chunks > 1)
    few = f"{stages} needs {n_stages} layers at least; the model has {n_layers}"
    rows, n_ids = -(-config.vocab_size // layout.tp), config.vocab_size  # of a rank
    short = f"tp={layout.tp} leaves a rank no row of a vocabulary of {n_ids}"
    rules = [
        (heads % layout.tp, f"tp={layout.tp} does not divide {heads} heads"),
        (rows * (layout.tp - 1) >= n_ids, short),
        (length % pieces, f"cp·tp={pieces} does not divide a sequence of {length}"),
        (n_stages > n_layers, few),
        (layout.chunks > 1 == layout.pp, f"chunks={layout.chunks} needs pp above 1"),
    ]
    if n_sequences is not None:
        words = f"dp·fsdp={data} does not divide a batch of {n_sequences} sequences"
        rules.append((n_sequences % data, words))
    return [words for wrong, words in rules if wrong]


def check_axes(layout) -> None:
    """Raise LayoutError unless it is a Layout of whole numbers above 0."""
    words = f"layout is {layout!r}; it must be a Layout, such as Layout(fsdp=2)"
    LayoutError.unless(isinstance(layout, Layout), words)
    for axis in (*AXES, "chunks", "micro_batch"):
        LayoutError.unless_whole(axis, getattr(layout, axis))
    words = f"recompute is {layout.recompute!r}; there are {', '.join(RECOMPUTE)}"
    LayoutError.unless(layout.recompute in RECOMPUTE, words)


def check_batch(config, world: int, n_sequences=None, n_ctx=None) -> None:
    """Raise LayoutError unless it is a config, and the numbers are some for it."""
    right = "a GPTConfig, such as GPTConfig.from_name('gpt3-1m')"
    words = f"config is {config!r}; it must be {right}"
    LayoutError.unless(isinstance(config, GPTConfig), words)
    LayoutError.unless_whole("world", world)
    for name, value in (("n_sequences", n_sequences), ("n_ctx", n_ctx)):
        if value is not None:
            LayoutError.unless_whole(name, value)
    words = f"n_ctx is {n_ctx}; the model reads {config.n_ctx} tokens at most"
    LayoutError.unless(n_ctx is None or n_ctx <= config.n_ctx, words)


def check_layout(layout, config, world: int, n_sequences=None, n_ctx=None) -> None:
    """Raise LayoutError, with the nearest layouts that work, unless all divides.

    world: the number of ranks; n_sequences: of a batch; n_ctx: of a sequence, that of
    the config if not said.
    """
    check_axes(layout)
    check_batch(config, world, n_sequences, n_ctx)
    found = faults(layout, config, n_sequences, n_ctx)
    if layout.world != world:
        found.insert(0, f"{layout} needs {layout.world} ranks, and there are {world}")
    if found:
        near = layouts(config, world, n_sequences, n_ctx)
        near = sorted(near, key=partial(distance, layout))[:3]
        names = "; ".join(map(str, near)) or f"none on {world} ranks"
        raise LayoutError(f"{'; '.join(found)}. The nearest that work: {names}")


def ranks_met() -> int:
    """How many ranks there are. Raises LayoutError if none have met."""
    right = "call this inside processes.together or ranks.joined"
    LayoutError.unless(dist.is_initialized(), f"no ranks have met; {right}")
    return dist.get_world_size()


def check_met(layout) -> None:
    """Raise LayoutError unless it is for as many ranks as have met."""
    check_axes(layout)
    n = dist.get_world_size() if dist.is_initialized() else layout.world
    words = f"{layout} needs {layout.world} ranks, and there are {n}"
    LayoutError.unless(n == layout.world, words)


@dataclass(frozen=True)
class Layout:
    """How a model and its batch are shared out; the product of five axes is the world.

    pp: stages of layers; dp: replicas; fsdp: parts of every tensor (ZeRO-3); cp: pieces
    of the sequence; tp: parts of every matrix. chunks: stages on a rank; micro_batch:
    sequences that a rank computes at a time, at most; recompute: what the backward pass
    computes again, "none", "selective" or "full"; compile: each block; bf16: products.
    """

    pp: int = 1
    dp: int = 1
    fsdp: int = 1
    cp: int = 1
    tp: int = 1
    chunks: int = 1
    micro_batch: int = 8
    recompute: str = "none"
    compile: bool = False
    bf16: bool = False

    @property
    def world(self) -> int:
        """How many ranks it needs."""
        return math.prod(getattr(self, axis) for axis in AXES)

    @property
    def data(self) -> int:
        """How many groups of ranks read different sequences."""
        return self.dp * self.fsdp

    def __str__(self) -> str:
        told = [f"{a}={getattr(self, a)}" for a in AXES if getattr(self, a) != 1]
        return " ".join(told) or "one rank"


class Grid:
    """The ranks of a layout, and where this one stands: pp, data, cp, tp.

    mesh: torch's DeviceMesh with the axes pp, dp, shard, tp; shard is fsdp · cp, whose
    ranks keep different parts of each tensor. long: the axis cp alone, or None.
    """

    def __init__(self, layout: Layout, device: str = "cpu"):
        check_met(layout)
        n, kind = layout, torch.device(device).type
        self.layout, self.device = layout, torch.device(device)
        shape, names = (n.pp, n.dp, n.fsdp * n.cp, n.tp), ("pp", "dp", "shard", "tp")
        self.mesh = init_device_mesh(kind, shape, mesh_dim_names=names)
        self.pp, replica, shard, self.tp = self.mesh.get_coordinate()
        self.data, self.cp = replica * n.fsdp + shard // n.cp, shard % n.cp
        self.long = None
        if n.cp > 1:
            shape, names = (n.pp * n.data, n.cp, n.tp), ("others", "cp", "tp")
            self.long = init_device_mesh(kind, shape, mesh_dim_names=names)["cp"]


def tensor_plan() -> dict:
    """How the parts of a block are shared out: two pairs, tracks shared in between."""
    cut, whole = Shard(1), Replicate()  # dimension 1 of (B, T, d_model) is the tracks
    pair = {"input_layouts": (cut, None), "desired_input_layouts": (whole, None)}
    one = {"input_layouts": (cut,), "desired_input_layouts": (whole,)}
    return {
        "ln_1": SequenceParallel(),
        "attention": PrepareModuleInput(**pair),  # all-gather: (x, past)
        "attention.wq": ColwiseParallel(),
        "attention.wk": ColwiseParallel(),
        "attention.wv": ColwiseParallel(),
        "attention.wo": RowwiseParallel(output_layouts=cut),  # reduce-scatter
        "ln_2": SequenceParallel(),
        "mlp": PrepareModuleInput(**one),
        "mlp.up": ColwiseParallel(),
        "mlp.down": RowwiseParallel(output_layouts=cut),
    }


def ends_plan() -> dict:
    """The same for what stands before and behind the blocks."""
    out = {"output_layouts": Shard(1), "desired_output_layouts": Replicate()}
    return {
        "embeddings.wte": RowwiseParallel(
            input_layouts=Replicate(), output_layouts=Shard(1)
        ),
        "embeddings.wpe": RowwiseParallel(
            input_layouts=Replicate(), output_layouts=Shard(0)
        ),
        "ln_f": [
            SequenceParallel(),
            PrepareModuleOutput(**out, use_local_output=False),
        ],
    }


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks of a GPT, or of a part of one, which has them in a dict."""
    blocks = model.blocks
    return [*(blocks.values() if isinstance(blocks, nn.ModuleDict) else blocks)]


def split_matrices(model: nn.Module, mesh) -> None:
    """Lay the plans upon a model: each rank has some heads, columns and rows of it."""
    for block in blocks_of(model):
        parallelize_module(block, mesh, tensor_plan())
    there = dict(model.named_modules())
    for name, styles in ends_plan().items():
        for style in styles if isinstance(styles, list) else [styles]:
            if name in there:
                parallelize_module(model, mesh, {name: style})


def shard(model: nn.Module, grid: Grid) -> None:
    """FSDP2: this rank keeps a part of each tensor, block by block."""
    ways = {"mesh": grid.mesh["dp", "shard"]}
    if grid.layout.bf16:  # products in bfloat16, sums of gradients in float32
        ways["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    for block in blocks_of(model):
        # a pipeline comes back soon, with the next micro-batch: it keeps them gathered
        fully_shard(block, reshard_after_forward=grid.layout.pp == 1, **ways)
    fully_shard(model, reshard_after_forward=False, **ways)
    if isinstance(model, GPT):
        register_fsdp_forward_method(model, "loss")


def parallelize(model: nn.Module, grid: Grid) -> nn.Module:
    """Share a model out over the grid, in place; it is on "meta", without numbers.

    It is a GPT, or a part of one. Its layers do not change, nor do its names.
    """
    layout = grid.layout
    if layout.tp > 1:
        split_matrices(model, grid.mesh["tp"])
    for block in blocks_of(model):
        if layout.recompute != "none":
            block.forward = partial(run_again, block, layout.recompute)
        if layout.compile:
            block.compile()
    if layout.data * layout.cp > 1 or layout.bf16:
        shard(model, grid)
    return model


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor, on every rank; all ranks must ask."""
    if not isinstance(tensor, DTensor):
        return tensor
    cuts = [*tensor.placements]
    for axis in range(len(cuts)):  # one after the other: FSDP cut last, so it is first
        cuts[axis] = Replicate()
        tensor = tensor.redistribute(placements=cuts)
    return tensor.to_local()


def piece_of(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """What this rank would hold of a whole tensor that is shared out as `like` is."""
    if not isinstance(like, DTensor):
        return whole
    axes = zip(like.placements, range(like.device_mesh.ndim))
    for cut, axis in reversed([*axes]):  # tp, the last axis, cut first, FSDP after it
        if hasattr(cut, "dim"):  # Shard, or FSDP's own kind of it
            n, mine = like.device_mesh.size(axis), like.device_mesh.get_local_rank(axis)
            pieces = whole.chunk(n, cut.dim)
            none_left = whole.narrow(cut.dim, 0, 0)  # 5 rows on 4 ranks: 2 + 2 + 1 + 0
            whole = pieces[mine] if mine < len(pieces) else none_left
    return whole


def fill_piece(parameter: torch.Tensor, whole: torch.Tensor) -> None:
    """Fill what this rank holds of a parameter from the whole of it."""
    local(parameter).copy_(piece_of(whole, parameter))


def materialise(model: nn.Module, device, seed: int = 0) -> nn.Module:
    """Give a shared-out model its numbers: those of GPT(config, seed), in pieces."""
    model.to_empty(device=device)
    initialise(model, model.config.n_layers, seed, fill=fill_piece)
    return model


def shift(x: torch.Tensor, mesh, way: int) -> torch.Tensor:
    """Send to the rank after (way 1) or before (-1), receive from the other one.

    The rank at the end, which receives nothing, has zeros.
    """
    group, here, messages = mesh.get_group(), mesh.get_local_rank(), []
    got, there = torch.zeros_like(x), partial(dist.get_global_rank, group)
    if 0 <= here + way < mesh.size():
        messages.append(dist.P2POp(dist.isend, x, there(here + way), group))
    if 0 <= here - way < mesh.size():
        messages.append(dist.P2POp(dist.irecv, got, there(here - way), group))
    for work in dist.batch_isend_irecv(messages):
        work.wait()
    return got


class Halo(torch.autograd.Function):
    """The last `width` tracks of the rank before; their gradient goes back to it."""

    @staticmethod
    def forward(ctx, x, width, mesh):
        """(N, H, T, d) -> (N, H, width, d)."""
        ctx.mesh, ctx.before = mesh, x.shape[2] - width
        return shift(x[:, :, ctx.before :].contiguous(), mesh, 1)

    @staticmethod
    def backward(ctx, grad):
        """Zeros for the tracks that nobody fetched."""
        back = shift(grad.contiguous(), ctx.mesh, -1)
        return F.pad(back, (0, 0, ctx.before, 0)), None, None


def gather_tracks(x: torch.Tensor, mesh) -> torch.Tensor:
    """(N, H, T, d) -> (N, H, n · T, d), all ranks' tracks; gradients are summed."""
    whole = DTensor.from_local(x, mesh, [Shard(2)]).redistribute(mesh, [Replicate()])
    return whole.to_local(grad_placements=[Partial()])


class Neighbours:
    """What a layer sees of the ranks whose tracks come before ours."""

    def __init__(self, mesh, bandwidth: int | None):
        self.mesh, self.bandwidth = mesh, bandwidth

    def append(self, k: torch.Tensor, v: torch.Tensor) -> tuple:
        """Our keys and values behind those of other ranks, and no mask."""
        here, n, both = self.mesh.get_local_rank(), k.shape[2], torch.cat([k, v])
        if self.bandwidth is None or self.bandwidth - 1 > n:
            both = gather_tracks(both, self.mesh)[:, :, : (here + 1) * n]
        elif self.bandwidth > 1:
            before = Halo.apply(both, self.bandwidth - 1, self.mesh)
            # the first rank has none, but must be there when the gradient comes back
            both = torch.cat([before, both], 2) if here else both + 0 * before.sum()
        return *both.chunk(2), None


class Sequence:
    """The `past` of a piece of a long text: the ranks along mesh have the others.

    n_tokens: of the piece. Read a text once with it: it keeps nothing.
    """

    def __init__(self, config, mesh, n_tokens: int):
        self.length = mesh.get_local_rank() * n_tokens  # tracks before ours
        bands = {"dense": None, "banded": config.bandwidth}
        self.layers = [Neighbours(mesh, bands[kind]) for kind in config.kinds]

    def tracks(self, tokens: torch.Tensor) -> torch.Tensor:
        """Where our tokens sit in the text."""
        n = tokens.shape[1]
        return torch.arange(self.length, self.length + n, device=tokens.device)


def keep_products(context, operation, *arguments, **ways) -> CheckpointPolicy:
    """Keep attention and products that do not narrow, but no parts of a sum (tp)."""
    name, kept = str(operation), "_scaled_dot_product" in str(operation)
    if name in ("aten.mm.default", "aten.addmm.default"):
        x, weight = arguments[-2:]
        cuts = x.placements if isinstance(x, DTensor) else ()
        is_part = any(getattr(cut, "dim", None) == x.dim() - 1 for cut in cuts)
        kept = x.shape[-1] <= weight.shape[-1] and not is_part
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def run_again(block: nn.Module, kind: str, x: torch.Tensor, past=None):
    """A block that keeps little, and runs again when its gradient is needed."""
    run = partial(type(block).forward, block)
    if not torch.is_grad_enabled():
        return run(x, past)
    ways = {"use_reentrant": False, "preserve_rng_state": False}
    if kind == "selective":
        how = partial(create_selective_checkpoint_contexts, keep_products)
        ways["context_fn"] = how
    return checkpoint(run, x, past, **ways)


def factors(number: int, count: int) -> Iterator[tuple[int, ...]]:
    """All ways to write a number as a product of so many, in order."""
    if count == 1:
        yield (number,)
        return
    for first in (n for n in range(1, number + 1) if number % n == 0):
        for rest in factors(number // first, count - 1):
            yield (first, *rest)


def layouts(config, world: int, n_sequences=None, n_ctx=None) -> Iterator["Layout"]:
    """All layouts of so many ranks that a model and its batch allow."""
    for sizes in factors(world, len(AXES)):
        layout = Layout(*sizes)
        if not faults(layout, config, n_sequences, n_ctx):
            yield layout


def distance(a: "Layout", b: "Layout") -> float:
    """How far two layouts are apart: doublings, summed over the axes."""
    return sum(abs(math.log2(getattr(a, x) / getattr(b, x))) for x in AXES)
