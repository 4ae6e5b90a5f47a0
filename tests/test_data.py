"""The data: each step against a slow twin or another library, and the family's text against its hash."""

import hashlib
import random
import re
import string
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt3lib import data, texts
from gpt3lib.data import (
    DataError,
    cut_out,
    decontaminate,
    deduplicate,
    extract,
    features,
    grams,
    held_out,
    jaccard,
    minhash,
    near_duplicates,
    pareto,
    passes,
    scores,
    shingles,
    train_classifier,
    words,
)

CHAPTER = Path(__file__).resolve().parent.parent / "book" / "11_data.ipynb"


def of_chapter() -> dict:
    """What the chapter shows and the module has not: the mixture and the windows."""
    names, space = ("TABLE_2_2", "epochs", "visiting_order", "fill_windows"), {**vars(data)}
    for cell in nbformat.read(CHAPTER, 4).cells:
        if re.search(rf"^(def )?({'|'.join(names)})( = |\()", cell.source, re.MULTILINE):
            exec(cell.source, space)
    return space


shown = of_chapter()
epochs, fill_windows, visiting_order = shown["epochs"], shown["fill_windows"], shown["visiting_order"]


def prose(seed: int, n_words: int, vocabulary: int = 400) -> list[str]:
    """Words that look like words, from dice of our own."""
    dice = random.Random(seed)
    return ["w" + np.base_repr(dice.randrange(vocabulary), 26).lower() for _ in range(n_words)]


@pytest.fixture(scope="module")
def pages():
    """The crawl as text, without the short pages: what the chapter calls `pages`."""
    every = (extract(page) for page in texts.crawl())
    return [page for page in every if len(page) >= 200]


# --- pages ---


@pytest.mark.parametrize(
    "page, text",
    [
        ("<h1>Rain</h1><p>It <b>rains</b>\ncats &amp; dogs.</p>", "Rain\nIt rains cats & dogs.\n"),
        ("<ul><li>one<LI class='x'>two</ul>three<br/>four", "one\ntwo\nthree\nfour\n"),
        ("<p>a</p>\n\n<p> </p><p>b <code>&lt;p&gt;</code></p>", "a\nb <p>\n"),  # an escaped tag is text
        ("plain", "plain\n"),
        ("<preface>no block</preface>", "no block\n"),
        ("1 &lt; 2 &#233;&nbsp;!", "1 < 2 é\xa0!\n"),
        ("", "\n"),
    ],
)
def test_extract(page, text):
    assert extract(page) == text


def test_no_markup_survives_on_the_crawl(pages):
    assert len(pages) == 19_925
    for page in texts.crawl()[::7]:
        text = extract(page)
        assert "&lt;" in page or not re.search(r"<[a-z/]", text)  # some pages speak about tags
        assert "\n\n" not in text and text.endswith("\n") and not re.search(r"^ | $", text, re.MULTILINE)


# --- the classifier and the dice ---


def test_chance_is_uniform_and_a_function_of_text_and_purpose():
    numbers = [data.chance(str(i), "x") for i in range(20_000)]
    assert min(numbers) >= 0 and max(numbers) < 1
    counts, _ = np.histogram(numbers, 20, (0, 1))
    assert ((counts - 1000) ** 2 / 1000).sum() < 50  # chi squared, 19 degrees of freedom: p < 0.0002
    golden = int(hashlib.sha256(b"xhello").hexdigest()[:13], 16) / 2**52
    assert data.chance("hello", "x") == golden


def test_pareto_is_numpys_by_the_inverse_of_its_distribution():
    theirs = np.sort(np.random.default_rng(1).pareto(9, 200_000))
    u = (np.arange(200_000) + 0.5) / 200_000
    ours = np.array([pareto(x) for x in u])
    middle = slice(1000, -1000)
    assert np.abs(theirs - ours)[middle].max() < 0.02
    assert pareto(0.0) == 0 and pareto(0.5, alpha=1) == pytest.approx(1.0)


@pytest.mark.parametrize("score", [0.0, 0.3, 0.6, 0.9, 0.99])
def test_the_papers_rule_passes_as_often_as_its_closed_form(score):
    share = np.mean([passes(f"document {i}", score) for i in range(40_000)])
    expected = (2 - score) ** -9
    assert abs(share - expected) < 4 * (expected * (1 - expected) / 40_000) ** 0.5
    assert all(passes(f"document {i}", 1.0) for i in range(1000))


def test_a_fresh_classifier_agrees_with_the_shipped_list(pages):
    good = [*texts.stories(), *texts.wikipedia(), *texts.speeches(), *texts.corpus()]
    tenth = [[d for d in each if data.chance(d, "tenth") < 0.1] for each in (good, pages)]
    classifier = train_classifier(*tenth)
    found = scores(classifier, pages)
    assert found.shape == (len(pages),) and found.min() > 0 and found.max() < 1
    fresh = {data.name_of(page) for page, score in zip(pages, found) if passes(page, score)}
    listed = set(data.KEPT.read_text().split())
    assert len(fresh ^ listed) <= 3 and len(listed) == 128
    histories = [score for page, score in zip(pages, found) if ": Introduction\n" in page[:60]]
    manual = [score for page, score in zip(pages, found) if re.match(r"[a-z0-9-]+: [A-Z][a-z]+[A-Z]\w+\n", page)]
    assert np.median(histories) > 0.5 > 10 * np.median(manual)


def test_features_read_the_beginning_only():
    long = " ".join(prose(1, 3000))
    ours = features([long, long[:4000], long[:3900]]).toarray()
    assert (ours[0] == ours[1]).all() and (ours[0] != ours[2]).any() and ours.min() == 0
    assert ours.shape == (3, 2**14) and np.linalg.norm(ours[0]) == pytest.approx(1)


# --- near-duplicates ---


def test_shingles_against_sets_of_strings():
    found = [prose(seed, 60, vocabulary=12) for seed in range(6)]
    for one in found:
        runs = {" ".join(one[i : i + 5]) for i in range(len(one) - 4)}
        assert len(shingles(" ".join(one))) == len(runs)
        for two in found:
            other = {" ".join(two[i : i + 5]) for i in range(len(two) - 4)}
            ours = jaccard(shingles(" ".join(one)), shingles(" ".join(two)))
            assert ours == pytest.approx(len(runs & other) / len(runs | other))
    assert len(shingles("")) == len(shingles("two words")) == 1  # too short: the whole is one shingle
    assert (shingles("Same, words! HERE (five) now") == shingles("same words here five now")).all()


def test_minhash_against_a_loop_in_python():
    found = shingles(" ".join(prose(0, 300)))
    ours = minhash(found, 10)
    for i in range(10):
        a, b = (int(data.sha256(f"{name}{i}".encode())[:8], 16) % data.PRIME for name in "ab")
        assert ours[i] == min((a * int(x) + b) % data.PRIME for x in found)
    assert data.PRIME == 4294967291  # the largest prime below 2**32, so that no product overflows
    assert all(data.PRIME % k for k in range(2, 65_536))


def test_equal_minima_estimate_the_similarity():
    base = prose(3, 400)
    other = base[:300] + prose(4, 100)
    a, b = shingles(" ".join(base)), shingles(" ".join(other))
    share = (minhash(a, 4000) == minhash(b, 4000)).mean()
    assert share == pytest.approx(jaccard(a, b), abs=0.03)


def test_near_duplicates_against_all_pairs():
    documents = []
    for seed in range(30):
        base = prose(seed, 120)
        documents.append(" ".join(base))
        for keep in (118, 110, 95, 60):  # words that stay at the front: a range of similarities
            documents.append(" ".join(base[:keep] + prose(1000 + seed * 10 + keep, 120 - keep)))
    sets = [shingles(document) for document in documents]
    found = near_duplicates(documents)
    for i, (j, alike) in found.items():
        assert j < i and j not in found and alike == jaccard(sets[i], sets[j]) >= 0.5
    close = [i for i in range(len(sets)) if any(jaccard(sets[i], sets[j]) > 0.8 for j in range(i))]
    assert len(close) > 40 and sum(i in found for i in close) / len(close) > 0.95
    assert not any(i % 5 == 0 for i in found)  # different seeds are different texts


def test_the_share_found_follows_the_bands():
    met = {0.45: [], 0.7: []}
    for seed in range(400):
        base = prose(seed, 84)
        for share, results in met.items():
            same = round(80 * 2 * share / (1 + share)) + 4
            pair = [" ".join(base), " ".join(base[:same] + prose(9999 + seed, 84 - same))]
            results.append(bool(near_duplicates(pair, threshold=0.1)))
    for share, results in met.items():
        expected = 1 - (1 - share**2) ** 5
        assert abs(np.mean(results) - expected) < 4 * (expected * (1 - expected) / 400) ** 0.5 + 0.02


def test_datasketch_finds_the_same_pairs():
    from datasketch import MinHash, MinHashLSH

    documents = [" ".join(prose(seed // 2, 100)[: 100 - seed % 2]) for seed in range(60)]
    index, found = MinHashLSH(threshold=0.8, num_perm=64), {}
    for i, document in enumerate(documents):
        signature = MinHash(num_perm=64, seed=3)
        signature.update_batch([str(x).encode() for x in shingles(document).tolist()])
        found[i] = sorted(index.query(signature))
        index.insert(i, signature)
    assert {i: near[0] for i, near in found.items() if near} == {
        i: j for i, (j, _) in near_duplicates(documents).items()
    }


def test_deduplicate_keeps_the_first_and_the_order():
    one, two = " ".join(prose(1, 50)), " ".join(prose(2, 50))
    assert deduplicate([two, one, two, one + " x", two]) == [two, one]


# --- decontamination ---


def test_words_and_grams():
    text = 'He said:  "GO_HOME!" -- now\n3,000 times.'
    assert [word for word, _, _ in words(text)] == ["he", "said", "gohome", "now", "3000", "times"]
    assert [text[a:b] for _, a, b in words(text)] == ["He", "said:", '"GO_HOME!"', "now", "3,000", "times."]
    found = list(grams(words(text), 3))
    assert len(found) == 4 and found[2] == ("gohome now 3000", text.index('"GO'), text.index(" times"))
    assert not list(grams(words("too short"), 13))


@given(st.integers(0, 300), st.lists(st.tuples(st.integers(0, 290), st.integers(1, 40)), max_size=6))
@settings(max_examples=200, deadline=None)
def test_cut_out_against_a_mask_of_letters(length, spans):
    """The slow twin marks every letter that goes, and splits what is left."""
    document = "".join(random.Random(length).choice(string.ascii_letters) for _ in range(length))
    places = [(start, min(length, start + n)) for start, n in spans if start < length]
    gone = [any(a - 7 <= i < b + 7 for a, b in places) for i in range(length)]
    marked = "".join(" " if lost else letter for lost, letter in zip(gone, document))
    expected = [piece for piece in marked.split(" ") if len(piece) >= 5] if places else [document]
    assert cut_out(document, places, window=7, shortest=5) == expected


def lines(seed: int, n_words: int) -> str:
    return " ".join(prose(seed, n_words, vocabulary=100_000))


def test_decontaminate_cuts_the_run_and_200_letters_around_it():
    before, leak, after = lines(1, 200), lines(2, 13), lines(3, 200)
    document = f"{before} {leak} {after}"
    (pieces,) = decontaminate([document], [f"{lines(4, 50)} {leak.upper()}! {lines(5, 50)}"])
    start, end = document.index(leak), document.index(leak) + len(leak)
    assert pieces == [document[: start - 200], document[end + 200 :]]
    assert decontaminate([document], [" ".join(leak.split()[:12])]) == [[document]]  # twelve words are no gram


def test_short_pieces_go_and_so_do_documents_in_many_pieces():
    leaks = [lines(100 + i, 13) for i in range(12)]
    exam = ["\n".join(leaks)]

    def document(n_leaks):
        parts = [lines(200, 200)]
        for i in range(n_leaks):
            parts += [leaks[i], lines(300 + i, 200)]
        return " ".join(parts)

    nine, ten = decontaminate([document(9), document(10)], exam)
    assert len(nine) == 10 and ten == []  # ten pieces stay, eleven are too many
    start = f"{lines(7, 60)[:390]} {leaks[0]} {lines(8, 200)}"  # 190 letters are left before the window
    (pieces,) = decontaminate([start], exam)
    assert len(pieces) == 1 and pieces[0] == start[start.index(leaks[0]) + len(leaks[0]) + 200 :]


def test_a_run_in_more_than_ten_documents_is_a_saying():
    saying, exam = lines(50, 13), [lines(50, 13)]
    documents = [f"{lines(60 + i, 100)} {saying} {lines(80 + i, 100)}" for i in range(11)]
    assert decontaminate(documents, exam) == [[document] for document in documents]
    assert all(len(pieces) == 2 for pieces in decontaminate(documents[:10], exam))
    twice = f"{documents[0]} {lines(98, 100)} {saying} {lines(99, 100)}"  # twice in one document counts once
    assert len(decontaminate([twice, *documents[1:10]], exam)[0]) == 3


def test_isaiah_loses_the_chapters_it_shares_with_kings():
    bible = texts.king_james()
    kings = next(book for book in bible if book.startswith("The Second Book of the Kings"))
    isaiah = next(book for book in bible if "Isaiah" in book[:40])
    assert held_out(kings) and not held_out(isaiah)
    (pieces,) = decontaminate([isaiah], [kings])
    assert "36:5 " not in "".join(pieces) and "38:1 " not in "".join(pieces)
    assert " 35:10 And the ransomed" in pieces[0] and "\n40:2 Speak ye comfortably" in pieces[-1]


# --- mixing, ordering, packing ---


def test_table_2_2():
    tokens, weights, printed = zip(*shown["TABLE_2_2"].values())
    assert (sum(tokens), sum(weights)) == (499, 101)
    ours = epochs(dict(enumerate(tokens)), dict(enumerate(weights)), 303)  # 303 / 101: each weight in whole billions
    assert [round(ours[i], 2) for i in range(5)] == [0.44, 3.47, 2.0, 0.44, 3.0]
    assert printed == (0.44, 2.9, 1.9, 0.43, 3.4)


def test_epochs_add_up_and_name_what_is_missing():
    found = epochs({"a": 10, "b": 40}, {"a": 3, "b": 1}, 100)
    assert found == {"a": 7.5, "b": 0.625}
    with pytest.raises(DataError, match="no size given for c, d"):
        epochs({"a": 1}, {"d": 1, "c": 1, "a": 1}, 10)
    assert sum(data.FAMILY_WEIGHTS.values()) == pytest.approx(1)


@given(st.integers(0, 60), st.integers(0, 5), st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_every_epoch_visits_each_document_once(n, epoch, seed):
    order = visiting_order(n, epoch, seed)
    assert sorted(order) == list(range(n)) and order == visiting_order(n, epoch, seed)


def test_orders_differ_and_are_fair():
    first = [visiting_order(8, epoch)[0] for epoch in range(4000)]
    assert ((np.bincount(first, minlength=8) - 500) ** 2 / 500).sum() < 30  # chi squared, 7 degrees of freedom
    assert visiting_order(50, 0) != visiting_order(50, 1) != visiting_order(50, 1, seed=1)


@given(st.lists(st.lists(st.integers(1, 9), max_size=12), max_size=8), st.integers(1, 9))
@settings(deadline=None)
def test_windows_hold_the_stream_and_waste_less_than_one(documents, n_ctx):
    windows = fill_windows(documents, n_ctx, end=0)
    stream = [token for document in documents for token in [0] + document]
    flat = [token for window in windows for token in window]
    assert all(len(window) == n_ctx for window in windows)
    assert flat == stream[: len(flat)] and len(stream) - len(flat) < n_ctx


# --- the family's text ---


@pytest.fixture(scope="module")
def family():
    """(training, validation): about a minute."""
    return data.family_split()


def test_the_family_reads_what_the_manifest_says(family):
    training, validation = family
    noted = texts.manifest()["family"]
    assert {name: len(each) for name, each in training.items()} == noted["documents"]
    assert {name: sum(map(len, each)) for name, each in training.items()} == noted["letters"]
    assert {name: len(each) for name, each in validation.items()} == noted["held_out"]
    assert list(training) == list(validation) == list(data.FAMILY_WEIGHTS)
    assert all(held_out(document) for each in validation.values() for document in each)


def test_the_family_shares_no_run_of_thirteen_words_with_its_exam(family):
    training, validation = family
    exam = {gram for each in validation.values() for d in each for gram, _, _ in grams(words(d))}
    pieces = [piece for name in ("bible", "crawl") for piece in training[name]] + training["speeches"][::9]
    assert not any(gram in exam for piece in pieces for gram, _, _ in grams(words(piece)))


def test_a_changed_cleaning_is_noticed(monkeypatch):
    sources = {name: [f"{name} {lines(i, 30)}"] for i, name in enumerate(data.FAMILY_WEIGHTS)}
    monkeypatch.setattr(data, "family_sources", lambda: sources)
    with pytest.raises(DataError, match="the cleaning has changed"):
        data.family_split()


def test_an_altered_list_is_refused(tmp_path, monkeypatch):
    altered = tmp_path / "crawl_kept.txt"
    altered.write_text("0" * 12 + "\n")
    monkeypatch.setattr(data, "KEPT", altered)
    with pytest.raises(DataError, match="SHA-256"):
        data.kept_pages()


# --- bad input, and what an import costs ---


@pytest.mark.parametrize("call", [near_duplicates, deduplicate, lambda d: decontaminate(d, [])])
@pytest.mark.parametrize(
    "documents, complaint",
    [
        ("a text", "list of documents"),
        (b"a", "list"),
        ([], "at least one"),
        (["a", b"b"], "document 1 is of type bytes"),
    ],
)
def test_what_is_no_list_of_texts_is_named(call, documents, complaint):
    with pytest.raises(DataError, match=complaint):
        call(documents)


def test_importing_needs_no_library_of_the_book():
    code = (
        "import sys; sys.modules.update({'sklearn': None, 'datasketch': None, 'datatrove': None})\n"
        "from gpt3lib import data\n"
        "assert data.deduplicate(['a b c']) == ['a b c']"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
