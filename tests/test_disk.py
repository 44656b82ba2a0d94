"""A disk that is full: the run says so, keeps what was there, and stops or goes on as configured. A real,
small file system.
"""

import os
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT, one_line
from test_train import assert_same_run, weights

pytestmark = pytest.mark.slow
FLAGS = [
    "--config",
    "configs/digits.yaml",
    "--epochs",
    "8",
    "--eval-freq",
    "1",
    "--print-freq",
    "5",
    "--save-freq",
    "10",
]


@pytest.fixture
def disk(tmp_path):
    """A file system of 16 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if (
        os.geteuid()
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=16m", "none", folder], capture_output=True
        ).returncode
    ):
        pytest.skip("only root can mount a small file system")
    yield folder
    subprocess.run(["umount", folder], check=True)


def run(folder, *flags, at_line=lambda line: None):
    """(exit code, stdout, stderr); every line of output is shown to `at_line` as it comes."""
    process = subprocess.Popen(
        [sys.executable, "train_semi.py", *FLAGS, "--output-dir", str(folder), *flags],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    errors = []
    reader = threading.Thread(target=lambda: errors.extend(process.stderr))
    reader.start()
    lines = []
    for line in process.stdout:
        lines.append(line)
        at_line(line)
    reader.join()
    return process.wait(timeout=60), "".join(lines), "".join(errors)


def fill(disk):
    with open(disk / "filler", "ab", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass


def fill_after_a_checkpoint(disk, until="nothing"):
    """Keep the disk full (a file that goes leaves room) from the first checkpoint on, until a line of output
    has `until`.
    """
    state = {"full": False, "over": False}

    def at_line(line):
        if line.startswith("epoch 1  student"):
            end = time.monotonic() + 60
            while not (disk / "run" / "last.pth").exists() and time.monotonic() < end:
                time.sleep(0.01)
            state["full"] = True
        if until in line:
            state["over"] = True
            (disk / "filler").unlink()
        if state["full"] and not state["over"]:
            fill(disk)

    return at_line


def test_stop(disk, tmp_path):
    code, _, err = run(disk / "run", at_line=fill_after_a_checkpoint(disk))
    one_line(code, err, "cannot write", "No space left on device")
    kept = weights(disk / "run")
    assert 0 < kept["step"] < 160
    (disk / "filler").unlink()
    assert run(disk / "run")[0] == 0
    assert run(tmp_path / "whole")[0] == 0
    assert_same_run(tmp_path / "whole", disk / "run")


def test_continue_until_there_is_room(disk, tmp_path):
    code, out, err = run(
        disk / "run",
        "--on-save-error",
        "continue",
        at_line=fill_after_a_checkpoint(disk, until="training goes on"),
    )
    assert code == 0 and "Traceback" not in err, err
    assert "training goes on" in out and "No space left" in out
    assert run(tmp_path / "whole", "--on-save-error", "continue")[0] == 0
    assert_same_run(tmp_path / "whole", disk / "run")


def test_continue_to_an_end_that_cannot_be_saved(disk):
    code, out, err = run(disk / "run", "--on-save-error", "continue", at_line=fill_after_a_checkpoint(disk))
    assert "training goes on" in out
    one_line(code, err, "cannot write", "No space left on device")
    assert 0 < weights(disk / "run")["step"] < 160  # what was there is whole
