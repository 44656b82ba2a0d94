"""Ranks: the only file that talks to torch.distributed. Alone (world size 1) every function is the obvious
identity.
"""

import inspect
import os
import socket
import threading
import time
from contextlib import nullcontext, suppress
from datetime import timedelta
from typing import Any, ContextManager, Optional, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from util.errors import UserError
from util.rendezvous import find_rendezvous

# Ranks talk twice: about tensors, over NCCL between GPUs; and about what to do next, over gloo, whose timeout
# leaves time to say which rank did not answer. CONTROL is the group of the latter, STORE the board where the
# ranks met, HOSTS their machines.
GLOO_GROUP: Optional[dist.ProcessGroup] = None
STORE: Optional[dist.Store] = None
HOSTNAMES: list[str] = []
ROLL_CALL_SECONDS = 10  # s in which ranks that still live put their names on the board after one was lost


def dist_init(device: str, timeout_minutes: float, port: int) -> torch.device:
    """Join the other ranks, if there are any, and choose this rank's device: NCCL between GPUs, gloo between
    CPUs.

    device: auto, cpu or cuda. timeout_minutes: how long a rank waits for another one, now and in any step.
    port: for `place`.
    """
    global GLOO_GROUP, STORE
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: there is no usable GPU here; use cpu or auto")
    cuda = device != "cpu" and torch.cuda.is_available()
    here = find_rendezvous(os.environ, port)
    if cuda:
        # A scheduler that shows every task its own GPU alone calls that one 0.
        torch.cuda.set_device(here.local_rank if torch.cuda.device_count() > 1 else 0)
    if here.world > 1 and not dist.is_initialized():
        timeout = timedelta(minutes=timeout_minutes)
        try:
            # NCCL's own timeout ends a process without naming the rank it waited for, so it is to come
            # second.
            hosts_it = (
                here.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
            )  # torchrun has its own
            STORE = dist.TCPStore(here.host, here.port, here.world, hosts_it, timeout)
            dist.init_process_group(
                "nccl" if cuda else "gloo",
                store=dist.PrefixStore("group", STORE),
                rank=here.rank,
                world_size=here.world,
                timeout=2 * timeout if cuda else timeout,
            )
            GLOO_GROUP = dist.new_group(backend="gloo", timeout=timeout)
            HOSTNAMES[:] = all_gather_object(socket.gethostname())
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"rank {here.rank} of {here.world}, on {socket.gethostname()}, did not meet the others at {here.host}:"
                f"{here.port} within {timeout_minutes:g} minutes ({str(error).splitlines()[0][:200]}): look for the "
                "rank that ended or never started, and whether that port is open between the nodes"
            ) from None
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")


def describe_lost_ranks(error: RuntimeError) -> Optional[str]:
    """A line that names the ranks that were lost, if `error` is of one that waited for them in vain; else
    None.
    """
    text = str(error)
    if STORE is None or not any(
        sign in text for sign in ("gloo", "NCCL", "Connection closed", "Connection reset", "Timed out")
    ):
        return None
    me, missing = (
        f"rank {rank()} on {HOSTNAMES[rank()]}",
        [0],
    )  # if the board does not answer: the rank that keeps it
    call = threading.Thread(target=_roll_call, args=(missing,), daemon=True)
    call.start()
    call.join(ROLL_CALL_SECONDS + 5)
    if not missing:
        return f"{me} lost contact with the others, which still live ({text.splitlines()[0][:200]}): look at the network between them"
    lost = ", ".join(f"rank {r} on {HOSTNAMES[r]}" for r in missing)
    return (
        f"{me} waited in vain for {lost}: it hangs or has ended; see what it said last, and its machine. The same command "
        "continues from the last checkpoint"
    )


def _roll_call(missing: list[int]) -> None:
    """Put this rank's name on the board; the ranks that do not, within ROLL_CALL seconds, are `missing`."""
    end, silent = time.monotonic() + ROLL_CALL_SECONDS, list(range(world_size()))
    with suppress(RuntimeError):  # a board that is gone
        STORE.set(f"lives/{rank()}", "")
        while silent and time.monotonic() < end:
            silent = [r for r in silent if not STORE.check([f"lives/{r}"])]
            time.sleep(0.1)
        missing[:] = silent
        if rank() == 0:
            time.sleep(3)  # others are reading still: the board goes with this process


def check_same_on_all_ranks(facts: dict[str, Any]) -> None:
    """Raise UserError, on all ranks, if one differs from rank 0 in what all must share for a step to be one."""
    first, *others = all_gather_object(facts)
    for number, other in enumerate(others, 1):
        for key in first:
            if other[key] != first[key]:
                raise UserError(
                    f"rank {number} on {HOSTNAMES[number]} has {key} {str(other[key])[:80]!r}, but rank 0 on {HOSTNAMES[0]} has "
                    f"{str(first[key])[:80]!r}: all ranks need the same command, data and output directory"
                )


def dist_end() -> None:
    """Part when all ranks are here: none ends before rank 0 has written its last checkpoint."""
    if dist.is_initialized():
        all_gather_object(None)
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def wrap_ddp(module: nn.Module) -> nn.Module:
    """`module` with gradients averaged over ranks. BN stays per rank; `broadcast_buffers` makes its
    statistics rank 0's.

    Parameters that a step does not use (the head, in the first epoch) keep no gradient, as when alone.
    """
    if world_size() == 1:
        return module
    ddp = nn.parallel.DistributedDataParallel
    new = "forward_sync_buffers" in inspect.signature(ddp).parameters  # what newer PyTorch calls it
    return ddp(
        module, find_unused_parameters=True, **{"forward_sync_buffers" if new else "broadcast_buffers": False}
    )


def sync_gradients(student: nn.Module, yes: bool) -> ContextManager[None]:
    """Whether a backward in this context ends with averaging the gradients over processes, those of earlier
    ones included.
    """
    return nullcontext() if yes or world_size() == 1 else student.no_sync()


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
    dist.all_gather_object(out, x, group=GLOO_GROUP)
    return out


def any_rank(yes: bool) -> bool:
    """Whether it is so on any rank; the same answer on all. It waits for no GPU."""
    if world_size() == 1:
        return yes
    answer = torch.tensor(int(yes))
    dist.all_reduce(answer, dist.ReduceOp.MAX, group=GLOO_GROUP)
    return bool(answer)


def sum_on_cpu(x: Tensor) -> Tensor:
    """Sum over ranks of a count, [...] on the CPU."""
    x = x.cpu()
    if world_size() > 1:
        dist.all_reduce(x, group=GLOO_GROUP)
    return x


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
    """Give every rank rank 0's buffers (BN statistics), in place, in one message for each type of number."""
    if world_size() == 1:
        return
    buffers = list(module.buffers())
    for dtype in sorted({buffer.dtype for buffer in buffers}, key=str):
        same = [buffer for buffer in buffers if buffer.dtype == dtype]
        flat = torch.cat([buffer.flatten() for buffer in same])
        dist.broadcast(flat, src=0)
        for buffer, values in zip(same, flat.split([buffer.numel() for buffer in same])):
            buffer.copy_(values.view_as(buffer))


class Shuffle:
    """One random regrouping of all ranks' rows, for shuffle-BN (MoCo, arXiv 1911.05722, section 3.3).

    `scatter` sends every row to the rank that the permutation gives it, each row traveling once; `gather`
    brings the results home, in the order in which the rows stood. One rank alone keeps its rows: its
    statistics are the same in any order.
    """

    def __init__(self, rows: int, groups: int, seed: int):
        """rows: of a rank, the same for all; groups: ranks that this process plays; seed: the same on all
        processes, another one for every step.
        """
        self.rows, self.alone = rows, world_size() * groups == 1
        if self.alone:
            return
        here = groups * rows  # rows of a process
        generator = torch.Generator().manual_seed(seed)
        slot = torch.randperm(
            world_size() * here, generator=generator
        )  # slot[i]: new place of global row i   [world·here]
        mine = slice(rank() * here, (rank() + 1) * here)
        home = torch.argsort(slot)[mine] // here  # where the rows of the new places stand [here]
        self.order = torch.argsort(slot[mine])  # own rows by new place                [here]
        self.sent = torch.bincount(
            slot[mine] // here, minlength=world_size()
        ).tolist()  # to each process    [world]
        self.received = torch.bincount(home, minlength=world_size()).tolist()  # from each          [world]
        self.arrival = torch.argsort(home, stable=True)  # new places in the order of arrival   [here]

    def scatter(self, groups: Sequence[Tensor]) -> Sequence[Tensor]:
        """[n, ...] of each rank that this process plays -> [n, ...] of the new groups in the same places."""
        if self.alone:
            return groups
        x = torch.cat(list(groups))  # [here, ...]
        return _inverse(
            self._exchange(x[self.order.to(x.device)], self.received, self.sent), self.arrival
        ).split(self.rows)

    def gather(self, groups: Sequence[Tensor]) -> Sequence[Tensor]:
        """[n, ...] of each new group -> [n, ...] of each rank's own rows."""
        if self.alone:
            return groups
        x = torch.cat(list(groups))  # [here, ...]
        return _inverse(
            self._exchange(x[self.arrival.to(x.device)], self.sent, self.received), self.order
        ).split(self.rows)

    @staticmethod
    def _exchange(x: Tensor, received: list[int], sent: list[int]) -> Tensor:
        if world_size() == 1:
            return x
        out = torch.empty_like(x)
        dist.all_to_all_single(out, x, received, sent)
        return out


def _inverse(x: Tensor, order: Tensor) -> Tensor:
    """y with y[order] = x, row by row."""
    out = torch.empty_like(x)
    out[order.to(x.device)] = x
    return out
