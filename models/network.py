"""Backbone -> class logits, and backbone -> projection head -> unit embedding (paper, Figure 2)."""
import torch.nn.functional as F
from torch import Tensor, nn

from models.resnet import RESNETS, resnet_encoder
from models.small import small_encoder

BACKBONES = ("small_encoder", *RESNETS)


class Network(nn.Module):
    """Student F_s or teacher F_t. Parameters are named as in the published checkpoints: backbone.*, fc.*, head.0.*, head.2.*"""

    def __init__(self, backbone: str, channels: int, num_classes: int, dim: int):
        """backbone: one of BACKBONES; channels: of the images; num_classes: C; dim: D."""
        super().__init__()
        self.backbone, width = (small_encoder(channels) if backbone == "small_encoder"
                                else resnet_encoder(*RESNETS[backbone], channels))
        self.fc = nn.Linear(width, num_classes)
        self.head = nn.Sequential(nn.Linear(width, width), nn.ReLU(inplace=True), nn.Linear(width, dim))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        feature = self.backbone(x)                                          # [n, d]
        return self.fc(feature), F.normalize(self.head(feature), dim=1)     # [n, C], [n, D]
