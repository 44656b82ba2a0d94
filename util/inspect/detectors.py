"""Detectors of what is wrong in a run. Each looks at the run's events and returns a finding or None;
util/inspect/rules.py names and describes them.
"""

import math
from collections.abc import Callable, Iterable
from itertools import pairwise
from statistics import fmean, median
from typing import NamedTuple

from util.inspect.run_log import Event, RunLog
from util.run.schedule import learning_rate


class Finding(NamedTuple):
    what: str  # one line
    first_step: int  # of the events that show it
    last_step: int


def _latest(events: list[Event], key: str, n: int, bad: Callable[[float], bool], what: str) -> Finding | None:
    """Return a finding if the value of `key` is bad in each of the last `n` events; its first step is that of
    the first bad event without a good one after it. what: a format string for {n}, the number of bad events
    from there on, {s}, which is "s" if there are several, and {value}, the last value.
    """

    def is_bad(event: Event) -> bool:
        return event.get(key) is not None and bad(event[key])

    if len(events) < n or not all(map(is_bad, events[-n:])):
        return None
    start = len(events) - n
    while start and is_bad(events[start - 1]):
        start -= 1
    bad_events = events[start:]
    message = what.format(n=len(bad_events), s="s" * (len(bad_events) > 1), value=bad_events[-1][key])
    return Finding(message, bad_events[0]["step"], bad_events[-1]["step"])


def _latest_after_warmup(
    run: RunLog, events: list[Event], key: str, n: int, bad: Callable[[float], bool], what: str
) -> Finding | None:
    """Call `_latest` with the events after warm-up. A finished run may have fewer than `n`: then all of these
    are judged, or, if the run ended within the warm-up, the last `n` of all its events.
    """
    settled = run.after_warmup(events)
    if run.finished:
        settled = settled or events
        n = max(1, min(n, len(settled)))
    return _latest(settled, key, n, bad, what)


def _first(findings: Iterable[Finding | None]) -> Finding | None:
    return next((finding for finding in findings if finding), None)


def _above_chance(accuracy: float, classes: int) -> float:
    """Scale an accuracy to 0 at chance and 1 if always right (Cohen's kappa for balanced classes)."""
    return (accuracy - 1 / classes) / (1 - 1 / classes)


def _teacher_accuracy(run: RunLog) -> float | None:
    """Return the teacher's latest accuracy, 0 to 1: that of its pseudo-labels if the true labels are known,
    otherwise that on the test images.
    """
    if run.train_events and run.train_events[-1]["pseudo_acc"] is not None:
        return fmean(e["pseudo_acc"] for e in run.train_events[-3:])
    return run.eval_events[-1]["teacher_top1"] / 100 if run.eval_events else None


def _with_bank(run: RunLog, events: list[Event]) -> list[Event]:
    """Return the events after warm-up in which the bank is in use: those after the first diagnostics event
    that used it, or, in a log without diagnostics, those after the second epoch.
    """
    steps = [e["step"] for e in run.diagnostic_events if e.get("q_entropy") is not None]
    start = steps[0] if steps else math.inf if run.diagnostic_events else 2 * (run.steps_per_epoch or 0)
    return [e for e in run.after_warmup(events) if e["step"] > start]


def bank_in_use(run: RunLog) -> Finding | None:
    """Find the train event in which loss_in rises from 0, because the bank is used from then on."""
    for before, e in pairwise(run.train_events):
        if before.get("loss_in") == 0 and e.get("loss_in"):
            rise = f"{before['loss']:.3g} to {e['loss']:.3g}"
            what = f"loss_in rose from 0 to {e['loss_in']:.3g}, and loss from {rise}"
            return Finding(what, e["step"], e["step"])
    return None


def _same_pseudo_labels(run: RunLog) -> list[Event]:
    """Return the train events after warm-up and after the first use of the bank: from then on pseudo-labels
    contain its predictions, so that mask and pseudo_acc do not compare with those before.
    """
    start = bank_in_use(run)
    return [e for e in run.after_warmup(run.train_events) if not start or e["step"] > start.first_step]


def not_finite(run: RunLog) -> Finding | None:
    for e in run.diagnostic_events:
        bad = [
            name for name in e["not_finite"] if run.config.precision != "fp16" or not name.startswith("grad_")
        ]
        if bad:
            return Finding(f"not finite: {', '.join(bad)}", e["step"], e["step"])
    return _first(Finding(e["why"].split(";")[0], e["step"], e["step"]) for e in run.stop_events)


def exploding_loss(run: RunLog) -> Finding | None:
    bound = 3 * math.log(run.config.cls)
    bad = [e for e in run.train_events if "loss_x" in e and e["loss_x"] > bound]
    return Finding(f"loss_x is {bad[0]['loss_x']:.3g}", bad[0]["step"], bad[-1]["step"]) if bad else None


def not_learning(run: RunLog) -> Finding | None:
    chance = math.log(run.config.cls)
    return _latest_after_warmup(
        run,
        run.train_events,
        "loss_x",
        5,
        lambda v: v >= 0.95 * chance,
        f"loss_x is {{value:.3g}}; guessing gives {chance:.3g}",
    )


def dead_term(run: RunLog) -> Finding | None:
    def find(name: str, events: list[Event]) -> Finding | None:
        shares = [
            {"step": e["step"], "share": e[name] / e["loss"]}
            for e in events
            if e.get(name) is not None and e["loss"] > 0
        ]
        return _latest_after_warmup(
            run,
            shares,
            "share",
            5,
            lambda v: v < 1e-6,
            f"{name} is {{value:.1g}} of the loss in {{n}} train event{{s}}",
        )

    return _first(
        find(f"loss_{term}", _with_bank(run, run.train_events) if term == "in" else run.train_events)
        for term in _terms(run, run.train_events, "loss_")
        if term != "x"
    )


def _terms(run: RunLog, events: list[Event], prefix: str) -> list[str]:
    """Return the loss terms of which events have values, as `prefix` and the name, and whose weight in the
    config, lambda and the name, is not 0; a term without such a setting has a constant weight.
    """
    names = dict.fromkeys(key[len(prefix) :] for e in events for key in e if key.startswith(prefix))
    return [name for name in names if getattr(run.config, f"lambda_{name}", 1)]


def mask_at_0(run: RunLog) -> Finding | None:
    return _latest_after_warmup(
        run,
        run.train_events,
        "mask",
        5,
        lambda v: v < 0.005,
        "mask is {value:.2g} in {n} train event{s}",
    )


def mask_at_1(run: RunLog) -> Finding | None:
    accuracy = _teacher_accuracy(run)
    if accuracy is None or accuracy >= 0.9:
        return None
    return _latest_after_warmup(
        run,
        run.train_events,
        "mask",
        5,
        lambda v: v > 0.999,
        "mask is {value:.4f} in {n} train event{s}, but the teacher's accuracy is "
        f"{100 * accuracy:.1f} %",
    )


def _means_of_three(events: list[Event], key: str) -> list[float]:
    """Average every three consecutive events; the list is empty if an event lacks the value."""
    values = [e[key] for e in events]
    return [fmean(values[i : i + 3]) for i in range(len(values) - 2)] if None not in values else []


def mask_falling(run: RunLog) -> Finding | None:
    events = _same_pseudo_labels(run)
    means = _means_of_three(events, "mask")
    if not means or max(means) < 0.1 or means[-1] > max(means) / 2:
        return None
    top = means.index(max(means))
    return Finding(
        f"mask fell from {means[top]:.2f} to {means[-1]:.2f}", events[top]["step"], events[-1]["step"]
    )


def pseudo_labels_at_chance(run: RunLog) -> Finding | None:
    return _latest_after_warmup(
        run,
        run.train_events,
        "pseudo_acc",
        5,
        lambda v: _above_chance(v, run.config.cls) < 0.02,
        "pseudo_acc is {value:.3f} in {n} train event{s}; chance is " + f"{1 / run.config.cls:.3f}",
    )


def confirmation_bias(run: RunLog) -> Finding | None:
    events = _same_pseudo_labels(run)
    accuracy, mask = _means_of_three(events, "pseudo_acc"), _means_of_three(events, "mask")
    if not accuracy:
        return None
    top = accuracy.index(max(accuracy))
    if accuracy[-1] > accuracy[top] - 0.05 or mask[-1] < mask[top] + 0.02:
        return None
    return Finding(
        f"pseudo_acc fell from {accuracy[top]:.3f} to {accuracy[-1]:.3f}, "
        f"while mask rose from {mask[top]:.2f} to {mask[-1]:.2f}",
        events[top]["step"],
        events[-1]["step"],
    )


def collapsed_classes(run: RunLog) -> Finding | None:
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
    least, most = (
        ", ".join(f"{name} {100 * share:.1f} %" for name, share in events[-1][key][:3])
        for key in ("least", "most")
    )
    return found._replace(what=f"{found.what}: least {least}; most {most}")


def prior_far_from_labels(run: RunLog) -> Finding | None:
    bound = math.log(run.config.cls) / 4
    return _latest(
        run.after_warmup(run.diagnostic_events),
        "prior_kl",
        2,
        lambda v: v > bound,
        "prior_kl is {value:.2f} nats",
    )


def q_w_too_certain(run: RunLog) -> Finding | None:
    accuracy = _teacher_accuracy(run)
    if accuracy is None or accuracy >= 0.9:
        return None
    return _q_w_entropy(
        run, lambda share: share < 0.01, f"while the teacher's accuracy is {100 * accuracy:.1f} %"
    )


def q_w_flat(run: RunLog) -> Finding | None:
    return _q_w_entropy(run, lambda share: share > 0.999, "in {n} diagnostics")


def _q_w_entropy(run: RunLog, bad: Callable[[float], bool], rest: str) -> Finding | None:
    """Return a finding if the entropy of q_w, as a share of its maximum log K, is bad. rest: message end."""
    events = [
        {"step": e["step"], "share": e["q_entropy"] / math.log(e["bank_rows"])}
        for e in run.after_warmup(run.diagnostic_events)
        if e.get("q_entropy") is not None and e["bank_rows"] > 1
    ]
    return _latest(events, "share", 3, bad, f"the entropy of q_w is {{value:.4f}} of log K {rest}")


def lr_off_schedule(run: RunLog) -> Finding | None:
    if not run.steps_per_epoch:
        return None
    bad = []
    for e in run.train_events:
        lr = learning_rate(run.config, e["step"] - 1, run.steps_per_epoch)
        if not math.isclose(e["lr"], lr, rel_tol=1e-6, abs_tol=1e-12):
            bad.append((e, lr))
    if not bad:
        return None
    (e, lr), (last, _) = bad[0], bad[-1]
    return Finding(
        f"lr is {e['lr']:.6g} at step {e['step']}; the config gives {lr:.6g} ({len(bad)} train events)",
        e["step"],
        last["step"],
    )


def no_gradient(run: RunLog) -> Finding | None:
    return _first(
        _latest(
            run.after_warmup(run.diagnostic_events),
            f"grad_{term}",
            2,
            lambda v: v < 1e-8,
            f"grad_{term} is {{value:.1g}} in {{n}} diagnostics",
        )
        for term in _terms(run, run.diagnostic_events, "grad_")
    )


def exploding_gradient(run: RunLog) -> Finding | None:
    for key in dict.fromkeys(key for e in run.diagnostic_events for key in e if key.startswith("grad_")):
        events = [e for e in run.diagnostic_events if e.get(key) is not None]
        for i in range(3, len(events)):
            before = median(e[key] for e in events[:i])
            if events[i][key] > max(100 * before, 100):
                return Finding(
                    f"{key} is {events[i][key]:.3g}; its median before was {before:.3g}",
                    events[i]["step"],
                    events[-1]["step"],
                )
    return None


def at_chance(run: RunLog) -> Finding | None:
    return _latest_after_warmup(
        run,
        run.eval_events,
        "student_top1",
        2,
        lambda v: _above_chance(v / 100, run.config.cls) < 0.02,
        "student_top1 is {value:.2f} % in {n} evaluation{s}; chance is " + f"{100 / run.config.cls:.2f} %",
    )


def student_and_teacher_apart(run: RunLog) -> Finding | None:
    gaps = [{"step": e["step"], "gap": e["student_top1"] - e["teacher_top1"]} for e in run.eval_events]
    limits: list[Callable[[float], bool]] = [lambda v: v < -20, lambda v: v > 20]
    what = "student_top1 - teacher_top1 is {value:.1f} points"
    return _first(_latest_after_warmup(run, gaps, "gap", 2, bad, what) for bad in limits)


def describe_start_in_teacher(ema_m: float, steps: int) -> str:
    """Return a warning if the teacher, a moving average, still holds more than a tenth of the network that it
    started from after `steps` steps; otherwise "".
    """
    left = ema_m**steps
    if left <= 0.1:
        return ""
    enough = 1 - 0.01 ** (1 / steps)  # the 1 - ema_m that leaves a hundredth
    digit = 10.0 ** math.floor(math.log10(enough))
    better = 1 - math.ceil(round(enough / digit, 6)) * digit  # with `enough` rounded up to one digit
    return (
        f"with --ema-m {ema_m:g} the teacher still holds {100 * left:.3g} % of the network it started from "
        f"after all {steps:,} steps; --ema-m {better:.10g} leaves 1 % at most"
    )


def start_in_teacher(run: RunLog) -> Finding | None:
    what = describe_start_in_teacher(run.config.ema_m, run.total_steps) if run.total_steps else ""
    step = run.events[-1]["step"] if what else 0
    return Finding(what, step, step) if what else None


def accuracy_lost(run: RunLog) -> Finding | None:
    if not run.eval_events:
        return None
    best = max(run.eval_events, key=lambda e: e["student_top1"])
    return _latest(
        run.eval_events,
        "student_top1",
        2,
        lambda v: v < best["student_top1"] - 10,
        f"student_top1 fell to {{value:.2f}} % from {best['student_top1']:.2f} % at step {best['step']}",
    )


def stale_bank(run: RunLog) -> Finding | None:
    passes = 3 if run.config.labeled_sampler == "exact" else 2  # its last pass of an epoch is cut
    for e in run.diagnostic_events:
        if e.get("bank_age_max") is not None and e["bank_age_max"] > passes * e["bank_pass"]:
            return Finding(
                f"the oldest bank row is {e['bank_age_max']} steps old; a pass over the labeled images takes "
                f"{e['bank_pass']} steps",
                e["step"],
                e["step"],
            )
        if e.get("q_entropy") is not None and e["bank_unwritten"]:
            return Finding(f"{e['bank_unwritten']} bank rows in use were never written", e["step"], e["step"])
    return _latest(
        run.after_warmup(run.diagnostic_events),
        "bank_drift",
        3,
        lambda v: v > 0.5,
        "bank_drift is {value:.2f} in {n} diagnostics",
    )


def slowed_down(run: RunLog) -> Finding | None:
    events = run.train_events
    if len(events) < 15:
        return None
    before = median(e["images_per_s"] for e in events[:-5])
    return _latest(
        events,
        "images_per_s",
        5,
        lambda v: v < before / 4,
        f"{{value:.0f}} images/s; the median before was {before:.0f}",
    )
