"""Where a training starts: from its own last checkpoint, from one of the published program, from MoCo's, or
from nothing.
"""

import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from util import checkpoint, dist_utils, published_checkpoints
from util.config import MAY_CHANGE_ON_RESUME, Config, to_dict
from util.errors import UserError


def load_last(path: Path) -> tuple[dict[str, Any] | None, str]:
    """(content, remark) of the newest checkpoint at `path`: ours, or one of the published program's; (None,
    "") without one.
    """
    if path.is_dir():
        raise UserError(
            f"{path} is a folder, where the checkpoint is to be: move it away, or choose another --output-dir"
        )
    content = None
    if path.is_file():
        with suppress(UserError):  # damaged: the one before it may serve
            content = checkpoint.read(path)
            if not is_published(content):
                return checkpoint.check(content, path), ""
    if not is_published(content):
        return checkpoint.load_newest(path)
    if checkpoint.previous(path).exists():
        raise UserError(
            f"{path} is a checkpoint of the published program, but {checkpoint.previous(path)} is of another run: move "
            "that away to continue from the published one"
        )
    return content, f"{path} is a checkpoint of the published program; a copy stays in {_kept(path)}"


def is_published(content: Any) -> bool:
    return isinstance(content, dict) and "state_dict" in content


def resume(
    path: Path,
    state: dict[str, Any],
    config: Config,
    split: tuple[str, str],
    fingerprint: str,
    method: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Continue from `state`, our checkpoint at `path`. split, fingerprint: of the labeled images, and of
    all, as they are now.

    1. The same command continues; nothing has to be said.
    2. What the run computes must be the same: every field but FREE, the labeled split and the names of all
    images. Anything
       else is refused. The number of ranks, which decides what a step is, is util/ranks.py's business.
    3. Everything is restored from the one file: weights, bank, prior, teacher and optimizer here; the best
    score, and what the
       log has yet to tell, by the caller. The order of the data and all views follow from the step.
    4. Where the last checkpoint is damaged or gone, the one before it serves, and the run says so.
    """
    now = to_dict(config)
    changed = [
        f"{key} was {state['config'].get(key)!r} and is now {now[key]!r}"
        for key in now
        if key not in MAY_CHANGE_ON_RESUME and state["config"].get(key) != now[key]
    ]
    if tuple(state["split"]) != tuple(split):
        changed.append(
            "the split was {} (sha256 {:.12}) and is now {} (sha256 {:.12})".format(*state["split"], *split)
        )
    if not changed and state["data"] != fingerprint:
        changed.append("training or test images were added, removed or renamed")
    if changed:
        raise UserError(
            f"{path} belongs to another run ({'; '.join(changed[:3])}): choose another --output-dir, "
            f"or move it and {checkpoint.previous(path).name} away to start anew"
        )
    checkpoint.load_module(method, state["method"], path)
    optimizer.load_state_dict(state["optimizer"])


def resume_published(
    path: Path,
    content: dict[str, Any],
    steps_per_epoch: int,
    method: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> int:
    """Continue from a checkpoint of the published SimMatch: weights, bank, prior, teacher, optimizer. Returns
    the steps done.

    It does not say with which settings it was trained: those of the command line hold. The file is kept under
    another name, since `path` is where this run saves.
    """
    values, state, _, steps = published_checkpoints.to_training_state(
        content, steps_per_epoch, f"checkpoint {path}"
    )
    checkpoint.load_module(method, values, path)
    optimizer.load_state_dict(state)
    if dist_utils.rank() == 0 and not _kept(path).exists():
        try:
            shutil.copy2(path, _kept(path))
        except OSError as error:
            raise UserError(f"cannot keep a copy of {path} in {_kept(path)}: {error.strerror}") from None
    return steps


def start_from_moco(path: Path, method: nn.Module) -> None:
    """Backbone and projection head from a MoCo checkpoint (its query encoder); then the teacher copies the
    student.
    """
    if not path.is_file():
        raise UserError(f"--moco-path {path}: there is no such file")
    network, values = (
        method.student,
        published_checkpoints.moco_backbone(checkpoint.read(path), f"checkpoint {path}"),
    )
    parts = {key.split(".")[0] for key in values}  # MoCo v1 has no head
    own = {key: value for key, value in network.state_dict().items() if key.split(".")[0] not in parts}
    checkpoint.load_module(network, {**values, **own}, path)
    method.teacher.net.load_state_dict(network.state_dict())


def _kept(path: Path) -> Path:
    return path.with_suffix(f".published{path.suffix}")
