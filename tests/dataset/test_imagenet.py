"""ImageNet in both layouts, CIFAR's files, and own folders, from small trees on disk."""

import hashlib
import re
import shutil
import zipfile

import numpy as np
import pytest
import torch
from conftest import ROOT, one_line
from trees import cifar10, imagenet, picture

from dataset import cifar as cifar_module
from dataset import imagenet as imagenet_module
from dataset import source, splits
from dataset.build import build_data
from dataset.imagenet import ImagenetPercentV2
from dataset.loader import Stream, to_device
from dataset.workers import PrefetchLoader
from util.config import Config, parse
from util.errors import UserError


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("SIMMATCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("IMAGENET_ROOT", raising=False)


def build(root, **fields):
    return build_data(
        Config(
            **{
                "dataset": "imagenet",
                "data": str(root),
                "cls": 3,
                "labels_per_class": 2,
                "image_size": 32,
                **fields,
            }
        ),
        gpu=False,
    )


@pytest.mark.parametrize("dataset", ["imagenet", "folder"])
def test_multicrop_has_five_views_of_an_image_that_is_decoded_once(dataset, tmp_path, monkeypatch):
    config = parse(["--checkpoint", "a.pth", "--multicrop", "--image-size", "64", "--dataset", dataset], "")
    data = build(imagenet(tmp_path), dataset=dataset, image_size=64, strong=config.strong, device_views="on")
    assert data.sides() == (64, 64, 55, 46, 34, 27)
    decoded = []
    monkeypatch.setattr(source, "to_rgb", lambda image: decoded.append(image) or image.convert("RGB"))
    item = Stream(data, 2, 3, seed=0)[0]
    assert len(decoded) == 2 + 6
    views = zip(data.strong_views, item.u_strong, strict=True)
    shapes = [tuple(to_device(view, raw, torch.device("cpu")).shape) for view, raw in views]
    assert shapes == [(6, 3, side, side) for side in data.sides()[1:]]


@pytest.mark.parametrize("flat_val", [False, True])
def test_both_layouts_give_the_same_data(tmp_path, flat_val):
    data = build(imagenet(tmp_path / "in", flat_val=flat_val))
    assert len(data.images) == 24 and len(data.labeled) == 6 and len(data.unlabeled) == 18
    assert np.bincount(data.labels[data.labeled]).tolist() == [2, 2, 2]
    assert not set(data.labeled) & set(data.unlabeled)  # unlabeled is train minus labeled
    assert data.test_labels.tolist() == [0, 0, 1, 1, 2, 2]
    expected = [np.asarray(picture(1000 * c + 10 * k + 1)) for c in range(3) for k in range(2)]
    for row, pixels in enumerate(expected):
        assert np.abs(np.asarray(data.test_images[row]).astype(int) - pixels).mean() < 8  # through JPEG
    item = Stream(data, 2, 3, seed=0)[0]
    assert to_device(data.weak_view, item.x, torch.device("cpu")).shape == (2, 3, 32, 32)
    assert to_device(data.strong_views[0], item.u_strong[0], torch.device("cpu")).shape == (6, 3, 32, 32)


def test_train_may_be_a_list(tmp_path):
    root = imagenet(tmp_path / "in")
    lines = [
        f"train/{path.parent.name}/{path.name} {int(path.parent.name[1:])}\n"
        for path in (root / "train").rglob("*.JPEG")
    ]
    (root / "train.txt").write_text("".join(sorted(lines, reverse=True)))
    data = build(root)
    assert len(data.images) == 24 and data.classes == ["n00000000", "n00000001", "n00000002"]
    assert data.split.sha256 != "" and np.bincount(data.labels).tolist() == [8, 8, 8]


def test_the_draw_does_not_depend_on_the_layout_of_the_disk(tmp_path):
    a, b = imagenet(tmp_path / "a"), tmp_path / "b"
    for path in sorted((a / "train").rglob("*.JPEG"), reverse=True):  # made in another order
        (b / "train" / path.parent.name).mkdir(parents=True, exist_ok=True)
        (b / "train" / path.parent.name / path.name).write_bytes(path.read_bytes())
    (b / "val").symlink_to(a / "val")
    assert build(a).split == build(b).split and build(a, seed=1).split != build(a).split


def test_the_path_comes_from_flag_environment_or_source(tmp_path, monkeypatch):
    a, b, c = (imagenet(tmp_path / name) for name in "abc")
    monkeypatch.setattr(imagenet_module, "IMAGENET_ROOT", str(a))
    assert ImagenetPercentV2(imagenet_module.find_root(""), "train").name(0).startswith(str(a))
    monkeypatch.setenv("IMAGENET_ROOT", str(b))
    assert imagenet_module.find_root("") == b
    assert imagenet_module.find_root(str(c)) == c


def test_a_share_of_train_is_labeled_and_the_rest_unlabeled(tmp_path):
    root = imagenet(tmp_path / "in")
    data = build(root, labels_per_class=0, anno_percent=0.25)
    assert len(data.labeled) == 6 and len(data.unlabeled) == 18
    assert data.images[int(data.labeled[0])].mode == "RGB"
    assert sorted(data.labeled.tolist() + data.unlabeled.tolist()) == list(range(24))
    name = data.images.name(data.labeled[0])
    assert name == str(root / "train" / "n00000000" / name.rpartition("/")[2])


def test_a_published_share_is_a_published_list(tmp_path, monkeypatch):
    """0.01 means SimMatch's list, where get_splits.sh puts it; here a list with a hash of its own."""
    root = imagenet(tmp_path / "in")
    text = b"n00000001_3.JPEG\nn00000000_0.JPEG\nn00000002_7.JPEG"
    folder = tmp_path / "lists"
    folder.mkdir()
    (folder / "simmatch-1p.txt").write_bytes(text)
    monkeypatch.setitem(
        splits.PUBLISHED,
        "simmatch-1p",
        splits.Published(hashlib.sha256(text).hexdigest(), 3, "owner/repository/file"),
    )
    monkeypatch.setattr(splits.load, "__defaults__", (folder,))
    data = build(root, labels_per_class=0, anno_percent=0.01)
    assert data.split == ("simmatch-1p", hashlib.sha256(text).hexdigest())
    assert [data.images.name(row).rpartition("/")[2] for row in data.labeled] == text.decode().split("\n")
    (folder / "simmatch-1p.txt").write_bytes(text + b"\n")
    with pytest.raises(UserError, match="not the published list"):
        build(root, labels_per_class=0, anno_percent=0.01)


def test_a_list_whose_first_image_is_missing_is_refused(tmp_path):
    root = imagenet(tmp_path / "in", flat_val=True)
    (root / "val.txt").write_text("n03/1.png 0\n")
    with pytest.raises(UserError, match="val.txt: there is no .*/in/val/n03/1.png; paths .* to .*/in/val$"):
        build(root)
    (root / "val").rename(root / "elsewhere")
    with pytest.raises(UserError, match="val.txt: there is no .*/in/val/n03/1.png"):
        build(root)


# Images that are not files.


@pytest.fixture
def zipped(tmp_path):
    """(checkout, data): a copy of the programs in which dataset/imagenet.py has the class of docs/DATA.md,
    and an ImageNet of two archives and two lists.
    """
    checkout, data = tmp_path / "checkout", imagenet(tmp_path / "in")
    for part in ("dataset", "models", "util", "configs"):
        shutil.copytree(ROOT / part, checkout / part, ignore=shutil.ignore_patterns("__pycache__"))
    for program in ("train_semi.py", "eval.py"):
        shutil.copy(ROOT / program, checkout)
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "DATA.md").read_text(), re.S)
    with open(checkout / "dataset" / "imagenet.py", "a") as file:
        file.write(f"\n\n{block}")
    for part in ("train", "val"):
        paths = sorted((data / part).rglob("*.JPEG"))
        with zipfile.ZipFile(data / f"{part}.zip", "w") as archive:
            for path in paths:
                archive.write(path, path.relative_to(data / part))
        lines = [f"{path.parent.name}/{path.name} {int(path.parent.name[1:])}\n" for path in paths]
        (data / f"{part}.txt").write_text("".join(lines))
        (data / part).rename(tmp_path / f"unzipped {part}")
    return checkout, data


FEW = "--labels-per-class 2 --image-size 32 --cls 3 --backbone small_encoder --device cpu".split()


@pytest.mark.slow(20)
def test_images_in_an_archive_need_one_method(zipped, command):
    """The class of docs/DATA.md is the one that training, evaluation and the check go through."""
    checkout, data = zipped

    def call(*args):
        done = command(*args, cwd=checkout, new_process=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    config = ["configs/imagenet_1p.yaml", "--data", data, *FEW]
    steps = "--batch-size 2 --mu 2 --steps-per-epoch 2 --epochs 1 --warmup-epoch 0 --workers 1".split()
    assert "done: best student top-1" in call(
        "train_semi.py", "--config", *config, *steps, "--output-dir", "run"
    )
    assert "6 test images" in call("eval.py", "--checkpoint", "run/best.pth", "--workers", "1")
    assert "formats: JPEG RGB 30" in call("-m", "dataset.check", *config)


def test_an_archive_without_an_image_makes_one_line(zipped, command):
    checkout, data = zipped
    config = ["configs/imagenet_1p.yaml", "--data", data, *FEW]
    (data / "val.zip").unlink()
    done = command("-m", "dataset.check", *config, cwd=checkout, new_process=True)
    one_line(done.returncode, done.stderr, "the first image of", "val.txt", "No such file or directory")


# CIFAR.


@pytest.fixture
def cifar_root(tmp_path, monkeypatch):
    monkeypatch.setattr(
        cifar_module.CIFAR10, "_check_integrity", lambda self: (tmp_path / "c" / self.base_folder).is_dir()
    )
    monkeypatch.setattr(cifar_module.CIFAR10, "meta", {**cifar_module.CIFAR10.meta, "md5": None})
    return cifar10(tmp_path / "c")


def test_cifar_has_its_images_labels_and_views(cifar_root):
    data = build(
        cifar_root, dataset="cifar10", cls=10, labels_per_class=4, weak="cifar_weak", strong="cifar_strong"
    )
    assert len(data.labeled) == 40 and len(data.unlabeled) == 200 and len(data.test_labels) == 20
    assert data.split.id == "cifar10-4-seed0" and data.classes[0] == "airplane"
    item = Stream(data, 4, 7, seed=0)[0]
    assert to_device(data.strong_views[0], item.u_strong[0], torch.device("cpu")).shape == (28, 3, 32, 32)
    eval_view = to_device(
        data.eval_view,
        data.eval_view.cpu_transform([data.test_images[0]], np.empty((1, 0))),
        torch.device("cpu"),
    )
    assert eval_view.shape == (1, 3, 32, 32) and eval_view.abs().max() < 4


def test_cifar_without_network_is_refused(tmp_path, monkeypatch):
    def offline(self):
        raise OSError("Name or service not known")

    monkeypatch.setattr(cifar_module.CIFAR10, "download", offline)
    with pytest.raises(UserError, match="cifar10 is not in .*nowhere and cannot be downloaded .*--data"):
        build(tmp_path / "nowhere", dataset="cifar10", cls=10)


# Own folders.


def own(root, **fields):
    return build(root, dataset="folder", **fields)


def test_a_share_of_one_folder_can_be_held_out(tmp_path):
    root = imagenet(tmp_path / "in") / "train"
    data = own(root, val_share=0.25)
    assert len(data.test_labels) == 6 and len(data.labeled) == 6 and len(data.unlabeled) == 12
    trained = {data.images.name(row) for row in range(len(data.images))}
    assert not trained & {data.test_images.name(row) for row in range(6)}
    assert np.bincount(data.test_labels).tolist() == [2, 2, 2]


def test_a_folder_of_unlabeled_images_can_be_added(tmp_path):
    root, unlabeled = imagenet(tmp_path / "in"), tmp_path / "unlabeled"
    for k, place in enumerate(("x.png", "deep/er/y.jpg", "deep/z.webp")):
        (unlabeled / place).parent.mkdir(parents=True, exist_ok=True)
        picture(k).save(unlabeled / place)
    (unlabeled / "notes.txt").write_text("not an image")
    data = own(root, unlabelled=str(unlabeled), labels_per_class=0)
    assert len(data.labeled) == 24 and len(data.unlabeled) == 3 and (data.labels[data.unlabeled] == -1).all()
    assert sorted(data.images.name(row) for row in data.unlabeled) == sorted(
        str(unlabeled / place) for place in ("x.png", "deep/er/y.jpg", "deep/z.webp")
    )
    assert all(data.images[row].mode == "RGB" for row in data.unlabeled)
    assert Stream(data, 1, 3, seed=0)[0].true_labels is None
    part = own(root, unlabelled=str(unlabeled), labels_per_class=2)
    assert len(part.labeled) == 6 and len(part.unlabeled) == 24 - 6 + 3


def test_a_list_of_paths_chooses_the_labeled_images(tmp_path):
    root = imagenet(tmp_path / "in")
    (tmp_path / "mine.txt").write_text(
        "n00000002/n00000002_1.JPEG\nn00000000/n00000000_5.JPEG\nn00000001/n00000001_0.JPEG\n"
    )
    data = own(root, split=str(tmp_path / "mine.txt"))
    assert data.split.id == "mine" and data.labels[data.labeled].tolist() == [2, 0, 1]


@pytest.mark.parametrize(
    "make, fields, words",
    [
        (None, {}, "folder .*nothing does not exist"),
        (lambda r: (r / "train").mkdir(parents=True), {}, "no val/|has no class folders"),
        (lambda r: imagenet(r), {"labels_per_class": 9}, "only 8 images, 9 are to be drawn"),
        (
            lambda r: imagenet(r),
            {"split": "simmatch-2p"},
            "simmatch-2p is neither a list file nor a published split",
        ),
        (lambda r: imagenet(r), {"cls": 4}, "has 3 classes: use --cls 3"),
        (lambda r: imagenet(r), {"strong": "stronk"}, "unknown view 'stronk'"),
        (
            lambda r: (imagenet(r), (r / "list.txt").write_text("n00000000_0.JPEG\nn00000009_0.JPEG\n")),
            {"split": "list.txt"},
            "1 of its 2 images are not in .*n00000009_0.JPEG",
        ),
        (
            lambda r: (imagenet(r), (r / "list.txt").write_text("n00000000_0.JPEG\n")),
            {"split": "list.txt"},
            "class n00000001 has no labeled image",
        ),
    ],
)
def test_impossible_imagenets_are_refused(tmp_path, make, fields, words):
    root = tmp_path / ("in" if make else "nothing")
    if make:
        make(root)
    if fields.get("split") == "list.txt":
        fields = {**fields, "split": str(root / "list.txt")}
    with pytest.raises(UserError, match=words):
        build(root, **fields)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"data": ""}, "needs --data DIR"),
        ({}, "--val-share"),
        ({"val_share": 0.99}, "no image left to train on"),
        ({"val": "{root}/elsewhere"}, "elsewhere does not exist"),
        ({"val_share": 0.2, "unlabelled": "{root}/empty"}, "empty holds no images"),
    ],
)
def test_impossible_folders_are_refused(tmp_path, fields, words):
    root = imagenet(tmp_path / "in") / "train"
    (tmp_path / "empty").mkdir()
    fields = {
        key: value.format(root=tmp_path) if isinstance(value, str) else value for key, value in fields.items()
    }
    with pytest.raises(UserError, match=words):
        own(**{"root": root, **fields}) if "data" not in fields else build(
            **{"root": "", "dataset": "folder", **fields}
        )


# What a step sees.


@pytest.mark.parametrize("device_views", ["on", "off"])
@pytest.mark.parametrize("workers", [0, 1, 4])
def test_files_give_the_same_bytes_with_any_workers_and_from_any_start(tmp_path, device_views, workers):
    data = build(imagenet(tmp_path / "in"), strong="moco", device_views=device_views)

    def raw(item):
        return [*item.x, item.y, item.index, *item.u_weak, *item.u_strong[0], item.true_labels]

    expected = [raw(Stream(data, 2, 2, seed=3, rank=1, world=2)[step]) for step in range(6)]
    assert expected[0][0].dtype == torch.uint8
    for start in (0, 3):
        got = list(
            PrefetchLoader(
                Stream(data, 2, 2, seed=3, rank=1, world=2), range(start, 6), workers, pin_memory=False
            )
        )
        assert len(got) == 6 - start
        assert all(
            torch.equal(a, b)
            for step, item in enumerate(got, start)
            for a, b in zip(raw(item), expected[step], strict=True)
        )
