"""Scaling laws against torch's own counter, scipy's regression, the paper's printed bill, and brute force."""

import json
import math
import sys
from dataclasses import asdict, replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import measure_scaling
from gpt3lib.cache import KVCache
from gpt3lib.model import GPT, GPTConfig
from gpt3lib.scaling import (
    BESIROGLU,
    HOFFMANN,
    LossLaw,
    PowerLaw,
    ScalingError,
    Work,
    chinchilla_optimal,
    cost,
    decode_work,
    fit_power_law,
    flops_by_convention,
    frontier,
    gpu_seconds,
    gpu_years,
    n_params,
    pf_days,
    product_work,
    t_quantile,
    training_days,
    training_flops,
)
from gpt3lib.sizes import EXTRA_SMALL, TABLE_2_1
from gpt3lib.texts import DATA, manifest
from measure_shots import shipped, weights_hash

TINY = GPTConfig(vocab_size=90, n_ctx=32, n_layers=3, d_model=16, n_heads=2, d_head=8, bandwidth=8)
BIG = GPTConfig.from_name("gpt3-175b")

# [B20] Table D.1, typed anew: total train compute in PF-days, FLOPs, parameters in millions
PAPER = {
    "gpt3-125m": ("2.60E+00", "2.25E+20", 125),
    "gpt3-350m": ("7.42E+00", "6.41E+20", 356),
    "gpt3-760m": ("1.58E+01", "1.37E+21", 760),
    "gpt3-1.3b": ("2.75E+01", "2.38E+21", 1320),
    "gpt3-2.7b": ("5.52E+01", "4.77E+21", 2650),
    "gpt3-6.7b": ("1.39E+02", "1.20E+22", 6660),
    "gpt3-13b": ("2.68E+02", "2.31E+22", 12850),
    "gpt3-175b": ("3.64E+03", "3.14E+23", 174600),
}


# ---- operations ----


@pytest.mark.parametrize("name", sorted([*TABLE_2_1, *EXTRA_SMALL]))
def test_parameters_are_those_of_the_model(name):
    config = GPTConfig.from_name(name)
    with torch.device("meta"):
        model = GPT(config)
    tables = sum(p.numel() for name, p in model.named_parameters() if "embeddings" in name)
    assert n_params(config) == model.num_params()
    assert n_params(config, embeddings=False) == model.num_params() - tables


@pytest.mark.parametrize("name", sorted(PAPER))
def test_the_papers_bill(name):
    days, flops, millions = PAPER[name]
    ours = training_flops(GPTConfig.from_name(name), 300e9)
    assert ours == pytest.approx(6 * millions * 1e6 * 300e9, rel=0.004)
    assert ours == pytest.approx(float(flops), rel=0.006)
    assert pf_days(6 * millions * 1e6 * 300e9) == pytest.approx(float(days), rel=0.005)


@pytest.mark.parametrize("attention", [("banded",), ("dense",), ("dense", "banded")])
def test_dense_is_what_torch_counts(attention):
    # a band as wide as the window: torch counts what is computed, and then nothing is cut into blocks
    config = replace(TINY, attention=attention, bandwidth=TINY.n_ctx)
    tokens = torch.arange(2 * config.n_ctx).view(2, -1)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        F.cross_entropy(GPT(config)(tokens).flatten(0, 1), tokens.flatten()).backward()
    assert counter.get_total_flops() == tokens.numel() * flops_by_convention(config)["dense"]


@pytest.mark.parametrize("width", [1, 7, 8, 32, 99])
def test_actual_counts_the_pairs_that_are_seen(width):
    config = replace(TINY, bandwidth=width)
    reach = {"dense": config.n_ctx, "banded": width}
    pairs = sum(min(i + 1, reach[kind]) for kind in config.kinds for i in range(config.n_ctx))
    matrices = 3 * (4 + 8) * 16**2 + 90 * 16
    assert flops_by_convention(config)["actual"] == pytest.approx(6 * matrices + 12 * 16 * pairs / 32, abs=0.5)


def test_conventions_in_order():
    for name in TABLE_2_1:
        found = flops_by_convention(GPTConfig.from_name(name))
        assert list(found) == ["6N", "layers", "dense", "actual"]
        assert found["layers"] < found["6N"] < found["actual"] < found["dense"]
        config = GPTConfig.from_name(name)
        for by, each in found.items():
            assert training_flops(config, 1e6, by=by) == each * 10**6
        assert training_flops(config, 7) == 7 * 6 * n_params(config)


def test_the_articles_numbers():
    assert gpu_years(3.14e23, 28e12) == pytest.approx(355.36, abs=0.01)
    assert cost(3.14e23, 28e12, 1.5) == pytest.approx(4.6726e6, rel=1e-4)
    assert training_days(3.14e23, 125e12, 10_000, 24.6 / 125) == pytest.approx(14.8, abs=0.05)


def test_time_and_money_by_fractions():
    seconds = Fraction(10**20, 2 * 10**13 // 4)  # a quarter of 20 TFLOP/s
    assert gpu_seconds(1e20, 2e13, 0.25) == float(seconds)
    assert gpu_years(1e20, 2e13, 0.25) == pytest.approx(float(seconds / (86400 * 365 + 21600)))
    assert training_days(1e20, 2e13, 8, 0.25) == pytest.approx(float(seconds / 86400 / 8))
    assert cost(1e20, 2e13, 3, 0.25) == pytest.approx(float(seconds / 1200))
    assert pf_days(8.64e19) == 1.0


# ---- laws ----


@pytest.mark.parametrize("level", [0.5, 0.95, 0.99])
@pytest.mark.parametrize("dof", [1, 2, 3, 5, 30, 1000])
def test_quantiles_of_student(dof, level):
    assert t_quantile(dof, level) == pytest.approx(stats.t.ppf((1 + level) / 2, dof), rel=1e-5)


@given(st.integers(3, 12), st.integers(0, 10**6), st.floats(0.5, 0.99))
@settings(max_examples=50, deadline=None)
def test_a_fit_is_scipys_regression(n, seed, level):
    dice = np.random.default_rng(seed)
    x = np.exp(dice.uniform(0, 20, n))
    y = 3 * x**-0.3 * np.exp(dice.normal(0, 0.2, n))
    law, line = fit_power_law(x, y, level=level), stats.linregress(np.log(x), np.log(y))
    half = stats.t.ppf((1 + level) / 2, n - 2) * line.stderr
    assert math.log(law.a) == pytest.approx(line.intercept, rel=1e-6, abs=1e-9)
    assert (law.alpha, law.high - law.alpha) == pytest.approx((-line.slope, half), rel=1e-4)
    assert law.alpha - law.low == pytest.approx(half, rel=1e-4)


@given(st.floats(0.01, 100), st.floats(-1, 2), st.floats(0, 5))
@settings(max_examples=50, deadline=None)
def test_an_exact_law_comes_back(a, alpha, floor):
    x = [1, 10, 100, 1000]
    law = fit_power_law(x, [floor + a * at**-alpha for at in x], floor) if a * 1000**-alpha > 1e-6 * floor else None
    if law:
        assert (law.a, law.alpha, law.floor) == pytest.approx((a, alpha, floor), rel=1e-6, abs=1e-6)
        assert law.high - law.low < 1e-3
        assert law(50) == pytest.approx(floor + a * 50**-alpha, rel=1e-6)


def test_a_fit_takes_numbers_of_any_kind():
    x, y = [1, 2, 4, 9], [5, 3, 2.5, 1.5]
    one = asdict(fit_power_law(x, y))
    for kind in (np.array, torch.tensor, lambda values: map(float, values), tuple):
        assert asdict(fit_power_law(kind(x), kind(y))) == pytest.approx(one, rel=1e-6)
    assert all(type(value) is float for value in one.values())
    assert PowerLaw(2.0, 1.0, 0, 0, 1.0)(np.array([1.0, 2.0])).tolist() == [3.0, 2.0]


def test_a_wider_level_is_a_wider_interval_around_the_same_line():
    x, y = [1, 2, 4, 9], [5, 3, 2.5, 1.5]
    narrow, wide = (fit_power_law(x, y, level=level) for level in (0.5, 0.95))
    assert wide.low < narrow.low < narrow.alpha == wide.alpha < narrow.high < wide.high


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), max_size=30))
def test_a_frontier_by_its_definition(points):
    best = {p for p in points if all(q[1] > p[1] for q in points if q[0] < p[0])}
    best = {p for p in best if all(q[1] >= p[1] for q in points if q[0] == p[0])}
    assert frontier(points) == sorted(best)


@pytest.mark.parametrize("law", [BESIROGLU, HOFFMANN, LossLaw(0, 3, 0.5, 20, 0.4)])
@pytest.mark.parametrize("flops", [1e18, 3.14e23])
def test_no_other_split_beats_the_best(law, flops):
    n, d = law.best(flops)
    assert 6 * n * d == pytest.approx(flops)
    around = n * np.geomspace(0.01, 100, 20_001)
    assert around[np.argmin(law.loss(around, flops / 6 / around))] == pytest.approx(n, rel=1e-3)


def test_printed_constants():
    # [H22] eq. 10: at Gopher's compute of 5.76e23 FLOPs approach 3 gives 40 billion parameters, 1, 2 give 67, 63
    assert HOFFMANN.best(5.76e23)[0] == pytest.approx(40e9, rel=0.25)
    assert BESIROGLU.best(5.76e23)[0] == pytest.approx(67e9, rel=0.15)
    n, d = chinchilla_optimal(5.76e23)
    assert (n, d) == pytest.approx((70e9, 1.4e12), rel=0.03)  # Chinchilla itself
    assert chinchilla_optimal(3.14e23, 5)[1] == pytest.approx(5 * chinchilla_optimal(3.14e23, 5)[0])


# ---- bytes ----


def test_a_product_moves_its_three_matrices():
    a, b = torch.ones(3, 4).half(), torch.ones(4, 5).half()
    c = a @ b
    with FlopCounterMode(display=False) as counter:
        torch.mm(a.float(), b.float())
    work = product_work(3, 4, 5)
    assert work == (counter.get_total_flops(), a.nbytes + b.nbytes + c.nbytes)
    assert work.intensity == work.flops / work.bytes
    assert product_work(3, 4, 5, width=4).bytes == 2 * work.bytes


def test_a_step_of_decoding_moves_weights_and_caches():
    model, past = GPT(TINY), KVCache(TINY, 20)
    with torch.no_grad():
        model(torch.arange(20).expand(5, -1), past)
    weights = sum(p.nbytes for name, p in model.named_parameters() if "wpe" not in name)
    caches = sum(layer.keys.nbytes + layer.values.nbytes for layer in past.layers)  # of five texts
    work = decode_work(TINY, batch=5, length=20, width=4)
    assert work.bytes == weights + caches
    assert work.flops == 2 * (5 * weights + caches) / 4


def test_forward_flops_of_decoding_are_torchs():
    config, n = replace(TINY, attention=("dense",)), 9
    model, past = GPT(config), KVCache(config, 32)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(torch.arange(n - 1)[None], past)
        with FlopCounterMode(display=False) as counter:
            model(torch.tensor([[3]]), past)
    no_products = config.n_layers * 13 * 16 + 2 * 16  # biases and norms
    assert decode_work(config, 1, n).flops == counter.get_total_flops() + 2 * no_products


def test_the_stored_decoding_moved_these_bytes():
    jobs = json.loads((DATA / "experiments" / "gpu_decode.json").read_text())["jobs"]
    config = GPTConfig.from_name("gpt3-125m")
    for batch in (1, 8, 64):
        found = jobs["gpt3-125m"][f"B = {batch}"]["MB a step"]
        assert decode_work(config, batch, 104).bytes / 1e6 == pytest.approx(found, abs=0.1)


def test_the_slower_limit_decides():
    assert Work(100, 10).seconds(peak=10, bandwidth=100) == 10
    assert Work(100, 10).seconds(peak=1000, bandwidth=2) == 5
    knee = Work(295.2, 1.0)
    assert knee.flops / 989e12 == pytest.approx(knee.bytes / 3.35e12, rel=1e-3)


# ---- what is refused ----

BAD = [0, -1, math.nan, math.inf, "1", None, True, 10**400]
POSITIVE = {
    "bandwidth": lambda value: Work(1, 1).seconds(1, value),
    "flops": pf_days,
    "flops of best": HOFFMANN.best,
    "flops of chinchilla_optimal": chinchilla_optimal,
    "flops of gpu_years": lambda value: gpu_years(value, 1e12),
    "n_tokens": lambda value: training_flops(TINY, value),
    "peak": lambda value: gpu_seconds(1e20, value),
    "peak of a roofline": lambda value: Work(1, 1).seconds(value, 1),
    "per_hour": lambda value: cost(1e20, 1e12, value),
    "ratio": lambda value: chinchilla_optimal(1e20, value),
}


@pytest.mark.parametrize("value", BAD, ids=repr)
@pytest.mark.parametrize("name", sorted(POSITIVE))
def test_what_must_be_above_0(name, value):
    with pytest.raises(ScalingError, match=rf"{name.split()[0]} is .*; it must be a number above 0"):
        POSITIVE[name](value)


@pytest.mark.parametrize("value", [0, -0.1, 1.01, 22, math.nan, "0.4", None, True])
def test_a_share_is_no_percentage(value):
    for function in (
        gpu_seconds,
        gpu_years,
        lambda *a: training_days(*a[:2], 8, a[2]),
        lambda *a: cost(*a[:2], 1, a[2]),
    ):
        with pytest.raises(ScalingError, match="mfu is .*; it must be a share, above 0 and at most 1"):
            function(1e20, 1e12, value)


@pytest.mark.parametrize("level", [0, 1, 95, "0.95"])
def test_a_level_is_below_1(level):
    with pytest.raises(ScalingError, match="level is .*; it must be a share, above 0 and below 1"):
        fit_power_law([1, 2, 3], [3, 2, 1], level=level)


@pytest.mark.parametrize("config", ["gpt3-175b", None, {"n_layers": 2}, 175e9])
def test_a_config_is_needed(config):
    right = "it must be a GPTConfig"
    for function in (n_params, flops_by_convention, lambda c: training_flops(c, 1), lambda c: decode_work(c, 1, 1)):
        with pytest.raises(ScalingError, match=right):
            function(config)


@pytest.mark.parametrize("value", [0, 1.5, -1, True, "8", None])
def test_whole_numbers(value):
    for name, function in {
        "n_gpus": lambda: training_days(1e20, 1e12, value),
        "batch": lambda: decode_work(TINY, value, 1),
        "length": lambda: decode_work(TINY, 1, value),
    }.items():
        with pytest.raises(ScalingError, match=f"{name} is .*; it must be a whole number, 1 or more"):
            function()


def test_an_unknown_convention():
    with pytest.raises(ScalingError, match="by is '7N'; it must be one of 6N, layers, dense, actual"):
        training_flops(TINY, 1, by="7N")


@pytest.mark.parametrize(
    "x, y, floor, words",
    [
        ([1, 2, 3], [1, 2], 0, "3 x and 2 y"),
        ([1, 1, 2], [3, 2, 1], 0, "2 different x"),
        ([], [], 0, "0 different x"),
        ([1, 2, 3], [3, 2, 0], 0, "finite numbers above 0"),
        ([-1, 2, 3], [3, 2, 1], 0, "finite numbers above 0"),
        ([1, 2, math.inf], [3, 2, 1], 0, "finite numbers above 0"),
        ([1, 2, 3], [3, "2", 1], 0, "finite numbers above 0"),
        ([1, 2, 3], [3, 2, math.nan], 0, "finite numbers above 0"),
        ([1, 2, 3], [3, 2, 1], 1, "floor is 1; it must be from 0 to below the lowest y, 1"),
        ([1, 2, 3], [3, 2, 1], -1, "floor is -1"),
        ([1, 2, 3], [3, 2, 1], "0", "floor is '0'"),
    ],
)
def test_points_that_no_line_goes_through(x, y, floor, words):
    with pytest.raises(ScalingError, match=words):
        fit_power_law(x, y, floor)


# ---- what was measured ----


def test_stored_losses_are_of_the_models_that_are_shipped():
    stored = json.loads((DATA / "experiments" / "scaling.json").read_text())
    models = manifest()["models"]
    for name in shipped():
        told = stored["sizes"][name]
        assert told["model"] == weights_hash(name)
        for source, losses in told["losses"].items():
            # the manifest has the mean of windows that lie elsewhere in the same text
            assert len(losses) == (1 if source == "crawl" else measure_scaling.N_WINDOWS)
            assert np.mean(losses) == pytest.approx(models[name]["held_out"][source], rel=0.02)


def test_stored_runs_end_where_a_long_run_was_looked_at():
    runs = json.loads((DATA / "experiments" / "scaling.json").read_text())["runs"]
    jobs = json.loads((DATA / "experiments" / "gpu_family.json").read_text())["jobs"]
    asked = [(name, n) for name, n in measure_scaling.SHORT]
    found = [(name, int(n)) for name in runs for n in runs[name]]
    assert [name for name, _ in found] == [name for name, _ in asked]
    for (name, n), (_, wanted) in zip(found, asked):
        assert n == pytest.approx(wanted, rel=0.01)
        curve = jobs[f"{name}@1.5"]["curve"]
        assert min(abs(int(tokens) / n - 1) for tokens in curve) < 0.015
        assert runs[name][str(n)].keys() == next(iter(curve.values())).keys()


def test_the_tool_measures_each_window(monkeypatch):
    dice = torch.Generator().manual_seed(0)
    text = torch.randint(90, (300,), generator=dice)
    monkeypatch.setattr(measure_scaling, "N_CTX", 32)
    monkeypatch.setattr(measure_scaling, "N_WINDOWS", 4)
    model = GPT(TINY).eval()
    found = measure_scaling.losses(model, text)
    assert len(found) == 4
    for start, loss in zip((0, 89, 178, 267), found):
        logits = model(text[None, start : start + 32])[0]
        assert loss == pytest.approx(F.cross_entropy(logits, text[start + 1 : start + 33]).item(), abs=1e-4)
    assert len(measure_scaling.losses(model, text[:20])) == 1


def test_the_tool_keeps_what_is_there(tmp_path, monkeypatch):
    place = tmp_path / "scaling.json"
    stored = json.loads((DATA / "experiments" / "scaling.json").read_text())
    place.write_text(json.dumps(stored))
    monkeypatch.setattr(measure_scaling, "PLACE", place)
    monkeypatch.setattr(measure_scaling, "family_split", lambda: (None, {}))
    monkeypatch.setattr(sys, "argv", ["measure_scaling.py"])
    assert measure_scaling.main() == 0
    again = json.loads(place.read_text())
    assert {part: again[part] for part in again if part != "about"} == {p: stored[p] for p in stored if p != "about"}
    assert again["about"]["command"] == stored["about"]["command"]
