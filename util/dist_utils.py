"""Ranks: the only file that talks to torch.distributed. Alone (world size 1) every function is the obvious identity."""
import inspect
import os
import socket
import subprocess
from datetime import timedelta
from typing import Any, Mapping, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from util.errors import UserError


# What a site may have to change: how long ranks wait for each other, and which ports are free between its nodes.
TIMEOUT = timedelta(minutes=10)
FIRST_PORT, PORTS = 20_000, 10_000


class Place(NamedTuple):
    """Where this process stands among the ranks, and where they meet."""
    rank: int = 0
    local_rank: int = 0         # among those of this node: the number of its GPU
    world: int = 1
    host: str = ""
    port: int = 0


def place(env: Mapping[str, str]) -> Place:
    """From the environment: of torchrun, of srun, or alone.

    Under srun the ranks are the tasks of the step, they meet on the first host of its nodes, and the port follows from the
    job's number, so that two jobs on one node do not meet. A batch script without srun is alone.
    """
    if "RANK" in env and "WORLD_SIZE" in env:
        return Place(int(env["RANK"]), int(env.get("LOCAL_RANK", 0)), int(env["WORLD_SIZE"]), env.get("MASTER_ADDR", "localhost"),
                     int(env.get("MASTER_PORT", 29500)))
    world = int(env.get("SLURM_STEP_NUM_TASKS", 1))
    if "SLURM_STEP_ID" not in env or world == 1:
        return Place()
    nodes = env.get("SLURM_STEP_NODELIST") or env["SLURM_JOB_NODELIST"]
    try:
        hosts = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"cannot tell the first of the nodes {nodes} ({error}): is scontrol there on the nodes? Otherwise start "
                        "with torchrun") from None
    port = FIRST_PORT + (int(env["SLURM_JOB_ID"]) + int(env["SLURM_STEP_ID"])) % PORTS
    return Place(int(env["SLURM_PROCID"]), int(env["SLURM_LOCALID"]), world, hosts[0], port)


def dist_init(device: str) -> torch.device:
    """Join the other ranks, if there are any, and choose this rank's device: NCCL between GPUs, gloo between CPUs.

    device: auto, cpu or cuda.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: there is no usable GPU here; use cpu or auto")
    cuda = device != "cpu" and torch.cuda.is_available()
    here = place(os.environ)
    if cuda:
        # A scheduler that shows every task its own GPU alone calls that one 0.
        torch.cuda.set_device(here.local_rank if torch.cuda.device_count() > 1 else 0)
    if here.world > 1:
        try:
            dist.init_process_group("nccl" if cuda else "gloo", init_method=f"tcp://{here.host}:{here.port}", rank=here.rank,
                                    world_size=here.world, timeout=TIMEOUT)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"rank {here.rank} of {here.world}, on {socket.gethostname()}, did not meet the others at {here.host}:"
                            f"{here.port} within {TIMEOUT} ({str(error).splitlines()[0][:200]}): look for the rank that ended or "
                            "never started, and whether that port is open between the nodes") from None
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")


def dist_end() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def parallel(module: nn.Module) -> nn.Module:
    """`module` with gradients averaged over ranks. BN stays per rank; `broadcast_buffers` makes its statistics rank 0's.

    Parameters that a step does not use (the head, in the first epoch) keep no gradient, as when alone.
    """
    if world_size() == 1:
        return module
    ddp = nn.parallel.DistributedDataParallel
    new = "forward_sync_buffers" in inspect.signature(ddp).parameters       # what newer PyTorch calls it
    return ddp(module, find_unused_parameters=True, **{"forward_sync_buffers" if new else "broadcast_buffers": False})


def all_gather(x: Tensor) -> Tensor:
    """[n, ...] of every rank -> [world·n, ...], in rank order, on every rank. No gradient."""
    if world_size() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def all_gather_object(x: Any) -> list[Any]:
    """A small Python object of every rank, in rank order, on every rank."""
    if world_size() == 1:
        return [x]
    out = [None] * world_size()
    dist.all_gather_object(out, x)
    return out


def from_rank_0(yes: bool) -> bool:
    """Rank 0's answer, on every rank."""
    return all_gather_object(yes)[0]


def all_mean(x: Tensor) -> Tensor:
    """Mean of `x` over ranks, same shape. No gradient."""
    return all_sum(x) / world_size()


def all_sum(x: Tensor) -> Tensor:
    """Sum of `x` over ranks, same shape. No gradient."""
    if world_size() == 1:
        return x
    x = x.clone()
    dist.all_reduce(x)
    return x


def broadcast_buffers(module: nn.Module) -> None:
    """Give every rank rank 0's buffers (BN statistics), in place."""
    if world_size() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


class Shuffle:
    """One random regrouping of all ranks' rows, for shuffle-BN (MoCo, arXiv 1911.05722, section 3.3).

    `scatter` sends every row to the rank that the permutation gives it, each row travelling once; `gather` brings the
    results home, in the order in which the rows stood. Alone it does nothing: one group keeps its statistics under any
    order.
    """

    def __init__(self, rows: int, seed: int):
        """rows: per rank, the same on all; seed: the same on all ranks, another one for every step."""
        self.world = world_size()
        if self.world == 1:
            return
        generator = torch.Generator().manual_seed(seed)
        slot = torch.randperm(self.world * rows, generator=generator)     # slot[i]: new place of global row i   [world·n]
        home = torch.argsort(slot) // rows                                # home[s]: rank of the row in slot s   [world·n]
        mine = slice(rank() * rows, (rank() + 1) * rows)
        self.order = torch.argsort(slot[mine])                            # own rows by new place                [n]
        self.sent = torch.bincount(slot[mine] // rows, minlength=self.world).tolist()    # rows to each rank     [world]
        self.received = torch.bincount(home[mine], minlength=self.world).tolist()        # rows from each rank   [world]

    def scatter(self, x: Tensor) -> Tensor:
        """[n, ...] of this rank -> [n, ...] of the group it hosts, ordered by origin."""
        if self.world == 1:
            return x
        return self._exchange(x[self.order.to(x.device)], self.received, self.sent)

    def gather(self, x: Tensor) -> Tensor:
        """[n, ...] of the hosted group -> [n, ...] of this rank's own rows."""
        if self.world == 1:
            return x
        out = torch.empty_like(x)
        out[self.order.to(x.device)] = self._exchange(x, self.sent, self.received)
        return out

    @staticmethod
    def _exchange(x: Tensor, received: list[int], sent: list[int]) -> Tensor:
        out = torch.empty_like(x)
        dist.all_to_all_single(out, x.contiguous(), received, sent)
        return out
