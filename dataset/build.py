"""The data sets, by name."""

from typing import Any

from dataset import cifar, digits, folder, imagenet
from dataset.imagenet import Validation
from dataset.loader import Data, View
from dataset.views import CIFAR10_NORM, CIFAR100_NORM, CIFAR_FILES, IMAGENET_NORM, photo_view, pipeline
from util.errors import UserError

DATASETS = {
    "digits": lambda c, on_device: digits.build(c.labels_per_class, c.seed),
    "imagenet": lambda c, on_device: imagenet.build(
        c.data, c.split, c.labels_per_class, c.anno_percent, c.seed, c.weak, c.strong, c.image_size, on_device
    ),
    "cifar10": lambda c, on_device: cifar.build(
        "cifar10", c.data, c.labels_per_class, c.seed, c.weak, c.strong, on_device
    ),
    "cifar100": lambda c, on_device: cifar.build(
        "cifar100", c.data, c.labels_per_class, c.seed, c.weak, c.strong, on_device
    ),
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


# The view for evaluation and the channels, for those whose images may come from files.
EVAL_VIEWS = {
    "imagenet": lambda c: (pipeline("eval", c.image_size), IMAGENET_NORM),
    "folder": lambda c: (pipeline("eval", c.image_size), IMAGENET_NORM),
    "cifar10": lambda c: (CIFAR_FILES, CIFAR10_NORM),
    "cifar100": lambda c: (CIFAR_FILES, CIFAR100_NORM),
}


def eval_view_for_files(config: Any, gpu: bool) -> tuple[View, int]:
    """(view, channels) in which a network of this config sees image files, without any of its training data."""
    if config.dataset not in EVAL_VIEWS:
        raise UserError(
            f"image files cannot be classified by a network for {config.dataset}, whose images are no files"
        )
    return photo_view(*EVAL_VIEWS[config.dataset](config), _on_device(config, gpu)), 3


def _on_device(config: Any, gpu: bool) -> bool:
    return config.device_views == "on" or config.device_views == "auto" and gpu


def build_data(config: Any, gpu: bool) -> Data:
    """config: anything with the fields of util.config.Config; gpu: whether the network runs on one.

    Raises UserError where the data cannot serve the settings.
    """
    if config.dataset not in DATASETS:
        raise UserError(f"unknown dataset {config.dataset!r}; known: {', '.join(DATASETS)}")
    data = DATASETS[config.dataset](config, _on_device(config, gpu))
    if config.cls and len(data.classes) != config.cls:
        raise UserError(
            f"cls is {config.cls}, but {config.dataset} has {len(data.classes)} classes: use --cls {len(data.classes)}"
        )
    return data


def build_validation(config: Any, gpu: bool) -> Validation:
    """ImageNet's val/ alone, below config.data: what a published checkpoint is evaluated on."""
    return imagenet.validation(config.data, config.image_size, _on_device(config, gpu))
