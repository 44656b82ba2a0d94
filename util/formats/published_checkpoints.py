"""Published checkpoints: detect their layout from their keys, and convert them to this repository's layout
and back. All functions work on dicts of tensors.

The layouts are those of the authors' SimMatch and SimMatchV2, of FixMatch and MoCo by EMAN's authors, and of
MoCo v2; docs/CHECKPOINTS.md lists the keys. Keys are written here without `module.`, a prefix that a file has
either on all of its keys or on none. "Native" means this repository's own layout.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from util.errors import UserError
from util.run.checkpoint_schema import KEYS, check_sgd_state, first_not_finite, first_three, is_sgd_state

PROGRAMS = {"simmatch": "SimMatch", "simmatchv2": "SimMatchV2", "fixmatch": "FixMatch", "moco": "MoCo"}
SPLITS = {
    13000: "simmatch-1p",
    128000: "simmatch-10p",
    12811: "simclr-1p",
    128116: "simclr-10p",
}  # number of labeled images -> split
RING = 256  # rows of the ring of distribution alignment in published files
# kind -> (required keys, optional keys); an entry that ends with a dot is the prefix of a key
_REQUIRED = (
    "main.backbone.conv1.weight",
    "main.fc.weight",
    "main.head.2.weight",
    "ema.backbone.",
    "ema.fc.",
    "ema.head.",
)
_OPTIONAL = ("main.backbone.", "main.fc.", "main.head.")
LAYOUTS = {
    "simmatch": ((*_REQUIRED, "bank", "labels"), (*_OPTIONAL, "DA_queue", "DA_ptr")),
    "simmatchv2": (
        (*_REQUIRED, "l_bank", "l_labels", "ptr", "u_bank", "u_labels", "da"),
        (*_OPTIONAL, "main.norm.", "ema.norm."),
    ),
    # the teacher exists only with --eman
    "fixmatch": (_REQUIRED[:2], (*_OPTIONAL, "ema.backbone.", "ema.fc.", "ema.head.")),
    "moco": (("encoder_q.conv1.weight",), ("encoder_q.", "encoder_k.", "queue", "queue_ptr")),
}
# Number of dimensions of the tensors from whose shapes the architecture is detected.
DIMENSIONS = {
    "main.backbone.conv1.weight": 4,
    "main.fc.weight": 2,
    "main.head.2.weight": 2,
    "bank": 2,
    "l_bank": 2,
    "encoder_q.conv1.weight": 4,
}
KIND_BY_KEY = {
    "bank": "simmatch",
    "l_bank": "simmatchv2",
    "main.fc.weight": "fixmatch",
    "encoder_q.conv1.weight": "moco",
}
# published key or prefix -> native one
PREFIXES = {"main.": "student.", "ema.": "teacher.net."}
BUFFERS = {"bank": "bank.z", "labels": "bank.labels", "DA_queue": "align.ring", "DA_ptr": "align.ptr"}


def detect_kind(state: Any, where: str = "the checkpoint") -> str:
    """Detect from the keys whether a file is native, simmatch, simmatchv2, fixmatch or moco. Raises
    UserError, with up to three keys, if it has none of these layouts.
    """
    if (
        isinstance(state, dict)
        and not isinstance(state.get("state_dict"), dict)
        and any(key in state for key in KEYS)
    ):
        return "native"
    problem = f"{where} was not written by train_semi.py, nor by " + ", ".join(PROGRAMS.values())
    if not isinstance(state, dict) or not isinstance(state.get("state_dict"), dict):
        held = [repr(key) for key in state] if isinstance(state, dict) else [f"a {type(state).__name__}"]
        raise UserError(f"{problem}: it has no 'state_dict', but {first_three(held) or 'nothing'}")
    values = tensors(state)
    kind = next((kind for key, kind in KIND_BY_KEY.items() if key in values), None)
    if kind is None:
        raise UserError(
            f"{problem}: its state_dict has {first_three([repr(key) for key in values]) or 'no key'}"
        )
    required, optional = LAYOUTS[kind]
    wrong = [
        f"{part}{'*' * part.endswith('.')} is missing"
        for part in required
        if not any(_matches(key, part) for key in values)
    ]
    wrong += [
        f"{key} is unknown" for key in values if not any(_matches(key, part) for part in required + optional)
    ]
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
        raise UserError(f"{where} is not a complete checkpoint of {PROGRAMS[kind]}: {first_three(wrong)}")
    return kind


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
    main = _below("main.", values)
    backbone = _below("backbone.", main)
    resnet = _check_resnet(backbone, where)
    dim = len(main["head.2.weight"]) if "head.2.weight" in main else 0
    labeled = (
        values["bank"].shape[-1]
        if "bank" in values
        else len(values["l_bank"])
        if "l_bank" in values
        else None
    )
    return NetworkSpec(
        resnet,
        backbone["conv1.weight"].shape[1],
        len(main["fc.weight"]),
        dim,
        "norm.weight" in main,
        labeled,
    )


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


def _below(prefix: str, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}


def _check_resnet(backbone: Mapping[str, Tensor], where: str) -> ResNetShape:
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
    return f"{PROGRAMS[kind]} as published, {backbone}; epoch {epoch}{labeled}"


def to_method_state(state: dict[str, Any], where: str = "the checkpoint") -> dict[str, Tensor]:
    """Convert a published SimMatch file to the state_dict of models.simmatch.SimMatch. The published bank is
    transposed. Raises UserError if the file has another layout or its buffers have other shapes or types.
    """
    kind = detect_kind(state, where)
    if kind != "simmatch":
        raise UserError(
            f"{where} is not a checkpoint of SimMatch, but of {PROGRAMS.get(kind, 'train_semi.py')}"
        )
    values = tensors(state)
    _check_buffers(values, network_spec(state, where), where)
    out = {_renamed(key, PREFIXES): value for key, value in values.items() if key not in BUFFERS}
    for published, native in BUFFERS.items():
        if published in values:
            value = values[published]
            out[native] = value.T.contiguous() if published == "bank" else value  # [D, K] -> [K, D]
    return out


def _check_buffers(values: dict[str, Tensor], spec: NetworkSpec, where: str) -> None:
    """Raise UserError if a buffer is missing or has another shape or type: load_state_dict would convert
    types silently.
    """
    expected: dict[str, tuple[int | None, ...]] = {
        "bank": (spec.dim, spec.labeled),
        "labels": (spec.labeled,),
    }
    if "DA_queue" in values or "DA_ptr" in values:
        expected |= {"DA_queue": (RING, spec.num_classes), "DA_ptr": (1,)}
    wrong = [f"{key} is missing" for key in expected if key not in values]
    for key in [key for key in expected if key in values]:
        value, dtype = values[key], torch.int64 if key in ("labels", "DA_ptr") else torch.float32
        if tuple(value.shape) != expected[key] or value.dtype != dtype:
            actual = _describe_tensor(value.shape, value.dtype)
            wrong.append(f"{key} is {actual}, not {_describe_tensor(expected[key], dtype)}")
    if wrong:
        raise UserError(f"{where} is not a complete checkpoint of SimMatch: {first_three(wrong)}")


def _describe_tensor(shape: Sequence[int | None], dtype: torch.dtype) -> str:
    return f"{list(shape)} {str(dtype).removeprefix('torch.')}"


def from_method_state(
    method: dict[str, Tensor], optimizer: dict[str, Any], epoch: int, where: str = "the checkpoint"
) -> dict[str, Any]:
    """Convert the state_dicts of a SimMatch method and its SGD to a file that the published code loads with
    strict keys.

    epoch: number of finished epochs. A method without distribution alignment gives a file that the published
    code loads without --DA. Raises UserError if the published layout cannot hold the method or the optimizer.
    """
    known = (*PREFIXES.values(), *BUFFERS.values())
    wrong = [f"{key} is missing" for key in ("bank.z", "bank.labels") if key not in method]
    wrong += [f"{key} does not exist in that layout" for key in method if not key.startswith(known)]
    if "align.ring" in method and len(method["align.ring"]) != RING:
        wrong.append(
            f"align.ring has {len(method['align.ring'])} rows, not {RING}: train with --da-len {RING}"
        )
    if wrong:
        raise UserError(f"{where} cannot be converted to the published layout: {first_three(wrong)}")
    values = {published: method[native] for published, native in BUFFERS.items() if native in method}
    values["bank"] = values["bank"].T.contiguous()  # [D, K]
    to_published = {native: published for published, native in PREFIXES.items()}
    values |= {
        _renamed(key, to_published): value
        for key, value in method.items()
        if key.startswith(tuple(to_published))
    }
    spec = network_spec({"state_dict": values}, where)  # raises UserError if the backbone is not a ResNet
    if spec.channels != 3:
        raise UserError(f"{where} is for images of {spec.channels} channels; the published code needs 3")
    names = parameter_names(values, "main.")
    if is_sgd_state(optimizer) and len(optimizer["param_groups"]) != 1:
        raise UserError(
            f"{where} cannot be converted to the published layout: that has one parameter group, but this "
            f"run has {len(optimizer['param_groups'])} (--no-decay-bn creates two)"
        )
    check_sgd_state(optimizer, [values[name] for name in names], where)
    name = first_not_finite(values)
    if name is not None:
        raise UserError(f"{where} is damaged: {name} is not finite; use another one")
    # the published code passes all parameters to SGD, including the teacher's, which never get a gradient
    group = {**optimizer["param_groups"][0], "params": list(range(2 * len(names)))}
    return {
        "epoch": epoch,
        "arch": PROGRAMS["simmatch"],
        "state_dict": {f"module.{key}": v for key, v in values.items()},
        "optimizer": {"state": optimizer["state"], "param_groups": [group]},
    }


def to_training_state(
    state: dict[str, Any], steps_per_epoch: int, where: str = "the checkpoint"
) -> tuple[dict[str, Tensor], dict[str, Any], int, int]:
    """Convert a published SimMatch file to (method state_dict, SGD state_dict, finished epochs, finished
    steps), to resume training. Raises UserError if that is not possible.

    steps_per_epoch: of the resumed run. The published code saves only at the end of epochs.
    """
    method = to_method_state(state, where)
    epoch = state.get("epoch")
    if type(epoch) is not int or epoch < 0:
        raise UserError(f"{where} has no valid number of finished epochs: its 'epoch' is {epoch!r}")
    return method, to_optimizer_state(state.get("optimizer"), method, where), epoch, epoch * steps_per_epoch


def to_optimizer_state(
    saved: Any, method: dict[str, Tensor], where: str = "the checkpoint"
) -> dict[str, Any]:
    """Convert the state of the published SGD to that of an SGD over the student alone. Both number the
    parameters in the order of the networks. Raises UserError if the state does not fit the student.

    method: from `to_method_state`, whose keys have that order.
    """
    names = parameter_names(method, "student.")
    if not is_sgd_state(saved) or len(saved["param_groups"]) != 1:
        raise UserError(
            f"{where} has no 'optimizer' with one parameter group, so training cannot be resumed from it"
        )
    (group,) = saved["param_groups"]
    listed = group["params"]
    if len(listed) not in (len(names), 2 * len(names)):
        raise UserError(
            f"{where} has an optimizer with {len(listed)} parameters, but a student with {len(names)}"
        )
    index = {key: k for k, key in enumerate(listed)}
    state = {index[key]: value for key, value in saved["state"].items() if key in index}
    for k, value in state.items():
        momentum = value.get("momentum_buffer")
        expected = method[names[k]].shape if k < len(names) else None
        if momentum is not None and momentum.shape != expected:
            owner = names[k] if expected else "the teacher"
            raise UserError(f"{where} has an optimizer whose momentum for {owner} is {list(momentum.shape)}")
    converted = {
        "state": {k: state[k] for k in sorted(state) if k < len(names)},
        "param_groups": [{**group, "params": list(range(len(names)))}],
    }
    check_sgd_state(converted, [method[name] for name in names], where)
    return converted


def parameter_names(values: dict[str, Tensor], prefix: str) -> list[str]:
    """Return, in order, the keys of the parameters below `prefix`: all except BN's running statistics."""
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    return [key for key in values if key.startswith(prefix) and not key.endswith(statistics)]


def moco_backbone(state: dict[str, Any], where: str = "the checkpoint") -> dict[str, Tensor]:
    """Convert a MoCo file to backbone.* and head.* of a Network: the query encoder and its two-layer MLP.

    A MoCo v1 file has a linear layer instead of the MLP; then there is no head.*. Raises UserError if the
    file has another layout.
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
        raise UserError(f"{where} does not have the head of MoCo v2: {first_three(wrong)}")
    _check_resnet(query, where)
    out = {key if key.startswith("fc.") else f"backbone.{key}": value for key, value in query.items()}
    return {_renamed(key, names): value for key, value in out.items() if key not in ("fc.weight", "fc.bias")}


def _renamed(key: str, prefixes: dict[str, str]) -> str:
    """Return `key` with its prefix replaced, if that is in `prefixes` (old -> new)."""
    for old, new in prefixes.items():
        if key.startswith(old):
            return new + key.removeprefix(old)
    return key


def _matches(key: str, entry: str) -> bool:
    """Return whether `key` is the `entry` of LAYOUTS, or starts with it if that is a prefix."""
    return key.startswith(entry) if entry.endswith(".") else key == entry
