"""A small convolutional encoder for 8×8 to 32×32 images: it trains on a laptop's CPU."""

import torch
from torch import nn


def small_encoder(channels: int, width: int = 32) -> tuple[nn.Module, int]:
    """(encoder, d): [n, channels, h, w] -> [n, d], four 3×3 convolutions, three of them strided, then the
    mean over space.
    """
    widths, strides = [width, 2 * width, 2 * width, 4 * width], [2, 2, 1, 2]
    layers: list[nn.Module] = []
    for w, stride in zip(widths, strides):
        layers += [
            nn.Conv2d(channels, w, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(w),
            nn.ReLU(inplace=True),
        ]
        nn.init.kaiming_normal_(layers[-3].weight, mode="fan_out", nonlinearity="relu")
        channels = w
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return net.to(memory_format=torch.channels_last), channels  # the layout in which a CPU convolves faster
