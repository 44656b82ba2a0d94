"""The teacher: a moving average of the student, of either kind."""
import copy

import torch
from torch import Tensor, nn

from util import dist_utils


class Teacher(nn.Module):
    """F_t, a network that is never trained by gradient: teacher <- m·teacher + (1 − m)·student after every step.

    eman=False (`ema`, the published SimMatch recipe): parameters alone are averaged. The forward runs in train mode, on
    batch statistics, over images regrouped at random across ranks (shuffle-BN); the running statistics are those that
    this forward collects.
    eman=True (EMAN, arXiv 2101.08482): the forward runs in eval mode, and BN's running mean and variance are averaged
    like parameters; num_batches_tracked is copied.
    """

    def __init__(self, student: nn.Module, momentum: float, eman: bool):
        super().__init__()
        self.net = copy.deepcopy(student).requires_grad_(False)
        self.momentum = momentum
        self.eman = eman
        self.train()        # EMAN's copy must not start in the student's mode

    def train(self, mode: bool = True) -> "Teacher":
        return super().train(mode and not self.eman)

    @torch.no_grad()
    def forward(self, x: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """x [n, c, h, w] -> logits' [n, C], z' [n, D]. step: the global step, which seeds the regrouping."""
        if not self.training:
            return self.net(x)
        shuffle = dist_utils.Shuffle(len(x), seed=step)
        logits, z = self.net(shuffle.scatter(x))
        return shuffle.gather(logits), shuffle.gather(z)

    @torch.no_grad()
    def update(self, student: nn.Module) -> None:
        """Average the student in. Under EMAN its BN statistics are rank 0's, so that all ranks keep one teacher."""
        mine, theirs = list(self.net.parameters()), list(student.parameters())
        if self.eman:
            dist_utils.broadcast_buffers(student)
            for old, new in zip(self.net.buffers(), student.buffers(), strict=True):
                if new.is_floating_point():
                    mine.append(old)
                    theirs.append(new)
                else:
                    old.copy_(new)
        torch._foreach_lerp_(mine, theirs, 1 - self.momentum)
