"""The bank and distribution alignment over several steps."""
import reference
import torch

from models.memory import DistributionAlignment, LabelBank


def test_the_bank_starts_with_random_unit_rows_and_known_labels():
    bank = LabelBank(torch.tensor([2, 0, 1]), dim=8)
    torch.testing.assert_close(bank.z.norm(dim=1), torch.ones(3))
    assert bank.labels.tolist() == [2, 0, 1]
    assert not torch.equal(bank.z[0], bank.z[1])


def test_writes_over_several_steps_touch_their_rows_only():
    bank, rows = LabelBank(torch.zeros(7), dim=3).double(), None
    rows = [row.clone() for row in bank.z]
    for step in range(5):
        g = torch.Generator().manual_seed(step)
        index, z = torch.randperm(7, generator=g)[:3], torch.randn(3, 3, generator=g, dtype=torch.float64)
        bank.write(index, z, torch.full((3,), step))
        for j in range(3):
            rows[int(index[j])] = z[j]
        assert torch.equal(bank.z, torch.stack(rows))


def test_the_last_of_duplicate_rows_wins():
    bank = LabelBank(torch.zeros(3), dim=2)
    z = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
    bank.write(torch.tensor([1, 2, 1, 2]), z, torch.tensor([5, 6, 7, 8]))
    assert bank.z[1].tolist() == [-1, 0] and bank.z[2].tolist() == [0, -1]
    assert bank.labels.tolist() == [0, 7, 8]


def test_alignment_equals_the_loop_until_the_ring_has_gone_round():
    align = DistributionAlignment(num_classes=4, length=5).double()
    ring, ptr = [[0.0] * 4 for _ in range(5)], 0
    for step in range(13):
        p = torch.softmax(torch.randn(6, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64), 1)
        mean = p.mean(dim=0)
        expected = torch.tensor(reference.align(p.tolist(), ring, ptr, mean.tolist()), dtype=torch.float64)
        before = align.ring.clone()
        aligned = align(p.log(), mean)
        assert torch.equal(align.ring, before)              # reading writes nothing
        torch.testing.assert_close(aligned.exp(), expected, rtol=1e-12, atol=0)
        align.write(mean)
        ptr = (ptr + 1) % 5
        torch.testing.assert_close(align.ring, torch.tensor(ring, dtype=torch.float64), rtol=1e-15, atol=0)
        assert align.ptr.item() == ptr


def test_the_ring_holds_256_steps():
    assert DistributionAlignment(num_classes=10).ring.shape == (256, 10)
