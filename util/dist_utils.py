"""What the ranks compute together. With one process no function communicates."""

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from util import process_groups
from util.errors import UserError
from util.process_groups import (
    HOSTNAMES,
    all_gather_object,
    begin_collective,
    begin_phase,
    describe_lost_ranks,
    dist_end,
    dist_init,
    rank,
    world_size,
)

__all__ = ["HOSTNAMES", "all_gather_object", "begin_phase", "describe_lost_ranks", "dist_end", "dist_init"]
T = TypeVar("T")


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
    # Without find_unused_parameters, DDP would change its buckets after the first step of a start, and so the
    # order in which it adds three gradients or more: a resumed run would not have the same bits.
    return ddp(module, find_unused_parameters=True, **no_buffers)


def sync_gradients(student: nn.Module, enabled: bool) -> AbstractContextManager[None]:
    """Return a context for a backward, which averages the accumulated gradients over processes if enabled."""
    begin_collective()
    if enabled or not isinstance(student, nn.parallel.DistributedDataParallel):
        return nullcontext()
    return student.no_sync()


def all_gather(x: Tensor) -> Tensor:
    """Concatenate x [n, ...] of all ranks -> [world·n, ...], in rank order, on every rank. No gradient."""
    if not begin_collective():
        return x
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def any_rank(condition: bool) -> bool:
    """Return, on all ranks, whether `condition` holds on any. It does not synchronize with the GPU."""
    if not begin_collective():
        return condition
    answer = torch.tensor(int(condition))
    dist.all_reduce(answer, dist.ReduceOp.MAX, group=process_groups.GLOO_GROUP)
    return bool(answer)


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


def all_mean(x: Tensor) -> Tensor:
    """Average `x` over ranks, same shape. No gradient."""
    return all_sum(x) / world_size()


def all_sum(x: Tensor) -> Tensor:
    """Sum `x` over ranks, same shape. No gradient."""
    if not begin_collective():
        return x
    x = x.clone()
    dist.all_reduce(x)
    return x


def broadcast_buffers(module: nn.Module) -> None:
    """Copy rank 0's buffers (BN statistics) to every rank, in place, in one message for each dtype."""
    if not begin_collective():
        return
    buffers = list(module.buffers())
    for dtype in sorted({buffer.dtype for buffer in buffers}, key=str):
        same = [buffer for buffer in buffers if buffer.dtype == dtype]
        flat = torch.cat([buffer.flatten() for buffer in same])
        dist.broadcast(flat, src=0)
        for buffer, values in zip(same, flat.split([buffer.numel() for buffer in same])):
            buffer.copy_(values.view_as(buffer))


def exchange(x: Tensor, received: list[int], sent: list[int]) -> Tensor:
    """Send the first sent[0] rows of `x` to rank 0, the next sent[1] to rank 1, and so on, and return the
    received[r] rows of each rank r, in rank order: as many rows in all.
    """
    if world_size() == 1:
        return x
    out = torch.empty_like(x)
    dist.all_to_all_single(out, x, received, sent)
    return out
