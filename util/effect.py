"""Which settings have an effect: those that the chosen method and data set use, unless another setting takes
their place. `train_semi.py` refuses the others, and config.yaml leaves them out.

The tables are here, and not beside the methods and data sets, because those import PyTorch, which takes
seconds: a mistake in the command line is reported before.
"""

from typing import Any

# method -> the fields that it uses, of those that not every method uses. The loop loads all views for every
# method, so mu and strong count as used by all.
_SIMMATCH = {"lambda_u", "lambda_in", "threshold", "st", "tt", "c_smooth", "DA", "da_len", "bank_m"}
METHOD_FIELDS = {
    "simmatch": _SIMMATCH | {"eman"},
    "simmatch_single": _SIMMATCH,
    "fixmatch": {"lambda_u", "threshold", "eman"},
    "supervised": set[str](),
}
# data set -> the fields that it uses, of those that not every data set uses
_CIFAR = {"data", "labels_per_class", "weak", "strong", "device_views"}
_IMAGENET = _CIFAR | {"split", "anno_percent", "image_size", "on_bad_image"}
DATASET_FIELDS = {
    "digits": {"labels_per_class"},
    "imagenet": _IMAGENET,
    "cifar10": _CIFAR,
    "cifar100": _CIFAR,
    "folder": _IMAGENET | {"unlabelled", "val", "val_share"},
}
# field -> the fields of which any one, if it is set, takes its place
REPLACED_BY = {
    "labels_per_class": ("split",),
    "anno_percent": ("split", "labels_per_class", "unlabelled"),
    "val_share": ("val",),
    "schedule": ("cos", "cos_7_16"),
}
# field -> the field without which it has no effect
NEEDS = {"da_len": "DA"}
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
    for name, others in REPLACED_BY.items():
        for other in others:
            if getattr(config, other) and other not in ends:
                ends.setdefault(name, f"with {other}, which takes its place")
    for name, needed in NEEDS.items():
        if not getattr(config, needed):
            ends.setdefault(name, f"without {needed}")
    return ends
