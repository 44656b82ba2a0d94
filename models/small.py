"""A small convolutional encoder for 8×8 to 32×32 images: it trains on a laptop's CPU."""

import torch
from torch import nn


def small_encoder(channels: int, width: int = 32) -> tuple[nn.Module, int]:
    """Return (encoder, d): [n, channels, h, w] -> [n, d], by four 3×3 convolutions, three of them strided,
    and average pooling.
    """
    widths, strides = [width, 2 * width, 2 * width, 4 * width], [2, 2, 1, 2]
    layers: list[nn.Module] = []
    for w, stride in zip(widths, strides):
        conv = nn.Conv2d(channels, w, 3, stride=stride, padding=1, bias=False)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        layers += [conv, nn.BatchNorm2d(w), nn.ReLU(inplace=True)]
        channels = w
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return net.to(memory_format=torch.channels_last), channels  # faster on a CPU
