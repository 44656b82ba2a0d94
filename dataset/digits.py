"""1,797 handwritten digits, 8×8 gray (digits_SOURCE.md): real data that needs no network."""

from functools import lru_cache, partial
from operator import itemgetter
from pathlib import Path
from typing import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dataset import splits
from dataset.loader import Data, HostTensors, SplitId, View
from dataset.source import Arrays

FILE = Path(__file__).with_name("digits.npz")
MEAN, STD = 4.88, 6.02  # of the 1,797 images, ink from 0 to 16
SIZE = (
    16  # of a view: a turn or shift by parts of a pixel blurs an 8×8 image, drawn twice as large it does not
)


def build(labels_per_class: int, seed: int) -> Data:
    """The digits with `labels_per_class` labeled images a class, drawn by `seed` from the 1,437 that are not
    test images.

    All 1,437 are unlabeled images, the labeled ones too. Raises UserError if there are too few images of a
    class.
    """
    with np.load(FILE, allow_pickle=False) as file:
        images, labels, test = file["images"], file["labels"].astype(np.int64), file["test"]
    train_images, train_labels = images[~test], labels[~test]  # [1437, 8, 8], [1437]
    labeled, sha = splits.draw(train_labels, labels_per_class, seed)  # [10·labels_per_class]
    return Data(
        images=Arrays(train_images),
        labels=train_labels,
        labeled=labeled,
        unlabeled=np.arange(len(train_labels)),
        test_images=Arrays(images[test]),
        test_labels=labels[test],
        weak_view=WEAK,
        strong_view=STRONG,
        eval_view=EVAL_VIEW,
        classes=[str(c) for c in range(10)],
        channels=1,
        split=SplitId(f"digits-{labels_per_class}-seed{seed}", sha),
    )


def eval_view(images: Sequence[np.ndarray], u: np.ndarray) -> Tensor:
    """n images [8, 8] uint8, 0 to 16 -> normalized [n, 1, 16, 16] float32."""
    return _normalize(_affine(images, torch.zeros(len(images), 6), degrees=0, shift=0, stretch=0, shear=0))


def weak(images: Sequence[np.ndarray], u: np.ndarray) -> Tensor:
    """A little rotation, shift, stretch and shear. n images [8, 8] uint8, [n, 6] -> [n, 1, 16, 16] float32."""
    return _normalize(_affine(images, _signed(u), degrees=10, shift=0.5, stretch=0.15, shear=0.2))


def strong(images: Sequence[np.ndarray], u: np.ndarray) -> Tensor:
    """More of the same, fainter ink, and a patch of paper over part of the digit. n [8, 8], [n, 10] -> [n, 1,
    16, 16].

    No flips: a mirrored digit is another sign. No thicker ink: it would close the holes that tell an 8 from a
    1.
    """
    x = _affine(images, _signed(u[:, :6]), degrees=25, shift=1, stretch=0.3, shear=0.4)  # [n, 1, 16, 16]
    u = torch.from_numpy(u).float()  # [n, 10]
    x = x * torch.exp(-0.5 * u[:, 6]).view(-1, 1, 1, 1)  # [n, 1, 16, 16]
    return _normalize(_cover(x, center=8 * u[:, 7:9], side=4.5 * u[:, 9]))


def _view(num_uniforms: int, function: Callable[[Sequence[np.ndarray], np.ndarray], Tensor]) -> View:
    """A view that is all made on the host."""
    return View(num_uniforms, partial(_alone, function), itemgetter(0))


def _alone(
    function: Callable[[Sequence[np.ndarray], np.ndarray], Tensor],
    images: Sequence[np.ndarray],
    u: np.ndarray,
) -> HostTensors:
    return (function(images, u),)


WEAK, STRONG, EVAL_VIEW = _view(6, weak), _view(10, strong), _view(0, eval_view)


def _normalize(x: Tensor) -> Tensor:
    return (x - MEAN) / STD


def _signed(u: np.ndarray) -> Tensor:
    return torch.from_numpy(2 * u - 1).float()


def _affine(
    images: Sequence[np.ndarray], a: Tensor, degrees: float, shift: float, stretch: float, shear: float
) -> Tensor:
    """Make each of n [8, 8] upright, rotate, shift, stretch and shear it about its center, and draw it anew,
    bicubic, paper (0) from outside.

    a [n, 6] in [−1, 1): how far to go, of at most `degrees`; `shift` pixels of 8, along x and y; a factor
    exp(`stretch`) along x and y; `shear` of x by y. -> [n, 1, SIZE, SIZE]
    """
    x, n = torch.from_numpy(np.stack(images)).float().unsqueeze(1), len(images)  # [n, 1, 8, 8]
    angle = torch.deg2rad(degrees * a[:, 0])  # [n]
    cos, sin = angle.cos(), angle.sin()  # [n], [n]
    to_source = torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)  # [n, 2, 2]
    to_source[:, :, 1] = to_source[:, :, 1] + shear * a[:, 5:6] * to_source[:, :, 0]
    to_source = to_source / torch.exp(stretch * a[:, None, 3:5])  # [n, 2, 2]
    offset = shift * a[:, 1:3] * 2 / 8  # [n, 2], the image being 2 wide and high
    stance = torch.stack([_stance(image.tobytes()) for image in images])  # [n, 2, 3]
    to_source = stance[:, :, :2] @ torch.cat([to_source, offset.unsqueeze(2)], 2)  # [n, 2, 3]
    to_source[:, :, 2] = to_source[:, :, 2] + stance[:, :, 2]
    grid = F.affine_grid(to_source, [n, 1, SIZE, SIZE], align_corners=False)
    return F.grid_sample(x, grid, mode="bicubic", align_corners=False)  # [n, 1, SIZE, SIZE]


@lru_cache(maxsize=2000)
def _stance(image: bytes) -> Tensor:
    """How the ink of an image [8, 8] stands, by its moments: the map from upright and centerd to there, [2,
    3].

    Coordinates run from −1 to 1. Writers differ in slant, digits do not. Every image is seen hundreds of
    times, so it is kept.
    """
    ink = torch.frombuffer(bytearray(image), dtype=torch.uint8).view(1, 8, 8).float()  # [1, 8, 8]
    ink = ink / ink.sum(dim=(1, 2)).view(-1, 1, 1)
    place = (torch.arange(8) + 0.5) / 4 - 1  # [8]
    center = torch.stack([(ink * place).sum((1, 2)), (ink * place[:, None]).sum((1, 2))], 1)  # [1, 2]
    dx, dy = (
        place - center[:, 0].view(-1, 1, 1),
        place[:, None] - center[:, 1].view(-1, 1, 1),
    )  # [1, 1, 8], [1, 8, 1]
    shear = (ink * dx * dy).sum((1, 2)) / (ink * dy * dy).sum((1, 2))  # [1]
    return torch.tensor([[1, shear, center[0, 0]], [0, 1, center[0, 1]]])  # [2, 3]


def _cover(x: Tensor, center: Tensor, side: Tensor) -> Tensor:
    """Put a square of paper (0), `side` [n] of the digit's 8 pixels wide, over `center` [n, 2] of each x [n,
    1, SIZE, SIZE].
    """
    place = (torch.arange(SIZE) + 0.5) * 8 / SIZE  # [SIZE]
    half = side[:, None] / 2  # [n, 1]
    inside = ((place - center[:, :1]).abs() < half)[:, :, None] & ((place - center[:, 1:]).abs() < half)[
        :, None
    ]
    return x.masked_fill(inside.unsqueeze(1), 0)  # [n, 1, SIZE, SIZE]
