"""Symptoms of a broken run: functions of its events, each of which finds one or nothing. util/rules.py has
them in words.
"""

import math
from collections.abc import Callable
from statistics import fmean, median
from typing import Any, NamedTuple

from util.config import Config
from util.schedule import learning_rate

Event = dict[str, Any]


class Run(NamedTuple):
    """A run as its log tells it; events in order."""

    config: Config
    trains: list[Event]
    evals: list[Event]
    diagnostic_events: list[Event]  # diagnostics
    stops: list[Event]
    steps_per_epoch: int | None  # None before the first evaluation or diagnostics

    def after_warmup(self, events: list[Event]) -> list[Event]:
        """Those after the first epoch and the warm-up, before which much is allowed to look odd."""
        if self.steps_per_epoch is None:
            return []
        return [e for e in events if e["step"] > max(1, self.config.warmup_epoch) * self.steps_per_epoch]


class Finding(NamedTuple):
    what: str
    first: int  # steps between which it is seen
    last: int


def _latest(events: list[Event], key: str, n: int, bad: Callable[[float], bool], what: str) -> Finding | None:
    """A finding if `key` of each of the last `n` events is there and bad. what: takes {n}, {first}, {last}
    values.
    """
    end = events[-n:]
    if len(end) < n or not all(e.get(key) is not None and bad(e[key]) for e in end):
        return None
    start = len(events) - n
    while start and events[start - 1].get(key) is not None and bad(events[start - 1][key]):
        start -= 1
    seen = events[start:]
    return Finding(what.format(n=len(seen), value=seen[-1][key]), seen[0]["step"], seen[-1]["step"])


def _first(findings: Any) -> Finding | None:
    return next((finding for finding in findings if finding), None)


def _better_than_guessing(accuracy: float, classes: int) -> float:
    """0 for a guess among `classes`, 1 for always right (Cohen's kappa for balanced classes)."""
    return (accuracy - 1 / classes) / (1 - 1 / classes)


def _accuracy(run: Run) -> float | None:
    """How right the teacher is, last: of pseudo-labels where hidden labels exist, else on the test images; 0
    to 1.
    """
    if run.trains and run.trains[-1]["pseudo_acc"] is not None:
        return fmean(e["pseudo_acc"] for e in run.trains[-3:])
    return run.evals[-1]["teacher_top1"] / 100 if run.evals else None


def _has_bank(run: Run, events: list[Event]) -> list[Event]:
    """Settled events from which on the bank is used: it was at the diagnostics, or, without any, after the
    second epoch.
    """
    used = [e["step"] for e in run.diagnostic_events if e["q_entropy"] is not None]
    start = used[0] if used else math.inf if run.diagnostic_events else 2 * (run.steps_per_epoch or 0)
    return [e for e in run.after_warmup(events) if e["step"] > start]


def not_finite(run: Run) -> Finding | None:
    for e in run.diagnostic_events:
        bad = [
            name for name in e["not_finite"] if run.config.precision != "fp16" or not name.startswith("grad_")
        ]
        if bad:
            return Finding(f"{', '.join(bad)} not finite", e["step"], e["step"])
    return _first(Finding(e["why"].split(";")[0], e["step"], e["step"]) for e in run.stops)


def exploding(run: Run) -> Finding | None:
    bound = 3 * math.log(run.config.cls)
    bad = [e for e in run.trains if e["loss_x"] > bound]
    return Finding(f"loss_x is {bad[0]['loss_x']:.3g}", bad[0]["step"], bad[-1]["step"]) if bad else None


def not_learning(run: Run) -> Finding | None:
    guess = math.log(run.config.cls)
    return _latest(
        run.after_warmup(run.trains),
        "loss_x",
        5,
        lambda v: v >= 0.95 * guess,
        f"loss_x is {{value:.3g}}, a guess has {guess:.3g}",
    )


def dead_term(run: Run) -> Finding | None:
    def find(name: str, events: list[Event]) -> Finding | None:
        shares = [
            {"step": e["step"], "share": e[name] / e["loss"]}
            for e in events
            if e[name] is not None and e["loss"] > 0
        ]
        return _latest(
            shares,
            "share",
            5,
            lambda v: v < 1e-6,
            f"{name} is {{value:.1g}} of the loss in {{n}} train events",
        )

    c = run.config
    return _first(
        [
            c.lambda_u and find("loss_u", run.after_warmup(run.trains)),
            c.lambda_in and find("loss_in", _has_bank(run, run.trains)),
        ]
    )


def mask_at_0(run: Run) -> Finding | None:
    return _latest(
        run.after_warmup(run.trains), "mask", 5, lambda v: v < 1e-4, "mask is {value:.2g} in {n} train events"
    )


def mask_at_1(run: Run) -> Finding | None:
    right = _accuracy(run)
    if right is None or right >= 0.9:
        return None
    return _latest(
        run.after_warmup(run.trains),
        "mask",
        5,
        lambda v: v > 0.999,
        f"mask is {{value:.4f}} in {{n}} train events, but the teacher is right on {100 * right:.1f} %",
    )


def _threes(events: list[Event], key: str) -> list[float]:
    """Means over every three neighboring events."""
    values = [e[key] for e in events]
    return [fmean(values[i : i + 3]) for i in range(len(values) - 2)] if None not in values else []


def mask_falling(run: Run) -> Finding | None:
    events = run.after_warmup(run.trains)
    means = _threes(events, "mask")
    if not means or max(means) < 0.1 or means[-1] > max(means) / 2:
        return None
    top = means.index(max(means))
    return Finding(
        f"mask fell from {means[top]:.2f} to {means[-1]:.2f}", events[top]["step"], events[-1]["step"]
    )


def pseudo_labels_at_chance(run: Run) -> Finding | None:
    return _latest(
        run.after_warmup(run.trains),
        "pseudo_acc",
        5,
        lambda v: _better_than_guessing(v, run.config.cls) < 0.02,
        "pseudo_acc is {value:.3f} in {n} train events, a guess is right on " + f"{1 / run.config.cls:.3f}",
    )


def confirmation_bias(run: Run) -> Finding | None:
    events = run.after_warmup(run.trains)
    right, mask = _threes(events, "pseudo_acc"), _threes(events, "mask")
    if not right:
        return None
    top = right.index(max(right))
    if right[-1] > right[top] - 0.05 or mask[-1] < mask[top] + 0.02:
        return None
    return Finding(
        f"pseudo_acc fell from {right[top]:.3f} to {right[-1]:.3f} while mask rose from {mask[top]:.2f} to "
        f"{mask[-1]:.2f}",
        events[top]["step"],
        events[-1]["step"],
    )


def collapsed_classes(run: Run) -> Finding | None:
    c = run.config.cls
    events = [
        e
        for e in run.after_warmup(run.diagnostic_events)
        if e["pseudo_labels"] and e["pseudo_labels"] >= 20 * c
    ]
    found = _latest(events, "starved", 2, lambda v: v > c / 20, "{value} of " + f"{c} classes are starved")
    found = found or _latest(
        events,
        "marginal_kl",
        2,
        lambda v: v > math.log(c) / 4,
        "pseudo-labels fall on few classes (KL {value:.2f} nats)",
    )
    if found is None:
        return None
    words = [
        ", ".join(f"{name} {100 * share:.1f} %" for name, share in events[-1][key][:3])
        for key in ("least", "most")
    ]
    return found._replace(what=f"{found.what}: least {words[0]}; most {words[1]}")


def prior_far(run: Run) -> Finding | None:
    bound = math.log(run.config.cls) / 4
    return _latest(
        run.after_warmup(run.diagnostic_events),
        "prior_kl",
        2,
        lambda v: v > bound,
        "prior_kl is {value:.2f} nats",
    )


def q_w_certain(run: Run) -> Finding | None:
    right = _accuracy(run)
    if right is None or right >= 0.9:
        return None
    return _entropy(run, lambda share: share < 0.01, f"while the teacher is right on {100 * right:.1f} %")


def q_w_flat(run: Run) -> Finding | None:
    return _entropy(run, lambda share: share > 0.999, "in {n} diagnostics")


def _entropy(run: Run, bad: Callable[[float], bool], rest: str) -> Finding | None:
    events = [
        {"step": e["step"], "share": e["q_entropy"] / math.log(e["bank_rows"])}
        for e in run.after_warmup(run.diagnostic_events)
        if e["q_entropy"] is not None and e["bank_rows"] > 1
    ]
    return _latest(events, "share", 3, bad, f"the entropy of q_w is {{value:.4f}} of log K {rest}")


def lr_off(run: Run) -> Finding | None:
    c, bad = run.config, []
    for e in run.trains if run.steps_per_epoch else []:
        lr = learning_rate(
            e["step"] - 1,
            lr=c.lr,
            steps_per_epoch=run.steps_per_epoch,
            epochs=c.epochs,
            warmup_epoch=c.warmup_epoch,
            cos=c.cos,
            schedule=c.schedule,
            cos_7_16=c.cos_7_16,
        )
        if not math.isclose(e["lr"], lr, rel_tol=1e-6, abs_tol=1e-12):
            bad.append((e, lr))
    if not bad:
        return None
    (e, lr), (last, _) = bad[0], bad[-1]
    return Finding(
        f"lr is {e['lr']:.6g} at step {e['step']}, the config gives {lr:.6g} ({len(bad)} train events)",
        e["step"],
        last["step"],
    )


GRADIENTS = ("grad_x", "grad_u", "grad_in")


def no_gradient(run: Run) -> Finding | None:
    return _first(
        _latest(
            run.after_warmup(run.diagnostic_events),
            key,
            2,
            lambda v: v < 1e-8,
            key + " is {value:.1g} in {n} diagnostics",
        )
        for key in GRADIENTS
        if key == "grad_x" or getattr(run.config, key.replace("grad", "lambda"))
    )


def gradient_exploding(run: Run) -> Finding | None:
    for key in GRADIENTS:
        events = [e for e in run.diagnostic_events if e[key] is not None]
        for i in range(3, len(events)):
            usual = median(e[key] for e in events[:i])
            if events[i][key] > max(100 * usual, 100):
                return Finding(
                    f"{key} is {events[i][key]:.3g}, its median before is {usual:.3g}",
                    events[i]["step"],
                    events[-1]["step"],
                )
    return None


def at_chance(run: Run) -> Finding | None:
    return _latest(
        run.after_warmup(run.evals),
        "student_top1",
        2,
        lambda v: _better_than_guessing(v / 100, run.config.cls) < 0.02,
        "student_top1 is {value:.2f} % in {n} evaluations, a guess has " + f"{100 / run.config.cls:.2f} %",
    )


def students_apart(run: Run) -> Finding | None:
    gaps = [
        {"step": e["step"], "gap": e["student_top1"] - e["teacher_top1"]} for e in run.after_warmup(run.evals)
    ]
    return _first(
        [
            _latest(
                gaps,
                "gap",
                2,
                lambda v: v < -20,
                "the student is {value:.1f} points from the teacher, below it",
            ),
            _latest(gaps, "gap", 2, lambda v: v > 20, "the student is {value:.1f} points above the teacher"),
        ]
    )


def accuracy_lost(run: Run) -> Finding | None:
    best = max(run.evals, key=lambda e: e["student_top1"], default=None)
    found = best and _latest(
        run.evals,
        "student_top1",
        2,
        lambda v: v < best["student_top1"] - 10,
        "student_top1 fell to {value:.2f} %",
    )
    return found and found._replace(
        what=f"{found.what} from {best['student_top1']:.2f} % at step {best['step']}"
    )


def stale_bank(run: Run) -> Finding | None:
    for e in run.diagnostic_events:
        if e["bank_age_max"] is not None and e["bank_age_max"] > 2 * e["bank_pass"]:
            return Finding(
                f"the oldest row is {e['bank_age_max']} steps old, a pass over the labels takes {e['bank_pass']}",
                e["step"],
                e["step"],
            )
        if e["q_entropy"] is not None and e["bank_unwritten"]:
            return Finding(f"{e['bank_unwritten']} rows in use were never written", e["step"], e["step"])
    return _latest(
        run.after_warmup(run.diagnostic_events),
        "bank_drift",
        3,
        lambda v: v > 0.5,
        "rows are written with bank_drift {value:.2f}",
    )


def slowed_down(run: Run) -> Finding | None:
    events = run.trains
    if len(events) < 15:
        return None
    usual = median(e["images_per_s"] for e in events[:-5])
    return _latest(
        events,
        "images_per_s",
        5,
        lambda v: v < usual / 4,
        f"{{value:.0f}} images/s, the median was {usual:.0f}",
    )
