"""The state of a run after a step, and what makes two starts the same run: together they are a checkpoint."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from util import dist_utils
from util.config import Config, to_dict
from util.errors import UserError
from util.run.metrics import Meter
from util.run.ranks import RankLayout


class BadImages:
    """The policy for unreadable images: stop the run, or collect them for the log."""

    def __init__(self, on_bad_image: str):
        """on_bad_image: stop or skip."""
        self.stop = on_bad_image == "stop"
        self.seen: list[tuple[str, str]] = []

    def add(self, bad: Sequence[tuple[str, str]]) -> None:
        """bad: (name, cause) of each. Raises UserError about the first if the run is to stop."""
        for name, cause in bad:
            if self.stop:
                raise UserError(
                    f"{name}: {cause}; fix or remove it, or use --on-bad-image skip (python -m dataset.check "
                    "lists all such images)"
                )
        self.seen += [(name, cause) for name, cause in bad]

    def take(self) -> list[tuple[str, str]]:
        """Return the bad images of all ranks since the last call. All ranks must call it."""
        seen, self.seen = self.of_all_ranks(), []
        return seen

    def of_all_ranks(self) -> list[tuple[str, str]]:
        """Return the bad images of all ranks. All ranks must call it."""
        return [image for seen in dist_utils.all_gather_object(self.seen) for image in seen]


@dataclass
class TrainState:
    """All that changes during a run."""

    method: Any  # a models.Method: student, teacher, bank and prior
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    meter: Meter  # what the steps since the last train event reported
    bad_images: BadImages  # images that were replaced in this epoch
    step: int = 0  # finished steps
    best: dict[str, float] = field(default_factory=lambda: {"step": 0, "student_top1": -1.0})
    evaluation_due: bool = False  # whether this step ends with an evaluation that has not ended

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint. All ranks must call it. The meter and the bad images are part of
        it, so that a resumed run logs the same values.
        """
        return {
            "step": self.step,
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "best": self.best,
            "evaluation_due": self.evaluation_due,
            "meter": self.meter.state_dict(),
            "bad_images": self.bad_images.of_all_ranks(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state that `state_dict` returned, in a run of any number of ranks."""
        self.method.load_state_dict(state["method"])
        # Options such as the momentum follow from the settings, which resume has compared.
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({**state["optimizer"], "param_groups": groups})
        self.scaler.load_state_dict(state["scaler"])
        self.meter.load_state_dict(state["meter"])
        self.bad_images.seen = state["bad_images"] if dist_utils.rank() == 0 else []
        self.step, self.best = state["step"], state["best"]
        self.evaluation_due = state.get("evaluation_due", False)  # older checkpoints were written after it


class RunIdentity(NamedTuple):
    """What two starts of the same run have in common; a resume compares it (util/run/resume.py)."""

    config: Config
    ranks: RankLayout
    steps_per_epoch: int
    split: tuple[str, str]  # id and SHA-256 of the labeled split
    classes: list[str]
    fingerprint: str  # of the names of all images

    def state_dict(self) -> dict[str, Any]:
        """Return the identity for a checkpoint."""
        return {
            "config": to_dict(self.config),
            "world": self.ranks.total,
            "processes": self.ranks.processes,
            "batch_size": self.ranks.batch_size,
            "steps_per_epoch": self.steps_per_epoch,
            "split": tuple(self.split),
            "classes": self.classes,
            "data": self.fingerprint,
        }
