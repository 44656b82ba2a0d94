"""The reference of SimMatchV2 on cases that are solved by hand, and the course of its first steps."""

import math

import pytest
import torch
from reference import cross_entropy
from reference_v2 import (
    SMALLEST,
    SimMatchV2Reference,
    align,
    average_prior,
    cross_entropy_with_logits,
    edges,
    enqueue,
    node_edges,
    propagate,
    propagation,
)

from tests.models import small

LN3 = math.log(3)  # with t = 1/ln 3, exp(similarity/t) is 3 for equal unit rows and 1 for orthogonal ones
SETTINGS = {**small.V2, "lr": 0.05, "momentum": 0.9, "wd": 1e-4, "nesterov": True}


def test_one_neighbor_moves_a_pseudo_label_by_alpha():
    """A of two nodes is [[0, 1], [1, 0]], so P is [[1, alpha], [alpha, 1]] / (1 + alpha)."""
    P = propagation([[1.0, 0.0], [0.6, 0.8]], alpha=0.25, t=0.1)
    assert P[0] == pytest.approx([0.8, 0.2]) and P[1] == pytest.approx([0.2, 0.8])
    bank, labels = [[-1.0, 0.0], [0.6, 0.8], [0.0, -1.0]], [0, 2, 0]
    pseudo = propagate([0.5, 0.5, 0.0], [1.0, 0.0], bank, labels, topn=1, alpha=0.25, t=0.1)
    assert pseudo == pytest.approx([0.4, 0.4, 0.2])  # row 1 is the nearest, not row 0


def test_propagation_over_three_nodes():
    """A is [[0, 3/4, 1/4], [3/4, 0, 1/4], [1/2, 1/2, 0]], and alpha 1/2."""
    z, bank = [1.0, 0.0, 0.0], [[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]
    P = propagation([z, bank[2], bank[0]], alpha=0.5, t=1 / LN3)
    assert P[0] == pytest.approx([62 / 99, 26 / 99, 11 / 99])
    pseudo = propagate([0.5, 0.25, 0.25], z, bank, [1, 2, 0], topn=2, alpha=0.5, t=1 / LN3)
    assert pseudo == pytest.approx([31 / 99 + 26 / 99, 15.5 / 99 + 11 / 99, 15.5 / 99])


def test_the_prior_divides_and_is_averaged():
    assert [float(v) for v in align([[0.5, 0.25, 0.25]], [0.5, 0.25, 0.125])[0]] == [0.25, 0.25, 0.5]
    da = average_prior([0.5, 0.5], [[0.5, 0.5], [1.0, 0.0]], da_m=0.9)
    assert da == pytest.approx([0.525, 0.475])


def test_class_sums_over_the_queue_are_not_normalized():
    z, queue = [[0.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]]
    assert [float(v) for v in edges(z, queue, t=1 / LN3)[0]] == pytest.approx([0.75, 0.25])
    n = node_edges([[0.75, 0.25]], [[0.0, 0.0, 0.0], [0.5, 0.5, 0.0]])
    assert n == [[0.125, 0.125, SMALLEST]]  # the sum is the share of the filled row
    assert float(cross_entropy([0.0, 0.0, 1.0], n[0])) == pytest.approx(1022 * math.log(2))


def test_cross_entropy_with_logits_is_finite_where_the_softmax_underflows():
    logits = torch.tensor([0.0, math.log(3), -2000.0], dtype=torch.float64)
    assert float(cross_entropy_with_logits([0.0, 1.0, 0.0], logits)) == pytest.approx(math.log(4 / 3))
    assert float(cross_entropy_with_logits([0.0, 0.0, 1.0], logits)) == pytest.approx(2000 + math.log(4))


def test_the_queue_continues_at_its_first_row_after_its_last():
    queue, labels = list("abc"), [[0.0], [0.0], [0.0]]
    ptr = enqueue(queue, labels, 0, "de", [[1.0], [2.0]])
    assert (queue, labels, ptr) == (list("dec"), [[1.0], [2.0], [0.0]], 2)
    ptr = enqueue(queue, labels, ptr, "fg", [[3.0], [4.0]])
    assert (queue, labels, ptr) == (list("gef"), [[4.0], [2.0], [3.0]], 1)


@pytest.mark.parametrize("bn_mode, DA", [("shuffle", True), ("average", False)])
def test_steps_of_two_ranks_write_bank_queue_prior_and_teacher(bn_mode, DA):
    net, world, n = small.network(), 2, small.B * small.MU
    net.norm = torch.nn.LayerNorm(5).double()
    net.fc.weight.data /= 12  # the LayerNorm makes the features large enough
    g = torch.Generator().manual_seed(7)
    bank, queue = (
        torch.nn.functional.normalize(torch.randn(rows, small.D, generator=g).double(), dim=1)
        for rows in (small.K, SETTINGS["k"] * world * n)
    )
    slow = SimMatchV2Reference(
        net, bank, small.LABELS, small.C, queue=queue, bn_mode=bn_mode, **{**SETTINGS, "DA": DA}
    )
    masks = []
    for step in range(3):
        da, half = slow.da, step % 2 * world * n  # the half of the queue that this step writes
        batches = [small.batch(10 * step + rank, sides=(6, 5)) for rank in range(world)]
        terms, pseudo, mask = slow.step(batches, step)
        masks += sum(mask, [])
        everything = [row for rank in slow.p for row in rank]
        assert (terms["loss_ne"] == 0.0) == (step == 0) and all(v > 0 for v in list(terms.values())[:3])
        assert slow.da == (average_prior(da, everything, 0.9) if DA else [0.25] * 4)
        assert slow.p_aligned == ([align(p, da) for p in slow.p] if DA else slow.p)  # with the old prior
        assert slow.queue_labels[half : half + world * n] == [row for p in slow.p_aligned for row in p]
        assert slow.ptr == (step + 1) % 2 * world * n
        written = [int(i) for batch in batches for i in batch.index]
        lengths = torch.stack(slow.bank)[written].norm(dim=1)
        torch.testing.assert_close(lengths, torch.ones(world * small.B).double())
        for p, row in zip(everything, [row for rank in pseudo for row in rank]):
            assert sum(p) == pytest.approx(1) and sum(row) == pytest.approx(1)
        for e_s, n_s in zip(slow.e_s, slow.n_s):
            assert len(e_s) == len(n_s) == 2 * n and all(sum(row) == pytest.approx(1) for row in e_s)
            sums = [sum(row) for row in n_s]  # the share of the filled rows: none, some and all of them
            assert max(sums) < (1e-300, 1, 2)[step] and min(sums) > (0, 1e-6, 1 - 1e-9)[step]
    assert 0 < sum(masks) < len(masks)  # some images pass the threshold, some do not
    assert slow.student.backbone[1].num_batches_tracked == 3 * 2  # each view is a forward
    changed = {
        name for name, p in slow.teacher.named_parameters() if not torch.equal(p, net.get_parameter(name))
    }
    assert changed >= {"norm.weight", "norm.bias", "head.0.weight", "head.2.bias", "fc.bias"}
