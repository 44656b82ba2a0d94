"""train_semi.py as a user runs it: its output, seeds, interrupted runs that continue, and mistakes."""

import json
import os
import shutil
import signal
import time

import pytest
import torch
import yaml
from conftest import DIGITS, one_line, start_python
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train_semi
from benchmark.same_run import difference, events, first_difference, weights
from models import SimMatch
from util.config import Config
from util.effect import without_effect
from util.inspect.diagnostics import event_keys

TRAIN = {
    "event",
    "step",
    "epoch",
    "loss",
    "loss_x",
    "loss_u",
    "loss_in",
    "mask",
    "pseudo_acc",
    "lr",
    "images_per_s",
}
KEYS = event_keys(SimMatch.loss_names, SimMatch.diagnostic_names)
EVAL = {"event", "step", "student_top1", "student_top5", "teacher_top1", "teacher_top5"}


def assert_same_run(a, b):
    """The runs agree bit for bit: logs, weights, bank, prior, teacher, optimizer, best score."""
    assert difference(a, b) == ""


def test_the_output_directory(finished):
    folder, _ = finished
    assert sorted(os.listdir(folder)) == [
        "best.pth",
        "config.yaml",
        "last.previous.pth",
        "last.pth",
        "log.jsonl",
        "tb",
    ]
    config = yaml.safe_load((folder / "config.yaml").read_text())
    settings = weights(folder)["config"]
    assert config["epochs"] == 2 and config == {key: settings[key] for key in config}
    left_out = {"evaluate", "norm", "start_epoch", *without_effect(Config(**config))}
    assert settings.keys() - config.keys() == left_out


def test_the_log_has_the_promised_keys_in_order(finished):
    folder, _ = finished
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    start = log.pop(0)
    assert start["event"] == "start" and [start["split"], start["sha256"]] == list(weights(folder)["split"])
    keys = {"train": TRAIN, "eval": EVAL, "diagnostics": {"event", "step", *KEYS}}
    assert {event["event"] for event in log} == set(keys)
    for event in log:
        assert set(event) == keys[event["event"]]
    trains = [event for event in log if event["event"] == "train"]
    steps = [event["step"] for event in trains]
    assert steps == sorted(set(steps))
    assert all(
        event["loss"] == pytest.approx(event["loss_x"] + event["loss_u"] + event["loss_in"], rel=1e-5)
        for event in trains
    )
    for kind in ("eval", "diagnostics"):
        assert [event["step"] for event in log if event["event"] == kind] == [max(steps) // 2, max(steps)]


def test_tensorboard_reads_the_same_values(finished):
    folder, _ = finished
    reader = EventAccumulator(str(folder / "tb"))
    reader.Reload()
    for event in map(json.loads, (folder / "log.jsonl").read_text().splitlines()):
        for key, value in event.items():
            if key in ("event", "step") or event["event"] == "start":
                continue
            if not isinstance(value, (int, float)):  # null and the lists of the diagnostics are not scalars
                continue
            found = [s.value for s in reader.Scalars(f"{event['event']}/{key}") if s.step == event["step"]]
            assert found == [pytest.approx(value, rel=1e-6)]


def test_plain_lines_when_the_output_is_a_file(finished):
    _, done = finished
    assert "\r" not in done.stdout and "\033" not in done.stdout
    assert "ETA" in done.stdout and "10 labeled, 1437 unlabeled, 360 test images" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("done: best student top-1")


def test_a_second_start_continues_and_says_so(finished, train):
    folder, _ = finished
    before = (folder / "log.jsonl").read_bytes()
    again = train(folder, "--print-freq", "3")
    assert again.returncode == 0, again.stderr
    assert f"continues from {folder}/last.pth at step" in again.stdout and "finished" in again.stdout
    assert (folder / "log.jsonl").read_bytes() == before


SHORT = ["--steps-per-epoch", "8"]  # of the 20 in a pass over the digits


@pytest.mark.slow(10)
@pytest.mark.parametrize("method", ["simmatch", "fixmatch", "supervised"])
def test_same_seed_same_bits_with_any_number_of_workers(method, train, tmp_path):
    for name, workers in (("a", "0"), ("b", "2")):
        done = train(tmp_path / name, "--method", method, "--workers", workers, *SHORT)
        assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_another_seed_is_another_run(train, tmp_path):
    for seed in "01":
        assert train(tmp_path / seed, "--seed", seed, *SHORT).returncode == 0
    assert events(tmp_path / "0") != events(tmp_path / "1")
    assert weights(tmp_path / "0")["split"] != weights(tmp_path / "1")["split"]


def test_diagnostics_change_no_bit(train, tmp_path):
    ranks = ["--virtual-ranks", "2", "--batch-size", "5", *SHORT]
    for name, every in (("each", 1), ("never", 1000)):
        assert train(tmp_path / name, "--diagnose-freq", every, *ranks).returncode == 0
    each, never = (weights(tmp_path / name) for name in ("each", "never"))
    assert [e for e in events(tmp_path / "each") if e["event"] != "diagnostics"] == events(tmp_path / "never")
    for key in ("method", "optimizer", "best"):
        assert first_difference(each[key], never[key], key) == ""


def wait_for(path, process, seconds=120):
    """Wait until `process` has written `path`."""
    end = time.monotonic() + seconds
    while not path.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    assert path.exists(), process.communicate()


@pytest.mark.slow(9)
@pytest.mark.parametrize(
    "method, flags", [("simmatch", []), ("simmatch", ["--eman"]), ("fixmatch", []), ("supervised", [])]
)
def test_a_killed_run_continues_to_the_same_bits(method, flags, train, tmp_path):
    flags = ["--method", method, "--epochs", "4", *flags]
    assert train(tmp_path / "whole", *flags).returncode == 0
    run = start_python("train_semi.py", *DIGITS, tmp_path / "killed", "--save-freq", "7", *flags)
    wait_for(tmp_path / "killed" / "last.pth", run)
    time.sleep(0.15)  # somewhere between two checkpoints
    run.kill()
    run.communicate()
    reached = weights(tmp_path / "killed")["step"]
    assert reached % 7 == 0 and 0 < reached < weights(tmp_path / "whole")["step"]
    again = train(tmp_path / "killed", *flags)
    assert again.returncode == 0 and f"at step {reached}" in again.stdout
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow(25)
def test_a_run_that_is_asked_to_stop_saves_and_continues_to_the_same_bits(train, tmp_path):
    assert train(tmp_path / "whole", "--epochs", "6", "--workers", "0").returncode == 0
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_IGN:
            continue  # nohup ignores SIGHUP, and so do the processes that it starts
        folder = tmp_path / number.name
        # The first checkpoint is early, so that a fast machine is asked long before the end, too.
        flags = [*DIGITS, folder, "--epochs", "6", "--workers", "2", "--save-freq", "3"]
        run = start_python("train_semi.py", *flags, start_new_session=True)
        wait_for(folder / "last.pth", run)
        os.killpg(run.pid, number)  # to its workers too, as Slurm does
        out, err = run.communicate(timeout=120)
        reached = weights(folder)["step"]
        assert run.returncode == 75 and f"asked to stop: saved step {reached}" in out and err == "", err
        assert reached < weights(tmp_path / "whole")["step"]
        assert train(folder, "--epochs", "6").returncode == 0
        assert_same_run(tmp_path / "whole", folder)


def test_a_damaged_or_missing_last_checkpoint_is_replaced_by_the_one_before_it(train, tmp_path):
    assert train(tmp_path / "whole", *SHORT).returncode == 0
    for damage in ("cut", "flipped", "gone"):
        folder = shutil.copytree(tmp_path / "whole", tmp_path / damage)
        data = bytearray((folder / "last.pth").read_bytes())
        assert weights(folder, "last.previous.pth")["step"] == 8 and weights(folder)["step"] == 16
        if damage == "gone":
            (folder / "last.pth").unlink()
        elif damage == "cut":
            (folder / "last.pth").write_bytes(data[: len(data) // 2])
        else:
            data[data.index(weights(folder)["method"]["student.fc.weight"].numpy().tobytes())] ^= 1
            (folder / "last.pth").write_bytes(data)
        again = train(folder, *SHORT)
        assert again.returncode == 0 and "last.previous.pth" in again.stdout
        assert "at step 8: 8 steps to go" in again.stdout
        assert_same_run(tmp_path / "whole", folder)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--start-epoch", "1"], ["no checkpoint", "start epoch 1"]),
        (["--moco-path", "nowhere.pth"], ["--moco-path nowhere.pth", "no such file"]),
        (["--moco-path", "README.md"], ["README.md", "not a PyTorch checkpoint"]),
        (["--evaluate"], ["--evaluate needs --checkpoint"]),
    ],
)
def test_mistakes_about_where_to_start(flags, words, mistake, tmp_path):
    mistake(train_semi.main, [*DIGITS, tmp_path / "run", *flags], *words)


def test_a_folder_or_a_published_file_in_the_place_of_a_checkpoint(mistake, tmp_path):
    (tmp_path / "last.pth").mkdir()
    mistake(train_semi.main, [*DIGITS, tmp_path], "last.pth is a directory")
    (tmp_path / "last.pth").rmdir()
    torch.save({"state_dict": {}, "epoch": 3}, tmp_path / "last.pth")
    before = (tmp_path / "last.pth").read_bytes()
    (tmp_path / "last.previous.pth").write_bytes(b"of another run")
    mistake(
        train_semi.main,
        [*DIGITS, tmp_path],
        "is a published checkpoint, but",
        "last.previous.pth belongs to another run",
    )
    assert (tmp_path / "last.pth").read_bytes() == before


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--lamda-u", "3"], ["--lamda-u", "--lambda-u"]),
        (["--epochs", "ten"], ["--epochs", "int", "'ten'"]),
        (["--labels-per-class", "0"], ["0 images per class", "at least 1"]),
        (["--labels-per-class", "2000"], ["only 142 images", "2000 are to be drawn"]),
        (["--method", "simatch"], ["'simatch'", "simmatch_single, fixmatch, supervised"]),
        (["--backbone", "resnet51"], ["'resnet51'", "resnet50_encoder"]),
        (["--dataset", "mnist"], ["'mnist'", "digits"]),
        (["--cls", "9"], ["cls is 9", "10 classes"]),
        (["--batch-size", "300"], ["1437", "--batch-size"]),
        (["--output-dir", "/proc/run"], ["/proc/run", "--output-dir"]),
        (["--output-dir", "LICENSE/run"], ["LICENSE/run", "Not a directory"]),
    ],
)
def test_mistakes(flags, words, mistake, tmp_path):
    mistake(train_semi.main, [*DIGITS, tmp_path / "run", *flags], *words)
    assert not (tmp_path / "run" / "last.pth").exists()


def test_a_mistake_in_a_real_process(command, tmp_path):
    done = command("train_semi.py", "--config", tmp_path / "none.yaml", new_process=True)
    one_line(done.returncode, done.stderr, "none.yaml", "No such file")


def test_a_damaged_last_checkpoint_is_not_overwritten(mistake, tmp_path):
    (tmp_path / "last.pth").write_bytes(b"PK\x03\x04 half a file")
    mistake(train_semi.main, [*DIGITS, tmp_path], "last.pth", "damaged")
    assert (tmp_path / "last.pth").read_bytes() == b"PK\x03\x04 half a file"


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--method", "fixmatch"], ["method was 'simmatch' and is now 'fixmatch'", "--output-dir"]),
        (["--seed", "4"], ["seed was 0 and is now 4", "split"]),
        (["--backbone", "resnet18_encoder"], ["backbone was 'small_encoder'"]),
    ],
)
def test_another_run_in_the_same_directory_is_refused(finished, mistake, flags, words):
    folder, _ = finished
    before = [(folder / name).read_bytes() for name in ("last.pth", "config.yaml", "log.jsonl")]
    mistake(train_semi.main, [*DIGITS, folder, *flags], *words)
    assert before == [(folder / name).read_bytes() for name in ("last.pth", "config.yaml", "log.jsonl")]


def test_a_non_finite_loss_names_term_and_step_and_keeps_the_checkpoint(mistake, tmp_path):
    """The weight of L_in overflows. L_in is on from the second epoch on, so the first one is saved."""
    mistake(
        train_semi.main,
        [*DIGITS, tmp_path, "--lambda-in", "3e38"],
        "loss_in is inf at step 21",
        "keeps the last checkpoint",
    )
    kept = weights(tmp_path)
    assert kept["step"] == 20
    assert all(torch.isfinite(v).all() for v in kept["method"].values() if v.is_floating_point())
