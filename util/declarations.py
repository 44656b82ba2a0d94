"""The settings that methods and data sets declare beside their code, read from the source of their files.

Importing such a file would import PyTorch, which takes seconds, and --help and mistakes in the command line
do not wait for it. So the declarations are literals at the top of a file:

SETTINGS: name -> the arguments of util.fields.arg. A setting is declared in one file, and others name it.
USES: the settings of other files that this one uses too. Without it: none.
DEFAULTS: what a published command line of the method leaves open. Without it: SimMatch's choices.
"""

import ast
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Declared(NamedTuple):
    settings: dict[str, dict[str, Any]]  # those that are declared in this file
    uses: set[str]  # all that have an effect
    defaults: dict[str, str]


@cache
def _literals(file: str) -> dict[str, Any]:
    values = {}
    for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(target := node.targets[0], ast.Name):
            if target.id in ("METHODS", "DATASETS", "SETTINGS", "USES", "DEFAULTS"):
                values[target.id] = ast.literal_eval(node.value)
    return values


def _read(file: str, table: str) -> dict[str, Declared]:
    """Return what each entry of a table declares: name -> module, or module:class."""
    declared = {}
    for name, target in _literals(file)[table].items():
        found = _literals(target.partition(":")[0].replace(".", "/") + ".py")
        settings = found.get("SETTINGS", {})
        declared[name] = Declared(settings, {*settings, *found.get("USES", ())}, found.get("DEFAULTS", {}))
    return declared


METHODS = _read("models/__init__.py", "METHODS")
DATASETS = _read("dataset/build.py", "DATASETS")
