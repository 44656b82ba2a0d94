"""Shared by all tests: the repository on the path, one thread, small settings, and commands as a user types
them.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
torch.set_num_threads(1)

from util import errors  # noqa: E402  (the repository is on the path only now)


@pytest.fixture
def command():
    """Run a script of the repository as a user would; returns the finished process, output as text."""

    def call(script, *args, timeout=300, env=None):
        return subprocess.run(
            [sys.executable, str(ROOT / script), *map(str, args)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        )

    return call


@pytest.fixture
def mistake(monkeypatch, capsys):
    """Call a script's main with flags it must refuse: exit code 2, one line on stderr with `words`, no
    traceback; returns it.

    In this process, since a new one needs seconds to import PyTorch; tests/test_train.py starts some for
    real.
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


@pytest.fixture
def train(command):
    """A short digits training: train(output_dir, *flags)."""

    def call(output_dir, *flags, **how):
        return command(
            "train_semi.py",
            "--config",
            "configs/digits.yaml",
            "--epochs",
            "2",
            "--eval-freq",
            "1",
            "--output-dir",
            output_dir,
            *flags,
            **how,
        )

    return call
