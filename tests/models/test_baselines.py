"""FixMatch, FixMatch-EMAN and supervised against plain loops."""

import pytest
import reference
import torch

from models.fixmatch import FixMatch
from models.supervised import Supervised
from tests.models import small


@pytest.mark.parametrize("eman", [False, True])
@pytest.mark.parametrize("sides", [(6,), (6, 5)])
def test_fixmatch_equals_the_loop(eman, sides):
    method = FixMatch(small.network(), lambda_u=3.0, threshold=0.5, ema_m=0.9, eman=eman).double().train()
    with torch.no_grad():
        for p in method.teacher.net.parameters():
            p *= 2  # so that student and teacher label the weak views differently
    batch, network = small.batch(0, sides=sides), small.network().train()
    first, *others = batch.u_strong
    logits, _ = network(torch.cat([batch.x, first] if eman else [batch.x, first, batch.u_weak]))
    weak = method.teacher.net.eval()(batch.u_weak)[0] if eman else logits[-len(batch.u_weak) :]
    method.train()
    strong = [logits[small.B : small.B + len(batch.u_weak)], *(network(view)[0] for view in others)]
    confidences = sorted(max(float(v) for v in reference.softmax(row.detach())) for row in weak)
    method.threshold = sum(confidences[2:4]) / 2  # three of the six are confident
    total, masks = 0.0, []
    for weak_i, *strong_i in zip(weak, *strong, strict=True):
        p = [float(v) for v in reference.softmax(weak_i.detach())]
        masks.append(1.0 if max(p) >= method.threshold else 0.0)
        for row in strong_i:
            total += masks[-1] * -torch.log(reference.softmax(row)[p.index(max(p))])
    terms, output = small.losses(method, batch, bank_ready=False)
    assert output.mask.tolist() == masks and 0 < sum(masks) < len(masks)
    torch.testing.assert_close(terms["loss_u"], 3.0 * total / (len(weak) * len(sides)), rtol=1e-10, atol=0)
    assert set(terms) == {"loss_x", "loss_u"}


def test_supervised_is_the_labeled_cross_entropy():
    method, batch = Supervised(small.network(), ema_m=0.9).double().train(), small.batch(0)
    logits, _ = small.network().train()(batch.x)
    expected = sum(-torch.log(reference.softmax(row)[int(y)]) for row, y in zip(logits, batch.y)) / small.B
    terms, output = small.losses(method, batch, bank_ready=False)
    assert set(terms) == {"loss_x"} and output.pseudo_label is None and output.mask is None
    torch.testing.assert_close(terms["loss_x"], expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    "make",
    [
        lambda n: FixMatch(n, lambda_u=1.0, threshold=0.5, ema_m=0.9, eman=False),
        lambda n: Supervised(n, ema_m=0.9),
    ],
)
def test_an_evaluation_teacher_averages_bn_statistics(make):
    method = make(small.network()).double().train()
    terms, output = small.losses(method, small.batch(0), bank_ready=False)
    method.update(output)
    mine, theirs = method.teacher.net.backbone[1], method.student.backbone[1]
    assert theirs.num_batches_tracked == 1 == mine.num_batches_tracked
    torch.testing.assert_close(mine.running_mean, 0.1 * theirs.running_mean)
