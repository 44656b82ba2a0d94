"""A look at a step changes nothing, and tells what the step then does."""

import copy
import math

import pytest
import torch

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


def run(make, ranks, look):
    """State, gradients and terms after three steps of `ranks` virtual ranks; and what was seen before each,
    if `look`.
    """
    torch.manual_seed(7)
    method, seen, terms = make(), [], []
    optimizer = torch.optim.SGD(method.student.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    for step in range(3):
        batches = [small.batch(10 * step + rank) for rank in range(ranks)]
        if look:
            seen.append(diagnose(method, batches, step=step, bank_ready=step > 0))
        terms.append(
            train_step(method, method.student, optimizer, batches, step=step, bank_ready=step > 0)[0]
        )
    return {
        "state": method.state_dict(),
        "gradients": [p.grad for p in method.student.parameters()],
        "terms": terms,
        "random": torch.get_rng_state(),
        "modes": [m.training for m in method.modules()],
    }, seen


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", METHODS)
def test_a_look_changes_no_bit(name, ranks):
    without, _ = run(METHODS[name], ranks, look=False)
    with_, seen = run(METHODS[name], ranks, look=True)
    for key in ("gradients", "terms"):
        for i, (a, b) in enumerate(zip(without.pop(key), with_.pop(key), strict=True)):
            assert first_difference(a, b, f"{key} {i}") == ""
    assert first_difference(without, with_, "state") == ""
    assert len(seen) == 3


@pytest.mark.parametrize("name", METHODS)
def test_it_tells_the_terms_of_the_step_that_follows(name):
    after, seen = run(METHODS[name], 1, look=True)
    for terms, looked in zip(after["terms"], seen, strict=True):
        assert {key: looked[key].item() for key in terms} == {
            key: value.item() for key, value in terms.items()
        }


@pytest.mark.parametrize("form", small.FORMS)
def test_gradient_norms_are_those_of_a_loss_of_one_term(form):
    def method(**weights):
        return small.method(form, **{"threshold": 0.3, "lambda_u": 0.0, "lambda_in": 0.0, **weights})

    torch.manual_seed(7)
    whole = method(lambda_u=10.0, lambda_in=5.0)
    whole.bank.z.copy_(
        torch.nn.functional.normalize(torch.randn(small.K, small.D), dim=1)
    )  # a temporal ensemble starts at 0
    batch = small.batch(3)
    looked = diagnose(whole, [batch], step=0, bank_ready=True)
    for name, weights in (("grad_x", {}), ("grad_u", {"lambda_u": 10.0}), ("grad_in", {"lambda_in": 5.0})):
        one = method(**weights)
        one.load_state_dict(whole.state_dict())
        terms, _ = small.losses(one, batch, bank_ready=True)
        terms[name.replace("grad", "loss")].backward()
        squares = [(p.grad**2).sum().item() for p in one.student.parameters() if p.grad is not None]
        assert looked[name].item() == pytest.approx(math.sqrt(sum(squares)), rel=1e-12) and looked[name] > 0
    scaled = diagnose(whole, [batch], step=0, bank_ready=True, scale=1024.0)
    assert {key: scaled[key].tolist() for key in scaled} == {
        key: pytest.approx(looked[key].tolist(), rel=1e-12) for key in looked
    }


def test_a_term_that_is_not_on_yet_has_no_gradient():
    looked = diagnose(small.method(), [small.batch(3)], step=0, bank_ready=False)
    assert (
        "grad_in" not in looked
        and "q_entropy" not in looked
        and looked["loss_in"] == 0
        and looked["bank_rows"] == small.K
    )


def test_entropy_drift_and_prior_by_plain_loops():
    torch.manual_seed(7)
    method, batch = small.method(), small.batch(3)
    looked = diagnose(method, [batch], step=0, bank_ready=True)
    (target,) = copy.deepcopy(method).targets([batch], method.student, step=0)
    bank, entropies, cosines = method.bank.z.tolist(), [], []
    for z in target.z_uw.tolist():
        e = [math.exp(sum(a * b for a, b in zip(z, row)) / method.tt) for row in bank]
        entropies.append(-sum(v / sum(e) * math.log(v / sum(e)) for v in e))
    for z, i in zip(target.z_x.tolist(), batch.index.tolist()):
        cosines.append(sum(a * b for a, b in zip(z, bank[i])) / math.hypot(*z) / math.hypot(*bank[i]))
    assert looked["q_entropy"].item() == pytest.approx(sum(entropies) / len(entropies), rel=1e-10)
    assert 0 < looked["q_entropy"] < math.log(small.K)
    assert looked["bank_drift"].item() == pytest.approx(1 - sum(cosines) / len(cosines), rel=1e-10)
    torch.testing.assert_close(
        looked["prior"] / looked["prior"].sum(), target.prior
    )  # the ring holds this step alone


def test_of_several_ranks_the_first_is_told():
    torch.manual_seed(7)
    method, whole = small.method("eman"), small.batch(3)
    doubled = type(whole)(*(torch.cat([field, field.flip(0)]) for field in whole))
    first, both = (
        diagnose(method, batches, step=0, bank_ready=True)
        for batches in ([whole], split_virtual_ranks(doubled, 2))
    )
    assert both["loss_x"] == first["loss_x"] and both["grad_x"] == first["grad_x"]
