"""The learning rate as a pure function of the step: warm-up and a cosine that is updated once per epoch for
ImageNet, a cosine that is updated at every step for CIFAR.
"""

import math

from util.config import Config


def learning_rate(config: Config, step: int, steps_per_epoch: int) -> float:
    """Return the learning rate of one optimizer step, as in the published recipes. step: counted from 0.

    During the first `warmup_epoch` epochs the rate rises linearly to `lr`, step by step. After that, `cos` is
    half a cosine from `lr` to 0, updated once per epoch; `cos_7_16` is lr·cos(7π/16·t), where t is the share
    of the steps after warm-up that are done (FixMatch, arXiv 2001.07685; it ends near lr/5). Without either,
    the rate is divided by 10 at each epoch of `schedule`.
    """
    lr, epochs, warmup_epoch = config.lr, config.epochs, config.warmup_epoch
    warmup_steps = warmup_epoch * steps_per_epoch
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    if config.cos_7_16:
        return lr * math.cos(
            7 * math.pi / 16 * (step - warmup_steps) / (epochs * steps_per_epoch - warmup_steps)
        )
    epoch = step // steps_per_epoch
    if config.cos:
        return lr * 0.5 * (1 + math.cos(math.pi * (epoch - warmup_epoch) / (epochs - warmup_epoch)))
    return lr * 0.1 ** sum(epoch >= milestone for milestone in config.schedule)
