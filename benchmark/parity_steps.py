"""The reference's steps on a small problem, in float64, with which benchmark/parity.py compares."""

from inspect import signature
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models import Batch, Method, build_method
from tests.reference import SimMatchReference
from tests.reference_v2 import SimMatchV2Reference
from util.config import Config

C, K, B, MU = 10, 40, 4, 2  # classes; labeled images; labeled images per rank; mu
SIDE = 64  # of an image, in pixels
LABELS = torch.arange(K) % C  # of the bank [K]


class Problem(NamedTuple):
    """What the comparison knows about a method."""

    reference: type[SimMatchReference]
    recipe: dict[str, Any]  # settings of the published 1 % recipe, except lr and threshold
    losses: tuple[str, ...]
    masked_loss: str  # the one which only images above the threshold enter
    states: dict[str, str]  # column of the table -> prefix of its keys in the method's state_dict
    sides: tuple[int, ...] = (SIDE,)  # of the strong views, in pixels
    left_out: str = ""  # the loss that a step leaves out where the reference has 0


PROBLEMS = {
    "simmatch": Problem(
        SimMatchReference,
        {"lambda_u": 10.0, "lambda_in": 5.0, "c_smooth": 0.9, "threshold": 0.5},
        ("loss_x", "loss_u", "loss_in"),
        "loss_u",
        {"prior": "align.", "bank": "bank."},
    ),
    "simmatchv2": Problem(
        SimMatchV2Reference,
        # The queue is empty in the first step, half full in the second, and then overwritten.
        {"lambda_nn": 10.0, "lambda_ee": 10.0, "lambda_ne": 10.0, "t": 0.1, "alpha": 0.1, "da_m": 0.9}
        | {"norm_feat": True, "topn": 16, "k": 2, "threshold": 0.5},
        ("loss_x", "loss_nn", "loss_ee", "loss_ne"),
        "loss_nn",
        # queue.p is a prefix of queue.ptr too.
        {"prior": "prior.", "bank": "bank.", "queue_z": "queue.z", "queue_p": "queue.p"},
        # The last maps of all views are 2·2 in ResNet-18; benchmark/parity.py derives a bound from that.
        (SIDE, 48, 40),
        left_out="loss_ne",
    ),
}


class Step(NamedTuple):
    """The reference's state before a step, the inputs, the results, and the state after it (`state_of`)."""

    before: dict[str, Tensor]
    batches: list[Batch]  # one per rank
    bank_ready: bool
    terms: dict[str, float]  # without that which the step leaves out
    pseudo_label: Tensor  # of all ranks          [ranks·muB, C]
    mask: Tensor  #                       [ranks·muB]
    after: dict[str, Tensor]


def settings(backbone: str = "resnet18_encoder", method: str = "simmatch", **changes: Any) -> Config:
    """The settings of the published 1 % recipe, with a learning rate of its warm-up and a threshold that some
    images of the small problem reach.
    """
    problem: dict[str, Any] = {"method": method, "backbone": backbone, "cls": C, "dim": 16, "mu": MU}
    recipe = {"lr": 1e-5, "nesterov": True, "DA": True, **PROBLEMS[method].recipe}
    return Config(**{**problem, **recipe, **changes})


def pretrained(config: Config, ranks: int) -> Method:
    """A method in float64 after some supervised training, whose teacher differs from the student.

    In an untrained network all images have similar features, so that rounding errors have a large effect.
    """
    torch.manual_seed(0)
    method = build_method(config, 3, LABELS, ranks * config.mu * B)
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
        u_strong = []
        for number, side in enumerate(PROBLEMS[config.method].sides):
            view = u_weak + 0.3 * images(y, seed + (number + 2 if number else 1))  # [muB, 3, SIDE, SIDE]
            if side != SIDE:
                view = F.interpolate(view, size=side, mode="bilinear")  # [muB, 3, side, side]
            u_strong.append(view.float().double())
        out.append(Batch(images(LABELS[rows], seed + 2), LABELS[rows], rows, u_weak, tuple(u_strong)))
    return out


def reference_of(config: Config, method: Method) -> SimMatchReference:
    """The reference with the settings of `config`, in the state of `method`. Its momentum is 0."""
    kind = PROBLEMS[config.method].reference
    state = method.state_dict()
    values = {name: getattr(config, name) for name in signature(kind).parameters if hasattr(config, name)}
    values["bn_mode"] = "average" if config.eman else "shuffle"
    if "queue.z" in state:
        values["queue"] = state["queue.z"]
    reference = kind(method.student, state["bank.z"], state["bank.labels"], config.cls, **values)
    reference.teacher.load_state_dict(method.teacher.net.state_dict())
    if isinstance(reference, SimMatchV2Reference):
        reference.queue_labels, reference.ptr = state["queue.p"].tolist(), int(state["queue.ptr"])
        reference.da = state["prior.da"].tolist()
    else:
        reference.ring, reference.ptr = state["align.ring"].tolist(), int(state["align.ptr"])
    return reference


def trajectory(config: Config, ranks: int, steps: int) -> list[Step]:
    """The reference's steps. The first is in the first epoch."""
    reference = reference_of(config, pretrained(config, ranks))
    out, before = [], state_of(reference)
    for k in range(steps):
        batches = batches_of(config, ranks, k)
        terms, pseudo, mask = reference.step(batches, k, first_epoch=k == 0)
        if terms.get(PROBLEMS[config.method].left_out) == 0:
            del terms[PROBLEMS[config.method].left_out]
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
    """A copy of the state, named as in the method's state_dict, with momentum.* of the parameters."""
    state = {
        f"{name}.{key}": value
        for name, net in (("student", reference.student), ("teacher.net", reference.teacher))
        for key, value in net.state_dict().items()
    }
    state |= {"bank.z": torch.stack(reference.bank), "bank.labels": torch.tensor(reference.labels)}
    if isinstance(reference, SimMatchV2Reference):
        state |= {
            "queue.z": torch.stack(reference.queue),
            "queue.p": torch.tensor(reference.queue_labels, dtype=torch.float64),
            "queue.ptr": torch.tensor([reference.ptr]),
            "prior.da": torch.tensor(reference.da, dtype=torch.float64),
        }
    else:
        ring = [[float(v) for v in row] for row in reference.ring]
        state |= {
            "align.ring": torch.tensor(ring, dtype=torch.float64),
            "align.ptr": torch.tensor([reference.ptr]),
        }
    state |= {f"momentum.{key}": value for key, value in reference.velocity.items()}
    return {key: value.clone() for key, value in state.items()}
