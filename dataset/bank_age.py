"""The ages of the rows of the labeled bank, which follow from the order of the labeled images."""

import numpy as np

from dataset.loader import Stream


def bank_row_ages(stream: Stream, done: int) -> np.ndarray:
    """Return the steps since each bank row was written, after `done` steps: [K] int64. 0 means in the last
    step, −1 not yet.

    A row is written whenever its image is in a batch. The order of the images is a pure function of the step,
    so no history is needed. An image that cannot be read counts as if it were in its batch.
    """
    total, per_step = len(stream.data.labeled), stream.n_x * stream.world
    seen = done * per_step  # images
    # These hold a whole permutation: the current one is incomplete, and the one before it may be cut.
    recent = np.arange(max(0, seen - 3 * total), seen)  # positions
    last = np.full(total, -1)  # the last position of each image   [K]
    last[stream.labeled.at(recent)[0]] = recent  # of an index that occurs twice, the later one stays
    return np.where(last < 0, -1, done - 1 - last // per_step)  # [K]
