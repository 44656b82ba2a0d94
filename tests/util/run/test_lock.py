"""One run at a time in an output directory."""

import json
import os
import socket
import subprocess
import sys
import time

import pytest
from conftest import ROOT, one_line

from util.errors import UserError
from util.run import lock
from util.run.lock import RunLock

HOLD = """
import os, sys, time
from pathlib import Path
from util.run.lock import RunLock
with RunLock([Path(sys.argv[1])], print):
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds tmp_path/run/lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path / "run" / "lock"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.communicate()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "lock"


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(lock, "WATCH_SECONDS", 1.5)
    monkeypatch.setattr(lock, "TOUCH_SECONDS", 0.2)
    monkeypatch.setattr(lock, "EARLIER_START_SECONDS", 1.5)


def pretend(path, **owner):
    """Write the lock of another process, as if it had ended without removing it."""
    path.parent.mkdir(exist_ok=True)
    here = {"host": socket.gethostname(), "pid": 1, "job": None, "start": 0, "since": "then"}
    path.write_text(json.dumps({**here, **owner}))


def test_a_second_process_is_refused_and_named(holder, path):
    with pytest.raises(UserError, match=f"process {holder.pid} on {socket.gethostname()}, since"):
        RunLock([path], print)
    assert path.exists()


def test_the_lock_is_removed_with_the_directory_made_for_it(path):
    with RunLock([path, path.parent / "deeper" / "lock"], print) as held:
        held.check()
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert not path.parent.exists()
    path.parent.mkdir()
    with RunLock([path], print):
        (path.parent / "last.pth").touch()
    assert os.listdir(path.parent) == ["last.pth"]


def test_the_lock_of_a_killed_process_is_taken_over_at_once(holder, path):
    holder.kill()
    holder.wait()
    assert path.exists()
    begun = time.monotonic()
    with RunLock([path], print):
        assert time.monotonic() - begun < lock.WATCH_SECONDS / 2  # it does not watch the file


def test_the_second_lock_is_refused_and_the_first_is_given_back(holder, path):
    with pytest.raises(UserError):
        RunLock([path.with_name("other"), path], print)
    assert os.listdir(path.parent) == ["lock"]


def test_a_file_of_another_host_is_watched(path, quick, capsys):
    pretend(path, host="node9")
    with RunLock([path], print) as held:
        held.check()
    assert "whether process 1 on node9" in capsys.readouterr().out


@pytest.mark.parametrize("flock", ["works", "is not supported"])
def test_a_process_on_another_host_that_touches_its_file_is_alive(flock, path, quick, monkeypatch):
    if flock != "works":
        monkeypatch.setattr(lock, "_flock", lambda descriptor: None)
    with RunLock([path], print):
        pretend(path, host="node9")  # its thread goes on to touch the file
        monkeypatch.setattr(lock, "_flock", lambda descriptor: None if flock != "works" else True)
        with pytest.raises(UserError, match="process 1 on node9"):
            RunLock([path], print)


def test_a_requeued_job_takes_over_at_once(path, quick, monkeypatch, capsys):
    pretend(path, host="node9", job="77", start=0)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with RunLock([path], print):
        assert json.loads(path.read_text())["start"] == 1
    assert capsys.readouterr().out == ""


def test_a_requeued_job_takes_over_from_an_earlier_start_that_does_not_end(path, quick, monkeypatch, capsys):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    earlier = RunLock([path], print)
    earlier.check()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with RunLock([path], print) as later:
        assert (
            capsys.readouterr().out == f"waits for start 0 of this job, on {socket.gethostname()}, to end\n"
        )
        with pytest.raises(UserError, match="is no longer this run's: .*start 1.* writes"):
            earlier.check()
        earlier.close()
        later.check()


def test_two_steps_of_one_job_are_two_runs(path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    with RunLock([path], print), pytest.raises(UserError, match="Slurm job 77, start 0"):
        RunLock([path], print)


@pytest.mark.parametrize("content", ["notes of the user", "[" * 4096])
def test_a_file_of_the_user_is_neither_replaced_nor_removed(content, path, monkeypatch):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "x")
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(UserError, match="is not the lock of a run: move it away"):
        RunLock([path], print)
    assert path.read_text() == content


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write to output directory .*file/run"):
        RunLock([tmp_path / "file" / "run" / "lock"], print)


def test_a_second_run_is_refused_and_the_first_is_not_disturbed(holder, path, train):
    (path.parent / "log.jsonl").write_text("of the first run")
    refused = train(path.parent)
    one_line(refused.returncode, refused.stderr, f"process {holder.pid}", "--output-dir")
    assert sorted(os.listdir(path.parent)) == ["lock", "log.jsonl"]
