"""Worker processes: where they are forked from, how long they live, which signals reach them, and what
happens when an item cannot be sent.
"""

import gc
import mmap
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from multiprocessing import forkserver, reduction, resource_tracker

import fork_server
import numpy as np
import pytest
import torch
from conftest import ROOT, free_port, one_line, one_thread
from limited import NOT_ALLOWED
from torch.utils.data import Dataset
from trees import imagenet, picture

from dataset.build import build_data
from dataset.loader import Stream
from dataset.shared_memory import shared_memory_warning
from dataset.views import IMAGENET_NORM, PIPELINES, photo_view, pipeline
from dataset.workers import PrefetchLoader, _Item, check_shared_memory, needed_shared_memory
from util.config import Config
from util.errors import UserError
from util.run import preempt


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


class Loaded:
    """Stands in for a DataLoader whose pass raises an error, or yields an item as it arrives."""

    def __init__(self, error=None, item=None):
        self.error, self.item = error, item

    def __iter__(self):
        if self.error:
            raise self.error
        yield pickle.loads(pickle.dumps(self.item))


class Breaks:
    """An object whose arrival raises an error."""

    def __init__(self, error):
        self.error = error

    def __reduce__(self):
        return raise_, (self.error,)


def raise_(error):
    raise error


def passed(loaded):
    loader = PrefetchLoader([], [], workers=0, pin_memory=False)
    loader.loader, loader._wait_for_end = loaded, lambda seconds: True
    return list(loader)


@pytest.mark.parametrize(
    "error", [EOFError(), ConnectionResetError("by peer"), FileNotFoundError()], ids=repr
)
def test_a_connection_that_a_lost_worker_broke_is_reported(error):
    with pytest.raises(UserError, match="a worker process that loads images has ended"):
        passed(Loaded(item=_Item(Breaks(error))))


@pytest.mark.parametrize(
    "error, named",
    [
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), True),
        (RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"), True),
        (RuntimeError("Pin memory thread exited unexpectedly"), True),
        (EOFError("Caught EOFError in DataLoader worker process 0."), False),
        (RuntimeError("Caught RuntimeError in DataLoader worker process 0."), False),
    ],
    ids=repr,
)
def test_a_lost_worker_is_reported_but_an_error_in_a_worker_is_raised(error, named):
    with pytest.raises(UserError if named else type(error)) as raised:
        passed(Loaded(error=error))
    assert ("a worker process that loads images has ended" in str(raised.value)) == named


def test_a_tensor_of_a_worker_that_has_ended_is_reported():
    items = iter(PrefetchLoader(Processes(), range(1000), 1, pin_memory=False))
    pid = next(items)["pid"]
    time.sleep(0.5)  # the worker sends the next item
    os.kill(pid, signal.SIGKILL)
    assert gone(pid)
    with pytest.raises(UserError, match="a worker process that loads images has ended"):
        next(items)


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


# Items that cannot be sent.


class Undeliverable(Dataset):
    """Items that a worker cannot send, by their name."""

    def __init__(self, name):
        self.name = name

    def __getitem__(self, item):
        if self.name == "unpicklable":
            return lambda: None
        if self.name == "own error":
            raise type("Odd", (Exception,), {})("a bug")
        if self.name == "unsent file":
            return UnsentFile()
        if self.name == "many files":
            return [torch.ones(3) for _ in range(200)]
        with open("/dev/shm/sparse", "w+b") as file:
            file.truncate(1 << 20)
            mmap.mmap(file.fileno(), 1 << 20)[:] = bytes(1 << 20)


class UnsentFile:
    """A file that is sent once, but asked for twice; the worker's thread fails at the second time."""

    def __reduce__(self):
        return receive_twice, (reduction.DupFd(0),)


def receive_twice(file):
    os.close(file.detach())
    file.detach()


@pytest.fixture
def deadline():
    """End a test that waits for an item forever."""
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("no item has arrived", pytrace=False))
    signal.alarm(60)
    yield
    signal.alarm(0)


def load(name):
    return list(PrefetchLoader(Undeliverable(name), range(3), 1, pin_memory=False))


@pytest.mark.parametrize(
    "name, error, words",
    [
        ("unpicklable", UserError, "cannot be sent from a worker process: .*Can't pickle .*lambda"),
        ("own error", RuntimeError, "in DataLoader worker process 0(?s:.*)Odd: a bug"),
        pytest.param(
            *("unsent file", UserError, "more than the .* open files .*ulimit -n .*--workers"),
            marks=pytest.mark.slow(6),
        ),
    ],
)
def test_an_item_that_cannot_be_sent_is_reported(name, error, words, capfd, deadline):
    with pytest.raises(error, match=words):
        load(name)
    assert capfd.readouterr().err == ""


def limited(*args, shm_kilobytes=0, files=0):
    """Run a script with so little shared memory, or so few open files: (exit code, stdout, stderr)."""
    done = fork_server.run(
        ["tests/limited.py", shm_kilobytes, files, *args],
        cwd=ROOT,
        env=one_thread({"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}),
        timeout=120,
    )
    if done.returncode == NOT_ALLOWED:
        pytest.skip("a file system cannot be mounted in a namespace of its own here")
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    "name, limits, words",
    [
        ("many files", {"files": 150}, ["more than the 150 open files", "ulimit -n 4096", "--workers"]),
        ("sparse file", {"shm_kilobytes": 500}, ["killed by SIGBUS", "shared memory is full", "--shm-size"]),
    ],
)
@pytest.mark.slow(9)
def test_a_limit_that_a_worker_reaches_is_named(name, limits, words, tmp_path):
    script = tmp_path / "load.py"
    script.write_text(
        "from tests.dataset.test_workers import load\nfrom util.errors import cli_main\n"
        f"if __name__ == '__main__':\n    cli_main(lambda: load({name!r}))\n"
    )
    code, _, err = limited(script, **limits)
    one_line(code, err, *words)


TRAIN = "train_semi.py --config configs/digits.yaml --epochs 2 --steps-per-epoch 4 --eval-freq 1".split()


@pytest.mark.parametrize(
    "flags, shm_kilobytes, steps",
    [
        # An image of a view takes 1 KB; there are 360 test images.
        (["--mu", "40"], 500, 0),
        (["--mu", "1", "--batch-size", "1"], 350, 4),
        (["--mu", "7"], 60, 0),
    ],
    ids=["training", "evaluation", "start"],
)
@pytest.mark.slow(9)
def test_a_run_ends_when_shared_memory_is_full(flags, shm_kilobytes, steps, tmp_path):
    flags = [*TRAIN, "--workers", 1, "--print-freq", 1, "--output-dir", tmp_path, *flags]
    code, out, err = limited(*flags, shm_kilobytes=shm_kilobytes)
    size = f"/dev/shm has {1.024 * shm_kilobytes / 1e3:.1f} MB"
    one_line(code, err, "shared memory is full", "need up to", size, "--shm-size 1g", "--workers")
    assert out.count("  step ") == steps
    warning = re.findall("^warning: workers may run out of shared memory: .*$", out, re.M)
    assert len(warning) == (shm_kilobytes > 60) and all(
        size in line and "--shm-size" in line for line in warning
    )


@pytest.mark.slow(9)
def test_an_evaluation_ends_when_shared_memory_is_full(finished):
    flags = ["eval.py", "--checkpoint", finished[0] / "best.pth", "--workers", 1]
    code, out, err = limited(*flags, shm_kilobytes=350)
    one_line(code, err, "shared memory is full", "--shm-size 1g")
    assert out.startswith("warning: workers may run out of shared memory") and out.count("\n") == 1


@pytest.mark.slow(12)
def test_a_prediction_ends_when_shared_memory_is_full(command, tmp_path):
    data, cache = imagenet(tmp_path / "in"), {"SIMMATCH_CACHE": str(tmp_path / "cache")}
    data = f"--config configs/folder.yaml --data {data} --image-size 32 --labels-per-class 1"
    run = (
        f"--backbone small_encoder --batch-size 2 --mu 1 --epochs 1 --warmup-epoch 0 --output-dir {tmp_path}"
    )
    done = command("train_semi.py", *data.split(), *run.split(), "--workers", 0, env=cache)
    assert done.returncode == 0, done.stderr
    photos, answers = tmp_path / "photos", tmp_path / "answers.csv"
    photos.mkdir()
    for k in range(100):
        picture(k, size=(8, 8)).save(photos / f"{k}.png")
    flags = ["eval.py", "--checkpoint", tmp_path / "best.pth", "--workers", 1, "--predict", photos]
    code, out, err = limited(*flags, "--output", answers, shm_kilobytes=250)  # 100 images take 307 KB
    one_line(code, err, "shared memory is full", "--shm-size 1g")
    assert out.startswith("warning: workers may run out of shared memory") and not answers.exists()


@pytest.mark.slow(20)
def test_the_other_rank_ends_too(tmp_path):
    env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    train = [*TRAIN, "--device", "cpu", "--mu", "40", "--workers", 1, "--output-dir", tmp_path]
    ranks = [
        fork_server.popen(
            [*([] if rank == 0 else ["tests/limited.py", 350, 0]), *train],
            cwd=ROOT,
            env=one_thread({**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    (_, lost), (_, full) = (process.communicate(timeout=120) for process in ranks)
    if ranks[1].returncode == NOT_ALLOWED:
        pytest.skip("a file system cannot be mounted in a namespace of its own here")
    one_line(ranks[1].returncode, full, "shared memory is full", "--shm-size 1g")
    assert ranks[0].returncode == 1 and re.fullmatch("error: .*timed out waiting for rank 1 .*\n", lost), lost


def test_a_warning_compares_needed_and_free_shared_memory():
    assert shared_memory_warning(needed=10**6, free=10**6, total=10**7) == ""
    warning = shared_memory_warning(needed=672_400_000, free=66_000_000, total=67_108_864)
    for words in ("need up to 672.4 MB", "/dev/shm has 67.1 MB, 66.0 MB of them free", "--shm-size 1g"):
        assert words in warning
    assert "--shm-size 3g" in shared_memory_warning(needed=2_100_000_000, free=0, total=0)


def test_the_needed_shared_memory_is_that_of_all_items_in_use():
    gc.collect()  # the loaders of earlier tests
    before, rows = needed_shared_memory(), range(100)
    first = PrefetchLoader(Processes(), rows, 2, pin_memory=False, item_bytes=10**9)
    one = needed_shared_memory() - before
    assert 5e9 < one < 5.001e9  # two prefetched items per worker, and the one in use
    second = PrefetchLoader(Processes(), range(3), 2, pin_memory=False, item_bytes=10**9)
    assert 3e9 < needed_shared_memory() - before - one < 3.001e9
    unused = PrefetchLoader(Processes(), rows, 0, pin_memory=False, item_bytes=10**9)
    assert first.shared_bytes + second.shared_bytes + unused.shared_bytes == needed_shared_memory() - before
    del first, second
    assert needed_shared_memory() == before and check_shared_memory() == ""


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
        ("bug", 1, "error: this is a bug[^\n]*ValueError: a bug[^\n]*"),
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


# The threads of the queues end 0.1 s late, as on a busy machine, and take 0.3 s to free a lock.
LATE_THREADS = """
import threading, time
from multiprocessing import queues, resource_tracker, synchronize
import _multiprocessing
from dataset.workers import PrefetchLoader

feed = queues.Queue._feed

def feed_and_wait(*arguments):
    feed(*arguments)
    time.sleep(0.1)

def free_slowly(name):
    _multiprocessing.sem_unlink(name)
    if threading.current_thread() is not threading.main_thread():
        time.sleep(0.3)
    resource_tracker.unregister(name, "semaphore")

queues.Queue._feed = staticmethod(feed_and_wait)
synchronize.SemLock._cleanup = staticmethod(free_slowly)
list(PrefetchLoader([1, 2], [0, 1], 1, False))
time.sleep(0.2)
"""


def test_a_thread_that_ends_late_leaves_no_lock_behind():
    run = subprocess.run([sys.executable, "-c", LATE_THREADS], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and run.stderr == "", run.stderr


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
    for a, b in zip(stream[3].u_strong[0], sent[3].u_strong[0], strict=True):
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
