"""Files against hashlib, the bytes of the format and a kill at every moment; what spoiled folders are said to be."""

import hashlib
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from gpt3lib import files
from gpt3lib.files import (
    INDEX,
    MODEL,
    Stored,
    WeightsError,
    beside,
    copied,
    find_folder,
    is_whole,
    pick_device,
    scan,
    scan_folder,
    sha256,
    shards,
    write_beside,
    write_folder,
    write_shards,
)
from mortal import Mortal

NUMBERS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(5), "c": torch.zeros(4, 4, dtype=torch.float16)}


def others(n=3):
    return {name: torch.full((n, n), float(n)) for name in "abcd"}


def listing(folder):
    return sorted(path.name for path in folder.iterdir())


def complaint(function, *arguments):
    with pytest.raises(WeightsError) as caught:
        function(*arguments)
    return str(caught.value)


def same(a, b):
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


def put(folder, tensors, header, config, way):
    """Write in one file or in shards of 60 bytes."""
    if way == "single":
        write_folder(folder, tensors, header, config)
    else:
        write_shards(folder, tensors, header, config, 60)


def get(folder):
    """Tensors and header as a reader finds them."""
    found, about = scan_folder(folder)
    return dict(Stored(found)), about


# ---- beside, then renamed ----


def test_beside_then_renamed(tmp_path):
    path = tmp_path / "x.bin"
    write_beside(path, b"old")
    write_beside(str(path), b"new")
    assert path.read_bytes() == b"new" and listing(tmp_path) == ["x.bin"]


@pytest.mark.parametrize("old", [b"old", None])
def test_a_kill_leaves_all_of_the_old_or_all_of_the_new(tmp_path, monkeypatch, old):
    path = tmp_path / "x.bin"
    if old:
        path.write_bytes(old)
    for calls in range(3):
        mortal = Mortal(calls).wrap
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", mortal(os.replace))
            patch.setattr(Path, "write_bytes", mortal(Path.write_bytes))
            if calls < 2:
                with pytest.raises(KeyboardInterrupt):
                    write_beside(path, b"new")
                assert (path.read_bytes() if path.exists() else None) == old
            else:
                write_beside(path, b"new")
    assert path.read_bytes() == b"new" and listing(tmp_path) == ["x.bin"]


def test_a_write_that_fails_half_way_leaves_the_old(tmp_path, monkeypatch):
    path = tmp_path / "x.bin"
    path.write_bytes(b"old")

    def full_disk(self, data):
        with open(self, "wb") as file:
            file.write(data[:1])
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="no space"):
        write_beside(path, b"new")
    assert path.read_bytes() == b"old"


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=3000))
def test_hashes_are_sha_256(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "hashed"
    path.write_bytes(data)
    assert sha256(data) == sha256(path) == hashlib.sha256(data).hexdigest()


def test_a_known_hash():
    assert sha256(b"abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


# ---- a folder, in one file or in shards ----


@pytest.mark.parametrize("way", ["single", "shards"])
def test_out_and_in_again_is_the_same_to_the_bit(tmp_path, way):
    put(tmp_path / "a" / "b", NUMBERS, {"who": "we"}, '{"wide": 3}', way)
    tensors, about = get(tmp_path / "a" / "b")
    assert same(tensors, NUMBERS) and about["who"] == "we"
    assert (tmp_path / "a" / "b" / "config.json").read_text() == '{"wide": 3}'


def test_a_file_is_eight_bytes_a_header_and_numbers(tmp_path):
    write_folder(tmp_path, NUMBERS, {"who": "we"}, "{}")
    raw = (tmp_path / MODEL).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    assert header.pop("__metadata__") == {"who": "we"} and header.keys() == NUMBERS.keys()
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        assert raw[8 + length + first : 8 + length + last] == NUMBERS[name].numpy().tobytes()
    assert len(raw) == 8 + length + 24 + 20 + 32


@pytest.mark.parametrize("way", ["single", "shards"])
def test_others_may_read_the_file_if_they_may_read_its_neighbour(tmp_path, way):
    put(tmp_path, NUMBERS, {}, "{}", way)
    (tmp_path / "another").write_bytes(b"")
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 1 and len(listing(tmp_path)) > 2


def test_scanning_tells_shapes_and_types(tmp_path):
    write_folder(tmp_path, NUMBERS, {"who": "we"}, "{}")
    found, about = scan(tmp_path / MODEL)
    path = tmp_path / MODEL
    assert found == {"a": (path, (2, 3), "F32"), "b": (path, (5,), "F32"), "c": (path, (4, 4), "F16")}
    assert about == {"who": "we"}
    save_file(NUMBERS, path)
    assert scan(path)[1] == {}


def test_reading_takes_what_is_asked_for(tmp_path):
    write_folder(tmp_path, NUMBERS, {}, "{}")
    found, _ = scan_folder(tmp_path)
    assert same(Stored({"b": found["b"]}), {"b": NUMBERS["b"]})
    assert same(Stored(found, {"x": "b"}), {"x": NUMBERS["b"]}) and len(Stored({})) == 0


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=12), st.integers(1, 120))
def test_shards_hold_every_tensor_once_in_order(sizes, room):
    tensors = {f"t{i}": torch.zeros(size, dtype=torch.int8) for i, size in enumerate(sizes)}
    groups = shards(tensors, room)
    assert [name for group in groups for name in group] == list(tensors)
    for group in groups:
        assert group and (sum(t.nbytes for t in group.values()) <= room or len(group) == 1)
    for group, following in zip(groups, groups[1:]):  # none could have taken one more
        assert sum(t.nbytes for t in group.values()) + next(iter(following.values())).nbytes > room


def test_no_tensors_make_no_shards():
    assert shards({}, 5) == []


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("way", ["single", "shards"])
def test_turned_empty_and_shared_tensors_come_back(tmp_path, dtype, way):
    whole = torch.arange(12).to(dtype)
    tensors = {"é": whole.view(4, 3).T, "0": torch.ones((), dtype=dtype), "e": torch.ones(0, 2), "part": whole[2:5]}
    put(tmp_path, tensors | {"again": whole}, {}, "{}", way)
    assert same(get(tmp_path)[0], tensors | {"again": whole})


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_a_copy_lies_in_one_piece_of_its_own(dtype):
    turned = torch.arange(6.0).view(2, 3).T
    copy = copied(turned, dtype)
    assert copy.is_contiguous() and copy.dtype == (dtype or torch.float32) and torch.equal(copy, turned.to(copy.dtype))
    copy.zero_()
    assert turned.sum() == 15


@pytest.mark.parametrize("way", ["single", "shards"])
@pytest.mark.parametrize("old", ["single", "shards", None])
def test_a_full_disk_leaves_what_was_there_and_nothing_else(tmp_path, monkeypatch, way, old):
    if old:
        put(tmp_path, NUMBERS, {"who": "we"}, "old", old)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    calls = iter([True])

    def full_file(tensors, path, metadata):
        path.write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    def full(path, data):
        if next(calls, False):
            return write_beside(path, data)  # the second shard finds no room
        with beside(path) as part:
            part.write_bytes(data[:4])
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "save_file", full_file)
    monkeypatch.setattr(files, "write_beside", full)
    message = complaint(put, tmp_path, others(), {"who": "they"}, "new", way)
    assert message.startswith(f"{tmp_path} cannot be written (") and "No space left" in message
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("way", ["single", "shards"])
def test_a_path_that_is_no_folder(tmp_path, way):
    (tmp_path / "x").write_bytes(b"mine")
    assert "is a file; give a folder to write into" in complaint(put, tmp_path / "x", NUMBERS, {}, "{}", way)
    assert "cannot be written" in complaint(put, tmp_path / "x" / "y", NUMBERS, {}, "{}", way)
    assert listing(tmp_path) == ["x"] and (tmp_path / "x").read_bytes() == b"mine"
    (tmp_path / "z" / MODEL).mkdir(parents=True)
    assert "is a folder; it must be a file" in complaint(scan_folder, tmp_path / "z")
    assert "cannot be written" in complaint(put, tmp_path / "z", NUMBERS, {}, "{}", way)
    assert (tmp_path / "z" / MODEL).is_dir() and not list((tmp_path / "z").glob("*.part"))


FULL = """
import resource, sys, torch
from pathlib import Path
from gpt3lib.files import write_folder, write_shards
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
tensors = {"a": torch.ones(5000), "b": torch.ones(20_000)}
for write in (lambda *a: write_folder(*a), lambda *a: write_shards(*a, 30_000)):
    try:
        write(Path(sys.argv[1]), tensors, {}, "{}")
    except Exception as error:
        print(type(error).__name__, error)
"""


@pytest.mark.skipif(os.name != "posix", reason="only there can a process forbid itself large files")
def test_a_limit_that_the_system_sets(tmp_path):
    """No stand-in: safetensors and the system themselves refuse the second tensor."""
    put(tmp_path, NUMBERS, {}, "old", "single")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    run = subprocess.run([sys.executable, "-c", FULL, tmp_path], capture_output=True, text=True, check=True)
    assert run.stdout.count(f"WeightsError {tmp_path} cannot be written (") == 2 == run.stdout.count("File too large")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("path", ["/".join(["x" * 99] * 50), "x" * 300])
@pytest.mark.parametrize("way", ["single", "shards"])
def test_paths_that_are_too_long(tmp_path, way, path):
    assert "cannot be written (" in complaint(put, tmp_path / path, NUMBERS, {}, "{}", way)
    assert "there is no such folder here" in complaint(scan_folder, find_folder(tmp_path / path, print))
    assert listing(tmp_path) in ([], ["x" * 99])  # folders on the way are made one by one


@pytest.mark.parametrize("path", [None, b"x", 3, "", ["x"], "x\0y"])
def test_what_is_no_path(path):
    assert complaint(find_folder, path, print) == f"{path!r} is no path; give the path of a folder, as text"


def test_addresses_and_ones_home(tmp_path, monkeypatch):
    for address in ("file:///x/y", "https://huggingface.co/gpt2"):
        assert complaint(find_folder, address, print) == f"{address} is an address; give a folder, or owner/name"
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x").mkdir()
    assert find_folder("~/x", print) == tmp_path / "x" and find_folder("~", print) == tmp_path
    assert find_folder("~root", print) == Path("~root").expanduser()
    assert find_folder("~nobody-of-this-name", print) == Path("~nobody-of-this-name")


def test_equal_models_make_equal_files(tmp_path):
    header = {"format": "pt", "config": '{"text": "Ἀρχή \\u0001 \\"x\\""}', "made by": "us\x01\t\x7f", "ä": "ö"}
    for number in range(12):  # safetensors puts four words in one of 24 orders
        put(tmp_path / f"{number}", NUMBERS, header, "{}", "single")
    assert len({sha256(tmp_path / f"{number}" / MODEL) for number in range(12)}) == 1
    tensors, about = get(tmp_path / "0")
    assert about == header and same(tensors, NUMBERS)
    save_file(NUMBERS, tmp_path / "plain", metadata=header)
    assert (tmp_path / "plain").stat().st_size == (tmp_path / "0" / MODEL).stat().st_size


@pytest.mark.parametrize("size", [0, -1, 2.5, "1GB", True, None])
def test_a_size_that_is_none(tmp_path, size):
    words = f"shard_bytes is {size!r}; it must be a whole number, 1 or more"
    assert complaint(write_shards, tmp_path / "x", NUMBERS, {}, "{}", size) == words
    assert not (tmp_path / "x").exists()


def test_shards_are_named_by_their_hashes(tmp_path):
    write_shards(tmp_path, NUMBERS, {"who": "we"}, "{}", 60)
    index = json.loads((tmp_path / INDEX).read_text())
    names = sorted(set(index["weight_map"].values()))
    assert len(names) == 2 and index["metadata"] == {"who": "we", "total_size": 76}
    for i, name in enumerate(names, start=1):
        assert name == f"model-{i:05}-of-00002-{sha256(tmp_path / name)[:16]}.safetensors"
        assert set(load_file(tmp_path / name)) == {n for n, file in index["weight_map"].items() if file == name}
    assert listing(tmp_path) == sorted(["config.json", INDEX, *names])


# ---- kills ----


@pytest.mark.parametrize("before", ["nothing", "single", "shards"])
@pytest.mark.parametrize("after", ["single", "shards"])
def test_killed_anywhere_the_folder_is_old_or_new(tmp_path, monkeypatch, before, after):
    """Die at the n-th write, rename or removal, for every n; tensors and header never part."""
    states = []
    for calls in range(100):
        folder = tmp_path / str(calls)
        if before != "nothing":
            put(folder, NUMBERS, {"config": "old"}, "old", before)
        mortal = Mortal(calls).wrap
        with monkeypatch.context() as patch:
            for home, name in ((os, "replace"), (os, "unlink"), (Path, "write_bytes"), (files, "save_file")):
                patch.setattr(home, name, mortal(getattr(home, name)))
            try:
                put(folder, others(), {"config": "new"}, "new", after)
                finished = True
            except KeyboardInterrupt:
                finished = False
        try:
            tensors, about = get(folder)
            wanted = {"old": NUMBERS, "new": others()}[about["config"]]
            states.append(about["config"] if same(tensors, wanted) else "mixture")
        except WeightsError:
            states.append("none")
        if finished:
            break
        put(folder, others(), {"config": "new"}, "new", after)  # what was left is in nobody's way
        assert same(get(folder)[0], others())
    assert states[0] == ("none" if before == "nothing" else "old") and states[-1] == "new"
    assert states == sorted(states, key=[states[0], "new"].index)
    shard_files = set(json.loads((folder / INDEX).read_text())["weight_map"].values()) if after == "shards" else set()
    wanted = {MODEL} if after == "single" else {INDEX, *shard_files}
    assert set(listing(folder)) == {"config.json", *wanted} and (folder / "config.json").read_text() == "new"


def test_a_file_of_ones_own_beside_the_model_stays(tmp_path):
    (tmp_path / "model-of-mine.safetensors").write_bytes(b"x")
    (tmp_path / "diary.txt").write_bytes(b"x")
    (tmp_path / "model-of-my-wife-of-old.safetensors").write_bytes(b"x")
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"x")  # of a model that is no more
    write_shards(tmp_path, NUMBERS, {}, "{}", 60)
    write_folder(tmp_path, NUMBERS, {}, "{}")
    own = ["model-of-mine.safetensors", "model-of-my-wife-of-old.safetensors"]
    assert listing(tmp_path) == ["config.json", "diary.txt", *own, MODEL]


@pytest.mark.parametrize("way", ["single", "shards"])
@pytest.mark.parametrize("name", ["config.json", MODEL, INDEX])
def test_a_folder_in_a_files_place(tmp_path, way, name):
    (tmp_path / name).mkdir()
    message = complaint(put, tmp_path, NUMBERS, {}, "{}", way)
    assert f"cannot be written ({name} is a folder)" in message and listing(tmp_path) == [name]


@pytest.mark.parametrize("text", ["{", "[1]", "\x80", '{"weight_map": 3}'])
def test_a_write_that_fails_over_a_damaged_index(tmp_path, monkeypatch, text):
    (tmp_path / INDEX).write_bytes(text.encode("latin-1"))
    monkeypatch.setattr(os, "replace", Mortal(1).wrap(os.replace))
    with pytest.raises(KeyboardInterrupt):
        write_shards(tmp_path, NUMBERS, {}, "{}", 60)
    assert listing(tmp_path) == [INDEX]


# ---- what a folder can have wrong with it ----


@pytest.mark.parametrize("keep", [0, 5, 60, -1])
def test_files_cut_short(tmp_path, keep):
    write_folder(tmp_path, NUMBERS, {}, "{}")
    path = tmp_path / MODEL
    path.write_bytes(path.read_bytes()[:keep])
    message = complaint(scan_folder, tmp_path)
    assert message.startswith(f"{path} is damaged (") and message.endswith("; copy or save it again")


def test_folders_without_tensors(tmp_path):
    words = f"{tmp_path} has no {MODEL}; save_pretrained writes one"
    assert complaint(scan_folder, tmp_path) == words
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    message = complaint(scan_folder, tmp_path)
    assert "has no safetensors but pickles (pytorch_model.bin), which can run any code" in message
    assert "has no model.safetensors" in complaint(scan_folder, tmp_path / "nowhere")


def test_shards_that_are_missing_damaged_or_misnamed(tmp_path):
    write_shards(tmp_path, NUMBERS, {}, "{}", 60)
    index = json.loads((tmp_path / INDEX).read_text())
    first, last = sorted(set(index["weight_map"].values()))
    good = (tmp_path / first).read_bytes()
    (tmp_path / first).write_bytes(good[:-9])
    assert f"{tmp_path / first} is damaged" in complaint(scan_folder, tmp_path)
    (tmp_path / first).unlink()
    assert f"has no {first}, which its index names" in complaint(scan_folder, tmp_path)
    (tmp_path / first).write_bytes(good)
    for wrong in (last, f"../{tmp_path.name}/{first}"):  # an index may not lead out of its folder
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": index["weight_map"] | {"a": wrong}}))
        assert f"says that a lies in {wrong}, but it does not" in complaint(scan_folder, tmp_path)
    for text in ("{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'):
        (tmp_path / INDEX).write_text(text)
        assert f"{tmp_path / INDEX} is damaged" in complaint(scan_folder, tmp_path)


# ---- a name instead of a folder ----


@pytest.fixture
def hub(monkeypatch):
    """A hub that returns a folder or raises an error, whichever was put into `answer`."""
    import huggingface_hub

    calls, answer = [], []

    def snapshot_download(name, **options):
        calls.append((name, options["allow_patterns"]))
        if isinstance(answer[0], Exception):
            raise answer[0]
        return str(answer[0])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls, answer


def test_a_name_is_checked_before_gigabytes_come(tmp_path, monkeypatch, hub):
    monkeypatch.chdir(tmp_path)
    calls, answer = hub
    write_folder(tmp_path / "cache", NUMBERS, {}, "{}")
    answer.append(tmp_path / "cache")
    seen = []
    assert find_folder("owner/name", seen.append) == tmp_path / "cache" and seen == [tmp_path / "cache"]
    assert calls == [("owner/name", ["config.json"]), ("owner/name", ["*.json", "*.safetensors"])]

    def refuse(folder):
        raise WeightsError("of another kind")

    calls.clear()
    assert complaint(find_folder, "owner/name", refuse) == "of another kind" and len(calls) == 1
    (tmp_path / "cache" / MODEL).unlink()
    assert "'owner/name' on the hub has no safetensors" in complaint(find_folder, "owner/name", seen.append)


@pytest.mark.parametrize("kind", ["ConnectTimeout", "RepositoryNotFoundError"])
def test_the_hub_is_away_or_does_not_know(tmp_path, monkeypatch, hub, kind):
    monkeypatch.chdir(tmp_path)
    hub[1].append(type(kind, (OSError,), {})("…"))
    message = complaint(find_folder, "name", print)
    says = "could not be reached" if kind == "ConnectTimeout" else "has no such model, or not for everybody"
    assert f"{says} ({kind})" in message and "hf download name" in message


@pytest.mark.parametrize("path", [Path("gpt2"), "./gpt2", "/no/gpt2", "a/b/c", "~/gpt2", ".hidden", "a//b", "a/"])
def test_paths_never_go_to_the_network(tmp_path, monkeypatch, hub, path):
    monkeypatch.chdir(tmp_path)
    assert find_folder(path, pytest.fail) == Path(path).expanduser() and hub[0] == []


def test_a_folder_comes_first_and_a_file_is_none(tmp_path, monkeypatch, hub):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()
    assert find_folder("gpt2", pytest.fail) == Path("gpt2") and hub[0] == []
    (tmp_path / "x").write_bytes(b"")
    assert complaint(find_folder, tmp_path / "x", print).endswith("is a file; give the folder that it lies in")


HUB = """
import http.server, json, os, sys, threading, time

mode, config, sha = sys.argv[1], b'{"vocab_size": 9, "d_model": 4}', "a" * 40
files = {"config.json": config, "model.safetensors": b"x" * 15_000_000}


class Hub(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        path = self.path.split("?")[0]
        if path.endswith("revision/main") or path.endswith("api/models/gpt2"):
            names = [{"rfilename": name} for name in files]
            body = json.dumps({"id": "gpt2", "sha": sha, "siblings": names}).encode()
        elif "/tree/" in path:
            entries = [{"type": "file", "oid": n, "path": n, "size": len(files[n])} for n in files]
            body = json.dumps(entries).encode()
            if mode == "list":
                time.sleep(100)
        else:
            body = files.get(path.split("/")[-1], b"{}")
        large = len(body) > 1000
        if mode == "start" or mode == "file" and large:
            time.sleep(100)
        self.send_response(200)
        for key, value in {"ETag": '"x%d"' % len(body), "X-Repo-Commit": sha, "Content-Length": len(body)}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command == "GET" and not (large and self.headers.get("range")):
            self.wfile.write(body[: 12_000_000 if mode == "middle" else None])
        if mode == "middle" and large and self.command == "GET":
            time.sleep(100)

    do_GET = do_HEAD


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
threading.Thread(target=server.serve_forever, daemon=True).start()
port = server.server_address[1]
if mode == "refused":
    server.server_close()
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{port}"
from gpt3lib.files import WeightsError, find_folder, impatient
import huggingface_hub  # the client's own imports are no silence

started = time.monotonic()
answers = []


def ask():
    try:
        answers.append(find_folder("gpt2", lambda folder: None).name == sha)
    except WeightsError as error:
        answers.append(error)


# a healthy hub answers three who ask at once: each counts its own questions only
askers = [threading.Thread(target=ask) for _ in range(3 if mode == "fine" else 1)]
for asker in askers:
    asker.start()
for asker in askers:
    asker.join()
print(*set(answers))
print(time.monotonic() - started)
os._exit(0)
"""


@pytest.mark.parametrize("mode", ["start", "list", "file", "middle", "refused", "fine"])
def test_a_hub_that_falls_silent_is_given_up(tmp_path, mode):
    """A real client against a real socket, which accepts and says nothing from some moment on."""
    off = {
        "HF_HOME": str(tmp_path),
        "HF_HUB_DOWNLOAD_TIMEOUT": "30" if mode == "fine" else "2",
        "NO_PROXY": "*",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    off |= {"PYTHONPATH": os.getcwd(), "HF_HUB_OFFLINE": "0"}  # 2 s instead of 7, so that the test is short
    environment = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()} | off
    command = [sys.executable, "-c", HUB, mode]
    run = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    said, seconds = run.stdout.strip().rsplit("\n", 1)
    assert (
        said == "True" if mode == "fine" else "'gpt2' is no folder here, and the Hugging Face hub could not be" in said
    )
    assert float(seconds) < 25


@pytest.mark.parametrize("value", [1, 7, np.int64(3), np.uint8(2)])
def test_a_whole_number_of_python_or_numpy(value):
    assert is_whole(value)
    assert is_whole(value, least=0)
    assert not is_whole(value, least=int(value) + 1)


@pytest.mark.parametrize("value", [True, np.True_, 1.0, np.float32(2), "1", None, float("nan"), 0, -1])
def test_no_whole_number_of_at_least_one(value):
    assert not is_whole(value)


def test_the_device_is_the_fastest_there_is_or_the_one_that_is_named(monkeypatch):
    monkeypatch.delenv("GPT3LIB_DEVICE", raising=False)
    for cuda, mps, name in ((True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda mps=mps: mps)
        assert pick_device() == torch.device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("GPT3LIB_DEVICE", "meta")
    assert pick_device() == torch.device("meta")
