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


def test_an_ensemble_keeps_a_share_of_the_old_row():
    """bank[i] <- normalize(0.7·bank[i] + 0.3·z). Of a repeated index only the last row is used, once."""
    bank, rows = LabelBank(torch.zeros(7), dim=3, m=0.7).double(), [torch.zeros(3, dtype=torch.float64)] * 7
    for step in range(6):
        g = torch.Generator().manual_seed(step)
        index = torch.randperm(7, generator=g)[:3]
        index[2] = index[0] if step % 2 else index[2]
        z = torch.nn.functional.normalize(torch.randn(3, 3, generator=g, dtype=torch.float64), dim=1)
        bank.write(index, z, torch.full((3,), step))
        before = list(rows)
        for j in range(3):
            mixed = 0.7 * before[index[j]] + 0.3 * z[j]
            rows[index[j]] = mixed / mixed.square().sum().sqrt()
        torch.testing.assert_close(bank.z, torch.stack(rows), rtol=1e-12, atol=1e-15)


def test_the_first_write_of_an_ensembles_row_sets_it_to_the_embedding():
    bank, z = LabelBank(torch.zeros(3), dim=4, m=0.7), torch.eye(4)[2:3]
    bank.write(torch.tensor([1]), z, torch.tensor([5]))
    assert torch.equal(bank.z, torch.stack([torch.zeros(4), z[0], torch.zeros(4)])) and bank.labels[1] == 5


def test_alignment_equals_the_loop_until_the_ring_has_gone_round():
    align = DistributionAlignment(num_classes=4, length=5).double()
    ring, ptr = [[0.0] * 4 for _ in range(5)], 0
    for step in range(13):
        p = torch.softmax(
            torch.randn(6, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64), 1
        )
        mean = p.mean(dim=0)
        expected = torch.tensor(reference.align(p.tolist(), ring, ptr, mean.tolist()), dtype=torch.float64)
        before = align.ring.clone()
        aligned = align(p.log(), mean)
        assert torch.equal(align.ring, before)  # reading does not write
        torch.testing.assert_close(aligned.exp(), expected, rtol=1e-12, atol=0)
        align.write(mean)
        ptr = (ptr + 1) % 5
        torch.testing.assert_close(align.ring, torch.tensor(ring, dtype=torch.float64), rtol=1e-15, atol=0)
        assert align.ptr.item() == ptr
