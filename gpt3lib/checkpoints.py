"""Folders that outlive a kill: on the disk, with hashes, few of them, and one run at
a time."""

# Made from book/g_checkpoints.ipynb by tools/export.py; edit the chapter.
import json
import math
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from gpt3lib.files import Refusal, WeightsError, parse, scan, sha256


class RunError(Refusal, RuntimeError):
    """A run that cannot start, go on or be saved; the message says what would help."""


@contextmanager
def writes(path: Path) -> Iterator[None]:
    """What cannot be written inside is a RunError that says why."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        right = "Make room, or look who may write there, and start the same run again"
        words = f"{path} cannot be written ({error}); finished checkpoints are whole. "
        raise RunError(words + right) from error


def say(text: str) -> None:
    """Print, unless the terminal is gone."""
    with suppress(OSError, ValueError):
        print(text, flush=True)


def to_disk(path: Path) -> None:
    """Wait until a file, or a folder's list of names, lies on the disk itself."""
    if path.is_dir() and os.name == "nt":
        return  # Windows has no such call; its file system keeps a journal of names
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Checkpoint:
    """A folder with the state of a run, read and compared with its hashes.

    number: steps taken; state: what state.json holds of it. Of many files a rank of
    several compares its share, every n_ranks-th. Raises RunError.
    """

    def __init__(self, folder: Path, rank: int = 0, n_ranks: int = 1):
        self.folder, self.number = folder, int(folder.name.split("-")[1])
        try:
            told = parse((folder / "state.json").read_text(encoding="utf-8"))
            for name in [n for n in ("state", "files", "sha256") if n not in told]:
                raise ValueError(f"state.json has no {name!r}")
            self.state, files = told["state"], told["files"]
            self.files = [folder / name for name in files]
            if told["sha256"] != sha256(json.dumps([self.state, files]).encode()):
                raise ValueError("its hash is another")
            for name, right in [*files.items()][rank::n_ranks]:
                if sha256(folder / name) != right:
                    raise ValueError(f"the hash of {name} is another")
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise RunError(f"{folder} is damaged ({error})") from error

    def check(self, about: dict) -> None:
        """Raise RunError unless it is of a run that is described so."""
        began = {"optimizer": "AdamW"} | self.state["about"]  # older ones do not say
        check_same_run(self.folder.parent, began, about)

    def tensors(self, kind: str) -> "Pieces":
        """The tensors of kind "model" or "optimizer", by name. Raises RunError."""
        try:
            return Pieces(self.files, memory=kind == "optimizer")
        except (WeightsError, ValueError, TypeError, KeyError) as error:
            raise RunError(str(error)) from error


class Pieces(Mapping):
    """Tensors by name, each put together from the files that hold a piece of it.

    memory: those of an optimizer, whose names have a slash, or else the model's. Where
    a piece begins says its file, in the words of torch.distributed.checkpoint; without
    them it is the whole. Raises WeightsError, ValueError.
    """

    def __init__(self, files: list[Path], memory: bool = False):
        self.pieces: dict[str, list] = {}
        for file in files:
            found, told = scan(file)
            begins = json.loads(told.get("DCP_SHARDING_INFO", "{}"))
            for name in (name for name in found if ("/" in name) == memory):
                shape = found[name][1]
                first = begins[name]["saved_offsets"] if begins else [0] * len(shape)
                place = tuple(
                    slice(i, i + n) for i, n in zip(first, shape, strict=True)
                )
                self.pieces.setdefault(name, []).append((file, place))
        for name, pieces in self.pieces.items():
            there = sum(
                math.prod(s.stop - s.start for s in place) for _, place in pieces
            )
            if there != math.prod(self.shape(name)):
                raise ValueError(f"the pieces of {name} are not the whole")

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the whole: as far as its pieces reach."""
        places = [place for _, place in self.pieces[name]]
        return tuple(max(s.stop for s in ends) for ends in zip(*places))

    def __getitem__(self, name: str) -> torch.Tensor:
        whole = None
        for path, place in self.pieces[name]:
            with safe_open(path, "pt") as file:
                piece = file.get_tensor(name)
            if whole is None:
                whole = piece.new_empty(self.shape(name))
            whole[place] = piece
        return whole

    def __iter__(self) -> Iterator[str]:
        return iter(self.pieces)

    def __len__(self) -> int:
        return len(self.pieces)


def check_same_run(folder: Path, old, new, name: str = "") -> None:
    """Raise RunError, naming the first setting that is not what the run began with."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            inner = f"{name}.{key}".lstrip(".")
            check_same_run(folder, old.get(key), new.get(key), inner)
    elif old != new:
        words = f"{name} is {new!r}, but the run in {folder} began with {old!r}; "
        raise RunError(words + "give it that again, or another folder")


class Store:
    """The checkpoints of one run: folder/step-0000000123/.

    keep_last: how many of the newest stay; keep_at: for each of these places on the
    clock, in tokens, the first checkpoint from there on stays too.
    """

    def __init__(self, folder: str | Path, keep_last: int = 3, keep_at=()):
        self.folder = Path(folder).expanduser()
        self.keep_last = RunError.unless_whole("keep_last", keep_last)
        self.keep_at = [RunError.unless_whole("keep_at", place) for place in keep_at]

    @contextmanager
    def locked(self) -> Iterator[None]:
        """The folder, made if need be, for this run alone. Raises RunError.

        What a killed run left unfinished is swept out.
        """
        with writes(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            file = (self.folder / "lock").open("a+", encoding="utf-8")
        with file:
            try:
                lock(file)
            except (BlockingIOError, PermissionError) as error:
                file.seek(0)
                words = f"in use by another run (process {file.read(20).strip()})"
                right = "wait for it, or give this one a folder of its own"
                raise RunError(f"{self.folder} is {words}; {right}") from error
            except OSError as error:  # some network disks have no locks
                words = f"{self.folder} cannot be locked ({error})"
                say(f"{words}; start no second run there")
            with writes(self.folder / "lock"):
                file.truncate(0)
                print(os.getpid(), file=file, flush=True)
            for path in self.folder.glob("step-*"):
                if path.suffix in (".part", ".gone"):
                    shutil.rmtree(path, ignore_errors=True)
            yield

    def checkpoints(self) -> list[Path]:
        """The folders of the checkpoints, oldest first; nobody has looked inside."""
        found = self.folder.glob("step-*")
        return sorted(p for p in found if re.fullmatch(r"step-\d{10}(-kept)?", p.name))

    def save(self, number: int, tensors: dict, state: dict, kept: bool = False) -> None:
        """Write a checkpoint beside, then rename it, then let old ones go.

        tensors: kind -> name -> tensor; state: what JSON can hold. Raises RunError.
        """
        part = self.part(number, kept)
        try:
            with writes(part):
                part.mkdir(parents=True)
                for kind, group in tensors.items():
                    plain = {
                        name: tensor.contiguous() for name, tensor in group.items()
                    }
                    save_file(plain, part / f"{kind}.safetensors")
                files = {path.name: sha256(path) for path in sorted(part.iterdir())}
                self.seal(part, state, files)
        except RunError:
            shutil.rmtree(part, ignore_errors=True)
            raise

    def part(self, number: int, kept: bool = False) -> Path:
        """Where the checkpoint of a step is written, before it has its name."""
        return self.folder / f"step-{number:010}{'-kept' * kept}.part"

    def seal(self, part: Path, state: dict, files: dict[str, str]) -> None:
        """Make a checkpoint of a folder with all its files; then let old ones go.

        files: name -> hash. Its name comes last, when the disk has all of it.
        """
        told = {"sha256": sha256(json.dumps([state, files]).encode())}
        about = part / "state.json"
        text = json.dumps(told | {"state": state, "files": files}, indent=1)
        about.write_text(text, encoding="utf-8")
        for path in part.iterdir():
            path.chmod(about.stat().st_mode)  # safetensors lets only the owner read
            to_disk(path)
        to_disk(part)
        os.replace(part, part.with_suffix(""))
        to_disk(self.folder)
        for old in self.checkpoints()[: -self.keep_last]:
            if not old.name.endswith("-kept"):
                gone = old.with_suffix(".gone")  # first: a kill leaves no half of it
                os.replace(old, gone)
                shutil.rmtree(gone, ignore_errors=True)

    def keeps(self, before: int, after: int) -> bool:
        """Whether a place of keep_at lies between two readings of the clock."""
        return any(before < place <= after for place in self.keep_at)

    def set_aside(self, after: int) -> None:
        """Give another name to the checkpoints after a step: damaged-step-…"""
        for path in self.checkpoints():
            if int(path.name.split("-")[1]) > after:
                name = f"damaged-{path.name}-{time.time():.0f}"
                os.replace(path, path.with_name(name))

    def latest(self) -> Checkpoint | None:
        """The newest whole checkpoint, or None when there is none at all.

        A damaged one is named, and the one before it taken. Raises RunError if all are.
        """
        faults = []
        for path in reversed(self.checkpoints()):
            try:
                found = Checkpoint(path)
            except RunError as error:
                faults.append(f"{error}")
                continue
            for fault in faults:
                say(f"{fault}; {path.name} is used instead")
            return found
        words = f"no checkpoint is whole: {'; '.join(faults)}. "
        RunError.unless(not faults, words + "Copy one back, or begin in another folder")
        return None


def lock(file) -> None:
    """The system's lock on an open file; it ends with the process, however that ends.

    Raises OSError while another one holds it.
    """
    if os.name == "nt":
        import msvcrt

        file.seek(2**20)  # far behind the text, which stays readable
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


class Logs:
    """Text files that only grow, and are cut back to where a checkpoint saw them end.

    names: of the files in the folder, which are opened or made.
    """

    def __init__(self, folder: Path, names: tuple[str, ...]):
        self.opened, self.files, self.folder = ExitStack(), {}, folder
        with writes(folder):
            for name in names:
                file = (folder / name).open("ab")
                self.files[name] = self.opened.enter_context(file)

    def __enter__(self) -> "Logs":
        return self

    def __exit__(self, *error) -> None:
        with suppress(OSError, ValueError):  # a full disk, a closed terminal
            self.opened.close()

    def write(self, name: str, text: str) -> None:
        """Add a line. It is the system's then: no kill takes it back. RunError."""
        with writes(self.folder / name):
            self.files[name].write(f"{text}\n".encode())
            self.files[name].flush()

    def sizes(self) -> dict[str, int]:
        """The bytes of each file, all of which lie on the disk by then. RunError."""
        with writes(self.folder):
            for file in self.files.values():
                os.fsync(file.fileno())
        return {name: os.fstat(f.fileno()).st_size for name, f in self.files.items()}

    def cut(self, sizes: dict[str, int]) -> None:
        """Take away what was written since the files had these sizes. RunError."""
        for name, size in sizes.items():
            there = os.fstat(self.files[name].fileno()).st_size
            if there < size:
                say(f"{name} is shorter than at the checkpoint; lines of it are lost")
            with writes(self.folder / name):
                self.files[name].truncate(min(there, size))


class Bar:
    """A line at the terminal: how far, how fast, how long it will take."""

    def __init__(self, total: int, done: int, progress: bool | None):
        from tqdm import tqdm

        off = None if progress is None else not progress  # None: if nobody looks
        look = {"unit": "tok", "unit_scale": True, "dynamic_ncols": True}
        look["bar_format"] = "{l_bar}{bar}| {remaining} left, {rate_fmt}{postfix}"
        self.bar = tqdm(total=total, initial=done, disable=off, **look)

    def tell(self, row: dict) -> None:
        """Show a row of the log."""
        text = "loss {loss:.2f}, {bits_per_byte:.3f} bits/byte, MFU {mfu:.0%}"
        self.bar.set_postfix_str(text.format_map(row), refresh=False)
        self.bar.update(row["tokens"] - self.bar.n)


class Board:
    """TensorBoard's curves."""

    def __init__(self, folder: Path, done: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(folder / "tensorboard", purge_step=done + 1)

    def tell(self, row: dict) -> None:
        """Add a point to each curve."""
        for name in row.keys() - {"step", "first", "n_sequences"}:
            self.writer.add_scalar(name, row[name], row["step"])


def show(journal, store, recipe, state, options) -> None:
    """Give a journal its bar, and TensorBoard where it is installed. RunError."""
    journal.shows = [Bar(recipe.n_tokens, state.tokens, options.progress)]
    journal.opened.callback(journal.shows[0].bar.close)
    try:
        if options.tensorboard is not False:
            journal.shows.append(Board(store.folder, state.step))
            journal.opened.callback(journal.shows[1].writer.close)
    except ImportError as error:
        if options.tensorboard:
            raise RunError(f"{error}; pip install tensorboard") from error


class Stopping:
    """Meanwhile Ctrl-C, a closed terminal or a polite kill only set `asked`.

    A second Ctrl-C ends at once, as ever.
    """

    NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")  # systems lack one or another

    def __init__(self):
        self.asked, self.old = None, {}

    def __enter__(self) -> "Stopping":
        main = threading.current_thread() is threading.main_thread()
        for name in self.NAMES if main else ():  # others may not catch signals
            number = getattr(signal, name, None)
            if number and signal.getsignal(number) not in (signal.SIG_IGN, None):
                self.old[number] = signal.signal(number, self.ask)
        return self

    def ask(self, number: int, frame) -> None:
        """What the system calls."""
        self.asked = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(number, self.old[number])

    def __exit__(self, *error) -> None:
        for number, handler in self.old.items():
            signal.signal(number, handler)
