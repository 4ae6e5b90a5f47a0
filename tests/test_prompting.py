"""Prompting: problems that anybody draws alike, one look against real writing, intervals, heads that look and heads
that are silenced, and the tool that measures the curves."""

import json
import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import measure_shots
from gpt3lib import prompting, tasks
from gpt3lib.attention import causal_mask
from gpt3lib.cache import generate
from gpt3lib.files import sha256
from gpt3lib.generation import generate_slowly
from gpt3lib.model import GPT, GPTConfig
from gpt3lib.prompting import Problem, Score, ShotError, few_shot_prompts, gaze, n_tracks, silenced, wilson
from gpt3lib.texts import DATA
from gpt3lib.tokenization import Tokenizer

HOME = DATA / "models" / "gpt3-100k"
TOKENIZER = Tokenizer.load(HOME / "merges.txt")
quick = settings(deadline=None, max_examples=40, derandomize=True)


def lively(n_ctx=12, n_layers=2, n_heads=2, d_head=4, vocab_size=11, seed=0, **options):
    """A random model whose logits are far from equal, so that a wrong number changes a token."""
    model = GPT(GPTConfig(vocab_size, n_ctx, n_layers, n_heads * d_head, n_heads, d_head, **options), seed).eval()
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "ln_" not in name:
            torch.nn.init.normal_(parameter, std=0.7)
    return model


def texts(rows):
    return [(TOKENIZER.decode(row.prompt), TOKENIZER.decode(row.answer)) for row in rows]


# ---- problems ----


def test_a_prompt_is_the_paper_s_layout_and_its_answer_ends_with_its_line():
    ((prompt, answer),) = texts(few_shot_prompts(TOKENIZER, "copy", 2, 1))
    start, first, second, question = prompt.split("\n")
    assert start == "<|endoftext|>Copy the words."
    for line in (first, second):
        left, right = line.split(" => ")
        assert left == right
    assert answer == f" {question.removesuffix(' =>')}\n"


@pytest.mark.parametrize("task", ["jsx", tasks.find("jsx")])
def test_looks_reach_through_and_change_nothing_else(task):
    plain = texts(few_shot_prompts(TOKENIZER, task, 2, 3, seed=5))
    for looks, change in (
        ({"described": False}, lambda text: text.replace("Write the component.\n", "")),
        ({"separator": "\n\n"}, lambda text: text.replace("\n", "\n\n")),
        ({"layout": 1}, lambda text: text.replace("\n", "\n[example] ").replace(" =>", " [toCode]")),
    ):
        other = texts(few_shot_prompts(TOKENIZER, task, 2, 3, seed=5, **looks))
        assert other == [(change(prompt), answer) for prompt, answer in plain]


def test_problems_are_a_function_of_seed_task_shots_and_number():
    rows = few_shot_prompts(TOKENIZER, "affix", 3, 6, seed=1)
    assert few_shot_prompts(TOKENIZER, "affix", 3, 2, seed=1, first=4) == rows[4:]
    assert len({tuple(row.prompt) for row in rows}) == 6
    assert few_shot_prompts(TOKENIZER, "affix", 3, 6, seed=2)[0] != rows[0]
    examples, question = tasks.problem(tasks.find("affix"), tasks.Dice(1, "affix", 3, 0), 3)
    assert tasks.is_held_out(question.key) and not any(tasks.is_held_out(example.key) for example in examples)
    assert TOKENIZER.decode(rows[0].prompt[1:]) == tasks.render(tasks.find("affix"), examples, question)


def test_what_does_not_fit_is_refused_with_the_number_that_would():
    rows = few_shot_prompts(TOKENIZER, "html", 9, 1)
    size = n_tracks(rows[0])
    assert few_shot_prompts(TOKENIZER, "html", 9, 1, n_ctx=size) == rows
    with pytest.raises(ShotError, match=f"have {size} tokens.*n_ctx = {size - 1}; at most 8 would"):
        few_shot_prompts(TOKENIZER, "html", 9, 1, n_ctx=size - 1)
    with pytest.raises(ShotError, match="not even the question would"):
        few_shot_prompts(TOKENIZER, "html", 1, 1, n_ctx=10)


@pytest.mark.parametrize("task", ["affix", "jsx", "RW"])
def test_the_largest_size_has_room_for_the_numbers_that_are_measured(task):
    assert max(map(n_tracks, few_shot_prompts(TOKENIZER, task, 32, 20))) <= 1024


@pytest.mark.parametrize("n", [0, -1, 1.5, None, True])
def test_no_problems_are_refused(n):
    with pytest.raises(ShotError, match="n is"):
        few_shot_prompts(TOKENIZER, "copy", 1, n)


# ---- right or wrong ----


def written(model, prompt, n):
    tokens = generate_slowly(model, torch.tensor([prompt]), n, temperature=0)
    return tokens[0, len(prompt) :].tolist()


@quick
@given(st.integers(0, 10**6), st.integers(1, 4), st.booleans())
def test_one_look_says_what_writing_does(seed, n, spoil):
    """Answers that the model itself wrote, some with one token changed."""
    model, dice = lively(seed=seed % 7, bandwidth=3), tasks.Dice(seed)
    rows = []
    for _ in range(5):
        prompt = [dice.below(11) for _ in range(1 + dice.below(7))]
        answer = written(model, prompt, n)
        if spoil and dice.below(2):
            answer[dice.below(n)] = dice.below(11)
        rows.append(Problem(prompt, answer))
    slow = [written(model, row.prompt, n) == row.answer for row in rows]
    for most in (1, 20, 10**4):
        assert prompting.are_right(model, rows, most) == slow
    assert prompting.share_right(model, rows) == sum(slow) / 5
    assert spoil or all(slow)


def test_no_batch_is_larger_than_asked_for(monkeypatch):
    sizes, look = [], prompting.look

    def counted(model, rows):
        sizes.append(len(rows) * max(map(n_tracks, rows)))
        return look(model, rows)

    monkeypatch.setattr(prompting, "look", counted)
    rows = [Problem([1] * n, [2]) for n in (1, 9, 2, 8, 3, 7, 4, 6, 5)]
    prompting.are_right(lively(), rows, 20)
    assert len(sizes) > 1 and max(sizes) <= 20


def test_one_look_says_what_a_trained_model_writes():
    model, tokenizer = GPT.from_pretrained(DATA / "models" / "gpt3-1m"), TOKENIZER
    rows = few_shot_prompts(tokenizer, "jsx", 2, 12)
    said = [prompting.answer(model, tokenizer, tokenizer.decode(row.prompt[1:])) for row in rows]
    slow = [text == tokenizer.decode(row.answer).strip() for text, row in zip(said, rows)]
    assert prompting.are_right(model, rows) == slow and 0 < sum(slow) < 12
    assert prompting.measure_task(model, tokenizer, "jsx", 2, 12) == Score(sum(slow), 12)
    assert prompting.shots_curve(model, tokenizer, "jsx", (2,), 12) == {2: Score(sum(slow), 12)}


def test_measuring_knows_the_window():
    model = GPT(GPTConfig(TOKENIZER.vocab_size, 40, 1, 8, 1, 8))
    with pytest.raises(ShotError, match="n_ctx = 40"):
        prompting.measure_task(model, TOKENIZER, "jsx", 4, 1)


@pytest.mark.parametrize("rows", [[], [Problem([], [1])], [Problem([1], [2]), Problem([1], [])]])
def test_nothing_to_look_at_is_refused(rows):
    with pytest.raises(ShotError):
        prompting.are_right(lively(), rows)


# ---- intervals ----


@quick
@given(st.integers(1, 60).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_s_ends_are_where_the_measured_share_is_just_likely_enough(pair):
    right, n = pair
    low, high = wilson(right, n)
    assert 0 <= low <= right / n <= high <= 1
    for end, outwards in ((low, -1), (high, 1)):
        for step in (1e-6, -1e-6):
            p = end + outwards * step
            if 0 < p < 1:
                assert (abs(right / n - p) > 1.96 * math.sqrt(p * (1 - p) / n)) == (step > 0)


def test_a_score_knows_its_share_and_interval():
    assert Score(3, 4).share == 0.75 and Score(3, 4).interval == wilson(3, 4)


@pytest.mark.parametrize("right, n", [(3, 2), (-1, 5), (0, 0), (1.5, 3), (1, None)])
def test_counts_that_cannot_be_are_refused(right, n):
    with pytest.raises(ShotError):
        wilson(right, n)


# ---- heads ----


def test_gaze_is_what_each_layer_does():
    model, tokens = lively(n_ctx=9, n_layers=3, bandwidth=3), torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8, 9]])
    x = model.embeddings(tokens)
    for block, kind, weights in zip(model.blocks, model.config.kinds, gaze(model, tokens)):
        assert weights.shape == (1, 2, 9, 9) and not weights.requires_grad
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(1, 2, 9))
        assert not weights[..., ~causal_mask(9, 9)].any()
        assert bool(weights[..., 8, :6].any()) == (kind == "dense")
        a, y = block.attention, block.ln_1(x)
        mixed = weights @ a.heads(a.wv(y))
        torch.testing.assert_close(a.wo(mixed.transpose(1, 2).flatten(2)), a(y))
        x = block(x)


def test_copying_scores_are_sums_over_the_places_of_the_next_token():
    model = lively(bandwidth=4)
    rows = [Problem([1, 2, 3, 2, 4], [2, 4, 9]), Problem([5, 6], [6, 5, 7])]
    total, n = torch.zeros(2, 2), 0
    for prompt, answer in rows:
        ids = prompt + answer
        seen = [weights[0] for weights in gaze(model, torch.tensor([ids[:-1]]))]
        for now in range(len(prompt) - 1, len(ids) - 1):
            places = [i for i in range(now + 1) if ids[i] == ids[now + 1]]
            n += bool(places)
            for layer in range(2):
                total[layer] += seen[layer][:, now, places].sum(dim=-1)
    assert n == 4  # 9 and 7 stand nowhere before
    torch.testing.assert_close(torch.tensor(prompting.copying_scores(model, rows)), total / n)


def test_an_induction_head_is_seen():
    """Head 0 looks from track i at track i - n + 1; the texts have two copies of n tokens."""
    n = 8
    model = GPT(GPTConfig(50, 16, 1, 32, 2, 16, attention=("dense",), bandwidth=n + 1))
    a = model.blocks[0].attention
    with torch.no_grad():
        model.embeddings.wte.weight.zero_()
        model.embeddings.wpe.weight.copy_(torch.eye(16, 32))
        for linear in (a.wq, a.wk):
            linear.weight.zero_()
        for i in range(n, 15):
            a.wq.weight[i - n, i], a.wk.weight[i - n, i - n + 1] = 30.0, 30.0
    found = prompting.induction_scores(model, n=n)
    assert found["scores"][0][0] > 0.95 and found["scores"][0][1] < 0.2
    assert found["first copy"] == pytest.approx(math.log(50), abs=0.01)


HEADS = [[(0, 1)], [(1, 0), (1, 1)], [(0, 0), (1, 1)], []]


@pytest.mark.parametrize("heads", HEADS)
def test_a_silenced_head_is_one_whose_columns_of_wo_are_zero(heads):
    model, twin = lively(bandwidth=3), lively(bandwidth=3)
    tokens = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    whole = model(tokens)
    with torch.no_grad():
        for layer, head in heads:
            twin.blocks[layer].attention.wo.weight[:, 4 * head : 4 * head + 4] = 0
    with silenced(model, heads):
        torch.testing.assert_close(model(tokens), twin(tokens))
        assert torch.equal(generate(model, tokens[:, :3], 6, 0), generate(twin, tokens[:, :3], 6, 0))
    assert torch.equal(model(tokens), whole)
    assert bool(heads) != torch.equal(whole, twin(tokens))


def test_heads_speak_again_after_an_error():
    model, tokens = lively(), torch.tensor([[3, 1, 4]])
    whole = model(tokens)
    with pytest.raises(KeyError), silenced(model, [(0, 0)]):
        raise KeyError
    assert torch.equal(model(tokens), whole)


@pytest.mark.parametrize("pair", [(2, 0), (0, 2), (-1, 0), (0, -1)])
def test_heads_that_are_not_there_are_refused(pair):
    with pytest.raises(ShotError, match="both count from 0"), silenced(lively(), [pair]):
        pass


# ---- the tool ----


def run_tool(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["measure_shots.py", *map(str, words)])
    measure_shots.main()


def test_the_tool_measures_what_measure_does_and_goes_on_where_it_stopped(tmp_path, monkeypatch):
    place = tmp_path / "shots.json"
    one = ["--models", "gpt3-300k", "--tasks", "sequence", "--shots", 0, 1, "--to", place]
    run_tool(monkeypatch, *one, "--minutes", 0)
    assert len(json.loads(place.read_text())["points"]) == 1
    run_tool(monkeypatch, *one)
    points = json.loads(place.read_text())["points"]
    model = GPT.from_pretrained(DATA / "models" / "gpt3-300k")
    for shots in (0, 1):
        point = points[f"gpt3-300k sequence {shots}"]
        score = prompting.measure_task(model, TOKENIZER, "sequence", shots, point["n"])
        assert point["n"] == 200 and point["right"] == score.right
    old, stale = place.read_text(), json.loads(place.read_text())
    run_tool(monkeypatch, *one)
    assert place.read_text() == old
    stale["points"]["gpt3-300k sequence 1"] |= {"model": "another", "right": 99}
    place.write_text(json.dumps(stale))
    run_tool(monkeypatch, *one)
    assert json.loads(place.read_text())["points"] == points


def test_stored_points_are_of_the_models_that_are_shipped():
    points = json.loads((DATA / "experiments" / "shots.json").read_text())["points"]
    hashes = {name: measure_shots.weights_hash(name) for name in measure_shots.shipped()}
    assert hashes["gpt3-100k"] == sha256(HOME / "model.safetensors")[:16]
    for key, point in points.items():
        name, task, shots, *plain = key.split()
        assert point["model"] == hashes[name] and 0 <= point["right"] <= point["n"] >= 50
        assert task in tasks.TASKS and int(shots) in prompting.SHOTS and plain in ([], ["plain"])
    wanted = {f"{m} {t} {k}" for m in hashes for t in measure_shots.CURVES for k in prompting.SHOTS}
    assert wanted <= points.keys()
