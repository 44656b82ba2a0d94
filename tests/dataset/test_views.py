"""Views of photographs: what the stages draw, and that PIL and the batched stages compute the same."""

import io
import math

import numpy as np
import pytest
import torch
import torchvision.transforms as T
import torchvision.transforms.functional as TF
from PIL import Image, ImageFilter

from dataset import device_views, views
from dataset.randaugment import CIFAR, IMAGENET, OPS, RandAugment
from dataset.stages import (
    Blur,
    CenterCrop,
    Cutout,
    Flip,
    Grayscale,
    Jitter,
    PadCrop,
    ResizedCrop,
    Solarize,
)
from dataset.views import CIFAR10_NORM, IMAGENET_NORM, MULTICROP, PIPELINES, photo_view, photo_views, pipeline
from util.errors import UserError

N = 20_000
SIZES = np.tile([500.0, 375.0], (N, 1))


def photo(width=120, height=90, seed=0):
    """Smooth colors with some noise and saturated parts, as photographs have."""
    rng = np.random.default_rng(seed)
    rough = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    noisy = np.asarray(rough).astype(int) * 3 // 2 - 60 + rng.integers(-12, 12, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def draws(stage, sizes=SIZES, seed=0):
    return stage.sample(np.random.default_rng(seed).random((len(sizes), stage.num_uniforms)), sizes)


def within(share, probability, n=N):
    """Five standard deviations of a binomial share: a right one fails once in a million runs, and the seed is
    fixed.
    """
    return abs(share - probability) < 5 * math.sqrt(probability * (1 - probability) / n)


# What is drawn.


@pytest.mark.parametrize("low, high", [(0.2, 1.0), (0.05, 0.429)])
def test_crops_have_the_drawn_areas_and_ratios(low, high):
    """Against torchvision's RandomResizedCrop, and against its definition."""
    left, top, w, h = draws(ResizedCrop(224, (low, high))).T
    assert (left >= 0).all() and (top >= 0).all() and (left + w <= 500).all() and (top + h <= 375).all()
    area, ratio = w * h / (500 * 375), w / h
    assert low * 0.99 < area.min() and area.max() < high * 1.01
    assert 3 / 4 * 0.99 < ratio.min() and ratio.max() < 4 / 3 * 1.01
    torch.manual_seed(0)
    image = Image.new("RGB", (500, 375))
    theirs = np.array(
        [T.RandomResizedCrop.get_params(image, (low, high), (3 / 4, 4 / 3)) for _ in range(4000)]
    )  # top left h w
    for ours, other in (
        (area, theirs[:, 2] * theirs[:, 3] / (500 * 375)),
        (np.log(ratio), np.log(theirs[:, 3] / theirs[:, 2])),
        (left, theirs[:, 1]),
        (top, theirs[:, 0]),
    ):
        quantiles = np.linspace(0.05, 0.95, 10)
        spread = np.ptp(ours)
        assert np.abs(np.quantile(ours, quantiles) - np.quantile(other, quantiles)).max() < 0.04 * spread


def test_a_crop_that_never_fits_is_central():
    stage = ResizedCrop(224, (0.9, 1.0))
    assert draws(stage, np.array([[1000.0, 100.0]])).tolist() == [[433, 0, 133, 100]]
    assert draws(stage, np.array([[100.0, 1000.0]])).tolist() == [[0, 433, 100, 133]]


def test_every_view_takes_an_image_of_one_pixel():
    for name in PIPELINES:
        if not name.startswith("cifar"):
            view = photo_view(pipeline(name, 32), IMAGENET_NORM, on_device=False)
            x = view.device_transform(
                view.cpu_transform([Image.new("RGB", (1, 1))], np.full((1, view.num_uniforms), 0.5))
            )
            assert torch.isfinite(x).all() and x.shape[1] == 3


def test_stages_have_their_probabilities_and_strengths():
    assert within(draws(Flip()).mean(), 0.5)
    assert within(draws(Grayscale(0.2)).mean(), 0.2)
    assert within(draws(Solarize(0.1)).mean(), 0.1)
    apply, sigma = draws(Blur(0.1, 2.0, 0.5)).T
    assert (
        within(apply.mean(), 0.5)
        and 0.1 <= sigma.min() < 0.101
        and 1.999 < sigma.max() <= 2
        and abs(sigma.mean() - 1.05) < 0.02
    )
    apply, order, *factors, hue = draws(Jitter(0.4, 0.3, 0.2, 0.1, 0.8)).T
    assert within(apply.mean(), 0.8)
    assert all(within((order == k).mean(), 1 / 24) for k in range(24))
    for top, f in zip((0.4, 0.3, 0.2), factors):
        assert (
            1 - top <= f.min() < 1 - 0.99 * top
            and 1 + 0.99 * top < f.max() <= 1 + top
            and abs(f.mean() - 1) < 0.02
        )
    assert -0.1 <= hue.min() < -0.099 and 0.099 < hue.max() <= 0.1 and abs(hue.mean()) < 0.003


def test_stages_draw_independently():
    """No stage of a pipeline sees the numbers of another, nor one number of a stage another's."""
    view = PIPELINES["multicrop_224"]
    u = np.random.default_rng(0).random((N, sum(stage.num_uniforms for stage in view)))
    column, table = 0, []
    for stage in view[1:]:
        table.append(stage.sample(u[:, 22 + column : 22 + column + stage.num_uniforms], SIZES))
        column += stage.num_uniforms
    correlation = np.corrcoef(np.concatenate(table, 1).T)
    assert np.abs(correlation - np.eye(len(correlation))).max() < 5 / math.sqrt(N)


def test_the_table_is_the_recipe():
    """Literal values of the recipe; a change of the table has to be made here too."""
    crop, jitter = ResizedCrop(224, (0.2, 1.0)), Jitter(0.4, 0.4, 0.4, 0.1, 0.8)
    assert PIPELINES["weak"] == (crop, Flip())
    assert PIPELINES["moco"] == (crop, Flip(), jitter, Grayscale(0.2), Blur(0.1, 2.0, 0.5))
    assert PIPELINES["rand"] == (crop, Flip(), RandAugment(2, "imagenet", 1.0))
    assert PIPELINES["stack"] == (
        crop,
        Flip(),
        jitter,
        Grayscale(0.2),
        Blur(0.1, 2.0, 0.5),
        RandAugment(2, "imagenet", 1.0),
    )
    assert PIPELINES["eval"] == (CenterCrop(256, 224),)
    assert PIPELINES["cifar_weak"] == (PadCrop(32, 4), Flip())
    assert PIPELINES["cifar_strong"] == (PadCrop(32, 4), Flip(), RandAugment(2, "cifar", 0.5), Cutout(16))
    assert list(MULTICROP.values()) == [
        (224, (0.140, 1)),
        (192, (0.117, 0.860)),
        (160, (0.095, 0.715)),
        (120, (0.073, 0.571)),
        (96, (0.050, 0.429)),
    ]
    for name, crop in MULTICROP.items():
        assert PIPELINES[name] == (
            ResizedCrop(*crop),
            Flip(),
            Jitter(0.4, 0.4, 0.2, 0.1, 0.8),
            Grayscale(0.2),
            Blur(0.1, 2.0, 0.5),
            Solarize(0.1),
        )


def test_randaugment_draws_ops_strengths_and_signs():
    p = draws(RandAugment(2, "imagenet"))
    assert len(IMAGENET) == 16 and len(CIFAR) == 14
    for first in (0, 3):
        place, apply, value = p[:, first : first + 3].T
        assert all(within((place == k).mean(), 1 / 16) for k in range(16)) and apply.all()
        rotate = value[place == [op.name for op in IMAGENET].index("rotate")]
        assert set(np.abs(rotate).round(6)) == {3.0 * v for v in range(1, 10)}
        assert within((rotate < 0).mean(), 0.5, len(rotate))
    together = np.mean(p[:, 0] == p[:, 3])
    assert within(together, 1 / 16)  # with replacement, independently
    assert within(draws(RandAugment(2, "cifar", 0.5))[:, 4].mean(), 0.5)


@pytest.mark.parametrize(
    "ops, table",
    [
        (
            "imagenet",
            {
                "brightness": (0.1 + 0.18, 0.1 + 1.62),
                "color": (0.28, 1.72),
                "contrast": (0.28, 1.72),
                "sharpness": (0.28, 1.72),
                "posterize": (4, 7),
                "rotate": (3, 27),
                "shear_x": (0.03, 0.27),
                "shear_y": (0.03, 0.27),
                "solarize": (25, 230),
                "solarize_add": (11, 99),
                "translate_x": (0.045, 0.405),
                "translate_y": (0.045, 0.405),
            },
        ),
        (
            "cifar",
            {
                "brightness": (0.14, 0.86),
                "color": (0.14, 0.86),
                "contrast": (0.14, 0.86),
                "sharpness": (0.14, 0.86),
                "posterize": (4, 7),
                "rotate": (3, 27),
                "shear_x": (0.03, 0.27),
                "shear_y": (0.03, 0.27),
                "solarize": (25, 230),
                "translate_x": (0.03, 0.27),
                "translate_y": (0.03, 0.27),
            },
        ),
    ],
)
def test_randaugment_has_the_strengths_of_the_recipe(ops, table):
    """Values at v = 1 and v = 9, from v·max/10 + bias."""
    signed = {"rotate", "shear_x", "shear_y", "translate_x", "translate_y", "solarize_add"}
    for op in OPS[ops]:
        low, high = op.value(np.array([1, 9]), np.array([False, False]))
        assert (low, high) == pytest.approx(table.get(op.name, (0, 0))), op.name
        assert (op.value(np.array([9]), np.array([True]))[0] == -high) == (op.name in signed or high == 0), (
            op.name
        )
    assert {op.name for op in OPS[ops]} == set(table) | {"autocontrast", "equalize", "identity"} | (
        {"invert"} if ops == "imagenet" else set()
    )


# What PIL makes of it.


def test_ops_change_pixels_as_defined():
    ramp = Image.fromarray(np.tile(np.arange(256, dtype=np.uint8)[None, :, None], (4, 1, 3)))
    ops = {op.name: op for op in IMAGENET}

    def row(name, value):
        return np.asarray(ops[name].apply(ramp, value))[0, :, 0].astype(int)

    x = np.arange(256)
    assert (row("solarize", 100) == np.where(x < 156, x, 255 - x)).all()
    added = (x + 50).clip(0, 255)
    assert (row("solarize_add", 50) == np.where(added < 128, added, 255 - added)).all()
    assert (row("posterize", 4) == x // 16 * 16).all()
    assert (row("invert", 0) == 255 - x).all()
    assert (row("translate_x", 0.25)[:192] == x[64:]).all() and (row("translate_x", 0.25)[192:] == 0).all()
    assert (row("identity", 0) == x).all()
    assert (row("brightness", 0.5) == x // 2).all()


def test_crop_padding_and_cutout_have_the_right_pixels():
    image = Image.fromarray(np.arange(32 * 32 * 3, dtype=np.uint32).reshape(32, 32, 3).astype(np.uint8))
    pixels = np.asarray(image)
    assert (np.asarray(PadCrop(32, 4).pil(image, np.array([4, 4]))) == pixels).all()
    shifted = np.asarray(PadCrop(32, 4).pil(image, np.array([0, 8])))
    assert (shifted[:28, 4:] == pixels[4:, :28]).all() and (
        shifted[:28, :4] == pixels[4:, 4:0:-1]
    ).all()  # mirrored
    assert set(draws(PadCrop(32, 4), np.full((N, 2), 32.0))[:, 0]) == set(range(9))
    edge = np.asarray(Cutout(16).pil(Image.new("RGB", (32, 32)), np.array([0.5, 0.0])))
    assert (edge[:, 8:24].any(1) == edge[:, 8:24].all(1)).all() and (edge == 127).sum() == 16 * 16 * 3
    whole = np.asarray(Cutout(16).pil(Image.new("RGB", (32, 32)), np.array([0.5, 0.5])))
    assert (whole[8:24, 8:24] == 127).all() and (whole == 127).sum() == 16 * 16 * 3


def test_evaluation_is_resize_and_center_crop():
    image = photo(500, 375)
    expected = T.CenterCrop(224)(T.Resize(256)(image))
    view = photo_view(pipeline("eval"), IMAGENET_NORM, on_device=False)
    x = view.device_transform(view.cpu_transform([image], np.empty((1, 0))))
    torch.testing.assert_close(x[0], TF.normalize(TF.to_tensor(expected), *IMAGENET_NORM), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["moco", *MULTICROP])
def test_moco_and_multicrop_equal_torchvision_with_the_same_parameters(name):
    """The stages, applied one after the other with torchvision's functions."""
    image, view = photo(300, 200), PIPELINES[name]
    size = MULTICROP.get(name, (224, ()))[0]
    rng = np.random.default_rng(1)
    for _ in range(10):
        u = rng.random((1, sum(stage.num_uniforms for stage in view)))
        x = image
        box, flip, jitter, grayscale, blur, *solarize = [
            stage.sample(part, np.array([[300.0, 200.0]]))[0].astype(np.float32)
            for stage, part in zip(view, np.split(u, np.cumsum([s.num_uniforms for s in view])[:-1], 1))
        ]
        x = TF.resized_crop(x, int(box[1]), int(box[0]), int(box[3]), int(box[2]), [size, size])
        x = TF.hflip(x) if flip[0] else x
        if jitter[0]:
            for k in device_views.ORDERS[int(jitter[1])]:
                x = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue][k](
                    x, float(jitter[2 + k])
                )
        x = TF.rgb_to_grayscale(x, 3) if grayscale[0] else x
        x = x.filter(ImageFilter.GaussianBlur(float(blur[1]))) if blur[0] else x
        x = TF.solarize(x, 128) if solarize and solarize[0] else x
        ours = photo_view(view, IMAGENET_NORM, on_device=False)
        got = ours.device_transform(ours.cpu_transform([image], u))[0]
        torch.testing.assert_close(got, TF.normalize(TF.to_tensor(x), *IMAGENET_NORM), rtol=0, atol=1e-5)


# The batched half.


def in_levels(name, u, images):
    """The two paths' images, in levels of 0 to 255: [n, 3, h, w] each."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in IMAGENET_NORM)
    out = []
    for on_device in (False, True):
        view = photo_view(pipeline(name), IMAGENET_NORM, on_device)
        raw = view.cpu_transform(images, u)
        assert raw[0].dtype == torch.uint8
        out.append((view.device_transform(raw) * std + mean) * 255)
    return out


BATCHED = [
    Flip(),
    Grayscale(0.5),
    Solarize(0.5),
    Jitter(0.4, 0, 0, 0, 1),
    Jitter(0, 0.4, 0, 0, 1),
    Jitter(0, 0, 0.4, 0, 1),
    Jitter(0, 0, 0, 0.1, 1),
    Jitter(0, 0, 0, 0.5, 1),
    Jitter(0.4, 0.4, 0.4, 0.1, 0.8),
    Blur(0.1, 2.0, 0.8),
    Blur(2.0, 9.0, 1.0),
]


@pytest.mark.parametrize("stage", BATCHED, ids=str)
def test_a_batched_stage_equals_pil(stage, device="cpu"):
    """Color ops within one level, on photographs and on noise, whose every pixel is another color."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8))
    images = [photo(seed=k) for k in range(12)] + [noise] * 12
    p = draws(stage, np.tile([120.0, 90.0], (24, 1))).astype(np.float32)
    expected = np.stack([np.asarray(stage.pil(image, own)) for image, own in zip(images, p)]).astype(int)
    x = (
        torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).float()
    )  # [24, 3, 90, 120]
    got = device_views.STAGES[type(stage).__name__](x.to(device), torch.from_numpy(p)).cpu()
    got = got.permute(0, 2, 3, 1).numpy()
    assert (got == got.round()).all() and (expected != x.permute(0, 2, 3, 1).numpy()).any()
    assert np.abs(got - expected).max() <= 1
    assert (got != expected).mean() < 1e-3


@pytest.mark.parametrize("name", ["weak", "moco", "rand", "stack", *MULTICROP, "eval"])
def test_device_views_on_and_off_make_the_same_view(name):
    images = [photo(500, 375, seed=k) for k in range(6)]
    u = np.random.default_rng(2).random((6, sum(stage.num_uniforms for stage in PIPELINES[name])))
    exact, fast = in_levels(name, u, images)
    difference = (exact - fast).abs()
    # A crop that differs by one level (the resize's rounding) differs by a few more after the color ops, at
    # few pixels.
    assert (difference > 1.5).float().mean() < 0.01 and difference.mean() < 0.1
    assert difference.max() < (1e-2 if name in ("rand", "stack", "eval") else 40)


def test_crop_resize_equals_pillow_within_one_level():
    image = photo(500, 375)
    for box in ((50, 40, 300, 250), (0, 0, 500, 375), (100, 20, 60, 50), (499, 374, 1, 1)):
        exact = np.asarray(ResizedCrop(224, (0.2, 1)).pil(image, np.array(box))).astype(int)
        assert np.abs(device_views.crop_resize(image, box, 224) - exact).max() <= 1


def test_each_image_of_a_batch_has_its_own_view():
    images = [photo(seed=k) for k in range(8)]
    view = photo_view(pipeline("moco", 64), IMAGENET_NORM, on_device=True)
    u = np.random.default_rng(0).random((8, view.num_uniforms))
    together = view.device_transform(view.cpu_transform(images, u))
    one_by_one = torch.cat(
        [view.device_transform(view.cpu_transform([image], line[None])) for image, line in zip(images, u)]
    )
    assert torch.equal(together, one_by_one)


def test_cifar_views_and_other_sizes_have_the_right_shape():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    for name in ("cifar_weak", "cifar_strong", "cifar_eval"):
        view = photo_view(pipeline(name), CIFAR10_NORM, on_device=True)
        assert view.device_transform(
            view.cpu_transform([image] * 3, np.full((3, view.num_uniforms), 0.3))
        ).shape == (
            3,
            3,
            32,
            32,
        )
    assert pipeline("eval", 56) == (CenterCrop(64, 56),)
    for size, sides in ((224, [224, 192, 160, 120, 96]), (32, [32, 27, 23, 17, 14]), (1, [1] * 5)):
        views = photo_views("weak", ",".join(MULTICROP), "eval", IMAGENET_NORM, True, size)
        assert [view.side for view in views["strong_views"]] == sides and views["weak_view"].side == size
    with pytest.raises(UserError, match="unknown view 'strongest'"):
        pipeline("strongest")


def test_views_take_decoded_files():
    buffer = io.BytesIO()
    photo().save(buffer, "JPEG")
    image = Image.open(buffer)
    image.load()
    view = photo_view(pipeline("moco", 32), IMAGENET_NORM, on_device=True)
    assert view.device_transform(
        view.cpu_transform([image.convert("RGB")], np.full((1, view.num_uniforms), 0.4))
    ).shape == (
        1,
        3,
        32,
        32,
    )
    assert views.CROP.size == 224
