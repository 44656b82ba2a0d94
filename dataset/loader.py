"""What every step sees, as a pure function of (seed, step, rank, world size): no worker, prefetch or restart
changes it.

A view is made in two halves: `host`, in the worker that loads the image, and `device`, in batches where the
network runs. What travels between them is small: uint8 pixels, and the numbers that the second half needs.
"""

import hashlib
from typing import Callable, Iterator, NamedTuple, Optional, Protocol, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dataset.rng import (
    ORDER_U,
    ORDER_X,
    REPLACE_U,
    REPLACE_X,
    VIEW_STRONG,
    VIEW_WEAK,
    VIEW_X,
    permutation,
    shuffled,
    uniforms,
)
from dataset.source import BadImage, Files, Source
from dataset.workers import PrefetchLoader
from util.errors import UserError

HostTensors = tuple[Tensor, ...]  # what `host` hands to `device`; the first has n lines, one an image


class View(NamedTuple):
    """A random view: `numbers` uniform numbers in [0, 1) an image decide everything that is random in it."""

    num_uniforms: int
    cpu_transform: Callable[[Sequence, np.ndarray], HostTensors]  # images [n], uniforms [n, numbers] -> raw
    device: Callable[[HostTensors], Tensor]  # raw -> normalized [n, c, h, w] float32


class SplitId(NamedTuple):
    """Names the labeled subset: results on different subsets do not compare."""

    id: str
    sha256: str

    def __str__(self) -> str:
        return f"{self.id} (sha256 {self.sha256[:12]})"


class Data(NamedTuple):
    """A data set, its labeled subset and its views, as `build_data` returns them."""

    # fmt: off
    images: Source                  # training images                                   [N]
    labels: np.ndarray              # their labels; −1 where there is none              [N] int64
    labeled: np.ndarray            # rows whose labels may be used: the labeled list  [K] int64
    unlabeled: np.ndarray          # rows used without their labels                    [U] int64
    test_images: Source             # [M]
    test_labels: np.ndarray         # [M] int64
    weak_view: View
    strong_view: View
    eval_view: View                     # the view for evaluation; it draws nothing
    classes: list[str]              # names, in the order of the labels                 [C]
    channels: int                   # of a view
    split: SplitId
    # fmt: on

    def fingerprint(self) -> str:
        """SHA-256 of which images are where, by their names without folders: the same wherever the data are
        kept.
        """
        total = hashlib.sha256(
            f"{len(self.images)} {len(self.unlabeled)} {len(self.test_images)} {self.classes}".encode()
        )
        for source in (self.images, self.test_images):
            if isinstance(source, Files):
                total.update(b"\0".join(name.rpartition(b"/")[2] for name in source.names.array.tolist()))
        return total.hexdigest()


class EvalData(Protocol):
    """The test images of a data set; `Data` and `dataset.imagenet.Validation` have these fields."""

    @property
    def test_images(self) -> Source: ...  # [M]
    @property
    def test_labels(self) -> np.ndarray: ...  # [M] int64
    @property
    def eval_view(self) -> View: ...
    @property
    def classes(self) -> list[str]: ...  # [C]


class HostBatch(NamedTuple):
    """What a worker makes of one step, for one rank."""

    # fmt: off
    x: HostTensors                          # weak views of labeled images
    y: Tensor                       # their labels                                      [B] int64
    index: Tensor                   # their places in the labeled list                 [B] int64
    u_weak: HostTensors                     # weak views of unlabeled images
    u_strong: HostTensors                   # strong views of the same images
    true_labels: Optional[Tensor]        # the labels that nobody may use                    [muB] int64; None if unknown
    bad: list[tuple[str, str]]      # (name, cause) of images that others stand in for
    # fmt: on


class Stream(Dataset):
    """step -> Item, for one rank; without an end.

    An epoch is one pass over the unlabeled images in random order, the incomplete last step dropped; or,
    with
    `steps_per_epoch`, that many steps, the passes following each other. The labeled images follow each other
    in random permutations without end. Ranks take neighboring slices of the same order.
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
    ):
        """batch_size: labeled images a rank and step (B); mu: unlabeled ones for each of them."""
        self.data, self.seed, self.rank, self.world = data, seed, rank, world
        self.n_x, self.n_u = batch_size, batch_size * mu
        self.has_true_labels = bool(
            (data.labels[data.unlabeled] >= 0).all()
        )  # whether hidden labels exist, for all
        in_a_pass = len(data.unlabeled) // (self.n_u * world)
        self.steps_per_epoch = steps_per_epoch or in_a_pass
        self.pass_length = len(data.unlabeled) if steps_per_epoch else in_a_pass * self.n_u * world

    def bank_ready(self, step: int) -> bool:
        """True from the first epoch on before which every labeled image has been seen."""
        start = step // self.steps_per_epoch * self.steps_per_epoch  # of this epoch
        return start > 0 and start * self.n_x * self.world >= len(self.data.labeled)

    def __getitem__(self, step: int) -> HostBatch:
        data, bad = self.data, []
        index, passes = self._order(step, self.n_x, len(data.labeled), len(data.labeled), ORDER_X)  # [B], [B]
        (x,), index = self._views(
            [(data.weak_view, VIEW_X)], data.labeled, index, passes, self._same_class, REPLACE_X, bad
        )
        order, passes = self._order(
            step, self.n_u, len(data.unlabeled), self.pass_length, ORDER_U
        )  # [muB], [muB]
        two = [(data.weak_view, VIEW_WEAK), (data.strong_view, VIEW_STRONG)]
        (u_weak, u_strong), order = self._views(two, data.unlabeled, order, passes, None, REPLACE_U, bad)
        true_labels = (
            torch.from_numpy(data.labels[data.unlabeled[order]]) if self.has_true_labels else None
        )  # [muB]
        return HostBatch(
            x,
            torch.from_numpy(data.labels[data.labeled[index]]),
            torch.from_numpy(index),
            u_weak,
            u_strong,
            true_labels,
            bad,
        )

    def _order(
        self, step: int, n: int, total: int, pass_length: int, stream_id: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Places, and numbers of the pass they belong to, of this rank's n images of the step: [n], [n].

        Of each permutation of `total` images the first `pass_length` are used.
        """
        passes, place = np.divmod(np.arange(n) + (step * self.world + self.rank) * n, pass_length)  # [n], [n]
        out = np.empty(n, np.int64)
        for number in np.unique(passes).tolist():
            here = passes == number
            out[here] = permutation(total, self.seed, stream_id, number)[place[here]]
        return out, passes

    def _views(
        self,
        views: list[tuple[View, int]],
        rows: np.ndarray,
        places: np.ndarray,
        passes: np.ndarray,
        pool: Optional[Callable[[int], np.ndarray]],
        stream_id: int,
        bad: list[tuple[str, str]],
    ) -> tuple[list[HostTensors], np.ndarray]:
        """Each of the views (view, what its numbers are for) of the images rows[places], few of which are
        held at a time; and the places of the images that were really used.
        """
        parts, places = [[] for _ in views], places.copy()
        for here in np.split(
            np.arange(len(places)),
            range(self.data.images.max_decoded, len(places), self.data.images.max_decoded),
        ):
            images = []
            for i in here.tolist():
                image, places[i] = self._load(int(places[i]), rows, pool, stream_id, bad)
                images.append(image)
            for part, (view, number) in zip(parts, views):
                u = uniforms(rows[places[here]], view.num_uniforms, self.seed, number, passes[here])
                part.append(view.cpu_transform(images, u))
        return [join(part) for part in parts], places

    def _same_class(self, place: int) -> np.ndarray:
        labels = self.data.labels[self.data.labeled]  # [K]
        return np.flatnonzero(labels == labels[place])

    def _load(
        self,
        place: int,
        rows: np.ndarray,
        pool: Optional[Callable[[int], np.ndarray]],
        stream_id: int,
        bad: list[tuple[str, str]],
    ) -> tuple[object, int]:
        """(image, its place in `rows`). A bad image is put down in `bad`, and another one of the pool stands
        in for it,
        always the same one: a labeled image for one of its class, an unlabeled image for any.
        """
        source = self.data.images
        try:
            return source[int(rows[place])], place
        except BadImage as error:
            bad.append((source.name(int(rows[place])), str(error)))
        places = pool(place) if pool else np.arange(len(rows))
        for other in places[shuffled(len(places), self.seed, stream_id, place)][:1000].tolist():
            try:
                return source[int(rows[other])], other
            except BadImage:
                pass  # it is put down when its own turn comes
        raise UserError(f"{bad[-1][0]}: {bad[-1][1]}; mend or remove it: no image could stand in for it")


class ImageChunks(Dataset):
    """chunk -> (raw, rows [n], bad): images of a source as they are seen in evaluation, `size` at a time.

    A bad image is left out of its chunk: nothing stands in for an image that is to be judged.
    """

    def __init__(self, source: Source, view: View, rows: np.ndarray, size: int = 256):
        self.source, self.view = source, view
        self.chunks = np.split(rows, range(size, len(rows), size))

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, chunk: int) -> tuple[HostTensors, Tensor, list[tuple[str, str]]]:
        parts, rows, bad = [], [], []
        everything, few = self.chunks[chunk], self.source.max_decoded
        for here in np.split(everything, range(few, len(everything), few)):
            images = []
            for row in here.tolist():
                try:
                    images.append(self.source[row])
                    rows.append(row)
                except BadImage as error:
                    bad.append((self.source.name(row), str(error)))
            if images:
                parts.append(self.view.cpu_transform(images, np.empty((len(images), 0))))
        return join(parts), torch.tensor(rows, dtype=torch.long), bad


class BadImages:
    """What becomes of images that cannot be used: the run stops, or they are kept on a list that is shown to
    people.
    """

    def __init__(self, on_bad_image: str):
        """on_bad_image: stop or skip."""
        self.stop = on_bad_image == "stop"
        self.seen: list[tuple[str, str]] = []

    def add(self, bad: Sequence[tuple[str, str]]) -> None:
        """bad: (name, cause) of each. Raises UserError about the first, if the run is to stop."""
        for name, cause in bad:
            if self.stop:
                raise UserError(
                    f"{name}: {cause}; mend or remove it, or use --on-bad-image skip (python -m dataset.check "
                    "finds all of them)"
                )
        self.seen += [(name, cause) for name, cause in bad]

    def take(self) -> list[tuple[str, str]]:
        """Those since the last call."""
        seen, self.seen = self.seen, []
        return seen


def join(parts: Sequence[HostTensors]) -> HostTensors:
    """Raws one after the other -> one raw."""
    return parts[0] if len(parts) == 1 else tuple(map(torch.cat, zip(*parts)))


class ImageLoader:
    """The given rows of a source as a view shows them, in order, as often as they are read."""

    def __init__(self, source: Source, view: View, rows: np.ndarray, workers: int, device: torch.device):
        chunks = ImageChunks(source, view, rows)
        self.view, self.device = view, device
        self.chunks = PrefetchLoader(chunks, range(len(chunks)), workers, pin_memory=device.type == "cuda")

    def read(self, bad: BadImages) -> Iterator[tuple[Tensor, Tensor]]:
        """(x [n, c, h, w] on the device, rows [n]). Bad images are left out, and told to `bad`."""
        for raw, got, unusable in self.chunks:
            bad.add(unusable)
            if len(got):
                yield to_device(self.view, raw, self.device), got


class EvalLoader:
    """A rank's share of the test images; every image is in exactly one share."""

    def __init__(self, data: EvalData, rank: int, world: int, workers: int, device: torch.device):
        share = np.arange(rank, len(data.test_labels), world)  # [m]
        self.images = ImageLoader(data.test_images, data.eval_view, share, workers, device)
        self.labels = torch.from_numpy(data.test_labels)  # [M]

    def read(self, bad: BadImages) -> Iterator[tuple[Tensor, Tensor]]:
        """(x [n, c, h, w], y [n]) on the device."""
        for x, rows in self.images.read(bad):
            yield x, self.labels[rows].to(x.device, non_blocking=True)


def to_device(view: View, raw: HostTensors, device: torch.device) -> Tensor:
    """The second half of a view, where the network is: -> [n, c, h, w]."""
    return view.device(
        (raw[0].to(device, non_blocking=True), *raw[1:])
    )  # pixels; parameters stay (dataset/device_views.py)
