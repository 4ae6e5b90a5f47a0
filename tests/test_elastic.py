"""Runs of many ranks: checkpoints for any layout, ranks that are shot or hang, two nodes, a file for Slurm."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import deadly_ranks
from deadly_ranks import CONFIG, alone, as_text, descendants, differences, finished, parts, share, torchrun
from gpt3lib import elastic
from gpt3lib.checkpoints import RunError, Store
from gpt3lib.parallel import Layout
from gpt3lib.pipeline import Team
from gpt3lib.processes import together
from gpt3lib.runs import Run, State, load

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="torchrun has no gloo between ranks there")
N_STEPS = 15  # of a run of 12 full batches: the first ones are smaller


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run in one process: folder and losses."""
    folder = tmp_path_factory.mktemp("whole")
    state, _ = alone(folder)
    assert state.step == N_STEPS
    return folder, state.losses


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """The run of two ranks that nobody disturbs."""
    folder = tmp_path_factory.mktemp("calm")
    together(2, share, str(folder), {"fsdp": 2})
    return folder


def near(losses, right):
    """Whether losses are equal, but for the order of sums."""
    return len(losses) == len(right) and all(abs(a - b) < 1e-5 * b for a, b in zip(losses, right))


def bits(team, optimizer):
    """All tensors of a team, put together, as one rank sees them."""
    found = elastic.team_tensors(team, optimizer)
    return {n: t.full_tensor() if hasattr(t, "full_tensor") else t.clone() for n, t in found.items()}


# --- saved in one layout, loaded in others ---


def stop_early(folder, axes, at=6):
    """A run in which only rank 1 hears that it shall stop."""

    def on_step(number, team):
        if number == at and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    return share(folder, axes, on_step=on_step)


def go_on(folder, axes):
    """Load the checkpoint in another layout: its tensors; then the rest of the run."""
    recipe, _ = parts()
    team = Team(CONFIG, Layout(**axes), seed=8)
    optimizer = team.optimizer(recipe)
    elastic.lay_out(elastic.newest(Store(folder)), team, optimizer)
    return bits(team, optimizer), share(folder, axes)


@pytest.fixture(scope="module")
def quartered(tmp_path_factory):
    """A run of four ranks, stopped after 6 steps by a signal to one of them: folder, what each rank said."""
    folder = tmp_path_factory.mktemp("four") / "run"
    return folder, together(4, stop_early, str(folder), {"fsdp": 2, "tp": 2})


def test_a_signal_that_one_rank_hears_stops_all_and_each_has_written_its_pieces(quartered):
    folder, said = quartered
    assert [answer["step"] for answer in said] == [6] * 4
    newest = Store(folder).checkpoints()[-1]
    assert newest.name == "step-0000000006" and len([*newest.glob("*.safetensors")]) == 4
    assert {path.suffix for path in folder.rglob("step-*/*")} == {".safetensors", ".json"}  # no pickle


@pytest.mark.parametrize("axes", [{"dp": 3}, {"pp": 2}, {"tp": 2}], ids=str)
def test_any_layout_goes_on_from_any_other(quartered, whole, tmp_path, axes):
    folder, before = quartered
    place = shutil.copytree(folder, tmp_path / "run")
    found = Store(place).latest()
    right = dict(found.tensors("model")) | dict(found.tensors("optimizer"))
    said = together(next(iter(axes.values())), go_on, str(place), axes)
    names = set()
    for tensors, _ in said:
        names |= {*tensors}
        assert all(torch.equal(tensor, right[name]) for name, tensor in tensors.items())
    assert names == {*right} and sum(n.startswith("exp_avg/") for n in names) == len(dict(found.tensors("model")))
    assert all(near(answer["losses"], whole[1]) for _, answer in said)
    # each sequence is read in order, by the ranks of one group of data, once
    groups = 1 if set(axes) & {"pp", "tp"} else 3
    read = sorted(i for _, answer in said[:groups] for i in answer["read"])
    first = max(i for answer in before for i in answer["read"]) + 1
    total = sum(step.n_sequences for step in parts()[0].steps(CONFIG.n_ctx))
    assert read == [*range(first, total)]


def test_one_process_goes_on_too_and_every_reader_finds_the_model(quartered, whole, tmp_path):
    place = shutil.copytree(quartered[0], tmp_path / "run")
    model = load(place)
    stored = Store(place).latest().tensors("model")
    assert all(torch.equal(tensor, stored[name]) for name, tensor in model.state_dict().items())
    model.save_pretrained(tmp_path / "model")
    state, _ = alone(place)
    assert near(state.losses, whole[1])


def test_four_ranks_read_the_sequences_of_one(quartered):
    read = [answer["read"] for answer in quartered[1]]
    assert read[0] == read[1] and read[2] == read[3]  # the same rows for two parts of a matrix
    total = sum(step.n_sequences for step, _ in zip(parts()[0].steps(CONFIG.n_ctx), range(6)))
    assert sorted(read[0] + read[2]) == [*range(total)]


def test_ranks_go_on_where_one_process_was_stopped(whole, tmp_path):
    folder = tmp_path / "run"
    alone(folder, on_step=lambda number, _: number == 6 and os.kill(os.getpid(), signal.SIGTERM) or None)
    assert Store(folder).latest().number == 6
    said = together(2, share, str(folder), {"dp": 2})
    assert all(near(answer["losses"], whole[1]) for answer in said)


# --- saving ---


def save_and_change(folder):
    """A save, and tensors that are changed while it is written; then one that cannot be written."""
    team = Team(CONFIG, Layout(fsdp=2))
    optimizer, saver = team.optimizer(), elastic.Saver(Store(folder))
    before = {name: t.clone() for name, t in bits(team, optimizer).items()}
    told = {"state": asdict(State(step=1)), "about": {}}
    saver.save(team, optimizer, 1, told)
    with torch.no_grad():
        for p in team.named_parameters().values():
            p.fill_(7.0)
    saver.wait()
    stored = Store(folder).latest().tensors("model")
    same = all(torch.equal(tensor, stored[name]) for name, tensor in before.items())
    if dist.get_rank() == 1:  # its disk is full
        elastic.sha256 = lambda path: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    saver.save(team, optimizer, 2, told)
    try:
        saver.wait()
    except RunError as error:
        return same, str(error)


def test_a_checkpoint_is_of_its_moment_and_a_full_disk_is_told_to_all(tmp_path):
    for same, words in together(2, save_and_change, str(tmp_path)):
        assert same and re.search("rank 1: .*step-0000000002.part cannot be written.*No space left", words)
    assert Store(tmp_path).latest().number == 1


def damaged(folder):
    """What two ranks take when a file of one's share is damaged; then, when all are."""
    found = [elastic.newest(Store(folder)).number]
    dist.barrier()
    if dist.get_rank() == 0:
        for path in Path(folder).glob("step-*/shard-00001*"):
            path.write_bytes(b"")
    dist.barrier()
    try:
        elastic.newest(Store(folder))
    except RunError as error:
        return [*found, str(error)]


def spoil(checkpoint: Path) -> None:
    """Flip a bit of the second rank's weights."""
    path = checkpoint / "shard-00002-model-00001-of-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_what_is_damaged_for_one_rank_is_damaged_for_all(calm, tmp_path):
    place = shutil.copytree(calm, tmp_path / "run")
    newest = Store(place).checkpoints()
    spoil(newest[-1])
    for number, words in together(2, damaged, str(place)):
        assert number == int(newest[-2].name.split("-")[1]) and words.startswith("no checkpoint is whole: ")


def test_what_is_damaged_is_set_aside_and_written_again(calm, tmp_path):
    place = shutil.copytree(calm, tmp_path / "run")
    newest = Store(place).checkpoints()[-1]
    spoil(newest)
    together(2, share, str(place), {"fsdp": 2})
    assert [path.name.rsplit("-", 1)[0] for path in place.glob("damaged-*")] == [f"damaged-{newest.name}"]
    assert Store(place).latest().folder.name == newest.name


# --- spikes and refusals ---


def poison(folder, on_spike):
    """Rank 1 breaks a weight in step 5, once."""
    done = []

    def on_step(number, team):
        if number == 5 and not done:
            done.append(number)
            if dist.get_rank() == 1:
                with torch.no_grad():
                    name, p = [*team.named_parameters().items()][-1]
                    elastic.local(p).fill_(torch.inf)

    try:
        said = share(folder, {"fsdp": 2}, on_step=on_step, on_spike=on_spike)
        return said["step"], said["passed"], (Path(folder) / "notes.txt").read_text()
    except RunError as error:
        return str(error)


def test_all_ranks_roll_back_together(tmp_path):
    for step, passed, notes in together(2, poison, str(tmp_path), "rollback"):
        assert (
            passed > 0 and notes.endswith("; rolled back to step 4\n") and "parameter ln_f.bias is not finite" in notes
        )
        assert step == N_STEPS


def refusals(folder):
    """What a run of two ranks refuses, and when."""
    found, (recipe, loader) = [], parts()
    for layout, other, ways in (
        ({"fsdp": 2}, recipe, {"sample_every": 3}),
        ({"fsdp": 3}, recipe, {}),
        ({"fsdp": 2}, replace(recipe, peak=2e-2), {}),
    ):
        try:
            elastic.run_together(CONFIG, Layout(**layout), loader, Store(folder), other, **deadly_ranks.QUIET | ways)
        except (RunError, ValueError) as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


def test_what_is_refused_is_refused_on_all_ranks(calm, tmp_path):
    place = shutil.copytree(calm, tmp_path / "run")
    for sample, layout, peak in together(2, refusals, str(place)):
        assert sample.startswith("RunError: sample_every is for a run in one process; `gpt3 generate`")
        assert layout.startswith("LayoutError: ") and "3" in layout
        assert peak.startswith("RunError: recipe.peak is 0.02, but the run in ")


# --- shot, hung ---


def test_two_ranks_are_shot_and_the_run_ends_as_if_nobody_had(calm, tmp_path):
    """One between its gradient and its update, one in the middle of a save."""
    folder = tmp_path / "run"
    ended = torchrun(2, folder, '{"fsdp": 2}', "step", 1, 5, "save", 0, 9, restarts=2)
    assert ended.returncode == 0, ended.stdout[-3000:]
    assert {path.name for path in folder.glob("struck-*")} == {"struck-step-1", "struck-save-0"}
    assert differences(folder, calm) == []
    assert not [*folder.glob("*.part"), *folder.glob("*.gone")]


def test_a_rank_that_hangs_is_named_within_a_minute(tmp_path):
    ended = torchrun(2, tmp_path / "run", '{"fsdp": 2}', "hang", 1, 3, GPT3LIB_PATIENCE="6")
    began = (tmp_path / "run" / "struck-hang-1").stat().st_mtime
    assert time.time() - began < 60 and ended.returncode == 1
    assert re.search(r"RankError: .*rank 1 hangs: for \d+ s it is in on_step at step 3, in strike", ended.stdout)


def opinions() -> list[bool]:
    """A worker: whether a step is calm that all ranks find calm, and one that rank 1 does not."""
    job, found = object.__new__(elastic.TeamRun), []
    for own in (True, dist.get_rank() == 0):
        with mock.patch.object(Run, "calm", lambda *_, own=own: own):
            found.append(job.calm(None, None))
    return found


def test_a_step_is_calm_only_if_all_ranks_find_it_so():
    assert together(2, opinions) == [[True, False]] * 2


def shown() -> list[int]:
    """A worker: by which rank rows are shown."""
    seen = []
    with mock.patch.object(Run, "present", lambda _: seen.append(dist.get_rank())):
        object.__new__(elastic.TeamRun).present()
    return seen


def test_only_the_first_rank_shows_rows():
    assert together(2, shown) == [[0], []]


def test_with_a_checkpoint_the_tries_begin_anew():
    job, saved = object.__new__(elastic.TeamRun), []
    job.state, job.heart, job.about, job.team, job.optimizer = State(step=3, tries=2), None, {}, None, None
    job.journal = SimpleNamespace(sizes=lambda: {"log.csv": 7})
    job.saver = SimpleNamespace(save=lambda *parts: saved.append(parts))
    job.save(kept=True)
    (_, _, number, told, kept), *_ = saved
    assert (number, kept, told["state"]["tries"], told["state"]["sizes"]) == (3, True, 0, {"log.csv": 7})


@pytest.mark.parametrize("seed", [None, 7])
def test_the_seed_of_the_command_is_that_of_the_team(monkeypatch, seed):
    class Asked(Exception):
        """With what a team was to run."""

    def run_together(*parts, **ways):
        raise Asked(ways["seed"])

    monkeypatch.setattr(elastic, "joined", lambda *_: nullcontext())
    monkeypatch.setattr(elastic, "run_together", run_together)
    parts = torch.device("cpu"), None, None, None, None
    with pytest.raises(Asked) as caught:
        elastic.learn_together(SimpleNamespace(n_threads=1, seed=seed), parts, Layout())
    assert caught.value.args == (seed or 0,)


@pytest.mark.parametrize("compiled, told, wanted", [(False, None, None), (True, None, 600), (True, "90", None)])
def test_a_compiler_has_more_patience_unless_the_environment_says_how_much(monkeypatch, compiled, told, wanted):
    class Asked(Exception):
        """What would have been waited for."""

    def joined(kind, patience):
        raise Asked(kind, patience)

    monkeypatch.setattr(elastic, "joined", joined)
    monkeypatch.delenv("GPT3LIB_PATIENCE", raising=False)
    if told:
        monkeypatch.setenv("GPT3LIB_PATIENCE", told)
    parts = torch.device("cpu"), None, None, None, None
    with pytest.raises(Asked) as caught:
        elastic.learn_together(SimpleNamespace(n_threads=1), parts, Layout(compile=compiled))
    assert caught.value.args == ("cpu", wanted)


# --- two nodes ---


def no_nodes() -> str:
    """Why this machine cannot play two nodes; "" if it can."""
    if not hasattr(os, "geteuid") or os.geteuid() or not shutil.which("ip"):
        return "network namespaces need root, and the command `ip`"
    tried = subprocess.run(["ip", "netns", "add", "gpt3-try"], capture_output=True)
    subprocess.run(["ip", "netns", "del", "gpt3-try"], capture_output=True)
    return "network namespaces are not allowed here" if tried.returncode else ""


@pytest.fixture
def nodes():
    """Two network namespaces with a cable between them: name -> address."""
    names = {f"gpt3-{side}-{os.getpid()}": f"10.77.0.{i}" for i, side in enumerate("ab", 1)}
    wire = ["link", "add", "e0", "netns", [*names][0], "type", "veth", "peer", "name", "e0", "netns", [*names][1]]
    try:
        for name in names:
            ip("netns", "add", name)
        ip(*wire)
        for name, address in names.items():
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "e0")
            ip("-n", name, "link", "set", "e0", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def ip(*words):
    """A call of iproute2."""
    subprocess.run(["ip", *words], check=True, capture_output=True)


def start_node(name, address, host, folder):
    """One node's torchrun, with one rank; host: whether the other one finds it here."""
    command = ["ip", "netns", "exec", name, *deadly_ranks.TORCHRUN, "--nnodes", "2", "--nproc-per-node", "1"]
    command += ["--max-restarts", "3", "--rdzv-backend", "c10d", "--rdzv-endpoint", "10.77.0.1:29400"]
    command += ["--rdzv-id", "two", "--local-addr", address]
    command += ["--rdzv-conf", f"is_host={host},keep_alive_interval=1,keep_alive_max_attempt=3"]
    own = {"GLOO_SOCKET_IFNAME": "e0", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "PAUSE": "0.2"}
    return subprocess.Popen([*command, deadly_ranks.__file__, str(folder), '{"fsdp": 2}'], **as_text(own))


def test_a_node_is_shot_and_comes_back(nodes, calm, tmp_path):
    """Two nodes; the second one dies with all its processes and is started again."""
    folder, log = tmp_path / "run", tmp_path / "run" / "log.csv"
    (a, home), (b, away) = nodes.items()
    first, second = start_node(a, home, 1, folder), start_node(b, away, 0, folder)
    try:
        end = time.monotonic() + 60
        while not (log.exists() and len(log.read_text().splitlines()) > 5):
            assert time.monotonic() < end and first.poll() is None, finished(first, 1).stdout[-3000:]
            time.sleep(0.05)
        for pid in descendants(second.pid):
            os.kill(pid, signal.SIGKILL)
        second.communicate()
        assert len(log.read_text().splitlines()) < N_STEPS
        second = start_node(b, away, 0, folder)
        for node in (first, second):
            ended = finished(node, 90)
            assert ended.returncode == 0, ended.stdout[-3000:]
    finally:
        for node in (first, second):
            for pid in descendants(node.pid) if node.poll() is None else ():
                os.kill(pid, signal.SIGKILL)
    assert differences(folder, calm) == []


if why := no_nodes():
    test_a_node_is_shot_and_comes_back = pytest.mark.skip(reason=why)(test_a_node_is_shot_and_comes_back)


# --- Slurm ---

SLURM = Path(__file__).parents[1] / "launch" / "slurm.sh"


@pytest.fixture
def cluster(tmp_path):
    """A folder with programs that play Slurm's on one node. Returns the environment of a job of it."""
    names = {
        "srun": 'while [ "${1#-}" != "$1" ]; do shift; done; SLURM_NODEID=0 exec "$@"',
        "scontrol": "echo 127.0.0.1",
    }
    place = tmp_path / "bin"
    place.mkdir()
    for name, text in names.items():
        (place / name).write_text(f"#!/bin/bash\n{text}\n")
        (place / name).chmod(0o755)
    paths = [str(place), str(Path(sys.executable).parent), os.environ["PATH"]]
    job = {"SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "here", "SLURM_JOB_ID": "7", "GPUS": "2"}
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        job["PORT"] = str(door.getsockname()[1])
    return as_text(job | {"PATH": os.pathsep.join(paths)})


def test_the_file_for_slurm_starts_a_run(cluster, calm, tmp_path):
    folder = tmp_path / "run"
    cluster["env"] |= {"PROGRAM": deadly_ranks.__file__, "TRAIN": f'{folder} {{"fsdp":2}}'}
    ended = finished(subprocess.Popen(["bash", SLURM], **cluster), 90)
    assert ended.returncode == 0, ended.stdout[-3000:]
    assert differences(folder, calm) == []


def test_the_file_for_slurm_runs_our_command_if_nothing_else_is_said():
    text = SLURM.read_text()
    assert text.startswith("#!/bin/bash\n") and 'PROGRAM=${PROGRAM:-"-m gpt3lib.cli train"}' in text
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in text and "#SBATCH --requeue" in text
