"""The rendezvous, from the variables that torchrun and srun set."""

import pytest

from util import dist_utils
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


def test_a_missing_scontrol_is_a_user_error(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="first of the nodes gpu.*scontrol"):
        find_rendezvous(SRUN, 20000)


def test_ranks_that_never_start_are_a_user_error(monkeypatch):
    for key, value in {
        "RANK": "1",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "9",
    }.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(UserError, match="rank 1 of 2, on .* did not meet the others at 127.0.0.1:9"):
        dist_utils.dist_init("cpu", 1 / 60, 0)
