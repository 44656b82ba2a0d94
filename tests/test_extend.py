"""A new method is one file and one line, and so is a new data set: a copy of the repository gets both."""

import shutil
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT, one_line

METHOD = """
from models.supervised import Supervised

SETTINGS = {"toy_weight": (2.0, "factor of the initial classifier", {"above": 0, "at_most": 9})}
USES = ("ema_m",)


class Toy(Supervised):
    def __init__(self, network, *, toy_weight, ema_m):
        network.fc.weight.data.mul_(toy_weight)
        super().__init__(network, ema_m=ema_m)
"""
DATASET = """
from dataset import digits
from dataset.loader import SplitId

SETTINGS = {"toy_classes": ([0], "classes whose digits are labeled", {"at_least": 0, "at_most": 9})}
USES = ("labels_per_class",)
side = digits.side


def build(labels_per_class, seed, toy_classes):
    data = digits.build(labels_per_class, seed)
    split = SplitId(f"{data.split.id}-{toy_classes}", data.split.sha256)
    return data._replace(split=split)
"""
DIGITS = "--config configs/digits.yaml --epochs 2 --steps-per-epoch 3 --batch-size 4 --mu 1".split()
TOY = [*DIGITS, "--method", "toy", "--dataset", "toys"]


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    folder = tmp_path_factory.mktemp("repository")
    for name in ("models", "dataset", "util", "configs"):
        shutil.copytree(
            ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "semi_files")
        )
    for name in ("train_semi.py", "eval.py"):
        shutil.copy(ROOT / name, folder)
    (folder / "models" / "toy.py").write_text(METHOD)
    (folder / "dataset" / "toys.py").write_text(DATASET)
    for file, table, line in (
        ("models/__init__.py", "METHODS = {", '"toy": "models.toy:Toy",'),
        ("dataset/build.py", "DATASETS = {", '"toys": "dataset.toys",'),
    ):
        text = (folder / file).read_text()
        assert text.count(table) == 1
        (folder / file).write_text(text.replace(table, f"{table}\n    {line}"))
    return folder


@pytest.fixture
def start(repository):
    def call(*arguments):
        command = [sys.executable, *map(str, arguments)]
        return subprocess.run(command, cwd=repository, capture_output=True, text=True)

    return call


def test_help_lists_the_settings_of_a_new_method_and_a_new_data_set(start):
    text = " ".join(start("train_semi.py", "--help").stdout.split())
    assert "factor of the initial classifier (for toy; default: 2.0)" in text
    assert "classes whose digits are labeled (for toys; default: [0])" in text
    assert "name of a method: toy, simmatch" in text and "name of a data set: toys, digits" in text


@pytest.mark.parametrize(
    "flags, line",
    [
        ([*TOY, "--toy-weight", "0"], "--toy-weight must be greater than 0, got 0.0"),
        ([*TOY, "--toy_weight", "9.5"], "--toy-weight must be 9 or less, got 9.5"),
        ([*TOY, "--toy-weight", "x"], "--toy-weight: expected float"),
        ([*TOY, "--toy-classes", "10"], "--toy-classes must be 9 or less"),
        ([*TOY, "--toy-wieght", "2"], "the nearest known one is '--toy-weight'"),
        ([*TOY, "--st", "0.2"], "--st has no effect with method toy: it is for simmatch and simmatch_single"),
        ([*TOY, "--strong", "rand"], "--strong has no effect with dataset toys: it is for imagenet"),
        ([*DIGITS, "--toy-weight", "3"], "--toy-weight has no effect with method simmatch: it is for toy"),
        ([*DIGITS, "--toy-classes", "3"], "--toy-classes has no effect with dataset digits: it is for toys"),
    ],
)
def test_the_settings_are_checked_and_refused_for_others_by_name(start, flags, line):
    done = start("train_semi.py", *flags)
    one_line(done.returncode, done.stderr, line)


@pytest.mark.slow(15)
def test_a_new_method_on_a_new_data_set_trains_is_evaluated_and_resumes(start, repository):
    run = [*TOY, "--output-dir", "run", "--device", "cpu"]
    done = start("train_semi.py", *run, "--toy-weight", "3", "--toy-classes", "1", "2")
    assert done.returncode == 0, done.stderr
    assert "toy on digits-1-seed0-[1, 2]" in done.stdout
    settings = yaml.safe_load((repository / "run" / "config.yaml").read_text())
    assert (settings["method"], settings["toy_weight"], settings["toy_classes"]) == ("toy", 3.0, [1, 2])
    assert not settings.keys() & {"lambda_u", "strong"}
    done = start("eval.py", "--checkpoint", "run/last.pth", "--workers", "0")
    assert done.returncode == 0 and "* Acc@1" in done.stdout, done.stderr
    done = start("train_semi.py", *run, "--toy-classes", "1", "2")
    one_line(done.returncode, done.stderr, "toy_weight was 3.0 and is now 2.0")
