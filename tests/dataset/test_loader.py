"""What a step loads depends only on seed, step, rank and world size."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from trees import imagenet

from dataset import digits
from dataset.eval_loader import EvalLoader, ImageChunks
from dataset.imagenet import build as imagenet_data
from dataset.loader import Data, SplitId, Stream, View
from dataset.rng import (
    ORDER_U,
    ORDER_X,
    REPLACE_U,
    REPLACE_X,
    VIEW_STRONG,
    VIEW_WEAK,
    VIEW_X,
    strong_stream_id,
    uniforms,
)
from dataset.source import BadImage
from dataset.workers import PrefetchLoader
from util.errors import UserError
from util.run.train_state import BadImages

CPU = torch.device("cpu")


class Numbers:
    """Images whose pixels all hold the row of the image; those in `bad` cannot be read."""

    max_decoded = 4

    def __init__(self, n, bad=()):
        self.n, self.bad = n, set(bad)

    def __len__(self):
        return self.n

    def __getitem__(self, row):
        if row in self.bad:
            raise BadImage("torn")
        return np.full((2, 2), float(row))

    def name(self, row):
        return f"image {row}"


def numbered(labeled, unlabeled, bad=(), bad_tests=()):
    """Images that hold their row, in a view that adds its random number."""
    n = labeled + unlabeled
    view = View(
        1,
        lambda images, u: (torch.from_numpy(np.stack(images)[:, None] + u[:, :, None, None]),),
        lambda raw: raw[0],
        2,
    )
    eval_view = View(
        0, lambda images, u: (torch.from_numpy(np.stack(images)[:, None]),), lambda raw: raw[0], 2
    )
    return Data(
        images=Numbers(n, bad),
        labels=np.arange(n) % 3,
        labeled=np.arange(labeled),
        unlabeled=np.arange(labeled, n),
        test_images=Numbers(5, bad_tests),
        test_labels=np.arange(5) % 3,
        weak_view=view,
        strong_views=(view,),
        eval_view=eval_view,
        classes=["a", "b", "c"],
        channels=1,
        split=SplitId("numbered", "0"),
    )


def parts(item):
    """(x, y, index, weak, strong) of a batch in which every view is one tensor."""
    return item.x[0], item.y, item.index, item.u_weak[0], item.u_strong[0][0]


def same(a, b):
    return (
        all(torch.equal(x, y) for x, y in zip((*parts(a), a.true_labels), (*parts(b), b.true_labels)))
        and a.bad == b.bad
    )


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_the_same_bytes_with_any_workers_and_from_any_start(workers):
    def stream():
        return Stream(digits.build(labels_per_class=3, seed=5), batch_size=8, mu=5, seed=5)

    expected = [stream()[step] for step in range(75)]  # two epochs, several passes over the labels
    for start in (0, 41):
        got = list(PrefetchLoader(stream(), range(start, 75), workers, pin_memory=False))
        assert len(got) == 75 - start
        assert all(same(a, b) for a, b in zip(got, expected[start:]))


def test_random_numbers_depend_on_seed_stream_pass_and_image():
    rows, passes = np.array([5, 3, 5, 5]), np.array([0, 0, 1, 0])
    u = uniforms(rows, 7, 11, 2, passes)
    assert (u[0] == u[3]).all() and (u[0] == uniforms(rows[:1], 7, 11, 2, passes[:1])[0]).all()
    others = [
        u[0],
        u[1],
        u[2],
        *(uniforms(rows[:1], 7, seed, stream_id, passes[:1])[0] for seed, stream_id in ((12, 2), (11, 3))),
    ]
    assert len({tuple(line) for line in others}) == 5
    many = uniforms(np.arange(3000), 9, 2**63 - 1, 1, np.full(3000, 10**6))
    assert 0 <= many.min() and many.max() < 1 and abs(many.mean() - 0.5) < 0.01
    assert np.abs(np.corrcoef(many.T) - np.eye(9)).max() < 0.1 and np.unique(many).size == many.size


def test_another_seed_is_another_stream():
    data = numbered(6, 60)
    assert not same(Stream(data, 4, 3, seed=0)[0], Stream(data, 4, 3, seed=1)[0])


@pytest.mark.parametrize("world", [1, 2, 3])
def test_an_epoch_covers_the_unlabeled_images_once_over_all_ranks(world):
    data = numbered(7, 65)
    streams = [Stream(data, 2, 3, seed=0, rank=r, world=world) for r in range(world)]
    steps = streams[0].steps_per_epoch
    assert steps == 65 // (6 * world)
    orders = []
    for epoch in range(2):
        seen = []
        for step in range(epoch * steps, (epoch + 1) * steps):
            for stream in streams:
                (*_, weak, strong), true_labels = parts(stream[step]), stream[step].true_labels
                rows = weak[:, 0, 0, 0].long()
                assert torch.equal(rows, strong[:, 0, 0, 0].long())  # two views of the same images
                assert not torch.equal(weak, strong)
                assert torch.equal(true_labels, rows % 3)
                seen += rows.tolist()
        assert len(set(seen)) == len(seen) == steps * 6 * world and min(seen) >= 7
        orders.append(seen)
    assert orders[0] != orders[1]


@pytest.mark.parametrize("world", [1, 2])
def test_labeled_images_come_in_permutations_without_end(world):
    data = numbered(7, 100)
    streams = [Stream(data, 3, 2, seed=0, rank=r, world=world) for r in range(world)]
    seen = []
    for step in range(28):
        for stream in streams:
            x, y, index, _, _ = parts(stream[step])
            assert torch.equal(x[:, 0, 0, 0].long(), index) and torch.equal(y, index % 3)
            seen += index.tolist()
    passes = [seen[i : i + 7] for i in range(0, len(seen), 7)]
    assert all(sorted(p) == list(range(7)) for p in passes) and passes[0] != passes[1]


def test_an_image_gets_new_views_in_every_pass():
    data = numbered(4, 12)
    stream = Stream(data, 4, 3, seed=0)
    draws = Counter()
    for step in range(6):
        x, _, _, weak, strong = parts(stream[step])
        draws.update(torch.cat([x, weak, strong])[:, 0, 0, 0].tolist())
    assert max(draws.values()) == 1


def test_the_bank_is_ready_once_every_labeled_image_was_seen():
    assert [Stream(numbered(4, 40), 2, 2, seed=0).bank_ready(s) for s in (0, 9, 10, 25)] == [
        False,
        False,
        True,
        True,
    ]
    slow = Stream(numbered(30, 40), 2, 2, seed=0)  # ten steps of two: one epoch shows 20 of the 30
    assert [slow.bank_ready(s) for s in (0, 10, 19, 20)] == [False, False, False, True]


def test_true_labels_are_absent_when_unknown():
    data = numbered(4, 12)
    assert (
        Stream(data._replace(labels=np.where(np.arange(16) < 4, data.labels, -1)), 2, 2, seed=0)[
            0
        ].true_labels
        is None
    )


def test_with_a_number_of_steps_an_epoch_no_image_is_dropped():
    """As for CIFAR: passes follow one another, whatever the length of an epoch."""
    stream = Stream(numbered(7, 20), 2, 3, seed=0, steps_per_epoch=4)
    assert stream.steps_per_epoch == 4
    seen = [row for step in range(10) for row in parts(stream[step])[3][:, 0, 0, 0].long().tolist()]
    assert all(sorted(seen[i : i + 20]) == list(range(7, 27)) for i in (0, 20, 40))
    assert seen[:20] != seen[20:40]
    assert [stream.bank_ready(step) for step in (0, 3, 4)] == [False, False, True]


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("workers", [0, 2])
def test_every_test_image_is_in_one_share(world, workers):
    data = digits.build(labels_per_class=1, seed=0)
    shares = [list(EvalLoader(data, r, world, workers, CPU).batches(BadImages("stop"))) for r in range(world)]
    x = torch.cat([x for share in shares for x, _ in share])
    y = torch.cat([y for share in shares for _, y in share])
    assert len(x) == 360
    whole = data.eval_view.cpu_transform([data.test_images[row] for row in range(360)], np.empty((360, 0)))[0]
    assert Counter(map(bytes, x.numpy())) == Counter(map(bytes, whole.numpy()))
    assert Counter(y.tolist()) == Counter(data.test_labels.tolist())


def test_the_size_of_an_item_is_that_of_its_tensors(tmp_path):
    imagenet(tmp_path)
    photos = [
        imagenet_data(str(tmp_path), "", 1, 0, 0, "weak", "moco,multicrop_96", size, on_device, "")
        for size, on_device in ((32, True), (48, False))
    ]
    for data in (digits.build(labels_per_class=3, seed=0), *photos):
        stream, rows = Stream(data, batch_size=2, mu=3, seed=0), np.arange(len(data.test_images))
        x, y, index, weak, strong, true_labels, _ = stream[0]
        tensors = [*x, y, index, *weak, *itertools.chain(*strong), true_labels]
        assert stream.item_bytes() == sum(t.nbytes for t in tensors)
        chunks = ImageChunks(data.test_images, data.eval_view, rows, size=len(rows) - 1)
        (pixels,), chunk_rows, _ = chunks[0]
        assert chunks.item_bytes() == pixels.nbytes + chunk_rows.nbytes


# Unreadable images.


def test_a_bad_unlabeled_image_is_replaced_by_the_same_other_one_and_listed():
    good, bad = (Stream(numbered(6, 30, bad=broken), 2, 3, seed=0) for broken in ((), (10, 20)))
    stand_in = {}
    for step in range(15):  # three epochs of five steps
        a, b = good[step], bad[step]
        before, after = (item.u_weak[0][:, 0, 0, 0].long().tolist() for item in (a, b))
        assert after == b.u_strong[0][0][:, 0, 0, 0].long().tolist() and b.true_labels.tolist() == [
            row % 3 for row in after
        ]
        assert [name for name, _ in b.bad] == [f"image {row}" for row in before if row in (10, 20)]
        for old, new in zip(before, after):
            assert old == new if old not in (10, 20) else new not in (10, 20) and new >= 6
            assert stand_in.setdefault(old, new) == new
        assert same(b, Stream(numbered(6, 30, bad=(10, 20)), 2, 3, seed=0)[step])
    assert {10, 20} <= set(stand_in)


def test_a_bad_labeled_image_is_replaced_by_one_of_its_class():
    stream = Stream(numbered(9, 60, bad=(4,)), 3, 3, seed=0)
    replaced = 0
    for step in range(12):
        item = stream[step]
        x = item.x[0][:, 0, 0, 0].long()
        assert 4 not in x and torch.equal(item.y, x % 3) and torch.equal(item.index, x)
        replaced += len(item.bad)
        assert all(entry == ("image 4", "torn") for entry in item.bad)
    assert replaced == 4  # once in each of four passes


def test_a_class_without_a_readable_image_stops_the_run():
    with pytest.raises(UserError, match="image 1: torn; .*no other image could replace it"):
        stream = Stream(numbered(3, 60, bad=(1,)), 3, 3, seed=0)
        stream[0]


def test_bad_images_stop_the_run_or_are_collected():
    with pytest.raises(UserError, match="image 3: torn; .*--on-bad-image skip"):
        BadImages("stop").add([("image 3", "torn")])
    kept = BadImages("skip")
    kept.add([("image 3", "torn")])
    assert kept.take() == [("image 3", "torn")] and kept.take() == []


def test_a_bad_test_image_is_left_out_or_stops():
    data = numbered(6, 30, bad_tests=(1, 4))
    bad = BadImages("skip")
    ((x, y),) = EvalLoader(data, 0, 1, 0, CPU).batches(bad)
    assert x[:, 0, 0, 0].tolist() == [0, 2, 3] and y.tolist() == [0, 2, 0]
    assert bad.take() == [("image 1", "torn"), ("image 4", "torn")]
    with pytest.raises(UserError, match="image 1: torn"):
        list(EvalLoader(data, 0, 1, 0, CPU).batches(BadImages("stop")))


def test_further_strong_views_draw_numbers_of_their_own_and_change_no_other():
    """An image is decoded once for all its views."""
    one = numbered(10, 40)
    three = one._replace(strong_views=3 * one.strong_views, images=Counting(50))
    for step in range(12):
        a, b = Stream(one, 2, 3, seed=5)[step], Stream(three, 2, 3, seed=5)[step]
        assert three.images.reads == 8 * (step + 1) and len(b.u_strong) == 3
        for x, y in zip(parts(a), parts(b), strict=True):
            assert torch.equal(x, y)
        rows = b.u_weak[0].long()
        views = [b.u_weak[0], *(view for (view,) in b.u_strong)]
        assert all(torch.equal(view.long(), rows) for view in views)
        assert len({tuple(view.flatten().tolist()) for view in views}) == 4
    ids = [strong_stream_id(view) for view in range(9)]
    others = {ORDER_X, ORDER_U, VIEW_X, VIEW_WEAK, REPLACE_X, REPLACE_U}
    assert ids[0] == VIEW_STRONG and len(set(ids) - others) == 9


class Counting(Numbers):
    reads = 0

    def __getitem__(self, row):
        self.reads += 1
        return super().__getitem__(row)
