"""Packages that take seconds to import are imported only when they are needed."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT


def imported(*arguments):
    """The top-level packages that a new Python process imports."""
    call = [sys.executable, "-X", "importtime", *arguments]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in re.findall(r"\| +([\w.]+)$", done.stderr, re.M)}


@pytest.mark.parametrize(
    "program",
    ["train_semi.py", "eval.py", "-m dataset.check", "-m dataset.splits", "-m util.report", "-m util.doctor"],
)
def test_help_does_not_import_torch(program):
    assert "torch" not in imported(*program.split(), "--help")


def test_the_digits_do_not_import_torchvision():
    code = (
        "from dataset.build import build_data\nfrom dataset.loader import Stream\n"
        "from util.config import Config\n"
        "data = build_data(Config(dataset='digits', cls=10, labels_per_class=1), gpu=False)\n"
        "Stream(data, 10, 7, seed=0)[0]"
    )
    found = imported("-c", code)
    assert "torch" in found and "torchvision" not in found
