"""The ImageNet recipe through exactly the published command line, on the published list of labeled images.

The images are made up and small, 15,000 names for a few files, and seen at 16 px; an epoch has eight steps.
Everything else is the recipe on one rank.
"""

import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, start_python
from trees import picture

from benchmark.same_run import first_difference
from tests.models.test_recipes import PUBLISHED
from util.run import checkpoint

LISTS = os.environ.get("SIMMATCH_SPLITS", "")
pytestmark = [
    pytest.mark.slow(90),
    pytest.mark.skipif(not LISTS, reason="SIMMATCH_SPLITS names no folder with the published lists"),
]
SMALLER = "--image-size 16 --workers 1 --device cpu"


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A copy of this one, with the lists fetched and the path at the top of dataset/imagenet.py edited, as a
    user does.
    """
    here = tmp_path_factory.mktemp("user")
    copy = here / "SimMatch"
    shutil.copytree(
        ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "checkpoints", "__pycache__", "log")
    )
    done = subprocess.run(
        ["bash", "script/get_splits.sh", "--from", os.path.abspath(LISTS)],
        cwd=copy,
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}"},
    )
    assert done.returncode == 0, done.stderr
    names = (copy / "dataset" / "semi_files" / "simmatch-1p.txt").read_text().split()
    files = [here / f"{k}.jpg" for k in range(20)]
    for k, file in enumerate(files):
        picture(k, size=(64, 48)).save(file)
    classes = sorted({name.split("_")[0] for name in names})
    names += [f"{wnid}_unlabeled.JPEG" for wnid in classes[:320]]
    for k, (part, name) in enumerate(
        [("train", name) for name in names] + [("val", f"{wnid}_val.JPEG") for wnid in classes]
    ):
        folder = here / "imagenet" / part / name.split("_")[0]
        folder.mkdir(parents=True, exist_ok=True)
        os.link(files[k % 20], folder / name)
    code = copy / "dataset" / "imagenet.py"
    text = code.read_text()
    assert text.count('"/path/to/imagenet"') == 1
    code.write_text(text.replace("/path/to/imagenet", f"{here}/imagenet"))
    return copy


def start(repository, *flags):
    command = ["train_semi.py", *shlex.split(f"{PUBLISHED['imagenet_1p']} {SMALLER}"), *flags]
    return start_python(*command, cwd=repository, env={"SIMMATCH_CACHE": str(repository.parent / "cache")})


def until(process, file, step, seconds=600):
    """The state that `process` saves at `file` once it is of that step or a later one. A file that is there
    before is not read.
    """
    end, seen = time.monotonic() + seconds, file.stat().st_mtime_ns if file.exists() else 0
    while process.poll() is None and time.monotonic() < end:
        time.sleep(0.1)
        if file.exists() and file.stat().st_mtime_ns != seen:
            seen = file.stat().st_mtime_ns
            state = checkpoint.load(file)
            if state["step"] >= step:
                return state
    process.kill()
    raise AssertionError(f"no step {step} in {seconds} s: {process.communicate()}")


def test_two_epochs_are_the_same_after_a_kill(repository, command):
    """Also: what eval.py and --evaluate print for the checkpoint, and a run that continues from its published
    form.
    """
    states, file = {}, repository / "checkpoints" / "simmatch-1p.pth"
    for name in ("whole", "killed"):
        process = start(repository)
        if name == "killed":
            until(process, file, 8)
            time.sleep(1)
            process.kill()
            process.communicate()
            reached = checkpoint.load(file)["step"]
            assert 8 <= reached < 16
            process = start(repository)
        states[name] = until(process, file, 16)
        process.kill()
        out, err = process.communicate()
        assert "8 + 40 images a step, 8 steps an epoch, 400 epochs = 3200 steps" in out, err
        assert "13000 labeled, 320 unlabeled, 1000 test images, 1000 classes" in out
        assert "simmatch-1p (sha256 90c1450521fa)" in out
        if name == "whole":
            (repository / "checkpoints" / "simmatch-1p").rename(repository / "checkpoints" / "whole")
            file.rename(repository / "checkpoints" / "whole.pth")
            checkpoint.previous(file).unlink()
    assert f"continues from checkpoints/simmatch-1p.pth at step {reached}" in out
    assert states["whole"]["step"] == 16 == states["killed"]["step"]
    assert first_difference(*states.values(), "last.pth") == ""

    def last_line(*words):
        done = command(*words, cwd=repository)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()[-1]

    flags = "--workers 0 --device cpu".split()
    evaluate = shlex.split("--evaluate --anno-percent 0.01 --DA --checkpoint whole.pth")
    line = last_line("train_semi.py", *evaluate, *flags)
    assert line.startswith("* Acc@1 ")
    assert line == last_line("eval.py", "--checkpoint", "checkpoints/whole.pth", *flags)

    published, export = "checkpoints/simmatch-10p.pth", ["--format", "published", "--export"]
    last_line("eval.py", "--checkpoint", "checkpoints/whole.pth", *export, published)
    assert line == last_line("eval.py", "--checkpoint", published, *flags, "--image-size", "16")
    theirs = torch.load(repository / published, weights_only=True)
    assert theirs["epoch"] == 2 and theirs["state_dict"]["module.bank"].shape == (128, 13000)
    kept = (repository / published).read_bytes()
    process = start(repository, "--checkpoint", "simmatch-10p.pth")  # the last --checkpoint counts
    after = until(process, repository / published, 24)
    process.kill()
    out, _ = process.communicate()
    assert "is a published checkpoint" in out and "at step 16: 3184 steps to go" in out
    assert after["step"] == 24
    assert Path(repository, "checkpoints", "simmatch-10p.published.pth").read_bytes() == kept
