"""The contract between the one step (models/step.py) and every method."""

from typing import Any, NamedTuple, Optional, Sequence

import torch
from torch import Tensor, nn

from models.ema import BNMode, Teacher


class Batch(NamedTuple):
    """What one rank sees in one step: B labeled images, and two views of mu·B unlabeled ones."""

    # fmt: off
    x: Tensor           # weak views of labeled images             [B, c, h, w], float
    y: Tensor           # their labels                              [B], int64
    index: Tensor       # their places in the labeled list         [B], int64
    u_weak: Tensor      # weak views of unlabeled images           [muB, c, h, w], float
    u_strong: Tensor    # strong views of the same images           [muB, c, h, w], float
    # fmt: on


class StepOutput(NamedTuple):
    """What a step computed that `update` writes and the log reads; no gradient. A method fills what it has."""

    # fmt: off
    z: Optional[Tensor] = None          # embedding of the labeled images, for the bank  [B, D]
    y: Optional[Tensor] = None          # their labels                                  [B]
    index: Optional[Tensor] = None      # their rows in the bank                        [B]
    prior: Optional[Tensor] = None      # mean of p over the global batch               [C]
    pseudo_label: Optional[Tensor] = None     # pseudo-labels                                 [muB, C]
    mask: Optional[Tensor] = None       # 1 where a pseudo-label is confident, else 0   [muB]
    # fmt: on


def at_least_fp32(x: Tensor) -> Tensor:
    """`x` in float32 at least: probabilities are summed over a thousand classes, for which bf16 and fp16 are
    too coarse.
    """
    return x if x.dtype == torch.float64 else x.float()


class Method(nn.Module):
    """A student, its teacher, and what a method keeps besides. One state_dict is the whole truth.

    A step is one call of `targets` for all ranks that this process plays, one of `losses` for each of them,
    and one of
    `update`. Between the first two lies all that ranks have to tell each other before there is a loss, so
    that the student's forward and backward run for one rank at a time, and need the memory of one.
    """

    def __init__(self, network: nn.Module, ema_m: float, bn_mode: BNMode):
        super().__init__()
        self.student = network
        self.teacher = Teacher(network, ema_m, bn_mode)

    def targets(self, batches: Sequence[Batch], student: nn.Module, *, step: int) -> list[Any]:
        """What the weak views of each batch say, for `losses` of the same batch.

        student: self.student, or its data-parallel wrapper: the forward that gradients flow through.
        step: from 0, over the whole training.
        """
        return [None] * len(batches)

    def losses(
        self, batch: Batch, targets: Any, student: nn.Module, *, bank_ready: bool
    ) -> tuple[dict[str, Tensor], StepOutput]:
        """Named, weighted terms whose sum is the loss, and what `update` needs. Writes no bank, prior or
        teacher.

        bank_ready: False in the first epoch, which shows every labeled image.
        """
        raise NotImplementedError

    def diagnostics(self, batch: Batch, targets: Any, *, bank_ready: bool) -> dict[str, Tensor]:
        """What only this method can tell of its health, for the diagnostics (docs/DOCTOR.md). Changes
        nothing.
        """
        return {}

    def update(self, output: StepOutput) -> None:
        """The one writer, called once after the optimizer step. fresh: of all ranks that this process plays."""
        self.teacher.update(self.student)
