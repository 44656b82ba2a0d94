"""The settings that methods and data sets declare beside their code, read from the source of their files.

Importing such a file would import PyTorch, which takes seconds, and --help and mistakes in the command line
do not wait for it. So the declarations are literals at the top of a file:

SETTINGS: name -> (default, help text) or (default, help text, further arguments of util.fields.arg). One file
declares a setting.
USES: names of settings that another file declares and that this one uses too.
DEFAULTS: what published command lines of a method leave open, where it is another choice than that of
SimMatch, which is the `DEFAULTS` below.
RULES: of a method, for the doctor: (name, description, advice, checks…), each check (number of diagnostics
events, key, condition, message), as util.inspect.detectors.Check says. LATE_TERMS: its loss terms that are
0 until they are in use -> (name of the note, diagnostic that is null until then, description). A method
with another one's rules names it: RULES = "simmatch".
"""

import ast
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

DEFAULTS = {"split": "simmatch"}  # whose lists --anno-percent 0.01 and 0.1 mean for ImageNet
NAMES = {"METHODS", "DATASETS", "SETTINGS", "USES", "DEFAULTS", "RULES", "LATE_TERMS"}
ROOT = Path(__file__).resolve().parent.parent


class Declared(NamedTuple):
    settings: dict[str, tuple[Any, ...]]  # those that are declared in this file
    uses: set[str]  # all that have an effect
    defaults: dict[str, str]
    rules: tuple[Any, ...] = ()
    late_terms: dict[str, tuple[str, ...]] = {}


@cache
def _literals(file: str) -> dict[str, Any]:
    values = {}
    for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(target := node.targets[0], ast.Name):
            if target.id in NAMES:
                try:
                    values[target.id] = ast.literal_eval(node.value)
                except ValueError:
                    where = f"{file}, line {node.lineno}"
                    raise ValueError(f"{where}: {target.id} must hold only literals") from None
    return values


def _read(file: str, table: str) -> dict[str, Declared]:
    """Return what each entry of a table declares: name -> module, or module:class."""
    declared: dict[str, Declared] = {}
    for name, target in _literals(file)[table].items():
        found = _literals(target.partition(":")[0].replace(".", "/") + ".py")
        settings = found.get("SETTINGS", {})
        uses, defaults = {*settings, *found.get("USES", ())}, DEFAULTS | found.get("DEFAULTS", {})
        rules, late_terms = found.get("RULES", ()), found.get("LATE_TERMS", {})
        if isinstance(rules, str):
            *_, rules, late_terms = declared[rules]
        declared[name] = Declared(settings, uses, defaults, rules, late_terms)
    return declared


METHODS = _read("models/__init__.py", "METHODS")
DATASETS = _read("dataset/build.py", "DATASETS")
