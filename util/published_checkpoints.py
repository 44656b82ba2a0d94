"""Checkpoints of the published programs, told by their keys and turned into ours and back. Functions over
dicts of tensors.

SimMatch and SimMatchV2 as their authors publish them, FixMatch and MoCo as EMAN's authors do, MoCo v2;
docs/CHECKPOINTS.md lists the keys. Names of these files' keys are given without `module.`, which stands
before all of them or before none.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from util.checkpoint import KEYS, first_three
from util.errors import UserError

PROGRAMS = {"simmatch": "SimMatch", "simmatchv2": "SimMatchV2", "fixmatch": "FixMatch", "moco": "MoCo"}
SPLITS = {
    13000: "simmatch-1p",
    128000: "simmatch-10p",
    12811: "simclr-1p",
    128116: "simclr-10p",
}  # by their sizes
RING = 256  # rows of the published ring of distribution alignment
# kind -> (what must be there, what may be there); with a dot at its end, the start of a key, otherwise a key
_MUST = (
    "main.backbone.conv1.weight",
    "main.fc.weight",
    "main.head.2.weight",
    "ema.backbone.",
    "ema.fc.",
    "ema.head.",
)
_MAY = ("main.backbone.", "main.fc.", "main.head.")
LAYOUTS = {
    "simmatch": ((*_MUST, "bank", "labels"), (*_MAY, "DA_queue", "DA_ptr")),
    "simmatchv2": (
        (*_MUST, "l_bank", "l_labels", "ptr", "u_bank", "u_labels", "da"),
        (*_MAY, "main.norm.", "ema.norm."),
    ),
    "fixmatch": (_MUST[:2], (*_MAY, "ema.backbone.", "ema.fc.", "ema.head.")),  # no ema without --eman
    "moco": (("encoder_q.conv1.weight",), ("encoder_q.", "encoder_k.", "queue", "queue_ptr")),
}
KIND_BY_KEY = {
    "bank": "simmatch",
    "l_bank": "simmatchv2",
    "main.fc.weight": "fixmatch",
    "encoder_q.conv1.weight": "moco",
}
# (bottleneck blocks, blocks of each layer, channels of the stem) -> name in models/resnet.py
RESNETS = {
    (False, (2, 2, 2, 2), 64): "resnet18_encoder",
    (False, (3, 4, 6, 3), 64): "resnet34_encoder",
    (True, (3, 4, 6, 3), 64): "resnet50_encoder",
    (True, (3, 4, 23, 3), 64): "resnet101_encoder",
    (True, (3, 4, 6, 3), 128): "resnet50w2x_encoder",
}
PARTS = {"main.": "student.", "ema.": "teacher.net."}  # published -> ours
BUFFERS = {"bank": "bank.z", "labels": "bank.labels", "DA_queue": "align.ring", "DA_ptr": "align.ptr"}


def detect_kind(state: Any, where: str = "the checkpoint") -> str:
    """ours, simmatch, simmatchv2, fixmatch or moco, by the keys; a UserError names the first three that fit
    none.
    """
    if (
        isinstance(state, dict)
        and not isinstance(state.get("state_dict"), dict)
        and any(key in state for key in KEYS)
    ):
        return "ours"
    lacks = f"{where} was not written by train_semi.py, nor by " + ", ".join(PROGRAMS.values())
    if not isinstance(state, dict) or not isinstance(state.get("state_dict"), dict):
        held = [repr(key) for key in state] if isinstance(state, dict) else [f"a {type(state).__name__}"]
        raise UserError(f"{lacks}: it has no 'state_dict', but {first_three(held) or 'nothing'}")
    values = tensors(state)
    kind = next((kind for key, kind in KIND_BY_KEY.items() if key in values), None)
    if kind is None:
        raise UserError(
            f"{lacks}: its state_dict has {first_three([repr(key) for key in values]) or 'no key'}"
        )
    must, may = LAYOUTS[kind]
    wrong = [
        f"{part}{'*' * part.endswith('.')} is missing"
        for part in must
        if not any(_fits(key, part) for key in values)
    ]
    wrong += [f"{key} is unknown" for key in values if not any(_fits(key, part) for part in must + may)]
    wrong += [
        f"{key} is no tensor, or a single number"
        for key, value in values.items()
        if not isinstance(value, Tensor) or not value.ndim and not key.endswith("num_batches_tracked")
    ]
    if wrong:
        raise UserError(f"{where} is not a whole checkpoint of {PROGRAMS[kind]}: {first_three(wrong)}")
    return kind


def tensors(state: dict[str, Any]) -> dict[str, Tensor]:
    """The state_dict of a published file, its keys without `module.`."""
    values = state["state_dict"]
    if all(isinstance(key, str) and key.startswith("module.") for key in values):
        return {key.removeprefix("module."): value for key, value in values.items()}
    return {str(key): value for key, value in values.items()}


class NetworkSpec(NamedTuple):
    """What the student (and the teacher) of a published file are made of."""

    backbone: str
    channels: int  # of the images
    num_classes: int  # C
    dim: int  # D; 0 without a head
    norm: bool  # LayerNorm on the feature
    labeled: int | None  # K; None where the file does not tell


def network_spec(state: dict[str, Any], where: str = "the checkpoint") -> NetworkSpec:
    """Read from the shapes, since `arch` in these files is the program's name. Not for `moco`, which has no
    classifier.
    """
    values = tensors(state)
    main = {key.removeprefix("main."): value for key, value in values.items() if key.startswith("main.")}
    backbone = {
        key.removeprefix("backbone."): value for key, value in main.items() if key.startswith("backbone.")
    }
    dim = len(main["head.2.weight"]) if "head.2.weight" in main else 0
    labeled = (
        values["bank"].shape[-1]
        if "bank" in values
        else len(values["l_bank"])
        if "l_bank" in values
        else None
    )
    return NetworkSpec(
        _resnet(backbone, where),
        backbone["conv1.weight"].shape[1],
        len(main["fc.weight"]),
        dim,
        "norm.weight" in main,
        labeled,
    )


def _resnet(backbone: dict[str, Tensor], where: str) -> str:
    blocks = tuple(
        len({key.split(".")[1] for key in backbone if key.startswith(f"layer{k}.")}) for k in (1, 2, 3, 4)
    )
    found = ("layer1.0.conv3.weight" in backbone, blocks, len(backbone.get("conv1.weight", ())))
    if found not in RESNETS:
        raise UserError(
            f"{where} has a backbone that is none of {', '.join(RESNETS.values())}: "
            f"layers of {'+'.join(map(str, blocks))} blocks, a stem of {found[2]} channels"
        )
    return RESNETS[found]


def describe(state: dict[str, Any], kind: str, found: NetworkSpec) -> str:
    """A line on a published file."""
    labeled = f", {found.labeled} labeled images" if found.labeled else ""
    if found.labeled in SPLITS:
        labeled += f" (as many as {SPLITS[found.labeled]})"
    return f"{PROGRAMS[kind]} as published, {found.backbone}; epoch {state.get('epoch')}{labeled}"


def to_method_state(state: dict[str, Any], where: str = "the checkpoint") -> dict[str, Tensor]:
    """A published SimMatch file -> the state_dict of a SimMatch method. A column of the published bank is a
    row of ours.
    """
    kind = detect_kind(state, where)
    if kind != "simmatch":
        raise UserError(
            f"{where} is not a checkpoint of SimMatch, but of {PROGRAMS.get(kind, 'train_semi.py')}"
        )
    values = tensors(state)
    _check_buffers(values, network_spec(state, where), where)
    out = {_renamed(key, PARTS): value for key, value in values.items() if key not in BUFFERS}
    for theirs, own in BUFFERS.items():
        if theirs in values:
            out[own] = values[theirs].T.contiguous() if theirs == "bank" else values[theirs]
    return out


def _check_buffers(values: dict[str, Tensor], found: NetworkSpec, where: str) -> None:
    """Kinds and shapes of what a load_state_dict would cast, or would have nothing to compare with."""
    wanted = {"bank": (found.dim, found.labeled), "labels": (found.labeled,)}
    if "DA_queue" in values or "DA_ptr" in values:
        wanted |= {"DA_queue": (RING, found.num_classes), "DA_ptr": (1,)}
    wrong = [f"{key} is missing" for key in wanted if key not in values]
    for key in [key for key in wanted if key in values]:
        kind = torch.int64 if key in ("labels", "DA_ptr") else torch.float32
        if tuple(values[key].shape) != wanted[key] or values[key].dtype != kind:
            wrong.append(
                f"{key} is {_describe_tensor(values[key].shape, values[key].dtype)}, not {_describe_tensor(wanted[key], kind)}"
            )
    if wrong:
        raise UserError(f"{where} is not a whole checkpoint of SimMatch: {first_three(wrong)}")


def _describe_tensor(shape: tuple[int, ...], kind: torch.dtype) -> str:
    return f"{list(shape)} {str(kind).removeprefix('torch.')}"


def from_method_state(
    method: dict[str, Tensor], optimizer: dict[str, Any], epoch: int, where: str = "the checkpoint"
) -> dict[str, Any]:
    """The state_dicts of a SimMatch method and of its SGD -> what the published program loads with strict
    keys.

    epoch: finished ones. Without distribution alignment the file has none either, and the published program
    takes it without --DA.
    """
    known = (*PARTS.values(), *BUFFERS.values())
    wrong = [f"{own} is missing" for own in ("bank.z", "bank.labels") if own not in method]
    wrong += [f"{key} has no place there" for key in method if not key.startswith(known)]
    if "align.ring" in method and len(method["align.ring"]) != RING:
        wrong.append(
            f"align.ring has {len(method['align.ring'])} rows, not {RING}: train with --da-len {RING}"
        )
    if wrong:
        raise UserError(f"{where} cannot be written as a checkpoint of SimMatch: {first_three(wrong)}")
    values = {theirs: method[own] for theirs, own in BUFFERS.items() if own in method}
    values["bank"] = values["bank"].T.contiguous()  # [D, K]
    back = {own: theirs for theirs, own in PARTS.items()}
    values |= {_renamed(key, back): value for key, value in method.items() if key.startswith(tuple(back))}
    found = network_spec({"state_dict": values}, where)  # refuses what is no ResNet
    if found.channels != 3:
        raise UserError(
            f"{where} is for images of {found.channels} channels; those of the published SimMatch have 3"
        )
    names = parameter_names(values, "main.")
    groups = optimizer["param_groups"]
    if len(groups) != 1 or list(groups[0]["params"]) != list(range(len(names))):
        raise UserError(
            f"{where} cannot be written as a checkpoint of SimMatch: that has one group of parameters, but this "
            f"run has {len(groups)} (--no-decay-bn makes two)"
        )
    # the published program hands all parameters to SGD, the teacher's too, which never get a gradient
    group = {**groups[0], "params": list(range(2 * len(names)))}
    return {
        "epoch": epoch,
        "arch": PROGRAMS["simmatch"],
        "state_dict": {f"module.{key}": v for key, v in values.items()},
        "optimizer": {"state": optimizer["state"], "param_groups": [group]},
    }


def to_training_state(
    state: dict[str, Any], steps_per_epoch: int, where: str = "the checkpoint"
) -> tuple[dict[str, Tensor], dict[str, Any], int, int]:
    """A published SimMatch file -> (method state_dict, SGD state_dict, finished epochs, finished steps) to
    train on from.

    steps_per_epoch: of the training that goes on; the published program saves at the end of epochs only.
    """
    method = to_method_state(state, where)
    epoch = state.get("epoch")
    if type(epoch) is not int or epoch < 0:
        raise UserError(f"{where} does not say how many epochs are done: its 'epoch' is {epoch!r}")
    return method, to_optimizer_state(state.get("optimizer"), method, where), epoch, epoch * steps_per_epoch


def to_optimizer_state(
    saved: Any, method: dict[str, Tensor], where: str = "the checkpoint"
) -> dict[str, Any]:
    """The published SGD's state -> that of an SGD over the student alone. Both number parameters in the
    networks' order.

    method: as from `to_ours`, whose keys have that order.
    """
    names = parameter_names(method, "student.")
    groups = saved.get("param_groups") if isinstance(saved, dict) else None
    if (
        not isinstance(groups, list)
        or len(groups) != 1
        or not isinstance(saved.get("state"), dict)
        or not all(isinstance(value, dict) for value in (*groups, *saved["state"].values()))
    ):
        raise UserError(
            f"{where} has no 'optimizer' with one group of parameters, so no training can go on from it"
        )
    listed = list(groups[0].get("params", ()))
    if len(listed) not in (len(names), 2 * len(names)):
        raise UserError(
            f"{where} has an optimizer of {len(listed)} parameters, but a student of {len(names)}"
        )
    place = {key: k for k, key in enumerate(listed)}
    state = {place[key]: value for key, value in saved["state"].items() if key in place}
    for k, value in state.items():
        velocity = value.get("momentum_buffer")
        wanted = method[names[k]].shape if k < len(names) else None
        if velocity is not None and velocity.shape != wanted:
            owner = names[k] if wanted else "the teacher"
            raise UserError(f"{where} has an optimizer whose momentum for {owner} is {list(velocity.shape)}")
    return {
        "state": {k: state[k] for k in sorted(state) if k < len(names)},
        "param_groups": [{**groups[0], "params": list(range(len(names)))}],
    }


def parameter_names(values: dict[str, Tensor], prefix: str) -> list[str]:
    """Keys of the parameters below `prefix`, in their order: all that is no running statistic of BN."""
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    return [key for key in values if key.startswith(prefix) and not key.endswith(statistics)]


def moco_backbone(state: dict[str, Any], where: str = "the checkpoint") -> dict[str, Tensor]:
    """A MoCo file -> backbone.* and head.* of a Network: the query encoder and, in its place, its two-layer
    head.

    A MoCo v1 file has one linear layer instead of a head: then there is no head.*.
    """
    kind = detect_kind(state, where)
    if kind != "moco":
        raise UserError(f"{where} is not a checkpoint of MoCo, but of {PROGRAMS.get(kind, 'train_semi.py')}")
    names = {"fc.0.": "head.0.", "fc.2.": "head.2."}
    query = {
        key.removeprefix("encoder_q."): v for key, v in tensors(state).items() if key.startswith("encoder_q.")
    }
    wrong = [
        f"encoder_q.{key} is unknown"
        for key in query
        if key.startswith("fc.") and not key.startswith((*names, "fc.weight", "fc.bias"))
    ]
    if wrong:
        raise UserError(f"{where} has another head than MoCo v2's: {first_three(wrong)}")
    _resnet(query, where)
    out = {key if key.startswith("fc.") else f"backbone.{key}": value for key, value in query.items()}
    return {_renamed(key, names): value for key, value in out.items() if key not in ("fc.weight", "fc.bias")}


def _renamed(key: str, starts: dict[str, str]) -> str:
    """`key`, its start replaced where it is one of `starts`."""
    for old, new in starts.items():
        if key.startswith(old):
            return new + key.removeprefix(old)
    return key


def _fits(key: str, part: str) -> bool:
    return key.startswith(part) if part.endswith(".") else key == part
