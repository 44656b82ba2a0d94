"""The embedded digits: their split, the labelled draw, and their views."""
import numpy as np
import pytest
import torch

from dataset import digits
from dataset.views import DIGITS_MEAN, DIGITS_STD, digits_plain, digits_strong, digits_weak
from util.errors import UserError


def test_sizes_and_the_fixed_test_split():
    data = digits.build(labels_per_class=4, seed=0)
    assert data.images.shape == (1437, 8, 8) and data.test_images.shape == (360, 8, 8)
    assert len(data.labelled) == 40 and len(data.unlabelled) == 1437
    assert np.bincount(data.test_labels).tolist() == [36] * 10
    with np.load(digits.FILE) as file:
        random = np.random.RandomState(0)
        expected = np.concatenate([random.permutation(np.flatnonzero(file["labels"] == c))[:36] for c in range(10)])
        assert np.flatnonzero(file["test"]).tolist() == sorted(expected)


def test_the_file_is_the_published_set():
    """The class counts that the UCI page gives for its test set, and its range of ink."""
    with np.load(digits.FILE) as file:
        assert np.bincount(file["labels"]).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
        assert (file["images"].min(), file["images"].max()) == (0, 16)


def test_the_labelled_draw_is_balanced_seeded_and_nested():
    data = [digits.build(labels_per_class=n, seed=s) for n, s in ((1, 0), (1, 0), (4, 0), (1, 1))]
    assert np.bincount(data[2].labels[data[2].labelled]).tolist() == [4] * 10
    assert data[0].labelled.tolist() == data[1].labelled.tolist()
    assert set(data[0].labelled) < set(data[2].labelled)
    assert data[0].labelled.tolist() != data[3].labelled.tolist()
    assert len({d.split for d in data}) == 3


@pytest.mark.parametrize("count, words", [(0, "at least 1"), (139, "class 8 has only 138")])
def test_impossible_draws(count, words):
    with pytest.raises(UserError, match=words):
        digits.build(labels_per_class=count, seed=0)


def test_normalisation():
    x = digits_plain(digits.build(1, 0).images)
    assert x.shape == (1437, 1, 8, 8) and x.dtype == torch.float32
    assert abs(x.mean()) < 0.01 and abs(x.std() - 1) < 0.01


@pytest.mark.parametrize("view, numbers, nothing", [
    (digits_weak, 6, [0.5] * 6),
    (digits_strong, 10, [0.5] * 6 + [0.0, 0.5, 0.5, 0.0])])
def test_a_view_that_changes_nothing(view, numbers, nothing):
    """No rotation, shift, stretch or shear, full ink, and a patch of side 0."""
    images = digits.build(1, 0).images[:20]
    assert len(nothing) == numbers
    torch.testing.assert_close(view(images, np.tile(nothing, (20, 1))), digits_plain(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize("view, numbers", [(digits_weak, 6), (digits_strong, 10)])
def test_each_image_has_its_own_view(view, numbers):
    images, u = digits.build(1, 0).images[:20], np.random.default_rng(0).random((20, numbers))
    together = view(images, u)
    one_by_one = torch.cat([view(images[i:i + 1], u[i:i + 1]) for i in range(20)])
    torch.testing.assert_close(together, one_by_one, rtol=1e-5, atol=1e-5)
    assert together.min() >= (0 - DIGITS_MEAN) / DIGITS_STD - 1e-4 and together.max() <= (16 - DIGITS_MEAN) / DIGITS_STD + 1e-4


def test_a_shift_moves_the_ink():
    """The second and third number of a view are the shift: for the weak one (2u − 1)·½ pixels, so u = 1 is half a pixel."""
    image = np.zeros((1, 8, 8), np.uint8)
    image[0, 3, 3] = 16
    u = np.full((1, 6), 0.5)
    u[0, 1] = 1
    ink = digits_weak(image, u)[0, 0] * DIGITS_STD + DIGITS_MEAN
    assert ink[3].tolist() == pytest.approx([0, 0, 8, 8, 0, 0, 0, 0], abs=1e-4)


def test_the_patch_is_paper_and_the_ink_only_fades():
    images = np.full((1, 8, 8), 16, np.uint8)
    u = np.array([[0.5] * 6 + [1.0, 0.5, 0.5, 1.0]])        # faintest ink, a patch of 3 pixels about the centre
    ink = (digits_strong(images, u)[0, 0] * DIGITS_STD + DIGITS_MEAN).round(decimals=3)
    expected = torch.full((8, 8), 16 * float(np.exp(-0.5)))
    expected[3:5, 3:5] = 0
    torch.testing.assert_close(ink, expected, rtol=0, atol=1e-2)
