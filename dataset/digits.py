"""1,797 handwritten digits, 8×8 gray (digits_SOURCE.md). They are part of the repository."""

from collections.abc import Sequence
from functools import lru_cache
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dataset import splits
from dataset.loader import Data, HostTensors, SplitId, View
from dataset.source import Arrays

# util/fields.py reads these literals from the source.
SETTINGS = {"strong_views": (1, "number of strong views of an unlabeled image", "(0, 100]")}
USES = ("labels_per_class",)

FILE = Path(__file__).with_name("digits.npz")
MEAN, STD = 4.88, 6.02  # of the pixel values of all 1,797 images, which range from 0 (background) to 16 (ink)
SIZE = 16  # side of a view: resampling at 8×8 would blur the digit


def build(labels_per_class: int, seed: int, strong_views: int = 1) -> Data:
    """Build the digits with `labels_per_class` labeled images per class, drawn by `seed`, and
    `strong_views` strong views, which differ in their random numbers.

    All 1,437 training images are unlabeled images, the labeled images too; the other 360 are test images.
    Raises UserError if a class has too few images.
    """
    with np.load(FILE, allow_pickle=False) as file:
        images, labels, test = file["images"], file["labels"].astype(np.int64), file["test"]
    train_images, train_labels = images[~test], labels[~test]  # [1437, 8, 8], [1437]
    labeled, sha = splits.draw_rows(train_labels, labels_per_class, seed)  # [10·labels_per_class]
    return Data(
        images=Arrays(train_images),
        labels=train_labels,
        labeled=labeled,
        unlabeled=np.arange(len(train_labels)),
        test_images=Arrays(images[test]),
        test_labels=labels[test],
        weak_view=WEAK,
        strong_views=strong_views * (STRONG,),
        eval_view=EVAL_VIEW,
        classes=[str(c) for c in range(10)],
        channels=1,
        split=SplitId(f"digits-{labels_per_class}-seed{seed}", sha),
    )


def eval_view(images: Sequence[np.ndarray], u: np.ndarray) -> HostTensors:
    """n images [8, 8] uint8, 0 to 16 -> normalized [n, 1, 16, 16] float32."""
    return _normalize(_affine(images, torch.zeros(len(images), 6), degrees=0, shift=0, stretch=0, shear=0))


def weak(images: Sequence[np.ndarray], u: np.ndarray) -> HostTensors:
    """Rotate, shift, stretch and shear weakly. n images [8, 8] uint8, u [n, 6] -> [n, 1, 16, 16] float32."""
    return _normalize(_affine(images, _signed(u), degrees=10, shift=0.5, stretch=0.15, shear=0.2))


def strong(images: Sequence[np.ndarray], u: np.ndarray) -> HostTensors:
    """Rotate, shift, stretch and shear strongly, fade the ink, and cut out a square. n images [8, 8] uint8,
    u [n, 10] -> [n, 1, 16, 16] float32.

    There are no flips, because a mirrored digit is not a digit, and no thicker ink, because it would fill the
    holes of an 8.
    """
    x = _affine(images, _signed(u[:, :6]), degrees=25, shift=1, stretch=0.3, shear=0.4)  # [n, 1, 16, 16]
    fade, *position, side = torch.from_numpy(u[:, 6:]).float().unbind(1)  # [n] each
    x = x * torch.exp(-0.5 * fade).view(-1, 1, 1, 1)  # [n, 1, 16, 16]
    return _normalize(_cutout(x, center=8 * torch.stack(position, 1), side=4.5 * side))


WEAK, STRONG, EVAL_VIEW = (
    View(num_uniforms, transform, itemgetter(0), SIZE)  # entirely on the CPU
    for num_uniforms, transform in ((6, weak), (10, strong), (0, eval_view))
)


def _normalize(x: Tensor) -> HostTensors:
    return ((x - MEAN) / STD,)


def _signed(u: np.ndarray) -> Tensor:
    return torch.from_numpy(2 * u - 1).float()


def _affine(
    images: Sequence[np.ndarray], a: Tensor, degrees: float, shift: float, stretch: float, shear: float
) -> Tensor:
    """Deslant and center each of n images [8, 8], then rotate, shift, stretch and shear it about its center
    (bicubic, zero padding) -> [n, 1, SIZE, SIZE].

    a [n, 6] in [−1, 1): the rotation as a share of `degrees`; the shifts along x and y, of `shift` pixels of
    the 8; the stretches along x and y, by a factor of exp(`stretch`); the shear of x by y, of `shear`.
    """
    x, n = torch.from_numpy(np.stack(images)).float().unsqueeze(1), len(images)  # [n, 1, 8, 8]
    angle = torch.deg2rad(degrees * a[:, 0])  # [n]
    cos, sin = angle.cos(), angle.sin()  # [n], [n]
    to_source = torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)  # [n, 2, 2]
    to_source[:, :, 1] = to_source[:, :, 1] + shear * a[:, 5:6] * to_source[:, :, 0]
    to_source = to_source / torch.exp(stretch * a[:, None, 3:5])  # [n, 2, 2]
    offset = shift * a[:, 1:3] * 2 / 8  # [n, 2]; coordinates run from −1 to 1 over 8 pixels
    deslant = torch.stack([_deslant(image.tobytes()) for image in images])  # [n, 2, 3]
    to_source = deslant[:, :, :2] @ torch.cat([to_source, offset.unsqueeze(2)], 2)  # [n, 2, 3]
    to_source[:, :, 2] = to_source[:, :, 2] + deslant[:, :, 2]
    grid = F.affine_grid(to_source, [n, 1, SIZE, SIZE], align_corners=False)
    return F.grid_sample(x, grid, mode="bicubic", align_corners=False)  # [n, 1, SIZE, SIZE]


@lru_cache(maxsize=2000)
def _deslant(image: bytes) -> Tensor:
    """Compute from moments the affine map [2, 3] from the deslanted and centered digit to an image [8, 8].

    Coordinates run from −1 to 1. The slant depends on the writer and not on the digit. The maps are cached,
    because every image is used hundreds of times.
    """
    ink = torch.frombuffer(bytearray(image), dtype=torch.uint8).view(1, 8, 8).float()  # [1, 8, 8]
    ink = ink / ink.sum(dim=(1, 2)).view(-1, 1, 1)
    x = (torch.arange(8) + 0.5) / 4 - 1  # [8]
    center = torch.stack([(ink * x).sum((1, 2)), (ink * x[:, None]).sum((1, 2))], 1)  # [1, 2]
    dx = x - center[:, 0].view(-1, 1, 1)  # [1, 1, 8]
    dy = x[:, None] - center[:, 1].view(-1, 1, 1)  # [1, 8, 1]
    shear = (ink * dx * dy).sum((1, 2)) / (ink * dy * dy).sum((1, 2))  # [1]
    return torch.tensor([[1, shear, center[0, 0]], [0, 1, center[0, 1]]])  # [2, 3]


def _cutout(x: Tensor, center: Tensor, side: Tensor) -> Tensor:
    """Set a square of each x [n, 1, SIZE, SIZE] to 0; center [n, 2] and side [n] are in pixels of the 8."""
    position = (torch.arange(SIZE) + 0.5) * 8 / SIZE  # [SIZE]
    inside = (position - center[:, :, None]).abs() < side[:, None, None] / 2  # [n, 2, SIZE]
    square = inside[:, 0, :, None] & inside[:, 1, None]  # [n, SIZE, SIZE]
    return x.masked_fill(square.unsqueeze(1), 0)  # [n, 1, SIZE, SIZE]
