"""The reference's steps on a small problem, in float64, with which benchmark/parity.py compares."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models import Batch, SimMatch, build_method
from tests.reference import SimMatchReference
from util.config import Config

C, K, B = 10, 40, 4  # classes; labeled images; labeled images per rank
SIDE = 64  # of an image, in pixels
LABELS = torch.arange(K) % C  # of the bank [K]


class Step(NamedTuple):
    """The reference's state before a step, the inputs, the results, and the state after it (`state_of`)."""

    before: dict[str, Tensor]
    batches: list[Batch]  # one per rank
    bank_ready: bool
    terms: dict[str, float]
    pseudo_label: Tensor  # of all ranks          [ranks·muB, C]
    mask: Tensor  #                       [ranks·muB]
    after: dict[str, Tensor]


def settings(backbone: str = "resnet18_encoder", **changes: Any) -> Config:
    """The settings of the published 1 % recipe, with a learning rate of its warm-up and a threshold that some
    images of the small problem reach.
    """
    problem: dict[str, Any] = {"backbone": backbone, "cls": C, "dim": 16, "mu": 2}
    recipe = {"lr": 1e-5, "nesterov": True, "lambda_u": 10.0, "lambda_in": 5.0, "c_smooth": 0.9, "DA": True}
    return Config(**{**problem, **recipe, "threshold": 0.5, **changes})


def pretrained(config: Config) -> SimMatch:
    """A method in float64 after some supervised training, whose teacher differs from the student.

    In an untrained network all images have similar features, so that rounding errors have a large effect.
    """
    torch.manual_seed(0)
    method = build_method(config, 3, LABELS)
    assert isinstance(method, SimMatch)
    optimizer = torch.optim.SGD(method.student.parameters(), lr=0.05, momentum=0.9)
    for k in range(60):
        y = LABELS[: 2 * C]  # [20]
        logits, _ = method.student(images(y, 100_000 + k).float())  # [20, C]
        optimizer.zero_grad()
        F.cross_entropy(logits, y, label_smoothing=0.2).backward()  # smoothing: L_x stays above 0
        optimizer.step()
    method.double()
    with torch.no_grad():
        for p, student_p in zip(method.teacher.net.parameters(), method.student.parameters()):
            p.copy_(student_p * (1 + 0.02 * torch.randn_like(student_p)))
        for buffer, student_buffer in zip(method.teacher.net.buffers(), method.student.buffers()):
            buffer.copy_(student_buffer)
    return method


def images(y: Tensor, seed: int) -> Tensor:
    """Images of classes `y` [n]: a smooth pattern of the class, one of the image, and noise -> [n, 3, SIDE,
    SIDE] float64, with values that float32 represents exactly.
    """
    patterns = torch.randn(C, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    g = torch.Generator().manual_seed(seed)
    smooth = F.interpolate(
        0.9 * patterns[y] + torch.randn(len(y), 3, 5, 5, generator=g), size=SIDE, mode="bicubic"
    )
    return (smooth + 0.2 * torch.randn(len(y), 3, SIDE, SIDE, generator=g)).double()


def batches_of(config: Config, ranks: int, step: int) -> list[Batch]:
    g = torch.Generator().manual_seed(step)
    index = torch.randperm(K, generator=g)[: B * ranks].chunk(ranks)  # [B] each
    out = []
    for rank, rows in enumerate(index):
        seed, y = 1000 * step + 10 * rank, torch.randint(C, (config.mu * B,), generator=g)
        u_weak = images(y, seed)  # [muB, 3, SIDE, SIDE]
        u_strong = (u_weak + 0.3 * images(y, seed + 1)).float().double()  # [muB, 3, SIDE, SIDE]
        out.append(Batch(images(LABELS[rows], seed + 2), LABELS[rows], rows, u_weak, (u_strong,)))
    return out


def trajectory(config: Config, ranks: int, steps: int) -> list[Step]:
    """The reference's steps. The first is in the first epoch."""
    method = pretrained(config)
    reference = SimMatchReference(
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
    reference.teacher.load_state_dict(method.teacher.net.state_dict())
    out, before = [], state_of(reference)
    for k in range(steps):
        batches = batches_of(config, ranks, k)
        terms, pseudo, mask = reference.step(batches, k, first_epoch=k == 0)
        after = state_of(reference)
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


def state_of(reference: SimMatchReference) -> dict[str, Tensor]:
    """A copy of the state, named as in SimMatch.state_dict(), with momentum.* of the student's parameters."""
    state = {
        f"{name}.{key}": value
        for name, net in (("student", reference.student), ("teacher.net", reference.teacher))
        for key, value in net.state_dict().items()
    }
    state |= {
        "bank.z": torch.stack(reference.bank),
        "bank.labels": torch.tensor(reference.labels),
        "align.ring": torch.tensor([[float(v) for v in row] for row in reference.ring], dtype=torch.float64),
        "align.ptr": torch.tensor([reference.ptr]),
    }
    state |= {f"momentum.{key}": value for key, value in reference.velocity.items()}
    return {key: value.clone() for key, value in state.items()}
