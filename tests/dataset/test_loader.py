"""What a step sees depends on seed, step, rank and world size alone."""
from collections import Counter

import numpy as np
import pytest
import torch

from dataset import digits
from dataset.loader import Data, Stream, View, batches, evaluation_batches


def numbered(labelled, unlabelled):
    """Images whose every pixel is their own number, and a view that adds the random number it was given."""
    n = labelled + unlabelled
    view = View(1, lambda images, u: torch.from_numpy(images[:, None] + u[:, :, None, None]))
    return Data(images=np.arange(n)[:, None, None] * np.ones((1, 2, 2)), labels=np.arange(n) % 3,
                labelled=np.arange(labelled), unlabelled=np.arange(labelled, n), test_images=np.zeros((5, 2, 2)),
                test_labels=np.arange(5) % 3, weak=view, strong=view, plain=lambda x: torch.from_numpy(x[:, None]),
                classes=["a", "b", "c"], channels=1, split="numbered")


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip((*a[0], a[1]), (*b[0], b[1])))


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_the_same_bytes_with_any_workers_and_from_any_start(workers):
    def stream():
        return Stream(digits.build(labels_per_class=3, seed=5), batch_size=8, mu=5, seed=5)
    expected = [stream()[step] for step in range(75)]       # two epochs, several passes over the labels
    for start in (0, 41):
        got = list(batches(stream(), start, 75, workers, pin_memory=False))
        assert len(got) == 75 - start
        assert all(same(a, b) for a, b in zip(got, expected[start:]))


def test_another_seed_is_another_stream():
    data = numbered(6, 60)
    assert not same(Stream(data, 4, 3, seed=0)[0], Stream(data, 4, 3, seed=1)[0])


@pytest.mark.parametrize("world", [1, 2, 3])
def test_an_epoch_covers_the_unlabelled_images_once_over_all_ranks(world):
    data = numbered(7, 65)
    streams = [Stream(data, 2, 3, seed=0, rank=r, world=world) for r in range(world)]
    steps = streams[0].steps_per_epoch
    assert steps == 65 // (6 * world)
    orders = []
    for epoch in range(2):
        seen = []
        for step in range(epoch * steps, (epoch + 1) * steps):
            for stream in streams:
                (x, y, index, weak, strong), hidden = stream[step]
                rows = weak[:, 0, 0, 0].long()
                assert torch.equal(rows, strong[:, 0, 0, 0].long())         # two views of the same images
                assert not torch.equal(weak, strong)
                assert torch.equal(hidden, rows % 3)
                seen += rows.tolist()
        assert len(set(seen)) == len(seen) == steps * 6 * world and min(seen) >= 7
        orders.append(seen)
    assert orders[0] != orders[1]


@pytest.mark.parametrize("world", [1, 2])
def test_labelled_images_come_in_permutations_without_end(world):
    data = numbered(7, 100)
    streams = [Stream(data, 3, 2, seed=0, rank=r, world=world) for r in range(world)]
    seen = []
    for step in range(28):
        for stream in streams:
            (x, y, index, _, _), _ = stream[step]
            assert torch.equal(x[:, 0, 0, 0].long(), index) and torch.equal(y, index % 3)
            seen += index.tolist()
    passes = [seen[i:i + 7] for i in range(0, len(seen), 7)]
    assert all(sorted(p) == list(range(7)) for p in passes) and passes[0] != passes[1]


def test_an_image_gets_new_views_in_every_pass():
    data = numbered(4, 12)
    stream = Stream(data, 4, 3, seed=0)
    draws = Counter()
    for step in range(6):
        (x, _, _, weak, strong), _ = stream[step]
        draws.update(torch.cat([x, weak, strong])[:, 0, 0, 0].tolist())
    assert max(draws.values()) == 1


def test_the_bank_is_ready_once_every_label_was_seen():
    assert [Stream(numbered(4, 40), 2, 2, seed=0).bank_ready(s) for s in (0, 9, 10, 25)] == [False, False, True, True]
    slow = Stream(numbered(30, 40), 2, 2, seed=0)          # ten steps of two: one epoch shows 20 of the 30
    assert [slow.bank_ready(s) for s in (0, 10, 19, 20)] == [False, False, False, True]


def test_hidden_labels_are_absent_when_unknown():
    data = numbered(4, 12)
    assert Stream(data._replace(labels=np.where(np.arange(16) < 4, data.labels, -1)), 2, 2, seed=0)[0][1] is None


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_test_image_is_in_one_share(world):
    data = digits.build(labels_per_class=1, seed=0)
    shares = [list(evaluation_batches(data, r, world, size=50)) for r in range(world)]
    x = torch.cat([x for share in shares for x, _ in share])
    y = torch.cat([y for share in shares for _, y in share])
    assert len(x) == 360
    assert Counter(map(bytes, x.numpy())) == Counter(map(bytes, data.plain(data.test_images).numpy()))
    assert Counter(y.tolist()) == Counter(data.test_labels.tolist())
