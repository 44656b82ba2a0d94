"""One flat dataclass of settings: YAML gives values, flags override, anything unknown or of the wrong type is
an error.

A field that the published program's command line has too keeps its name, default and meaning, so that a
published command, with no --config, is the published recipe.
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


def arg(default: Any, reason: str) -> Any:
    """A dataclass field whose `reason` is its comment in the source and its text in --help."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": reason})
    return field(default=default, metadata={"help": reason})


@dataclass
class Config:
    # what runs, and where it leaves its results
    method: str = arg(
        "simmatch", "simmatch, simmatch_single (one network, as for CIFAR), fixmatch or supervised"
    )
    output_dir: str = arg(
        "", "everything a run writes; empty means checkpoints/<name of the config or of checkpoint>"
    )
    checkpoint: str = arg("", "NAME: checkpoints/NAME stands for last.pth, and may be a published file")
    evaluate: bool = arg(False, "evaluate that checkpoint instead of training")
    seed: int = arg(0, "decides the labeled draw, initial weights, order and views")
    device: str = arg("auto", "auto (a GPU if there is one), cpu or cuda")
    precision: str = arg(
        "fp32", "of the networks' forward and backward: fp32, bf16 or fp16; losses and weights stay in fp32"
    )
    channels_last: bool = arg(False, "convolve in the memory layout that GPUs prefer")
    compile: bool = arg(False, "torch.compile the networks; the first steps then take minutes")
    # ranks
    port: int = arg(23456, "where ranks started by srun meet; the job's number is added to it")
    virtual_ranks: int = arg(
        0, "ranks of a step, shared evenly by the processes, which play theirs in turn; 0: one a process"
    )
    other_ranks: str = arg(
        "refuse", "continuing with another number of ranks than before: refuse, or continue at the same step"
    )
    timeout_minutes: float = arg(
        10.0, "how long a rank waits for another one before the run ends with its name"
    )
    # data
    dataset: str = arg("imagenet", "a name in dataset/build.py")
    data: str = arg(
        "", "folder of the images; empty: the path at the top of dataset/imagenet.py, or data/ for CIFAR"
    )
    unlabelled: str = arg("", "dataset folder: more images, in any nesting, that have no labels")
    val: str = arg("", "dataset folder: the test images, in class folders; empty: data/val, or val_share")
    val_share: float = arg(
        0.0, "dataset folder without test images: the share of each class that is held out as such"
    )
    split: str = arg(
        "", "the labeled images: a published list (python -m dataset.splits list) or any list file"
    )
    labels_per_class: int = arg(0, "without split: labeled images of each class, drawn by seed")
    anno_percent: float = arg(
        0.1, "without either: the share that is labeled; ImageNet's 0.01 and 0.1 are SimMatch's lists"
    )
    weak: str = arg("weak", "view of labeled and weak unlabeled images: a name in dataset/views.py")
    strong: str = arg(
        "moco", "strong view of unlabeled images: a name in dataset/views.py (moco, rand, stack, ...)"
    )
    image_size: int = arg(224, "pixels a side of the views of photographs; the recipes use 224")
    device_views: str = arg(
        "auto",
        "where flips, colors, blur and normalization are done: on (the training device), "
        "off (PIL, in the workers), auto (on, for a GPU)",
    )
    on_bad_image: str = arg(
        "stop", "an image that cannot be read: stop the run, or skip it (another stands in)"
    )
    workers: int = arg(
        6,
        "processes that load training images, and as many again for test images; no effect on what is loaded",
    )
    batch_size: int = arg(8, "labeled images a step and rank (B)")
    mu: int = arg(5, "unlabeled images for each labeled one")
    # network
    backbone: str = arg("resnet50_encoder", "a name in models/network.py")
    cls: int = arg(1000, "number of classes (C); must agree with the data; 0: as many as these have")
    dim: int = arg(128, "length of the embedding z (D)")
    norm: str = arg("None", "the backbone's normalization: None or BN, both BN per rank")
    moco_path: str = arg("", "a MoCo checkpoint that a new run's backbone and head start from")
    # optimization: SGD
    epochs: int = arg(200, "how many; an epoch is a pass over the unlabeled images, or steps_per_epoch")
    start_epoch: int = arg(
        0,
        "of the published command line: a checkpoint says itself where it goes on, and without one only 0 will do",
    )
    steps_per_epoch: int = arg(0, "steps that count as an epoch; 0: one pass over the unlabeled images")
    lr: float = arg(0.1, "learning rate after warm-up")
    warmup_epoch: int = arg(0, "epochs of linear warm-up")
    cos: bool = arg(False, "cosine decay to 0, once an epoch; otherwise --schedule")
    cos_7_16: bool = arg(
        False, "FixMatch's decay, every step: lr * cos(7 pi / 16 * share of the training done)"
    )
    schedule: list[int] = arg(
        [120, 160], "without --cos and --cos-7-16: epochs at which the rate falls tenfold"
    )
    momentum: float = arg(0.9, "SGD momentum")
    nesterov: bool = arg(False, "Nesterov's form of momentum")
    wd: float = arg(1e-4, "weight decay, on every parameter (biases and BN too)")
    no_decay_bn: bool = arg(False, "no weight decay on biases and BN, as for CIFAR")
    # method (symbols of the paper)
    lambda_u: float = arg(10.0, "weight of the unsupervised (pseudo-label) loss L_u")
    lambda_in: float = arg(1.0, "weight of the instance similarity loss L_in")
    threshold: float = arg(0.7, "pseudo-labels whose largest probability is below this do not count in L_u")
    st: float = arg(0.1, "temperature of the student's similarities")
    tt: float = arg(0.1, "temperature of the teacher's similarities")
    c_smooth: float = arg(
        1.0, "share of the class prediction in the pseudo-label; the rest comes from the bank (alpha)"
    )
    DA: bool = arg(False, "distribution alignment of the teacher's predictions")
    da_len: int = arg(256, "steps whose mean prediction counts in distribution alignment")
    bank_m: float = arg(0.0, "share of its old row that a bank row keeps when written (temporal ensemble)")
    eman: bool = arg(False, "EMAN teacher (BN statistics averaged); otherwise EMA with shuffle-BN")
    ema_m: float = arg(0.999, "momentum of the teacher (m)")
    # what is reported, and how often
    print_freq: int = arg(20, "steps between two train events in the log")
    eval_freq: int = arg(1, "epochs between two evaluations, each with a checkpoint")
    diagnose_freq: int = arg(
        0,
        "steps between two diagnostics (docs/DOCTOR.md), each at the cost of some three steps; 0: with "
        "every evaluation",
    )
    save_freq: int = arg(0, "steps between two further checkpoints; 0: none")
    on_save_error: str = arg(
        "stop",
        "a checkpoint or log that cannot be written, as on a full disk: stop the run, or continue "
        "and try again later",
    )
    save_minutes: float = arg(
        0.0, "minutes between two further checkpoints, looked at every print_freq steps; 0: none"
    )


FIELDS = {f.name: f for f in dataclasses.fields(Config)}
# How a run is watched and where its data are, not what it computes: these may change when a run is continued.
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
# Further spellings on the published command line, and flags that stand for a value of a field.
ALIASES = {
    "workers": ["-j"],
    "batch_size": ["-b"],
    "print_freq": ["-p"],
    "evaluate": ["-e"],
    "lr": ["--learning-rate"],
    "wd": ["--weight-decay"],
    "unlabelled": ["--unlabeled"],
}
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
    """Config of a command line: `--config FILE` first, then every `--field value` over it."""
    parser = Parser(description)
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="YAML file with any of the fields below; without it the published "
        "program's defaults hold, which are for ImageNet",
    )
    for name, f in FIELDS.items():
        flags = dict.fromkeys([*ALIASES.get(name, ()), f"--{name.replace('_', '-')}", f"--{name}"])
        how = (
            {"nargs": "?", "const": "true"}
            if f.type is bool
            else {"nargs": "*"}
            if f.type == list[int]
            else {}
        )
        parser.add_argument(
            *flags,
            dest=name,
            default=None,
            metavar=_type_name(f.type).upper(),
            help=f"{f.metadata['help']} (default: {getattr(Config(), name)!r})",
            **how,
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
    said = [flag for flag in SHORTHANDS if getattr(known, flag)]
    if len(said) + (known.strong is not None) > 1:
        raise UserError(
            f"--{' and --'.join([*said, 'strong'][:2])} both choose the strong view: give one of them"
        )
    values |= dict(SHORTHANDS[flag] for flag in said)
    config = Config(**values)
    if not known.config and not config.checkpoint:
        raise UserError(
            "--config FILE or --checkpoint NAME must say what to train: try --config configs/digits.yaml"
        )
    if not config.output_dir:
        config.output_dir = os.path.join("checkpoints", Path(config.checkpoint or known.config).stem)
    return validate(config)


def read_yaml(path: str) -> dict[str, Any]:
    """Checked values of a config file."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        values = yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"config file {path}: {error.strerror}; the ones that ship are in configs/") from None
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
    """`values` with every key known and every value of its field's type, else a UserError naming `where`."""
    for key in values:
        if key not in FIELDS:
            raise UserError(_unknown(str(key), f"in {where}"))
    return {key: coerce(key, value, f"{where}, key {key}") for key, value in values.items()}


def coerce(name: str, value: Any, where: str) -> Any:
    """`value` (from YAML, or text from a flag) as the type of field `name`."""
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


def _scalar(kind: type, value: Any) -> Any:
    if kind is float and not math.isfinite(float(value)):
        raise ValueError(value)
    if kind is bool:
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
    elif kind is str or isinstance(value, str):  # YAML 1.1 reads 1e-4, with no dot, as text
        if isinstance(value, str):
            return kind(value)
    elif type(value) is int or (kind is float and type(value) is float):
        return kind(value)
    if type(value) is kind:
        return value
    raise ValueError(value)


def validate(config: Config) -> Config:
    """Ranges that every method and data set share; the rest is checked where it is known."""

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
    must(config.norm in ("None", "BN"), "norm", "None or BN: the published recipe has BN per rank")
    must(
        Path(config.checkpoint).name == config.checkpoint,
        "checkpoint",
        "a file name, of a file in checkpoints/",
    )
    if config.evaluate and not config.checkpoint:
        raise UserError(
            "--evaluate needs --checkpoint NAME, a file in checkpoints/; for any other: python eval.py --checkpoint FILE"
        )
    must(config.other_ranks in ("refuse", "continue"), "other_ranks", "refuse or continue")
    must(config.on_save_error in ("stop", "continue"), "on_save_error", "stop or continue")
    must(config.on_bad_image in ("stop", "skip"), "on_bad_image", "stop or skip")
    must(not (config.cos and config.cos_7_16), "cos_7_16", "false with cos: there is one schedule")
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
