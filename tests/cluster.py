"""A real Slurm as the tests use it: submit a job, wait for it, look at it, and clean up."""

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
    """Names of the nodes that can take jobs; none without Slurm. (Where no controller answers, sinfo alone
    takes 9 s to say so.)
    """
    if not shutil.which("sbatch") or slurm("scontrol", "ping").returncode:
        return []
    return sorted(set(slurm("sinfo", "-h", "-N", "-t", "idle,mix,alloc,comp", "-o", "%N").stdout.split()))


needs_slurm = [
    pytest.mark.slow(60),
    pytest.mark.skipif(len(nodes()) < 2, reason="no Slurm with two nodes is running here (sbatch, sinfo)"),
]
JOBS = []
ON_CPUS = ["--nodes=2", "--ntasks-per-node=1", "--gres=none", "--cpus-per-task=1", "--time=10"]
DIGITS = (
    "configs/digits.yaml --device cpu --batch-size 5 --epochs 12 --print-freq 10 --eval-freq 4 --save-freq 20"
).split()  # on two ranks 240 steps


def sbatch(*words, **how):
    """Submit a job; returns its number."""
    done = slurm("sbatch", "--parsable", *words, **how)
    assert done.returncode == 0, done.stderr
    JOBS.append(done.stdout.strip())
    return JOBS[-1]


def digits(folder, *flags, options=(), **how):
    """Submit a training on digits with two ranks on two nodes. It writes into `folder` and <folder>.out."""
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


def wait(job, until=lambda: False, seconds=400):
    """Wait until the job has left the queue, or `until` is true."""
    end, look = time.monotonic() + seconds, 0
    while not until():
        if time.monotonic() > look:  # squeue takes longer than `until`
            if not listed(job):
                return
            look = time.monotonic() + 1
        assert time.monotonic() < end, f"job {job} took longer than {seconds} s: {show(job)}"
        time.sleep(0.1)


def wait_running(job, path, seconds=240):
    """Wait until the running job has written `path`."""
    wait(job, until=path.exists, seconds=seconds)
    assert path.exists() and show(job)["JobState"] == "RUNNING", show(job)


def show(job):
    """The fields of `scontrol show job`, by name."""
    return dict(re.findall(r"(\S+?)=(\S*)", slurm("scontrol", "show", "job", job).stdout))


def task(job, rank, node):
    """The process number of a rank of the job's first step. The test must run on the node of the rank."""
    for pid, _, _, _, number in map(
        str.split, slurm("scontrol", "listpids", f"{job}.0", node).stdout.splitlines()[1:]
    ):
        if number == str(rank):
            return int(pid)
    pytest.skip(f"the processes on {node} cannot be reached from here")


def clean_up():
    """Cancel the jobs that the tests left behind."""
    left = [job for job in JOBS if listed(job)]
    if left:
        slurm("scancel", *left)
        for job in left:
            wait(job, seconds=60)
    JOBS.clear()
