"""A step looked at without taking it: its loss terms, the length of each one's gradient, and what the method
says of itself.
"""

from typing import Any, Sequence

import torch
from torch import Tensor

from models.ema import freeze_bn_stats
from models.method import Batch, Method


def diagnose(
    method: Method, batches: Sequence[Batch], *, step: int, bank_ready: bool, scale: float = 1.0
) -> dict[str, Tensor]:
    """Of the step that `train_step` takes next with these batches. Nothing changes: no weight, gradient,
    statistic or bank.

    batches, step, bank_ready: as for `train_step`; the losses are those of the first of the batches. scale:
    of the loss in the backward, for fp16. Every process must call it: the ranks meet as in a step. Returns,
    for each term, `loss_*`, the weighted value, and, if it has one, `grad_*`, the L2 norm of its gradient
    over all parameters; and what `method.signs` gives.
    """
    values: dict[str, Tensor] = {}
    with freeze_bn_stats(method):
        target, terms = _look(method, batches, step, bank_ready)
        values |= {name: term.detach() for name, term in terms.items()} | method.diagnostics(
            batches[0], target, bank_ready=bank_ready
        )
        for i, name in enumerate(terms):
            if i:  # a forward for each: a compiled one has a graph that serves one backward
                _, terms = _look(method, batches, step, bank_ready)
            if terms[name].requires_grad:
                values[name.replace("loss_", "grad_")] = _gradient_norm(terms[name] * scale, method) / scale
    return values


def _look(
    method: Method, batches: Sequence[Batch], step: int, bank_ready: bool
) -> tuple[Any, dict[str, Tensor]]:
    """Target and terms of the first batch. On the student without its data-parallel wrapper, whose backward
    is for training.
    """
    target = method.targets(batches, method.student, step=step)[0]
    return target, method.losses(batches[0], target, method.student, bank_ready=bank_ready)[0]


def _gradient_norm(loss: Tensor, method: Method) -> Tensor:
    """L2 norm over all parameters of the student; what the loss does not reach counts as 0. Leaves every
    .grad alone.
    """
    gradients = torch.autograd.grad(loss, list(method.student.parameters()), allow_unused=True)
    return torch.stack([g.norm() for g in gradients if g is not None]).norm()
