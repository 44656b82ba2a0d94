"""eval.py as a user runs it."""

import copy
import os
import re
from random import Random

import pytest
import torch
from conftest import one_line
from torch.amp import GradScaler

import eval as eval_script
from models import build_method, build_optimizer
from util.config import Config
from util.errors import UserError
from util.run import checkpoint, resume
from util.run.metrics import Meter
from util.run.ranks import RankLayout
from util.run.train_state import BadImages, RunIdentity, TrainState


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
        (lambda s: s.update(split=("only one",)), ["a.pth", "no valid 'split'"]),
        (lambda s: s["config"].update(dim=77), ["a.pth", "which has dim 77", "is [128, 128]"]),
        (lambda s: s["config"].update(dim=10**13), ["a.pth", "dim", "10000000000000"]),
        (lambda s: s["config"].update({3: 4}), ["a.pth", "no valid 'config'"]),
        (
            lambda s: s["method"]["student.fc.weight"][3].fill_(float("nan")),
            ["a.pth is damaged: student.fc.weight is not finite"],
        ),
        (
            lambda s: s["method"]["teacher.net.fc.bias"].fill_(-float("inf")),
            ["a.pth is damaged: teacher.net.fc.bias is not finite"],
        ),
        (
            lambda s: s["method"].update({"student.fc.bias": torch.ones(10, dtype=torch.int64)}),
            ["a.pth is damaged: student.fc.bias is int64, not float32"],
        ),
        (
            lambda s: s["method"]["student.backbone.1.running_var"].fill_(-1.0),
            ["a.pth is damaged: its network gives logits that are not finite"],
        ),
    ],
)
def test_checkpoints_that_do_not_fit_are_refused(finished, mistake, tmp_path, change, words):
    save_changed(finished[0] / "best.pth", tmp_path / "a.pth", change)
    mistake(eval_script.main, ["--checkpoint", tmp_path / "a.pth"], *words)


def save_changed(source, path, change):
    """Copy a checkpoint with a change of its content, and with the right checksum."""
    state = torch.load(source, weights_only=True)
    change(state)
    checkpoint.save(path, {key: value for key, value in state.items() if key not in ("format", "sha256")})


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


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--output", "a.csv"], "--output needs --predict DIR"),
        (["--export", "a", "--format", "timm", "--output", "a.csv"], "--output needs --predict DIR"),
        (["--predict", ".", "--per-class"], "--per-class is for an evaluation"),
        (["--predict", "~no-such-user"], "~no-such-user is not the home folder of a user"),
        (["--export", "x" * 300, "--format", "timm"], "File name too long"),
    ],
)
def test_flags_without_effect_and_impossible_paths_are_refused(finished, mistake, flags, words):
    mistake(eval_script.main, ["--checkpoint", finished[0] / "best.pth", *flags], words)


@pytest.mark.parametrize("form", ["published", "torchvision", "timm", "onnx"])
@pytest.mark.parametrize(
    "name", ["read.pth", "link.pth", "hard.pth", "other.pth", "note.txt", "cut.pth", "fifo"]
)
def test_an_export_replaces_no_file_of_another_kind(finished, mistake, tmp_path, name, form):
    """Not the checkpoint that is read, nor another one of ours."""
    save_changed(finished[0] / "best.pth", tmp_path / "read.pth", lambda state: None)
    (tmp_path / "link.pth").symlink_to("read.pth")
    os.link(tmp_path / "read.pth", tmp_path / "hard.pth")
    whole = (finished[0] / "last.pth").read_bytes()
    (tmp_path / "other.pth").write_bytes(whole)
    (tmp_path / "cut.pth").write_bytes(whole[:5000])
    (tmp_path / "note.txt").write_text("my notes")
    os.mkfifo(tmp_path / "fifo")
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    flags = ["--checkpoint", tmp_path / "read.pth", "--export", tmp_path / name, "--format", form]
    mistake(eval_script.main, flags, name)
    flags = ["--checkpoint", tmp_path / "read.pth", "--predict", tmp_path, "--output", tmp_path / name]
    mistake(eval_script.main, flags, name)
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


ODD = [
    None,
    True,
    -1,
    10**13,
    10**30,
    1.5,
    float("nan"),
    "",
    "\n",
    b"b",
    [],
    {1: 2},
    (1, 2),
    torch.zeros(()),
    torch.zeros(0),
    torch.zeros(1).expand(10**13),
    torch.zeros(10**9, 0),
]


def mutated(value, random):
    """Change a part of a state at random, at any depth."""
    parts = list(value) if isinstance(value, dict) else list(range(len(value)))
    if not parts:
        return
    key = random.choice(parts)
    if isinstance(value[key], (dict, list)) and random.random() < 0.8:
        mutated(value[key], random)
    elif isinstance(value[key], torch.Tensor) and random.random() < 0.7:
        changes = (
            torch.Tensor.double,
            torch.Tensor.long,
            torch.Tensor.flatten,
            lambda t: t[None],
            lambda t: t / 0,
        )
        value[key] = random.choice(changes)(value[key])
    elif random.random() < 0.3:
        del value[key]
    elif random.random() < 0.3 and isinstance(value, dict):
        value[random.choice([1, "new", None])] = random.choice(ODD)
    else:
        value[key] = random.choice(ODD)


def resume_from(path, whole):
    """Resume a run that is like the one of the checkpoint `whole` from the file at `path`."""
    config = Config(**whole["config"])
    identity = RunIdentity(
        config, RankLayout(1, 1, 10), 20, tuple(whole["split"]), whole["classes"], whole["data"]
    )
    method = build_method(config, 1, whole["method"]["bank.labels"])
    optimizer = build_optimizer(config, method.student)
    state = TrainState(method, optimizer, GradScaler(enabled=False), Meter(), BadImages("stop"))
    found, _ = resume.load_last(path)
    resume.resume(path, found, identity, state)


@pytest.mark.parametrize("name, value", [("bank.labels", 10), ("bank.labels", -1), ("align.ptr", 10**6)])
def test_an_index_that_is_out_of_range_is_refused(finished, tmp_path, name, value):
    whole = torch.load(finished[0] / "last.pth", weights_only=True)
    save_changed(finished[0] / "last.pth", tmp_path / "a.pth", lambda s: None)
    resume_from(tmp_path / "a.pth", whole)
    save_changed(finished[0] / "last.pth", tmp_path / "a.pth", lambda s: s["method"][name].fill_(value))
    with pytest.raises(UserError, match=f"a.pth is damaged: {name} is not between 0 and"):
        resume_from(tmp_path / "a.pth", whole)


def test_no_change_of_a_checkpoint_is_more_than_a_user_error(finished, tmp_path, capsys):
    """Neither in an evaluation nor when training resumes; the checksum is right."""
    whole, path, refused = torch.load(finished[0] / "last.pth", weights_only=True), tmp_path / "a.pth", 0
    random = Random(0)
    for key in ("format", "sha256"):
        del whole[key]
    for _ in range(60):
        spoiled = copy.deepcopy(whole)
        mutated(spoiled, random)
        try:
            checkpoint.save(path, spoiled)
        except RuntimeError:  # the checksum of a tensor that no memory can hold
            continue
        try:
            eval_script.open_checkpoint(path, {})
            resume_from(path, whole)
        except UserError as error:
            refused += "a.pth" in str(error)
    assert refused > 20
