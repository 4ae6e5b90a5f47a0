"""The notebooks as other processors run them: the switches reach torch, a chapter that comes out otherwise is red."""

import json
import subprocess
import sys

import pytest

import elsewhere
import execute

ASK = "import json, os, torch; print(json.dumps([torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()]))"


def test_at_least_three_other_processors_and_one_two_and_four_threads():
    sets = {switches[:3] for switches in elsewhere.PROCESSORS.values()}
    assert len(sets - {(None, None, None)}) >= 3
    assert {switches[3] for switches in elsewhere.PROCESSORS.values()} == {1, 2, 4}


@pytest.mark.parametrize("name, capability", [("sse", "DEFAULT"), ("avx", "DEFAULT"), ("avx2", "AVX2")])
def test_the_switches_reach_torch(name, capability, monkeypatch):
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "nonsense of before")
    environment = elsewhere.environment(name)
    environment["OMP_NUM_THREADS"] = environment["BOOK_THREADS"]  # as conftest.py does
    done = subprocess.run([sys.executable, "-c", ASK], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [capability, elsewhere.PROCESSORS[name][3]]


def test_threads_are_those_of_the_stored_outputs_or_the_ones_that_are_asked_for(monkeypatch):
    for asked, expected in ((None, 1), ("4", 4)):
        environment = elsewhere.environment("own") | {"OMP_NUM_THREADS": "3", "PYTHONPATH": "tools"}
        environment.pop("BOOK_THREADS")
        if asked:
            environment["BOOK_THREADS"] = asked
        command = [sys.executable, "-c", f"import conftest; {ASK}"]
        done = subprocess.run(command, env=environment, cwd=elsewhere.ROOT, capture_output=True, text=True, check=True)
        assert json.loads(done.stdout)[1] == expected


def test_every_chapter_is_run_unless_some_are_asked_for():
    paths = [f"book/{name}.ipynb" for name in execute.chapters()]
    assert elsewhere.command(execute.chapters(), 2)[-len(paths) :] == paths


def test_a_chapter_that_comes_out_otherwise_is_told_and_fails(monkeypatch, capsys):
    def command(chapters, jobs):
        code = "import os, sys; print('1 failed'); sys.exit(os.environ.get('ATEN_CPU_CAPABILITY') == 'avx2')"
        return [sys.executable, "-c", code]

    monkeypatch.setattr(elsewhere, "command", command)
    assert elsewhere.main(["sse", "own"]) == 0
    assert "every output came out again" in capsys.readouterr().out
    assert elsewhere.main([]) == 1
    assert capsys.readouterr().out.endswith("red: avx2\n")


def test_a_processor_that_is_not_known_is_refused(capsys):
    with pytest.raises(SystemExit):
        elsewhere.main(["z80"])
    assert "no processor z80; there are sse, avx" in capsys.readouterr().err
