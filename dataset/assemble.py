"""Builds a data set of image files whose labeled images are those of a split."""

from typing import Any

import numpy as np

from dataset import splits
from dataset.loader import Data, SplitId
from dataset.source import LabeledFiles
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


def assemble(train: LabeledFiles, test: LabeledFiles, chosen: splits.Split, views: dict[str, Any]) -> Data:
    """Build a data set of these files with the labeled images of the split `chosen`; the other images of
    `train` are unlabeled. views: what `dataset.views.photo_views` returns. Raises UserError if an image of
    the split has no label, or a class has no labeled image.
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
        classes=train.classes,
        channels=3,
        split=SplitId(chosen.id, chosen.sha256),
        **views,
    )
