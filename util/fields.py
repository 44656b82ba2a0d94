"""All settings in one flat dataclass: each field with its default, its meaning and its valid values.

Those that every method and data set share are here. A method declares its own in its file in models/, and a
data set in its file in dataset/ (util/declarations.py).

Flags of the published code keep their names, defaults and meanings, so that a published command without
--config runs the published recipe.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from util.declarations import DATASETS, METHODS


def arg(
    default: Any,
    help: str,
    *,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    choices: tuple[str, ...] = (),
    aliases: tuple[str, ...] = (),
    replaced_by: tuple[str, ...] = (),
    needs: str = "",
    may_change: bool = False,
) -> Any:
    """A field of Config with its help text, which --help prints, and its valid values.

    A number must be greater than `above`, or `at_least` or more, and `at_most` or less; for a list this holds
    for every number in it. A text must be one of the `choices`, if there are any.
    aliases: other spellings of the flag, most of them those of the published command line. replaced_by: the
    settings of which any one, if it is set, takes the place of this one. needs: the setting without which
    this one has no effect. may_change: it does not decide what a run computes, so a resume may change it.
    """
    metadata = {name: value for name, value in locals().items() if name != "default"}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class _Shared:
    # what to run, and where results go
    method: str = arg("simmatch", f"name of a method: {', '.join(METHODS)}")
    output_dir: str = arg(
        "",
        "directory for all output; empty: checkpoints/<name of the config file or of --checkpoint>",
        may_change=True,
    )
    checkpoint: str = arg(
        "",
        "NAME: checkpoints/NAME takes the place of last.pth; it may be a published checkpoint",
        may_change=True,
    )
    evaluate: bool = arg(False, "evaluate --checkpoint instead of training", may_change=True, aliases=("-e",))
    seed: int = arg(
        0,
        "random seed of labeled subset, initial weights, image order and views",
        at_least=0,
        at_most=2**63 - 1,
    )
    device: str = arg(
        "auto", "auto (a GPU if there is one), cpu or cuda", choices=("auto", "cpu", "cuda"), may_change=True
    )
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
        may_change=True,
    )
    virtual_ranks: int = arg(
        0,
        "ranks of a step; processes share them evenly and run theirs in turn; 0: one per process",
        at_least=0,
        at_most=65536,
        may_change=True,
    )
    other_ranks: str = arg(
        "refuse",
        "when resuming with another number of ranks: refuse, or continue at the same step",
        choices=("refuse", "continue"),
        may_change=True,
    )
    timeout_minutes: float = arg(
        10.0,
        "minutes that a rank waits for another one before the run ends, naming that rank",
        above=0,
        at_most=10_000,
        may_change=True,
    )
    # data
    dataset: str = arg("imagenet", f"name of a data set: {', '.join(DATASETS)}")
    workers: int = arg(
        6,
        "worker processes that load training images, and again as many for test images",
        at_least=0,
        at_most=1024,
        may_change=True,
        aliases=("-j",),
    )
    batch_size: int = arg(
        8, "labeled images per rank and step (B)", above=0, at_most=100_000, aliases=("-b",)
    )
    mu: int = arg(5, "unlabeled images per labeled image", above=0, at_most=1000)
    labeled_sampler: str = arg(
        "infinite",
        "order of the labeled images: infinite (permutations follow one another, across epochs) or exact "
        "(each epoch has its own permutations, cut to its length, and shows every labeled image)",
        choices=("infinite", "exact"),
    )
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
    moco_path: str = arg(
        "", "MoCo checkpoint that initializes the backbone and projection head of a new run", may_change=True
    )
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
        may_change=True,
    )
    steps_per_epoch: int = arg(
        0, "number of steps in an epoch; 0: one pass over the unlabeled images", at_least=0, at_most=10**9
    )
    lr: float = arg(0.1, "learning rate after warm-up", above=0, at_most=1000, aliases=("--learning-rate",))
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
        replaced_by=("cos", "cos_7_16"),
    )
    momentum: float = arg(0.9, "momentum of SGD", at_least=0, at_most=1)
    nesterov: bool = arg(False, "use Nesterov momentum")
    wd: float = arg(
        1e-4,
        "weight decay of all parameters, including biases and BN",
        at_least=0,
        at_most=1000,
        aliases=("--weight-decay",),
    )
    no_decay_bn: bool = arg(False, "no weight decay of biases and BN parameters, as for CIFAR")
    # logging, evaluation and checkpoints
    print_freq: int = arg(
        20,
        "steps between two train events in the log",
        above=0,
        at_most=10**9,
        may_change=True,
        aliases=("-p",),
    )
    eval_freq: int = arg(
        1,
        "epochs between two evaluations, each of which also saves a checkpoint",
        above=0,
        at_most=10**9,
        may_change=True,
    )
    diagnose_freq: int = arg(
        0,
        "steps between diagnostics events (they take three steps' time); 0: with every evaluation",
        at_least=0,
        at_most=10**9,
        may_change=True,
    )
    save_freq: int = arg(
        0, "steps between two additional checkpoints; 0: none", at_least=0, at_most=10**9, may_change=True
    )
    on_save_error: str = arg(
        "stop",
        "if a checkpoint or the log cannot be written (disk full): stop, or continue and try again",
        choices=("stop", "continue"),
        may_change=True,
    )
    save_minutes: float = arg(
        0.0,
        "minutes between additional checkpoints, checked every --print-freq steps; 0: none",
        at_least=0,
        at_most=10**6,
        may_change=True,
    )


def _declared() -> list[tuple[str, Any, Any]]:
    """Return name, type and field of each setting that a method or a data set declares."""
    fields = {}
    for declared in (*DATASETS.values(), *METHODS.values()):
        for name, (default, text, *more) in declared.settings.items():
            kind = list[int] if isinstance(default, list) else type(default)
            fields[name] = name, kind, arg(default, text, **(more[0] if more else {}))
    return list(fields.values())


if TYPE_CHECKING:

    class Config(_Shared):
        """The settings of a run."""

        def __init__(self, **values: Any) -> None: ...

        # The settings that methods and data sets declare.
        def __getattr__(self, name: str) -> Any: ...
        def __setattr__(self, name: str, value: Any) -> None: ...

else:
    namespace = {"__module__": __name__, "__doc__": "The settings of a run."}
    Config = dataclasses.make_dataclass("Config", _declared(), bases=(_Shared,), namespace=namespace)

FIELDS = {f.name: f for f in dataclasses.fields(Config)}
MAY_CHANGE_ON_RESUME = frozenset(name for name, f in FIELDS.items() if f.metadata["may_change"])
ALIASES = {name: f.metadata["aliases"] for name, f in FIELDS.items() if f.metadata["aliases"]}
# Flags of the published command line that set another field.
SHORTHANDS = {
    "randaug": ("strong", "rand"),
    "stack": ("strong", "stack"),
    "multicrop": ("strong", "multicrop_224,multicrop_192,multicrop_160,multicrop_120,multicrop_96"),
}


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
