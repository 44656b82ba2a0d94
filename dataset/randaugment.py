"""RandAugment (arXiv 1909.13719) in the two variants of the published recipes, ImageNet's and CIFAR's.

The magnitude v is drawn from 1 … 9 for every op. The value of an op is v·max/10 + bias, and the value of a
signed op is negative with probability ½.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageOps


class Op(NamedTuple):
    """An operation apply(image, value) -> image, and the range of its value."""

    name: str
    apply: Callable[[Image.Image, float], Image.Image]
    max: float = 0.0
    bias: float = 0.0
    signed: bool = False
    integer: bool = False  # v·max/10 is truncated to an integer

    def value(self, v: np.ndarray, negative: np.ndarray) -> np.ndarray:
        """Return the values [n] for magnitudes v [n] in 1 … 9 and signs: negative [n] bool."""
        x = v * self.max / 10  # [n]
        x = (np.trunc(x) if self.integer else x) + self.bias  # [n]
        return np.where(negative & self.signed, -x, x)  # [n]


def _affine(image: Image.Image, *matrix: float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix)


def _translate(image: Image.Image, x: float, y: float) -> Image.Image:
    return _affine(image, 1, 0, int(x * image.width), 0, 1, int(y * image.height))


def _solarize_add(image: Image.Image, v: float) -> Image.Image:
    """Add v to every pixel value, clip to 0 … 255, and solarize at 128."""
    return ImageOps.solarize(image.point([min(255, max(0, i + int(v))) for i in range(256)] * 3), 128)


def _ops(strength: float, bias: float, share: float) -> list[Op]:
    """Return the operations in the order of the recipes. strength, bias: of the four enhancements; share: of
    the side that a translation moves the image by.
    """

    def enhance(name: str, enhancer: Callable[[Image.Image], ImageEnhance._Enhance]) -> Op:
        return Op(name, lambda image, v: enhancer(image).enhance(v), strength, bias)

    return [
        Op("autocontrast", lambda image, v: ImageOps.autocontrast(image)),
        enhance("brightness", ImageEnhance.Brightness),
        enhance("color", ImageEnhance.Color),
        enhance("contrast", ImageEnhance.Contrast),
        enhance("sharpness", ImageEnhance.Sharpness),
        Op("equalize", lambda image, v: ImageOps.equalize(image)),
        Op("identity", lambda image, v: image),
        Op("invert", lambda image, v: ImageOps.invert(image)),
        Op("posterize", lambda image, v: ImageOps.posterize(image, int(v)), 4, 4, integer=True),
        Op("rotate", lambda image, v: image.rotate(v), 30, signed=True),
        Op("shear_x", lambda image, v: _affine(image, 1, v, 0, 0, 1, 0), 0.3, signed=True),
        Op("shear_y", lambda image, v: _affine(image, 1, 0, 0, v, 1, 0), 0.3, signed=True),
        Op("solarize", lambda image, v: ImageOps.solarize(image, 256 - int(v)), 256, integer=True),
        Op("solarize_add", _solarize_add, 110, signed=True, integer=True),
        Op("translate_x", lambda image, v: _translate(image, v, 0), share, signed=True),
        Op("translate_y", lambda image, v: _translate(image, 0, v), share, signed=True),
    ]


IMAGENET = _ops(1.8, 0.1, 0.45)
CIFAR = [op for op in _ops(0.9, 0.05, 0.3) if op.name not in ("invert", "solarize_add")]
OPS = {"imagenet": IMAGENET, "cifar": CIFAR}


@dataclass(frozen=True)
class RandAugment:
    """`n` ops are drawn with replacement, and each is applied with probability `p`."""

    n: int
    ops: str  # a name in OPS
    p: float = 1.0

    @property
    def num_uniforms(self) -> int:
        return 4 * self.n

    def sample(self, u: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """u [n, num_uniforms] -> [n, 3·self.n]: for each op its index in OPS[self.ops], whether to apply it,
        and its value.
        """
        ops, out = OPS[self.ops], []
        for k in range(self.n):
            which, v, sign, apply = u[:, 4 * k : 4 * k + 4].T  # [n] each
            index = (which * len(ops)).astype(int)  # [n]
            v, negative = 1 + np.floor(9 * v), sign < 0.5  # [n], [n]
            values = np.stack([op.value(v, negative) for op in ops], 1)  # [n, ops]
            out += [index, apply < self.p, values[np.arange(len(u)), index]]
        return np.stack(out, 1)  # [n, 3·self.n]

    def pil(self, image: Image.Image, p: np.ndarray) -> Image.Image:
        for index, apply, value in p.reshape(self.n, 3).tolist():
            if apply:
                image = OPS[self.ops][int(index)].apply(image, value)
        return image
