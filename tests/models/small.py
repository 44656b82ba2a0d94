"""A tiny problem for the models' tests: networks, batches and settings in float64."""

import reference
import reference_v2
import torch
import torch.nn.functional as F
from torch import nn

from models import Batch
from models.network import Network
from models.simmatch import SimMatch
from models.simmatch_single import SimMatchSingle
from models.simmatchv2 import SimMatchV2

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
V2 = dict(
    lambda_nn=10.0,
    lambda_ee=5.0,
    lambda_ne=3.0,
    threshold=0.4,
    t=0.1,
    alpha=0.3,
    topn=4,
    k=2,
    DA=True,
    da_m=0.9,
    ema_m=0.9,
)


def method(form="ema", net=None, **changes):
    """A method of that form on `net`, in train mode."""
    kind, _, settings = FORMS[form]
    net = network() if net is None else net
    return kind(net, LABELS, C, D, **{**settings, **changes}).to(next(net.parameters()).dtype).train()


def method_v2(net=None, ranks=1, **changes):
    """SimMatchV2 on `net`, in train mode."""
    net = network_v2() if net is None else net
    settings = {**V2, "eman": False, **changes}
    method = SimMatchV2(net, LABELS, C, D, B * MU * ranks, **settings)
    return method.to(next(net.parameters()).dtype).train()


def reference_of_v2(net, method, eman=False, **changes):
    """The reference in the state of a new `method`, which was built from `net`."""
    settings = {**V2, "bn_mode": "average" if eman else "shuffle", **changes}
    bank, queue = method.bank.z, method.queue.z
    return reference_v2.SimMatchV2Reference(net, bank, LABELS, C, queue=queue, **settings)


def compare_v2(method, state, slow, rtol=1e-10, atol=1e-12):
    """Whether the state_dict of `method` is the state of the reference."""
    rows = [row.tolist() for row in slow.queue]
    expected = {
        "bank.z": torch.stack(slow.bank),
        "bank.labels": torch.tensor(slow.labels),
        "queue.z": torch.tensor(rows, dtype=torch.float64),
        "queue.p": torch.tensor(reference_v2.floats(slow.queue_labels), dtype=torch.float64),
        "queue.ptr": torch.tensor([slow.ptr]),
    }
    if method.prior is not None:
        expected["prior.da"] = torch.tensor([float(v) for v in slow.da], dtype=torch.float64)
    for name, net in (("student", slow.student), ("teacher.net", slow.teacher)):
        expected |= {f"{name}.{key}": value for key, value in net.state_dict().items()}
    assert expected.keys() == state.keys()
    for key, value in expected.items():
        torch.testing.assert_close(state[key], value, rtol=rtol, atol=atol, msg=key)


def network_v2(seed=0):
    """A network with a LayerNorm, which makes the features so large that fc need not be."""
    net = network(seed)
    net.norm = nn.LayerNorm(5).double()
    net.fc.weight.data /= 12
    return net


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
