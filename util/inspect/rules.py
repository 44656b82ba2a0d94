"""The rules of the doctor in one table: for each the name, a description with its numbers, what to try, and
what finds it. A method declares more of them.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from util.fields import METHODS
from util.inspect import detectors
from util.inspect.detectors import Check, Finding, first
from util.inspect.run_log import RunLog

Find = Callable[[RunLog], Finding | None]


class Rule(NamedTuple):
    name: str
    description: str
    advice: str
    find: Find


def either(*checks: Find) -> Find:
    return lambda run: first(check(run) for check in checks)


train = partial(Check, "train", 5)
evaluation = partial(Check, "eval", 2)
diagnostics = partial(Check, "diagnostics", 2)
ENOUGH = "pseudo_labels >= 20 * C"  # for a distribution over the classes
STARVED = "{value} of {C} classes are starved"
SKEWED = "pseudo-labels fall on few classes (KL {value:.2f} nats)"
EXTREMES = ": least {shares(least)}; most {shares(most)}"
APART = "student_top1 - teacher_top1 is {value - teacher_top1:.1f} points"

# C: number of classes; K: number of labeled images. "After warm-up" means after the first epoch and after the
# learning-rate warm-up. A finished run with fewer train events or evaluations than a rule asks for is judged
# by those that it has. A rule finds nothing in a log without its values. The cross-entropy of the labeled
# images is loss_x in every method. docs/DOCTOR.md has the same table.
RULES = (
    Rule(
        "not finite",
        "a loss, or (except in fp16) a gradient, is NaN or infinite in any diagnostics event, or such a "
        "value stopped the run",
        "a lower --lr, a longer --warmup-epoch, or --precision bf16 or fp32 instead of fp16",
        detectors.not_finite,
    ),
    Rule(
        "exploding loss",
        "loss_x is above 3 ln C in any train event (guessing gives ln C)",
        "a lower --lr or a longer --warmup-epoch",
        detectors.exploding_loss,
    ),
    Rule(
        "not learning",
        "loss_x is at least 0.95 ln C in the last 5 train events after warm-up",
        "another --lr; check the images and labels (python -m dataset.check)",
        train("loss_x", "value >= 0.95 * ln(C)", "loss_x is {value:.3g}; guessing gives {ln(C):.3g}"),
    ),
    Rule(
        "dead loss term",
        "a term other than loss_x is below 1e-6 of the loss in the last 5 train events after warm-up, "
        "although its lambda is above 0 and the term is in use",
        "for a term of pseudo-labels a lower --threshold; for one of similarities another temperature",
        train(
            "loss_*",
            "weight and key != 'loss_x' and value < 1e-6 * loss",
            "{key} is {value / loss:.1g} of the loss in {n} train event{s}",
        ),
    ),
    Rule(
        "mask at 0",
        "mask is below 0.005 in the last 5 train events after warm-up: hardly a pseudo-label reaches the "
        "threshold, so their loss term trains nothing",
        "a lower --threshold, more steps, or a smaller --ema-m if the teacher is behind the student",
        train("mask", "value < 0.005", "mask is {value:.2g} in {n} train event{s}"),
    ),
    Rule(
        "mask at 1",
        "mask is above 0.999 in the last 5 train events after warm-up, while the accuracy of the teacher "
        "is below 90 % (pseudo_acc, or teacher_top1 if the true labels are unknown)",
        "a higher --threshold, or distribution alignment (--DA)",
        train(
            "mask",
            "value > 0.999 and accuracy < 90",
            "mask is {value:.4f} in {n} train event{s}, but the teacher's accuracy is {accuracy:.1f} %",
        ),
    ),
    Rule(
        "mask falling",
        "mask, averaged over 3 train events after warm-up and after every loss term is in use, is at most "
        "half of its highest value, which is at least 0.1",
        "a lower --lr: the teacher is losing confidence",
        detectors.mask_falling,
    ),
    Rule(
        "pseudo-labels at chance",
        "pseudo_acc is less than 2 % of the way from chance (1/C) to 1 in the last 5 train events after "
        "warm-up",
        "--method supervised first, to see whether the labels can be learned at all",
        train(
            "pseudo_acc",
            "value - 1 / C < 0.02 * (1 - 1 / C)",
            "pseudo_acc is {value:.3f} in {n} train event{s}; chance is {1 / C:.3f}",
        ),
    ),
    Rule(
        "confirmation bias",
        "pseudo_acc, averaged over 3 train events after warm-up and after every loss term is in use, is at "
        "least 0.05 below its highest value, and mask is at least 0.02 above its value at that time",
        "a higher --threshold, a smaller weight of the pseudo-labels' loss term, or --DA",
        detectors.confirmation_bias,
    ),
    Rule(
        "collapsed classes",
        "in the last 2 diagnostics events after warm-up with at least 20 C pseudo-labels, more than C/20 "
        "classes got less than a tenth of their share of the labeled images, or marginal_kl is above "
        "ln(C)/4",
        "--DA, a lower --lr, or more labels of these classes",
        either(
            diagnostics("starved", "value > C / 20", STARVED + EXTREMES, ENOUGH),
            diagnostics("marginal_kl", "value > ln(C) / 4", SKEWED + EXTREMES, ENOUGH),
        ),
    ),
    Rule(
        "prior far from the labels",
        "prior_kl, or another KL divergence of the method, is above ln(C)/4 in the last 2 diagnostics events "
        "after warm-up: distribution alignment hides that the teacher predicts few classes",
        "a lower --lr, or a smaller weight of the pseudo-labels' loss term",
        diagnostics("*_kl", "key != 'marginal_kl' and value > ln(C) / 4", "{key} is {value:.2f} nats"),
    ),
    Rule(
        "lr off schedule",
        "lr of any train event differs by more than 1e-6 of its value from what util/run/schedule.py gives "
        "for config.yaml",
        "compare config.yaml with the settings you intended; it may have been edited",
        detectors.lr_off_schedule,
    ),
    Rule(
        "no gradient",
        "the gradient norm of a term whose lambda is above 0 is below 1e-8 in the last 2 diagnostics "
        "events after warm-up",
        "for a term of pseudo-labels a lower --threshold; for all terms a lower --lr: units may be dead",
        diagnostics("grad_*", "weight and value < 1e-8", "{key} is {value:.1g} in {n} diagnostics"),
    ),
    Rule(
        "exploding gradient",
        "the gradient norm of a term is above 100, and above 100 times its median over all earlier "
        "diagnostics events (3 or more)",
        "a lower --lr or a longer --warmup-epoch",
        detectors.exploding_gradient,
    ),
    Rule(
        "accuracy at chance",
        "student_top1 is less than 2 % of the way from chance (100/C) to 100 in the last 2 evaluations "
        "after warm-up",
        "another --lr; check the images and labels (python -m dataset.check)",
        evaluation(
            "student_top1",
            "value - 100 / C < 0.02 * (100 - 100 / C)",
            "student_top1 is {value:.2f} % in {n} evaluation{s}; chance is {100 / C:.2f} %",
        ),
    ),
    Rule(
        "student and teacher apart",
        "student_top1 and teacher_top1 are more than 20 points apart, in the same direction, in the last 2 "
        "evaluations after warm-up",
        "a smaller --ema-m if the teacher is behind, a lower --lr if the student is",
        either(
            evaluation("student_top1", "value - teacher_top1 < -20", APART),
            evaluation("student_top1", "value - teacher_top1 > 20", APART),
        ),
    ),
    Rule(
        "start in the teacher",
        "ema_m to the power of the number of steps of the whole run is above 0.1: the teacher, an average, "
        "still holds that share of the network it started from",
        "a smaller --ema-m, or more steps",
        detectors.start_in_teacher,
    ),
    Rule(
        "accuracy lost",
        "student_top1 is more than 10 points below its best value in the last 2 evaluations",
        "a lower --lr; best.pth holds the best model",
        detectors.accuracy_lost,
    ),
    Rule(
        "slowed down",
        "images_per_s in the last 5 train events is below a quarter of its median before (15 or more train "
        "events in all)",
        "check the disk and other jobs on the machine; more --workers",
        detectors.slowed_down,
    ),
)


def rules_of(method: str) -> tuple[Rule, ...]:
    """Return the rules of every method and those that this one declares (util/fields.py)."""
    declared = METHODS[method].rules if method in METHODS else ()
    return RULES + tuple(
        Rule(name, description, advice, either(*(Check("diagnostics", *check) for check in checks)))
        for name, description, advice, *checks in declared
    )
