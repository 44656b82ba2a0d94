"""The data sets, by name."""
from typing import Any

from dataset import digits
from dataset.loader import Data
from util.errors import UserError

DATASETS = {
    "digits": lambda c: digits.build(c.labels_per_class, c.seed),
}


def build_data(config: Any) -> Data:
    """config: anything with the fields of util.config.Config. Raises UserError where the data cannot serve them."""
    if config.dataset not in DATASETS:
        raise UserError(f"unknown dataset {config.dataset!r}; known: {', '.join(DATASETS)}")
    data = DATASETS[config.dataset](config)
    if len(data.classes) != config.cls:
        raise UserError(f"cls is {config.cls}, but {config.dataset} has {len(data.classes)} classes")
    return data
