"""The contract between the training step (models/step.py) and every method."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from models.ema import BNMode, Teacher
from models.network import Network


class Batch(NamedTuple):
    """What one rank sees in one step: B labeled images, and views of each of mu·B unlabeled images."""

    # fmt: off
    x: Tensor           # weak views of the labeled images          [B, c, h, w], float
    y: Tensor           # their labels                              [B], int64
    index: Tensor       # type: ignore[assignment]  # their indices in the labeled list     [B], int64
    u_weak: Tensor      # weak views of the unlabeled images        [muB, c, h, w], float
    u_strong: tuple[Tensor, ...]    # strong views of the same images, each of its own size     [muB, c, h, w]
    # fmt: on


class StepOutput(NamedTuple):
    """What `losses` returns. Only the losses have a gradient.

    losses: the weighted terms, whose sum is the loss. Their names are "loss_NAME"; a step may leave one out.
    The setting of the weight, if there is one, is lambda_NAME. for_update: what the method's own `update`
    needs, each tensor with a row for each image, or with a single row. Those of virtual ranks are
    concatenated.
    """

    # fmt: off
    losses: dict[str, Tensor]
    pseudo_label: Tensor | None = None  # class probabilities                               [muB, C]
    mask: Tensor | None = None          # 1 where the pseudo-label is confident, else 0     [muB]
    for_update: dict[str, Tensor] = {}
    skipped: Tensor | None = None   # from train_step in fp16: 1 if the weights stay unchanged, else 0
    # fmt: on


def at_least_fp32(x: Tensor) -> Tensor:
    """Cast bf16 and fp16 to float32: they are too coarse for probabilities summed over a thousand classes."""
    return x if x.dtype == torch.float64 else x.float()


def forward_views(
    network: Callable[[Tensor], tuple[Tensor, Tensor]], joint: Sequence[Tensor], others: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Run one forward on all images of `joint`, which have one size, and one on each of `others`.

    Return logits [n, C] and z [n, D] of all images, in this order, in float32 or float64.
    """
    outputs = [network(torch.cat([*joint])), *map(network, others)]
    logits, z = (at_least_fp32(torch.cat(part)) for part in zip(*outputs))
    return logits, z


class Method(nn.Module):
    """A student, its teacher, and the method's own state: its state_dict is all that a resume needs of it.

    A step calls `targets` once for all virtual ranks of the process, `losses` once for each of them, and
    `update` once. All communication needed before the loss happens in `targets`; `losses` is local, so
    virtual ranks run one at a time and need the memory of one.

    loss_names, diagnostic_names: columns of the train and of the diagnostics event that are always in the
    log, in this order, with null where a step has no value. What the method returns besides follows them.
    """

    loss_names: ClassVar[tuple[str, ...]] = ()
    diagnostic_names: ClassVar[tuple[str, ...]] = ()

    def __init__(self, network: Network, ema_m: float, bn_mode: BNMode):
        super().__init__()
        self.student = network
        self.teacher = Teacher(network, ema_m, bn_mode)

    def check_views(self, weak: int, *strong: int) -> None:
        """Raise ValueError if the method cannot use views with these sides in pixels.

        Here: unless the first strong view has the size of the weak one, for methods that run both in one
        forward.
        """
        if strong[0] != weak:
            raise ValueError(
                f"the weak view has a side of {weak} pixels, and the first strong view of {strong[0]}: name "
                "a strong view of the weak view's size first in --strong"
            )

    def fit_state(self, values: dict[str, Tensor]) -> str:
        """Change a saved state_dict so that it can be loaded, where a buffer has a shape that depends on more
        than the network and the labeled list. Return a line that says what is lost, or "".
        """
        return ""

    def targets(self, batches: Sequence[Batch], student: nn.Module, *, step: int) -> list[Any]:
        """Compute the targets of each batch, which `losses` compares the student with. Ranks may communicate.

        student: self.student or its DDP wrapper; gradients flow through this forward.
        step: the global step, from 0.
        """
        return [None] * len(batches)

    def losses(self, batch: Batch, targets: Any, student: nn.Module, *, bank_ready: bool) -> StepOutput:
        """Compute the loss terms of one virtual rank. It does not write the bank, the prior or the teacher.

        bank_ready: whether every labeled image was seen before this epoch began; False in the first epoch.
        """
        raise NotImplementedError

    def diagnostics(self, batch: Batch, targets: Any, *, bank_ready: bool) -> dict[str, Tensor]:
        """Return the method's own health indicators for the diagnostics event (docs/DOCTOR.md).

        Each is a number, of which the log has the mean over ranks, or a distribution over the classes [C],
        here `name`, of which the log has the KL divergence from that of the labeled images, as `name_kl`.
        """
        return {}

    def age_diagnostics(self, ages: np.ndarray, labels_per_step: int) -> dict[str, float]:
        """Return indicators that follow from the order of the labeled images, the same on all ranks.

        ages [K] int64: the steps since each labeled image was in a batch; negative if it never was.
        labels_per_step: the number of labeled images in a step, of all ranks.
        """
        return {}

    def index_limits(self) -> dict[str, int]:
        """Return the names of buffers in the state_dict that hold indices, each with the number that all of
        them are below. A resume refuses a checkpoint with others.
        """
        return {}

    def update(self, output: StepOutput) -> None:
        """Write bank, prior and teacher. `train_step` calls it once, after the optimizer step.

        output: the outputs of all virtual ranks of this process, concatenated.
        """
        self.teacher.update(self.student)
