"""The recipe against the paper's words computed anew, torch's own optimizer and clipping, and big batches."""

import copy
import json
import math
from dataclasses import asdict, replace
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from gpt3lib.cache import generate
from gpt3lib.generation import generate_slowly
from gpt3lib.model import GPT, GPTConfig
from gpt3lib.recipe import (
    TABLE_BATCHES,
    Recipe,
    RecipeError,
    accumulate,
    micro_batches,
    noise_scale,
    peak_by_size,
    recomputed,
    squared_lengths,
    update,
)
from gpt3lib.sizes import TABLE_2_1
from gpt3lib.training import loss_of, make_optimizer

TINY = GPTConfig(vocab_size=31, n_ctx=8, n_layers=4, d_model=16, n_heads=2, d_head=8, bandwidth=4)

# Table 2.1 of the paper, typed anew: batch in multiples of 2,048 tokens, learning rate; and our length of the ramp
PAPER = {
    "gpt3-125m": (256, "6.0e-4", 4),
    "gpt3-350m": (256, "3.0e-4", 4),
    "gpt3-760m": (256, "2.5e-4", 4),
    "gpt3-1.3b": (512, "2.0e-4", 6),
    "gpt3-2.7b": (512, "1.6e-4", 6),
    "gpt3-6.7b": (1024, "1.2e-4", 8),
    "gpt3-13b": (1024, "1.0e-4", 8),
    "gpt3-175b": (1536, "0.6e-4", 12),
}
M, B = 10**6, 10**9
PLACES = [0, 1, 32_768, M, 100 * M, 374_999_999, 375 * M, 375 * M + 1, B, 2 * B, 4 * B - 1, 4 * B, 7 * B]
PLACES += [12 * B, 50 * B, 130 * B, 200 * B, 260 * B - 1, 260 * B, 300 * B]


def model_of(seed: int = 0, config: GPTConfig = TINY) -> GPT:
    return GPT(config, seed)


def batch_of(count: int, seed: int = 0, config: GPTConfig = TINY) -> tuple[torch.Tensor, torch.Tensor]:
    dice = torch.Generator().manual_seed(seed)
    tokens = torch.randint(config.vocab_size, (count, config.n_ctx + 1), generator=dice)
    return tokens[:, :-1], tokens[:, 1:]


def recipe_of(n_tokens=40_000, peak=1e-2, batch_tokens=512, **changes) -> Recipe:
    return Recipe.scaled(n_tokens, peak, batch_tokens, **changes)


def grads_of(model: nn.Module) -> list[torch.Tensor]:
    return [p.grad.clone() for p in model.parameters()]


def largest_gap(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    return max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))


# --- the clock -------------------------------------------------------------------------------------------------------


def rate_in_paper(tokens: int, peak: str) -> float:
    """The closed form, with another half of the cosine, (1 + cos x) / 2 = cos²(x / 2), and exact fractions."""
    part = Fraction(peak)
    if tokens < 375 * M:
        return float(part * tokens / (375 * M))
    progress = Fraction(min(tokens, 260 * B) - 375 * M, 260 * B - 375 * M)
    return float(part) * (1 / 10 + 9 / 10 * math.cos(math.pi / 2 * float(progress)) ** 2)


def sequences_in_paper(tokens: int, full: int, ramp: int) -> int:
    """The straight line from 16 sequences to the full batch, cut to whole sequences."""
    return math.floor(16 + (full - 16) * min(Fraction(1), Fraction(tokens, ramp * B)))


def test_there_are_twenty_positions_and_eight_sizes():
    assert len(PLACES) == 20 and list(PAPER) == list(TABLE_2_1) == list(TABLE_BATCHES)


@pytest.mark.parametrize("name", PAPER)
def test_schedules_equal_the_closed_form(name):
    recipe, (full, peak, ramp) = Recipe.from_name(name), PAPER[name]
    for tokens in PLACES:
        assert recipe.learning_rate(tokens) == pytest.approx(rate_in_paper(tokens, peak), rel=1e-12, abs=1e-18)
        assert recipe.batch_size(tokens, 2048) == sequences_in_paper(tokens, full, ramp)
    assert recipe.batch_tokens == 2048 * full and recipe.first_batch_tokens == 32_768
    assert recipe.peak == float(peak) and recipe.n_tokens == 300 * B


def test_what_appendix_b_says_of_every_size():
    for name in PAPER:
        recipe = Recipe.from_name(name)
        assert (recipe.betas, recipe.eps, recipe.clip, recipe.weight_decay) == ((0.9, 0.95), 1e-8, 1.0, 0.1)
        assert (recipe.warmup_tokens, recipe.decay_tokens) == (375 * M, 260 * B)
        assert 4 * B <= recipe.ramp_tokens <= 12 * B
        assert recipe.learning_rate(375 * M) == recipe.peak
        assert recipe.learning_rate(260 * B) == recipe.learning_rate(300 * B) == pytest.approx(recipe.peak / 10)


@given(st.integers(0, 300 * B), st.integers(0, 300 * B))
def test_the_rate_rises_then_falls_and_the_batch_only_grows(a, b):
    low, high = sorted((a, b))
    recipe = Recipe.from_name("gpt3-13b")
    if high <= recipe.warmup_tokens:
        assert recipe.learning_rate(low) <= recipe.learning_rate(high)
    if low >= recipe.warmup_tokens:
        assert recipe.learning_rate(low) >= recipe.learning_rate(high) > 0
    assert 16 <= recipe.batch_size(low, 2048) <= recipe.batch_size(high, 2048) <= 1024


RUNS = st.fixed_dictionaries(
    {
        "n_tokens": st.integers(200, 9_000),
        "batch_tokens": st.integers(1, 3_000),
        "ramp_step": st.integers(1, 5),
        "n_ctx": st.integers(1, 200),
    }
)


@settings(max_examples=200, deadline=None)
@given(RUNS, st.floats(0, 1), st.integers(0, 40))
def test_steps_read_every_sequence_once_and_can_begin_anywhere(numbers, ramp, first):
    n_ctx = numbers.pop("n_ctx")
    recipe = Recipe.scaled(peak=0.1, ramp_tokens=int(ramp * numbers["n_tokens"]), **numbers)
    steps = list(recipe.steps(n_ctx))
    taken = 0
    for number, step in enumerate(steps):
        assert step.number == number and step.tokens == taken * n_ctx and step.n_sequences >= 1
        cut = min(recipe.batch_size(step.tokens, n_ctx), numbers["n_tokens"] // n_ctx - taken)
        assert step.n_sequences == cut
        taken += step.n_sequences
        assert step.rate == recipe.learning_rate(taken * n_ctx)
    assert taken == numbers["n_tokens"] // n_ctx
    assert list(recipe.steps(n_ctx, first)) == steps[first:] and recipe.n_steps(n_ctx) == len(steps)


@settings(max_examples=200, deadline=None)
@given(RUNS, st.floats(0, 1))
def test_the_batch_grows_by_ramp_step_and_ends_full(numbers, place):
    n_ctx, whole = numbers["n_ctx"], numbers["ramp_step"]
    recipe = Recipe.scaled(numbers["n_tokens"], 0.1, numbers["batch_tokens"], ramp_step=whole)
    full = max(1, recipe.batch_tokens // n_ctx)
    size = recipe.batch_size(int(place * recipe.n_tokens), n_ctx)
    assert 1 <= size <= full and (size % whole == 0 or size == full)
    assert recipe.batch_size(recipe.ramp_tokens, n_ctx) == full


def test_the_size_of_a_batch_is_exact_where_floats_are_not():
    recipe = replace(Recipe.from_name("gpt3-175b"), ramp_tokens=12 * B + 1, first_batch_tokens=2048)
    for tokens in (7 * 10**9 + 3, 11_999_999_999, 12 * B):
        exact = 2048 + Fraction((1536 * 2048 - 2048) * tokens, 12 * B + 1)
        assert recipe.batch_size(tokens, 1) == math.floor(exact)


def test_the_paper_s_warm_up_in_steps():
    assert int(375 * M / 32_768) == 11_444 and int(375 * M / 524_288) == 715
    recipe = Recipe.from_name("gpt3-125m", ramp_tokens=0)
    assert sum(step.tokens < 375 * M for step in recipe.steps(2048)) == 716  # the batch is full from the start


def test_number_of_steps_without_a_ramp_is_a_division():
    recipe = Recipe.from_name("gpt3-175b", ramp_tokens=0)
    assert recipe.n_steps(2048) == math.ceil(300 * B / (1536 * 2048))
    assert recipe.n_steps(2048) < Recipe.from_name("gpt3-175b").n_steps(2048)


def test_scaled_keeps_the_proportions_of_the_smallest_row():
    paper, half = Recipe.from_name("gpt3-125m"), Recipe.scaled(150 * B, 6e-4, 256 * 2048)
    assert Recipe.scaled(300 * B, 6e-4, 256 * 2048) == paper
    for name in ("warmup_tokens", "decay_tokens", "ramp_tokens"):
        assert 2 * getattr(half, name) == getattr(paper, name)
    assert Recipe.scaled(150 * B, 6e-4, 256 * 2048, clip=2).clip == 2


def test_a_recipe_survives_json_and_takes_whole_floats():
    recipe = Recipe.from_name("gpt3-6.7b", n_tokens=300e9)
    again = Recipe(**json.loads(json.dumps(asdict(recipe))))
    assert again == recipe and type(recipe.n_tokens) is int and hash(again) == hash(recipe)


def test_peak_by_size_is_the_least_squares_line_of_table_2_1():
    with torch.device("meta"):
        counts = [GPT(GPTConfig.from_name(name)).num_params() for name in PAPER]
    x = torch.tensor(counts).double().log()
    y = torch.tensor([float(peak) for _, peak, _ in PAPER.values()]).double().log()
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    for n in (1e5, 1e7, 1e9, 1e11):
        line = (y.mean() + slope * (math.log(n) - x.mean())).exp()
        assert peak_by_size(n) == pytest.approx(line.item(), rel=0.01)


# --- one step --------------------------------------------------------------------------------------------------------


def plain_step(model, optimizer, inputs, targets, rate, clip):
    """What every loop in the world does."""
    optimizer.zero_grad()
    loss = model.loss(inputs, targets)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    return loss.item(), norm.item()


def test_update_is_the_plain_step_to_the_last_bit():
    ours, theirs = model_of(), model_of()
    a, b = recipe_of().optimizer(ours), make_optimizer(theirs)
    for step in range(5):
        x, y = batch_of(6, seed=step)
        loss, norm = update(ours, a, [(x, y)], rate=0.01)
        assert (loss.item(), norm.item()) == plain_step(theirs, b, x, y, 0.01, 1.0)
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters()))


def test_the_optimizer_is_adamw_as_the_recipe_says():
    """Five steps in float64 against the formulas of the two papers, on every parameter."""
    recipe = recipe_of(weight_decay=0.3, betas=(0.8, 0.97), eps=1e-4, clip=0.5)
    model = model_of().double()
    optimizer = recipe.optimizer(model)
    ours = [p.detach().clone() for p in model.parameters()]
    m, v = ([torch.zeros_like(p) for p in ours] for _ in range(2))
    for t in range(1, 6):
        x, y = batch_of(4, seed=t)
        _, norm = update(model, optimizer, [(x, y)], rate=0.02, clip=recipe.clip)
        for i, g in enumerate(grads_of(model)):  # clipped ones
            m[i] = 0.8 * m[i] + 0.2 * g
            v[i] = 0.97 * v[i] + 0.03 * g**2
            decay = 0.3 if g.dim() == 2 else 0.0
            stride = m[i] / (1 - 0.8**t) / ((v[i] / (1 - 0.97**t)).sqrt() + 1e-4)
            ours[i] = ours[i] * (1 - 0.02 * decay) - 0.02 * stride
        length = math.sqrt(sum(g.square().sum().item() for g in grads_of(model)))
        assert norm > 0.5 and length == pytest.approx(0.5, abs=1e-5)
    assert largest_gap(ours, list(model.parameters())) < 1e-12


@pytest.mark.parametrize("clip", [1e-3, 1.0, 1e3, math.inf])
def test_the_norm_is_that_before_clipping(clip):
    model, (x, y) = model_of(), batch_of(6)
    _, norm = update(model, recipe_of().optimizer(model), [(x, y)], 0.01, clip=clip)
    whole = torch.autograd.grad(model_of().loss(x, y), list(model_of().parameters()), allow_unused=True)
    assert all(g is None for g in whole)  # another model's parameters: nothing to see there
    fresh = model_of()
    fresh.loss(x, y).backward()
    length = math.sqrt(sum(g.double().square().sum().item() for g in grads_of(fresh)))
    assert norm.item() == pytest.approx(length, rel=1e-5)
    after = math.sqrt(sum(g.double().square().sum().item() for g in grads_of(model)))
    assert after == pytest.approx(min(length, clip), rel=1e-4)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=5))
def test_micro_batches_of_any_sizes_are_the_big_batch(sizes):
    x, y = batch_of(sum(sizes))
    whole, pieces = model_of().double(), model_of().double()
    whole.loss(x, y).backward()
    loss = accumulate(pieces, zip(x.split(sizes), y.split(sizes)))
    assert loss.item() == pytest.approx(whole.loss(x, y).item(), abs=1e-12)
    assert largest_gap(grads_of(whole), grads_of(pieces)) < 1e-12


def test_sequences_of_different_lengths_count_by_their_tokens():
    x, y = batch_of(2)
    parts = [(x[:1], y[:1]), (x[1:, :3], y[1:, :3])]
    model = model_of().double()
    mean = (8 * model.loss(*parts[0]) + 3 * model.loss(*parts[1])) / 11
    assert accumulate(model, parts).item() == pytest.approx(mean.item(), abs=1e-12)


def test_the_mean_of_unequal_means_is_another_gradient():
    x, y = batch_of(5)
    right, wrong = model_of().double(), model_of().double()
    right.loss(x, y).backward()
    for inputs, targets in zip(x.split([4, 1]), y.split([4, 1])):
        (wrong.loss(inputs, targets) / 2).backward()
    assert largest_gap(grads_of(right), grads_of(wrong)) > 1e-3


def test_targets_that_are_not_told_do_not_count():
    def loss_of_told(model, inputs, targets, bf16=False):
        told = targets >= 0
        logits = model(inputs)[told]
        return torch.nn.functional.cross_entropy(logits, targets[told])

    x, y = batch_of(4)
    y = y.clone()
    y[0, 1:], y[3, :2] = -1, -1  # the first pair of rows tells less than the second
    whole, pieces = model_of().double(), model_of().double()
    loss = loss_of_told(whole, x, y)
    loss.backward()
    found = accumulate(pieces, micro_batches(x, y, 2), loss_of=loss_of_told)
    assert found.item() == pytest.approx(loss.item(), abs=1e-12)
    assert largest_gap(grads_of(whole), grads_of(pieces)) < 1e-12


def test_micro_batches_lose_nothing():
    x, y = batch_of(7)
    pairs = micro_batches(x, y, 3)
    assert [len(a) for a, _ in pairs] == [3, 3, 1]
    assert torch.equal(torch.cat([a for a, _ in pairs]), x) and torch.equal(torch.cat([b for _, b in pairs]), y)


def test_update_forgets_the_gradients_of_the_step_before():
    model, (x, y) = model_of(), batch_of(4)
    optimizer = recipe_of().optimizer(model)
    update(model, optimizer, [(x, y)], rate=0.0, clip=math.inf)
    first = grads_of(model)
    update(model, optimizer, [(x, y)], rate=0.0, clip=math.inf)
    assert largest_gap(first, grads_of(model)) == 0


def test_update_passes_bf16_on_and_takes_another_loss():
    model, (x, y), seen = model_of(), batch_of(4), []

    def spy(model, inputs, targets, bf16):
        seen.append((len(inputs), bf16))
        return loss_of(model, inputs, targets, bf16)

    update(model, recipe_of().optimizer(model), micro_batches(x, y, 3), 0.01, bf16=True, loss_of=spy)
    assert seen == [(3, True), (1, True)]


def test_a_compiled_loss_trains_the_same():
    losses = []
    for compute in (loss_of, torch.compile(loss_of, backend="aot_eager")):
        model = model_of()
        optimizer = recipe_of().optimizer(model)
        pairs = [micro_batches(*batch_of(4, seed), 2) for seed in range(4)]
        losses.append([update(model, optimizer, pair, 0.01, loss_of=compute)[0].item() for pair in pairs])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


class NoReading(TorchDispatchMode):
    """Raises where a number is read, which on a GPU waits for everything before it."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert "_local_scalar_dense" not in str(function), "a number was read"
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("clip", [1.0, math.inf])
def test_update_reads_no_number(clip):
    model = nn.Linear(3, 5)
    optimizer = recipe_of().optimizer(model)
    x, y = torch.randn(4, 3), torch.randint(5, (4,))

    def loss(model, inputs, targets, bf16):
        return nn.functional.cross_entropy(model(inputs), targets)

    before = model.weight.detach().clone()
    with NoReading():
        for _ in range(3):
            update(model, optimizer, micro_batches(x, y, 3), 0.01, clip=clip, loss_of=loss)
    assert not torch.equal(before, model.weight)
    with NoReading(), pytest.raises(AssertionError, match="a number was read"):
        x.sum().item()


def state_of(model, optimizer) -> list[torch.Tensor]:
    """Copies of all numbers of a model and its optimizer."""
    states = [value for state in optimizer.state_dict()["state"].values() for value in state.values()]
    return [tensor.detach().clone() for tensor in [*model.parameters(), *states]]


def spoiled(number):
    return lambda model, inputs, targets, bf16: loss_of(model, inputs, targets) * number


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("way", [math.nan, math.inf, "refused"])
def test_a_step_that_is_not_taken_changes_nothing(way, fused):
    model, pairs = model_of(), [batch_of(4)]
    optimizer = recipe_of().optimizer(model)
    for group in optimizer.param_groups:
        group["fused"] = fused
    update(model, optimizer, pairs, 0.01)
    before = state_of(model, optimizer)
    ways = {"accept": lambda loss, norm: False} if way == "refused" else {"loss_of": spoiled(way)}
    loss, norm = update(model, optimizer, pairs, 0.01, **ways)
    assert math.isfinite(loss + norm) == (way == "refused")
    assert all(torch.equal(a, b) for a, b in zip(before, state_of(model, optimizer), strict=True))
    update(model, optimizer, pairs, 0.01)  # and the next one is an ordinary step again
    after = state_of(model, optimizer)
    assert all(tensor.isfinite().all() for tensor in after) and not torch.equal(before[0], after[0])


def test_accept_hears_loss_and_norm_before_anything_moves():
    model, pairs, heard = model_of(), [batch_of(4)], []
    before = model.embeddings.wte.weight.detach().clone()

    def accept(loss, norm):
        heard.append((loss.item(), norm.item(), torch.equal(before, model.embeddings.wte.weight)))
        return True

    loss, norm = update(model, recipe_of().optimizer(model), pairs, 0.01, accept=accept)
    assert heard == [(loss.item(), norm.item(), True)]
    assert not torch.equal(before, model.embeddings.wte.weight)


# --- half precision --------------------------------------------------------------------------------------------------


def test_bf16_multiplies_in_bfloat16_and_keeps_float32():
    model, (x, y), kinds = model_of(), batch_of(4), {}
    for name, part in model.named_modules():
        part.register_forward_hook(lambda part, args, out, name=name: kinds.update({name: out.dtype}))
    optimizer = recipe_of().optimizer(model)
    loss, norm = update(model, optimizer, [(x, y)], 0.01, bf16=True)
    assert {kinds[f"blocks.0.mlp.{part}"] for part in ("up", "down", "activation")} == {torch.bfloat16}
    assert kinds["blocks.0.ln_1"] == kinds["blocks.0"] == kinds["ln_f"] == loss.dtype == norm.dtype == torch.float32
    assert {tensor.dtype for tensor in state_of(model, optimizer) + grads_of(model)} == {torch.float32}
    exact = model_of().loss(x, y).item()
    assert 0 < abs(loss.item() - exact) < 0.02


# --- a block that is computed twice ----------------------------------------------------------------------------------


def kept(compute) -> int:
    """The bytes that autograd saves for the backward pass while `compute` runs, parameters included."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = (tensor, tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = compute()
    assert loss.requires_grad
    return sum(nbytes for _, nbytes in storages.values())


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("every", [1, 2, 3])
def test_recomputed_gradients_are_the_same_and_less_is_kept(every, bf16):
    model, (x, y) = model_of(), batch_of(6)
    whole = kept(lambda: loss_of(model, x, y, bf16))
    loss_of(model, x, y, bf16).backward()
    plain = grads_of(model)
    model.zero_grad()
    with recomputed(model, every) as same:
        assert same is model
        assert kept(lambda: loss_of(model, x, y, bf16)) < whole
        model.zero_grad()
        loss_of(model, x, y, bf16).backward()
    assert largest_gap(plain, grads_of(model)) == 0


def test_what_is_kept_falls_with_the_number_of_blocks_recomputed():
    model, (x, y) = model_of(), batch_of(6)
    sizes = []
    for every in (4, 2, 1):
        with recomputed(model, every):
            sizes.append(kept(lambda: model.loss(x, y)))
    assert kept(lambda: model.loss(x, y)) > sizes[0] > sizes[1] > sizes[2]


def test_recomputed_leaves_the_model_as_it_was():
    model = model_of()
    names = list(model.state_dict())
    with pytest.raises(RuntimeError, match="stop"), recomputed(model):
        assert list(model.state_dict()) == names
        raise RuntimeError("stop")
    assert not any("forward" in vars(block) for block in model.blocks)
    with recomputed(model):  # and again
        pass


def test_importing_the_recipe_changes_no_method():
    assert model_of().blocks[0].forward.__func__.__module__ == "gpt3lib.model"


def test_a_copy_of_a_recomputed_model_is_on_its_own():
    model, (x, y) = model_of(), batch_of(4)
    with recomputed(model):
        twin = copy.deepcopy(model)
    with torch.no_grad():
        model.blocks[0].mlp.up.weight.zero_()
    assert twin.loss(x, y).item() == model_of().loss(x, y).item()


def test_a_recomputed_model_still_writes():
    model, prompt = model_of(), batch_of(1)[0][:, :3]
    with recomputed(model):
        fast = generate(model, prompt, 5, temperature=0)
        slow = generate_slowly(model, prompt, 5, temperature=0)
    assert torch.equal(fast, slow)
    assert torch.equal(slow, generate_slowly(model_of(), prompt, 5, temperature=0))


def test_a_compiled_loss_recomputes_too():
    graphs, model, (x, y) = [], model_of(), batch_of(4)

    def look(graph, inputs):
        graphs.append(graph.print_readable(print_output=False))
        return graph

    compiled = torch.compile(loss_of, backend=look)
    compiled(model, x, y).backward()
    plain = grads_of(model)
    model.zero_grad()
    with recomputed(model):
        compiled(model, x, y).backward()
    assert largest_gap(plain, grads_of(model)) < 1e-6
    assert ["checkpoint" in graph for graph in graphs] == [False, True]


# --- the noise scale -------------------------------------------------------------------------------------------------


def test_noise_scale_of_expected_lengths_is_exact():
    """E|g_b|² = |G|² + tr(Σ) / b ([M18] App. A.1)."""
    for signal, noise, small, big in ((1.0, 5.0, 1, 2), (0.3, 40.0, 64, 4096), (2.0, 0.0, 1, 10)):
        lengths = signal + noise / small, signal + noise / big
        assert noise_scale(*lengths, small, big) == pytest.approx(noise / signal, rel=1e-9)


def test_noise_that_hides_the_gradient_is_infinite():
    assert noise_scale(1.0, 0.1, 1, 10) == math.inf and noise_scale(1.0, 2.0, 1, 10) == 0.0


class Middle(nn.Module):
    """Half the squared distance to the inputs: its gradient at w is w - mean(x), its noise the inputs' variance."""

    def __init__(self, d: int):
        super().__init__()
        self.w, self.b = nn.Parameter(torch.zeros(d)), nn.Parameter(torch.zeros(d))


def half_square(model, inputs, targets, bf16):
    return ((model.w - inputs).square().sum(-1) + (model.b - targets).square().sum(-1)).mean() / 2


def test_the_noise_scale_of_a_known_cloud():
    dice = torch.Generator().manual_seed(0)
    x, y = (torch.randn(40_000, 10, generator=dice) for _ in range(2))
    small, big = squared_lengths(Middle(10), micro_batches(2 * x + 1, y, 8), loss_of=half_square)
    # gradient (1 … 1, 0 … 0): |G|² = 10; noise: ten numbers of variance 4, ten of variance 1
    assert noise_scale(small, big, 8, 40_000) == pytest.approx(5.0, rel=0.05)
    assert big == pytest.approx(10, rel=0.02) and small == pytest.approx(10 + 50 / 8, rel=0.02)


def test_squared_lengths_are_those_of_the_gradients():
    model, (x, y) = model_of().double(), batch_of(6)
    small = []
    for inputs, targets in micro_batches(x, y, 2):
        fresh = model_of().double()
        fresh.loss(inputs, targets).backward()
        small.append(sum(g.square().sum().item() for g in grads_of(fresh)))
    whole = model_of().double()
    whole.loss(x, y).backward()
    big = sum(g.square().sum().item() for g in grads_of(whole))
    found = squared_lengths(model, micro_batches(x, y, 2))
    assert found == pytest.approx((sum(small) / 3, big), rel=1e-5)
    assert all(p.grad is None for p in model.parameters())


def test_frozen_parameters_have_no_part_in_it():
    model, (x, y) = model_of().double(), batch_of(4)
    model.embeddings.wpe.weight.requires_grad_(False)
    frozen = model.embeddings.wpe.weight.clone()
    whole = torch.autograd.grad(model.loss(x, y), [p for p in model.parameters() if p.requires_grad])
    big = sum(g.square().sum().item() for g in whole)
    assert squared_lengths(model, micro_batches(x, y, 2))[1] == pytest.approx(big, rel=1e-6)
    update(model, recipe_of().optimizer(model), [(x, y)], 0.1)
    assert torch.equal(frozen, model.embeddings.wpe.weight)


# --- a run -----------------------------------------------------------------------------------------------------------

# the losses of steps 0, 10 … 100 of this run: to the last digit, give or take one
GOLDEN = [3.622, 4.146, 3.865, 3.618, 3.0, 2.433, 1.859, 1.742, 1.576, 1.477, 1.447]


def losses_of(first: int = 0, last: int = 101, model=None, optimizer=None) -> list[float]:
    config = GPTConfig(64, 16, n_layers=2, d_model=32, n_heads=2, d_head=16, bandwidth=8)
    recipe = Recipe.scaled(40_000, 1e-2, 512, warmup_tokens=4_000, ramp_tokens=10_000)
    model = model or GPT(config).double()  # so that no processor's rounding is heard
    optimizer = optimizer or recipe.optimizer(model)
    dice = torch.Generator().manual_seed(7)
    a, b = torch.randint(64, (2, 2500), generator=dice)  # progressions a, a + b, a + 2 b … modulo 64
    tokens = (a[:, None] + b[:, None] % 5 * torch.arange(17)) % 64
    losses = []
    for step in recipe.steps(16, first):
        if step.number == last:
            break
        place = step.tokens // 16
        rows = tokens[place : place + step.n_sequences]
        loss, _ = update(model, optimizer, micro_batches(rows[:, :-1], rows[:, 1:], 8), step.rate, recipe.clip)
        losses.append(loss.item())
    return losses


def test_a_hundred_steps_cost_what_they_did_when_this_was_written():
    losses = losses_of()
    assert len(losses) == 101
    assert losses[::10] == pytest.approx(GOLDEN, abs=1e-3)


def test_a_run_can_be_cut_anywhere():
    config = GPTConfig(64, 16, n_layers=2, d_model=32, n_heads=2, d_head=16, bandwidth=8)
    model = GPT(config).double()
    optimizer = Recipe.scaled(40_000, 1e-2, 512).optimizer(model)
    parts = losses_of(0, 13, model, optimizer) + losses_of(13, 40, model, optimizer)
    assert parts == losses_of(0, 40)


# --- what is refused -------------------------------------------------------------------------------------------------

GOOD = {"n_tokens": 300 * B, "peak": 1e-3, "batch_tokens": 524_288}
WRONG = [
    ({"n_tokens": 0}, "n_tokens is 0; it must be a whole number, 1 or more"),
    ({"n_tokens": 1.5}, "n_tokens is 1.5"),
    ({"n_tokens": math.inf}, "n_tokens is inf"),
    ({"n_tokens": math.nan}, "n_tokens is nan"),
    ({"n_tokens": True}, "n_tokens is True"),
    ({"n_tokens": 10**400}, "n_tokens is too large for a float"),
    ({"n_tokens": -(10**400)}, "n_tokens is -1000"),
    ({"n_tokens": "300B"}, "n_tokens is '300B'"),
    ({"n_tokens": B}, "decay_tokens is 260,000,000,000, but n_tokens is 1,000,000,000"),
    ({"batch_tokens": 1024}, "first_batch_tokens is 32,768, but batch_tokens is 1,024"),
    ({"batch_tokens": -1}, "batch_tokens is -1"),
    ({"first_batch_tokens": 0}, "first_batch_tokens is 0"),
    ({"warmup_tokens": 261 * B}, "warmup_tokens is 261,000,000,000, but decay_tokens"),
    ({"warmup_tokens": -1}, "warmup_tokens is -1; it must be a whole number, 0 or more"),
    ({"ramp_tokens": None}, "ramp_tokens is None"),
    ({"ramp_step": 0}, "ramp_step is 0"),
    ({"peak": 0}, "peak is 0; it must be a number above 0"),
    ({"peak": "6e-4"}, "peak is '6e-4'"),
    ({"peak": math.nan}, "peak is nan"),
    ({"peak": 10**400}, "peak is 1000"),
    ({"clip": 0}, "clip is 0; it must be a length above 0, or math.inf for none"),
    ({"clip": math.nan}, "clip is nan"),
    ({"weight_decay": -0.1}, "weight_decay is -0.1"),
    ({"weight_decay": 10**400}, "weight_decay is 1000"),
    ({"eps": math.inf}, "eps is inf"),
    ({"betas": (0.9,)}, "betas is (0.9,); it must be two numbers"),
    ({"betas": 0.9}, "betas is 0.9; it must be two numbers"),
    ({"betas": (0.9, 1.0)}, "betas is (0.9, 1.0); both must be from 0 to below 1"),
    ({"betas": ("0.9", 0.9)}, "both must be from 0 to below 1"),
]


@pytest.mark.parametrize("changes, words", WRONG, ids=lambda value: str(value)[:40])
def test_a_recipe_that_makes_no_sense_is_refused(changes, words):
    with pytest.raises(RecipeError) as error:
        Recipe(**GOOD | changes)
    assert words in str(error.value)


X, Y = batch_of(4)
CALLS = [
    (lambda: Recipe.from_name("gpt3-1m"), "Table 2.1 has no 'gpt3-1m'; there are gpt3-125m, "),
    (lambda: Recipe.from_name(["gpt3-125m"]), "Table 2.1 has no ['gpt3-125m']; there are"),
    (lambda: Recipe.scaled(0, 0.1, 10), "n_tokens is 0"),
    (lambda: Recipe.scaled(100, 0.1, "10"), "batch_tokens is '10'"),
    (lambda: recipe_of().learning_rate(-1), "tokens is -1; the clock starts at 0"),
    (lambda: recipe_of().learning_rate(math.nan), "tokens is nan"),
    (lambda: recipe_of().batch_size(-1, 8), "tokens is -1"),
    (lambda: recipe_of().batch_size(0, 0), "n_ctx is 0"),
    (lambda: recipe_of().steps(2.0), "n_ctx is 2.0"),
    (lambda: recipe_of().steps(8, -1), "first is -1"),
    (lambda: recipe_of(n_tokens=100).steps(101), "n_tokens is 100, less than a sequence of 101"),
    (lambda: peak_by_size(0), "n_params is 0; it must be a number above 0"),
    (lambda: micro_batches(X, Y, 0), "size is 0"),
    (lambda: accumulate(model_of(), []), "0 micro-batches; 1 are the least"),
    (lambda: accumulate(model_of(), [X]), "must be a pair (inputs, targets), not a Tensor"),
    (lambda: accumulate(model_of(), (X, Y)), "for a single one use [(inputs, targets)]"),
    (lambda: update(model_of(), None, [(X, Y)], 0.1, clip=-1), "clip is -1"),
    (lambda: squared_lengths(model_of(), [(X, Y)]), "1 micro-batches; 2 are the least"),
    (lambda: squared_lengths(model_of(), micro_batches(X, Y, 3)), "micro-batches of different sizes"),
    (lambda: noise_scale(1, 1, 2, 2), "b_small is 2, b_big 2"),
    (lambda: noise_scale(1, 1, 0, 2), "b_small is 0, b_big 2"),
    (lambda: recomputed(nn.Linear(2, 2)).__enter__(), "model is a Linear; it must be a GPT"),
    (lambda: recomputed(model_of(), 0).__enter__(), "every is 0"),
    (lambda: recomputed(model_of(), -1).__enter__(), "every is -1"),
    (lambda: recomputed(model_of(), 1.5).__enter__(), "every is 1.5"),
]


@pytest.mark.parametrize("call, words", CALLS, ids=[words[:40] for _, words in CALLS])
def test_calls_that_make_no_sense_are_refused(call, words):
    with pytest.raises(RecipeError) as error:
        call()
    assert words in str(error.value)


def test_recomputing_twice_is_refused_and_leaves_the_first():
    model = model_of()
    with recomputed(model):
        with pytest.raises(RecipeError, match="recomputed already"), recomputed(model):
            pass
        assert all("forward" in vars(block) for block in model.blocks)
