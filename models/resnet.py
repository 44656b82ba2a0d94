"""ResNet encoders: torchvision's own, without their classifier, under the published names."""

from torch import nn
from torchvision.models import resnet
from torchvision.models.resnet import BasicBlock, Bottleneck


class WideResNetEncoder(resnet.ResNet):
    """A ResNet whose every layer, stem and output included, is `widen` times as wide (SimCLR's "2x")."""

    def __init__(self, block: type, layers: list[int], widen: int):
        self.widen = widen
        super().__init__(block, layers)
        self.conv1 = nn.Conv2d(3, 64 * widen, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64 * widen)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")

    def _make_layer(self, block, planes, *args, **kwargs):
        if planes == 64:  # the first layer: torchvision has just set the stem's width
            self.inplanes = 64 * self.widen
        return super()._make_layer(block, planes * self.widen, *args, **kwargs)


def resnet_encoder(block: type, layers: list[int], widen: int, channels: int) -> tuple[nn.Module, int]:
    """(encoder, d): [n, channels, h, w] -> [n, d]. Parameter names are torchvision's, with no fc."""
    net = resnet.ResNet(block, layers) if widen == 1 else WideResNetEncoder(block, layers, widen)
    net.fc = nn.Identity()
    if channels != 3:
        net.conv1 = nn.Conv2d(channels, net.conv1.out_channels, 7, stride=2, padding=3, bias=False)
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    return net, 512 * block.expansion * widen


RESNETS = {
    "resnet18_encoder": (BasicBlock, [2, 2, 2, 2], 1),
    "resnet34_encoder": (BasicBlock, [3, 4, 6, 3], 1),
    "resnet50_encoder": (Bottleneck, [3, 4, 6, 3], 1),
    "resnet101_encoder": (Bottleneck, [3, 4, 23, 3], 1),
    "resnet50w2x_encoder": (Bottleneck, [3, 4, 6, 3], 2),
}
