"""The embedded digits: their split, the labeled draw, and their views."""

import numpy as np
import pytest
import torch

from dataset import digits
from dataset.digits import MEAN, STD, eval_view, strong, weak
from dataset.loader import Stream
from util.errors import UserError

NONE = np.empty((0, 0))  # eval_view views draw nothing


def train_images(n):
    return [digits.build(1, 0).images[row] for row in range(n)]


def test_sizes_and_the_fixed_test_split():
    data = digits.build(labels_per_class=4, seed=0)
    assert len(data.images) == 1437 and data.images[0].shape == (8, 8) and len(data.test_images) == 360
    assert len(data.labeled) == 40 and len(data.unlabeled) == 1437
    assert np.bincount(data.test_labels).tolist() == [36] * 10
    with np.load(digits.FILE) as file:
        own = [np.flatnonzero(file["labels"] == c) for c in range(10)]
        expected = [rows[int((k + 0.5) * len(rows) / 36)] for rows in own for k in range(36)]
        assert np.flatnonzero(file["test"]).tolist() == sorted(expected)


def test_the_file_is_the_published_set():
    """The class counts that the UCI page gives for its test set, and its range of ink."""
    with np.load(digits.FILE) as file:
        assert np.bincount(file["labels"]).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
        assert (file["images"].min(), file["images"].max()) == (0, 16)


def test_the_labeled_draw_is_balanced_seeded_and_nested():
    data = [digits.build(labels_per_class=n, seed=s) for n, s in ((1, 0), (1, 0), (4, 0), (1, 1))]
    assert np.bincount(data[2].labels[data[2].labeled]).tolist() == [4] * 10
    assert data[0].labeled.tolist() == data[1].labeled.tolist()
    assert set(data[0].labeled) < set(data[2].labeled)
    assert data[0].labeled.tolist() != data[3].labeled.tolist()
    assert len({d.split.sha256 for d in data}) == len({d.split.id for d in data}) == 3


@pytest.mark.parametrize("count, words", [(0, "at least 1"), (139, "class 8 has only 138")])
def test_impossible_draws_are_refused(count, words):
    with pytest.raises(UserError, match=words):
        digits.build(labels_per_class=count, seed=0)


def test_the_eval_view_is_the_image_at_twice_the_size():
    """Pixels among equal pixels keep their values; the ink is moved to the center; mean and standard
    deviation are about 0 and 1.
    """
    (x,) = eval_view(train_images(1437), NONE)
    assert x.shape == (1437, 1, 16, 16) and x.dtype == torch.float32
    assert abs(x.mean()) < 0.02 and abs(x.std() - 1) < 0.1
    image = np.zeros((8, 8), np.uint8)
    image[:, 4:] = 16
    ink = eval_view([image], NONE)[0][0, 0] * STD + MEAN
    assert ink[8, [0, 7, 8, 15]].tolist() == pytest.approx([0, 16, 16, 0], abs=1e-4)


@pytest.mark.parametrize("slope", [-0.5, 0, 0.3])
def test_the_eval_view_is_deslanted(slope):
    """A slanted stroke becomes a vertical one in the center, in every row of the view except at its ends."""
    middle = 4.5 + slope * (np.arange(8) - 3.5)  # [8]
    image = np.clip(1.5 - np.abs(np.arange(8) + 0.5 - middle[:, None]), 0, 1)  # [8, 8]
    ink = eval_view([(16 * image).round().astype(np.uint8)], NONE)[0][0, 0] * STD + MEAN  # [16, 16]
    center = (ink * (torch.arange(16) + 0.5)).sum(1) / ink.sum(1)  # [16]
    assert center[2:14].tolist() == pytest.approx([8.0] * 12, abs=0.25)


@pytest.mark.parametrize(
    "view, numbers, nothing", [(weak, 6, [0.5] * 6), (strong, 10, [0.5] * 6 + [0.0, 0.5, 0.5, 0.0])]
)
def test_a_view_without_changes_is_the_eval_view(view, numbers, nothing):
    """No rotation, shift, stretch or shear, full ink, and a cutout of side 0."""
    images = train_images(20)
    assert len(nothing) == numbers
    torch.testing.assert_close(
        view(images, np.tile(nothing, (20, 1)))[0], eval_view(images, NONE)[0], rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("view, numbers", [(weak, 6), (strong, 10)])
def test_each_image_has_its_own_view(view, numbers):
    images, u = train_images(20), np.random.default_rng(0).random((20, numbers))
    (together,) = view(images, u)
    one_by_one = torch.cat([view(images[i : i + 1], u[i : i + 1])[0] for i in range(20)])
    torch.testing.assert_close(together, one_by_one, rtol=1e-5, atol=1e-5)


def test_a_shift_moves_the_ink():
    """The second number of a view is the shift along x: for the weak one (2u − 1)·½ pixels of the image."""
    image = np.zeros((8, 8), np.uint8)
    image[:, 2:4] = 16
    center = []
    for u1 in (0.5, 1.0):
        u = np.full((1, 6), 0.5)
        u[0, 1] = u1
        ink = weak([image], u)[0][0, 0] * STD + MEAN
        center.append(float((ink[8] * torch.arange(16)).sum() / ink[8].sum()))
    assert center[0] - center[1] == pytest.approx(1.0, abs=0.05)  # half a pixel of 8 is one of 16


def test_the_cutout_is_background_and_the_ink_only_fades():
    images = [np.full((8, 8), 16, np.uint8)]
    u = np.array([[0.5] * 6 + [1.0, 0.5, 0.5, 1.0]])  # faintest ink, a cutout of 4.5 pixels about the center
    ink = strong(images, u)[0][0, 0] * STD + MEAN
    assert ink[4:12, 4:12].abs().max() < 1e-5
    around = ink[3:13, 3:13].clone()
    around[1:9, 1:9] = 16 * float(np.exp(-0.5))
    torch.testing.assert_close(around, torch.full((10, 10), 16 * float(np.exp(-0.5))), rtol=0, atol=1e-3)


def test_several_strong_views_are_the_same_transform_with_numbers_of_their_own():
    one, three = (Stream(digits.build(1, 0, views), 2, 3, seed=0)[4] for views in (1, 3))
    assert torch.equal(one.u_strong[0][0], three.u_strong[0][0]) and len(three.u_strong) == 3
    assert len({view.numpy().tobytes() for (view,) in three.u_strong}) == 3
