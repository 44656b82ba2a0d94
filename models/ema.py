"""The EMA teacher, in three kinds that differ in what happens to BN's running statistics."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from models.network import Network
from util import dist_utils
from util.shuffle import Shuffle

BNMode = Literal["shuffle", "average", "copy"]


class Teacher(nn.Module):
    """F_t: a moving average of the student, teacher ← m·teacher + (1 − m)·student after every step.

    bn_mode:
    shuffle (`ema`, the published SimMatch recipe): only parameters are averaged. The forward runs in train
    mode, on batch statistics, over images that are shuffled across ranks (shuffle-BN, MoCo). The running
    statistics are collected in this forward.
    average (EMAN, arXiv 2101.08482): the forward runs in eval mode. The running mean and variance are
    averaged as parameters are; num_batches_tracked is copied.
    copy (the CIFAR recipe): the forward runs in eval mode, and all buffers are copied from the student. This
    teacher serves for evaluation only, so ranks do not synchronize its statistics: each rank keeps those of
    its own student.
    """

    def __init__(self, student: Network, momentum: float, bn_mode: BNMode):
        super().__init__()
        if bn_mode not in get_args(BNMode):
            raise ValueError(f"bn_mode must be one of {get_args(BNMode)}, got {bn_mode!r}")
        self.net = copy.deepcopy(student).requires_grad_(False)
        self.momentum = momentum
        self.bn_mode = bn_mode
        self.train()  # deepcopy keeps the student's mode, which is wrong for a teacher that runs in eval mode

    def train(self, mode: bool = True) -> "Teacher":
        return super().train(mode and self.bn_mode == "shuffle")

    @torch.no_grad()
    def forward(self, batches: Sequence[Tensor], step: int) -> list[tuple[Tensor, Tensor]]:
        """Images [n, c, h, w] of each virtual rank -> (logits' [n, C], z' [n, D]) of each.

        step: the global step, which seeds the shuffle.
        """
        if not self.training:
            return [self.net(x) for x in batches]
        shuffle = Shuffle(len(batches[0]), len(batches), seed=step, device=batches[0].device)
        outputs = []
        for i, x in enumerate(shuffle.scatter(batches)):
            # BN's running statistics come from the first virtual rank, as they do in the student.
            with freeze_bn_stats(self.net) if i else nullcontext():
                outputs.append(self.net(x))  # [n, C], [n, D]
        if shuffle.is_identity:
            return outputs
        num_classes = outputs[0][0].shape[1]
        joined = shuffle.gather([torch.cat(output, dim=1) for output in outputs])  # [n, C+D] of each
        return [(rows[:, :num_classes], rows[:, num_classes:]) for rows in joined]

    @torch.no_grad()
    def update(self, student: nn.Module) -> None:
        """Average the student into the teacher; bn_mode decides about the buffers.

        With `average`, the students of all ranks first take over rank 0's BN statistics, so that all ranks
        keep the same teacher.
        """
        averages: list[Tensor] = list(self.net.parameters())
        latest: list[Tensor] = list(student.parameters())
        if self.bn_mode == "average":
            dist_utils.broadcast_buffers(student)
        if self.bn_mode != "shuffle":
            for teacher_buffer, student_buffer in zip(self.net.buffers(), student.buffers(), strict=True):
                if self.bn_mode == "average" and student_buffer.is_floating_point():
                    averages.append(teacher_buffer)
                    latest.append(student_buffer)
                else:
                    teacher_buffer.copy_(student_buffer)
        torch._foreach_lerp_(averages, latest, 1 - self.momentum)


@contextmanager
def freeze_bn_stats(network: nn.Module) -> Iterator[None]:
    """Within the context, BN in train mode normalizes by its batch but does not update its running
    statistics.
    """
    layers = [m for m in network.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True
