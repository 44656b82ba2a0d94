"""A method in one file: it trains, logs, is diagnosed, resumes, and is shown by doctor and report, although
no shared code knows its terms and values. And several strong views, as a user asks for them.
"""

import json
import sys

import pytest
import torch.nn.functional as F
from trees import imagenet

import train_semi
from benchmark.same_run import difference
from models import METHODS
from models.method import Method, StepOutput, forward_views
from util import fields
from util.fields import Declared
from util.inspect import doctor, report
from util.inspect.diagnostics import event_keys

FLAGS = (
    "--config configs/digits.yaml --method toy --batch-size 5 --steps-per-epoch 6 --epochs 3 "
    "--warmup-epoch 0 --eval-freq 1 --print-freq 2 --workers 0 --device cpu"
).split()


class Toy(Method):
    """Strong views shall have small embeddings before the normalization: a loss without a meaning."""

    def __init__(self, network):
        super().__init__(network, ema_m=0.9, bn_mode="average")
        self.weight = 0.5

    def losses(self, batch, targets, student, *, bank_ready):
        logits, _ = forward_views(student, [batch.x, batch.u_strong[0]], batch.u_strong[1:])
        logits_x, logits_us = logits[: len(batch.x)], logits[len(batch.x) :]
        loss_toy = self.weight * logits_us.square().mean()
        return StepOutput({"loss_x": F.cross_entropy(logits_x, batch.y), "loss_toy": loss_toy})

    def diagnostics(self, batch, targets, *, bank_ready):
        return {"toy_norm": self.student.fc.weight.norm()}


@pytest.fixture
def toy(monkeypatch, capsys):
    """Register Toy; toy(main, *flags) calls a script's main and returns its exit code and output."""
    monkeypatch.setitem(METHODS, "toy", f"{__name__}:Toy")
    monkeypatch.setitem(fields.METHODS, "toy", Declared({}, set(), {}))

    def call(main, *flags):
        monkeypatch.setattr(sys, "argv", ["script", *map(str, flags)])
        try:
            code = main() or 0
        except SystemExit as stop:
            code = stop.code
        return code, capsys.readouterr().out

    return call


def events(folder, kind):
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [event for event in log if event["event"] == kind]


@pytest.mark.parametrize("ranks", [1, 5])
def test_a_method_of_its_own_file_trains_and_is_shown(toy, tmp_path, ranks):
    flags = [*FLAGS, "--virtual-ranks", ranks]
    code, out = toy(train_semi.main, *flags, "--output-dir", tmp_path / "run")
    assert code == 0 and " (x " in out and " toy " in out and " u " not in out
    trains, diagnostics = events(tmp_path / "run", "train"), events(tmp_path / "run", "diagnostics")
    keys = "event step epoch loss loss_x loss_toy mask pseudo_acc lr images_per_s"
    assert len(trains) == 9 and {tuple(event) for event in trains} == {tuple(keys.split())}
    for event in trains:
        assert event["loss"] == pytest.approx(event["loss_x"] + event["loss_toy"])
    expected = ["event", "step", *event_keys(["loss_x", "loss_toy"], ["toy_norm"])]
    assert len(diagnostics) == 3 and {tuple(event) for event in diagnostics} == {tuple(expected)}
    for event in diagnostics:
        assert event["share_x"] + event["share_toy"] == pytest.approx(1)
        assert event["toy_norm"] > 0 and event["grad_toy"] > 0 and event["not_finite"] == []
    code, out = toy(doctor.main, tmp_path / "run")
    assert code in (0, 1) and ("nothing looks wrong" in out or "rule:" in out)
    code, out = toy(report.main, tmp_path / "run")
    assert code == 0 and "| toy | 1 |" in out


def test_it_resumes_bit_for_bit(toy, tmp_path, monkeypatch):
    toy(train_semi.main, *FLAGS, "--output-dir", tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(train_semi.preempt, "stop_requested", lambda: True)
        code, out = toy(train_semi.main, *FLAGS, "--output-dir", tmp_path / "cut")
        assert code == train_semi.preempt.REQUEUE_EXIT_CODE and "saved step 1" in out
    assert toy(train_semi.main, *FLAGS, "--output-dir", tmp_path / "cut")[0] == 0
    assert difference(tmp_path / "whole", tmp_path / "cut") == ""


def test_the_doctor_judges_terms_that_it_does_not_know(toy, tmp_path):
    run = tmp_path / "run"
    toy(train_semi.main, *FLAGS, "--output-dir", run)
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    changed = [{**e, **{key: 0.0 for key in e if key in ("loss_toy", "grad_toy")}} for e in log]
    (run / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in changed))
    code, out = toy(doctor.main, run)
    assert code == 1 and "dead loss term: loss_toy is 0 of the loss" in out
    assert "no gradient: grad_toy is 0 in 2 diagnostics" in out


PHOTOS = (
    "--config configs/imagenet_1p.yaml --backbone small_encoder --cls 3 --labels-per-class 2 --image-size 32 "
    "--batch-size 2 --mu 2 --workers 0 --epochs 2 --steps-per-epoch 3 --warmup-epoch 0 --device cpu"
).split()


@pytest.mark.parametrize("method", ["simmatch", "simmatch_single", "fixmatch"])
def test_several_strong_views_train(method, toy, tmp_path):
    flags = [*PHOTOS, "--data", imagenet(tmp_path / "in"), "--method", method, "--virtual-ranks", 2]
    more = ["--strong", "moco, multicrop_96", "--output-dir", tmp_path / "run"]
    assert toy(train_semi.main, *flags, *more)[0] == 0
    assert len(events(tmp_path / "run", "eval")) > 0


@pytest.mark.parametrize(
    "method, strong, words",
    [
        ("simmatch", "multicrop_96", ["32 pixels", "14", "--strong"]),
        ("fixmatch", "multicrop_96,moco", ["32 pixels", "14", "--strong"]),
        ("simmatch", "moco,mocco", ["unknown view 'mocco'"]),
        ("simmatch", "moco,", ["unknown view ''"]),
    ],
)
def test_views_that_a_method_cannot_use_are_refused(method, strong, words, mistake, tmp_path):
    flags = [*PHOTOS, "--data", imagenet(tmp_path / "in"), "--output-dir", tmp_path / "run"]
    mistake(train_semi.main, [*flags, "--method", method, "--strong", strong], *words)
    assert not (tmp_path / "run").exists()


def test_a_method_without_strong_views_takes_any(toy, tmp_path):
    flags = [*PHOTOS, "--data", imagenet(tmp_path / "in"), "--output-dir", tmp_path / "run"]
    assert toy(train_semi.main, *flags, "--method", "supervised", "--strong", "multicrop_96")[0] == 0
