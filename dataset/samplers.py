"""The order in which images are drawn, as pure functions: position in the sequence of all ranks -> image.

A pass is a random permutation of the images, or its beginning. Its number is part of the key of an image's
random numbers, so that an image has other views in every pass.
"""

from dataclasses import dataclass

import numpy as np

from dataset.rng import permutation
from util.errors import UserError


@dataclass(frozen=True)
class InfiniteSampler:
    """Passes follow one another without end, across epochs. Ranks take adjacent slices of a step."""

    n: int  # number of images
    pass_length: int  # number of images of each permutation that are used
    key: tuple[int, ...]  # seed and stream id

    def draw(self, step: int, batch_size: int, rank: int, world: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the indices of the images of a process in a step, and their passes: [batch_size] each."""
        return self.at((step * world + rank) * batch_size + np.arange(batch_size))

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the index of the image at each position, and its pass: [m], [m]."""
        passes, offset = np.divmod(positions, self.pass_length)  # [m], [m]
        return _look_up(self.n, self.key, passes[:, None], offset), passes


@dataclass(frozen=True)
class ExactSampler:
    """Every epoch has as many permutations of its own as it needs, cut to exactly `epoch_length` images, over
    which ranks take strides: SimMatchV2's sampler of labeled images. Raises UserError if an epoch cannot show
    every image.
    """

    n: int  # number of images
    epoch_length: int  # number of images that all ranks draw in an epoch
    images_per_step: int
    virtual_ranks: int  # of each process; their images are concatenated
    key: tuple[int, ...]  # seed and stream id

    def __post_init__(self) -> None:
        if 0 < self.epoch_length < self.n:  # an epoch without a step is reported elsewhere
            steps = -(-self.n // self.images_per_step)
            raise UserError(
                f"--labeled-sampler exact shows all {self.n} labeled images in an epoch, which has only "
                f"{self.epoch_length}: lower --mu, use --steps-per-epoch {steps} or more, or "
                "--labeled-sampler infinite"
            )

    def draw(self, step: int, batch_size: int, rank: int, world: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the indices of the images of a process in a step, and their passes: [batch_size] each."""
        V = self.virtual_ranks
        ranks = rank * V + np.arange(V)  # [V]
        own = ranks[:, None] + world * V * np.arange(batch_size // V)  # positions in the step [V, B]
        return self.at(step * world * batch_size + own.flatten())

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the index of the image at each position, and its pass: [m], [m]."""
        epochs, offset = np.divmod(positions, self.epoch_length)  # [m], [m]
        in_epoch, offset = np.divmod(offset, self.n)  # number of the permutation in its epoch [m], [m]
        index = _look_up(self.n, self.key, np.stack([epochs, in_epoch], 1), offset)  # [m]
        return index, epochs * -(-self.epoch_length // self.n) + in_epoch


def _look_up(n: int, key: tuple[int, ...], numbers: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """Return item offset[i] of the permutation of n images whose key is `key` and then numbers[i]: [m]."""
    index = np.empty_like(offset)
    for own in np.unique(numbers, axis=0).tolist():
        in_pass = (numbers == own).all(1)  # [m]
        index[in_pass] = permutation(n, *key, *own)[offset[in_pass]]
    return index
