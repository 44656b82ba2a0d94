"""The methods by name. Only the two `build_` functions read a config; all others take plain values."""

from typing import Any

from torch import Tensor

from models.diagnose import diagnose
from models.fixmatch import FixMatch
from models.method import Batch, Method, StepOutput
from models.network import BACKBONES, Network
from models.optimizer import build_optimizer, parameter_groups
from models.simmatch import SimMatch
from models.simmatch_single import SimMatchSingle
from models.step import configure_execution, split_virtual_ranks, train_step
from models.supervised import Supervised

__all__ = [
    "METHODS",
    "Batch",
    "Method",
    "SimMatch",
    "StepOutput",
    "build_method",
    "build_network",
    "build_optimizer",
    "configure_execution",
    "diagnose",
    "parameter_groups",
    "split_virtual_ranks",
    "train_step",
]

METHODS = {
    "simmatch": lambda c, network, labels: SimMatch(
        network, labels, c.cls, c.dim, bn_mode="average" if c.eman else "shuffle", **_simmatch_settings(c)
    ),
    "simmatch_single": lambda c, network, labels: SimMatchSingle(
        network, labels, c.cls, c.dim, **_simmatch_settings(c)
    ),
    "fixmatch": lambda c, network, labels: FixMatch(
        network, lambda_u=c.lambda_u, threshold=c.threshold, ema_m=c.ema_m, eman=c.eman
    ),
    "supervised": lambda c, network, labels: Supervised(network, ema_m=c.ema_m),
}


def _simmatch_settings(c: Any) -> dict[str, Any]:
    """The settings that both forms of SimMatch share."""
    names = ("lambda_u", "lambda_in", "threshold", "st", "tt", "c_smooth", "DA", "da_len", "bank_m", "ema_m")
    return {name: getattr(c, name) for name in names}


def build_network(config: Any, channels: int) -> Network:
    """Build the student's network. Raises ValueError if the backbone is unknown."""
    if config.backbone not in BACKBONES:
        raise ValueError(f"unknown backbone {config.backbone!r}; known: {', '.join(BACKBONES)}")
    return Network(config.backbone, channels, config.cls, config.dim)


def build_method(config: Any, channels: int, labels: Tensor) -> Method:
    """Build the method of a config: any object with the fields of util.config.Config.

    channels: of the images. labels [K]: of the labeled list, in its order.
    Raises ValueError if the method or the backbone is unknown; the message lists the known ones.
    """
    if config.method not in METHODS:
        raise ValueError(f"unknown method {config.method!r}; known: {', '.join(METHODS)}")
    return METHODS[config.method](config, build_network(config, channels), labels)
