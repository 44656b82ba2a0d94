"""One global training step, the same for every method, on any number of processes."""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import reduce

import torch
from torch import nn

from models.ema import freeze_bn_stats
from models.method import Batch, Method, StepOutput
from util import dist_utils


def train_step(
    method: Method,
    student: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    *,
    step: int,
    bank_ready: bool,
    scaler: torch.amp.GradScaler | None = None,
) -> StepOutput:
    """Compute the losses and their gradients, take an optimizer step, then call the method's `update`.

    Return the outputs of all batches, joined: the means of the losses, and everything else concatenated.

    batches: one for each virtual rank of this process. They run one after the other, each with the BN
    statistics of its own batch, and their gradients are averaged, as DDP averages them over processes. So a
    step of r ranks is the same on 1 to r processes, up to rounding. BN's running statistics come from the
    first virtual rank.
    student: method.student, or its DDP wrapper. step: the global step, from 0. bank_ready: see Method.losses.
    scaler: for fp16, where small gradients would underflow; if the scaled gradients overflow, the weights
    stay unchanged.
    """
    scaler = scaler or torch.amp.GradScaler(enabled=False)
    outputs: list[StepOutput] = []
    targets = method.targets(batches, student, step=step)
    optimizer.zero_grad()
    for i, (batch, target) in enumerate(zip(batches, targets, strict=True)):
        first, last = i == 0, i == len(batches) - 1
        bn_stats = nullcontext() if first else freeze_bn_stats(method.student)
        with bn_stats, dist_utils.sync_gradients(student, last):
            output = method.losses(batch, target, student, bank_ready=bank_ready)
            scaler.scale(reduce(torch.add, output.losses.values()) / len(batches)).backward()
        outputs.append(output._replace(losses={name: v.detach() for name, v in output.losses.items()}))
    scaler.step(optimizer)
    skipped = _update_scale(scaler)
    joined = _join_virtual_ranks(outputs)._replace(skipped=skipped)
    method.update(joined)
    return joined


def _update_scale(scaler: torch.amp.GradScaler) -> torch.Tensor | None:
    """Update the scale of the loss. Return 1 if it decreases, because the gradients have overflowed and the
    optimizer has skipped the step, else 0; None without a scaler. No step waits for the device to know it.
    """
    if not scaler.is_enabled():
        return None
    before = scaler._get_scale_async().clone()  # type: ignore[union-attr]
    scaler.update()
    return (scaler._get_scale_async() < before).float()  # type: ignore[operator]


def split_virtual_ranks(batch: Batch, ranks: int) -> list[Batch]:
    """Split the batch of a process, in which its virtual ranks are concatenated, into one batch for each."""
    *fields, views = batch
    strong = zip(*(view.chunk(ranks) for view in views))
    return [Batch(*own) for own in zip(*(field.chunk(ranks) for field in fields), strong, strict=True)]


def _join_virtual_ranks(outputs: list[StepOutput]) -> StepOutput:
    """Average the losses and concatenate everything else."""
    if len(outputs) == 1:
        return outputs[0]
    losses, pseudo_labels, masks, for_update, _ = zip(*outputs)
    return StepOutput(
        {name: torch.stack([own[name] for own in losses]).mean(dim=0) for name in losses[0]},
        None if pseudo_labels[0] is None else torch.cat(pseudo_labels),
        None if masks[0] is None else torch.cat(masks),
        {name: torch.cat([own[name] for own in for_update]) for name in for_update[0]},
    )


def configure_execution(method: Method, precision: str, channels_last: bool, compiled: bool) -> None:
    """Set autocast dtype, memory format and compilation of both networks.

    The step stays the same up to rounding, and the keys of the state_dict do not change.
    precision: fp32, bf16 or fp16.
    """
    for network in (method.student, method.teacher.net):
        network.autocast_dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        if channels_last:
            network.to(memory_format=torch.channels_last)
        if compiled:
            # Not the whole network: a compiled head that no loss uses would get a gradient of zero instead of
            # none, and SGD would then apply weight decay to it.
            network.backbone.compile()
