"""Processes that load images: what they are copies of, how long they stay, and which signals reach them."""
import os
import pickle
import signal
import subprocess
import sys
import time
from multiprocessing import forkserver

import numpy as np
import pytest
import torch
from conftest import ROOT
from trees import imagenet, picture
from torch.utils.data import Dataset

from dataset.build import build_data
from dataset.loader import Stream
from dataset.views import IMAGENET_NORM, PIPELINES, photo_view, pipeline
from dataset.workers import Batches
from util import preempt
from util.config import Config
from util.errors import UserError


class Processes(Dataset):
    """What a worker says of itself."""

    def __init__(self):
        self.state = "as sent"

    def __getitem__(self, item):
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        return {"item": item, "pid": os.getpid(), "parent": os.getppid(), "threads": torch.get_num_threads(), "state": self.state,
                "blocked": blocked & set(preempt.SIGNALS), "usr1": signal.getsignal(signal.SIGUSR1)}


def test_workers_are_no_copies_of_this_process_and_stay_for_the_next_pass():
    dataset = Processes()
    made = Batches(dataset, range(6), 2, pin_memory=False)
    dataset.state = "edited later"              # they have begun already
    first, second = list(made), list(made)
    assert [said["item"] for said in first] == [said["item"] for said in second] == list(range(6))
    pids = {said["pid"] for said in first}
    assert len(pids) == 2 and pids == {said["pid"] for said in second} and os.getpid() not in pids
    assert {said["parent"] for said in first} == {forkserver._forkserver._forkserver_pid}
    assert all(said["state"] == "as sent" and said["threads"] == 1 for said in first + second)


def test_signals_of_a_scheduler_reach_the_workers_and_not_the_helper():
    made = Batches(Processes(), range(2), 1, pin_memory=False)
    (said, _), helper = list(made), forkserver._forkserver._forkserver_pid
    assert said["blocked"] == set() and said["usr1"] == signal.SIG_IGN
    for number in (signal.SIGUSR1, signal.SIGTERM):
        for process in (helper, said["pid"]):
            os.kill(process, number)
    time.sleep(1)
    assert [again["pid"] for again in made] == 2 * [said["pid"]]            # it goes on for preempt.GRACE seconds
    assert [again["parent"] for again in Batches(Processes(), range(1), 1, pin_memory=False)] == [helper]
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & set(preempt.SIGNALS)


def test_a_worker_that_is_killed_is_named():
    made = Batches(Processes(), range(1000), 1, pin_memory=False)
    with pytest.raises(UserError, match="a process that loads images was killed.*--workers"):
        for said in made:
            os.kill(said["pid"], signal.SIGKILL)


@pytest.mark.slow
def test_nothing_is_left_when_the_process_is_killed(tmp_path):
    code = ("import time\nfrom tests.dataset.test_workers import Processes\nfrom dataset.workers import Batches\n"
            "made = Batches(Processes(), range(1), 2, False)\nfor said in made: print(said['pid'], said['parent'], flush=True)\n"
            "time.sleep(100)\n")
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True)
    worker, helper = map(int, process.stdout.readline().split())
    process.kill()
    end = time.monotonic() + 20
    while any(map(alive, (worker, helper))) and time.monotonic() < end:
        time.sleep(0.2)
    assert not alive(worker) and not alive(helper)


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
    stream = Stream(build_data(Config(dataset=name, cls=0, data=str(tmp_path), labels_per_class=1), gpu=False), 2, 2, seed=0)
    sent = pickle.loads(pickle.dumps(stream))
    for a, b in zip(stream[3].u_strong, sent[3].u_strong, strict=True):
        assert torch.equal(a, b)
    assert np.array_equal(stream.data.labelled, sent.data.labelled)


@pytest.mark.parametrize("on_device", [True, False])
@pytest.mark.parametrize("name", PIPELINES)
def test_every_view_can_be_sent_to_a_worker(name, on_device):
    view = photo_view(pipeline(name, 64), IMAGENET_NORM, on_device)
    sent = pickle.loads(pickle.dumps(view))
    images, u = [picture(k, size=(32, 32)) for k in range(4)], np.random.default_rng(0).random((4, view.numbers))
    assert torch.equal(view.device(view.host(images, u)), sent.device(sent.host(images, u)))
