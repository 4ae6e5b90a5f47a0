"""A model cut into stages is the same model: each layout beside one process; schedules, tied tables, padded rows."""

import itertools
import json
import math
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ranks
import teams
from gpt3lib import hooks, pipeline
from gpt3lib.model import GPT, GPTConfig
from gpt3lib.parallel import RECOMPUTE, Layout, LayoutError, check_layout
from gpt3lib.pipeline import Box, Part, bubble_share, cuts, gpipe, interleaved, most_held, one_f_one_b, timetable
from gpt3lib.processes import together
from gpt3lib.texts import DATA

OTHERS = ("cp", "dp", "fsdp", "tp")
MIXES = {  # ranks -> every mix with two or more stages
    2: [{"pp": 2}],
    4: [{"pp": 4}, *({"pp": 2, other: 2} for other in OTHERS)],
}
SWITCHES = [*itertools.product((1, 2), ranks.KINDS, RECOMPUTE)]  # parts a rank, attention, recompute: twelve
PAIRS = [  # in the suite each mix has two of them, which differ in all three
    ((1, kind, RECOMPUTE[r]), (2, other, RECOMPUTE[(r + 1) % 3]))
    for kind, other in (("dense", "banded"), ("banded", "dense"))
    for r in range(3)
]

OWN = torch.__version__.split("+")[0].rpartition(".")[0]
tried = pytest.mark.skipif(OWN not in hooks.TRIED, reason=f"pipelines were not tried with torch {OWN}")


def cases(n):
    """(layout, config, one process, rows) for every mix of n ranks."""
    found = []
    for place, mix in enumerate(MIXES[n], start=n // 4):
        for chunks, kind, recompute in SWITCHES if ranks.WHOLE_GRID else PAIRS[place]:
            layout = Layout(**mix, chunks=chunks, recompute=recompute, micro_batch=2)
            shape = ranks.config(kind, n_layers=8 if layout.pp * chunks == 8 else 4)
            found.append((layout, shape, teams.alone(shape), ranks.ROWS))
    return found


WITHOUT = {2: [{"dp": 2}, {"fsdp": 2}], 4: [{"dp": 2, "fsdp": 2}, {"dp": 2, "tp": 2}, {"fsdp": 2, "cp": 2}]}


@pytest.mark.parametrize("n", [2, 4])
def test_micro_batches_without_stages_change_nothing(n):
    """FSDP shares gradients out after each of them, replicas add theirs up after the last."""
    shape = ranks.config()
    layouts = [Layout(**mix) for mix in WITHOUT[n]]
    layouts = [replace(one, micro_batch=ranks.ROWS // one.data // 2) for one in layouts]  # two on each rank
    asked = [(layout, shape, teams.alone(shape), ranks.ROWS) for layout in layouts]
    for found, (layout, *_) in zip(zip(*together(n, teams.train_all, asked, timeout=300)), asked, strict=True):
        for far in found:
            assert far["losses"] < ranks.LOSS and far["norms"] < ranks.LOSS, f"{layout}: {far}"
            assert far["gradients"] < ranks.GRADIENTS and far["weights"] < ranks.WEIGHTS, f"{layout}: {far}"


def test_the_suite_has_each_mix_with_both_schedules_both_kinds_and_recomputing_or_not():
    seen = [(layout, shape) for n in MIXES for layout, shape, *_ in cases(n)]
    for mix in itertools.chain(*MIXES.values()):
        mine = [(a, b) for a, b in seen if all(getattr(a, axis) == mix.get(axis, 1) for axis in ("pp", *OTHERS))]
        assert {layout.chunks for layout, _ in mine} == {1, 2}, mix
        assert len({shape.attention for _, shape in mine}) == 2, mix
        assert len({layout.recompute for layout, _ in mine}) >= 2, mix
    assert {layout.recompute for layout, _ in seen} == set(RECOMPUTE)


@tried
@pytest.mark.parametrize("n", [2, 4])
def test_every_mix_is_equal_to_one_process(n):
    asked = cases(n)
    answers = together(n, teams.train_all, asked, timeout=3000 if ranks.WHOLE_GRID else 600)
    for found, (layout, _, right, _) in zip(zip(*answers), asked, strict=True):
        for rank, far in enumerate(found):
            case = f"rank {rank}, {layout}, chunks {layout.chunks}, {layout.recompute}: {far}"
            assert far["born"] == 0, case
            assert far["losses"] < ranks.LOSS and far["norms"] < ranks.LOSS, case
            assert far["gradients"] < ranks.GRADIENTS, case
            assert far["weights"] < ranks.WEIGHTS, case
        held = [far["tables"] for far in found if far["tables"]]
        assert len(held) == 2 * layout.world // layout.pp, layout  # the first and the last rank of each pipeline
        assert len(held[0]) == len(set(held[0])) == ranks.STEPS, layout  # it learns
        assert all(tables == held[0] for tables in held), f"{layout}: the copies of the token table differ"
        assert set().union(*(far["names"] for far in found)) == set(right["born"]), layout


@tried
@pytest.mark.parametrize("rows", [5, 7])
def test_rows_that_do_not_divide_change_nothing(rows):
    shape = ranks.config()
    right = teams.alone(shape, rows, 3)
    asked = [Layout(pp=2, dp=2, micro_batch=2), Layout(pp=2, fsdp=2, chunks=2, micro_batch=8)]
    for answer in together(4, teams.train_all, [(layout, shape, right, rows) for layout in asked]):
        for far in answer:
            assert far["losses"] < ranks.LOSS and far["norms"] < ranks.LOSS, far
            assert far["gradients"] < ranks.GRADIENTS and far["weights"] < ranks.WEIGHTS, far


def test_a_team_of_one_is_update():
    shape = ranks.config()
    right = teams.alone(shape, ranks.ROWS, 3)
    asked = [(Layout(micro_batch=size), shape, right, ranks.ROWS) for size in (2, 8)]
    for far in together(1, teams.train_all, asked)[0]:
        assert far["losses"] < 1e-6 and far["weights"] < 1e-5, far


@tried
def test_torch_works_in_the_order_of_the_plan():
    asked = [
        (Layout(pp=2, micro_batch=2), ranks.config(), 8, one_f_one_b, (2, 4)),
        (Layout(pp=2, micro_batch=1), ranks.config(), 5, one_f_one_b, (2, 5)),
        (Layout(pp=2, chunks=2, micro_batch=2), ranks.config(), 8, interleaved, (2, 4, 2)),
        (Layout(pp=2, chunks=4, micro_batch=2), ranks.config(n_layers=8), 12, interleaved, (2, 6, 4)),
    ]
    answers = together(2, teams.orders_of, [case[:3] for case in asked])
    for rank, answer in enumerate(answers):
        for notes, (*_, way, numbers) in zip(answer, asked, strict=True):
            assert notes == way(rank, *numbers), (rank, way, numbers)


@tried
def test_what_a_step_refuses_leaves_all_as_it_was():
    for rank, said in enumerate(together(2, teams.refusals, Layout(pp=2, micro_batch=2), ranks.config())):
        assert said["not accepted"] == 0
        assert said["nan"] == (True, 1)  # the nan that was put there, and nothing else
        assert said["clip"].startswith("RecipeError: clip is 0.0")
        assert said["rows"].startswith("LayoutError: 3 rows of inputs and 3 of targets; this rank's share is 8")
        assert said["world"].startswith("LayoutError: pp=4 needs 4 ranks, and there are 2"), rank
        assert "needs 6 layers at least; the model has 4. The nearest that work: " in said["layers"]


@tried
@pytest.mark.parametrize("mix", [{"dp": 2}, {"fsdp": 2}, {"pp": 2}, {"tp": 2}])
def test_frozen_parameters_stay_and_the_rest_learns_as_alone(mix):
    shape = ranks.config(n_layers=2)
    for found in together(2, teams.frozen, [(Layout(**mix, micro_batch=2), shape)]):
        for far in found:
            assert far["told"] < ranks.LOSS and far["weights"] < ranks.WEIGHTS, far


@tried
@pytest.mark.parametrize("mix", [{"dp": 2}, {"pp": 2}])
def test_a_team_refuses_what_does_not_fit(mix):
    share = 8 // mix.get("dp", 1)
    for said in together(2, teams.bad_steps, Layout(**mix, micro_batch=2), ranks.config()):
        for name in ("count 0", "count -8", "count 2.5", "count None", "rows 0", "rows -8", "rows 2.5", "rows '8'"):
            value = name.partition(" ")[2]
            words = f"LayoutError: the number of rows is {value}; it must be a whole number, 1 or more"
            assert said[name] == words, name
        assert "the number of rows is 0" in said["batches 0"] and "the number of rows is 8.0" in said["batches 8.0"]
        words = f"LayoutError: {share // 2} micro-batches hold {share} rows; this rank's share is "
        for n, wanted in (("6", 3 * share // 4), ("80", 10 * share)):
            assert said[f"count {n}"] == f"{words}{wanted}, see Team.rows", (n, said)
        assert said["empty"].startswith("LayoutError: 0 micro-batches hold 0 rows"), said["empty"]
        assert said["part"].startswith("LayoutError: 1 micro-batches hold 2 rows"), said["part"]
        assert f"inputs ({share}, 32) and targets ({share}, 31) must have one shape, (B, T)" in said["wide"]
        assert f"inputs ({share},) and targets ({share},) must have" in said["flat"]
        assert "inputs () and targets () must have one shape" in said["lists"]
        assert said["seed"] == "ConfigError: seed is 'one'; it must be a whole number"
        assert said["seed 1.5"] == "ConfigError: seed is 1.5; it must be a whole number"
        assert said["config"].startswith("LayoutError: config is 'gpt3-1m'; it must be a GPTConfig")
        assert said["layout"].startswith("LayoutError: layout is {'pp': 2}; it must be a Layout")
        assert said["moved"] == 0


@tried
def test_without_the_sum_the_tables_part():
    lower, upper = together(2, teams.unsummed, Layout(pp=2, micro_batch=2), ranks.config(), 2)
    gaps = [(a - b).abs().max().item() for a, b in zip(lower, upper, strict=True)]
    assert ranks.WEIGHTS < gaps[0] < gaps[1]


@tried
def test_a_team_can_stay_without_numbers():
    answers = together(2, teams.on_meta, Layout(pp=2), ranks.config())
    names = [name for name, _ in GPT(ranks.config()).named_parameters()]
    assert all(is_meta for answer in answers for _, is_meta in answer)
    assert sorted(names + [pipeline.TABLE]) == sorted(name for answer in answers for name, _ in answer)


# --- without ranks ---


def test_a_torch_that_pipelines_were_not_tried_with_is_refused_first():
    with (
        mock.patch.object(hooks, "TRIED", ("1.0",)),
        pytest.raises(hooks.TorchError, match="A pipeline was tried with"),
    ):
        pipeline.Team(ranks.config(), Layout(pp=2))


def test_parts_one_after_the_other_are_the_whole():
    shape = ranks.config()
    inputs, targets = ranks.batch(0)
    whole = GPT(shape, 3)
    right = whole.loss(inputs, targets)
    for bounds in ([(0, 2), (2, 4)], [(0, 1), (1, 2), (2, 3), (3, 4)]):
        parts = [Part(GPT(shape, 3), *pair) for pair in bounds]
        x = inputs
        for part in parts[:-1]:
            x = part(x)
            assert x.shape == (8, 32, 32)
        assert torch.equal(parts[-1](x, targets), right)
        names = [name for part in parts for name, _ in part.named_parameters()]
        assert sorted(names) == sorted([*dict(whole.named_parameters()), pipeline.TABLE])


def slots(orders):
    """The length of a timetable."""
    return max(stop for _, stop in timetable(orders).values())


@given(p=st.integers(1, 6), rounds=st.integers(1, 5), v=st.integers(2, 4))
@settings(deadline=None, max_examples=60)
def test_counted_bubbles_are_those_of_the_formula(p, rounds, v):
    m = p * rounds
    for way, n in ((gpipe, 1), (one_f_one_b, 1), (interleaved, v)):
        orders = [way(rank, p, m) if n == 1 else way(rank, p, m, v) for rank in range(p)]
        boxes = sorted(itertools.chain(*orders))
        assert boxes == sorted(Box(kind, k, i) for kind in "FB" for k in range(n * p) for i in range(m))
        end = slots(orders)
        assert end == 2 * (n * m + p - 1)
        assert 1 - 2 * n * m / end == pytest.approx(bubble_share(p, m, n))


@given(p=st.integers(1, 8), m=st.integers(1, 12))
@settings(deadline=None, max_examples=60)
def test_1f1b_holds_as_many_as_there_are_ranks_from_it_on(p, m):
    for rank in range(p):
        assert most_held(one_f_one_b(rank, p, m)) == min(m, p - rank)
        assert most_held(gpipe(rank, p, m)) == m
    assert slots([one_f_one_b(rank, p, m) for rank in range(p)]) == slots([gpipe(rank, p, m) for rank in range(p)])


def test_a_timetable_keeps_the_order_of_things():
    orders = [interleaved(rank, 4, 8, 2) for rank in range(4)]
    times = timetable(orders, {"F": 1, "B": 2})
    for order in orders:  # a rank does one thing at a time
        assert all(times[a][1] <= times[b][0] for a, b in itertools.pairwise(order))
    for box, (begin, end) in times.items():
        assert end - begin == (1 if box.kind == "F" else 2)
        needed = box.needs(8)
        assert needed is None or times[needed][1] <= begin


def test_a_deadlock_is_named():
    orders = [one_f_one_b(0, 2, 2)[::-1], one_f_one_b(1, 2, 2)]
    with pytest.raises(LayoutError, match="8 boxes are left, and each waits"):
        timetable(orders)


def test_a_timetable_needs_a_box_and_cuts_a_weight():
    for orders in ([], [[], []]):
        with pytest.raises(LayoutError, match="no rank has a box"):
            timetable(orders)
    for way_out in (math.nan, -0.5, math.inf, "1", None):
        for n in (1, 2):
            with pytest.raises(LayoutError, match="way_out is .*; it must be a number of layers, 0 or more"):
                cuts(4, n, way_out)


@given(n_layers=st.integers(1, 40), n=st.integers(1, 9), way_out=st.sampled_from([0.0, 0.34, 2.0, 5.5]))
@settings(deadline=None, max_examples=150)
def test_cuts_are_as_even_as_can_be(n_layers, n, way_out):
    if n > n_layers:
        with pytest.raises(LayoutError, match=f"{n_layers} layers do not fill {n} parts"):
            cuts(n_layers, n, way_out)
        return
    bounds = cuts(n_layers, n, way_out)
    assert [first for first, _ in bounds] == [0] + [last for _, last in bounds[:-1]]
    assert len(bounds) == n and bounds[-1][1] == n_layers
    sizes = [last - first for first, last in bounds]
    assert min(sizes) >= 1
    slowest = max([*sizes[:-1], sizes[-1] + way_out])
    # no other size of the last part does better
    others = [max(math.ceil((n_layers - k) / max(1, n - 1)), k + way_out) for k in range(1, n_layers - n + 2)]
    assert slowest <= (min(others) if n > 1 else n_layers + way_out)


def test_the_paper_s_largest_is_cut_evenly():
    c = GPTConfig.from_name("gpt3-175b")
    assert cuts(96, 8, c.vocab_size / (12 * c.d_model)) == [(12 * i, 12 * i + 12) for i in range(8)]
    assert [b - a for a, b in cuts(12, 4, 5.45)] == [4, 4, 3, 1]


@given(
    count=st.integers(1, 40),
    data=st.integers(1, 5),
    pp=st.integers(1, 4),
    chunks=st.integers(1, 3),
    micro_batch=st.integers(1, 9),
)
@settings(deadline=None, max_examples=150)
def test_every_rank_has_as_many_micro_batches_and_no_row_is_lost(count, data, pp, chunks, micro_batch):
    layout = Layout(pp=pp, dp=data, chunks=chunks if pp > 1 else 1, micro_batch=micro_batch)
    rows = torch.arange(count)[:, None].expand(count, 4)
    found = []
    for rank, (first, last) in enumerate(pipeline.share(count, data)):
        grid = SimpleNamespace(layout=layout, data=rank, cp=0, device="cpu")
        found.append(pipeline.micro_batches_of(grid, rows[first:last], rows[first:last], count))
    assert len({len(batches) for batches in found}) == 1
    n = len(found[0])
    assert n >= pp and (layout.chunks == 1 or n % pp == 0)
    flat = [triple for batches in found for triple in batches]
    assert len({x.shape for x, *_ in flat}) == 1 and len(flat[0][0]) <= micro_batch
    read = torch.cat([x[:, 0] for x, _, weight in flat if weight == 1.0])
    assert read.tolist() == list(range(count))
    assert {weight for *_, weight in flat} <= {0.0, 1.0}


@pytest.mark.parametrize("p, m, v", [(0, 1, 1), (1, 0, 1), (1, 1, 0), (2.5, 1, 1)])
def test_a_bubble_needs_whole_numbers(p, m, v):
    with pytest.raises(LayoutError, match="must be a whole number, 1 or more"):
        bubble_share(p, m, v)


def test_bad_pipelines_are_refused_before_anything_is_started():
    shape = ranks.config()
    for layout, world, words in (
        (Layout(pp=8), 8, "pp=8 needs 8 layers at least; the model has 4. The nearest that work: pp=4"),
        (Layout(pp=2, chunks=4), 2, "needs 8 layers at least; the model has 4"),
        (Layout(chunks=2), 1, "chunks=2 needs pp above 1"),
        (Layout(pp=2), 4, "pp=2 needs 2 ranks, and there are 4"),
    ):
        with pytest.raises(LayoutError, match=words):
            check_layout(layout, shape, world)


def test_the_stored_run_is_one_of_the_plan():
    stored = json.loads((DATA / "experiments" / "pipeline.json").read_text())
    for m, run in stored["runs"].items():
        times = {}
        for rank, boxes in enumerate(run["boxes"]):
            assert [tuple(box[:3]) for box in boxes] == one_f_one_b(rank, 2, int(m))
            assert all(a[4] <= b[3] for a, b in itertools.pairwise(boxes))
            times |= {Box(*box[:3]): box[3:] for box in boxes}
        for box, (begin, _) in times.items():
            needed = box.needs(2)
            assert needed is None or times[needed][1] <= begin + 1e-4, (m, box)
