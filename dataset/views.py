"""Views of photographs: the table of the recipes' pipelines of stages, and how a view is made of them."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image

from dataset import device_views
from dataset.loader import HostTensors, View
from dataset.randaugment import RandAugment
from dataset.stages import (
    Blur,
    CenterCrop,
    Cutout,
    Flip,
    Grayscale,
    Jitter,
    PadCrop,
    ResizedCrop,
    Solarize,
    Stage,
)
from util.errors import UserError

CROP = ResizedCrop(224, (0.2, 1.0))
MOCO = (Jitter(0.4, 0.4, 0.4, 0.1, p=0.8), Grayscale(0.2), Blur(0.1, 2.0, p=0.5))
MULTICROP_COLORS = (Jitter(0.4, 0.4, 0.2, 0.1, p=0.8), Grayscale(0.2), Blur(0.1, 2.0, p=0.5), Solarize(0.1))
MULTICROP = {  # SimMatchV2's strong views: name -> (size, scale)
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
    **{name: (ResizedCrop(*crop), Flip(), *MULTICROP_COLORS) for name, crop in MULTICROP.items()},
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
    if on_device and on_cpu and isinstance(last := stages[on_cpu - 1], ResizedCrop):
        stages = [*stages[: on_cpu - 1], replace(last, fast=True), *stages[on_cpu:]]
    names = [type(stage).__name__ for stage in stages[on_cpu:]]
    mean, std = norm
    return View(
        sum(stage.num_uniforms for stage in stages),
        partial(_cpu_transform, tuple(stages), on_cpu),
        partial(device_views.finish, stages=names, mean=mean, std=std),
        getattr(stages[0], "size", 32) if stages else 32,  # without a crop, an image of CIFAR keeps its 32
    )


def _cpu_transform(
    stages: Sequence[Stage], on_cpu: int, images: Sequence[Image.Image], u: np.ndarray
) -> HostTensors:
    """Apply the first `on_cpu` stages -> pixels [n, h, w, 3] uint8, the other stages' parameters [n, k]."""
    sizes = np.array([image.size for image in images], float)  # [n, 2]
    params, column = [], 0
    for stage in stages:
        p = stage.sample(u[:, column : column + stage.num_uniforms], sizes)  # [n, k]
        params.append(p.astype(np.float32))  # on both paths, so that they apply the same parameters
        column += stage.num_uniforms
    pixels = []
    for i, image in enumerate(images):
        for stage, p in zip(stages[:on_cpu], params):
            image = stage.pil(image, p[i])
        pixels.append(np.asarray(image))  # [h, w, 3]
    return (torch.from_numpy(np.stack(pixels)), *map(torch.from_numpy, params[on_cpu:]))
