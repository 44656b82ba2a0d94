"""The CIFAR recipe through train_semi.py and eval.py, on a few made-up images in files of CIFAR's format."""

import sys

import pytest
import torch
from conftest import ROOT
from test_train import assert_same_run
from trees import cifar10

import eval as eval_script
import train_semi
from dataset import cifar


@pytest.mark.slow(10)
def test_the_recipe_trains_evaluates_and_continues_exactly(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        cifar.CIFAR10, "_check_integrity", lambda self: True
    )  # its checksums are those of the real files
    monkeypatch.setattr(cifar.CIFAR10, "meta", {**cifar.CIFAR10.meta, "md5": None})
    root = cifar10(tmp_path / "cifar")

    def call(main, *flags):
        monkeypatch.setattr(sys, "argv", ["script", *map(str, flags)])
        main()

    def train(folder, *flags):
        call(
            train_semi.main,
            "--config",
            ROOT / "configs" / "cifar10_40.yaml",
            "--data",
            root,
            "--batch-size",
            "2",
            "--mu",
            "2",
            "--steps-per-epoch",
            "4",
            "--epochs",
            "2",
            "--print-freq",
            "2",
            "--device",
            "cpu",
            "--output-dir",
            folder,
            *flags,
        )

    train(tmp_path / "a", "--workers", "0")
    assert "40 labeled, 200 unlabeled, 20 test images" in capsys.readouterr().out

    monkeypatch.setattr(train_semi.checkpoint.Writer, "save", once(train_semi.checkpoint.Writer.save))
    with pytest.raises(KeyboardInterrupt):  # the second epoch's checkpoint is never written
        train(tmp_path / "b", "--workers", "1")
    monkeypatch.undo()
    monkeypatch.setattr(cifar.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(cifar.CIFAR10, "meta", {**cifar.CIFAR10.meta, "md5": None})
    train(tmp_path / "b", "--workers", "1")
    assert "continues from" in capsys.readouterr().out
    assert_same_run(tmp_path / "a", tmp_path / "b")

    call(eval_script.main, "--checkpoint", tmp_path / "a" / "last.pth", "--workers", "0")
    out = capsys.readouterr().out
    assert out.splitlines()[-1].startswith("* Acc@1 ") and "teacher: top-1" in out
    state = torch.load(tmp_path / "a" / "last.pth", weights_only=True)
    assert state["method"]["align.ring"].shape == (32, 10) and state["method"]["bank.z"].shape == (40, 128)
    groups = state["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [5e-4, 0.0]


def once(save):
    """Write the first epoch's checkpoint, and end with Ctrl-C before the next one."""
    written = []

    def call(writer, state):
        if written:
            raise KeyboardInterrupt
        written.append(state["step"])
        save(writer, state)

    return call
