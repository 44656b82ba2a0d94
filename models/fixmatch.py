"""FixMatch (arXiv 2001.07685) and, with an EMAN teacher, FixMatch-EMAN (arXiv 2101.08482)."""

from typing import Optional, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.method import Batch, Method, StepOutput, at_least_fp32


class FixMatch(Method):
    """Hard pseudo-labels from weak views, learned on strong views where they are confident.

    eman=False: the student itself labels the weak views, in the same forward; its teacher is for evaluation
    only. eman=True: the teacher labels them.
    """

    def __init__(self, network: nn.Module, *, lambda_u: float, threshold: float, ema_m: float, eman: bool):
        super().__init__(
            network, ema_m, "average"
        )  # no shuffle-BN here: a teacher always averages BN statistics
        self.lambda_u, self.threshold, self.teacher_labels = lambda_u, threshold, eman

    def targets(self, batches: Sequence[Batch], student: nn.Module, *, step: int) -> list[Optional[Tensor]]:
        """The teacher's logits' of each batch [muB, C]; None where the student's own serve."""
        if not self.teacher_labels:
            return [None] * len(batches)
        return [logits for logits, _ in self.teacher([batch.u_weak for batch in batches], step)]

    def losses(
        self, batch: Batch, targets: Optional[Tensor], student: nn.Module, *, bank_ready: bool
    ) -> tuple[dict[str, Tensor], StepOutput]:
        n_x, n_u = len(batch.x), len(batch.u_weak)
        if targets is not None:
            logits, _ = student(torch.cat([batch.x, batch.u_strong]))  # [B+muB, C]
            logits_uw = targets  # [muB, C]
        else:
            logits, _ = student(torch.cat([batch.x, batch.u_strong, batch.u_weak]))  # [B+2muB, C]
            logits_uw = logits[n_x + n_u :].detach()  # [muB, C]
        logits_x, logits_us = (
            at_least_fp32(logits[:n_x]),
            at_least_fp32(logits[n_x : n_x + n_u]),
        )  # [B, C], [muB, C]

        p = torch.softmax(at_least_fp32(logits_uw), dim=1)  # [muB, C]
        confidence, label = p.max(dim=1)  # [muB], [muB]
        mask = (confidence >= self.threshold).to(p.dtype)  # [muB]
        loss_u = (mask * F.cross_entropy(logits_us, label, reduction="none")).mean()
        terms = {"loss_x": F.cross_entropy(logits_x, batch.y), "loss_u": self.lambda_u * loss_u}
        return terms, StepOutput(pseudo_label=p, mask=mask)
