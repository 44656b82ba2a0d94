"""Encoders from torchvision's networks. Importing this file imports torchvision, which takes seconds."""

from typing import Any

from torch import nn
from torchvision.models import get_model, resnet


def torchvision_encoder(name: str, channels: int) -> tuple[nn.Module, int]:
    """Return (encoder, d): [n, channels, h, w] -> [n, d]. It is torchvision's network `name` without its last
    linear layer, the classifier; the other parameters keep torchvision's names.
    """
    return _without_classifier(get_model(name), channels)


def resnet50w2x_encoder(channels: int) -> tuple[nn.Module, int]:
    """Return (encoder, d): [n, channels, h, w] -> [n, d], where d is 4096."""
    encoder, d = _without_classifier(_ResNet50w2x(), channels)
    return encoder, 2 * d  # torchvision's classifier has the width of a ResNet-50


class _ResNet50w2x(resnet.ResNet):
    """A ResNet-50 with twice the channels in every layer, stem and output included (SimCLR's "2x")."""

    def __init__(self) -> None:
        super().__init__(resnet.Bottleneck, [3, 4, 6, 3])
        self.conv1 = nn.Conv2d(3, 128, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(128)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")

    def _make_layer(self, block: type, planes: int, *args: Any, **kwargs: Any) -> nn.Module:
        if planes == 64:  # layer1: inplanes is still the width of torchvision's own stem
            self.inplanes = 128
        return super()._make_layer(block, 2 * planes, *args, **kwargs)


def _without_classifier(net: nn.Module, channels: int) -> tuple[nn.Module, int]:
    """Return the network without its last linear layer, for images of `channels` channels, and the dimension
    of its feature.
    """
    name, classifier = [(n, m) for n, m in net.named_modules() if isinstance(m, nn.Linear)][-1]
    _replace(net, name, nn.Identity())
    if channels != 3:
        name, old = next((n, m) for n, m in net.named_modules() if isinstance(m, nn.Conv2d))
        conv = nn.Conv2d(
            channels,
            old.out_channels,
            old.kernel_size,  # type: ignore[arg-type]  # a tuple of two
            old.stride,  # type: ignore[arg-type]
            old.padding,  # type: ignore[arg-type]
            bias=old.bias is not None,
        )
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        _replace(net, name, conv)
    return net, classifier.in_features


def _replace(net: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(net.get_submodule(parent), attribute, new)
