"""What the doctor looks for: one table of rules, each in words with its numbers, how it is found, and what to
try.
"""

from collections.abc import Callable
from typing import NamedTuple

from util import detectors
from util.detectors import Finding, Run


class Rule(NamedTuple):
    name: str
    description: str
    find: Callable[[Run], Finding | None]
    advice: str


# C: classes; K: labeled images. "Settled" is after the first epoch and the warm-up, before which much is
# allowed to look odd.
RULES = (
    Rule(
        "not finite",
        "a loss, or but in fp16 a gradient, that is NaN or infinite in any diagnostics; or a run that ended for it",
        detectors.not_finite,
        "a lower --lr, a longer --warmup-epoch, or --precision bf16 or fp32 in place of fp16",
    ),
    Rule(
        "exploding loss",
        "loss_x above 3 ln C in any train event (a guess has ln C)",
        detectors.exploding,
        "a lower --lr or a longer --warmup-epoch",
    ),
    Rule(
        "not learning",
        "loss_x at least 0.95 ln C in the last 5 settled train events",
        detectors.not_learning,
        "another --lr; look at images and labels (python -m dataset.check)",
    ),
    Rule(
        "dead loss term",
        "loss_u or loss_in below 1e-6 of the loss in the last 5 settled train events, though its lambda is above 0 and the bank "
        "is in use",
        detectors.dead_term,
        "for loss_u a lower --threshold; for loss_in other --tt and --st",
    ),
    Rule(
        "mask at 0",
        "mask below 0.0001 in the last 5 settled train events",
        detectors.mask_at_0,
        "a lower --threshold, or --c-smooth nearer to 1",
    ),
    Rule(
        "mask at 1",
        "mask above 0.999 in the last 5 settled train events, while the teacher is right on less than 90 % (pseudo_acc, or "
        "without hidden labels teacher_top1)",
        detectors.mask_at_1,
        "a higher --threshold, or distribution alignment (--DA)",
    ),
    Rule(
        "mask falling",
        "mask, as a mean over 3 settled train events, at most half of its highest, and that is at least 0.1",
        detectors.mask_falling,
        "a lower --lr: the teacher loses confidence that it had",
    ),
    Rule(
        "pseudo-labels at chance",
        "pseudo_acc less than 2 % of the way from a guess, 1/C, to 1 in the last 5 settled train events",
        detectors.pseudo_labels_at_chance,
        "--method supervised first: is there something to learn from the labels?",
    ),
    Rule(
        "confirmation bias",
        "pseudo_acc, as a mean over 3 settled train events, 0.05 below its highest, and mask 0.02 above what it was then",
        detectors.confirmation_bias,
        "a higher --threshold, a smaller --lambda-u, or --DA",
    ),
    Rule(
        "collapsed classes",
        "in the last 2 settled diagnostics of at least 20 C pseudo-labels: more than C/20 classes got less than a tenth of their "
        "share of the labels, or marginal_kl is above ln(C)/4",
        detectors.collapsed_classes,
        "--DA, a lower --lr, or more labels of these classes",
    ),
    Rule(
        "prior far from the labels",
        "prior_kl above ln(C)/4 in the last 2 settled diagnostics: alignment hides that the teacher knows few classes",
        detectors.prior_far,
        "a lower --lr or a smaller --lambda-u; a shorter --da-len if it is an old prior",
    ),
    Rule(
        "q_w too certain",
        "q_entropy below 0.01 ln K in the last 3 settled diagnostics, while the teacher is right on less than 90 %",
        detectors.q_w_certain,
        "a higher --tt",
    ),
    Rule(
        "q_w flat",
        "q_entropy above 0.999 ln K in the last 3 settled diagnostics: all labeled images look alike",
        detectors.q_w_flat,
        "a lower --tt, a larger --dim, or a backbone that has learned something (--moco-path)",
    ),
    Rule(
        "lr off schedule",
        "lr of any train event more than 1e-6 of it away from what util/schedule.py gives for config.yaml",
        detectors.lr_off,
        "compare config.yaml with what was meant to run; was it edited?",
    ),
    Rule(
        "no gradient",
        "the gradient of a term whose lambda is above 0 shorter than 1e-8 in the last 2 settled diagnostics",
        detectors.no_gradient,
        "for grad_u a lower --threshold; for all terms a lower --lr: units may be dead",
    ),
    Rule(
        "exploding gradient",
        "the gradient of a term longer than 100, and than 100 times its median in the 3 or more diagnostics before",
        detectors.gradient_exploding,
        "a lower --lr or a longer --warmup-epoch",
    ),
    Rule(
        "accuracy at chance",
        "student_top1 less than 2 % of the way from a guess, 100/C, to 100 in the last 2 settled evaluations",
        detectors.at_chance,
        "another --lr; look at images and labels (python -m dataset.check)",
    ),
    Rule(
        "student and teacher apart",
        "student_top1 and teacher_top1 more than 20 points apart, in the same direction, in the last 2 settled evaluations",
        detectors.students_apart,
        "where the teacher lags a smaller --ema-m, where the student lags a lower --lr",
    ),
    Rule(
        "accuracy lost",
        "student_top1 more than 10 points below its best in the last 2 evaluations",
        detectors.accuracy_lost,
        "a lower --lr; best.pth has the best one",
    ),
    Rule(
        "stale bank",
        "a row older than two passes over the labels, a row in use that was never written, or bank_drift above 0.5 in the last 3 "
        "settled diagnostics",
        detectors.stale_bank,
        "a larger --batch-size or a lower --lr",
    ),
    Rule(
        "slowed down",
        "images_per_s in the last 5 of 15 or more train events below a quarter of its median before",
        detectors.slowed_down,
        "look at the disk and at other jobs on the machine; more --workers",
    ),
)
