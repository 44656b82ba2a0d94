"""The methods, by name. Everything here is told what it needs by value; only `build_method` sees a config."""
from typing import Any

from torch import Tensor

from models.fixmatch import FixMatch
from models.method import Batch, Fresh, Method
from models.network import BACKBONES, Network
from models.simmatch import SimMatch
from models.supervised import Supervised

METHODS = {
    "simmatch": lambda c, network, labels: SimMatch(
        network, labels, c.cls, c.dim, lambda_u=c.lambda_u, lambda_in=c.lambda_in, threshold=c.threshold, st=c.st,
        tt=c.tt, c_smooth=c.c_smooth, DA=c.DA, ema_m=c.ema_m, eman=c.eman),
    "fixmatch": lambda c, network, labels: FixMatch(
        network, lambda_u=c.lambda_u, threshold=c.threshold, ema_m=c.ema_m, eman=c.eman),
    "supervised": lambda c, network, labels: Supervised(network, ema_m=c.ema_m),
}


def build_method(config: Any, channels: int, labels: Tensor) -> Method:
    """config: anything with the fields of util.config.Config; channels: of the images; labels [K]: of the labelled list.

    Raises ValueError on an unknown method or backbone, naming the known ones.
    """
    for kind, name, known in (("method", config.method, METHODS), ("backbone", config.backbone, BACKBONES)):
        if name not in known:
            raise ValueError(f"unknown {kind} {name!r}; known: {', '.join(known)}")
    network = Network(config.backbone, channels, config.cls, config.dim)
    return METHODS[config.method](config, network, labels)
