"""A model shared out over ranks is the same model: each layout beside one process, and layouts that cannot be."""

import functools
import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import measure_parallel
import ranks
from gpt3lib import parallel
from gpt3lib.model import GPT
from gpt3lib.parallel import AXES, RECOMPUTE, Grid, Layout, LayoutError, check_layout, layouts
from gpt3lib.pipeline import Team
from gpt3lib.processes import together
from gpt3lib.texts import DATA

MIXES = {  # ranks -> every mix of replicas, shards and parts of matrices, and long texts
    2: [{"dp": 2}, {"fsdp": 2}, {"tp": 2}, {"cp": 2}],
    4: [
        {"cp": 4},
        {"fsdp": 4},
        {"tp": 4},
        {"dp": 4},
        {"dp": 2, "fsdp": 2},
        {"dp": 2, "tp": 2},
        {"fsdp": 2, "tp": 2},
        {"fsdp": 2, "cp": 2},
        {"cp": 2, "tp": 2},
    ],
}
SWITCHES = [*itertools.product(ranks.KINDS, RECOMPUTE)]  # six pairs


def cases(n):
    """(layout, config, one process) for every mix of n ranks; in the suite each has one pair of switches, in turn."""
    found = []
    for i, mix in enumerate(MIXES[n], start=0 if n == 2 else len(MIXES[2])):
        pairs = SWITCHES if ranks.WHOLE_GRID else [SWITCHES[i % len(SWITCHES)]]
        for kind, recompute in pairs:
            shape = ranks.config(kind)
            found.append((Layout(**mix, recompute=recompute), shape, ranks.alone(shape)))
    return found


def test_the_suite_has_every_pair_of_switches_with_two_or_more_mixes():
    seen = [(shape.attention, layout.recompute) for n in MIXES for layout, shape, _ in cases(n)]
    assert all(seen.count((ranks.KINDS[kind], recompute)) >= 2 for kind, recompute in SWITCHES)
    for n in MIXES:  # of texts in pieces, layers that gather and layers that fetch a halo
        assert any(layout.cp == n and shape.attention == ranks.KINDS["banded"] for layout, shape, _ in cases(n))


@pytest.mark.parametrize("n", [*MIXES])
def test_every_mix_is_equal_to_one_process(n):
    asked = cases(n)
    answers = [[] for _ in range(n)]
    for start in range(0, len(asked), 12):  # every layout opens connections, and a process has only so many
        for answer, more in zip(answers, together(n, ranks.train_all, asked[start : start + 12], timeout=500)):
            answer += more
    n_params = GPT(asked[0][1]).num_params()
    for rank, answer in enumerate(answers):
        for (layout, shape, _), far in zip(asked, answer):
            case = f"rank {rank}, {layout}, {shape.attention}: {far}"
            assert far["born"] == 0, case
            assert far["losses"] < ranks.LOSS, case
            assert far["gradients"] < ranks.GRADIENTS, case
            assert far["weights"] < ranks.WEIGHTS, case
            # what this rank keeps of the model: its part, and a few rows more where it does not divide
            part = n_params / (layout.fsdp * layout.cp * layout.tp)
            assert part * 0.9 < far["held"] < part * 1.15, case


def test_the_stored_grid_has_every_mix_and_keeps_every_limit():
    stored = json.loads((DATA / "experiments" / "parallel.json").read_text())
    for name, mixes, parts in ("mixes", measure_parallel.WITHOUT, (1,)), ("stages", measure_parallel.WITH, (1, 2)):
        rows = stored[name]["rows"]
        switches = itertools.product(mixes, parts, ranks.KINDS.values(), RECOMPUTE)
        wanted = {(str(Layout(**mix, chunks=n)), n, kind, way) for mix, n, kind, way in switches}
        found = [(row["layout"], row["parts a rank"], tuple(row["attention"]), row["recompute"]) for row in rows]
        assert set(found) == wanted and len(found) == len(wanted)
        for row in rows:
            assert row["born"] == 0 and row["copies equal"], row
            assert all(row[number] < limit for number, limit in measure_parallel.LIMITS.items()), row
    assert [row["seed"] for row in stored["kills"]["rows"]] == [*range(10)]
    assert len({row["behind step"] for row in stored["kills"]["rows"]}) > 3
    assert len(stored["traces"]["rows"]) == 9


@pytest.mark.parametrize("n", [2, 4])
def test_pieces_of_a_text_give_the_logits_of_the_whole(n):
    # bands of 1, narrower than a piece, as wide as fits, wider (then all keys are gathered), wider than the text
    shapes = [ranks.config("dense")] + [ranks.config("banded", bandwidth=w) for w in (1, 6, 32 // n + 1, 24, 64)]
    asked = [(Layout(cp=n), shape, {"logits": ranks.alone(shape, 0)["logits"]}) for shape in shapes]
    asked += [(replace(asked[2][0], cp=2, tp=n // 2), *asked[2][1:])]
    for answer in together(n, ranks.logits_of, asked):
        assert max(answer) < 1e-5, answer


def halos(bandwidths):
    """A worker: how many numbers each layer sends to look at the ranks before, for each bandwidth."""
    mesh = Grid(Layout(cp=dist.get_world_size())).long
    found = []
    for width in bandwidths:
        k = torch.full((1, 2, 8, 3), float(dist.get_rank()))
        keys, values, mask = parallel.Neighbours(mesh, width).append(k, 10 * k)
        assert mask is None and torch.equal(values, 10 * keys) and torch.equal(keys[:, :, -8:], k)
        found.append(keys[0, 0, :, 0].tolist())
    return found


def test_a_banded_layer_fetches_a_halo_and_a_dense_one_all():
    first, second, third = together(3, halos, [1, 3, 9, 10, None])
    assert first == [[0.0] * 8] * 5
    assert second == [[1.0] * 8, [0.0] * 2 + [1.0] * 8] + [[0.0] * 8 + [1.0] * 8] * 3
    assert third[:3] == [[2.0] * 8, [1.0] * 2 + [2.0] * 8, [1.0] * 8 + [2.0] * 8]
    assert third[3:] == [[0.0] * 8 + [1.0] * 8 + [2.0] * 8] * 2


def switches(shape, right):
    """A worker: bfloat16, and blocks that are compiled (by a backend that needs no compiler of the system)."""
    calls, compile = [], torch.compile

    def note(*arguments, **ways):
        calls.append(ways)
        return compile(*arguments, backend="aot_eager", **ways)

    torch.compile = note
    far = ranks.train(Layout(fsdp=2, compile=True, recompute="full"), shape, right, 3)
    far2 = ranks.train(Layout(tp=2, compile=True), shape, right, 3)
    kinds, fill = set(), torch.nn.functional.gelu

    def look(x, **ways):
        kinds.add(str(x.dtype))
        return fill(x, **ways)

    torch.nn.functional.gelu = look
    return far, far2, len(calls), ranks.train(Layout(fsdp=2, bf16=True), shape, right, 3), kinds


def test_blocks_can_be_compiled_and_products_be_bfloat16():
    shape = ranks.config(n_layers=2)
    right = ranks.alone(shape, 3)
    for far, far2, n_compiled, rough, kinds in together(2, switches, shape, right):
        assert n_compiled == 2 * shape.n_layers
        assert max(far["losses"], far2["losses"]) < ranks.LOSS
        assert max(far["weights"], far2["weights"]) < ranks.WEIGHTS
        assert kinds == {"torch.bfloat16"} and 0 < rough["losses"] < 0.01 and rough["born"] == 0


def kept(layout, shape):
    """A worker: which products of a block selective recomputation keeps, in the order in which they are made."""
    found, policy = [], parallel.keep_products

    def note(context, operation, *arguments, **ways):
        answer = policy(context, operation, *arguments, **ways)
        if not context.is_recompute and ("mm.default" in str(operation) or "dot_product" in str(operation)):
            found.append(answer.name)
        return answer

    parallel.keep_products = note
    with torch.device("meta"):
        model = parallel.parallelize(GPT(shape), Grid(layout))
    parallel.materialise(model, "cpu")
    model.hidden(ranks.batch(0)[0])
    return found


@pytest.mark.parametrize("n", [1, 2])
def test_selective_recomputation_keeps_the_wide_products(n):
    shape = ranks.config("dense", n_layers=1)
    found = together(n, kept, Layout(tp=n, recompute="selective"), shape)[0]
    keep, again = "MUST_SAVE", "PREFER_RECOMPUTE"
    # q, k, v, attention, wo (a part of a sum where tp cuts it), up, down
    assert found == [keep] * 4 + [keep if n == 1 else again] + [keep, again]


def cost(recompute):
    """Products of a block, forward and back, in units of forward."""
    block = GPT(ranks.config("dense")).blocks[0]
    run = block if recompute == "none" else functools.partial(parallel.run_again, block, recompute)
    with FlopCounterMode(display=False) as counter:
        out = run(torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(0), requires_grad=True))
        forward = counter.get_total_flops()
        out.square().sum().backward()
    return counter.get_total_flops() / forward


def test_recomputation_costs_what_it_says():
    assert cost("none") == cost("selective") == 3
    assert 3.6 < cost("full") < 4


def test_without_gradients_nothing_is_kept_or_run_again():
    block = GPT(ranks.config("dense")).blocks[0]
    x = torch.randn(2, 32, 32)
    with torch.no_grad():
        for recompute in ("selective", "full"):
            assert torch.equal(parallel.run_again(block, recompute, x), block(x))


# --- layouts


def test_a_layout_says_what_it_is():
    assert Layout(dp=2, tp=4).world == 8 and Layout(dp=2, fsdp=3, tp=4).data == 6
    assert str(Layout(dp=2, tp=4)) == "dp=2 tp=4" and str(Layout()) == "one rank"
    assert Layout(pp=2, chunks=2).world == 2


def refusal(layout, world, **ways):
    """What check_layout says of it."""
    with pytest.raises(LayoutError) as caught:
        check_layout(layout, ranks.config(), world, **ways)
    return str(caught.value)


def test_bad_layouts_are_refused_with_the_nearest_that_work():
    assert not dist.is_initialized()
    found = {
        "tp=3 does not divide 4 heads": (Layout(tp=3), 3, {}),
        "tp=8 does not divide 4 heads": (Layout(tp=8), 8, {}),
        "pp=8 needs 8 layers at least; the model has 4": (Layout(pp=8), 8, {}),
        "pp=2 · chunks=3 needs 6 layers at least; the model has 4": (Layout(pp=2, chunks=3), 2, {}),
        "cp·tp=3 does not divide a sequence of 32": (Layout(cp=3), 3, {}),
        "cp·tp=4 does not divide a sequence of 30": (Layout(cp=2, tp=2), 4, {"n_ctx": 30}),
        "dp·fsdp=4 does not divide a batch of 6 sequences": (Layout(dp=2, fsdp=2), 4, {"n_sequences": 6}),
        "dp=2 tp=2 needs 4 ranks, and there are 8": (Layout(dp=2, tp=2), 8, {}),
        "chunks=2 needs pp above 1": (Layout(chunks=2), 1, {}),
    }
    for words, (layout, world, ways) in found.items():
        said = refusal(layout, world, **ways)
        assert words in said and "The nearest that work: " in said
    assert "dp=2 tp=2; dp=2 cp=2; pp=2 dp=2" in refusal(Layout(dp=4), 4, n_sequences=6)
    assert not dist.is_initialized()


def test_no_layout_may_fit():
    shape = ranks.config()
    with pytest.raises(LayoutError, match="needs 1 ranks, and there are 7. The nearest that work: none on 7 ranks"):
        check_layout(Layout(), replace(shape, n_layers=1), 7, n_sequences=8)


def test_words_and_numbers_of_a_layout_are_checked():
    for axis in (*AXES, "chunks", "micro_batch"):
        for value in (0, -1, 1.5, "2", True):
            assert f"{axis} is {value!r}; it must be a whole number, 1 or more" in refusal(Layout(**{axis: value}), 1)
    assert "recompute is 'some'; there are none, selective, full" in refusal(Layout(recompute="some"), 1)


def test_what_a_layout_is_checked_against_is_checked_too():
    for name in ("world", "n_sequences", "n_ctx"):
        for value in (0, -1, 1.5, "2", True, math.nan):
            ways = {"world": 1} | {name: value}
            assert f"{name} is {value!r}; it must be a whole number, 1 or more" == refusal(Layout(), **ways)
    assert "world is None; it must be a whole number" in refusal(Layout(), None)
    assert refusal(Layout(), 1, n_ctx=33) == "n_ctx is 33; the model reads 32 tokens at most"
    assert refusal({"tp": 2}, 1).startswith("layout is {'tp': 2}; it must be a Layout, such as ")
    for config in (None, "gpt3-1m", {}):
        with pytest.raises(LayoutError, match="config is .*; it must be a GPTConfig, such as "):
            check_layout(Layout(), config, 1)


def test_a_team_needs_ranks_that_have_met():
    words = "no ranks have met; call this inside processes.together or ranks.joined"
    with pytest.raises(LayoutError, match=words):
        Team(ranks.config(), Layout())


def test_every_rank_needs_a_row_of_the_vocabulary():
    for n_ids, fine in ((3, False), (4, True), (5, False), (6, False), (7, True), (8, True), (9, False), (10, True)):
        shape = replace(ranks.config(), vocab_size=n_ids)
        check_layout(Layout(), shape, 1)
        if fine:  # 7 rows on 4 ranks: 2 + 2 + 2 + 1
            check_layout(Layout(tp=4), shape, 4)
        else:
            with pytest.raises(LayoutError, match=f"tp=4 leaves a rank no row of a vocabulary of {n_ids}. The nearest"):
                check_layout(Layout(tp=4), shape, 4)


def grids(layouts):
    """A worker: what a grid says of each layout."""
    said = []
    for layout in layouts:
        try:
            said.append(f"no error: {Grid(layout).mesh.shape}")
        except LayoutError as error:
            said.append(str(error))
    return said


def test_a_grid_is_for_as_many_ranks_as_there_are():
    asked = [Layout(tp=2), Layout(), Layout(tp=4), Layout(tp=-1, dp=-2), Layout(tp=0), {"tp": 2}]
    for said in together(2, grids, asked):
        assert said[0] == "no error: (1, 1, 1, 2)"
        assert said[1:3] == ["one rank needs 1 ranks, and there are 2", "tp=4 needs 4 ranks, and there are 2"]
        assert said[3].startswith("dp is -2; it must be a whole") and said[4].startswith("tp is 0; it must be a whole")
        assert said[5].startswith("layout is {'tp': 2}; it must be a Layout")


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 24), st.sampled_from([None, 4, 6, 8, 12]), st.sampled_from([None, 24, 30]))
def test_the_layouts_that_are_named_work_and_no_other(world, n_sequences, n_ctx):
    shape, ways = ranks.config(), {"n_sequences": n_sequences, "n_ctx": n_ctx}
    named = [*layouts(shape, world, **ways)]
    assert len(set(named)) == len(named)
    divisors = [d for d in range(1, world + 1) if world % d == 0]
    for sizes in itertools.product(divisors, repeat=5):
        pp, dp, fsdp, cp, tp = sizes
        if math.prod(sizes) != world:
            continue
        fine = 4 % tp == 0 and pp <= 4 and (n_ctx or 32) % (cp * tp) == 0
        fine = fine and (n_sequences is None or n_sequences % (dp * fsdp) == 0)
        assert (Layout(*sizes) in named) == fine
        if fine:
            check_layout(Layout(*sizes), shape, world, **ways)
