"""SimMatch (arXiv 2203.06915): pseudo-labels that agree by class and by similarity to labeled images."""

from typing import NamedTuple, Optional, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.ema import BNMode
from models.memory import DistributionAlignment, LabelBank
from models.method import Batch, Method, StepOutput, at_least_fp32
from util import dist_utils


class StudentOutput(NamedTuple):
    """What the student says; gradients flow through it."""

    # fmt: off
    logits_x: Tensor                    # of the labeled images        [B, C]
    logits_us: Tensor                   # of the strong views           [muB, C]
    z_us: Tensor                        # their embeddings              [muB, D]
    # fmt: on


class TeacherOutput(NamedTuple):
    """What the teacher says; no gradient."""

    # fmt: off
    z_x: Tensor                         # of the labeled images        [B, D]
    logits_uw: Tensor                   # of the weak views             [muB, C]
    z_uw: Tensor                        # their embeddings              [muB, D]
    student_output: Optional[StudentOutput] = None     # of the same forward, where student and teacher are one
    # fmt: on


class Targets(NamedTuple):
    """The same after all ranks have met: what a loss compares the student with."""

    # fmt: off
    z_x: Tensor                         # for the bank                  [B, D]
    log_p: Tensor                       # aligned predictions           [muB, C]
    z_uw: Tensor                        #                               [muB, D]
    prior: Optional[Tensor]             # mean of p over the global batch, without DA none    [C]
    student_output: Optional[StudentOutput]
    # fmt: on


class SimMatch(Method):
    """Section 3 of the paper, in its order and symbols."""

    def __init__(
        self,
        network: nn.Module,
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
        bn_mode: BNMode,
    ):
        """labels [K]: of the labeled list, in its order."""
        super().__init__(network, ema_m, bn_mode)
        self.bank = LabelBank(labels, dim, bank_m)
        self.align = DistributionAlignment(num_classes, da_len) if DA else None
        self.lambda_u, self.lambda_in, self.threshold = lambda_u, lambda_in, threshold
        self.st, self.tt, self.c_smooth = st, tt, c_smooth

    # fmt: off
    def teacher_forward(self, batches: Sequence[Batch], student: nn.Module, step: int) -> list[TeacherOutput]:
        """What the teacher makes of the weak views of each batch."""
        n_x = len(batches[0].x)
        out = self.teacher([torch.cat([batch.x, batch.u_weak]) for batch in batches], step)     # [B+muB, C], [B+muB, D] of each
        return [TeacherOutput(at_least_fp32(z[:n_x]), at_least_fp32(logits[n_x:]), at_least_fp32(z[n_x:])) for logits, z in out]

    def student_forward(self, batch: Batch, student: nn.Module) -> StudentOutput:
        """The student on labeled images and strong views."""
        n_x = len(batch.x)
        logits, z = map(at_least_fp32, student(torch.cat([batch.x, batch.u_strong])))         # [B+muB, C], [B+muB, D]
        return StudentOutput(logits[:n_x], logits[n_x:], z[n_x:])

    def targets(self, batches: Sequence[Batch], student: nn.Module, *, step: int) -> list[Targets]:
        teacher_outputs = self.teacher_forward(batches, student, step)
        with torch.no_grad():
            log_p = [torch.log_softmax(t.logits_uw, dim=1) for t in teacher_outputs]             # [muB, C] of each
            prior = None
            if self.align is not None:
                prior = dist_utils.all_mean(torch.stack([each.exp().mean(dim=0) for each in log_p]).mean(dim=0))     # [C]
                log_p = [self.align(each, prior) for each in log_p]                     # [muB, C] of each
        return [Targets(t.z_x, each, t.z_uw, prior, t.student_output) for t, each in zip(teacher_outputs, log_p)]

    def losses(self, batch: Batch, targets: Targets, student: nn.Module, *, bank_ready: bool) -> tuple[dict[str, Tensor], StepOutput]:
        z_x, log_p, z_uw, prior, student_output = targets
        logits_x, logits_us, z_us = student_output or self.student_forward(batch, student)
        p = log_p.exp()                                                     # [muB, C]
        loss_in = z_us.new_zeros(())
        if bank_ready:
            labels = self.bank.labels                                       # [K]
            with torch.no_grad():
                log_q_w = self.similarities(z_uw, self.tt)                  # [muB, K]
                q_hat = unfold(log_q_w, log_p, labels).exp()                # [muB, K]
                p = self.c_smooth * p + (1 - self.c_smooth) * aggregate(log_q_w, labels, p.shape[1])    # [muB, C]
            log_q_s = self.similarities(z_us, self.st)                      # [muB, K]
            loss_in = cross_entropy(q_hat, log_q_s).mean()

        mask = (p.amax(dim=1) >= self.threshold).to(p.dtype)                # [muB]
        loss_u = (mask * cross_entropy(p, torch.log_softmax(logits_us, dim=1))).mean()
        terms = {"loss_x": F.cross_entropy(logits_x, batch.y),
                 "loss_u": self.lambda_u * loss_u,
                 "loss_in": self.lambda_in * loss_in}
        return terms, StepOutput(z_x, batch.y, batch.index, prior, p, mask)

    # fmt: on
    def similarities(self, z: Tensor, t: float) -> Tensor:
        """log q, the similarities of embeddings z [n, D] to the bank at temperature t, each row a
        distribution -> [n, K].
        """
        return torch.log_softmax(z @ self.bank.z.T / t, dim=1)

    @torch.no_grad()
    def diagnostics(self, batch: Batch, targets: Targets, *, bank_ready: bool) -> dict[str, Tensor]:
        """bank_rows, K; from the second epoch on q_entropy, the mean entropy of q_w in nats, and bank_drift,
        1 − the mean cosine of the rows to be written and what they are written over; with DA the `prior` [C],
        this step's included.
        """
        out = {"bank_rows": torch.tensor(len(self.bank.labels), device=self.bank.z.device)}
        if bank_ready:
            log_q_w = self.similarities(targets.z_uw, self.tt)  # [muB, K]
            out["q_entropy"] = cross_entropy(log_q_w.exp(), log_q_w).mean()
            out["bank_drift"] = 1 - F.cosine_similarity(targets.z_x, self.bank.z[batch.index]).mean()
        if self.align is not None:
            out["prior"] = self.align.prior(targets.prior)
        return out

    def update(self, output: StepOutput) -> None:
        gather = dist_utils.all_gather
        self.bank.write(gather(output.index), gather(output.z), gather(output.y))
        if self.align is not None:
            self.align.write(output.prior)
        super().update(output)


def unfold(log_q: Tensor, log_p: Tensor, labels: Tensor) -> Tensor:
    """Calibrate instance similarities by class predictions (section 3.3): q̂_ij ∝ q_ij · p_i[label_j], in
    logs.

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
    """H(p_i, q_i) of two distributions, in nats: p [n, C], log q [n, C], finite -> [n]."""
    return -(p * log_q).sum(dim=1)
