"""The rank of this process and the address where all ranks meet, from the environment of torchrun or srun."""

import subprocess
from collections.abc import Mapping
from typing import NamedTuple

from util.errors import UserError

# Under srun the ranks meet at one of NUM_PORTS ports from --port on; these must be open between the nodes.
NUM_PORTS = 5_000


class Rendezvous(NamedTuple):
    """The rank of this process, and the host and port where all ranks meet."""

    rank: int = 0
    local_rank: int = 0  # rank among the processes of this node, which is the number of its GPU
    world: int = 1
    host: str = ""
    port: int = 0


def find_rendezvous(env: Mapping[str, str], port: int) -> Rendezvous:
    """Return the rendezvous that the environment variables of torchrun or srun describe; without either, a
    single rank.

    Under srun the ranks are the tasks of the job step. They meet on the first host of its nodes, at `port`
    plus an offset from the IDs of job and step and the number of restarts, so that different starts use
    different ports. A batch script without srun is a single rank. Raises UserError if the hosts cannot be
    found.
    """
    if "RANK" in env and "WORLD_SIZE" in env:
        return Rendezvous(
            int(env["RANK"]),
            int(env.get("LOCAL_RANK", 0)),
            int(env["WORLD_SIZE"]),
            env.get("MASTER_ADDR", "localhost"),
            int(env.get("MASTER_PORT", 29500)),
        )
    world = int(env.get("SLURM_STEP_NUM_TASKS", 1))
    if "SLURM_STEP_ID" not in env or world == 1:
        return Rendezvous()
    nodes = env.get("SLURM_STEP_NODELIST") or env["SLURM_JOB_NODELIST"]
    try:
        hosts = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True
        ).stdout.split()
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(
            f"cannot find the first of the nodes {nodes} ({error}): make scontrol available on the nodes, or "
            "start with torchrun"
        ) from None
    # Another port after a restart: ranks of the earlier start may still be waiting at theirs, because Slurm
    # kills the processes of a lost node late.
    restart_offset = 1009 * int(env.get("SLURM_RESTART_COUNT", 0))
    port += (int(env["SLURM_JOB_ID"]) + int(env["SLURM_STEP_ID"]) + restart_offset) % NUM_PORTS
    return Rendezvous(int(env["SLURM_PROCID"]), int(env["SLURM_LOCALID"]), world, hosts[0], port)
