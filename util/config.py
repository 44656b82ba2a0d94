"""All settings in one flat dataclass. A YAML file sets values, flags override them, and an unknown key or a
value of the wrong type is an error.

Flags of the published code keep their names, defaults and meanings, so that a published command without
--config runs the published recipe.
"""

import dataclasses
import difflib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from util.errors import Parser, UserError
from util.files import user_path


def arg(default: Any, help: str) -> Any:
    """A field of Config with its help text, which --help prints."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class Config:
    # what to run, and where results go
    method: str = arg(
        "simmatch", "simmatch, simmatch_single (one network, as for CIFAR), fixmatch or supervised"
    )
    output_dir: str = arg(
        "", "directory for all output; empty: checkpoints/<name of the config file or of --checkpoint>"
    )
    checkpoint: str = arg(
        "", "NAME: checkpoints/NAME takes the place of last.pth; it may be a published checkpoint"
    )
    evaluate: bool = arg(False, "evaluate --checkpoint instead of training")
    seed: int = arg(0, "random seed of labeled subset, initial weights, image order and views")
    device: str = arg("auto", "auto (a GPU if there is one), cpu or cuda")
    precision: str = arg(
        "fp32", "autocast of the networks: fp32 (none), bf16 or fp16; losses and weights stay in fp32"
    )
    channels_last: bool = arg(False, "use the channels_last memory format, which is faster on GPUs")
    compile: bool = arg(False, "use torch.compile for the networks; the first steps then take minutes")
    # ranks
    port: int = arg(
        23456, "port where ranks started by srun meet; an offset that depends on the job ID is added"
    )
    virtual_ranks: int = arg(
        0, "ranks of a step; processes share them evenly and run theirs in turn; 0: one per process"
    )
    other_ranks: str = arg(
        "refuse", "when resuming with another number of ranks: refuse, or continue at the same step"
    )
    timeout_minutes: float = arg(
        10.0, "minutes that a rank waits for another one before the run ends, naming that rank"
    )
    # data
    dataset: str = arg("imagenet", "name of a data set in dataset/build.py")
    data: str = arg(
        "", "directory of the images; empty: IMAGENET_ROOT in dataset/imagenet.py, or data/ for CIFAR"
    )
    unlabelled: str = arg("", "dataset folder: directory of additional unlabeled images, at any depth")
    val: str = arg(
        "", "dataset folder: test images, one folder per class; empty: val/ in --data, or --val-share"
    )
    val_share: float = arg(
        0.0, "dataset folder without test images: share of each class to hold out for testing"
    )
    split: str = arg("", "labeled split: a published list (see python -m dataset.splits list) or a list file")
    labels_per_class: int = arg(0, "without --split: number of labeled images per class, drawn with --seed")
    anno_percent: float = arg(
        0.1, "without --split and --labels-per-class: labeled share; ImageNet 0.01, 0.1: SimMatch's lists"
    )
    weak: str = arg("weak", "weak view, of labeled and unlabeled images: a name in dataset/views.py")
    strong: str = arg(
        "moco", "strong view of unlabeled images: a name in dataset/views.py (moco, rand, stack, ...)"
    )
    image_size: int = arg(224, "side length in pixels of the views of image files; the recipes use 224")
    device_views: str = arg(
        "auto", "do flips, color, blur and normalization on the training device: on, off (PIL), auto (if GPU)"
    )
    on_bad_image: str = arg(
        "stop", "if an image cannot be read: stop the run, or skip it and use another one instead"
    )
    workers: int = arg(6, "worker processes that load training images, and again as many for test images")
    batch_size: int = arg(8, "labeled images per rank and step (B)")
    mu: int = arg(5, "unlabeled images per labeled image")
    # network
    backbone: str = arg("resnet50_encoder", "name of a backbone in models/network.py")
    cls: int = arg(1000, "number of classes (C); must match the data; 0: taken from the data")
    dim: int = arg(128, "dimension of the embedding z (D)")
    norm: str = arg("None", "normalization of the backbone: None or BN, which both mean batch norm per rank")
    moco_path: str = arg("", "MoCo checkpoint that initializes the backbone and projection head of a new run")
    # optimization: SGD
    epochs: int = arg(
        200, "number of epochs: passes over the unlabeled images, or --steps-per-epoch steps each"
    )
    start_epoch: int = arg(
        0, "for published commands: a new run needs 0, a resumed one starts at its own step"
    )
    steps_per_epoch: int = arg(0, "number of steps in an epoch; 0: one pass over the unlabeled images")
    lr: float = arg(0.1, "learning rate after warm-up")
    warmup_epoch: int = arg(0, "epochs of linear learning-rate warm-up")
    cos: bool = arg(
        False, "cosine decay of the learning rate to 0, updated once per epoch; otherwise --schedule"
    )
    cos_7_16: bool = arg(
        False, "FixMatch's decay, at every step: lr * cos(7 pi / 16 * share of the steps done)"
    )
    schedule: list[int] = arg(
        [120, 160], "without --cos and --cos-7-16: epochs at which the learning rate is divided by 10"
    )
    momentum: float = arg(0.9, "momentum of SGD")
    nesterov: bool = arg(False, "use Nesterov momentum")
    wd: float = arg(1e-4, "weight decay of all parameters, including biases and BN")
    no_decay_bn: bool = arg(False, "no weight decay of biases and BN parameters, as for CIFAR")
    # method (symbols of the paper)
    lambda_u: float = arg(10.0, "weight of the unsupervised (pseudo-label) loss L_u")
    lambda_in: float = arg(1.0, "weight of the instance similarity loss L_in")
    threshold: float = arg(
        0.7, "confidence threshold: L_u ignores pseudo-labels whose largest probability is lower"
    )
    st: float = arg(0.1, "temperature of the student's similarities")
    tt: float = arg(0.1, "temperature of the teacher's similarities")
    c_smooth: float = arg(
        1.0, "weight of the class prediction in the pseudo-label (alpha); the rest comes from the bank"
    )
    DA: bool = arg(False, "use distribution alignment of the teacher's predictions")
    da_len: int = arg(
        256, "number of past steps whose mean predictions form the prior of distribution alignment"
    )
    bank_m: float = arg(
        0.0, "momentum of the bank: share of the old row that stays when it is written (temporal ensemble)"
    )
    eman: bool = arg(
        False, "simmatch: EMAN teacher, whose BN is averaged, not shuffle-BN; fixmatch: the teacher labels"
    )
    ema_m: float = arg(0.999, "momentum of the teacher (m)")
    # logging, evaluation and checkpoints
    print_freq: int = arg(20, "steps between two train events in the log")
    eval_freq: int = arg(1, "epochs between two evaluations, each of which also saves a checkpoint")
    diagnose_freq: int = arg(
        0, "steps between diagnostics events (they take three steps' time); 0: with every evaluation"
    )
    save_freq: int = arg(0, "steps between two additional checkpoints; 0: none")
    on_save_error: str = arg(
        "stop", "if a checkpoint or the log cannot be written (disk full): stop, or continue and try again"
    )
    save_minutes: float = arg(
        0.0, "minutes between additional checkpoints, checked every --print-freq steps; 0: none"
    )


FIELDS = {f.name: f for f in dataclasses.fields(Config)}
# These fields do not decide what a run computes, and may therefore change when it is resumed.
MAY_CHANGE_ON_RESUME = frozenset(
    {
        "output_dir",
        "checkpoint",
        "evaluate",
        "moco_path",
        "start_epoch",
        "port",
        "device",
        "workers",
        "print_freq",
        "eval_freq",
        "diagnose_freq",
        "save_freq",
        "save_minutes",
        "data",
        "unlabelled",
        "val",
        "on_bad_image",
        "virtual_ranks",
        "other_ranks",
        "timeout_minutes",
        "on_save_error",
    }
)
# Other spellings of flags; most are those of the published command line.
ALIASES = {
    "workers": ["-j"],
    "batch_size": ["-b"],
    "print_freq": ["-p"],
    "evaluate": ["-e"],
    "lr": ["--learning-rate"],
    "wd": ["--weight-decay"],
    "unlabelled": ["--unlabeled"],
}
# Flags of the published command line that set another field.
SHORTHANDS = {"randaug": ("strong", "rand"), "stack": ("strong", "stack")}

_POSITIVE = (
    "timeout_minutes",
    "port",
    "image_size",
    "batch_size",
    "mu",
    "dim",
    "epochs",
    "lr",
    "st",
    "tt",
    "da_len",
    "print_freq",
    "eval_freq",
)
_NOT_NEGATIVE = (
    "virtual_ranks",
    "start_epoch",
    "diagnose_freq",
    "save_freq",
    "save_minutes",
    "seed",
    "cls",
    "labels_per_class",
    "workers",
    "steps_per_epoch",
    "warmup_epoch",
    "wd",
    "lambda_u",
    "lambda_in",
)
_SHARE = ("val_share", "anno_percent", "momentum", "threshold", "c_smooth", "bank_m", "ema_m")


def parse(argv: Sequence[str], description: str) -> Config:
    """The Config of a command line: values of `--config FILE`, overridden by flags. Raises UserError."""
    parser = Parser(description)
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="YAML file with any of the settings below; without it the defaults are those of the published "
        "code, for ImageNet",
    )
    for name, f in FIELDS.items():
        flags = dict.fromkeys([*ALIASES.get(name, ()), f"--{name.replace('_', '-')}", f"--{name}"])
        nargs: dict[str, Any] = {}
        if f.type is bool:
            nargs = {"nargs": "?", "const": "true"}
        elif f.type == list[int]:
            nargs = {"nargs": "*"}
        parser.add_argument(
            *flags,
            dest=name,
            default=None,
            metavar=_type_name(f.type).upper(),
            help=f"{f.metadata['help']} (default: {getattr(Config(), name)!r})",
            **nargs,
        )
    for flag, (name, value) in SHORTHANDS.items():
        parser.add_argument(f"--{flag}", action="store_true", help=f"the same as --{name} {value}")
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        raise UserError(_unknown(unknown[0], "on the command line"))
    values = read_yaml(known.config) if known.config else {}
    for name in FIELDS:
        if getattr(known, name) is not None:
            values[name] = coerce(name, getattr(known, name), f"--{name.replace('_', '-')}")
    shorthands = [flag for flag in SHORTHANDS if getattr(known, flag)]
    if len(shorthands) + (known.strong is not None) > 1:
        raise UserError(
            f"--{' and --'.join([*shorthands, 'strong'][:2])} both choose the strong view: give one of them"
        )
    values |= dict(SHORTHANDS[flag] for flag in shorthands)
    config = Config(**values)
    if not known.config and not config.checkpoint:
        raise UserError("give --config FILE or --checkpoint NAME, for example --config configs/digits.yaml")
    if not config.output_dir:
        config.output_dir = os.path.join("checkpoints", Path(config.checkpoint or known.config).stem)
    return validate(config)


def read_yaml(path: str) -> dict[str, Any]:
    """The values in a config file, checked as by `from_dict`."""
    try:
        text = user_path(path).read_text(encoding="utf-8")
        values = yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"config file {path}: {error.strerror}; configs/ has examples") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"config file {path} is not YAML: {' '.join(str(error).split())}") from None
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise UserError(
            f"config file {path}: expected lines of the form 'key: value', got a {type(values).__name__}"
        )
    return from_dict(values, path)


def from_dict(values: dict[str, Any], where: str) -> dict[str, Any]:
    """`values`, each converted to the type of its field. Raises UserError, naming `where`, if one is not
    valid.
    """
    for key in values:
        if key not in FIELDS:
            raise UserError(_unknown(str(key), f"in {where}"))
    return {key: coerce(key, value, f"{where}, key {key}") for key, value in values.items()}


def coerce(name: str, value: Any, where: str) -> Any:
    """`value`, from YAML or the text of a flag, as the type of the field `name`. Raises UserError."""
    kind = FIELDS[name].type
    try:
        if kind == list[int]:
            if isinstance(value, list):
                return [_scalar(int, v) for v in value]
        else:
            return _scalar(kind, value)
    except (ValueError, TypeError, OverflowError):
        pass
    raise UserError(f"{where}: expected {_type_name(kind)}, got {value!r}")


def _scalar(kind: Any, value: Any) -> Any:
    if kind is float and not math.isfinite(float(value)):
        raise ValueError(value)
    if kind is bool:
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
    elif kind is str or isinstance(value, str):  # YAML 1.1 reads 1e-4 (without a dot) as a string
        if isinstance(value, str):
            return kind(value)
    elif type(value) is int or (kind is float and type(value) is float):
        return kind(value)
    if type(value) is kind:
        return value
    raise ValueError(value)


def validate(config: Config) -> Config:
    """Check what does not depend on the method or the data set. Raises UserError if a value is not valid."""

    def must(ok: bool, name: str, rule: str) -> None:
        if not ok:
            raise UserError(f"{name} must be {rule}, got {getattr(config, name)!r}")

    for name in _POSITIVE:
        must(getattr(config, name) > 0, name, "greater than 0")
    for name in _NOT_NEGATIVE:
        must(getattr(config, name) >= 0, name, "0 or more")
    for name in _SHARE:
        must(0 <= getattr(config, name) <= 1, name, "between 0 and 1")
    must(config.seed < 2**63, "seed", "less than 2**63")
    must(config.device in ("auto", "cpu", "cuda"), "device", "auto, cpu or cuda")
    must(config.device_views in ("auto", "on", "off"), "device_views", "auto, on or off")
    must(config.precision in ("fp32", "bf16", "fp16"), "precision", "fp32, bf16 or fp16")
    must(config.norm in ("None", "BN"), "norm", "None or BN, which both mean batch norm per rank")
    must(
        Path(config.checkpoint).name == config.checkpoint,
        "checkpoint",
        "a file name in checkpoints/",
    )
    if config.evaluate and not config.checkpoint:
        raise UserError(
            "--evaluate needs --checkpoint NAME, a file in checkpoints/; for any other file use "
            "python eval.py --checkpoint FILE"
        )
    must(config.other_ranks in ("refuse", "continue"), "other_ranks", "refuse or continue")
    must(config.on_save_error in ("stop", "continue"), "on_save_error", "stop or continue")
    must(config.on_bad_image in ("stop", "skip"), "on_bad_image", "stop or skip")
    must(not (config.cos and config.cos_7_16), "cos_7_16", "false if cos is true: choose one of them")
    must(not config.nesterov or config.momentum > 0, "momentum", "greater than 0 with nesterov")
    return config


def to_dict(config: Config) -> dict[str, Any]:
    return dataclasses.asdict(config)


def to_yaml(config: Config) -> str:
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def _type_name(kind: Any) -> str:
    return "list of int" if kind == list[int] else kind.__name__


def _unknown(key: str, where: str) -> str:
    plain = key.lstrip("-").split("=")[0].replace("-", "_")
    lower = {name.lower(): name for name in [*FIELDS, "config"]}
    near = difflib.get_close_matches(plain.lower(), lower, n=1, cutoff=0.0)
    return f"unknown key {key!r} {where}; the nearest known one is {lower[near[0]]!r}"
