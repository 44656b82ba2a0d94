"""Builds a data set of image files whose labeled images are those of a split."""

import numpy as np

from dataset import splits
from dataset.loader import Data, SplitId
from dataset.source import LabeledFiles
from dataset.views import IMAGENET_NORM, photo_view, pipeline, strong_views
from util.errors import UserError

PUBLISHED_SHARES = {0.01: "1p", 0.1: "10p"}  # the published lists of --anno-percent: simmatch-1p, …


def choose_split(
    train: LabeledFiles,
    split: str,
    labels_per_class: int,
    anno_percent: float,
    seed: int,
    lists: str = "",
) -> splits.Split:
    """Return the split `split`, a name or path, if it is given; else draw `labels_per_class` images per
    class, if it is not 0; else return the published split of the share `anno_percent` from `lists`, simmatch
    or simclr, or draw that share if there is no such split.
    """
    if lists and not split and not labels_per_class and anno_percent in PUBLISHED_SHARES:
        split = f"{lists}-{PUBLISHED_SHARES[anno_percent]}"
    if split:
        return splits.load(split)
    names = splits.names_by_class(train)
    if labels_per_class:
        return splits.make(names, per_class=labels_per_class, seed=seed)
    return splits.make(names, percent=anno_percent, seed=seed)


def assemble(
    train: LabeledFiles,
    test: LabeledFiles,
    chosen: splits.Split,
    weak: str,
    strong: str,
    image_size: int,
    on_device: bool,
) -> Data:
    """Build a data set of these files with the labeled images of the split `chosen`; the other images of
    `train` are unlabeled. Raises UserError if an image of the split has no label, or a class has no labeled
    image.
    """
    labeled = splits.find_rows(chosen, train.names.array, str(train.root))  # [K]
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
    return Data(
        images=train,
        labels=train.labels,
        labeled=labeled,
        unlabeled=unlabeled,
        test_images=test,
        test_labels=test.labels,
        weak_view=photo_view(pipeline(weak, image_size), IMAGENET_NORM, on_device),
        strong_views=tuple(
            photo_view(pipeline(name, image_size), IMAGENET_NORM, on_device) for name in strong_views(strong)
        ),
        eval_view=photo_view(pipeline("eval", image_size), IMAGENET_NORM, on_device),
        classes=train.classes,
        channels=3,
        split=SplitId(chosen.id, chosen.sha256),
    )
