"""Token shards on disk, and a loader whose order is a pure function of a number."""

# Made from book/12_loading.ipynb by tools/export.py; edit the chapter.
import bisect
import hashlib
import json
import math
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from fractions import Fraction
from functools import partial
from itertools import accumulate, chain
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from gpt3lib.files import Refusal, as_float, is_whole, sha256, write_beside
from gpt3lib.tokenization import Tokenizer, to_utf8

MANIFEST, MERGES, TOKENS_FORMAT = "manifest.json", "merges.bpe", "gpt3lib tokens 1"
COUNTS = ("vocab_size", "n_tokens", "n_documents", "n_bytes")


# What this chapter refuses; the workshop at the end of this page has a table of it.
class LoadingError(Refusal, ValueError):
    """Texts, shards or a mixture that cannot be what a model is trained on."""


must = LoadingError.unless  # must(all is fine, else this problem)


def must_be_whole(name: str, value, least: int, most: int = 2**40) -> int:
    """The value as Python's int. LoadingError unless it is whole, least … most."""
    fine = is_whole(value, least) and value <= most
    must(fine, f"{name} is {value!r}; it must be a whole number, {least} to {most}")
    return int(value)


def check_mixture(sources: Mapping, weights: Mapping, n_ctx: int) -> None:
    """Raise LoadingError unless each source has a weight, and at least one window."""
    both = isinstance(sources, Mapping) and isinstance(weights, Mapping)
    must(both and sources, "sources and weights must be dicts, of one source at least")
    names, given = sorted(map(str, sources)), sorted(map(str, weights))
    problem = f"the sources are {names}, the weights are for {given}; give each its own"
    must(names == given, problem)
    for name, source in sources.items():
        shape = tuple(getattr(source, "shape", (0,)))
        must(len(shape) == 1, f"{name} has shape {shape}; give one long row of ids")
        problem = f"{name} has {len(source)} tokens, a window needs {n_ctx} + 1"
        must(len(source) > n_ctx, f"{problem}; give more text, or a smaller n_ctx")
    kinds = {getattr(source, "tokenizer_sha256", None) for source in sources.values()}
    problem = "the sources' tokenizers differ, so that one id means different things"
    must(len(kinds - {None}) < 2, f"{problem}; tokenize all sources with one")


def check_weights(weights: Mapping) -> None:
    """Raise LoadingError unless the weights are numbers, none below 0, not all 0."""
    for name, weight in weights.items():
        fine = 0 <= as_float(weight) < math.inf
        must(fine, f"the weight of {name} is {weight!r}; it must be a number from 0 on")
    must(any(weights.values()), "all weights are 0; at least one must be more")


def check_writing(documents, folder: Path, tokenizer) -> None:
    """Raise LoadingError unless these can be documents, a folder, and a tokenizer."""
    fine = isinstance(documents, Iterable) and not isinstance(documents, str | bytes)
    must(fine, f"documents is a {type(documents).__name__}; for one text use [text]")
    kind, fine = type(tokenizer).__name__, hasattr(tokenizer, "to_tiktoken")
    must(fine, f"tokenizer is a {kind}; it must be a Tokenizer")
    fresh = not (folder / MANIFEST).exists()
    must(fresh, f"{folder} holds tokens already; choose another, or delete it first")


def read_manifest(folder: Path) -> dict:
    """A folder's manifest, and `files`: name -> (bytes or None, hash). LoadingError."""
    path, mend = folder / MANIFEST, "copy it again, or tokenize anew"
    problem = f"{folder} has no {MANIFEST}, so it holds no finished tokens"
    must(path.is_file(), f"{problem}; write_tokens makes them, or begins anew")
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        sizes = [shard["n_tokens"] for shard in about["shards"]]
        fine = all(map(is_whole, [about[name] for name in COUNTS] + sizes))
        must(fine and sum(sizes) == about["n_tokens"], "its counts make no sense")
        right = {"format": TOKENS_FORMAT, "dtype": token_type(about["vocab_size"])}
        for key, word in right.items():
            must(about[key] == word, f"its {key} is {about[key]!r}, not {word!r}")
        about["files"] = {MERGES: (None, about["tokenizer"])}
        for shard in about["shards"]:
            size = shard["n_tokens"] * np.dtype(about["dtype"]).itemsize
            about["files"][Path(shard["file"]).name] = size, shard["sha256"]
        return about
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise LoadingError(f"{path} is damaged ({error!r}); {mend}") from error


def check_files(folder: Path, files: dict, verify: bool) -> None:
    """Raise LoadingError for a file with other bytes than the manifest means."""
    for file, (size, expected) in files.items():
        path, mend = folder / file, "copy it again, or tokenize anew"
        found = path.stat().st_size if path.is_file() else "no"
        problem = f"{path} has {found} bytes, the manifest says {size}; {mend}"
        must(found == size or size is None and path.is_file(), problem)
        if verify or file == MERGES:
            found = sha256(path)
            problem = f"{path} has SHA-256 {found[:16]}…, not {expected!s:.16}…"
            must(found == expected, f"{problem} as the manifest says; {mend}")


def round_keys(*words) -> np.ndarray:
    """Eight numbers of 64 bits that depend on every one of the words."""
    text = "/".join(map(str, words))
    return np.frombuffer(hashlib.sha512(text.encode()).digest(), "<u8")


def scatter(numbers: np.ndarray) -> np.ndarray:
    """Each uint64 as another that looks unrelated; products keep 64 bits."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        numbers = (numbers ^ (numbers >> np.uint64(shift))) * np.uint64(factor)
    return numbers ^ (numbers >> np.uint64(31))


def permuted(places: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    """Where a shuffle of 0 … n - 1 puts these places (int64); no list of it is made."""
    side = np.uint64(math.isqrt(n - 1) + 1)
    found, walking = places.astype(np.uint64), np.arange(len(places))
    while len(walking):
        row, column = np.divmod(found[walking], side)
        for key in keys:
            row, column = column, (row + scatter(column ^ key) % side) % side
        found[walking] = row * side + column
        walking = walking[found[walking] >= n]  # outside: go again
    return found.astype(np.int64)


def whole_parts(weights: dict[str, float], most: int = 2**20) -> dict[str, int]:
    """The weights as whole numbers, the largest first; 0.6 means six tenths.

    If their sum is more than `most`, they are rounded to so many parts. LoadingError.
    """
    check_weights(weights)
    exact = {name: Fraction(str(w)) for name, w in weights.items() if w}
    unit = math.lcm(*(weight.denominator for weight in exact.values()))
    parts = {name: int(weight * unit) for name, weight in exact.items()}
    if (total := sum(parts.values())) > most:
        parts = {n: max(1, round(Fraction(most * p, total))) for n, p in parts.items()}
    return dict(sorted(parts.items(), key=lambda item: (-item[1], item[0])))


def drawn(parts: dict[str, int], n: np.ndarray) -> np.ndarray:
    """How many of the first n sequences come from each source, (sources, len(n)).

    Each source gets its share, rounded, of what the earlier ones left.
    """
    left, rest, counts = n, sum(parts.values()), []
    for part in parts.values():
        counts.append((2 * part * left + rest) // (2 * rest))  # part / rest · left
        left, rest = left - counts[-1], rest - part
    return np.stack(counts)


def shuffled_windows(k: np.ndarray, n_tokens: int, n_ctx: int, *words):
    """The epochs and windows of a source's k-th sequences, both (len(k),) int64.

    Window w starts at token w · n_ctx of the repeated row; the words make its keys.
    """
    epochs, windows = k * n_ctx // n_tokens, np.empty_like(k)
    for epoch in np.unique(epochs).tolist():
        here = epochs == epoch  # the first window of an epoch: rounded up
        first, end = (-(-e * n_tokens // n_ctx) for e in (epoch, epoch + 1))
        keys = round_keys(*words, epoch)
        windows[here] = first + permuted(k[here] - first, end - first, keys)
    return epochs, windows


class Loader:
    """Sequences of n_ctx tokens from a mixture, in an order that is a pure function.

    sources: name -> Tokens, or one long tensor of ids; weights: name -> its share, in
    any unit; seed: another one gives another order. Raises LoadingError.
    """

    def __init__(self, sources: dict, weights: dict, n_ctx: int, seed: int = 0):
        self.n_ctx = must_be_whole("n_ctx", n_ctx, 1)
        self.seed = must_be_whole("seed", seed, 0)
        check_mixture(sources, weights, self.n_ctx)
        self.parts = whole_parts(weights)  # the largest first
        self.sources = {name: sources[name] for name in self.parts}

    def counts(self, n_sequences: int) -> dict[str, int]:
        """How many of the first n_sequences come from each source."""
        n = np.array([must_be_whole("n_sequences", n_sequences, 0)])
        return dict(zip(self.parts, drawn(self.parts, n)[:, 0].tolist()))

    def epochs(self, n_sequences: int) -> dict[str, float]:
        """How often the first n_sequences have read each source."""
        counts, n_ctx = self.counts(n_sequences), self.n_ctx
        return {n: counts[n] * n_ctx / len(s) for n, s in self.sources.items()}

    def places(self, first: int, count: int) -> list[tuple[str, int, int]]:
        """Source, epoch and window of the sequences first … first + count - 1."""
        count = must_be_whole("count", count, 0)
        i = must_be_whole("first", first, 0) + np.arange(count)
        before = drawn(self.parts, i)  # (sources, count)
        source = (drawn(self.parts, i + 1) - before).argmax(axis=0)
        places = [None] * count
        for s, (name, tokens) in enumerate(self.sources.items()):
            here = np.flatnonzero(source == s)
            where = before[s, here], len(tokens), self.n_ctx
            epochs, windows = shuffled_windows(*where, self.seed, name)
            for at, *place in zip(here, epochs.tolist(), windows.tolist()):
                places[at] = (name, *place)
        return places

    def where(self, i: int) -> tuple[str, int, int]:
        """Source, epoch and window of sequence i, whatever was read before it."""
        return self.places(i, 1)[0]

    def window(self, name: str, number: int) -> torch.Tensor:
        """A window's n_ctx + 1 ids; behind a source's last token its first follows."""
        tokens = self.sources[name]
        start = number * self.n_ctx % len(tokens)
        end = start + self.n_ctx + 1
        last, end = tokens[start:end], end - len(tokens)
        return torch.cat([last, tokens[:end]]) if end > 0 else last

    def sequences(self, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of the sequences from first on, (count, n_ctx) int64."""
        count = must_be_whole("count", count, 0)
        rows = torch.empty(count, self.n_ctx + 1, dtype=torch.int64)
        for row, (name, _, window) in zip(rows, self.places(first, count)):
            row.copy_(self.window(name, window))
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    @property
    def bytes_per_token(self) -> float | None:
        """Bytes of text for each token of the mixture; None for tokens without text."""
        rates = [getattr(s, "bytes_per_token", None) for s in self.sources.values()]
        weights = [*self.parts.values()]
        return None if None in rates else float(np.average(rates, weights=weights))

    def identity(self) -> dict:
        """All that the order depends on, as plain JSON, and the tokens' hashes."""
        own = {n: getattr(s, "sha256", len(s)) for n, s in self.sources.items()}
        return dict(n_ctx=self.n_ctx, seed=self.seed, parts=self.parts, sources=own)


PIECE = 2**20  # characters that are tokenized at once
WORDS = re.compile(r".*\S(?=[ \n])", re.DOTALL)  # up to the end of the last whole word


def text_pieces(document: str | Iterable[str]) -> Iterator[str]:
    """A document, or its parts, in pieces of at most PIECE characters; the same ids.

    A piece ends behind a word and before white space, where no chunk of GPT-2's pattern
    reaches across. Only a word longer than PIECE is cut inside.
    """
    whole, rest = isinstance(document, str) or not isinstance(document, Iterable), ""
    for part in [document] if whole else document:
        kind = type(part).__name__
        must(isinstance(part, str), f"a document holds a {kind}; it must be text, str")
        for start in range(0, len(part), PIECE):
            rest += part[start : start + PIECE]
            while len(rest) > PIECE:
                found = WORDS.match(rest, 0, PIECE + 1)
                end = found.end() if found else PIECE
                yield rest[:end]
                rest = rest[end:]
    yield rest


def text_batches(documents: Iterable) -> Iterator[list[tuple[bool, str]]]:
    """(begins a document, piece of text), in lists of about PIECE characters."""
    batch, size = [], 0
    for document in documents:
        for i, piece in enumerate(text_pieces(document)):
            batch.append((i == 0, piece))
            size += len(piece)
            if size >= PIECE:
                yield batch
                batch, size = [], 0
    yield batch


def encode_batch(encoding, batch: list) -> tuple[np.ndarray, int, int]:
    """The ids of a batch (uint32); how many documents and bytes of text it has."""
    begin, rows, n_bytes = np.array([encoding.eot_token], np.uint32), [], 0
    for begins, text in batch:
        rows += [begin] * begins
        data = to_utf8(text)
        n_bytes += len(data)
        rows.append(encoding.encode_to_numpy(data.decode(), disallowed_special=()))
    ids = np.concatenate([begin[:0], *rows])
    return ids, sum(begins for begins, _ in batch), n_bytes


def in_threads(function: Callable, items: Iterable, n_threads: int) -> Iterator:
    """function(item) of each item, in order, by threads; few are kept waiting."""
    with ThreadPoolExecutor(n_threads) as pool:
        waiting = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * n_threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def remove_unfinished(folder: Path) -> None:
    """Remove what write_tokens leaves in a folder without a manifest when killed."""
    paths = [*folder.glob("shard-[0-9]*.bin*"), *folder.glob(f"{MERGES}*")]
    for path in paths if not (folder / MANIFEST).exists() else []:
        path.unlink(missing_ok=True)


def token_type(vocab_size: int) -> str:
    """The smallest type that holds all ids: uint16 for up to 65,536, else uint32."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


def regroup(rows: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """The same ids in rows of `size` each; the last may be shorter."""
    waiting, room = [], size
    for row in rows:
        while len(row) >= room:
            yield np.concatenate([*waiting, row[:room]])
            waiting, row, room = [], row[room:], size
        waiting.append(row)
        room -= len(row)
    if room < size:
        yield np.concatenate(waiting)


def write_shard(folder: Path, number: int, ids: np.ndarray) -> dict:
    """Write one shard beside, then rename; returns its line for the manifest."""
    path = folder / f"shard-{number:05}.bin"
    data = ids.astype(ids.dtype.newbyteorder("<"), copy=False).tobytes()
    write_beside(path, data)
    return {"file": path.name, "sha256": sha256(data), "n_tokens": len(ids)}


def write_tokens(
    documents: Iterable,
    folder: str | Path,
    tokenizer: Tokenizer,
    shard_tokens: int = 2**25,
    n_threads: int | None = None,
    progress: bool = False,
    total_bytes: int | None = None,
) -> "Tokens":
    """Tokenize documents into a folder: shards, the tokenizer, and a manifest.

    documents: texts, or iterables of a text's parts; each comes after end-of-text.
    n_threads: None means one a core. progress: a bar, of total_bytes. The manifest is
    last: a folder without it is unfinished; what fails leaves none. LoadingError.
    """
    folder = Path(folder)
    check_writing(documents, folder, tokenizer)
    must_be_whole("shard_tokens", shard_tokens, 1)
    n_threads = must_be_whole("n_threads", n_threads or os.cpu_count() or 1, 1)
    dtype, counts = token_type(tokenizer.vocab_size), np.zeros(3, np.int64)
    encode = partial(encode_batch, tokenizer.to_tiktoken("loading"))
    bar = tqdm(total=total_bytes, unit="B", unit_scale=True, disable=not progress)

    def rows():
        for ids, *more in in_threads(encode, text_batches(documents), n_threads):
            counts[:] += len(ids), *more
            bar.update(more[1])
            yield ids.astype(dtype)

    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_unfinished(folder)
        tokenizer.save(folder / MERGES)
        rows_of_shards = enumerate(regroup(rows(), shard_tokens))
        shards = [write_shard(folder, number, ids) for number, ids in rows_of_shards]
        must(counts[2], "the documents hold no text; give some")
        about = {"format": TOKENS_FORMAT, "dtype": dtype}
        about |= dict(zip(COUNTS, [tokenizer.vocab_size, *counts.tolist()]))
        about |= {"tokenizer": sha256(folder / MERGES), "shards": shards}
        write_beside(folder / MANIFEST, (json.dumps(about, indent=1) + "\n").encode())
    except BaseException as error:
        remove_unfinished(folder)
        if isinstance(error, OSError):
            problem = f"{folder} cannot be finished ({error}); mend it, begin anew"
            raise LoadingError(problem) from error
        raise
    finally:
        bar.close()
    return Tokens(folder, verify=False)


class Tokens:
    """A folder of shards as one long row of ids, which stays on the disk.

    tokens[a:b] is a tensor (b - a,) int64, tokens[i] an int. verify: read and hash the
    shards; their sizes and the tokenizer are always compared. Raises LoadingError.
    """

    def __init__(self, folder: str | Path, verify: bool = True):
        self.folder = Path(folder)
        about = read_manifest(self.folder)
        check_files(self.folder, about["files"], verify)
        self.tokenizer_sha256, self.dtype = about["tokenizer"], about["dtype"]
        self.tokenizer = Tokenizer.load(self.folder / MERGES)  # it made the ids
        self.vocab_size, _, self.n_documents, self.n_bytes = map(about.get, COUNTS)
        told, has = self.vocab_size, self.tokenizer.vocab_size
        must(told == has, f"{folder}: vocab_size is {told} in {MANIFEST}, not {has}")
        self.sha256 = sha256(self.folder / MANIFEST)  # and so of all the rest
        kind, (_, *files) = np.dtype(self.dtype).newbyteorder("<"), about["files"]
        self.shards = [np.memmap(self.folder / file, kind, "r") for file in files]
        self.ends = [*accumulate(map(len, self.shards))]  # where each shard ends

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text for each token; end-of-text is a token of no bytes."""
        return self.n_bytes / len(self)

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, place: int | slice) -> torch.Tensor | int:
        if not isinstance(place, slice):
            place = range(len(self))[place]  # counts from the end, too
            return self[place : place + 1].item()
        start, end, step = place.indices(len(self))
        must(step == 1, f"tokens has no steps of {step}; take [a:b][::{step}]")
        parts = [self.shards[0][:0]]
        while start < end:
            shard = bisect.bisect_right(self.ends, start)
            first = self.ends[shard] - len(self.shards[shard])
            parts.append(self.shards[shard][start - first : end - first])
            start += len(parts[-1])
        return torch.from_numpy(np.concatenate(parts, dtype=np.int64))


def text_of(row, field: str, where: str) -> str:
    """The text in a field of a row, a dict or its JSON. LoadingError says where not."""
    with suppress(ValueError, RecursionError):
        row = json.loads(row) if isinstance(row, str) else row
    has = list(row) if isinstance(row, Mapping) else f"{row!r:.40}"
    fine = isinstance(row, Mapping) and isinstance(row.get(field), str)
    right = f'it must be one object, such as {{"{field}": "To be"}}'
    must(fine, f"{where} has no text called {field!r}, but {has}; {right}")
    return row[field]


def stream_dataset(dataset: Iterable, field: str = "text") -> Iterator[str]:
    """The texts of a Hugging Face split, streamed or not; of any dicts."""
    return (text_of(row, field, f"row {i}") for i, row in enumerate(dataset))


def text_files(path: str | Path) -> list[Path]:
    """The file itself, or all .txt, .md and .jsonl files of a folder, sorted."""
    path, kinds = Path(path), (".txt", ".md", ".jsonl")
    below = sorted(p for p in path.rglob("*") if p.suffix.lower() in kinds)
    files = [path] if path.is_file() else below
    must(files, f"{path} is no file and no folder of .txt, .md or .jsonl; give a text")
    return files


def read_file(path: Path, field: str) -> Iterator[str]:
    """The texts of a .jsonl file, one in each line; of others the text, in parts."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            try:
                if path.suffix.lower() == ".jsonl":
                    for number, line in enumerate(file, start=1):
                        if line.strip():
                            yield text_of(line, field, f"{path}, line {number},")
                while part := file.read(PIECE):
                    must("\0" not in part, f"{path} holds zeros: it is binary, no text")
                    yield part
            except UnicodeDecodeError as error:
                # what was decoded in vain ends where the file was read to
                place = file.buffer.tell() - len(error.object) + error.start
                words = f"{path} is not in UTF-8, see byte {place}; if it is Latin-1: "
                words += f"iconv -f latin1 -t utf-8 {path} > NEW"
                raise LoadingError(words) from error
    except OSError as error:
        raise LoadingError(f"{path} cannot be read ({error})") from error


def read_documents(path: str | Path, field: str = "text") -> Iterator:
    """The documents of a file, or of all files in a folder; raises LoadingError.

    A .jsonl file has one in each line, in this field; another file is one, in parts.
    """
    texts = [(file.suffix.lower(), read_file(file, field)) for file in text_files(path)]
    return chain.from_iterable(t if kind == ".jsonl" else [t] for kind, t in texts)


def text_size(path: str | Path) -> int:
    """The bytes of all files that read_documents reads there, for a progress bar."""
    return sum(file.stat().st_size for file in text_files(path))
