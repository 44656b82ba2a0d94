"""Flips and color stages of views, applied in batches on the training device, with parameters per image.

Every op rounds to whole values of 0 to 255 as Pillow does, so that for the same parameters both paths give
the same image to about one level. Images are [n, 3, h, w] float32 with whole numbers. The parameters are on
the CPU, where the images that an op applies to are selected; a selection on a GPU would have to wait for it.
"""

import functools
import itertools
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from util.device import copy_async

ORDERS = list(itertools.permutations(range(4)))  # of brightness, contrast, saturation, hue
BLUR_PASSES = 3  # Pillow's Gaussian is three box filters in each direction


def crop_resize(image: Image.Image, box: Sequence[float], size: int) -> np.ndarray:
    """Crop and resize (bilinear) -> [size, size, 3] uint8: the same as Pillow to within one level, in half
    the time.

    box: left, top, width, height
    """
    left, top, w, h = map(int, box)
    pixels = torch.from_numpy(np.array(image.crop((left, top, left + w, top + h))))  # [h, w, 3]
    x = F.interpolate(
        pixels.permute(2, 0, 1)[None], (size, size), mode="bilinear", antialias=True
    )  # [1, 3, size, size]
    return x[0].permute(1, 2, 0).numpy()  # [size, size, 3]


def finish(
    tensors: tuple[Tensor, ...], stages: Sequence[str], mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """Apply `stages`, names in STAGES, and normalize -> [n, 3, h, w] float32.

    tensors: pixels [n, h, w, 3] uint8, and the parameters [n, k] of each stage
    """
    pixels, *params = tensors
    x = pixels.permute(0, 3, 1, 2).float()  # [n, 3, h, w], channels last in memory
    for name, p in zip(stages, params, strict=True):
        x = STAGES[name](x, p)  # [n, 3, h, w]
    m, s = (constant(tuple(v), x.device).view(1, 3, 1, 1) for v in (mean, std))  # [1, 3, 1, 1] each
    return (x / 255 - m) / s  # [n, 3, h, w]


@functools.cache
def constant(values: tuple, device: torch.device) -> Tensor:
    """Return a tensor of these numbers on `device`; it is copied there once."""
    return copy_async(torch.tensor(values), device)


def flip(x: Tensor, p: Tensor) -> Tensor:
    """Flip horizontally. p [n, 1]: whether to apply it."""
    return torch.where(_applies(x, p), x.flip(3), x)  # [n, 3, h, w]


def grayscale(x: Tensor, p: Tensor) -> Tensor:
    """Convert to three equal channels. p [n, 1]: whether to apply it."""
    return torch.where(_applies(x, p), luma(x), x)  # [n, 3, h, w]


def solarize(x: Tensor, p: Tensor) -> Tensor:
    """Invert the values of 128 and more. p [n, 1]: whether to apply it."""
    return torch.where(_applies(x, p) & (x >= 128), 255 - x, x)  # [n, 3, h, w]


def _applies(x: Tensor, p: Tensor) -> Tensor:
    return copy_async(p, x.device).bool().view(-1, 1, 1, 1)  # [n, 1, 1, 1]


def jitter(x: Tensor, p: Tensor) -> Tensor:
    """Change brightness, contrast, saturation and hue in random order.

    p [n, 6]: whether to apply it, the index in ORDERS, three factors, and the shift of the hue
    """
    orders = torch.tensor(ORDERS)[p[:, 1].long()]  # [n, 4]
    applies = (orders.T[:, None] == torch.arange(4)[:, None]) & p[:, 0].bool()  # [position, op, n]
    rows = copy_async(applies.nonzero()[:, 2], x.device)  # by position, then by op
    groups = rows.split(applies.sum(dim=2).flatten().tolist())  # [m] each
    p = copy_async(p, x.device)  # [n, 6]
    x = x.clone()
    for group, (k, op) in zip(groups, 4 * [*enumerate((brightness, contrast, saturation, hue))]):
        x[group] = op(x[group], p[group, 2 + k].view(-1, 1, 1, 1))
    return x


def brightness(x: Tensor, factor: Tensor) -> Tensor:
    """Blend x [n, 3, h, w] with black; factor [n, 1, 1, 1], here and below."""
    return blend(torch.zeros_like(x), x, factor)


def contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Blend x with the mean of its luma."""
    mean = luma(x).double().mean(dim=(1, 2, 3), keepdim=True).add(0.5).floor().float()  # [n, 1, 1, 1]
    return blend(mean, x, factor)


def saturation(x: Tensor, factor: Tensor) -> Tensor:
    """Blend x with its luma."""
    return blend(luma(x), x, factor)


def blend(a: Tensor, b: Tensor, factor: Tensor) -> Tensor:
    """Return a + factor·(b − a), clipped to 0 … 255 and truncated to whole numbers: [n, 3, h, w]."""
    return (a + factor * (b - a)).clamp(0, 255).floor()


def luma(x: Tensor) -> Tensor:
    """Convert to gray [n, 3, h, w] -> [n, 1, h, w] by ITU-R 601-2, in Pillow's 16-bit fixed-point numbers."""
    x = x.int()
    return ((19595 * x[:, :1] + 38470 * x[:, 1:2] + 7471 * x[:, 2:] + 32768) >> 16).float()


def hue(x: Tensor, shift: Tensor) -> Tensor:
    """Rotate the hue by `shift` full turns [n, 1, 1, 1], in Pillow's HSV with 8 bits per channel.

    float64 is used where Pillow's C code uses doubles: an error of one level is 1.4 degrees of hue.
    """
    top, low = x.amax(dim=1, keepdim=True), x.amin(dim=1, keepdim=True)  # [n, 1, h, w] each
    span = (top - low).clamp_min(1)  # [n, 1, h, w]
    rc, gc, bc = ((top - x) / span).split(1, dim=1)  # [n, 1, h, w] each
    r, g, _ = x.split(1, dim=1)  # [n, 1, h, w] each
    h = torch.where(
        r == top,
        bc - gc,
        torch.where(g == top, (2 + rc.double() - bc).float(), (4 + gc.double() - rc).float()),
    )
    h = ((h.double() / 6 + 1) % 1).float()  # [n, 1, h, w]
    gray_pixel = top == low  # [n, 1, h, w]
    h = torch.where(gray_pixel, 0, (h.double() * 255).floor().float())  # [n, 1, h, w], whole numbers
    s = torch.where(
        gray_pixel, 0, (((top - low) / top.clamp_min(1)).double() * 255).floor().float()
    )  # [n, 1, h, w], whole
    h = (h + (shift * 255).trunc()) % 256  # [n, 1, h, w]

    sector = (h * 6 / 255).floor()  # [n, 1, h, w]
    f, s = h.double() * 6 / 255 - sector, s.double() / 255  # [n, 1, h, w] each
    v = top  # [n, 1, h, w]
    p, q, t = ((v * (1 - s * part)).add(0.5).floor().float() for part in (1, f, 1 - f))  # [n, 1, h, w] each
    sector = (sector % 6).long()  # [n, 1, h, w]
    table = torch.stack([v, q, p, t])  # [4, n, 1, h, w]
    pick = constant(((0, 1, 2, 2, 3, 0), (3, 0, 0, 1, 2, 2), (2, 2, 3, 0, 0, 1)), x.device)  # [3, 6]
    return torch.cat([table.gather(0, pick[c][sector][None])[0] for c in range(3)], dim=1)  # [n, 3, h, w]


def blur(x: Tensor, p: Tensor) -> Tensor:
    """Blur (Gaussian, replicate padding). p [n, 2]: whether to apply it, and the standard deviation."""
    rows = torch.nonzero(p[:, 0]).flatten()  # [m]
    radius = box_radius(p[rows, 1].double())  # [m]
    reach = 1 + int(radius.max()) if len(rows) else 1
    offsets = torch.arange(-reach, reach + 1)  # [k]
    weight = (radius[:, None] + 1 - offsets.abs()).clamp(0, 1)  # [m, k]: 1 inside, the fraction at both ends
    weight = copy_async((weight / (2 * radius[:, None] + 1)).float(), x.device)  # [m, k]
    rows = copy_async(rows, x.device)  # [m]
    y = x[rows]  # [m, 3, h, w]
    for dim in (3, 2):
        for _ in range(BLUR_PASSES):
            y = box(y, weight, dim)
    x = x.clone()
    x[rows] = y
    return x


def box(x: Tensor, weight: Tensor, dim: int) -> Tensor:
    """Average 2·reach + 1 neighbors along `dim` (2 or 3) with weights.

    x [m, 3, h, w], weight [m, 2·reach + 1] -> [m, 3, h, w]
    """
    reach, length = weight.shape[1] // 2, x.shape[dim]
    padded = F.pad(x, (reach, reach, 0, 0) if dim == 3 else (0, 0, reach, reach), mode="replicate")
    y = torch.zeros_like(x)  # [m, 3, h, w]
    for k in range(2 * reach + 1):
        y = y + weight[:, k].view(-1, 1, 1, 1) * padded.narrow(dim, k, length)
    return y.add(0.5).floor()  # [m, 3, h, w]


def box_radius(sigma: Tensor) -> Tensor:
    """Return the fractional radius [m] of a box filter whose BLUR_PASSES passes have variance sigma [m]²."""
    variance = sigma**2 / BLUR_PASSES
    whole = ((12 * variance + 1).sqrt().sub(1) / 2).floor()
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    return whole + part


STAGES = {"Flip": flip, "Jitter": jitter, "Grayscale": grayscale, "Blur": blur, "Solarize": solarize}
