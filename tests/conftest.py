"""Shared by all tests: the path, one thread, the order of the tests, and scripts as a user starts them."""

import functools
import itertools
import os
import re
import signal
import socket
import subprocess
import sys
from multiprocessing import resource_tracker
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
torch.set_num_threads(1)
# The GPUs that tests/test_gpu.py uses. pytest-xdist's processes inherit the variable.
GPUS = os.environ.setdefault("SIMMATCH_TEST_GPUS", os.environ.get("CUDA_VISIBLE_DEVICES", "0"))
# A shell ignores Ctrl-C for what it starts in the background, and child processes would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

import fork_server  # noqa: E402  (the repository is on the path only now)

from util import errors  # noqa: E402
from util.run import preempt  # noqa: E402

# Started as dataset/workers.py does it, before a test starts it with signals that would kill it.
with preempt.signals_blocked():
    resource_tracker.ensure_running()


def pytest_configure(config):
    """Hide GPUs from all tests and from what they start: a GPU does not compute the same bits twice."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


# Several processes (pytest-xdist, script/test.sh) take from one list: Slurm's tests first, since they mostly
# wait; then the slow tests, the longest first; then the others.


def pytest_collection_modifyitems(items):
    def order(item):
        mark = item.get_closest_marker("slow")
        return unit(item.nodeid) != "slurm", -mark.args[0] if mark and unit(item.nodeid) != "slurm" else 0

    items.sort(key=order)


def unit(nodeid):
    """What one process takes at a time: all of Slurm's tests; a slow test; all quick tests of a file, since
    they share fixtures.
    """
    file, _, test = nodeid.partition("::")
    if file.startswith("tests/test_slurm"):
        return "slurm"
    return nodeid if test.partition("[")[0] in slow_tests(file) else file


@functools.cache
def slow_tests(file):
    """The names of the tests that are marked as slow, read from the source: pytest-xdist does not tell."""
    text = (ROOT / file).read_text(encoding="utf-8")
    every = re.search(r"^pytestmark = .*?mark\.slow", text, re.M | re.S)
    return re.findall(r"^def (test_\w+)" if every else r"mark\.slow.*?^def (test_\w+)", text, re.M | re.S)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return unit(nodeid)

    config.option.loadscopereorder = False  # the order is that above
    return Scheduling(config, log)


def one_thread(env=None):
    """The environment of a script that is started beside others."""
    return {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}


def start_python(*args, env=None, **how):
    """`python *args` in a new process, at the root of the repository."""
    how = {"cwd": ROOT, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **how}
    return subprocess.Popen([sys.executable, *map(str, args)], env=one_thread(env), **how)


@pytest.fixture
def command():
    """Run a script of the repository with `python *args`; returns the finished process, output as text.

    new_process: start Python for it, as a user does, in place of a fork of tests/fork_server.py.
    """

    def call(*args, timeout=300, cwd=ROOT, env=None, new_process=False):
        if not new_process:
            return fork_server.run(args, cwd=cwd, env=one_thread(env), timeout=timeout)
        process = start_python(*args, cwd=cwd, env=env)
        try:
            out, err = process.communicate(timeout=timeout)
        finally:
            process.kill()
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    return call


@pytest.fixture
def train(command):
    """A short digits training: train(output_dir, *flags)."""

    def call(output_dir, *flags, **how):
        return command("train_semi.py", *DIGITS, output_dir, *flags, **how)

    return call


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """(output directory, process) of a finished run of two epochs, in a process of its own."""
    folder = tmp_path_factory.mktemp("run")
    process = start_python("train_semi.py", *DIGITS, folder, "--print-freq", "3")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return folder, subprocess.CompletedProcess(process.args, process.returncode, out, err)


DIGITS = "--config configs/digits.yaml --epochs 2 --eval-freq 1 --output-dir".split()


@pytest.fixture
def mistake(monkeypatch, capsys):
    """Call a script's main in this process, with flags that it must refuse: exit code 2, one line on stderr
    with `words`, no traceback. Returns that line.
    """

    def call(main, flags, *words):
        monkeypatch.setattr(sys, "argv", ["script", *map(str, flags)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            errors.cli_main(main)
        return one_line(stop.value.code, capsys.readouterr().err, *words)

    return call


def one_line(code, stderr, *words):
    assert code == 2, (code, stderr)
    assert stderr.startswith("error: ") and stderr.count("\n") == 1, stderr
    for word in words:
        assert word in stderr, stderr
    return stderr[:-1]


# Each test process takes its ports from another hundred, all below those that systems hand out.
_ports = itertools.cycle(range(first := 10000 + 100 * (os.getpid() % 200), first + 100))


def free_port():
    """A port of this machine that is not in use."""
    for port in itertools.islice(_ports, 100):
        with socket.socket() as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                s.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError("none of 100 ports is free")
