"""Every row of docs/MISTAKES.md: the command prints that one line on stderr, and its exit code is 2."""

import shutil

import mistakes
import pytest

ROWS = mistakes.rows()


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(mistakes.template(), tmp_path / "w", symlinks=True)


def test_the_table_has_rows_about_every_kind_of_input():
    commands = [command for command, _ in ROWS]
    assert len(set(commands)) == len(commands) >= 71
    for part in (
        "train_semi.py",
        "eval.py",
        "dataset.check",
        "dataset.splits",
        "util.doctor",
        "util.report",
        "WORLD_SIZE=",
    ):
        assert any(part in command for command in commands)


@pytest.mark.parametrize("command, printed", ROWS, ids=[command for command, _ in ROWS])
def test_a_mistake_is_one_line(command, printed, folder):
    assert mistakes.run(command, folder) == (2, f"error: {printed}")
