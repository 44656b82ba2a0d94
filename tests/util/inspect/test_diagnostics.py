"""The diagnostics event against a plain loop, and its counts after resuming."""

import json
import math

import numpy as np
import pytest
import torch

from models import SimMatch
from tests.models import small
from util.errors import UserError
from util.inspect.diagnostics import diagnostics_event, event_keys, kl, log_stop_reason, marginal
from util.run.log import Logger
from util.run.metrics import Meter

NAMES = ["a", "b", "c", "d"]
COLUMNS = (SimMatch.loss_names, SimMatch.diagnostic_names)
LABELS = np.array([0, 1, 1, 2, 3, 3, 3, 3])  # of the labeled images: shares 1/8, 2/8, 1/8, 4/8


def batch(seed, has_true_labels=True):
    """pseudo_label [20, 4], mask [20], true_labels [20] or None"""
    g = torch.Generator().manual_seed(seed)
    p = torch.softmax(3 * torch.randn(20, 4, generator=g), dim=1)
    return p, (p.amax(dim=1) > 0.7).float(), torch.randint(4, (20,), generator=g) if has_true_labels else None


@pytest.mark.parametrize("has_true_labels", [True, False])
def test_counts_equal_a_plain_loop(has_true_labels):
    meter, expected = Meter(), [[0] * 4 for _ in range(4 if has_true_labels else 2)]
    for step in range(3):
        p, mask, true_labels = batch(step, has_true_labels)
        meter.add(step, {"loss_x": torch.tensor(1.0)}, p, mask, true_labels)
        for i in range(20):
            c = max(range(4), key=p[i].tolist().__getitem__)
            correct = has_true_labels and c == true_labels[i]
            for row, yes in enumerate(
                [True, mask[i] == 1, correct, correct and mask[i] == 1][: len(expected)]
            ):
                expected[row][c] += int(yes)
    assert meter.take_counts().tolist() == expected and sum(expected[1]) not in (0, 60)
    assert meter.take_counts() is None


def test_counts_continue_after_resuming():
    whole, first, second = Meter(), Meter(), Meter()
    for step in range(4):
        for meter in (whole, first if step < 2 else second):
            meter.add(step, {"loss_x": torch.tensor(1.0)}, *batch(step))
        if step == 1:
            second.load_state_dict(first.state_dict())
    assert torch.equal(whole.take_counts(), second.take_counts())
    old = {key: value for key, value in first.state_dict().items() if key != "counts"}
    second.load_state_dict(old)  # an older checkpoint, without counts
    assert second.take_counts() is None and second.take_means() == first.take_means()


def test_marginal_describes_the_class_distribution():
    counts = np.array([[10, 0, 5, 85], [8, 0, 0, 72], [9, 0, 1, 60], [8, 0, 0, 56]])
    out = marginal(counts, np.bincount(LABELS) / 8, NAMES)
    assert (out["pseudo_labels"], out["mask"], out["pseudo_acc"], out["confident_acc"]) == (
        100,
        0.8,
        0.7,
        0.8,
    )
    assert (out["marginal_min"], out["marginal_max"], out["starved"]) == (0, 0.85, 1)
    assert (
        [name for name, _ in out["most"]] == ["d", "a", "c", "b"]
        and out["most"][0] == ["d", 0.85]
        and out["least"][0] == ["b", 0.0]
    )
    assert out["marginal_kl"] == pytest.approx(
        0.1 * math.log(0.1 / 0.125) + 0.05 * math.log(0.05 / 0.125) + 0.85 * math.log(0.85 / 0.5)
    )
    assert marginal(counts[:2], np.bincount(LABELS) / 8, NAMES).keys() == out.keys() - {
        "pseudo_acc",
        "confident_acc",
    }


def test_kl_is_0_for_equal_distributions_and_keeps_nan():
    assert kl(np.array([2.0, 6.0]), np.array([0.25, 0.75])) == 0
    assert kl(np.array([1.0, 0.0]), np.array([0.5, 0.5])) == pytest.approx(math.log(2))
    assert math.isnan(kl(np.array([1.0, math.nan]), np.array([0.5, 0.5])))


def test_the_event_has_all_keys_in_order():
    diag = {
        "loss_x": 1.0,
        "loss_u": 3.0,
        "loss_in": 0.0,
        "grad_x": 2.0,
        "grad_u": math.inf,
        "q_entropy": 1.5,
        "bank_drift": 0.25,
    }
    diag = {name: torch.tensor(value) for name, value in diag.items()} | {
        "prior": torch.tensor([0.0, 0.5, 0.0, 0.0])
    }
    diag |= small.method().age_diagnostics(np.array([0, 1, 2, 3, 4, 5, -1, 5]), 3)
    event = diagnostics_event(3, 20, *COLUMNS, diag, torch.tensor([[1, 2, 1, 4]] * 2), LABELS, NAMES)
    assert list(event) == event_keys(*COLUMNS)
    assert [event[f"share_{name}"] for name in ("x", "u", "in")] == [0.25, 0.75, 0]
    assert (
        event["grad_u"] is None
        and event["grad_in"] is None
        and event["not_finite"] == ["grad_u"]
        and event["marginal_kl"] == 0
    )
    assert event["prior_kl"] == pytest.approx(math.log(4))
    assert [
        event[f"bank_{name}"] for name in ("rows", "drift", "unwritten", "age_median", "age_max", "pass")
    ] == [8, 0.25, 1, 3, 5, 3]
    json.dumps(event, allow_nan=False)
    diag["loss_u"] = torch.tensor(math.nan)
    broken = diagnostics_event(3, 20, *COLUMNS, diag, None, LABELS, NAMES)
    assert (
        broken["not_finite"] == ["share_x", "share_u", "share_in", "grad_u", "loss_u"]
        and broken["mask"] is None
    )
    json.dumps(broken, allow_nan=False)


def test_values_that_a_method_does_not_have_are_null():
    diag = {"loss_x": torch.tensor(2.0), "grad_x": torch.tensor(1.0)}
    event = diagnostics_event(1, 20, *COLUMNS, diag, None, LABELS, NAMES)
    assert list(event) == event_keys(*COLUMNS)
    assert {key for key, value in event.items() if value is not None} == {
        "epoch",
        "steps_per_epoch",
        "share_x",
        "grad_x",
        "not_finite",
    }


def test_the_error_that_ends_a_run_is_logged(tmp_path):
    log = Logger(tmp_path, 0, 50, active=True)
    with pytest.raises(UserError, match="loss_x is nan"), log_stop_reason(log, 7):
        raise UserError("loss_x is nan at step 7")
    with log_stop_reason(log, 8):
        pass
    log.close()
    assert [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [
        {"event": "stop", "step": 7, "why": "loss_x is nan at step 7"}
    ]


def test_values_without_a_column_follow_in_the_order_of_the_method():
    diag = {"loss_x": torch.tensor(2.0), "loss_toy": torch.tensor(2.0), "toy_norm": torch.tensor(3.0)}
    event = diagnostics_event(1, 20, (), (), diag, None, LABELS, NAMES)
    assert list(event) == event_keys(["loss_x", "loss_toy"], ["toy_norm"])
    assert event["share_toy"] == 0.5 and event["toy_norm"] == 3
