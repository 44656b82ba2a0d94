"""The reference of SimMatchV2: its step as loops over ranks, images, classes, nodes and queue rows, written
from the paper, with the inverse of the propagation as the paper writes it.

Only the networks' forward and backward, and that inverse, are PyTorch's. models/simmatchv2.py must agree with
it to rounding in float64.
"""

import copy
import math

import torch

from tests.reference import SimMatchReference, cosines, cross_entropy, softmax

SMALLEST = torch.finfo(torch.float64).tiny  # the smallest normal number


def align(p, prior):
    """Divide each row of p by the prior and normalize it to sum 1."""
    out = []
    for p_i in p:
        ratios = [p_ic / prior_c for p_ic, prior_c in zip(p_i, prior, strict=True)]
        out.append([ratio / sum(ratios) for ratio in ratios])
    return out


def average_prior(prior, p, da_m):
    """The next prior: da_m times the prior plus 1 − da_m times the mean of the rows of p."""
    mean = [sum(row[c] for row in p) / len(p) for c in range(len(prior))]
    return [da_m * prior_c + (1 - da_m) * mean_c for prior_c, mean_c in zip(prior, mean)]


def edges(z, rows, t):
    """Row i: the softmax of z[i]'s similarities with all `rows`, each divided by t."""
    return [softmax([c / t for c in similarities]) for similarities in cosines(z, rows)]


def propagation(nodes, alpha, t):
    """P = (1 − alpha)·(I − alpha·A)^-1 of n nodes, as n lists of n floats.

    A is the softmax over each row of the similarities divided by t, with −inf on the diagonal.
    """
    n, A = len(nodes), []
    for a, similarities in enumerate(cosines(nodes, nodes)):
        A.append(softmax([-math.inf if a == b else c / t for b, c in enumerate(similarities)]))
    system = [[(1.0 if a == b else 0.0) - alpha * float(A[a][b]) for b in range(n)] for a in range(n)]
    return ((1 - alpha) * torch.linalg.inv(torch.tensor(system, dtype=torch.float64))).tolist()


def propagate(p_i, z_i, bank, labels, *, topn, alpha, t):
    """The pseudo-label of an image: the first row of P times the nodes' class distributions.

    The nodes are the image, with the distribution p_i, and the topn bank rows nearest to z_i, with their
    one-hot labels.
    """
    similarities = [float(c) for c in cosines([z_i], bank)[0]]
    nearest = sorted(range(len(bank)), key=lambda j: similarities[j], reverse=True)[:topn]
    P = propagation([z_i, *(bank[j] for j in nearest)], alpha, t)
    classes = [p_i, *(one_hot(labels[j], len(p_i)) for j in nearest)]
    return [sum(P[0][a] * classes[a][c] for a in range(len(classes))) for c in range(len(p_i))]


def node_edges(e, queue_labels):
    """Row i: the sum over the queue rows j of e[i][j] times row j's class distribution, at least SMALLEST.

    It is not normalized: queue rows not yet written have zeros for a distribution.
    """
    out = []
    for e_i in e:
        n_i = [
            sum(e_ij * row[c] for e_ij, row in zip(e_i, queue_labels)) for c in range(len(queue_labels[0]))
        ]
        out.append([n_ic if n_ic > SMALLEST else SMALLEST for n_ic in n_i])
    return out


def enqueue(queue, queue_labels, ptr, z, p):
    """Write the rows of z and p into the two lists from ptr on, and from 0 after the last row. Return the new
    ptr.
    """
    for z_i, p_i in zip(z, p, strict=True):
        queue[ptr], queue_labels[ptr] = z_i, p_i
        ptr = (ptr + 1) % len(queue)
    return ptr


def cross_entropy_with_logits(p, logits):
    """H(p, softmax(logits)), which is finite where a class of the softmax underflows."""
    top = max(float(v.detach()) for v in logits)
    log_sum = top + torch.log(sum(torch.exp(v - top) for v in logits))
    return sum(p_c * (log_sum - v) for p_c, v in zip(p, logits, strict=True))


def one_hot(label, num_classes):
    return [1.0 if c == label else 0.0 for c in range(num_classes)]


def mean_cross_entropy(p, q):
    """The mean of H(p[i], q[i]) over the rows."""
    return sum(cross_entropy(p_i, q_i) for p_i, q_i in zip(p, q, strict=True)) / len(p)


def floats(rows):
    """Rows of 0-dim tensors or floats as rows of floats."""
    return [[float(torch.as_tensor(v, dtype=torch.float64).detach()) for v in row] for row in rows]


class SimMatchV2Reference(SimMatchReference):
    """The state of a training: student, teacher, bank, labels, queue with its class distributions, prior.

    The forwards, SGD and the moving average are those of SimMatchReference. bn_mode: "shuffle" (the EMA
    teacher) or "average" (EMAN). queue: the initial features, k rows for each unlabeled image of a step.

    After a step its values are attributes: `p`, `p_aligned`, `e_w` and `pseudo_label` are lists over ranks of
    lists over unlabeled images of rows, `mask` of numbers. `e_s` and `n_s` have for each rank the images of
    the first strong view, then those of the second, and so on. `terms` has the weighted loss terms.
    """

    def __init__(
        self,
        network,
        bank,
        labels,
        num_classes,
        *,
        queue,
        lambda_nn,
        lambda_ee,
        lambda_ne,
        threshold,
        t,
        alpha,
        topn,
        k,
        DA,
        da_m,
        ema_m,
        lr,
        momentum,
        wd,
        nesterov,
        bn_mode,
    ):
        self.student, self.teacher = copy.deepcopy(network), copy.deepcopy(network)
        self.teacher.requires_grad_(False)
        self.bank, self.labels = [row.clone() for row in bank], [int(label) for label in labels]
        self.queue, self.ptr = [row.clone() for row in queue], 0
        self.queue_labels = [[0.0] * num_classes for _ in queue]
        self.da = [1 / num_classes] * num_classes
        self.velocity = {}
        self.num_classes = num_classes
        self.h = dict(
            lambda_nn=lambda_nn,
            lambda_ee=lambda_ee,
            lambda_ne=lambda_ne,
            threshold=threshold,
            t=t,
            alpha=alpha,
            topn=topn,
            k=k,
            DA=DA,
            da_m=da_m,
            ema_m=ema_m,
            bn_mode=bn_mode,
            lr=lr,
            momentum=momentum,
            wd=wd,
            nesterov=nesterov,
            no_decay_bn=False,
        )

    def step(self, batches, step, first_epoch=False):
        """batches: one (x, y, index, u_weak, (u_strong, …)) for each rank. Returns the terms,
        pseudo-labels and masks. Terms of strong views are means over all of them. first_epoch has no effect.
        """
        h = self.h
        assert len(self.queue) == h["k"] * sum(len(u_weak) for _, _, _, u_weak, _ in batches)
        self.student.train()
        logits_x, logits_us, z_us, z_x, logits_uw, z_uw = self._forwards(
            batches, step
        )  # each [rank][image][…]
        self._predict(logits_uw)
        self.e_w = [floats(edges(z, self.queue, h["t"])) for z in z_uw]
        settings = dict(topn=h["topn"], alpha=h["alpha"], t=h["t"])
        self.pseudo_label = [
            [propagate(p_i, z_i, self.bank, self.labels, **settings) for p_i, z_i in zip(p, z, strict=True)]
            for p, z in zip(self.p_aligned, z_uw)
        ]
        self.mask = [[1.0 if max(row) >= h["threshold"] else 0.0 for row in p] for p in self.p_aligned]

        totals = {"loss_x": 0.0, "loss_nn": 0.0, "loss_ee": 0.0, "loss_ne": 0.0}
        self.e_s, self.n_s = [], []
        for rank, batch in enumerate(batches):
            logits_s, e_s = logits_us[rank], edges(z_us[rank], self.queue, h["t"])
            n_s = node_edges(e_s, self.queue_labels)
            terms = self._terms(rank, batch, logits_x[rank], logits_s, e_s, n_s)
            for name, term in terms.items():
                totals[name] += term / len(batches)
            self.e_s.append(floats(e_s))
            self.n_s.append(floats(n_s))

        self._write(batches, z_x, z_uw)  # the bank and the queue of the next step
        self._sgd(sum(totals.values()))
        self._average()
        self.terms = {name: float(torch.as_tensor(value).detach()) for name, value in totals.items()}
        return self.terms, self.pseudo_label, self.mask

    def _predict(self, logits_uw):
        """Align with the prior of before the step; then the mean of the unaligned p enters the prior."""
        self.p = [floats(softmax(row) for row in logits) for logits in logits_uw]
        self.p_aligned = self.p
        if self.h["DA"]:
            self.p_aligned = [align(p, self.da) for p in self.p]
            self.da = average_prior(self.da, [row for p in self.p for row in p], self.h["da_m"])

    def _terms(self, rank, batch, logits_x, logits_s, e_s, n_s):
        """The weighted terms of one rank. All strong views of an image have the targets of its weak view.

        In the first step every class distribution in the queue is zero, and L_ne is left out.
        """
        h, (_, y, _, _, strong_views) = self.h, batch
        views = len(strong_views)
        p_aligned, e_w = views * self.p_aligned[rank], views * self.e_w[rank]
        strong = zip(views * self.mask[rank], views * self.pseudo_label[rank], logits_s, strict=True)
        labeled = zip((one_hot(int(label), self.num_classes) for label in y), logits_x, strict=True)
        loss_x = sum(cross_entropy_with_logits(a, b) for a, b in labeled) / len(y)
        loss_nn = sum(m * cross_entropy_with_logits(a, b) for m, a, b in strong) / len(logits_s)
        loss_ee = mean_cross_entropy(e_w, e_s)
        queue_is_empty = not any(any(row) for row in self.queue_labels)
        loss_ne = 0.0 if queue_is_empty else mean_cross_entropy(p_aligned, n_s)
        return {
            "loss_x": loss_x,
            "loss_nn": h["lambda_nn"] * loss_nn,
            "loss_ee": h["lambda_ee"] * loss_ee,
            "loss_ne": h["lambda_ne"] * loss_ne,
        }

    def _write(self, batches, z_x, z_uw):
        """Write the labeled images of all ranks into the bank and the unlabeled ones into the queue, in the
        order of the ranks. Where a labeled image occurs twice, its last row stays.
        """
        for rank, (_, y, index, _, _) in enumerate(batches):
            for j in range(len(y)):
                self.bank[int(index[j])] = z_x[rank][j].clone()
                self.labels[int(index[j])] = int(y[j])
            rows = z_uw[rank].clone(), self.p_aligned[rank]
            self.ptr = enqueue(self.queue, self.queue_labels, self.ptr, *rows)
