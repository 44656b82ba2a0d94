"""Backbone -> class logits, and backbone -> projection head -> unit embedding (paper, Figure 2)."""

from functools import partial
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.resnet import RESNETS, resnet_encoder
from models.small import small_encoder
from models.wide_resnet import wide_resnet

# name -> function of the images' channels that gives (encoder, length d of its feature)
BACKBONES = {
    "small_encoder": small_encoder,
    **{name: partial(resnet_encoder, *how) for name, how in RESNETS.items()},
    "wrn_28_2": partial(wide_resnet, 28, 2),
    "wrn_28_8": partial(wide_resnet, 28, 8),
}


class Network(nn.Module):
    """Student F_s or teacher F_t. Parameters are named, and in the order, of the published checkpoints:
    backbone.*, fc.*, head.0.*, head.2.*, norm.*
    """

    def __init__(self, backbone: str, channels: int, num_classes: int, dim: int, norm: bool = False):
        """backbone: one of BACKBONES; channels: of the images; num_classes: C; dim: D, 0 for a network
        without a head, whose embedding is the feature; norm: LayerNorm on the feature that fc and head read
        (SimMatchV2's norm_feat).
        """
        super().__init__()
        self.backbone, width = BACKBONES[backbone](channels)
        self.fc = nn.Linear(width, num_classes)
        self.head = (
            nn.Sequential(nn.Linear(width, width), nn.ReLU(inplace=True), nn.Linear(width, dim))
            if dim
            else nn.Identity()
        )
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()

        self.autocast_dtype: Optional[torch.dtype] = (
            None  # bfloat16 or float16 for matrix products and convolutions in autocast
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [n, c, h, w] -> logits [n, C], unit z [n, D], both in the type of the parameters."""
        with torch.autocast(x.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
            feature = self.norm(self.backbone(x))  # [n, d]
            logits, z = self.fc(feature), self.head(feature)  # [n, C], [n, D]
        exact = self.fc.weight.dtype
        return logits.to(exact), F.normalize(z.to(exact), dim=1)  # [n, C], [n, D]


def parameter_groups(module: nn.Module, wd: float, no_decay_bn: bool) -> list[dict[str, Any]]:
    """The optimizer's groups: weight decay `wd` on every parameter, or, with no_decay_bn, on all but biases
    and BN.
    """
    parameters = list(module.parameters())
    if not no_decay_bn:
        return [{"params": parameters, "weight_decay": wd}]
    # biases, and BN's scales and shifts, are the vectors among the parameters
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": wd},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
