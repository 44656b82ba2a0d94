"""The only file that calls torch.distributed. With one process no function communicates."""

import atexit
import inspect
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from util.device import copy_async
from util.errors import UserError
from util.rendezvous import find_rendezvous

T = TypeVar("T")
# Two groups: the default one for tensors (NCCL between GPUs), and gloo for control messages, whose timeout
# lets us name the lost rank.
GLOO_GROUP: Any = None
STORE: dist.Store | None = None  # the key-value store of the rendezvous, on rank 0
HOSTNAMES: list[str] = []  # by rank
# Seconds that the ranks which lost another one wait for each other's key in the store; dist_init raises them.
LIVENESS_SECONDS = 10.0
liveness_window = LIVENESS_SECONDS


def dist_init(device: str, timeout_minutes: float, port: int) -> torch.device:
    """Join the other ranks, if there are any, and choose this rank's device.

    device: auto, cpu or cuda. timeout_minutes: how long a rank waits for another one, now and in any step.
    port: see util/rendezvous.py. Raises UserError if there is no such device, or if the ranks do not meet.
    """
    global GLOO_GROUP, STORE, liveness_window
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: there is no usable GPU here; use cpu or auto")
    cuda = device != "cpu" and torch.cuda.is_available()
    rendezvous = find_rendezvous(os.environ, port)
    if cuda:
        # Where a scheduler shows each task only its own GPU, that GPU has index 0.
        torch.cuda.set_device(rendezvous.local_rank if torch.cuda.device_count() > 1 else 0)
    if rendezvous.world > 1 and not dist.is_initialized():
        timeout = timedelta(minutes=timeout_minutes)
        if rendezvous.world > 2:
            # A rank that waits for another survivor notices the loss only at its own timeout.
            liveness_window = LIVENESS_SECONDS + min(timeout.total_seconds(), 30)
        # torchrun runs a store of its own; otherwise rank 0 does.
        runs_store = rendezvous.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        try:
            STORE = dist.TCPStore(rendezvous.host, rendezvous.port, rendezvous.world, runs_store, timeout)
            dist.init_process_group(
                "nccl" if cuda else "gloo",
                store=dist.PrefixStore("group", STORE),
                rank=rendezvous.rank,
                world_size=rendezvous.world,
                # NCCL's timeout ends the process without naming the lost rank, so gloo's must come first.
                timeout=2 * timeout if cuda else timeout,
            )
            GLOO_GROUP = dist.new_group(backend="gloo", timeout=timeout)
            atexit.register(_close_groups)
            HOSTNAMES[:] = all_gather_object(socket.gethostname())
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"rank {rendezvous.rank} of {rendezvous.world}, on {socket.gethostname()}, did not meet the "
                f"others at {rendezvous.host}:{rendezvous.port} within {timeout_minutes:g} minutes "
                f"({str(error).splitlines()[0][:200]}): look for the rank that ended or never started, and "
                "whether that port is open between the nodes"
            ) from None
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")


def _close_groups() -> None:
    """Destroy the process groups, and end gloo's threads with them.

    A thread of gloo that frees a tensor while Python exits aborts the process, even after a finished run. It
    ends when the last reference to its group is gone. NCCL's group is left to the exit after an error,
    because destroying it may wait for a lost rank.
    """
    global GLOO_GROUP
    if dist.is_initialized():
        dist.destroy_process_group(GLOO_GROUP if dist.get_backend() == "nccl" else None)
    GLOO_GROUP = None


def describe_lost_ranks(error: RuntimeError) -> str | None:
    """Return a line that names the lost ranks if `error` says that communication with other ranks failed,
    else None.
    """
    text = str(error)
    markers = ("gloo", "NCCL", "Connection closed", "Connection reset", "Timed out", "pair closure")
    if STORE is None or not any(marker in text for marker in markers):
        return None
    this_rank = f"rank {rank()} on {HOSTNAMES[rank()]}"
    missing = [0]  # the store runs beside or in rank 0: if it does not answer, rank 0 is the lost one
    check = threading.Thread(target=_find_missing_ranks, args=(STORE, missing), daemon=True)
    check.start()
    check.join(liveness_window + 5)
    if not missing:
        return (
            f"{this_rank} lost the connection to the other ranks, which are still alive "
            f"({text.splitlines()[0][:200]}): check the network between them"
        )
    lost = ", ".join(f"rank {r} on {HOSTNAMES[r]}" for r in missing)
    return (
        f"{this_rank} timed out waiting for {lost}, which hangs or has ended: look at its last output and at "
        "its machine. The same command continues from the last checkpoint"
    )


def _find_missing_ranks(store: dist.Store, missing: list[int]) -> None:
    """Set `missing` to the ranks that do not set their key in the store within `liveness_window` seconds."""
    end, silent = time.monotonic() + liveness_window, list(range(world_size()))
    with suppress(RuntimeError):  # raised if the store has ended; `missing` then keeps its last value
        store.set(f"lives/{rank()}", "")
        while silent and time.monotonic() < end:
            silent = [r for r in silent if not store.check([f"lives/{r}"])]
            missing[:] = silent
            time.sleep(0.1)
        if rank() == 0:
            time.sleep(3)  # the store ends with this process, and the other ranks may still be reading it


def check_same_on_all_ranks(facts: dict[str, Any]) -> None:
    """Raise UserError, on all ranks, if any rank differs from rank 0 in one of `facts`."""
    first, *others = all_gather_object(facts)
    for number, other in enumerate(others, 1):
        for key in first:
            if other[key] != first[key]:
                raise UserError(
                    f"rank {number} on {HOSTNAMES[number]} has {key} {str(other[key])[:80]!r}, but rank 0 on "
                    f"{HOSTNAMES[0]} has {str(first[key])[:80]!r}: all ranks need the same command, data and "
                    "output directory"
                )


def dist_end() -> None:
    """Barrier, then destroy the process group: no rank ends before rank 0 has written its last checkpoint."""
    if dist.is_initialized():
        all_gather_object(None)
        _close_groups()
        if dist.is_initialized():  # NCCL's
            dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def wrap_ddp(module: nn.Module) -> nn.Module:
    """Wrap `module` in DDP, which averages gradients over ranks. BN statistics stay per rank.

    Parameters that a step does not use (the head, in the first epoch) get no gradient, as with one process.
    """
    if world_size() == 1:
        return module
    ddp = nn.parallel.DistributedDataParallel
    # Newer PyTorch has another name for the argument.
    renamed = "forward_sync_buffers" in inspect.signature(ddp).parameters
    no_buffers: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    return ddp(module, find_unused_parameters=True, **no_buffers)


def sync_gradients(student: nn.Module, enabled: bool) -> AbstractContextManager[None]:
    """Return a context for a backward, which averages the accumulated gradients over processes if enabled."""
    if enabled or not isinstance(student, nn.parallel.DistributedDataParallel):
        return nullcontext()
    return student.no_sync()


def all_gather(x: Tensor) -> Tensor:
    """Concatenate x [n, ...] of all ranks -> [world·n, ...], in rank order, on every rank. No gradient."""
    if world_size() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def all_gather_object(x: Any) -> list[Any]:
    """Collect a small Python object of every rank -> a list in rank order, on every rank."""
    if world_size() == 1:
        return [x]
    out = [None] * world_size()
    dist.all_gather_object(out, x, group=GLOO_GROUP)
    return out


def any_rank(condition: bool) -> bool:
    """Return, on all ranks, whether `condition` holds on any. It does not synchronize with the GPU."""
    if world_size() == 1:
        return condition
    answer = torch.tensor(int(condition))
    dist.all_reduce(answer, dist.ReduceOp.MAX, group=GLOO_GROUP)
    return bool(answer)


def sum_on_cpu(x: Tensor) -> Tensor:
    """Sum `x` over ranks, same shape, on the CPU. A tensor that is already there is changed in place."""
    x = x.cpu()
    if world_size() > 1:
        dist.all_reduce(x, group=GLOO_GROUP)
    return x


def on_rank_0(call: Callable[[], T]) -> T | None:
    """Return `call()` on rank 0 and None on the others. A UserError that it raises is raised on all ranks."""
    result, message = None, None
    if rank() == 0:
        try:
            result = call()
        except UserError as error:
            message = str(error)
    message = all_gather_object(message)[0]
    if message is not None:
        raise UserError(message)
    return result


def from_rank_0(condition: bool) -> bool:
    """Return rank 0's `condition` on every rank."""
    return all_gather_object(condition)[0]


def all_mean(x: Tensor) -> Tensor:
    """Average `x` over ranks, same shape. No gradient."""
    return all_sum(x) / world_size()


def all_sum(x: Tensor) -> Tensor:
    """Sum `x` over ranks, same shape. No gradient."""
    if world_size() == 1:
        return x
    x = x.clone()
    dist.all_reduce(x)
    return x


def broadcast_buffers(module: nn.Module) -> None:
    """Copy rank 0's buffers (BN statistics) to every rank, in place, in one message for each dtype."""
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
    """A random permutation of the global batch for shuffle-BN (MoCo, arXiv 1911.05722, section 3.3).

    `scatter` sends every row to the virtual rank that the permutation assigns it to, each row once; `gather`
    returns the results to the rows' own ranks, in their original order. With a single rank in all, both are
    the identity, because BN's batch statistics do not depend on the order of the rows.
    """

    def __init__(self, rows: int, virtual_ranks: int, seed: int, device: torch.device):
        """rows: per virtual rank, the same on all. virtual_ranks: of this process.

        seed: the same on all processes, and another one in every step. device: of the rows.
        """
        self.rows, self.is_identity = rows, world_size() * virtual_ranks == 1
        if self.is_identity:
            return
        # Row i of the global batch moves to slot[i]; a process holds n = virtual_ranks · rows rows and slots.
        n = virtual_ranks * rows
        generator = torch.Generator().manual_seed(seed)
        slot = torch.randperm(world_size() * n, generator=generator)  # [world·n]
        own = slice(rank() * n, (rank() + 1) * n)
        source = torch.argsort(slot)[own] // n  # the process that each own slot's row comes from [n]
        send_order = torch.argsort(slot[own])  # own rows in the order of their slots [n]
        receive_order = torch.argsort(source, stable=True)  # own slots in the order of arrival [n]
        self.send_order, self.receive_order = copy_async(torch.stack([send_order, receive_order]), device)
        self.sent = torch.bincount(slot[own] // n, minlength=world_size()).tolist()  # rows to each process
        self.received = torch.bincount(source, minlength=world_size()).tolist()  # rows from each process

    def scatter(self, batches: Sequence[Tensor]) -> Sequence[Tensor]:
        """[rows, ...] of each virtual rank of this process -> [rows, ...] of each after the permutation."""
        if self.is_identity:
            return batches
        x = torch.cat(list(batches))  # [n, ...]
        x = self._exchange(x[self.send_order], self.received, self.sent)  # [n, ...]
        return _undo_order(x, self.receive_order).split(self.rows)

    def gather(self, batches: Sequence[Tensor]) -> Sequence[Tensor]:
        """Undo `scatter`: [rows, ...] of each virtual rank -> [rows, ...] of each, in the original order."""
        if self.is_identity:
            return batches
        x = torch.cat(list(batches))  # [n, ...]
        x = self._exchange(x[self.receive_order], self.sent, self.received)  # [n, ...]
        return _undo_order(x, self.send_order).split(self.rows)

    @staticmethod
    def _exchange(x: Tensor, received: list[int], sent: list[int]) -> Tensor:
        if world_size() == 1:
            return x
        out = torch.empty_like(x)
        dist.all_to_all_single(out, x, received, sent)
        return out


def _undo_order(x: Tensor, order: Tensor) -> Tensor:
    """Return y with y[order] = x, row by row."""
    out = torch.empty_like(x)
    out[order] = x
    return out
