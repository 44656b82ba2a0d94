"""eval.py as a user runs it."""

import re

import pytest
import torch
from conftest import one_line

import eval as eval_script
from util import checkpoint


def test_it_needs_only_the_checkpoint_and_ends_with_the_published_line(finished, command):
    folder, trained = finished
    done = command("eval.py", "--checkpoint", folder / "best.pth", "--per-class", new_process=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert re.fullmatch(r"\* Acc@1 \d+\.\d{3} Acc@5 \d+\.\d{3}", lines[-1])
    assert sum(line.startswith("class ") for line in lines) == 10
    assert any(line.startswith("teacher: top-1") for line in lines)
    best = re.search(r"best student top-1 (\d+\.\d{3})", trained.stdout)[1]
    assert lines[-1].startswith(f"* Acc@1 {best} ")  # the accuracy that training reported


def test_accuracies_of_classes_are_printed_on_request(finished, command):
    folder, _ = finished
    assert "class " not in command("eval.py", "--checkpoint", folder / "best.pth").stdout


@pytest.mark.parametrize(
    "change, words",
    [
        (
            lambda s: s["config"].update(backbone="resnet18_encoder"),
            ["a.pth", "another network or number of classes"],
        ),
        (lambda s: s["config"].update(cls=7), ["cls is 7", "10 classes"]),
        (
            lambda s: s["method"].update({"student.fc.weight": torch.zeros(7, 64)}),
            ["a.pth", "student.fc.weight is [7, 64]"],
        ),
        (lambda s: s["config"].update(color="red"), ["a.pth", "'color'"]),
        (lambda s: s["config"].update(method="magic"), ["a.pth", "'magic'"]),
        (lambda s: s.update(split=("another", "0")), ["a.pth", "split", "another"]),
        (lambda s: s.pop("method"), ["a.pth", "was not written by train_semi.py", "'method'"]),
    ],
)
def test_checkpoints_that_do_not_fit_are_refused(finished, mistake, tmp_path, change, words):
    state = torch.load(finished[0] / "best.pth", weights_only=True)
    change(state)
    checkpoint.save(
        tmp_path / "a.pth", {key: value for key, value in state.items() if key not in ("format", "sha256")}
    )
    mistake(eval_script.main, ["--checkpoint", tmp_path / "a.pth"], *words)


def test_missing_truncated_and_foreign_files_are_refused(finished, mistake, tmp_path):
    mistake(eval_script.main, ["--checkpoint", tmp_path / "none.pth"], "none.pth", "does not exist")
    whole = (finished[0] / "best.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    mistake(eval_script.main, ["--checkpoint", tmp_path / "cut.pth"], "cut.pth", "damaged")
    torch.save({"state_dict": {"a": torch.zeros(1)}}, tmp_path / "foreign.pth")
    mistake(
        eval_script.main,
        ["--checkpoint", tmp_path / "foreign.pth"],
        "foreign.pth",
        "was not written by train_semi.py",
    )
    mistake(eval_script.main, [], "--checkpoint")


def test_a_mistake_in_a_real_process(command, tmp_path):
    done = command("eval.py", "--checkpoint", tmp_path / "none.pth", new_process=True)
    one_line(done.returncode, done.stderr, "none.pth", "does not exist")
