"""SimMatch's formulas and its whole step against plain loops, in float64."""

import pytest
import reference
import torch

from models import build_method, split_virtual_ranks, train_step
from models.method import StepOutput
from models.optimizer import parameter_groups
from models.simmatch import aggregate, cross_entropy, unfold
from tests.models import small
from util.config import Config

SGD = dict(lr=0.05, momentum=0.9, wd=1e-4, nesterov=True)


def distributions(n, m, seed):
    return torch.softmax(
        3 * torch.randn(n, m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), 1
    )


def test_unfold_equals_the_loop():
    q, p = distributions(5, small.K, 1), distributions(5, small.C, 2)
    expected = torch.tensor(
        reference.unfold(q.tolist(), p.tolist(), small.LABELS.tolist()), dtype=torch.float64
    )
    torch.testing.assert_close(unfold(q.log(), p.log(), small.LABELS).exp(), expected, rtol=1e-12, atol=0)


def test_unfold_keeps_a_distribution_where_the_product_underflows():
    """With factors of 1e-300 the product underflows in every format, but its log does not."""
    log_q = torch.tensor([[0.0, -690.0]], dtype=torch.float64)
    log_p = torch.tensor([[-2000.0, 0.0]], dtype=torch.float64)
    q_hat = unfold(log_q, log_p, torch.tensor([0, 1])).exp()
    torch.testing.assert_close(q_hat, torch.tensor([[0.0, 1.0]], dtype=torch.float64))


def test_aggregate_equals_the_loop():
    q = distributions(5, small.K, 3)
    expected = torch.tensor(
        reference.aggregate(q.tolist(), small.LABELS.tolist(), small.C), dtype=torch.float64
    )
    a = aggregate(q.log(), small.LABELS, small.C)
    torch.testing.assert_close(a, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(a.sum(1), torch.ones(5, dtype=torch.float64))


def test_cross_entropy_equals_the_loop():
    p, q = distributions(5, small.C, 4), distributions(5, small.C, 5)
    expected = torch.stack([reference.cross_entropy(a, b) for a, b in zip(p.tolist(), q.tolist())])
    torch.testing.assert_close(cross_entropy(p, q.log()), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("form", small.FORMS)
@pytest.mark.parametrize("DA", [False, True])
@pytest.mark.parametrize("nesterov, no_decay_bn", [(False, True), (True, False)])
def test_six_steps_equal_the_loops(form, DA, nesterov, no_decay_bn):
    net = small.network()
    method, (_, slow, settings) = small.method(form, net, DA=DA), small.FORMS[form]
    slow = slow(
        net,
        method.bank.z,
        small.LABELS,
        small.C,
        **{**settings, "DA": DA},
        **{**SGD, "nesterov": nesterov, "no_decay_bn": no_decay_bn},
    )
    optimizer = torch.optim.SGD(
        parameter_groups(method.student, SGD["wd"], no_decay_bn),
        lr=SGD["lr"],
        momentum=SGD["momentum"],
        nesterov=nesterov,
    )
    seen = []
    for step in range(6):
        batch = small.batch(step)
        if step % 2:  # the first labeled image occurs twice, in two views
            batch.index[2], batch.y[2] = batch.index[0], batch.y[0]
        output = train_step(method, method.student, optimizer, [batch], step=step, bank_ready=step > 1)
        expected, pseudo, mask = slow.step([batch], step, first_epoch=step <= 1)

        for name, value in expected.items():
            assert output.losses[name].item() == pytest.approx(value, rel=1e-10), (step, name)
        torch.testing.assert_close(
            output.pseudo_label, torch.tensor(pseudo[0], dtype=torch.float64), rtol=1e-10, atol=1e-14
        )
        assert output.mask.tolist() == mask[0]
        seen += mask[0]
        torch.testing.assert_close(method.bank.z, torch.stack(slow.bank), rtol=1e-10, atol=1e-12)
        assert method.bank.labels.tolist() == slow.labels
        if DA:
            rows = torch.tensor([[float(v) for v in row] for row in slow.ring], dtype=torch.float64)
            torch.testing.assert_close(method.align.ring, rows, rtol=1e-10, atol=1e-14)
        for mine, theirs in ((method.student, slow.student), (method.teacher.net, slow.teacher)):
            torch.testing.assert_close(mine.state_dict(), theirs.state_dict(), rtol=1e-10, atol=1e-12)
    assert 0 < sum(seen) < len(seen)  # some images pass the threshold, some do not


@pytest.mark.parametrize("form", small.FORMS)
def test_losses_write_no_bank_prior_or_teacher_weight(form):
    method = small.method(form)
    kept = {
        key: value.clone()
        for key, value in method.state_dict().items()
        if "running" not in key and "tracked" not in key
    }
    terms, output = small.losses(method, small.batch(0), step=0, bank_ready=True)
    sum(terms.values()).backward()
    after = method.state_dict()
    assert all(torch.equal(after[key], value) for key, value in kept.items())
    others = (output.pseudo_label, output.mask, *output.for_update.values())
    assert not any(value.requires_grad for value in others)


@pytest.mark.parametrize("form", small.FORMS)
def test_the_head_has_no_gradient_before_the_bank_is_ready(form):
    """As published: without L_in the head is not in the graph, so SGD applies no weight decay to it."""
    method = small.method(form)
    terms, _ = small.losses(method, small.batch(0), step=0, bank_ready=False)
    sum(terms.values()).backward()
    assert terms["loss_in"].item() == 0
    assert all(p.grad is None for p in method.student.head.parameters())
    assert all(p.grad is not None for p in method.student.fc.parameters())


def test_the_single_network_does_not_read_its_teacher():
    """The teacher is for evaluation: any teacher gives the same terms, and no forward changes its
    statistics.
    """
    values = []
    for scale in (1.0, 3.0):
        method = small.method("single")
        with torch.no_grad():
            for p in method.teacher.net.parameters():
                p *= scale
        terms, output = small.losses(method, small.batch(0), step=0, bank_ready=True)
        values.append([*terms.values(), output.for_update["z"], output.pseudo_label])
        assert method.teacher.net.backbone[1].num_batches_tracked == 0
    assert all(torch.equal(a, b) for a, b in zip(*values))


def test_gradients_of_the_single_network_stop_at_weak_views():
    method, n = small.method("single", threshold=0.0), small.B * small.MU
    torch.manual_seed(1)
    student = small.Fixed(
        torch.randn(small.B + 2 * n, small.C).double(), torch.randn(small.B + 2 * n, small.D).double()
    )
    method.bank.z.copy_(torch.eye(small.D).repeat(2, 1)[: small.K])
    terms, _ = small.losses(method, small.batch(0), student, step=0, bank_ready=True)
    sum(terms.values()).backward()
    x, weak, strong = slice(0, small.B), slice(small.B, small.B + n), slice(small.B + n, None)
    logits, z = student.logits.grad, student.z.grad
    assert logits[x].any(1).all() and logits[strong].any(1).all() and z[strong].any(1).all()
    assert not logits[weak].any() and not z[weak].any() and not z[x].any()


@pytest.mark.parametrize("form", ["ema", "single"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("temperature", [0.01, 0.1])
@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_losses_and_gradients_are_finite(form, dtype, temperature, scale):
    """Low precision, low temperature, and logits so far apart that probabilities underflow."""
    method = small.method(
        form, small.network(dtype=torch.float32), st=temperature, tt=temperature, threshold=0.0
    )
    torch.manual_seed(1)
    method.bank.z.copy_(torch.nn.functional.normalize(torch.randn(small.K, small.D), dim=1))
    n = small.B * (1 + small.MU * (2 if form == "single" else 1))
    student = small.Fixed((scale * torch.randn(n, small.C)).to(dtype), torch.randn(n, small.D).to(dtype))
    if form == "ema":
        weak = small.Fixed((scale * torch.randn(n, small.C)).to(dtype), torch.randn(n, small.D).to(dtype))
        weak.requires_grad_(False)
        method.teacher.forward = lambda groups, step: [weak(x) for x in groups]
    with torch.no_grad():  # strong views exactly on a bank row, and exactly opposite to it
        student.z[-2], student.z[-1] = method.bank.z[0].to(dtype), -method.bank.z[0].to(dtype)
    for step in range(3):
        terms, output = small.losses(
            method, small.batch(0, torch.float32), student, step=step, bank_ready=True
        )
        sum(terms.values()).backward()
        assert reference.all_finite(terms.values()), terms
        assert all(term.dtype == torch.float32 for term in terms.values())
        assert torch.isfinite(output.pseudo_label).all()
        torch.testing.assert_close(output.pseudo_label.sum(1), torch.ones(small.B * small.MU))
        assert torch.isfinite(student.logits.grad).all() and torch.isfinite(student.z.grad).all()
        output.for_update["z"] = output.for_update["z"].float()
        method.update(output)
        assert torch.isfinite(method.align.ring).all()


def test_a_class_that_underflows_everywhere_stays_finite():
    """p is exactly 0 in float32 for class 1 in every image, so its prior is 0 too."""
    method = small.method("ema", small.network(dtype=torch.float32))
    n = small.B * (1 + small.MU)
    logits = torch.zeros(n, small.C)
    logits[:, 1] = -500
    fixed = small.Fixed(logits, torch.randn(n, small.D))
    method.teacher.forward = lambda groups, step: [fixed(x) for x in groups]
    terms, output = small.losses(method, small.batch(0, torch.float32), fixed, step=0, bank_ready=True)
    assert reference.all_finite(terms.values()) and torch.isfinite(output.pseudo_label).all()


def test_update_writes_the_bank():
    method = small.method("ema", DA=False)
    assert method.align is None
    z = torch.eye(small.D, dtype=torch.float64)[:2]
    method.update(
        StepOutput({}, for_update={"z": z, "y": torch.tensor([3, 2]), "index": torch.tensor([7, 2])})
    )
    assert torch.equal(method.bank.z[[7, 2]], z) and method.bank.labels[7] == 3 and method.bank.labels[2] == 2


def test_build_method_passes_every_setting_on():
    config = Config(
        method="simmatch_single",
        backbone="small_encoder",
        cls=small.C,
        dim=small.D,
        DA=True,
        da_len=7,
        bank_m=0.25,
        ema_m=0.5,
        lambda_u=2.0,
        lambda_in=3.0,
        threshold=0.6,
        st=0.2,
        tt=0.3,
        c_smooth=0.8,
    )
    method = build_method(config, 1, small.LABELS)
    assert method.align.ring.shape == (7, small.C) and method.bank.m == 0.25
    assert method.teacher.bn_mode == "copy" and method.teacher.momentum == 0.5
    assert all(
        getattr(method, name) == getattr(config, name)
        for name in ("lambda_u", "lambda_in", "threshold", "st", "tt", "c_smooth")
    )
    config.method = "simmatch"
    for config.eman, bn in ((False, "shuffle"), (True, "average")):
        method = build_method(config, 1, small.LABELS)
        assert method.teacher.bn_mode == bn and method.bank.m == 0.25


@pytest.mark.parametrize("form", small.FORMS)
def test_losses_are_means_over_two_strong_views_of_different_sizes(form):
    net = small.network()
    method, (_, slow, settings) = small.method(form, net), small.FORMS[form]
    slow = slow(net, method.bank.z, small.LABELS, small.C, **settings, **SGD)
    optimizer = torch.optim.SGD(
        parameter_groups(method.student, SGD["wd"], SGD.get("no_decay_bn", False)),
        lr=SGD["lr"],
        momentum=SGD["momentum"],
        nesterov=SGD.get("nesterov", False),
    )
    for step in range(3):
        batches = [small.batch(10 * step + rank, sides=(6, 5)) for rank in range(2)]
        output = train_step(method, method.student, optimizer, batches, step=step, bank_ready=step > 0)
        expected, pseudo, mask = slow.step(batches, step, first_epoch=step == 0)
        terms = {name: term.item() for name, term in output.losses.items()}
        assert terms == pytest.approx(expected, rel=1e-10) and output.mask.tolist() == sum(mask, [])
        for mine, theirs in ((method.student, slow.student), (method.teacher.net, slow.teacher)):
            torch.testing.assert_close(mine.state_dict(), theirs.state_dict(), rtol=1e-10, atol=1e-12)


def test_virtual_ranks_split_every_strong_view():
    batch = small.batch(0, sides=(6, 5))
    halves = split_virtual_ranks(batch._replace(x=batch.x[:2], y=batch.y[:2], index=batch.index[:2]), 2)
    assert [tuple(view.shape) for view in halves[1].u_strong] == [(3, 1, 6, 6), (3, 1, 5, 5)]
    for v in range(2):
        assert torch.equal(torch.cat([half.u_strong[v] for half in halves]), batch.u_strong[v])
