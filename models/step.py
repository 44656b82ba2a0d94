"""One global training step, the same for every method, on any number of processes."""

from contextlib import nullcontext
from typing import Optional, Sequence

import torch
from torch import Tensor, nn

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
    scaler: Optional[torch.amp.GradScaler] = None,
) -> tuple[dict[str, Tensor], StepOutput]:
    """Losses → backward → optimizer step → bank, prior, teacher. Returns the terms (means over `batches`) and
    what was fresh.

    batches: one for each rank that this process plays; more than one where virtual ranks share it. These take
    turns, each with BN statistics of its own batch, and their gradients are averaged, as between processes:
    the step of r ranks is the same on 1 to r processes, to rounding. Running statistics are those of the
    first.
    student: method.student, or its data-parallel wrapper. step: from 0. bank_ready: False in the first epoch.
    scaler: for fp16, whose small gradients would be 0; a step whose gradients overflow leaves the weights as
    they are.
    """
    scaler = scaler or torch.amp.GradScaler(enabled=False)
    parts: list[tuple[dict[str, Tensor], StepOutput]] = []
    targets = method.targets(batches, student, step=step)
    optimizer.zero_grad()
    for i, (batch, target) in enumerate(zip(batches, targets, strict=True)):
        first, last = i == 0, i == len(batches) - 1
        with (
            nullcontext() if first else freeze_bn_stats(method.student),
            dist_utils.sync_gradients(student, last),
        ):
            terms, output = method.losses(batch, target, student, bank_ready=bank_ready)
            scaler.scale(sum(terms.values()) / len(batches)).backward()
        parts.append(({name: term.detach() for name, term in terms.items()}, output))
    scaler.step(optimizer)
    scaler.update()
    terms, output = _join(parts)
    method.update(output)
    return terms, output


def split_virtual_ranks(batch: Batch, ranks: int) -> list[Batch]:
    """What `ranks` ranks see, one after the other in one batch -> a batch of each."""
    return [Batch(*fields) for fields in zip(*(field.chunk(ranks) for field in batch), strict=True)]


def _join(parts: list[tuple[dict[str, Tensor], StepOutput]]) -> tuple[dict[str, Tensor], StepOutput]:
    """Terms as means, what was fresh one after the other; the prior is the same for all."""
    if len(parts) == 1:
        return parts[0]
    terms = {name: torch.stack([part[name] for part, _ in parts]).mean(dim=0) for name in parts[0][0]}
    fields = zip(*(output._replace(prior=None) for _, output in parts))
    output = StepOutput(*(None if values[0] is None else torch.cat(values) for values in fields))
    return terms, output._replace(prior=parts[0][1].prior)


def configure_execution(method: Method, precision: str, channels_last: bool, compiled: bool) -> None:
    """How fast the networks of `method` run, not what they compute: to rounding the step stays the same.

    precision: fp32, bf16 or fp16. Keys of the state_dict stay as they are.
    """
    for network in (method.student, method.teacher.net):
        network.autocast_dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        if channels_last:
            network.to(memory_format=torch.channels_last)
        if compiled:
            network.backbone.compile()  # the backbone alone: a compiled head that no loss uses would get a gradient of 0, not none
