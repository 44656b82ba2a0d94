"""The ages of the rows of the labeled bank, which follow from the order of the labeled images."""

import numpy as np

from dataset.loader import Stream
from dataset.rng import ORDER_X, permutation


def bank_row_ages(stream: Stream, done: int) -> np.ndarray:
    """Return the steps since each bank row was written, after `done` steps: [K] int64. 0 means in the last
    step, −1 not yet.

    A row is written whenever its image is in a batch. The order of the images is a pure function of the step,
    so no history is needed. An image that cannot be read counts as if it were in its batch.
    """
    total, per_step = len(stream.data.labeled), stream.n_x * stream.world
    seen = done * per_step  # images
    last = np.full(total, -1)  # the last position of each image in the sequence of all passes   [K]
    for number in range(max(0, seen // total - 1), seen // total + 1):  # the last full and the current pass
        order = permutation(total, stream.seed, ORDER_X, number)[: seen - number * total]
        last[order] = number * total + np.arange(len(order))
    return np.where(last < 0, -1, done - 1 - last // per_step)  # [K]
