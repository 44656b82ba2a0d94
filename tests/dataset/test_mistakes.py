"""Mistakes with data: each row of the table in docs/DATA.md, by its name, is compared with the message."""

import hashlib
import os
import re
import shutil

import pytest
from conftest import ROOT
from trees import imagenet, picture

import train_semi
from dataset import cifar, splits

TABLE = dict(
    re.findall(r"^\| (.+?) \| (error: .+) \|$", (ROOT / "docs" / "DATA.md").read_text(encoding="utf-8"), re.M)
)
ROWS = {}


def row(name):
    def add(function):
        ROWS[name] = function
        return function

    return add


def labeled_list(root, *names):
    (root / "mine.txt").write_text("".join(name + "\n" for name in names))
    return ["--split", root / "mine.txt", "--labels-per-class", "0"]


def everywhere(root, part, data, every=1):
    """Write `data` over the image files of a part, or every second, third … of them."""
    for path in sorted((root / part).rglob("*.JPEG"))[::every]:
        path.write_bytes(data)
    return []


@row("the path in dataset/imagenet.py was not edited")
def _(root, monkeypatch):
    return ["--data", ""]


@row("no train/ in the folder")
def _(root, monkeypatch):
    shutil.rmtree(root / "train")
    return []


@row("a flat val/ without val.txt")
def _(root, monkeypatch):
    shutil.rmtree(root / "val")
    imagenet(root, train=0, flat_val=True)
    (root / "val.txt").unlink()
    return []


@row("an output directory among the images")
def _(root, monkeypatch):
    return ["--output-dir", root / "train" / "run"]


@row("a class folder with a line end in its name")
def _(root, monkeypatch):
    (root / "train" / "n0\n1").mkdir()
    return []


@row("a FIFO or a link to a device named .png")
def _(root, monkeypatch):
    os.mkfifo(root / "train" / "n00000000" / "a.png")
    return []


@row("a drawn image whose name is not UTF-8")
def _(root, monkeypatch):
    for part in ("train", "val"):
        (root / part / "n00000003").mkdir()
        picture(0).save(root / part / "n00000003" / os.fsdecode(b"caf\xe9.JPEG"))
    return ["--labels-per-class", "1", "--cls", "4"]


@row("a home folder that does not exist")
def _(root, monkeypatch):
    return ["--data", "~no-such-user/images"]


@row("an empty class folder")
def _(root, monkeypatch):
    (root / "train" / "n00000009").mkdir()
    return []


@row("a folder inside a class folder of ImageNet")
def _(root, monkeypatch):
    (root / "train" / "n00000000" / "more").mkdir()
    return []


@row("a line of a list without a label")
def _(root, monkeypatch):
    (root / "val.txt").write_text("n00000000/n00000000_0.JPEG 0\nn00000001/n00000001_0.JPEG\n")
    return []


@row("a list that is not text")
def _(root, monkeypatch):
    (root / "val.txt").write_bytes(b"\xff\xfe\x00\x01")
    return []


def published(root, monkeypatch, sha):
    monkeypatch.setitem(splits.PUBLISHED, "simmatch-1p", splits.Published(sha, 3, "owner/repository/file"))
    monkeypatch.setattr(splits.load, "__defaults__", (root / "lists",))
    (root / "lists").mkdir()
    return ["--labels-per-class", "0", "--anno-percent", "0.01"]


@row("a published split that was not fetched")
def _(root, monkeypatch):
    return published(root, monkeypatch, "00")


@row("a published split that was changed")
def _(root, monkeypatch):
    flags = published(root, monkeypatch, hashlib.sha256(b"other").hexdigest())
    (root / "lists" / "simmatch-1p.txt").write_text("n00000000_0.JPEG\n")
    return flags


@row("an unknown split")
def _(root, monkeypatch):
    return ["--split", "simmatch-2p", "--labels-per-class", "0"]


@row("a list with an image that is not there")
def _(root, monkeypatch):
    return labeled_list(root, "n00000000_0.JPEG", "n00000001_77.JPEG", "n00000002_0.JPEG")


@row("a list without images of a class")
def _(root, monkeypatch):
    return labeled_list(root, "n00000000_0.JPEG")


@row("an image twice in a list")
def _(root, monkeypatch):
    return labeled_list(root, "n00000000_0.JPEG", "n00000000_0.JPEG")


@row("more labels than images")
def _(root, monkeypatch):
    return ["--labels-per-class", "9"]


@row("another number of classes")
def _(root, monkeypatch):
    return ["--cls", "4"]


@row("a setting that the data set does not use")
def _(root, monkeypatch):
    return ["--val", root / "val"]


@row("labeled images chosen in two ways")
def _(root, monkeypatch):
    return ["--split", "simmatch-1p"]


@row("an unknown view")
def _(root, monkeypatch):
    return ["--strong", "strongest"]


@row("a JPEG that was cut short")
def _(root, monkeypatch):
    whole = (root / "train" / "n00000000" / "n00000000_0.JPEG").read_bytes()
    return everywhere(root, "train", whole[: len(whole) // 2], every=2)


@row("an empty image file")
def _(root, monkeypatch):
    return everywhere(root, "train", b"", every=2)


@row("a text named .jpg")
def _(root, monkeypatch):
    return everywhere(root, "train", b"<html>404 Not Found</html>", every=2)


@row("a bad test image")
def _(root, monkeypatch):
    return everywhere(root, "val", b"")


@row("`--on-bad-image skip`, and no labeled image of a class can be read")
def _(root, monkeypatch):
    return [
        *everywhere(root, "train/n00000001", b""),
        "--on-bad-image",
        "skip",
        "--workers",
        "1",
    ]  # said by a worker process


@row("own images without test images")
def _(root, monkeypatch):
    return ["--dataset", "folder", "--data", root / "train"]


@row("a val/ folder among the class folders")
def _(root, monkeypatch):
    shutil.move(root / "val", root / "train" / "val")
    return ["--dataset", "folder", "--data", root / "train"]


@row("train/ beside classes")
def _(root, monkeypatch):
    (root / "zebra").mkdir()
    return ["--dataset", "folder"]


@row("`--unlabelled` that holds the test images too")
def _(root, monkeypatch):
    shutil.copytree(root / "val", root.parent / "unlabeled" / "more")
    return [
        "--dataset",
        "folder",
        "--val",
        root.parent / "unlabeled" / "more",
        "--unlabelled",
        root.parent / "unlabeled",
    ]


@row("labels of a list in another order than the folders'")
def _(root, monkeypatch):
    (root / "val.txt").write_text(
        "".join(f"n0000000{c}/n0000000{c}_0.JPEG {label}\n" for c, label in ((0, 1), (1, 0), (2, 2)))
    )
    return []


@row("own images in one folder only")
def _(root, monkeypatch):
    return ["--dataset", "folder", "--data", root / "train" / "n00000000", "--val-share", "0.2"]


@row("`--unlabelled` without images")
def _(root, monkeypatch):
    (root.parent / "unlabeled").mkdir()
    return ["--dataset", "folder", "--unlabelled", root.parent / "unlabeled"]


@row("a test class that training does not have")
def _(root, monkeypatch):
    (root / "val" / "zebra").mkdir()
    picture(0).save(root / "val" / "zebra" / "a.png")
    return ["--dataset", "folder"]


@row("CIFAR without network")
def _(root, monkeypatch):
    def offline(self):
        raise OSError("Name or service not known")

    monkeypatch.setattr(cifar.CIFAR10, "download", offline)
    return ["--dataset", "cifar10", "--cls", "10", "--image-size", "224"]  # the default, instead of 32


@row("going on with another draw of labels")
def _(root, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train_semi.py", *map(str, flags(root))])
    train_semi.main()
    return ["--labels-per-class", "3"]


@row("going on after images were removed")
def _(root, monkeypatch):
    monkeypatch.setattr(
        "sys.argv", ["train_semi.py", *map(str, [*flags(root), *labeled_list(root, *CHOSEN)])]
    )
    train_semi.main()
    (root / "train" / "n00000001" / "n00000001_6.JPEG").unlink()
    return ["--split", root / "mine.txt", "--labels-per-class", "0"]


CHOSEN = [f"n0000000{c}_{k}.JPEG" for c in range(3) for k in range(2)]


def flags(root):
    return [
        "--config",
        ROOT / "configs" / "digits.yaml",
        "--dataset",
        "imagenet",
        "--data",
        root,
        "--cls",
        "3",
        "--labels-per-class",
        "2",
        "--image-size",
        "32",
        "--backbone",
        "small_encoder",
        "--batch-size",
        "2",
        "--mu",
        "2",
        "--epochs",
        "1",
        "--output-dir",
        root.parent / "run",
        "--device",
        "cpu",
    ]


def test_the_table_and_the_tests_have_the_same_rows():
    assert set(TABLE) == set(ROWS) and len(ROWS) >= 20


@pytest.mark.parametrize("name", ROWS)
def test_each_mistake_has_its_message(name, tmp_path, monkeypatch, mistake):
    monkeypatch.setenv("SIMMATCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("IMAGENET_ROOT", raising=False)
    root = imagenet(tmp_path / "in")
    said = mistake(train_semi.main, [*flags(root), *ROWS[name](root, monkeypatch)])
    assert re.fullmatch(".*".join(map(re.escape, TABLE[name].split("…"))), said), said
