"""What a new run says about results that mean little."""

import os
import shutil

import numpy as np
import pytest
from conftest import ROOT
from trees import imagenet

from dataset.build import build_data
from dataset.findings import MAX_NAMED, few_test_images, same_files, standard_error, start_warnings
from util.config import Config, coerce_values, read_yaml, validate


def config(file, **values):
    known = read_yaml(str(ROOT / "configs" / file))
    return validate(Config(**{**known, **coerce_values(values, "the test")}))


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """3 classes, each with 8 training images, of which 4 are labeled, and 12 test images."""
    monkeypatch.setenv("SIMMATCH_CACHE", str(tmp_path / "cache"))
    return imagenet(tmp_path / "in", train=8, val=12)


def warnings(tree, **values):
    c = config("folder.yaml", data=str(tree), labels_per_class=4, **values)
    return start_warnings(c, build_data(c, gpu=False), steps_per_epoch=100)


def test_a_sound_run_has_no_warning(tree):
    assert warnings(tree) == []
    digits = config("digits.yaml")
    assert start_warnings(digits, build_data(digits, gpu=False), steps_per_epoch=20) == []


def test_classes_without_test_images_are_named(tree):
    shutil.rmtree(tree / "val/n00000001")
    (line,) = warnings(tree)
    assert line == (
        "warning: classes without a test image, about which the accuracy says nothing: 1 (n00000001)"
    )


def test_a_class_of_nine_test_images_is_named_and_one_of_ten_is_not(tree):
    for k in (9, 10, 11):
        (tree / f"val/n00000002/n00000002_{k}.JPEG").unlink()
    (tree / "val/n00000000/n00000000_0.JPEG").unlink()
    (tree / "val/n00000000/n00000000_1.JPEG").unlink()
    (line,) = warnings(tree)
    assert line.startswith("warning: 1 of 3 classes have fewer than 10 test images (n00000002 9): ")
    assert "up to 17 points for a class of 9, and up to 9 points for all 31 test images" in line


@pytest.mark.parametrize("images", [1, 9, 360, 10_000])
def test_the_standard_error_is_that_of_simulated_accuracies(images):
    accuracies = np.random.default_rng(0).binomial(images, 0.5, 100_000) / images
    assert float(standard_error(images)) == pytest.approx(100 * accuracies.std(), rel=0.03)


def test_few_names_stand_for_many():
    line = few_test_images(np.array([3] * 20 + [50]), [f"c{k}" for k in range(21)])
    named = ", ".join(f"c{k} 3" for k in range(MAX_NAMED))
    assert line.startswith(f"20 of 21 classes have fewer than 10 test images ({named}, ...): ")


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_a_labeled_image_that_is_also_a_test_image_is_found_through_links(tree, link):
    c = config("folder.yaml", data=str(tree), labels_per_class=4)
    before = build_data(c, gpu=False)
    labeled = before.images.name(int(before.labeled[5]))
    unlabeled = before.images.name(int(before.unlabeled[0]))
    assert same_files(before) == []
    leak = tree / "val/n00000002/leak.jpg"
    link(labeled, leak)
    link(unlabeled, tree / "val/n00000002/other.jpg")
    shutil.copyfile(labeled, tree / "val/n00000002/copy.jpg")  # only dataset.check compares contents
    (tree / "val/n00000000/n00000000_0.JPEG").unlink()
    (line,) = start_warnings(c, build_data(c, gpu=False), steps_per_epoch=100)
    assert line == (
        f"warning: labeled images that are also test images (remove them): 1 ({labeled} is {leak})"
    )


def test_names_of_any_bytes_are_printed(tree):
    labeled = build_data(config("folder.yaml", data=str(tree), labels_per_class=4), gpu=False)
    os.link(labeled.images.name(int(labeled.labeled[0])), os.fsencode(tree / "val/n00000000") + b"/\xe9.jpg")
    (line,) = warnings(tree)
    assert line.endswith(r"/val/n00000000/\xe9.jpg)") and line.encode()


@pytest.mark.slow(5)
def test_a_new_run_warns_and_a_resumed_one_does_not(train, tmp_path):
    flags = ["--print-freq", "30", "--ema-m", "0.9999"]
    done = train(tmp_path, *flags)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if "warning" in line] == [
        "warning: evaluations are 20 steps apart (20 steps an epoch), fewer than --print-freq 30: the log "
        "has hardly any train event but those of evaluations; set --print-freq 4",
        "warning: with --ema-m 0.9999 the teacher still holds 99.6 % of the network it started from after "
        "all 40 steps; --ema-m 0.8 leaves 1 % at most",
    ]
    assert "warning" not in train(tmp_path, *flags).stdout
