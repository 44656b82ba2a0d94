"""A user's own images: class folders, whose images are all or partly labeled, and further images without
labels.
"""

import os
from pathlib import Path

import numpy as np

from dataset import imagenet, listing, splits
from dataset.assemble import assemble, choose_split
from dataset.loader import Data
from dataset.source import LabeledFiles, Names
from dataset.views import IMAGENET_NORM, photo_views
from util.errors import UserError
from util.files import user_path

# util/fields.py reads these literals from the source.
# fmt: off
SETTINGS = {
    "unlabelled": ("", "directory of additional unlabeled images, at any depth",
        {"aliases": ("--unlabeled",), "may_change": True}),
    "val": ("", "test images, one folder per class; empty: val/ in --data, or --val-share",
        {"may_change": True}),
    "val_share": (0.0, "without test images: share of each class to hold out for testing",
        "[0, 1]", {"replaced_by": ("val",)}),
}
USES = ("data", "split", "labels_per_class", "anno_percent",
        "weak", "strong", "image_size", "device_views", "on_bad_image")
# fmt: on

# Folders of these names are not taken for classes.
NOT_CLASSES = {"val", "valid", "validation", "test", "unlabelled", "unlabeled"}


def build(
    data: str,
    unlabelled: str,
    val: str,
    val_share: float,
    split: str,
    labels_per_class: int,
    anno_percent: float,
    seed: int,
    weak: str,
    strong: str,
    image_size: int,
    on_device: bool,
) -> Data:
    """Build a data set of class folders and unlabeled images, or of class folders that are partly labeled.

    data: a tree <class>/…/<image>, or a folder with such a tree in train/. unlabelled: a folder of images in
    any nesting; with it, all of data is labeled unless `split` or `labels_per_class` is given. val: the tree
    of the test images, by default data/val/; without both, the share `val_share` of each class of data is
    drawn by `seed` as test images. Raises UserError.
    """
    views = photo_views(weak, strong, "eval", IMAGENET_NORM, on_device, image_size)
    if not data:
        raise UserError("dataset folder needs --data DIR, a folder with one folder of images for each class")
    root = user_path(data)
    train_root, val_root = root, user_path(val) if val else None
    unlabeled_root = user_path(unlabelled) if unlabelled else None
    folders = {entry.name for entry in os.scandir(root) if entry.is_dir()} if root.is_dir() else set()
    if "train" in folders:
        others = sorted(name for name in folders - NOT_CLASSES - {"train"} if not name.startswith("."))
        if others:
            raise UserError(
                f"{root} has train/ beside {others[0]}/: if train/ holds the classes, move {others[0]}/ out; "
                "if train is a class, rename it"
            )
        train_root = root / "train"
        val_root = val_root or (root / "val" if "val" in folders else None)
    elif folders & NOT_CLASSES:
        name = min(folders & NOT_CLASSES)
        raise UserError(
            f"{root / name} would count as a class: "
            f"put the classes into {root / 'train'}, or move {name}/ out"
        )
    for flag, other in (("--val", val_root), ("--unlabelled", unlabeled_root)):
        if other and other.resolve().is_relative_to(train_root.resolve()):
            raise UserError(
                f"{flag} {other} lies in {train_root}, where every folder is a class: move it out"
            )
    images = listing.scan(train_root, recursive=True)
    if len(images.classes) < 2:
        raise UserError(
            f"{train_root} has only one class, {images.classes[0]}: "
            "put the images of each class in a folder of its own"
        )

    if val_root is not None:
        train, test = images, _scan_test(val_root, images.classes, train_root)
    else:
        if not 0 < val_share < 1:
            raise UserError(
                f"there are no test images: give --val DIR, put classes into "
                f"{root}/train and test images into {root}/val, or hold out a share with --val-share 0.1"
            )
        drawn = splits.make(splits.names_by_class(images), percent=val_share, seed=seed)
        test_rows = splits.find_rows(drawn, images.names.array)
        train, test = images.select(splits.complement(test_rows, len(images))), images.select(test_rows)
    empty = np.flatnonzero(np.bincount(train.labels, minlength=len(train.classes)) == 0)
    if len(empty):
        raise UserError(f"class {train.classes[empty[0]]} has no image left to train on: lower --val-share")
    if unlabelled and not split and not labels_per_class:
        chosen = splits.make(splits.names_by_class(train), percent=1.0, seed=seed)
    else:
        chosen = choose_split(train, split, labels_per_class, anno_percent, seed)
    if unlabeled_root is not None:
        train = _add_unlabeled(train, test, unlabeled_root)
    return assemble(train, test, chosen, views)


eval_view_for_files = imagenet.eval_view_for_files


def searched_dirs(data: str, unlabelled: str, val: str) -> list[Path]:
    return [user_path(path) for path in (data, unlabelled, val) if path]


def _scan_test(root: Path, classes: list[str], train_root: Path) -> LabeledFiles:
    """List the test images, with labels that are indices in `classes`."""
    images = listing.scan(root, recursive=True)
    unknown = sorted(set(images.classes) - set(classes))
    if unknown:
        raise UserError(
            f"{root} has the class folder {unknown[0]}, {train_root} has not; the names must agree"
        )
    labels = np.array([classes.index(c) for c in images.classes])[images.labels]  # [M]
    return LabeledFiles(images.root, images.names, labels, classes)


def _add_unlabeled(train: LabeledFiles, test: LabeledFiles, folder: Path) -> LabeledFiles:
    """Append to `train` the images below `folder`, with label −1 and absolute paths as names."""
    images = listing.list_images(folder)
    paths = _paths(images.root, images.names)  # [n]
    for kind, others in (("test", test), ("labeled", train)):
        shared = np.flatnonzero(np.isin(paths, _paths(others.root, others.names)))
        if len(shared):
            raise UserError(
                f"--unlabelled {folder} also holds {len(shared)} of the {kind} folder's images, the first is "
                f"{os.fsdecode(paths[shared[0]])}: give a folder without them"
            )
    names = Names(np.concatenate([train.names.array, paths]))
    labels = np.concatenate([train.labels, np.full(len(paths), -1)])  # [N]
    return LabeledFiles(train.root, names, labels, train.classes)


def _paths(root: Path, names: Names) -> np.ndarray:
    return np.char.add(os.fsencode(root) + b"/", names.array)  # [n] bytes
