"""The learning rate as a pure function of the step: ImageNet's warm-up and cosine per epoch, CIFAR's cosine
per step.
"""

import math
from collections.abc import Sequence


def learning_rate(
    step: int,
    *,
    lr: float,
    steps_per_epoch: int,
    epochs: int,
    warmup_epoch: int,
    cos: bool,
    schedule: Sequence[int],
    cos_7_16: bool = False,
) -> float:
    """The rate for one optimizer step, in the published recipes' form.

    step: global step, from 0. During the first `warmup_epoch` epochs the rate rises linearly by the step to
    `lr`. After it, `cos` gives half a cosine that moves once an epoch; `cos_7_16` gives lr·cos(7π/16·t),
    where t, the share of the steps after warm-up that are done, moves with every step (FixMatch, arXiv
    2001.07685: it ends near lr/5); without both, the rate falls tenfold at each epoch of `schedule`.
    """
    warmup_steps = warmup_epoch * steps_per_epoch
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    if cos_7_16:
        return lr * math.cos(
            7 * math.pi / 16 * (step - warmup_steps) / (epochs * steps_per_epoch - warmup_steps)
        )
    epoch = step // steps_per_epoch
    if cos:
        return lr * 0.5 * (1 + math.cos(math.pi * (epoch - warmup_epoch) / (epochs - warmup_epoch)))
    return lr * 0.1 ** sum(epoch >= milestone for milestone in schedule)
