"""What every step sees, as a pure function of (seed, step, rank, world size): no worker, prefetch or restart changes it."""
from functools import lru_cache
from typing import Callable, Iterator, NamedTuple, Optional

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

# What a random number is for; one more key beside seed and epoch.
ORDER_X, ORDER_U, VIEW_X, VIEW_WEAK, VIEW_STRONG = range(5)


class View(NamedTuple):
    """A random view: `numbers` uniform numbers in [0, 1) an image decide everything that is random in it."""
    numbers: int
    apply: Callable[[np.ndarray, np.ndarray], Tensor]   # images [n, ...] uint8, uniforms [n, numbers] -> [n, c, h, w] float


class Data(NamedTuple):
    """A data set, its labelled subset and its views, as `build_data` returns them."""
    images: np.ndarray              # training images                                   [N, ...] uint8
    labels: np.ndarray              # their labels; −1 where there is none              [N] int64
    labelled: np.ndarray            # rows whose labels may be used: the labelled list  [K] int64
    unlabelled: np.ndarray          # rows used without their labels                    [U] int64
    test_images: np.ndarray         # [M, ...] uint8
    test_labels: np.ndarray         # [M] int64
    weak: View
    strong: View
    plain: Callable[[np.ndarray], Tensor]       # the view for evaluation: [n, ...] uint8 -> [n, c, h, w] float
    classes: list[str]              # names, in the order of the labels                 [C]
    channels: int                   # of a view
    split: str                      # names the labelled subset: results on different splits do not compare


class Stream(Dataset):
    """step -> ((x, y, index, u_weak, u_strong), hidden labels of the unlabelled images or None), for one rank.

    An epoch is one pass over the unlabelled images in random order, the incomplete last step dropped. The labelled
    images follow each other in random permutations without end. Ranks take neighbouring slices of the same order.
    """

    def __init__(self, data: Data, batch_size: int, mu: int, seed: int, rank: int = 0, world: int = 1):
        """batch_size: labelled images a rank and step (B); mu: unlabelled ones for each of them."""
        self.data, self.seed, self.rank, self.world = data, seed, rank, world
        self.n_x, self.n_u = batch_size, batch_size * mu
        self.known = bool((data.labels[data.unlabelled] >= 0).all())        # whether hidden labels exist, for all
        self.steps_per_epoch = len(data.unlabelled) // (self.n_u * world)

    def bank_ready(self, step: int) -> bool:
        """True from the first epoch on before which every labelled image has been seen."""
        start = step // self.steps_per_epoch * self.steps_per_epoch     # of this epoch
        return start > 0 and start * self.n_x * self.world >= len(self.data.labelled)

    def __getitem__(self, step: int) -> tuple[tuple[Tensor, ...], Optional[Tensor]]:
        data = self.data
        place = np.arange(self.n_x) + (step * self.world + self.rank) * self.n_x            # [B]
        passes, place = np.divmod(place, len(data.labelled))                                # [B], [B]
        index = np.array([permutation(len(data.labelled), self.seed, ORDER_X, p)[i] for p, i in zip(passes, place)])
        x = self._view(data.weak, data.labelled[index], passes, VIEW_X)                     # [B, c, h, w]

        epoch, place = divmod(step, self.steps_per_epoch)
        start = (place * self.world + self.rank) * self.n_u
        order = permutation(len(data.unlabelled), self.seed, ORDER_U, epoch)                # [U]
        rows = data.unlabelled[order[start:start + self.n_u]]                               # [muB]
        epochs = np.full(self.n_u, epoch)                                                   # [muB]
        u_weak = self._view(data.weak, rows, epochs, VIEW_WEAK)                             # [muB, c, h, w]
        u_strong = self._view(data.strong, rows, epochs, VIEW_STRONG)                       # [muB, c, h, w]

        y, hidden = data.labels[data.labelled[index]], data.labels[rows]                    # [B], [muB]
        hidden = torch.from_numpy(hidden) if self.known else None
        return (x, torch.from_numpy(y), torch.from_numpy(index), u_weak, u_strong), hidden

    def _view(self, view: View, rows: np.ndarray, passes: np.ndarray, purpose: int) -> Tensor:
        table = [uniforms(len(self.data.images), view.numbers, self.seed, purpose, p) for p in np.unique(passes)]
        u = np.concatenate([t[rows[passes == p]] for t, p in zip(table, np.unique(passes))])    # [n, numbers]
        return view.apply(self.data.images[rows], u)


def batches(stream: Stream, start: int, stop: int, workers: int, pin_memory: bool) -> DataLoader:
    """The stream's items for steps start … stop − 1, in order, made ahead of time by `workers` processes."""
    return DataLoader(stream, batch_size=None, sampler=range(start, stop), num_workers=workers, pin_memory=pin_memory)


def evaluation_batches(data: Data, rank: int = 0, world: int = 1, size: int = 256) -> Iterator[tuple[Tensor, Tensor]]:
    """(x [n, c, h, w], y [n]) of this rank's share of the test images; every image is in exactly one share."""
    rows = np.arange(rank, len(data.test_labels), world)
    for chunk in np.split(rows, range(size, len(rows), size)):
        yield data.plain(data.test_images[chunk]), torch.from_numpy(data.test_labels[chunk])


@lru_cache(maxsize=8)
def permutation(n: int, seed: int, purpose: int, number: int) -> np.ndarray:
    """[n]: the order of pass `number`."""
    return _generator(seed, purpose, number).permutation(n)


@lru_cache(maxsize=8)
def uniforms(n: int, numbers: int, seed: int, purpose: int, number: int) -> np.ndarray:
    """[n, numbers] in [0, 1): row i decides the view of image i in pass `number`."""
    return _generator(seed, purpose, number).random((n, numbers))


def _generator(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([int(k) for k in key])))
