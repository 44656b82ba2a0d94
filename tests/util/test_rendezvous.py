"""The rendezvous, from the variables that torchrun and srun set, and how long a rank waits there."""

import re
import signal
import socket
import subprocess
import types

import fork_server
import pytest
import torch
from conftest import ROOT, free_port, one_line, one_thread

from util import dist_utils, process_groups
from util.errors import UserError
from util.rendezvous import NUM_PORTS, Rendezvous, find_rendezvous

SRUN = {
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_JOB_NODELIST": "gpu[07-08]",
}


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """A script that answers as Slurm's scontrol does."""
    (tmp_path / "scontrol").write_text(
        '#!/bin/sh\n[ "$*" = "show hostnames gpu[07-08]" ] && printf "gpu07\\ngpu08\\n"\n'
    )
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")


def test_without_variables_there_is_one_rank():
    assert find_rendezvous({}, 20000) == Rendezvous(0, 0, 1, "", 0)


def test_a_batch_script_without_srun_is_one_rank():
    assert (
        find_rendezvous(
            {key: value for key, value in SRUN.items() if not key.startswith("SLURM_STEP")}
            | {"SLURM_NTASKS": "16"},
            20000,
        )
        == Rendezvous()
    )


def test_one_task_of_srun_is_one_rank():
    assert find_rendezvous({**SRUN, "SLURM_STEP_NUM_TASKS": "1"}, 20000) == Rendezvous()


def test_the_variables_of_torchrun_are_used():
    env = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "5", **SRUN}
    assert find_rendezvous(env, 20000) == Rendezvous(3, 1, 4, "a", 5)


def test_each_start_under_srun_has_its_own_port(scontrol):
    assert find_rendezvous(SRUN, 20000) == Rendezvous(9, 1, 16, "gpu07", 20000 + 123456 % NUM_PORTS)
    other = find_rendezvous({**SRUN, "SLURM_JOB_ID": "123457"}, 20000)
    again = find_rendezvous({**SRUN, "SLURM_RESTART_COUNT": "1"}, 20000)
    assert (
        len({other.port, again.port, find_rendezvous(SRUN, 20000).port}) == 3
        and 20000 <= other.port < 20000 + NUM_PORTS
    )


@pytest.mark.parametrize(
    "env, words",
    [
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE is 'x', but must be a number of at least 1"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0', but must be a number of at least 1"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is empty"),
        ({"WORLD_SIZE": None}, "WORLD_SIZE is not set"),
        ({"RANK": None}, "RANK is not set"),
        ({"RANK": ""}, "RANK is empty"),
        ({"RANK": "-1"}, "RANK is '-1', but must be a number from 0 to 3"),
        ({"RANK": "4"}, "RANK is '4', but must be a number from 0 to 3"),
        ({"LOCAL_RANK": "one"}, "LOCAL_RANK is 'one', but must be a number from 0 to 3"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is empty"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT is '0', but must be a number from 1 to 65535"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT is '65536', but must be a number from 1 to 65535"),
    ],
)
def test_an_invalid_variable_of_torchrun_is_a_user_error(env, words):
    valid = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "5"}
    with pytest.raises(UserError, match=f"the environment variable {words}"):
        find_rendezvous({key: text for key, text in {**valid, **env}.items() if text is not None}, 20000)


@pytest.mark.parametrize(
    "env, words",
    [
        (
            {"SLURM_STEP_NUM_TASKS": "many"},
            "SLURM_STEP_NUM_TASKS is 'many', but must be a number of at least 1",
        ),
        ({"SLURM_PROCID": "16"}, "SLURM_PROCID is '16', but must be a number from 0 to 15"),
        ({"SLURM_PROCID": None}, "SLURM_PROCID is not set"),
        ({"SLURM_LOCALID": ""}, "SLURM_LOCALID is empty"),
        ({"SLURM_JOB_ID": "1_2"}, "SLURM_JOB_ID is '1_2', but must be a number of at least 0"),
        ({"SLURM_STEP_ID": "batch"}, "SLURM_STEP_ID is 'batch', but must be a number of at least 0"),
        ({"SLURM_RESTART_COUNT": "x"}, "SLURM_RESTART_COUNT is 'x', but must be a number of at least 0"),
        ({"SLURM_STEP_NODELIST": None, "SLURM_JOB_NODELIST": None}, "SLURM_JOB_NODELIST is not set"),
    ],
)
def test_an_invalid_variable_of_srun_is_a_user_error(env, words, scontrol):
    with pytest.raises(UserError, match=f"the environment variable {words}"):
        find_rendezvous({key: text for key, text in {**SRUN, **env}.items() if text is not None}, 20000)


@pytest.mark.parametrize("port", [0, 60537])
def test_a_port_that_leaves_no_room_for_the_offset_is_a_user_error(port, scontrol):
    with pytest.raises(UserError, match=f"--port {port} must be from 1 to 60536"):
        find_rendezvous(SRUN, port)


def test_a_missing_scontrol_is_a_user_error(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="first of the nodes gpu.*scontrol"):
        find_rendezvous(SRUN, 20000)


def rank_alone(rank, port, host="127.0.0.1", **how):
    """Start one of two ranks, which waits for the other one for 3 s."""
    env = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": host, "MASTER_PORT": str(port)}
    flags = ["--config", "configs/digits.yaml", "--device", "cpu", "--timeout-minutes", "0.05"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return fork_server.popen(["train_semi.py", *flags], cwd=ROOT, env=one_thread(env), **pipes)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_rank_waits_for_rank_0_no_longer_than_the_timeout(host):
    rank = rank_alone(1, port := free_port(), host)
    _, err = rank.communicate(timeout=30)
    one_line(
        rank.returncode, err, "rank 1 of 2, on ", f"the others at {host}:{port} within 0.05 minutes (no "
    )


def test_a_rank_waits_for_a_port_that_never_answers_no_longer_than_the_timeout():
    with socket.create_server(("127.0.0.1", 0)) as server:
        rank = rank_alone(1, server.getsockname()[1])
        _, err = rank.communicate(timeout=30)
    one_line(rank.returncode, err, "rank 1 of 2, on ", "within 0.05 minutes (no connection)")


def test_rank_0_waits_for_the_others_no_longer_than_the_timeout_and_names_them():
    rank = rank_alone(0, free_port())
    _, err = rank.communicate(timeout=30)
    one_line(rank.returncode, err, "rank 0 of 2, on ", "within 0.05 minutes (rank 1 did not come)")


def test_ctrl_c_ends_a_rank_that_waits_for_the_others():
    with socket.create_server(("127.0.0.1", 0)) as server:
        rank = rank_alone(1, server.getsockname()[1])
        server.accept()
        rank.send_signal(signal.SIGINT)
        _, err = rank.communicate(timeout=30)
    assert rank.returncode == 130 and err.startswith("interrupted"), err


@pytest.fixture
def gpus(monkeypatch):
    """gpus(n): n GPUs that are visible to this process. Returns the list of GPUs that it chose."""
    chosen = []

    def show(count):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: chosen[-1])
        properties = lambda index: types.SimpleNamespace(uuid=f"GPU-{index}")  # noqa: E731
        monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
        return chosen

    return show


@pytest.mark.parametrize("count, local_rank, index", [(1, 3, 0), (4, 3, 3)])
def test_a_rank_chooses_the_gpu_of_its_local_rank_or_the_only_one(count, local_rank, index, gpus):
    chosen = gpus(count)
    assert process_groups._choose_gpu(Rendezvous(7, local_rank, 8, "a", 5)) == f"GPU-{index}"
    assert chosen == [index]


def test_more_processes_than_gpus_are_a_user_error(gpus, monkeypatch):
    chosen = gpus(2)
    for key, value in {"RANK": "6", "LOCAL_RANK": "2", "WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(
        UserError, match="rank 6 is process number 3 on .*, which has 2 GPUs: start at most one"
    ):
        dist_utils.dist_init("auto", 1, 0)
    assert chosen == []


def test_two_ranks_on_one_gpu_are_a_user_error():
    """Not if the scheduler shows each task only its own GPU: the names are the same, but not the UUIDs."""
    process_groups._refuse_shared_gpus([("a", "GPU-1"), ("a", "GPU-2"), ("b", "GPU-3")])
    process_groups._refuse_shared_gpus([("a", ""), ("a", "")])
    with pytest.raises(UserError, match="rank 0 and rank 2 on a use the same GPU: start at most one process"):
        process_groups._refuse_shared_gpus([("a", "GPU-1"), ("a", "GPU-2"), ("a", "GPU-1")])


NCCL = """NCCL error in: /torch/csrc/distributed/c10d/NCCLUtils.cpp:77, invalid usage, NCCL version 2.21.5
ncclInvalidUsage: This usually reflects invalid usage of NCCL library.
Last error:
Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1b000
"""


@pytest.mark.parametrize(
    "error, lost, line",
    [
        (NCCL, "", r"NCCL failed on rank 0 on a, although .*: Duplicate GPU detected .* CUDA device 1b000"),
        (NCCL, "rank 1 is lost", "rank 1 is lost"),
        ("[a.cc:8] Connection closed by peer", "", r"rank 0 on a lost the connection .* \(\[a.cc:8\] Conn.*"),
        ("CUDA out of memory", "rank 1 is lost", None),
    ],
)
def test_an_error_of_nccl_keeps_its_last_line(error, lost, line, monkeypatch):
    heartbeat = types.SimpleNamespace(explain=lambda timed_out: lost)
    monkeypatch.setattr(process_groups, "HEARTBEAT", heartbeat)
    monkeypatch.setattr(process_groups, "HOSTNAMES", ["a"])
    found = dist_utils.describe_lost_ranks(RuntimeError(error))
    assert found == line or re.fullmatch(line, found)
