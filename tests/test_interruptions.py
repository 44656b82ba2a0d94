"""A run loses nothing to a closed terminal, lost output, Ctrl-C or a failed evaluation."""

import io
import os
import signal
import subprocess
import sys

import pytest
from conftest import DIGITS, ROOT, one_line, one_thread, start_python
from test_train import assert_same_run, events, wait_for, weights
from trees import imagenet

from util import errors
from util.run import checkpoint

PHOTOS = (
    "--config configs/folder.yaml --labels-per-class 2 --image-size 32 --backbone small_encoder "
    "--batch-size 3 --mu 2 --warmup-epoch 1 --print-freq 1 --workers 0 --data"
).split()


@pytest.fixture
def photos(tmp_path, monkeypatch):
    monkeypatch.setenv("SIMMATCH_CACHE", str(tmp_path / "cache"))
    return imagenet(tmp_path / "photos", train=12, val=4)


@pytest.mark.slow(15)
def test_an_evaluation_that_fails_does_not_lose_the_epoch(photos, command, tmp_path):
    start = ["train_semi.py", *PHOTOS, photos, "--epochs", "2", "--output-dir"]
    assert command(*start, tmp_path / "whole").returncode == 0
    image = next((photos / "val").rglob("*.JPEG"))
    content = image.read_bytes()
    image.write_bytes(b"not an image")
    for _ in range(2):  # the second time it resumes with the evaluation
        failed = command(*start, tmp_path / "run")
        one_line(failed.returncode, failed.stderr, image.name)
        state = weights(tmp_path / "run")
        assert (state["step"], state["evaluation_due"], state["best"]["step"]) == (5, True, 0)
        assert {e["event"] for e in events(tmp_path / "run")} == {"start", "train", "diagnostics"}
    assert "continues from" in failed.stdout and "at step 5: 5 steps to go" in failed.stdout
    image.write_bytes(content)
    done = command(*start, tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.slow(15)
def test_a_run_that_is_asked_to_stop_in_an_evaluation_saves_and_resumes_with_it(photos, command, tmp_path):
    image = next((photos / "val").rglob("*.JPEG"))
    for number in range(3000):
        os.link(image, image.with_name(f"{number}.JPEG"))
    flags = [*PHOTOS, photos, "--epochs", "1", "--output-dir"]
    run = start_python("train_semi.py", *flags, tmp_path / "run")
    wait_for(tmp_path / "run" / "last.pth", run)
    run.terminate()
    out, err = run.communicate(timeout=60)
    assert run.returncode == 75 and "asked to stop: saved step 5 " in out and err == "", (out, err)
    assert weights(tmp_path / "run")["evaluation_due"] and not (tmp_path / "run" / "best.pth").exists()
    done = command("train_semi.py", *flags, tmp_path / "run")
    assert done.returncode == 0 and "at step 5: it is finished" in done.stdout, done.stderr
    assert not checkpoint.load(tmp_path / "run" / "last.pth")["evaluation_due"]
    assert [e["event"] for e in events(tmp_path / "run")].count("eval") == 1
    assert weights(tmp_path / "run", "best.pth")["step"] == 5


def test_a_run_under_nohup_ignores_the_closed_terminal(tmp_path):
    run = subprocess.Popen(
        [
            "nohup",
            sys.executable,
            "train_semi.py",
            *DIGITS,
            tmp_path / "run",
            "--save-freq",
            "5",
            "--workers",
            "1",
        ],
        cwd=ROOT,
        env=one_thread(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for(tmp_path / "run" / "last.pth", run)
    os.killpg(run.pid, signal.SIGHUP)
    out, err = run.communicate(timeout=60)
    assert run.returncode == 0 and "done: best" in out, err


@pytest.mark.parametrize("output", ["| head -1", ">&-", ">&- 2>&-", "> /dev/full 2> /dev/full"])
def test_training_goes_on_when_its_output_is_lost(output, tmp_path):
    flags = " ".join(map(str, [*DIGITS, tmp_path / "run", "--epochs", "1", "--workers", "0"]))
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{sys.executable} train_semi.py {flags} {output}"],
        cwd=ROOT,
        env=one_thread(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert weights(tmp_path / "run")["step"] == 20 and events(tmp_path / "run")[-1]["event"] == "eval"


def test_a_program_whose_output_is_not_read_ends_quietly(finished):
    folder, _ = finished
    evaluate = f"{sys.executable} eval.py --checkpoint {folder}/last.pth --per-class"
    for command, code, words in (
        (f"{evaluate} | true", 128 + signal.SIGPIPE, ""),
        (f"{sys.executable} -m util.doctor {folder} | true", 128 + signal.SIGPIPE, ""),
        (f"{evaluate} > /dev/full", 2, "No space left on device"),
        (f"{evaluate} >&-", 0, ""),
    ):
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == code and done.stderr.count("\n") == bool(words), (command, done.stderr)
        assert words in done.stderr


@pytest.mark.parametrize("program", ["train_semi.py --config configs/digits.yaml", "eval.py --checkpoint x"])
def test_an_interrupt_during_the_imports_is_one_line(program):
    process = start_python("-X", "importtime", *program.split(), env={"PYTHONUNBUFFERED": "1"})
    for line in process.stderr:
        if line.endswith(" torch._C\n"):  # a part of PyTorch is imported now, and the rest is not
            break
    process.send_signal(signal.SIGINT)
    lines = [line for line in process.communicate(timeout=60)[1].splitlines() if "import time:" not in line]
    assert process.returncode == 130 and lines == ["interrupted"]


def test_an_interrupt_before_the_first_checkpoint_does_not_promise_one(tmp_path):
    flags = [*DIGITS, tmp_path / "run", "--epochs", "500", "--eval-freq", "500", "--print-freq", "1"]
    for save, words in (
        ("0", "before the first checkpoint: "),
        ("3", "continues from the last checkpoint, "),
    ):
        run = start_python("train_semi.py", *flags, "--save-freq", save, env={"PYTHONUNBUFFERED": "1"})
        for line in run.stdout:
            if "step 9/" in line:
                break
        run.send_signal(signal.SIGINT)
        _, err = run.communicate(timeout=60)
        assert run.returncode == 130 and words in err and err.count("\n") == 1, err


def fail(error):
    raise error


@pytest.mark.parametrize(
    "error, code, line",
    [
        (
            KeyError("x"),
            1,
            "error: this is a bug, please report it with its traceback (--debug shows it): KeyError: 'x'",
        ),
        (MemoryError(), 2, "error: out of memory (MemoryError): lower --batch-size"),
        (errors.UserError("a name with \n and \x1b"), 2, r"error: a name with \n and \x1b"),
    ],
)
def test_an_error_is_one_line(error, code, line, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["program"])
    with pytest.raises(SystemExit) as end:
        errors.cli_main(lambda: fail(error))
    err = capsys.readouterr().err
    assert end.value.code == code and err.startswith(line) and err.count("\n") == 1
    if code == 1:
        assert "(tests/test_interruptions.py, line " in err


def test_a_name_that_is_not_utf8_can_be_printed(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict")
    monkeypatch.setattr(sys, "stdout", out)
    errors.cli_main(lambda: print("a\udcff"))
    assert out.buffer.getvalue() == b"a\\udcff\n"


def test_debug_shows_the_traceback_of_a_bug(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["program", "--debug"])
    with pytest.raises(SystemExit):
        errors.cli_main(lambda: fail(KeyError("x")))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback") and lines[-1].startswith("error: this is a bug")


@pytest.mark.slow(10)
def test_two_runs_in_one_directory(train, tmp_path):
    flags = [*DIGITS, tmp_path / "run", "--workers", "0", "--epochs", "4"]
    first = start_python("train_semi.py", *flags)
    wait_for(tmp_path / "run" / "log.jsonl", first)
    second = train(tmp_path / "run", "--epochs", "4")
    one_line(
        second.returncode, second.stderr, f"another run writes to {tmp_path / 'run'}: process {first.pid}"
    )
    assert first.communicate(timeout=120)[1] == "" and first.returncode == 0
    assert train(tmp_path / "alone", "--epochs", "4", "--workers", "0").returncode == 0
    assert_same_run(tmp_path / "run", tmp_path / "alone")
    assert not (tmp_path / "run" / "lock").exists()
