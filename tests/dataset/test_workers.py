"""Worker processes: where they are forked from, how long they live, and which signals reach them."""

import os
import pickle
import re
import signal
import subprocess
import sys
import time
from multiprocessing import forkserver, resource_tracker

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch.utils.data import Dataset
from trees import imagenet, picture

from dataset.build import build_data
from dataset.loader import Stream
from dataset.views import IMAGENET_NORM, PIPELINES, photo_view, pipeline
from dataset.workers import PrefetchLoader
from util import preempt
from util.config import Config
from util.errors import UserError


class Processes(Dataset):
    """An item names the processes around the worker that loaded it."""

    def __init__(self):
        self.state = "as sent"

    def __getitem__(self, item):
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        return {
            "item": item,
            "pid": os.getpid(),
            "parent": os.getppid(),
            "x": torch.ones(3),
            "state": self.state,
            "blocked": blocked & set(preempt.SIGNALS),
            "usr1": signal.getsignal(signal.SIGUSR1),
        }


def test_workers_are_not_forked_from_this_process_and_serve_the_next_pass():
    dataset = Processes()
    made = PrefetchLoader(dataset, range(6), 2, pin_memory=False)
    dataset.state = "edited later"  # after the workers have started
    first, second = list(made), list(made)
    assert [said["item"] for said in first] == [said["item"] for said in second] == list(range(6))
    pids = {said["pid"] for said in first}
    assert len(pids) == 2 and pids == {said["pid"] for said in second} and os.getpid() not in pids
    assert {said["parent"] for said in first} == {forkserver._forkserver._forkserver_pid}
    assert all(said["state"] == "as sent" for said in first + second)


def test_signals_of_a_scheduler_reach_the_workers_and_not_the_helpers():
    made = PrefetchLoader(Processes(), range(2), 1, pin_memory=False)
    (said, _), helper, tracker = (
        list(made),
        forkserver._forkserver._forkserver_pid,
        resource_tracker._resource_tracker._pid,
    )
    assert said["blocked"] == set() and said["usr1"] == signal.SIG_IGN
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        for process in (helper, tracker, said["pid"]):
            os.kill(process, number)
    time.sleep(1)
    assert [again["pid"] for again in made] == 2 * [said["pid"]]  # it lives for WORKER_GRACE_SECONDS more
    assert [again["parent"] for again in PrefetchLoader(Processes(), range(1), 1, pin_memory=False)] == [
        helper
    ]
    os.kill(tracker, 0)
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & {*preempt.SIGNALS, signal.SIGINT}


@pytest.mark.parametrize(
    "error, named",
    [
        (EOFError(), True),
        (ConnectionResetError("reset by peer"), True),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), True),
        (EOFError("Caught EOFError in DataLoader worker process 0."), False),
        (RuntimeError("Caught RuntimeError in DataLoader worker process 0."), False),
    ],
    ids=repr,
)
def test_a_broken_connection_is_a_lost_worker_but_an_error_in_a_worker_is_not(error, named):
    class Loader:
        def __iter__(self):
            raise error

    loader = PrefetchLoader([], [], workers=0, pin_memory=False)
    loader.loader = Loader()
    with pytest.raises(UserError if named else type(error)) as raised:
        list(loader)
    assert ("a worker process that loads images has ended" in str(raised.value)) == named


def test_a_worker_that_is_killed_is_named():
    items = iter(PrefetchLoader(Processes(), range(1000), 1, pin_memory=False))
    os.kill(next(items)["pid"], signal.SIGKILL)
    with pytest.raises(
        UserError, match="a worker process that loads images has ended.*was killed.*--workers"
    ):
        list(items)


class Raises(Dataset):
    def __getitem__(self, item):
        raise ConnectionResetError("of the file server")


def test_an_error_in_a_worker_is_raised_here():
    with pytest.raises(ConnectionResetError, match="of the file server"):
        list(PrefetchLoader(Raises(), range(3), 1, pin_memory=False))


def main(end):
    """Run a process that ends while its workers are busy."""
    made = PrefetchLoader(Processes(), range(10_000), 2, pin_memory=False)
    for said in made:
        print(said["pid"], said["parent"], flush=True)
        if end == "killed":
            time.sleep(100)
        raise {
            "bug": ValueError("a bug"),
            "lost": RuntimeError("a rank"),
            "mistake": UserError("a mistake"),
            "Ctrl-C": KeyboardInterrupt(),
        }[end]


@pytest.mark.slow(7)
@pytest.mark.parametrize(
    "end, code, lines",
    [
        ("bug", 1, "Traceback.*ValueError: a bug"),
        ("lost", 1, "error: a rank was lost"),
        ("mistake", 2, "error: a mistake"),
        ("Ctrl-C", 130, "interrupted"),
    ],
)
def test_a_process_ends_at_once_with_its_workers(end, code, lines, tmp_path):
    process = start(end, tmp_path)
    worker, helper = map(int, process.stdout.readline().split())
    begun = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - begun < preempt.WORKER_GRACE_SECONDS / 2  # not after the grace period
    assert process.returncode == code and re.fullmatch(lines, err.strip(), re.DOTALL), err
    assert gone(worker, helper) and list(tmp_path.iterdir()) == []


def start(end, folder):
    code = (
        "from tests.dataset.test_workers import main\nfrom util.errors import cli_main\n"
        f"cli_main(lambda: main({end!r}), describe_error=lambda error: 'a rank was lost')"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "TMPDIR": str(folder)},
    )


@pytest.mark.slow(7)
def test_nothing_is_left_when_the_process_is_killed(tmp_path):
    process = start("killed", tmp_path)
    worker, helper = map(int, process.stdout.readline().split())
    process.kill()
    assert gone(worker, helper)


@pytest.mark.slow(7)
def test_a_tmpdir_that_is_too_long_for_a_socket_does_not_stop_a_run(train, tmp_path):
    long = tmp_path / ("x" * 100)
    long.mkdir()
    run = train(tmp_path / "run", "--workers", "1", env={"TMPDIR": str(long)}, new_process=True)
    assert run.returncode == 0 and run.stderr == "", run.stderr


def gone(*pids):
    """Whether the processes end within 20 s; the helper ends when no process uses it any more."""
    end = time.monotonic() + 20
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.1)
    return not any(map(alive, pids))


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("name", ["digits", "imagenet"])
def test_a_data_set_can_be_sent_to_a_worker(name, tmp_path):
    if name == "imagenet":
        imagenet(tmp_path)
    stream = Stream(
        build_data(Config(dataset=name, cls=0, data=str(tmp_path), labels_per_class=1), gpu=False),
        2,
        2,
        seed=0,
    )
    sent = pickle.loads(pickle.dumps(stream))
    for a, b in zip(stream[3].u_strong, sent[3].u_strong, strict=True):
        assert torch.equal(a, b)
    assert np.array_equal(stream.data.labeled, sent.data.labeled)


@pytest.mark.parametrize("on_device", [True, False])
@pytest.mark.parametrize("name", PIPELINES)
def test_every_view_can_be_sent_to_a_worker(name, on_device):
    view = photo_view(pipeline(name, 64), IMAGENET_NORM, on_device)
    sent = pickle.loads(pickle.dumps(view))
    images, u = (
        [picture(k, size=(32, 32)) for k in range(4)],
        np.random.default_rng(0).random((4, view.num_uniforms)),
    )
    assert torch.equal(
        view.device_transform(view.cpu_transform(images, u)),
        sent.device_transform(sent.cpu_transform(images, u)),
    )
