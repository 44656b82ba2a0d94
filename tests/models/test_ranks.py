"""Two real gloo ranks against the loops over ranks: shuffle-BN, the prior of the global batch, bank rows of all ranks."""
import os
import socket
import time

import pytest
import torch
import torch.multiprocessing as mp

from tests.models import small
from util import dist_utils

SGD = dict(lr=0.05, momentum=0.9, wd=1e-4, nesterov=True)
STEPS = 4


def run_rank(rank, world, port, form, folder):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))
    dist_utils.dist_init("cpu")
    net = small.network()
    torch.manual_seed(5)
    method = small.method(form, net)
    student = dist_utils.parallel(method.student)
    optimizer = torch.optim.SGD(method.student.parameters(), lr=SGD["lr"], momentum=SGD["momentum"],
                                weight_decay=SGD["wd"], nesterov=SGD["nesterov"])
    out = []
    for step in range(STEPS):
        terms, fresh = method.losses(small.batch(10 * step + rank), student, step=step, bank_ready=step > 0)
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
        method.update(fresh)
        out.append(({name: dist_utils.all_mean(term.detach()).item() for name, term in terms.items()},
                    fresh.pseudo, fresh.mask))
    dist_utils.broadcast_buffers(method.student)
    torch.save((out, method.state_dict()), f"{folder}/{rank}.pt")
    dist_utils.dist_end()


def spawn(function, world, *args, seconds=120):
    """function(rank, world, port, *args) in `world` processes; ranks that hang are ended and fail the test."""
    port = next(p for p in range(10000 + os.getpid() % 10000, 30000) if free(p))     # below the ports that systems hand out
    ranks = mp.spawn(function, (world, port, *args), nprocs=world, join=False)
    deadline = time.monotonic() + seconds
    while not ranks.join(timeout=1):
        if time.monotonic() > deadline:
            for process in ranks.processes:
                process.kill()
            pytest.fail(f"{world} ranks did not finish in {seconds} s")


def free(port):
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) != 0


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("form", small.FORMS)
def test_ranks_equal_the_loops(world, form, tmp_path):
    spawn(run_rank, world, form, str(tmp_path))
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]

    net = small.network()
    torch.manual_seed(5)
    bank, (_, slow, settings) = small.method(form, net).bank.z, small.FORMS[form]
    slow = slow(net, bank, small.LABELS, small.C, **settings, **SGD)
    for step in range(STEPS):
        batches = [small.batch(10 * step + rank) for rank in range(world)]
        expected, pseudo, mask = slow.step(batches, step, first_epoch=step == 0)
        for rank in range(world):
            terms, got_pseudo, got_mask = results[rank][0][step]
            assert terms == pytest.approx(expected, rel=1e-10)
            torch.testing.assert_close(got_pseudo, torch.tensor(pseudo[rank], dtype=torch.float64), rtol=1e-10, atol=1e-14)
            assert got_mask.tolist() == mask[rank]

    first = results[0][1]
    for _, state in results[1:]:        # ranks agree on everything but the statistics that BN collects on each
        for key in first:
            if "teacher" not in key or "running" not in key or form == "eman":
                assert torch.equal(state[key], first[key]), key
    torch.testing.assert_close(first["bank.z"], torch.stack(slow.bank), rtol=1e-10, atol=1e-12)
    for name, net in (("student", slow.student), ("teacher.net", slow.teacher)):
        for key, value in net.state_dict().items():
            torch.testing.assert_close(first[f"{name}.{key}"], value, rtol=1e-10, atol=1e-12, msg=f"{name}.{key}")


def test_alone_every_collective_is_the_identity():
    x = torch.randn(4, 2)
    shuffle = dist_utils.Shuffle(4, seed=0)
    for f in (dist_utils.all_gather, dist_utils.all_mean, dist_utils.all_sum, shuffle.scatter, shuffle.gather):
        assert torch.equal(f(x), x)
