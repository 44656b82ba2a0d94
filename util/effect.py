"""Which settings have an effect: those that the chosen method and data set use, unless another setting takes
their place. `train_semi.py` refuses the others, and config.yaml leaves them out.
"""

from typing import Any

from util.declarations import DATASETS, METHODS
from util.fields import FIELDS

# method or data set -> the fields that it uses, of those that a method or a data set declares
METHOD_FIELDS = {name: declared.uses for name, declared in METHODS.items()}
DATASET_FIELDS = {name: declared.uses for name, declared in DATASETS.items()}
# Fields of published commands that are always accepted, although they do not change what a run does.
ALWAYS_ACCEPTED = {"evaluate", "norm", "start_epoch"}


def without_effect(config: Any) -> dict[str, str]:
    """Return the fields that have no effect in a config, each with the end of the sentence "… has no effect".

    config: an object with the fields of util.config.Config. A method or a data set that is not in the tables
    uses all fields.
    """
    ends: dict[str, str] = {}
    for kind, table in (("method", METHOD_FIELDS), ("dataset", DATASET_FIELDS)):
        choice, all_fields = getattr(config, kind), set[str]().union(*table.values())
        for name in sorted(all_fields - table.get(choice, all_fields)):
            users = [user for user, fields in table.items() if name in fields]
            for_users = " and ".join(filter(None, [", ".join(users[:-1]), users[-1]]))
            ends.setdefault(name, f"with {kind} {choice}: it is for {for_users}")
    for name, f in FIELDS.items():
        for other in f.metadata["replaced_by"]:
            if getattr(config, other) and other not in ends:
                ends.setdefault(name, f"with {other}, which takes its place")
        if f.metadata["needs"] and not getattr(config, f.metadata["needs"]):
            ends.setdefault(name, f"without {f.metadata['needs']}")
    return ends
