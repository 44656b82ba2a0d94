"""Accuracy against a plain loop, and the meter."""

import math

import pytest
import torch

from util.errors import UserError
from util.run.metrics import Meter, count_hits, join_hits


def test_accuracy_equals_a_plain_loop():
    g = torch.Generator().manual_seed(0)
    logits, y = torch.randn(53, 8, generator=g), torch.randint(7, (53,), generator=g)  # no image of class 7
    top1 = top5 = 0
    own = [[0, 0] for _ in range(8)]
    for row, label in zip(logits.tolist(), y.tolist()):
        rank = sum(value > row[label] for value in row)
        top1, top5 = top1 + (rank == 0), top5 + (rank < 5)
        own[label] = [own[label][0] + (rank == 0), own[label][1] + 1]
    batches = zip(logits.split(10), y.split(10))
    networks = [lambda x: (x, None), lambda x: (-x, None)]
    result, worst = join_hits(count_hits(networks, batches, 8, torch.device("cpu")))
    assert worst.top1 < result.top1 or top1 < 10  # two networks in one pass over the batches
    assert (result.top1, result.top5) == pytest.approx((100 * top1 / 53, 100 * top5 / 53))
    assert result.per_class[:7] == pytest.approx([100 * a / n for a, n in own[:7]])
    assert math.isnan(result.per_class[7])


def test_top5_of_three_classes_is_100():
    batches = [(torch.eye(3), torch.tensor([0, 1, 1]))]
    (result,) = join_hits(count_hits([lambda x: (x, None)], batches, 3, torch.device("cpu")))
    assert result.top5 == 100 and result.top1 == pytest.approx(200 / 3)


def test_take_means_returns_the_means_since_its_last_call():
    meter = Meter()
    for step, value in enumerate((1.0, 3.0)):
        pseudo = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
        meter.add(
            step,
            {"loss_x": torch.tensor(value), "loss_u": torch.tensor(1.0)},
            pseudo,
            torch.tensor([1.0, 0.0]),
            torch.tensor([0, 0]),
        )
    assert meter.take_means() == pytest.approx(
        {"loss_x": 2, "loss_u": 1, "loss": 3, "mask": 0.5, "pseudo_acc": 0.5}
    )
    meter.add(2, {"loss_x": torch.tensor(7.0)}, None, None, None)
    assert meter.take_means() == {"loss_x": 7, "loss": 7}


def test_the_means_of_terms_add_up_where_a_step_left_one_out():
    meter = Meter()
    meter.add(0, {"loss_x": torch.tensor(1.0)}, None, None, None)
    state = meter.state_dict()
    meter = Meter()
    meter.load_state_dict(state)
    meter.add(1, {"loss_x": torch.tensor(2.0), "loss_ne": torch.tensor(4.0)}, None, None, None)
    assert meter.take_means() == {"loss_x": 1.5, "loss_ne": 2, "loss": 3.5}
    meter.add(2, {"loss_x": torch.tensor(1.0)}, None, None, None)
    assert meter.take_means() == {"loss_x": 1, "loss": 1}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_term_that_is_not_finite_is_named_with_its_step_as_the_log_counts_it(bad):
    meter = Meter()
    for step in range(5):
        meter.add(
            step,
            {"loss_x": torch.tensor(1.0), "loss_u": torch.tensor(bad if step >= 3 else 1.0)},
            None,
            None,
            None,
        )
    with pytest.raises(UserError, match=f"loss_u is {bad} at step 4;"):
        meter.take_means()
