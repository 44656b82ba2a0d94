"""The contract between the training step (models/step.py) and every method."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models.ema import BNMode, Teacher
from models.network import Network


class Batch(NamedTuple):
    """What one rank sees in one step: B labeled images, and two views of each of mu·B unlabeled images."""

    # fmt: off
    x: Tensor           # weak views of the labeled images          [B, c, h, w], float
    y: Tensor           # their labels                              [B], int64
    index: Tensor       # type: ignore[assignment]  # their indices in the labeled list     [B], int64
    u_weak: Tensor      # weak views of the unlabeled images        [muB, c, h, w], float
    u_strong: Tensor    # strong views of the same images           [muB, c, h, w], float
    # fmt: on


class StepOutput(NamedTuple):
    """What a step leaves to `update` and to the log, without gradient. A method fills the fields it has."""

    # fmt: off
    z: Tensor | None = None             # embeddings of the labeled images, for the bank    [B, D]
    y: Tensor | None = None             # their labels                                      [B]
    index: Tensor | None = None         # type: ignore[assignment]  # their rows in the bank    [B]
    mean_p: Tensor | None = None        # mean of p over the global batch, for the prior    [C]
    pseudo_label: Tensor | None = None  # class probabilities                               [muB, C]
    mask: Tensor | None = None          # 1 where the pseudo-label is confident, else 0     [muB]
    # fmt: on


def at_least_fp32(x: Tensor) -> Tensor:
    """Cast bf16 and fp16 to float32: they are too coarse for probabilities summed over a thousand classes."""
    return x if x.dtype == torch.float64 else x.float()


class Method(nn.Module):
    """A student, its teacher, and the method's own state: its state_dict is all that a resume needs of it.

    A step calls `targets` once for all virtual ranks of the process, `losses` once for each of them, and
    `update` once. All communication needed before the loss happens in `targets`; `losses` is local, so
    virtual ranks run one at a time and need the memory of one.
    """

    def __init__(self, network: Network, ema_m: float, bn_mode: BNMode):
        super().__init__()
        self.student = network
        self.teacher = Teacher(network, ema_m, bn_mode)

    def targets(self, batches: Sequence[Batch], student: nn.Module, *, step: int) -> list[Any]:
        """Compute the targets of each batch, which `losses` compares the student with. Ranks may communicate.

        student: self.student or its DDP wrapper; gradients flow through this forward.
        step: the global step, from 0.
        """
        return [None] * len(batches)

    def losses(
        self, batch: Batch, targets: Any, student: nn.Module, *, bank_ready: bool
    ) -> tuple[dict[str, Tensor], StepOutput]:
        """Return the weighted loss terms by name, whose sum is the loss, and what `update` needs.

        It does not write the bank, the prior or the teacher.
        bank_ready: whether every labeled image was seen before this epoch began; False in the first epoch.
        """
        raise NotImplementedError

    def diagnostics(self, batch: Batch, targets: Any, *, bank_ready: bool) -> dict[str, Tensor]:
        """Return the method's own health indicators for the diagnostics event (docs/DOCTOR.md)."""
        return {}

    def update(self, output: StepOutput) -> None:
        """Write bank, prior and teacher. `train_step` calls it once, after the optimizer step.

        output: the outputs of all virtual ranks of this process, concatenated.
        """
        self.teacher.update(self.student)
