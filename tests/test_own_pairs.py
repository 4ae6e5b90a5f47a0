"""Your own pairs: what is read, held out and chosen; runs that are killed and go on; the model that comes out."""

import hashlib
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gpt3lib import own_pairs, runs
from gpt3lib.cli import main
from gpt3lib.commands import TuneConfig
from gpt3lib.evaluation import EvaluationError
from gpt3lib.finetuning import Pairs, TuningError, add_lora, answer_loss_of
from gpt3lib.model import GPT, GPTConfig
from gpt3lib.own_pairs import (
    as_pairs,
    check_memory,
    check_tune,
    dealt,
    hold_out,
    looks,
    numbered_pairs,
    plan_tuning,
    replies,
    settled_tuning,
    tried,
    verdict,
    write_held,
)
from gpt3lib.tokenization import Tokenizer
from gpt3lib.using import find_model, write_model
from samples import WORDS, text

CONFIG = GPTConfig(vocab_size=257, n_ctx=48, n_layers=2, d_model=16, n_heads=2, d_head=8, bandwidth=8)
TOKENIZER = Tokenizer.train(text(500), 257)
PROGRAM = [sys.executable, "-c", "import sys; from gpt3lib.cli import main; sys.exit(main())"]


def lines(n=30):
    """n pairs: a word, and its first letter."""
    words = sorted({a + b for a in WORDS for b in WORDS})[:n]
    return [{"context": f"{word}:", "completion": f" {word[0]}"} for word in words]


def write(path, pairs):
    Path(path).write_text("".join(json.dumps(pair) + "\n" for pair in pairs))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of a model of 10,000 parameters, which has learned nothing."""
    folder = tmp_path_factory.mktemp("base")
    write_model(GPT(CONFIG, seed=4).eval(), TOKENIZER, folder)
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch, base):
    """A folder of one's own with pairs, a text and a model; measuring the processor takes no time there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "measured_peak", lambda *_: 1e9)
    write("mine.jsonl", lines())
    Path("old.txt").write_text(text(3000))
    shutil.copytree(base, "base")
    return tmp_path


def gpt3(line, capfd):
    """Exit code, stdout and stderr of a command."""
    capfd.readouterr()
    code = main(shlex.split(line))
    out = capfd.readouterr()
    return code, out.out, out.err


TUNE = "train --from base --pairs mine.jsonl --out run --epochs 4 --batch 4 --n_threads 1 --save_every 3 --peak 1e-2"


def weights(run="run"):
    return load_file(Path(run) / "model" / "model.safetensors")


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- pairs ---


def test_lines_keep_their_numbers_and_each_pair_stands_once(tmp_path):
    path = tmp_path / "mine.jsonl"
    one, two = '{"context": "a", "completion": [" b", " c"]}', '{"context": "a", "completion": " c"}'
    path.write_text(f"\n{one}\n\n{two}\n{one}\n")
    assert [number for number, _ in numbered_pairs(path)] == [2, 4, 5]
    found = as_pairs(numbered_pairs(path), TOKENIZER, 48)
    assert [(pair.context, pair.completion) for pair in found] == [("a", " b"), ("a", " c")]
    end = TOKENIZER.end_of_text
    assert found[0].row.prompt == [end, *TOKENIZER.encode("a")]
    assert found[0].row.answer == [*TOKENIZER.encode(" b"), end]


def test_what_is_too_long_is_told_by_its_lines(tmp_path):
    path = tmp_path / "mine.jsonl"
    write(path, [{"context": "x" * n, "completion": "y"} for n in (5, 6, 7, 8, 9, 10)])
    assert len(as_pairs(numbered_pairs(path), TOKENIZER, 12)) == 6  # end-of-text, 10 letters, 1 letter: 12 tracks
    with pytest.raises(TuningError, match="11 tokens fit .* but line 6 has 12; make these"):
        as_pairs(numbered_pairs(path), TOKENIZER, 11)
    with pytest.raises(TuningError, match="7 tokens fit .* line 2 has 8, line 3 has 9, line 4 has 10 and 2 more"):
        as_pairs(numbered_pairs(path), TOKENIZER, 7)


@pytest.mark.parametrize("n, held", [(1, 0), (3, 0), (4, 1), (8, 2), (12, 3), (60, 3), (80, 4), (400, 20)])
def test_a_twentieth_of_the_contexts_is_held_out(n, held):
    problems = [own_pairs.Pair(f"question {i}", f" {k}", None) for i in range(n) for k in "ab"]
    learned, kept = hold_out(problems)
    assert len(kept) == 2 * held and len(learned) == 2 * (n - held)
    assert not {pair.context for pair in learned} & {pair.context for pair in kept}
    again = hold_out(problems[::-1])
    assert sorted(again[1]) == sorted(kept) and sorted(again[0]) == sorted(learned)


def test_a_lone_half_of_a_character_has_a_hash_too():
    assert hold_out([own_pairs.Pair("\ud800", " x", None)])[1] == []


# --- what is chosen ---


def test_what_is_open_is_chosen_by_the_pairs_and_the_model():
    model, open_ = GPT(CONFIG), TuneConfig("base", "mine.jsonl")
    config = settled_tuning(open_, model, 40)
    assert (config.batch, config.epochs, config.rank, config.seed, config.save_every) == (16, 20, 0, 0, 100)
    assert settled_tuning(open_, model, 400).epochs == 4 and settled_tuning(open_, model, 10**6).epochs == 3
    assert settled_tuning(open_, model, 5).batch == 5 and settled_tuning(open_, model, 1).batch == 2
    full = 0.134 * model.num_params() ** -0.306
    assert config.peak == pytest.approx(0.3 * full, rel=0.05)
    assert settled_tuning(replace(open_, rank=2), model, 40).peak == pytest.approx(3 * full, rel=0.05)
    mine = replace(open_, epochs=2, batch=3, peak=0.5, seed=7, save_every=9, rank=0)
    assert settled_tuning(mine, model, 40) == mine
    with pytest.raises(TuningError, match="epochs is 0"):
        settled_tuning(replace(open_, epochs=0), model, 40)


@pytest.mark.parametrize("n, replay", [(7, 0), (30, 0), (30, 1), (30, 3)])
def test_each_pair_is_read_as_often_as_told(n, replay):
    rows = [own_pairs.as_row(TOKENIZER, pair["context"], pair["completion"]) for pair in lines(n)]
    pairs = Pairs(rows, 4, 0, torch.arange(200) % 250 if replay else None, replay)
    recipe = plan_tuning(TuneConfig(epochs=3, peak=0.1), pairs)
    steps = [*recipe.steps(pairs.n_ctx)]
    assert {step.n_sequences for step in steps} == {4} and len(steps) == math.ceil(3 * n / (4 - replay))
    assert steps[-1].rate == pytest.approx(0.01, rel=1e-6) and max(step.rate for step in steps) <= 0.1
    read = [pairs.row(i) for i in range(3 * n)]
    assert sorted(map(str, read)) == sorted(map(str, 3 * rows))


def test_the_loader_has_a_share_of_old_text_and_bytes_of_answers(tmp_path):
    (tmp_path / "old.txt").write_text(text(3000))
    found = as_pairs([(1, q) for _, q in numbered_of(tmp_path)], TOKENIZER, 48)
    config = settled_tuning(TuneConfig("m", "p", batch=8), GPT(CONFIG), len(found))
    assert dealt(config, TOKENIZER, found).n_own == 8
    told = replace(config, replay=(str(tmp_path / "old.txt"),))
    assert dealt(told, TOKENIZER, found).n_own == 6 and dealt(replace(told, share=0.01), TOKENIZER, found).n_own == 7
    assert dealt(replace(told, share=0.5), TOKENIZER, found).n_own == 4
    assert dealt(config, TOKENIZER, found).bytes_per_token == 1.0  # each token is a byte
    learned = Tokenizer.train(text(500), 300)
    more = as_pairs([(1, q) for _, q in numbered_of(tmp_path)], learned, 48)
    n_tokens = sum(len(learned.encode(q.completion)) for q in more)
    assert dealt(config, learned, more).bytes_per_token == pytest.approx(2 * len(more) / n_tokens)


def numbered_of(folder):
    write(folder / "pairs.jsonl", lines())
    return numbered_pairs(folder / "pairs.jsonl")


def test_memory_counts_what_is_learned(monkeypatch):
    model = GPT(CONFIG)
    n = model.num_params()
    monkeypatch.setattr(own_pairs, "memory_of", lambda device: 16 * n if device == torch.device("cpu") else 0)
    assert "for weights, gradients and Adam" in check_memory(model, "mine")
    monkeypatch.setattr(own_pairs, "memory_of", lambda device: 16 * n - 1)
    with pytest.raises(TuningError, match="mine needs 0 MB of memory .* LoRA, --rank 8, takes"):
        check_memory(model, "mine")
    add_lora(model, 1)
    check_memory(model, "mine")
    monkeypatch.setattr(own_pairs, "memory_of", lambda device: None)
    check_memory(model, "mine")


def test_a_trial_leaves_no_gradients_and_no_threads_behind():
    model, before = GPT(CONFIG), torch.get_num_threads()
    batch = torch.zeros(2, 8, dtype=torch.int64)
    n, seconds = tried(model, (batch, batch))
    assert tried(model, (batch, batch), 3)[0] == 3
    assert n in (1, before) and 0 < seconds < 60 and torch.get_num_threads() == before
    assert all(p.grad is None for p in model.parameters())


def test_the_faster_of_one_thread_and_all_is_taken(monkeypatch):
    model, before = GPT(CONFIG), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for slow, best in ((1, 2), (2, 1)):
            monkeypatch.setattr(
                own_pairs, "step_seconds", lambda *_, slow=slow: 3.0 if torch.get_num_threads() == slow else 1.0
            )
            assert tried(model, ()) == (best, 1.0)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"start": None}, "--pairs for which model"),
        ({"pairs": None}, "to learn what"),
        ({"share": 0.5}, "--share is of the texts of --replay"),
        ({"share": 1.0, "replay": ("x",)}, "share is 1.0; it must be above 0 and below 1"),
        ({"share": 0.0, "replay": ("x",)}, "share is 0.0"),
    ],
)
def test_what_is_missing_is_named(wrong, words):
    check_tune(TuneConfig("m", "p"))
    check_tune(TuneConfig("m", "p", replay=("x",), share=0.5))
    with pytest.raises(TuningError, match=words):
        check_tune(replace(TuneConfig("m", "p"), **wrong))


def test_a_rise_is_told():
    assert verdict(3.0, [(1.0, 2.0), (2.0, 1.0)]) == "held-out loss: 3.00 before, 1.00 now"
    said = verdict(3.0, [(1.2, 1.0), (2.0, 1.5)])
    assert "It was 1.00 after epoch 1.2" in said and "--epochs 2, with another --out, may be better" in said
    assert "It was" not in verdict(3.0, [(1.0, 1.0), (2.0, 1.04)])
    assert "nobody knows" in verdict(math.nan, [])


# --- the command ---


def test_pairs_become_a_model_that_answers(here, capfd):
    before = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in Path("base").iterdir()}
    code, out, _ = gpt3(TUNE.replace("--epochs 4", "--epochs 40"), capfd)
    assert code == 0 and "27 to learn, 3 held out" in out and "all of them" in out and "time     about" in out
    assert "stood there twice" not in out
    assert before == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in Path("base").iterdir()}
    asked = [json.loads(line) for line in Path("run/held_out.jsonl").read_text().splitlines()]
    assert len(asked) == 3 and all(pair in lines() for pair in asked)
    assert all(f"{pair['context']}\n  it says" in out for pair in asked)
    model, tokenizer = find_model("run")
    found = as_pairs(numbered_pairs("run/held_out.jsonl"), tokenizer, 48)
    seen = looks(Path("run"))
    assert len(seen) == 10 and seen[-1][1] == pytest.approx(answer_loss_of(model, [p.row for p in found]), rel=1e-4)
    assert f"{seen[-1][1]:.2f} now" in out
    learned = [pair for pair in as_pairs(numbered_pairs("mine.jsonl"), tokenizer, 48) if pair not in found]
    assert answer_loss_of(model, [pair.row for pair in learned]) < 0.5
    said = replies(model, tokenizer, learned)
    right = sum(reply == pair.completion for reply, pair in zip(said, learned))
    assert right > 20
    some = learned[[s == p.completion for s, p in zip(said, learned)].index(True)]
    code, out, _ = gpt3(f"generate run '{some.context}' --temperature 0", capfd)
    assert code == 0 and out == f"{some.context}{some.completion}\n"
    code, out, _ = gpt3("eval run --task mine.jsonl", capfd)
    held = sum(s == p.completion for s, p in zip(replies(model, tokenizer, found), found))
    assert code == 0 and f"{(right + held) / 30:.1%} right".replace("%", "") in out.replace("%", "")
    assert gpt3("convert run neo --to gpt_neo", capfd)[0] == 0
    other, _ = find_model("neo")
    tokens = torch.tensor([found[0].row.prompt])
    torch.testing.assert_close(other(tokens), model(tokens), atol=1e-4, rtol=1e-4)


def test_lora_is_merged_and_kept_beside(here, capfd):
    code, out, _ = gpt3(TUNE + " --rank 2", capfd)
    assert code == 0 and "by LoRA" in out
    assert "an adapter; the merged model is run" in gpt3("generate run/adapter x", capfd)[2]
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    told = readme.partition("```py\n")[2].partition("```")[0]  # how the adapter is loaded
    exec(told.replace("gpt3-3m", "base").replace("runs/mine", "run"), names := {})
    whole = names["model"]
    merged, _ = find_model("run")
    tokens = torch.arange(40)[None]
    start, _ = find_model("base")
    assert not torch.allclose(start(tokens), merged(tokens), atol=1e-2)
    torch.testing.assert_close(whole(tokens), merged(tokens), atol=1e-4, rtol=1e-4)
    untouched = {name for name, t in start.state_dict().items() if torch.equal(t, merged.state_dict()[name])}
    assert {"embeddings.wte.weight", "ln_f.weight"} <= untouched and len(untouched) < len(start.state_dict())


def test_the_way_to_other_machines_is_a_file(here, capfd):
    assert gpt3(TUNE + " --seed 3", capfd)[0] == 0
    assert gpt3("train --config run/config.yaml --out again", capfd)[0] == 0
    assert equal(weights("run"), weights("again"))
    assert gpt3(TUNE.replace("run", "other") + " --seed 4", capfd)[0] == 0
    assert not equal(weights("run"), weights("other"))
    told = Path("run/config.yaml").read_text()
    assert "from: base" in told and "start" not in told and "seed: 3" in told


def test_a_finished_run_goes_on_to_the_same_end(here, capfd):
    assert gpt3(TUNE, capfd)[0] == 0
    before, log = weights(), Path("run/log.csv").read_text()
    for line in (TUNE, "train --out run", "train --from base --pairs mine.jsonl --out run --save_every 5"):
        code, out, _ = gpt3(line, capfd)
        assert code == 0 and "going on" in out and "it says" in out and "time " not in out
        assert equal(before, weights()) and Path("run/log.csv").read_text() == log


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_other_peoples_models_learn_too(kind, here, capfd):
    """From a folder of Hugging Face's, and back into one that it reads."""
    import transformers

    torch.manual_seed(0)
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=257, n_positions=48, n_embd=16, n_layer=2, n_head=2)
    else:
        sizes = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 64, "num_attention_heads": 2}
        config = transformers.OPTConfig(vocab_size=257, num_hidden_layers=2, max_position_embeddings=48, **sizes)
    theirs = transformers.AutoModelForCausalLM.from_config(config)
    theirs.save_pretrained("theirs")
    shutil.copy("base/merges.txt", "theirs/merges.txt")
    code, out, error = gpt3(TUNE.replace("--from base", "--from theirs") + " --rank 2", capfd)
    assert code == 0, error
    model, _ = find_model("run")
    tuned = transformers.AutoModelForCausalLM.from_pretrained("run/model")
    tokens = torch.arange(2, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(tuned(tokens).logits, model(tokens), atol=1e-4, rtol=1e-4)
        assert not torch.allclose(tuned(tokens).logits, theirs(tokens).logits, atol=1e-3)


def test_what_stood_twice_is_said_and_learned_once(here, capfd):
    write("mine.jsonl", lines() + lines()[:3])
    code, out, _ = gpt3(TUNE, capfd)
    assert code == 0 and "27 to learn, 3 held out; 3 stood there twice" in out


def test_few_pairs_are_learned_without_any_held_out(here, capfd):
    write("mine.jsonl", lines(2))
    code, out, _ = gpt3(TUNE.replace("--batch 4", "--batch 2"), capfd)
    assert code == 0 and "2 to learn, 0 held out" in out and "nobody knows" in out
    assert "it says" in out and not Path("run/held_out.jsonl").exists() and looks(Path("run")) == []


def test_half_precision_is_trained_in_single(here, capfd):
    assert gpt3("convert base half --to gpt3lib --dtype float16", capfd)[0] == 0
    assert gpt3(TUNE.replace("--from base", "--from half"), capfd)[0] == 0
    assert {tensor.dtype for tensor in weights().values()} == {torch.float32}


def test_held_out_pairs_are_written_as_they_were(tmp_path):
    pair = own_pairs.Pair('é "\n\ud800', " ☃", None)
    write_held([pair], tmp_path / "x.jsonl")
    assert numbered_pairs(tmp_path / "x.jsonl")[0][1].context == pair.context


def test_what_is_held_out_keeps_all_that_is_right_and_the_choices(tmp_path):
    asked = [
        {"context": "a", "completion": [" b", " c"]},
        {"context": "b", "completion": " x", "choices": [" x", " y"]},
        {"context": "c", "completion": " z"},
    ]
    write(tmp_path / "mine.jsonl", asked)
    write_held(as_pairs(numbered_pairs(tmp_path / "mine.jsonl"), TOKENIZER, 48), tmp_path / "x.jsonl")
    assert [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()] == asked


def test_the_plan_counts_what_may_not_be_meant(here, capfd):
    more = [{"context": "a", "completion": [" b", " c"]}, {"context": "a", "completion": "b"}]
    write("mine.jsonl", lines() + more + [{"context": "d", "completion": "e"}])
    _, out, _ = gpt3(TUNE, capfd)
    told = "several completions: 1 (the first is learned); no space before the completion: 2; contexts of more than"
    assert f"lines    {told} one line: 1\n" in out
    assert own_pairs.oddities(as_pairs(numbered_pairs("run/held_out.jsonl"), TOKENIZER, 48)[:1]) == ""


def test_hints_can_be_pasted(here, capfd):
    write("mine.jsonl", [{"context": f"-{i} it's?", "completion": f" {i % 3}"} for i in range(29)] + lines(1))
    code, out, _ = gpt3(TUNE.replace("--out run", "--out 'my run'"), capfd)
    asked, counted = (line.partition(": gpt3 ")[2] for line in out.splitlines()[-2:])
    assert shlex.split(asked) == ["generate", "my run", lines(1)[0]["context"], "--temperature", "0"]
    assert shlex.split(counted) == ["eval", "my run", "--task", str(Path("my run/held_out.jsonl"))]
    assert code == 0 and gpt3(asked, capfd)[0] == 0 and gpt3(counted, capfd)[0] == 0
    write("mine.jsonl", [{"context": f"-{i}", "completion": f" {i % 3}"} for i in range(9)])
    _, out, _ = gpt3(TUNE.replace("--out run", "--out bare"), capfd)
    assert out.splitlines()[-2].split() == "Ask it: gpt3 generate bare --temperature 0".split()


# --- killed, and on ---


def killed(line, folder):
    """Start a command in a process of its own, and kill it when it has saved a few times."""
    with open(folder / "said.txt", "w") as log:
        process = subprocess.Popen([*PROGRAM, *shlex.split(line)], cwd=folder, stdout=log, stderr=log)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline and not [*folder.glob("run/step-*6")]:
        time.sleep(0.002)
    return process


@pytest.mark.skipif(os.name == "nt", reason="other signals")
@pytest.mark.parametrize("more", ["", "--rank 2 --replay old.txt"])
def test_a_kill_changes_nothing(more, here, capfd):
    line = f"{TUNE.replace('--epochs 4', '--epochs 12')} {more}"
    assert gpt3(line.replace("--out run", "--out whole"), capfd)[0] == 0
    process = killed(line, here)
    process.kill()
    assert process.wait() == -signal.SIGKILL and not Path("run/model").exists()
    code, out, _ = gpt3(line, capfd)
    assert code == 0 and "going on" in out
    assert equal(weights("whole"), weights("run"))
    assert Path("whole/extra.jsonl").read_text() == Path("run/extra.jsonl").read_text()
    if more:
        one, other = (load_file(f"{name}/adapter/adapter_model.safetensors") for name in ("whole", "run"))
        assert equal(one, other)


def test_ctrl_c_and_on_and_nobody_asks_half_a_model(here, capfd, monkeypatch):
    real = own_pairs.run

    def stopped(model, optimizer, pairs, store, recipe, look, **ways):
        def raising(number, model):
            if number == 5:
                os.kill(os.getpid(), signal.SIGINT)
            return look(number, model)

        return real(model, optimizer, pairs, store, recipe, raising, **ways)

    assert gpt3(TUNE.replace("--out run", "--out whole"), capfd)[0] == 0
    monkeypatch.setattr(own_pairs, "run", stopped)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        code, out, _ = gpt3(TUNE, capfd)
    finally:
        signal.signal(signal.SIGINT, before)
    assert code == 130 and "go on with: gpt3 train --out run" in out and not Path("run/model").exists()
    for line in ("generate run x", "eval run --data old.txt", "convert run x --to gpt_neo"):
        code, _, error = gpt3(line, capfd)
        assert code == 2 and "run has not learned all of its pairs yet; gpt3 train --out run finishes it" in error
    monkeypatch.setattr(own_pairs, "run", real)
    assert gpt3("train --out run", capfd)[0] == 0
    assert equal(weights("whole"), weights("run"))


# --- what is refused ---


@pytest.mark.parametrize(
    "line, words",
    [
        ("train --pairs mine.jsonl", "--pairs for which model"),
        ("train --from base", "to learn what? Give --pairs"),
        ("train --from base --pairs mine.jsonl --text old.txt", "not --text or --data"),
        ("train --data t --from base --pairs mine.jsonl", "not --text or --data"),
        ("train gpt3-1m --from base --pairs mine.jsonl", "gpt3-1m: the model of --from has its size already"),
        (TUNE + " --n_ctx 8", "Unrecognized options: --n_ctx, 8"),
        (TUNE + " --share 0.5", "--share is of the texts of --replay"),
        (TUNE + " --rank 17", "rank is 17, and the matrices have only 16"),
        (TUNE + " --rank -1", "--rank is -1; it must be a whole number without a sign, such as 3"),
        (TUNE + " --epochs 1.5", "--epochs is 1.5; it must be a whole number without a sign, such as 3"),
        (TUNE + " --batch 28", "batch is 28, and 27 pairs are to be learned; give 27 at most"),
        ("train gpt3-1m --pairs mine.jsonl", "write --from gpt3-1m --pairs mine.jsonl"),
        (TUNE.replace("--from base", "--from gpt3-9m"), "there are gpt3-100k, gpt3-300k, gpt3-1m, gpt3-3m, gpt3-10m"),
        (TUNE + " --epochs 0", "epochs is 0"),
        (TUNE + " --batch 0", "batch_size is 0"),
        (TUNE + " --peak 0", "peak is 0.0; it must be a number above 0"),
        (TUNE + " --save_every 0", "save_every is 0"),
        (TUNE + " --n_threads 0", "n_threads is 0; it must be 1 to 1,024"),
        (TUNE + " --device warp", "no device 'warp'"),
        (TUNE + " --batch 1 --replay old.txt", "leave one for the pairs"),
        (TUNE + " --replay nowhere.txt", "nowhere.txt"),
        (TUNE + " --replay short.txt", "replay has 5 tokens, the longest pair"),
        (TUNE.replace("mine.jsonl", "nowhere.jsonl"), "nowhere.jsonl cannot be read"),
        (TUNE.replace("mine.jsonl", "empty.jsonl"), "empty.jsonl has no problems"),
        (TUNE.replace("mine.jsonl", "broken.jsonl"), "broken.jsonl, line 2 is no JSON"),
        (TUNE.replace("mine.jsonl", "silent.jsonl"), "silent.jsonl, line 3: the completion is empty"),
        (TUNE.replace("mine.jsonl", "long.jsonl"), "48 tokens fit into the model's window, but line 2 has 52"),
        (TUNE.replace("--from base", "--from nowhere/at/all"), "no run and no model there"),
        (TUNE.replace("--from base", "--from mute"), "mute has no merges.txt"),
        (TUNE.replace("--out run", "--out base"), "base holds a model already"),
        (TUNE.replace("--out run", "--out mine.jsonl"), "mine.jsonl is a file; give a folder"),
    ],
)
def test_a_start_that_is_refused_leaves_no_trace(line, words, here, capfd):
    good = json.dumps(lines()[0])
    Path("empty.jsonl").write_text("\n")
    Path("short.txt").write_text("old.")
    Path("broken.jsonl").write_text(good + '\n{"context": \n')
    Path("silent.jsonl").write_text(good + "\n\n" + '{"context": "x", "completion": " "}\n')
    Path("long.jsonl").write_text(good + "\n" + json.dumps({"context": "x" * 50, "completion": "y"}) + "\n")
    shutil.copytree("base", "mute")
    Path("mute/merges.txt").unlink()
    before = sorted(Path("base").iterdir())
    code, _, error = gpt3(line, capfd)
    assert code == 2 and words in error and error.count("\n") == 1 and "Error:" not in error
    assert not Path("run").exists() and [p for p in sorted(Path("base").iterdir()) if p.name != "lock"] == before


@pytest.mark.parametrize(
    "change, words",
    [
        ("--epochs 5", "epochs is 5, but the run in run began with 4"),
        ("--from other", "from is 'other', but the run in run began with 'base'"),
        ("--rank 2", "rank is 2, but the run in run began with 0"),
        ("--replay old.txt", "replay is ('old.txt',)"),
    ],
)
def test_a_run_goes_on_only_as_it_began(change, words, here, capfd):
    assert gpt3(TUNE, capfd)[0] == 0
    code, _, error = gpt3(f"{TUNE} {change}", capfd)
    assert code == 2 and words in error and "another --out" in error


def test_a_run_goes_on_only_with_its_pairs(here, capfd):
    assert gpt3(TUNE, capfd)[0] == 0
    write("mine.jsonl", lines(29))
    code, _, error = gpt3(TUNE, capfd)
    assert code == 2 and "mine.jsonl: not the pairs, or not the --replay, with which the run in run began" in error


def test_runs_of_the_two_kinds_do_not_mix(here, capfd):
    small = "--n_tokens 512 --n_ctx 16 --batch_tokens 64 --n_threads 1"
    assert gpt3(f"train --text old.txt --out text {small}", capfd)[0] == 0
    assert gpt3(TUNE, capfd)[0] == 0
    code, _, error = gpt3(TUNE.replace("--out run", "--out text"), capfd)
    assert code == 2 and "the run in text is one of another kind; give this one another --out" in error
    code, _, error = gpt3(f"train --text old.txt --out run {small}", capfd)
    assert code == 2 and "the run in run is one of --from and --pairs; give this one another --out" in error


def test_a_broken_line_is_told_before_a_model_is_read(here, monkeypatch):
    Path("mine.jsonl").write_text("{")
    monkeypatch.setattr(own_pairs, "find_model", lambda *_: pytest.fail("too early"))
    with pytest.raises(EvaluationError, match="line 1"):
        own_pairs.prepare_tuning(TuneConfig("base", "mine.jsonl", "run"))


def test_help_tells_of_both_ways(capfd):
    code, out, _ = gpt3("train --help", capfd)
    assert code == 0 and "--text FILE" in out and "gpt3 train --from --help" in out
    for line in ("train --from --help", "train --from x -h", "train --help --pairs"):
        code, out, _ = gpt3(line, capfd)
        assert code == 0 and "--pairs FILE.jsonl" in out and "LoRA" in out and "usage: gpt3 train" in out
