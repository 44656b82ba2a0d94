"""Shared by all tests: the repository on the path, one thread, small settings, and commands as a user types them."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
torch.set_num_threads(1)


@pytest.fixture
def command():
    """Run a script of the repository as a user would; returns the finished process, output as text."""
    def call(script, *args, timeout=300, env=None):
        return subprocess.run([sys.executable, str(ROOT / script), *map(str, args)], cwd=ROOT, capture_output=True, text=True,
                              timeout=timeout, env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})})
    return call


@pytest.fixture
def train(command):
    """A short digits training: train(output_dir, *flags)."""
    def call(output_dir, *flags, **how):
        return command("train_semi.py", "--config", "configs/digits.yaml", "--epochs", "2", "--workers", "0",
                       "--output-dir", output_dir, *flags, **how)
    return call
