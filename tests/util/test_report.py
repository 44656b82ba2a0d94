"""The table and the curves, from a log."""

import json

import pytest
from PIL import Image

from util import report
from util.config import Config, to_yaml
from util.errors import UserError


@pytest.fixture
def run_dir(tmp_path):
    folder = tmp_path / "fast"
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(Config(method="fixmatch", labels_per_class=4)))
    events = [
        {"event": "start", "step": 0, "split": "digits-4-seed0", "sha256": "ab" * 32},
        {"event": "train", "step": 10, "pseudo_acc": None},
        {
            "event": "eval",
            "step": 10,
            "student_top1": 50.0,
            "student_top5": 90.0,
            "teacher_top1": 40.0,
            "teacher_top5": 80.0,
        },
        {"event": "train", "step": 20, "pseudo_acc": 0.75},
        {
            "event": "eval",
            "step": 20,
            "student_top1": 61.25,
            "student_top5": 90.0,
            "teacher_top1": 55.5,
            "teacher_top5": 80.0,
        },
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return folder


def test_table_and_curves(run_dir, tmp_path):
    run = report.read(run_dir)
    assert "| fixmatch | 4 | 20 | 61.25 | 55.50 |" in report.table([run])
    report.draw([run], tmp_path / "c.png")
    with Image.open(tmp_path / "c.png") as image:
        assert image.size == (1100, 420)
        assert len(image.getcolors(100000)) > 20  # something was drawn


def test_folders_that_are_not_finished_runs(run_dir, tmp_path):
    with pytest.raises(UserError, match="not the output directory"):
        report.read(tmp_path)
    (run_dir / "log.jsonl").write_text('{"event": "train", "step": 1, "pseudo_acc": null}\n')
    with pytest.raises(UserError, match="no evaluation yet"):
        report.read(run_dir)
    (run_dir / "log.jsonl").write_text("{\n")
    with pytest.raises(UserError, match="damaged"):
        report.read(run_dir)


def test_a_last_line_that_a_crash_cut_short_is_left_out(run_dir):
    with open(run_dir / "log.jsonl", "a") as file:
        file.write('{"event": "eval", "step": 30, "stu')
    assert report.read(run_dir).evals[-1]["step"] == 20


def test_runs_on_different_splits_are_not_compared(run_dir, tmp_path, mistake):
    other = tmp_path / "slow"
    other.mkdir()
    (other / "config.yaml").write_text((run_dir / "config.yaml").read_text())
    (other / "log.jsonl").write_text((run_dir / "log.jsonl").read_text().replace("abab", "cdcd"))
    report.check_same_split([report.read(run_dir)] * 2)
    mistake(report.main, [run_dir, other], "digits-4-seed0", "slow", "do not compare")


@pytest.mark.parametrize(
    "line",
    [
        '{"step": 20}',
        "[1]",
        '{"event": "eval", "step": 3, "student_top1": 1.0}',
        '{"event": "train", "step": 3}',
    ],
)
def test_an_event_of_another_kind_is_one_line(line, tmp_path):
    (tmp_path / "log.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match="log.jsonl is damaged: an event is not one of ours"):
        report.read(tmp_path)
