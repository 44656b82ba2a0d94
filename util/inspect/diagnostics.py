"""The diagnostics event: numbers about one step and about the pseudo-labels since the last such event."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import Tensor

from util import dist_utils
from util.errors import UserError
from util.run.log import Logger

# In the order of the log; docs/DOCTOR.md explains each one. A value that a method does not have is null.
KEYS = (
    "epoch",
    "steps_per_epoch",
    "share_x",
    "share_u",
    "share_in",
    "grad_x",
    "grad_u",
    "grad_in",
    "pseudo_labels",
    "mask",
    "pseudo_acc",
    "confident_acc",
    "marginal_kl",
    "marginal_min",
    "marginal_max",
    "starved",
    "most",
    "least",
    "prior_kl",
    "q_entropy",
    "bank_rows",
    "bank_drift",
    "bank_unwritten",
    "bank_age_median",
    "bank_age_max",
    "bank_pass",
    "not_finite",
)
NUM_EXTREMES = 5  # classes named in `most` and in `least`


def diagnostics_event(
    epoch: int,
    steps_per_epoch: int,
    labels_per_step: int,
    diag: dict[str, Tensor],
    counts: Tensor | None,
    labels: np.ndarray,
    classes: Sequence[str],
    ages: np.ndarray,
) -> dict[str, Any]:
    """Return the values of the event, the same on every rank. All ranks must call it.

    labels_per_step: labeled images of all ranks in a step. diag: what models.diagnose returned on this rank.
    counts: what Meter.take_counts returned. labels [K]: of the labeled images. classes [C]: names. ages [K]:
    steps since each bank row was written, negative if never (dataset/bank_age.py).
    """
    values: dict[str, Any] = {
        name: dist_utils.all_mean(value.float()).tolist() for name, value in diag.items()
    }
    reference = np.bincount(labels, minlength=len(classes)) / len(labels)  # [C]
    losses = {name[5:]: value for name, value in values.items() if name.startswith("loss_")}
    total = sum(losses.values())
    out = dict.fromkeys(KEYS) | {key: value for key, value in values.items() if key in KEYS}
    out |= {"epoch": epoch, "steps_per_epoch": steps_per_epoch}
    out |= {f"share_{name}": value / total if total else None for name, value in losses.items()}
    if counts is not None:
        out |= marginal(counts.numpy(), reference, classes)
    if "prior" in values:
        out["prior_kl"] = kl(np.asarray(values["prior"]), reference)
    if "bank_rows" in values:
        written = ages[ages >= 0]
        out |= {
            "bank_rows": len(ages),
            "bank_unwritten": len(ages) - len(written),
            "bank_age_median": float(np.median(written)),
            "bank_age_max": int(written.max()),
            "bank_pass": math.ceil(len(ages) / labels_per_step),
        }
    bad = [key for key, value in out.items() if isinstance(value, float) and not math.isfinite(value)]
    bad += [name for name, value in values.items() if name.startswith("loss_") and not math.isfinite(value)]
    return out | dict.fromkeys(key for key in bad if key in KEYS) | {"not_finite": bad}  # JSON has no NaN


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
