"""The race is fair: all contestants compute the same thing, and FLOPs are counted as torch counts them."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import plain_gpt
import race
from gpt3lib.cache import KVCache, OneStep
from gpt3lib.model import GPT, GPTConfig
from oracles import to_gpt2


def small(**changes):
    shape = {"vocab_size": 61, "n_ctx": 24, "n_layers": 3, "d_model": 32, "n_heads": 4, "d_head": 8, "bandwidth": 5}
    torch.manual_seed(0)
    return GPT(GPTConfig(**shape | changes))


def test_the_plain_gpt_is_the_same_model():
    ours = small(attention=("dense",))
    plain = plain_gpt.PlainGPT(61, 24, 3, 32, 4)
    with torch.no_grad():
        for name, table in (("wte", ours.embeddings.wte), ("wpe", ours.embeddings.wpe)):
            getattr(plain, name).weight.copy_(table.weight)
        for mine, block in zip(plain.blocks, ours.blocks):
            three = [getattr(block.attention, name) for name in ("wq", "wk", "wv")]
            mine.qkv.weight.copy_(torch.cat([linear.weight for linear in three]))
            for theirs, linear in (
                (mine.out, block.attention.wo),
                (mine.up, block.mlp.up),
                (mine.down, block.mlp.down),
            ):
                theirs.weight.copy_(linear.weight)
                theirs.bias.zero_()
            mine.qkv.bias.zero_()
    x, y = race.text(61, 2, 24)
    torch.testing.assert_close(plain(x), ours(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(plain.loss(x, y), ours.loss(x, y))


def test_the_loss_of_a_transformers_model_is_ours():
    ours = small(attention=("dense",))
    x, y = race.text(61, 2, 24)
    torch.testing.assert_close(race.their_loss(to_gpt2(ours), x, y), ours.loss(x, y))


def test_contestants_have_one_size():
    assert sum(p.numel() for p in race.gpt2(4096, 256).parameters()) == race.ours(4096, 256).num_params()
    neo, ours = race.gpt_neo(4096, 512, 2), race.ours(4096, 512, n_layers=2)
    biases = 3 * 2 * 384  # GPT-Neo has none for queries, keys and values
    assert sum(p.numel() for p in neo.parameters()) == ours.num_params() - biases
    assert neo.config.attention_layers == ["global", "local"] and ours.config.kinds == ("dense", "banded")
    assert neo.config.window_size == ours.config.bandwidth


def test_dense_flops_are_what_torch_counts():
    """In the naive step, with every score computed. Only biases and norms differ: they are in N, but no product."""
    model = small(attention=("dense",))
    x, y = race.text(61, 2, 24)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
    counted, (dense, actual) = counter.get_total_flops(), race.step_flops(model.config, 2, 24)
    in_vectors = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    assert dense - 6 * in_vectors * 2 * 24 == counted and actual < dense
    assert race.step_flops(small(attention=("banded",)).config, 2, 24)[1] < actual


def test_everybody_takes_turns_and_the_first_turn_does_not_count(monkeypatch):
    calls, now = [], iter(range(1000))
    monkeypatch.setattr(race.time, "perf_counter", lambda: next(now))
    seconds = race.race({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3)
    turns = ["".join(calls[i : i + 2]) for i in range(0, 8, 2)]
    assert set(turns) == {"ab", "ba"} and len(calls) == 8 and seconds == {"a": 1, "b": 1}


def test_a_training_step_moves_the_weights_of_ours_and_theirs(monkeypatch):
    monkeypatch.setattr(race, "make_optimizer", lambda model: torch.optim.SGD(model.parameters(), lr=0.1))
    x, y = race.text(61, 2, 24)
    for model in (small(), to_gpt2(small(attention=("dense",)))):
        before = [parameter.detach().clone() for parameter in model.parameters()]
        race.training_step(model, x, y)()
        assert any(not old.equal(new) for old, new in zip(before, model.parameters()))
        assert all(parameter.grad is None for parameter in model.parameters())


def test_one_step_is_what_the_flat_part_times():
    model = small().eval()
    cache, tokens = KVCache(model.config, 24), race.text(61, 1, 9)[0]
    with torch.no_grad():
        model.hidden(tokens[:, :8], cache)
        torch.testing.assert_close(OneStep(model)(tokens[:, 8:], cache), model(tokens)[:, -1], rtol=1e-5, atol=1e-5)


def test_the_peak_is_measured_between_the_contestants():
    turns = []
    peak = race.Peak(sizes=(8,))
    seconds, flops = race.race_with_peak({"a": lambda: turns.append("a"), "b": lambda: turns.append("b")}, 3)
    assert set(seconds) == {"a", "b"} and len(turns) == 8 and flops > 1e8
    peak()
    first = peak.flops
    peak.pairs = []  # a slow moment does not lower it
    peak()
    assert peak.flops == first > 0


def test_bf16_is_left_out_with_the_reason_where_it_is_emulated(monkeypatch, capsys):
    monkeypatch.setattr(race, "race", lambda contestants, rounds: {"float32": 1.0, "bfloat16": 50.0})
    monkeypatch.setattr(race, "step", lambda **options: pytest.fail("it would run for a quarter of an hour"))
    found = race.bf16()
    assert "left out" in capsys.readouterr().out
    assert found["left out"].startswith("a product in bfloat16 takes 50 × one in float32")
    monkeypatch.setattr(race, "race", lambda contestants, rounds: {"float32": 1.0, "bfloat16": 0.5})
    monkeypatch.setattr(race, "step", lambda **options: options)
    assert race.bf16() == {"bf16": True}


def test_without_a_compiler_that_part_is_left_out(monkeypatch, capsys):
    monkeypatch.setattr(race.shutil, "which", lambda name: None)
    assert race.compiled() == {"left out": "no C++ compiler"}
    assert "left out; there is no C++ compiler" in capsys.readouterr().out


def test_a_part_says_what_it_does_before_it_is_measured(monkeypatch, capsys):
    def measured(contestants, rounds):
        assert "training step, 6 × 384" in capsys.readouterr().out
        contestants[""]()
        return dict.fromkeys(contestants, 1.0)

    monkeypatch.setattr(race, "race", measured)
    race.step(rounds=1)
    assert capsys.readouterr().out.count("× gpt3lib") == 3
