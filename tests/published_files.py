"""Files of the published layouts: modules with the parameters and buffers that docs/CHECKPOINTS.md lists, on
torchvision's own ResNets.
"""

import torch
import torchvision
from torch import nn


class Net(nn.Module):
    def __init__(self, arch, classes, dim=0, norm=False):
        super().__init__()
        self.backbone = getattr(torchvision.models, arch)()
        width = self.backbone.fc.in_features
        self.backbone.fc = nn.Identity()
        self.fc = nn.Linear(width, classes)
        if dim:
            self.head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, dim))
        if norm:
            self.norm = nn.LayerNorm(width)

    def forward(self, x):
        feature = self.backbone(x)
        return self.fc(self.norm(feature) if hasattr(self, "norm") else feature)


class Published(nn.Module):
    """The networks main and ema, and the buffers of a program."""

    def __init__(self, main, ema=None, **buffers):
        super().__init__()
        self.main = main
        if ema is not None:
            self.ema = ema.requires_grad_(False)
        for name, value in buffers.items():
            self.register_buffer(name, value)


class MoCo(nn.Module):
    def __init__(self, arch="resnet18", dim=16, layers=2):
        super().__init__()
        self.encoder_q, self.encoder_k = (getattr(torchvision.models, arch)() for _ in range(2))
        for encoder in (self.encoder_q, self.encoder_k):
            width = encoder.fc.in_features
            hidden = [part for _ in range(layers - 1) for part in (nn.Linear(width, width), nn.ReLU())]
            encoder.fc = nn.Sequential(*hidden, nn.Linear(width, dim)) if hidden else nn.Linear(width, dim)
        self.register_buffer("queue", torch.randn(dim, 64))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))


def unit(n, dim):
    return nn.functional.normalize(torch.randn(n, dim), dim=1)


def simmatch(arch="resnet18", classes=3, dim=16, labeled=7, DA=True):
    ring = {"DA_queue": torch.rand(256, classes), "DA_ptr": torch.tensor([5])} if DA else {}
    return randomized(
        Published(
            Net(arch, classes, dim),
            Net(arch, classes, dim),
            bank=unit(labeled, dim).T.contiguous(),
            labels=torch.arange(labeled) % classes,
            **ring,
        )
    )


def simmatchv2(arch="resnet18", classes=3, dim=16, labeled=7, norm=True):
    return randomized(
        Published(
            Net(arch, classes, dim, norm),
            Net(arch, classes, dim, norm),
            l_bank=unit(labeled, dim),
            l_labels=torch.eye(classes)[torch.arange(labeled) % classes],
            ptr=torch.zeros(1, dtype=torch.long),
            u_bank=unit(20, dim),
            u_labels=torch.zeros(20, classes),
            da=torch.full((1, classes), 1 / classes),
        )
    )


def fixmatch(arch="resnet18", classes=3, eman=True):
    return randomized(Published(Net(arch, classes), Net(arch, classes) if eman else None))


def randomized(model):
    """Change the initial BN and LayerNorm values of `model`, so that a test notices a lost one."""
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.2)
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 1.5)
            module.num_batches_tracked.fill_(11)
    return model


def sgd(model, without_gradient=()):
    """The published optimizer over all parameters, including the teacher's, after a step that changes only
    the student.
    """
    optimizer = torch.optim.SGD(model.parameters(), 0.03, momentum=0.9, weight_decay=1e-4, nesterov=True)
    for name, p in model.named_parameters():
        if p.requires_grad and not name.startswith(without_gradient or "nothing"):
            p.grad = 0.01 * torch.randn_like(p)
    optimizer.step()
    return optimizer


def contents(model, arch, epoch=12, optimizer=None, prefix=True, **more):
    """The content of a file. prefix: with the model in DataParallel, as published."""
    held = nn.DataParallel(model) if prefix else model
    state = {"epoch": epoch, "arch": arch, "state_dict": held.state_dict(), **more}
    return state if optimizer is None else {**state, "optimizer": optimizer.state_dict()}
