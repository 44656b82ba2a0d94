"""Conversion of published checkpoints (util/formats/published_layouts.py) to this repository's layout, and
back. All functions work on dicts of tensors.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from util.errors import UserError
from util.formats.published_layouts import (
    LAYOUTS,
    NetworkSpec,
    below,
    check_resnet,
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

# The published SimMatch's key or prefix of keys -> ours, for both directions.
NETWORKS = {"main.": "student.", "ema.": "teacher.net."}
BUFFERS = {"bank": "bank.z", "labels": "bank.labels", "DA_queue": "align.ring", "DA_ptr": "align.ptr"}
RING = 256  # rows of the ring of distribution alignment in published files


def to_method_state(state: dict[str, Any], where: str = "the checkpoint") -> dict[str, Tensor]:
    """Convert a published SimMatch file to the state_dict of models.simmatch.SimMatch. The published bank is
    transposed. Raises UserError if the file has another layout or its buffers have other shapes or types.
    """
    require_kind("simmatch", state, where)
    values = tensors(state)
    _check_buffers(values, network_spec(state, where), where)
    return _renamed(_with_transposed_bank(values), {**NETWORKS, **BUFFERS})


def _with_transposed_bank(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**values, "bank": values["bank"].T.contiguous()}  # published [D, K], ours [K, D]


def _check_buffers(values: dict[str, Tensor], spec: NetworkSpec, where: str) -> None:
    """Raise UserError if a buffer is missing or has another shape or type: load_state_dict would convert
    types silently.
    """
    assert spec.labeled is not None
    with torch.device("meta"):
        expected = {
            "bank": torch.empty(spec.dim, spec.labeled),
            "labels": torch.empty(spec.labeled, dtype=torch.int64),
        }
        if "DA_queue" in values or "DA_ptr" in values:
            expected["DA_queue"] = torch.empty(RING, spec.num_classes)
            expected["DA_ptr"] = torch.empty(1, dtype=torch.int64)
    found = {key: values[key] for key in expected if key in values}
    if wrong := mismatches(found, expected, describe_tensor):
        raise UserError(f"{where} is not a complete checkpoint of SimMatch: {first_three(wrong)}")


def from_method_state(
    method: dict[str, Tensor], optimizer: dict[str, Any], epoch: int, where: str = "the checkpoint"
) -> dict[str, Any]:
    """Convert the state_dicts of a SimMatch method and its SGD to a file that the published code loads with
    strict keys.

    epoch: number of finished epochs. A method without distribution alignment gives a file that the published
    code loads without --DA. Raises UserError if the published layout cannot hold the method or the optimizer.
    """
    known = (*NETWORKS.values(), *BUFFERS.values())
    wrong = [f"{key} is missing" for key in ("bank.z", "bank.labels") if key not in method]
    wrong += [f"{key} does not exist in that layout" for key in method if not key.startswith(known)]
    if "align.ring" in method and len(method["align.ring"]) != RING:
        wrong.append(
            f"align.ring has {len(method['align.ring'])} rows, not {RING}: train with --da-len {RING}"
        )
    if wrong:
        raise UserError(f"{where} cannot be converted to the published layout: {first_three(wrong)}")
    to_published = {native: published for published, native in {**BUFFERS, **NETWORKS}.items()}
    values = _with_transposed_bank(_renamed(method, to_published))
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
    return {
        "epoch": epoch,
        "arch": LAYOUTS["simmatch"].program,
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
