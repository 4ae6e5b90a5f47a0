"""From raw pages to the text that a model reads: filter, de-duplicate,
decontaminate, mix and pack."""

# Made from book/11_data.ipynb by tools/export.py; edit the chapter.
import html
import re
import zlib
from collections import Counter, defaultdict

import numpy as np

from gpt3lib import texts
from gpt3lib.files import sha256
from gpt3lib.texts import DATA, DataError, check_hash, check_same_text, manifest


def as_documents(documents) -> list[str]:
    """A list of texts. Raises DataError for one bare string, an empty list, bytes."""
    fine = documents and not isinstance(documents, str | bytes)
    DataError.unless(fine, "expected a list of documents, each a string, at least one")
    for i, document in enumerate(documents):
        problem = f"document {i} is of type {type(document).__name__}"
        DataError.unless(isinstance(document, str), f"{problem}; decode it to a string")
    return list(documents)


BLOCK = r"</?(?:p|h\d|li|ul|ol|br|div|dl|dt|dd|table|tr|td|note|important)\b[^>]*>"


def extract(page: str) -> str:
    """The text of an HTML page: a line per paragraph, heading or item of a list."""
    flat = re.sub(r"\s+", " ", page)  # line breaks mean nothing in HTML
    lines = re.sub(BLOCK, "\n", flat, flags=re.IGNORECASE)
    bare = html.unescape(re.sub(r"<[^>]+>", "", lines))
    kept = [line.strip() for line in bare.split("\n")]
    return "\n".join(line for line in kept if line) + "\n"


BEGINNING = 4000  # characters that the classifier reads


def features(documents: list[str]):
    """Hashed word counts, scaled to length 1, as a sparse matrix (documents, 2**14)."""
    from sklearn.feature_extraction.text import HashingVectorizer

    hashing = HashingVectorizer(n_features=2**14, alternate_sign=False)
    return hashing.transform(document[:BEGINNING] for document in documents)


def train_classifier(good: list[str], raw: list[str]):
    """Logistic regression that tells good documents (1) from raw pages (0)."""
    from sklearn.linear_model import LogisticRegression

    answers = [1] * len(as_documents(good)) + [0] * len(as_documents(raw))
    return LogisticRegression().fit(features([*good, *raw]), answers)


def scores(classifier, documents: list[str]) -> np.ndarray:
    """The probability that each document is a good one, (documents,)."""
    return classifier.predict_proba(features(documents))[:, 1]


def chance(text: str, purpose: str) -> float:
    """A number in [0, 1) that looks random and depends on the text and purpose only."""
    return int(sha256((purpose + text).encode())[:13], 16) / 16**13


def pareto(u: float, alpha: float = 9) -> float:
    """A Pareto (Lomax) number from a uniform one, as np.random.pareto makes it."""
    return (1 - u) ** (-1 / alpha) - 1


def passes(document: str, score: float, alpha: float = 9) -> bool:
    """The paper's rule: keep iff pareto(9) > 1 - score; the dice are the text's own."""
    return pareto(chance(document, "quality"), alpha) > 1 - score


KEPT = DATA / "crawl_kept.txt"  # a line of twelve hexadecimal digits for each page


def name_of(document: str) -> str:
    """The first twelve hexadecimal digits of a document's SHA-256."""
    return sha256(document.encode())[:12]


def kept_pages() -> list[str]:
    """The crawl's pages as text that passed the classifier, by the list in data/."""
    check_hash(KEPT, manifest()["family"][KEPT.name])
    kept = set(KEPT.read_text(encoding="ascii").split())
    pages = [extract(page) for page in texts.crawl()]
    found = {name_of(page): page for page in pages}  # a page that is there twice, once
    return [page for name, page in found.items() if name in kept]


PRIME = 2**32 - 5
SHINGLE = 5  # words


def shingles(document: str) -> np.ndarray:
    """The hashes of all runs of five words, each once; (n,) uint64."""
    words = re.findall(r"[a-z0-9]+", document.lower())
    runs = range(max(1, len(words) - SHINGLE + 1))
    found = {zlib.crc32(" ".join(words[i : i + SHINGLE]).encode()) for i in runs}
    return np.array(sorted(found), dtype=np.uint64)


def minhash(found: np.ndarray, count: int = 10) -> np.ndarray:
    """Of `count` hash functions, the smallest value over all shingles; (count,)."""
    names = [f"{letter}{i}" for letter in "ab" for i in range(count)]
    drawn = [int(sha256(name.encode())[:8], 16) for name in names]
    a, b = np.array(drawn, dtype=np.uint64).reshape(2, count, 1) % np.uint64(PRIME)
    return ((a * found + b) % np.uint64(PRIME)).min(1)


def jaccard(one: np.ndarray, two: np.ndarray) -> float:
    """How much two sets share: size of the intersection over size of the union."""
    both = len(np.intersect1d(one, two, assume_unique=True))
    return both / (len(one) + len(two) - both)


def near_duplicates(documents, threshold: float = 0.5, bands: int = 5):
    """{number of a document: (an earlier one, their Jaccard similarity >= threshold)}.

    Candidates agree in one of `bands` bands of the ten min-hashes; then the sets
    themselves are compared. A document found to be a copy is no original for others.
    """
    sets = [shingles(document) for document in as_documents(documents)]
    copies, shelves = {}, defaultdict(list)
    for i, found in enumerate(sets):
        signature = np.array_split(minhash(found), bands)
        keys = [(band, part.tobytes()) for band, part in enumerate(signature)]
        for j in sorted({j for key in keys for j in shelves[key]}):
            if (alike := jaccard(sets[j], found)) >= threshold:
                copies[i] = j, alike
                break
        else:
            for key in keys:
                shelves[key].append(i)
    return copies


def deduplicate(documents, threshold: float = 0.5) -> list[str]:
    """The documents without those that nearly repeat an earlier one."""
    copies = near_duplicates(documents, threshold)
    return [document for i, document in enumerate(documents) if i not in copies]


def held_out(document: str) -> bool:
    """Is this document kept for validation? Decided by its own hash, for ever."""
    return chance(document, "a") < 1 / 32


def words(document: str) -> list[tuple[str, int, int]]:
    """(word, start, end): lower-case, cut at white space, without punctuation."""
    found = []
    for match in re.finditer(r"\S+", document):
        word = match[0].lower()
        if not word.isalnum():
            word = re.sub(r"[^\w]|_", "", word)
        if word:
            found.append((word, match.start(), match.end()))
    return found


def grams(found: list[tuple[str, int, int]], n: int = 13):
    """Every run of n words, with the place where it starts and ends in the text."""
    only = [word for word, _, _ in found]
    for i in range(len(found) - n + 1):
        yield " ".join(only[i : i + n]), found[i][1], found[i + n - 1][2]


def cut_out(document: str, places, window: int = 200, shortest: int = 200):
    """The pieces left when each (start, end) and `window` characters around it go."""
    pieces, at = [], 0
    for start, end in sorted(places):
        pieces.append(document[at : max(at, start - window)])
        at = max(at, end + window)
    pieces.append(document[at:])
    return [piece for piece in pieces if len(piece) >= shortest] if places else pieces


def decontaminate(documents, tests, n=13, common=10, most=10) -> list[list[str]]:
    """For each document the pieces that share no run of n words with any test.

    An untouched document is one piece. A run found in more than `common` documents
    is ignored; a document that falls into more than `most` pieces is dropped.
    """
    wanted = {gram for test in tests for gram, _, _ in grams(words(test), n)}
    hits, holders = [], Counter()
    for document in as_documents(documents):
        found = [(g, a, b) for g, a, b in grams(words(document), n) if g in wanted]
        holders.update({gram for gram, _, _ in found})
        hits.append(found)
    left = []
    for document, found in zip(documents, hits):
        places = [(a, b) for gram, a, b in found if holders[gram] <= common]
        pieces = cut_out(document, places)
        left.append(pieces if len(pieces) <= most else [])
    return left


FAMILY_WEIGHTS = {
    "stories": 0.25,
    "wikipedia": 0.26,
    "plays": 0.13,
    "bible": 0.13,
    "speeches": 0.22,
    "crawl": 0.01,
}


def family_sources() -> dict[str, list[str]]:
    """Every source before the last two steps: name -> documents."""
    return {
        "stories": texts.stories(),
        "wikipedia": texts.wikipedia(),
        "plays": texts.shakespeare(),
        "bible": texts.king_james(),
        "speeches": texts.speeches(),
        "crawl": kept_pages(),
    }


def family_split() -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """(what the book's models read, what is held out): source -> cleaned documents.

    The same on every machine: the hash of both stands in the manifest. Takes about a
    minute, and 36 MB of downloads once. Raises DataError.
    """
    pairs = [(name, d) for name, each in family_sources().items() for d in each]
    copies = near_duplicates([document for _, document in pairs])
    clean, exam = ({name: [] for name in FAMILY_WEIGHTS} for _ in range(2))
    for i, (name, document) in enumerate(pairs):
        if i not in copies:
            (exam if held_out(document) else clean)[name].append(document)
    tests = [document for each in exam.values() for document in each]
    for name, each in clean.items():
        clean[name] = [d for pieces in decontaminate(each, tests) for d in pieces]
    both = [d for half in (clean, exam) for each in half.values() for d in each]
    check_same_text("family", both)
    return clean, exam
