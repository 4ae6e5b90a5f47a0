"""Limits: questions, overlap, repetition, counts and odds against plain loops; bad input; whose numbers are stored."""

import json
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt3lib import limits
from gpt3lib.files import sha256
from gpt3lib.limits import (
    TEMPLATES,
    LimitsError,
    cloze,
    cloze_questions,
    counted,
    judged,
    log_odds,
    loop_start,
    loss_behind,
    overlap,
    pronoun_odds,
    read_once,
    repeated_share,
    repeats,
)
from gpt3lib.model import GPT, GPTConfig
from gpt3lib.texts import DATA, manifest
from gpt3lib.tokenization import Tokenizer

TEXT = (
    "The king said that he saw her. She came in, and then he went, for the queen was tired. When they heard this, so."
)
TOKENIZER = Tokenizer.train(TEXT * 9 + " he she" * 99, 320)
BYTES = Tokenizer.train(TEXT, 257)
CONFIG = GPTConfig(TOKENIZER.vocab_size, 48, 2, 24, 3, 8, bandwidth=7)
STORED = json.loads((DATA / "experiments" / "limits.json").read_text())["points"]


def shaken(seed=0):
    """A model none of whose numbers is what it was at the beginning."""
    model, dice = GPT(CONFIG, seed), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn(p.shape, generator=dice)
    return model.eval()


MODEL = shaken()
IDS = st.lists(st.integers(0, 3), max_size=30)


# --- questions ---


def test_a_question_is_the_end_of_a_sentence_with_what_stands_before():
    document = "x" * 9 + " one two. Then he said house! And so on; she-went. No end"
    assert [end for _, end in cloze(document, before=5)] == [" house"]  # two and went: too short, inside a word
    assert cloze(document, before=9) == [("he said", " house")]
    assert cloze("House. ", before=5) == []


def documents():
    """Sixty sentences with sixty different ends."""
    ends = [a + b + "ing" for a in "bcdfghkl" for b in "aeiou"]
    return [f"{'word ' * 60}and the other {end}. " for end in ends]


def test_questions_are_drawn_by_the_seed_and_have_four_different_choices_with_the_answer_anywhere():
    questions = cloze_questions(documents(), 30, "a")
    assert questions == cloze_questions(documents(), 30, "a") != cloze_questions(documents(), 30, "b")
    assert len({q.answers for q in questions}) == 30
    for q in questions:
        assert len(set(q.choices)) == 4 and q.answers[0] in q.choices
        assert any(q.context + q.answers[0] in " ".join(d.split()) for d in documents())
        assert set(q.choices) <= {answer for other in questions for answer in other.answers}
    assert {q.choices.index(q.answers[0]) for q in questions} == {0, 1, 2, 3}


def test_judged_adds_the_log_probabilities_of_a_choice_token_by_token():
    questions = cloze_questions([d for d in documents()], 6)
    questions = [limits.Question(q.context[-12:], q.answers, q.choices) for q in questions]
    for q, (right, nats) in zip(questions, judged(MODEL, TOKENIZER, questions)):
        sums = {}
        for choice in q.choices:
            before = [TOKENIZER.end_of_text, *TOKENIZER.encode(q.context)]
            ids, total = [TOKENIZER.end_of_text, *TOKENIZER.encode(q.context + choice)], 0.0
            assert ids[: len(before)] == before
            for i in range(len(before), len(ids)):
                with torch.no_grad():
                    total += MODEL(torch.tensor([ids[:i]]))[0, -1].log_softmax(-1)[ids[i]].item()
            sums[choice] = total
        assert nats == pytest.approx(sums[q.answers[0]], abs=1e-4)
        assert right == (max(sums, key=sums.get) == q.answers[0])


# --- overlap ---

SENTENCES = st.lists(st.sampled_from("a b, c! A".split()), min_size=1, max_size=9).map(" ".join)


@settings(max_examples=150, deadline=None)
@given(st.lists(SENTENCES, min_size=1, max_size=3), st.lists(SENTENCES, min_size=1, max_size=3), st.integers(1, 5))
def test_overlap_is_what_sets_of_runs_say(passages, documents, n):
    plain = lambda text: re.sub("[,!]", "", text.lower()).split()
    runs = lambda found, k: [tuple(found[i : i + k]) for i in range(len(found) - k + 1)]
    wanted = []
    for passage in map(plain, passages):
        k = min(n, len(passage))
        seen = {run for document in documents for run in runs(plain(document), k)}
        own = runs(passage, k)
        wanted.append(sum(run in seen for run in own) / len(own))
    assert overlap(passages, documents, n) == wanted


def test_runs_do_not_reach_from_one_document_into_the_next():
    assert overlap(["a b c d"], ["a b", "c d"], 2) == [2 / 3]
    assert overlap(["a b c"], ["x a b c y"]) == [1.0]  # shorter than 13 words: as a whole
    assert overlap(["a b c"], ["x a b"]) == [0.0]


# --- memory ---


def test_reading_once_is_adamw_on_each_row_once_with_a_falling_rate():
    rows = torch.randint(CONFIG.vocab_size, (5, 9), generator=torch.Generator().manual_seed(1))
    model, twin = shaken(3), shaken(3)
    losses = read_once(model, rows, batch_size=2, peak=1e-2)
    matrices = [p for p in twin.parameters() if p.dim() > 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": [p for p in twin.parameters() if p.dim() < 2]}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    for some, rate, loss in zip((rows[:2], rows[2:4], rows[4:]), (1e-2, 7e-3, 4e-3), losses, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        found = torch.nn.functional.cross_entropy(twin(some[:, :-1]).flatten(0, 1), some[:, 1:].flatten())
        assert loss == pytest.approx(found.item(), abs=1e-4)
        found.backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        optimizer.step()
    assert not model.training  # a key's bias has no gradient but rounding, which Adam blows up: what it says counts
    with torch.no_grad():
        assert torch.allclose(model(rows), twin(rows), atol=1e-3)
        assert not torch.allclose(model(rows), shaken(3)(rows), atol=1e-1)


# --- repetition ---


@settings(max_examples=200, deadline=None)
@given(IDS, st.integers(1, 4))
def test_a_token_repeats_when_its_run_stands_anywhere_before(ids, n):
    wanted = []
    for end in range(1, len(ids) + 1):
        run = ids[end - n : end] if end >= n else None
        wanted.append(run is not None and any(ids[i : i + n] == run for i in range(end - n)))
    assert repeats(ids, n) == wanted
    if len(ids) >= n:
        runs = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
        assert repeated_share(ids, n) == pytest.approx(1 - len(set(runs)) / len(runs))


@settings(max_examples=300, deadline=None)
@given(IDS, st.integers(1, 6), st.integers(2, 4))
def test_a_loop_is_the_earliest_place_from_which_all_repeats(ids, longest, rounds):
    found = [
        (start, period)
        for start in range(len(ids))
        for period in range(1, longest + 1)
        if len(ids) - start >= rounds * period
        and all(ids[i] == ids[i + period] for i in range(start, len(ids) - period))
    ]
    assert loop_start(ids, longest, rounds) == (min(found) if found else None)


def test_a_longer_period_that_begins_earlier_wins():
    assert loop_start([9, 8, 7, 6, 5, 0, 0, 1, 0, 0, 1, 0, 0], rounds=2) == (5, 3)
    assert loop_start([7] * 3) == (0, 1) and loop_start([7] * 2) is None


def test_loss_behind_is_the_loss_of_the_last_tokens_with_so_many_before():
    rows = torch.randint(CONFIG.vocab_size, (5, 40), generator=torch.Generator().manual_seed(2))
    for n_before in (0, 3, 31):
        total = 0.0
        for row in rows.tolist():
            for i in range(32, 40):
                with torch.no_grad():
                    logits = MODEL(torch.tensor([row[31 - n_before : i]]))[0, -1]
                total -= logits.log_softmax(-1)[row[i]].item()
        assert loss_behind(MODEL, rows, n_before, 8) == pytest.approx(total / 40, abs=1e-4)


# --- what stands beside what ---


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from("king queen he her x".split()), min_size=1, max_size=25), st.integers(1, 4))
def test_counting_is_a_plain_loop_over_pairs(found, reach):
    pairs = [(i, j) for i in range(len(found)) for j in range(len(found)) if i != j and abs(i - j) <= reach]
    for behind in (False, True):
        counts = counted([" ".join(found)], ["king", "queen"], reach, behind)
        for who in ("king", "queen"):
            near = [found[j] for i, j in pairs if found[i] == who and (j > i or not behind)]
            assert counts[who] == (found.count(who), near.count("he"), near.count("her"))


def test_ten_words_are_near():
    for n, near in ((9, 1), (10, 0)):  # words between
        assert counted(["king " + "x " * n + "he"], ["king"]) == {"king": (1, near, 0)}
        assert counted(["she " + "x " * n + "king"], ["king"]) == {"king": (1, 0, near)}


def test_words_are_whole_and_documents_apart():
    assert counted(["The King's men", "he and the kingdom", "Herself: king"], ["king"]) == {"king": (2, 0, 1)}
    assert log_odds(0, 0) == 0 and log_odds(5, 1) == pytest.approx(math.log(3)) == -log_odds(1, 5)


def test_odds_are_a_mean_over_templates_of_two_softmaxes():
    (he,), (she,) = TOKENIZER.encode(" he"), TOKENIZER.encode(" she")
    for who, found in zip(("king", "queen"), pronoun_odds(MODEL, TOKENIZER, ["king", "queen"])):
        wanted = []
        for template in TEMPLATES:
            ids = [TOKENIZER.end_of_text, *TOKENIZER.encode(template.replace("{}", who))]
            with torch.no_grad():
                p = MODEL(torch.tensor([ids]))[0, -1].softmax(-1)
            wanted.append((p[he].log() - p[she].log()).item())
        assert found == pytest.approx(sum(wanted) / len(wanted), abs=1e-4)


# --- what is refused ---

ROWS = torch.zeros(2, 9, dtype=torch.long)
BAD = {
    "a bare string": (lambda: cloze_questions("The king. ", 4), "documents must be a list of texts"),
    "a reach of nothing": (lambda: counted([TEXT], ["king"], 0), "reach is 0"),
    "a row of one": (lambda: read_once(MODEL, torch.zeros(3, 1)), "T from 2 on"),
    "a run of nothing": (lambda: repeats([1, 2], 0), "n is 0"),
    "bytes": (lambda: counted([b"king"], ["king"]), "documents must be a list of texts"),
    "half a question": (lambda: cloze_questions(documents(), 4.5), "n is 4.5"),
    "no documents": (lambda: overlap(["a"], []), "documents must be a list of texts"),
    "no passages": (lambda: overlap([], ["a"]), "passages must be a list of texts"),
    "no peak": (lambda: read_once(MODEL, ROWS, peak=math.nan), "peak is nan"),
    "he in pieces": (lambda: pronoun_odds(MODEL, BYTES, ["king"]), "cuts he or she into pieces"),
    "no people": (lambda: pronoun_odds(MODEL, TOKENIZER, []), "people must be a list"),
    "no place": (lambda: pronoun_odds(MODEL, TOKENIZER, ["king"], ["The king"]), "no place for the person"),
    "no rows": (lambda: loss_behind(MODEL, ROWS[:0], 2, 3), "rows must be a tensor"),
    "no words": (lambda: overlap(["?!"], ["a"]), "without a word"),
    "one person": (lambda: counted([TEXT], "king"), "people must be a list of texts"),
    "short rows": (lambda: loss_behind(MODEL, ROWS, 3, 8), "T from 12 on, not (2, 9)"),
    "short text": (lambda: repeated_share([1, 2, 3]), "3 tokens hold no run of 4"),
    "three questions": (lambda: cloze_questions(documents(), 3), "n is 3"),
    "three words": (lambda: cloze_questions([d for d in documents()[:3] for _ in "ab"], 5), "no four different"),
    "too few sentences": (lambda: cloze_questions(documents(), 41), "40 sentences"),
}


@pytest.mark.parametrize("name", sorted(BAD))
def test_what_is_refused_says_what_is_wrong(name):
    call, words = BAD[name]
    with pytest.raises(LimitsError, match=re.escape(words)):
        call()


# --- what is stored ---


@pytest.mark.parametrize("key", sorted(STORED))
def test_stored_points_are_the_shipped_models(key):
    point = STORED[key]
    if key != "counts":
        home = DATA / "models" / key.split()[1]
        assert point["model"] == sha256(home / "model.safetensors")[:16]
        assert manifest()["models"][home.name]["model.safetensors"].startswith(point["model"])


def test_every_part_is_stored_for_every_size():
    sizes = ["100k", "300k", "1m", "3m", "10m"]
    wanted = {f"{part} gpt3-{s}" for part in ("cloze", "copies", "odds", "repeats", "window") for s in sizes}
    assert wanted - {"copies gpt3-10m"} | {"counts", "window gpt3-1m-dense"} == set(STORED)
