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
    different ports. A batch script without srun is a single rank. Raises UserError if a variable is missing
    or invalid, or if the hosts cannot be found.
    """
    if "RANK" in env or "WORLD_SIZE" in env:
        world = _number(env, "WORLD_SIZE", 1)
        return Rendezvous(
            _number(env, "RANK", 0, world - 1),
            _number(env, "LOCAL_RANK", 0, world - 1, default="0"),
            world,
            _text(env, "MASTER_ADDR", default="localhost"),
            _number(env, "MASTER_PORT", 1, 65535, default="29500"),
        )
    if "SLURM_STEP_ID" not in env:
        return Rendezvous()
    world = _number(env, "SLURM_STEP_NUM_TASKS", 1, default="1")
    if world == 1:
        return Rendezvous()
    highest = 65536 - NUM_PORTS
    if not 1 <= port <= highest:
        raise UserError(f"--port {port} must be from 1 to {highest}, because up to {NUM_PORTS - 1} are added")
    nodes = env.get("SLURM_STEP_NODELIST") or _text(env, "SLURM_JOB_NODELIST")
    try:
        host = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True
        ).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise UserError(
            f"cannot find the first of the nodes {nodes} ({error}): make scontrol available on the nodes, or "
            "start with torchrun"
        ) from None
    # Another port after a restart: ranks of the earlier start may still be waiting at theirs, because Slurm
    # kills the processes of a lost node late.
    restart_offset = 1009 * _number(env, "SLURM_RESTART_COUNT", 0, default="0")
    port += (_number(env, "SLURM_JOB_ID", 0) + _number(env, "SLURM_STEP_ID", 0) + restart_offset) % NUM_PORTS
    return Rendezvous(
        _number(env, "SLURM_PROCID", 0, world - 1),
        _number(env, "SLURM_LOCALID", 0, world - 1),
        world,
        host,
        port,
    )


def _number(
    env: Mapping[str, str], name: str, least: int, most: int = 2**32, default: str | None = None
) -> int:
    text = _text(env, name, default)
    if not (text.isascii() and text.isdigit() and least <= int(text) <= most):
        bounds = f"from {least} to {most}" if most < 2**32 else f"of at least {least}"
        raise _bad_variable(name, f"is {text!r}, but must be a number {bounds}")
    return int(text)


def _text(env: Mapping[str, str], name: str, default: str | None = None) -> str:
    text = env.get(name, default)
    if not text:
        raise _bad_variable(name, "is not set" if text is None else "is empty")
    return text


def _bad_variable(name: str, problem: str) -> UserError:
    return UserError(
        f"the environment variable {name} {problem}: start with torchrun or srun, which set it; to run a "
        "single process, unset RANK, WORLD_SIZE and SLURM_STEP_ID"
    )
