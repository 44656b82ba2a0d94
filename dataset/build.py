"""Builds the data set of a config, with its split and its views."""

from collections.abc import Callable
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

from dataset import imagenet
from dataset.loader import Data, EvalData, View
from util.errors import UserError

# name -> module, which is imported only if it is used, because torchvision takes seconds. A new data set is a
# file and a line of this table, which util/fields.py reads. The module has these functions, whose
# parameters are settings by name:
# eval_view_for_files(..., on_device) -> View, if the network can also classify image files from elsewhere
# searched_dirs(...) -> the directories that are searched for images, if there are any
DATASETS = {
    "digits": "dataset.digits",
    "imagenet": "dataset.imagenet",
    "cifar10": "dataset.cifar",
    "cifar100": "dataset.cifar",
    "folder": "dataset.folder",
}


def _call(function: Callable[..., Any], config: Any, **known: Any) -> Any:
    """Call a function of a data set with the values that its parameters name, of `known` or of the config."""
    names = signature(function).parameters
    return function(**{name: known[name] if name in known else getattr(config, name) for name in names})


def _module(config: Any) -> Any:
    """Return the module of the config's data set. Raises UserError if it is unknown."""
    if config.dataset not in DATASETS:
        raise UserError(f"unknown dataset {config.dataset!r}; known: {', '.join(DATASETS)}")
    return import_module(DATASETS[config.dataset])


def check_output_dirs(config: Any, *outputs: Path) -> None:
    """Raise UserError if a directory that a run writes to lies in one that is searched for images: the next
    start would take it for a class, or its pictures for images.
    """
    searched_dirs: Callable[..., list[Path]] = getattr(_module(config), "searched_dirs", lambda: [])
    for images in _call(searched_dirs, config):
        for output in outputs:
            if output.resolve().is_relative_to(images.resolve()):
                raise UserError(
                    f"output directory {output} lies in {images}, which is searched for images: choose "
                    "another --output-dir"
                )


def eval_view_for_files(config: Any, gpu: bool) -> View:
    """Return the evaluation view of image files for a network of this config. It needs no training data.
    Raises UserError if the network cannot classify image files.
    """
    found = getattr(_module(config), "eval_view_for_files", None)
    if found is None:
        raise UserError(
            f"a network for {config.dataset} cannot classify image files: its training images are not files"
        )
    view: View = _call(found, config, on_device=_on_device(config, gpu))
    return view


def _on_device(config: Any, gpu: bool) -> bool:
    return config.device_views == "on" or config.device_views == "auto" and gpu


def build_data(config: Any, gpu: bool) -> Data:
    """Build the data set of a config, with its split and its views.

    config: an object with the fields of util.config.Config. gpu: whether the network runs on a GPU, where
    `device_views: auto` applies the last stages of the views. Raises UserError if the data set cannot be
    built with these settings.
    """
    build = _module(config).build
    data: Data = _call(build, config, on_device=_on_device(config, gpu))
    if config.cls and len(data.classes) != config.cls:
        raise UserError(
            f"cls is {config.cls}, but {config.dataset} has {len(data.classes)} classes: "
            f"use --cls {len(data.classes)}"
        )
    return data


def build_validation(config: Any, gpu: bool) -> EvalData:
    """Return the images of val/ of the ImageNet folder config.data, on which published checkpoints are
    evaluated. Raises UserError if they cannot be found.
    """
    val = imagenet.ImagenetPercentV2(imagenet.find_root(config.data), "val")
    view = imagenet.eval_view_for_files(config.image_size, _on_device(config, gpu))
    return EvalData(val, val.labels, view, val.classes)
