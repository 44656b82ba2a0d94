"""Where a process stands among the ranks and where they meet, from what torchrun or srun has set."""

import subprocess
from collections.abc import Mapping
from typing import NamedTuple

from util.errors import UserError

# What a site may have to change, in a config or on the command line: --port, the first of the PORTS that must
# be free between nodes, and --timeout-minutes.
NUM_PORTS = 5_000


class Rendezvous(NamedTuple):
    """Where this process stands among the ranks, and where they meet."""

    rank: int = 0
    local_rank: int = 0  # among those of this node: the number of its GPU
    world: int = 1
    host: str = ""
    port: int = 0


def find_rendezvous(env: Mapping[str, str], port: int) -> Rendezvous:
    """From the environment: of torchrun, of srun, or alone.

    Under srun the ranks are the tasks of the step, they meet on the first host of its nodes, at `port` and
    some more by the numbers of the job and its start, so that no two of them meet. A batch script without
    srun is alone.
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
            f"cannot tell the first of the nodes {nodes} ({error}): is scontrol there on the nodes? Otherwise start "
            "with torchrun"
        ) from None
    # Not where ranks of an earlier start may still wait for each other: those of a node that was lost are
    # killed late.
    start = 1009 * int(env.get("SLURM_RESTART_COUNT", 0))
    port += (int(env["SLURM_JOB_ID"]) + int(env["SLURM_STEP_ID"]) + start) % NUM_PORTS
    return Rendezvous(int(env["SLURM_PROCID"]), int(env["SLURM_LOCALID"]), world, hosts[0], port)
