"""The optimizer of a config."""

from typing import Any

import torch
from torch import nn

# BN, instance, layer and group normalization, and their variants.
NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def build_optimizer(config: Any, student: nn.Module) -> torch.optim.SGD:
    """Return SGD with the momentum and weight decay of a config: any object with the fields of
    util.config.Config.
    """
    return torch.optim.SGD(
        parameter_groups(student, config.wd, config.no_decay_bn),
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
    )


def parameter_groups(module: nn.Module, wd: float, no_decay_bn: bool) -> list[dict[str, Any]]:
    """Return the parameter groups for the optimizer: weight decay `wd` acts on all parameters or, with
    no_decay_bn, on all but biases and the parameters of normalization layers. The order within a group is
    that of the module.
    """
    parameters = list(module.parameters())
    if not no_decay_bn:
        return [{"params": parameters, "weight_decay": wd}]
    spared = {
        id(p)
        for part in module.modules()
        for name, p in part.named_parameters(recurse=False)
        if isinstance(part, NORMS) or name.endswith("bias")
    }
    return [
        {"params": [p for p in parameters if id(p) not in spared], "weight_decay": wd},
        {"params": [p for p in parameters if id(p) in spared], "weight_decay": 0.0},
    ]
