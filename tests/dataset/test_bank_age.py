"""Ages of bank rows, compared with a record of every step."""

import numpy as np
import pytest

from dataset.bank_age import bank_row_ages
from dataset.build import build_data
from dataset.loader import Stream
from util.config import Config


@pytest.mark.parametrize("sampler", ["infinite", "exact"])
@pytest.mark.parametrize(
    "labels_per_class, batch_size, world",
    [(1, 10, 1), (1, 3, 1), (2, 7, 1), (4, 3, 2), (1, 12, 2), (3, 4, 3)],
)
def test_ages_equal_those_counted_step_by_step(labels_per_class, batch_size, world, sampler):
    data = build_data(Config(dataset="digits", cls=10, labels_per_class=labels_per_class), gpu=False)
    steps = -(-46 // (batch_size * world))  # of an epoch, which ends within a pass
    ranks = [Stream(data, batch_size, 1, 5, rank, world, steps, sampler) for rank in range(world)]
    written = np.full(len(data.labeled), -1)
    for step in range(24):
        for stream in ranks:
            written[stream[step].index.numpy()] = step
        expected = np.where(written < 0, -1, step - written)
        for stream in ranks:
            assert bank_row_ages(stream, step + 1).tolist() == expected.tolist()
    assert bank_row_ages(ranks[0], 24).min() == 0
