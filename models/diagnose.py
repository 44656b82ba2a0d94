"""Diagnostics of a step, without side effects: losses, gradient norms, and the method's own indicators."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from models.ema import freeze_bn_stats
from models.method import Batch, Method


def diagnose(
    method: Method, batches: Sequence[Batch], *, step: int, bank_ready: bool, scale: float = 1.0
) -> dict[str, Tensor]:
    """Examine the step that `train_step` would take with these batches, without side effects.

    batches, step, bank_ready: as for `train_step`; only the losses of the first batch are computed. scale:
    the loss scale of the backward, for fp16. All processes must call it, because ranks communicate as in a
    step. Return, for each loss term, its weighted value as `loss_*` and, if it has a gradient, the L2 norm of
    that over all parameters as `grad_*`; and whatever `method.diagnostics` returns.
    """
    values: dict[str, Tensor] = {}
    with freeze_bn_stats(method):
        targets, losses = _first_batch_losses(method, batches, step, bank_ready)
        values |= {name: loss.detach() for name, loss in losses.items()}
        values |= method.diagnostics(batches[0], targets, bank_ready=bank_ready)
        for i, name in enumerate(losses):
            if i:  # One forward for each term: the graph of a compiled forward serves a single backward.
                _, losses = _first_batch_losses(method, batches, step, bank_ready)
            if losses[name].requires_grad:
                values[name.replace("loss_", "grad_")] = _gradient_norm(losses[name] * scale, method) / scale
    return values


def _first_batch_losses(
    method: Method, batches: Sequence[Batch], step: int, bank_ready: bool
) -> tuple[Any, dict[str, Tensor]]:
    """Targets and losses of the first batch, on the bare student: DDP's backward would average gradients."""
    targets = method.targets(batches, method.student, step=step)[0]
    return targets, method.losses(batches[0], targets, method.student, bank_ready=bank_ready).losses


def _gradient_norm(loss: Tensor, method: Method) -> Tensor:
    """L2 norm over all parameters of the student; unused parameters count as 0. No .grad changes."""
    gradients = torch.autograd.grad(loss, list(method.student.parameters()), allow_unused=True)
    return torch.stack([g.norm() for g in gradients if g is not None]).norm()
