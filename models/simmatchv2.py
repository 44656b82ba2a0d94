"""SimMatchV2 (arXiv 2308.06692): consistency of the nodes and edges of a graph over images."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.ema import freeze_bn_stats
from models.memory import EMAPrior, LabelBank, Queue
from models.method import Batch, Method, StepOutput, at_least_fp32
from models.network import Network
from models.simmatch import cross_entropy
from util import dist_utils

# util/fields.py reads these literals from the source.
SETTINGS = {
    "lambda_nn": (10.0, "weight of the node-node consistency L_nn", "[0, 3.4e38]"),
    "lambda_ee": (5.0, "weight of the edge-edge consistency L_ee", "[0, 3.4e38]"),
    "lambda_ne": (5.0, "weight of the node-edge consistency L_ne", "[0, 3.4e38]"),
    "t": (0.1, "temperature of all similarities", "(0, 1000]"),
    "alpha": (
        0.1,
        "share of the neighbors in node propagation; 0: pseudo-labels stay as they are",
        "[0, 0.99]",
    ),
    "topn": (128, "number of nearest labeled images in node propagation", "(0, 4096]"),
    "k": (256, "number of past steps whose images the queue holds", "(0, 1_000_000]"),
    "da_m": (0.9, "momentum of the prior of distribution alignment", "[0, 1]", {"needs": "DA"}),
    "bn_from_first_view": (
        False,
        "update BN's running statistics by the forward with the first strong view only, not by every view",
    ),
}
USES = ("threshold", "DA", "eman", "ema_m")
DEFAULTS = {"lists": "simclr", "labeled_sampler": "exact"}


class Targets(NamedTuple):
    """What `losses` needs of the teacher's outputs; without gradient."""

    # fmt: off
    z_x: Tensor             # embeddings of the labeled images, for the bank        [B, D]
    z_uw: Tensor            # embeddings of the weak views, for the queue           [muB, D]
    p: Tensor               # class predictions of the weak views, aligned          [muB, C]
    mean_p: Tensor | None   # mean over the global batch, not aligned; None without DA      [C]
    # fmt: on


class SimMatchV2(Method):
    """The method of section 3 of the paper.

    The images are the nodes of a graph, and their similarities its edges. p: class prediction (the label of
    a node), e: similarities to the R rows of the queue (the edges), n: class prediction by the edges, z:
    embedding. Suffixes: x for labeled images, w (uw) and s for weak and strong views of unlabeled images.
    The three consistencies are means over V strong views.
    """

    loss_names = ("loss_x", "loss_nn", "loss_ee", "loss_ne")
    diagnostic_names = ("prior_kl", "queue_filled", "edge_entropy", "node_change", "edge_agreement")

    def __init__(
        self,
        network: Network,
        labels: Tensor,
        num_classes: int,
        dim: int,
        unlabeled_per_step: int,
        *,
        lambda_nn: float,
        lambda_ee: float,
        lambda_ne: float,
        threshold: float,
        t: float,
        alpha: float,
        topn: int,
        k: int,
        DA: bool,
        da_m: float,
        ema_m: float,
        eman: bool,
        bn_from_first_view: bool = False,
    ):
        """labels [K]: of the labeled list, in its order. unlabeled_per_step: of all ranks. The other
        arguments: see SETTINGS. Raises ValueError if topn is greater than K.
        """
        K = len(labels)
        if topn > K:
            raise ValueError(f"topn is {topn}, but there are {K} labeled images: set --topn to {K} or less")
        super().__init__(network, ema_m, "average" if eman else "shuffle")
        self.bank = LabelBank(labels, dim)
        self.queue = Queue(k * unlabeled_per_step, dim, num_classes)
        self.prior = EMAPrior(num_classes, da_m) if DA else None
        self.lambda_nn, self.lambda_ee, self.lambda_ne = lambda_nn, lambda_ee, lambda_ne
        self.threshold, self.t, self.alpha, self.topn = threshold, t, alpha, topn
        self.bn_from_first_view = bn_from_first_view

    def check_views(self, weak: int, *strong: int) -> None:
        super().check_views(weak, *strong)
        if self.bn_from_first_view and len(strong) == 1:
            raise ValueError("bn_from_first_view has no effect with a single strong view: leave it out")

    def fit_state(self, values: dict[str, Tensor]) -> str:
        """Replace a queue of another length, which a file of another number of ranks has, by this one. Drop a
        prior that is not used: published files always have one.
        """
        if self.prior is None:
            values.pop("prior.da", None)
        saved, rows = len(values.get("queue.z", ())), len(self.queue.z)
        if saved in (0, rows):  # 0: it is missing, which loading reports
            return ""
        values |= {f"queue.{name}": value.clone() for name, value in self.queue.state_dict().items()}
        return f"the checkpoint's queue has {saved:,} rows, but this run's has {rows:,}: it starts empty"

    def index_limits(self) -> dict[str, int]:
        rows, num_classes = self.queue.p.shape
        return {"bank.labels": num_classes, "queue.ptr": rows}

    # fmt: off
    @torch.no_grad()
    def targets(self, batches: Sequence[Batch], student: nn.Module, *, step: int) -> list[Targets]:
        n_x, mean_p = len(batches[0].x), None
        outputs = self.teacher([torch.cat([batch.x, batch.u_weak]) for batch in batches], step)
        zs = [at_least_fp32(z) for _, z in outputs]                         # [B+muB, D] of each
        log_ps = [torch.log_softmax(at_least_fp32(logits[n_x:]), dim=1) for logits, _ in outputs]   # [muB, C]
        if self.prior is not None:
            local_mean = torch.stack([log_p.exp().mean(dim=0) for log_p in log_ps]).mean(dim=0)     # [C]
            mean_p = dist_utils.all_mean(local_mean)                        # [C]
            log_ps = [self.prior(log_p) for log_p in log_ps]                # [muB, C] of each
        return [Targets(z[:n_x], z[n_x:], log_p.exp(), mean_p) for z, log_p in zip(zs, log_ps)]

    def losses(
        self, batch: Batch, targets: Targets, student: nn.Module, *, bank_ready: bool
    ) -> StepOutput:
        p, n_u = targets.p, len(batch.u_weak)                               # [muB, C], muB
        with torch.no_grad():
            e_w = self.log_edges(targets.z_uw).exp()                        # [muB, R]
            pseudo_label = self.propagate(targets)                          # [muB, C]
            mask = (p.amax(dim=1) >= self.threshold).to(p.dtype)            # [muB]

        logits_x, logits_s, z_s = self.student_forward(batch, student)      # [B, C], [V·muB, C], [V·muB, D]
        log_p_s = torch.log_softmax(logits_s, dim=1).unflatten(0, (-1, n_u))                # [V, muB, C]
        log_e_s = self.log_edges(z_s)                                       # [V·muB, R]
        loss_nn = (mask * cross_entropy(pseudo_label, log_p_s)).mean()
        loss_ee = cross_entropy(e_w, log_e_s.unflatten(0, (-1, n_u))).mean()
        losses = {"loss_x": F.cross_entropy(logits_x, batch.y),
                  "loss_nn": self.lambda_nn * loss_nn,
                  "loss_ee": self.lambda_ee * loss_ee}
        if self.queue.filled:
            # Where an image has no similar row, n_s underflows to 0: its log stays finite.
            n_s = log_e_s.exp() @ self.queue.p                              # [V·muB, C]
            log_n_s = n_s.clamp_min(torch.finfo(n_s.dtype).tiny).log()      # [V·muB, C]
            losses["loss_ne"] = self.lambda_ne * cross_entropy(p, log_n_s.unflatten(0, (-1, n_u))).mean()
        for_update = {"z_x": targets.z_x, "y": batch.y, "index": batch.index,       # [B, D], [B], [B]
                      "z_uw": targets.z_uw, "p": p}                                 # [muB, D], [muB, C]
        if targets.mean_p is not None:
            for_update["mean_p"] = targets.mean_p[None]                     # [1, C]
        return StepOutput(losses, pseudo_label, mask, for_update)

    def student_forward(self, batch: Batch, student: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits of the labeled images, and logits and embeddings of the strong views.

        The first strong view is in one forward with the labeled images; each further one has its own.
        """
        n_x, (first, *others) = len(batch.x), batch.u_strong
        outputs = [student(torch.cat([batch.x, first]))]
        with freeze_bn_stats(self.student) if self.bn_from_first_view else nullcontext():
            outputs += [student(view) for view in others]
        logits, z = (torch.cat(part) for part in zip(*outputs))             # [B+V·muB, C], [B+V·muB, D]
        logits, z = at_least_fp32(logits), at_least_fp32(z)
        return logits[:n_x], logits[n_x:], z[n_x:]
    # fmt: on

    def log_edges(self, z: Tensor) -> Tensor:
        """Embeddings z [n, D] -> log e [n, R]: how similar each is to the R rows of the queue."""
        # The temperature divides z and not the larger product.
        return torch.log_softmax(z / self.t @ self.queue.z.T, dim=1)

    def propagate(self, targets: Targets) -> Tensor:
        """Return the pseudo-labels [muB, C] of one rank after node propagation over the bank."""
        return propagate(
            targets.z_uw, targets.p, self.bank.z, self.bank.labels, topn=self.topn, t=self.t, alpha=self.alpha
        )

    @torch.no_grad()
    def diagnostics(self, batch: Batch, targets: Targets, *, bank_ready: bool) -> dict[str, Tensor]:
        """Return, with DA, the `prior` [C]; `queue_filled`, the share of the queue's rows that are written;
        `edge_entropy`, the mean entropy of e_w, as a share of its maximum ln R; `node_change`, the share of a
        pseudo-label that propagation moves to other classes, in the mean and divided by alpha; and, if the
        queue has rows, `edge_agreement`, the share of images for whose first strong view n_s and p have the
        same class.
        """
        p = targets.p  # [muB, C]
        log_e_w, R = self.log_edges(targets.z_uw), len(self.queue.z)  # [muB, R]
        out = {
            "queue_filled": p.new_full((), self.queue.filled / R),
            "edge_entropy": cross_entropy(log_e_w.exp(), log_e_w).mean() / math.log(max(R, 2)),
            "node_change": (self.propagate(targets) - p).abs().sum(dim=1).mean() / (2 * self.alpha or 1),
        }
        if self.queue.filled:
            e_s = self.log_edges(at_least_fp32(self.student(batch.u_strong[0])[1])).exp()  # [muB, R]
            out["edge_agreement"] = ((e_s @ self.queue.p).argmax(1) == p.argmax(1)).to(p.dtype).mean()
        if self.prior is not None:
            out["prior"] = self.prior.da
        return out

    def update(self, output: StepOutput) -> None:
        own = output.for_update
        self.bank.write(*(dist_utils.all_gather(own[name]) for name in ("index", "z_x", "y")))
        self.queue.write(*(dist_utils.all_gather(own[name]) for name in ("z_uw", "p")))
        if self.prior is not None:
            self.prior.write(own["mean_p"][0])  # the same in all rows
        super().update(output)


@torch.no_grad()
def propagate(
    z: Tensor, p: Tensor, bank: Tensor, labels: Tensor, *, topn: int, t: float, alpha: float
) -> Tensor:
    """Node propagation (section 3): mix the label of each image with those of its nearest labeled images.

    The nodes of a graph are an image and its `topn` nearest rows of the bank. A [topn+1, topn+1] is the
    softmax of their similarities at temperature t, without those of a node with itself. The result is the
    first row of (1 − alpha)·(I − alpha·A)⁻¹·(labels of the nodes). That row is the sum of the power series
    (1 − alpha)·Σ alphaⁿ·e₀ᵀAⁿ, of which we add the terms that matter in the dtype of z.

    z [n, D], p [n, C], bank [K, D], labels [K] -> [n, C], each row a distribution.
    """
    nearest = (z @ bank.T).topk(topn, dim=1, sorted=False).indices  # [n, topn]
    nodes = torch.cat([z[:, None], bank[nearest]], dim=1)  # [n, topn+1, D]
    similarities = nodes @ nodes.transpose(1, 2) / t  # [n, topn+1, topn+1]
    similarities.diagonal(dim1=1, dim2=2).fill_(-math.inf)
    A = similarities.softmax(dim=2)  # [n, topn+1, topn+1]
    term = A.new_zeros(len(z), 1, topn + 1)  # [n, 1, topn+1]
    term[:, :, 0] = 1 - alpha
    weights = term  # [n, 1, topn+1]
    for _ in range(series_length(alpha, z.dtype)):
        term = alpha * (term @ A)  # [n, 1, topn+1]
        weights = weights + term
    weights = weights[:, 0]  # [n, topn+1]
    return (weights[:, :1] * p).scatter_add_(1, labels[nearest], weights[:, 1:])  # [n, C]


def series_length(alpha: float, dtype: torch.dtype) -> int:
    """Return after how many terms the rest of Σ alphaⁿ is less than a tenth of the rounding error."""
    return math.ceil(math.log(torch.finfo(dtype).eps / 10) / math.log(alpha)) if alpha else 0


# What the doctor (docs/DOCTOR.md) says about the diagnostics of this method; literals too.
RULES = (
    (
        "queue not full",
        "less than half of the queue is written in the last 2 diagnostics events after warm-up",
        "a smaller --k",
        (2, "queue_filled", "value < 0.5", "{100 * value:.0f} % of the queue is written"),
    ),
    (
        "e_w too certain",
        "edge_entropy is below 0.01 in the last 3 diagnostics events after warm-up, while the accuracy of "
        "the teacher is below 90 %",
        "a higher --t",
        (
            3,
            "edge_entropy",
            "value < 0.01 and accuracy < 90",
            "the entropy of e_w is {value:.4f} of its maximum while the teacher's accuracy is "
            "{accuracy:.1f} %",
        ),
    ),
    (
        "e_w flat",
        "edge_entropy is above 0.999 in the last 3 diagnostics events after warm-up: all unlabeled images "
        "look alike",
        "a lower --t, a larger --dim, or a pretrained backbone (--moco-path)",
        (3, "edge_entropy", "value > 0.999", "the entropy of e_w is {value:.4f} of its maximum"),
    ),
    (
        "neighbors disagree",
        "node_change is above 0.9 in the last 3 diagnostics events after warm-up: the nearest labeled images "
        "have other classes than the prediction",
        "a smaller --topn or --alpha",
        (3, "node_change", "value > 0.9", "{100 * value:.0f} % of the neighbors' labels are other classes"),
    ),
    (
        "edges at chance",
        "edge_agreement is less than 2 % of the way from chance (1/C) to 1 in the last 3 diagnostics events "
        "after warm-up",
        "a lower --t; --method supervised shows whether the labels can be learned at all",
        (
            3,
            "edge_agreement",
            "value - 1 / C < 0.02 * (1 - 1 / C)",
            "n_s and p have the same class for {100 * value:.1f} % of the images; chance is {100 / C:.1f} %",
        ),
    ),
)
