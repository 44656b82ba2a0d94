"""Interrupted jobs of script/train.sh, on a real Slurm of two nodes; skipped where none is running.

Each job mostly waits for Slurm. So the jobs that leave the nodes as they are run side by side, each in a
thread: a function below interrupts its job and returns what Slurm shows for it in the end. The tests look at
that.
"""

import os
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from cluster import clean_up, digits, needs_slurm, nodes, sbatch, show, slurm, task, wait, wait_running
from test_train import assert_same_run, weights

pytestmark = needs_slurm
STEPS = 240
WITH_WORKER = ["--workers", "1"]  # Slurm's signals reach it, too


def whole(folder):
    """No interruption."""
    wait(job := digits(folder))
    return show(job)


def asked(folder):
    """A signal to the ranks asks them to stop."""
    return interrupted(folder, "scancel", "--signal=USR1")


def requeued(folder):
    """Slurm puts the job back into the queue and sends SIGTERM, as at a preemption."""
    return interrupted(folder, "scontrol", "requeue")


def interrupted(folder, *words):
    wait_running(job := digits(folder, *WITH_WORKER), folder / "last.pth")
    assert slurm(*words, job).returncode == 0
    wait(job)
    return show(job)


def limited(folder):
    """The time limit is three minutes and the signal due a minute before it; Slurm looks every 30 s. The
    ranks stand still (SIGSTOP) until Slurm wakes them with the signal, so that no machine is too fast for it.
    """
    job = digits(folder, options=["--time=3", "--signal=USR1@60"])
    wait_running(job, folder / "last.pth", seconds=110)
    assert slurm("scancel", "--signal=STOP", job).returncode == 0
    assert "asked to stop" not in log(folder)
    wait(job)
    return show(job)


def cancelled(folder):
    """A user cancels the job, and submits it again."""
    wait_running(job := digits(folder), folder / "last.pth")
    assert slurm("scancel", job).returncode == 0
    wait(job)
    state = {**show(job), "saved": weights(folder)["step"], "log": log(folder)}
    wait(digits(folder))
    return state


def not_requeued(folder):
    """A job that may not be requeued is asked to stop."""
    wait_running(job := digits(folder, options=["--no-requeue"]), folder / "last.pth")
    assert slurm("scancel", "--signal=USR1", job).returncode == 0
    wait(job)
    return show(job)


def killed(folder):
    """A rank is killed."""
    wait_running(job := digits(folder), folder / "last.pth")
    os.kill(task(job, 1, nodes()[1]), signal.SIGKILL)
    wait(job)
    return show(job)


def hung(folder):
    """A rank hangs."""
    wait_running(job := digits(folder, "--timeout-minutes", "0.5"), folder / "last.pth")
    os.kill(task(job, 1, nodes()[1]), signal.SIGSTOP)
    wait(job)
    return show(job)


def mistaken(folder):
    """A mistake of the user."""
    wait(job := digits(folder, "--lr", "high"))
    return show(job)


SCENARIOS = [limited, hung, whole, requeued, asked, cancelled, not_requeued, killed, mistaken]


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """result(scenario): its output directory, and what Slurm shows for the job."""
    parent = tmp_path_factory.mktemp("slurm")
    with ThreadPoolExecutor(4) as pool:
        started = {scenario: pool.submit(scenario, parent / scenario.__name__) for scenario in SCENARIOS}
        yield lambda scenario: (parent / scenario.__name__, started[scenario].result())
        for future in started.values():
            future.cancel()
        clean_up()


@pytest.fixture
def alone(result):
    """Nothing else runs on the nodes."""
    for scenario in SCENARIOS:
        result(scenario)
    yield
    clean_up()


def log(folder):
    return folder.with_name(folder.name + ".out").read_text()


def assert_whole_run(folder, result):
    assert_same_run(result(whole)[0], folder)


def test_a_job_that_is_not_interrupted_runs_to_its_end(result):
    folder, state = result(whole)
    assert state["JobState"] == "COMPLETED" and state["Restarts"] == "0", log(folder)
    assert weights(folder)["step"] == STEPS and weights(folder)["world"] == 2


@pytest.mark.parametrize(
    "scenario, by", [(asked, "train: back into the queue"), (requeued, "DUE TO JOB REQUEUE")]
)
def test_a_job_that_is_asked_to_stop_is_requeued_and_ends_with_the_same_bits(scenario, by, result):
    folder, state = result(scenario)
    text = log(folder)
    assert "asked to stop: saved step" in text and by in text and "start number 1" in text, text
    assert "start number 2" not in text
    assert state["Restarts"] == "1" and state["JobState"] == "COMPLETED"
    assert_whole_run(folder, result)


def test_slurm_signals_before_the_time_limit_and_the_job_continues_later(result):
    folder, state = result(limited)
    text = log(folder)
    assert "asked to stop: saved step" in text and "start number 1" in text, text
    assert "TIME LIMIT" not in text and state["JobState"] == "COMPLETED" and int(state["Restarts"]) >= 1
    assert_whole_run(folder, result)


def test_a_cancelled_job_saves_stays_cancelled_and_the_same_command_continues(result):
    folder, state = result(cancelled)
    saved = state["saved"]
    assert f"asked to stop: saved step {saved} " in state["log"] and saved < STEPS, state["log"]
    assert state["JobState"] == "CANCELLED" and state["Restarts"] == "0"
    assert f"at step {saved}: {STEPS - saved} steps to go" in log(folder)
    assert_whole_run(folder, result)


def test_a_job_that_may_not_be_requeued_names_the_command_that_continues(result):
    folder, state = result(not_requeued)
    text = log(folder)
    assert "asked to stop: saved step" in text and "the same sbatch command continues" in text, text
    assert state["JobState"] == "FAILED" and state["ExitCode"] == "75:0"


def assert_failed_for_good(state, text):
    """The job failed, and is not started again."""
    assert state["JobState"] == "FAILED" and state["ExitCode"] != "0:0" and state["Restarts"] == "0", state
    assert "is not started again" in text and "back into the queue" not in text, text


def test_a_rank_that_is_killed_ends_the_job_and_the_log_names_it(result):
    folder, state = result(killed)
    assert f"{nodes()[1]}: task 1: Killed" in log(folder), log(folder)
    assert_failed_for_good(state, log(folder))


def test_a_rank_that_hangs_ends_the_job_with_its_name_after_the_timeout(result):
    folder, state = result(hung)
    assert re.search(r"timed out waiting for rank 1 on \S+, which hangs or has ended", log(folder)), log(
        folder
    )
    assert_failed_for_good(state, log(folder))


def test_a_mistake_ends_the_job_with_its_line_and_is_not_requeued(result):
    folder, state = result(mistaken)
    assert "error: " in log(folder) and "'high'" in log(folder) and "Traceback" not in log(folder)
    assert state["ExitCode"] == "2:0"
    assert_failed_for_good(state, log(folder))


def test_a_node_that_goes_down_is_waited_for(result, alone, tmp_path):
    """Slurm requeues by itself; the run continues from what --save-freq saved. The nodes fail one after the
    other: the second one is that of the batch script.
    """
    folder, reached = tmp_path / "down", []
    job = digits(folder, "--save-freq", "7")
    for node in reversed(nodes()[:2]):
        begun = time.time()
        wait(job, until=lambda begun=begun: modified(folder / "last.pth") > begun)
        assert show(job)["JobState"] == "RUNNING", show(job)
        try:
            down = slurm("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
            if down.returncode:
                pytest.skip(f"this user may not set a node down: {down.stderr.strip()}")
            wait(job, until=lambda: show(job)["JobState"] == "PENDING", seconds=60)
            reached.append(weights(folder)["step"])
        finally:
            slurm("scontrol", "update", f"nodename={node}", "state=resume")
    wait(job)
    text = log(folder)
    assert all(f"Node failure on {node}" in text for node in nodes()[:2]) and "start number 2" in text, text
    assert 0 < reached[0] < reached[1] < STEPS and all(f"at step {step}: " in text for step in reached), text
    assert show(job)["JobState"] == "COMPLETED"
    assert_whole_run(folder, result)


def modified(path):
    return path.stat().st_mtime if path.exists() else 0


def by_urgency():
    """Names of the partitions, the least urgent first, if Slurm requeues a job of one for a job of a later
    one.
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
def test_a_preempted_job_continues_later(result, alone, tmp_path):
    folder, (least, *_, most) = tmp_path / "preempted", by_urgency()
    job = digits(folder, options=[f"--partition={least}"])
    wait_running(job, folder / "last.pth")
    sbatch(
        f"--partition={most}", "--nodes=2", "--exclusive", "--time=1", "--output=/dev/null", "--wrap=sleep 5"
    )
    wait(job)
    assert "DUE TO PREEMPTION" in log(folder) and "asked to stop: saved step" in log(folder), log(folder)
    assert "start number 1" in log(folder) and show(job)["JobState"] == "COMPLETED"
    assert_whole_run(folder, result)
