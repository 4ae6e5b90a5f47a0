"""Evaluation: likelihoods by brute force, choices, free text, intervals, JSONL, results that go on, the harness."""

import builtins
import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt3lib import evaluation, prompting
from gpt3lib.decoding import beam_search
from gpt3lib.evaluation import (
    EvaluationError,
    Question,
    as_pair,
    best_of,
    bootstrap,
    choice_scores,
    examine,
    examine_all,
    find_problems,
    fingerprint,
    harness,
    likelihoods,
    read_problems,
    task_problems,
    with_shots,
    write_answers,
)
from gpt3lib.generation import last_logits
from gpt3lib.model import GPT, GPTConfig
from gpt3lib.tasks import TASKS, Dice, TaskError, problem, render
from gpt3lib.tokenization import Tokenizer
from gpt3lib.using import write_model

TEXT = "The quick brown fox jumps over the lazy dog, and the dog sleeps on. Answer: yes or no?\n"
TOKENIZER = Tokenizer.train(TEXT * 9, 300)
CONFIG = GPTConfig(TOKENIZER.vocab_size, 48, 2, 24, 3, 8, bandwidth=7)


def shaken(config=CONFIG, seed=0, by=0.2):
    """A model none of whose numbers is what it was at the beginning."""
    model, dice = GPT(config, seed), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += by * torch.randn(p.shape, generator=dice)
    return model.eval()


MODEL = shaken()


def by_hand(model, context, completion):
    """Sum of log-probabilities and whether each is the likeliest, a token at a time, in the slowest way."""
    total, greedy = 0.0, True
    for i, token in enumerate(completion):
        seen = torch.tensor([(context + completion[:i])[-model.config.n_ctx :]])
        with torch.no_grad():
            row = last_logits(model, seen)[0].log_softmax(-1)
        total, greedy = total + row[token].item(), greedy and row.argmax().item() == token
    return total, greedy


# --- brute force: everything that five tokens can say ---

FIVE = shaken(GPTConfig(5, 8, 2, 12, 2, 6, bandwidth=3), by=0.7)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_all_strings_have_probability_1_and_the_widest_beam_finds_the_best(n):
    texts = [list(ids) for ids in itertools.product(range(5), repeat=n)]
    found = likelihoods(FIVE, [([4, 1], ids) for ids in texts], batch=64)
    assert sum(math.exp(f.log_p) for f in found) == pytest.approx(1, abs=1e-5)
    best = max(range(len(texts)), key=lambda i: found[i].log_p)
    ids, totals = beam_search(FIVE, torch.tensor([[4, 1]]), n, width=5**n, length_penalty=0.0)
    assert ids[0] == texts[best] and totals[0] == pytest.approx(found[best].log_p, abs=1e-5)
    assert sorted(ids) == texts
    greedy = [ids for ids, f in zip(texts, found) if f.is_greedy]
    assert greedy == beam_search(FIVE, torch.tensor([[4, 1]]), n, width=1, length_penalty=0.0)[0]


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_a_likelihood_is_the_product_by_hand(batch):
    texts = [list(ids) for n in (1, 3, 4) for ids in itertools.product(range(5), repeat=n)][::9]
    pairs = [([(i + j) % 5 for j in range(1 + i % 4)], ids) for i, ids in enumerate(texts)]
    for pair, found in zip(pairs, likelihoods(FIVE, iter(pairs), batch)):
        total, greedy = by_hand(FIVE, *pair)
        assert found.log_p == pytest.approx(total, abs=1e-5)
        assert found.is_greedy == greedy and found.n_tokens == len(pair[1])


def test_a_long_context_loses_its_beginning_and_a_long_answer_is_refused():
    long = [i * 7 % 5 for i in range(20)]
    (cut,) = likelihoods(FIVE, [(long, [1, 2, 3])])
    (kept,) = likelihoods(FIVE, [(long[-6:], [1, 2, 3])])
    assert cut == kept  # 6 + 3 tokens, of which the last is only predicted
    with pytest.raises(EvaluationError, match="an answer has 9 tokens, and the window only 8"):
        likelihoods(FIVE, [([1], [0] * 9)])
    assert likelihoods(FIVE, [([1], [0] * 8)])[0].n_tokens == 8
    assert likelihoods(FIVE, []) == []


# --- where the context ends ---


@settings(max_examples=60, deadline=None)
@given(st.text("The fox\n!ä", max_size=12), st.text("The fox\n!ä", min_size=1, max_size=6))
def test_both_sides_together_are_the_text(context, completion):
    first, second = as_pair(TOKENIZER, context, completion)
    assert first[0] == TOKENIZER.end_of_text and second
    assert first[1:] + second == TOKENIZER.encode(context + completion)
    assert context.encode().startswith(TOKENIZER.decode_bytes(first[1:]))


def test_a_space_belongs_to_the_word_behind_it():
    bare, spaced = as_pair(TOKENIZER, "The dog", " sleeps"), as_pair(TOKENIZER, "The dog ", "sleeps")
    assert bare == spaced and TOKENIZER.decode(bare[1]) == " sleeps"
    half = as_pair(TOKENIZER, "The qu", "ick")  # one token spans the place: all of it counts
    assert TOKENIZER.decode(half[0][1:]) + TOKENIZER.decode(half[1]) == "The quick"
    with pytest.raises(EvaluationError, match="nothing to score"):
        as_pair(TOKENIZER, "The dog", "")


# --- choices ---


def test_three_ways_to_compare():
    asked = [("The dog", " sleeps on"), ("The dog", " fox"), ("The ", "lazy dog")]
    pairs = [as_pair(TOKENIZER, *pair) for pair in asked]
    totals = [by_hand(MODEL, *pair)[0] for pair in pairs]
    alone = [by_hand(MODEL, *as_pair(TOKENIZER, "Answer:", " " + choice.strip()))[0] for _, choice in asked]
    expected = {
        "sum": totals,
        "token": [total / len(new) for total, (_, new) in zip(totals, pairs)],
        "answer": [total - other for total, other in zip(totals, alone)],
    }
    for by, wanted in expected.items():
        assert choice_scores(MODEL, TOKENIZER, asked, by) == pytest.approx(wanted, abs=1e-4)


def test_equal_scores_are_decided_by_dice_and_by_nothing_else():
    assert best_of([-1.0, -0.5, -2.0], Dice(0)) == 1
    drawn = [best_of([-0.5, -1.0, -0.5], Dice(i)) for i in range(200)]
    assert set(drawn) == {0, 2} and 60 < drawn.count(0) < 140
    assert drawn == [best_of([-0.5, -1.0, -0.5 + 1e-9], Dice(i)) for i in range(200)]


def test_a_choice_is_what_the_scores_say():
    choices = (" sleeps", " fox", " lazy dog")
    problems = [Question(text, (" fox",), choices) for text in ("The", "The dog", "and the quick")]
    for by in ("token", "answer", "sum"):
        found = [choice_scores(MODEL, TOKENIZER, [(p.context, c) for c in choices], by) for p in problems]
        said = evaluation.answers_of(MODEL, TOKENIZER, problems, 1, by=by)
        assert said == [choices[row.index(max(row))].strip() for row in found]


# --- free text ---


def greedy(ids, n):
    """n new tokens, each the likeliest, in the slowest way."""
    text = list(ids)
    for _ in range(n):
        text.append(last_logits(MODEL, torch.tensor([text[-48:]]))[0].argmax().item())
    return text[len(ids) :]


def test_greedy_and_beams_write_to_the_end_of_the_line():
    prompts = ["The quick", "The dog, and", "no?\nAnswer:"]
    (end,) = TOKENIZER.encode("\n")
    rows = [[TOKENIZER.end_of_text, *TOKENIZER.encode(prompt)] for prompt in prompts]
    for beams in (None, 1, 4):
        for ids, said in zip(rows, write_answers(MODEL, TOKENIZER, prompts, 6, beams)):
            start = torch.tensor([ids])
            alone = beam_search(MODEL, start, 6, beams, stop=end)[0][0] if beams else greedy(ids, 6)
            assert said == TOKENIZER.decode(alone).split("\n")[0].strip()
    assert write_answers(MODEL, TOKENIZER, [], 6) == []


def test_an_answer_ends_where_its_text_does(monkeypatch):
    """A model that was tuned on pairs writes an end-of-text token, not a line's end."""
    end = TOKENIZER.end_of_text
    rows = [[*TOKENIZER.encode(" yes"), end, *TOKENIZER.encode(" no")], TOKENIZER.encode(" no\n yes")]
    monkeypatch.setattr(evaluation, "generate_many", lambda *_, **ways: rows)
    assert write_answers(MODEL, TOKENIZER, ["a", "b"], 6) == ["yes", "no"]


def test_of_a_prompt_that_is_too_long_the_end_counts():
    long = TEXT * 3
    ids = TOKENIZER.encode(long)[-(48 + 1 - 5) :]
    said = write_answers(MODEL, TOKENIZER, [long], 5)
    assert said == [TOKENIZER.decode(greedy(ids, 5)).split("\n")[0].strip()]


@pytest.mark.parametrize("name, shots", [("copy", 2), ("2D+", 1), ("jsx", 1)])
def test_a_written_answer_is_right_where_one_look_says_so(name, shots):
    from gpt3lib.using import find_model

    model, tokenizer = find_model("gpt3-1m", "cpu")
    found = examine(model, tokenizer, task_problems(name, shots, 12))
    rows = prompting.few_shot_prompts(tokenizer, name, shots, 12)
    assert found["right"] == sum(prompting.are_right(model, rows)) and found["n"] == 12


# --- how sure ---


@pytest.mark.parametrize("right, n", [(5, 10), (80, 100), (450, 500)])
def test_the_bootstrap_agrees_with_the_formula(right, n):
    low, high = bootstrap([True] * right + [False] * (n - right), seed=1)
    p = right / n
    width = 1.96 * math.sqrt(p * (1 - p) / n)
    assert low == pytest.approx(p - width, abs=0.25 * width + 1 / n)
    assert high == pytest.approx(p + width, abs=0.25 * width + 1 / n)
    if n == 500:  # fine enough to tell 95 % from 90 %
        assert high - low == pytest.approx(2 * width, rel=0.1)
    assert bootstrap([True] * right + [False] * (n - right), seed=1) == [low, high]


def test_all_right_leaves_the_bootstrap_without_doubt_and_wilson_not():
    assert bootstrap([True] * 20) == [1.0, 1.0] and prompting.wilson(20, 20)[0] < 0.85


# --- examples ---


def test_a_tasks_problems_are_the_prompts_of_the_book():
    for name in TASKS:
        for asked, i in zip(task_problems(name, 3, 4, seed=5), range(4)):
            examples, question = problem(TASKS[name], Dice(5, name, 3, i), 3)
            assert asked.prompt() == render(TASKS[name], examples, question)
            assert asked.prompt(1) == render(TASKS[name], examples[:1], question)
            assert asked.answers == (" " + question.answer,)


FILE = [Question(f"Q: {i} plus 1? A:", (f" {i + 1}",)) for i in range(6)]


def test_examples_are_drawn_by_seed_and_never_the_question():
    for shots in range(6):
        drawn = with_shots(FILE, shots, seed=3)
        assert drawn == with_shots(FILE, shots, seed=3)
        for asked in drawn:
            assert len(set(asked.examples)) == shots
            assert not any(line.startswith(asked.context) for line in asked.examples)
    assert with_shots(FILE, 5, 0) != with_shots(FILE, 5, 1)
    assert with_shots(FILE, 2, 0)[0].prompt().endswith("\nQ: 0 plus 1? A:")
    with pytest.raises(EvaluationError, match="6 examples, but beside problem 1 there are only 5"):
        with_shots(FILE, 6)
    twins = [*FILE, FILE[0]]
    for asked in with_shots(twins, 5):  # the same question twice is one question
        assert asked.context not in "".join(asked.examples)
    with pytest.raises(EvaluationError, match="only 0"):
        with_shots(FILE[:1], 1)
    assert len(with_shots(FILE[:1], 5, pool=FILE)[0].examples) == 5


def test_an_empty_line_stands_between_examples_of_several_lines():
    several = [replace(p, context="Add.\n" + p.context) for p in FILE]
    assert with_shots(several, 1, 0)[0].prompt().count("\n\n") == 1


# --- a JSONL of one's own ---


def jsonl(path, *lines):
    path.write_bytes(
        b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines)
    )
    return path


GOOD = {"context": "The dog", "completion": " sleeps"}


def test_the_papers_format_and_what_may_be_added(tmp_path):
    found = read_problems(
        jsonl(
            tmp_path / "x.jsonl",
            b"\xef\xbb\xbf" + json.dumps(GOOD).encode(),
            b"",
            {"context": "", "completion": [" a", " b"], "id": 7, "note": {"any": "thing"}},
            {"context": "c\u2028d", "completion": " no", "choices": [" yes", " no"], "id": "7"},
        )
    )
    assert found == [
        Question("The dog", (" sleeps",)),
        Question("", (" a", " b")),
        Question("c\u2028d", (" no",), (" yes", " no")),
    ]


@pytest.mark.parametrize(
    "line, words",
    [
        (b'{"context": "a", ', "line 2 is no JSON: Expecting [^:]* at character 1[78]; write {"),
        (b'{"context": "a', "line 2 is no JSON: Unterminated string starting at character 13; write {"),
        (b"a,b", 'Expecting value at character 1; write {"context": "a text", "completion": "a text"}$'),
        (b'{"context": "\xff"}', "line 2 is no UTF-8; save the file as UTF-8"),
        (json.dumps(GOOD).encode("utf-16"), "line 2 is no UTF-8; save the file as UTF-8"),
        (b"[" * 100_000, "line 2 is no JSON: .*; write {"),
        (b'{"context": "a", "context": "b", "completion": " c"}', "line 2 .*'context' stands in it twice"),
        (["a", "b"], "line 2 must be"),
        ({"context": "a"}, "line 2 must be"),
        ({"prompt": "a"}, "line 2 must be"),
        ({"context": 5, "completion": " c"}, "line 2 must be"),
        ({"context": "a", "completion": ""}, "line 2: the completion is empty"),
        ({"context": "a", "completion": " \n"}, "line 2: the completion is empty"),
        ({"context": "a", "completion": 7}, "line 2: the completion is empty, or no text"),
        ({"context": "a", "completion": []}, "line 2: the completion is empty"),
        ({"context": "a", "completion": [" b", ""]}, "line 2: the completion is empty"),
        (GOOD | {"choices": [" sleeps"]}, "line 2: choices must be different texts"),
        (GOOD | {"choices": []}, "line 2: choices must be different texts"),
        (GOOD | {"choices": [" sleeps", " sleeps"]}, "line 2: choices must be different texts"),
        (GOOD | {"choices": " sleeps"}, "line 2: choices must be different texts"),
        (GOOD | {"choices": ["sleeps", " runs"]}, "line 2: the completion must be one of the choices"),
        (GOOD | {"id": 1}, "line 2: the id 1 is that of line 1"),
    ],
)
def test_a_line_that_cannot_be_asked_is_named_by_its_number(line, words, tmp_path):
    path = jsonl(tmp_path / "x.jsonl", GOOD | {"id": 1}, line)
    with pytest.raises(EvaluationError, match=words) as error:
        read_problems(path)
    assert str(path) in str(error.value)


def test_files_that_hold_nothing(tmp_path):
    with pytest.raises(EvaluationError, match="has no problems"):
        read_problems(jsonl(tmp_path / "x.jsonl", b"", b"  "))
    for path, words in ((tmp_path, " is a folder"), (tmp_path / "none.jsonl", r" cannot be read \(No such file")):
        for read in (find_problems, read_problems):
            with pytest.raises(EvaluationError, match=words) as error:
                read(str(path))
            assert str(error.value).startswith(str(path)) and "tasks" not in str(error.value)
    with pytest.raises(EvaluationError, match="no task and no file 'copi'; the tasks are copy"):
        find_problems("copi")
    for fault in ({"shots": -1}, {"n": 0}, {"shots": 1.5}):
        with pytest.raises(EvaluationError, match="must be a whole number"):
            find_problems("copy", **fault)
    with pytest.raises(TaskError, match="no task"):
        task_problems("copi", 0, 1)


# --- evaluate: asked once, gone on with, refused ---


class Spy:
    """`answers_of` that counts, and stops after so many calls."""

    def __init__(self, monkeypatch, most=None):
        self.calls, own = 0, evaluation.answers_of

        def answers_of(*arguments, **named):
            if self.calls == most:
                raise KeyboardInterrupt
            self.calls += 1
            return own(*arguments, **named)

        monkeypatch.setattr(evaluation, "answers_of", answers_of)


PROBLEMS = [Question(text, (" fox",), (" fox", " dog", " lazy")) for text in ("The", "a", "the quick", "over the")]
PROBLEMS += [Question("The dog", (" sleeps", " jumps"))] * 2


def test_what_was_answered_is_not_asked_again(tmp_path, monkeypatch):
    whole = examine(MODEL, TOKENIZER, PROBLEMS, tmp_path / "whole" / "a.jsonl", {"task": "x"}, batch=2)
    path = tmp_path / "b.jsonl"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        Spy(patch, 2)
        examine(MODEL, TOKENIZER, PROBLEMS, path, {"task": "x"}, batch=2)
    assert len(path.read_text().splitlines()) == 5 and not path.with_suffix(".json").exists()
    path.write_bytes(path.read_bytes()[:-9])  # and the last line was only half written
    with monkeypatch.context() as patch:
        spy = Spy(patch)
        again = examine(MODEL, TOKENIZER, PROBLEMS, path, {"task": "x"}, batch=2)
        assert again == whole and spy.calls == 2  # 3 of 6 were left
        assert examine(MODEL, TOKENIZER, PROBLEMS, path, {"task": "x"}) == whole and spy.calls == 2
    assert path.read_bytes() == (tmp_path / "whole" / "a.jsonl").read_bytes()
    assert json.loads(path.with_suffix(".json").read_text()) == json.loads(json.dumps(whole))
    assert examine(MODEL, TOKENIZER, PROBLEMS, about={"task": "x"}, batch=5) == whole  # without a file


@pytest.mark.parametrize("n", [0, 1, 20])
def test_a_file_cut_anywhere_in_its_header_begins_anew(n, tmp_path):
    path = tmp_path / "a.jsonl"
    whole = examine(MODEL, TOKENIZER, PROBLEMS, path)
    path.write_bytes(path.read_bytes()[:n])
    assert examine(MODEL, TOKENIZER, PROBLEMS, path) == whole


def test_results_of_something_else_are_not_gone_on_with(tmp_path):
    path = tmp_path / "a.jsonl"
    examine(MODEL, TOKENIZER, PROBLEMS, path, {"shots": 0})
    for words, model, problems, ways in [
        ("shots 0, and now it is 1", MODEL, PROBLEMS, {"about": {"shots": 1}}),
        ("by 'token', and now it is 'sum'", MODEL, PROBLEMS, {"by": "sum"}),
        ("beams None, and now it is 4", MODEL, PROBLEMS, {"beams": 4}),
        ("begun with problems", MODEL, PROBLEMS[1:], {}),
        ("begun with model", shaken(seed=1), PROBLEMS, {}),
    ]:
        with pytest.raises(EvaluationError, match=words):
            examine(model, TOKENIZER, problems, path, **{"about": {"shots": 0}} | ways)
    for content in (b"my own notes\n", b"no line", b"[1]\n", b'{"a": 1}\n{"b"\n'):
        path.write_bytes(content)
        with pytest.raises(EvaluationError, match="holds no results|begun with"):
            examine(MODEL, TOKENIZER, PROBLEMS, path)
        assert path.read_bytes() == content


def test_a_place_that_takes_no_results_is_told(tmp_path, monkeypatch):
    (tmp_path / "notes").write_text("mine")
    (tmp_path / "a.jsonl").mkdir()

    def may_not(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    for name in ("notes/a.jsonl", "notes/deep/a.jsonl", "a.jsonl", "shut/a.jsonl"):
        with monkeypatch.context() as patch:
            if name.startswith("shut"):
                patch.setattr(builtins, "open", may_not)
            words = "results cannot be written: .*; give --out a folder to write into$"
            with pytest.raises(EvaluationError, match=words) as error:
                examine(MODEL, TOKENIZER, PROBLEMS, tmp_path / name)
        assert str(tmp_path / name.split("/")[0]) in str(error.value)
    assert (tmp_path / "notes").read_text() == "mine"


def test_a_fingerprint_is_of_config_tokens_and_weights():
    mark = fingerprint(MODEL, TOKENIZER)
    assert mark == fingerprint(shaken(), TOKENIZER) and len(mark) == 16
    others = [shaken(seed=1), shaken(replace(CONFIG, bandwidth=8)), shaken().bfloat16()]
    marks = {mark, *(fingerprint(model, TOKENIZER) for model in others)}
    marks.add(fingerprint(MODEL, Tokenizer.train(TEXT[::-1] * 9, 300)))
    assert len(marks) == 5


def test_calls_that_cannot_be():
    for words, problems, tokenizer, ways in [
        ("there are no problems", [], TOKENIZER, {}),
        ("a model without tokenizer", PROBLEMS, None, {}),
        ("by is 'luck'; it must be 'token' or 'answer' or 'sum'", PROBLEMS, TOKENIZER, {"by": "luck"}),
        ("beams is 0", PROBLEMS, TOKENIZER, {"beams": 0}),
        ("an answer has .* tokens, and the window only 48", [Question("a", (" dog" * 60,))], TOKENIZER, {}),
    ]:
        with pytest.raises(EvaluationError, match=words):
            examine(MODEL, tokenizer, problems, **ways)


def test_examples_that_do_not_fit_are_counted_and_a_long_question_is_cut():
    lines = tuple(f"the dog jumps over {i}" for i in range(9))
    size = lambda shots: len(TOKENIZER.encode(asked.prompt(shots))) + len(TOKENIZER.encode(" fox")) + 1
    asked = Question("the quick", (" fox",), examples=lines)
    most = max(shots for shots in range(10) if size(shots) <= 48)
    assert 1 <= most < 9
    with pytest.raises(EvaluationError, match=f"^problem 2, its examples .* fit .*{most} would do"):
        examine(MODEL, TOKENIZER, [replace(asked, examples=()), asked])
    fits = [replace(asked, examples=lines[:most])]
    assert examine(MODEL, TOKENIZER, fits)["cut"] == 0
    assert examine(shaken(replace(CONFIG, n_ctx=size(most))), TOKENIZER, fits)["n"] == 1  # to the last token
    with pytest.raises(EvaluationError, match=f"^problem 1, .*{most - 1} would do"):
        examine(shaken(replace(CONFIG, n_ctx=size(most) - 1)), TOKENIZER, fits)
    with pytest.raises(
        EvaluationError, match=r"fewer --shots \(0 would do\), or shorten the longest, problem 1 with \d+$"
    ):
        examine(MODEL, TOKENIZER, [replace(asked, examples=(TEXT * 3,))])
    found = examine(MODEL, TOKENIZER, [Question(TEXT * 3, (" fox",)), Question("a", (" fox",))])
    assert found["cut"] == 1 and found["n"] == 2


def test_tasks_and_files_in_one_table(tmp_path, capsys):
    path = jsonl(tmp_path / "mine.jsonl", *({"context": p.context, "completion": p.answers[0]} for p in FILE))
    model = shaken(replace(CONFIG, n_ctx=200))
    found = examine_all(model, TOKENIZER, ["last", str(path)], (0, 1), n=5, seed=2, out=tmp_path / "out")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["last", "0"], ["last", "1"], ["mine", "0"], ["mine", "1"]]
    assert all("5 problems" in line and "95 %: " in line for line in lines)
    names = {f"{name}-{k}-shots{end}" for name in ("last", "mine") for k in (0, 1) for end in (".jsonl", ".json")}
    assert {p.name for p in (tmp_path / "out").iterdir()} == names
    assert [row["shots"] for row in found] == [0, 1, 0, 1]
    assert found == examine_all(model, TOKENIZER, ["last", str(path)], (0, 1), n=5, seed=2)


def test_all_that_is_asked_for_is_checked_before_the_first_question(tmp_path, monkeypatch, capsys):
    lines = [{"context": p.context, "completion": p.answers[0]} for p in FILE]
    lines.insert(3, GOOD | {"context": "fox " * 20})
    path = str(jsonl(tmp_path / "mine.jsonl", *lines))
    model, n = shaken(replace(CONFIG, n_ctx=50)), len(TOKENIZER.encode("fox " * 20))
    spy = Spy(monkeypatch)
    for names, shots in (([path], (0, 2)), ([path], (2, 0))):
        with pytest.raises(
            EvaluationError, match=f"mine.jsonl, 2 shots: .* fit into 50 .*shorten the longest, problem 4 with {n}$"
        ):
            examine_all(model, TOKENIZER, names, shots, out=tmp_path / "out")
    jsonl(tmp_path / "long.jsonl", GOOD | {"completion": " fox" * 60})
    with pytest.raises(EvaluationError, match="long.jsonl, 0 shots: an answer has .*, and the window only 50"):
        examine_all(model, TOKENIZER, [path, str(tmp_path / "long.jsonl")], out=tmp_path / "out")
    with pytest.raises(EvaluationError, match="a model without tokenizer"):
        examine_all(model, None, [path])
    assert spy.calls == 0 and not (tmp_path / "out").exists() and not capsys.readouterr().out


# --- lm-evaluation-harness ---


class Request:
    def __init__(self, *args):
        self.args = args


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Our LM and the harness's own, on the same weights in GPT-2's format."""
    pytest.importorskip("lm_eval")
    pytest.importorskip("accelerate")
    from lm_eval.models.huggingface import HFLM

    folder = tmp_path_factory.mktemp("harness") / "gpt2"
    model = shaken(replace(CONFIG, attention=("dense",)))
    write_model(model, TOKENIZER, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        theirs = HFLM(pretrained=str(folder), device="cpu", batch_size=4, dtype="float32")
    return harness(model, TOKENIZER), theirs


CONTEXTS = [
    "",
    "The dog",
    "The dog ",
    "The dog,\n",
    "over the lazy \n ",
    "Answer: y",
    TEXT * 4,
    "<|endoftext|>The ",
    "fö",
]
WORDS = [" sleeps on", "sleeps", " fox jumps over the lazy dog", "es or no?", "\n", " ä", "?" * 5]


def test_it_is_an_lm_of_the_harness(two):
    from lm_eval.api.model import LM

    assert isinstance(two[0], LM) and two[0].world_size == 1


def test_log_likelihoods_are_the_harnesss_own(two):
    requests = [Request(context, word) for context in CONTEXTS for word in WORDS]
    theirs = two[1].loglikelihood(requests)
    ours = two[0].loglikelihood(requests)
    for request, (log_p, greedy), (expected, their_greedy) in zip(requests, ours, theirs):
        assert log_p == pytest.approx(expected, abs=1e-4), request.args
        assert greedy == their_greedy
    follows = two[0].generate_until([Request(c, {"until": ["\n"], "max_gen_toks": 3}) for c in CONTEXTS[1:]])
    likely = [Request(c, text) for c, text in zip(CONTEXTS[1:], follows) if text.strip()]
    ours, theirs = (lm.loglikelihood(likely) for lm in two)
    assert [g for _, g in ours] == [g for _, g in theirs] and any(g for _, g in ours)


def test_whole_texts_are_measured_as_by_the_harness(two):
    requests = [Request(text) for text in ("The dog", TEXT, TEXT * 5, "ä")]
    assert two[0].loglikelihood_rolling(requests) == pytest.approx(two[1].loglikelihood_rolling(requests), abs=1e-3)


@pytest.mark.parametrize(
    "settings",
    [
        {"until": ["\n"]},
        {"until": ["o", " the"], "max_gen_toks": 12},
        {"until": "e", "max_gen_toks": 5},
        {"max_gen_toks": 9},
    ],
)
def test_texts_are_the_harnesss_own(two, settings):
    requests = [Request(context, {"max_gen_toks": 20} | settings) for context in CONTEXTS if context]
    ours = two[0].generate_until(requests)
    assert ours == two[1].generate_until(requests) and len(set(ours)) > 3


def test_a_task_of_the_harness_runs_without_a_network(two, tmp_path):
    import lm_eval
    from lm_eval.tasks import TaskManager

    path = jsonl(tmp_path / "mine.jsonl", *({"q": p.context, "c": list(p.choices), "a": 0} for p in PROBLEMS[:4]))
    (tmp_path / "mine.yaml").write_text(
        f"task: mine\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {path}}}}}\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: '{{c}}'\ndoc_to_target: '{{a}}'\n"
        "target_delimiter: ''\nmetric_list: [{metric: acc}]\n"
    )
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = [lm_eval.simple_evaluate(lm, tasks=["mine"], task_manager=manager, bootstrap_iters=0) for lm in two]
    ours, theirs = (f["results"]["mine"]["acc,none"] for f in found)
    assert ours == theirs


def test_without_lm_eval_the_error_says_what_to_install(monkeypatch):
    own = builtins.__import__

    def no_harness(name, *rest, **named):
        if name.startswith("lm_eval"):
            raise ImportError("No module named 'lm_eval'")
        return own(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", no_harness)
    with pytest.raises(EvaluationError, match=r"pip install 'gpt3lib\[eval\]'"):
        harness(MODEL, TOKENIZER)
