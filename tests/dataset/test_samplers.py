"""The samplers, compared with plain loops."""

import numpy as np
import pytest
import torch
from conftest import one_line

from benchmark.same_run import difference
from dataset import digits
from dataset.loader import Stream
from dataset.rng import ORDER_X, shuffled
from dataset.samplers import ExactSampler, InfiniteSampler
from util.errors import UserError


def drawn(sampler, steps, batch_size, world):
    """[step][rank] -> indices of that process."""
    return [
        [sampler.draw(step, batch_size, rank, world)[0].tolist() for rank in range(world)] for step in steps
    ]


@pytest.mark.parametrize("world, pass_length", [(1, 7), (2, 7), (3, 5)])
def test_infinite_equals_a_loop_that_reshuffles_when_the_list_runs_out(world, pass_length):
    def endless():
        number = 0
        while True:
            yield from shuffled(7, 5, ORDER_X, number)[:pass_length].tolist()
            number += 1

    images = endless()
    expected = [[[next(images) for _ in range(3)] for _ in range(world)] for _ in range(20)]
    assert drawn(InfiniteSampler(7, pass_length, (5, ORDER_X)), range(20), 3, world) == expected


def exact_by_a_loop(epoch, n, steps, batch_size, ranks, seed):
    """SimMatchV2's sampler, rank by rank: [rank] -> list of the epoch's images, in the order of its steps."""
    order, k = [], 0
    while len(order) < steps * batch_size * ranks:
        order += shuffled(n, seed, ORDER_X, epoch, k).tolist()
        k += 1
    order = order[: steps * batch_size * ranks]
    return [order[rank::ranks] for rank in range(ranks)]


@pytest.mark.parametrize("processes, virtual", [(1, 1), (1, 4), (2, 2), (4, 1), (3, 1)])
def test_exact_equals_a_loop_over_ranks_on_any_number_of_processes(processes, virtual):
    n, steps, batch_size, ranks = 7, 5, 3, processes * virtual
    sampler = ExactSampler(n, steps * batch_size * ranks, batch_size * ranks, virtual, (5, ORDER_X))
    for epoch in range(3):
        expected = exact_by_a_loop(epoch, n, steps, batch_size, ranks, seed=5)
        for step in range(steps):
            own = [rank[step * batch_size : (step + 1) * batch_size] for rank in expected]
            (got,) = drawn(sampler, [epoch * steps + step], batch_size * virtual, processes)
            assert sum(got, []) == sum(own, [])


def test_exact_shows_an_image_in_every_epoch_and_never_twice_in_a_pass():
    sampler = ExactSampler(7, 30, 6, 1, (0, ORDER_X))  # 4 permutations and 2 images of a fifth
    index, passes = sampler.at(np.arange(90))
    assert len({*zip(index.tolist(), passes.tolist())}) == 90
    assert all(set(epoch) == set(range(7)) for epoch in index.reshape(3, 30).tolist())
    assert index[:30].tolist() != index[30:60].tolist()
    assert index.tolist() != ExactSampler(7, 30, 6, 1, (1, ORDER_X)).at(np.arange(90))[0].tolist()


def test_exact_refuses_an_epoch_that_cannot_show_every_image(train, tmp_path):
    with pytest.raises(UserError, match="all 7 labeled images .* only 6: lower --mu"):
        ExactSampler(7, 6, 2, 1, (0, ORDER_X))
    flags = ["--labeled-sampler", "exact", "--mu", "5", "--labels-per-class", "30"]
    run = train(tmp_path / "run", *flags)  # 28 steps of 10 labeled images
    one_line(run.returncode, run.stderr, "all 300 labeled images", "only 280", "--steps-per-epoch 30 or more")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("processes, virtual", [(1, 4), (2, 2), (4, 1)])
def test_a_stream_loads_the_same_images_for_every_rank_on_any_number_of_processes(processes, virtual):
    """Also if it starts in the middle of an epoch, and with other ranks the same images in a step."""
    data = digits.build(labels_per_class=2, seed=0)

    def stream(rank, processes, virtual, batch_size=3):
        more = {"steps_per_epoch": 4, "labeled_sampler": "exact", "virtual_ranks": virtual}
        return Stream(data, batch_size * virtual, 2, 0, rank, processes, **more)

    ranks = [stream(rank, 4, 1) for rank in range(4)]
    own = [stream(rank, processes, virtual) for rank in range(processes)]
    for step in (5, 6, 13):
        expected = torch.cat([rank[step].x[0] for rank in ranks])
        assert torch.equal(torch.cat([process[step].x[0] for process in own]), expected)
        (other,) = stream(0, 1, 2, batch_size=6)[step].x
        assert sorted(map(bytes, other.numpy())) == sorted(map(bytes, expected.numpy()))
    assert [own[0].bank_ready(step) for step in (0, 3, 4)] == [False, False, True]


def test_a_run_with_the_exact_sampler_resumes_to_the_same_bits(train, tmp_path):
    flags = [
        "--labeled-sampler",
        "exact",
        "--steps-per-epoch",
        "7",
        "--save-freq",
        "5",
        "--diagnose-freq",
        "3",
    ]
    whole = train(tmp_path / "whole", *flags)
    assert whole.returncode == 0, whole.stderr
    assert train(tmp_path / "part", *flags).returncode == 0
    (tmp_path / "part" / "last.previous.pth").rename(tmp_path / "part" / "last.pth")
    assert "continues from" in train(tmp_path / "part", *flags).stdout
    assert difference(tmp_path / "whole", tmp_path / "part") == ""
    changed = train(tmp_path / "part", *flags[2:])
    one_line(changed.returncode, changed.stderr, "labeled_sampler was 'exact' and is now 'infinite'")
