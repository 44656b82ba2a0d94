"""SimMatch (arXiv 2203.06915): consistency of class predictions and of similarities to labeled images."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.ema import BNMode
from models.memory import DistributionAlignment, LabelBank
from models.method import Batch, Method, StepOutput, at_least_fp32, forward_views
from models.network import Network
from util import dist_utils

# util/fields.py reads these literals from the source.
SETTINGS = {
    "lambda_u": (10.0, "weight of the unsupervised (pseudo-label) loss L_u", "[0, 3.4e38]"),
    "lambda_in": (1.0, "weight of the instance similarity loss L_in", "[0, 3.4e38]"),
    "threshold": (0.7, "confidence threshold of L_u for the largest class of a pseudo-label", "[0, 1]"),
    "st": (0.1, "temperature of the student's similarities", "(0, 1000]"),
    "tt": (0.1, "temperature of the teacher's similarities", "(0, 1000]"),
    "c_smooth": (1.0, "weight of the class prediction in the pseudo-label (alpha); rest: the bank", "[0, 1]"),
    "DA": (False, "use distribution alignment of the teacher's predictions"),
    "da_len": (256, "number of past steps that form the prior of DA", "(0, 1_000_000]", {"needs": "DA"}),
    "bank_m": (0.0, "momentum of the bank: share of the old row that stays in a write", "[0, 1]"),
    "eman": (False, "simmatch: EMAN teacher, with averaged BN, not shuffle-BN; fixmatch: the teacher labels"),
    "ema_m": (0.999, "momentum of the teacher (m)", "[0, 1]"),
}


class StudentOutput(NamedTuple):
    """What the student computes; gradients flow through it."""

    # fmt: off
    logits_x: Tensor                    # of the labeled images         [B, C]
    logits_us: Tensor                   # of the V strong views         [V·muB, C]
    z_us: Tensor                        # embeddings of the same        [V·muB, D]
    # fmt: on


class TeacherOutput(NamedTuple):
    """What the teacher computes, without gradient."""

    # fmt: off
    z_x: Tensor                         # embeddings of the labeled images  [B, D]
    logits_uw: Tensor                   # of the weak views             [muB, C]
    z_uw: Tensor                        # embeddings of the same        [muB, D]
    student_output: StudentOutput | None = None     # of the same forward, in the single-network form
    # fmt: on


class Targets(NamedTuple):
    """Teacher outputs after cross-rank distribution alignment, with which `losses` compares the student."""

    # fmt: off
    z_x: Tensor                         # embeddings for the bank       [B, D]
    log_p: Tensor                       # aligned class predictions     [muB, C]
    z_uw: Tensor                        # embeddings of the weak views  [muB, D]
    mean_p: Tensor | None               # over the global batch; None without DA    [C]
    student_output: StudentOutput | None
    # fmt: on


class SimMatch(Method):
    """The method of section 3 of the paper, with its symbols.

    p: class prediction, q: similarities to the bank, z: embedding. Suffixes: x for labeled images, uw and us
    for weak and strong views of unlabeled images; w and s where only the view matters.
    With several strong views L_u and L_in are means over them. The first is in one forward with x.
    """

    loss_names = ("loss_x", "loss_u", "loss_in")
    diagnostic_names = (
        *("prior_kl", "q_entropy", "bank_rows", "bank_drift"),
        *("bank_unwritten", "bank_age_median", "bank_age_max", "bank_pass"),
    )

    def __init__(
        self,
        network: Network,
        labels: Tensor,
        num_classes: int,
        dim: int,
        *,
        lambda_u: float,
        lambda_in: float,
        threshold: float,
        st: float,
        tt: float,
        c_smooth: float,
        DA: bool,
        da_len: int,
        bank_m: float,
        ema_m: float,
        eman: bool = False,
        bn_mode: BNMode = "shuffle",
    ):
        """labels [K]: of the labeled list, in its order. eman takes the place of bn_mode: it averages BN's
        statistics. The other arguments: see SETTINGS.
        """
        super().__init__(network, ema_m, "average" if eman else bn_mode)
        self.bank = LabelBank(labels, dim, bank_m)
        self.align = DistributionAlignment(num_classes, da_len) if DA else None
        self.lambda_u, self.lambda_in, self.threshold = lambda_u, lambda_in, threshold
        self.st, self.tt, self.c_smooth = st, tt, c_smooth

    # fmt: off
    def teacher_forward(self, batches: Sequence[Batch], student: nn.Module, step: int) -> list[TeacherOutput]:
        """Run the teacher on the weak views of every batch, labeled images included.

        student: for the single-network form, which overrides this function.
        """
        n_x = len(batches[0].x)
        outputs = []
        for logits, z in self.teacher([torch.cat([batch.x, batch.u_weak]) for batch in batches], step):
            logits, z = at_least_fp32(logits), at_least_fp32(z)             # [B+muB, C], [B+muB, D]
            outputs.append(TeacherOutput(z[:n_x], logits[n_x:], z[n_x:]))
        return outputs

    def student_forward(self, batch: Batch, student: nn.Module) -> StudentOutput:
        """Run the student on the labeled images and the strong views."""
        n_x, (first, *others) = len(batch.x), batch.u_strong
        logits, z = forward_views(student, [batch.x, first], others)        # [B+V·muB, C], [B+V·muB, D]
        return StudentOutput(logits[:n_x], logits[n_x:], z[n_x:])

    def targets(self, batches: Sequence[Batch], student: nn.Module, *, step: int) -> list[Targets]:
        teacher_outputs = self.teacher_forward(batches, student, step)
        with torch.no_grad():
            log_ps = [torch.log_softmax(t.logits_uw, dim=1) for t in teacher_outputs]   # [muB, C] of each
            mean_p = None
            if self.align is not None:
                local_mean = torch.stack([log_p.exp().mean(dim=0) for log_p in log_ps]).mean(dim=0)     # [C]
                mean_p = dist_utils.all_mean(local_mean)                                # [C]
                log_ps = [self.align(log_p, mean_p) for log_p in log_ps]                # [muB, C] of each
        pairs = zip(teacher_outputs, log_ps)
        return [Targets(t.z_x, log_p, t.z_uw, mean_p, t.student_output) for t, log_p in pairs]

    def losses(
        self, batch: Batch, targets: Targets, student: nn.Module, *, bank_ready: bool
    ) -> StepOutput:
        z_x, log_p, z_uw, mean_p, student_output = targets
        logits_x, logits_us, z_us = student_output or self.student_forward(batch, student)
        pseudo_label = p = log_p.exp()                                      # [muB, C]
        views = len(batch.u_strong)                                         # V
        loss_in = z_us.new_zeros(())
        if bank_ready:
            labels = self.bank.labels                                       # [K]
            with torch.no_grad():
                log_q_w = self.log_similarities(z_uw, self.tt)              # [muB, K]
                q_hat = unfold(log_q_w, log_p, labels).exp()                # [muB, K]
                a = aggregate(log_q_w, labels, p.shape[1])                  # [muB, C]
                pseudo_label = self.c_smooth * p + (1 - self.c_smooth) * a  # [muB, C]
            log_q_s = self.log_similarities(z_us, self.st)                  # [V·muB, K]
            loss_in = cross_entropy(q_hat.repeat(views, 1), log_q_s).mean()

        mask = (pseudo_label.amax(dim=1) >= self.threshold).to(p.dtype)     # [muB]
        log_p_s = torch.log_softmax(logits_us, dim=1)                       # [V·muB, C]
        loss_u = (mask.repeat(views) * cross_entropy(pseudo_label.repeat(views, 1), log_p_s)).mean()
        losses = {"loss_x": F.cross_entropy(logits_x, batch.y),
                  "loss_u": self.lambda_u * loss_u,
                  "loss_in": self.lambda_in * loss_in}
        for_update = {"z": z_x, "y": batch.y, "index": batch.index}         # [B, D], [B], [B]
        if mean_p is not None:
            for_update["mean_p"] = mean_p[None]                             # [1, C]
        return StepOutput(losses, pseudo_label, mask, for_update)
    # fmt: on

    def log_similarities(self, z: Tensor, t: float) -> Tensor:
        """Embeddings z [n, D] -> log q [n, K]: how similar each is to the bank's rows, at temperature t."""
        return torch.log_softmax(z @ self.bank.z.T / t, dim=1)

    @torch.no_grad()
    def diagnostics(self, batch: Batch, targets: Targets, *, bank_ready: bool) -> dict[str, Tensor]:
        """Return, with DA, the `prior` [C], this step's mean included.

        From the second epoch on also `q_entropy`, the mean entropy of q_w in nats, and `bank_drift`, 1 − the
        mean cosine between the rows to be written and the rows that they replace.
        """
        out = {}
        if bank_ready:
            log_q_w = self.log_similarities(targets.z_uw, self.tt)  # [muB, K]
            out["q_entropy"] = cross_entropy(log_q_w.exp(), log_q_w).mean()
            out["bank_drift"] = 1 - F.cosine_similarity(targets.z_x, self.bank.z[batch.index]).mean()
        if self.align is not None:
            assert targets.mean_p is not None  # `targets` computes it with DA
            out["prior"] = self.align.prior(targets.mean_p)
        return out

    def age_diagnostics(self, ages: np.ndarray, labels_per_step: int) -> dict[str, float]:
        """Return the numbers of rows, of all and of those never written, the ages of the others in steps, and
        the steps of a pass over the labeled images: a row is written whenever its image is in a batch.
        """
        written = ages[ages >= 0]
        return {
            "bank_rows": len(ages),
            "bank_unwritten": len(ages) - len(written),
            "bank_age_median": float(np.median(written)),
            "bank_age_max": int(written.max()),
            "bank_pass": math.ceil(len(ages) / labels_per_step),
        }

    def index_limits(self) -> dict[str, int]:
        limits = {"bank.labels": self.student.fc.out_features}
        return limits if self.align is None else {**limits, "align.ptr": len(self.align.ring)}

    def update(self, output: StepOutput) -> None:
        own = output.for_update
        self.bank.write(*(dist_utils.all_gather(own[name]) for name in ("index", "z", "y")))
        if self.align is not None:
            self.align.write(own["mean_p"][0])  # the same in all rows
        super().update(output)


def unfold(log_q: Tensor, log_p: Tensor, labels: Tensor) -> Tensor:
    """Calibrate instance similarities by class predictions (section 3.3): q̂_ij ∝ q_ij · p_i[label_j].

    log_q [n, K], log_p [n, C], labels [K] -> [n, K], each row the log of a distribution.
    """
    return torch.log_softmax(log_q + log_p[:, labels], dim=1)


def aggregate(log_q: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Sum instance similarities within each class (section 3.3): a_i[c] = Σ_{j: label_j = c} q_ij.

    log_q [n, K], labels [K] -> [n, C], each row a distribution.
    """
    q = log_q.exp()  # [n, K]
    return q.new_zeros(len(q), num_classes).index_add_(1, labels, q)


def cross_entropy(p: Tensor, log_q: Tensor) -> Tensor:
    """H(p_i, q_i) of two distributions, in nats: p [..., C], log q [..., C], finite -> [...]."""
    return -(p * log_q).sum(dim=-1)


# What the doctor (docs/DOCTOR.md) says about the diagnostics of this method; literals too.
RULES = (
    (
        "q_w too certain",
        "q_entropy is below 0.01 ln K in the last 3 diagnostics events after warm-up, while the accuracy "
        "of the teacher is below 90 %",
        "a higher --tt",
        (
            3,
            "q_entropy",
            "bank_rows > 1 and value < 0.01 * ln(bank_rows) and accuracy < 90",
            "the entropy of q_w is {value / ln(bank_rows):.4f} of log K while the teacher's accuracy is "
            "{accuracy:.1f} %",
        ),
    ),
    (
        "q_w flat",
        "q_entropy is above 0.999 ln K in the last 3 diagnostics events after warm-up: all labeled images "
        "look alike",
        "a lower --tt, a larger --dim, or a pretrained backbone (--moco-path)",
        (
            3,
            "q_entropy",
            "bank_rows > 1 and value > 0.999 * ln(bank_rows)",
            "the entropy of q_w is {value / ln(bank_rows):.4f} of log K in {n} diagnostics",
        ),
    ),
    (
        "stale bank",
        "a bank row is older than two passes over the labeled images (three with --labeled-sampler exact), a "
        "row in use was never written, or bank_drift is above 0.5 in the last 3 diagnostics events after "
        "warm-up",
        "a larger --batch-size or a lower --lr",
        (
            0,
            "bank_age_max",
            "value > (3 if exact else 2) * bank_pass",
            "the oldest bank row is {value} steps old; a pass over the labeled images takes {bank_pass} "
            "steps",
        ),
        (0, "bank_unwritten", "value > 0 and q_entropy >= 0", "{value} bank rows in use were never written"),
        (3, "bank_drift", "value > 0.5", "bank_drift is {value:.2f} in {n} diagnostics"),
    ),
)
LATE_TERMS = {
    "loss_in": (
        "bank in use",
        "q_entropy",
        "this is expected: the bank is used from the first epoch that begins after every labeled image was "
        "seen. Before, loss_in is 0. It starts near lambda_in ln K, its value if all labeled images look "
        "alike, and cannot fall below lambda_in times the entropy of its targets",
    )
}
