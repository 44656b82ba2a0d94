"""The bytes that ranks send each other, as the kernel counts them: none depend on the size of the bank, and
an image is sent at most once.
"""

import socket
from statistics import mean

import pytest
from conftest import ROOT

from benchmark import traffic
from util.config import parse


def test_every_byte_sent_is_counted_once_whether_it_is_read_or_not():
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as client,
    ):
        peer, _ = server.accept()
        with peer:
            before = traffic.bytes_sent()
            client.setblocking(False)
            sent = client.send(bytes(10**8))  # more than the buffers hold: a part is not sent yet
            assert sent > 10**5 and traffic.bytes_sent() - before == sent
            read = 0
            while read < sent:
                read += len(peer.recv(2**20))
            peer.sendall(bytes(1003))
            assert traffic.bytes_sent() - before == sent + 1003


def test_the_ledger_counts_bytes_of_a_nested_call_for_the_inner_cause():
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as client,
    ):

        class Sender:
            def inner(self, n):
                client.sendall(bytes(n))

            def outer(self, n):
                client.sendall(bytes(10 * n))
                self.inner(n)
                client.sendall(bytes(100 * n))

        ledger = traffic.Ledger()
        ledger.wrap(Sender, "inner", "features")
        ledger.wrap(Sender, "outer", "other")
        client.sendall(bytes(5))
        Sender().outer(1)
        assert ledger.take() == {
            **dict.fromkeys(traffic.CAUSES, 0),
            "features": 1,
            "other": 110,
            "unassigned": 5,
        }
        assert set(ledger.take().values()) == {0}


@pytest.mark.slow(6)
@pytest.mark.parametrize("teacher", ["ema", "eman"])
def test_two_ranks(teacher):
    config = parse(
        [
            "--config",
            str(ROOT / "configs" / "imagenet_10p.yaml"),
            "--backbone",
            "small_encoder",
            "--image-size",
            "32",
            "--cls",
            "10",
            "--eman",
            str(teacher == "eman"),
        ],
        "",
    )
    few, many = traffic.count(2, config, [10, 1000], steps=2)
    assert (
        few["sent"] == many["sent"] and len(few["sent"]) == 4
    )  # every cause, rank and step; the larger bank has 0.5 MB more
    paper = traffic.on_paper(2, config, few)
    assert few["images"] == 48 * 3 * 32 * 32 * 4 and few["gradients"] > 600_000
    for sent in few["sent"]:
        assert sent["unassigned"] == 0
        for cause in (
            "gradients",
            "features",
        ):  # the rest are headers and, for gradients, which parameters were used
            assert paper[cause] <= sent[cause] <= 1.01 * paper[cause] + 1000
        assert sent["other"] <= 10_000  # prior, statistics, the log's means, whether to stop
        if teacher == "ema":
            assert 0 < sent["shuffle-BN out"] <= few["images"]
            assert 0 < sent["shuffle-BN home"] <= 48 * (config.cls + config.dim) * 4 + 1000
        else:
            assert sent["shuffle-BN out"] == sent["shuffle-BN home"] == 0
        assert traffic.share_of_bound(sent, few["images"]) <= 1
    for cause in traffic.CAUSES[:-1]:
        assert paper[cause] == pytest.approx(mean(sent[cause] for sent in few["sent"]), rel=0.25, abs=5000), (
            cause
        )
