"""The settings of a run: a YAML file sets values, and flags override them. util/fields.py has the fields.

An unknown key, a value of the wrong type or out of its bounds, and a setting without effect are errors.
"""

import copy
import difflib
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from util.config_file import plain_value, read_mapping, to_text
from util.effect import ALWAYS_ACCEPTED, without_effect
from util.errors import Parser, UserError
from util.fields import (
    DATASETS,
    FIELDS,
    MAY_CHANGE_ON_RESUME,
    METHODS,
    SHARED,
    SHORTHANDS,
    Config,
    defaults_of,
)

TYPE_NAMES: dict[Any, str] = {
    bool: "bool (true or false)",
    int: "int (in decimal digits)",
    float: "float (such as 0.1 or 1e-4)",
    str: "str",
    list[int]: "list of int (in decimal digits)",
}
LONG_ALIASES = {alias: name for name, f in FIELDS.items() for alias in f.aliases if alias.startswith("--")}


def parse(argv: Sequence[str], description: str) -> Config:
    """Return the Config of a command line: the values of `--config FILE`, overridden by flags. Raises
    UserError.
    """
    parser = _parser(description)
    known, unknown = parser.parse_known_args(argv)
    if unknown and not unknown[0].startswith("-"):
        raise UserError(
            f"unexpected {unknown[0]!r} on the command line: a setting is --name VALUE, and a config file is "
            "--config FILE"
        )
    if unknown:
        names = [*map(_flag, FIELDS), "--config", *(f"--{name}" for name in SHORTHANDS), *LONG_ALIASES]
        raise _unknown("flag", unknown[0].split("=")[0], "on the command line", dict(zip(names, names)))
    in_file = read_yaml(known.config) if known.config else {}
    where = {name: f"{name} in {known.config}" for name in in_file}
    flags = {}
    for name in FIELDS:
        if getattr(known, name) is not None:
            where[name] = _flag(name)
            flags[name] = coerce(name, getattr(known, name), where[name])
    for flag, (name, value) in SHORTHANDS.items():
        if getattr(known, flag):
            if name in flags:
                raise UserError(f"--{flag} and {where[name]} both set {name}: give one of them")
            flags[name], where[name] = value, f"--{flag}"
    config = Config(**{**in_file, **flags})
    if not known.config and not config.checkpoint:
        raise UserError("give --config FILE or --checkpoint NAME, for example --config configs/digits.yaml")
    if not config.output_dir:
        config.output_dir = os.path.join("checkpoints", Path(config.checkpoint or known.config).stem)
    for name, table in (("method", METHODS), ("dataset", DATASETS)):
        if getattr(config, name) not in table:
            raise UserError(f"unknown {name} {getattr(config, name)!r}; known: {', '.join(table)}")
    validate(config, where)
    _refuse_without_effect(config, in_file, flags, where)
    return config


def _parser(description: str) -> Parser:
    parser = Parser(description)
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="YAML file with any of the settings below; without it the defaults are those of the published "
        "code, for ImageNet",
    )
    nargs: dict[Any, dict[str, Any]] = {bool: {"nargs": "?", "const": "true"}, list[int]: {"nargs": "*"}}
    for name, f in FIELDS.items():
        parser.add_argument(
            *dict.fromkeys([*f.aliases, _flag(name), f"--{name}"]),
            dest=name,
            metavar=TYPE_NAMES[f.type].partition(" (")[0].upper(),
            help=f"{f.help} ({_notes(name)})",
            **nargs.get(f.type, {}),
        )
    for flag, (name, value) in SHORTHANDS.items():
        parser.add_argument(f"--{flag}", action="store_true", help=f"the same as --{name} {value}")
    return parser


def _notes(name: str) -> str:
    """Return for --help which methods or data sets use a setting, unless all do, and its defaults."""
    notes = []
    for table in (METHODS, DATASETS):
        users = [user for user, declared in table.items() if name in declared.uses]
        if 0 < len(users) < len(table):
            notes.append(f"for {', '.join(users)}")
    notes.append(f"default: {FIELDS[name].default!r}")
    own = {method: declared.defaults for method, declared in METHODS.items() if name in declared.defaults}
    return "; ".join([*notes, *(f"with {method}: {defaults[name]!r}" for method, defaults in own.items())])


def read_yaml(path: str) -> dict[str, Any]:
    """Return the values in a config file, each as the type of its field. Raises UserError."""
    return coerce_values(read_mapping(path), path)


def coerce_values(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return `values`, each as the type of its field. Raises UserError, which names `where`."""
    for key in values:
        if key not in FIELDS:
            raise _unknown("key", str(key), f"in {where}", {**dict(zip(FIELDS, FIELDS)), **LONG_ALIASES})
    return {key: coerce(key, value, f"{key} in {where}") for key, value in values.items()}


def coerce(name: str, value: Any, where: str) -> Any:
    """Return `value`, from YAML or the text of a flag, as the type of the field `name`. Raises UserError."""
    kind: Any = FIELDS[name].type
    try:
        if kind == list[int]:
            if isinstance(value, list):
                return [_scalar(int, v) for v in value]
        else:
            return _scalar(kind, value)
    except (ValueError, TypeError, OverflowError):
        pass
    raise UserError(f"{where}: expected {TYPE_NAMES[kind]}, got {value!r:.100}")


def _scalar(kind: Any, value: Any) -> Any:
    if isinstance(value, str) and kind is not str:
        value = plain_value(value)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise ValueError(value)
    if kind is str and "\0" in value:
        raise ValueError(value)
    return value


def validate(config: Config, where: Mapping[str, str] | None = None) -> Config:
    """Check what does not depend on the method or the data set. Raises UserError if a value is not valid.

    where: how a message names a field, if not by its name: as a flag, or with the file that sets it.
    """

    def must(ok: bool, name: str, rule: str) -> None:
        if not ok:
            raise UserError(f"{(where or {}).get(name, name)} must be {rule}, got {getattr(config, name)!r}")

    for name, f in FIELDS.items():
        rule = f.broken_rule(getattr(config, name))
        must(not rule, name, rule)
    must(not config.checkpoint or not config.checkpoint.endswith(("/", "..")), "checkpoint", "a file")
    if config.evaluate and not config.checkpoint:
        raise UserError(
            "--evaluate needs --checkpoint NAME, a file in checkpoints/, or a path with a slash in it"
        )
    must(not (config.cos and config.cos_7_16), "cos_7_16", "false if cos is true: choose one of them")
    must(not config.nesterov or config.momentum > 0, "momentum", "greater than 0 with nesterov")
    return config


def _refuse_without_effect(
    config: Config, in_file: Mapping[str, Any], flags: Mapping[str, Any], where: Mapping[str, str]
) -> None:
    """Raise UserError for a setting that is given, is not the default, and has no effect.

    A flag must have an effect in `config`; a value of the file, in `config` or in the file alone, because a
    flag such as --method may choose something else than the file. A flag of another method is refused at its
    default too: without --method, SimMatchV2's published command would train SimMatch. With --evaluate all
    settings are accepted, as the published commands need it.
    """
    if config.evaluate:
        return
    ends = without_effect(config)
    # Earlier versions wrote every field into config.yaml, and only they wrote these.
    written_by_earlier_version = ALWAYS_ACCEPTED <= in_file.keys()
    in_file_alone = {} if written_by_earlier_version else without_effect(Config(**in_file))
    defaults = defaults_of(config.method)
    for name, end in ends.items():
        given = name in flags or name in in_file and name in in_file_alone
        of_another_method = name in flags and name not in SHARED and name not in METHODS[config.method].uses
        if of_another_method or given and getattr(config, name) != defaults[name]:
            raise UserError(f"{where[name]} has no effect {end}")


def to_dict(config: Config) -> dict[str, Any]:
    return copy.deepcopy(vars(config))


def to_yaml(config: Config) -> str:
    """Return a config file of the same run, with the settings that have an effect."""
    return to_text(_with_effect(config))


def changed_settings(before: Mapping[str, Any], config: Config) -> list[str]:
    """Describe each setting that differs from that of an earlier run, has an effect, and decides what a run
    computes. before: the settings of the earlier run, with or without those that have no effect. A setting
    that it does not name had the default of the method.
    """
    earlier = {**defaults_of(config.method), **before}
    return [
        f"{name} was {earlier[name]!r} and is now {value!r}"
        for name, value in _with_effect(config).items()
        if name not in MAY_CHANGE_ON_RESUME and earlier[name] != value
    ]


def _with_effect(config: Config) -> dict[str, Any]:
    unused = without_effect(config).keys() | ALWAYS_ACCEPTED
    return {name: value for name, value in to_dict(config).items() if name not in unused}


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _unknown(what: str, text: str, where: str, names: Mapping[str, str]) -> UserError:
    """Return the error for an unknown flag or key, with the value in `names` of the name nearest to it."""

    def plain(name: str) -> str:
        return name.lower().lstrip("-").replace("-", "_")

    values = {plain(name): value for name, value in names.items()}
    begins = [name for name in values if len(plain(text)) > 2 and name.startswith(plain(text))]
    near = difflib.get_close_matches(plain(text), begins or values, n=1, cutoff=0.0 if begins else 0.7)
    every = "flag" if what == "flag" else "setting"
    hint = f"no known one is near; --help lists every {every}"
    if near:
        hint = f"the nearest known one is {values[near[0]]!r}"
    return UserError(f"unknown {what} {text!r:.100} {where}; {hint}")
