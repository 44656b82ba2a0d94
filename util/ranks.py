"""How many ranks a step has, how many of them each process plays, and how a run goes on with another number
of processes.
"""

from typing import Any, NamedTuple

from util.errors import UserError


class RankLayout(NamedTuple):
    """A rank is a group of images with BN statistics of its own. `batch_size` labeled images (B) make one."""

    total: int  # of a global step
    processes: int  # that share them
    batch_size: int

    @property
    def virtual_ranks_per_process(self) -> int:
        """Ranks that each process plays, one after the other."""
        return self.total // self.processes

    def __str__(self) -> str:
        return f"{self.total} rank{'s' * (self.total > 1)} of {self.batch_size} labeled images" + (
            f", {self.virtual_ranks_per_process} on each of {self.processes} processes"
            if self.virtual_ranks_per_process > 1
            else ""
        )


def plan_ranks(batch_size: int, virtual_ranks: int, processes: int) -> RankLayout:
    """Of a new run: as many as processes, or `virtual_ranks` shared by them. Raises UserError if they cannot
    be shared evenly.
    """
    total = virtual_ranks or processes
    if total % processes:
        raise UserError(
            f"{total} virtual ranks cannot be shared evenly by {processes} processes: start a number of them that "
            f"divides {total}, or choose another --virtual-ranks"
        )
    return RankLayout(total, processes, batch_size)


def plan_ranks_on_resume(
    asked: RankLayout, virtual_ranks: int, other_ranks: str, state: dict[str, Any]
) -> tuple[RankLayout, str]:
    """(ranks, remark) with which a run goes on from the checkpoint `state`, always at the same step, with the
    same images in it.

    1. The same number of ranks: the same step. On another number of processes it is rounded otherwise.
    2. Another number, and other_ranks is `continue`: without virtual_ranks, virtual ranks make the same step,
    where they can
       be shared evenly; otherwise the images of a step are grouped anew, which changes BN's statistics.
    3. Another number, and other_ranks is `refuse`: UserError.
    """
    before = RankLayout(state["world"], state["processes"], state["batch_size"])
    if asked.total != before.total:
        if other_ranks == "refuse":
            raise UserError(
                f"the checkpoint is of {before.total} ranks, this start is of {asked.total}: --virtual-ranks "
                f"{before.total} computes the same step on fewer processes, --other-ranks continue goes on with "
                "what fits"
            )
        images = before.total * before.batch_size
        if not virtual_ranks and before.total % asked.processes == 0:
            asked = asked._replace(total=before.total)
        elif images % asked.total:
            raise UserError(
                f"the {images} labeled images of a step cannot be shared evenly by {asked.total} ranks: choose another "
                "number of processes, or --virtual-ranks"
            )
        else:
            asked = asked._replace(batch_size=images // asked.total)
            return asked, (
                f"goes on at the same step and images with {asked} (it had {before.total} of {before.batch_size}): "
                "BN's statistics are of other groups, so results are not those of the run as it began"
            )
    asked = asked._replace(batch_size=before.batch_size)
    if asked.processes == before.processes:
        return asked, ""
    return (
        asked,
        f"goes on with {asked} (it had {before.processes} processes): the same step, rounded otherwise",
    )
