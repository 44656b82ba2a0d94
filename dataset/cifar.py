"""CIFAR-10 and CIFAR-100, through torchvision, with a few labels of each class."""

import pickle
from pathlib import Path

import numpy as np
from torchvision.datasets import CIFAR10, CIFAR100

from dataset import splits
from dataset.loader import Data, SplitId
from dataset.source import Arrays
from dataset.views import CIFAR10_NORM, CIFAR100_NORM, photo_view, pipeline
from util.errors import UserError

SETS = {"cifar10": (CIFAR10, CIFAR10_NORM), "cifar100": (CIFAR100, CIFAR100_NORM)}
ROOT = "data"  # where the files are, or are put, without --data


def build(
    name: str, data: str, labels_per_class: int, seed: int, weak: str, strong: str, on_device: bool
) -> Data:
    """Labeled images drawn by seed; all training images are unlabeled images, the labeled ones too (METHOD
    §2).

    name: cifar10 or cifar100. The files are downloaded if they are not in `data`.
    """
    kind, norm = SETS[name]
    root = Path(data or ROOT).expanduser()
    train, test = (_open(kind, name, root, part) for part in (True, False))
    labels, test_labels = (np.array(part.targets, np.int64) for part in (train, test))  # [50000], [10000]
    labeled, sha = splits.draw(labels, labels_per_class, seed)  # [C·labels_per_class]
    views = [photo_view(pipeline(view), norm, on_device) for view in (weak, strong, "cifar_eval")]
    return Data(
        Arrays(train.data, pil=True),
        labels,
        labeled,
        np.arange(len(labels)),
        Arrays(test.data, pil=True),
        test_labels,
        *views,
        classes=list(train.classes),
        channels=3,
        split=SplitId(f"{name}-{labels_per_class}-seed{seed}", sha),
    )


def _open(kind, name: str, root: Path, train: bool):
    try:
        try:
            return kind(str(root), train=train, download=False)
        except RuntimeError:  # torchvision's word for missing or damaged files
            print(f"{name}: not in {root}, or damaged there; downloading it", flush=True)
            return kind(str(root), train=train, download=True)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{name} is not in {root} and cannot be downloaded ({' '.join(str(error).split())[:120]}): put the "
            f"archive's folder {kind.base_folder} there, or use --data"
        ) from None
    except (pickle.UnpicklingError, EOFError, KeyError, ValueError) as error:
        raise UserError(
            f"{name} in {root} is damaged ({error}): remove {root / kind.base_folder} and start again"
        ) from None
