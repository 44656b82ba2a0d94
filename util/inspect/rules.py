"""The rules of the doctor in one table: for each the name, a description with its numbers, its detector, and
what to try.
"""

from collections.abc import Callable
from typing import NamedTuple

from util.inspect import detectors
from util.inspect.detectors import Finding
from util.inspect.run_log import RunLog


class Rule(NamedTuple):
    name: str
    description: str
    find: Callable[[RunLog], Finding | None]
    advice: str


# C: number of classes; K: number of labeled images. "After warm-up" means after the first epoch and after the
# learning-rate warm-up. A finished run with fewer train events or evaluations than a rule asks for is judged
# by those that it has. A rule finds nothing in a log without its values. docs/DOCTOR.md has the same table.
RULES = (
    Rule(
        "not finite",
        "a loss, or (except in fp16) a gradient, is NaN or infinite in any diagnostics event, or such a "
        "value stopped the run",
        detectors.not_finite,
        "a lower --lr, a longer --warmup-epoch, or --precision bf16 or fp32 instead of fp16",
    ),
    Rule(
        "exploding loss",
        "loss_x is above 3 ln C in any train event (guessing gives ln C)",
        detectors.exploding_loss,
        "a lower --lr or a longer --warmup-epoch",
    ),
    Rule(
        "not learning",
        "loss_x is at least 0.95 ln C in the last 5 train events after warm-up",
        detectors.not_learning,
        "another --lr; check the images and labels (python -m dataset.check)",
    ),
    Rule(
        "dead loss term",
        "a term other than loss_x is below 1e-6 of the loss in the last 5 train events after warm-up, "
        "although its lambda is above 0 and, for loss_in, the bank is in use",
        detectors.dead_term,
        "for loss_u a lower --threshold; for loss_in other --tt and --st",
    ),
    Rule(
        "mask at 0",
        "mask is below 0.005 in the last 5 train events after warm-up: hardly a pseudo-label reaches the "
        "threshold, so L_u trains nothing",
        detectors.mask_at_0,
        "a lower --threshold, --c-smooth closer to 1, more steps, or a smaller --ema-m if the teacher is "
        "behind the student",
    ),
    Rule(
        "mask at 1",
        "mask is above 0.999 in the last 5 train events after warm-up, while the accuracy of the teacher "
        "is below 90 % (pseudo_acc, or teacher_top1 if the true labels are unknown)",
        detectors.mask_at_1,
        "a higher --threshold, or distribution alignment (--DA)",
    ),
    Rule(
        "mask falling",
        "mask, averaged over 3 train events after warm-up and after the first use of the bank, is at most "
        "half of its highest value, which is at least 0.1",
        detectors.mask_falling,
        "a lower --lr: the teacher is losing confidence",
    ),
    Rule(
        "pseudo-labels at chance",
        "pseudo_acc is less than 2 % of the way from chance (1/C) to 1 in the last 5 train events after "
        "warm-up",
        detectors.pseudo_labels_at_chance,
        "--method supervised first, to see whether the labels can be learned at all",
    ),
    Rule(
        "confirmation bias",
        "pseudo_acc, averaged over 3 train events after warm-up and after the first use of the bank, is at "
        "least 0.05 below its highest value, and mask is at least 0.02 above its value at that time",
        detectors.confirmation_bias,
        "a higher --threshold, a smaller --lambda-u, or --DA",
    ),
    Rule(
        "collapsed classes",
        "in the last 2 diagnostics events after warm-up with at least 20 C pseudo-labels, more than C/20 "
        "classes got less than a tenth of their share of the labeled images, or marginal_kl is above "
        "ln(C)/4",
        detectors.collapsed_classes,
        "--DA, a lower --lr, or more labels of these classes",
    ),
    Rule(
        "prior far from the labels",
        "prior_kl is above ln(C)/4 in the last 2 diagnostics events after warm-up: distribution alignment "
        "hides that the teacher predicts few classes",
        detectors.prior_far_from_labels,
        "a lower --lr or a smaller --lambda-u; a shorter --da-len if the prior is out of date",
    ),
    Rule(
        "q_w too certain",
        "q_entropy is below 0.01 ln K in the last 3 diagnostics events after warm-up, while the accuracy "
        "of the teacher is below 90 %",
        detectors.q_w_too_certain,
        "a higher --tt",
    ),
    Rule(
        "q_w flat",
        "q_entropy is above 0.999 ln K in the last 3 diagnostics events after warm-up: all labeled images "
        "look alike",
        detectors.q_w_flat,
        "a lower --tt, a larger --dim, or a pretrained backbone (--moco-path)",
    ),
    Rule(
        "lr off schedule",
        "lr of any train event differs by more than 1e-6 of its value from what util/run/schedule.py gives "
        "for config.yaml",
        detectors.lr_off_schedule,
        "compare config.yaml with the settings you intended; it may have been edited",
    ),
    Rule(
        "no gradient",
        "the gradient norm of a term whose lambda is above 0 is below 1e-8 in the last 2 diagnostics "
        "events after warm-up",
        detectors.no_gradient,
        "for grad_u a lower --threshold; for all terms a lower --lr: units may be dead",
    ),
    Rule(
        "exploding gradient",
        "the gradient norm of a term is above 100, and above 100 times its median over all earlier "
        "diagnostics events (3 or more)",
        detectors.exploding_gradient,
        "a lower --lr or a longer --warmup-epoch",
    ),
    Rule(
        "accuracy at chance",
        "student_top1 is less than 2 % of the way from chance (100/C) to 100 in the last 2 evaluations "
        "after warm-up",
        detectors.at_chance,
        "another --lr; check the images and labels (python -m dataset.check)",
    ),
    Rule(
        "student and teacher apart",
        "student_top1 and teacher_top1 are more than 20 points apart, in the same direction, in the last 2 "
        "evaluations after warm-up",
        detectors.student_and_teacher_apart,
        "a smaller --ema-m if the teacher is behind, a lower --lr if the student is",
    ),
    Rule(
        "start in the teacher",
        "ema_m to the power of the number of steps of the whole run is above 0.1: the teacher, an average, "
        "still holds that share of the network it started from",
        detectors.start_in_teacher,
        "a smaller --ema-m, or more steps",
    ),
    Rule(
        "accuracy lost",
        "student_top1 is more than 10 points below its best value in the last 2 evaluations",
        detectors.accuracy_lost,
        "a lower --lr; best.pth holds the best model",
    ),
    Rule(
        "stale bank",
        "a bank row is older than two passes over the labeled images (three with --labeled-sampler exact), a "
        "row in use was never written, or "
        "bank_drift is above 0.5 in the last 3 diagnostics events after warm-up",
        detectors.stale_bank,
        "a larger --batch-size or a lower --lr",
    ),
    Rule(
        "slowed down",
        "images_per_s in the last 5 train events is below a quarter of its median before (15 or more train "
        "events in all)",
        detectors.slowed_down,
        "check the disk and other jobs on the machine; more --workers",
    ),
)


class Note(NamedTuple):
    name: str
    find: Callable[[RunLog], Finding | None]
    description: str


# What looks wrong in a log, but is expected. docs/DOCTOR.md has the same descriptions.
NOTES = (
    Note(
        "bank in use",
        detectors.bank_in_use,
        "this is expected: the bank is used from the first epoch that begins after every labeled image was "
        "seen. Before, loss_in is 0. It starts near lambda_in ln K, its value if all labeled images look "
        "alike, and cannot fall below lambda_in times the entropy of its targets",
    ),
)
