"""Real gloo ranks, and virtual ones, against the loops over ranks: shuffle-BN, the prior of the global batch,
and the bank rows of all ranks; and the means over ranks of an interrupted log.
"""

import os
import time

import pytest
import torch
import torch.multiprocessing as mp
from conftest import free_port

from benchmark.same_run import first_difference
from models import train_step
from tests.models import small
from util import dist_utils
from util.run.metrics import Meter
from util.shuffle import Shuffle

SGD = dict(lr=0.05, momentum=0.9, wd=1e-4, nesterov=True)
STEPS = 4
FORMS = (*small.FORMS, "v2", "v2 eman")


def run_rank(rank, world, port, ranks, folder):
    """A process of `world`: some steps of each form of SimMatch with its share of the ranks."""
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    dist_utils.dist_init("cpu", 2, 0)
    own = range(rank * ranks // world, (rank + 1) * ranks // world)  # this process's virtual ranks
    results = {form: steps(form, own, ranks) for form in FORMS}
    torch.save({**results, "meter": meters(rank)}, f"{folder}/{rank}.pt")
    dist_utils.dist_end()


def method_of(form, net, ranks):
    torch.manual_seed(5)
    if form.startswith("v2"):
        return small.method_v2(net, ranks, eman="eman" in form)
    return small.method(form, net)


def steps(form, own, ranks):
    """[(terms, pseudo-label, mask) of each step], state_dict."""
    method = method_of(form, small.network_v2() if form.startswith("v2") else small.network(), ranks)
    student = dist_utils.wrap_ddp(method.student)
    optimizer = torch.optim.SGD(
        method.student.parameters(),
        lr=SGD["lr"],
        momentum=SGD["momentum"],
        weight_decay=SGD["wd"],
        nesterov=SGD["nesterov"],
    )
    out = []
    for step in range(STEPS):
        batches = [batch(step, rank) for rank in own]
        output = train_step(method, student, optimizer, batches, step=step, bank_ready=step > 0)
        means = {name: dist_utils.all_mean(term).item() for name, term in output.losses.items()}
        out.append((means, output.pseudo_label, output.mask))
    dist_utils.broadcast_buffers(method.student)
    return out, method.state_dict()


def meters(rank):
    """The states of two meters with the same values, of which the second was saved and restored twice."""
    whole, restored = Meter(), Meter()
    random = torch.Generator().manual_seed(rank)
    for step in range(9):
        terms = {name: torch.rand((), generator=random) for name in ("loss_x", "loss_u", "loss_in")}
        pseudo_label = torch.rand(7, 3, generator=random)
        for meter in (whole, restored):
            meter.add(step, terms, pseudo_label, torch.ones(7), None)
        if step in (1, 4):
            state, restored = restored.state_dict(), Meter()
            restored.load_state_dict(state)
    return whole.state_dict(), restored.state_dict()


def batch(step, rank):
    """In every second step all ranks have one bank row in common, as at the end of a pass over the labeled
    images: the last rank's write holds. The last steps have two strong views, of different sizes.
    """
    own = small.batch(10 * step + rank, sides=(6, 5) if step >= 2 else (6,))
    if rank and step % 2:
        first = small.batch(10 * step)
        own.index[0], own.y[0] = first.index[0], first.y[0]
    return own


def spawn(function, world, *args, seconds=300):
    """Call function(rank, world, port, *args) in `world` processes. Ranks that hang are killed and fail the
    test.
    """
    ranks = mp.spawn(function, (world, free_port(), *args), nprocs=world, join=False)
    deadline = time.monotonic() + seconds
    while not ranks.join(timeout=1):
        if time.monotonic() > deadline:
            for process in ranks.processes:
                process.kill()
            pytest.fail(f"{world} ranks did not finish in {seconds} s")


@pytest.mark.slow(12)
@pytest.mark.parametrize(
    "processes, ranks", [(3, 3), (2, 4), (1, 4)], ids=["processes", "both", "virtual ranks"]
)
def test_ranks_equal_the_loops(processes, ranks, tmp_path):
    """A rank for each process; several in each; all in one. Every rank has BN of its own batch."""
    spawn(run_rank, processes, ranks, str(tmp_path))
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(processes)]
    for form in FORMS:
        compare(form, [result[form] for result in results], ranks)
    for whole, restored in (result["meter"] for result in results):
        assert first_difference(whole, restored, "meter") == ""
        assert whole["rows"].shape == (9, 5) and whole["counts"].sum() == 2 * 9 * 7 * processes


def compare(form, results, ranks):
    net = small.network_v2() if form.startswith("v2") else small.network()
    method = method_of(form, net, ranks)
    if form.startswith("v2"):
        slow = small.reference_of_v2(net, method, "eman" in form, **SGD)
    else:
        _, slow, settings = small.FORMS[form]
        slow = slow(net, method.bank.z, small.LABELS, small.C, **settings, **SGD)
    for step in range(STEPS):
        expected, pseudo, mask = slow.step(
            [batch(step, rank) for rank in range(ranks)], step, first_epoch=step == 0
        )
        got_pseudo, got_mask = (
            [row for result in results for row in result[0][step][i].tolist()] for i in (1, 2)
        )
        for result in results:
            terms = result[0][step][0]
            assert terms == pytest.approx({name: expected[name] for name in terms}, rel=1e-10)
            assert all(expected[name] == 0 for name in expected.keys() - terms.keys())
        torch.testing.assert_close(
            torch.tensor(got_pseudo, dtype=torch.float64),
            torch.tensor(pseudo, dtype=torch.float64).flatten(0, 1),
            rtol=1e-10,
            atol=1e-14,
        )
        assert got_mask == sum(mask, [])

    first = results[0][1]
    for _, state in results[1:]:  # processes agree on everything but the statistics that BN collects on each
        for key in first:
            if "teacher" not in key or "running" not in key or form.endswith("eman"):
                assert torch.equal(state[key], first[key]), key
    if form.startswith("v2"):
        return small.compare_v2(method, first, slow)
    torch.testing.assert_close(first["bank.z"], torch.stack(slow.bank), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        first["align.ring"],
        torch.tensor([[float(v) for v in row] for row in slow.ring], dtype=torch.float64),
        rtol=1e-10,
        atol=1e-14,
    )
    for name, net in (("student", slow.student), ("teacher.net", slow.teacher)):
        for key, value in net.state_dict().items():
            torch.testing.assert_close(
                first[f"{name}.{key}"], value, rtol=1e-10, atol=1e-12, msg=f"{name}.{key}"
            )


def test_alone_every_collective_is_the_identity():
    x = torch.randn(4, 2)
    shuffle = Shuffle(4, 1, seed=0, device=x.device)
    for f in (dist_utils.all_gather, dist_utils.all_mean, dist_utils.all_sum):
        assert torch.equal(f(x), x)
    assert shuffle.scatter([x])[0] is x and shuffle.gather([x])[0] is x


def test_virtual_ranks_exchange_rows_and_get_them_back():
    groups = list(torch.arange(24.0).view(3, 4, 2))
    shuffle = Shuffle(4, 3, seed=0, device=groups[0].device)
    mixed = shuffle.scatter(groups)
    assert not torch.equal(torch.cat(list(mixed)), torch.cat(groups))
    assert sorted(torch.cat(list(mixed))[:, 0].tolist()) == torch.cat(groups)[:, 0].tolist()
    assert torch.equal(torch.cat(list(shuffle.gather(mixed))), torch.cat(groups))
