"""Backbone -> class logits, and backbone -> projection head -> unit embedding (paper, Figure 2)."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.small import small_encoder
from models.wide_resnet import wide_resnet


def torchvision_encoder(name: str, channels: int) -> tuple[nn.Module, int]:
    """Return torchvision's network `name` as an encoder, and the dimension of its feature."""
    from models import resnet  # here, because importing torchvision takes seconds

    return resnet.torchvision_encoder(name, channels)


def _resnet50w2x(channels: int) -> tuple[nn.Module, int]:
    from models import resnet

    return resnet.resnet50w2x_encoder(channels)


# name -> function: number of image channels -> (encoder, dimension d of its feature). Any network of
# torchvision that ends in a linear classifier joins in a line, such as
# "convnext_tiny": partial(torchvision_encoder, "convnext_tiny")
BACKBONES: dict[str, Callable[[int], tuple[nn.Module, int]]] = {
    "small_encoder": small_encoder,
    "resnet18_encoder": partial(torchvision_encoder, "resnet18"),
    "resnet34_encoder": partial(torchvision_encoder, "resnet34"),
    "resnet50_encoder": partial(torchvision_encoder, "resnet50"),
    "resnet101_encoder": partial(torchvision_encoder, "resnet101"),
    "resnet50w2x_encoder": _resnet50w2x,
    "wrn_28_2": partial(wide_resnet, 28, 2),
    "wrn_28_8": partial(wide_resnet, 28, 8),
}


class Network(nn.Module):
    """Student F_s or teacher F_t.

    The parameters have the names and the order of the published checkpoints: backbone.*, fc.*, head.0.*,
    head.2.*, norm.*
    """

    def __init__(self, backbone: str, channels: int, num_classes: int, dim: int, norm: bool = False):
        """backbone: a key of BACKBONES. channels: of the images. num_classes: C.

        dim: D; 0 for a network without a head, whose embedding is the feature itself.
        norm: LayerNorm on the feature that fc and head read (SimMatchV2's norm_feat).
        """
        super().__init__()
        self.backbone, width = BACKBONES[backbone](channels)
        self.fc = nn.Linear(width, num_classes)
        self.head: nn.Module = nn.Identity()
        if dim:
            self.head = nn.Sequential(nn.Linear(width, width), nn.ReLU(inplace=True), nn.Linear(width, dim))
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()
        # bfloat16 or float16 for matrix products and convolutions; None: no autocast.
        self.autocast_dtype: torch.dtype | None = None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [n, c, h, w] -> logits [n, C], unit z [n, D], both in the dtype of the parameters."""
        with torch.autocast(x.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
            feature = self.norm(self.backbone(x))  # [n, d]
            logits, z = self.fc(feature), self.head(feature)  # [n, C], [n, D]
        dtype = self.fc.weight.dtype
        return logits.to(dtype), F.normalize(z.to(dtype), dim=1)  # [n, C], [n, D]
