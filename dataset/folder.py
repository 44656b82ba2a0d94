"""Your own images: class folders, of which some or all images are labelled, and any further images without labels."""
import os
from pathlib import Path

import numpy as np

from dataset import listing, splits
from dataset.imagenet import assemble, choose_split
from dataset.loader import Data
from dataset.source import Files
from util.errors import UserError


class Folder(Files):
    """Image files with labels [N] (−1: none) and class names."""

    def __init__(self, root: Path, names: listing.Names, labels: np.ndarray, classes: list[str]):
        super().__init__(root, names)
        self.labels, self.classes = labels, classes


def build(data: str, unlabelled: str, val: str, val_share: float, split: str, labels_per_class: int, anno_percent: float,
          seed: int, weak: str, strong: str, image_size: int, on_device: bool) -> Data:
    """One labelled folder and a pile of unlabelled images, or one folder of which a part is labelled.

    data: <class>/…/<image>, or such a tree in data/train/. unlabelled: a folder with images in any nesting; with it, and
    no other choice of labelled images, all of data is labelled. val: <class>/…/<image>; else data/val/; else `val_share` of
    each class of data, drawn by seed, is held out.
    """
    if not data:
        raise UserError("dataset folder needs --data DIR, a folder with one folder of images for each class")
    root = Path(data).expanduser()
    train_root, val_root = root, Path(val).expanduser() if val else None
    if (root / "train").is_dir():
        train_root = root / "train"
        val_root = val_root or (root / "val" if (root / "val").is_dir() else None)
    train = listing.scan(train_root, recursive=True)
    if len(train.classes) < 2:
        raise UserError(f"{train_root} has one class only, {train.classes[0]}: put the images of each class in a folder of its own")

    if val_root is not None:
        test = listing.scan(val_root, recursive=True)
        odd = sorted(set(test.classes) - set(train.classes))
        if odd:
            raise UserError(f"{val_root} has the class folder {odd[0]}, {train_root} has not; the names must agree")
        own = np.array([train.classes.index(c) for c in test.classes])
        test = Folder(test.root, test.names, own[test.labels], train.classes)
        kept = np.arange(len(train.names))
    else:
        if not 0 < val_share < 1:
            raise UserError(f"there are no test images: give --val DIR, make {root}/val, or hold out a share with --val-share 0.1")
        held = splits.rows(splits.make(splits.by_class(train), percent=val_share, seed=seed), train.names.array)
        test = Folder(train.root, listing.Names(train.names.array[held]), train.labels[held], train.classes)
        kept = splits.complement(held, len(train.names))

    train = train._replace(names=listing.Names(train.names.array[kept]), labels=train.labels[kept])
    empty = np.flatnonzero(np.bincount(train.labels, minlength=len(train.classes)) == 0)
    if len(empty):
        raise UserError(f"class {train.classes[empty[0]]} has no image left to train on: lower --val-share")
    everything = Folder(train.root, train.names, train.labels, train.classes)
    if unlabelled and not split and not labels_per_class:
        chosen = splits.make(splits.by_class(train), percent=1.0, seed=seed)
    else:
        chosen = choose_split(everything, split, labels_per_class, anno_percent, seed, shares={})
    if unlabelled:
        everything = _with(everything, Path(unlabelled).expanduser())
    return assemble(everything, test, chosen, weak, strong, image_size, on_device)


def _with(train: Folder, folder: Path) -> Folder:
    """`train` and the images below `folder`, without labels. The names of these are whole paths, which no root changes."""
    more = listing.pile(folder)
    whole = np.char.add(os.fsencode(more.root) + b"/", more.names.array)    # [n]
    labels = np.concatenate([train.labels, np.full(len(whole), -1)])        # [N]
    return Folder(train.root, listing.Names(np.concatenate([train.names.array, whole])), labels, train.classes)
