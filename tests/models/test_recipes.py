"""The CIFAR configs: each is the recipe, and differs from the others only in the data, the network and the weight decay."""
import re

import pytest
import torch
from conftest import ROOT

from models import build_method
from util.config import Config, parse, to_dict

NAMES = [f"cifar10_{k}" for k in (40, 250, 4000)] + [f"cifar100_{k}" for k in (400, 2500, 10000)]
RECIPE = dict(
    method="simmatch_single", batch_size=64, mu=7, epochs=1024, steps_per_epoch=1024, lr=0.03, warmup_epoch=0, cos=False,
    cos_7_16=True, momentum=0.9, nesterov=True, no_decay_bn=True, lambda_u=1.0, lambda_in=1.0, threshold=0.95, st=0.1, tt=0.1,
    c_smooth=0.9, DA=True, da_len=32, bank_m=0.7, ema_m=0.999, dim=128, weak="cifar_weak", strong="cifar_strong")
BY_DATASET = {"cifar10": dict(cls=10, backbone="wrn_28_2", wd=5e-4), "cifar100": dict(cls=100, backbone="wrn_28_8", wd=1e-3)}


@pytest.mark.parametrize("name", NAMES)
def test_a_config_is_the_recipe(name):
    path = ROOT / "configs" / f"{name}.yaml"
    config, (dataset, labels) = parse(["--config", str(path)], ""), name.split("_")
    expected = {**RECIPE, **BY_DATASET[dataset], "dataset": dataset}
    expected["labels_per_class"] = int(labels) // expected["cls"]
    ours = {"output_dir", "print_freq"}         # how it is watched
    assert {key: value for key, value in to_dict(config).items() if key not in ours} == {
        key: value for key, value in {**to_dict(Config()), **expected}.items() if key not in ours}
    text = path.read_text()
    assert 20 <= text.count("\n") <= 35 and f"--config configs/{name}.yaml" in text and "ours: not run" in text
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
    assert method.teacher.bn == "copy" and type(method).__name__ == "SimMatchSingle"
