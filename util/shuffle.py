"""Shuffle-BN over all virtual ranks."""

from collections.abc import Sequence

import torch
from torch import Tensor

from util.device import copy_async
from util.dist_utils import exchange, rank, world_size


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
        x = exchange(x[self.send_order], self.received, self.sent)  # [n, ...]
        return torch.empty_like(x).index_copy_(0, self.receive_order, x).split(self.rows)

    def gather(self, batches: Sequence[Tensor]) -> Sequence[Tensor]:
        """Undo `scatter`: [rows, ...] of each virtual rank -> [rows, ...] of each, in the original order."""
        if self.is_identity:
            return batches
        x = torch.cat(list(batches))  # [n, ...]
        x = exchange(x[self.receive_order], self.sent, self.received)  # [n, ...]
        return torch.empty_like(x).index_copy_(0, self.send_order, x).split(self.rows)
