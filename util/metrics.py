"""Accuracy over a data set, and the running means of training."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from util import dist_utils
from util.errors import UserError


class Accuracy(NamedTuple):
    top1: float  # percent
    top5: float  # percent; with fewer than five classes, of being among all of them
    per_class: list[float]  # top-1 of each class, percent; nan for a class without images


@torch.no_grad()
def evaluate(
    networks: Sequence[Callable[[Tensor], tuple[Tensor, Tensor]]],
    batches: Iterable[tuple[Tensor, Tensor]],
    num_classes: int,
    device: torch.device,
) -> list[Accuracy]:
    """Accuracy of each network (x -> logits, z; in eval mode) over the (x [n, c, h, w], y [n]) of all ranks
    together.

    The batches are gone through once, and are on `device`.
    """
    counts = torch.zeros(
        len(networks), 3, num_classes, dtype=torch.float64, device=device
    )  # top-1, top-5, images
    for x, y in batches:
        for network, own in zip(networks, counts):
            logits, _ = network(x)  # [n, C]
            best = logits.topk(min(5, num_classes), dim=1).indices  # [n, 5]
            hit = (best == y[:, None]).double()  # [n, 5]
            for row, value in enumerate((hit[:, 0], hit.sum(dim=1), torch.ones_like(hit[:, 0]))):
                own[row].index_add_(0, y, value)
    out = []
    for top1, top5, images in dist_utils.sum_on_cpu(counts):  # [C] each
        total = images.sum()
        if total == 0:
            raise UserError("none of the test images can be read: python -m dataset.check lists them")
        out.append(
            Accuracy(
                100 * (top1.sum() / total).item(),
                100 * (top5.sum() / total).item(),
                (100 * top1 / images).tolist(),
            )
        )
    return out


class Meter:
    """Means over the steps since the last reading; and which classes were given as pseudo-labels, since they
    were last taken.

    Values stay on the device until then: no step waits for a GPU.
    """

    def __init__(self) -> None:
        self.rows: list[tuple[int, Tensor]] = []
        self.names: tuple[str, ...] = ()
        self.counts: Tensor | None = None  # as `take_counts` gives them, on this rank

    def add(
        self,
        step: int,
        terms: dict[str, Tensor],
        pseudo_label: Tensor | None,
        mask: Tensor | None,
        true_labels: Tensor | None,
    ) -> None:
        """terms: weighted losses; pseudo [muB, C], mask [muB]: pseudo-labels; hidden [muB]: the labels they
        stand for.
        """
        values = {name: term.detach() for name, term in terms.items()}
        values["loss"] = sum(values.values())
        if mask is not None:
            values["mask"] = mask.mean()
        if pseudo_label is not None:
            label = pseudo_label.argmax(dim=1)  # [muB]
            counted = [torch.ones_like(mask), mask]
            if true_labels is not None:
                right = (label == true_labels.to(label.device)).float()  # [muB]
                values["pseudo_acc"] = right.mean()
                counted += [right, right * mask]
            self._count(label, torch.stack(counted).long(), pseudo_label.shape[1])
        self.names = tuple(values)
        self.rows.append((step, torch.stack([v.float() for v in values.values()])))

    def state_dict(self) -> dict[str, Any]:
        """What has been added since the last reading, as means over ranks: a continued run then reads the
        same.
        """
        rows = (
            dist_utils.all_mean(torch.stack([row for _, row in self.rows])).cpu()
            if self.rows
            else torch.empty(0)
        )
        counts = None if self.counts is None else dist_utils.all_sum(self.counts).cpu()
        return {
            "names": list(self.names),
            "steps": [step for step, _ in self.rows],
            "rows": rows,  # rows [steps, names]
            "counts": counts,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.names, self.rows = tuple(state["names"]), list(zip(state["steps"], state["rows"]))
        self.counts = state.get("counts")  # checkpoints did not always have them
        if self.counts is not None and dist_utils.rank():
            self.counts = torch.zeros_like(
                self.counts
            )  # whole numbers: rank 0 goes on with the sum over all, exactly

    def _count(self, label: Tensor, rows: Tensor, num_classes: int) -> None:
        """Add each column of `rows` [2 or 4, muB] to that of its `label` [muB]."""
        if self.counts is None:
            self.counts = rows.new_zeros(len(rows), num_classes)
        self.counts = self.counts.to(rows.device).index_add_(1, label, rows)

    def take_counts(self) -> Tensor | None:
        """How many pseudo-labels of each class there were on all ranks, and forget them: [4, C] int64 on the
        CPU.

        The rows: all; confident ones; right ones; both. [2, C] where no hidden labels tell; None without
        pseudo-labels.
        """
        counts, self.counts = self.counts, None
        return None if counts is None else dist_utils.all_sum(counts).cpu()

    def read(self) -> dict[str, float]:
        """Means by name, over steps and ranks, and forget them. A value that is not finite raises, with its
        step.
        """
        steps = [step for step, _ in self.rows]
        last = self.rows[-1][1]  # rows of an earlier process are on the CPU
        values = dist_utils.all_mean(
            torch.stack([row.to(last.device) for _, row in self.rows])
        ).cpu()  # [steps, names]
        self.rows = []
        for step, row in zip(steps, values):
            for name, value in zip(self.names, row.tolist()):
                if value != value or value in (float("inf"), float("-inf")):
                    raise UserError(
                        f"{name} is {value} at step {step}; training stops, and the last checkpoint stays as "
                        "it was: try a lower --lr, or look at the images of that step"
                    )
        return dict(zip(self.names, values.mean(dim=0).tolist()))
