"""The table and the curves that util.report makes from logs."""

import json
import os

import pytest
from PIL import Image

from util.config import Config, to_yaml
from util.errors import UserError
from util.inspect import doctor, report


@pytest.fixture
def run_dir(tmp_path):
    folder = tmp_path / "fast"
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(Config(method="fixmatch", labels_per_class=4)))
    events = [
        {"event": "start", "step": 0, "split": "digits-4-seed0", "sha256": "ab" * 32},
        {"event": "train", "step": 10, "epoch": 1, "pseudo_acc": None},
        {
            "event": "eval",
            "step": 10,
            "student_top1": 50.0,
            "student_top5": 90.0,
            "teacher_top1": 40.0,
            "teacher_top5": 80.0,
        },
        {"event": "train", "step": 20, "epoch": 2, "pseudo_acc": 0.75},
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


def test_the_table_and_the_curves_show_the_run(run_dir, tmp_path):
    run = report.read_evaluated_run(run_dir)
    assert "| fixmatch | 4 | 20 | 61.25 | 55.50 |" in report.table([run])
    report.draw([run], tmp_path / "c.png")
    with Image.open(tmp_path / "c.png") as image:
        assert image.size == (1100, 420)
        assert len(image.getcolors(100000)) > 20  # something was drawn


def test_a_folder_without_an_evaluated_run_is_a_user_error(run_dir, tmp_path):
    with pytest.raises(UserError, match="not the output directory"):
        report.read_evaluated_run(tmp_path)
    (run_dir / "log.jsonl").write_text('{"event": "train", "step": 1, "epoch": 1, "pseudo_acc": null}\n')
    with pytest.raises(UserError, match="no evaluation yet"):
        report.read_evaluated_run(run_dir)
    (run_dir / "log.jsonl").write_text("{\n")
    with pytest.raises(UserError, match="damaged"):
        report.read_evaluated_run(run_dir)


def test_an_incomplete_last_line_is_ignored(run_dir):
    with open(run_dir / "log.jsonl", "a") as file:
        file.write('{"event": "eval", "step": 30, "stu')
    assert report.read_evaluated_run(run_dir).eval_events[-1]["step"] == 20


def test_runs_on_different_splits_are_not_compared(run_dir, tmp_path, mistake):
    other = tmp_path / "slow"
    other.mkdir()
    (other / "config.yaml").write_text((run_dir / "config.yaml").read_text())
    (other / "log.jsonl").write_text((run_dir / "log.jsonl").read_text().replace("abab", "cdcd"))
    report.check_same_split([report.read_evaluated_run(run_dir)] * 2)
    mistake(report.main, [run_dir, other], "digits-4-seed0", "slow", "not comparable")


@pytest.mark.parametrize(
    "line",
    [
        '{"step": 20}',
        "[1]",
        '{"event": "eval", "step": 3, "student_top1": 1.0}',
        '{"event": "train", "step": 3}',
    ],
)
def test_an_unexpected_event_is_a_user_error(line, tmp_path):
    (tmp_path / "log.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match="log.jsonl is damaged or of another version: unexpected event"):
        report.read_evaluated_run(tmp_path)


@pytest.mark.parametrize("value", ['"high"', "NaN", "true"])
def test_an_accuracy_that_is_no_number_is_a_user_error(value, run_dir):
    log = (run_dir / "log.jsonl").read_text()
    (run_dir / "log.jsonl").write_text(log.replace("61.25", value))
    with pytest.raises(UserError, match="log.jsonl is damaged or of another version: unexpected event"):
        report.read_evaluated_run(run_dir)


def test_curves_replace_only_a_png(run_dir, tmp_path, mistake, capsys, monkeypatch):
    for name in ("log.jsonl", "config.yaml"):
        before = (run_dir / name).read_bytes()
        mistake(report.main, [run_dir, "--curves", run_dir / name], "is not a PNG image", "--curves")
        assert (run_dir / name).read_bytes() == before
    mistake(report.main, [run_dir, "--curves", run_dir], "is a directory")
    monkeypatch.setattr("sys.argv", ["report", str(run_dir), "--curves", str(tmp_path / "c.png")])
    report.main()
    assert "replaces" not in capsys.readouterr().out
    report.main()
    assert f"replaces {tmp_path / 'c.png'}, a PNG image" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.png", "fast"]


def test_folders_that_are_no_runs_are_named(tmp_path, mistake):
    os.mkfifo(tmp_path / "log.jsonl")
    for folder, words in (
        (tmp_path, "log.jsonl is a FIFO"),
        ("~no-such-user", "is not the home folder of a user"),
        ("x" * 300, "File name too long"),
    ):
        mistake(report.main, [folder], words)
        mistake(doctor.main, [folder], words)
