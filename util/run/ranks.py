"""How many ranks a step has, how many of them run in each process, and how a run resumes with another number
of processes.
"""

from typing import Any, NamedTuple

from util.errors import UserError


class RankLayout(NamedTuple):
    """A rank is a group of images with its own BN statistics: `batch_size` labeled images and their share of
    the unlabeled ones. A process with several (virtual) ranks runs them one after another.
    """

    total: int  # ranks of a step
    processes: int
    batch_size: int  # labeled images of a rank (B)

    @property
    def virtual_ranks_per_process(self) -> int:
        return self.total // self.processes

    def __str__(self) -> str:
        return f"{self.total} rank{'s' * (self.total > 1)} of {self.batch_size} labeled images" + (
            f", {self.virtual_ranks_per_process} on each of {self.processes} processes"
            if self.virtual_ranks_per_process > 1
            else ""
        )


def plan_ranks(batch_size: int, virtual_ranks: int, processes: int) -> RankLayout:
    """Return the ranks of a new run: one per process, or `virtual_ranks` in all. Raises UserError if the
    processes cannot share them evenly.
    """
    total = virtual_ranks or processes
    if total % processes:
        raise UserError(
            f"{total} virtual ranks cannot be shared evenly by {processes} processes: choose a number of "
            f"processes that divides {total}, or another --virtual-ranks"
        )
    return RankLayout(total, processes, batch_size)


def plan_ranks_on_resume(
    planned: RankLayout, virtual_ranks: int, other_ranks: str, state: dict[str, Any]
) -> tuple[RankLayout, str]:
    """Return (ranks, warning) with which a run resumes from the checkpoint `state`. The step number and the
    images of each step stay the same in every case.

    planned: the ranks of a new run with the same settings.

    1. If there are as many planned ranks as in the checkpoint, every step computes the same, up to rounding
       if the number of processes differs.
    2. If there are not, and other_ranks is `refuse`, UserError is raised.
    3. If there are not, and other_ranks is `continue`: if virtual_ranks is 0 and the processes can share the
       checkpoint's ranks evenly, they run these as virtual ranks, as in 1. Otherwise the images of a step are
       divided among the planned ranks, which changes the BN statistics.
    """
    before = RankLayout(state["world"], state["processes"], state["batch_size"])
    other = planned.total != before.total
    if other and other_ranks == "refuse":
        raise UserError(
            f"the checkpoint has {before.total} ranks, but this start has {planned.total}: use "
            f"--virtual-ranks {before.total} to compute the same steps on fewer processes, or "
            "--other-ranks continue"
        )
    if other and (virtual_ranks or before.total % planned.processes):
        images = before.total * before.batch_size
        if images % planned.total:
            raise UserError(
                f"the {images} labeled images of a step cannot be shared evenly by {planned.total} ranks: "
                "choose another number of processes, or --virtual-ranks"
            )
        ranks = planned._replace(batch_size=images // planned.total)
        return ranks, (
            f"resumes with {ranks} instead of {before.total} of {before.batch_size}: the images of a step "
            "are the same, but BN groups them differently, so results will differ"
        )
    ranks = before._replace(processes=planned.processes)
    if ranks == before:
        return ranks, ""
    return ranks, (
        f"resumes with {ranks}, in {ranks.processes} instead of {before.processes} processes: the same step, "
        "up to rounding"
    )
