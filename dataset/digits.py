"""1,797 handwritten digits, 8×8 grey (digits_SOURCE.md): real data that needs no network."""
import hashlib
from pathlib import Path

import numpy as np

from dataset.loader import Data
from dataset.views import DIGITS
from util.errors import UserError

FILE = Path(__file__).with_name("digits.npz")


def build(labels_per_class: int, seed: int) -> Data:
    """The digits with `labels_per_class` labelled images a class, drawn by `seed` from the 1,437 that are not test images.

    All 1,437 are unlabelled images, the labelled ones too. Raises UserError if there are too few images of a class.
    """
    with np.load(FILE, allow_pickle=False) as file:
        images, labels, test = file["images"], file["labels"].astype(np.int64), file["test"]
    train_images, train_labels = images[~test], labels[~test]               # [1437, 8, 8], [1437]
    labelled = draw(train_labels, labels_per_class, seed)                   # [10·labels_per_class]
    sha = hashlib.sha256(labelled.astype("<i8").tobytes()).hexdigest()[:12]
    return Data(images=train_images, labels=train_labels, labelled=labelled, unlabelled=np.arange(len(train_labels)),
                test_images=images[test], test_labels=labels[test], classes=[str(c) for c in range(10)], channels=1,
                split=f"digits, {labels_per_class} a class, seed {seed}, sha256 {sha}", **DIGITS)


def draw(labels: np.ndarray, per_class: int, seed: int) -> np.ndarray:
    """Rows of `per_class` random images of each class, class after class: labels [N] -> [C·per_class].

    A smaller draw of the same seed is contained in a larger one.
    """
    if per_class < 1:
        raise UserError(f"labels_per_class is {per_class}: every class needs at least 1 labelled image")
    generator = np.random.Generator(np.random.Philox(seed))
    rows = []
    for c in range(labels.max() + 1):
        own = generator.permutation(np.flatnonzero(labels == c))
        if len(own) < per_class:
            raise UserError(f"labels_per_class is {per_class}, but class {c} has only {len(own)} training images")
        rows.append(own[:per_class])
    return np.concatenate(rows)
