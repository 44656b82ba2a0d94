"""A full disk: the run says so, keeps the files that it has, and stops or continues as configured. The file
system is real, and small.
"""

import os
import subprocess
import threading
import time

import pytest
from conftest import one_line, start_python
from test_train import assert_same_run, weights

pytestmark = pytest.mark.slow(15)
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
    "--mu",
    "2",
    "--steps-per-epoch",
    "20",
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
    """Run to the end, with a call of `at_line` for every line of output: (exit code, stdout, stderr)."""
    process = start_python("train_semi.py", *FLAGS, "--output-dir", folder, *flags)
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
    """Keep the disk full (a file that is deleted leaves room) from the first checkpoint on, until a line of
    output contains `until`.
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


def test_stop(disk, command, tmp_path):
    code, _, err = run(disk / "run", at_line=fill_after_a_checkpoint(disk))
    one_line(code, err, "cannot write", "No space left on device")
    kept = weights(disk / "run")
    assert 0 < kept["step"] < 160
    (disk / "filler").unlink()
    assert run(disk / "run")[0] == 0
    assert command("train_semi.py", *FLAGS, "--output-dir", tmp_path / "whole").returncode == 0
    assert_same_run(tmp_path / "whole", disk / "run")


def test_continue_until_there_is_room(disk, command, tmp_path):
    code, out, err = run(
        disk / "run",
        "--on-save-error",
        "continue",
        at_line=fill_after_a_checkpoint(disk, until="training goes on"),
    )
    assert code == 0 and "Traceback" not in err, err
    assert "training goes on" in out and "No space left" in out
    flags = [*FLAGS, "--on-save-error", "continue", "--output-dir"]
    assert command("train_semi.py", *flags, tmp_path / "whole").returncode == 0
    assert_same_run(tmp_path / "whole", disk / "run")


def test_continue_to_an_end_that_cannot_be_saved(disk):
    code, out, err = run(disk / "run", "--on-save-error", "continue", at_line=fill_after_a_checkpoint(disk))
    assert "training goes on" in out
    one_line(code, err, "cannot write", "No space left on device")
    assert 0 < weights(disk / "run")["step"] < 160  # the checkpoint is not damaged
