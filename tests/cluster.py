"""A real Slurm as the tests use it: submitting, waiting, looking, and cleaning up."""

import os
import re
import shutil
import subprocess
import sys
import time

import pytest
from conftest import ROOT


def slurm(*words, cwd=ROOT):
    return subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}"},
    )


def nodes():
    """Names of the nodes that can take jobs; none where no Slurm is. (sinfo alone takes 9 s to find that
    nobody answers.)
    """
    if not shutil.which("sbatch") or slurm("scontrol", "ping").returncode:
        return []
    return sorted(set(slurm("sinfo", "-h", "-N", "-t", "idle,mix,alloc,comp", "-o", "%N").stdout.split()))


needs_slurm = [
    pytest.mark.slow,
    pytest.mark.skipif(len(nodes()) < 2, reason="no Slurm with two nodes is running here (sbatch, sinfo)"),
]
JOBS = []
ON_CPUS = ["--nodes=2", "--ntasks-per-node=1", "--gres=none", "--cpus-per-task=1", "--time=10"]
DIGITS = [
    "configs/digits.yaml",
    "--device",
    "cpu",
    "--batch-size",
    "5",
    "--epochs",
    "20",
    "--print-freq",
    "10",
    "--eval-freq",
    "5",
    "--workers",
    "1",
]  # on two ranks 400 steps


def sbatch(*words, **how):
    """The number of the submitted job."""
    done = slurm("sbatch", "--parsable", *words, **how)
    assert done.returncode == 0, done.stderr
    JOBS.append(done.stdout.strip())
    return JOBS[-1]


def digits(folder, *flags, options=(), **how):
    """Train on digits with two ranks on two nodes, into `folder`; the log is <folder>.out."""
    return sbatch(
        *ON_CPUS,
        f"--output={folder}.out",
        *options,
        "script/train.sh",
        *DIGITS,
        "--output-dir",
        folder,
        *flags,
        **how,
    )


def listed(job):
    return bool(slurm("squeue", "-h", "-j", job).stdout.strip())


def wait(job, until=lambda: False, seconds=240):
    """Until the job has left the queue, or `until` is true."""
    end = time.monotonic() + seconds
    while listed(job) and not until():
        assert time.monotonic() < end, f"job {job} took longer than {seconds} s: {show(job)}"
        time.sleep(0.5)


def wait_running(job, path, seconds=120):
    """Until the running job has written `path`."""
    wait(job, until=path.exists, seconds=seconds)
    assert path.exists() and show(job)["JobState"] == "RUNNING", show(job)


def show(job):
    """What `scontrol show job` says, by name."""
    return dict(re.findall(r"(\S+?)=(\S*)", slurm("scontrol", "show", "job", job).stdout))


def task(job, rank, node):
    """Process number of a rank of the job's first step; a test needs to be on the node for that."""
    for pid, _, _, _, number in map(
        str.split, slurm("scontrol", "listpids", f"{job}.0", node).stdout.splitlines()[1:]
    ):
        if number == str(rank):
            return int(pid)
    pytest.skip(f"the processes on {node} cannot be reached from here")


def clean_up():
    """End what a test left behind."""
    left = [job for job in JOBS if listed(job)]
    if left:
        slurm("scancel", *left)
        for job in left:
            wait(job, seconds=60)
    JOBS.clear()
