"""What script/train.sh and script/eval.sh ask a real Slurm for, and the tables of docs/SLURM.md: each row, by
its name, is compared with what Slurm answers. Skipped where no Slurm is running.
"""

import re
import time

import pytest
import torch
from cluster import DIGITS, clean_up, needs_slurm, nodes, sbatch, show, slurm, wait
from conftest import ROOT

pytestmark = needs_slurm
PAGE = (ROOT / "docs" / "SLURM.md").read_text(encoding="utf-8")
ROWS = dict(re.findall(r"^\| (.+?) \| (.+?) \|", PAGE, re.M))
ONE_EPOCH = [*DIGITS, "--epochs", "1", "--steps-per-epoch", "2"]
ONE = ["--nodes=1", "--ntasks-per-node=1", "--gres=gpu:1", "--cpus-per-task=1"]


@pytest.fixture(autouse=True)
def nothing_is_left_behind():
    yield
    clean_up()


def says(quoted, text):
    """Whether `text` contains what a row quotes, with any text in place of each …."""
    return re.search(".+".join(map(re.escape, quoted.split("…"))), text)


def cpus():
    """The largest number of CPUs of a node."""
    counts = slurm("sinfo", "-h", "-N", "-o", "%c").stdout.split() if nodes() else []
    return max((int(count.rstrip("+")) for count in counts), default=0)


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
    """Slurm needs some seconds to find the reason."""
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


def submit(folder, *words, **how):
    """A function that waits for the job and returns (state, log)."""
    job = sbatch(f"--output={folder}.out", *words, **how)

    def finish():
        wait(job)
        out = folder.with_name(folder.name + ".out")
        return show(job), out.read_text() if out.exists() else ""

    return finish


def test_other_numbers_of_tasks_than_gpus(tmp_path):
    """More are an error, fewer a warning."""
    jobs = {
        name: submit(
            tmp_path / name, *ONE, *options, "script/train.sh", *ONE_EPOCH, "--output-dir", tmp_path / name
        )
        for name, options in (("more", ["--ntasks-per-node=2"]), ("fewer", ["--gres=gpu:2"]))
    }
    state, text = jobs["more"]()
    assert state["ExitCode"] == "2:0" and text == ROWS["more tasks than GPUs"] + "\n"
    assert not (tmp_path / "more").exists()
    state, text = jobs["fewer"]()
    assert state["JobState"] == "COMPLETED" and text.startswith(ROWS["fewer tasks than GPUs"] + "\n"), text
    assert (tmp_path / "fewer" / "last.pth").exists()


def test_a_job_from_another_folder(tmp_path):
    script = ROOT / "script" / "train.sh"
    first = submit(tmp_path / "job", *ONE, script, cwd=tmp_path)
    second = submit(tmp_path / "log" / "job", *ONE, script, cwd=tmp_path)
    state, text = first()
    assert state["ExitCode"] == "2:0" and text.count("\n") == 1, text
    assert says(ROWS["sbatch from another folder"], text), text
    state, _ = second()
    assert "`ExitCode=0:53`" in PAGE and state["ExitCode"] == "0:53" and not (tmp_path / "log").exists()


def test_eval_sh(tmp_path, train):
    """Under Slurm it prints the same lines as without."""
    assert train(tmp_path / "run", "--device", "cpu", "--steps-per-epoch", "2").returncode == 0
    words = ["script/eval.sh", "--device", "cpu", "--checkpoint"]
    options = ["--gres=none", "--cpus-per-task=1"]
    right, wrong = (
        submit(tmp_path / name, *options, *words, tmp_path / "run" / name)
        for name in ("last.pth", "none.pth")
    )
    alone = slurm("bash", *words, tmp_path / "run" / "last.pth")
    state, text = right()
    assert state["JobState"] == "COMPLETED", text
    assert alone.returncode == 0 and alone.stdout == text, text
    assert re.fullmatch(r"\* Acc@1 \S+ Acc@5 \S+", text.splitlines()[-1])
    state, text = wrong()
    assert state["ExitCode"] == "2:0" and "none.pth does not exist" in text, text


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_on_a_login_node_without_gpu_train_sh_names_sbatch(tmp_path):
    done = slurm("bash", "script/train.sh", *ONE_EPOCH, "--output-dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "no GPU on this machine, so training uses the CPU." in done.stdout
    assert "To use the cluster's: sbatch script/train.sh configs/digits.yaml" in done.stdout
    assert (tmp_path / "run" / "last.pth").exists()
