"""What benchmark/parity.py compares with: the reference's steps on a small problem, in float64."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models import Batch, Method, build_method
from tests.reference import SimMatchReference
from util.config import Config

C, K, B, SIDE = (
    10,
    40,
    4,
    64,
)  # classes; labeled images; of them in a rank's batch; pixels of an image's side
LABELS = torch.arange(K) % C  # of the bank             [K]


class Step(NamedTuple):
    """What the reference started a step from, saw, and came to. States in float64, as in `state_of`."""

    before: dict[str, Tensor]
    batches: list[Batch]  # one for each rank
    bank_ready: bool
    terms: dict[str, float]
    pseudo_label: Tensor  # of all ranks          [ranks·muB, C]
    mask: Tensor  #                       [ranks·muB]
    after: dict[str, Tensor]


def settings(backbone: str = "resnet18_encoder", **changes: Any) -> Config:
    """The published 1 % recipe's, at a rate of its warm-up, and with a threshold that some images of a small
    problem pass.
    """
    return Config(
        **{
            **dict(
                backbone=backbone,
                cls=C,
                dim=16,
                mu=2,
                lr=1e-5,
                nesterov=True,
                lambda_u=10.0,
                lambda_in=5.0,
                threshold=0.5,
                c_smooth=0.9,
                DA=True,
            ),
            **changes,
        }
    )


def ripe(config: Config) -> Method:
    """A method in float64 after some supervised training, whose teacher lags.

    Not an untrained one: there all images look alike, and a classifier that tells them apart magnifies
    rounding.
    """
    torch.manual_seed(0)
    method = build_method(config, 3, LABELS)
    optimizer = torch.optim.SGD(method.student.parameters(), lr=0.05, momentum=0.9)
    for k in range(60):
        y = LABELS[: 2 * C]  # [20]
        logits, _ = method.student(images(y, 100_000 + k).float())  # [20, C]
        optimizer.zero_grad()
        F.cross_entropy(logits, y, label_smoothing=0.2).backward()  # not too sure: L_x stays far from 0
        optimizer.step()
    method.double()
    with torch.no_grad():
        for own, theirs in zip(method.teacher.net.parameters(), method.student.parameters()):
            own.copy_(theirs * (1 + 0.02 * torch.randn_like(theirs)))
        for own, theirs in zip(method.teacher.net.buffers(), method.student.buffers()):
            own.copy_(theirs)
    return method


def images(y: Tensor, seed: int) -> Tensor:
    """Of classes `y` [n]: a smooth pattern of the class, one of the image, and noise; exact in float32. [n,
    3, SIDE, SIDE] float64.
    """
    patterns = torch.randn(C, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    g = torch.Generator().manual_seed(seed)
    smooth = F.interpolate(
        0.9 * patterns[y] + torch.randn(len(y), 3, 5, 5, generator=g), size=SIDE, mode="bicubic"
    )
    return (smooth + 0.2 * torch.randn(len(y), 3, SIDE, SIDE, generator=g)).double()


def batches_of(config: Config, ranks: int, step: int) -> list[Batch]:
    g = torch.Generator().manual_seed(step)
    index = torch.randperm(K, generator=g)[: B * ranks].chunk(ranks)  # [B] of each
    out = []
    for rank, rows in enumerate(index):
        seed, y = 1000 * step + 10 * rank, torch.randint(C, (config.mu * B,), generator=g)
        u_weak = images(y, seed)  # [muB, 3, SIDE, SIDE]
        u_strong = (u_weak + 0.3 * images(y, seed + 1)).float().double()  # [muB, 3, SIDE, SIDE]
        out.append(Batch(images(LABELS[rows], seed + 2), LABELS[rows], rows, u_weak, u_strong))
    return out


def trajectory(config: Config, ranks: int, steps: int) -> list[Step]:
    """The reference's steps; the first is of the first epoch."""
    method = ripe(config)
    slow = SimMatchReference(
        method.student,
        method.bank.z,
        method.bank.labels,
        config.cls,
        lambda_u=config.lambda_u,
        lambda_in=config.lambda_in,
        threshold=config.threshold,
        st=config.st,
        tt=config.tt,
        c_smooth=config.c_smooth,
        DA=config.DA,
        da_len=config.da_len,
        bank_m=config.bank_m,
        ema_m=config.ema_m,
        lr=config.lr,
        momentum=config.momentum,
        wd=config.wd,
        nesterov=config.nesterov,
        no_decay_bn=config.no_decay_bn,
        bn_mode="average" if config.eman else "shuffle",
    )
    slow.teacher.load_state_dict(method.teacher.net.state_dict())
    out, before = [], state_of(slow)
    for k in range(steps):
        batches = batches_of(config, ranks, k)
        terms, pseudo, mask = slow.step(batches, k, first_epoch=k == 0)
        after = state_of(slow)
        out.append(
            Step(
                before,
                batches,
                k > 0,
                terms,
                torch.tensor(pseudo, dtype=torch.float64).flatten(0, 1),
                torch.tensor(mask).flatten(),
                after,
            )
        )
        before = after
    return out


def state_of(slow: SimMatchReference) -> dict[str, Tensor]:
    """A copy of it, named as in the state_dict of a SimMatch, and momentum.* of the student's parameters."""
    state = {
        f"{name}.{key}": value
        for name, net in (("student", slow.student), ("teacher.net", slow.teacher))
        for key, value in net.state_dict().items()
    }
    state |= {
        "bank.z": torch.stack(slow.bank),
        "bank.labels": torch.tensor(slow.labels),
        "align.ring": torch.tensor([[float(v) for v in row] for row in slow.ring], dtype=torch.float64),
        "align.ptr": torch.tensor([slow.ptr]),
    }
    state |= {f"momentum.{key}": value for key, value in slow.velocity.items()}
    return {key: value.clone() for key, value in state.items()}
