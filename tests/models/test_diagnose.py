"""`diagnose` changes nothing, and returns the loss terms of the step that follows."""

import copy
import math

import pytest
import torch
from torch.utils._pytree import tree_map

from benchmark.same_run import first_difference
from models import diagnose, split_virtual_ranks, train_step
from models.fixmatch import FixMatch
from models.supervised import Supervised
from tests.models import small


def methods():
    yield from ((form, lambda form=form: small.method(form)) for form in small.FORMS)
    net = small.network
    yield (
        "fixmatch",
        lambda: FixMatch(net(), lambda_u=10.0, threshold=0.4, ema_m=0.9, eman=False).double().train(),
    )
    yield (
        "fixmatch, eman",
        lambda: FixMatch(net(), lambda_u=10.0, threshold=0.4, ema_m=0.9, eman=True).double().train(),
    )
    yield "supervised", lambda: Supervised(net(), ema_m=0.9).double().train()


METHODS = dict(methods())


def run(make, ranks, diagnosed):
    """(state, gradients and terms after three steps of `ranks` virtual ranks; the diagnostics before each
    step, if `diagnosed`).
    """
    torch.manual_seed(7)
    method, diagnostics, terms = make(), [], []
    optimizer = torch.optim.SGD(method.student.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    for step in range(3):
        batches = [small.batch(10 * step + rank) for rank in range(ranks)]
        if diagnosed:
            diagnostics.append(diagnose(method, batches, step=step, bank_ready=step > 0))
        terms.append(
            train_step(method, method.student, optimizer, batches, step=step, bank_ready=step > 0).losses
        )
    return {
        "state": method.state_dict(),
        "gradients": [p.grad for p in method.student.parameters()],
        "terms": terms,
        "random": torch.get_rng_state(),
        "modes": [m.training for m in method.modules()],
    }, diagnostics


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", METHODS)
def test_diagnose_changes_no_bit(name, ranks):
    without, _ = run(METHODS[name], ranks, diagnosed=False)
    with_, diagnostics = run(METHODS[name], ranks, diagnosed=True)
    for key in ("gradients", "terms"):
        for i, (a, b) in enumerate(zip(without.pop(key), with_.pop(key), strict=True)):
            assert first_difference(a, b, f"{key} {i}") == ""
    assert first_difference(without, with_, "state") == ""
    assert len(diagnostics) == 3


@pytest.mark.parametrize("name", METHODS)
def test_it_returns_the_terms_of_the_step_that_follows(name):
    after, diagnostics = run(METHODS[name], 1, diagnosed=True)
    for terms, diag in zip(after["terms"], diagnostics, strict=True):
        assert {key: diag[key].item() for key in terms} == {key: value.item() for key, value in terms.items()}


@pytest.mark.parametrize("form", small.FORMS)
def test_gradient_norms_are_those_of_a_loss_of_one_term(form):
    def method(**weights):
        return small.method(form, **{"threshold": 0.3, "lambda_u": 0.0, "lambda_in": 0.0, **weights})

    torch.manual_seed(7)
    whole = method(lambda_u=10.0, lambda_in=5.0)
    whole.bank.z.copy_(
        torch.nn.functional.normalize(torch.randn(small.K, small.D), dim=1)
    )  # a temporal ensemble starts as zeros
    batch = small.batch(3)
    diag = diagnose(whole, [batch], step=0, bank_ready=True)
    for name, weights in (("grad_x", {}), ("grad_u", {"lambda_u": 10.0}), ("grad_in", {"lambda_in": 5.0})):
        one = method(**weights)
        one.load_state_dict(whole.state_dict())
        terms, _ = small.losses(one, batch, bank_ready=True)
        terms[name.replace("grad", "loss")].backward()
        squares = [(p.grad**2).sum().item() for p in one.student.parameters() if p.grad is not None]
        assert diag[name].item() == pytest.approx(math.sqrt(sum(squares)), rel=1e-12) and diag[name] > 0
    scaled = diagnose(whole, [batch], step=0, bank_ready=True, scale=1024.0)
    assert {key: scaled[key].tolist() for key in scaled} == {
        key: pytest.approx(diag[key].tolist(), rel=1e-12) for key in diag
    }


def test_a_term_that_is_not_on_yet_has_no_gradient():
    diag = diagnose(small.method(), [small.batch(3)], step=0, bank_ready=False)
    assert "grad_in" not in diag and "q_entropy" not in diag and diag["loss_in"] == 0


def test_entropy_drift_and_prior_by_plain_loops():
    torch.manual_seed(7)
    method, batch = small.method(), small.batch(3)
    diag = diagnose(method, [batch], step=0, bank_ready=True)
    (target,) = copy.deepcopy(method).targets([batch], method.student, step=0)
    bank, entropies, cosines = method.bank.z.tolist(), [], []
    for z in target.z_uw.tolist():
        e = [math.exp(sum(a * b for a, b in zip(z, row)) / method.tt) for row in bank]
        entropies.append(-sum(v / sum(e) * math.log(v / sum(e)) for v in e))
    for z, i in zip(target.z_x.tolist(), batch.index.tolist()):
        cosines.append(sum(a * b for a, b in zip(z, bank[i])) / math.hypot(*z) / math.hypot(*bank[i]))
    assert diag["q_entropy"].item() == pytest.approx(sum(entropies) / len(entropies), rel=1e-10)
    assert 0 < diag["q_entropy"] < math.log(small.K)
    assert diag["bank_drift"].item() == pytest.approx(1 - sum(cosines) / len(cosines), rel=1e-10)
    torch.testing.assert_close(
        diag["prior"] / diag["prior"].sum(), target.mean_p
    )  # the ring holds only this step


def test_of_several_virtual_ranks_the_first_is_diagnosed():
    torch.manual_seed(7)
    method, whole = small.method("eman"), small.batch(3)
    doubled = type(whole)(*tree_map(lambda field: torch.cat([field, field.flip(0)]), tuple(whole)))
    first, both = (
        diagnose(method, batches, step=0, bank_ready=True)
        for batches in ([whole], split_virtual_ranks(doubled, 2))
    )
    assert both["loss_x"] == first["loss_x"] and both["grad_x"] == first["grad_x"]
