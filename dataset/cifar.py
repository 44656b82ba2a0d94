"""CIFAR-10 and CIFAR-100. This file imports torchvision, which takes seconds: import it only when needed."""

import pickle
from pathlib import Path

import numpy as np
from torchvision.datasets import CIFAR10, CIFAR100

from dataset import splits
from dataset.loader import Data, SplitId, View
from dataset.source import Arrays
from dataset.views import CIFAR10_NORM, CIFAR100_NORM, CIFAR_FILES, photo_view, photo_views
from util.errors import UserError
from util.files import user_path

# util/fields.py reads these literals from the source.
USES = ("data", "labels_per_class", "weak", "strong", "device_views")

SETS = {"cifar10": (CIFAR10, CIFAR10_NORM), "cifar100": (CIFAR100, CIFAR100_NORM)}
ROOT = "data"  # the folder of the files without --data


def build(
    dataset: str, data: str, labels_per_class: int, seed: int, weak: str, strong: str, on_device: bool
) -> Data:
    """Build cifar10 or cifar100 with `labels_per_class` labeled images per class, drawn by `seed`.

    All training images are unlabeled images, the labeled images too (docs/METHOD.md, CIFAR recipe). The files
    are downloaded if they are not in `data`. Raises UserError if they are damaged or cannot be downloaded.
    """
    kind, norm = SETS[dataset]
    views = photo_views(weak, strong, "cifar_eval", norm, on_device)
    root = user_path(data or ROOT)
    train, test = (_open(kind, dataset, root, is_train) for is_train in (True, False))
    labels, test_labels = (np.array(part.targets, np.int64) for part in (train, test))  # [50000], [10000]
    labeled, sha = splits.draw_rows(labels, labels_per_class, seed)  # [C·labels_per_class]
    return Data(
        images=Arrays(train.data, pil=True),
        labels=labels,
        labeled=labeled,
        unlabeled=np.arange(len(labels)),
        test_images=Arrays(test.data, pil=True),
        test_labels=test_labels,
        classes=list(train.classes),
        channels=3,
        split=SplitId(f"{dataset}-{labels_per_class}-seed{seed}", sha),
        **views,
    )


def eval_view_for_files(dataset: str, on_device: bool) -> View:
    """Return the evaluation view of image files of any size."""
    return photo_view(CIFAR_FILES, SETS[dataset][1], on_device)


def _open(dataset: type[CIFAR10], name: str, root: Path, train: bool) -> CIFAR10:
    try:
        try:
            return dataset(str(root), train=train, download=False)
        except RuntimeError:  # torchvision raises it if files are missing or damaged
            print(f"{name}: the files in {root} are missing or damaged; downloading them", flush=True)
            return dataset(str(root), train=train, download=True)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{name} is not in {root} and cannot be downloaded ({' '.join(str(error).split())[:120]}): "
            f"put the archive's folder {dataset.base_folder} there, or use --data"
        ) from None
    except (pickle.UnpicklingError, EOFError, KeyError, ValueError) as error:
        raise UserError(
            f"{name} in {root} is damaged ({error}): remove {root / dataset.base_folder} and start again"
        ) from None
