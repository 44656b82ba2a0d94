"""The learning rate against the recipe's formulas."""
import math

import pytest

from util.schedule import learning_rate

RECIPE = dict(lr=0.03, steps_per_epoch=100, epochs=400, warmup_epoch=5, cos=True, schedule=[120, 160])


def test_warm_up_is_linear_by_the_step():
    for step in (0, 1, 250, 499):
        assert learning_rate(step, **RECIPE) == pytest.approx(0.03 * (step + 1) / 500)
    assert learning_rate(499, **RECIPE) == pytest.approx(0.03)


def test_cosine_moves_once_an_epoch():
    for epoch in (5, 6, 200, 399):
        expected = 0.03 * 0.5 * (1 + math.cos(math.pi * (epoch - 5) / 395))
        assert learning_rate(100 * epoch, **RECIPE) == learning_rate(100 * epoch + 99, **RECIPE) == pytest.approx(expected)


def test_steps_without_cosine():
    flat = {**RECIPE, "cos": False, "warmup_epoch": 0}
    assert [learning_rate(100 * e, **flat) for e in (0, 119, 120, 160)] == pytest.approx([0.03, 0.03, 0.003, 0.0003])


def test_a_run_shorter_than_its_warm_up():
    assert learning_rate(199, **{**RECIPE, "epochs": 2}) == pytest.approx(0.03 * 200 / 500)
