"""SimMatch's formulas and its whole step against plain loops, in float64."""
import pytest
import reference
import torch

from models.method import Fresh
from models.simmatch import SimMatch, aggregate, cross_entropy, unfold
from tests.models import small

SGD = dict(lr=0.05, momentum=0.9, wd=1e-4, nesterov=True)


def distributions(n, m, seed):
    return torch.softmax(3 * torch.randn(n, m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), 1)


def test_unfold_equals_the_loop():
    q, p = distributions(5, small.K, 1), distributions(5, small.C, 2)
    expected = torch.tensor(reference.unfold(q.tolist(), p.tolist(), small.LABELS.tolist()), dtype=torch.float64)
    torch.testing.assert_close(unfold(q.log(), p.log(), small.LABELS).exp(), expected, rtol=1e-12, atol=0)


def test_unfold_keeps_a_distribution_where_the_product_underflows():
    """Each factor may be 1e-300: the product is 0 in any format, its log is not."""
    log_q = torch.tensor([[0.0, -690.0]], dtype=torch.float64)
    log_p = torch.tensor([[-2000.0, 0.0]], dtype=torch.float64)
    q_hat = unfold(log_q, log_p, torch.tensor([0, 1])).exp()
    torch.testing.assert_close(q_hat, torch.tensor([[0.0, 1.0]], dtype=torch.float64))


def test_aggregate_equals_the_loop():
    q = distributions(5, small.K, 3)
    expected = torch.tensor(reference.aggregate(q.tolist(), small.LABELS.tolist(), small.C), dtype=torch.float64)
    a = aggregate(q.log(), small.LABELS, small.C)
    torch.testing.assert_close(a, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(a.sum(1), torch.ones(5, dtype=torch.float64))


def test_cross_entropy_equals_the_loop():
    p, q = distributions(5, small.C, 4), distributions(5, small.C, 5)
    expected = torch.stack([reference.cross_entropy(a, b) for a, b in zip(p.tolist(), q.tolist())])
    torch.testing.assert_close(cross_entropy(p, q.log()), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("eman", [False, True])
@pytest.mark.parametrize("DA", [False, True])
@pytest.mark.parametrize("nesterov", [False, True])
def test_six_steps_equal_the_loops(eman, DA, nesterov):
    settings, sgd = {**small.SETTINGS, "eman": eman, "DA": DA}, {**SGD, "nesterov": nesterov}
    net = small.network()
    method = SimMatch(net, small.LABELS, small.C, small.D, **settings).double()
    slow = reference.SimMatchReference(net, method.bank.z, small.LABELS, small.C, **settings, **sgd)
    optimizer = torch.optim.SGD(method.student.parameters(), lr=sgd["lr"], momentum=sgd["momentum"],
                                weight_decay=sgd["wd"], nesterov=nesterov)
    method.train()
    seen = []
    for step in range(6):
        batch = small.batch(step)
        terms, fresh = method.losses(batch, method.student, step=step, bank_ready=step > 1)
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
        method.update(fresh)
        expected, pseudo, mask = slow.step([batch], step, first_epoch=step <= 1)

        for name, value in expected.items():
            assert terms[name].item() == pytest.approx(value, rel=1e-10), (step, name)
        torch.testing.assert_close(fresh.pseudo, torch.tensor(pseudo[0], dtype=torch.float64), rtol=1e-10, atol=1e-14)
        assert fresh.mask.tolist() == mask[0]
        seen += mask[0]
        torch.testing.assert_close(method.bank.z, torch.stack(slow.bank), rtol=1e-10, atol=1e-12)
        assert method.bank.labels.tolist() == slow.labels
        if DA:
            rows = torch.tensor([[float(v) for v in row] for row in slow.ring], dtype=torch.float64)
            torch.testing.assert_close(method.align.ring, rows, rtol=1e-10, atol=1e-14)
        for mine, theirs in ((method.student, slow.student), (method.teacher.net, slow.teacher)):
            torch.testing.assert_close(mine.state_dict(), theirs.state_dict(), rtol=1e-10, atol=1e-12)
    assert 0 < sum(seen) < len(seen)    # both sides of the threshold were met


def test_losses_write_no_bank_prior_or_teacher_weight():
    method = SimMatch(small.network(), small.LABELS, small.C, small.D, **small.SETTINGS).double().train()
    kept = {key: value.clone() for key, value in method.state_dict().items() if "running" not in key and "tracked" not in key}
    terms, fresh = method.losses(small.batch(0), method.student, step=0, bank_ready=True)
    sum(terms.values()).backward()
    after = method.state_dict()
    assert all(torch.equal(after[key], value) for key, value in kept.items())
    assert not any(value.requires_grad for value in fresh if value is not None)


def test_the_head_has_no_gradient_before_the_bank_is_ready():
    """As published: without L_in the head is not part of the graph, so SGD does not even decay it."""
    method = SimMatch(small.network(), small.LABELS, small.C, small.D, **small.SETTINGS).double().train()
    terms, _ = method.losses(small.batch(0), method.student, step=0, bank_ready=False)
    sum(terms.values()).backward()
    assert terms["loss_in"].item() == 0
    assert all(p.grad is None for p in method.student.head.parameters())
    assert all(p.grad is not None for p in method.student.fc.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("temperature", [0.01, 0.1])
@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_losses_and_gradients_are_finite(dtype, temperature, scale):
    """Low precision, low temperature, and logits so far apart that probabilities underflow."""
    settings = {**small.SETTINGS, "st": temperature, "tt": temperature, "threshold": 0.0}
    method = SimMatch(small.network(dtype=torch.float32), small.LABELS, small.C, small.D, **settings)
    torch.manual_seed(1)
    n = small.B * (1 + small.MU)
    student = small.Fixed((scale * torch.randn(n, small.C)).to(dtype), torch.randn(n, small.D).to(dtype))
    method.teacher.forward = small.Fixed((scale * torch.randn(n, small.C)).to(dtype), torch.randn(n, small.D).to(dtype)).forward
    with torch.no_grad():       # unlabelled images exactly on a bank row, and exactly opposite to it
        student.z[small.B], student.z[small.B + 1] = method.bank.z[0].to(dtype), -method.bank.z[0].to(dtype)
    for step in range(3):
        terms, fresh = method.losses(small.batch(0, torch.float32), student, step=step, bank_ready=True)
        sum(terms.values()).backward()
        assert reference.all_finite(terms.values()), terms
        assert all(term.dtype == torch.float32 for term in terms.values())
        assert torch.isfinite(fresh.pseudo).all()
        torch.testing.assert_close(fresh.pseudo.sum(1), torch.ones(small.B * small.MU))
        assert torch.isfinite(student.logits.grad).all() and torch.isfinite(student.z.grad).all()
        method.update(fresh._replace(z=fresh.z.float()))
        assert torch.isfinite(method.align.ring).all()


def test_a_class_that_underflows_everywhere_stays_finite():
    """p is exactly 0 in float32 for class 1 in every image, so its prior is 0 too."""
    method = SimMatch(small.network(dtype=torch.float32), small.LABELS, small.C, small.D, **small.SETTINGS)
    n = small.B * (1 + small.MU)
    logits = torch.zeros(n, small.C)
    logits[:, 1] = -500
    fixed = small.Fixed(logits, torch.randn(n, small.D))
    method.teacher.forward = fixed.forward
    terms, fresh = method.losses(small.batch(0, torch.float32), fixed, step=0, bank_ready=True)
    assert reference.all_finite(terms.values()) and torch.isfinite(fresh.pseudo).all()


def test_update_gathers_what_the_bank_needs():
    method = SimMatch(small.network(), small.LABELS, small.C, small.D, **{**small.SETTINGS, "DA": False}).double()
    assert method.align is None
    z = torch.eye(small.D, dtype=torch.float64)[:2]
    method.update(Fresh(z=z, y=torch.tensor([3, 2]), index=torch.tensor([7, 2])))
    assert torch.equal(method.bank.z[[7, 2]], z) and method.bank.labels[7] == 3 and method.bank.labels[2] == 2
