"""SimMatch in its single-network form, the paper's for CIFAR: the student is its own teacher."""

from typing import Any, Sequence

import torch
from torch import Tensor, nn

from models.ema import freeze_bn_stats
from models.method import Batch, at_least_fp32
from models.simmatch import SimMatch, StudentOutput, TeacherOutput


class SimMatchSingle(SimMatch):
    """One forward of the student on all views; what it gives for weak views, without gradient, stands for the
    teacher's.

    The teacher is an average for evaluation only, with the student's BN statistics.
    """

    def __init__(self, network: nn.Module, labels: Tensor, num_classes: int, dim: int, **settings: Any):
        """settings: SimMatch's, without `bn`."""
        super().__init__(network, labels, num_classes, dim, **settings, bn_mode="copy")

    def teacher_forward(self, batches: Sequence[Batch], student: nn.Module, step: int) -> list[TeacherOutput]:
        if len(batches) == 1:
            return [self.forward_once(batches[0], student)]
        # The prior needs all ranks' predictions before any loss: a second forward costs less than keeping all
        # graphs.
        with torch.no_grad(), freeze_bn_stats(self.student):
            return [self.forward_once(batch, self.student)._replace(student_output=None) for batch in batches]

    def student_forward(self, batch: Batch, student: nn.Module) -> StudentOutput:
        return self.forward_once(batch, student).student_output

    def forward_once(self, batch: Batch, student: nn.Module) -> TeacherOutput:
        sizes = len(batch.x), len(batch.u_weak), len(batch.u_strong)
        logits, z = map(
            at_least_fp32, student(torch.cat([batch.x, batch.u_weak, batch.u_strong]))
        )  # [B+2muB, C], [B+2muB, D]
        logits_x, logits_uw, logits_us = logits.split(sizes)  # [B, C], [muB, C], [muB, C]
        z_x, z_uw, z_us = z.split(sizes)  # [B, D], [muB, D], [muB, D]
        return TeacherOutput(
            z_x.detach(), logits_uw.detach(), z_uw.detach(), StudentOutput(logits_x, logits_us, z_us)
        )
