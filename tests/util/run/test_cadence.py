"""When the log, diagnostics, evaluations and checkpoints are due, and images per second."""

import time

import pytest

from util.config import Config
from util.run.cadence import Due, Throughput, due_after

NOTHING = Due(log=False, diagnose=False, evaluate=False, save=False, end_of_epoch=False)


def due(step, **settings):
    values = {"epochs": 5, "print_freq": 4, "eval_freq": 2, "diagnose_freq": 0, "save_freq": 0, **settings}
    return due_after(step, 10, Config(**values))


@pytest.mark.parametrize(
    "step, settings, expected",
    [
        (3, {}, NOTHING),
        (4, {}, NOTHING._replace(log=True)),
        (10, {}, NOTHING._replace(end_of_epoch=True)),  # eval_freq is 2
        (20, {}, Due(log=True, diagnose=True, evaluate=True, save=True, end_of_epoch=True)),
        (50, {}, Due(log=True, diagnose=True, evaluate=True, save=True, end_of_epoch=True)),  # the last step
        (30, {"print_freq": 7}, NOTHING._replace(end_of_epoch=True)),
        (6, {"save_freq": 3}, NOTHING._replace(save=True)),
        (6, {"diagnose_freq": 3}, NOTHING._replace(diagnose=True)),
        (
            20,
            {"diagnose_freq": 3},
            Due(log=True, diagnose=False, evaluate=True, save=True, end_of_epoch=True),
        ),
    ],
)
def test_what_is_due_after_a_step(step, settings, expected):
    assert due(step, **settings) == expected


def test_every_evaluation_is_logged_and_saved_and_the_last_step_is_evaluated():
    for eval_freq in range(1, 7):
        for step in range(1, 51):
            found = due(step, eval_freq=eval_freq)
            assert not found.evaluate or found.log and found.save and found.end_of_epoch
        assert due(50, eval_freq=eval_freq).evaluate


def test_images_per_second_leave_out_pauses(monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    throughput = Throughput(images_per_step=30, step=5)
    now += 2.0
    with throughput.paused():
        now += 50.0
    assert throughput.take(7) == 30.0  # 2 steps of 30 images in 2 seconds
    now += 1.0
    assert throughput.take(8) == 30.0
    now += 9.0
    throughput.restart(8)
    now += 3.0
    assert throughput.take(9) == 10.0
