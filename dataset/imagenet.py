"""ImageNet-1k with a labeled share. Edit the path here; --data and the environment variable IMAGENET_ROOT
override it.
"""

import os
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np

from dataset import listing, splits
from dataset.loader import Data, SplitId, View
from dataset.source import Files
from dataset.views import IMAGENET_NORM, photo_view, pipeline
from util.errors import UserError

IMAGENET_ROOT = (
    "/path/to/imagenet"  # holds train/ and val/ (and train.txt and val.txt where they are not class folders)
)
SHARES = {
    0.01: "simmatch-1p",
    0.1: "simmatch-10p",
}  # the lists that stand for a share that is merely given as a number


class Imagenet(Files):
    """All images of train/ or val/, with their labels; [row] is an RGB PIL image.

    Two layouts: class folders (train/<wnid>/*.JPEG), or files in any place with a list beside the folder
    (val/*.JPEG and val.txt, a line being a path relative to val/, or to the root, and a label).
    """

    def __init__(self, root: Path, part: str):
        """part: train or val."""
        folder, file = Path(root) / part, Path(root) / f"{part}.txt"
        if not Path(root).is_dir():
            raise UserError(
                f"ImageNet folder {root} does not exist: edit IMAGENET_ROOT at the top of dataset/imagenet.py, "
                "set the environment variable of that name, or use --data"
            )
        if not folder.is_dir():
            raise UserError(f"ImageNet folder {root} has no {part}/; it needs train/ and val/")
        if file.exists():
            images = listing.read_list(file, _base(file, folder))
        elif any(entry.is_dir() for entry in os.scandir(folder)):
            images = listing.scan(folder)
        else:
            raise UserError(
                f"{folder} has no class folders: put them in, or a list {file} with lines of the form `path label`"
            )
        super().__init__(images.root, images.names)
        self.labels, self.classes = images.labels, images.classes  # [N], C names


class ImagenetPercentV2(Imagenet):
    """The labeled part of train/, or all the rest of it; `rows` are its places among all images of train/.

    len() and [row] are of that part alone.
    """

    def __init__(
        self, percent: float, labeled: bool, root: Optional[Path] = None, split: str = "", seed: int = 0
    ):
        """percent: labeled share (0.01 and 0.1: SimMatch's lists); split: any other list, by name or path."""
        super().__init__(find_root("" if root is None else str(root)), "train")
        self.split = choose_split(self, split, 0, percent, seed)
        rows = splits.rows(self.split, self.names.array, str(self.root))  # [K]
        self.rows = rows if labeled else splits.complement(rows, len(self.names))
        self.names, self.labels = listing.Names(self.names.array[self.rows]), self.labels[self.rows]


def find_root(data: str) -> Path:
    """`data` if given, else the environment variable, else the path at the top of this file."""
    return Path(data or os.environ.get("IMAGENET_ROOT") or IMAGENET_ROOT).expanduser()


def choose_split(
    train: Files,
    split: str,
    labels_per_class: int,
    anno_percent: float,
    seed: int,
    shares: dict[float, str] = SHARES,
) -> splits.Split:
    """The labeled list: `split` by name or path; else a draw by number; else by share, where a known share
    is a list.
    """
    if not split and not labels_per_class:
        split = shares.get(anno_percent, "")
    if split:
        return splits.load(split)
    images = splits.by_class(listing.Listing(train.root, train.classes, train.names, train.labels))
    return splits.make(images, labels_per_class or None, None if labels_per_class else anno_percent, seed)


def build(
    data: str,
    split: str,
    labels_per_class: int,
    anno_percent: float,
    seed: int,
    weak: str,
    strong: str,
    image_size: int,
    on_device: bool,
) -> Data:
    """ImageNet as the recipes use it: unlabeled is train minus labeled, test is val."""
    root = find_root(data)
    train, val = Imagenet(root, "train"), Imagenet(root, "val")
    hint = "labels of a list count the sorted class folders from 0"
    if len(train.classes) != len(val.classes):
        raise UserError(
            f"{root}: train/ has {len(train.classes)} classes and val/ {len(val.classes)}; {hint}"
        )
    numbers = [str(k) for k in range(len(train.classes))]
    if val.classes != numbers:  # a flat val/ has names that tell nothing of classes
        for label, (a, b) in enumerate(zip(train.classes, val.classes)):
            if a != b:
                raise UserError(f"{root}: label {label} is {a} in train/ and {b} in val/; {hint}")
    chosen = choose_split(train, split, labels_per_class, anno_percent, seed)
    return assemble(train, val, chosen, weak, strong, image_size, on_device)


class Validation(NamedTuple):
    """val/ alone, under the names that `Data` has for it."""

    test_images: Files
    test_labels: np.ndarray  # [M] int64
    eval_view: View
    classes: list[str]  # [C]


def validation(data: str, image_size: int, on_device: bool) -> Validation:
    """ImageNet's val/ without its train/ and without a labeled list."""
    val = Imagenet(find_root(data), "val")
    return Validation(
        val, val.labels, photo_view(pipeline("eval", image_size), IMAGENET_NORM, on_device), val.classes
    )


def assemble(
    train: Files, test: Files, chosen: splits.Split, weak: str, strong: str, image_size: int, on_device: bool
) -> Data:
    """Data of image files with the labeled list `chosen`; train and test have labels and classes.

    Unlabeled is train minus labeled, in the order of the rows.
    """
    labeled = splits.rows(chosen, train.names.array, str(train.root))  # [K]
    unlabeled = splits.complement(labeled, len(train))  # [U]
    if (train.labels[labeled] < 0).any():
        name = train.name(int(labeled[np.argmax(train.labels[labeled] < 0)]))
        raise UserError(f"split {chosen.id}: {name} is among the images without labels")
    missing = np.setdiff1d(np.arange(len(train.classes)), train.labels[labeled])
    if len(missing):
        raise UserError(
            f"split {chosen.id}: class {train.classes[missing[0]]} has no labeled image"
            + (f", nor have {len(missing) - 1} more" if len(missing) > 1 else "")
        )
    views = [
        photo_view(pipeline(name, image_size), IMAGENET_NORM, on_device) for name in (weak, strong, "eval")
    ]
    return Data(
        train,
        train.labels,
        labeled,
        unlabeled,
        test,
        test.labels,
        *views,
        classes=train.classes,
        channels=3,
        split=SplitId(chosen.id, chosen.sha256),
    )


def _base(file: Path, folder: Path) -> Path:
    """What the paths of a list are relative to: the folder, or the root that holds it."""
    first = listing.entries(listing.read_bytes(file), str(file))[1][0]
    return file.parent if (file.parent / first).is_file() else folder
