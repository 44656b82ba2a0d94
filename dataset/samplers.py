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
    seed: int
    stream_id: int

    def positions(self, step: int, batch_size: int, rank: int, world: int) -> np.ndarray:
        """Return the positions of the images of a process in a step: [batch_size]."""
        return (step * world + rank) * batch_size + np.arange(batch_size)

    def draw(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the index of the image at each position, and its pass: [m], [m]."""
        passes, offset = np.divmod(positions, self.pass_length)  # [m], [m]
        index = np.empty_like(positions)
        for number in np.unique(passes).tolist():
            in_pass = passes == number  # [m]
            index[in_pass] = permutation(self.n, self.seed, self.stream_id, number)[offset[in_pass]]
        return index, passes


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
    seed: int
    stream_id: int

    def __post_init__(self) -> None:
        if 0 < self.epoch_length < self.n:  # an epoch without a step is reported elsewhere
            steps = -(-self.n // self.images_per_step)
            raise UserError(
                f"--labeled-sampler exact shows all {self.n} labeled images in an epoch, which has only "
                f"{self.epoch_length}: lower --mu, use --steps-per-epoch {steps} or more, or "
                "--labeled-sampler infinite"
            )

    def positions(self, step: int, batch_size: int, rank: int, world: int) -> np.ndarray:
        """Return the positions of the images of a process in a step: [batch_size]."""
        ranks = rank * self.virtual_ranks + np.arange(self.virtual_ranks)  # [V]
        first = step * world * batch_size + ranks  # [V]
        stride = world * self.virtual_ranks
        return (first[:, None] + stride * np.arange(batch_size // self.virtual_ranks)).flatten()  # [V·B]

    def draw(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the index of the image at each position, and its pass: [m], [m]."""
        epochs, offset = np.divmod(positions, self.epoch_length)  # [m], [m]
        in_epoch, offset = np.divmod(offset, self.n)  # number of the permutation in its epoch [m], [m]
        passes = epochs * -(-self.epoch_length // self.n) + in_epoch  # [m]
        index = np.empty_like(positions)
        for epoch, k in {*zip(epochs.tolist(), in_epoch.tolist())}:
            in_pass = (epochs == epoch) & (in_epoch == k)  # [m]
            index[in_pass] = permutation(self.n, self.seed, self.stream_id, epoch, k)[offset[in_pass]]
        return index, passes
