"""SimMatch in its single-network form, the paper's for CIFAR: the student is its own teacher."""

from typing import Any, Sequence

import torch
from torch import Tensor, nn

from models.ema import no_statistics
from models.method import Batch, precise
from models.simmatch import Learnt, SimMatch, Taught


class SimMatchSingle(SimMatch):
    """One forward of the student on all views; what it gives for weak views, without gradient, stands for the
    teacher's.

    The teacher is an average for evaluation only, with the student's BN statistics.
    """

    def __init__(self, network: nn.Module, labels: Tensor, num_classes: int, dim: int, **settings: Any):
        """settings: SimMatch's, without `bn`."""
        super().__init__(network, labels, num_classes, dim, **settings, bn="copy")

    def teach(self, batches: Sequence[Batch], student: nn.Module, step: int) -> list[Taught]:
        if len(batches) == 1:
            return [self.forward_once(batches[0], student)]
        # The prior needs all ranks' predictions before any loss: a second forward costs less than keeping all
        # graphs.
        with torch.no_grad(), no_statistics(self.student):
            return [self.forward_once(batch, self.student)._replace(learnt=None) for batch in batches]

    def learn(self, batch: Batch, student: nn.Module) -> Learnt:
        return self.forward_once(batch, student).learnt

    def forward_once(self, batch: Batch, student: nn.Module) -> Taught:
        sizes = len(batch.x), len(batch.u_weak), len(batch.u_strong)
        logits, z = map(
            precise, student(torch.cat([batch.x, batch.u_weak, batch.u_strong]))
        )  # [B+2muB, C], [B+2muB, D]
        logits_x, logits_uw, logits_us = logits.split(sizes)  # [B, C], [muB, C], [muB, C]
        z_x, z_uw, z_us = z.split(sizes)  # [B, D], [muB, D], [muB, D]
        return Taught(z_x.detach(), logits_uw.detach(), z_uw.detach(), Learnt(logits_x, logits_us, z_us))
