"""The methods, by name. Everything here is told what it needs by value; only `build_method` sees a config."""

from typing import Any

from torch import Tensor

from models.diagnose import diagnose
from models.fixmatch import FixMatch
from models.method import Batch, StepOutput, Method
from models.network import BACKBONES, Network, parameter_groups
from models.simmatch import SimMatch
from models.simmatch_single import SimMatchSingle
from models.step import split_virtual_ranks, train_step, configure_execution
from models.supervised import Supervised

METHODS = {
    "simmatch": lambda c, network, labels: SimMatch(
        network, labels, c.cls, c.dim, bn_mode="average" if c.eman else "shuffle", **_simmatch(c)
    ),
    "simmatch_single": lambda c, network, labels: SimMatchSingle(
        network, labels, c.cls, c.dim, **_simmatch(c)
    ),
    "fixmatch": lambda c, network, labels: FixMatch(
        network, lambda_u=c.lambda_u, threshold=c.threshold, ema_m=c.ema_m, eman=c.eman
    ),
    "supervised": lambda c, network, labels: Supervised(network, ema_m=c.ema_m),
}


def _simmatch(c: Any) -> dict[str, Any]:
    """What both forms of SimMatch are told."""
    return dict(
        lambda_u=c.lambda_u,
        lambda_in=c.lambda_in,
        threshold=c.threshold,
        st=c.st,
        tt=c.tt,
        c_smooth=c.c_smooth,
        DA=c.DA,
        da_len=c.da_len,
        bank_m=c.bank_m,
        ema_m=c.ema_m,
    )


def build_network(config: Any, channels: int) -> Network:
    """The student of a config. Raises ValueError on an unknown backbone, naming the known ones."""
    if config.backbone not in BACKBONES:
        raise ValueError(f"unknown backbone {config.backbone!r}; known: {', '.join(BACKBONES)}")
    return Network(config.backbone, channels, config.cls, config.dim)


def build_method(config: Any, channels: int, labels: Tensor) -> Method:
    """config: anything with the fields of util.config.Config; channels: of the images; labels [K]: of the
    labeled list.

    Raises ValueError on an unknown method or backbone, naming the known ones.
    """
    if config.method not in METHODS:
        raise ValueError(f"unknown method {config.method!r}; known: {', '.join(METHODS)}")
    return METHODS[config.method](config, build_network(config, channels), labels)
