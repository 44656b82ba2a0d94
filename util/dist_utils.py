"""Ranks: the only file that talks to torch.distributed. Alone (world size 1) every function is the obvious identity."""
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from util.errors import UserError


def dist_init(device: str) -> torch.device:
    """Join the other ranks, if there are any, and choose this rank's device.

    device: auto, cpu or cuda. The ranks come from torchrun's environment variables; without them the process is alone.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: there is no usable GPU here; use cpu or auto")
    cuda = device != "cpu" and torch.cuda.is_available()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    if not cuda:
        return torch.device("cpu")
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cuda", torch.cuda.current_device())


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
    return nn.parallel.DistributedDataParallel(module, broadcast_buffers=False, find_unused_parameters=True)


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


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


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
