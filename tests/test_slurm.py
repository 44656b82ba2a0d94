"""Jobs of script/train.sh that are interrupted, on a real Slurm of two nodes; skipped where none is running."""

import os
import re
import signal

import pytest
from cluster import clean_up, digits, needs_slurm, nodes, sbatch, show, slurm, task, wait, wait_running
from test_train import assert_same_run, weights

pytestmark = needs_slurm


@pytest.fixture(autouse=True)
def nothing_is_left_behind():
    yield
    clean_up()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("slurm") / "whole"
    wait(digits(folder))
    assert weights(folder)["step"] == 400 and weights(folder)["world"] == 2
    return folder


def log(folder):
    return folder.with_name(folder.name + ".out").read_text()


@pytest.mark.parametrize(
    "how, by",
    [
        (["scancel", "--signal=USR1"], "train: back into the queue"),
        (["scontrol", "requeue"], "DUE TO JOB REQUEUE"),
    ],
)
def test_a_job_that_is_asked_to_stop_is_requeued_and_ends_with_the_same_bits(how, by, whole, tmp_path):
    """By a signal to the ranks; and by SIGTERM as Slurm puts it back itself, which is what a preemption does."""
    folder = tmp_path / "asked"
    job = digits(folder)
    wait_running(job, folder / "last.pth")
    assert slurm(*how, job).returncode == 0
    wait(job)
    assert (
        "asked to stop: saved step" in log(folder) and by in log(folder) and "start number 1" in log(folder)
    ), log(folder)
    assert "start number 2" not in log(folder)
    assert show(job)["Restarts"] == "1" and show(job)["JobState"] == "COMPLETED"
    assert_same_run(whole, folder)


def test_slurm_signals_before_the_time_limit_and_the_job_goes_on_later(whole, tmp_path):
    """The limit is two minutes and the signal due a minute before it; Slurm looks every 30 s. So that no
    machine is fast enough to end before it, the ranks stand still (SIGSTOP) until Slurm sends it, which wakes
    them.
    """
    folder = tmp_path / "limited"
    job = digits(folder, options=["--time=2", "--signal=USR1@60"])
    wait_running(job, folder / "last.pth", seconds=60)
    assert slurm("scancel", "--signal=STOP", job).returncode == 0
    assert "asked to stop" not in log(folder)
    wait(job)
    assert "asked to stop: saved step" in log(folder) and "start number 1" in log(folder), log(folder)
    assert (
        "TIME LIMIT" not in log(folder)
        and show(job)["JobState"] == "COMPLETED"
        and int(show(job)["Restarts"]) >= 1
    )
    assert_same_run(whole, folder)


@pytest.mark.parametrize("which", [0, 1])
def test_a_node_that_goes_down_is_waited_for(which, whole, tmp_path):
    """Slurm requeues by itself; the run goes on from what --save-freq saved."""
    folder, node = tmp_path / "down", nodes()[which]
    job = digits(folder, "--save-freq", "7")
    wait_running(job, folder / "last.pth")
    try:
        down = slurm("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
        if down.returncode:
            pytest.skip(f"this user may not set a node down: {down.stderr.strip()}")
        wait(job, until=lambda: show(job)["JobState"] == "PENDING", seconds=60)
        reached = weights(folder)["step"]
    finally:
        slurm("scontrol", "update", f"nodename={node}", "state=resume")
    wait(job)
    assert "NODE FAILURE" in log(folder) and "start number 1" in log(folder), log(folder)
    assert 0 < reached < 400 and f"at step {reached}: " in log(folder)
    assert show(job)["JobState"] == "COMPLETED"
    assert_same_run(whole, folder)


def by_urgency():
    """Names of the partitions, the least urgent first, if Slurm puts a job of one back into the queue for one
    of a later.
    """
    if not nodes() or not re.search(r"PreemptMode\s*=\s*REQUEUE", slurm("scontrol", "show", "config").stdout):
        return []
    tiers = re.findall(
        r"PartitionName=(\S+).*?PriorityTier=(\d+)", slurm("scontrol", "show", "partition").stdout, re.S
    )
    return [name for name, tier in sorted(tiers, key=lambda pair: int(pair[1]))]


@pytest.mark.skipif(
    len(by_urgency()) < 2,
    reason="this Slurm does not preempt: PreemptMode=REQUEUE and two partitions are needed",
)
def test_a_preempted_job_goes_on_later(whole, tmp_path):
    folder, (least, *_, most) = tmp_path / "preempted", by_urgency()
    job = digits(folder, options=[f"--partition={least}"])
    wait_running(job, folder / "last.pth")
    sbatch(
        f"--partition={most}", "--nodes=2", "--exclusive", "--time=1", "--output=/dev/null", "--wrap=sleep 5"
    )
    wait(job)
    assert "DUE TO PREEMPTION" in log(folder) and "asked to stop: saved step" in log(folder), log(folder)
    assert "start number 1" in log(folder) and show(job)["JobState"] == "COMPLETED"
    assert_same_run(whole, folder)


def test_a_cancelled_job_saves_stays_cancelled_and_the_same_command_continues(whole, tmp_path):
    folder = tmp_path / "cancelled"
    job = digits(folder)
    wait_running(job, folder / "last.pth")
    assert slurm("scancel", job).returncode == 0
    wait(job)
    saved = weights(folder)["step"]
    assert f"asked to stop: saved step {saved} " in log(folder) and saved < 400, log(folder)
    assert show(job)["JobState"] == "CANCELLED" and show(job)["Restarts"] == "0"
    wait(digits(folder))
    assert f"at step {saved}: {400 - saved} steps to go" in log(folder)
    assert_same_run(whole, folder)


def ended_by_itself(job, folder):
    """The job failed, and is not started again."""
    state = show(job)
    assert state["JobState"] == "FAILED" and state["ExitCode"] != "0:0" and state["Restarts"] == "0", state
    assert "is not started again" in log(folder) and "back into the queue" not in log(folder), log(folder)


def test_a_rank_that_is_killed_ends_the_job_and_the_log_names_it(tmp_path):
    folder = tmp_path / "killed"
    job = digits(folder)
    wait_running(job, folder / "last.pth")
    node = nodes()[1]
    os.kill(task(job, 1, node), signal.SIGKILL)
    wait(job, seconds=120)
    assert f"{node}: task 1: Killed" in log(folder), log(folder)
    ended_by_itself(job, folder)


def test_a_rank_that_hangs_ends_the_job_with_its_name_after_the_timeout(tmp_path):
    folder = tmp_path / "hung"
    job = digits(folder, "--timeout-minutes", "0.3")
    wait_running(job, folder / "last.pth")
    os.kill(task(job, 1, nodes()[1]), signal.SIGSTOP)
    wait(job, seconds=300)
    assert re.search(r"timed out waiting for rank 1 on \S+, which hangs or has ended", log(folder)), log(
        folder
    )
    ended_by_itself(job, folder)


def test_a_mistake_ends_the_job_with_its_line_and_is_not_requeued(tmp_path):
    folder = tmp_path / "run"
    job = digits(folder, "--strong", "strongest", "--dataset", "cifar10", "--data", tmp_path)
    wait(job)
    assert "error: " in log(folder) and "Traceback" not in log(folder), log(folder)
    assert show(job)["ExitCode"] == "2:0"
    ended_by_itself(job, folder)
