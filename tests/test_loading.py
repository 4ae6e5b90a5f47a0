"""Shards and the loader against lists, slow loops, other people's tokenizer, and files that were damaged on purpose."""

import contextlib
import errno
import json
import math
import random
import subprocess
import sys
import tempfile
import textwrap
import time
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt3lib import loading
from gpt3lib.loading import (
    Loader,
    LoadingError,
    Tokens,
    drawn,
    in_threads,
    permuted,
    read_documents,
    regroup,
    round_keys,
    stream_dataset,
    text_pieces,
    text_size,
    whole_parts,
    write_tokens,
)
from gpt3lib.model import GPT, GPTConfig
from gpt3lib.texts import DATA
from gpt3lib.tokenization import Tokenizer
from gpt3lib.training import pack, train

TABLE_2_2 = {"Common Crawl": 60, "WebText2": 22, "Books1": 8, "Books2": 8, "Wikipedia": 3}
DOCUMENTS = [
    "To be,\nor not to be",
    "",
    "  two  spaces\tand a tab ",
    "Ἀρχή <|endoftext|> 漢字 🜁",
    "half \ud83d a pair",
    "\n \n",
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(DATA / "tokenizer-4353.bpe")


def places_of(n: int) -> np.ndarray:
    return np.arange(n, dtype=np.int64)


GOLDEN_ORDER = [2, 9, 4, 5, 0, 3, 6, 1, 7, 8]
GOLDEN_PLACES = [
    ("plays", 0, 4258),
    ("plays", 0, 4487),
    ("bible", 0, 501),
    ("plays", 0, 1194),
    ("plays", 153, 750090),
    ("plays", 153600000, 750000000450),
]


# --- a shuffle without a list ----------------------------------------------------------------------------------------

LOW = 2**64 - 1


def one_by_one(place: int, n: int, keys) -> int:
    """The same walk in Python's own numbers, for one place."""
    side = math.isqrt(n - 1) + 1
    while True:
        row, column = divmod(place, side)
        for key in map(int, keys):
            mixed = column ^ key
            mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 & LOW
            mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB & LOW
            row, column = column, (row + (mixed ^ (mixed >> 31)) % side) % side
        place = row * side + column
        if place < n:
            return place


def test_every_number_up_to_400_is_shuffled_without_loss():
    for n in range(1, 401):
        for key in range(3):
            assert sorted(permuted(places_of(n), n, round_keys(key, n)).tolist()) == list(range(n))


@given(n=st.integers(1, 10**15), key=st.integers(0, 2**70), dice=st.randoms(use_true_random=False))
def test_large_shuffles_are_one_to_one_and_equal_the_walk_of_a_single_place(n, key, dice):
    places = sorted({dice.randrange(n) for _ in range(50)})
    keys = round_keys("seed", key)
    found = permuted(np.array(places), n, keys).tolist()
    assert len(set(found)) == len(places) and all(0 <= place < n for place in found)
    assert found[:5] == [one_by_one(place, n, keys) for place in places[:5]]


@pytest.mark.parametrize("n", [5, 10, 30])
def test_every_place_and_every_pair_of_places_gets_every_number_about_equally_often(n):
    orders = np.stack([permuted(places_of(n), n, round_keys("even", key)) for key in range(3000)])
    for found, cells in ((orders[:, 0], n), (orders[:, -1], n), (orders[:, 0] * n + orders[:, 1], n * (n - 1))):
        counts = np.unique(found, return_counts=True)[1]
        expected = 3000 / cells
        chi2 = ((counts - expected) ** 2).sum() / expected + (cells - len(counts)) * expected
        assert chi2 < cells + 6 * math.sqrt(2 * cells), (n, cells)


def test_neighbours_do_not_stay_neighbours():
    n = 10_000
    order = permuted(places_of(n), n, round_keys("far"))
    assert abs(np.corrcoef(places_of(n), order)[0, 1]) < 0.05
    gaps = np.abs(np.diff(order))
    assert abs(gaps.mean() - n / 3) < n / 100 and (gaps == 1).sum() < 12  # a random order has about 2


def test_keys_depend_on_every_word_and_the_golden_order_stays():
    assert len({round_keys(*words).tobytes() for words in [(0, "a", 1), (0, "a", 2), (1, "a", 1), (0, "b", 1)]}) == 4
    assert permuted(places_of(10), 10, round_keys(0, "plays", 0)).tolist() == GOLDEN_ORDER


# --- the mixture -----------------------------------------------------------------------------------------------------

weights = st.dictionaries(st.text("abcdef", min_size=1, max_size=2), st.integers(1, 1000), min_size=1, max_size=7)


@given(weights=weights, first=st.integers(0, 2**39))
def test_each_sequence_has_one_source_wherever_one_looks(weights, first):
    parts = whole_parts(weights)
    counts = drawn(parts, first + places_of(200))
    steps = np.diff(counts, axis=1)
    assert (counts.sum(axis=0) == first + places_of(200)).all()
    assert ((steps == 0) | (steps == 1)).all() and (steps.sum(axis=0) == 1).all()


@given(weights=weights, n=st.integers(0, 2**39))
def test_no_source_is_ever_far_from_its_share(weights, n):
    total = sum(weights.values())
    counts = dict(zip(whole_parts(weights), drawn(whole_parts(weights), np.array([n]))[:, 0].tolist()))
    for name, weight in weights.items():
        assert abs(counts[name] - Fraction(weight * n, total)) < (1 if len(weights) < 3 else 2)


def test_the_papers_mixture_is_within_a_thousandth_and_never_1_25_sequences_off():
    loader = Loader({name: range(10**9) for name in TABLE_2_2}, TABLE_2_2, 2048)
    counts = drawn(loader.parts, places_of(101 * 3))
    ideal = np.array([*loader.parts.values()])[:, None] * places_of(101 * 3) / 101
    assert np.abs(counts - ideal).max() < 1.25
    for n in (1_000_000, 146_484_375):  # the second: 300 billion tokens
        for name, count in loader.counts(n).items():
            assert abs(count / n / (TABLE_2_2[name] / 101) - 1) < 1e-3 and abs(count - n * TABLE_2_2[name] / 101) < 1.25
    tally = Counter(name for name, _, _ in loader.places(0, 10_100))
    assert tally == {name: 100 * weight for name, weight in TABLE_2_2.items()}


def test_weights_mean_what_is_written():
    assert whole_parts({"a": 0.1, "b": 0.2}) == {"b": 2, "a": 1}
    assert whole_parts({"b": 1, "a": 1, "c": 0}) == {"a": 1, "b": 1}
    assert whole_parts({"a": np.float64(0.6), "b": Fraction(2, 5)}) == {"a": 3, "b": 2}
    many = whole_parts({"a": math.pi, "b": 1.0, "c": 1e-9})
    assert abs(many["a"] / sum(many.values()) - math.pi / (math.pi + 1)) < 1e-5 and many["c"] == 1
    places = [
        Loader({"a": range(99), "b": range(99)}, w, 8).places(0, 50) for w in ({"a": 2, "b": 1}, {"b": 0.5, "a": 1})
    ]
    assert places[0] == places[1]  # neither the unit nor the order of the names matters


@pytest.mark.parametrize("bad", [-1, math.nan, math.inf, None, True, "1", [1], 1j])
def test_weights_that_are_none_are_named(bad):
    with pytest.raises(LoadingError, match="weight of b is"):
        Loader({"a": range(99), "b": range(99)}, {"a": 1, "b": bad}, 8)


# --- every token once an epoch ---------------------------------------------------------------------------------------


def positions(loader, name: str, places) -> list[int]:
    """Where each target of a source's windows lies in its endlessly repeated tokens, in the order of the windows."""
    n_ctx = loader.n_ctx
    return [p for source, _, w in places if source == name for p in range(w * n_ctx + 1, (w + 1) * n_ctx + 1)]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(9, 120), min_size=1, max_size=4),
    n_ctx=st.integers(1, 8),
    shares=st.lists(st.integers(1, 20), min_size=4, max_size=4),
    seed=st.integers(0, 1000),
    n_ranks=st.integers(1, 9),
    dice=st.randoms(use_true_random=False),
)
def test_every_token_is_a_target_once_an_epoch_for_any_number_of_ranks(lengths, n_ctx, shares, seed, n_ranks, dice):
    sources = {f"source {i}": torch.arange(length) for i, length in enumerate(lengths)}
    loader = Loader(sources, dict(zip(sources, shares)), n_ctx, seed)
    total = 300
    read, first = [[] for _ in range(n_ranks)], 0
    batches = []
    while first < total:  # a batch ramp, cut among the ranks in another way each time
        count = dice.randint(1, 40)
        cuts = sorted(dice.randint(0, count) for _ in range(n_ranks - 1))
        bounds = [0, *cuts, count]
        for rank in range(n_ranks):
            read[rank] += loader.places(first + bounds[rank], bounds[rank + 1] - bounds[rank])
        batches.append((first, count))
        first += count
    everything = [place for rank in read for place in rank]
    assert Counter(everything) == Counter(loader.places(0, first))
    for name, source in sources.items():
        n, found = len(source), positions(loader, name, everything)
        assert len(set(found)) == len(found)  # no token of any pass twice
        k = sum(place[0] == name for place in everything)
        done = k * n_ctx // n  # whole epochs
        begun = -(-done * n // n_ctx) * n_ctx  # where the last one begins
        assert set(range(1, begun + 1)) <= set(found)  # none of the finished ones is missing
        seen = Counter(p % n for p in found if p <= done * n)
        assert all(seen[token] == done for token in range(n))  # token 0 is a target when it follows the last one
        for epoch in {e for s, e, _ in everything if s == name}:
            starts = [w * n_ctx for s, e, w in everything if s == name and e == epoch]
            assert all(epoch * n <= start < (epoch + 1) * n for start in starts)


@settings(max_examples=40, deadline=None)
@given(st.integers(10, 60), st.integers(1, 9), st.integers(0, 99), st.integers(0, 10**6), st.integers(0, 9))
def test_sequences_are_the_windows_of_the_repeated_tokens(length, n_ctx, seed, first, count):
    tokens = torch.randperm(length, generator=torch.Generator().manual_seed(seed)) + 1000
    loader = Loader({"a": tokens, "b": tokens[:10].int()}, {"a": 2, "b": 1}, n_ctx, seed)
    inputs, targets = loader.sequences(first, count)
    assert inputs.shape == targets.shape == (count, n_ctx) and inputs.dtype == targets.dtype == torch.int64
    for i in range(count):
        name, epoch, window = loader.where(first + i)
        source = loader.sources[name].tolist()
        row = [source[(window * n_ctx + j) % len(source)] for j in range(n_ctx + 1)]
        assert inputs[i].tolist() == row[:-1] and targets[i].tolist() == row[1:]
        assert epoch == window * n_ctx // len(source)


def test_the_order_is_that_of_a_list_that_is_shuffled_every_epoch():
    tokens, n_ctx, seed = torch.arange(1003), 10, 5
    loader = Loader({"a": tokens}, {"a": 1}, n_ctx, seed)
    slow = []
    for epoch in range(4):
        windows = [w for w in range(500) if epoch * 1003 <= w * n_ctx < (epoch + 1) * 1003]
        keys = round_keys(seed, "a", epoch)
        slow += [windows[one_by_one(place, len(windows), keys)] for place in range(len(windows))]
    assert [w for _, _, w in loader.places(0, 402)] == slow[:402]
    assert slow[:100] != [w - 101 for w in slow[101:201]]  # another order in each epoch


def test_seeds_and_epochs_have_orders_of_their_own_and_the_golden_places_stay():
    sources = {"plays": range(5_000_000), "bible": range(900_000)}
    orders = [Loader(sources, {"plays": 3, "bible": 1}, 1024, seed).places(0, 40) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert [name for name, *_ in orders[0]] == [name for name, *_ in orders[2]]
    loader = Loader(sources, {"plays": 3, "bible": 1}, 1024, 0)
    found = [loader.where(i) for i in (0, 1, 2, 3, 10**6, 10**12)]
    assert found == GOLDEN_PLACES and json.loads(json.dumps(found)) == [list(place) for place in found]


def test_epochs_of_the_papers_table():
    sizes = {"Common Crawl": 410, "WebText2": 19, "Books1": 12, "Books2": 55, "Wikipedia": 3}
    loader = Loader({name: range(size * 10**9) for name, size in sizes.items()}, TABLE_2_2, 2048)
    epochs = loader.epochs(300 * 10**9 // 2048)
    for name, size in sizes.items():
        assert epochs[name] == pytest.approx(TABLE_2_2[name] / 101 * 300 / size, rel=1e-6)


def test_what_a_loader_depends_on_is_written_down(tokenizer, tmp_path):
    one, two = (write_tokens([f"text {i} " * 50], tmp_path / f"{i}", tokenizer) for i in range(2))
    loaders = [
        Loader({"a": s}, {"a": 3}, 8, seed) for s, seed in ((one, 0), (Tokens(tmp_path / "0"), 0), (two, 0), (one, 1))
    ]
    a, again, other, seed = (json.loads(json.dumps(loader.identity())) for loader in loaders)
    assert a == again and a != other and a != seed
    assert loaders[0].bytes_per_token == pytest.approx(one.n_bytes / len(one))
    assert Loader({"a": torch.arange(20)}, {"a": 1}, 8).bytes_per_token is None
    both = Loader({"a": one, "b": two}, {"a": 3, "b": 1}, 8).bytes_per_token
    assert both == pytest.approx(0.75 * one.bytes_per_token + 0.25 * two.bytes_per_token)


MIXTURES = {
    "no sources": (({}, {}, 8), "dicts"),
    "a list": (([range(99)], [1], 8), "dicts"),
    "another name": (({"a": range(99)}, {"b": 1}, 8), r"\['a'\].*\['b'\]"),
    "a short text": (({"a": range(8)}, {"a": 1}, 8), "a has 8 tokens, a window needs 8 \\+ 1"),
    "a batch": (({"a": torch.zeros(9, 9)}, {"a": 1}, 8), r"shape \(9, 9\)"),
    "no weight": (({"a": range(9)}, {"a": 0}, 8), "all weights are 0"),
    "no window": (({"a": range(9)}, {"a": 1}, 0), "n_ctx is 0"),
    "half a window": (({"a": range(9)}, {"a": 1}, 2.5), "n_ctx is 2.5"),
    "a seed in words": (({"a": range(9)}, {"a": 1}, 2, "seed"), "seed is 'seed'"),
}


@pytest.mark.parametrize("arguments, words", MIXTURES.values(), ids=MIXTURES)
def test_mixtures_that_cannot_be_are_named(arguments, words):
    with pytest.raises(LoadingError, match=words):
        Loader(*arguments)


@pytest.mark.parametrize("call", ["where", "sequences", "places", "counts", "epochs"])
@pytest.mark.parametrize("bad", [-1, 1.0, None, "3", 2**41])
def test_numbers_that_are_no_sequence_are_named(call, bad):
    loader = Loader({"a": torch.arange(9)}, {"a": 1}, 2)
    with pytest.raises(LoadingError, match="must be a whole number"):
        getattr(loader, call)(*([bad, 1] if call in ("sequences", "places") else [bad]))
    with pytest.raises(LoadingError, match="must be a whole number"):
        loader.sequences(0, bad)


# --- shards ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_tokens", [1, 7, 2**25])
def test_shards_hold_what_pack_makes(tokenizer, tmp_path, shard_tokens):
    tokens = write_tokens(DOCUMENTS, tmp_path / "t", tokenizer, shard_tokens)
    packed = pack(tokenizer, DOCUMENTS)
    assert torch.equal(tokens[:], packed) and tokens[:].dtype == torch.int64
    assert tokens.n_documents == len(DOCUMENTS) and len(tokens) == len(packed)
    assert tokens.n_bytes == sum(len(d.encode("utf-8", "replace")) for d in DOCUMENTS) + 2  # U+FFFD for half a pair
    assert len(tokens.shards) == -(-len(packed) // shard_tokens)
    again = Tokens(tmp_path / "t")
    assert torch.equal(again[:], packed) and again.tokenizer.merges == tokenizer.merges
    assert not [*(tmp_path / "t").glob("*.part")]


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_slices_are_those_of_a_list(tokenizer, data):
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        tokens = write_tokens(["so many words in here"], Path(folder) / "t", tokenizer, data.draw(st.integers(1, 9)))
        plain = tokens[:].tolist()
        edges = st.none() | st.integers(-len(plain) - 2, len(plain) + 2)
        for _ in range(20):
            place = slice(data.draw(edges), data.draw(edges))
            assert tokens[place].tolist() == plain[place] and tokens[place].dtype == torch.int64
        for i in range(-len(plain), len(plain)):
            assert tokens[i] == plain[i]
        for i in (len(plain), -len(plain) - 1):
            with pytest.raises(IndexError):
                tokens[i]
        with pytest.raises(LoadingError, match="steps of 2"):
            tokens[::2]
        del tokens


def test_files_are_what_the_manifest_says(tokenizer, tmp_path):
    write_tokens(["a text " * 100], tmp_path, tokenizer, shard_tokens=50)
    about = json.loads((tmp_path / "manifest.json").read_text())
    assert about["format"] == "gpt3lib tokens 1" and about["dtype"] == "uint16" and about["vocab_size"] == 4353
    assert about["n_documents"] == 1 and about["n_bytes"] == 700
    raw = b"".join((tmp_path / shard["file"]).read_bytes() for shard in about["shards"])
    ids = [low + 256 * high for low, high in zip(raw[::2], raw[1::2])]  # two bytes each, the lower first
    assert ids == pack(tokenizer, ["a text " * 100]).tolist() and about["n_tokens"] == len(ids)
    for shard in about["shards"]:
        assert loading.sha256(tmp_path / shard["file"]) == shard["sha256"]
    assert about["tokenizer"] == loading.sha256(tmp_path / "merges.bpe")


def test_more_than_65536_ids_take_four_bytes(tokenizer, tmp_path, monkeypatch):
    assert loading.token_type(65536) == "uint16" and loading.token_type(65537) == "uint32"
    monkeypatch.setattr(Tokenizer, "vocab_size", property(lambda self: 70_000))
    tokens = write_tokens(["four bytes"], tmp_path, tokenizer)
    assert tokens.dtype == "uint32" and tokens.shards[0].dtype == np.dtype("<u4")
    assert torch.equal(tokens[:], pack(tokenizer, ["four bytes"]))


@given(st.lists(st.lists(st.integers(0, 9), max_size=9), max_size=9), st.integers(1, 12))
def test_regrouped_rows_are_the_same_row(rows, size):
    flat = [i for row in rows for i in row]
    found = [part.tolist() for part in regroup((np.array(row, np.int64) for row in rows), size)]
    assert found == [flat[i : i + size] for i in range(0, len(flat), size)]


# --- a text in pieces ------------------------------------------------------------------------------------------------

words = st.text(st.sampled_from("ab 'st\n\t\x1c\x85\u3000é7.!漢 \u200b"), max_size=60)


@settings(max_examples=300)
@given(parts=st.lists(words, max_size=4), size=st.integers(1, 30))
def test_pieces_are_the_text_and_its_ids(tokenizer, parts, size):
    text = "".join(parts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "PIECE", size)
        pieces, again = list(text_pieces(text)), list(text_pieces(parts))
    assert pieces == again and "".join(pieces) == text
    assert all(len(piece) <= size for piece in pieces)
    longest = max(map(len, text.split()), default=0)
    blank = max(map(len, (run for run in loading.re.split(r"\S+", text))), default=0)
    if longest + blank < size and all(c in " \n" or not c.isspace() for c in text):
        ids = [i for piece in pieces for i in tokenizer.encode(piece)]
        assert ids == tokenizer.encode(text)


@settings(max_examples=200)
@given(text=st.text(st.sampled_from("ab 'st\n7.!\u00a0\x1c漢"), max_size=80), size=st.integers(4, 40))
def test_a_cut_before_white_space_changes_no_id(tokenizer, text, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "PIECE", size)
        pieces = list(text_pieces(text))
    ends = np.cumsum([len(piece) for piece in pieces])[:-1]
    if all(text[end - 1 : end].strip() and text[end] in " \n" for end in ends):
        assert [i for piece in pieces for i in tokenizer.encode(piece)] == tokenizer.encode(text)


def test_a_word_without_end_is_cut_and_nothing_is_lost(monkeypatch):
    monkeypatch.setattr(loading, "PIECE", 100)
    for text in ("x" * 1050, " " * 1050, "a " + "b" * 500 + " c", "\n" * 99 + "a" + "\n" * 300):
        pieces = list(text_pieces(text))
        assert "".join(pieces) == text and max(map(len, pieces)) <= 100


def test_pieces_come_while_the_text_is_still_being_read():
    asked = []

    def parts():
        for i in range(100):
            asked.append(i)
            yield "word " * (loading.PIECE // 10)

    pieces = text_pieces(parts())
    next(pieces)
    assert len(asked) <= 4


def test_threads_keep_the_order_and_read_little_ahead():
    asked = []

    def items():
        for i in range(50):
            asked.append(i)
            yield i

    dice = random.Random(0)
    results = in_threads(lambda i: (time.sleep(dice.random() / 500), i * i)[1], items(), 3)
    for i, result in enumerate(results):
        assert result == i * i and len(asked) <= i + 8


# --- what is refused, what is damaged --------------------------------------------------------------------------------

WRITING = {
    "one text": (lambda t: ("To be", t), "for one text use"),
    "bytes": (lambda t: (b"To be", t), "for one text use"),
    "no documents": (lambda t: ([], t), "no text"),
    "empty documents": (lambda t: (["", ""], t), "no text"),
    "a number": (lambda t: (["a", 3], t), "holds a int"),
    "bytes inside": (lambda t: ([b"a"], t), "holds a int"),
    "no tokenizer": (lambda t: (["a"], "gpt2"), "must be a Tokenizer"),
    "no shard": (lambda t: (["a"], t, 0), "shard_tokens is 0"),
    "no thread": (lambda t: (["a"], t, 9, -1), "n_threads is -1"),
}


@pytest.mark.parametrize("arguments, words", WRITING.values(), ids=WRITING)
def test_what_cannot_be_written_is_named_and_leaves_nothing(tokenizer, tmp_path, arguments, words):
    documents, *others = arguments(tokenizer)
    with pytest.raises(LoadingError, match=words):
        write_tokens(documents, tmp_path / "t", *others)
    assert not (tmp_path / "t").exists() or not [*(tmp_path / "t").iterdir()]


def test_finished_tokens_are_not_overwritten_and_unfinished_ones_are(tokenizer, tmp_path):
    write_tokens(["first " * 40], tmp_path, tokenizer, shard_tokens=9)
    with pytest.raises(LoadingError, match="holds tokens already"):
        write_tokens(["second"], tmp_path, tokenizer)
    (tmp_path / "manifest.json").unlink()  # as after a kill
    (tmp_path / "shard-00077.bin.part").write_bytes(b"half")
    (tmp_path / "mine.txt").write_text("a user's own file")
    with pytest.raises(LoadingError, match="no manifest"):
        Tokens(tmp_path)
    tokens = write_tokens(["second"], tmp_path, tokenizer)
    assert tokens.tokenizer.decode(tokens[1:].tolist()) == "second"
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["manifest.json", "merges.bpe", "mine.txt", "shard-00000.bin"]


def test_folders_are_made_and_every_core_takes_part(tokenizer, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(loading.os, "cpu_count", lambda: 3)
    monkeypatch.setattr(loading, "in_threads", lambda f, items, n: asked.append(n) or in_threads(f, items, n))
    write_tokens(["words"], tmp_path / "a" / "b" / "c", tokenizer)
    assert len(Tokens(str(tmp_path / "a" / "b" / "c"))) == 3 and asked == [3]


def test_an_interrupt_removes_what_was_written(tokenizer, tmp_path):
    def documents():
        yield "words and more words " * 100_000
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_tokens(documents(), tmp_path, tokenizer, shard_tokens=100)
    assert not [*tmp_path.iterdir()]


def test_a_full_disk_is_named_and_leaves_nothing(tokenizer, tmp_path, monkeypatch):
    real, written = Path.write_bytes, []

    def write(self, data):
        written.append(self)
        if len(written) > 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, data)

    monkeypatch.setattr(Path, "write_bytes", write)
    with pytest.raises(LoadingError, match="No space left"):
        write_tokens(["word " * 500], tmp_path, tokenizer, shard_tokens=20)
    assert len(written) > 4 and not [*tmp_path.iterdir()]


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on the size of a file")
def test_a_file_that_may_not_grow_is_named(tmp_path):
    code = f"""
    import resource
    from pathlib import Path
    from gpt3lib.loading import LoadingError, write_tokens
    from gpt3lib.texts import DATA
    from gpt3lib.tokenization import Tokenizer
    tokenizer = Tokenizer.load(DATA / "tokenizer-4353.bpe")
    folder = Path({str(tmp_path)!r}) / "t"
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    try:
        write_tokens(["word and " * 100_000], folder, tokenizer)
    except LoadingError as error:
        print(error)
    print([path.name for path in folder.iterdir()])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert "cannot be finished" in done.stdout and "\n[]" in done.stdout, done.stderr


def damage(folder: Path, change) -> None:
    path = folder / "manifest.json"
    about = json.loads(path.read_text())
    change(about)
    path.write_text(json.dumps(about))


def flip(path: Path, place: int = 5) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "a bit": (lambda f: flip(f / "shard-00001.bin"), "shard-00001.bin has SHA-256"),
    "a byte less": (lambda f: (f / "shard-00001.bin").write_bytes(b"x" * 19), "shard-00001.bin has 19 bytes.*says 20"),
    "a shard less": (lambda f: (f / "shard-00001.bin").unlink(), "shard-00001.bin has no bytes"),
    "two shards changed about": (
        lambda f: (f / "shard-00000.bin").write_bytes((f / "shard-00001.bin").read_bytes()),
        "shard-00000.bin has SHA-256",
    ),
    "another tokenizer": (lambda f: Tokenizer([(1, 2)]).save(f / "merges.bpe"), "merges.bpe has SHA-256"),
    "no tokenizer": (lambda f: (f / "merges.bpe").unlink(), "merges.bpe has no bytes"),
    "another dtype": (lambda f: damage(f, lambda a: a.update(dtype="uint32")), "dtype is 'uint32', not 'uint16'"),
    "another vocabulary": (
        lambda f: damage(f, lambda a: a.update(vocab_size=70_000)),
        "dtype is 'uint16', not 'uint32'",
    ),
    "another format": (lambda f: damage(f, lambda a: a.update(format="2")), "format is '2'"),
    "another count": (lambda f: damage(f, lambda a: a.update(n_tokens=5)), "counts make no sense"),
    "a vocabulary of 900": (
        lambda f: damage(f, lambda a: a.update(vocab_size=900)),
        "vocab_size is 900 in manifest.json, not 4353",
    ),
    "no count": (lambda f: damage(f, lambda a: a.pop("n_bytes")), "n_bytes"),
    "half a manifest": (lambda f: (f / "manifest.json").write_text('{"format": '), "is damaged"),
    "a list": (lambda f: (f / "manifest.json").write_text("[]"), "is damaged"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "has no manifest.json"),
    "a path": (lambda f: damage(f, lambda a: a["shards"][0].update(file="../x.bin")), "x.bin has no bytes"),
    "a number for a name": (lambda f: damage(f, lambda a: a["shards"][0].update(file=3)), "is damaged"),
    "a number for a hash": (lambda f: damage(f, lambda a: a["shards"][0].update(sha256=3)), "not 3…"),
}


@pytest.mark.parametrize("harm, words", DAMAGES.values(), ids=DAMAGES)
def test_damaged_tokens_are_named(tokenizer, tmp_path, harm, words):
    write_tokens(["so many words in here " * 9], tmp_path, tokenizer, shard_tokens=10)
    Tokens(tmp_path)
    harm(tmp_path)
    with pytest.raises(LoadingError, match=words):
        Tokens(tmp_path)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_manifest_of_anything_is_a_named_error_or_the_tokens(tokenizer, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("any")
    write_tokens(["words"], folder, tokenizer)
    about = json.loads((folder / "manifest.json").read_text())
    junk = st.one_of(
        st.none(), st.integers(-5, 10**30), st.text(max_size=3), st.lists(st.integers(), max_size=2), st.booleans()
    )
    place = about if data.draw(st.booleans()) else about["shards"][0]
    place[data.draw(st.sampled_from(sorted(place)))] = data.draw(junk)
    (folder / "manifest.json").write_text(json.dumps(about))
    with contextlib.suppress(LoadingError):
        assert len(Tokens(folder)) == 3


def test_without_verify_only_a_hash_goes_unnoticed(tokenizer, tmp_path):
    write_tokens(["so many words"], tmp_path, tokenizer)
    flip(tmp_path / "shard-00000.bin")
    Tokens(tmp_path, verify=False)
    with pytest.raises(LoadingError, match="SHA-256"):
        Tokens(tmp_path)


def test_sources_of_two_tokenizers_are_refused(tokenizer, tmp_path):
    one = write_tokens(["so many words " * 9], tmp_path / "1", tokenizer)
    two = write_tokens(["so many words " * 9], tmp_path / "2", Tokenizer([(1, 2)]))
    with pytest.raises(LoadingError, match="tokenizers differ"):
        Loader({"a": one, "b": two}, {"a": 1, "b": 1}, 8)


# --- documents -------------------------------------------------------------------------------------------------------


def texts_at(path, **options) -> list[str]:
    return [d if isinstance(d, str) else "".join(d) for d in read_documents(path, **options)]


def test_documents_of_files_and_folders(tmp_path, tokenizer):
    (tmp_path / "b.txt").write_bytes("\ufeffein Buch\r\nmit zwei Zeilen".encode())
    (tmp_path / "sub").mkdir()
    rows = [{"text": "one\nline"}, {"text": ""}, {"text": "Ἀρχή", "more": 1}]
    (tmp_path / "sub" / "a.JSONL").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (tmp_path / "c.md").write_text("# notes")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    found = texts_at(tmp_path)
    assert found == ["ein Buch\r\nmit zwei Zeilen", "# notes", "one\nline", "", "Ἀρχή"]
    assert text_size(tmp_path) == sum((tmp_path / p).stat().st_size for p in ("b.txt", "c.md", "sub/a.JSONL"))
    assert texts_at(tmp_path / "b.txt") == found[:1]
    (tmp_path / "d.jsonl").write_text('{"body": "x"}')
    assert texts_at(tmp_path / "d.jsonl", field="body") == ["x"]
    tokens = write_tokens(read_documents(tmp_path / "sub"), tmp_path / "t", tokenizer)
    assert torch.equal(tokens[:], pack(tokenizer, found[2:]))


FILES = {
    "binary": ("a.txt", b"text\0text", "a.txt holds zeros: it is binary"),
    "latin": ("a.txt", "Übermut".encode("latin-1"), "UTF-8, see byte 0; .*iconv -f latin1 -t utf-8 .*a.txt > NEW"),
    "latin later": ("a.txt", b"\n" * 3000 + b"\xe9", "see byte 3000;"),
    "latin far": ("a.txt", "é".encode() * 2**20 + b"\xe9t", "see byte 2097152;"),
    "latin lines": ("a.jsonl", b'{"text": "a"}\n' * 9000 + b"\xe9", "see byte 126000;"),
    "latin after a mark": ("a.txt", b"\xef\xbb\xbfb\xe9t", "see byte 4;"),
    "cut in a letter": ("a.txt", "aé".encode()[:-1], "see byte 1;"),
    "a picture": ("a.png", b"\x89PNG\r\n", "UTF-8"),
    "no json": (
        "a.jsonl",
        b'{"text": "a"}\r\n\n{"text": "b"}\n{nothing',
        r"a.jsonl, line 4, has no text called 'text', but '\{nothing'; it must be one object, such as \{\"text\": ",
    ),
    "no such field": ("a.jsonl", b'\n{"body": "a"}', r"line 2, has no text called 'text', but \['body'\]"),
    "a list": ("a.jsonl", b"[1]", "line 1, has no text"),
    "a number": ("a.jsonl", b'{"text": 3}', "line 1, has no text"),
    "deep": ("a.jsonl", b"[" * 100_000, "line 1, has no text"),
}


@pytest.mark.parametrize("name, data, words", FILES.values(), ids=FILES)
def test_files_that_are_no_text_are_named(tmp_path, name, data, words):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(LoadingError, match=words) as caught:
        texts_at(tmp_path / name)
    assert name in str(caught.value)


def test_missing_and_empty_places_are_named(tmp_path, tokenizer):
    for path in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(LoadingError, match="no file and no folder"):
            texts_at(path)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(LoadingError, match="no text"):
        write_tokens(read_documents(tmp_path), tmp_path / "t", tokenizer)
    (tmp_path / "empty.txt").write_text("one text")
    for name in ("t", "u"):  # what is written beside the texts is not read as one of them
        tokens = write_tokens(read_documents(tmp_path), tmp_path / name, tokenizer)
        assert tokens.n_documents == 1


def test_a_hugging_face_dataset_streams(tmp_path, tokenizer):
    datasets = pytest.importorskip("datasets")
    texts = [f"document {i} " * (i % 7) for i in range(300)]
    rows = datasets.Dataset.from_dict({"text": texts, "n": list(range(300))})
    rows.to_parquet(tmp_path / "rows.parquet")
    rows.to_json(tmp_path / "rows.jsonl")
    for kind, file in (("parquet", "rows.parquet"), ("json", "rows.jsonl")):
        options = {
            "data_files": str(tmp_path / file),
            "split": "train",
            "streaming": True,
            "cache_dir": str(tmp_path / "c"),
        }
        stream = datasets.load_dataset(kind, **options)
        assert isinstance(stream, datasets.IterableDataset)
        tokens = write_tokens(stream_dataset(stream), tmp_path / kind, tokenizer)
        assert torch.equal(tokens[:], pack(tokenizer, texts))
    assert texts_at(tmp_path / "rows.jsonl") == texts
    with pytest.raises(LoadingError, match=r"row 0 has no text called 'body', but \['text', 'n'\]"):
        list(stream_dataset(rows, "body"))
    with pytest.raises(LoadingError, match="row 0 has no text called 'text', but 'train'"):
        list(stream_dataset({"train": rows}))


# --- speed, bars -----------------------------------------------------------------------------------------------------


def test_a_bar_of_bytes_runs_to_its_end(tokenizer, tmp_path, capsys):
    write_tokens(["word " * 1000] * 3, tmp_path, tokenizer, progress=True, total_bytes=15_000)
    assert "100%" in capsys.readouterr().err
    write_tokens(["word"], tmp_path / "quiet", tokenizer)
    assert not capsys.readouterr().err


def test_the_loader_feeds_ten_times_what_the_smallest_model_eats(tokenizer, tmp_path):
    tokens = write_tokens(["so many words in here " * 20_000], tmp_path, tokenizer, shard_tokens=50_000)
    config = GPTConfig.from_name("gpt3-100k", n_ctx=256)
    loader = Loader({"a": tokens}, {"a": 1}, 256)
    rates = []
    for turn in range(3):
        start = time.perf_counter()
        for batch in range(10):
            loader.sequences(160 * turn + 16 * batch, 16)
        loading_time = time.perf_counter() - start
        start = time.perf_counter()
        train(GPT(config), tokens[:], 2, batch_size=16, warmup=0)
        rates.append((time.perf_counter() - start) / 2 / (loading_time / 10))
    assert max(rates) > 10, rates


def test_tokenizing_keeps_up_with_tiktoken_itself(tokenizer, tmp_path):
    documents = [
        "".join(random.Random(i).choices(["word ", "and ", "more\n", "the longest ", "9"], k=20_000)) for i in range(40)
    ]
    encoding, rates = tokenizer.to_tiktoken("own"), []
    for turn in range(4):
        start = time.perf_counter()
        encoding.encode_ordinary_batch(documents, num_threads=2)
        own = time.perf_counter() - start
        start = time.perf_counter()
        write_tokens(documents, tmp_path / f"{turn}", tokenizer, n_threads=2)
        rates.append(own / (time.perf_counter() - start))
    assert max(rates) > 0.8, rates
