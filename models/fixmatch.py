"""FixMatch (arXiv 2001.07685) and, with an EMAN teacher, FixMatch-EMAN (arXiv 2101.08482)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.method import Batch, Method, StepOutput, at_least_fp32, forward_views
from models.network import Network
from models.simmatch import SimMatch

# util/fields.py reads these literals from the source.
USES = ("lambda_u", "threshold", "eman", "ema_m")


class FixMatch(Method):
    """Hard pseudo-labels from weak views are the targets of strong views wherever they are confident.

    eman=False: the student labels the weak views, in the same forward; its teacher serves for evaluation
    only. eman=True: the teacher labels them. The loss of the strong views is the mean over them.
    The log has the columns of SimMatch, so that both can be read as one table.
    """

    loss_names, diagnostic_names = SimMatch.loss_names, SimMatch.diagnostic_names

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
    ) -> StepOutput:
        n_u, views, (first, *others) = len(batch.u_weak), len(batch.u_strong), batch.u_strong   # views: V
        weak = [batch.u_weak] if targets is None else []
        logits, _ = forward_views(student, [batch.x, first, *weak], others)
        sizes = len(batch.x), n_u, n_u * len(weak), n_u * len(others)
        logits_x, logits_us, logits_uw, logits_others = logits.split(sizes)             # [B, C], [muB, C] …
        logits_us = torch.cat([logits_us, logits_others])                               # [V·muB, C]
        logits_uw = logits_uw.detach() if targets is None else targets                  # [muB, C]

        p = torch.softmax(at_least_fp32(logits_uw), dim=1)                              # [muB, C]
        confidence, label = p.max(dim=1)                                                # [muB], [muB]
        mask = (confidence >= self.threshold).to(p.dtype)                               # [muB]
        loss_u = mask.repeat(views) * F.cross_entropy(logits_us, label.repeat(views), reduction="none")
        losses = {"loss_x": F.cross_entropy(logits_x, batch.y), "loss_u": self.lambda_u * loss_u.mean()}
        return StepOutput(losses, p, mask)
    # fmt: on
