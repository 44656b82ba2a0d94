"""Image files in both programs, as a user runs them: training, evaluation, prediction, bad images and moved
data.
"""

import csv
import json
import os
import shutil

import pytest
import torch
from conftest import one_line
from test_train import assert_same_run
from trees import imagenet, picture

import eval as eval_script
import train_semi
from util.formats import predictions
from util.run import checkpoint


def without_frame(state):
    """A loaded checkpoint, as `checkpoint.save` takes it."""
    return {key: value for key, value in state.items() if key not in ("format", "sha256")}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return imagenet(tmp_path_factory.mktemp("photos") / "in", classes=3, train=12, val=4)


@pytest.fixture
def train_photos(command, root):
    def call(output_dir, *flags, data=None):
        return command(
            "train_semi.py",
            "--config",
            "configs/folder.yaml",
            "--data",
            data or root,
            "--labels-per-class",
            "2",
            "--image-size",
            "32",
            "--backbone",
            "small_encoder",
            "--batch-size",
            "3",
            "--mu",
            "2",
            "--epochs",
            "2",
            "--warmup-epoch",
            "1",
            "--print-freq",
            "1",
            "--output-dir",
            output_dir,
            *flags,
            env={"SIMMATCH_CACHE": str(output_dir.parent / "cache")},
        )

    return call


@pytest.mark.slow(8)
def test_train_evaluate_and_predict(train_photos, command, root, tmp_path):
    done = train_photos(tmp_path / "run", "--workers", "0")
    assert done.returncode == 0, done.stderr
    assert "6 labeled, 30 unlabeled, 12 test images, 3 classes" in done.stdout and "split" not in done.stderr
    evaluate = ["eval.py", "--checkpoint", tmp_path / "run" / "best.pth", "--workers"]
    done = command(*evaluate, "0", "--per-class")
    assert done.returncode == 0 and "class n00000002: " in done.stdout, done.stderr

    photos = tmp_path / "new photos"
    (photos / "deep").mkdir(parents=True)
    picture(5).save(photos / "a.png")
    picture(6, size=(500, 20)).save(photos / "deep" / "b, c.jpg")
    picture(7).save(photos / "=1+1.png")
    picture(8).save(photos / os.fsdecode(b"caf\xe9.png"))  # not UTF-8
    (photos / "torn.jpg").write_bytes(b"\xff\xd8\xff torn")
    out = tmp_path / "answers.csv"
    done = command(*evaluate, "1", "--predict", photos, "--output", out)
    one_line(done.returncode, done.stderr, "torn.jpg")
    assert not out.exists()
    flags = ["--on-bad-image", "skip", "--data", "/moved/away"]  # predictions need no training data
    done = command(*evaluate, "0", "--predict", photos, "--output", out, *flags)
    assert done.returncode == 0 and "left out" in done.stdout and "4 images" in done.stdout, done.stderr
    assert (
        r"1 of the paths are not UTF-8, the first is caf\xe9.png" in done.stdout and "Rename" in done.stdout
    )
    assert "replaces" not in done.stdout
    lines = list(csv.DictReader(open(out, newline="", encoding="utf-8", errors="surrogateescape")))
    assert [line["path"] for line in lines] == [
        "./=1+1.png",
        "a.png",
        os.fsdecode(b"caf\xe9.png"),
        "deep/b, c.jpg",
    ]
    assert all((photos / line["path"]).exists() for line in lines)
    for line in lines:
        top = json.loads(line["top5"])
        assert {name for name, _ in top} == {"n00000000", "n00000001", "n00000002"}
        assert sum(p for _, p in top) == pytest.approx(1, abs=1e-3)
        assert top[0] == [line["class"], float(line["probability"])] and top[0][1] == max(p for _, p in top)
    before = out.read_bytes()
    done = command(*evaluate, "0", "--predict", photos, "--output", out, *flags)
    assert f"replaces {out}, a CSV file of predictions" in done.stdout and out.read_bytes() == before
    os.mkfifo(photos / "b.png")
    done = command(*evaluate, "0", "--predict", photos, "--output", out)
    one_line(done.returncode, done.stderr, "b.png is a FIFO, not an image")
    assert out.read_bytes() == before


@pytest.mark.parametrize("name, shown", [("=cmd", "'=cmd"), ("-1", "'-1"), ("@a", "'@a"), ("a;b=c", "a;b=c")])
def test_a_class_is_no_formula_and_no_ambiguity(name, shown):
    path, label, probability, top5 = predictions.row("+x/y.png", [name, "é"], [0.75, 0.25])
    assert (path, label, probability) == ("./+x/y.png", shown, "0.7500")
    assert json.loads(top5) == [[name, 0.75], ["é", 0.25]] and "é" in top5


@pytest.mark.parametrize("flag", ["--data", "--unlabelled", "--val"])
def test_the_output_directory_is_not_among_the_images(root, mistake, tmp_path, flag, monkeypatch):
    monkeypatch.setenv("SIMMATCH_CACHE", str(tmp_path / "cache"))
    flags = ["--config", "configs/folder.yaml", "--data", root, "--device", "cpu", "--anno-percent", "0.1"]
    folder = root
    if flag != "--data":
        folder = tmp_path / "more"
        shutil.copytree(root / "val", folder)
        flags += [flag, folder]
    (tmp_path / "link").symlink_to(folder)
    before = sorted(folder.rglob("*"))
    for output in (folder / "run", folder, tmp_path / "link" / "a" / "b"):
        mistake(train_semi.main, [*flags, "--output-dir", output], f"{output} lies in {folder}, which")
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("flag", ["--data", "--unlabelled", "--val", "--split", "--output-dir", "--config"])
@pytest.mark.parametrize(
    "path, words", [("~no-such-user/x", "home folder"), ("x" * 300, "File name too long")]
)
def test_an_impossible_path_is_named(root, mistake, flag, path, words):
    flags = ["--config", "configs/folder.yaml", "--data", root, "--device", "cpu"]
    mistake(train_semi.main, [*flags, flag, path], path[:50], words)


@pytest.mark.slow(12)
def test_the_same_bits_with_any_workers_and_after_a_move(train_photos, root, tmp_path):
    """The data move while the run is stopped."""
    assert train_photos(tmp_path / "a", "--workers", "0").returncode == 0
    assert train_photos(tmp_path / "b", "--workers", "2", "--epochs", "1").returncode == 0
    half = torch.load(tmp_path / "b" / "last.pth", weights_only=True)
    half["config"]["epochs"] = 2  # with one epoch or two, the first one is warm-up
    checkpoint.save(tmp_path / "b" / "last.pth", without_frame(half))
    moved = tmp_path / "elsewhere"
    moved.symlink_to(root)
    assert train_photos(tmp_path / "b", "--workers", "2", data=moved).returncode == 0
    for path in (tmp_path / run / name for run in "ab" for name in ("best.pth", "last.pth")):
        values = torch.load(path, weights_only=True)
        del values["config"]["data"]
        values["config"]["epochs"] = 2  # best.pth may be from the first start
        checkpoint.save(path, without_frame(values))
    assert_same_run(tmp_path / "a", tmp_path / "b")


@pytest.mark.slow(14)
def test_bad_images_stop_the_run_or_are_skipped_and_listed(train_photos, tmp_path):
    root = imagenet(tmp_path / "in", classes=3, train=12, val=4)
    torn = [root / "train" / "n00000001" / f"n00000001_{k}.JPEG" for k in (3, 7)]
    for path in torn:
        path.write_bytes(path.read_bytes()[:200])
    done = train_photos(tmp_path / "stop", "--workers", "1", data=root)
    one_line(done.returncode, done.stderr, "n00000001_", "damaged or cut short", "--on-bad-image skip")
    done = train_photos(tmp_path / "skip", "--workers", "1", "--on-bad-image", "skip", data=root)
    assert done.returncode == 0 and "2 bad images were replaced by others" in done.stdout, done.stderr
    bad_test = root / "val" / "n00000002" / "n00000002_0.JPEG"
    bad_test.write_bytes(b"")
    done = train_photos(tmp_path / "test", "--workers", "0", "--on-bad-image", "skip", data=root)
    assert f"left out of testing (1 times):\n  {bad_test}: the file is empty" in done.stdout
    events = [json.loads(line) for line in (tmp_path / "skip" / "log.jsonl").read_text().splitlines()]
    bad = [event for event in events if event["event"] == "bad_images"]
    assert {name for event in bad for name, _ in event["images"]} == set(map(str, torn)) and len(bad) == 2


def test_predict_refuses_what_it_cannot_do(mistake, tmp_path, train):
    assert train(tmp_path / "digits", "--epochs", "1", "--warmup-epoch", "0").returncode == 0
    picture(0).save(tmp_path / "a.png")
    mistake(
        eval_script.main,
        ["--checkpoint", tmp_path / "digits" / "last.pth", "--predict", tmp_path],
        "a network for digits",
    )
    mistake(
        eval_script.main,
        ["--checkpoint", tmp_path / "digits" / "last.pth", "--workers", "many"],
        "workers",
        "'many'",
    )
