"""Views of photographs: every pipeline of the recipes in one table, and the stages they are made of.

A stage turns uniform numbers into parameters (`sample`), and applies them to one PIL image (`pil`). Where
dataset/device_views.py knows the stage too, it can be applied in batches on the training device instead.
"""

import math
from functools import partial
from typing import Callable, NamedTuple, Optional, Sequence, Union

import numpy as np
import torch
import torchvision.transforms.functional as TF
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor

from dataset import device_views
from dataset.loader import HostTensors, View
from dataset.randaugment import RandAugment
from util.errors import UserError


class ResizedCrop(NamedTuple):
    """A part of the image with `scale` of its area and an aspect ratio of 3/4 to 4/3, resized to size × size
    (bilinear).
    """

    size: int
    scale: tuple[float, float]
    num_uniforms = 22

    def sample(self, u: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """u [n, 22], sizes [n, 2] (width, height) -> left, top, width, height [n, 4]. Of ten tries the first
        that fits; if none does, the middle of the image, as near to the allowed ratios as it is.
        """
        width, height = sizes[:, :1], sizes[:, 1:]  # [n, 1], [n, 1]
        low, high = self.scale
        area = width * height * (low + (high - low) * u[:, :10])  # [n, 10]
        ratio = np.exp(math.log(3 / 4) + math.log(16 / 9) * u[:, 10:20])  # [n, 10]
        w, h = np.round(np.sqrt(area * ratio)), np.round(np.sqrt(area / ratio))  # [n, 10] each
        fits = (0 < w) & (w <= width) & (0 < h) & (h <= height)  # [n, 10]
        first, line = fits.argmax(1), np.arange(len(u))  # [n], [n]
        w, h = w[line, first], h[line, first]  # [n], [n]
        left = np.floor(u[:, 20] * (width[:, 0] - w + 1))  # [n]
        top = np.floor(u[:, 21] * (height[:, 0] - h + 1))  # [n]
        middle_w = np.minimum(width, np.round(height * 4 / 3))[:, 0]  # [n]
        middle_h = np.minimum(height, np.round(width * 4 / 3))[:, 0]  # [n]
        middle = np.stack(
            [(width[:, 0] - middle_w) // 2, (height[:, 0] - middle_h) // 2, middle_w, middle_h], 1
        )  # [n, 4]
        return np.where(fits.any(1)[:, None], np.stack([left, top, w, h], 1), middle)  # [n, 4]

    def pil(self, image: Image.Image, p: np.ndarray) -> Image.Image:
        left, top, w, h = map(int, p)
        return image.crop((left, top, left + w, top + h)).resize(
            (self.size, self.size), Image.Resampling.BILINEAR
        )


class PadCrop(NamedTuple):
    """`size` × `size` pixels from the image with `pad` mirrored ones around it."""

    size: int
    pad: int
    num_uniforms = 2

    def sample(self, u: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """u [n, 2], sizes [n, 2] -> left, top [n, 2]."""
        return np.floor(u * (sizes + 2 * self.pad - self.size + 1))  # [n, 2]

    def pil(self, image: Image.Image, p: np.ndarray) -> Image.Image:
        pixels = np.pad(
            np.asarray(image), ((self.pad, self.pad), (self.pad, self.pad), (0, 0)), "reflect"
        )  # [h, w, 3]
        left, top = map(int, p)
        return Image.fromarray(pixels[top : top + self.size, left : left + self.size])


class CenterCrop(NamedTuple):
    """The shorter side resized to `resize` (bilinear), then the middle size × size pixels."""

    resize: int
    size: int
    num_uniforms = 0

    def sample(self, u: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        return np.empty((len(u), 0))

    def pil(self, image: Image.Image, p: np.ndarray) -> Image.Image:
        return TF.center_crop(TF.resize(image, self.resize), self.size)


class Flip(NamedTuple):
    """Left and right exchanged with probability ½."""

    num_uniforms = 1

    def sample(self, u: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        return (u < 0.5).astype(float)  # [n, 1]

    def pil(self, image: Image.Image, p: np.ndarray) -> Image.Image:
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if p[0] else image


class Jitter(NamedTuple):
    """Brightness, contrast, saturation and hue changed in random order, with probability p (torchvision's
    ColorJitter).
    """

    brightness: float
    contrast: float
    saturation: float
    hue: float
    p: float
    num_uniforms = 6

    def sample(self, u: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """u [n, 6] -> [n, 6]: whether to apply it, the order's number, three factors, a shift of the hue in
        turns.
        """
        top = np.array([self.brightness, self.contrast, self.saturation])  # [3]
        return np.concatenate(
            [
                u[:, :1] < self.p,
                np.floor(24 * u[:, 1:2]),
                1 + (2 * u[:, 2:5] - 1) * top,
                (2 * u[:, 5:] - 1) * self.hue,
            ],
            1,
        )  # [n, 6]

    def pil(self, image: Image.Image, p: np.ndarray) -> Image.Image:
        ops = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
        if p[0]:
            for k in device_views.ORDERS[int(p[1])]:
                image = ops[k](image, float(p[2 + k]))
        return image


class Grayscale(NamedTuple):
    """Three equal channels, with probability p."""

    p: float
    num_uniforms = 1

    def sample(self, u: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        return (u < self.p).astype(float)  # [n, 1]

    def pil(self, image: Image.Image, p: np.ndarray) -> Image.Image:
        return image.convert("L").convert("RGB") if p[0] else image


class Blur(NamedTuple):
    """Gaussian blur of standard deviation `low` to `high` pixels, with probability p."""

    low: float
    high: float
    p: float
    num_uniforms = 2

    def sample(self, u: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """u [n, 2] -> [n, 2]: whether to apply it, the standard deviation."""
        return np.stack([u[:, 0] < self.p, self.low + (self.high - self.low) * u[:, 1]], 1)  # [n, 2]

    def pil(self, image: Image.Image, p: np.ndarray) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(float(p[1]))) if p[0] else image


class Solarize(NamedTuple):
    """Values of 128 and more inverted, with probability p."""

    p: float
    num_uniforms = 1

    def sample(self, u: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        return (u < self.p).astype(float)  # [n, 1]

    def pil(self, image: Image.Image, p: np.ndarray) -> Image.Image:
        return ImageOps.solarize(image, 128) if p[0] else image


class Cutout(NamedTuple):
    """A gray (127) square of `side` pixels, its center anywhere in the image."""

    side: int
    num_uniforms = 2

    def sample(self, u: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """u [n, 2] -> the center as shares of width and height [n, 2]."""
        return u

    def pil(self, image: Image.Image, p: np.ndarray) -> Image.Image:
        left, top = (max(0, int(share * side - self.side / 2)) for share, side in zip(p, image.size))
        image = image.copy()
        image.paste(
            (127, 127, 127),
            (left, top, min(image.size[0], left + self.side), min(image.size[1], top + self.side)),
        )
        return image


Stage = Union[ResizedCrop, PadCrop, CenterCrop, Flip, Jitter, Grayscale, Blur, Solarize, Cutout, RandAugment]

CROP, MOCO = (
    ResizedCrop(224, (0.2, 1.0)),
    (Jitter(0.4, 0.4, 0.4, 0.1, p=0.8), Grayscale(0.2), Blur(0.1, 2.0, p=0.5)),
)
MULTICROP = {
    "multicrop_224": (224, (0.140, 1.000)),
    "multicrop_192": (192, (0.117, 0.860)),
    "multicrop_160": (160, (0.095, 0.715)),
    "multicrop_120": (120, (0.073, 0.571)),
    "multicrop_96": (96, (0.050, 0.429)),
}
PIPELINES: dict[str, tuple[Stage, ...]] = {
    "weak": (CROP, Flip()),
    "moco": (CROP, Flip(), *MOCO),
    "rand": (CROP, Flip(), RandAugment(2, "imagenet")),
    "stack": (CROP, Flip(), *MOCO, RandAugment(2, "imagenet")),
    **{
        name: (
            ResizedCrop(*crop),
            Flip(),
            Jitter(0.4, 0.4, 0.2, 0.1, p=0.8),
            Grayscale(0.2),
            Blur(0.1, 2.0, p=0.5),
            Solarize(0.1),
        )
        for name, crop in MULTICROP.items()
    },
    "eval": (CenterCrop(256, 224),),
    "cifar_weak": (PadCrop(32, 4), Flip()),
    "cifar_strong": (PadCrop(32, 4), Flip(), RandAugment(2, "cifar", p=0.5), Cutout(16)),
    "cifar_eval": (),
}
CIFAR_FILES = (CenterCrop(32, 32),)  # image files for a CIFAR network
IMAGENET_NORM = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CIFAR10_NORM = ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616))
CIFAR100_NORM = ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))


def pipeline(name: str, size: int = 224) -> tuple[Stage, ...]:
    """The stages of PIPELINES[name]; with another `size` than 224, its crops are smaller or larger in
    proportion.
    """
    if name not in PIPELINES:
        raise UserError(f"unknown view {name!r}; known: {', '.join(PIPELINES)}")
    out = []
    for stage in PIPELINES[name]:
        if isinstance(stage, (ResizedCrop, CenterCrop)):
            stage = stage._replace(size=round(stage.size * size / 224))
        if isinstance(stage, CenterCrop):
            stage = stage._replace(resize=round(stage.resize * size / 224))
        out.append(stage)
    return tuple(out)


def photo_view(
    stages: Sequence[Stage], norm: tuple[Sequence[float], Sequence[float]], on_device: bool
) -> View:
    """A pipeline as a View over RGB PIL images, normalized by norm = (mean, std) of values from 0 to 1.

    on_device: leave the stages at the end that device_views has to the training device; otherwise PIL does
    all of them.
    """
    cut = len(stages)
    while on_device and cut and type(stages[cut - 1]).__name__ in device_views.STAGES:
        cut -= 1
    resize = device_views.crop_resize if on_device else None
    left = tuple(type(stage).__name__ for stage in stages[cut:])
    return View(
        sum(stage.num_uniforms for stage in stages),
        partial(_host, tuple(stages), cut, resize),
        partial(_device, left, *norm),
    )


Resize = Optional[Callable[[Image.Image, Sequence[float], int], np.ndarray]]


def _host(
    stages: Sequence[Stage], cut: int, resize: Resize, images: Sequence[Image.Image], u: np.ndarray
) -> HostTensors:
    """The first `cut` stages done, and the parameters of the others."""
    sizes = np.array([image.size for image in images], float)  # [n, 2]
    params, column = [], 0
    for stage in stages:
        p = stage.sample(u[:, column : column + stage.num_uniforms], sizes)  # [n, k]
        params.append(p.astype(np.float32))  # the precision in which they travel, whoever applies them
        column += stage.num_uniforms
    pixels = [_apply(image, stages[:cut], [p[i] for p in params], resize) for i, image in enumerate(images)]
    return (torch.from_numpy(np.stack(pixels)), *map(torch.from_numpy, params[cut:]))  # [n, h, w, 3], [n, k]…


def _device(stages: Sequence[str], mean: Sequence[float], std: Sequence[float], raw: HostTensors) -> Tensor:
    return device_views.finish(raw, stages, mean, std)  # [n, 3, h, w]


def _apply(
    image: Image.Image, stages: Sequence[Stage], params: Sequence[np.ndarray], resize: Resize
) -> np.ndarray:
    """-> [h, w, 3] uint8."""
    for k, (stage, p) in enumerate(zip(stages, params)):
        if resize and k == len(stages) - 1 and isinstance(stage, ResizedCrop):
            return resize(image, p, stage.size)
        image = stage.pil(image, p)
    return np.asarray(image)
