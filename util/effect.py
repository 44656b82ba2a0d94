"""Which settings have an effect: those that the chosen method and data set use, unless another setting takes
their place. `train_semi.py` refuses the others, and config.yaml leaves them out.
"""

from typing import Any

from util.fields import DATASETS, FIELDS, METHODS

# Fields of published commands that are always accepted, although they do not change what a run does.
ALWAYS_ACCEPTED = {"evaluate", "norm", "start_epoch"}


def without_effect(config: Any) -> dict[str, str]:
    """Return the fields that have no effect in a config, each with the end of the sentence "… has no effect".

    config: an object with the fields of util.config.Config. A method or a data set that is not in the tables
    uses all fields.
    """
    ends: dict[str, str] = {}
    for kind, table in (("method", METHODS), ("dataset", DATASETS)):
        choice = getattr(config, kind)
        declared = set[str]().union(*(entry.uses for entry in table.values()))
        for name in sorted(declared - table[choice].uses) if choice in table else ():
            *others, last = (user for user, entry in table.items() if name in entry.uses)
            users = f"{', '.join(others)} and {last}" if others else last
            ends.setdefault(name, f"with {kind} {choice}: it is for {users}")
    for name, f in FIELDS.items():
        for other in f.replaced_by:
            if getattr(config, other) and other not in ends:
                ends.setdefault(name, f"with {other}, which takes its place")
        if f.needs and not getattr(config, f.needs):
            ends.setdefault(name, f"without {f.needs}")
    return ends
