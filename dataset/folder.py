"""Your own images: class folders, of which some or all images are labeled, and any further images without
labels.
"""

import os
from pathlib import Path

import numpy as np

from dataset import listing, splits
from dataset.imagenet import assemble, choose_split
from dataset.loader import Data
from dataset.source import Files
from util.errors import UserError

NOT_CLASSES = {
    "val",
    "valid",
    "validation",
    "test",
    "unlabelled",
    "unlabeled",
}  # names of folders that are no classes


class Folder(Files):
    """Image files with labels [N] (−1: none) and class names."""

    def __init__(self, root: Path, names: listing.Names, labels: np.ndarray, classes: list[str]):
        super().__init__(root, names)
        self.labels, self.classes = labels, classes


def build(
    data: str,
    unlabeled: str,
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
    """One labeled folder and a pile of unlabeled images, or one folder of which a part is labeled.

    data: <class>/…/<image>, or such a tree in data/train/. unlabeled: a folder with images in any nesting;
    with it, and no other choice of labeled images, all of data is labeled. val: <class>/…/<image>; else
    data/val/; else `val_share` of each class of data, drawn by seed, is held out.
    """
    if not data:
        raise UserError("dataset folder needs --data DIR, a folder with one folder of images for each class")
    root = Path(data).expanduser()
    train_root, val_root = root, Path(val).expanduser() if val else None
    inside = {entry.name for entry in os.scandir(root) if entry.is_dir()} if root.is_dir() else set()
    if "train" in inside:
        odd = sorted(name for name in inside - NOT_CLASSES - {"train"} if not name.startswith("."))
        if odd:
            raise UserError(
                f"{root} has train/ beside {odd[0]}/: if train/ holds the classes, move {odd[0]}/ out; if train is a "
                "class, rename it"
            )
        train_root = root / "train"
        val_root = val_root or (root / "val" if "val" in inside else None)
    elif inside & NOT_CLASSES:
        odd = min(inside & NOT_CLASSES)
        raise UserError(
            f"{root / odd} would count as a class: put the classes into {root / 'train'}, or move {odd}/ out"
        )
    for name, other in (
        ("--val", val_root),
        ("--unlabelled", Path(unlabeled).expanduser() if unlabeled else None),
    ):
        if other and other.resolve().is_relative_to(train_root.resolve()):
            raise UserError(
                f"{name} {other} lies in {train_root}, where every folder is a class: move it out"
            )
    train = listing.scan(train_root, recursive=True)
    if len(train.classes) < 2:
        raise UserError(
            f"{train_root} has one class only, {train.classes[0]}: put the images of each class in a folder of its own"
        )

    if val_root is not None:
        test = listing.scan(val_root, recursive=True)
        odd = sorted(set(test.classes) - set(train.classes))
        if odd:
            raise UserError(
                f"{val_root} has the class folder {odd[0]}, {train_root} has not; the names must agree"
            )
        own = np.array([train.classes.index(c) for c in test.classes])
        test = Folder(test.root, test.names, own[test.labels], train.classes)
        kept = np.arange(len(train.names))
    else:
        if not 0 < val_share < 1:
            raise UserError(
                f"there are no test images: give --val DIR, put classes into "
                f"{root}/train and test images into {root}/val, or hold out a share with --val-share 0.1"
            )
        held = splits.rows(
            splits.make(splits.by_class(train), percent=val_share, seed=seed), train.names.array
        )
        test = Folder(train.root, listing.Names(train.names.array[held]), train.labels[held], train.classes)
        kept = splits.complement(held, len(train.names))

    train = train._replace(names=listing.Names(train.names.array[kept]), labels=train.labels[kept])
    empty = np.flatnonzero(np.bincount(train.labels, minlength=len(train.classes)) == 0)
    if len(empty):
        raise UserError(f"class {train.classes[empty[0]]} has no image left to train on: lower --val-share")
    everything = Folder(train.root, train.names, train.labels, train.classes)
    if unlabeled and not split and not labels_per_class:
        chosen = splits.make(splits.by_class(train), percent=1.0, seed=seed)
    else:
        chosen = choose_split(everything, split, labels_per_class, anno_percent, seed, shares={})
    if unlabeled:
        everything = _with(everything, test, Path(unlabeled).expanduser())
    return assemble(everything, test, chosen, weak, strong, image_size, on_device)


def _with(train: Folder, test: Folder, folder: Path) -> Folder:
    """`train` and the images below `folder`, without labels. The names of these are whole paths, which no
    root changes.
    """
    more = listing.list_images(folder)
    whole = _whole(more.root, more.names)  # [n]
    for what, known in (
        ("test", _whole(test.root, test.names)),
        ("labeled", _whole(train.root, train.names)),
    ):
        both = np.flatnonzero(np.isin(whole, known))
        if len(both):
            raise UserError(
                f"--unlabelled {folder} also holds {len(both)} of the {what} folder's images, the first is "
                f"{os.fsdecode(whole[both[0]])}: give a folder without them"
            )
    labels = np.concatenate([train.labels, np.full(len(whole), -1)])  # [N]
    return Folder(
        train.root, listing.Names(np.concatenate([train.names.array, whole])), labels, train.classes
    )


def _whole(root: Path, names: listing.Names) -> np.ndarray:
    return np.char.add(os.fsencode(root) + b"/", names.array)  # [n] bytes
