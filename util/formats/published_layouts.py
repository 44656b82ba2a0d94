"""The layouts of published checkpoints: which one a file has, and which network is in it.

They are those of the authors' SimMatch and SimMatchV2, of FixMatch and MoCo by EMAN's authors, and of MoCo
v2; docs/CHECKPOINTS.md lists the keys. Keys are written here without `module.`, a prefix that a file has
either on all of its keys or on none. "Native" means this repository's own layout.
"""

import fnmatch
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from util.errors import UserError
from util.run.checkpoint_schema import KEYS, first_three


class Layout(NamedTuple):
    program: str
    mark: str  # a file has the first layout whose mark is one of its keys
    required: str  # patterns, each of at least one key
    optional: str  # patterns of further keys


_CLASSIFIER = "main.backbone.conv1.weight main.fc.weight"
_STUDENT, _TEACHER = "main.backbone.* main.fc.* main.head.*", "ema.backbone.* ema.fc.* ema.head.*"
_SIMMATCH = f"{_CLASSIFIER} main.head.2.weight {_TEACHER} bank labels"
_SIMMATCHV2 = f"{_CLASSIFIER} main.head.2.weight {_TEACHER} l_bank l_labels ptr u_bank u_labels da"
# Version 1 of MoCo has a linear layer for its head, version 2 an MLP.
_MOCO_HEADS = "encoder_q.fc.weight encoder_q.fc.bias encoder_q.fc.0.* encoder_q.fc.2.*"
LAYOUTS = {
    "simmatch": Layout("SimMatch", "bank", _SIMMATCH, f"{_STUDENT} DA_queue DA_ptr"),
    "simmatchv2": Layout("SimMatchV2", "l_bank", _SIMMATCHV2, f"{_STUDENT} main.norm.* ema.norm.*"),
    # the teacher exists only with --eman
    "fixmatch": Layout("FixMatch", "main.fc.weight", _CLASSIFIER, f"{_STUDENT} {_TEACHER}"),
    "moco": Layout(
        "MoCo",
        "encoder_q.conv1.weight",
        "encoder_q.conv1.weight",
        f"encoder_q.[!f]* {_MOCO_HEADS} encoder_k.* queue queue_ptr",
    ),
}
# Number of dimensions of the tensors from whose shapes the architecture is detected.
DIMENSIONS = {
    **{"main.backbone.conv1.weight": 4, "main.fc.weight": 2, "main.head.2.weight": 2},
    **{"bank": 2, "l_bank": 2, "encoder_q.conv1.weight": 4},
}
# number of labeled images -> split
SPLITS = {13000: "simmatch-1p", 128000: "simmatch-10p", 12811: "simclr-1p", 128116: "simclr-10p"}


def detect_kind(state: Any, where: str = "the checkpoint") -> str:
    """Detect from the keys whether a file is native, simmatch, simmatchv2, fixmatch or moco. Raises
    UserError, with up to three keys, if it has none of these layouts.
    """
    published = isinstance(state, dict) and isinstance(state.get("state_dict"), dict)
    if isinstance(state, dict) and not published and any(key in state for key in KEYS):
        return "native"
    programs = ", ".join(layout.program for layout in LAYOUTS.values())
    problem = f"{where} was not written by train_semi.py, nor by {programs}"
    if not published:
        held = [repr(key) for key in state] if isinstance(state, dict) else [f"a {type(state).__name__}"]
        raise UserError(f"{problem}: it has no 'state_dict', but {first_three(held) or 'nothing'}")
    values = tensors(state)
    kind = next((kind for kind, layout in LAYOUTS.items() if layout.mark in values), None)
    if kind is None:
        held = [repr(key) for key in values]
        raise UserError(f"{problem}: its state_dict has {first_three(held) or 'no key'}")
    program, _, required, optional = LAYOUTS[kind]
    wrong = [f"{part} is missing" for part in required.split() if not fnmatch.filter(values, part)]
    allowed = {key for part in [*required.split(), *optional.split()] for key in fnmatch.filter(values, part)}
    wrong += [f"{key} is unknown" for key in values if key not in allowed]
    wrong += [
        f"{key} is not a tensor, or has no dimensions"
        for key, value in values.items()
        if not isinstance(value, Tensor) or not value.ndim and not key.endswith("num_batches_tracked")
    ]
    wrong += [
        f"{key} is {list(values[key].shape)}, without elements or not of {ndim} dimensions"
        for key, ndim in DIMENSIONS.items()
        if isinstance(values.get(key), Tensor) and (values[key].ndim != ndim or not values[key].numel())
    ]
    if wrong:
        raise UserError(f"{where} is not a complete checkpoint of {program}: {first_three(wrong)}")
    return kind


def require_kind(kind: str, state: Any, where: str) -> None:
    """Raise UserError unless a file has the layout `kind`."""
    found = detect_kind(state, where)
    if found != kind:
        program = LAYOUTS[found].program if found in LAYOUTS else "train_semi.py"
        raise UserError(f"{where} is not a checkpoint of {LAYOUTS[kind].program}, but of {program}")


def tensors(state: dict[str, Any]) -> dict[str, Tensor]:
    """Return the state_dict of a published file, with its keys without `module.`."""
    values = state["state_dict"]
    if all(isinstance(key, str) and key.startswith("module.") for key in values):
        return {key.removeprefix("module."): value for key, value in values.items()}
    return {str(key): value for key, value in values.items()}


class ResNetShape(NamedTuple):
    """What tells one ResNet from another."""

    bottleneck: bool
    blocks: tuple[int, ...]  # of each of the four layers
    stem: int  # channels of the first convolution

    def __str__(self) -> str:
        return f"layers of {'+'.join(map(str, self.blocks))} blocks, a stem of {self.stem} channels"


# name -> function: number of image channels -> (encoder, d), as in models/network.py
Backbones = Mapping[str, Callable[[int], tuple[nn.Module, int]]]


class NetworkSpec(NamedTuple):
    """The architecture of the student and the teacher in a published file."""

    resnet: ResNetShape
    channels: int  # of the images
    num_classes: int  # C
    dim: int  # D; 0 without a head
    norm: bool  # LayerNorm on the feature
    labeled: int | None  # K; None if the file has no bank


def network_spec(state: dict[str, Any], where: str = "the checkpoint") -> NetworkSpec:
    """Find the architecture from the shapes of the tensors, because `arch` in these files is the name of the
    method. `moco` files have no classifier and are not accepted. Raises UserError if the backbone is not a
    ResNet.
    """
    values = tensors(state)
    main = below("main.", values)
    backbone = below("backbone.", main)
    resnet = check_resnet(backbone, where)
    dim = len(main["head.2.weight"]) if "head.2.weight" in main else 0
    bank = values["bank"].T if "bank" in values else values.get("l_bank")  # [K, D]
    labeled = None if bank is None else len(bank)
    channels, num_classes = backbone["conv1.weight"].shape[1], len(main["fc.weight"])
    return NetworkSpec(resnet, channels, num_classes, dim, "norm.weight" in main, labeled)


def find_backbone(spec: NetworkSpec, backbones: Backbones, where: str) -> str:
    """Return the name of a published file's backbone. Raises UserError if it is not one of `backbones`."""
    resnets = {}
    for name, build in backbones.items():
        with torch.device("meta"):
            resnets[name] = _resnet_shape(build(3)[0].state_dict())
        if resnets[name] == spec.resnet:
            return name
    known = ", ".join(name for name, shape in resnets.items() if 0 not in shape.blocks)
    raise UserError(f"{where} has a backbone that is none of {known}: {spec.resnet}")


def below(prefix: str, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}


def check_resnet(backbone: Mapping[str, Tensor], where: str) -> ResNetShape:
    """Return the shape of a ResNet with these tensors. Raises UserError if they are not those of a ResNet."""
    resnet = _resnet_shape(backbone)
    if 0 in resnet.blocks:
        raise UserError(f"{where} has a backbone that is not a ResNet: {resnet}")
    return resnet


def _resnet_shape(backbone: Mapping[str, Tensor]) -> ResNetShape:
    """Return the shape of a backbone with these tensors; a number of blocks is 0 if it is not a ResNet."""
    blocks = tuple(
        len({key.split(".")[1] for key in backbone if key.startswith(f"layer{k}.")}) for k in (1, 2, 3, 4)
    )
    stem = len(backbone.get("conv1.weight", ()))
    return ResNetShape("layer1.0.conv3.weight" in backbone, blocks, stem)


def describe(state: dict[str, Any], kind: str, backbone: str, labels: int | None) -> str:
    """Return one line that describes a published file. labels: K, if it has a bank."""
    labeled = f", {labels} labeled images" if labels else ""
    if labels in SPLITS:
        labeled += f" (as many as {SPLITS[labels]})"
    epoch = state.get("epoch") if type(state.get("epoch")) is int else "unknown"
    return f"{LAYOUTS[kind].program} as published, {backbone}; epoch {epoch}{labeled}"
