"""The supervised baseline: it has the loss of the labeled images alone."""

import torch.nn.functional as F
from torch import nn

from models.method import Batch, Method, StepOutput, at_least_fp32
from models.network import Network
from models.simmatch import SimMatch

# util/fields.py reads these literals from the source.
USES = ("ema_m",)


class Supervised(Method):
    """Cross-entropy on the labeled images; the teacher serves for evaluation only.

    Its log has the columns of SimMatch, so that both can be read as one table.
    """

    loss_names, diagnostic_names = SimMatch.loss_names, SimMatch.diagnostic_names

    def __init__(self, network: Network, *, ema_m: float):
        super().__init__(network, ema_m, "average")

    def check_views(self, weak: int, *strong: int) -> None:
        """It uses no strong view."""

    def losses(self, batch: Batch, targets: None, student: nn.Module, *, bank_ready: bool) -> StepOutput:
        logits, _ = student(batch.x)  # [B, C]
        return StepOutput({"loss_x": F.cross_entropy(at_least_fp32(logits), batch.y)})
