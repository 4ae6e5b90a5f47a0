"""Whether a run fits and what it costs, before a GPU is rented: memory, messages,
days, dollars."""

# Made from book/20_planning.ipynb by tools/export.py; edit the chapter.
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product

from gpt3lib.files import Refusal, as_float, is_whole
from gpt3lib.model import GPTConfig
from gpt3lib.parallel import AXES, RECOMPUTE, Layout, faults, layouts
from gpt3lib.pipeline import cuts
from gpt3lib.recipe import TABLE_BATCHES
from gpt3lib.scaling import n_params, positive, training_flops


# What is refused; the workshop at the end of this page has a table of it.
class PlanError(Refusal, ValueError):
    """A plan that cannot be: an unknown GPU, a batch that does not divide, no room."""


def check_micro(layout: Layout, n_sequences: int) -> int:
    """Micro-batches of a step on each rank. Raises PlanError for a rest."""
    rows = layout.data * PlanError.unless_whole("micro_batch", layout.micro_batch)
    words = f"{n_sequences} sequences on {layout.data} groups of ranks, of "
    words += f"{layout.micro_batch} at a time, leave a rest"
    right = "let dp · fsdp · micro_batch divide the batch"
    PlanError.unless(n_sequences % rows == 0, f"{words}; {right}")
    return n_sequences // rows


def layer_shapes(config: GPTConfig) -> list[tuple]:
    """(shape, dimension that tp cuts, or None) of each tensor of a layer."""
    d, f = config.d_model, config.d_ff
    thin = [((d,), None)] * 6  # two norms, the biases of wo and down
    wide = [((d, d), 0), ((d,), 0)] * 3 + [((f, d), 0), ((f,), 0)]  # wq wk wv, up
    return [*thin, *wide, ((d, d), 1), ((d, f), 1)]  # wo, down


def end_shapes(config: GPTConfig, first: bool, last: bool) -> list[tuple]:
    """The same of what stands before the layers and behind; the table with both."""
    d, table = config.d_model, ((config.vocab_size, config.d_model), 0)
    before, behind = [((config.n_ctx, d), 0)] * first, [((d,), None)] * 2 * last
    return [table] * (first or last) + before + behind


def numbers(shapes, tp: int = 1, shards: int = 1) -> int:
    """How many numbers of these tensors the first of tp · shards ranks holds."""
    total = 0
    for shape, cut in shapes:
        size = [math.ceil(n / tp) if i == cut else n for i, n in enumerate(shape)]
        size[0] = math.ceil(size[0] / shards)  # FSDP cuts what tp leaves, by rows
        total += math.prod(size)
    return total


# widths cut by tp, or not; selective: what goes in; q, k, v, attention's result; up's
KEPT_NUMBERS = {"full": (1, 0), "selective": (9, 0), "none": (14, 2)}


def kept_widths(layout: Layout, kind: str, blocks: int = 0) -> float:
    """Widths (d_model) that a token leaves in a layer for the backward pass.

    blocks: of a band that is computed in blocks, as on a processor, where q, k and v
    are padded, and k and v once more in pairs; 0 for one kernel.
    """
    cut, whole = KEPT_NUMBERS[layout.recompute]
    if layout.recompute == "selective" and layout.tp == 1:
        whole += 1  # wo's product, which is no partial sum then
    if layout.recompute == "none" and kind == "banded" and blocks:
        cut += 5 - 4 / blocks
    return cut / layout.tp + whole


@dataclass(frozen=True)
class Rank:
    """The first rank of one stage of a layout: what it has, in numbers and in bytes."""

    config: GPTConfig
    layout: Layout
    stage: int = 0
    blocks: bool = False  # a band in blocks, as on a processor; else one kernel

    def __post_init__(self):
        words = f"chunks is {self.layout.chunks}; plans are made for 1"
        PlanError.unless(self.layout.chunks == 1, words)
        words = f"stage is {self.stage!r}; there are 0 to {self.layout.pp - 1}"
        PlanError.unless(is_whole(self.stage, 0) and self.stage < self.layout.pp, words)

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of its layers."""
        way_out = self.config.vocab_size / (12 * self.config.d_model)
        bounds = cuts(self.config.n_layers, self.layout.pp, way_out)
        return self.config.kinds[slice(*bounds[self.stage])]

    @property
    def ends(self) -> tuple[bool, bool]:
        """Whether the tokens come in here, and whether the loss is computed here."""
        return self.stage == 0, self.stage == self.layout.pp - 1

    @property
    def gathers(self) -> bool:
        """Whether FSDP is at work, for its shards, the replicas or bfloat16."""
        return self.layout.data * self.layout.cp > 1 or self.layout.bf16

    @property
    def width(self) -> int:
        """Bytes of a number in a product."""
        return 2 if self.layout.bf16 else 4

    @property
    def n_tokens(self) -> int:
        """Tokens of a micro-batch on this rank."""
        return self.layout.micro_batch * self.config.n_ctx // self.layout.cp

    def count(self, shards: int = 1, layers: bool = True, ends: bool = True) -> int:
        """Its numbers: of its layers, of the tables and norms at the ends, or both."""
        layer, tp = layer_shapes(self.config), self.layout.tp
        found = len(self.kinds) * numbers(layer, tp, shards) if layers else 0
        if ends:
            found += numbers(end_shapes(self.config, *self.ends), tp, shards)
        return found

    @cached_property
    def held(self) -> int:
        """The numbers that this rank updates."""
        return self.count(self.layout.fsdp * self.layout.cp)

    @cached_property
    def whole(self) -> int:
        """The numbers that it computes with, gathered."""
        return self.count()

    def kept(self, kind: str, recompute: str | None = None) -> float:
        """Bytes that a micro-batch leaves in a layer of this kind."""
        layout = replace(self.layout, recompute=recompute or self.layout.recompute)
        band = self.blocks and self.config.bandwidth < self.config.n_ctx
        n = math.ceil(self.config.n_ctx / max(self.config.bandwidth, 32)) if band else 0
        widths = kept_widths(layout, kind, n)
        sums = 4 * self.config.n_heads / layout.tp  # attention's own, in float32
        sums *= layout.recompute != "full"
        return self.n_tokens * (self.width * self.config.d_model * widths + sums)

    @cached_property
    def activations(self) -> float:
        """Bytes that a micro-batch leaves in all its layers."""
        return sum(self.kept(kind) for kind in self.kinds)


def table_surplus(rank: Rank) -> int:
    """Numbers of the embeddings' gradient beyond its cut: torch adds it up whole."""
    config, tp = rank.config, rank.layout.tp
    both = (config.vocab_size + config.n_ctx) * config.d_model
    return round(both * (1 - 1 / tp)) if rank.ends[0] else 0


def loss_bytes(rank: Rank) -> float:
    """What the loss needs: pieces of logits and the table's gradient, or all logits."""
    if not rank.ends[1]:
        return 0.0
    config, layout, n = rank.config, rank.layout, rank.n_tokens
    h = n * config.d_model * rank.width * (1 + 1 / layout.tp)
    rows = math.ceil(config.vocab_size / layout.tp)
    if layout.tp > 1:  # loss_parallel: four times all logits in float32
        return h + 16 * n * rows
    piece = 256 * rows * (4 + rank.width)  # see model.LossInPieces
    return h + 4 * config.d_model * (n + rows) + piece


def working_bytes(rank: Rank) -> float:
    """The most that a layer's backward pass, or the loss, needs for a moment."""
    layout = rank.layout
    hidden = 8 / layout.tp + (layout.tp > 1)  # gradients of GELU, on both sides
    layer = rank.n_tokens * rank.config.d_model * rank.width * hidden
    if layout.recompute != "none":  # one layer is there whole
        layer += max(rank.kept(kind, "none") - rank.kept(kind) for kind in rank.kinds)
    return max(layer, loss_bytes(rank))


def moments(rank: Rank, n_micro: int) -> dict[str, dict[str, float]]:
    """What the rank holds at the moments at which it may be fullest, in bytes."""
    late = min(PlanError.unless_whole("n_micro", n_micro), rank.layout.pp) > 1
    layout, flight = rank.layout, min(n_micro, rank.layout.pp - rank.stage)
    base = {"parameters": 4.0 * rank.held, "optimizer": 8.0 * rank.held}
    layer, ends = rank.count(ends=False) // len(rank.kinds), rank.count(layers=False)
    open_now = rank.whole if layout.pp > 1 else ends + 2 * layer
    gathered = rank.width * open_now if rank.gathers else 0.0
    summed = 4.0 * (rank.whole if late or not rank.gathers else rank.held)
    # with the way out on the same rank torch cuts the sum of both gradients
    summed += 4.0 * table_surplus(rank) * (layout.pp > 1)
    one, work = rank.activations, working_bytes(rank)
    above = 4.0 * layer * (layout.pp == 1 and rank.gathers)  # is summed up meanwhile
    above = max(0.0, above - one / len(rank.kinds))  # but has left its activations
    row = lambda *values: base | dict(zip(LINES[2:], values))
    found = {"first backward": row(0.0, gathered, flight * one, work + above)}
    if n_micro > flight:
        found["middle"] = row(summed, gathered, flight * one, work + above)
    new = rank.width * (layer + rank.ends[0] * ends) if rank.gathers else 0.0
    new += rank.width * table_surplus(rank)
    found["backward's end"] = row(summed, gathered, (flight - 1) * one, work + new)
    whole = 4.0 * max(layer, ends) if rank.gathers else 0.0
    found["sum over ranks"] = row(summed, gathered, 0.0, whole)
    found["update"] = row(4.0 * rank.held, 0.0, 0.0, 0.0)
    return found


LINES = "parameters optimizer gradients gathered activations working".split()


def ledger(config, layout: Layout, n_micro: int, stage=0, blocks=False) -> dict:
    """Bytes that a rank of this stage holds at its fullest moment, line by line."""
    found = moments(Rank(config, layout, stage, blocks), n_micro)
    return max(found.values(), key=lambda lines: sum(lines.values()))


def fullest(config, layout: Layout, n_micro: int) -> dict:
    """The ledger of the fullest rank, which is on the first stage or on the last."""
    found = [ledger(config, layout, n_micro, stage) for stage in {0, layout.pp - 1}]
    return max(found, key=lambda lines: sum(lines.values()))


@dataclass(frozen=True)
class GPU:
    """A GPU as its maker sells it; price in dollars an hour is assumed."""

    peak: float  # FLOP/s of matrix products in 16 bits, not sparse
    memory: float  # GiB
    bandwidth: float  # bytes/s of its memory
    link: float  # bytes/s to another GPU of its machine, each way
    watts: float
    price: float
    source: str


GPUS = {
    "v100-32gb": GPU(125e12, 32, 0.9e12, 150e9, 300, 1.50, "N17"),
    "a100-40gb": GPU(312e12, 40, 1.555e12, 300e9, 400, 1.50, "NV20"),
    "a100-80gb": GPU(312e12, 80, 2.039e12, 300e9, 400, 1.80, "NV20"),
    "h100-80gb": GPU(989e12, 80, 3.35e12, 450e9, 700, 2.50, "NV22"),
    "h200-141gb": GPU(989e12, 141, 4.8e12, 450e9, 700, 3.00, "NV24"),
}


def find_gpu(name: str) -> GPU:
    """A GPU of the table. Raises PlanError."""
    PlanError.unless(name in GPUS, f"no GPU {name!r}; there are {', '.join(GPUS)}")
    return GPUS[name]


def tensor_bytes(rank: Rank) -> float:
    """Bytes that a rank sends to its tp group for a micro-batch."""
    tp, times = rank.layout.tp, 8 + 3 * (rank.layout.recompute != "none")
    one = rank.n_tokens * rank.config.d_model * rank.width * (tp - 1) / tp
    return one * (times * len(rank.kinds) + 2 * sum(rank.ends))


def shard_bytes(rank: Rank, n_micro: int) -> float:
    """Bytes that a rank sends for FSDP in a step: weights, then gradients."""
    n, alone = rank.layout.fsdp * rank.layout.cp, rank.layout.pp == 1
    one = rank.width * (rank.whole + alone * rank.count(ends=False)) + 4 * rank.whole
    rounds = n_micro if alone else 1  # each gathers all, its layers twice, and sums up
    return rounds * one * (n - 1) / n


def sent_bytes(rank: Rank, n_micro: int) -> dict[str, float]:
    """Bytes that a rank sends on each axis in a step; an all-reduce counts twice."""
    layout, n = rank.layout, rank.layout.dp
    stage = rank.n_tokens * rank.config.d_model * rank.width / layout.tp
    table = end_shapes(rank.config, *rank.ends)[: layout.pp > 1]  # the ends swap it
    table = numbers(table, layout.tp, layout.fsdp * layout.cp)
    return {
        "tp": n_micro * tensor_bytes(rank),
        "shard": shard_bytes(rank, n_micro),
        "dp": 2 * 4 * rank.held * (n - 1) / n,
        "pp": n_micro * (2 - sum(rank.ends)) * stage + 4 * table,
    }


@dataclass(frozen=True)
class Machine:
    """GPUs and what connects them; network: bytes/s of each GPU to other machines."""

    gpu: GPU
    per_node: int = 8
    network: float = 50e9
    efficiency: float = 0.5

    def __post_init__(self):
        PlanError.unless_whole("per_node", self.per_node)
        words = f"network is {self.network!r}; it must be a number above 0"
        PlanError.unless(0 < as_float(self.network) < math.inf, words)
        words = f"efficiency is {self.efficiency!r}; it must be a share, above 0 and at"
        PlanError.unless(0 < as_float(self.efficiency) <= 1, f"{words} most 1")

    def link(self, ranks: int) -> float:
        """Bytes/s between neighbours among so many ranks that sit side by side."""
        return self.gpu.link if ranks <= self.per_node else self.network


def stage_flops(rank: Rank) -> float:
    """FLOPs of a micro-batch on this rank, forward, backward and what runs again."""
    config, layout = rank.config, rank.layout
    d, n = config.d_model, config.n_ctx
    keys = {"dense": n, "banded": min(config.bandwidth, n)}
    found = sum(72 * d**2 + 12 * d * keys[kind] for kind in rank.kinds)
    found *= 11 / 9 if layout.recompute == "full" else 1  # forward again, but for down
    found += 6 * d * config.vocab_size * rank.ends[1]
    return found * rank.n_tokens / layout.tp


def moved_bytes(rank: Rank) -> float:
    """Bytes that norms, GELUs and sums read and write for a micro-batch."""
    widths = 18 * (3 + (rank.layout.recompute != "none"))  # backward is twice forward
    one = rank.n_tokens * rank.config.d_model * rank.width / rank.layout.tp
    return widths * one * len(rank.kinds)


def predicted_seconds(config, layout: Layout, n_micro: int, machine: Machine) -> dict:
    """Seconds of a step, by what they go to; the slowest stage decides."""
    ranks = [Rank(config, layout, stage) for stage in {0, layout.pp - 1}]
    speed = machine.gpu.peak * machine.efficiency
    fast, memory = machine.link(layout.tp), machine.gpu.bandwidth
    shards = layout.tp * layout.fsdp * layout.cp
    slots = [(stage_flops(r), moved_bytes(r), tensor_bytes(r)) for r in ranks]
    slots = [(a / speed, b / memory, c / fast) for a, b, c in slots]
    work, rest, talk = max(slots, key=sum)
    sent = sent_bytes(ranks[0], n_micro)
    shard = sent["shard"] / machine.link(shards)
    if layout.pp == 1:  # the next layer is gathered while this one is computed
        shard = max(0.0, shard - n_micro * work)
    return {
        "products": n_micro * work,
        "norms, GELUs": n_micro * rest,
        "tensor parallel": n_micro * talk,
        "bubble": (layout.pp - 1) * (work + rest + talk),
        "stages": sent["pp"] / machine.network,
        "shards": shard,
        "replicas": sent["dp"] / machine.link(shards * layout.dp),
        "update": 28 * ranks[0].held / memory,  # what AdamW reads and writes
    }


@dataclass(frozen=True)
class Proposal:
    """A layout with what it needs: bytes of the fullest rank, seconds of a step."""

    layout: Layout
    n_micro: int
    memory: float
    seconds: float


def weigh(config, layout: Layout, n_sequences: int, machine: Machine) -> Proposal:
    """What a layout needs. Raises PlanError when the batch leaves a rest."""
    n_micro = check_micro(layout, n_sequences)
    full = sum(fullest(config, layout, n_micro).values())
    seconds = sum(predicted_seconds(config, layout, n_micro, machine).values())
    return Proposal(layout, n_micro, full, seconds)


POWER = 1.2  # of a machine's GPUs: what its processors, network and cooling add
ROOM = 0.92  # of a GPU's memory; the rest is for NCCL, the allocator and the driver
TOLD = (*AXES, "micro_batch", "recompute")  # of a layout


def told_layout(config, world, n_sequences, told: dict) -> Layout:
    """The smallest layout with what is told. Raises PlanError when there is none."""
    unknown = ", ".join(name for name in told if name not in TOLD)
    PlanError.unless(not unknown, f"{unknown} is none of {', '.join(TOLD)}")
    fixed = Layout(**{"micro_batch": 1} | told)
    whole = {"world": world, "n_sequences": n_sequences} | vars(fixed)
    for name in ("world", "n_sequences", *AXES, "micro_batch"):
        PlanError.unless_whole(name, whole[name])
    words = f"recompute is {fixed.recompute!r}; there are {', '.join(RECOMPUTE)}"
    PlanError.unless(fixed.recompute in RECOMPUTE, words)
    wrong = faults(fixed, config, n_sequences)
    PlanError.unless(not wrong, "; ".join(wrong))
    n_micro = check_micro(fixed, n_sequences)
    words = f"pp={fixed.pp} needs as many micro-batches; each rank has {n_micro}"
    PlanError.unless(n_micro >= fixed.pp, words)
    return fixed


def candidates(config, world, n_sequences, per_node, told: dict) -> Iterator[Layout]:
    """Layouts in bfloat16 that divide, tp inside a machine; told: what is set."""
    limits = {"cp": 1} | told  # no context parallelism without a word of it
    sizes = [told["micro_batch"]] if "micro_batch" in told else [1, 2, 4, 8]
    ways = [told["recompute"]] if "recompute" in told else [*KEPT_NUMBERS]
    for found in layouts(config, world, n_sequences):
        wrong = (getattr(found, x) != n for x, n in limits.items() if x in AXES)
        if any(wrong) or found.tp > max(per_node, told.get("tp", 1)):
            continue
        share = n_sequences // found.data
        fine = [n for n in sizes if share % n == 0 and share // n >= found.pp]
        for size, way in product(fine, ways):
            yield replace(found, recompute=way, micro_batch=size, bf16=True)


def propose(config, world, n_sequences, machine: Machine, **told) -> list[Proposal]:
    """The layouts that fit, the fastest first; told: what is set. Raises PlanError."""
    fixed, n = told_layout(config, world, n_sequences, told), machine.per_node
    every = candidates(config, world, n_sequences, n, told)
    every = [weigh(config, one, n_sequences, machine) for one in every]
    if not every:  # the smallest layout itself divides, so some number does
        most = n_sequences * fixed.cp * told.get("tp", min(n, config.n_heads))
        most, step = min(world - 1, most), fixed.world
        fine = lambda fewer: any(candidates(config, fewer, n_sequences, n, told))
        near = next(filter(fine, range(most - most % step, 0, -step)), step)
        what = f"has {fixed}" if world % step else f"divides {n_sequences} sequences"
        raise PlanError(f"no layout of {world} GPUs {what}; one of {near} does")
    room = ROOM * machine.gpu.memory * 2**30
    least = min(one.memory for one in every)
    words = f"nothing fits: the smallest layout takes {least / 2**30:.1f} GiB, and "
    words += f"{room / 2**30:.1f} are free; take more GPUs, or larger ones"
    PlanError.unless(least <= room, words)
    fits = [one for one in every if one.memory <= room]
    return sorted(fits, key=lambda one: (float(f"{one.seconds:.3g}"), one.memory))


def batch_of(config) -> tuple[GPTConfig, int, float]:
    """Model, sequences of a batch and tokens. Raises PlanError, ScalingError."""
    said = {name: value for name, value in vars(config).items() if value is not None}
    shape = GPTConfig.from_name(config.size)
    shape = replace(shape, n_ctx=said.get("n_ctx", shape.n_ctx))
    n_ctx, usual = shape.n_ctx, TABLE_BATCHES.get(config.size, (32 * shape.n_ctx,))[0]
    tokens = said.get("batch_tokens", max(1, usual // n_ctx) * n_ctx)
    rest = PlanError.unless_whole("batch_tokens", tokens, n_ctx) % n_ctx
    words = f"batch_tokens is {tokens}; whole windows of {n_ctx} make {tokens - rest}"
    PlanError.unless(rest == 0, words)
    return shape, tokens // n_ctx, positive("n_tokens", said.get("n_tokens", 300e9))


def machine_of(config) -> Machine:
    """A command's GPUs and what connects them. Raises PlanError, ScalingError."""
    gpu = find_gpu(config.gpu)
    if config.price is not None:
        gpu = replace(gpu, price=positive("price", config.price))
    network = positive("network", config.network) * 1e9
    return Machine(gpu, config.per_node, network, config.efficiency)


def bill(one: Proposal, shape, n_sequences: int, n_tokens, n_gpus, machine) -> dict:
    """What a run of this layout takes: MFU, days, energy, dollars."""
    gpu, batch = machine.gpu, n_sequences * shape.n_ctx
    seconds = n_tokens / batch * one.seconds
    mfu = 6 * n_params(shape) * batch / (one.seconds * n_gpus * gpu.peak)
    energy = n_gpus * gpu.watts * POWER * seconds / 3.6e9
    paid = n_gpus * gpu.price * seconds / 3600
    return {"MFU": mfu, "days": seconds / 86_400, "MWh": energy, "dollars": paid}


def show_plan(one: Proposal, shape, machine: Machine, costs: dict) -> None:
    """Print a layout's memory, messages, time and costs, and where each is from."""
    layout, n_micro = one.layout, one.n_micro
    lines = fullest(shape, layout, n_micro)
    sent = sent_bytes(Rank(shape, layout), n_micro)
    seconds, gpu = predicted_seconds(shape, layout, n_micro, machine), machine.gpu
    sheet = f"data sheet [{gpu.source}]"
    rows = [("memory of the fullest rank",)]
    rows += [(name, f"{n / 2**30:.2f} GiB", "computed") for name, n in lines.items()]
    rows += [("messages of a rank in a step",)]
    rows += [(name, f"{n / 1e9:.2f} GB", "computed") for name, n in sent.items()]
    rows += [("time of a step",)]
    rows += [(name, f"{n:.2f} s", "predicted") for name, n in seconds.items()]
    rows += [("the run",), ("FLOPs", f"{costs['FLOPs']:.2e}", "computed")]
    looks = {"MFU": ".0%", "days": ",.1f", "MWh": ",.0f", "dollars": ",.0f"}
    rows += [(k, format(costs[k], look), "predicted") for k, look in looks.items()]
    rows += [("taken from elsewhere",)]
    rows += [("peak", f"{gpu.peak / 1e12:.0f} TFLOP/s", sheet)]
    rows += [("NVLink", f"{gpu.link / 1e9:.0f} GB/s", sheet)]
    rows += [("power", f"{gpu.watts:.0f} W", f"{sheet}, times {POWER} assumed")]
    rows += [("efficiency", f"{machine.efficiency:.0%}", "assumed")]
    rows += [("network", f"{machine.network / 1e9:.0f} GB/s", "assumed")]
    rows += [("price", f"${gpu.price:.2f} an hour", "assumed")]
    for row in rows:
        print(*row if len(row) == 1 else [f"  {row[0]:15} {row[1]:>14}  {row[2]}"])


def run_plan(config) -> tuple[GPTConfig, Proposal]:
    """Print a plan; the model's shape and the fastest layout. Raises PlanError."""
    shape, n_sequences, n_tokens = batch_of(config)
    n_gpus, machine = PlanError.unless_whole("gpus", config.gpus), machine_of(config)
    top = PlanError.unless_whole("top", config.top)
    told = {x: y for x in TOLD if (y := getattr(config, x)) is not None}
    fits = propose(shape, n_gpus, n_sequences, machine, **told)
    told = f"{config.size} on {n_gpus:,} × {config.gpu}, {n_tokens:.3g} tokens"
    print(f"{told}, {n_sequences:,} × {shape.n_ctx:,} a step")
    print(f"{len(fits)} layouts fit, of these the fastest:")
    about = shape, n_sequences, n_tokens, n_gpus, machine
    for one in fits[:top]:
        costs, way = bill(one, *about), one.layout.recompute
        print(f"  {one.layout} recompute={way}: {one.layout.micro_batch} at a time")
        text = f"{one.memory / 2**30:.1f} GiB, {one.seconds:.2f} s a step"
        print(f"    {text}, MFU {costs['MFU']:.0%}, {costs['days']:,.1f} days")
    flops = {"FLOPs": training_flops(shape, n_tokens)}
    show_plan(fits[0], shape, machine, bill(fits[0], *about) | flops)
    return shape, fits[0]
