"""The supervised baseline: it has the loss of the labeled images alone."""

import torch.nn.functional as F
from torch import Tensor, nn

from models.method import Batch, Method, StepOutput, at_least_fp32
from models.network import Network

# util/declarations.py reads these literals from the source.
USES = ("ema_m",)


class Supervised(Method):
    """Cross-entropy on the labeled images; the teacher serves for evaluation only."""

    def __init__(self, network: Network, *, ema_m: float):
        super().__init__(network, ema_m, "average")

    def losses(
        self, batch: Batch, targets: None, student: nn.Module, *, bank_ready: bool
    ) -> tuple[dict[str, Tensor], StepOutput]:
        logits, _ = student(batch.x)  # [B, C]
        return {"loss_x": F.cross_entropy(at_least_fp32(logits), batch.y)}, StepOutput()
