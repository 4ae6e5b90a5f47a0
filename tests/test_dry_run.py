"""The dry run: a meter against counts by hand, a fake world against a real one, the plan against both."""

import json
from dataclasses import asdict, replace

import pytest
import torch
import torch.distributed as dist

import measure_traces
from gpt3lib import GPTConfig, dry_run, hooks
from gpt3lib.dry_run import Meter, TraceError, real_step
from gpt3lib.parallel import Layout, LayoutError
from gpt3lib.plan import Rank, ledger, sent_bytes
from gpt3lib.processes import together
from gpt3lib.texts import DATA

OWN = torch.__version__.split("+")[0].rpartition(".")[0]
pytestmark = pytest.mark.skipif(OWN not in hooks.TRIED, reason=f"the dry run was not tried with torch {OWN}")
TINY = GPTConfig(257, 64, 4, 64, 4, 16, bandwidth=16)
SMALL = GPTConfig(8000, 512, 4, 512, 8, 64, bandwidth=64)
MIB = 2**20


def test_a_meter_counts_what_is_held_and_no_view_twice():
    with Meter({}).watching() as meter:
        a = torch.ones(1000)
        assert meter.now == 4000
        b = a.view(10, 100)[2:]
        assert meter.now == 4000
        c = b + 1
        assert meter.now == 4000 + 3200
        del a, c
        assert (meter.now, meter.peak) == (4000, 7200)  # b looks at a's memory
        del b
        assert meter.now == 0
        meter.restart()
        d = torch.ones(10, dtype=torch.float64)
        d.untyped_storage().resize_(0)
        assert (meter.now, meter.peak) == (0, 80)
        d.untyped_storage().resize_(160)
        assert meter.now == meter.peak == 160


@pytest.mark.parametrize("fake", [False, True])
def test_a_meter_counts_products_and_attention(fake):
    with hooks.fake_tensors() if fake else torch.enable_grad():
        q = torch.ones(2, 3, 16, 8, requires_grad=True)
        x, w = torch.ones(5, 7, requires_grad=True), torch.ones(7, 11, requires_grad=True)
        with Meter({}).watching() as meter:
            y = x @ w
            assert meter.flops == 2 * 5 * 7 * 11
            y.sum().backward()
            assert meter.flops == 3 * 2 * 5 * 7 * 11
            meter.restart()
            z = torch.nn.functional.scaled_dot_product_attention(q, q, q)
            assert meter.flops == 2 * 2 * 2 * 3 * 16 * 16 * 8
            z.sum().backward()
            assert meter.flops == (2 + 5) * 2 * 2 * 3 * 16 * 16 * 8  # the backward pass makes the scores again


def test_a_meter_counts_what_a_ring_sends():
    with hooks.fake_ranks(4):
        groups = {dist.group.WORLD.group_name: ("dp", 4)}
        with Meter(groups).watching() as meter:
            dist.all_reduce(torch.ones(8))
            dist.all_gather_single(torch.ones(32), torch.ones(8))
        assert meter.sent == {"dp": 48 + 96} and meter.messages == {"dp": 2}
        with Meter({}).watching() as meter:
            dist.all_reduce(torch.ones(8))
        assert meter.sent == {"other": 0} and meter.messages == {"other": 0}


FAITHFUL = {
    "fsdp tp": Layout(fsdp=2, tp=2, micro_batch=2, bf16=True),
    "pp dp": Layout(pp=2, dp=2, micro_batch=2, recompute="full"),
}


@pytest.mark.parametrize("name", sorted(FAITHFUL))
def test_four_real_ranks_are_counted_as_four_fake_ones(name):
    layout = FAITHFUL[name]
    real = together(4, real_step, TINY, layout, 4)
    # a message on its way keeps its tensor, so in a real pipeline a few may be there at the peak
    message = 2 * TINY.n_ctx * TINY.d_model * 4
    for rank in (0, 3):
        fake, found = asdict(dry_run.dry_run(TINY, layout, rank, 4)), real[rank]
        assert 0 <= found["peak"] - fake["peak"] <= 4 * message * (layout.pp > 1)
        assert found | {"peak": 0} == fake | {"peak": 0}


@pytest.mark.parametrize("rank", [0, 7])
def test_the_plan_is_right_about_a_rank_of_eight(rank):
    layout = Layout(pp=2, fsdp=2, tp=2, micro_batch=2, bf16=True)
    trace, ours = dry_run.dry_run(SMALL, layout, rank, 4), Rank(SMALL, layout, rank // 4, blocks=True)
    assert trace.parameters == pytest.approx(4 * ours.held, rel=0.01)
    assert trace.optimizer == pytest.approx(8 * ours.held, rel=0.01)
    assert trace.activations == pytest.approx(ours.activations, rel=0.01)
    peak = sum(ledger(SMALL, layout, 4, rank // 4, blocks=True).values())
    assert trace.peak == pytest.approx(peak, rel=0.05)
    sent = sent_bytes(ours, 4)
    for axis in ("pp", "shard", "tp"):
        assert trace.sent[axis] == pytest.approx(sent[axis], rel=0.05, abs=2000)
    assert trace.flops == pytest.approx(flops_of(SMALL, ours, 8), rel=0.12)  # blocks compute a little more


def test_shards_keep_no_whole_gradient_and_replicas_sum_once():
    """More micro-batches cost no memory without a pipeline; FSDP sums each, replicas only the last."""
    layout = Layout(dp=2, fsdp=4, micro_batch=1, bf16=True)
    two, five = (dry_run.dry_run(SMALL, layout, 0, n) for n in (2, 5))
    rank = Rank(SMALL, layout)
    assert (
        two.peak == pytest.approx(five.peak, rel=1e-3)
        and five.peak < 12 * rank.held + rank.activations + 4 * rank.whole
    )
    assert five.sent["dp"] == two.sent["dp"] == pytest.approx(2 * 4 * rank.held / 2, rel=0.01)
    assert five.sent["shard"] / two.sent["shard"] == pytest.approx(5 / 2, rel=0.01)


def flops_of(config, rank, n_texts) -> float:
    """Six for each number of a matrix, and attention in a band's blocks; shared by two ranks."""
    d, n = config.d_model, config.n_ctx
    matrices = 6 * 12 * d**2 * len(rank.kinds) + 6 * d * config.vocab_size * rank.ends[1]
    keys = {"dense": n, "banded": 2 * config.bandwidth}
    return n_texts * n * (matrices + sum(14 * d * keys[kind] for kind in rank.kinds)) / 2


def test_what_cannot_be_traced_is_refused():
    layout = Layout(pp=2, fsdp=2, micro_batch=1)
    for rank in (-1, 4, 1.5):
        with pytest.raises(TraceError, match=f"rank is {rank}; the layout has ranks 0 to 3"):
            dry_run.dry_run(TINY, layout, rank)
    with pytest.raises(TraceError, match="n_micro is 1; it must be a whole number, 2 or more"):
        dry_run.dry_run(TINY, layout, n_micro=1)
    with pytest.raises(LayoutError, match="tp=3 does not divide 4 heads"):
        dry_run.dry_run(TINY, Layout(tp=3))
    old = hooks.TRIED
    hooks.TRIED = ("1.0",)
    try:
        with pytest.raises(hooks.TorchError, match="The dry run was tried with torch 1.0"):
            dry_run.dry_run(TINY, layout)
    finally:
        hooks.TRIED = old


def test_one_row_of_the_stored_traces_and_how_far_the_plan_is_off(capsys):
    layout = Layout(fsdp=2, micro_batch=1, bf16=True)
    kept = []
    rows = measure_traces.nine_traces([("gpt3-100k", layout, 2)], keep=kept.append)
    assert rows == kept and "gpt3-100k fsdp=2 none: parameters +" in capsys.readouterr().out
    off = measure_traces.off(rows[0])
    assert abs(off["parameters"]) < 0.01 and abs(off["optimizer"]) < 0.01 and abs(off["activations"]) < 0.03
    assert rows[0]["layout"] == {"pp": 1, "dp": 1, "fsdp": 2, "cp": 1, "tp": 1, "micro_batch": 1, "bf16": True} | {
        "recompute": "none"
    }
    wrong = rows[0] | {"trace": rows[0]["trace"] | {"parameters": rows[0]["trace"]["parameters"] * 2}}
    assert measure_traces.off(wrong)["parameters"] == pytest.approx(-0.5, abs=0.01)


def test_the_stored_traces_are_nine_and_the_plan_is_right_about_them():
    rows = json.loads((DATA / "experiments" / "traces.json").read_text())["traces"]
    cases = {(size, str(layout), layout.recompute) for size, layout, _ in measure_traces.CASES}
    assert {(row["size"], str(Layout(**row["layout"])), row["layout"]["recompute"]) for row in rows} == cases
    assert len(rows) == len(cases) == 9
    for row in rows:
        off = measure_traces.off(row)
        assert abs(off["parameters"]) < 0.01 and abs(off["optimizer"]) < 0.01, row["size"]
        assert abs(off["activations"]) < 0.01 and abs(off["peak"]) < 0.05, row["size"]
        assert row["resident_gib"] <= 4
        if row["size"] == "gpt3-175b":
            assert Layout(**row["layout"]).world == 1024 and row["n_micro"] >= 8 and row["cpu_seconds"] <= 60


def test_stored_rows_replace_those_of_the_same_case(tmp_path, monkeypatch):
    monkeypatch.setattr(measure_traces, "DATA", tmp_path)
    (tmp_path / "experiments").mkdir()
    row = {"size": "gpt3-13b", "layout": {"pp": 1}, "peak": 1}
    for new in (row, row | {"size": "gpt3-1.3b"}, row | {"peak": 2}, row | {"layout": {"pp": 2}}):
        measure_traces.store(new)
    stored = json.loads((tmp_path / "experiments" / "traces.json").read_text())
    told = [(row["size"], row["layout"]["pp"], row["peak"]) for row in stored["traces"]]
    assert told == [("gpt3-1.3b", 1, 1), ("gpt3-13b", 1, 2), ("gpt3-13b", 2, 1)]
    assert stored["about"]["torch"] == torch.__version__.split("+")[0]


def test_an_interleaved_rank_counts_all_its_parts():
    layout = Layout(pp=2, chunks=2, micro_batch=1, bf16=True)
    once = dry_run.dry_run(TINY, replace(layout, chunks=1), 0, 4)
    twice = dry_run.dry_run(TINY, layout, 0, 4)
    assert twice.activations == pytest.approx(once.activations, rel=0.2)
    assert twice.sent["pp"] > once.sent["pp"]
