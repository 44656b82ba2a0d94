"""The learning rate against the formulas of the recipes."""

import math

import pytest

from util.config import Config, validate
from util.errors import UserError
from util.run.schedule import learning_rate

RECIPE = dict(lr=0.03, epochs=400, warmup_epoch=5, cos=True, schedule=[120, 160])


def test_warm_up_is_linear_in_the_step():
    for step in (0, 1, 250, 499):
        assert learning_rate(Config(**RECIPE), step, 100) == pytest.approx(0.03 * (step + 1) / 500)
    assert learning_rate(Config(**RECIPE), 499, 100) == pytest.approx(0.03)


def test_the_cosine_changes_once_per_epoch():
    for epoch in (5, 6, 200, 399):
        expected = 0.03 * 0.5 * (1 + math.cos(math.pi * (epoch - 5) / 395))
        assert (
            learning_rate(Config(**RECIPE), 100 * epoch, 100)
            == learning_rate(Config(**RECIPE), 100 * epoch + 99, 100)
            == pytest.approx(expected)
        )


def test_the_schedule_divides_the_rate_by_10():
    flat = {**RECIPE, "cos": False, "warmup_epoch": 0}
    assert [learning_rate(Config(**flat), 100 * e, 100) for e in (0, 119, 120, 160)] == pytest.approx(
        [0.03, 0.03, 0.003, 0.0003]
    )


def test_a_run_may_be_shorter_than_its_warm_up():
    assert learning_rate(Config(**{**RECIPE, "epochs": 2}), 199, 100) == pytest.approx(0.03 * 200 / 500)


CIFAR = dict(lr=0.03, epochs=1024, warmup_epoch=0, cos=False, cos_7_16=True, schedule=[1])


def test_cos_7_16_changes_with_every_step():
    total = 1 << 20
    assert learning_rate(Config(**CIFAR), 0, 1024) == 0.03
    for step in (1000, 1001, 600_000, 600_001):
        assert learning_rate(Config(**CIFAR), step, 1024) == pytest.approx(
            0.03 * math.cos(7 * math.pi * step / (16 * total)), rel=1e-14
        )
    assert learning_rate(Config(**CIFAR), total // 2, 1024) == pytest.approx(
        0.03 * 0.7730104533627370
    )  # cos(7π/32)
    assert learning_rate(Config(**CIFAR), total - 1, 1024) == pytest.approx(
        0.03 * 0.1950903220161283, rel=1e-4
    )  # cos(7π/16)


def test_cos_7_16_starts_from_the_full_rate_after_warm_up():
    rate = [
        learning_rate(Config(**{**CIFAR, "warmup_epoch": 1, "epochs": 3}), step, 1024)
        for step in (0, 1023, 1024, 2048)
    ]
    assert rate == pytest.approx([0.03 / 1024, 0.03, 0.03, 0.03 * math.cos(7 * math.pi / 32)])


def test_two_schedules_are_a_user_error():
    with pytest.raises(UserError, match="cos_7_16"):
        validate(Config(cos=True, cos_7_16=True))
