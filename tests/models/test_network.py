"""Shapes, names and sizes of the networks."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from models import build_network
from models.network import BACKBONES, Network, torchvision_encoder
from models.optimizer import parameter_groups
from util.config import Config


def test_published_parameter_names_and_unit_embeddings():
    net = Network("resnet18_encoder", channels=3, num_classes=7, dim=16).eval()
    logits, z = net(torch.randn(2, 3, 64, 64))
    assert logits.shape == (2, 7) and z.shape == (2, 16)
    torch.testing.assert_close(z.norm(dim=1), torch.ones(2))
    own = {key[len("backbone.") :] for key in net.state_dict() if key.startswith("backbone.")}
    assert own == {key for key in torchvision.models.resnet18().state_dict() if not key.startswith("fc.")}
    rest = {key for key in net.state_dict() if not key.startswith("backbone.")}
    assert rest == {"fc.weight", "fc.bias", "head.0.weight", "head.0.bias", "head.2.weight", "head.2.bias"}


def test_a_normalized_feature_and_no_head():
    """SimMatchV2's norm_feat: fc and head both read the normalized feature. FixMatch has no head."""
    torch.manual_seed(0)
    net, x = Network("small_encoder", 1, num_classes=3, dim=4, norm=True).eval(), torch.randn(2, 1, 8, 8)
    nn.init.uniform_(net.norm.weight)
    nn.init.uniform_(net.norm.bias)
    f = net.backbone(x)
    f = (f - f.mean(1, keepdim=True)) / (
        f.var(1, unbiased=False, keepdim=True) + 1e-5
    ).sqrt() * net.norm.weight + net.norm.bias
    logits, z = net(x)
    torch.testing.assert_close(logits, net.fc(f))
    torch.testing.assert_close(z, F.normalize(net.head(f), dim=1))
    assert [key for key in net.state_dict() if not key.startswith("backbone.")][-2:] == [
        "norm.weight",
        "norm.bias",
    ]

    bare = Network("small_encoder", 1, num_classes=3, dim=0).eval()
    assert {key.split(".")[0] for key in bare.state_dict()} == {"backbone", "fc"}
    torch.testing.assert_close(bare(x)[1], F.normalize(bare.backbone(x), dim=1))


@pytest.mark.parametrize(
    "name, millions",
    [
        ("resnet18_encoder", 11.18),
        ("resnet34_encoder", 21.28),
        ("resnet50_encoder", 23.51),
        ("resnet101_encoder", 42.50),
        ("resnet50w2x_encoder", 93.91),
    ],
)
def test_backbone_sizes(name, millions):
    """torchvision's counts without the classifier; for 2x, SimCLR's 94 M."""
    with torch.device("meta"):
        net = Network(name, channels=3, num_classes=10, dim=8)
    assert sum(p.numel() for p in net.backbone.parameters()) / 1e6 == pytest.approx(millions, abs=0.01)


@pytest.mark.parametrize("name", ["small_encoder", "resnet18_encoder", "wrn_28_2"])
@pytest.mark.parametrize("side", [8, 28, 32])
def test_gray_images(name, side):
    logits, z = Network(name, channels=1, num_classes=10, dim=8).eval()(torch.randn(2, 1, side, side))
    assert logits.shape == (2, 10) and z.shape == (2, 8)


def test_2x_forward():
    logits, z = Network("resnet50w2x_encoder", channels=3, num_classes=3, dim=4).eval()(
        torch.randn(1, 3, 32, 32)
    )
    assert logits.shape == (1, 3) and z.shape == (1, 4)
    assert "small_encoder" in BACKBONES


@pytest.mark.parametrize("name, classes, count", [("wrn_28_2", 10, 1_467_610), ("wrn_28_8", 100, 23_401_012)])
def test_wide_resnet_sizes(name, classes, count):
    """The counts include the classifier, but not the projection head."""
    with torch.device("meta"):
        net = Network(name, channels=3, num_classes=classes, dim=8)
    assert sum(p.numel() for part in (net.backbone, net.fc) for p in part.parameters()) == count
    assert net.fc.in_features == {"wrn_28_2": 128, "wrn_28_8": 512}[name]


def plain_wrn_28_2(s, x):
    """WRN-28-2 in eval mode, line by line from its description; s: its state_dict."""

    def act(name, x):
        keys = ("running_mean", "running_var", "weight", "bias")
        mean, var, scale, shift = (s[f"{name}.{key}"].view(-1, 1, 1) for key in keys)
        x = (x - mean) / (var + 0.001).sqrt() * scale + shift
        return torch.where(x > 0, x, 0.1 * x)

    x = F.conv2d(x, s["conv1.weight"], padding=1)
    for stage in (1, 2, 3):
        for i in range(4):
            name, stride = f"layer{stage}.{i}", 2 if stage > 1 and i == 0 else 1
            active = act(f"{name}.bn1", x)
            out = act(f"{name}.bn2", F.conv2d(active, s[f"{name}.conv1.weight"], stride=stride, padding=1))
            out = F.conv2d(out, s[f"{name}.conv2.weight"], padding=1)
            x = active if stage == 1 and i == 0 else x
            x = F.conv2d(x, s[f"{name}.shortcut.weight"], stride=stride) if i == 0 else x
            x = x + out
    assert x.shape[1:] == (128, 8, 8)
    return act("bn", x).mean(dim=(2, 3))


def test_wide_resnet_equals_its_formulas():
    torch.manual_seed(0)
    net = Network("wrn_28_2", channels=3, num_classes=10, dim=8).backbone.double().eval()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):  # not the identity, and with an effect of eps
                for value in (module.running_mean, module.weight, module.bias):
                    value.add_(0.3 * torch.randn_like(value))
                module.running_var.uniform_(0.01, 1)
        x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
        torch.testing.assert_close(net(x), plain_wrn_28_2(net.state_dict(), x), rtol=1e-10, atol=1e-10)


def test_wide_resnet_starts_and_collects_statistics_as_fixmatch():
    torch.manual_seed(0)
    net, x = (
        Network("wrn_28_2", channels=3, num_classes=10, dim=8).backbone.train(),
        torch.randn(4, 3, 32, 32),
    )
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == 25
    mean = net.conv1(x).mean(dim=(0, 2, 3))
    net(x)
    torch.testing.assert_close(norms[0].running_mean, 0.001 * mean)  # norms[0] follows the first convolution
    assert {(module.momentum, module.eps) for module in norms} == {(0.001, 0.001)}
    for conv in (net.layer1[1].conv2, net.layer3[0].conv1, net.layer2[0].shortcut):
        k, c_out = conv.kernel_size[0], conv.out_channels
        assert conv.weight.std().item() == pytest.approx((2 / (k * k * c_out)) ** 0.5, rel=0.05)


@pytest.mark.parametrize("name", ["small_encoder", "resnet50_encoder", "wrn_28_2"])
def test_parameter_groups(name):
    with torch.device("meta"):
        net = Network(name, channels=3, num_classes=10, dim=8)
    (one,) = parameter_groups(net, 0.5, no_decay_bn=False)
    assert one["weight_decay"] == 0.5 and [*map(id, one["params"])] == [*map(id, net.parameters())]

    spared = {
        id(p)
        for module in net.modules()
        for key, p in module.named_parameters(recurse=False)
        if isinstance(module, nn.BatchNorm2d) or key == "bias"
    }
    decayed, rest = parameter_groups(net, 0.5, no_decay_bn=True)
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.5, 0.0)
    assert {id(p) for p in rest["params"]} == spared and len(rest["params"]) == len(spared) > 0
    assert {id(p) for p in decayed["params"]} == {id(p) for p in net.parameters()} - spared
    assert len(decayed["params"]) + len(rest["params"]) == len(list(net.parameters()))


def test_weight_decay_spares_by_type_and_not_by_shape():
    """A norm layer over images has parameters of three dimensions; a vector need not be a norm's."""
    net = nn.Sequential(nn.LayerNorm((2, 4, 4)), nn.Conv2d(2, 3, 3), nn.GroupNorm(1, 3), nn.PReLU(3))
    decayed, rest = parameter_groups(net, 0.5, no_decay_bn=True)
    assert [*map(id, decayed["params"])] == [id(net[1].weight), id(net[3].weight)]
    spared = [net[0].weight, net[0].bias, net[1].bias, net[2].weight, net[2].bias]
    assert [*map(id, rest["params"])] == [*map(id, spared)]


@pytest.mark.parametrize(
    "name, d", [("convnext_tiny", 768), ("mobilenet_v3_small", 1024), ("regnet_y_400mf", 440)]
)
def test_a_torchvision_network_joins_in_a_line(name, d, monkeypatch):
    monkeypatch.setitem(BACKBONES, name, partial(torchvision_encoder, name))
    for channels in (3, 1):
        net = build_network(Config(backbone=name, cls=5, dim=4), channels).eval()
        logits, z = net(torch.randn(2, channels, 64, 64))
        assert logits.shape == (2, 5) and z.shape == (2, 4) and net.fc.in_features == d
    own, theirs = net.backbone.state_dict(), torchvision.models.get_model(name).state_dict()
    (classifier,) = {key.rpartition(".")[0] for key in theirs.keys() - own.keys()}
    assert own.keys() <= theirs.keys() and theirs[f"{classifier}.weight"].shape == (1000, d)
