"""Conversion of published checkpoints (util/formats/published_layouts.py) to this repository's layout, and
back. All functions work on dicts of tensors.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from util.errors import UserError
from util.formats.published_layouts import (
    LAYOUTS,
    NetworkSpec,
    below,
    check_resnet,
    detect_kind,
    network_spec,
    require_kind,
    tensors,
)
from util.run.checkpoint_schema import (
    check_sgd_state,
    describe_tensor,
    first_not_finite,
    first_three,
    is_sgd_state,
    mismatches,
)

NETWORKS = {"main.": "student.", "ema.": "teacher.net."}  # prefix of published keys -> ours
RING = 256  # rows of the ring of distribution alignment in published SimMatch files


class Format(NamedTuple):
    """How the buffers of a program's files become ours, and ours theirs."""

    buffers: dict[str, str]  # published key -> ours, for both directions
    together: tuple[str, ...]  # published keys that a file has all or none of
    shapes: Callable[
        [NetworkSpec, int], dict[str, tuple[int, ...]]
    ]  # spec, rows of the queue -> of the buffers
    to_ours: dict[
        str, Callable[[Tensor], Tensor]
    ]  # published key -> conversion of its tensor, where it differs
    to_published: dict[str, Callable[[Tensor, int], Tensor]]  # back; the second argument is C


FORMATS = {
    "simmatch": Format(
        {"bank": "bank.z", "labels": "bank.labels", "DA_queue": "align.ring", "DA_ptr": "align.ptr"},
        ("DA_queue", "DA_ptr"),
        lambda spec, rows: {
            "bank": (spec.dim, spec.labeled or 0),
            "labels": (spec.labeled or 0,),
            "DA_queue": (RING, spec.num_classes),
            "DA_ptr": (1,),
        },
        {"bank": lambda bank: bank.T.contiguous()},  # [D, K] -> [K, D]
        {"bank": lambda bank, C: bank.T.contiguous()},
    ),
    "simmatchv2": Format(
        {
            "l_bank": "bank.z",
            "l_labels": "bank.labels",
            "u_bank": "queue.z",
            "u_labels": "queue.p",
            "ptr": "queue.ptr",
            "da": "prior.da",
        },
        (),
        lambda spec, rows: {
            "l_bank": (spec.labeled or 0, spec.dim),
            "l_labels": (spec.labeled or 0, spec.num_classes),
            "u_bank": (rows, spec.dim),
            "u_labels": (rows, spec.num_classes),
            "ptr": (1,),
            "da": (1, spec.num_classes),
        },
        {"l_labels": lambda one_hot: one_hot.argmax(dim=1), "da": lambda da: da[0]},  # [K, C] -> [K]
        {"l_labels": lambda labels, C: F.one_hot(labels, C).float(), "da": lambda da, C: da[None]},
    ),
}
INTEGERS = {"labels", "DA_ptr", "ptr"}


def to_method_state(state: dict[str, Any], where: str = "the checkpoint") -> dict[str, Tensor]:
    """Convert a published SimMatch or SimMatchV2 file to the state_dict of models.simmatch.SimMatch or
    models.simmatchv2.SimMatchV2. Raises UserError if the file has another layout or its buffers have other
    shapes or types.
    """
    kind = detect_kind(state, where)
    if kind not in FORMATS:
        program = LAYOUTS[kind].program if kind in LAYOUTS else "train_semi.py"
        raise UserError(f"{where} is not a checkpoint of SimMatch or SimMatchV2, but of {program}")
    values, form = tensors(state), FORMATS[kind]
    _check_buffers(values, kind, network_spec(state, where), where)
    values |= {key: convert(values[key]) for key, convert in form.to_ours.items()}
    return _renamed(values, {**NETWORKS, **form.buffers})


def _check_buffers(values: dict[str, Tensor], kind: str, spec: NetworkSpec, where: str) -> None:
    """Raise UserError if a buffer is missing or has another shape or type: load_state_dict would convert
    types silently.
    """
    form, rows = FORMATS[kind], len(values.get("u_bank", ()))
    left_out = set(form.together) - values.keys()
    with torch.device("meta"):
        expected = {
            key: torch.empty(shape, dtype=torch.int64 if key in INTEGERS else torch.float32)
            for key, shape in form.shapes(spec, rows).items()
            if key not in form.together or left_out != set(form.together)
        }
    found = {key: values[key] for key in expected if key in values}
    if wrong := mismatches(found, expected, describe_tensor):
        program = LAYOUTS[kind].program
        raise UserError(f"{where} is not a complete checkpoint of {program}: {first_three(wrong)}")


def from_method_state(
    method: dict[str, Tensor],
    optimizer: dict[str, Any],
    epoch: int,
    where: str = "the checkpoint",
    scaler: dict[str, Any] | None = None,
    best: tuple[float, float] = (0.0, 0.0),
) -> dict[str, Any]:
    """Convert the state_dicts of a SimMatch or SimMatchV2 method and its SGD to a file that the published
    code loads with strict keys.

    epoch: number of finished epochs. scaler, best: the state of the GradScaler, and the best top-1 and top-5
    in percent, which SimMatchV2's files have too. A SimMatch without distribution alignment gives a file that
    the published code loads without --DA. Raises UserError if the published layout cannot hold the method or
    the optimizer.
    """
    kind = "simmatchv2" if "queue.z" in method else "simmatch"
    form = FORMATS[kind]
    num_classes = len(method["student.fc.weight"]) if "student.fc.weight" in method else 1
    if kind == "simmatchv2":  # without distribution alignment its prior stays uniform
        method = {"prior.da": torch.full((num_classes,), 1 / num_classes), **method}
    known = (*NETWORKS.values(), *form.buffers.values())
    optional = {form.buffers[key] for key in form.together}
    wrong = [f"{key} is missing" for key in form.buffers.values() if key not in {*method, *optional}]
    wrong += [f"{key} does not exist in that layout" for key in method if not key.startswith(known)]
    if len(ring := method.get("align.ring", torch.empty(RING))) != RING:
        wrong.append(f"align.ring has {len(ring)} rows, not {RING}: train with --da-len {RING}")
    if wrong:
        raise UserError(f"{where} cannot be converted to the published layout: {first_three(wrong)}")
    to_published = {native: published for published, native in {**form.buffers, **NETWORKS}.items()}
    values = _renamed(method, to_published)
    values |= {key: convert(values[key], num_classes) for key, convert in form.to_published.items()}
    spec = network_spec({"state_dict": values}, where)  # raises UserError if the backbone is not a ResNet
    if spec.channels != 3:
        raise UserError(f"{where} is for images of {spec.channels} channels; the published code needs 3")
    names = parameter_names(values, "main.")
    if is_sgd_state(optimizer) and len(optimizer["param_groups"]) != 1:
        raise UserError(
            f"{where} cannot be converted to the published layout: that has one parameter group, but this "
            f"run has {len(optimizer['param_groups'])} (--no-decay-bn creates two)"
        )
    check_sgd_state(optimizer, {name: values[name] for name in names}, where)
    if (name := first_not_finite(values)) is not None:
        raise UserError(f"{where} is damaged: {name} is not finite; use another one")
    # the published code passes all parameters to SGD, including the teacher's, which never get a gradient
    group = {**optimizer["param_groups"][0], "params": list(range(2 * len(names)))}
    is_v2 = kind == "simmatchv2"
    return {
        "epoch": epoch,
        **({"best_acc1": best[0], "best_acc5": best[1]} if is_v2 else {}),
        "arch": LAYOUTS[kind].program,
        "state_dict": {f"module.{key}": v for key, v in values.items()},
        "optimizer": {"state": optimizer["state"], "param_groups": [group]},
        **({"scaler": scaler or {}} if is_v2 else {}),
    }


def to_training_state(
    state: dict[str, Any], steps_per_epoch: int, where: str = "the checkpoint"
) -> tuple[dict[str, Tensor], dict[str, Any], int, int]:
    """Convert a published SimMatch or SimMatchV2 file to (method state_dict, SGD state_dict, finished epochs,
    finished steps), to resume training. Raises UserError if that is not possible.

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
    state = {k: saved["state"][key] for k, key in enumerate(listed) if key in saved["state"]}
    converted = {
        # the teacher's parameters have no momentum
        "state": {k: part for k, part in state.items() if part.get("momentum_buffer") is not None},
        "param_groups": [{**group, "params": list(range(len(names)))}],
    }
    check_sgd_state(converted, {name: method[name] for name in names}, where)
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
    require_kind("moco", state, where)
    query = below("encoder_q.", tensors(state))
    check_resnet(query, where)
    backbone = {f"backbone.{key}": value for key, value in query.items() if not key.startswith("fc.")}
    return backbone | _renamed(query, {"fc.0.": "head.0.", "fc.2.": "head.2."})


def _renamed(values: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Return the values whose keys are in `names` (old -> new), in its order; a name that ends with a dot is
    the prefix of keys.
    """
    return {
        new + key.removeprefix(old): value
        for old, new in names.items()
        for key, value in values.items()
        if key == old or old.endswith(".") and key.startswith(old)
    }
