"""The script for a GPU, on a processor: every part on tiny sizes, and each tool against an independent answer."""

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import on_gpu
import on_gpu_check
import on_gpu_data
import on_gpu_family as family
import on_gpu_parts as parts
from gpt3lib import GPT, GPTConfig, generate
from gpt3lib.loading import Loader
from gpt3lib.recipe import peak_by_size
from gpt3lib.tasks import TASKS, numbered

PLAY = ["To be, or not to be, that is the question. " * 20, "And the sea was dark. The king said nothing. " * 30]


def texts():
    """Two sources of text, as gpt3lib.data gives the family's."""
    return {
        "train": {"plays": PLAY * 3, "news": ["There were 1984 of them in 2026. " * 60]},
        "held_out": {"plays": PLAY, "news": ["In 1789 nobody knew. " * 90]},
        "weights": {"plays": 0.3, "news": 0.1},
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("v300")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(on_gpu_data, "family_text", texts)
        words = ["--vocab", "300", "--task-documents", "40", "--held-out-tasks", "20", "--task-share", "0.5"]
        on_gpu_data.main([str(folder), *words])
    return folder


def test_data_are_what_they_say_and_the_same_from_a_packed_folder(data, tmp_path, monkeypatch):
    found = family.Data(data)
    assert found.weights == pytest.approx({"plays": 0.375, "news": 0.125, "tasks": 0.5}) and found.spaced
    ids, end = found.held_out["tasks"][0 : len(found.held_out["tasks"])].tolist(), found.tokenizer.end_of_text
    starts = [i for i, token in enumerate(ids) if token == end]
    assert len(starts) == 20 and found.tokenizer.decode(ids[starts[3] + 1 : starts[4]]) == numbered(1, 3)
    digits = [piece for piece in found.tokenizer.vocabulary if sum(48 <= byte <= 57 for byte in piece) > 1]
    assert digits == []
    monkeypatch.setattr(on_gpu_data, "family_text", texts)
    on_gpu_data.main([str(tmp_path / "packed"), "--pack", "--vocab", "300"])
    monkeypatch.setattr(on_gpu_data, "family_text", None)
    words = ["--task-documents", "40", "--held-out-tasks", "20", "--weights", "plays=1", "news=3"]
    on_gpu_data.main([str(tmp_path / "again"), "--packed", str(tmp_path / "packed"), *words])
    again = family.Data(tmp_path / "again")
    assert again.weights == pytest.approx({"plays": 0.1, "news": 0.3, "tasks": 0.6})
    for part in ("train", "held_out"):
        assert {n: t.sha256 for n, t in getattr(again, part).items()} == {
            n: t.sha256 for n, t in getattr(found, part).items()
        }
    with pytest.raises(SystemExit, match="holds data already"):
        on_gpu_data.main([str(data)])
    with pytest.raises(SystemExit, match="one weight for each of plays, news"):
        on_gpu_data.main([str(tmp_path / "x"), "--packed", str(tmp_path / "packed"), "--weights", "plays=1"])


def options(tmp_path, *words):
    found = on_gpu.read_options([*map(str, words), "--cpu", "--out", str(tmp_path)])
    (tmp_path / "jobs").mkdir(exist_ok=True)
    return found


def job(tmp_path, part, label, *words):
    """What one job finds."""
    results = parts.Results(on_gpu.job_file(tmp_path, part, label), label)
    on_gpu.PARTS[part].work(label, results, options(tmp_path, part, *words))
    return json.loads(results.path.read_text())


def small(**changes):
    shape = {"vocab_size": 61, "n_ctx": 48, "n_layers": 2, "d_model": 32, "n_heads": 2, "d_head": 16, "bandwidth": 9}
    return GPT(GPTConfig(**shape | changes)).eval()


@pytest.mark.parametrize("label", ["flex 16 float32", "many bands", "models", "text"])
def test_check_finds_nothing_wrong_on_a_processor(tmp_path, label):
    found = job(tmp_path, "check", label)
    assert found["failed"] == 0 and len(found["checks"]) >= 2


def test_a_comparison_that_fails_is_stored_and_the_next_one_goes_on(tmp_path):
    checks = on_gpu_check.Checks(parts.Results(tmp_path / "x.json"))
    checks.near("near", torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.1]), 1e-3)
    checks.near("nan", torch.tensor([math.nan]), torch.tensor([1.0]), 1e9)
    checks.same("shape", torch.zeros(2), torch.zeros(3))
    checks.run("error", lambda checks: 1 / 0)
    checks.same("same", torch.ones(2), torch.ones(2))
    found = json.loads((tmp_path / "x.json").read_text())
    assert [row["passes"] for row in found["checks"]] == [False, False, False, False, True] and found["failed"] == 4
    assert found["checks"][0]["difference"] == pytest.approx(0.1 / math.hypot(1, 2.1), rel=1e-4)
    assert "ZeroDivisionError" in found["checks"][3]["error"]


@pytest.mark.parametrize("part, label", [("band", "2 x 16"), ("steps", "gpt3-100k"), ("decode", "gpt3-100k")])
def test_each_part_measures(tmp_path, part, label):
    found = job(tmp_path, part, label)
    if part == "band":
        assert set(found["T = 64, forward and backward"]["ms"]) == {"dense", "blocks"}
    elif part == "steps":
        assert found["tokens_per_second"] > 0 and set(found["mfu"]["measured peak"]) == {"6N", "dense", "actual"}
    else:
        assert found["B = 64"]["MB a step"] > found["B = 1"]["MB a step"] >= found["weights_MB"]


def test_the_race_has_contestants_of_one_size(tmp_path):
    shape = {"n_layers": 2, "d_model": 64, "n_heads": 4}
    models = parts.race_models(None, 300, 64, shape)
    assert len(models) == 4 and len({sum(p.numel() for p in m.parameters()) for m, _ in models.values()}) == 1
    found = job(tmp_path, "race", "eager")
    assert set(found["ms"]) == set(models) and found["times gpt3lib"]["gpt3lib"] == 1


def test_flops_are_those_of_the_other_race():
    race = pytest.importorskip("race")
    config = small().config
    found = parts.step_flops(config, 3, 48)
    assert (found["dense"], found["actual"]) == race.step_flops(config, 3, 48)
    assert found["6N"] < found["actual"] < found["dense"]


def test_a_run_of_the_family_is_trained_measured_and_saved(tmp_path, data):
    found = job(tmp_path, "family", "gpt3-100k@2", "--data", data)
    home = tmp_path / "models" / "gpt3-100k"
    assert found["finished"] and found["tokens"] == found["recipe"]["n_tokens"]
    assert found["held_out"].keys() == {"plays", "news", "tasks"}
    assert found["recipe"]["peak"] == pytest.approx(2 * peak_by_size(GPT(GPTConfig(**found["config"] | {
        "attention": tuple(found["config"]["attention"])})).num_params()))  # fmt: skip
    rows = (home / "log.csv").read_text().splitlines()
    assert len(rows) == 1 + found["steps"] and rows[-1].split(",")[1] == str(found["tokens"])
    induction = [json.loads(line) for line in (home / "extra.jsonl").read_text().splitlines()]
    assert all(0 <= score <= 1 for heads in induction[0]["induction"]["scores"] for score in heads)
    model = GPT.from_pretrained(home)
    assert family.held_out_loss(model, family.Data(data).held_out["plays"], 8)["nats"] == pytest.approx(
        found["held_out"]["plays"]["nats"], abs=5e-3
    )  # float16 on disk
    assert not (home / "run").exists() and set(found["files"]) >= {"model.safetensors", "merges.txt", "log.csv"}


def test_large_models_are_saved_in_pieces(tmp_path, data, monkeypatch):
    monkeypatch.setattr(family, "SHARD_BYTES", 20_000)
    files = family.save(small(), family.Data(data), tmp_path)
    pieces = [tmp_path / name for name in files if name.endswith(".safetensors")]
    assert len(pieces) > 1 and GPT.from_pretrained(tmp_path).num_params() == small().num_params()


def test_a_run_stops_at_its_deadline_and_is_saved(tmp_path, data):
    found = job(tmp_path, "family", "gpt3-100k@2", "--data", data, "--until", time.time(), "--tokens", "20480")
    assert not found["finished"] and 0 < found["tokens"] < 20480 and "model.safetensors" in found["files"]


def test_tune_and_speed(tmp_path, data):
    words = ("--data", data, "--names", "gpt3-100k", "--peak", "1", "3")
    labels = family.tune_labels(options(tmp_path, "tune", *words))
    assert labels == [f"{data.name}/gpt3-100k@1", f"{data.name}/gpt3-100k@3"]
    found = job(tmp_path, "tune", labels[1], *words)
    assert found["run"]["peak"] == 3 and "files" not in found and found["accuracy"].keys() == {"copy", "reverse"}
    assert job(tmp_path, "speed", "gpt3-100k", "--micro", "2")["tokens_per_second"] > 0


def test_a_replayed_loss_has_the_gradients_of_the_plain_one():
    """A CUDA graph writes over the same tensors each time; here a function does. Two micro-batches are added up."""
    model, plain = small(), small()
    places, parameters = parts.tokens_for(61, 2, 48, "cpu"), list(model.parameters())
    loss = model.loss(*places)
    grads, loss = torch.autograd.grad(loss, parameters), loss.detach()

    class Graph:
        def replay(self):
            with torch.enable_grad():
                fresh = model.loss(*places)
                new = fresh.detach(), *torch.autograd.grad(fresh, parameters)
            for old, its in zip((loss, *grads), new):
                old.copy_(its)

    recorded = (Graph(), places, loss, grads)
    for seed, share in ((1, 0.25), (2, 0.75)):
        x, y = parts.tokens_for(61, 2, 48, "cpu", seed)
        found, expected = parts.Replay.apply(recorded, x, y, *parameters), plain.loss(x, y)
        torch.testing.assert_close(found, expected)
        (found * share).backward(), (expected * share).backward()
    for mine, its in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(mine.grad, its.grad)


def test_a_way_that_fails_or_is_wrong_gives_way_to_a_slower_one(tmp_path, monkeypatch):
    tried = []

    def difference(model, loss, n, n_ctx, device):
        tried.append((model.blocks[1].attention.how, loss is family.loss_of))
        if len(tried) == 1:
            raise RuntimeError("no compiler")
        return 0.5 if len(tried) < 4 else 0.001

    monkeypatch.setattr(family, "difference", difference)
    results, given = parts.Results(tmp_path / "x.json"), options(tmp_path, "speed", "--how", "mask")
    assert family.prepare(small(), given, results, compiled=True) is family.loss_of
    assert tried == [("mask", False), ("mask", True), ("mask", True), ("blocks", True), ("blocks", True)]
    told = [name for name in results.found if name.startswith("failed")]
    assert len(told) == 2 and "no compiler" in results.found[told[0]] and "50.0%" in results.found[told[1]]


def test_names_of_runs_and_tasks():
    assert set(family.PROBED) <= TASKS.keys()
    assert len({str(family.Spec.parse(name)) for name in family.FAMILY}) == len(family.FAMILY) == 11
    assert family.Spec.parse("gpt3-1m:constant,seed2", 3.0) == family.Spec("gpt3-1m", False, True, 2, 3.0)
    with pytest.raises(ValueError, match="no run is 'sparse'"):
        family.Spec.parse("gpt3-1m:sparse")


def test_every_batch_of_a_run_has_few_shapes(tmp_path):
    given, n_ctx = options(tmp_path, "family", "--tokens", "1e6", "--n-ctx", "64"), 64
    for text in ("gpt3-100k", "gpt3-100k:constant"):
        recipe = family.recipe_of(family.Spec.parse(text), small(n_ctx=n_ctx), given)
        sizes = [step.n_sequences for step in recipe.steps(n_ctx)]
        assert all(size % 16 == 0 for size in sizes) and 0.99e6 < sum(sizes) * n_ctx == recipe.n_tokens <= 1e6
        assert sizes[0] == (64 if "constant" in text else 16) and max(sizes) == 64


def test_reading_ahead_changes_nothing():
    ids = torch.arange(5000) % 61
    plain = Loader({"a": ids, "b": ids[:999]}, {"a": 0.7, "b": 0.3}, 16, seed=3)
    ahead = family.Ahead(plain, n=10)
    for first, count in ((0, 4), (4, 8), (12, 30), (42, 1)):
        for got, expected in zip(ahead.sequences(first, count), plain.sequences(first, count)):
            assert got.equal(expected)
    assert ahead.n_ctx == 16 and ahead.identity() == plain.identity()


def test_the_share_of_right_answers_is_what_greedy_writing_gets():
    model = small(vocab_size=7)
    with torch.no_grad():
        model.embeddings.wte.weight.mul_(20)
    rows, dice = [], torch.Generator().manual_seed(1)
    for i in range(20):
        prompt = torch.randint(7, (1, 3 + i), generator=dice)
        answer = generate(model, prompt, 3, temperature=0)[0, 3 + i :].tolist()
        rows.append((prompt[0].tolist(), answer if i % 4 else [answer[0], answer[1], (answer[2] + 1) % 7]))
    assert family.share_right(model, rows, batch=6) == 15 / 20
    assert not model.training and model.blocks[1].attention.how == "auto"


def test_questions_end_with_their_lines_and_fit(data):
    tokenizer = family.Data(data).tokenizer
    rows = family.questions(TASKS["copy"], tokenizer, 2, 5, True, 1024)
    text = tokenizer.decode(rows[0][0][1:])
    assert len(rows) == 5 and text.endswith(" =>") and text.count("\n") == 3  # description, two examples, question
    assert tokenizer.decode(rows[0][1]).endswith("\n") and rows[0][0][0] == tokenizer.end_of_text
    assert family.questions(TASKS["copy"], tokenizer, 32, 5, True, 64) == []


def test_an_induction_head_is_seen():
    """A head whose queries and keys are positions one apart from those of the first copy, and one that sees nothing."""
    n = 8
    model = small(n_ctx=16, n_layers=1, attention=("dense",), bandwidth=n + 1)
    a = model.blocks[0].attention
    flat = family.induction_scores(model, n=n)["scores"][0]
    with torch.no_grad():
        model.embeddings.wte.weight.zero_()
        model.embeddings.wpe.weight.copy_(torch.eye(16, 32))
        for linear in (a.wq, a.wk):
            linear.weight.zero_()
        for i in range(n, 15):  # head 0: the query of track i is the key of track i - n + 1
            a.wq.weight[i - n, i], a.wk.weight[i - n, i - n + 1] = 30.0, 30.0
    seen = family.induction_scores(model, n=n)["scores"][0]
    assert seen[0] > 0.95 and seen[1] == pytest.approx(sum(1 / (i + 1) for i in range(n, 15)) / 7, abs=1e-3)
    assert all(score < 0.2 for score in flat)


def test_bits_per_byte_come_from_nats(data):
    tokens, model = family.Data(data).held_out["plays"], small(vocab_size=300)
    found = family.held_out_loss(model, tokens, 10**6)
    ids = tokens[0 : len(tokens)].long()
    n = (len(ids) - 1) // 48
    starts = [i * (len(ids) - 49) // (n - 1) for i in range(n)]
    with torch.no_grad():
        losses = [F.cross_entropy(model(ids[None, s : s + 48])[0], ids[s + 1 : s + 49]).item() for s in starts]
    assert found["nats"] == pytest.approx(sum(losses) / n, abs=1e-3)
    right = found["nats"] / math.log(2) * len(ids) / tokens.n_bytes
    assert found["bits_per_byte"] == pytest.approx(right, abs=1e-3)
    short = family.held_out_loss(small(n_ctx=10**4, vocab_size=300), tokens, 8)  # less text than a window
    assert short["nats"] == pytest.approx(math.log(300), abs=0.2)


def test_late_jobs_are_stopped_and_what_has_not_begun_is_left_out():
    python = [sys.executable, "-c"]
    wait = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    commands = {"quick": [*python, "pass"], "wrong": [*python, "exit(3)"], "late": [*python, wait], "never": ["x"]}
    begin = time.monotonic()
    found = {name: how for name, how, _ in on_gpu.run_jobs(commands, at_once=1, seconds=3)}
    assert found["quick"] == "done" and found["wrong"] == "failed (3)" and time.monotonic() - begin < 15
    assert found["late"].startswith("stopped after") and found["never"].startswith("left out")


def test_the_command_line_writes_one_file_for_a_part(tmp_path):
    script = Path(on_gpu.__file__)
    done = subprocess.run(
        [sys.executable, script, "decode", "--cpu", "--out", tmp_path], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "gpu_decode.json").read_text())
    assert found["about"].keys() == {"device", "torch", "date", "command"} and str(tmp_path) not in str(found)
    assert found["jobs"]["gpt3-100k"]["state"] == "done" and found["jobs"]["gpt3-100k"]["B = 1"]["tokens/s"] > 0


def test_nine_minutes_are_enough():
    limits = [on_gpu.PARTS[name].limit for name in on_gpu.BY_DEFAULT]
    assert sum(limits) <= 540 and max(limits) <= 180


def test_what_cannot_be_is_said_at_once(tmp_path, capsys):
    with pytest.raises(SystemExit):
        on_gpu.read_options(["flops"])
    assert "no part 'flops'" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="give folders that hold train"):
        family.family_labels(options(tmp_path, "family", "--data", tmp_path))
