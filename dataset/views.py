"""Views of photographs: the stages, and at the end the table of the recipes' pipelines of stages.

A stage turns uniform random numbers into parameters (`sample`) and applies them to one PIL image (`pil`). The
stages that dataset/device_views.py has too can be applied in batches on the training device instead.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor

from dataset import device_views
from dataset.loader import HostTensors, View
from dataset.randaugment import RandAugment
from util.errors import UserError


@dataclass(frozen=True)
class ResizedCrop:
    """A crop with a share `scale` of the image's area and an aspect ratio of 3/4 to 4/3, resized to
    size × size (bilinear).
    """

    size: int
    scale: tuple[float, float]
    num_uniforms: ClassVar[int] = 22

    def sample(self, u: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """u [n, 22], sizes [n, 2] (width, height) -> left, top, width, height [n, 4].

        As in torchvision's RandomResizedCrop: the first of ten draws that fits into the image; if none does,
        the largest central crop with an allowed ratio.
        """
        width, height = sizes[:, :1], sizes[:, 1:]  # [n, 1], [n, 1]
        low, high = self.scale
        area = width * height * (low + (high - low) * u[:, :10])  # [n, 10]
        ratio = np.exp(math.log(3 / 4) + math.log(16 / 9) * u[:, 10:20])  # [n, 10]
        w, h = np.round(np.sqrt(area * ratio)), np.round(np.sqrt(area / ratio))  # [n, 10] each
        fits = (0 < w) & (w <= width) & (0 < h) & (h <= height)  # [n, 10]
        first, row = fits.argmax(1), np.arange(len(u))  # [n], [n]
        w, h = w[row, first], h[row, first]  # [n], [n]
        left = np.floor(u[:, 20] * (width[:, 0] - w + 1))  # [n]
        top = np.floor(u[:, 21] * (height[:, 0] - h + 1))  # [n]
        center_w = np.minimum(width, np.round(height * 4 / 3))[:, 0]  # [n]
        center_h = np.minimum(height, np.round(width * 4 / 3))[:, 0]  # [n]
        center_left, center_top = (width[:, 0] - center_w) // 2, (height[:, 0] - center_h) // 2  # [n], [n]
        center = np.stack([center_left, center_top, center_w, center_h], 1)  # [n, 4]
        return np.where(fits.any(1)[:, None], np.stack([left, top, w, h], 1), center)  # [n, 4]

    def pil(self, image: Image.Image, p: np.ndarray) -> Image.Image:
        left, top, w, h = map(int, p)
        crop = image.crop((left, top, left + w, top + h))
        return crop.resize((self.size, self.size), Image.Resampling.BILINEAR)


@dataclass(frozen=True)
class PadCrop:
    """A random crop of `size` × `size` pixels after reflection padding by `pad` pixels."""

    size: int
    pad: int
    num_uniforms: ClassVar[int] = 2

    def sample(self, u: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """u [n, 2], sizes [n, 2] -> left, top [n, 2]."""
        return np.floor(u * (sizes + 2 * self.pad - self.size + 1))  # [n, 2]

    def pil(self, image: Image.Image, p: np.ndarray) -> Image.Image:
        pad = (self.pad, self.pad)
        pixels = np.pad(np.asarray(image), (pad, pad, (0, 0)), "reflect")  # [h, w, 3]
        left, top = map(int, p)
        return Image.fromarray(pixels[top : top + self.size, left : left + self.size])


@dataclass(frozen=True)
class CenterCrop:
    """The shorter side is resized to `resize` (bilinear), then the central size × size pixels are cropped."""

    resize: int
    size: int
    num_uniforms: ClassVar[int] = 0

    def sample(self, u: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        return np.empty((len(u), 0))

    def pil(self, image: Image.Image, p: np.ndarray) -> Image.Image:
        import torchvision.transforms.functional as TF  # takes seconds: only where an image needs it

        return TF.center_crop(TF.resize(image, self.resize), self.size)


@dataclass(frozen=True)
class Flip:
    """Horizontal flip with probability ½."""

    num_uniforms: ClassVar[int] = 1

    def sample(self, u: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        return (u < 0.5).astype(float)  # [n, 1]

    def pil(self, image: Image.Image, p: np.ndarray) -> Image.Image:
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if p[0] else image


@dataclass(frozen=True)
class Jitter:
    """torchvision's ColorJitter with probability p: brightness, contrast, saturation and hue are changed in
    random order.
    """

    brightness: float
    contrast: float
    saturation: float
    hue: float
    p: float
    num_uniforms: ClassVar[int] = 6

    def sample(self, u: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """u [n, 6] -> [n, 6]: whether to apply it, the index in device_views.ORDERS, three factors, and the
        shift of the hue (1 is a full turn).
        """
        strength = np.array([self.brightness, self.contrast, self.saturation])  # [3]
        apply, order = u[:, :1] < self.p, np.floor(24 * u[:, 1:2])  # [n, 1], [n, 1]
        factors = 1 + (2 * u[:, 2:5] - 1) * strength  # [n, 3]
        hue = (2 * u[:, 5:] - 1) * self.hue  # [n, 1]
        return np.concatenate([apply, order, factors, hue], 1)  # [n, 6]

    def pil(self, image: Image.Image, p: np.ndarray) -> Image.Image:
        if not p[0]:
            return image
        import torchvision.transforms.functional as TF  # takes seconds: only where an image needs it

        ops = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
        for k in device_views.ORDERS[int(p[1])]:
            image = ops[k](image, float(p[2 + k]))
        return image


@dataclass(frozen=True)
class Grayscale:
    """Conversion to three equal channels with probability p."""

    p: float
    num_uniforms: ClassVar[int] = 1

    def sample(self, u: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        return (u < self.p).astype(float)  # [n, 1]

    def pil(self, image: Image.Image, p: np.ndarray) -> Image.Image:
        return image.convert("L").convert("RGB") if p[0] else image


@dataclass(frozen=True)
class Blur:
    """Gaussian blur with a standard deviation of `low` to `high` pixels, with probability p."""

    low: float
    high: float
    p: float
    num_uniforms: ClassVar[int] = 2

    def sample(self, u: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """u [n, 2] -> [n, 2]: whether to apply it, and the standard deviation."""
        return np.stack([u[:, 0] < self.p, self.low + (self.high - self.low) * u[:, 1]], 1)  # [n, 2]

    def pil(self, image: Image.Image, p: np.ndarray) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(float(p[1]))) if p[0] else image


@dataclass(frozen=True)
class Solarize:
    """Inversion of the values of 128 and more, with probability p."""

    p: float
    num_uniforms: ClassVar[int] = 1

    def sample(self, u: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        return (u < self.p).astype(float)  # [n, 1]

    def pil(self, image: Image.Image, p: np.ndarray) -> Image.Image:
        return ImageOps.solarize(image, 128) if p[0] else image


@dataclass(frozen=True)
class Cutout:
    """A gray (127) square with a side of `side` pixels and its center anywhere in the image."""

    side: int
    num_uniforms: ClassVar[int] = 2

    def sample(self, u: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """u [n, 2] -> the center [n, 2], as shares of width and height."""
        return u

    def pil(self, image: Image.Image, p: np.ndarray) -> Image.Image:
        left, top = (max(0, int(share * side - self.side / 2)) for share, side in zip(p, image.size))
        right, bottom = min(image.size[0], left + self.side), min(image.size[1], top + self.side)
        image = image.copy()
        image.paste((127, 127, 127), (left, top, right, bottom))
        return image


Stage = (
    ResizedCrop | PadCrop | CenterCrop | Flip | Jitter | Grayscale | Blur | Solarize | Cutout | RandAugment
)

CROP = ResizedCrop(224, (0.2, 1.0))
MOCO = (Jitter(0.4, 0.4, 0.4, 0.1, p=0.8), Grayscale(0.2), Blur(0.1, 2.0, p=0.5))
MULTICROP = {  # name -> (size, scale)
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
CIFAR_FILES = (CenterCrop(32, 32),)  # for image files of any size that a CIFAR network classifies
IMAGENET_NORM = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CIFAR10_NORM = ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616))
CIFAR100_NORM = ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))


def pipeline(name: str, size: int = 224) -> tuple[Stage, ...]:
    """Return the stages of PIPELINES[name], with crops scaled by size / 224 and rounded to whole pixels.
    Raises UserError if unknown.
    """
    if name not in PIPELINES:
        raise UserError(f"unknown view {name!r}; known: {', '.join(PIPELINES)}")
    return tuple(_scaled(stage, size / 224) for stage in PIPELINES[name])


def _scaled(stage: Stage, factor: float) -> Stage:
    if isinstance(stage, ResizedCrop):
        return replace(stage, size=max(1, round(stage.size * factor)))
    if isinstance(stage, CenterCrop):
        return replace(stage, size=round(stage.size * factor), resize=round(stage.resize * factor))
    return stage


Norm = tuple[Sequence[float], Sequence[float]]  # mean and standard deviation of values from 0 to 1


def photo_views(
    weak: str, strong: str, eval_name: str, norm: Norm, on_device: bool, size: int = 224
) -> dict[str, Any]:
    """Return the fields weak_view, strong_views and eval_view of Data. strong: names with commas between
    them. Raises UserError if a name is unknown.
    """

    def view(name: str) -> View:
        return photo_view(pipeline(name.strip(), size), norm, on_device)

    strong_views = tuple(map(view, strong.split(",")))
    return {"weak_view": view(weak), "strong_views": strong_views, "eval_view": view(eval_name)}


def photo_view(stages: Sequence[Stage], norm: Norm, on_device: bool) -> View:
    """Build the view of RGB PIL images with these stages.

    on_device: the last stages, as long as device_views has them, are applied on the training device, and a
    faster resize is used; otherwise PIL applies all stages.
    """
    on_cpu = len(stages)  # the number of stages that are applied on the CPU
    while on_device and on_cpu and type(stages[on_cpu - 1]).__name__ in device_views.STAGES:
        on_cpu -= 1
    resize = device_views.crop_resize if on_device else None
    device_stages = tuple(type(stage).__name__ for stage in stages[on_cpu:])
    return View(
        sum(stage.num_uniforms for stage in stages),
        partial(_cpu_transform, tuple(stages), on_cpu, resize),
        partial(_device_transform, device_stages, *norm),
        getattr(stages[0], "size", 32) if stages else 32,  # without a crop, an image of CIFAR keeps its 32
    )


Resize = Callable[[Image.Image, Sequence[float], int], np.ndarray]


def _cpu_transform(
    stages: Sequence[Stage],
    on_cpu: int,
    resize: Resize | None,
    images: Sequence[Image.Image],
    u: np.ndarray,
) -> HostTensors:
    """Apply the first `on_cpu` stages -> pixels [n, h, w, 3] uint8, the other stages' parameters [n, k]."""
    sizes = np.array([image.size for image in images], float)  # [n, 2]
    params, column = [], 0
    for stage in stages:
        p = stage.sample(u[:, column : column + stage.num_uniforms], sizes)  # [n, k]
        params.append(p.astype(np.float32))  # on both paths, so that they apply the same parameters
        column += stage.num_uniforms
    pixels = [
        _apply(image, stages[:on_cpu], [p[i] for p in params], resize) for i, image in enumerate(images)
    ]
    return (torch.from_numpy(np.stack(pixels)), *map(torch.from_numpy, params[on_cpu:]))


def _device_transform(
    stages: Sequence[str], mean: Sequence[float], std: Sequence[float], tensors: HostTensors
) -> Tensor:
    return device_views.finish(tensors, stages, mean, std)  # [n, 3, h, w]


def _apply(
    image: Image.Image, stages: Sequence[Stage], params: Sequence[np.ndarray], resize: Resize | None
) -> np.ndarray:
    """Apply the stages to one image -> [h, w, 3] uint8. `resize` replaces Pillow's in a last ResizedCrop."""
    for k, (stage, p) in enumerate(zip(stages, params)):
        if resize and k == len(stages) - 1 and isinstance(stage, ResizedCrop):
            return resize(image, p.tolist(), stage.size)
        image = stage.pil(image, p)
    return np.asarray(image)
