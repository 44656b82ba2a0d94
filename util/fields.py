"""All settings in one flat dataclass: each field with its default, its meaning and its valid values.

Flags of the published code keep their names, defaults and meanings, so that a published command without
--config runs the published recipe. Which methods and data sets use a field: util/effect.py.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

FP32_MAX = 3.4e38  # the largest number of fp32


def arg(
    default: Any,
    help: str,
    *,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    choices: tuple[str, ...] = (),
) -> Any:
    """A field of Config with its help text, which --help prints, and its valid values.

    A number must be greater than `above`, or `at_least` or more, and `at_most` or less; for a list this holds
    for every number in it. A text must be one of the `choices`, if there are any.
    """
    metadata = {"help": help, "above": above, "at_least": at_least, "at_most": at_most, "choices": choices}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


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
    seed: int = arg(
        0,
        "random seed of labeled subset, initial weights, image order and views",
        at_least=0,
        at_most=2**63 - 1,
    )
    device: str = arg("auto", "auto (a GPU if there is one), cpu or cuda", choices=("auto", "cpu", "cuda"))
    precision: str = arg(
        "fp32",
        "autocast of the networks: fp32 (none), bf16 or fp16; losses and weights stay in fp32",
        choices=("fp32", "bf16", "fp16"),
    )
    channels_last: bool = arg(False, "use the channels_last memory format, which is faster on GPUs")
    compile: bool = arg(False, "use torch.compile for the networks; the first steps then take minutes")
    # ranks
    port: int = arg(
        23456,
        "port where ranks started by srun meet; an offset that depends on the job ID is added",
        above=0,
        at_most=65535,
    )
    virtual_ranks: int = arg(
        0,
        "ranks of a step; processes share them evenly and run theirs in turn; 0: one per process",
        at_least=0,
        at_most=65536,
    )
    other_ranks: str = arg(
        "refuse",
        "when resuming with another number of ranks: refuse, or continue at the same step",
        choices=("refuse", "continue"),
    )
    timeout_minutes: float = arg(
        10.0,
        "minutes that a rank waits for another one before the run ends, naming that rank",
        above=0,
        at_most=10_000,
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
        0.0,
        "dataset folder without test images: share of each class to hold out for testing",
        at_least=0,
        at_most=1,
    )
    split: str = arg("", "labeled split: a published list (see python -m dataset.splits list) or a list file")
    labels_per_class: int = arg(
        0,
        "without --split: number of labeled images per class, drawn with --seed",
        at_least=0,
        at_most=10**7,
    )
    anno_percent: float = arg(
        0.1,
        "without --split and --labels-per-class: labeled share; ImageNet 0.01, 0.1: SimMatch's lists",
        at_least=0,
        at_most=1,
    )
    weak: str = arg("weak", "weak view, of labeled and unlabeled images: a name in dataset/views.py")
    strong: str = arg(
        "moco", "strong view of unlabeled images: a name in dataset/views.py (moco, rand, stack, ...)"
    )
    image_size: int = arg(
        224, "side length in pixels of the views of image files; the recipes use 224", above=0, at_most=8192
    )
    device_views: str = arg(
        "auto",
        "do flips, color, blur and normalization on the training device: on, off (PIL), auto (if GPU)",
        choices=("auto", "on", "off"),
    )
    on_bad_image: str = arg(
        "stop",
        "if an image cannot be read: stop the run, or skip it and use another one instead",
        choices=("stop", "skip"),
    )
    workers: int = arg(
        6,
        "worker processes that load training images, and again as many for test images",
        at_least=0,
        at_most=1024,
    )
    batch_size: int = arg(8, "labeled images per rank and step (B)", above=0, at_most=100_000)
    mu: int = arg(5, "unlabeled images per labeled image", above=0, at_most=1000)
    # network
    backbone: str = arg("resnet50_encoder", "name of a backbone in models/network.py")
    cls: int = arg(
        1000,
        "number of classes (C); must match the data; 0: taken from the data",
        at_least=0,
        at_most=10**7,
    )
    dim: int = arg(128, "dimension of the embedding z (D)", above=0, at_most=65536)
    norm: str = arg(
        "None",
        "normalization of the backbone: None or BN, which both mean batch norm per rank",
        choices=("None", "BN"),
    )
    moco_path: str = arg("", "MoCo checkpoint that initializes the backbone and projection head of a new run")
    # optimization: SGD
    epochs: int = arg(
        200,
        "number of epochs: passes over the unlabeled images, or --steps-per-epoch steps each",
        above=0,
        at_most=10**6,
    )
    start_epoch: int = arg(
        0,
        "for published commands: a new run needs 0, a resumed one starts at its own step",
        at_least=0,
        at_most=10**6,
    )
    steps_per_epoch: int = arg(
        0, "number of steps in an epoch; 0: one pass over the unlabeled images", at_least=0, at_most=10**9
    )
    lr: float = arg(0.1, "learning rate after warm-up", above=0, at_most=1000)
    warmup_epoch: int = arg(0, "epochs of linear learning-rate warm-up", at_least=0, at_most=10**6)
    cos: bool = arg(
        False, "cosine decay of the learning rate to 0, updated once per epoch; otherwise --schedule"
    )
    cos_7_16: bool = arg(
        False, "FixMatch's decay, at every step: lr * cos(7 pi / 16 * share of the steps done)"
    )
    schedule: list[int] = arg(
        [120, 160],
        "without --cos and --cos-7-16: epochs at which the learning rate is divided by 10",
        at_least=0,
        at_most=10**6,
    )
    momentum: float = arg(0.9, "momentum of SGD", at_least=0, at_most=1)
    nesterov: bool = arg(False, "use Nesterov momentum")
    wd: float = arg(1e-4, "weight decay of all parameters, including biases and BN", at_least=0, at_most=1000)
    no_decay_bn: bool = arg(False, "no weight decay of biases and BN parameters, as for CIFAR")
    # method (symbols of the paper)
    lambda_u: float = arg(
        10.0, "weight of the unsupervised (pseudo-label) loss L_u", at_least=0, at_most=FP32_MAX
    )
    lambda_in: float = arg(1.0, "weight of the instance similarity loss L_in", at_least=0, at_most=FP32_MAX)
    threshold: float = arg(
        0.7,
        "confidence threshold: L_u ignores pseudo-labels whose largest probability is lower",
        at_least=0,
        at_most=1,
    )
    st: float = arg(0.1, "temperature of the student's similarities", above=0, at_most=1000)
    tt: float = arg(0.1, "temperature of the teacher's similarities", above=0, at_most=1000)
    c_smooth: float = arg(
        1.0,
        "weight of the class prediction in the pseudo-label (alpha); the rest comes from the bank",
        at_least=0,
        at_most=1,
    )
    DA: bool = arg(False, "use distribution alignment of the teacher's predictions")
    da_len: int = arg(
        256,
        "number of past steps whose mean predictions form the prior of distribution alignment",
        above=0,
        at_most=10**6,
    )
    bank_m: float = arg(
        0.0,
        "momentum of the bank: share of the old row that stays when it is written (temporal ensemble)",
        at_least=0,
        at_most=1,
    )
    eman: bool = arg(
        False, "simmatch: EMAN teacher, whose BN is averaged, not shuffle-BN; fixmatch: the teacher labels"
    )
    ema_m: float = arg(0.999, "momentum of the teacher (m)", at_least=0, at_most=1)
    # logging, evaluation and checkpoints
    print_freq: int = arg(20, "steps between two train events in the log", above=0, at_most=10**9)
    eval_freq: int = arg(
        1, "epochs between two evaluations, each of which also saves a checkpoint", above=0, at_most=10**9
    )
    diagnose_freq: int = arg(
        0,
        "steps between diagnostics events (they take three steps' time); 0: with every evaluation",
        at_least=0,
        at_most=10**9,
    )
    save_freq: int = arg(0, "steps between two additional checkpoints; 0: none", at_least=0, at_most=10**9)
    on_save_error: str = arg(
        "stop",
        "if a checkpoint or the log cannot be written (disk full): stop, or continue and try again",
        choices=("stop", "continue"),
    )
    save_minutes: float = arg(
        0.0,
        "minutes between additional checkpoints, checked every --print-freq steps; 0: none",
        at_least=0,
        at_most=10**6,
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


def broken_rule(name: str, value: Any) -> str:
    """Return what a value of the field `name` must be and `value` is not, or "" if it is valid."""
    m = FIELDS[name].metadata
    if m["choices"]:
        return "" if value in m["choices"] else f"{', '.join(m['choices'][:-1])} or {m['choices'][-1]}"
    for number in value if isinstance(value, list) else [value]:
        too_low = m["above"] is not None and number <= m["above"]
        too_low = too_low or m["at_least"] is not None and number < m["at_least"]
        too_high = m["at_most"] is not None and number > m["at_most"]
        if (too_low or too_high) and (m["at_least"], m["at_most"]) == (0, 1):
            return "between 0 and 1"
        if too_low:
            return f"{m['at_least']} or more" if m["above"] is None else f"greater than {m['above']}"
        if too_high:
            return f"{m['at_most']} or less"
    return ""
