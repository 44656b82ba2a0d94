"""The stages of the views of photographs.

A stage turns uniform random numbers into parameters (`sample`) and applies them to one PIL image (`pil`). The
stages that dataset/device_views.py has too can be applied in batches on the training device instead.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from dataset import device_views
from dataset.randaugment import RandAugment


@dataclass(frozen=True)
class ResizedCrop:
    """A crop with a share `scale` of the image's area and an aspect ratio of 3/4 to 4/3, resized to
    size × size (bilinear). fast: by PyTorch, to an array, so that no stage of Pillow can follow.
    """

    size: int
    scale: tuple[float, float]
    fast: bool = False
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

    def pil(self, image: Image.Image, p: np.ndarray) -> Any:
        if self.fast:
            return device_views.crop_resize(image, p.tolist(), self.size)
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
class Chance:
    """A stage without parameters that is applied with probability p."""

    p: float
    num_uniforms: ClassVar[int] = 1

    def sample(self, u: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        return (u < self.p).astype(float)  # [n, 1]


@dataclass(frozen=True)
class Flip(Chance):
    """Horizontal flip."""

    p: float = 0.5

    def pil(self, image: Image.Image, p: np.ndarray) -> Image.Image:
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if p[0] else image


class Grayscale(Chance):
    """Conversion to three equal channels."""

    def pil(self, image: Image.Image, p: np.ndarray) -> Image.Image:
        return image.convert("L").convert("RGB") if p[0] else image


class Solarize(Chance):
    """Inversion of the values of 128 and more."""

    def pil(self, image: Image.Image, p: np.ndarray) -> Image.Image:
        return ImageOps.solarize(image, 128) if p[0] else image


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
