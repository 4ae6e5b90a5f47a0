"""The tokenizer against tiktoken, Hugging Face's tokenizers and brute force."""

import hashlib
import json
import os
import random
import time
from collections import Counter

import numpy
import pytest
import tiktoken
import torch
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from gpt3lib import tokenization
from gpt3lib.texts import DATA, DataError, manifest
from gpt3lib.tokenization import (
    BPE,
    BYTE_TO_ID,
    END_OF_TEXT,
    GPT2_PATTERN,
    TokenError,
    Tokenizer,
    encode_quickly,
    for_tiktoken,
    gpt2_file,
    merge,
    parse_merges,
    printable,
    printable_bytes,
    read_merges,
    spell,
    split,
    to_utf8,
    train_bpe,
)

OURS = Tokenizer.load(DATA / "tokenizer-4353.bpe")
GPT2 = Tokenizer.gpt2()
SLOW = BPE(list(OURS.merges))

TEXTS = [
    "A robot must obey the orders given it by human beings.",
    "Το ρομπότ πρέπει να υπακούει.",
    "Робот должен подчиняться.",
    "הרובוט חייב לציית.",
    "يجب على الروبوت أن يطيع ١٢٣.",
    "रोबोट को आज्ञा माननी चाहिए।",
    "หุ่นยนต์ต้องเชื่อฟัง",
    "机器人必须服从。",
    "ロボットは従わなければならない。",
    "로봇은 복종해야 한다.",
    "🤖👩‍🚀🏳️‍🌈 e\u0301 é ﬁ",
    "def f(x):\n\treturn  {'a': [1, 2.5e-3]}  # ok\r\n",
    " \t\n\n   x    \u00a0\u2003y \n ",
    "I'll I'LL we've'd 'tis 's''",
    "48+76=124 2048 1234567 ½ ² Ⅷ",
    "<|endoftext|> <|end",
    "",
    bytes(range(256)).decode(errors="replace"),
    "\ud800 a\udfff \ud83e\udd16 a\ud835\udc9c!\ud835\udfd8",  # lone halves; pairs: a sign, a letter, a digit
]
# code points that Unicode added lately are letters for one table and signs for another: leave unassigned ones out
ANY = st.text(st.characters(exclude_categories=("Cn",)))
MIXED = st.lists(st.sampled_from([*"ab1 '\n\t.é字🤖\ud83e", "  ", "'ll", " the", "ing", "2048"])).map("".join)
SMALL = st.text("aab '1\n字", max_size=60)


def hugging_face(tokenizer: Tokenizer):
    """transformers' tokenizer from our names and merges."""
    names = tokenizer.names()
    merges = [(names[left], names[right]) for left, right in tokenizer.merges]
    return transformers.GPT2Tokenizer(vocab={name: i for i, name in enumerate(names)}, merges=merges)


RUST = {"ours": OURS.to_tiktoken("ours"), "gpt2": GPT2.to_tiktoken("gpt2")}
HUGGING_FACE = {"ours": hugging_face(OURS), "gpt2": hugging_face(GPT2)}


def train_by_brute_force(text: str, n_merges: int) -> list[tuple[bytes, bytes]]:
    """Recount everything after each merge; tokens are byte strings, numbered as they come."""
    number = {bytes([byte]): i for byte, i in BYTE_TO_ID.items()}
    chunks = [[bytes([byte]) for byte in chunk.encode()] for chunk in split(text)]
    merges = []
    for _ in range(n_merges):
        counts = Counter()
        for chunk in chunks:
            for i in range(len(chunk) - 1):
                counts[number[chunk[i]], number[chunk[i + 1]], chunk[i], chunk[i + 1]] += 1
        if not counts or max(counts.values()) < 2:
            break
        most = max(counts.values())
        _, _, left, right = min(pair for pair, count in counts.items() if count == most)
        merges.append((left, right))
        number[left + right] = len(number)
        for chunk in chunks:
            i = 0
            while i < len(chunk) - 1:
                if (chunk[i], chunk[i + 1]) == (left, right):
                    chunk[i : i + 2] = [left + right]
                i += 1
    return merges


def spelled(merges: list[tuple[int, int]]) -> list[tuple[bytes, bytes]]:
    """Merges of ids as merges of byte strings."""
    vocabulary = Tokenizer(merges).vocabulary
    return [(vocabulary[left], vocabulary[right]) for left, right in merges]


# the alphabet and the splitting pattern


def test_the_alphabet_is_gpt2s():
    assert set(printable_bytes().values()) == set(pre_tokenizers.ByteLevel.alphabet())
    assert all(show.isprintable() and not show.isspace() for show in printable_bytes().values())
    encoder = json.loads(gpt2_file("encoder.json"))
    assert all(encoder[show] == BYTE_TO_ID[byte] for byte, show in printable_bytes().items())
    assert encoder[printable(b" robot")] == 9379 and printable(bytes(BYTE_TO_ID)) == "".join(printable_bytes().values())


def compare_chunks(text: str) -> None:
    """Our chunks join to the text, and are those of Hugging Face's own pattern."""
    mended = to_utf8(text).decode()
    chunks = split(text)
    assert "".join(chunks) == mended
    theirs = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(mended)
    show = printable_bytes()
    assert ["".join(show[byte] for byte in chunk.encode()) for chunk in chunks] == [chunk for chunk, _ in theirs]


@pytest.mark.parametrize("text", TEXTS)
def test_chunks_are_hugging_faces(text):
    compare_chunks(text)


@given(ANY | MIXED)
@settings(max_examples=150, deadline=None)
def test_chunks_of_anything_are_hugging_faces(text):
    compare_chunks(text)


def test_the_classes_of_the_pattern_are_tiktokens():
    everything = "".join(chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000)
    bytes_only = {bytes([i]): i for i in range(256)}
    for kind in (r"\s", r"\p{L}", r"\p{N}"):
        rust = tiktoken.Encoding("x", pat_str=kind, mergeable_ranks=bytes_only, special_tokens={})
        theirs = set(rust.decode(rust.encode_ordinary(everything)))
        mine = set(tokenization.regex.findall(kind, everything))
        assert theirs <= mine  # ours may know younger letters
        assert kind != r"\s" or theirs == mine


@given(ANY | MIXED)
@settings(max_examples=100, deadline=None)
def test_the_pattern_needs_no_possessive_plus(text):
    possessive = GPT2_PATTERN.replace("}+|", "}++|").replace("]+|", "]++|")  # as OpenAI writes it
    assert possessive.count("++") == 3
    mended = to_utf8(text).decode()
    assert tokenization.regex.findall(possessive, mended) == split(text)


@given(st.text(st.characters()))
@settings(deadline=None)
@example("\ud83e")
@example("\udd16\ud83e")
def test_to_utf8_keeps_what_can_be_kept(text):
    mended = to_utf8(text).decode()
    pairs = text.encode("utf-16-le", "surrogatepass")
    assert len(mended.encode("utf-16-le")) == len(pairs)
    if text.isascii() or not any(0xD800 <= ord(c) < 0xE000 for c in text):
        assert mended == text


# training

# of the merges that recounting after each merge learns, see test_training_on_one_long_chunk_is_quick
DIGEST = "979b6278fda514e16a2e47a02113a20bd54d25d58136825c0ff14d2d4abc5f7b"


@given(SMALL, st.integers(0, 12))
@settings(max_examples=200, deadline=None)
@example("aaaa aaaaa aaa", 12)
@example("abab abab", 12)
@example("ab cd ab cd", 1)
def test_training_equals_brute_force(text, n_merges):
    assert spelled(train_bpe(text, n_merges)) == train_by_brute_force(text, n_merges)


def test_training_equals_brute_force_on_prose():
    text = "".join(TEXTS[:16]) * 3 + "".join(OURS.decode(range(300, 1500)))
    assert spelled(train_bpe(text, 150)) == train_by_brute_force(text, 150)


@given(SMALL)
@settings(max_examples=100, deadline=None)
def test_properties_of_what_was_learned(text):
    merges = train_bpe(text, 30)
    learned = Tokenizer(merges).vocabulary[256:-1]
    chunks = [chunk.encode() for chunk in split(text)]
    assert all(sum(word in chunk for chunk in chunks) for word in learned)  # no merge crosses a chunk
    assert len(set(learned)) == len(learned)  # no two tokens are spelled alike
    for n in range(len(merges)):
        assert train_bpe(text, n) == merges[:n]  # a smaller vocabulary is a prefix of a larger one


@given(st.sampled_from(["ab", "aab", "a", "acgt", "ab ", "é字"]), st.integers(0, 400), st.integers(0, 10**9))
@settings(max_examples=60, deadline=None)
def test_training_on_long_chunks_equals_brute_force(alphabet, length, seed):
    text = "".join(random.Random(seed).choices(alphabet, k=length))
    merges = train_bpe(text, 40)
    assert spelled(merges) == train_by_brute_force(text, 40)
    assert len(set(Tokenizer(merges).vocabulary)) == 257 + len(merges)


def test_training_on_one_long_chunk_is_quick():
    text = "".join(random.Random(0).choices("acgt", k=10_000))
    start = time.process_time()
    merges = train_bpe(text, 300)
    assert time.process_time() - start < 2  # walking through the chunk for each merge took 8
    digest = hashlib.sha256(json.dumps(merges).encode()).hexdigest()
    assert len(merges) == 300 and digest == DIGEST


def test_ties_and_the_end():
    a, b, c = (BYTE_TO_ID[ord(letter)] for letter in "abc")
    assert train_bpe("bc ab bc ab", 1) == [(a, b)]  # as frequent, but smaller
    assert train_bpe("abc", 5) == []  # seen once is no pattern
    assert train_bpe("abc abc", 2) == [(a, b), (256, c)]
    assert Tokenizer.train("abab" * 9, 257).vocab_size == 257
    assert Tokenizer.train("ab ab", 5000).vocab_size < 270


def test_merge():
    assert merge([1, 2, 1, 2, 1], (1, 2), 9) == [9, 9, 1]
    assert merge([7, 7, 7], (7, 7), 9) == [9, 7]
    assert merge([2, 1], (1, 2), 9) == [2, 1]
    assert merge([], (1, 2), 9) == []


def test_spell():
    assert spell([(97, 98), (256, 99)])[255:] == [b"\xff", b"ab", b"abc"]
    assert spell([], BYTE_TO_ID)[:2] == [b"!", b'"'] and set(spell([], BYTE_TO_ID)) == set(spell([]))


# encoding and decoding


def test_gpt2s_ids_are_openais():
    assert json.loads(gpt2_file("encoder.json")) == {name: i for i, name in enumerate(GPT2.names())}
    assert GPT2.encode("Hello world") == [15496, 995] and GPT2.encode(" Hello world") == [18435, 995]
    assert (GPT2.vocab_size, GPT2.end_of_text, OURS.vocab_size, OURS.end_of_text) == (50257, 50256, 4353, 4352)


def compare(text: str) -> None:
    """Round trip, and the same ids as tiktoken and Hugging Face, with both vocabularies."""
    mended = to_utf8(text).decode()
    for name, tokenizer in (("ours", OURS), ("gpt2", GPT2)):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == mended
        assert ids == RUST[name].encode_ordinary(text)
        assert ids == HUGGING_FACE[name](mended, split_special_tokens=True)["input_ids"]


@pytest.mark.parametrize("text", TEXTS)
def test_three_tokenizers_agree(text):
    compare(text)


@given(ANY | MIXED)
@settings(max_examples=150, deadline=None)
def test_three_tokenizers_agree_on_anything(text):
    compare(text)


@given(st.text(st.characters()) | MIXED)
@settings(max_examples=100, deadline=None)
def test_round_trip_of_any_string_and_the_slow_twin(text):
    ids = OURS.encode(text)
    assert OURS.decode(ids) == SLOW.decode(ids) == to_utf8(text).decode()
    assert ids == SLOW.encode(text)


@given(
    st.sampled_from(["ab", "a", "acgt", "etaoinshrdlu", "01", "字é🤖", "!?.", "\n", "the and"]),
    st.integers(0, 150),
    st.randoms(),
)
@settings(max_examples=150, deadline=None)
def test_long_chunks_are_encoded_as_by_the_plain_loop_and_tiktoken(alphabet, length, source):
    text = "".join(source.choices(alphabet, k=length))
    for name, tokenizer in (("ours", OURS), ("gpt2", GPT2)):
        plain = BPE.encode_chunk(tokenizer, text.encode())
        assert encode_quickly(text.encode(), tokenizer.merges) == plain
        assert tokenizer.encode(text) == RUST[name].encode_ordinary(text)
    own = Tokenizer.train(text, 300)
    assert encode_quickly(text.encode(), own.merges) == BPE.encode_chunk(own, text.encode())
    assert own.encode(text) == BPE(own.merges).encode(text)


@pytest.mark.parametrize("length", [9, 10, 11, 24, 25])
def test_chunks_about_the_limits(length):
    chunk = "commandmentscommandments!"[:length].encode()
    fresh = Tokenizer(OURS.merges)
    assert fresh.encode_chunk(chunk) == fresh.encode_chunk(chunk) == BPE.encode_chunk(OURS, chunk)
    assert (chunk in fresh.cache) == (length < 25)


SOURCE = random.Random(0)
MILLION = {
    "letters": "".join(SOURCE.choices("abcdefghijklmnopqrstuvwxyz", k=1_000_000)),
    "digits": "".join(SOURCE.choices("0123456789", k=1_000_000)),
    "signs": "".join(SOURCE.choices("!?.,;-+*", k=1_000_000)),
    "gaps": "".join(SOURCE.choices(" \n\t", k=1_000_000)),
    "one letter": "a" * 1_000_000,
    "two letters": "ab" * 500_000,
    "blanks": " " * 1_000_000 + "x",
    "Chinese": "".join(map(chr, SOURCE.choices(range(0x4E00, 0x9FFF), k=333_333))),
    "emoji": "🤖" * 250_000,
    "words": " ".join("".join(SOURCE.choices("abcdefghij", k=12)) for _ in range(77_000)),
}


@pytest.mark.parametrize("kind", MILLION)
def test_a_megabyte_of_anything_is_encoded_in_seconds(kind):
    text, tokenizer = MILLION[kind], Tokenizer(GPT2.merges)
    start = time.process_time()
    ids = tokenizer.encode(text)
    assert time.process_time() - start < 5
    assert tokenizer.decode(ids) == text
    assert ids == RUST["gpt2"].encode_ordinary(text)


def test_the_slow_twin_is_the_same_but_for_files_and_memory():
    assert (SLOW.vocabulary, SLOW.merges, SLOW.end_of_text) == (OURS.vocabulary, OURS.merges, 4352)
    with pytest.raises(TokenError, match="4353 is not in the vocabulary"):
        SLOW.decode([4353])
    assert SLOW.to_tiktoken("slow").encode_ordinary(TEXTS[0]) == SLOW.encode(TEXTS[0])


@given(st.lists(st.integers(0, 4352)))
@settings(max_examples=50, deadline=None)
def test_decode_equals_tiktoken(ids):
    assert OURS.decode_bytes(ids) == RUST["ours"].decode_bytes(ids)
    assert OURS.decode(ids) == RUST["ours"].decode(ids)


def test_half_an_emoji_is_shown_as_a_mark():
    ids = OURS.encode("🤖")
    assert OURS.decode(ids[:2]) == "\ufffd" and OURS.decode_bytes(ids[:2]) == "🤖".encode()[:2]


def test_end_of_text_is_no_text():
    for tokenizer in (OURS, GPT2):
        ids = tokenizer.encode("a<|endoftext|>b")
        assert tokenizer.end_of_text not in ids and tokenizer.decode(ids) == "a<|endoftext|>b"
        assert tokenizer.decode([tokenizer.end_of_text]) == "<|endoftext|>"
    assert RUST["ours"].encode("<|endoftext|>", allowed_special="all") == [OURS.end_of_text]


def test_decode_takes_rows_of_all_kinds():
    ids = OURS.encode("to be or not")
    rows = [tuple(ids), iter(ids), torch.tensor(ids), list(torch.tensor(ids)), numpy.array(ids), numpy.array(ids, "u2")]
    assert [OURS.decode(row) for row in rows] == ["to be or not"] * len(rows)
    assert OURS.decode([]) == "" == OURS.decode(torch.tensor([], dtype=torch.int64))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([4353], "token id 4353 is not in the vocabulary; ids go from 0 to 4352"),
        ([0, -1], "token id -1 is not in the vocabulary"),
        (torch.tensor([5, -3]), "token id -3"),
        (torch.zeros(2, 3, dtype=torch.int64), r"not Tensor of shape \(2, 3\); of a batch, decode each row"),
        (torch.tensor(7), r"not Tensor of shape \(\)"),
        (numpy.zeros((1, 2), int), r"not ndarray of shape \(1, 2\)"),
        (torch.tensor([1.0]), "integer ids"),
        (torch.tensor([True]), r"not bool True \(at place 0\)"),
        (numpy.array([1.5]), r"not float 1.5 \(at place 0\)"),
        ([1.0], r"integer ids, not float 1.0 \(at place 0\)"),
        ([1, True], r"not bool True \(at place 1\)"),
        ([numpy.True_], "not bool True"),
        ([numpy.float32(2)], r"not float 2.0 \(at place 0\)"),
        ([torch.tensor(2.0)], r"not float 2.0 \(at place 0\)"),
        ([torch.tensor([1, 2])], r"not list \[1, 2\] \(at place 0\); of a batch, decode each row"),
        ([[1]], r"integer ids, not list \[1\] \(at place 0\); of a batch, decode each row"),
        (["a"], r"integer ids, not str 'a' \(at place 0\)"),
        ([1, None], r"not NoneType None \(at place 1\)"),
        (iter([2, 3.5]), r"not float 3.5 \(at place 1\)"),
        ([[1] * 1000], r"not list \[1, 1[^]]{30,40}\(at place 0\)"),  # cut short
        ("abc", "not str;"),
        ("", "not str;"),
        (b"abc", "not bytes;"),
        ({5: 1}, "not dict;"),
        ({5}, "not set;"),
        (7, "not int;"),
        (1.5, "not float;"),
        (numpy.int64(7), r"not int64 of shape \(\)"),
        (None, "not NoneType;"),
    ],
)
def test_decode_refuses(ids, message):
    with pytest.raises(TokenError, match=message):
        OURS.decode(ids)


def test_numbers_of_numpy_and_torch_are_ids():
    assert OURS.decode([numpy.int64(32), torch.tensor(32), 32]) == "AAA"
    assert OURS.decode(numpy.array([32], object)) == "A"


def test_only_strings_are_encoded():
    for wrong in (b"abc", None, ["a"], 3):
        with pytest.raises(TypeError, match=f"a tokenizer reads a string, not {type(wrong).__name__}"):
            OURS.encode(wrong)
    with pytest.raises(TypeError, match="not bytes"):
        Tokenizer.train(b"abc", 300)
    with pytest.raises(TypeError, match="not bytes"):
        Tokenizer.from_merges(b"#version: 0.2\n", "x")


@pytest.mark.parametrize("size", [256, -1, 0, 300.0, True, "300", None, [300], numpy.float32(300), torch.tensor(300.0)])
def test_a_size_that_cannot_be(size):
    with pytest.raises(TokenError, match=r"vocab_size is .* whole number, 257 or more"):
        Tokenizer.train("abc", size)


@pytest.mark.parametrize("n_merges", [-1, 2.5, 2.0, True, "2", None, [2], numpy.float32(2)])
def test_a_number_of_merges_that_cannot_be(n_merges):
    with pytest.raises(TokenError, match=r"n_merges is .* whole number, 0 or more"):
        train_bpe("abc abc", n_merges)


def test_sizes_of_numpy():
    assert train_bpe("abc abc", numpy.int32(1)) == train_bpe("abc abc", 1)
    tokenizer = Tokenizer.train("abc abc", numpy.int64(258))
    assert type(tokenizer.vocab_size) is int and tokenizer.vocab_size == 258


@pytest.mark.parametrize(
    ("merges", "message"),
    [
        ([(0, 256)], r"merge 256 joins \(0, 256\), of which one does not exist yet"),
        ([(-1, 0)], "does not exist yet"),
        ([(0, 1), (257, 0)], r"merge 257 joins \(257, 0\)"),
        ([(0, 1), (0, 1)], r"merge 257 spells b'!\"', which is token 256 already"),
        ([(0, 1), (1, 2), (256, 2), (0, 257)], "merge 259 spells b'!\"#', which is token 258 already"),
        ([(1.0, 2)], r"merge 256 is \(1.0, 2\); it must be two whole numbers, the ids that it joins"),
        ([(True, 2)], r"merge 256 is \(True, 2\)"),
        ([(1, numpy.float64(2))], "merge 256 is .*two whole numbers"),
        ([("t", "h")], "merge 256 is .*two whole numbers"),
        (["th"], "merge 256 is 'th'"),
        ([(1, 2, 3)], r"merge 256 is \(1, 2, 3\)"),
        ([(1, 2), 3], "merge 257 is 3"),
        ([None], "merge 256 is None"),
        (torch.tensor([[1.0, 2.0]]), r"merge 256 is \[1.0, 2.0\]"),
        ("th", "needs a list of merges, pairs of ids, not str"),
        (None, "not NoneType"),
        (5, "not int"),
    ],
)
def test_merges_that_cannot_be(merges, message):
    for kind in (Tokenizer, BPE):
        with pytest.raises(TokenError, match=message):
            kind(merges)


def test_merges_of_other_types():
    pairs = [(83, 71), (256, 68)]
    kinds = [
        iter(pairs),
        [[83, 71], [256, 68]],
        numpy.array(pairs),
        torch.tensor(pairs),
        [(numpy.int32(83), 71), (256, 68)],
    ]
    for merges in (*kinds, dict.fromkeys(pairs)):
        tokenizer = Tokenizer(merges)
        assert list(tokenizer.merges) == pairs and {type(i) for pair in tokenizer.merges for i in pair} == {int}
        assert tokenizer.encode("the") == [257]


def test_the_cache_is_bounded_and_changes_nothing(monkeypatch):
    monkeypatch.setattr(tokenization, "CACHED_CHUNKS", 3)
    tokenizer = Tokenizer(list(OURS.merges))
    text = "one two three four five one two " + "x" * 100
    first, second = tokenizer.encode(text), tokenizer.encode(text)
    assert first == second == OURS.encode(text)
    assert len(tokenizer.cache) == 3
    monkeypatch.setattr(tokenization, "CACHED_CHUNKS", 99)
    tokenizer.encode(text)
    assert 3 < len(tokenizer.cache) < 99 and all(len(chunk) < 100 for chunk in tokenizer.cache)
    assert tokenizer.cache[b" two"] == OURS.encode(" two")


def test_what_encode_returns_belongs_to_the_caller():
    ids = OURS.encode("obey")
    ids.append(0)
    assert OURS.encode("obey") == ids[:-1]
    chunk_ids = OURS.encode_chunk(b"obey")
    chunk_ids.append(0)
    assert OURS.encode_chunk(b"obey") == chunk_ids[:-1]


# files


def test_the_shipped_vocabulary_survives_a_round_trip(tmp_path):
    OURS.save(tmp_path / "merges.txt")
    assert (tmp_path / "merges.txt").read_bytes() == (DATA / "tokenizer-4353.bpe").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["merges.txt"]
    GPT2.save(str(tmp_path / "vocab.bpe"))
    assert (tmp_path / "vocab.bpe").read_bytes() == gpt2_file("vocab.bpe")


def test_a_save_that_dies_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "merges.txt"
    OURS.save(path)

    def die(*_):
        raise OSError("killed")

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(OSError, match="killed"):
        Tokenizer([(0, 1)]).save(path)
    assert Tokenizer.load(path).merges == OURS.merges


@given(SMALL)
@settings(max_examples=20, deadline=None)
def test_any_trained_tokenizer_survives_a_round_trip(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("bpe") / "merges.txt"
    tokenizer = Tokenizer.train(text, 290)
    tokenizer.save(path)
    assert Tokenizer.load(path).vocabulary == tokenizer.vocabulary
    assert list(Tokenizer.load(path).merges) == list(tokenizer.merges)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: '' should be '#version: 0.2'"),
        ("t h\nth e\n", "line 1: 't h' should be"),
        ("#version: 0.2\nt h\nth", "line 3: 'th' does not join"),
        ("#version: 0.2\nt h\n\nth e", "line 3: '' does not join"),
        ("#version: 0.2\nth e\nt h", "line 2: 'th e' does not join"),
        ("#version: 0.2\nt h\nt h", "line 3: 't h' does not join two tokens of earlier lines to a new one"),
        ("#version: 0.2\na b\nb c\nab c\na bc", "line 5: 'a bc'"),  # a second token of the same bytes
        ("#version: 0.2\nt h e", "line 2: 't h e'"),
    ],
)
def test_a_broken_merges_file_is_refused_with_its_line(tmp_path, text, message):
    path = tmp_path / "broken.bpe"
    path.write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        Tokenizer.load(path)
    assert "broken.bpe" in str(caught.value)


def test_what_is_checked_is_what_is_parsed():
    text = (DATA / "tokenizer-4353.bpe").read_text(encoding="utf-8")
    assert read_merges(text, "x") == parse_merges(text.split("\n")[1:-1]) == list(OURS.merges)
    assert parse_merges(["t h", "th e"]) == [(83, 71), (256, 68)]


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match="no merges file that can be read"):
        Tokenizer.load(tmp_path / "nothing")
    (tmp_path / "binary").write_bytes(b"#version: 0.2\n\xff\xfe")
    with pytest.raises(DataError, match="no merges file that can be read"):
        Tokenizer.load(tmp_path / "binary")


def test_line_ends_of_windows_are_fine(tmp_path):
    (tmp_path / "merges.txt").write_bytes(b"#version: 0.2\r\nt h\r\nth e\r\n")
    assert len(Tokenizer.load(tmp_path / "merges.txt").encode("the")) == 1


def test_gpt2s_files_must_be_openais(monkeypatch):
    with pytest.raises(DataError, match="no file 'merges.txt'; there are encoder.json, vocab.bpe"):
        gpt2_file("merges.txt")
    changed = manifest()
    changed["gpt2"]["vocab.bpe"] = "0" * 64
    monkeypatch.setattr(tokenization, "manifest", lambda: changed)
    with pytest.raises(DataError, match="is not OpenAI's file"):
        Tokenizer.gpt2()


def test_tiktoken_gets_the_same_pattern_and_the_special_token():
    encoding = OURS.to_tiktoken("mine")
    assert isinstance(encoding, tiktoken.Encoding) and END_OF_TEXT.encode() not in encoding._mergeable_ranks
    assert (encoding.name, encoding.n_vocab, encoding.eot_token) == ("mine", 4353, 4352)
    assert encoding._pat_str.replace(r"(?:\s{256}(?=\s))*", "") == GPT2_PATTERN


SPACES = st.lists(st.tuples(st.sampled_from(" \n\u00a0x1.é'"), st.sampled_from([1, 2, 255, 256, 257, 511, 512, 513])))


@given(SPACES)
@settings(max_examples=150, deadline=None)
@example([(" ", 256), ("x", 1)])
@example([(" ", 257), ("x", 1)])
@example([(" ", 255), ("\n", 257)])
def test_the_pattern_for_tiktoken_cuts_as_gpt2s(runs):
    text = "".join(character * n for character, n in runs)
    assert tokenization.regex.findall(for_tiktoken(GPT2_PATTERN), text) == split(text)
    assert RUST["ours"].encode_ordinary(text) == OURS.encode(text)


@pytest.mark.parametrize("gap", [" ", "\n", "\u2003", "\r\n"])
@pytest.mark.parametrize("after", ["", "x", " x"])
def test_a_gap_of_a_million_does_not_make_tiktoken_panic(gap, after):
    text = "a" + gap * 1_100_000 + after
    ids = RUST["gpt2"].encode_ordinary(text)
    assert GPT2.decode(ids) == text
    assert ids[:50] == GPT2.encode(text[:2000])[:50]
