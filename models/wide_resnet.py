"""Wide ResNets (arXiv 1605.07146) for 32×32 images, as FixMatch uses them: WRN-28-2 for CIFAR-10, WRN-28-8
for CIFAR-100.
"""

import torch.nn.functional as F
from torch import Tensor, nn

LEAKY_RELU_SLOPE = 0.1


def batch_norm(channels: int) -> nn.BatchNorm2d:
    """BN as in FixMatch: eps 0.001; TensorFlow's momentum of 0.999 is 0.001 in PyTorch's convention."""
    return nn.BatchNorm2d(channels, eps=0.001, momentum=0.001)


def activate(bn: nn.Module, x: Tensor) -> Tensor:
    """BN, then LeakyReLU: [n, c, h, w] -> [n, c, h, w]."""
    return F.leaky_relu(bn(x), LEAKY_RELU_SLOPE, inplace=True)


class Block(nn.Module):
    """Pre-activation block: shortcut + conv(act(conv(act(x)))), where act is BN and LeakyReLU.

    The shortcut is x, or a 1×1 convolution of x where the width changes.
    activate_first: the shortcut takes act(x) instead of x.
    """

    def __init__(self, c_in: int, c_out: int, stride: int, activate_first: bool):
        super().__init__()
        self.activate_first = activate_first
        self.bn1 = batch_norm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1, bias=False)
        self.bn2 = batch_norm(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.shortcut = (
            nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1, stride=stride, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        out = activate(self.bn1, x)  # [n, c_in, h, w]
        if self.activate_first:
            x = out
        out = self.conv2(activate(self.bn2, self.conv1(out)))  # [n, c_out, h/stride, w/stride]
        return self.shortcut(x) + out


class WideResNet(nn.Module):
    """[n, channels, h, w] -> [n, 64·widen].

    No convolution has a bias, because every path passes through a later BN, which would cancel it.
    """

    def __init__(self, depth: int, widen: int, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        stages, c_in = [], 16
        for stage, stride in enumerate((1, 2, 2)):
            c_out = 16 * widen << stage
            blocks = []
            # Each of the three stages has (depth − 4) / 6 blocks of two convolutions; the stem and three
            # shortcuts are the other four.
            for i in range((depth - 4) // 6):
                blocks.append(Block(c_in, c_out, stride if i == 0 else 1, activate_first=stage == i == 0))
                c_in = c_out
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3 = stages
        self.bn = batch_norm(c_in)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="leaky_relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))  # [n, 64·widen, h/4, w/4]
        return activate(self.bn, x).mean(dim=(2, 3))  # [n, 64·widen]


def wide_resnet(depth: int, widen: int, channels: int) -> tuple[nn.Module, int]:
    """Return (encoder, d): [n, channels, h, w] -> [n, d]."""
    return WideResNet(depth, widen, channels), 64 * widen
