"""Builds the data set of a config, with its split and its views."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dataset import digits, folder, imagenet
from dataset.imagenet import Validation
from dataset.loader import Data, View
from dataset.views import (
    CIFAR10_NORM,
    CIFAR100_NORM,
    CIFAR_FILES,
    IMAGENET_NORM,
    Stage,
    photo_view,
    pipeline,
    strong_views,
)
from util.errors import UserError
from util.files import user_path


def _build_cifar(config: Any, on_device: bool) -> Data:
    from dataset import cifar  # imports torchvision, which takes seconds: only if a CIFAR set is used

    c = config
    return cifar.build(c.dataset, c.data, c.labels_per_class, c.seed, c.weak, c.strong, on_device)


# name -> (config, on_device) -> Data
DATASETS: dict[str, Callable[[Any, bool], Data]] = {
    "digits": lambda c, on_device: digits.build(c.labels_per_class, c.seed),
    "imagenet": lambda c, on_device: imagenet.build(
        c.data, c.split, c.labels_per_class, c.anno_percent, c.seed, c.weak, c.strong, c.image_size, on_device
    ),
    "cifar10": _build_cifar,
    "cifar100": _build_cifar,
    "folder": lambda c, on_device: folder.build(
        c.data,
        c.unlabelled,
        c.val,
        c.val_share,
        c.split,
        c.labels_per_class,
        c.anno_percent,
        c.seed,
        c.weak,
        c.strong,
        c.image_size,
        on_device,
    ),
}


# Stages and normalization of the evaluation view, for image files that do not belong to the data set.
EVAL_VIEWS = {
    "imagenet": lambda c: (pipeline("eval", c.image_size), IMAGENET_NORM),
    "folder": lambda c: (pipeline("eval", c.image_size), IMAGENET_NORM),
    "cifar10": lambda c: (CIFAR_FILES, CIFAR10_NORM),
    "cifar100": lambda c: (CIFAR_FILES, CIFAR100_NORM),
}

# (config, name of a view) -> its side in pixels
VIEW_SIDES: dict[str, Callable[[Any, str], int]] = {
    "digits": lambda c, view: digits.SIZE,
    "imagenet": lambda c, view: _side(pipeline(view, c.image_size)),
    "folder": lambda c, view: _side(pipeline(view, c.image_size)),
    "cifar10": lambda c, view: _side(pipeline(view)),
    "cifar100": lambda c, view: _side(pipeline(view)),
}


def view_sides(config: Any) -> tuple[int, ...]:
    """Return the sides in pixels of the weak and the strong views. Raises UserError if a view is unknown."""
    return tuple(VIEW_SIDES[config.dataset](config, v) for v in (config.weak, *strong_views(config.strong)))


def _side(stages: Sequence[Stage]) -> int:
    return (
        getattr(stages[0], "size", 32) if stages else 32
    )  # without a crop, an image of CIFAR keeps its side


def check_output_dirs(config: Any, *outputs: Path) -> None:
    """Raise UserError if a directory that a run writes to lies in one that is searched for images: the next
    start would take it for a class, or its pictures for images.
    """
    searched: list[Path] = []
    if config.dataset == "folder":
        searched = [user_path(path) for path in (config.data, config.unlabelled, config.val) if path]
    elif config.dataset == "imagenet":
        searched = [imagenet.find_root(config.data) / part for part in ("train", "val")]
    for images in searched:
        for output in outputs:
            if output.resolve().is_relative_to(images.resolve()):
                raise UserError(
                    f"output directory {output} lies in {images}, which is searched for images: choose "
                    "another --output-dir"
                )


def eval_view_for_files(config: Any, gpu: bool) -> tuple[View, int]:
    """Return the evaluation view of image files for a network of this config, and the number of channels.
    It needs no training data. Raises UserError if the network cannot classify image files.
    """
    if config.dataset not in EVAL_VIEWS:
        raise UserError(
            f"a network for {config.dataset} cannot classify image files: its training images are not files"
        )
    return photo_view(*EVAL_VIEWS[config.dataset](config), _on_device(config, gpu)), 3


def _on_device(config: Any, gpu: bool) -> bool:
    return config.device_views == "on" or config.device_views == "auto" and gpu


def build_data(config: Any, gpu: bool) -> Data:
    """Build the data set of a config, with its split and its views.

    config: an object with the fields of util.config.Config. gpu: whether the network runs on a GPU, where
    `device_views: auto` applies the last stages of the views. Raises UserError if the data set cannot be
    built with these settings.
    """
    if config.dataset not in DATASETS:
        raise UserError(f"unknown dataset {config.dataset!r}; known: {', '.join(DATASETS)}")
    view_sides(config)  # so that a view that is unknown is reported before the images are listed
    data = DATASETS[config.dataset](config, _on_device(config, gpu))
    if config.cls and len(data.classes) != config.cls:
        raise UserError(
            f"cls is {config.cls}, but {config.dataset} has {len(data.classes)} classes: "
            f"use --cls {len(data.classes)}"
        )
    return data


def build_validation(config: Any, gpu: bool) -> Validation:
    """Return the images of val/ of the ImageNet folder config.data, on which published checkpoints are
    evaluated. Raises UserError if they cannot be found.
    """
    return imagenet.validation(config.data, config.image_size, _on_device(config, gpu))
