"""How old the rows of the labeled bank are, from the order of the labeled images alone."""

import numpy as np

from dataset.loader import Stream
from dataset.rng import ORDER_X, permutation


def bank_row_ages(stream: Stream, done: int) -> np.ndarray:
    """Steps since each labeled image was last seen, and its row written, after `done` steps: [K] int64, −1:
    not yet.

    0 is the newest step. The order is a pure function of the step, so that nothing has to be kept. An image
    that cannot be read counts as seen.
    """
    total, a_step = len(stream.data.labeled), stream.n_x * stream.world
    seen = done * a_step
    last = np.full(total, -1)  # places in the endless order   [K]
    for number in range(
        max(0, seen // total - 1), seen // total + 1
    ):  # the last whole pass and the one in progress
        order = permutation(total, stream.seed, ORDER_X, number)[: seen - number * total]
        last[order] = number * total + np.arange(len(order))
    return np.where(last < 0, -1, done - 1 - last // a_step)
