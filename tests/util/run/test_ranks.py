"""How a run resumes with another number of processes."""

import pytest

from util.errors import UserError
from util.run.ranks import RankLayout, plan_ranks, plan_ranks_on_resume


def saved(world, processes, batch_size):
    return {"world": world, "processes": processes, "batch_size": batch_size}


def test_a_new_run_has_one_rank_per_process_or_the_virtual_ranks():
    assert plan_ranks(8, 0, 4) == RankLayout(4, 4, 8) and plan_ranks(8, 0, 4).virtual_ranks_per_process == 1
    assert plan_ranks(8, 8, 2) == RankLayout(8, 2, 8) and plan_ranks(8, 8, 2).virtual_ranks_per_process == 4
    assert "4 on each of 2 processes" in str(plan_ranks(8, 8, 2))
    with pytest.raises(UserError, match="8 virtual ranks cannot be shared evenly by 3 processes"):
        plan_ranks(8, 8, 3)


def test_the_same_number_of_ranks_resumes_without_a_warning():
    assert plan_ranks_on_resume(plan_ranks(8, 0, 4), 0, "refuse", saved(4, 4, 8)) == (RankLayout(4, 4, 8), "")


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_virtual_ranks_compute_the_same_step_on_other_processes(processes):
    ranks, warning = plan_ranks_on_resume(plan_ranks(8, 8, processes), 8, "refuse", saved(8, 8, 8))
    assert ranks == RankLayout(8, processes, 8) and ("the same step" in warning) == (processes != 8)


def test_another_number_of_ranks_is_refused_by_default():
    with pytest.raises(UserError, match="has 8 ranks, but this start has 4: use --virtual-ranks 8"):
        plan_ranks_on_resume(plan_ranks(8, 0, 4), 0, "refuse", saved(8, 8, 8))


def test_continue_uses_virtual_ranks_if_they_can_be_shared_evenly():
    ranks, warning = plan_ranks_on_resume(plan_ranks(8, 0, 4), 0, "continue", saved(8, 8, 8))
    assert ranks == RankLayout(8, 4, 8) and "the same step" in warning


@pytest.mark.parametrize(
    "planned, virtual, expected",
    [(plan_ranks(8, 0, 16), 0, RankLayout(16, 16, 4)), (plan_ranks(8, 4, 2), 4, RankLayout(4, 2, 16))],
)
def test_otherwise_the_same_images_are_grouped_differently(planned, virtual, expected):
    ranks, warning = plan_ranks_on_resume(planned, virtual, "continue", saved(8, 8, 8))
    assert ranks == expected and "differently" in warning
    assert plan_ranks_on_resume(planned, virtual, "refuse", saved(*expected)) == (
        expected,
        "",
    )  # and the next start resumes with these ranks


def test_images_that_cannot_be_shared_evenly_are_a_user_error():
    with pytest.raises(UserError, match="the 64 labeled images of a step cannot be shared evenly by 3 ranks"):
        plan_ranks_on_resume(plan_ranks(8, 0, 3), 0, "continue", saved(8, 8, 8))
