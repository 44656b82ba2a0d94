"""What every step loads, as a pure function of (seed, step, rank, world size): workers and restarts change
nothing.

A view has two parts: `cpu_transform` runs in the worker that loads the image, `device_transform` on batches
on the training device. What is copied to the device is small: uint8 pixels and the parameters that
`device_transform` needs.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from dataset.rng import (
    ORDER_U,
    ORDER_X,
    REPLACE_U,
    REPLACE_X,
    VIEW_WEAK,
    VIEW_X,
    shuffled,
    strong_stream_id,
    uniforms,
)
from dataset.samplers import ExactSampler, InfiniteSampler
from dataset.source import BadImage, Files, Source
from util.device import copy_async
from util.errors import UserError

# What cpu_transform returns and device_transform takes: pixels [n, ...], then the parameters [n, k] of each
# stage that is left for the device.
HostTensors = tuple[Tensor, ...]


class View(NamedTuple):
    """A random view of an image; `num_uniforms` uniform numbers in [0, 1) decide everything that is random in
    it.
    """

    num_uniforms: int
    cpu_transform: Callable[[Sequence, np.ndarray], HostTensors]  # n images, uniforms [n, num_uniforms]
    device_transform: Callable[[HostTensors], Tensor]  # -> normalized [n, c, side, side] float32
    side: int  # in pixels


class SplitId(NamedTuple):
    """Identifies the labeled subset; results on different subsets are not comparable."""

    id: str
    sha256: str

    def __str__(self) -> str:
        return f"{self.id} (sha256 {self.sha256[:12]})"


class Data(NamedTuple):
    """A data set with its labeled subset and its views, as `build_data` returns it."""

    # fmt: off
    images: Source                  # training images                                   [N]
    labels: np.ndarray              # their labels; −1 where there is none              [N] int64
    labeled: np.ndarray             # the labeled list: rows whose labels may be used   [K] int64
    unlabeled: np.ndarray           # rows used without their labels                    [U] int64
    test_images: Source             # images of the evaluation                          [M]
    test_labels: np.ndarray         # their labels                                      [M] int64
    weak_view: View
    strong_views: tuple[View, ...]  # one or more, which may differ in size
    eval_view: View                 # draws no random numbers
    classes: list[str]              # names, in the order of the labels                 [C]
    channels: int                   # of the images of a view
    split: SplitId
    # fmt: on

    def sides(self) -> tuple[int, ...]:
        """Return the sides in pixels of the weak and the strong views."""
        return tuple(view.side for view in (self.weak_view, *self.strong_views))

    def fingerprint(self) -> str:
        """Return the SHA-256 of the numbers of images, the classes and, in their order, the names of image
        files without folders. It does not depend on where the data are stored.
        """
        sizes = f"{len(self.images)} {len(self.unlabeled)} {len(self.test_images)}"
        digest = hashlib.sha256(f"{sizes} {self.classes}".encode())
        for source in (self.images, self.test_images):
            if isinstance(source, Files):
                digest.update(b"\0".join(name.rpartition(b"/")[2] for name in source.names.array.tolist()))
        return digest.hexdigest()


class EvalData(NamedTuple):
    """Test images without training images; the fields are named as those of `Data`."""

    test_images: Files  # [M]
    test_labels: np.ndarray  # [M] int64
    eval_view: View
    classes: list[str]  # [C]


class HostBatch(NamedTuple):
    """The images of one step for one rank, as a worker returns them."""

    # fmt: off
    x: HostTensors                  # weak views of labeled images
    y: Tensor                       # their labels                                      [B] int64
    index: Tensor                   # type: ignore[assignment]  # indices in the labeled list   [B] int64
    u_weak: HostTensors             # weak views of unlabeled images
    u_strong: tuple[HostTensors, ...]   # strong views of the same images, in the order of Data's
    true_labels: Tensor | None      # of the unlabeled images, for the log; None if unknown [muB] int64
    bad: list[tuple[str, str]]      # (name, cause) of unreadable images that were replaced by others
    # fmt: on


class Stream(Dataset):
    """An endless dataset: step -> HostBatch of one rank. A rank is a process here: all its virtual ranks.

    An epoch is one pass over the unlabeled images in random order, without the incomplete last step; or, with
    `steps_per_epoch`, that many steps, while passes follow one another. dataset/samplers.py has the order of
    the labeled images.
    """

    def __init__(
        self,
        data: Data,
        batch_size: int,
        mu: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        steps_per_epoch: int = 0,
        labeled_sampler: str = "infinite",
        virtual_ranks: int = 1,
    ):
        """batch_size: labeled images per step and process; mu: unlabeled images for each of them.
        virtual_ranks: of a process. Raises UserError if an epoch has fewer images than the sampler needs.
        """
        self.data, self.seed, self.rank, self.world = data, seed, rank, world
        self.n_x, self.n_u = batch_size, batch_size * mu
        self.has_true_labels = bool((data.labels[data.unlabeled] >= 0).all())
        U, K, per_step = len(data.unlabeled), len(data.labeled), batch_size * world
        steps_per_pass = U // (self.n_u * world)
        self.steps_per_epoch = steps_per_epoch or steps_per_pass
        pass_length = U if steps_per_epoch else steps_per_pass * self.n_u * world
        self.unlabeled = InfiniteSampler(U, pass_length, (seed, ORDER_U))
        self.labeled: InfiniteSampler | ExactSampler = InfiniteSampler(K, K, (seed, ORDER_X))
        if labeled_sampler == "exact":
            length = self.steps_per_epoch * per_step
            self.labeled = ExactSampler(K, length, per_step, virtual_ranks, (seed, ORDER_X))

    def bank_ready(self, step: int) -> bool:
        """True from the first epoch that begins after every labeled image has been seen."""
        epoch_start = step // self.steps_per_epoch * self.steps_per_epoch
        return epoch_start > 0 and epoch_start * self.n_x * self.world >= len(self.data.labeled)

    def item_bytes(self) -> int:
        """Return the size of an item's tensors; labels and indices are int64."""
        views = (self.data.weak_view, *self.data.strong_views)
        weak, *strong = (view_bytes(self.data.images, view) for view in views)
        return self.n_x * (weak + 8 + 8) + self.n_u * (weak + sum(strong) + 8)

    # fmt: off
    def __getitem__(self, step: int) -> HostBatch:
        data = self.data
        bad: list[tuple[str, str]] = []
        index, passes = self.labeled.draw(step, self.n_x, self.rank, self.world)        # [B], [B]
        views = [(data.weak_view, VIEW_X)]
        (x,), index = self._views(views, data.labeled, index, passes, REPLACE_X, bad)
        y = torch.from_numpy(data.labels[data.labeled[index]])                          # [B]

        u_index, passes = self.unlabeled.draw(step, self.n_u, self.rank, self.world)    # [muB], [muB]
        strong_views = [(view, strong_stream_id(v)) for v, view in enumerate(data.strong_views)]
        views = [(data.weak_view, VIEW_WEAK), *strong_views]
        u_views, u_index = self._views(views, data.unlabeled, u_index, passes, REPLACE_U, bad)
        u_weak, *u_strong = u_views
        true_labels = None
        if self.has_true_labels:
            true_labels = torch.from_numpy(data.labels[data.unlabeled[u_index]])        # [muB]
        return HostBatch(x, y, torch.from_numpy(index), u_weak, tuple(u_strong), true_labels, bad)
    # fmt: on

    def _views(
        self,
        views: list[tuple[View, int]],
        rows: np.ndarray,
        index: np.ndarray,
        passes: np.ndarray,
        replace_id: int,
        bad: list[tuple[str, str]],
    ) -> tuple[list[HostTensors], np.ndarray]:
        """Apply each view to images[rows[index]], at most `max_decoded` at a time.

        Also return the indices that were used after replacing unreadable images.
        views: (view, stream id of its random numbers). replace_id, bad: see `_load`.
        """
        parts: list[list[HostTensors]] = [[] for _ in views]
        index = index.copy()
        n, at_most = len(index), self.data.images.max_decoded
        for chunk in np.split(np.arange(n), range(at_most, n, at_most)):
            images = []
            for i in chunk.tolist():
                image, index[i] = self._load(int(index[i]), rows, replace_id, bad)
                images.append(image)
            for part, (view, stream_id) in zip(parts, views):
                u = uniforms(rows[index[chunk]], view.num_uniforms, self.seed, stream_id, passes[chunk])
                part.append(view.cpu_transform(images, u))
        return [concatenate(part) for part in parts], index

    def _load(
        self, index: int, rows: np.ndarray, replace_id: int, bad: list[tuple[str, str]]
    ) -> tuple[object, int]:
        """Load images[rows[index]]; return it with its index.

        An unreadable image is appended to `bad` and replaced by another one, always the same: a labeled image
        (`replace_id` is REPLACE_X) by one of its class. Raises UserError if none of the first 1,000 of these,
        in random order, can be read.
        """
        source = self.data.images
        try:
            return source[int(rows[index])], index
        except BadImage as error:
            bad.append((source.name(int(rows[index])), str(error)))
        others = np.arange(len(rows))
        if replace_id == REPLACE_X:
            labels = self.data.labels[rows]  # [K]
            others = np.flatnonzero(labels == labels[index])
        for other in others[shuffled(len(others), self.seed, replace_id, index)][:1000].tolist():
            try:
                return source[int(rows[other])], other
            except BadImage:
                pass  # it is reported when it is drawn itself
        raise UserError(f"{bad[-1][0]}: {bad[-1][1]}; fix or remove it: no other image could replace it")


def concatenate(parts: Sequence[HostTensors]) -> HostTensors:
    """Concatenate each tensor over the parts."""
    return parts[0] if len(parts) == 1 else tuple(map(torch.cat, zip(*parts)))


def view_bytes(source: Source, view: View) -> int:
    """Return the size of what `cpu_transform` returns for an image of `source`; it is the same for all."""
    image = Image.new("RGB", (256, 256)) if isinstance(source, Files) else source[0]
    return sum(tensor.nbytes for tensor in view.cpu_transform([image], np.zeros((1, view.num_uniforms))))


def to_device(view: View, tensors: HostTensors, device: torch.device) -> Tensor:
    """Copy the pixels to the device and apply the view's device_transform -> [n, c, h, w].

    The parameters stay on the CPU; dataset/device_views.py says why.
    """
    return view.device_transform((copy_async(tensors[0], device), *tensors[1:]))
