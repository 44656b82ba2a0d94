"""The teacher: a moving average of the student, of three kinds."""

import copy
from contextlib import contextmanager, nullcontext
from typing import Iterator, Literal, Sequence, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from util import dist_utils

BNMode = Literal["shuffle", "average", "copy"]


class Teacher(nn.Module):
    """F_t, a network that is never trained by gradient: teacher <- m·teacher + (1 − m)·student after every
    step.

    bn: what becomes of BN's running statistics, and with them of the forward.
    shuffle (`ema`, the published SimMatch recipe): parameters alone are averaged. The forward runs in train
    mode, on batch statistics, over images regrouped at random across ranks (shuffle-BN); the running
    statistics are those that this forward collects.
    average (EMAN, arXiv 2101.08482): the forward runs in eval mode, and the running mean and variance are
    averaged like parameters; num_batches_tracked is copied.
    copy (the CIFAR recipe): eval mode, and all buffers are the student's as they are. It is for evaluation
    only, so that ranks exchange nothing in a step: the statistics are each rank's own, as the student's are.
    """

    def __init__(self, student: nn.Module, momentum: float, bn_mode: BNMode):
        super().__init__()
        if bn_mode not in get_args(BNMode):
            raise ValueError(f"bn must be one of {get_args(BNMode)}, got {bn_mode!r}")
        self.net = copy.deepcopy(student).requires_grad_(False)
        self.momentum = momentum
        self.bn_mode = bn_mode
        self.train()  # a copy that runs in eval mode must not start in the student's mode

    def train(self, mode: bool = True) -> "Teacher":
        return super().train(mode and self.bn_mode == "shuffle")

    @torch.no_grad()
    def forward(self, groups: Sequence[Tensor], step: int) -> list[tuple[Tensor, Tensor]]:
        """x [n, c, h, w] of each rank that this process plays -> logits' [n, C], z' [n, D] of each, in the
        type of the network.

        step: the global step, which seeds the regrouping.
        """
        if not self.training:
            return [self.net(x) for x in groups]
        shuffle, out = dist_utils.Shuffle(len(groups[0]), len(groups), seed=step), []
        for i, x in enumerate(shuffle.scatter(groups)):
            with freeze_bn_stats(self.net) if i else nullcontext():  # running statistics are the first rank's
                out.append(self.net(x))
        if shuffle.alone:
            return out
        classes = out[0][0].shape[1]
        both = shuffle.gather([torch.cat(pair, dim=1) for pair in out])  # [n, C+D] of each
        return [(rows[:, :classes], rows[:, classes:]) for rows in both]

    @torch.no_grad()
    def update(self, student: nn.Module) -> None:
        """Average the student in. Averaged BN statistics are rank 0's, so that all ranks keep one teacher."""
        mine, theirs = list(self.net.parameters()), list(student.parameters())
        if self.bn_mode == "average":
            dist_utils.broadcast_buffers(student)
        if self.bn_mode != "shuffle":
            for old, new in zip(self.net.buffers(), student.buffers(), strict=True):
                if self.bn_mode == "average" and new.is_floating_point():
                    mine.append(old)
                    theirs.append(new)
                else:
                    old.copy_(new)
        torch._foreach_lerp_(mine, theirs, 1 - self.momentum)


@contextmanager
def freeze_bn_stats(network: nn.Module) -> Iterator[None]:
    """Meanwhile BN in train mode normalizes by its batch as ever, but collects no running statistics."""
    layers = [m for m in network.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True
