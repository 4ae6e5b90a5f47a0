"""The plan: shapes against the model, kept tensors against autograd, bills against the article and the paper."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from gpt3lib import GPT, GPTConfig, plan
from gpt3lib.model import Block
from gpt3lib.parallel import Layout
from gpt3lib.pipeline import bubble_share
from gpt3lib.plan import (
    GPUS,
    LINES,
    Machine,
    PlanError,
    Rank,
    find_gpu,
    kept_widths,
    layer_shapes,
    ledger,
    numbers,
    predicted_seconds,
    propose,
    run_plan,
    sent_bytes,
    weigh,
)
from gpt3lib.recipe import TABLE_BATCHES
from gpt3lib.scaling import n_params
from gpt3lib.texts import DATA

BIG = GPTConfig.from_name("gpt3-175b")
SMALL = GPTConfig(1000, 128, 6, 64, 4, 16, bandwidth=32)
ONE = {"micro_batch": 1, "bf16": True}
EIGHT = Layout(pp=8, fsdp=16, tp=8, **ONE)
H100 = Machine(GPUS["h100-80gb"])


@pytest.mark.parametrize("name", sorted(TABLE_BATCHES))
def test_the_shapes_are_those_of_the_model(name):
    config = GPTConfig.from_name(name)
    with torch.device("meta"):
        block = Block(config)
    assert sorted(shape for shape, _ in layer_shapes(config)) == sorted(tuple(p.shape) for p in block.parameters())
    assert Rank(config, Layout()).held == n_params(config)
    stages = [Rank(config, Layout(pp=4), stage).held for stage in range(4)]
    assert sum(stages) == n_params(config) + config.vocab_size * config.d_model  # the table stands on both ends


@pytest.mark.parametrize("shards", [1, 3, 4])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_the_first_rank_has_the_first_piece_of_each_tensor(tp, shards):
    cuts = {"wq": 0, "wk": 0, "wv": 0, "up": 0, "wo.weight": 1, "down.weight": 1, "wte": 0, "wpe": 0}
    wanted = 0
    for name, p in GPT(SMALL).named_parameters():
        cut = next((dim for part, dim in cuts.items() if part in name), None)
        piece = p if cut is None else p.chunk(tp, cut)[0]
        wanted += piece.chunk(shards, 0)[0].numel()
    assert Rank(SMALL, Layout(fsdp=shards, tp=tp)).held == wanted
    assert numbers([((7, 5), 0), ((5,), None)], tp=2, shards=3) == 2 * 5 + 2
    assert numbers([((4, 7), 1)], tp=2) == 4 * 4 and numbers([((7, 5), 0), ((5,), None)]) == 40


def saved_bytes(block: nn.Module, x: torch.Tensor) -> int:
    """Bytes of the storages that autograd keeps for a block's backward pass, parameters aside."""
    own = {p.untyped_storage().data_ptr() for p in block.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and tensor.numel() > 8 * x.shape[0] * x.shape[1]:  # without sums of a track
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        block(x).sum()
        return sum(storage.nbytes() for storage in kept.values())


def test_a_dense_layer_keeps_sixteen_widths():
    config = replace(SMALL, d_model=256, n_heads=8, d_head=32)
    block, x = Block(config), torch.randn(2, 64, 256, requires_grad=True)
    assert saved_bytes(block, x) / (x.numel() * 4) == kept_widths(Layout(), "dense") == 16
    assert kept_widths(Layout(tp=8), "dense") == 14 / 8 + 2
    assert kept_widths(Layout(recompute="full", tp=4), "banded", 9) == 0.25


def test_a_band_in_blocks_keeps_more_and_one_kernel_does_not():
    config = replace(SMALL, d_model=256, n_heads=8, d_head=32, n_ctx=512)
    block, x = Block(config, "banded"), torch.randn(1, 512, 256, requires_grad=True)
    ours = kept_widths(Layout(), "banded", 512 // 32)
    assert saved_bytes(block, x) / (x.numel() * 4) == pytest.approx(ours, rel=0.03)
    assert ours == 16 + 5 - 4 / 16 and kept_widths(Layout(), "banded") == 16


def test_sixteen_bytes_for_each_parameter_and_what_pipelines_add():
    alone = plan.moments(Rank(BIG, Layout()), 1)["update"]
    assert sum(alone.values()) == 16 * n_params(BIG)
    lines = ledger(BIG, EIGHT, 96)
    assert list(lines) == LINES and all(size >= 0 for size in lines.values())
    by_hand = 12 * 12 * BIG.d_model**2 / 8  # the stage's numbers, but for the ends
    assert lines["parameters"] == pytest.approx(4 * by_hand / 16, rel=0.04)
    assert lines["optimizer"] == 2 * lines["parameters"]
    assert lines["gathered"] == pytest.approx(2 * by_hand, rel=0.04)
    assert lines["gradients"] == pytest.approx(4 * by_hand, rel=0.25)  # the table's is not cut
    one = 12 * 2048 * (2 * BIG.d_model * (14 / 8 + 2) + 4 * 96 / 8)
    assert lines["activations"] == 8 * one
    assert ledger(BIG, EIGHT, 96, stage=7)["activations"] == pytest.approx(one, rel=0.1)


def total(layout, n_micro=8, stage=0, config=BIG):
    return sum(ledger(config, layout, n_micro, stage).values())


def test_memory_grows_and_shrinks_as_it_must():
    assert total(replace(EIGHT, recompute="full")) < total(replace(EIGHT, recompute="selective")) < total(EIGHT)
    assert total(replace(EIGHT, micro_batch=2)) > total(EIGHT)
    assert total(replace(EIGHT, bf16=False)) > total(EIGHT)
    assert total(replace(EIGHT, fsdp=1, dp=16)) > total(EIGHT) > total(replace(EIGHT, fsdp=32))
    assert total(EIGHT, n_micro=96) == total(EIGHT, n_micro=9) >= total(EIGHT)
    assert total(Layout(fsdp=8, **ONE), 1, config=SMALL) < total(Layout(fsdp=8, **ONE), 2, config=SMALL)
    assert total(Layout(fsdp=8, **ONE), 2, config=SMALL) == total(Layout(fsdp=8, **ONE), 9, config=SMALL)


def test_gradients_are_summed_whole_only_in_a_pipeline():
    layout = Layout(fsdp=8, **ONE)
    rank = Rank(SMALL, layout)
    once, twice = plan.moments(rank, 1), plan.moments(rank, 2)
    assert once["backward's end"]["gradients"] == 4 * rank.held and "middle" not in once
    assert twice["backward's end"]["gradients"] == twice["middle"]["gradients"] == 4 * rank.held
    staged = Rank(SMALL, replace(layout, pp=2))
    late = plan.moments(staged, 3)
    assert late["backward's end"]["gradients"] == late["middle"]["gradients"] == 4 * staged.whole
    assert twice["update"]["gradients"] == 4 * rank.held and late["update"]["gradients"] == 4 * staged.held
    layer, ends = numbers(layer_shapes(SMALL)), rank.count(layers=False)
    one = plan.working_bytes(rank) + 4 * layer - rank.activations / 6  # the layer above is summed up meanwhile
    assert once["first backward"]["working"] == twice["middle"]["working"] == max(one, plan.working_bytes(rank))
    wide = Rank(BIG, layout)
    meanwhile = plan.moments(wide, 1)["first backward"]["working"] - plan.working_bytes(wide)
    assert (
        meanwhile == pytest.approx(4 * numbers(layer_shapes(BIG)) - wide.activations / 96, rel=1e-6) and meanwhile > 0
    )
    assert once["first backward"]["gathered"] == 2 * (ends + 2 * layer)
    assert once["sum over ranks"]["working"] == 4 * max(layer, ends)
    assert once["sum over ranks"]["activations"] == 0 and once["sum over ranks"]["gathered"] == 2 * (ends + 2 * layer)
    assert plan.table_surplus(Rank(BIG, EIGHT)) == (50257 + 2048) * BIG.d_model * 7 / 8
    assert plan.table_surplus(Rank(BIG, EIGHT, 3)) == plan.table_surplus(rank) == 0
    plain = plan.moments(Rank(SMALL, Layout(tp=2)), 1)
    assert plain["first backward"]["gathered"] == plain["sum over ranks"]["working"] == 0
    assert plain["backward's end"]["gradients"] == 4 * Rank(SMALL, Layout(tp=2)).whole


def test_gathers_hide_behind_products_where_there_is_no_pipeline():
    layout, slow = Layout(fsdp=16, **ONE), replace(H100, network=1e9)
    rank = Rank(SMALL, layout)
    seconds = predicted_seconds(SMALL, layout, 4, slow)
    assert seconds["shards"] == pytest.approx(plan.shard_bytes(rank, 4) / 1e9 - seconds["products"])
    assert seconds["update"] == 28 * rank.held / 3.35e12 and seconds["bubble"] == 0
    assert predicted_seconds(SMALL, layout, 4, replace(H100, network=1e15))["shards"] == 0
    copies = predicted_seconds(SMALL, replace(layout, dp=2), 4, slow)
    assert copies["replicas"] == pytest.approx(4 * rank.held / 1e9)


def test_what_is_sent_by_hand():
    sent, n = sent_bytes(Rank(BIG, EIGHT, 3), 96), 2048 * BIG.d_model * 2
    assert sent["tp"] == 96 * 12 * 8 * n * 7 / 8
    assert sent["pp"] == 96 * 2 * n / 8
    assert sent["dp"] == 0
    whole = Rank(BIG, EIGHT, 3).whole
    assert sent["shard"] == 6 * whole * 15 / 16
    doubled = sent_bytes(Rank(BIG, replace(EIGHT, dp=16, fsdp=1), 3), 96)
    assert doubled["dp"] == 8 * whole * 15 / 16 and doubled["shard"] == 0
    table = 4 * 6283 * BIG.d_model / 16  # the ends swap its gradient; 393 rows of 6,283 on the first shard
    assert sent_bytes(Rank(BIG, EIGHT), 96)["pp"] == pytest.approx(sent["pp"] / 2 + table, rel=0.001)


def test_time_is_work_over_speed_and_the_bubble_is_the_pipelines():
    seconds = predicted_seconds(BIG, EIGHT, 96, H100)
    dense = 48 * 12 * BIG.d_model * 2048 + 48 * 12 * BIG.d_model * 256
    work = (6 * 96 * 12 * BIG.d_model**2 + dense) * 1536 * 2048 / 1024
    assert seconds["products"] == pytest.approx(work / (0.5 * 989e12), rel=0.03)  # the last stage has the way out
    moved = 96 * 12 * 2048 * 2 * BIG.d_model * 54 / 8  # norms, GELUs and sums: 18 widths, three times
    assert seconds["norms, GELUs"] == pytest.approx(moved / 3.35e12)
    busy = seconds["products"] + seconds["norms, GELUs"] + seconds["tensor parallel"]
    assert seconds["bubble"] / (busy + seconds["bubble"]) == pytest.approx(bubble_share(8, 96))
    again = predicted_seconds(BIG, replace(EIGHT, recompute="full"), 96, H100)
    assert again["products"] / seconds["products"] == pytest.approx(11 / 9, rel=0.02)  # but for the last product
    assert again["tensor parallel"] / seconds["tensor parallel"] == pytest.approx(11 / 8, rel=0.02)
    assert again["norms, GELUs"] / seconds["norms, GELUs"] == pytest.approx(4 / 3)
    across = predicted_seconds(BIG, EIGHT, 96, replace(H100, per_node=4))
    assert across["tensor parallel"] == pytest.approx(9 * seconds["tensor parallel"])
    faster = predicted_seconds(BIG, EIGHT, 96, replace(H100, efficiency=1.0))
    assert faster["products"] == seconds["products"] / 2


def test_what_is_proposed_fits_divides_and_is_sorted():
    found = propose(BIG, 1024, 1536, H100)
    room = plan.ROOM * 80 * 2**30
    for one in found:
        assert one.layout.world == 1024 and one.memory <= room and one.layout.tp <= 8 and one.layout.cp == 1
        assert one.n_micro * one.layout.micro_batch * one.layout.data == 1536 and one.n_micro >= one.layout.pp
    assert [one.seconds for one in found] == pytest.approx(sorted(one.seconds for one in found), rel=0.011)
    first = found[0]
    assert first == weigh(BIG, first.layout, 1536, H100) and len({one.layout for one in found}) == len(found)
    told = propose(BIG, 1024, 1536, H100, pp=16, recompute="full", micro_batch=2)
    assert {(one.layout.pp, one.layout.recompute, one.layout.micro_batch) for one in told} == {(16, "full", 2)}
    assert all(one in found for one in told)
    assert propose(BIG, 1024, 1536, H100, tp=16)[0].layout.tp == 16  # who says so gets it


def command(size="gpt3-175b", **told):
    empty = dict.fromkeys("n_tokens batch_tokens n_ctx pp dp fsdp cp tp micro_batch recompute price".split())
    usual = {"gpus": 1024, "gpu": "h100-80gb", "per_node": 8, "network": 50, "efficiency": 0.5, "top": 3}
    return SimpleNamespace(size=size, **empty | usual | told)


def test_told_axes_that_do_not_divide_the_gpus_are_named():
    with pytest.raises(PlanError, match="no layout of 1024 GPUs has pp=3 tp=8; one of 768 does"):
        propose(BIG, 1024, 1536, H100, pp=3, tp=8)
    with pytest.raises(PlanError, match="no layout of 1000 GPUs divides 512 sequences; one of"):
        propose(GPTConfig.from_name("gpt3-1.3b"), 1000, 512, H100)


def test_small_models_are_ranked_by_their_time_too():
    found = propose(GPTConfig.from_name("gpt3-125m"), 8, 256, replace(H100, efficiency=1.0))
    seconds = [one.seconds for one in found]
    assert all(a <= b * 1.01 for a, b in zip(seconds, seconds[1:])) and seconds[0] < 0.2


def test_the_command_marks_each_number(capsys):
    shape, best = run_plan(command())
    assert shape == BIG and best == propose(BIG, 1024, 1536, H100)[0]
    text = capsys.readouterr().out
    rows = [
        line.split()
        for line in text.splitlines()
        if line.startswith("  ") and line[2] != " " and "at a time" not in line
    ]
    marks = ("computed", "predicted", "assumed", "data sheet [NV22]")
    assert len(rows) > 20 and all(any(mark in " ".join(row) for mark in marks) for row in rows)
    named = {row[0]: " ".join(row[1:]) for row in rows}
    assert named["parameters"].endswith("computed") and named["days"].endswith("predicted")
    assert named["FLOPs"].startswith("3.14e+23") and named["price"] == "$2.50 an hour assumed"
    days = float(named["days"].split()[0])
    mfu = 6 * n_params(BIG) * 300e9 / (days * 86_400 * 1024 * 989e12)
    assert float(named["MFU"].split("%")[0]) == pytest.approx(100 * mfu, abs=0.6)
    taken = ("peak", "NVLink", "power", "efficiency", "network", "price")
    assert [row[0] for row in rows[-6:]] == [*taken] and named["peak"].startswith("989 TFLOP/s")
    assert float(named["dollars"].split()[0].replace(",", "")) == pytest.approx(1024 * 24 * 2.5 * days, rel=0.02)
    assert float(named["MWh"].split()[0].replace(",", "")) == pytest.approx(1024 * 0.84 * 24 * days / 1000, rel=0.02)


def test_the_command_hears_what_it_is_told(capsys):
    few = command("gpt3-1.3b", gpus=8, n_tokens=1e9, batch_tokens=64 * 2048, tp=2, price=1.0, gpu="a100-80gb", top=1)
    shape, best = run_plan(few)
    text = capsys.readouterr().out
    assert best.layout.tp == 2 and "64 × 2,048 a step" in text and "$1.00 an hour" in text and "[NV20]" in text
    longer, _ = run_plan(command("gpt3-100k", gpus=1, n_ctx=512))
    assert longer.n_ctx == 512 and "32 × 512 a step" in capsys.readouterr().out


BAD = {
    "batch_tokens": ({"batch_tokens": 100}, "batch_tokens is 100; it must be a whole number, 2048 or more"),
    "efficiency": ({"efficiency": 50}, "efficiency is 50; it must be a share"),
    "gpu": ({"gpu": "h100"}, "no GPU 'h100'; there are v100-32gb, a100"),
    "gpus": ({"gpus": 0}, "gpus is 0; it must be a whole number, 1 or more"),
    "n_tokens": ({"n_tokens": -1}, "n_tokens is -1; it must be a number above 0"),
    "network": ({"network": 0.0}, "network is 0.0; it must be a number above 0"),
    "n_ctx": ({"n_ctx": 0}, "n_ctx is 0; it must be a whole number, 1 or more"),
    "no batch": ({"batch_tokens": 0}, "batch_tokens is 0; it must be a whole number, 2048 or more"),
    "no micro-batch": ({"micro_batch": 0}, "micro_batch is 0; it must be a whole number, 1 or more"),
    "no tokens": ({"n_tokens": 0}, "n_tokens is 0; it must be a number above 0"),
    "nothing divides": ({"gpus": 97}, "no layout of 97 GPUs divides 1536 sequences; one of 96 does"),
    "rest": ({"batch_tokens": 3000}, "batch_tokens is 3000; whole windows of 2048 make 2048"),
    "small": ({"size": "gpt3-1m"}, "no layout of 1024 GPUs divides 32 sequences; one of 128 does"),
    "price": ({"price": math.inf}, "price is inf; it must be a number above 0"),
    "room": ({"gpus": 16}, "nothing fits: the smallest layout takes .* GiB, and 73.6 are free; take more GPUs"),
    "size": ({"size": "gpt4"}, "no model is called 'gpt4'"),
    "top": ({"top": 0}, "top is 0; it must be a whole number, 1 or more"),
    "tp": ({"tp": 5}, "^tp=5 does not divide 96 heads; cp·tp=5 does not divide a sequence of 2048$"),
}


def test_nothing_is_weighed_before_all_is_checked(capsys):
    with pytest.raises(PlanError):
        run_plan(command("gpt3-100k", gpus=1, top=0))
    assert not capsys.readouterr().out


def test_the_named_number_of_gpus_works():
    config, n = GPTConfig.from_name("gpt3-1m"), 32
    for world, told, near in [(1024, {}, 128), (7, {}, 6), (31, {"tp": 2}, 24), (3, {"tp": 2, "pp": 4}, 8)]:
        what = "has " if world % math.prod(told.values()) else "divides 32 sequences"
        with pytest.raises(PlanError, match=f"no layout of {world} GPUs {what}.*; one of {near} does"):
            propose(config, world, n, H100, **told)
        assert propose(config, near, n, H100, **told)
        for between in range(near + 1, world):  # none is nearer
            with pytest.raises(PlanError, match="no layout of"):
                propose(config, between, n, H100, **told)


WHOLE = "it must be a whole number, 1 or more"
UNTOLD = {
    "batch": ({"n_sequences": "64"}, f"n_sequences is '64'; {WHOLE}"),
    "many at a time": ({"micro_batch": 3}, "64 sequences on 1 groups of ranks, of 3 at a time, leave a rest"),
    "micro_batch": ({"micro_batch": 0}, f"micro_batch is 0; {WHOLE}"),
    "micro_batch as text": ({"micro_batch": "2"}, f"micro_batch is '2'; {WHOLE}"),
    "name": ({"tpp": 2}, "tpp is none of pp, dp, fsdp, cp, tp, micro_batch, recompute"),
    "recompute": ({"recompute": "x"}, "recompute is 'x'; there are none, selective, full"),
    "stages": ({"pp": 4, "micro_batch": 32}, "pp=4 needs as many micro-batches; each rank has 2"),
    "tp": ({"tp": True}, f"tp is True; {WHOLE}"),
    "world a bool": ({"world": True}, f"world is True; {WHOLE}"),
    "world a float": ({"world": 8.0}, f"world is 8.0; {WHOLE}"),
    "world as text": ({"world": "8"}, f"world is '8'; {WHOLE}"),
    "world missing": ({"world": None}, f"world is None; {WHOLE}"),
}


@pytest.mark.parametrize("name", sorted(UNTOLD))
def test_a_proposal_refuses_what_it_cannot_hear(name):
    told, words = UNTOLD[name]
    with pytest.raises(PlanError, match=words):
        propose(**{"config": SMALL, "world": 8, "n_sequences": 64, "machine": H100} | told)


MACHINES = {
    "efficiency -1": ({"efficiency": -1}, "efficiency is -1; it must be a share, above 0 and at most 1"),
    "efficiency 0": ({"efficiency": 0}, "efficiency is 0; it must be a share"),
    "network": ({"network": 0}, "network is 0; it must be a number above 0"),
    "per_node": ({"per_node": 0}, f"per_node is 0; {WHOLE}"),
}


@pytest.mark.parametrize("name", sorted(MACHINES))
def test_a_machine_that_cannot_be(name):
    told, words = MACHINES[name]
    with pytest.raises(PlanError, match=words):
        Machine(GPUS["h100-80gb"], **told)


@pytest.mark.parametrize("name", sorted(BAD))
def test_what_cannot_be_planned_is_told_at_once(name):
    told, words = BAD[name]
    with pytest.raises(ValueError, match=words):
        run_plan(command(**told))


def test_other_wrong_questions():
    with pytest.raises(PlanError, match="chunks is 2; plans are made for 1"):
        ledger(BIG, replace(EIGHT, chunks=2), 96)
    with pytest.raises(PlanError, match="1535 sequences on 16 groups of ranks, of 1 at a time, leave a rest"):
        weigh(BIG, EIGHT, 1535, H100)
    with pytest.raises(PlanError, match="no GPU"):
        find_gpu("cray-1")
    for stage in (-1, 5, 2, 0.5):
        with pytest.raises(PlanError, match=f"stage is {stage}; there are 0 to 1"):
            ledger(SMALL, Layout(pp=2), 8, stage=stage)
    for n_micro in (-1, 0):
        with pytest.raises(PlanError, match=f"n_micro is {n_micro}; {WHOLE}"):
            ledger(SMALL, Layout(pp=2), n_micro)
    with pytest.raises(PlanError, match="micro_batch is 0"):
        weigh(SMALL, Layout(micro_batch=0), 8, H100)


def test_the_loss_needs_logits_or_a_gradient_of_the_table():
    n, d, rows = 2048, BIG.d_model, 6283  # of 50,257 on the first of eight
    assert plan.loss_bytes(Rank(BIG, EIGHT, 7)) == n * d * 2 * 9 / 8 + 16 * n * rows
    assert plan.loss_bytes(Rank(BIG, EIGHT, 6)) == 0
    alone = replace(EIGHT, tp=1)
    pieces = 256 * 50257 * 6 + 4 * d * (n + 50257)
    assert plan.loss_bytes(Rank(BIG, alone, 7)) == n * d * 2 * 2 + pieces


def test_nine_stored_traces_agree_with_bytes_flops_and_messages():
    rows = json.loads((DATA / "experiments" / "traces.json").read_text())["traces"]
    for row in rows:
        config, layout, trace = GPTConfig.from_name(row["size"]), Layout(**row["layout"]), row["trace"]
        rank = Rank(config, layout, row["stage"], blocks=True)
        assert (4 * rank.held, 8 * rank.held) == pytest.approx((trace["parameters"], trace["optimizer"]), rel=1e-3)
        assert rank.activations == pytest.approx(trace["activations"], rel=0.005)
        peak = sum(ledger(config, layout, row["n_micro"], row["stage"], blocks=True).values())
        assert peak == pytest.approx(trace["peak"], rel=0.035)
        sent = sent_bytes(rank, row["n_micro"])
        for axis, size in sent.items():
            assert size == pytest.approx(trace["sent"].get(axis, 0), rel=0.035, abs=1e5), (row["size"], axis)
        flops = plan.stage_flops(rank) * row["n_micro"]
        assert flops == pytest.approx(trace["flops"], rel=0.035), row["size"]


SHEETS = {  # FLOP/s in 16 bits, GB, GB/s of memory, GB/s of NVLink both ways, watts: data sheets of the SXM cards
    "a100-40gb": (312e12, 40, 1555, 600, 400),
    "a100-80gb": (312e12, 80, 2039, 600, 400),
    "h100-80gb": (989e12, 80, 3350, 900, 700),
    "h200-141gb": (989e12, 141, 4800, 900, 700),
    "v100-32gb": (125e12, 32, 900, 300, 300),
}


@pytest.mark.parametrize("name", sorted(SHEETS))
def test_a_gpu_is_as_its_data_sheet_says(name):
    gpu = GPUS[name]
    assert (gpu.peak, gpu.memory, gpu.bandwidth / 1e9, 2 * gpu.link / 1e9, gpu.watts) == SHEETS[name]
    prices = {"a100-40gb": 1.5, "a100-80gb": 1.8, "h100-80gb": 2.5, "h200-141gb": 3.0, "v100-32gb": 1.5}
    assert set(SHEETS) == set(GPUS) and gpu.price == prices[name]  # assumed; the V100's is the article's
