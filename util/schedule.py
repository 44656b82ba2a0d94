"""The learning rate as a pure function of the step (METHOD: warm-up per iteration, cosine per epoch)."""
import math
from typing import Sequence


def learning_rate(step: int, *, lr: float, steps_per_epoch: int, epochs: int, warmup_epoch: int, cos: bool,
                  schedule: Sequence[int]) -> float:
    """The rate for one optimizer step, in the published recipe's form.

    step: global step, from 0. During the first `warmup_epoch` epochs the rate rises linearly by the step to `lr`.
    After it, `cos` gives half a cosine that moves once an epoch; without `cos`, the rate falls tenfold at each epoch of
    `schedule`.
    """
    warmup_steps = warmup_epoch * steps_per_epoch
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    epoch = step // steps_per_epoch
    if cos:
        return lr * 0.5 * (1 + math.cos(math.pi * (epoch - warmup_epoch) / (epochs - warmup_epoch)))
    return lr * 0.1 ** sum(epoch >= milestone for milestone in schedule)
