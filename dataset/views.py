"""Views of images, as batched functions of the images and of the uniform numbers that decide them."""
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dataset.loader import View

DIGITS_MEAN, DIGITS_STD = 4.88, 6.02    # of the 1,797 images, ink from 0 to 16


def digits_plain(images: np.ndarray) -> Tensor:
    """[n, 8, 8] uint8, 0 to 16 -> normalised [n, 1, 8, 8] float32."""
    x = torch.from_numpy(images).float().unsqueeze(1)                       # [n, 1, 8, 8]
    return (x - DIGITS_MEAN) / DIGITS_STD


def digits_weak(images: np.ndarray, u: np.ndarray) -> Tensor:
    """A little rotation, shift, stretch and shear. [n, 8, 8] uint8, [n, 6] -> [n, 1, 8, 8] float32."""
    x = torch.from_numpy(images).float().unsqueeze(1)                       # [n, 1, 8, 8]
    x = _affine(x, _signed(u), degrees=10, shift=0.5, stretch=0.15, shear=0.2)
    return (x - DIGITS_MEAN) / DIGITS_STD


def digits_strong(images: np.ndarray, u: np.ndarray) -> Tensor:
    """More of the same, fainter ink, and a patch of paper over part of the digit. [n, 8, 8], [n, 10] -> [n, 1, 8, 8].

    No flips: a mirrored digit is another sign. No thicker ink: it would close the holes that tell an 8 from a 1.
    """
    x = torch.from_numpy(images).float().unsqueeze(1)                       # [n, 1, 8, 8]
    x = _affine(x, _signed(u[:, :6]), degrees=15, shift=0.75, stretch=0.2, shear=0.25)
    u = torch.from_numpy(u).float()                                         # [n, 10]
    x = x * torch.exp(-0.5 * u[:, 6]).view(-1, 1, 1, 1)                     # [n, 1, 8, 8]
    x = _cover(x, centre=8 * u[:, 7:9], side=3 * u[:, 9])
    return (x - DIGITS_MEAN) / DIGITS_STD


DIGITS = {"weak": View(6, digits_weak), "strong": View(10, digits_strong), "plain": digits_plain}


def _signed(u: np.ndarray) -> Tensor:
    return torch.from_numpy(2 * u - 1).float()


def _affine(x: Tensor, a: Tensor, degrees: float, shift: float, stretch: float, shear: float) -> Tensor:
    """Rotate, shift, stretch and shear [n, 1, h, w] about its centre, bilinear, paper (0) from outside.

    a [n, 6] in [−1, 1): how far to go, of at most `degrees`; `shift` pixels along x and y; a factor exp(`stretch`) along x
    and y; `shear` of x by y.
    """
    n, _, h, w = x.shape
    angle = torch.deg2rad(degrees * a[:, 0])                                # [n]
    cos, sin = angle.cos(), angle.sin()                                     # [n], [n]
    to_source = torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)       # [n, 2, 2]
    to_source[:, :, 1] = to_source[:, :, 1] + shear * a[:, 5:6] * to_source[:, :, 0]
    to_source = to_source / torch.exp(stretch * a[:, None, 3:5])            # [n, 2, 2]
    offset = shift * a[:, 1:3] * x.new_tensor([2 / w, 2 / h])               # [n, 2], the image being 2 wide and high
    grid = F.affine_grid(torch.cat([to_source, offset.unsqueeze(2)], 2), [n, 1, h, w], align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)                      # [n, 1, h, w]


def _cover(x: Tensor, centre: Tensor, side: Tensor) -> Tensor:
    """Put a square of paper (0), `side` [n] pixels wide, over `centre` [n, 2] of each image [n, 1, h, w]."""
    rows = torch.arange(x.shape[2]) + 0.5                                   # [h]
    cols = torch.arange(x.shape[3]) + 0.5                                   # [w]
    half = side[:, None] / 2                                                # [n, 1]
    inside = ((rows - centre[:, :1]).abs() < half)[:, :, None] & ((cols - centre[:, 1:]).abs() < half)[:, None]
    return x.masked_fill(inside.unsqueeze(1), 0)                            # [n, 1, h, w]
