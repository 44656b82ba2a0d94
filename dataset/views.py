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
    """Up to 10 degrees of rotation and a shift of up to three quarters of a pixel. [n, 8, 8], [n, 3] -> [n, 1, 8, 8]."""
    x = torch.from_numpy(images).float().unsqueeze(1)                       # [n, 1, 8, 8]
    a = _signed(u)                                                          # [n, 3]
    x = _affine(x, degrees=10 * a[:, 0], shift=0.75 * a[:, 1:3])
    return (x - DIGITS_MEAN) / DIGITS_STD


def digits_strong(images: np.ndarray, u: np.ndarray) -> Tensor:
    """Rotation, scale, stretch, shear, shift, contrast, and a grey patch over part of the digit; no flips.

    [n, 8, 8] uint8, [n, 12] -> [n, 1, 8, 8] float32.
    """
    x = torch.from_numpy(images).float().unsqueeze(1)                       # [n, 1, 8, 8]
    a = _signed(u)                                                          # [n, 12]
    x = _affine(x, degrees=30 * a[:, 0], shift=1.5 * a[:, 1:3], scale=torch.exp(0.25 * a[:, 3:5]), shear=0.3 * a[:, 5])
    ink = torch.exp(0.5 * a[:, 6]).view(-1, 1, 1, 1)                        # [n, 1, 1, 1]
    x = (x * ink).clamp(0, 16)
    x = _cutout(x, centre=torch.from_numpy(u[:, 7:9]).float() * 8, side=4 * torch.from_numpy(u[:, 9]).float())
    return (x - DIGITS_MEAN) / DIGITS_STD


DIGITS = {"weak": View(3, digits_weak), "strong": View(12, digits_strong), "plain": digits_plain}


def _signed(u: np.ndarray) -> Tensor:
    return torch.from_numpy(2 * u - 1).float()


def _affine(x: Tensor, degrees: Tensor, shift: Tensor, scale: Tensor | None = None, shear: Tensor | None = None) -> Tensor:
    """Rotate, scale, shear and shift [n, 1, h, w] about its centre, bilinear, zeros from outside.

    degrees [n]; shift [n, 2] in pixels (x, y); scale [n, 2] (x, y); shear [n], x by y.
    """
    n, _, h, w = x.shape
    angle = torch.deg2rad(degrees)                                          # [n]
    cos, sin = angle.cos(), angle.sin()
    inverse = torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)     # [n, 2, 2]
    if shear is not None:
        inverse[:, :, 1] = inverse[:, :, 1] + shear[:, None] * inverse[:, :, 0]
    if scale is not None:
        inverse = inverse / scale[:, None, :]
    offset = shift * shift.new_tensor([2 / w, 2 / h])                       # [n, 2], in units of grid_sample
    grid = F.affine_grid(torch.cat([inverse, offset.unsqueeze(2)], 2), [n, 1, h, w], align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)                      # [n, 1, h, w]


def _cutout(x: Tensor, centre: Tensor, side: Tensor) -> Tensor:
    """Cover a square of `side` [n] pixels around `centre` [n, 2] of each image with the mean ink."""
    rows = torch.arange(x.shape[2]) + 0.5                                   # [h]
    cols = torch.arange(x.shape[3]) + 0.5                                   # [w]
    half = side[:, None] / 2                                                # [n, 1]
    inside = ((rows - centre[:, :1]).abs() < half)[:, :, None] & ((cols - centre[:, 1:]).abs() < half)[:, None]
    return torch.where(inside.unsqueeze(1), DIGITS_MEAN, x)
