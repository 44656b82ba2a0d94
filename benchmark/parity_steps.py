"""What benchmark/parity.py compares with: the reference's steps on a small problem, in float64."""
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import Batch, Method, build_method
from tests.reference import SimMatchReference
from util.config import Config

K, B, SIDE = 40, 4, 64                      # labelled images; of them in a rank's batch; pixels of an image's side


class Step(NamedTuple):
    """What the reference started a step from, saw, and came to. States in float64, as in `state_of`."""
    before: dict[str, Tensor]
    batches: list[Batch]                    # one for each rank
    bank_ready: bool
    terms: dict[str, float]
    pseudo: Tensor                          # of all ranks          [ranks·muB, C]
    mask: Tensor                            #                       [ranks·muB]
    after: dict[str, Tensor]


def settings(backbone: str = "resnet18_encoder", **changes: Any) -> Config:
    """The published recipe's, with a rate of its first steps, and a threshold that some images of a small problem pass."""
    return Config(**{**dict(backbone=backbone, cls=10, dim=16, mu=2, lr=1e-5, nesterov=True, lambda_u=10.0, lambda_in=5.0,
                            threshold=0.3, c_smooth=0.9, DA=True), **changes})


def labels_of(config: Config) -> Tensor:
    return torch.arange(K) % config.cls                                                     # [K]


def ripe(config: Config) -> Method:
    """A method in float64 as after some training: BN has scales and shifts, classes are told apart, the teacher lags."""
    torch.manual_seed(0)
    method = build_method(config, 3, labels_of(config)).double()
    with torch.no_grad():
        for layer in method.student.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.weight += 0.1 * torch.randn_like(layer.weight)
                layer.bias += 0.1 * torch.randn_like(layer.bias)
                layer.momentum = None           # running statistics are the mean over these batches
        for k in range(4):
            logits, _ = method.student(images(16, 100 + k))                        # [16, C]
        for layer in method.student.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.momentum = 0.1
        scale = 2 / logits.std(dim=0).mean()
        method.student.fc.bias.copy_(scale * (method.student.fc.bias - logits.mean(dim=0)))
        method.student.fc.weight *= scale
        for own, theirs in zip(method.teacher.net.parameters(), method.student.parameters()):
            own.copy_(theirs * (1 + 0.02 * torch.randn_like(theirs)))
        for own, theirs in zip(method.teacher.net.buffers(), method.student.buffers()):
            own.copy_(theirs)
    return method


def images(n: int, seed: int) -> Tensor:
    """Smooth ones with some noise, exact in float32: [n, 3, SIDE, SIDE] float64."""
    g = torch.Generator().manual_seed(seed)
    smooth = F.interpolate(torch.randn(n, 3, 5, 5, generator=g), size=SIDE, mode="bicubic")
    return (smooth + 0.2 * torch.randn(n, 3, SIDE, SIDE, generator=g)).double()


def batches_of(config: Config, ranks: int, step: int) -> list[Batch]:
    g = torch.Generator().manual_seed(step)
    index = torch.randperm(K, generator=g)[:B * ranks].chunk(ranks)                         # [B] of each
    out, n = [], config.mu * B
    for rank, rows in enumerate(index):
        u, noise = images(2 * n, 1000 * step + 10 * rank).split(n)
        out.append(Batch(images(B, 1000 * step + 10 * rank + 1), labels_of(config)[rows], rows, u, (u + 0.3 * noise).float().double()))
    return out


def trajectory(config: Config, ranks: int, steps: int) -> list[Step]:
    """The reference's steps; the first is of the first epoch."""
    method = ripe(config)
    slow = SimMatchReference(method.student, method.bank.z, method.bank.labels, config.cls, lambda_u=config.lambda_u,
                             lambda_in=config.lambda_in, threshold=config.threshold, st=config.st, tt=config.tt,
                             c_smooth=config.c_smooth, DA=config.DA, da_len=config.da_len, bank_m=config.bank_m,
                             ema_m=config.ema_m, lr=config.lr, momentum=config.momentum, wd=config.wd, nesterov=config.nesterov,
                             no_decay_bn=config.no_decay_bn, bn="average" if config.eman else "shuffle")
    slow.teacher.load_state_dict(method.teacher.net.state_dict())
    out, before = [], state_of(slow)
    for k in range(steps):
        batches = batches_of(config, ranks, k)
        terms, pseudo, mask = slow.step(batches, k, first_epoch=k == 0)
        after = state_of(slow)
        out.append(Step(before, batches, k > 0, terms, torch.tensor(pseudo, dtype=torch.float64).flatten(0, 1), torch.tensor(mask).flatten(), after))
        before = after
    return out


def state_of(slow: SimMatchReference) -> dict[str, Tensor]:
    """A copy of it, named as in the state_dict of a SimMatch, and momentum.* of the student's parameters."""
    state = {f"{name}.{key}": value for name, net in (("student", slow.student), ("teacher.net", slow.teacher))
             for key, value in net.state_dict().items()}
    state |= {"bank.z": torch.stack(slow.bank), "bank.labels": torch.tensor(slow.labels),
              "align.ring": torch.tensor([[float(v) for v in row] for row in slow.ring], dtype=torch.float64),
              "align.ptr": torch.tensor([slow.ptr])}
    state |= {f"momentum.{key}": value for key, value in slow.velocity.items()}
    return {key: value.clone() for key, value in state.items()}
