"""Reads a checkpoint of any layout, so that its networks can be built."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from util.config import Config, coerce_values, to_dict, validate
from util.errors import UserError
from util.formats import published_layouts, torch_files
from util.run import checkpoint


class Contents(NamedTuple):
    """What a checkpoint of any layout holds."""

    path: Path
    kind: str  # from published_layouts.detect_kind
    state: dict[str, Any]  # the content of the file
    config: Config  # of a published file: ImageNet and the detected architecture
    description: str  # one line
    classes: list[str]  # names; of a published file: numbers  [C]
    tensors: dict[str, Tensor]
    student: str  # prefix of the student's keys in `tensors`
    teacher: str  # of the teacher's; "" if there is none
    spec: published_layouts.NetworkSpec | None  # of a published file


def read_checkpoint(
    path: Path, overrides: Mapping[str, Any], backbones: published_layouts.Backbones
) -> Contents:
    """Read a checkpoint. Raises UserError if it cannot be evaluated.

    overrides: settings that replace those of the checkpoint's config. backbones: as in models/network.py.
    """
    where, spec = f"checkpoint {path}", None
    state = torch_files.load(path)
    kind = published_layouts.detect_kind(state, where)
    if kind == "moco":
        raise UserError(
            f"{where} is a MoCo checkpoint, which has no classifier: use it to start training, with "
            "train_semi.py --moco-path"
        )
    if kind == "native":
        state = checkpoint.verify(state, path)
        config = _override(state["config"], overrides, path)
        classes, tensors = list(state["classes"]), state["method"]
        split, sha256 = state["split"]
        description = (
            f"{config.method}, {config.backbone}, {split} (sha256 {sha256[:12]}); step {state['step']}"
        )
        student, teacher = "student.", "teacher.net."
    else:
        spec = published_layouts.network_spec(state, where)
        backbone = published_layouts.find_backbone(spec, backbones, where)
        values = to_dict(Config(dataset="imagenet", backbone=backbone, cls=spec.num_classes))
        config = _override(values, overrides, path)
        classes, tensors = [str(c) for c in range(spec.num_classes)], published_layouts.tensors(state)
        description = published_layouts.describe(state, kind, backbone, spec.labeled)
        student, teacher = "main.", "ema."
    if config.cls != len(classes):
        raise UserError(f"the config in {path}: cls is {config.cls}, but there are {len(classes)} classes")
    # Compared before a network of that size is built.
    weight = tensors.get(f"{student}head.2.weight")
    if kind == "native" and (weight is None or weight.shape[:1] != (config.dim,)):
        raise UserError(
            f"{where} has another network than its config says, which has dim {config.dim}: "
            f"{student}head.2.weight is {'missing' if weight is None else list(weight.shape)}"
        )
    if kind == "fixmatch" and not any(key.startswith(teacher) for key in tensors):
        teacher = ""
    return Contents(path, kind, state, config, description, classes, tensors, student, teacher, spec)


def _override(values: dict[str, Any], overrides: Mapping[str, Any], path: Path) -> Config:
    """Return the config with these values, overridden by the others."""
    where = f"the config in {path}"
    stored = coerce_values(values, where)
    try:
        validate(Config(**stored))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return validate(Config(**{**stored, **coerce_values(dict(overrides), "the command line")}))


def image_channels(values: Mapping[str, Tensor], prefix: str) -> int:
    """Return the number of image channels, from the first convolution below `prefix`; 3 if there is none,
    which `load_module` will report.
    """
    convolutions = (v for k, v in values.items() if k.startswith(prefix) and v.ndim == 4 and v.numel())
    return next((value.shape[1] for value in convolutions), 3)
