"""The methods by name. Only the two `build_` functions read a config; all others take plain values."""

from importlib import import_module
from inspect import signature
from typing import Any

from torch import Tensor

from models.diagnose import diagnose
from models.method import Batch, Method
from models.network import BACKBONES, Network
from models.optimizer import build_optimizer
from models.simmatch import SimMatch
from models.step import configure_execution, split_virtual_ranks, train_step

__all__ = [
    "METHODS",
    "Batch",
    "Method",
    "SimMatch",
    "build_method",
    "build_network",
    "build_optimizer",
    "configure_execution",
    "diagnose",
    "split_virtual_ranks",
    "train_step",
]

# name -> module:class. A new method is a file and a line of this table, which util/fields.py reads.
METHODS = {
    "simmatch": "models.simmatch:SimMatch",
    "simmatchv2": "models.simmatchv2:SimMatchV2",
    "simmatch_single": "models.simmatch_single:SimMatchSingle",
    "fixmatch": "models.fixmatch:FixMatch",
    "supervised": "models.supervised:Supervised",
}


def build_network(config: Any, channels: int) -> Network:
    """Build the student's network. Raises ValueError if the backbone is unknown."""
    if config.backbone not in BACKBONES:
        raise ValueError(f"unknown backbone {config.backbone!r}; known: {', '.join(BACKBONES)}")
    return Network(config.backbone, channels, config.cls, config.dim, config.norm_feat)


def build_method(config: Any, channels: int, labels: Tensor, unlabeled_per_step: int = 0) -> Method:
    """Build the method of a config: any object with the fields of util.config.Config.

    A method gets the network, the settings that its file declares or uses and, if its constructor names them,
    `labels`, `num_classes`, `dim` and `unlabeled_per_step`.
    channels: of the images. labels [K]: of the labeled list, in its order. unlabeled_per_step: the number of
    unlabeled images in a step of all ranks; 0: those of a single rank.
    Raises ValueError if the method or the backbone is unknown; the message lists the known ones.
    """
    if config.method not in METHODS:
        raise ValueError(f"unknown method {config.method!r}; known: {', '.join(METHODS)}")
    module_name, _, class_name = METHODS[config.method].partition(":")
    module = import_module(module_name)
    kind = getattr(module, class_name)
    names = {*getattr(module, "SETTINGS", ()), *getattr(module, "USES", ())}
    arguments = {name: getattr(config, name) for name in names}
    problem = {
        "labels": labels,
        "num_classes": config.cls,
        "dim": config.dim,
        "unlabeled_per_step": unlabeled_per_step or config.batch_size * config.mu,
    }
    arguments |= {name: value for name, value in problem.items() if name in signature(kind).parameters}
    return kind(build_network(config, channels), **arguments)
