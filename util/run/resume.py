"""Where training starts: from the run's own last checkpoint, from a published checkpoint of SimMatch or
SimMatchV2, from a MoCo checkpoint, or from scratch.
"""

import filecmp
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from util import dist_utils
from util.config import changed_settings
from util.errors import UserError
from util.files import special_file, user_path, write_atomically
from util.formats import published_checkpoints, torch_files
from util.formats.published_layouts import LAYOUTS, detect_kind, tensors
from util.run import checkpoint
from util.run.checkpoint_schema import FLOATS, METER, check_sgd_state, conforms
from util.run.train_state import RunIdentity, TrainState


def load_last(path: Path) -> tuple[dict[str, Any] | None, str]:
    """Return (content, warning) of the checkpoint to resume from: the one at `path`, which may be a published
    one, or the previous one if that is damaged or missing; (None, "") if there is none.
    """
    if special := special_file(path):
        raise UserError(
            f"{path} is {special} and not a checkpoint: move it away, or choose another --output-dir"
        )
    before = checkpoint.previous(path)
    if not os.path.lexists(path) and not before.exists():
        return None, ""
    try:
        content = torch_files.load(path)
        if not is_published(content):
            return checkpoint.verify(content, path), ""
    except UserError as error:
        if not before.exists():
            raise
        return checkpoint.load(before), f"{error}; resuming from the previous one, {before}"
    if before.exists():
        raise UserError(
            f"{path} is a published checkpoint, but {before} belongs to another run: move the latter away to "
            "resume from the published one"
        )
    return content, f"{path} is a published checkpoint"


def is_published(content: Any) -> bool:
    """Return whether the published code wrote a checkpoint; those of this repository have no `state_dict`."""
    return isinstance(content, dict) and "state_dict" in content


def resume(path: Path, saved: dict[str, Any], identity: RunIdentity, state: TrainState) -> None:
    """Resume the run from `saved`, its checkpoint at `path`. identity: that of the run as it starts now.

    1. The same command resumes the run; no flag is needed.
    2. The settings that decide what the run computes must be the same: all fields of the config that have an
       effect, except MAY_CHANGE_ON_RESUME, the labeled split and the names of all images. Otherwise UserError
       is raised. The number of ranks is the concern of util/run/ranks.py.
    3. This function restores the state. The order of the data and all views depend only on the seed and the
       step.
    4. If the last checkpoint is damaged or missing, `load_last` returns the previous one and a warning.
    """
    changed = changed_settings(saved["config"], identity.config)
    if tuple(saved["split"]) != tuple(identity.split):
        changed.append(
            "the split was {} (sha256 {:.12}) and is now {} (sha256 {:.12})".format(
                *saved["split"], *identity.split
            )
        )
    if not changed and saved["data"] != identity.fingerprint:
        changed.append("training or test images were added, removed or renamed")
    if changed:
        raise UserError(
            f"{path} belongs to another run ({'; '.join(changed[:3])}): choose another --output-dir, "
            f"or move it and {checkpoint.previous(path).name} away to start a new run"
        )
    checkpoint.check_module(state.method, saved["method"], path)
    _check_indices(state.method, saved["method"], path)
    _check_resumable(path, saved, state)
    state.load_state_dict(saved)


def _check_resumable(path: Path, saved: dict[str, Any], state: TrainState) -> None:
    """Raise UserError unless the values of `saved` besides the networks are ones that this run could have
    saved: an evaluation does not need them, so they may be missing.
    """
    names = {p: name for name, p in state.method.student.named_parameters()}
    parameters = {names[p]: p for group in state.optimizer.param_groups for p in group["params"]}
    check_sgd_state(saved["optimizer"], parameters, f"checkpoint {path}")
    meter = saved["meter"]
    valid = {
        "best": {"step", "student_top1"} <= saved["best"].keys(),
        "scaler": _is_scaler_state(saved["scaler"], state.scaler),
        "meter": conforms(meter, METER) and _fits_together(meter, len(saved["classes"])),
    }
    for key, fine in valid.items():
        if not fine:
            raise UserError(f"checkpoint {path} cannot be resumed: it has no valid {key!r}")


def _fits_together(meter: dict[str, Any], num_classes: int) -> bool:
    """Return whether the tensors of a Meter's state have the types and shapes that its lists ask for."""
    names, steps, rows, counts = meter["names"], meter["steps"], meter["rows"], meter.get("counts")
    counted = (4 if "pseudo_acc" in names else 2, num_classes)
    return (
        rows.dtype in FLOATS
        and (not steps or rows.shape == (len(steps), len(names)) and "loss" in names)
        and (counts is None or counts.dtype == torch.int64 and counts.shape == counted)
    )


def _check_indices(method: Any, values: dict[str, torch.Tensor], path: Path) -> None:
    """Raise UserError if a buffer in a method's state_dict has an index that is out of range."""
    for name, limit in method.index_limits().items():
        if values[name].numel() and not 0 <= values[name].min() <= values[name].max() < limit:
            raise UserError(f"checkpoint {path} is damaged: {name} is not between 0 and {limit - 1}")


def resume_published(
    path: Path, content: dict[str, Any], identity: RunIdentity, state: TrainState
) -> list[str]:
    """Resume training from a published SimMatch or SimMatchV2 checkpoint: weights, bank, prior, teacher,
    optimizer and, in fp16, the scaler. Return lines about what is not restored, and about copies.

    The file does not contain the settings of its run, so those of the command line are used. Copies of it and
    of NAME_best.pth are kept under other names, because this run may save its checkpoints to both.
    """
    config, steps_per_epoch = identity.config, identity.steps_per_epoch
    kind = detect_kind(content, f"checkpoint {path}")
    if kind in published_checkpoints.FORMATS and config.method != kind:
        raise UserError(
            f"{path} is a checkpoint of {LAYOUTS[kind].program}: train with --method {kind}, or choose "
            "another --checkpoint"
        )
    if (norm_feat := "main.norm.weight" in tensors(content)) != config.norm_feat:
        advice = "add --norm-feat" if norm_feat else "leave --norm-feat out"
        has = "a" if norm_feat else "no"
        raise UserError(f"{path} has a network with {has} LayerNorm on its feature: {advice}")
    values, optimizer, _, state.step = published_checkpoints.to_training_state(
        content, steps_per_epoch, f"checkpoint {path}"
    )
    lines = [state.method.fit_state(values)]
    checkpoint.load_module(state.method, values, path)
    _check_indices(state.method, values, path)
    _load_momentum(state, optimizer["state"])
    if content.get("scaler") and state.scaler.is_enabled():
        if not _is_scaler_state(content["scaler"], state.scaler):
            raise UserError(f"checkpoint {path} cannot be resumed: it has no valid 'scaler'")
        state.scaler.load_state_dict(content["scaler"])
    if isinstance(best := content.get("best_acc1"), (int, float)):
        lines.append(f"the best score counts from this start; that of {path.name} is {best:.3f} %")
    best_file = path.with_stem(f"{path.stem}_best")
    if dist_utils.rank() == 0:
        lines += [_keep_copy(file) for file in (path, best_file) if file.exists()]
    return lines


def _keep_copy(file: Path) -> str:
    """Copy `file` to a name that no other file has, unless there is a copy already. Return a line about the
    copy.
    """
    names = (file.with_suffix(f".published{n or ''}{file.suffix}") for n in range(10**6))
    copy = next(name for name in names if not name.exists() or filecmp.cmp(name, file, shallow=False))
    if not copy.exists():
        with open(file, "rb") as source:
            write_atomically(copy, partial(shutil.copyfileobj, source))
    return f"a copy of {file} is kept in {copy}"


def _load_momentum(state: TrainState, momentum: dict[int, Any]) -> None:
    """Load the momentum of SGD, whose parameters are numbered in the order of the student. The options, such
    as the weight decay, stay those of the settings.
    """
    number = {p: k for k, p in enumerate(state.method.student.parameters())}
    own = [number[p] for group in state.optimizer.param_groups for p in group["params"]]
    values = {i: momentum[k] for i, k in enumerate(own) if k in momentum}
    groups = state.optimizer.state_dict()["param_groups"]
    state.optimizer.load_state_dict({"state": values, "param_groups": groups})


def _is_scaler_state(saved: Any, scaler: torch.amp.GradScaler) -> bool:
    """Return whether `saved` is a state of a GradScaler with which a run can go on."""
    own = scaler.state_dict()
    if not own:
        return True
    if not conforms(saved, dict[str, float]) or own.keys() != saved.keys():
        return False
    steps, interval = saved["_growth_tracker"], saved["growth_interval"]
    return (
        0 < saved["scale"] <= torch.finfo(torch.float32).max
        and 0 < saved["backoff_factor"] < 1 < saved["growth_factor"]
        and type(steps) is type(interval) is int
        and 0 <= steps < interval < 2**31
    )


def check_moco_path(path: Path, found: dict[str, Any], moco_path: str) -> str:
    """Return the MoCo checkpoint from which the run started that is resumed from `found`, the content of
    `path`; "" if there is none or if it is not known. Raises UserError if `moco_path` is given and is not it.
    """
    before = found.get("config", {}).get("moco_path", "")  # a published checkpoint has no config
    before = before if isinstance(before, str) else ""
    if moco_path and Path(moco_path) != Path(before):
        raise UserError(
            f"--moco-path {moco_path} has no effect: {path} is resumed, which did not start from it; leave "
            "the flag out, or choose another --output-dir"
        )
    return before


def start_from_moco(path: Path, student: nn.Module, teacher: nn.Module) -> None:
    """Initialize the backbone and projection head of the student from the query encoder of a MoCo checkpoint,
    then the teacher from the student.
    """
    path = user_path(path)
    if not path.exists():
        raise UserError(f"--moco-path {path}: no such file")
    values = published_checkpoints.moco_backbone(torch_files.load(path), f"checkpoint {path}")
    parts = {key.split(".")[0] for key in values}  # MoCo v1 has no head
    own = {key: value for key, value in student.state_dict().items() if key.split(".")[0] not in parts}
    checkpoint.load_module(student, {**values, **own}, path)
    teacher.load_state_dict(student.state_dict())
