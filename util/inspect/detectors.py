"""What the rules of the doctor (util/inspect/rules.py) are made of: conditions on the events of a run, and
functions for what a condition on single events cannot express.
"""

import fnmatch
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from itertools import chain, pairwise, takewhile
from statistics import fmean, median
from types import CodeType
from typing import Any, NamedTuple

from util.fields import METHODS
from util.inspect.run_log import Event, RunLog
from util.run.schedule import learning_rate


class Finding(NamedTuple):
    what: str  # one line
    first_step: int  # of the events that show it
    last_step: int


def _finding(what: str, events: list[Event]) -> Finding:
    return Finding(what, events[0]["step"], events[-1]["step"])


def _latest(events: list[Event], n: int, is_bad: Callable[[Event], bool]) -> list[Event]:
    """Return the bad events after the last good one, or none if they are fewer than `n`."""
    bad = [*takewhile(is_bad, reversed(events))][::-1]
    return bad if len(bad) >= n else []


def first(findings: Iterable[Finding | None]) -> Finding | None:
    return next((finding for finding in findings if finding), None)


@dataclass(frozen=True)
class Check:
    """A condition on events, applied to each of their keys that match a pattern.

    `bad` and `where` are Python expressions, and `what` is the text of an f-string. They name values of the
    event (an expression does not hold if one is missing or null), and:
    value, key: the value that is judged, and its name; weight: of its loss term, 0 if it is switched off
    C: number of classes; accuracy: of the teacher, in percent; ln: logarithm; shares: text of most or least
    exact: whether an epoch has its own permutations of the labeled images
    n, s (in `what`): the number of bad events, and "s" if there are several
    """

    kind: str  # train, eval or diagnostics
    last: int  # the number of last events after warm-up that must be bad; 0: any event of the run
    keys: str  # a key, or a pattern such as grad_*
    bad: str
    what: str
    where: str = ""  # other events are left out

    def __call__(self, run: RunLog) -> Finding | None:
        events = [e for e in run.events if e["event"] == self.kind]
        keys = fnmatch.filter(dict.fromkeys(chain.from_iterable(events)), self.keys)
        return first(self._judge(run, key, events) for key in keys)

    def _judge(self, run: RunLog, key: str, events: list[Event]) -> Finding | None:
        names = {
            "key": key,
            "weight": getattr(run.config, f"lambda_{key.partition('_')[2]}", 1),
            "C": run.config.cls,
            "exact": run.config.labeled_sampler == "exact",
            "accuracy": _teacher_accuracy(run),
            "ln": math.log,
            "shares": _shares,
        }

        def evaluate(expression: str, event: Event, **more: Any) -> Any:
            return _evaluate(expression, {**event, **names, "value": event.get(key), **more})

        if key in late_terms(run):
            events = _in_use(run, late_terms(run)[key].diagnostic, events)
        if self.last:
            n, settled = self.last, run.after_warmup(events)
            if run.finished and self.kind != "diagnostics":  # a short run is judged by what it has
                settled = settled or events
                n = max(1, min(n, len(settled)))
            if self.where:
                settled = [e for e in settled if evaluate(self.where, e)]
            bad = _latest(settled, n, lambda e: evaluate(self.bad, e))
        else:
            bad = [e for e in events if evaluate(self.bad, e)][:1]
        what = bad and evaluate(f"f{self.what!r}", bad[-1], n=len(bad), s="s" * (len(bad) > 1))
        return _finding(what, bad) if what else None


def _evaluate(expression: str, values: dict[str, Any]) -> Any:
    """Return None if one of the values is missing or null. Expressions are literals of this repository."""
    code = _compiled(expression)
    if any(values.get(name) is None for name in code.co_names):
        return None
    return eval(code, {"__builtins__": {}}, values)


@cache
def _compiled(expression: str) -> CodeType:
    return compile(expression, expression, "eval")


def _shares(classes: list[tuple[str, float]]) -> str:
    return ", ".join(f"{name} {100 * share:.1f} %" for name, share in classes[:3])


def _teacher_accuracy(run: RunLog) -> float | None:
    """Return the teacher's latest accuracy in percent: that of its pseudo-labels if the true labels are
    known, otherwise that on the test images.
    """
    if run.train_events and run.train_events[-1]["pseudo_acc"] is not None:
        return 100 * fmean(e["pseudo_acc"] for e in run.train_events[-3:])
    return run.eval_events[-1]["teacher_top1"] if run.eval_events else None


class LateTerm(NamedTuple):
    """A loss term that is 0 until it is in use. A method declares it (util/fields.py)."""

    note: str  # its name
    diagnostic: str  # of the method, null until the term is in use
    description: str


def late_terms(run: RunLog) -> dict[str, LateTerm]:
    """Return the late terms of the run's method by name, such as loss_NAME."""
    declared = METHODS.get(run.config.method)
    return {term: LateTerm(*rest) for term, rest in declared.late_terms.items()} if declared else {}


def _in_use(run: RunLog, diagnostic: str, events: list[Event]) -> list[Event]:
    """Return the events after warm-up and after the first diagnostics event that has the value `diagnostic`;
    in a log without diagnostics those after the second epoch.
    """
    steps = [e["step"] for e in run.diagnostic_events if e.get(diagnostic) is not None]
    start = steps[0] if steps else math.inf if run.diagnostic_events else 2 * (run.steps_per_epoch or 0)
    return [e for e in run.after_warmup(events) if e["step"] > start]


def first_use(run: RunLog, term: str) -> Finding | None:
    """Find the train event in which a late term rises from 0."""
    for before, e in pairwise(run.train_events):
        if before.get(term) == 0 and e.get(term):
            rise = f"{before['loss']:.3g} to {e['loss']:.3g}"
            return _finding(f"{term} rose from 0 to {e[term]:.3g}, and loss from {rise}", [e])
    return None


def _all_in_use(run: RunLog) -> list[Event]:
    """Return the train events after warm-up and after the first use of every late term: from then on
    pseudo-labels may be of another kind, so that mask and pseudo_acc do not compare with those before.
    """
    starts = [found.first_step for term in late_terms(run) if (found := first_use(run, term))]
    return [e for e in run.after_warmup(run.train_events) if e["step"] > max(starts, default=0)]


def not_finite(run: RunLog) -> Finding | None:
    for e in run.diagnostic_events:
        names = e["not_finite"]
        if run.config.precision == "fp16":  # gradients may be infinite, and such a step is skipped
            names = [name for name in names if not name.startswith("grad_")]
        if names:
            return _finding(f"not finite: {', '.join(names)}", [e])
    return first(_finding(e["why"].split(";")[0], [e]) for e in run.stop_events)


def exploding_loss(run: RunLog) -> Finding | None:
    bad = [e for e in run.train_events if "loss_x" in e and e["loss_x"] > 3 * math.log(run.config.cls)]
    return _finding(f"loss_x is {bad[0]['loss_x']:.3g}", bad) if bad else None


def _means_of_three(events: list[Event], key: str) -> list[float]:
    """Average every three consecutive events; the list is empty if an event lacks the value."""
    values = [e[key] for e in events]
    return [fmean(values[i : i + 3]) for i in range(len(values) - 2)] if None not in values else []


def mask_falling(run: RunLog) -> Finding | None:
    events = _all_in_use(run)
    means = _means_of_three(events, "mask")
    if not means or max(means) < 0.1 or means[-1] > max(means) / 2:
        return None
    top = means.index(max(means))
    return _finding(f"mask fell from {means[top]:.2f} to {means[-1]:.2f}", events[top:])


def confirmation_bias(run: RunLog) -> Finding | None:
    events = _all_in_use(run)
    accuracy, mask = _means_of_three(events, "pseudo_acc"), _means_of_three(events, "mask")
    if not (accuracy and mask):
        return None
    top = accuracy.index(max(accuracy))
    if accuracy[-1] > accuracy[top] - 0.05 or mask[-1] < mask[top] + 0.02:
        return None
    what = f"pseudo_acc fell from {accuracy[top]:.3f} to {accuracy[-1]:.3f}, "
    return _finding(what + f"while mask rose from {mask[top]:.2f} to {mask[-1]:.2f}", events[top:])


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
    e, lr = bad[0]
    what = f"lr is {e['lr']:.6g} at step {e['step']}; the config gives {lr:.6g} ({len(bad)} train events)"
    return _finding(what, [e for e, _ in bad])


def exploding_gradient(run: RunLog) -> Finding | None:
    for key in dict.fromkeys(key for e in run.diagnostic_events for key in e if key.startswith("grad_")):
        events = [e for e in run.diagnostic_events if e.get(key) is not None]
        for i in range(3, len(events)):
            value, before = events[i][key], median(e[key] for e in events[:i])
            if value > max(100 * before, 100):
                return _finding(f"{key} is {value:.3g}; its median before was {before:.3g}", events[i:])
    return None


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
    return _finding(what, run.events[-1:]) if what else None


def accuracy_lost(run: RunLog) -> Finding | None:
    if not run.eval_events:
        return None
    best = max(run.eval_events, key=lambda e: e["student_top1"])
    bad = _latest(run.eval_events, 2, lambda e: e["student_top1"] < best["student_top1"] - 10)
    if not bad:
        return None
    what = f"student_top1 fell to {bad[-1]['student_top1']:.2f} % from {best['student_top1']:.2f} %"
    return _finding(f"{what} at step {best['step']}", bad)


def slowed_down(run: RunLog) -> Finding | None:
    events = run.train_events
    if len(events) < 15:
        return None
    before = median(e["images_per_s"] for e in events[:-5])
    bad = _latest(events, 5, lambda e: e["images_per_s"] < before / 4)
    what = "{images_per_s:.0f} images/s; the median before was {before:.0f}"
    return _finding(what.format(**bad[-1], before=before), bad) if bad else None
