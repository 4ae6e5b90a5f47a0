"""The engine's part of the GPU script, on a processor: one rank through the same code, and what is stored of it."""

import json
import math

import pytest

import on_gpu
import on_gpu_parallel
from gpt3lib import GPTConfig
from gpt3lib.parallel import Layout
from gpt3lib.plan import LINES
from gpt3lib.scaling import n_params
from on_gpu_parts import Results


def options(tmp_path, *words):
    return on_gpu.read_options(["parallel", *words, "--out", str(tmp_path)])


def test_one_rank_goes_through_the_engine_and_is_stored_beside_its_plan(tmp_path):
    results = Results(tmp_path / "job.json")
    on_gpu.PARTS["parallel"].work("gpt3-100k full", results, options(tmp_path, "--cpu"))
    found = json.loads(results.path.read_text())
    assert (
        found["backend"] == "gloo" and found["learns"] and found["losses"][0] == pytest.approx(math.log(4353), abs=0.2)
    )
    assert set(found["planned"]) == set(LINES) and found["peak_GiB"] == 0.0  # nobody counts on a processor
    assert found["planned_GiB"] == pytest.approx(sum(found["planned"].values()), abs=0.003)
    assert found["tokens_per_second"] > 0 and set(found["mfu"]["measured peak"]) == {"6N", "actual", "dense"}


def test_the_jobs_are_the_sizes_with_checkpointing_on_and_off(tmp_path):
    labels = on_gpu_parallel.parallel_labels(options(tmp_path))
    for size in ("gpt3-125m", "gpt3-1.3b"):
        assert f"{size} none" in labels and f"{size} full" in labels
    assert "gpt3-2.7b full" in labels and "gpt3-2.7b none" not in labels
    layout = Layout(micro_batch=4, recompute="full", bf16=True)
    assert on_gpu_parallel.layout_of("gpt3-1.3b full") == ("gpt3-1.3b", layout)
    assert on_gpu_parallel.layout_of("gpt3-125m none compiled")[1].compile


def test_what_is_planned_for_a_gpu_fits_one_and_has_its_sixteen_bytes():
    for label in on_gpu_parallel.JOBS:
        size, layout = on_gpu_parallel.layout_of(label)
        config = GPTConfig.from_name(size)
        lines = on_gpu_parallel.planned_bytes(config, layout, "cuda")
        assert 16 * n_params(config) < sum(lines.values()) < 72 * 2**30, label
        assert sum(lines.values()) <= sum(on_gpu_parallel.planned_bytes(config, layout, "cpu").values())


def test_a_peak_is_that_of_one_step(monkeypatch):
    steps = []
    assert on_gpu_parallel.peak_of(lambda: steps.append(1), "cpu") == 0 and steps == [1]
    cuda = on_gpu_parallel.torch.cuda
    monkeypatch.setattr(on_gpu_parallel, "wait", lambda device: None)
    monkeypatch.setattr(cuda, "reset_peak_memory_stats", lambda: steps.append("reset"))
    monkeypatch.setattr(cuda, "max_memory_allocated", lambda: 7)
    assert on_gpu_parallel.peak_of(lambda: steps.append(2), "cuda") == 7 and steps == [1, "reset", 2]
