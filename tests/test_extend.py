"""docs/EXTEND.md word for word, in a copy of the repository: a method, a data set, a view and a backbone."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT, one_line

from benchmark.same_run import difference

PAGE = (ROOT / "docs" / "EXTEND.md").read_text(encoding="utf-8")
NEW_FILE = re.compile(r"^`(?P<file>[^`]+)`:\n\n```python\n(?P<code>.*?)```", re.M | re.S)
NEW_LINE = re.compile(
    r"^A line of `(?P<table>\w+)` in `(?P<file>[^`]+)`[^\n]*:\n\n```python\n(?P<line>.*?)```", re.M | re.S
)
COMMAND = re.compile(r"```bash\npython (?P<command>.*?)```", re.S)
DIGITS = "--config configs/digits.yaml --epochs 2 --steps-per-epoch 3 --batch-size 4 --mu 1".split()
TOY = [*DIGITS, "--method", "toy", "--dataset", "squares"]


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    folder = tmp_path_factory.mktemp("repository")
    for name in ("models", "dataset", "util", "configs"):
        shutil.copytree(
            ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "semi_files")
        )
    for name in ("train_semi.py", "eval.py"):
        shutil.copy(ROOT / name, folder)
    for file, code in NEW_FILE.findall(PAGE):
        (folder / file).write_text(code)
    for table, file, line in NEW_LINE.findall(PAGE):
        text = (folder / file).read_text()
        head = re.search(rf"^{table}\b.*= {{\n", text, flags=re.M)
        assert head and line.count("\n") == 1, table
        text = text[: head.end()] + line + text[head.end() :]
        (folder / file).write_text(text)
    return folder


@pytest.fixture
def start(repository):
    def call(*arguments):
        command = [sys.executable, *map(str, arguments)]
        return subprocess.run(command, cwd=repository, capture_output=True, text=True)

    return call


def test_the_page_adds_two_files_and_four_lines():
    assert [file for file, _ in NEW_FILE.findall(PAGE)] == ["models/toy.py", "dataset/squares.py"]
    assert [table for table, _, _ in NEW_LINE.findall(PAGE)] == [
        "METHODS",
        "DATASETS",
        "PIPELINES",
        "BACKBONES",
    ]
    for _, code in NEW_FILE.findall(PAGE):
        assert code.count("\n") <= 40


def test_help_lists_the_settings_of_a_new_method(start):
    text = " ".join(start("train_semi.py", "--help").stdout.split())
    assert "weight of loss_toy (for toy; default: 0.1)" in text
    assert "momentum of SGD (default: 0.9; with toy: 0.8)" in text
    assert "name of a method: toy, simmatch" in text and "name of a data set: squares, digits" in text


@pytest.mark.parametrize(
    "flags, line",
    [
        ([*TOY, "--lambda-toy", "-1"], "--lambda-toy must be 0 or more, got -1.0"),
        ([*TOY, "--lambda_toy", "101"], "--lambda-toy must be 100 or less, got 101.0"),
        ([*TOY, "--lambda-toy", "x"], "--lambda-toy: expected float"),
        ([*TOY, "--lamda-toy", "2"], "the nearest known one is '--lambda-toy'"),
        ([*TOY, "--st", "0.2"], "--st has no effect with method toy: it is for simmatch and simmatch_single"),
        ([*TOY, "--image-size", "64"], "--image-size has no effect with dataset squares: it is for imagenet"),
        ([*DIGITS, "--lambda-toy", "3"], "--lambda-toy has no effect with method simmatch: it is for toy"),
        ([*DIGITS, "--strong", "rand"], "--strong has no effect with dataset digits: it is for squares"),
    ],
)
def test_the_settings_are_checked_and_refused_for_others_by_name(start, flags, line):
    done = start("train_semi.py", *flags)
    one_line(done.returncode, done.stderr, line)


@pytest.mark.slow(20)
def test_the_command_trains_is_logged_evaluated_and_reported_and_resumes(start, repository):
    command = COMMAND.search(PAGE)["command"].replace("\\\n", " ").split()
    command += ["--workers", "0", "--device", "cpu"]
    done = start(*command)
    assert done.returncode == 0, done.stderr
    assert "toy on squares-4-seed0" in done.stdout and " toy " in done.stdout
    run = repository / "checkpoints" / "toy"
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    for kind, keys in (("train", {"loss_x", "loss_toy"}), ("diagnostics", {"toy_norm", "grad_toy"})):
        events = [event for event in log if event["event"] == kind]
        assert len(events) == 2 and all(keys <= event.keys() and event["step"] in (2, 4) for event in events)
    settings = yaml.safe_load((run / "config.yaml").read_text())
    assert (settings["lambda_toy"], settings["momentum"]) == (0.1, 0.8) and not settings.keys() & {
        "lambda_u",
        "image_size",
    }

    shutil.copytree(run, run.with_name("resumed"))
    (run.with_name("resumed") / "last.pth").unlink()  # so that it resumes from the first epoch
    resumed = start(*[word.replace("checkpoints/toy", "checkpoints/resumed") for word in command])
    assert resumed.returncode == 0 and "at step 2: 2 steps to go" in resumed.stdout, resumed.stderr
    assert difference(run, run.with_name("resumed")) == ""

    done = start("eval.py", "--checkpoint", "checkpoints/toy/last.pth", "--workers", "0")
    assert done.returncode == 0 and "* Acc@1" in done.stdout, done.stderr
    done = start("-m", "util.report", "checkpoints/toy")
    assert done.returncode == 0 and "| toy | 4 |" in done.stdout, done.stderr
    assert start("-m", "util.doctor", "checkpoints/toy").returncode in (0, 1)
    done = start(*command, "--lambda-toy", "3")
    one_line(done.returncode, done.stderr, "lambda_toy was 0.1 and is now 3.0")
