"""The training chapter's functions against counting by hand, torch, transformers, and each other."""

import json
import math
import tomllib
from collections import Counter
from hashlib import sha256
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from gpt3lib.model import GPT, GPTConfig
from gpt3lib.texts import DATA
from gpt3lib.tokenization import TokenError, Tokenizer
from gpt3lib.training import (
    HELD_OUT,
    TrainingError,
    batch,
    bigram_loss,
    evaluate,
    learning_rate,
    make_optimizer,
    pack,
    train,
    training_and_validation,
    windows,
)
from oracles import to_gpt2

TINY = GPTConfig(vocab_size=31, n_ctx=8, n_layers=2, d_model=16, n_heads=2, d_head=8)


def model_of(seed: int = 0, config: GPTConfig = TINY) -> GPT:
    return GPT(config, seed)


def text_of(length: int, vocab_size: int = 31, seed: int = 1) -> torch.Tensor:
    return torch.randint(vocab_size, (length,), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(DATA / "tokenizer-4353.bpe")


# --- the long tensor -------------------------------------------------------------------------------------------------


def test_pack_puts_end_of_text_before_every_document_and_loses_nothing(tokenizer):
    documents = ["To be,\nor not to be", "", "  two  spaces\tand a tab", "Ἀρχή <|endoftext|> 漢字 🜁"]
    packed = pack(tokenizer, documents)
    assert packed.dtype == torch.int64 and packed.dim() == 1
    found, current = [], None
    for i in packed.tolist():
        if i == tokenizer.end_of_text:
            current = []
            found.append(current)
        else:
            current.append(i)  # fails when the first id is not end-of-text
    assert [tokenizer.decode(ids) for ids in found] == documents
    assert found == [tokenizer.encode(document) for document in documents]  # our slow encoder, not tiktoken


def test_pack_of_nothing_is_an_empty_tensor_of_ids(tokenizer):
    assert pack(tokenizer, []).dtype == torch.int64 and len(pack(tokenizer, [])) == 0


def test_pack_takes_a_million_blanks(tokenizer):
    text = " " * 1_100_000 + "x"
    assert tokenizer.decode(pack(tokenizer, [text])[1:].tolist()) == text


def test_pack_takes_documents_one_by_one_and_no_bare_text(tokenizer):
    documents = ["To be", "or not", ""]
    packed = pack(tokenizer, documents)
    for same in (tuple(documents), iter(documents), (text for text in documents), dict.fromkeys(documents)):
        assert torch.equal(pack(tokenizer, same), packed)
    pair = training_and_validation(tokenizer, iter(documents))
    assert torch.equal(pair[0], pack(tokenizer, documents[1:])) and torch.equal(pair[1], pack(tokenizer, documents[:1]))
    wrong = {
        "documents is a str; for one text use \\[text\\]": "abc",
        "documents is a bytes": b"abc",
        "documents is a NoneType": None,
        "documents is a int": 5,
        "document 1 is a NoneType; it must be a text, str": ["a", None],
        "document 0 is a bytes": [b"abc"],
        "document 0 is a list": [["a"]],
    }
    for message, documents in wrong.items():
        for f in (pack, training_and_validation):
            with pytest.raises(TrainingError, match=message):
                f(tokenizer, documents)


def test_every_26th_document_is_held_out_and_no_other(tokenizer):
    documents = [f"document {i}" for i in range(60)]
    training, validation = training_and_validation(tokenizer, documents)
    read = [tokenizer.decode(t.tolist()).split("<|endoftext|>")[1:] for t in (training, validation)]
    assert read[1] == ["document 0", "document 26", "document 52"] and HELD_OUT == 26
    assert read[0] == [document for document in documents if document not in read[1]]


# --- windows and batches ---------------------------------------------------------------------------------------------


@given(st.integers(2, 40), st.data())
@settings(max_examples=40, deadline=None)
def test_windows_equal_a_loop(length, data):
    n_ctx = data.draw(st.integers(1, length - 1))
    starts = data.draw(st.lists(st.integers(0, length - n_ctx - 1), min_size=1, max_size=5))
    tokens = text_of(length)
    inputs, targets = windows(tokens, n_ctx, torch.tensor(starts))
    text = tokens.tolist()
    assert inputs.tolist() == [text[s : s + n_ctx] for s in starts]
    assert targets.tolist() == [text[s + 1 : s + 1 + n_ctx] for s in starts]


def test_a_batch_is_a_pure_function_of_seed_and_step():
    tokens = torch.arange(5000)
    first = batch(tokens, 6, 16, seed=3, step=70)
    torch.manual_seed(99)
    torch.rand(10)  # the global generator has no say, and does not notice
    state = torch.get_rng_state()
    again = batch(tokens, 6, 16, seed=3, step=70)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert torch.equal(state, torch.get_rng_state())
    assert first[0].shape == first[1].shape == (6, 16)
    assert torch.equal(first[0] + 1, first[1])  # on counting numbers the target is one more
    seen = {tuple(batch(tokens, 6, 16, seed, step)[0][:, 0].tolist()) for seed in range(4) for step in range(50)}
    assert len(seen) == 200


def test_every_start_is_reached_the_first_and_the_last_too():
    tokens = torch.arange(12)
    firsts = Counter(i for step in range(200) for i in batch(tokens, 4, 5, 0, step)[0][:, 0].tolist())
    assert sorted(firsts) == list(range(7))  # 12 tokens hold 7 windows of 5 + 1
    assert min(firsts.values()) > 60 and max(firsts.values()) < 180  # 800 draws, 114 each on average
    lasts = {batch(tokens, 4, 5, 0, step)[1][i, -1].item() for step in range(200) for i in range(4)}
    assert max(lasts) == 11


def test_the_shortest_text_has_one_window_and_a_shorter_one_is_refused():
    inputs, targets = batch(torch.arange(6), 3, 5, 0, 0)
    assert inputs.tolist() == [[0, 1, 2, 3, 4]] * 3 and targets[0].tolist() == [1, 2, 3, 4, 5]
    with pytest.raises(TrainingError, match=r"5 tokens hold no window of 5 \+ 1; use a longer text or a smaller n_ctx"):
        batch(torch.arange(5), 3, 5, 0, 0)


# --- the loss and its baselines --------------------------------------------------------------------------------------


@given(st.integers(2, 6), st.integers(5, 60), st.sampled_from([0.0, 0.4, 0.9, 1.0]), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_bigram_loss_equals_dictionaries(vocab_size, length, weight, seed):
    train_ids, valid_ids = text_of(length, vocab_size, seed).tolist(), text_of(17, vocab_size, seed + 1).tolist()
    single, pairs, followed = Counter(train_ids), Counter(zip(train_ids, train_ids[1:])), Counter(train_ids[:-1])
    prices = []
    for a, b in zip(valid_ids, valid_ids[1:]):
        alone = (single[b] + 1) / (length + vocab_size)
        chance = (weight * pairs[a, b] / followed[a] if followed[a] else 0.0) + (1 - weight) * alone
        prices.append(-math.log(chance) if chance else math.inf)
    ours = bigram_loss(torch.tensor(train_ids), torch.tensor(valid_ids), vocab_size, weight)
    assert ours == pytest.approx(sum(prices) / len(prices), rel=1e-9)


@pytest.mark.parametrize("seen", [[], [2]])
def test_bigram_loss_of_a_text_without_pairs_is_that_of_single_tokens(seen):
    chance = [(seen.count(b) + 1) / (len(seen) + 5) for b in range(5)]
    seen, text = torch.tensor(seen, dtype=torch.int64), torch.tensor([0, 2, 2, 4])
    for weight in (0.0, 0.9):
        expected = -sum(math.log((1 - weight) * chance[b]) for b in (2, 2, 4)) / 3
        assert bigram_loss(seen, text, 5, weight) == pytest.approx(expected, rel=1e-12)


def test_bigram_loss_refuses_what_it_cannot_judge():
    text = text_of(50)
    for short in ([], [3]):
        with pytest.raises(TrainingError, match=f"{len(short)} validation tokens hold no pair; 2 are the least"):
            bigram_loss(text, torch.tensor(short, dtype=torch.int64), 31)
    for pair in ((text, text + 1), (text + 1, text), (text - 1, text)):
        with pytest.raises(TokenError, match="not in the vocabulary"):
            bigram_loss(*pair, int(text.max()) + 1)
    for weight in (-0.1, 1.5, math.nan):
        with pytest.raises(TrainingError, match="weight is .*; it must be a share, 0 to 1"):
            bigram_loss(text, text, 31, weight)


def test_bigram_loss_counts_ids_of_32_bits_as_others():
    """Numbers of pairs need 64: 50,257 squared is more than 32 hold."""
    text, other = text_of(300, 50257), text_of(300, 50257)
    assert bigram_loss(text.int(), other.int(), 50257) == bigram_loss(text, other, 50257)


def test_bigram_probabilities_add_up_to_one():
    tokens = text_of(400, vocab_size=5)
    chances = [math.exp(-bigram_loss(tokens, torch.tensor([2, b]), 5)) for b in range(5)]
    assert sum(chances) == pytest.approx(1)


def test_bigram_loss_needs_no_table_of_vocabulary_squared():
    tokens = text_of(300, vocab_size=50257)
    assert 5 < bigram_loss(tokens, text_of(300, 50257, seed=2), 50257) < 14  # a dense table would take 20 GB


def test_an_untrained_model_is_as_good_as_a_uniform_guess():
    tokens = text_of(600)
    assert evaluate(model_of(), tokens) == pytest.approx(math.log(31), abs=0.05)


# --- the schedule and the optimizer ----------------------------------------------------------------------------------


def rate_by_hand(step, n_steps, peak, warmup):
    """The same schedule, as two straight thoughts: a share of the warm-up, or a blend of peak and floor."""
    if step < warmup:
        return (step + 1) * peak / warmup
    share = 1.0 if step >= n_steps else (step - warmup) / (n_steps - warmup)
    height = math.cos(math.pi * share / 2) ** 2  # 1 at the start, 0 at the end
    return height * peak + (1 - height) * peak / 10


@given(st.integers(1, 300), st.data())
@settings(max_examples=60, deadline=None)
def test_learning_rate_equals_another_formula(n_steps, data):
    warmup = data.draw(st.integers(0, n_steps))
    step = data.draw(st.integers(0, 2 * n_steps))
    assert learning_rate(step, n_steps, 2.0, warmup) == pytest.approx(rate_by_hand(step, n_steps, 2.0, warmup))


def test_learning_rate_at_its_corners():
    rate = [learning_rate(step, n_steps=110, peak=1.0, warmup=10) for step in range(400)]
    assert rate[0] == pytest.approx(0.1) and rate[9] == 1 and rate[10] == 1
    assert rate[60] == pytest.approx(0.55) and rate[110] == pytest.approx(0.1)
    assert all(value == pytest.approx(0.1) for value in rate[110:])  # it does not climb again
    assert rate[10:111] == sorted(rate[10:111], reverse=True) and max(rate) == 1
    assert learning_rate(0, n_steps=5, peak=1.0, warmup=0) == 1
    assert learning_rate(4, n_steps=5, peak=1.0, warmup=5) == 1


def test_the_optimizer_decays_matrices_and_spares_vectors():
    model = model_of()
    optimizer = make_optimizer(model)
    name_of = {id(p): name for name, p in model.named_parameters()}
    decayed, spared = ([name_of[id(p)] for p in group["params"]] for group in optimizer.param_groups)
    linears = ["attention.wq", "attention.wk", "attention.wv", "attention.wo", "mlp.up", "mlp.down"]
    norms = ["ln_1", "ln_2"]
    expected = {"embeddings.wte.weight", "embeddings.wpe.weight"}
    expected |= {f"blocks.{i}.{linear}.weight" for i in range(2) for linear in linears}
    assert set(decayed) == expected and len(decayed) == len(expected)
    expected = {f"blocks.{i}.{linear}.bias" for i in range(2) for linear in linears} | {"ln_f.weight", "ln_f.bias"}
    expected |= {f"blocks.{i}.{norm}.{kind}" for i in range(2) for norm in norms for kind in ("weight", "bias")}
    assert set(spared) == expected and len(spared) == len(expected)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert make_optimizer(model, weight_decay=0.3).param_groups[0]["weight_decay"] == 0.3
    for group in optimizer.param_groups:
        assert group["betas"] == (0.9, 0.95) and group["eps"] == 1e-8 and not group["amsgrad"]


# --- the loop --------------------------------------------------------------------------------------------------------


def steps_by_hand(model: GPT, tokens, n_steps, batch_size, peak, warmup, seed) -> tuple[list[float], list[float]]:
    """The recipe of [B20] App. B written down once more, in float32 and without torch.optim; losses and norms."""
    names = dict(model.named_parameters())
    m = {name: torch.zeros_like(p) for name, p in names.items()}
    v = {name: torch.zeros_like(p) for name, p in names.items()}
    losses, norms = [], []
    for step in range(n_steps):
        inputs, targets = batch(tokens, batch_size, model.config.n_ctx, seed, step)
        log_p = model(inputs).log_softmax(dim=-1)
        loss = -log_p.gather(-1, targets[..., None]).mean()
        gradients = dict(zip(names, torch.autograd.grad(loss, list(names.values()))))
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))
        lr = rate_by_hand(step, n_steps, peak, warmup)
        for name, p in names.items():
            g = gradients[name] * min(1.0, 1.0 / norm)
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.95 * v[name] + 0.05 * g * g
            stride = (m[name] / (1 - 0.9 ** (step + 1))) / ((v[name] / (1 - 0.95 ** (step + 1))).sqrt() + 1e-8)
            decay = 0.1 if p.dim() == 2 else 0.0
            p.data = p.data - lr * decay * p.data - lr * stride
        losses.append(loss.item())
        norms.append(norm)
    return losses, norms


@pytest.mark.parametrize("loud", [0.1, 30.0])
def test_train_equals_the_recipe_written_by_hand(loud):
    tokens = text_of(300)
    ours, theirs = model_of(), model_of()
    for model in (ours, theirs):
        with torch.no_grad():
            model.ln_f.weight *= loud  # loud logits, large gradients
    losses = train(ours, tokens, 3, batch_size=4, peak=1e-3, warmup=2, seed=5)
    expected, norms = steps_by_hand(theirs, tokens, 3, 4, 1e-3, 2, seed=5)
    assert (min(norms) > 1) if loud > 1 else (max(norms) < 1)  # once with clipping, once without
    assert losses == pytest.approx(expected, abs=1e-5)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters()):
        if name.endswith("wk.bias"):  # its true gradient is zero: Adam divides rounding errors by themselves
            assert (a - b).abs().max() < 4e-3
        else:
            torch.testing.assert_close(a, b, atol=2e-5, rtol=0, msg=name)


def test_one_step_equals_the_recipe_to_a_millionth():
    tokens = text_of(300)
    ours, theirs = model_of(), model_of()
    for model in (ours, theirs):
        with torch.no_grad():
            model.ln_f.weight *= 30
    train(ours, tokens, 1, batch_size=4, peak=1e-3, warmup=0)
    _, norms = steps_by_hand(theirs, tokens, 1, 4, 1e-3, 0, seed=0)
    assert norms[0] > 1
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters()):
        if not name.endswith("wk.bias"):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=0, msg=name)


def test_ten_losses_equal_gpt2_of_transformers():
    ours, tokens = model_of(), text_of(400)
    theirs = to_gpt2(ours)  # in evaluation mode: no dropout
    matrices = [p for p in theirs.parameters() if p.dim() == 2]
    vectors = [p for p in theirs.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-8)
    expected = []
    for step in range(10):
        inputs, targets = batch(tokens, 4, 8, seed=0, step=step)
        for group in optimizer.param_groups:
            group["lr"] = rate_by_hand(step, 10, 1e-2, 3)
        loss = F.cross_entropy(theirs(inputs).logits.transpose(1, 2), targets)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        expected.append(loss.item())
    losses = train(ours, tokens, 10, batch_size=4, peak=1e-2, warmup=3)
    assert losses == pytest.approx(expected, abs=1e-4)
    assert losses[-1] != pytest.approx(losses[0], abs=1e-2)  # ten different losses, not one ten times


@pytest.mark.parametrize("bf16", [False, True])
def test_bf16_multiplies_in_bfloat16_and_keeps_float32_weights(bf16):
    tokens, seen = text_of(400), set()
    exact, model = model_of(), model_of()
    for linear in (model.blocks[0].attention.wq, model.blocks[1].mlp.down):
        linear.register_forward_hook(lambda module, given, out: seen.add(out.dtype))
    losses = train(model, tokens, 10, batch_size=4, peak=1e-2, warmup=3, bf16=bf16)
    assert seen == {torch.bfloat16 if bf16 else torch.float32}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    expected = train(exact, tokens, 10, batch_size=4, peak=1e-2, warmup=3)
    assert losses == pytest.approx(expected, abs=0.02) and (losses != expected) == bf16


def test_training_repeats_to_the_last_bit_and_follows_its_seed():
    tokens = text_of(400)
    first, second, other = model_of(), model_of(), model_of()
    losses = train(first, tokens, 5, batch_size=2, warmup=2)
    torch.manual_seed(123)
    assert losses == train(second, tokens, 5, batch_size=2, warmup=2)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))
    assert losses != train(other, tokens, 5, batch_size=2, warmup=2, seed=1)


def test_one_batch_is_learnt_by_heart():
    losses = train(model_of(), text_of(9), 80, batch_size=2, peak=1e-2, warmup=5)  # 9 tokens: a single window
    assert losses[0] > 3 and losses[-1] < 0.1


def test_noise_cannot_be_predicted_so_targets_are_not_inputs():
    """On random tokens no honest model gets below ln V; one whose targets are its inputs does, within 60 steps."""
    noise = text_of(100_000)
    honest = train(model_of(), noise, 60, batch_size=8, peak=1e-2, warmup=5)
    assert sum(honest[-10:]) / 10 > math.log(31) - 0.05

    def unshifted(tokens, n_ctx, starts):
        inputs, _ = windows(tokens, n_ctx, starts)
        return inputs, inputs

    with patch("gpt3lib.training.windows", unshifted):
        wrong = train(model_of(), noise, 60, batch_size=8, peak=1e-2, warmup=5)
    assert wrong[-1] < 1


def test_on_step_is_called_after_each_update_and_eval_mode_at_the_end():
    model, seen = model_of(), []
    start = model.ln_f.bias.detach().clone()

    def watch(step, loss):
        seen.append((step, loss))
        assert model.training and not torch.equal(model.ln_f.bias, start)
        evaluate(model, text_of(40))
        assert model.training  # evaluate gives the mode back

    losses = train(model, text_of(100), 3, batch_size=2, warmup=1, on_step=watch)
    assert seen == list(enumerate(losses)) and not model.training


def test_evaluate_is_the_mean_over_evenly_spread_windows():
    model, tokens = model_of().eval(), text_of(100)
    starts = [0, 10, 20, 30, 40, 50, 60, 70, 80, 91]  # 91 is the last start of 8 + 1 in 100
    with torch.no_grad():
        expected = [model.loss(tokens[s : s + 8][None], tokens[s + 1 : s + 9][None]).item() for s in starts]
    assert evaluate(model, tokens, n_windows=10) == pytest.approx(sum(expected) / 10, abs=1e-5)
    assert evaluate(model, tokens, n_windows=10) == evaluate(model, tokens, n_windows=10)
    assert evaluate(model, tokens, n_windows=1) == pytest.approx(expected[0], abs=1e-5)
    assert not model.training and next(model.parameters()).grad is None


def test_evaluate_looks_in_eval_mode():
    class Moody(torch.nn.Module):
        config = TINY

        def loss(self, inputs, targets):
            return torch.tensor(9.0 if self.training else 2.0)

    model = Moody().train()
    assert evaluate(model, text_of(100)) == 2.0 and model.training


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"n_steps": 0}, "n_steps is 0; it must be a whole number, 1 or more"),
        ({"n_steps": -3}, "n_steps is -3"),
        ({"n_steps": 5, "batch_size": 0}, "batch_size is 0; it must be a whole number, 1 or more"),
        ({"n_steps": 5, "warmup": 6}, "warmup is 6, but there are 5 steps; choose 0 to 5"),
        ({"n_steps": 5, "warmup": -1}, "warmup is -1"),
        ({"n_steps": 5.0}, "n_steps is 5.0; it must be a whole number, 1 or more"),
        ({"n_steps": True}, "n_steps is True"),
        ({"n_steps": "5"}, "n_steps is '5'"),
        ({"n_steps": None}, "n_steps is None"),
        ({"n_steps": 5, "batch_size": 2.0}, "batch_size is 2.0"),
        ({"n_steps": 5, "warmup": 0.5}, "warmup is 0.5, but there are 5 steps; choose 0 to 5, a whole number"),
        ({"n_steps": 5, "warmup": False}, "warmup is False"),
        ({"n_steps": 5, "peak": math.nan}, "peak is nan; it must be a number, 0 or more"),
        ({"n_steps": 5, "peak": math.inf}, "peak is inf"),
        ({"n_steps": 5, "peak": -1e-3}, "peak is -0.001"),
        ({"n_steps": 5, "peak": "1e-3"}, "peak is '1e-3'"),
        ({"n_steps": 5, "peak": None}, "peak is None"),
        ({"n_steps": 5, "seed": 0.5}, "seed is 0.5; choose a whole number of 12 digits"),
        ({"n_steps": 5, "seed": 2**62}, "seed is 4611686018427387904"),
        ({"n_steps": 5, "seed": None}, "seed is None"),
    ],
)
def test_settings_that_make_no_sense_are_refused_before_any_work(settings_, message):
    model = model_of()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(TrainingError, match=message):
        train(model, text_of(100), **({"batch_size": 2, "warmup": 0} | settings_))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


@pytest.mark.parametrize(
    ("tokens", "kind"),
    [
        ([1, 2, 3] * 9, "not list; use torch.tensor\\(ids\\), or pack"),
        (np.arange(27), "not ndarray"),
        ("To be, or not to be", "not str"),
        (torch.zeros(3, 9, dtype=torch.int64), "not \\(3, 9\\) torch.int64"),
        (torch.zeros((), dtype=torch.int64), "not \\(\\) torch.int64"),
        (torch.zeros(27), "not \\(27,\\) torch.float32"),
        (torch.ones(27, dtype=torch.bool), "torch.bool"),
    ],
    ids=["list", "numpy", "str", "two dimensions", "none", "float", "bool"],
)
def test_a_text_is_one_long_tensor_of_ids(tokens, kind):
    model, text = model_of(), text_of(50)
    calls = (
        lambda: train(model, tokens, 5, batch_size=2, warmup=0),
        lambda: evaluate(model, tokens),
        lambda: batch(tokens, 2, 8, 0, 0),
        lambda: windows(tokens, 8, torch.tensor([0])),
        lambda: bigram_loss(tokens, text, 31),
        lambda: bigram_loss(text, tokens, 31),
    )
    for call in calls:
        with pytest.raises(TrainingError, match=f"tokens must be one long tensor of ids, .*{kind}"):
            call()


@pytest.mark.parametrize("wrong", [0, -1, 2.0, True, "3", None])
def test_numbers_of_windows_are_whole_numbers(wrong):
    text = text_of(50)
    for call in (
        lambda: evaluate(model_of(), text, wrong),
        lambda: batch(text, wrong, 8, 0, 0),
        lambda: batch(text, 2, wrong, 0, 0),
    ):
        with pytest.raises(TrainingError, match="it must be a whole number, 1 or more"):
            call()


def test_ids_are_looked_at_before_training():
    """All of them, not only those in the first batches."""
    for spoiled in (31, -1):
        text, model = text_of(100_000), model_of()
        text[77_777] = spoiled
        with pytest.raises(TokenError, match=f"token id {spoiled} is not in the vocabulary"):
            train(model, text, 1, batch_size=1, warmup=0)
        assert torch.equal(model.ln_f.bias, torch.zeros(16))


def test_numbers_of_numpy_and_ids_of_32_bits_change_nothing():
    text, found = text_of(100), []
    for whole, real, tokens in ((int, float, text), (np.int64, np.float64, text.int())):
        model = model_of()
        numbers = (whole(3), whole(2), real(1e-2), whole(1), whole(7))
        losses = train(model, tokens, *numbers)
        found.append(
            (losses, evaluate(model, tokens, whole(4)), *batch(tokens, whole(2), whole(8), whole(1), whole(3)))
        )
    assert found[0][:2] == found[1][:2]
    assert torch.equal(found[0][2], found[1][2].long()) and torch.equal(found[0][3], found[1][3].long())


def test_tokens_go_where_the_model_is():
    """The meta device stands for a GPU."""
    seen = set()

    class Elsewhere(torch.nn.Module):
        config = TINY

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1, device="meta"))

        def loss(self, inputs, targets):
            seen.update((inputs.device.type, targets.device.type))
            return torch.tensor(2.0)

    assert evaluate(Elsewhere(), text_of(50)) == 2 and seen == {"meta"}


def test_evaluate_adds_up_in_more_than_the_model_has():
    """256 losses of about 3.4 in bfloat16: their sum there has two digits."""
    model, tokens = model_of().bfloat16(), text_of(3000)
    wide = model_of().bfloat16().double()
    assert evaluate(model, tokens, 256) == pytest.approx(evaluate(wide, tokens, 256), abs=1e-3)


def test_a_text_without_a_window_is_refused():
    with pytest.raises(TrainingError, match=r"8 tokens hold no window of 8 \+ 1"):
        train(model_of(), text_of(8), 5, batch_size=2, warmup=0)
    with pytest.raises(TrainingError, match=r"8 tokens hold no window of 8 \+ 1"):
        evaluate(model_of(), text_of(8))
    assert issubclass(TrainingError, ValueError)


def test_nan_stops_the_run_at_its_step_before_the_weights_are_touched():
    model, calls = model_of(), []

    def spoil(step, loss):
        calls.append(step)
        if step == 2:
            with torch.no_grad():
                model.ln_f.bias[0] = math.nan

    with pytest.raises(TrainingError, match="step 3: loss nan"):
        train(model, text_of(100), 10, batch_size=2, warmup=0, on_step=spoil)
    assert calls == [0, 1, 2] and model.embeddings.wpe.weight.isfinite().all()


def test_an_infinite_gradient_under_a_finite_loss_stops_the_run_too():
    model = model_of()
    model.embeddings.wpe.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(TrainingError, match="step 0: loss 3.*gradient (nan|inf)"):
        train(model, text_of(100), 10, batch_size=2, warmup=0)
    assert all(p.isfinite().all() for p in model.parameters())


# --- the shipped model -----------------------------------------------------------------------------------------------


def test_the_shipped_model_is_the_one_the_manifest_names():
    entry = tomllib.loads((DATA / "manifest.toml").read_text())["models"]["shakespeare-1m"]
    assert entry["command"] == "python tools/train_models.py shakespeare-1m"
    folder = DATA / "models" / "shakespeare-1m"
    for name in ("model.safetensors", "config.json"):
        assert sha256((folder / name).read_bytes()).hexdigest() == entry[name], name
    assert GPTConfig(**json.loads((folder / "config.json").read_text())) == GPTConfig.from_name(
        "gpt3-1m", n_ctx=256, bandwidth=256
    )


def test_the_shipped_model_passes_the_bigram_line(tokenizer):
    from gpt3lib.texts import corpus

    training, validation = training_and_validation(tokenizer, corpus())
    shipped = evaluate(GPT.from_pretrained(DATA / "models" / "shakespeare-1m"), validation, n_windows=16)
    assert shipped < bigram_loss(training, validation, tokenizer.vocab_size) - 0.3


# --- small numpy numbers, and what is refused at the door ------------------------------------------------------------


def test_small_numbers_of_numpy_do_not_overflow():
    tokens = text_of(400)
    assert train(model_of(), tokens, 300, 1, peak=0, warmup=np.uint8(2)) == train(model_of(), tokens, 300, 1, 0, 2)
    for a, b in zip(batch(tokens, np.int8(2), np.int8(127), 0, np.int8(1)), batch(tokens, 2, 127, 0, 1)):
        assert torch.equal(a, b)
    assert bigram_loss(tokens, tokens, np.uint8(60)) == bigram_loss(tokens, tokens, 60)
    assert type(evaluate(model_of(), tokens, np.int64(3))) is float


def test_float64_trains_with_bf16():
    assert math.isfinite(train(model_of().double(), text_of(400), 2, 1, warmup=0, bf16=True)[-1])


NO_MODEL = torch.nn.Linear(2, 2)
REFUSED = {
    "train, no model": lambda text: train(NO_MODEL, text, 1),
    "train, nothing": lambda text: train(None, text, 1, warmup=0),
    "evaluate, no model": lambda text: evaluate(NO_MODEL, text),
    "evaluate, nothing": lambda text: evaluate(None, text),
    "pack, nothing": lambda text: pack(None, ["a"]),
    "pack, a name": lambda text: pack("gpt2", ["a"]),
    "on_step": lambda text: train(model_of(), text, 1, 1, warmup=0, on_step=3),
    "bf16 yes": lambda text: train(model_of(), text, 1, 1, warmup=0, bf16="yes"),
    "bf16 None": lambda text: train(model_of(), text, 1, 1, warmup=0, bf16=None),
    "a huge peak": lambda text: train(model_of(), text, 1, 1, warmup=0, peak=10**400),
    "before": lambda text: windows(text, 4, torch.tensor([-1])),
    "behind": lambda text: windows(text, 4, torch.tensor([396])),
    "a list": lambda text: windows(text, 4, [1]),
    "floats": lambda text: windows(text, 4, torch.tensor([1.0])),
    "one": lambda text: windows(text, 4, torch.tensor(1)),
    "step 2": lambda text: batch(text, 2, 4, 0, "2"),
    "step 2.7": lambda text: batch(text, 2, 4, 0, 2.7),
    "step None": lambda text: batch(text, 2, 4, 0, None),
    "weight None": lambda text: bigram_loss(text, text, 31, None),
    "weight True": lambda text: bigram_loss(text, text, 31, True),
    "vocabulary 31.0": lambda text: bigram_loss(text, text, 31.0),
    "vocabulary 2**31": lambda text: bigram_loss(text, text, 2**31),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_no_sense_is_refused_before_any_work(name):
    with patch("gpt3lib.training.make_optimizer", side_effect=AssertionError), pytest.raises(TrainingError):
        REFUSED[name](text_of(400))


def test_the_last_window_is_one():
    text = text_of(400)
    assert torch.equal(windows(text, 4, torch.tensor([0, 395]))[1][1], text[-4:])


def test_evaluate_gives_each_part_its_mode_back_even_after_an_error():
    model = model_of().train()
    model.blocks[0].eval()
    before = [part.training for part in model.modules()]
    evaluate(model, text_of(400), 2)
    assert [part.training for part in model.modules()] == before
    with patch.object(model, "loss", side_effect=KeyError), pytest.raises(KeyError):
        evaluate(model, text_of(400), 2)
    assert [part.training for part in model.modules()] == before
