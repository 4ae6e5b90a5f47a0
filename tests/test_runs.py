"""Long runs: a run that is killed at any moment goes on bit-equal; what is refused; spikes; logs."""

import copy
import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import deadly
from deadly import CONFIG, go, parts, remains
from gpt3lib import checkpoints, runs
from gpt3lib.checkpoints import Checkpoint, Logs, Pieces, RunError, Stopping, Store
from gpt3lib.loading import Loader, write_tokens
from gpt3lib.model import GPT, GPTConfig
from gpt3lib.recipe import update
from gpt3lib.runs import Options, first_bad, flops_per_token, is_spike, load, portions, run
from gpt3lib.texts import DATA
from gpt3lib.tokenization import Tokenizer

POSIX = pytest.mark.skipif(os.name == "nt", reason="forks, and signals that Windows lacks")


def process(*words) -> subprocess.CompletedProcess:
    """deadly.py's task in a process of its own."""
    command = [sys.executable, str(Path(deadly.__file__)), *map(str, words)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What an uninterrupted run leaves."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole")
    go(folder)
    return remains(folder)


class Broken(Exception):
    """Ends a run in the middle, as no policy would."""


def break_off(folder, at, **options):
    """A run that ends after so many steps without saving."""

    def on_step(number, model):
        if number == at:
            raise Broken
        return {"odd": number % 3} if number % 2 else None

    with pytest.raises(Broken):
        go(folder, on_step=on_step, **options)


# --- the same numbers ---


def test_the_losses_are_those_of_a_plain_loop(whole):
    model, optimizer, loader, recipe = parts()
    model.train()
    for row, step in zip(whole["rows"][1:], recipe.steps(CONFIG.n_ctx), strict=True):
        inputs, targets = loader.sequences(step.tokens // CONFIG.n_ctx, step.n_sequences)
        pairs = list(zip(inputs.split(3), targets.split(3)))
        loss, norm = update(model, optimizer, pairs, step.rate, clip=recipe.clip)
        number, tokens = step.number + 1, step.tokens + step.n_sequences * CONFIG.n_ctx
        assert row[:3] == [f"{number}", f"{tokens}", f"{loss.item()}"]
        assert row[4:] == [f"{step.rate}", f"{norm.item()}"]
    for name, tensor in model.state_dict().items():
        assert tensor.tolist() == whole["tensors"][f"model {name}"]


def test_a_golden_curve_of_a_hundred_steps(tmp_path):
    torch.set_num_threads(1)
    state, _ = go(tmp_path, 95)
    rows = [line.split(",") for line in (tmp_path / "log.csv").read_text().splitlines()[1:]]
    losses = {int(row[0]): float(row[2]) for row in rows}
    assert len(losses) == state.step == 97 and state.finished
    golden = {1: 4.115, 10: 3.748, 25: 3.028, 50: 1.910, 75: 1.750, 97: 2.029}
    assert {n: losses[n] for n in golden} == pytest.approx(golden, abs=0.02)  # another processor moves the third digit


@pytest.mark.parametrize("at", [1, 2, 3, 4, 17, 29])
def test_a_run_broken_off_goes_on_as_if_nothing_had_been(tmp_path, whole, at):
    break_off(tmp_path, at)
    state, model = go(tmp_path)
    assert remains(tmp_path) == whole and state.finished and not model.training


def test_a_finished_run_stays_as_it_is(tmp_path, whole):
    go(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    state, model = go(tmp_path)
    assert state.finished and remains(tmp_path) == whole
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert model.ln_f.weight.tolist() == whole["tensors"]["model ln_f.weight"]


def test_losses_read_later_are_the_same(tmp_path, whole):
    go(tmp_path / "seldom", sync_every=4)
    break_off(tmp_path / "broken", 14, sync_every=4)
    go(tmp_path / "broken", sync_every=4)
    assert remains(tmp_path / "seldom") == remains(tmp_path / "broken") == whole


def test_tokens_that_fill_no_sequence_are_left(tmp_path):
    model, optimizer, loader, recipe = parts(6)
    recipe = replace(recipe, n_tokens=recipe.n_tokens + 7)
    state = run(model, optimizer, loader, Store(tmp_path), recipe, tensorboard=False)
    assert state.finished and recipe.n_tokens - state.tokens == 7


def test_when_checkpoints_are_made_changes_nothing(tmp_path, whole):
    go(tmp_path, save_every=7)
    assert remains(tmp_path)["rows"] == whole["rows"] and remains(tmp_path)["tensors"] == whole["tensors"]


# --- kill -9 ---


@POSIX
def test_killed_at_25_random_moments(tmp_path):
    done = process("random", tmp_path / "killed", 0, 25)
    assert done.returncode == 0, done.stderr
    assert max(json.loads(done.stdout)) > 1  # some of them died after a step
    assert process("whole", tmp_path / "whole", 60).returncode == 0
    killed, right = (remains(tmp_path / name) for name in ("killed", "whole"))
    assert killed["rows"] == right["rows"] and killed["tensors"] == right["tensors"]


@POSIX
def test_killed_at_operations_on_files(tmp_path):
    first = random.randrange(5)  # with stride 1 all of them: 103 on Linux
    done = process("events", tmp_path, first, 5)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["died"] >= 15 and found["wrong"] == [], (first, found)


@POSIX
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_finishes_the_step_and_saves_though_the_terminal_is_gone(tmp_path, whole, name):
    assert process("signal", tmp_path, name).returncode == 0
    assert json.loads((tmp_path / "ended").read_text()) == [7, False]
    assert Store(tmp_path).latest().number == 7
    go(tmp_path, save_every=5)
    assert remains(tmp_path)["tensors"] == whole["tensors"] and remains(tmp_path)["rows"] == whole["rows"]


# --- a folder ---


def spoil(path, how):
    data = path.read_bytes()
    if how == "gone":
        path.unlink()
    elif how == "half":
        path.write_bytes(data[: len(data) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "a bit":
        place = random.Random(5).randrange(len(data))
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    else:
        path.write_text(how)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("how", ["gone", "half", "empty", "a bit", "[]", '{"state": {}, "files": {}}', "[" * 100_000])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path, whole, capsys, file, how):
    break_off(tmp_path, 8)
    newest = Store(tmp_path).checkpoints()[-1]
    spoil(newest / file, how)
    found = Store(tmp_path).latest()
    assert found.number == 3 and newest.name == "step-0000000006"
    said = capsys.readouterr().out
    assert f"{newest} is damaged" in said and "step-0000000003 is used instead" in said
    go(tmp_path)
    assert remains(tmp_path) == whole
    assert len(list(tmp_path.glob("damaged-step-0000000006-*"))) == 1  # kept for who wants to look


def test_when_all_are_damaged_nothing_is_begun_anew(tmp_path):
    break_off(tmp_path, 8)
    for path in tmp_path.glob("step-*/state.json"):
        path.write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(
        RunError, match="no checkpoint is whole.*step-0000000006 is damaged .state.json has no 'state'.*another folder"
    ):
        go(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


def test_how_many_stay(tmp_path):
    store = Store(tmp_path, keep_last=2, keep_at=[40, 500, 505])
    go(tmp_path, store=store)
    names = [path.name for path in store.checkpoints()]
    ends = {step.number + 1: step.tokens + step.n_sequences * 16 for step in parts()[3].steps(16)}
    kept = [min(n for n in ends if ends[n] >= place) for place in (40, 500)]  # 500 and 505 are reached by one step
    last = max(ends)
    before = (last - 1) // 3 * 3
    assert names == [f"step-{n:010}-kept" for n in kept] + [f"step-{n:010}" for n in (before, last)]


def test_what_a_store_refuses(tmp_path):
    for wrong in ({"keep_last": 0}, {"keep_last": 1.5}, {"keep_at": [0]}, {"keep_at": ["a"]}):
        with pytest.raises(RunError, match="must be a whole number, 1 or more"):
            Store(tmp_path, **wrong)
    assert Store(tmp_path / "none").latest() is None
    with pytest.raises(RunError, match="holds no checkpoint"):
        load(tmp_path / "none")


def test_other_folders_are_left_alone(tmp_path):
    for name in ("step-7", "step-0000000001.txt", "mine"):
        (tmp_path / name).mkdir()
    assert Store(tmp_path).checkpoints() == []
    (tmp_path / "step-0000000009.part").mkdir()
    (tmp_path / "step-0000000008.gone").mkdir()
    with Store(tmp_path).locked():
        assert sorted(p.name for p in tmp_path.iterdir()) == ["lock", "mine", "step-0000000001.txt", "step-7"]


@pytest.mark.parametrize("last", range(12))
def test_a_write_that_fails_leaves_the_older_ones_whole(tmp_path, monkeypatch, last):
    break_off(tmp_path, 8)
    before = {path: path.read_bytes() for path in tmp_path.glob("step-*/*")}
    left = [last]

    def failing(function):
        def wrapped(*arguments, **named):
            left[0] -= 1
            if left[0] < 0:
                raise OSError(28, "No space left on device")
            return function(*arguments, **named)

        return wrapped

    with monkeypatch.context() as patch:
        for home, name in ((os, "replace"), (os, "fsync"), (checkpoints, "save_file"), (Path, "write_text")):
            patch.setattr(home, name, failing(getattr(home, name)))
        if last < 11:
            with pytest.raises(RunError, match="cannot be written.*No space left.*Make room"):
                go(tmp_path)
            assert {path: path.read_bytes() for path in tmp_path.glob("step-*/*")} == before
            assert not list(tmp_path.glob("*.part"))
    go(tmp_path)
    assert Store(tmp_path).latest().number > 8


@POSIX
def test_a_file_that_may_not_grow(tmp_path):
    done = process("limit", tmp_path, 30_000)
    assert "model" not in done.stderr and "cannot be written" in json.loads(done.stdout)
    assert not list(tmp_path.glob("step-*"))


def test_a_log_that_cannot_be_written(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with Logs(tmp_path, ("a.txt",)) as logs, pytest.raises(RunError, match="cannot be written .*No space"):
        logs.sizes()
    with pytest.raises(RunError, match="cannot be written"):
        Logs(tmp_path / "no such folder", ("a.txt",))
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        go(tmp_path / "file")


def test_two_runs_in_one_folder(tmp_path):
    message = rf"in use by another run \(process {os.getpid()}\)"
    with Store(tmp_path).locked(), pytest.raises(RunError, match=message):
        go(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]
    go(tmp_path, 3)

    def on_step(number, model):
        with pytest.raises(RunError, match=message):
            go(tmp_path / "inner")

    go(tmp_path / "inner", 3, on_step=on_step)


# --- another run ---


def changed(name):
    model, optimizer, loader, recipe = parts()
    if name == "model.n_layers":
        model = GPT(GPTConfig(**{**vars(CONFIG), "n_layers": 1}))
        optimizer = recipe.optimizer(model)
    elif name == "recipe.peak":
        recipe = replace(recipe, peak=2e-3)
    elif name == "data.seed":
        loader = Loader(loader.sources, {"squares": 2, "steps": 1}, 16, seed=4)
    elif name == "data.parts.squares":
        loader = parts(weights={"squares": 3, "steps": 1})[2]
    else:
        sources = dict(deadly.SOURCES) | {"steps": deadly.SOURCES["steps"][:-1]}
        loader = Loader(sources, {"squares": 2, "steps": 1}, 16, seed=3)
    return model, optimizer, loader, recipe


@pytest.mark.parametrize(
    "name", ["model.n_layers", "recipe.peak", "data.seed", "data.parts.squares", "data.sources.steps"]
)
def test_a_checkpoint_of_another_run_is_refused_and_left_alone(tmp_path, whole, name):
    break_off(tmp_path, 8)
    model, optimizer, loader, recipe = changed(name)
    numbers = copy.deepcopy(model.state_dict())
    with pytest.raises(RunError, match=rf"{name}.* is .*began with .*another folder"):
        run(model, optimizer, loader, Store(tmp_path), recipe)
    assert all(torch.equal(numbers[n], t) for n, t in model.state_dict().items())
    go(tmp_path)
    assert remains(tmp_path) == whole


@pytest.mark.parametrize(
    "options, message",
    [
        ({"save_every": 0}, "save_every is 0; it must be a whole number, 1 or more"),
        ({"micro_batch": 1.5}, "micro_batch is 1.5"),
        ({"sync_every": True}, "sync_every is True"),
        ({"sample_every": -1}, "sample_every is -1; it must be a whole number, 0 or more"),
        ({"on_spike": "hope"}, "on_spike is 'hope'; it must be 'stop', 'skip' or 'rollback'"),
        ({"spike": 0}, "spike is 0; it must be nats above 0"),
        ({"spike": math.nan}, "spike is nan"),
        ({"spike": "big"}, "spike is 'big'"),
        ({"on_step": 3}, "on_step is 3; it must be a function"),
        ({"sample_every": 2}, "no samples without a tokenizer"),
        ({"prompt": 5}, "prompt is 5; it must be text"),
        ({"spike": True}, "spike is True; it must be nats above 0"),
        ({"save_evry": 5}, "save_evry is no option; these are: on_spike, spike, save_every"),
    ],
)
def test_what_run_refuses(tmp_path, options, message):
    with pytest.raises(RunError, match=message):
        go(tmp_path / "new", **options)
    assert not list(tmp_path.glob("new/step-*"))


def frozen(model, *names):
    """The model, in which these parameters, or all, do not learn."""
    for name, p in model.named_parameters():
        p.requires_grad_(bool(names) and name not in names)
    return model


def on_meta():
    with torch.device("meta"):
        return GPT(CONFIG)


ONLY = "make it with recipe.optimizer"
WHOLE = {
    "of another model": (parts()[0], parts()[1], f"the optimizer holds none of this model's parameters; {ONLY}"),
    "no optimizer": (parts()[0], 5, f"the optimizer holds none of this model's parameters; {ONLY}"),
    "on meta": (on_meta(), None, "the model is on meta, where it has no numbers; make it on a device"),
    "frozen": (frozen(GPT(CONFIG)), None, "all parameters are frozen; one at least"),
    "a layer": (torch.nn.Linear(3, 3), None, "model is a Linear; it must be a GPT"),
}


@pytest.mark.parametrize("model, optimizer, message", WHOLE.values(), ids=WHOLE)
def test_a_model_that_would_not_learn_is_refused_before_any_work(tmp_path, model, optimizer, message):
    _, _, loader, recipe = parts()
    optimizer = optimizer or recipe.optimizer(model)
    with pytest.raises(RunError, match=message):
        run(model, optimizer, loader, Store(tmp_path / "new"), recipe)
    assert not (tmp_path / "new").exists()


def test_all_that_learns_must_be_the_optimizer_s_and_nothing_else(tmp_path):
    model, _, loader, recipe = parts(6)
    some = dict(model.named_parameters())
    last = some.pop("ln_f.weight")
    quiet = {"tensorboard": False, "progress": False}
    for held in ([*some.values()], [*some.values(), last, torch.nn.Parameter(torch.ones(2))]):
        with pytest.raises(RunError, match=f"holds not exactly this model's parameters; {ONLY}"):
            run(model, torch.optim.AdamW(held), loader, Store(tmp_path), recipe, **quiet)
    before = last.detach().clone()
    frozen(model, "ln_f.weight")
    run(model, torch.optim.AdamW([*some.values()]), loader, Store(tmp_path / "a"), recipe, **quiet)
    model = frozen(GPT(CONFIG), "ln_f.weight")
    run(model, recipe.optimizer(model), loader, Store(tmp_path / "b"), recipe, **quiet)
    assert torch.equal(model.ln_f.weight, before) and model.ln_f.bias.any()


def test_another_optimizer_is_refused_and_an_old_checkpoint_s_is_adamw(tmp_path):
    break_off(tmp_path, 8)
    model, _, loader, recipe = parts()
    with pytest.raises(RunError, match="optimizer is 'SGD', but the run in .* began with 'AdamW'"):
        run(model, torch.optim.SGD(model.parameters(), 0.1), loader, Store(tmp_path), recipe)
    about = runs.description(*parts())
    del about["optimizer"]
    tensors = runs.run_tensors(*parts()[:2])
    Store(tmp_path / "old").save(0, tensors, {"state": {}, "about": about})
    assert go(tmp_path / "old")[0].finished


@pytest.mark.parametrize("found", [[1], torch.ones(2), {"a": torch.ones(2)}, "loss", {1, 2}, 0.5])
def test_what_on_step_may_not_give(tmp_path, found):
    with pytest.raises(RunError, match="on_step gave .*; give a dict of plain numbers and texts, or None"):
        go(tmp_path, 6, on_step=lambda number, model: found)
    assert [path.name for path in Store(tmp_path).checkpoints()] == ["step-0000000000"]


def test_a_loader_that_does_not_fit_the_model_is_refused_before_anything_is_saved(tmp_path):
    model, optimizer, loader, recipe = parts()
    with pytest.raises(ValueError, match="context"):
        run(model, optimizer, Loader(loader.sources, loader.parts, 32), Store(tmp_path), recipe)
    assert Store(tmp_path).checkpoints() == []


# --- trouble ---


def poisoned(monkeypatch, at, add):
    """Let the loss of the micro-batches number `at`, counted over all calls, be `add` more."""
    count, plain = [0], runs.loss_of

    def loss_of(*arguments):
        count[0] += 1
        return plain(*arguments) + (add if count[0] - 1 in at else 0.0)

    monkeypatch.setattr(runs, "loss_of", loss_of)


@pytest.mark.parametrize("sync_every", [1, 4])
def test_stop_at_a_loss_that_is_none(tmp_path, monkeypatch, sync_every):
    poisoned(monkeypatch, {25}, math.nan)
    with pytest.raises(RunError, match=r"step \d+: loss nan.*on_spike='skip'"):
        go(tmp_path, sync_every=sync_every)
    monkeypatch.undo()
    assert all(tensor.isfinite().all() for tensor in Store(tmp_path).latest().tensors("model").values())


@pytest.mark.parametrize("sync_every", [1, 4])
def test_skip_leaves_out_one_step_and_nothing_else(tmp_path, monkeypatch, sync_every):
    poisoned(monkeypatch, {0}, math.nan)
    state, model = go(tmp_path, on_spike="skip", sync_every=sync_every)
    monkeypatch.undo()
    twin, optimizer, loader, recipe = parts()
    twin.train()
    for step in recipe.steps(16):
        pairs = [part.split(3) for part in loader.sequences(step.tokens // 16, step.n_sequences)]
        if step.number:
            update(twin, optimizer, list(zip(*pairs)), step.rate, clip=recipe.clip)
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in twin.state_dict().items())
    assert "step 1: loss nan" in (tmp_path / "notes.txt").read_text() and state.finished
    rows = (tmp_path / "log.csv").read_text().splitlines()
    assert [int(row.split(",")[0]) for row in rows[1:]] == list(range(1, state.step + 1))


def test_a_spike_is_seen_after_a_loss_that_was_none(tmp_path, monkeypatch):
    calls = [sum(-(-step.n_sequences // 3) for step in parts(60)[3].steps(16) if step.number < n) for n in (38, 42)]
    plain, count = runs.loss_of, iter(range(10**6))
    # the step after 38 is none; first_bad makes it again, with as many calls
    bad = {calls[0]: math.nan, calls[1] + 2: 5.0}
    monkeypatch.setattr(runs, "loss_of", lambda *batch: plain(*batch) + bad.get(next(count), 0.0))
    go(tmp_path, 60, on_spike="skip")
    assert [line.split(":")[0] for line in (tmp_path / "notes.txt").read_text().splitlines()] == ["step 39", "step 43"]


def test_a_spike_is_one_only_against_enough_losses(tmp_path):
    calm = [2.0] * runs.WATCHED
    assert is_spike(math.nan, 1.0, [], math.inf) and is_spike(1.0, math.inf, [], math.inf)
    assert not is_spike(9.0, 1.0, calm[1:], 1.0) and is_spike(3.1, 1.0, calm, 1.0)
    assert not is_spike(2.9, 1.0, calm, 1.0) and not is_spike(99.0, 1.0, calm, math.inf)


def test_roll_back_goes_on_with_the_data_behind_the_spike(tmp_path, monkeypatch):
    model, optimizer, loader, recipe = parts(60)
    asked, plain = [], loader.sequences
    loader.sequences = lambda first, count: asked.append((first, count)) or plain(first, count)
    n_calls = sum(-(-step.n_sequences // 3) for step in recipe.steps(16) if step.number < 40)
    poisoned(monkeypatch, {n_calls}, 5.0)  # in the step after 40
    options = {"micro_batch": 3, "tensorboard": False, "on_spike": "rollback", "save_every": 6}
    state = run(model, optimizer, loader, Store(tmp_path), recipe, **options)
    steps = {step.number: step for step in recipe.steps(16)}
    spiked = steps[40].tokens // 16, steps[40].n_sequences
    after = spiked[0] + spiked[1]
    assert asked[1:].count(spiked) == 2  # the step, and the look at what was wrong with it
    again = asked.index((after, steps[36].n_sequences))  # step 36 once more, from there on
    assert again > asked.index(spiked)
    assert state.passed == after - steps[36].tokens // 16 and state.finished
    assert "rolled back to step 36" in (tmp_path / "notes.txt").read_text()
    rows = (tmp_path / "log.csv").read_text().splitlines()[1:]
    assert [int(row.split(",")[0]) for row in rows] == [n + 1 for n in steps]


def test_a_second_rollback_leaves_out_more_text_and_none_twice(tmp_path, monkeypatch):
    model, optimizer, loader, recipe = parts(60)
    asked, read, plain = [], loader.sequences, runs.loss_of
    steps = list(recipe.steps(16))
    spiky = {steps[40].tokens // 16, steps[50].tokens // 16}  # these sequences are bad, whichever step reads them
    loader.sequences = lambda first, count: asked.append(range(first, first + count)) or read(first, count)
    monkeypatch.setattr(runs, "loss_of", lambda *batch: plain(*batch) + (5.0 if spiky & {*asked[-1]} else 0.0))
    options = {"tensorboard": False, "on_spike": "rollback", "save_every": 6}
    state = run(model, optimizer, loader, Store(tmp_path), recipe, **options)
    assert state.finished and (tmp_path / "notes.txt").read_text().count("rolled back") == 2
    assert asked[-1].stop == state.tokens // 16 + state.passed  # the clock, and what was left out
    last = max(i for i, place in enumerate(asked) if spiky & {*place})
    assert all(place.start > max(spiky) for place in asked[last + 1 :])


def test_three_rollbacks_to_one_place_are_enough(tmp_path, monkeypatch):
    poisoned(monkeypatch, range(30, 10**6), math.nan)
    with pytest.raises(RunError, match="rolled back to step 15 three times, in vain"):
        go(tmp_path, on_spike="rollback")
    assert (tmp_path / "notes.txt").read_text().count("rolled back to step 15") == 3


def test_a_broken_parameter_is_named_and_never_skipped(tmp_path):
    def on_step(number, model):
        if number == 5:
            model.blocks[1].mlp.up.bias.data[3] = math.inf

    with pytest.raises(RunError, match=r"step 6.*parameter blocks.1.mlp.up.bias is not finite"):
        go(tmp_path, on_step=on_step, on_spike="skip")


def test_the_first_bad_tensor_has_a_name():
    model, _, loader, _ = parts()
    batches = [loader.sequences(0, 2)]
    assert first_bad(model, batches).startswith("the largest gradient is that of ")
    with torch.no_grad():
        model.blocks[1].mlp.down.weight.fill_(1e38)
        model.blocks[1].mlp.up.bias.fill_(1e10)
    assert first_bad(model, batches) == "the output of blocks.1.mlp.down is not finite"
    assert all(p.grad is None for p in model.parameters())


# --- logs ---


def test_samples_bits_and_tensorboard(tmp_path):
    tokenizer = Tokenizer.load(DATA / "tokenizer-4353.bpe")
    tokens = write_tokens(["Friends, Romans, countrymen, lend me your ears. " * 20], tmp_path / "tokens", tokenizer)
    model = GPT(GPTConfig(**{**vars(CONFIG), "vocab_size": 4353}))
    recipe = parts(6)[3]
    loader = Loader({"speech": tokens}, {"speech": 1}, 16)
    options = {"sample_every": 3, "prompt": "Friends", "save_every": 4, "tensorboard": True}
    state = run(model, recipe.optimizer(model), loader, Store(tmp_path / "run"), recipe, **options)
    samples = (tmp_path / "run" / "samples.txt").read_text(encoding="utf-8")
    assert samples.count("--- after step ") == state.step // 3 and samples.count("\nFriends") == state.step // 3
    head, *rows = [line.split(",") for line in (tmp_path / "run" / "log.csv").read_text().splitlines()]
    for row in (dict(zip(head, row)) for row in rows):
        bits = float(row["loss"]) / math.log(2) * len(tokens) / tokens.n_bytes
        assert float(row["bits_per_byte"]) == pytest.approx(bits, abs=1e-5)
        assert float(row["mfu"]) == pytest.approx(
            int(row["tokens_per_s"]) * flops_per_token(model.config) / 1e9, rel=0.01
        )
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [point.value for point in board.Scalars("loss")] == pytest.approx([float(row[2]) for row in rows])


def test_tensorboard_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    go(tmp_path / "a", 3, tensorboard=None)
    with pytest.raises(RunError, match="pip install tensorboard"):
        go(tmp_path / "b", 3, tensorboard=True)


def test_a_bar_shows_how_far(tmp_path, capsys):
    state, _ = go(tmp_path, 6, progress=True)
    shown = capsys.readouterr().err.split("\r")[-1]
    assert "100%" in shown and "loss 3." in shown and "bits/byte" in shown and "MFU" in shown


def test_the_bar_of_a_long_run_fits_a_terminal():
    bar = checkpoints.Bar(300 * 10**9, 10**9, True)
    bar.tell({"tokens": 170 * 10**9, "loss": 10.1234, "bits_per_byte": 3.1234, "mfu": 0.123})
    for elapsed in (1000, 100_000):  # hours, and days that are left
        look = bar.bar.format_dict | {"ncols": 80, "elapsed": elapsed, "rate": 123_456.0}
        line = bar.bar.format_meter(**look)
        bar.bar.close()
        assert line.endswith(" left, 123ktok/s, loss 10.12, 3.123 bits/byte, MFU 12%")
        assert len(line) <= 80 and len(line.split("|")[1]) >= 8


def test_a_log_that_lost_lines_is_said_to(tmp_path, capsys):
    break_off(tmp_path, 8)
    (tmp_path / "extra.jsonl").write_text("")
    state, _ = go(tmp_path)
    assert "extra.jsonl is shorter than at the checkpoint" in capsys.readouterr().out and state.finished


def test_load_gives_the_newest_model(tmp_path):
    _, model = go(tmp_path, 6)
    again = load(tmp_path)
    tokens = torch.arange(12)[None]
    assert torch.equal(again(tokens), model(tokens)) and again.config == CONFIG and not again.training


# --- pieces that many ranks wrote ---


def write_pieces(folder, pieces):
    """Files with a piece each of a tensor "w": (offsets or None, piece). Returns them."""
    files = []
    for i, (offsets, piece) in enumerate(pieces):
        told = {} if offsets is None else {"DCP_SHARDING_INFO": json.dumps({"w": {"saved_offsets": offsets}})}
        files.append(folder / f"{i}.safetensors")
        save_file(
            {"w": piece.contiguous(), f"exp_avg/{i}": torch.zeros(1)} if not told else {"w": piece.contiguous()},
            files[-1],
            told,
        )
    return files


def test_pieces_become_the_whole_tensor(tmp_path):
    whole = torch.arange(30.0).view(5, 6)
    pieces = [([0, 0], whole[:2, :4]), ([2, 4], whole[2:, 4:]), ([0, 4], whole[:2, 4:]), ([2, 0], whole[2:, :4])]
    found = Pieces(write_pieces(tmp_path, pieces))
    assert torch.equal(found["w"], whole) and [*found] == ["w"] and len(found) == 1


def test_whole_tensors_are_pieces_too_and_kinds_are_told_apart(tmp_path):
    files = write_pieces(tmp_path, [(None, torch.tensor(7.0))])
    assert Pieces(files)["w"] == 7 and [*Pieces(files, memory=True)] == ["exp_avg/0"]


def test_a_gap_between_pieces_is_refused(tmp_path):
    files = write_pieces(tmp_path, [([0], torch.ones(2)), ([3], torch.ones(2))])
    with pytest.raises(ValueError, match="pieces of w are not the whole"):
        Pieces(files)


def test_a_checkpoint_whose_pieces_have_a_gap_is_refused(tmp_path):
    part, store = tmp_path / "step-0000000003.part", Store(tmp_path)
    part.mkdir()
    files = write_pieces(part, [([0, 0], torch.ones(2, 2)), ([2, 1], torch.ones(2, 1))])
    store.seal(part, {"about": {}}, {path.name: checkpoints.sha256(path) for path in files})
    with pytest.raises(RunError, match="pieces of w are not the whole"):
        store.latest().tensors("model")


def test_each_rank_compares_a_share_of_the_hashes(tmp_path):
    part, store = tmp_path / "step-0000000003.part", Store(tmp_path)
    part.mkdir()
    files = write_pieces(part, [([0], torch.ones(2)), ([2], torch.ones(2)), ([4], torch.ones(2))])
    store.seal(part, {"about": {}}, {path.name: checkpoints.sha256(path) for path in files})
    place = tmp_path / "step-0000000003"
    (place / "1.safetensors").write_bytes(b"")
    assert Checkpoint(place, 0, 2).number == 3
    with pytest.raises(RunError, match="the hash of 1.safetensors is another"):
        Checkpoint(place, 1, 2)


# --- small parts ---


@pytest.mark.parametrize("halves", [False, True])
def test_portions(halves):
    for count in range(1, 70):
        for size in (1, 3, 4, 8, 16):
            found = portions(count, size, halves)
            assert sum(found) == count and max(found) <= size and found == sorted(found, reverse=True)
            left = found[count // size :]
            assert len(left) <= (size.bit_length() if halves else 1)
            assert not halves or all(n & (n - 1) == 0 for n in left)


def test_compiled_with_few_shapes(tmp_path, monkeypatch, whole):
    shapes = set()

    def compile(function, dynamic):
        assert dynamic is False and function is runs.loss_of
        return lambda model, x, *more: shapes.add(len(x)) or function(model, x, *more)

    monkeypatch.setattr(torch, "compile", compile)
    go(tmp_path, compile=True)
    assert shapes == {1, 2, 3} and remains(tmp_path)["rows"][-1][:2] == whole["rows"][-1][:2]


def test_operations_are_those_of_a_count_by_brute_force():
    config = GPTConfig(vocab_size=61, n_ctx=24, n_layers=4, d_model=12, n_heads=2, d_head=6, bandwidth=5)
    forward = 0
    for kind in config.kinds:
        forward += config.n_ctx * 2 * 12 * config.d_model**2
        for query in range(config.n_ctx):
            for key in range(query + 1):
                if kind == "dense" or query - key < config.bandwidth:
                    forward += 2 * 2 * config.d_model  # a score, and its share of the mix
    forward += config.n_ctx * 2 * config.vocab_size * config.d_model
    assert flops_per_token(config) == pytest.approx(3 * forward / config.n_ctx, abs=1)


def test_a_peak_is_measured():
    assert 1e8 < deadly.measured_peak(torch.device("cpu"), seconds=0.01) < 1e14


def test_signals_are_given_back(request):
    before = signal.getsignal(signal.SIGTERM)
    old = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, old))
    with Stopping() as stopping:
        signal.raise_signal(signal.SIGTERM)
        assert stopping.asked == "SIGTERM"
        signal.raise_signal(signal.SIGTERM)  # a system may send two
    assert signal.getsignal(signal.SIGTERM) is before
    with pytest.raises(KeyboardInterrupt), Stopping() as stopping:
        signal.raise_signal(signal.SIGINT)
        assert stopping.asked == "SIGINT"
        signal.raise_signal(signal.SIGINT)


def test_a_signal_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with Stopping() as stopping:
            signal.raise_signal(signal.SIGTERM)
        assert stopping.asked is None
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_run_in_a_thread(tmp_path):
    thread = threading.Thread(target=go, args=(tmp_path, 3))
    thread.start()
    thread.join()
    assert Store(tmp_path).latest().state["state"]["finished"]


def test_options_are_the_arguments_of_run():
    assert Options(save_every=3) == Options(save_every=3)
    with pytest.raises(TypeError):
        Options(save_evry=3)


def test_a_checkpoint_tells_what_it_holds(tmp_path):
    go(tmp_path, 6)
    found = Checkpoint(Store(tmp_path).checkpoints()[-1])
    model = parts(6)[0]
    assert set(found.tensors("model")) == set(model.state_dict())
    wanted = {f"{key}/{name}" for name, _ in model.named_parameters() for key in ("exp_avg", "exp_avg_sq", "step")}
    assert set(found.tensors("optimizer")) == wanted
    assert found.state["about"]["model"]["n_layers"] == 2 and found.state["about"]["recipe"]["peak"] == 1e-2
