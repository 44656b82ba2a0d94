"""Loads test images and images to predict, each exactly once and in order."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dataset.loader import Data, EvalData, HostTensors, View, concatenate, to_device, view_bytes
from dataset.source import BadImage, Source
from dataset.workers import PrefetchLoader
from util.device import copy_async
from util.run.train_state import BadImages


class ImageChunks(Dataset):
    """chunk -> (tensors, rows [n], bad): images of a source in the view of an evaluation, `size` at a time.

    Unreadable images are left out, because a replacement would count in the accuracy.
    """

    def __init__(self, source: Source, view: View, rows: np.ndarray, size: int = 256):
        self.source, self.view = source, view
        self.chunks = np.split(rows, range(size, len(rows), size))

    def __len__(self) -> int:
        return len(self.chunks)

    def item_bytes(self) -> int:
        """Return the size of the tensors of the first chunk, which no other chunk exceeds."""
        return len(self.chunks[0]) * (view_bytes(self.source, self.view) + 8)  # 8: a row, int64

    def __getitem__(self, chunk: int) -> tuple[HostTensors, Tensor, list[tuple[str, str]]]:
        parts, rows, bad = [], [], []
        wanted, at_most = self.chunks[chunk], self.source.max_decoded
        for few_rows in np.split(wanted, range(at_most, len(wanted), at_most)):
            images = []
            for row in few_rows.tolist():
                try:
                    images.append(self.source[row])
                    rows.append(row)
                except BadImage as error:
                    bad.append((self.source.name(row), str(error)))
            if images:
                parts.append(self.view.cpu_transform(images, np.empty((len(images), 0))))
        return concatenate(parts), torch.tensor(rows, dtype=torch.long), bad


class ImageLoader:
    """Loads the given rows of a source, in order, in one view, any number of times."""

    def __init__(self, source: Source, view: View, rows: np.ndarray, workers: int, device: torch.device):
        chunks = ImageChunks(source, view, rows)
        self.view, self.device = view, device
        self.chunks = PrefetchLoader(
            chunks,
            range(len(chunks)),
            workers,
            pin_memory=device.type == "cuda",
            item_bytes=chunks.item_bytes(),
        )

    def batches(self, bad: BadImages) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (x [n, c, h, w] on the device, rows [n]). Unreadable images go to `bad` instead."""
        for tensors, rows, unreadable in self.chunks:
            bad.add(unreadable)
            if len(rows):
                yield to_device(self.view, tensors, self.device), rows


class EvalLoader(ImageLoader):
    """Loads a rank's share of the test images; every image is in exactly one share."""

    def __init__(self, data: Data | EvalData, rank: int, world: int, workers: int, device: torch.device):
        share = np.arange(rank, len(data.test_labels), world)  # [m]
        super().__init__(data.test_images, data.eval_view, share, workers, device)
        self.labels = torch.from_numpy(data.test_labels)  # [M]

    def batches(self, bad: BadImages) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (x [n, c, h, w], y [n]) on the device. Unreadable images go to `bad` instead."""
        for x, rows in super().batches(bad):
            yield x, copy_async(self.labels[rows], x.device)
