"""FixMatch (arXiv 2001.07685) and, with an EMAN teacher, FixMatch-EMAN (arXiv 2101.08482)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.method import Batch, Method, StepOutput, at_least_fp32
from models.network import Network

# util/declarations.py reads these literals from the source.
USES = ("lambda_u", "threshold", "eman", "ema_m")


class FixMatch(Method):
    """Hard pseudo-labels from weak views are the targets of strong views wherever they are confident.

    eman=False: the student labels the weak views, in the same forward; its teacher serves for evaluation
    only. eman=True: the teacher labels them.
    """

    def __init__(self, network: Network, *, lambda_u: float, threshold: float, ema_m: float, eman: bool):
        # FixMatch has no shuffle-BN: BN statistics are always averaged.
        super().__init__(network, ema_m, "average")
        self.lambda_u, self.threshold, self.teacher_labels = lambda_u, threshold, eman

    def targets(self, batches: Sequence[Batch], student: nn.Module, *, step: int) -> list[Tensor | None]:
        """Return the teacher's logits' [muB, C] per batch, or None if the student labels the weak views."""
        if not self.teacher_labels:
            return [None] * len(batches)
        return [logits for logits, _ in self.teacher([batch.u_weak for batch in batches], step)]

    # fmt: off
    def losses(
        self, batch: Batch, targets: Tensor | None, student: nn.Module, *, bank_ready: bool
    ) -> tuple[dict[str, Tensor], StepOutput]:
        n_x, n_u = len(batch.x), len(batch.u_weak)
        if targets is not None:
            logits, _ = student(torch.cat([batch.x, batch.u_strong]))                   # [B+muB, C]
            logits_uw = targets                                                         # [muB, C]
        else:
            logits, _ = student(torch.cat([batch.x, batch.u_strong, batch.u_weak]))     # [B+2muB, C]
            logits_uw = logits[n_x + n_u:].detach()                                     # [muB, C]
        logits_x = at_least_fp32(logits[:n_x])                                          # [B, C]
        logits_us = at_least_fp32(logits[n_x:n_x + n_u])                                # [muB, C]

        p = torch.softmax(at_least_fp32(logits_uw), dim=1)                              # [muB, C]
        confidence, label = p.max(dim=1)                                                # [muB], [muB]
        mask = (confidence >= self.threshold).to(p.dtype)                               # [muB]
        loss_u = (mask * F.cross_entropy(logits_us, label, reduction="none")).mean()
        losses = {"loss_x": F.cross_entropy(logits_x, batch.y), "loss_u": self.lambda_u * loss_u}
        return losses, StepOutput(pseudo_label=p, mask=mask)
    # fmt: on
