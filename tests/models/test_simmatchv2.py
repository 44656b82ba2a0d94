"""SimMatchV2's formulas and its whole step against plain loops, in float64."""

import pytest
import reference_v2
import torch
import torch.nn.functional as F

from models import train_step
from models.memory import Queue
from models.optimizer import parameter_groups
from models.simmatchv2 import propagate
from tests.models import small

SGD = dict(lr=0.05, momentum=0.9, wd=1e-4, nesterov=True)


def optimizer_of(method):
    groups = parameter_groups(method.student, SGD["wd"], False)
    return torch.optim.SGD(groups, lr=SGD["lr"], momentum=SGD["momentum"], nesterov=SGD["nesterov"])


@pytest.mark.parametrize("eman", [False, True])
@pytest.mark.parametrize("DA, sides", [(True, (6,)), (False, (6, 6)), (True, (6, 5, 4))])
def test_six_steps_equal_the_loops(eman, DA, sides):
    """The queue has room for two steps, so that each of its rows is written three times."""
    net = small.network_v2()
    method = small.method_v2(net, eman=eman, DA=DA)
    slow = small.reference_of_v2(net, method, eman, DA=DA, **SGD)
    optimizer, seen = optimizer_of(method), []
    for step in range(6):
        batch = small.batch(step, sides=sides)
        if step % 2:  # the first labeled image occurs twice, in two views
            batch.index[2], batch.y[2] = batch.index[0], batch.y[0]
        output = train_step(method, method.student, optimizer, [batch], step=step, bank_ready=step > 1)
        expected, pseudo, mask = slow.step([batch], step)
        assert ("loss_ne" in output.losses) == (step > 0)
        for name, value in output.losses.items():
            assert value.item() == pytest.approx(expected[name], rel=1e-10), (step, name)
        pseudo = torch.tensor(pseudo[0], dtype=torch.float64)
        torch.testing.assert_close(output.pseudo_label, pseudo, rtol=1e-10, atol=1e-14)
        assert output.mask.tolist() == mask[0]
        seen += mask[0]
        small.compare_v2(method, method.state_dict(), slow)
    assert 0 < sum(seen) < len(seen)  # some images pass the threshold, some do not


def unit(n, d, seed):
    return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)).double(), dim=1)


def inverse(z_i, p_i, bank, labels, *, topn, t, alpha):
    """The pseudo-label of one image, with the inverse of the paper."""
    nearest = torch.argsort(bank @ z_i, descending=True)[:topn]
    nodes = torch.cat([z_i[None], bank[nearest]])  # [topn+1, D]
    classes = torch.cat([p_i[None], F.one_hot(labels[nearest], len(p_i)).double()])  # [topn+1, C]
    A = torch.softmax((nodes @ nodes.T / t).fill_diagonal_(-torch.inf), dim=1)
    P = (1 - alpha) * torch.linalg.inv(torch.eye(topn + 1).double() - alpha * A)
    return (P @ classes)[0]


PROBLEM = unit(6, 32, 1), torch.softmax(3 * unit(6, 7, 3), dim=1), unit(300, 32, 2), torch.arange(300) % 7


def test_propagation_equals_the_loop():
    z, p, bank, labels = PROBLEM
    settings = dict(topn=5, t=0.1, alpha=0.3)
    rows = bank.tolist(), labels.tolist()
    expected = [reference_v2.propagate(*own, *rows, **settings) for own in zip(p.tolist(), z.tolist())]
    out = propagate(z, p, bank, labels, **settings)
    torch.testing.assert_close(out, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-10), (torch.float32, 1e-6)])
@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("topn", [1, 128, 300])
def test_propagation_is_the_row_of_the_inverse(topn, alpha, dtype, bound):
    z, p, bank, labels = PROBLEM
    settings = dict(topn=topn, t=0.1, alpha=alpha)
    out = propagate(z.to(dtype), p.to(dtype), bank.to(dtype), labels, **settings)
    assert out.dtype == dtype
    expected = torch.stack([inverse(*own, bank, labels, **settings) for own in zip(z, p)])
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=bound)


@pytest.mark.parametrize("alpha, topn", [(0.1, 128), (0.9, 3)])
def test_an_image_keeps_nearly_all_of_its_class_prediction(alpha, topn):
    """P00 lies between 1 − alpha and 1 / (1 + alpha)."""
    z, bank = unit(6, 32, 1), unit(300, 32, 2)
    p = F.one_hot(torch.zeros(6, dtype=torch.long), 2).double()  # the neighbors have class 1
    out = propagate(z, p, bank, torch.ones(300, dtype=torch.long), topn=topn, t=0.1, alpha=alpha)
    assert out[:, 0].min() >= 1 - alpha and out[:, 0].max() <= 1 / (1 + alpha)


def test_more_neighbors_than_labeled_images_are_refused():
    with pytest.raises(ValueError, match="topn is 11, but there are 10 labeled images: set --topn to 10"):
        small.method_v2(topn=11)


def test_a_single_view_has_no_first_view_for_bn():
    method = small.method_v2(bn_from_first_view=True)
    method.check_views(6, 6, 5)
    with pytest.raises(ValueError, match="bn_from_first_view has no effect with a single strong view"):
        method.check_views(6, 6)


def test_the_queue_is_first_in_first_out():
    queue = Queue(5, 2, 3)
    random, filled = queue.z.clone(), []
    torch.testing.assert_close(random.norm(dim=1), torch.ones(5))
    rows, expected_z, expected_p, ptr = iter(range(1, 100)), list(random), list(torch.zeros(5, 3)), 0
    for n in (2, 2, 2, 5, 1):
        z = torch.tensor([[float(next(rows)), 0.0] for _ in range(n)])
        p = torch.softmax(z @ torch.randn(2, 3), dim=1)
        queue.write(z, p)
        ptr = reference_v2.enqueue(expected_z, expected_p, ptr, list(z), list(p))
        assert queue.z.equal(torch.stack(expected_z)) and queue.p.equal(torch.stack(expected_p))
        assert queue.ptr.tolist() == [ptr]
        filled.append(queue.filled)
    assert filled == [2, 4, 5, 5, 5]


@pytest.mark.parametrize("writes", range(4))
def test_a_restored_queue_knows_how_full_it_is(writes):
    queue, restored = Queue(5, 2, 3), Queue(5, 2, 3)
    for _ in range(writes):
        queue.write(torch.randn(2, 2), torch.softmax(torch.randn(2, 3), dim=1))
    restored.load_state_dict(queue.state_dict())
    assert restored.filled == queue.filled == min(2 * writes, 5)


def test_losses_write_nothing():
    method = small.method_v2(small.network_v2())
    kept = {k: v.clone() for k, v in method.state_dict().items() if "running" not in k and "tracked" not in k}
    terms, output = small.losses(method, small.batch(0, sides=(6, 5)))
    sum(terms.values()).backward()
    after = method.state_dict()
    assert all(after[key].equal(value) for key, value in kept.items()) and method.queue.filled == 0
    others = (output.pseudo_label, output.mask, *output.for_update.values())
    assert not any(value.requires_grad for value in others)


@pytest.mark.parametrize("bn_from_first_view, updates", [(False, 3), (True, 1)])
def test_which_views_update_the_running_statistics(bn_from_first_view, updates):
    method = small.method_v2(bn_from_first_view=bn_from_first_view)
    batches = [small.batch(seed, sides=(6, 5, 4)) for seed in (0, 1)]  # two virtual ranks: the first one's
    method.queue = Queue(small.V2["k"] * 2 * small.B * small.MU, small.D, small.C).double()
    train_step(method, method.student, optimizer_of(method), batches, step=0, bank_ready=False)
    assert method.student.backbone[1].num_batches_tracked == updates


@pytest.mark.parametrize("filled", [False, True])
def test_gradients_equal_finite_differences(filled):
    """All terms together, by the logits and embeddings of the student."""
    method = small.method_v2(threshold=0.0)
    if filled:
        n = len(method.queue.z)
        p = torch.softmax(torch.randn(n, small.C, generator=torch.Generator().manual_seed(1)).double(), dim=1)
        method.queue.write(unit(n, small.D, 2), p)
    batch = small.batch(0, sides=(6, 6))
    (targets,) = method.targets([batch], method.student, step=0)
    n, random = small.B + small.B * small.MU, torch.Generator().manual_seed(3)

    def loss(logits, z, logits_2, z_2):
        outputs = iter([(logits, F.normalize(z, dim=1)), (logits_2, F.normalize(z_2, dim=1))])
        output = method.losses(batch, targets, lambda x: next(outputs), bank_ready=False)
        assert ("loss_ne" in output.losses) == filled
        return sum(output.losses.values())

    sizes = [(n, small.C), (n, small.D), (n - small.B, small.C), (n - small.B, small.D)]
    inputs = [torch.randn(size, generator=random).double().requires_grad_() for size in sizes]
    assert torch.autograd.gradcheck(loss, inputs, eps=1e-6, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("temperature", [0.01, 0.1])
@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_losses_and_gradients_are_finite(dtype, temperature, scale):
    """Where nothing in the queue is similar, n_s is 0 in float32."""
    method = small.method_v2(small.network_v2().float(), t=temperature).float()
    method.queue.write(
        F.normalize(torch.ones(1, small.D), dim=1), F.one_hot(torch.zeros(1).long(), small.C).float()
    )
    batch = small.batch(0, torch.float32, sides=(6, 5))
    (targets,) = method.targets([batch], method.student, step=0)
    targets = targets._replace(p=F.one_hot(torch.full((6,), 2), small.C).float())
    outputs = []

    def student(x):
        logits = (scale * torch.randn(len(x), small.C)).to(dtype).requires_grad_()
        z = F.normalize(torch.randn(len(x), small.D), dim=1).to(dtype).requires_grad_()
        outputs.extend([logits, z])
        return logits, z

    losses = method.losses(batch, targets, student, bank_ready=False).losses
    assert losses["loss_ne"] > 100  # the prediction is class 2, which no row of the queue has
    sum(losses.values()).backward()
    assert all(torch.isfinite(value).all() for value in losses.values())
    assert all(torch.isfinite(x.grad).all() for x in outputs)


def test_a_queue_of_another_length_starts_empty():
    two, one = small.method_v2(ranks=2), small.method_v2()
    train_step(
        two, two.student, optimizer_of(two), [small.batch(0), small.batch(1)], step=0, bank_ready=False
    )
    values, random = dict(two.state_dict()), one.queue.z.clone()
    assert one.fit_state(dict(one.state_dict())) == ""
    assert (
        one.fit_state(values) == "the checkpoint's queue has 24 rows, but this run's has 12: it starts empty"
    )
    one.load_state_dict(values)
    assert one.queue.filled == 0 and one.queue.z.equal(random) and one.queue.p.abs().sum() == 0
    assert one.bank.z.equal(two.bank.z) and one.prior.da.equal(two.prior.da)
