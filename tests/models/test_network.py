"""Shapes, names and sizes of the networks."""
import pytest
import torch
import torchvision

from models.network import BACKBONES, Network


def test_published_parameter_names_and_unit_embeddings():
    net = Network("resnet18_encoder", channels=3, num_classes=7, dim=16).eval()
    logits, z = net(torch.randn(2, 3, 64, 64))
    assert logits.shape == (2, 7) and z.shape == (2, 16)
    torch.testing.assert_close(z.norm(dim=1), torch.ones(2))
    own = {key[len("backbone."):] for key in net.state_dict() if key.startswith("backbone.")}
    assert own == {key for key in torchvision.models.resnet18().state_dict() if not key.startswith("fc.")}
    rest = {key for key in net.state_dict() if not key.startswith("backbone.")}
    assert rest == {"fc.weight", "fc.bias", "head.0.weight", "head.0.bias", "head.2.weight", "head.2.bias"}


@pytest.mark.parametrize("name, millions", [("resnet18_encoder", 11.18), ("resnet34_encoder", 21.28),
                                            ("resnet50_encoder", 23.51), ("resnet101_encoder", 42.50),
                                            ("resnet50w2x_encoder", 93.91)])
def test_backbone_sizes(name, millions):
    """torchvision's counts less their classifier; 2x: SimCLR's 94 M."""
    with torch.device("meta"):
        net = Network(name, channels=3, num_classes=10, dim=8)
    assert sum(p.numel() for p in net.backbone.parameters()) / 1e6 == pytest.approx(millions, abs=0.01)


@pytest.mark.parametrize("name", ["small_encoder", "resnet18_encoder"])
@pytest.mark.parametrize("side", [8, 28, 32])
def test_grey_images(name, side):
    logits, z = Network(name, channels=1, num_classes=10, dim=8).eval()(torch.randn(2, 1, side, side))
    assert logits.shape == (2, 10) and z.shape == (2, 8)


def test_2x_forward():
    logits, z = Network("resnet50w2x_encoder", channels=3, num_classes=3, dim=4).eval()(torch.randn(1, 3, 32, 32))
    assert logits.shape == (1, 3) and z.shape == (1, 4)
    assert "small_encoder" in BACKBONES
