"""ResNet encoders: torchvision's own, without their classifier. Importing this file imports torchvision."""

from typing import Any

from torch import nn
from torchvision.models import resnet


class WideResNetEncoder(resnet.ResNet):
    """A ResNet with `widen` times the channels in every layer, stem and output included (SimCLR's "2x")."""

    def __init__(self, block: type, layers: list[int], widen: int):
        self.widen = widen
        super().__init__(block, layers)
        self.conv1 = nn.Conv2d(3, 64 * widen, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64 * widen)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")

    def _make_layer(self, block: type, planes: int, *args: Any, **kwargs: Any) -> nn.Module:
        if planes == 64:  # layer1: inplanes is still the width of torchvision's own stem
            self.inplanes = 64 * self.widen
        return super()._make_layer(block, planes * self.widen, *args, **kwargs)


def resnet_encoder(block: str, layers: list[int], widen: int, channels: int) -> tuple[nn.Module, int]:
    """Return (encoder, d): [n, channels, h, w] -> [n, d]. Parameters have torchvision's names, without fc.

    block: BasicBlock or Bottleneck.
    """
    block_class = getattr(resnet, block)
    net = resnet.ResNet(block_class, layers) if widen == 1 else WideResNetEncoder(block_class, layers, widen)
    net.fc = nn.Identity()
    if channels != 3:
        net.conv1 = nn.Conv2d(channels, net.conv1.out_channels, 7, stride=2, padding=3, bias=False)
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    return net, 512 * block_class.expansion * widen
