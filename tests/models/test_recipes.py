"""Each config and each published command line sets the values of its recipe."""

import re

import numpy as np
import pytest
import torch
from conftest import ROOT

from dataset.loader import Data, Stream
from dataset.views import MULTICROP
from models import build_method
from util.config import Config, parse, to_dict
from util.errors import UserError

NAMES = [f"cifar10_{k}" for k in (40, 250, 4000)] + [f"cifar100_{k}" for k in (400, 2500, 10000)]
RECIPE = dict(
    method="simmatch_single",
    batch_size=64,
    mu=7,
    epochs=1024,
    steps_per_epoch=1024,
    lr=0.03,
    warmup_epoch=0,
    cos=False,
    cos_7_16=True,
    momentum=0.9,
    nesterov=True,
    no_decay_bn=True,
    lambda_u=1.0,
    lambda_in=1.0,
    threshold=0.95,
    st=0.1,
    tt=0.1,
    c_smooth=0.9,
    DA=True,
    da_len=32,
    bank_m=0.7,
    ema_m=0.999,
    dim=128,
    weak="cifar_weak",
    strong="cifar_strong",
)
BY_DATASET = {
    "cifar10": dict(cls=10, backbone="wrn_28_2", wd=5e-4),
    "cifar100": dict(cls=100, backbone="wrn_28_8", wd=1e-3),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_config_is_the_recipe(name):
    path = ROOT / "configs" / f"{name}.yaml"
    config, (dataset, labels) = parse(["--config", str(path)], ""), name.split("_")
    expected = {**RECIPE, **BY_DATASET[dataset], "dataset": dataset}
    expected["labels_per_class"] = int(labels) // expected["cls"]
    ours = {"output_dir", "print_freq"}  # not part of a recipe
    assert {key: value for key, value in to_dict(config).items() if key not in ours} == {
        key: value for key, value in {**to_dict(Config()), **expected}.items() if key not in ours
    }
    text = path.read_text()
    assert (
        20 <= text.count("\n") <= 35 and f"--config configs/{name}.yaml" in text and "ours: not run" in text
    )
    error, accuracy = re.search(r"Expected: ([\d.]+) % error, ([\d.]+) % top-1 \(published\)", text).groups()
    assert float(error) + float(accuracy) == pytest.approx(100)


@pytest.mark.parametrize("name", ["cifar10_40", "cifar100_400"])
def test_its_method_has_the_recipes_parts(name):
    config = parse(["--config", str(ROOT / "configs" / f"{name}.yaml")], "")
    labels = torch.arange(config.cls).repeat(config.labels_per_class)
    with torch.device("meta"):
        method = build_method(config, 3, labels)
    assert method.bank.z.shape == (len(labels), 128) and method.bank.m == 0.7
    assert method.align.ring.shape == (32, config.cls)
    assert method.teacher.bn_mode == "copy" and type(method).__name__ == "SimMatchSingle"


# The published commands, from the authors' instructions; their simmatch.py is train_semi.py.
TRAIN = (
    "--nesterov --lambda_in 5 --lr 0.03 --epochs 400 --cos --warmup-epoch 5 --st 0.1 --tt 0.1 "
    "--anno-percent {} --c_smooth 0.9 --DA"
)
PUBLISHED = {
    "imagenet_1p": TRAIN.format("0.01") + " --checkpoint simmatch-1p.pth",
    "imagenet_10p": TRAIN.format("0.1") + " --checkpoint simmatch-10p.pth",
}
WHERE = {"output_dir", "checkpoint"}  # where a run writes


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_command_is_the_recipe(name):
    """The recipe as the paper states it, as our config states it, and as the authors type it."""
    share = {"imagenet_1p": 0.01, "imagenet_10p": 0.1}[name]
    recipe = dict(
        method="simmatch",
        dataset="imagenet",
        cls=1000,
        anno_percent=share,
        weak="weak",
        strong="moco",
        image_size=224,
        batch_size=8,
        mu=5,
        workers=6,
        backbone="resnet50_encoder",
        dim=128,
        norm="None",
        epochs=400,
        start_epoch=0,
        lr=0.03,
        warmup_epoch=5,
        cos=True,
        momentum=0.9,
        nesterov=True,
        wd=1e-4,
        no_decay_bn=False,
        lambda_u=10.0,
        lambda_in=5.0,
        threshold=0.7,
        st=0.1,
        tt=0.1,
        c_smooth=0.9,
        DA=True,
        da_len=256,
        bank_m=0.0,
        eman=False,
        ema_m=0.999,
        print_freq=20,
        eval_freq=1,
        precision="fp32",
    )
    typed = to_dict(parse(PUBLISHED[name].split(), ""))
    ours = to_dict(parse(["--config", str(ROOT / "configs" / f"{name}.yaml")], ""))
    assert {key: typed[key] for key in recipe} == recipe
    assert {key: ours[key] for key in ours if key not in WHERE} == {
        key: typed[key] for key in typed if key not in WHERE
    }
    assert typed["checkpoint"] == PUBLISHED[name].split()[-1]
    assert typed["output_dir"] == f"checkpoints/simmatch-{name.split('_')[1]}"


@pytest.mark.parametrize("share, name", [("0.01", "simmatch-1p.pth"), ("0.1", "simmatch-10p.pth")])
def test_the_published_evaluation_commands(share, name):
    config = parse(f"--evaluate --anno-percent {share} --DA --checkpoint {name}".split(), "")
    assert config.evaluate and config.checkpoint == name and config.DA and config.anno_percent == float(share)


V2 = (
    "--method simmatchv2 --norm_feat --multicrop --alpha 0.1 --topn 128 --k 256 --lambda_nn 10 "
    "--lambda_ee {0} --lambda_ne {0} --DA --da_m 0.9 --t 0.1 --fp16 --nesterov --lr 0.03 --epochs 300 "
    "--cos --warmup-epoch 5 "
    "--anno-percent {1} --checkpoint checkpoints/300ep-res50-{2}.pth"
)


@pytest.mark.parametrize("weight, share, name", [(10, 0.01, "1p"), (5, 0.1, "10p")])
def test_a_published_simmatchv2_command_is_the_recipe(weight, share, name):
    recipe = dict(
        dataset="imagenet",
        cls=1000,
        anno_percent=share,
        lists="simclr",
        labeled_sampler="exact",
        weak="weak",
        strong=",".join(MULTICROP),
        batch_size=8,
        mu=5,
        backbone="resnet50_encoder",
        norm_feat=True,
        dim=128,
        epochs=300,
        lr=0.03,
        warmup_epoch=5,
        cos=True,
        momentum=0.9,
        nesterov=True,
        wd=1e-4,
        no_decay_bn=False,
        lambda_nn=10.0,
        lambda_ee=float(weight),
        lambda_ne=float(weight),
        threshold=0.7,
        t=0.1,
        alpha=0.1,
        topn=128,
        k=256,
        DA=True,
        da_m=0.9,
        eman=False,
        ema_m=0.999,
        bn_from_first_view=False,
        precision="fp16",
    )
    command = V2.format(weight, share, name)
    typed = to_dict(parse(command.split(), ""))
    ours = to_dict(parse(["--config", str(ROOT / "configs" / f"simmatchv2_{name}.yaml")], ""))
    assert {key: typed[key] for key in recipe} == recipe
    assert {key: ours[key] for key in ours if key not in WHERE} == {
        key: typed[key] for key in typed if key not in WHERE
    }
    assert typed["output_dir"] == f"checkpoints/300ep-res50-{name}"
    evaluate = f"--method simmatchv2 --evaluate --anno-percent {share} --norm_feat --k 256"
    assert parse([*evaluate.split(), "--checkpoint", "x/y.pth"], "").evaluate


def test_a_published_simmatchv2_command_needs_its_method():
    """All of its values are the defaults at 10 %."""
    command = V2.format(5, 0.1, "10p").replace("--method simmatchv2 ", "")
    with pytest.raises(UserError, match="--alpha has no effect with method simmatch: it is for simmatchv2"):
        parse(command.split(), "")


def test_simmatchv2_has_its_published_defaults():
    config = parse("--method simmatchv2 --checkpoint a.pth".split(), "")
    defaults = dict(t=0.1, alpha=0.1, da_m=0.9, k=256, topn=128, lambda_nn=10.0, lambda_ee=5.0, lambda_ne=5.0)
    defaults |= dict(DA=False, norm_feat=False, strong="moco", threshold=0.7, precision="fp32", ema_m=0.999)
    assert {key: getattr(config, key) for key in defaults} == defaults


def test_the_published_flags_and_their_defaults():
    config = parse(["--checkpoint", "a.pth"], "")
    defaults = dict(
        backbone="resnet50_encoder",
        cls=1000,
        port=23456,
        workers=6,
        epochs=200,
        start_epoch=0,
        warmup_epoch=0,
        batch_size=8,
        lr=0.1,
        schedule=[120, 160],
        cos=False,
        momentum=0.9,
        wd=1e-4,
        nesterov=False,
        print_freq=20,
        eval_freq=1,
        evaluate=False,
        anno_percent=0.1,
        mu=5,
        lambda_u=10.0,
        threshold=0.7,
        eman=False,
        ema_m=0.999,
        norm="None",
        moco_path="",
        st=0.1,
        tt=0.1,
        c_smooth=1.0,
        DA=False,
        lambda_in=1.0,
        strong="moco",
    )
    assert {key: getattr(config, key) for key in defaults} == defaults


@pytest.mark.parametrize(
    "flags, field, value",
    [
        ("-j 3", "workers", 3),
        ("-b 4", "batch_size", 4),
        ("-p 7", "print_freq", 7),
        ("-e", "evaluate", True),
        ("--learning-rate 0.2", "lr", 0.2),
        ("--weight-decay 0.5", "wd", 0.5),
        ("--schedule 10 20", "schedule", [10, 20]),
        ("--randaug", "strong", "rand"),
        ("--stack", "strong", "stack"),
        ("--multicrop", "strong", ",".join(MULTICROP)),
        ("--norm BN", "norm", "BN"),
        ("--seed 5", "seed", 5),
        ("--eman --ema-m 0.99", "ema_m", 0.99),
        ("--backbone resnet50w2x_encoder", "backbone", "resnet50w2x_encoder"),
        ("--moco-path m.pth", "moco_path", "m.pth"),
        ("--port 23999", "port", 23999),
        ("--start-epoch 3", "start_epoch", 3),
        ("--fp16", "precision", "fp16"),
        ("--norm_feat", "norm_feat", True),
        ("--checkpoint a/b.pth", "checkpoint", "a/b.pth"),
    ],
)
def test_published_flags(flags, field, value):
    assert getattr(parse(["--checkpoint", "a.pth", *flags.split()], ""), field) == value


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--randaug --stack", "--stack and --randaug both set strong"),
        ("--stack --strong moco", "--stack and --strong both set strong"),
        ("--multicrop --strong moco", "--multicrop and --strong both set strong"),
        ("--fp16 --precision bf16", "--fp16 and --precision both set precision"),
        ("--norm SyncBN", "None or BN"),
        ("--checkpoint a/b/", "a file"),
    ],
)
def test_published_flags_that_are_refused(flags, words):
    with pytest.raises(UserError, match=words):
        parse(["--checkpoint", "a.pth", *flags.split()], "")


@pytest.mark.parametrize(
    "config, labeled, steps", [("imagenet_1p", 13_000, 3_963), ("imagenet_10p", 128_000, 3_603)]
)
def test_steps_of_an_epoch(config, labeled, steps):
    """A step takes 64 + 320 images over 8 ranks. The unlabeled images are the training images without the
    labeled ones; an incomplete last step is dropped.
    """
    config, images = parse(["--config", str(ROOT / "configs" / f"{config}.yaml")], ""), 1_281_167
    data = Data(
        images=(),
        labels=np.zeros(images, np.int64),
        labeled=np.arange(labeled),
        unlabeled=np.arange(labeled, images),
        test_images=(),
        test_labels=np.zeros(0),
        weak_view=None,
        strong_views=(),
        eval_view=None,
        classes=[],
        channels=3,
        split=None,
    )
    assert Stream(data, config.batch_size, config.mu, 0, rank=3, world=8).steps_per_epoch == steps


CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_has_its_header_and_builds(name):
    text = (ROOT / "configs" / f"{name}.yaml").read_text()
    header = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
    assert text.startswith(header) and 20 <= text.count("\n") <= 35
    for word in ("Command: ", f"configs/{name}.yaml", "Paper: ", "Expected: ", "plit: "):
        assert word in header, word
    if "digits" not in name and "folder" not in name:
        assert "not measured" in header and "not run" in header
    config = parse(["--config", str(ROOT / "configs" / f"{name}.yaml")], "")
    with torch.device("meta"):
        build_method(config, 1 if "digits" in name else 3, torch.zeros(128, dtype=torch.long))
