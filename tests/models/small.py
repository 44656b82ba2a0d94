"""A tiny problem for the models' tests: networks, batches and settings in float64."""

import reference
import torch
import torch.nn.functional as F
from torch import nn

from models import Batch
from models.network import Network
from models.simmatch import SimMatch
from models.simmatch_single import SimMatchSingle

C, D, K, B, MU = 4, 6, 10, 3, 2
LABELS = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 0, 0])
SETTINGS = dict(
    lambda_u=10.0,
    lambda_in=5.0,
    threshold=0.4,
    st=0.1,
    tt=0.1,
    c_smooth=0.9,
    DA=True,
    da_len=4,
    bank_m=0.0,
    ema_m=0.9,
)
# The three forms of SimMatch: (class, reference, settings)
FORMS = {
    "ema": (SimMatch, reference.SimMatchReference, {**SETTINGS, "bn_mode": "shuffle"}),
    "eman": (SimMatch, reference.SimMatchReference, {**SETTINGS, "bn_mode": "average"}),
    "single": (
        SimMatchSingle,
        reference.SimMatchSingleReference,
        {**SETTINGS, "bank_m": 0.7, "threshold": 0.8},
    ),
}


def method(form="ema", net=None, **changes):
    """A method of that form on `net`, in train mode."""
    kind, _, settings = FORMS[form]
    net = network() if net is None else net
    return kind(net, LABELS, C, D, **{**settings, **changes}).to(next(net.parameters()).dtype).train()


def network(seed=0, dtype=torch.float64):
    """A network with a convolution and BN, whose batch statistics and running statistics differ."""
    torch.manual_seed(seed)
    net = Network("small_encoder", channels=1, num_classes=C, dim=D)
    net.backbone = nn.Sequential(
        nn.Conv2d(1, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    net.fc = nn.Linear(5, C)
    net.fc.weight.data *= 12  # predictions on both sides of the thresholds
    net.head = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, D))
    return net.to(dtype)


def batch(seed, dtype=torch.float64, sides=(6,)):
    """sides: of the strong views."""
    g = torch.Generator().manual_seed(seed)
    index = torch.randperm(K, generator=g)[:B]

    def images(n, side=6):
        return torch.randn(n, 1, side, side, generator=g, dtype=torch.float64).to(dtype)

    x, u_weak = images(B), images(B * MU)
    return Batch(x, LABELS[index], index, u_weak, tuple(images(B * MU, side) for side in sides))


class Fixed(nn.Module):
    """A network that returns the same outputs for any images."""

    def __init__(self, logits, z):
        super().__init__()
        self.logits, self.z = nn.Parameter(logits), nn.Parameter(z)

    def forward(self, x, step=None):
        return self.logits, F.normalize(self.z.float(), dim=1).to(self.z.dtype)


def losses(method, batch, student=None, *, step=0, bank_ready=False):
    """(terms, StepOutput) of a single rank."""
    student = method.student if student is None else student
    (target,) = method.targets([batch], student, step=step)
    output = method.losses(batch, target, student, bank_ready=bank_ready)
    return output.losses, output
