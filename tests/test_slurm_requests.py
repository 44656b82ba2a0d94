"""What script/train.sh and script/eval.sh ask a real Slurm for, and the tables of docs/SLURM.md: each row by
its name, against what Slurm says; skipped where none is running.
"""

import re
import time

import pytest
import torch
from cluster import DIGITS, clean_up, digits, needs_slurm, nodes, sbatch, show, slurm, wait, wait_running
from conftest import ROOT

pytestmark = needs_slurm
PAGE = (ROOT / "docs" / "SLURM.md").read_text(encoding="utf-8")
ROWS = dict(re.findall(r"^\| (.+?) \| (.+?) \|", PAGE, re.M))
ONE = ["--nodes=1", "--ntasks-per-node=1", "--gres=gpu:1", "--cpus-per-task=1"]


@pytest.fixture(autouse=True)
def nothing_is_left_behind():
    yield
    clean_up()


def says(quoted, text):
    """Whether `text` has what a row quotes, … standing for anything."""
    return re.search(".+".join(map(re.escape, quoted.split("…"))), text)


def cpus():
    """The most that a node has."""
    return (
        max([int(n.rstrip("+")) for n in slurm("sinfo", "-h", "-N", "-o", "%c").stdout.split()])
        if nodes()
        else 0
    )


REFUSED = {
    "an unknown partition": [*ONE, "--partition=nosuch"],
    "more GPUs than a node has": [*ONE, "--gres=gpu:999"],
    "a type of GPU that is not there": [*ONE, "--gres=gpu:nosuch:1"],
    "an unknown kind of resource, such as `--gres=gpus:1`": [*ONE, "--gres=gpus:1"],
    "`--gpus=N` beside the script's `--gres`": ["--gpus=2"],
    "more CPUs than a node has": [*ONE, f"--cpus-per-task={cpus() + 1}"],
    "more memory than a node has": [*ONE, "--mem=9999G"],
    "an invalid time": [*ONE, "--time=tomorrow"],
    "an invalid signal": [*ONE, "--signal=USR9@60"],
    "an invalid number of nodes": [*ONE, "--nodes=two"],
    "an unknown node": [*ONE, "--nodelist=nosuch"],
    "an unknown feature": [*ONE, "--constraint=nosuch"],
    "an unknown reservation": [*ONE, "--reservation=nosuch"],
    "a misspelled option": [*ONE, "--epochs=3"],
    "the script from another folder": ONE,
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_request_that_sbatch_refuses(name, tmp_path):
    done = slurm(
        "sbatch", "--parsable", *REFUSED[name], "script/train.sh", cwd=tmp_path if "folder" in name else ROOT
    )
    if done.returncode == 0:
        slurm("scancel", done.stdout.strip())
    assert done.returncode != 0 and done.stdout == ""
    assert says(ROWS[name].strip("`"), done.stderr), done.stderr


WAITING = {
    "more nodes than the partition has": [*ONE, "--nodes=999"],
    "more CPUs than all nodes have": [*ONE, "--cpus-per-task=99999"],
    "nodes that others use": [*ONE, "--nodes=2", "--exclusive"],
    "a start later on, or after a requeue": [*ONE, "--begin=now+1hour"],
    "a job that waits for another": [*ONE],
    "a job on hold": [*ONE, "--hold"],
}


@pytest.mark.parametrize("name", WAITING)
def test_a_request_that_waits(name):
    """Slurm takes some seconds to find its reason."""
    options = list(WAITING[name])
    if name == "nodes that others use":
        sbatch("--exclusive", "--nodes=2", "--output=/dev/null", "--wrap=sleep 60")
    if name == "a job that waits for another":
        options.append(f"--dependency=afterok:{sbatch('--hold', '--output=/dev/null', '--wrap=true')}")
    job = sbatch(*options, "--output=/dev/null", "script/train.sh")
    known = re.findall(r"`(\w+)`", ROWS[name])
    for _ in range(60):
        if show(job)["Reason"] in known:
            break
        time.sleep(0.5)
    assert known and show(job)["JobState"] == "PENDING" and show(job)["Reason"] in known, show(job)


def test_every_row_is_tested():
    names = re.findall(r"^\| ([^|]+) \| [^|]+ \| [^|]+ \|$", PAGE, re.M)  # the rows of three columns
    assert sorted(set(names) - {"asked for"}) == sorted([*REFUSED, *WAITING])


def test_what_the_script_asks_for_and_that_the_command_line_goes_before_it(tmp_path):
    usual = show(sbatch("--hold", "script/train.sh"))
    assert (
        usual["JobName"],
        usual["TimeLimit"],
        usual["NumTasks"],
        usual["TresPerNode"],
        usual["Requeue"],
    ) == ("simmatch", "1-00:00:00", "8", "gres:gpu:8", "1")
    assert usual["StdOut"] == f"{ROOT}/log/simmatch-{usual['JobId']}.out"
    own = show(
        sbatch(
            "--hold",
            "--job-name=mine",
            "--time=7",
            "--ntasks-per-node=2",
            "--gres=gpu:2",
            "--cpus-per-task=3",
            "--no-requeue",
            f"--output={tmp_path}/%x-%j.txt",
            "script/train.sh",
        )
    )
    assert (
        own["JobName"],
        own["TimeLimit"],
        own["NumTasks"],
        own["TresPerNode"],
        own["Requeue"],
        own["CPUs/Task"],
    ) == ("mine", "00:07:00", "2", "gres:gpu:2", "0", "3")
    assert own["StdOut"] == f"{tmp_path}/mine-{own['JobId']}.txt"


def finished(tmp_path, *words, **how):
    """(state, log) of a job that has run to its end."""
    job = sbatch(f"--output={tmp_path}/job.out", *words, **how)
    wait(job, seconds=120)
    return show(job), (tmp_path / "job.out").read_text() if (tmp_path / "job.out").exists() else ""


def test_more_tasks_than_gpus_is_an_error(tmp_path):
    run = tmp_path / "run"
    state, said = finished(
        tmp_path, *ONE, "--ntasks-per-node=2", "script/train.sh", *DIGITS, "--output-dir", run
    )
    assert state["ExitCode"] == "2:0" and said == ROWS["more tasks than GPUs"] + "\n"
    assert not run.exists()


def test_fewer_tasks_than_gpus_is_a_warning(tmp_path):
    run = tmp_path / "run"
    state, said = finished(
        tmp_path, *ONE, "--gres=gpu:2", "script/train.sh", *DIGITS, "--epochs", "1", "--output-dir", run
    )
    assert state["JobState"] == "COMPLETED" and said.startswith(ROWS["fewer tasks than GPUs"] + "\n"), said
    assert (run / "last.pth").exists()


def test_a_job_from_another_folder(tmp_path):
    state, said = finished(tmp_path, *ONE, ROOT / "script" / "train.sh", cwd=tmp_path)
    assert (
        state["ExitCode"] == "2:0"
        and said.count("\n") == 1
        and says(ROWS["sbatch from another folder"], said)
    ), said
    state, _ = finished(
        tmp_path, *ONE, f"--output={tmp_path}/log/%j.out", ROOT / "script" / "train.sh", cwd=tmp_path
    )
    assert "`ExitCode=0:53`" in PAGE and state["ExitCode"] == "0:53" and not (tmp_path / "log").exists()


def test_one_that_may_not_be_requeued_says_how_to_go_on(tmp_path):
    folder = tmp_path / "run"
    job = digits(folder, options=["--no-requeue"])
    wait_running(job, folder / "last.pth")
    slurm("scancel", "--signal=USR1", job)
    wait(job)
    said = (tmp_path / "run.out").read_text()
    assert "asked to stop: saved step" in said and "the same sbatch command continues" in said, said
    assert show(job)["JobState"] == "FAILED" and show(job)["ExitCode"] == "75:0"


def test_eval_sh(tmp_path, train):
    """Under Slurm the same lines as without."""
    assert train(tmp_path / "run", "--device", "cpu").returncode == 0
    words = ["script/eval.sh", "--device", "cpu", "--checkpoint"]
    state, said = finished(
        tmp_path, "--gres=none", "--cpus-per-task=1", *words, tmp_path / "run" / "last.pth"
    )
    assert state["JobState"] == "COMPLETED", said
    here = slurm("bash", *words, tmp_path / "run" / "last.pth")
    assert here.returncode == 0 and here.stdout == said, said
    assert re.fullmatch(r"\* Acc@1 \S+ Acc@5 \S+", said.splitlines()[-1])
    state, said = finished(tmp_path, "--gres=none", "--cpus-per-task=1", *words, tmp_path / "none.pth")
    assert state["ExitCode"] == "2:0" and "none.pth does not exist" in said, said


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_on_a_login_node_without_gpu_train_sh_names_sbatch(tmp_path):
    done = slurm("bash", "script/train.sh", *DIGITS, "--epochs", "1", "--output-dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert (
        "no GPU on this machine, so training uses the CPU. To use the cluster's: sbatch script/train.sh configs/digits.yaml"
        in done.stdout
    )
    assert (tmp_path / "run" / "last.pth").exists()
