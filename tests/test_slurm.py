"""script/train.sh on a real Slurm of two nodes; skipped where none is running."""
import os
import shutil
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from test_train import assert_same_run, weights


def slurm(*words):
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}"})


def nodes():
    return len(slurm("sinfo", "-N", "-h").stdout.split("\n")) - 1 if shutil.which("sbatch") else 0


pytestmark = [pytest.mark.slow, pytest.mark.skipif(nodes() < 2, reason="no Slurm with two nodes is running here (sbatch, sinfo)")]
SMALL = ["--nodes=2", "--ntasks-per-node=1", "--gres=none", "--cpus-per-task=1", "--time=10"]


def submit(folder, *flags, options=SMALL):
    done = slurm("sbatch", "--parsable", *options, f"--output={folder}.out", "script/train.sh", "configs/digits.yaml", "--device",
                 "cpu", "--batch-size", "5", "--epochs", "20", "--print-freq", "10", "--eval-freq", "5", "--workers", "1",
                 "--output-dir", str(folder), *flags)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def wait(job, until=lambda: False, seconds=240):
    end = time.monotonic() + seconds
    while time.monotonic() < end and not until():
        if not slurm("squeue", "-h", "-j", job).stdout.strip():
            return
        time.sleep(0.5)
    assert until(), f"job {job} took longer than {seconds} s"


def test_a_job_on_two_nodes_that_is_asked_to_stop_is_requeued_and_ends_with_the_same_bits(tmp_path):
    whole, asked = tmp_path / "whole", tmp_path / "asked"
    wait(submit(whole))
    assert weights(whole)["step"] == 400 and weights(whole)["world"] == 2
    job = submit(asked)
    wait(job, until=(asked / "last.pth").exists)
    assert slurm("scancel", "--signal=USR1", job).returncode == 0
    wait(job)
    said = (tmp_path / "asked.out").read_text()
    assert "asked to stop: saved step" in said and "back into the queue" in said and "start number 1" in said, said
    assert "Restarts=1" in slurm("scontrol", "show", "job", job).stdout and "JobState=COMPLETED" in slurm(
        "scontrol", "show", "job", job).stdout
    assert_same_run(whole, asked)


def test_a_mistake_ends_the_job_with_its_line_and_is_not_requeued(tmp_path):
    job = submit(tmp_path / "run", "--strong", "strongest", "--dataset", "cifar10", "--data", str(tmp_path))
    wait(job)
    said = (tmp_path / "run.out").read_text()
    assert "error: " in said and "back into the queue" not in said and "Traceback" not in said, said
    assert "ExitCode=2:0" in slurm("scontrol", "show", "job", job).stdout


def test_train_sh_says_where_to_call_it_from(tmp_path):
    done = subprocess.run(["bash", str(ROOT / "script" / "train.sh")], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "SLURM_JOB_ID": "1", "SLURM_SUBMIT_DIR": str(tmp_path)})
    assert done.returncode == 2 and "call sbatch from its top folder" in done.stderr
