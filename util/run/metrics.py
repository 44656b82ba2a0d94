"""Accuracy over a data set, and means of what training steps report."""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from util import dist_utils
from util.device import copy_async
from util.errors import UserError
from util.run import preempt


class Accuracy(NamedTuple):
    top1: float  # percent
    top5: float  # percent; 100 if there are five classes or fewer
    per_class: list[float]  # top-1 of each class, percent; nan for a class without images


@torch.no_grad()
def count_hits(
    networks: Sequence[Callable[[Tensor], tuple[Tensor, Tensor]]],
    batches: Iterable[tuple[Tensor, Tensor]],
    num_classes: int,
    device: torch.device,
) -> Tensor:
    """Return for each network and class the numbers of top-1 hits, of top-5 hits, and of images, of this
    rank, [networks, 3, C] float64. Ranks do not communicate.

    networks: each maps x to (logits, z) and is in eval mode. batches: of this rank, each x [n, c, h, w] and
    y [n] on `device`; one pass serves all networks.
    """
    counts = torch.zeros(len(networks), 3, num_classes, dtype=torch.float64, device=device)
    for x, y in batches:
        for network, own in zip(networks, counts):
            logits, _ = network(x)  # [n, C]
            top = logits.topk(min(5, num_classes), dim=1).indices  # [n, 5]
            hit = (top == y[:, None]).double()  # [n, 5]
            for row, value in enumerate((hit[:, 0], hit.sum(dim=1), torch.ones_like(hit[:, 0]))):
                own[row].index_add_(0, y, value)
    return counts


def join_hits(counts: Tensor) -> list[Accuracy]:
    """Sum what `count_hits` returned over all ranks, and return the accuracy of each network. All ranks must
    call it. Raises UserError if there is no image.
    """
    out = []
    for top1, top5, images in dist_utils.all_sum(counts).cpu():  # [C] each
        total = images.sum()
        if total == 0:
            raise UserError("no test image can be read: python -m dataset.check lists the causes")
        out.append(
            Accuracy(
                100 * (top1.sum() / total).item(),
                100 * (top5.sum() / total).item(),
                (100 * top1 / images).tolist(),
            )
        )
    return out


def accuracies(
    networks: dict[str, nn.Module],
    batches: Iterable[tuple[Tensor, Tensor]],
    num_classes: int,
    device: torch.device,
) -> dict[str, float] | None:
    """Return NAME_top1 and NAME_top5 of each network, in percent, or None if a signal has asked the run to
    stop meanwhile.

    All ranks must call it; they first take over rank 0's BN statistics. networks: in eval mode. batches: this
    rank's (x [n, c, h, w], y [n]); the accuracy is that over the batches of all ranks.
    """
    for network in networks.values():
        dist_utils.broadcast_buffers(network)
    until_stop = itertools.takewhile(lambda batch: not preempt.stop_requested(), batches)
    hits = count_hits(list(networks.values()), until_stop, num_classes, device)
    if dist_utils.any_rank(preempt.stop_requested()):
        return None
    scores = {}
    for name, result in zip(networks, join_hits(hits)):
        scores[f"{name}_top1"], scores[f"{name}_top5"] = result.top1, result.top5
    return scores


class Meter:
    """Collects the loss terms and pseudo-label statistics of each step: `take_means` gives the means since
    its last call, `take_counts` the number of pseudo-labels of each class since its last call.

    Until then all values stay on the device, so that no step waits for a GPU. What a checkpoint contains was
    averaged or summed over ranks already. It stays on the CPU, apart from the values of this rank.

    A step may leave a loss term out, which is NaN in its row then. A term that is not finite by itself makes
    the sum of the terms, "loss", not finite either.
    """

    def __init__(self) -> None:
        self.names: tuple[str, ...] = ()
        self.steps: list[int] = []  # of all rows: first the restored ones
        self.restored_rows: list[Tensor] = []  # means over ranks [names] of each step
        self.rows: list[Tensor] = []  # values [names] of each step
        self.restored_counts: Tensor | None = None  # as `take_counts` returns them
        self.counts: Tensor | None = None  # the same of this rank

    def add(
        self,
        step: int,
        terms: dict[str, Tensor],
        pseudo_label: Tensor | None,
        mask: Tensor | None,
        true_labels: Tensor | None,
        skipped: Tensor | None = None,
    ) -> None:
        """step: from 0. terms: weighted losses; pseudo_label [muB, C]; mask [muB]: 1 if it is confident, else
        0; true_labels [muB]: None if unknown; skipped: 1 if the optimizer skipped the step, else 0.
        """
        values = {name: term.detach() for name, term in terms.items()}
        values["loss"] = sum(values.values(), torch.zeros(()))
        if mask is not None:
            values["mask"] = mask.mean()
        if pseudo_label is not None and mask is not None:
            label = pseudo_label.argmax(dim=1)  # [muB]
            counted = [torch.ones_like(mask), mask]
            if true_labels is not None:
                correct = (label == copy_async(true_labels, label.device)).float()  # [muB]
                values["pseudo_acc"] = correct.mean()
                counted += [correct, correct * mask]
            self._count(label, torch.stack(counted).long(), pseudo_label.shape[1])
        if skipped is not None:
            values["skipped"] = skipped
        self.names += tuple(name for name in values if name not in self.names)
        self.steps.append(step)
        left_out = values["loss"].new_full((), math.nan)  # without a copy from the host
        self.rows.append(torch.stack([values.get(name, left_out).float() for name in self.names]))

    def state_dict(self) -> dict[str, Any]:
        """Return what was added since the last calls, averaged or summed over ranks, so that a resumed run
        logs the same values. All ranks must call it.
        """
        return {
            "names": list(self.names),
            "steps": list(self.steps),
            "rows": self._means(),  # [steps, names]
            "counts": self._totals(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.names, self.steps = tuple(state["names"]), list(state["steps"])
        self.restored_rows, self.rows = list(state["rows"]), []
        self.restored_counts, self.counts = state.get("counts"), None  # older checkpoints have none

    def _count(self, label: Tensor, rows: Tensor, num_classes: int) -> None:
        """Add each column of `rows` [2 or 4, muB] to the counts of its class in `label` [muB]."""
        if self.counts is None:
            self.counts = rows.new_zeros(len(rows), num_classes)
        self.counts.index_add_(1, label, rows)

    def _means(self) -> Tensor:
        """Return the mean of each value over ranks, on the CPU: [steps, names].

        In float64 the sum is exact, as long as the ranks' values differ by less than a factor of 10^8. In
        float32 it would depend on the order in which an all-reduce adds the ranks, which is another one for
        each part of the message, and so on the number of rows.
        """
        means = self._padded(self.restored_rows)
        if self.rows:
            means += dist_utils.all_mean(torch.stack(self._padded(self.rows)).double()).cpu().float()
        return torch.stack(means) if means else torch.empty(0)

    def _padded(self, rows: list[Tensor]) -> list[Tensor]:
        """Return the rows with NaN for the names that were added after them."""
        return [F.pad(row, (0, len(self.names) - len(row)), value=math.nan) for row in rows]

    def _totals(self) -> Tensor | None:
        """Return the counts of all ranks, on the CPU, as `take_counts` does."""
        if self.counts is None:
            return self.restored_counts
        counts = dist_utils.all_sum(self.counts).cpu()
        return counts if self.restored_counts is None else self.restored_counts + counts

    def take_counts(self) -> Tensor | None:
        """Return the number of pseudo-labels per class on all ranks since the last call, int64 on the CPU.

        [4, C]: all, confident, correct, and both confident and correct ones; [2, C]: all and confident ones,
        if the true labels are unknown; None: there were no pseudo-labels.
        """
        counts = self._totals()
        self.restored_counts = self.counts = None
        return counts

    def take_means(self) -> dict[str, float]:
        """Return the mean of each value over all ranks and the steps since the last call. A term that a step
        has left out counts as 0 there, so that the terms add up to the loss; one that all have left out is
        missing.

        Raises UserError if a value is not finite, with its name and its step, counted from 1 as in the log.
        """
        means, steps = self._means(), self.steps
        self.steps, self.restored_rows, self.rows = [], [], []
        for step, row in zip(steps, means.tolist()):
            values = dict(zip(self.names, row))
            loss = values.pop("loss")
            if not math.isfinite(loss):
                # Beside a loss that is inf, NaN means that the step has left the term out.
                terms = (
                    (name, value)
                    for name, value in values.items()
                    if math.isinf(value) or math.isnan(value) and math.isnan(loss)
                )
                name, value = next(terms, ("loss", loss))
                raise UserError(
                    f"{name} is {value} at step {step + 1}; training stops and keeps the last "
                    "checkpoint: try a lower --lr, or check the images of that step"
                )
        left_out = means.isnan().all(dim=0).tolist()  # [names]
        mean = means.nan_to_num(nan=0.0).mean(dim=0).tolist()  # [names]
        return {name: value for name, value, out in zip(self.names, mean, left_out) if not out}
