"""Training on several processes as a user starts it: killed, continued with other numbers of processes, and
with a rank that is lost.
"""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import fork_server
import pytest
import torch
from conftest import ROOT, free_port, one_line, one_thread, start_python
from test_train import assert_same_run, events, wait_for, weights

import train_semi
from util.run import checkpoint

pytestmark = pytest.mark.slow(9)
FLAGS = (
    "--config configs/digits.yaml --device cpu --batch-size 5 --epochs 3 --eval-freq 1 --print-freq 4 "
    "--workers 0 --save-freq 7"
).split()


def environment(processes):
    """What torchrun sets for all ranks. With its run ID, ranks end when the tests are killed."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return {"WORLD_SIZE": str(processes), "TORCHELASTIC_RUN_ID": "test", **address}


def start(folder, *flags, processes=2, others=(), new_processes=True):
    """Start the ranks as torchrun does, each with its own output.

    others: flags that ranks other than 0 have besides. new_processes: see `command`.
    """
    env = environment(processes)
    ranks = []
    for rank in range(processes):
        args = ["train_semi.py", *FLAGS, "--output-dir", str(folder), *flags, *(others if rank else ())]
        own = {**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        if new_processes:
            ranks.append(start_python(*args, env=own))
        else:
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            ranks.append(fork_server.popen(args, cwd=ROOT, env=one_thread(own), **pipes))
    return ranks


def finish(ranks, seconds=180):
    """(exit code, stdout, stderr) of each."""
    try:
        texts = [process.communicate(timeout=seconds) for process in ranks]
    finally:
        for process in ranks:
            if process.poll() is None:
                process.kill()
    return [(process.returncode, *text) for process, text in zip(ranks, texts)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The output directory of a run of two ranks that nothing interrupts."""
    folder = tmp_path_factory.mktemp("ranks") / "whole"
    (code, out, err), other = finish(start(folder, new_processes=False))
    assert code == 0 and other[0] == 0, err
    assert "2 ranks of 5 labeled images" in out and other[1] == ""
    return folder


def killed(folder, *flags, **how):
    """Start two ranks and kill them after their first checkpoint. Returns the step of the last one."""
    ranks = start(folder, *flags, **how)
    wait_for(folder / "last.pth", ranks[0])
    for process in ranks:
        process.kill()
    finish(ranks)
    reached = weights(folder)["step"]
    assert 0 < reached < 60
    return reached


def test_two_ranks_that_are_killed_go_on_to_the_same_bits(whole, tmp_path):
    reached = killed(tmp_path / "killed")
    (code, out, err), _ = finish(start(tmp_path / "killed"))
    assert code == 0 and f"at step {reached}" in out, err
    assert_same_run(whole, tmp_path / "killed")


def test_virtual_ranks_are_the_ranks_rounded_otherwise(whole, tmp_path):
    flags = ["--virtual-ranks", "2"]
    ((code, out, err),) = finish(start(tmp_path / "virtual", *flags, processes=1, new_processes=False))
    assert code == 0 and "2 ranks of 5 labeled images, 2 on each of 1 processes" in out, err
    first, second = (
        [event for event in events(folder) if event["event"] == "train"]
        for folder in (whole, tmp_path / "virtual")
    )
    assert [event["step"] for event in first] == [event["step"] for event in second]
    for a, b in zip(
        first[:3], second
    ):  # rounding in float32 grows from step to step; the models' tests are in float64
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-3) and b["pseudo_acc"] == pytest.approx(
            a["pseudo_acc"], abs=0.02
        )


def test_another_number_of_processes_is_refused_or_goes_on_as_the_user_says(mistake, tmp_path):
    folder = tmp_path / "run"
    reached = killed(folder, new_processes=False)
    before = (folder / "last.pth").read_bytes()
    mistake(
        train_semi.main,
        [*FLAGS, "--output-dir", folder],
        "has 2 ranks, but this start has 1",
        "--virtual-ranks 2",
        "--other-ranks continue",
    )
    assert (folder / "last.pth").read_bytes() == before
    flags = ["--other-ranks", "continue"]
    ((code, out, err),) = finish(start(folder, *flags, processes=1, new_processes=False))
    assert code == 0 and "the same step, up to rounding" in out and f"at step {reached}" in out, err
    steps = [event["step"] for event in events(folder) if event["event"] == "train"]
    assert steps == sorted(set(steps)) and steps[-1] == 60 and weights(folder)["world"] == 2


def test_another_number_of_ranks_keeps_the_images_of_a_step(whole, tmp_path):
    flags = ["--batch-size", "10", "--epochs", "2"]
    alone = finish(start(tmp_path / "run", *flags, processes=1, new_processes=False))
    assert alone[0][0] == 0, alone[0][2]
    one = weights(tmp_path / "run")
    one["config"]["epochs"] = 3  # another three epochs would be another run
    checkpoint.save(
        tmp_path / "run" / "last.pth",
        {key: value for key, value in one.items() if key not in ("sha256", "format")},
    )
    (code, out, err), other = finish(
        start(tmp_path / "run", *flags[:2], "--other-ranks", "continue", new_processes=False)
    )
    assert (
        code == 0
        and other[0] == 0
        and "2 ranks of 5 labeled images instead of 1 of 10" in out
        and "BN groups them differently" in out
    ), err
    assert weights(tmp_path / "run")["step"] == 60 and weights(tmp_path / "run")["batch_size"] == 5


def test_evaluation_counts_every_image_once(whole, command):
    """The ranks' accuracy is that of one process that sees all images."""
    done = command("eval.py", "--checkpoint", whole / "last.pth")
    last = [event for event in events(whole) if event["event"] == "eval"][-1]
    assert (
        done.stdout.splitlines()[-1] == f"* Acc@1 {last['student_top1']:.3f} Acc@5 {last['student_top5']:.3f}"
    ), done.stderr


@pytest.mark.parametrize("how, victim", [("hangs", 1), ("dies", 1), ("dies", 0)])
def test_a_lost_rank_ends_the_run_with_its_name(how, victim, tmp_path):
    hangs = how == "hangs"
    # One survivor notices a death at once; the other only when its own timeout is over.
    flags = ["--epochs", "200", "--timeout-minutes", "0.3" if hangs else "0.15"]
    ranks = start(tmp_path / "run", *flags, processes=3, new_processes=hangs)
    wait_for(tmp_path / "run" / "last.pth", ranks[0])
    ranks[victim].send_signal(signal.SIGSTOP if hangs else signal.SIGKILL)
    survivors = finish([process for process in ranks if process is not ranks[victim]], seconds=180)
    ranks[victim].kill()
    for code, _, err in survivors:
        assert code == 1 and "Traceback" not in err, err
        line = [line for line in err.splitlines() if line.startswith("error: ")]
        assert len(line) == 1 and re.search(
            rf"timed out waiting for rank {victim} on \S+, which hangs or has ended \(last seen in st",
            line[0],
        ), err
    assert torch.load(tmp_path / "run" / "last.pth", weights_only=True)["step"] > 0


def test_ranks_that_cannot_be_shared(mistake, tmp_path):
    mistake(
        train_semi.main,
        [*FLAGS, "--output-dir", tmp_path, "--timeout-minutes", "0"],
        "--timeout-minutes",
        "greater than 0",
    )
    mistake(
        train_semi.main, [*FLAGS, "--output-dir", tmp_path, "--other-ranks", "maybe"], "refuse or continue"
    )


@pytest.mark.parametrize("what, flags", [("seed", ["--seed", "4"]), ("step", ["--output-dir", "elsewhere"])])
def test_ranks_that_do_not_run_the_same_say_so(what, flags, tmp_path):
    """Another command; or another output directory, without the checkpoint that rank 0 continues from."""
    if what == "step":
        killed(tmp_path / "run", new_processes=False)
        flags = ["--output-dir", str(tmp_path / "elsewhere")]
    for code, _, err in finish(start(tmp_path / "run", others=flags)):
        one_line(code, err, "rank 1 on ", f"has {what} ", "the same command, data and output directory")


def test_one_line_when_the_mistake_is_every_ranks(tmp_path):
    for code, _, err in finish(start(tmp_path / "run", "--virtual-ranks", "3")):
        one_line(code, err, "3 virtual ranks cannot be shared evenly by 2 processes")


def test_torchrun_starts_the_ranks_again_after_one_is_killed(whole, tmp_path):
    launcher = [*"-m torch.distributed.run --standalone --nproc-per-node 2 --max-restarts 1".split()]
    process = start_python(*launcher, "train_semi.py", *FLAGS, "--output-dir", tmp_path / "run")
    wait_for(tmp_path / "run" / "last.pth", process)
    os.kill(child(process.pid, "RANK=1"), signal.SIGKILL)
    ((code, out, err),) = finish([process])
    assert code == 0 and "continues from" in out, err
    assert re.search(
        r"error: rank 0 on \S+ timed out waiting for rank 1 on \S+, which hangs or has ended", err
    )
    assert_same_run(whole, tmp_path / "run")


def child(parent, variable):
    """The process number of the child of `parent` that has `variable` in its environment."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    (found,) = [
        pid for pid in children if variable.encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    ]
    return int(found)


ENDS = """
import atexit, os, sys
from pathlib import Path

def print_threads():
    print([path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")])

atexit.register(print_threads)  # called last
import torch
from util import dist_utils
from util.errors import UserError, cli_main

def main():
    dist_utils.dist_init("cpu", 1, 0)
    student = dist_utils.wrap_ddp(torch.nn.Linear(2, 2))
    student(torch.ones(1, 2)).sum().backward()
    if sys.argv[1] == "mistake":
        raise UserError("a mistake")
    dist_utils.dist_end()
    sys.exit(int(sys.argv[1]))

cli_main(main)
"""


@pytest.mark.parametrize("end, code", [("75", 75), ("mistake", 2)])
def test_no_thread_of_gloo_is_left_when_python_exits(end, code, tmp_path):
    """Such a thread can abort the process, with exit code -6."""
    (tmp_path / "ends.py").write_text(ENDS)
    env = {**environment(2), "PYTHONPATH": str(ROOT)}
    ranks = [start_python(tmp_path / "ends.py", end, env={**env, "RANK": rank}) for rank in "01"]
    for found, out, err in finish(ranks):
        assert found == code and "python" in out and "gloo" not in out, (out, err)
        assert "TCPStore" not in err, err  # no warning that rank 0 has ended, and with it the store


LAUNCHER = """
import os, sys, time
from util import dist_utils
from util.errors import cli_main

def main():
    if sys.argv[1] == "waiting":
        print("ready", flush=True)
    dist_utils.dist_init("cpu", 10, 0)
    print("ready", flush=True)
    time.sleep(1000)

for rank in "01" if sys.argv[1] == "running" else "1":
    if os.fork() == 0:
        os.environ["RANK"] = rank
        cli_main(main)
time.sleep(1000)
"""


@pytest.mark.parametrize("ranks_are", ["waiting", "running"])
def test_ranks_end_after_the_process_that_started_them(ranks_are, tmp_path):
    (tmp_path / "launcher.py").write_text(LAUNCHER)
    env = one_thread({**environment(2), "PYTHONPATH": str(ROOT)})
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    launcher = fork_server.popen([tmp_path / "launcher.py", ranks_are], env=env, **pipes)
    assert launcher.stdout.readline() == "ready\n"
    time.sleep(1)  # until dist_init has looked who started the rank
    launcher.kill()
    ((_, _, err),) = finish([launcher], seconds=60)  # until no process has its stderr any more
    assert "the process that started it has ended" in err and "Traceback" not in err, err
