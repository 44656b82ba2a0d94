"""All settings of a run, each with its default, its meaning and its valid values.

Those that every method and data set share are in SETTINGS below. A method declares its own in its file in
models/, and a data set in its file in dataset/, as literals, which are read from the source here:
importing such a file would import PyTorch, which takes seconds, and --help and mistakes in the command line
do not wait for it. The literals are

SETTINGS: name -> (default, help text, valid values, further fields of Setting); the last two may be left out.
One file declares a setting.
USES: names of settings that another file declares and that this one uses too.
DEFAULTS: name -> default with this method, of shared settings and of those of data sets.
RULES: of a method, for the doctor: (name, description, advice, checks…), each check (number of diagnostics
events, key, condition, message), as util.inspect.detectors.Check says. LATE_TERMS: its loss terms that are
0 until they are in use -> (name of the note, diagnostic that is null until then, description). A method
with another one's rules names it: RULES = "simmatch".

Flags of the published code keep their names, defaults and meanings, so that a published command without
--config runs the published recipe.
"""

import ast
import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

LITERALS = {"METHODS", "DATASETS", "SETTINGS", "USES", "DEFAULTS", "RULES", "LATE_TERMS"}
ROOT = Path(__file__).resolve().parent.parent


class Setting(NamedTuple):
    """The declaration of a setting."""

    default: Any
    help: str
    valid: str | tuple[str, ...] = ()  # an interval of numbers, such as "(0, 1]", or the choices; (): any
    aliases: tuple[str, ...] = ()  # other spellings of the flag, most of them of the published command line
    replaced_by: tuple[str, ...] = ()  # settings each of which, if it is set, takes the place of this one
    needs: str = ""  # the setting without which this one has no effect
    may_change: bool = False  # whether a resume may change it, because it does not decide what a run computes

    @property
    def type(self) -> Any:
        return list[int] if isinstance(self.default, list) else type(self.default)

    @property
    def bounds(self) -> tuple[Any, Any]:
        return ast.literal_eval(f"({self.valid[1:-1]})")

    def broken_rule(self, value: Any) -> str:
        """Return what a value must be and `value` is not, or "" if it is valid."""
        if not isinstance(self.valid, str):
            valid = not self.valid or value in self.valid
            return "" if valid else f"{', '.join(self.valid[:-1])} or {self.valid[-1]}"
        (low, high), is_open = self.bounds, self.valid[0] == "("
        for number in value if isinstance(value, list) else [value]:
            too_low = number < low or is_open and number == low
            if self.valid == "[0, 1]" and (too_low or number > high):
                return "between 0 and 1"
            if too_low:
                return f"greater than {low}" if is_open else f"{low} or more"
            if number > high:
                return f"{high} or less"
        return ""


class Declared(NamedTuple):
    """What the file of a method or of a data set declares."""

    settings: dict[str, Setting]
    uses: set[str]  # all that have an effect, those of other files too
    defaults: dict[str, Any]
    rules: tuple[Any, ...] = ()
    late_terms: dict[str, tuple[str, ...]] = {}


def _literals(file: str) -> dict[str, Any]:
    values = {}
    for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(target := node.targets[0], ast.Name):
            if target.id in LITERALS:
                try:
                    values[target.id] = ast.literal_eval(node.value)
                except ValueError:
                    where = f"{file}, line {node.lineno}"
                    raise ValueError(f"{where}: {target.id} must hold only literals") from None
    return values


def _settings(literal: dict[str, tuple]) -> dict[str, Setting]:
    settings = {}
    for name, entry in literal.items():
        *values, further = entry if isinstance(entry[-1], dict) else (*entry, {})
        settings[name] = Setting(*values, **further)
    return settings


def _read(file: str, table: str) -> dict[str, Declared]:
    """Return what each entry of a table declares: name -> module, or module:class."""
    declared: dict[str, Declared] = {}
    for name, target in _literals(file)[table].items():
        found = _literals(target.partition(":")[0].replace(".", "/") + ".py")
        settings = _settings(found.get("SETTINGS", {}))
        uses = {*settings, *found.get("USES", ())}
        rules, late_terms = found.get("RULES", ()), found.get("LATE_TERMS", {})
        if isinstance(rules, str):
            *_, rules, late_terms = declared[rules]
        declared[name] = Declared(settings, uses, found.get("DEFAULTS", {}), rules, late_terms)
    return declared


METHODS = _read("models/__init__.py", "METHODS")
DATASETS = _read("dataset/build.py", "DATASETS")

# fmt: off
SETTINGS: dict[str, tuple] = {
    # what to run, and where results go
    "method": ("simmatch", f"name of a method: {', '.join(METHODS)}"),
    "output_dir": (
        "", "directory for all output; empty: checkpoints/<name of the config file or --checkpoint>",
        {"may_change": True}),
    "checkpoint": (
        "", "NAME: checkpoints/NAME takes the place of last.pth; it may be a published checkpoint. With a "
        "slash in it, it is a path, and NAME_best.pth beside it takes the place of best.pth",
        {"may_change": True}),
    "evaluate": (False, "evaluate --checkpoint instead of training",
        {"may_change": True, "aliases": ("-e",)}),
    "seed": (0, "random seed of labeled subset, initial weights, image order and views",
        "[0, 9223372036854775807]"),
    "device": ("auto", "auto (a GPU if there is one), cpu or cuda",
        ("auto", "cpu", "cuda"), {"may_change": True}),
    "precision": (
        "fp32", "autocast of the networks: fp32 (none), bf16, fp16; losses and weights stay in fp32",
        ("fp32", "bf16", "fp16")),
    "channels_last": (False, "use the channels_last memory format, which is faster on GPUs"),
    "compile": (False, "use torch.compile for the networks; the first steps then take minutes"),
    # ranks
    "port": (23456, "port where ranks started by srun meet; an offset that depends on the job ID is added",
        "(0, 65535]", {"may_change": True}),
    "virtual_ranks": (0, "ranks of a step; a process runs its share of them in turn; 0: one per process",
        "[0, 65536]", {"may_change": True}),
    "other_ranks": ("refuse", "if resumed with another number of ranks: refuse, or continue at the same step",
        ("refuse", "continue"), {"may_change": True}),
    "timeout_minutes": (10.0, "minutes that a rank waits for another before the run ends, naming that rank",
        "(0, 10_000]", {"may_change": True}),
    # data
    "dataset": ("imagenet", f"name of a data set: {', '.join(DATASETS)}"),
    "workers": (6, "worker processes that load training images, and again as many for test images",
        "[0, 1024]", {"may_change": True, "aliases": ("-j",)}),
    "batch_size": (8, "labeled images per rank and step (B)", "(0, 100_000]", {"aliases": ("-b",)}),
    "mu": (5, "unlabeled images per labeled image", "(0, 1000]"),
    "labeled_sampler": ("infinite",
        "order of the labeled images: infinite (permutations follow one another, across epochs) or exact "
        "(each epoch has its own permutations, cut to its length, and shows every labeled image)",
        ("infinite", "exact")),
    # network
    "backbone": ("resnet50_encoder", "name of a backbone in models/network.py"),
    "cls": (1000, "number of classes (C); must match the data; 0: taken from the data", "[0, 10_000_000]"),
    "dim": (128, "dimension of the embedding z (D)", "(0, 65536]"),
    "norm": ("None", "normalization of the backbone: None or BN, which both mean batch norm per rank",
        ("None", "BN")),
    "norm_feat": (False, "LayerNorm on the feature that classifier and projection head read (SimMatchV2)"),
    "moco_path": ("", "MoCo checkpoint that initializes the backbone and projection head of a new run",
        {"may_change": True}),
    # optimization: SGD
    "epochs": (200, "number of epochs: passes over the unlabeled images, or --steps-per-epoch steps each",
        "(0, 1_000_000]"),
    "start_epoch": (0, "for published commands: a new run needs 0, a resumed one starts at its own step",
        "[0, 1_000_000]", {"may_change": True}),
    "steps_per_epoch": (0, "number of steps in an epoch; 0: one pass over the unlabeled images",
        "[0, 1_000_000_000]"),
    "lr": (0.1, "learning rate after warm-up", "(0, 1000]", {"aliases": ("--learning-rate",)}),
    "warmup_epoch": (0, "epochs of linear learning-rate warm-up", "[0, 1_000_000]"),
    "cos": (False, "cosine decay of the learning rate to 0, updated once per epoch; otherwise --schedule"),
    "cos_7_16": (False, "FixMatch's decay, at every step: lr * cos(7 pi / 16 * share of the steps done)"),
    "schedule": ([120, 160], "without --cos and --cos-7-16: epochs at which the rate is divided by 10",
        "[0, 1_000_000]", {"replaced_by": ("cos", "cos_7_16")}),
    "momentum": (0.9, "momentum of SGD", "[0, 1]"),
    "nesterov": (False, "use Nesterov momentum"),
    "wd": (1e-4, "weight decay of all parameters, including biases and BN",
        "[0, 1000]", {"aliases": ("--weight-decay",)}),
    "no_decay_bn": (False, "no weight decay of biases and BN parameters, as for CIFAR"),
    # logging, evaluation and checkpoints
    "print_freq": (20, "steps between two train events in the log",
        "(0, 1_000_000_000]", {"may_change": True, "aliases": ("-p",)}),
    "eval_freq": (1, "epochs between two evaluations, each of which also saves a checkpoint",
        "(0, 1_000_000_000]", {"may_change": True}),
    "diagnose_freq": (
        0, "steps between diagnostics events (a step's time for each loss term); 0: with every evaluation",
        "[0, 1_000_000_000]", {"may_change": True}),
    "save_freq": (0, "steps between two additional checkpoints; 0: none",
        "[0, 1_000_000_000]", {"may_change": True}),
    "on_save_error": ("stop", "if a checkpoint or the log cannot be written: stop, or continue and try again",
        ("stop", "continue"), {"may_change": True}),
    "save_minutes": (0.0, "minutes between additional checkpoints, checked every --print-freq steps; 0: none",
        "[0, 1_000_000]", {"may_change": True}),
}
# fmt: on
SHARED = _settings(SETTINGS) | {n: f for data_set in DATASETS.values() for n, f in data_set.settings.items()}
FIELDS = SHARED | {n: f for method in METHODS.values() for n, f in method.settings.items()}
MAY_CHANGE_ON_RESUME = frozenset(name for name, f in FIELDS.items() if f.may_change)
# Flags of the published command line that set another field.
SHORTHANDS = {
    "randaug": ("strong", "rand"),
    "stack": ("strong", "stack"),
    "multicrop": ("strong", "multicrop_224,multicrop_192,multicrop_160,multicrop_120,multicrop_96"),
    "fp16": ("precision", "fp16"),
}


class Config(SimpleNamespace):
    """The settings of a run, each an attribute. One that is not given has the default of the method."""

    def __init__(self, **values: Any):
        if unknown := values.keys() - FIELDS.keys():
            raise TypeError(f"unknown settings: {', '.join(sorted(unknown))}")
        method = values.get("method", FIELDS["method"].default)
        super().__init__(**copy.deepcopy(defaults_of(method) | values))


def defaults_of(method: str) -> dict[str, Any]:
    """Return the default of every setting with a method, which may be unknown."""
    own = METHODS[method].defaults if method in METHODS else {}
    return {name: f.default for name, f in FIELDS.items()} | own


def _check_defaults(method: str, defaults: dict[str, Any]) -> None:
    for name, value in defaults.items():
        problem = "is not a shared setting"
        if name in SHARED:
            fits = type(value) is type(SHARED[name].default)
            problem = SHARED[name].broken_rule(value) if fits else SHARED[name].type.__name__
            problem = problem and f"must be {problem}, not {value!r}"
        if problem:
            raise ValueError(f"DEFAULTS of the method {method}: {name!r} {problem}")


for _name, _method in METHODS.items():
    _check_defaults(_name, _method.defaults)
