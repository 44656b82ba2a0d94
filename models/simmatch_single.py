"""SimMatch in its single-network form, which the paper uses for CIFAR: the student is its own teacher."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from models.ema import freeze_bn_stats
from models.method import Batch, forward_views
from models.network import Network
from models.simmatch import SimMatch, StudentOutput, TeacherOutput

# util/fields.py reads these literals from the source.
USES = ("lambda_u", "lambda_in", "threshold", "st", "tt", "c_smooth", "DA", "da_len", "bank_m", "ema_m")
RULES = "simmatch"


class SimMatchSingle(SimMatch):
    """The student runs on all views at once; its outputs on weak views, detached, replace the teacher's.

    The EMA teacher serves for evaluation only, with the student's BN statistics.
    """

    def __init__(self, network: Network, labels: Tensor, num_classes: int, dim: int, **settings: Any):
        """settings: SimMatch's, without `bn_mode`."""
        super().__init__(network, labels, num_classes, dim, **settings, bn_mode="copy")

    def teacher_forward(self, batches: Sequence[Batch], student: nn.Module, step: int) -> list[TeacherOutput]:
        if len(batches) == 1:
            return [self.joint_forward(batches[0], student)[1]]
        # The prior needs the predictions of all virtual ranks before any loss. A second forward, in
        # student_forward, takes less memory than keeping the graphs of all of them.
        with torch.no_grad(), freeze_bn_stats(self.student):
            first_views = [batch._replace(u_strong=batch.u_strong[:1]) for batch in batches]
            outputs = [self.joint_forward(batch, self.student)[1] for batch in first_views]
        return [output._replace(student_output=None) for output in outputs]

    def student_forward(self, batch: Batch, student: nn.Module) -> StudentOutput:
        return self.joint_forward(batch, student)[0]

    def joint_forward(self, batch: Batch, student: nn.Module) -> tuple[StudentOutput, TeacherOutput]:
        """Run the student on the labeled images and all views. The teacher's part is detached."""
        first, *others = batch.u_strong
        sizes = len(batch.x), len(batch.u_weak), len(first) * len(batch.u_strong)
        joint = [batch.x, batch.u_weak, first]
        logits, z = forward_views(student, joint, others)  # [B+muB+V·muB, C], [B+muB+V·muB, D]
        logits_x, logits_uw, logits_us = logits.split(sizes)  # [B, C], [muB, C], [V·muB, C]
        z_x, z_uw, z_us = z.split(sizes)  # [B, D], [muB, D], [V·muB, D]
        student_output = StudentOutput(logits_x, logits_us, z_us)
        return student_output, TeacherOutput(z_x.detach(), logits_uw.detach(), z_uw.detach(), student_output)
