"""The diagnostics event: numbers about one step and about the pseudo-labels since the last such event."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import Tensor

from util import dist_utils
from util.errors import UserError
from util.run.log import Logger

# Of every method; a value that there is not is null.
PSEUDO_LABEL_KEYS = (
    *("pseudo_labels", "mask", "pseudo_acc", "confident_acc", "marginal_kl"),
    *("marginal_min", "marginal_max", "starved", "most", "least"),
)
NUM_EXTREMES = 5  # classes named in `most` and in `least`


def event_keys(loss_names: Iterable[str], diagnostic_names: Iterable[str]) -> list[str]:
    """Return the keys of the event in the order of the log; docs/DOCTOR.md explains each one."""
    terms = [name.removeprefix("loss_") for name in loss_names]
    parts = [f"{part}_{term}" for part in ("share", "grad") for term in terms]
    return ["epoch", "steps_per_epoch", *parts, *PSEUDO_LABEL_KEYS, *diagnostic_names, "not_finite"]


def diagnostics_event(
    epoch: int,
    steps_per_epoch: int,
    loss_names: Sequence[str],
    diagnostic_names: Sequence[str],
    diag: Mapping[str, Tensor | float],
    counts: Tensor | None,
    labels: np.ndarray,
    classes: Sequence[str],
) -> dict[str, Any]:
    """Return the values of the event, the same on every rank. All ranks must call it.

    loss_names, diagnostic_names: columns that the event always has (models/method.py). diag: what
    models.diagnose returned on this rank, and numbers that are the same on all ranks. counts: what
    Meter.take_counts returned. labels [K]: of the labeled images. classes [C]: names.
    """
    values: dict[str, Any] = {
        name: dist_utils.all_mean(value.float()).tolist() if isinstance(value, Tensor) else value
        for name, value in diag.items()
    }
    reference = np.bincount(labels, minlength=len(classes)) / len(labels)  # [C]
    for name in [name for name, value in values.items() if isinstance(value, list)]:
        values[f"{name}_kl"] = kl(np.asarray(values.pop(name)), reference)
    losses = {name: value for name, value in values.items() if name.startswith("loss_")}
    others = {name: value for name, value in values.items() if name not in losses}
    own = dict.fromkeys([*diagnostic_names, *(name for name in others if not name.startswith("grad_"))])
    out = dict.fromkeys(event_keys(dict.fromkeys([*loss_names, *losses]), own))
    total = sum(losses.values())
    out |= {"epoch": epoch, "steps_per_epoch": steps_per_epoch, **others}
    out |= {f"share_{name[5:]}": value / total if total else None for name, value in losses.items()}
    if counts is not None:
        out |= marginal(counts.numpy(), reference, classes)
    bad = [key for key, value in out.items() if isinstance(value, float) and not math.isfinite(value)]
    not_finite = bad + [name for name, value in losses.items() if not math.isfinite(value)]
    return out | dict.fromkeys(bad) | {"not_finite": not_finite}  # JSON has no NaN


def marginal(counts: np.ndarray, reference: np.ndarray, classes: Sequence[str]) -> dict[str, Any]:
    """Describe the class distribution of the pseudo-labels. reference [C]: that of the labeled images.

    counts [2 or 4, C]: as Meter.take_counts returns them.
    """
    n = int(counts[0].sum())
    share = counts[0] / n  # [C]
    order = np.argsort(share - reference, kind="stable")  # [C]
    confident = int(counts[1].sum())
    out = {
        "pseudo_labels": n,
        "mask": confident / n,
        "marginal_kl": kl(share, reference),
        "marginal_min": float(share.min()),
        "marginal_max": float(share.max()),
        "starved": int((share < reference / 10).sum()),
        "most": [[classes[c], float(share[c])] for c in order[::-1][:NUM_EXTREMES]],
        "least": [[classes[c], float(share[c])] for c in order[:NUM_EXTREMES]],
    }
    if len(counts) == 4:
        out |= {
            "pseudo_acc": int(counts[2].sum()) / n,
            "confident_acc": int(counts[3].sum()) / confident if confident else None,
        }
    return out


def kl(p: np.ndarray, reference: np.ndarray) -> float:
    """Return KL(p ‖ reference) in nats, with p [C] normalized to sum 1. The reference of a class without
    labeled images counts as 1e-12.
    """
    p = p / p.sum()
    positive = ~(p <= 0)  # keeps NaN, so that the result shows it
    return float((p[positive] * np.log(p[positive] / reference[positive].clip(1e-12))).sum())


@contextmanager
def log_stop_reason(log: Logger, step: int) -> Iterator[None]:
    """Log a UserError raised in this context as a stop event, so that the log says why the run ended."""
    try:
        yield
    except UserError as error:
        log.write("stop", step, {"why": str(error)})
        raise
