"""ImageNet-1k, of which a share is labeled. Edit IMAGENET_ROOT in this file, set the environment variable of
that name, or use --data.
"""

import os
from pathlib import Path

from dataset import listing
from dataset.assemble import assemble, choose_split
from dataset.loader import Data, View
from dataset.source import BadImage, LabeledFiles
from dataset.views import IMAGENET_NORM, photo_view, photo_views, pipeline
from util.errors import UserError
from util.files import user_path

# The folder that holds train/ and val/, and train.txt or val.txt if they have no class folders.
IMAGENET_ROOT = "/path/to/imagenet"

# util/fields.py reads these literals from the source.
# fmt: off
SETTINGS = {
    "data": ("", "directory of the images; empty: IMAGENET_ROOT in dataset/imagenet.py, or data/ for CIFAR",
        {"may_change": True}),
    "split": ("", "labeled split: a published list (see python -m dataset.splits list) or a list file"),
    "labels_per_class": (0, "without --split: number of labeled images per class, drawn with --seed",
        "[0, 10_000_000]", {"replaced_by": ("split",)}),
    "anno_percent": (
        0.1, "without --split and --labels-per-class: labeled share; ImageNet 0.01, 0.1: published lists",
        "[0, 1]", {"replaced_by": ("split", "labels_per_class", "unlabelled")}),
    "lists": ("simmatch", "whose published lists --anno-percent 0.01 and 0.1 choose: simmatch or simclr",
        ("simmatch", "simclr"), {"replaced_by": ("split", "labels_per_class")}),
    "weak": ("weak", "weak view, of labeled and unlabeled images: a name in dataset/views.py"),
    "strong": ("moco", "strong views, with commas between them: names in dataset/views.py (moco, rand, ...)"),
    "image_size": (224, "side length in pixels of the views of image files; 224 in the recipes", "(0, 8192]"),
    "device_views": (
        "auto", "do flips, color, blur, normalization on the training device: on, off (PIL), auto (if GPU)",
        ("auto", "on", "off")),
    "on_bad_image": (
        "stop", "if an image cannot be read: stop the run, or skip it and use another one instead",
        ("stop", "skip"), {"may_change": True}),
}
# fmt: on


class Imagenet(LabeledFiles):
    """All images of train/ or val/.

    There are two layouts: class folders (train/<wnid>/*.JPEG), or a list file beside the folder (val.txt
    beside val/) with lines `path label`, whose paths are relative to val/ or to the root.
    """

    def __init__(self, root: Path, part: str):
        """part: train or val. Raises UserError if it cannot be found or listed."""
        folder, file = root / part, root / f"{part}.txt"
        if not root.is_dir():
            raise UserError(
                f"ImageNet folder {root} does not exist: edit IMAGENET_ROOT at the top of "
                "dataset/imagenet.py, set the environment variable of that name, or use --data"
            )
        if not folder.is_dir() and not file.exists():
            raise UserError(f"ImageNet folder {root} has no {part}/; it needs train/ and val/")
        if file.exists():
            images = listing.read_list(file, folder)
            if (root / images.names[0]).is_file():
                images.root = root.resolve()
        elif any(entry.is_dir() for entry in os.scandir(folder)):
            images = listing.scan(folder)
        else:
            raise UserError(
                f"{folder} has no class folders: add them, or a list {file} "
                "with lines of the form `path label`"
            )
        super().__init__(images.root, images.names, images.labels, images.classes)
        if file.exists():
            self._check_first(file)

    def _check_first(self, file: Path) -> None:
        """Raise UserError if the first image of the list is missing, which detects a wrong root."""
        try:
            first = self.encoded(0)
        except BadImage as error:
            raise UserError(f"the first image of {file}, {self.name(0)}: {error}") from None
        if isinstance(first, Path) and not first.exists():
            raise UserError(f"{file}: there is no {first}; paths are relative to {self.root}")


class ImagenetPercentV2(Imagenet):
    """The images of train/ or val/ as training, evaluation and dataset.check read them. If yours are not
    files, override `read` here (docs/DATA.md).
    """


def find_root(data: str) -> Path:
    """Return `data` if it is given, else the environment variable, else the path at the top of this file."""
    return user_path(data or os.environ.get("IMAGENET_ROOT") or IMAGENET_ROOT)


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
    lists: str,
) -> Data:
    """Build ImageNet as in the recipes: the images of train/ that are not labeled are unlabeled images, and
    those of val/ are test images. lists: see choose_split. Raises UserError if the images or the split cannot
    be used.
    """
    views = photo_views(weak, strong, "eval", IMAGENET_NORM, on_device, image_size)
    root = find_root(data)
    train, val = ImagenetPercentV2(root, "train"), ImagenetPercentV2(root, "val")
    hint = "labels of a list are positions among the sorted class folders, from 0"
    if len(train.classes) != len(val.classes):
        raise UserError(
            f"{root}: train/ has {len(train.classes)} classes and val/ {len(val.classes)}; {hint}"
        )
    # The classes of a list without class names are numbers, which cannot be compared.
    if val.classes != [str(c) for c in range(len(val.classes))]:
        for label, (a, b) in enumerate(zip(train.classes, val.classes)):
            if a != b:
                raise UserError(f"{root}: label {label} is {a} in train/ and {b} in val/; {hint}")
    chosen = choose_split(train, split, labels_per_class, anno_percent, seed, lists)
    return assemble(train, val, chosen, views)


def eval_view_for_files(image_size: int, on_device: bool) -> View:
    return photo_view(pipeline("eval", image_size), IMAGENET_NORM, on_device)


def searched_dirs(data: str) -> list[Path]:
    return [find_root(data) / part for part in ("train", "val")]
