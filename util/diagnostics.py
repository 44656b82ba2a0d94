"""The diagnostics event: what a look at a step and the pseudo-labels since the last one come to, in a few
numbers.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import Tensor

from util import dist_utils
from util.errors import UserError
from util.log import Logger

# In this order in the log; docs/DOCTOR.md says what each is. What a method does not have is null.
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
EXTREMES = 5  # classes named as given too often, and as many too rarely


def diagnostics(
    epoch: int,
    steps_per_epoch: int,
    labels_per_step: int,
    diag: dict[str, Tensor],
    counts: Tensor | None,
    labels: np.ndarray,
    classes: Sequence[str],
    ages: np.ndarray,
) -> dict[str, Any]:
    """The values of the event, the same on every rank; all ranks must call it.

    labels_per_step: labeled images of all ranks in a step. looked: what models.diagnose gave, on this rank.
    counts: Meter.take_counts(). labels [K]: of the labeled list. classes [C]: their names. ages [K]: of its
    rows (dataset/bank_age.py).
    """
    values = {name: dist_utils.all_mean(value.float()).tolist() for name, value in diag.items()}
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
        seen = ages[ages >= 0]
        out |= {
            "bank_rows": len(ages),
            "bank_unwritten": len(ages) - len(seen),
            "bank_age_median": float(np.median(seen)),
            "bank_age_max": int(seen.max()),
            "bank_pass": math.ceil(len(ages) / labels_per_step),
        }
    bad = [key for key, value in out.items() if isinstance(value, float) and not math.isfinite(value)]
    bad += [name for name, value in values.items() if name.startswith("loss_") and not math.isfinite(value)]
    return out | dict.fromkeys(key for key in bad if key in KEYS) | {"not_finite": bad}  # JSON has no NaN


def marginal(counts: np.ndarray, reference: np.ndarray, classes: Sequence[str]) -> dict[str, Any]:
    """How pseudo-labels are shared among the classes, against the labeled images' shares `reference` [C].

    counts [2 or 4, C]: rows of Meter.take_counts.
    """
    given, n = counts[0], int(counts[0].sum())
    share = given / n  # [C]
    order = np.argsort(share - reference, kind="stable")  # [C]
    confident = int(counts[1].sum())
    out = {
        "pseudo_labels": n,
        "mask": confident / n,
        "marginal_kl": kl(share, reference),
        "marginal_min": float(share.min()),
        "marginal_max": float(share.max()),
        "starved": int((share < reference / 10).sum()),
        "most": [[classes[c], float(share[c])] for c in order[::-1][:EXTREMES]],
        "least": [[classes[c], float(share[c])] for c in order[:EXTREMES]],
    }
    if len(counts) == 4:
        out |= {
            "pseudo_acc": int(counts[2].sum()) / n,
            "confident_acc": int(counts[3].sum()) / confident if confident else None,
        }
    return out


def kl(p: np.ndarray, reference: np.ndarray) -> float:
    """KL(p ‖ reference) in nats; p [C] is made to sum to 1. A class of which no image is labeled counts as a
    share of 1e-12.
    """
    p = p / p.sum()
    here = ~(p <= 0)  # NaN is here too: it is to be seen
    return float((p[here] * np.log(p[here] / reference[here].clip(1e-12))).sum())


@contextmanager
def log_stop_reason(log: Logger, step: int) -> Iterator[None]:
    """A UserError that ends the run in this context is an event too: the log then says why it ends there."""
    try:
        yield
    except UserError as error:
        log.write("stop", step, {"why": str(error)})
        raise
