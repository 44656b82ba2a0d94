"""Bytes that a rank sends in a step, by cause: python benchmark/traffic.py [--ranks 2 4] [--paper 8 64 512]

Starts gloo ranks on this machine that train on random images with the settings of --config, and counts the
bytes that each rank sends over its TCP connections: the payload, with gloo's headers, without those of TCP.
Further flags are those of train_semi.py, such as --batch-size 4. Needs Linux 4.19 or later. --paper starts no
ranks, but prints the predictions of docs/SCALE.md.

gradients: sent between the start of the student's forward and the end of backward. features: embeddings,
labels and indices for the bank. shuffle-BN out: images, sent to the rank that normalizes them; shuffle-BN
home: logits and embeddings, sent back. other: the prior, EMAN's BN statistics, and the control messages of
--print-freq, which are sent after every step. unassigned: the rest.
"""

import functools
import json
import os
import resource
import socket
import statistics
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# DDP warns that all parameters are used; in the first epoch they are not.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import torch  # noqa: E402

from benchmark.digits import machine  # noqa: E402
from benchmark.ranks import call_on_ranks  # noqa: E402
from models import Batch, Method, build_method, build_optimizer, train_step  # noqa: E402
from util import dist_utils, process_groups  # noqa: E402
from util.config import Config, parse  # noqa: E402
from util.errors import Parser, UserError, cli_main  # noqa: E402
from util.run.metrics import Meter  # noqa: E402
from util.shuffle import Shuffle  # noqa: E402

CAUSES = ("gradients", "features", "shuffle-BN out", "shuffle-BN home", "other", "unassigned")
# Offsets in linux/tcp.h: tcpi_notsent_bytes; tcpi_bytes_sent and tcpi_bytes_retrans; the end of these.
NOT_SENT, SENT_AND_RESENT, LENGTH = 144, 200, 216


def bytes_sent() -> int:
    """Payload that this process has written to its TCP connections so far, even if it is not sent yet."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as s:
                if s.family not in (socket.AF_INET, socket.AF_INET6) or s.type != socket.SOCK_STREAM:
                    continue
                info = s.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 512)
        except OSError:
            continue  # the connection was closed in the meantime
        if len(info) < LENGTH:
            raise UserError(
                f"this kernel ({os.uname().release}) does not count the bytes of a connection: "
                "use Linux 4.19 or later"
            )
        sent, resent = struct.unpack_from("=QQ", info, SENT_AND_RESENT)
        total += sent - resent + struct.unpack_from("=I", info, NOT_SENT)[0]
    return total


class Ledger:
    """Assigns every byte that this process sends to the cause that is current when it is sent."""

    def __init__(self) -> None:
        self.cause, self.seen = "unassigned", bytes_sent()
        self.bytes = dict.fromkeys(CAUSES, 0)

    def switch(self, cause: str) -> str:
        """Make `cause` the current cause and return the previous one."""
        before, now = self.cause, bytes_sent()
        self.bytes[before] += now - self.seen
        self.cause, self.seen = cause, now
        return before

    def take(self) -> dict[str, int]:
        """Bytes by cause since the last call."""
        self.switch(self.cause)
        out, self.bytes = self.bytes, dict.fromkeys(CAUSES, 0)
        return out

    def wrap(self, owner: Any, name: str, cause: str) -> None:
        """Assign what the function `name` of `owner`, a module or a class, sends to `cause`."""
        call = getattr(owner, name)

        @functools.wraps(call)
        def counted(*args: Any) -> Any:
            before = self.switch(cause)
            result = call(*args)
            self.switch(before)
            return result

        setattr(owner, name, counted)

    def wrap_context(self, owner: Any, name: str, cause: str) -> None:
        """Assign what is sent within a context that the function `name` of `owner` returns to `cause`."""
        call: Callable = getattr(owner, name)

        @contextmanager
        def counted(*args: Any) -> Iterator[None]:
            before = self.switch(cause)
            with call(*args):
                yield
            self.switch(before)

        setattr(owner, name, counted)


def wrap_communication() -> Ledger:
    """A ledger of what the communication functions send that models/ and train_semi.py call."""
    ledger = Ledger()
    for name, cause in (("scatter", "shuffle-BN out"), ("gather", "shuffle-BN home")):
        ledger.wrap(Shuffle, name, cause)
    for name, cause in (
        ("all_gather", "features"),
        ("all_mean", "other"),
        ("broadcast_buffers", "other"),
        ("any_rank", "other"),
    ):
        ledger.wrap(dist_utils, name, cause)
    ledger.wrap_context(dist_utils, "sync_gradients", "gradients")
    return ledger


def random_batch(config: Config, labels: torch.Tensor, step: int) -> Batch:
    """A batch of noise, which differs between ranks and steps."""
    random = torch.Generator().manual_seed(1000 * step + dist_utils.rank())
    index = torch.randint(len(labels), (config.batch_size,), generator=random)  # [B]

    def images(n: int) -> torch.Tensor:
        return torch.randn(n, 3, config.image_size, config.image_size, generator=random)  # [n, 3, h, w]

    n_u = config.mu * config.batch_size
    return Batch(images(config.batch_size), labels[index], index, images(n_u), (images(n_u),))


def train(config: Config, bank: int, steps: int, ledger: Ledger) -> dict[str, Any]:
    """Train for `steps` steps after the first epoch -> "sent": bytes by cause of each step; and `sizes`."""
    torch.manual_seed(config.seed)
    labels = torch.arange(bank) % config.cls  # [K]
    method = build_method(config, 3, labels).train()
    optimizer = build_optimizer(config, method.student)
    student, meter, sent = dist_utils.wrap_ddp(method.student), Meter(), []
    ledger.take()
    for step in range(steps):
        output = train_step(
            method, student, optimizer, [random_batch(config, labels, step)], step=step, bank_ready=True
        )
        meter.add(step, output.losses, output.pseudo_label, output.mask, None)
        dist_utils.any_rank(False)  # the message of --print-freq: whether to stop
        meter.take_means()
        sent.append(ledger.take())
    return {"sent": sent, **sizes(config, method)}


def sizes(config: Config, method: Method) -> dict[str, int]:
    """Bytes in fp32 of the student's gradients, of its buffers (BN statistics), and of the images that go
    through a rank's teacher.
    """
    return {
        "gradients": 4 * sum(p.numel() for p in method.student.parameters()),
        "buffers": sum(buffer.nbytes for buffer in method.student.buffers()),
        "images": (1 + config.mu) * config.batch_size * 3 * config.image_size**2 * 4,
    }


def one_rank(rank: int, config: Config, banks: list[int], steps: int, folder: str) -> None:
    """Train with each of `banks` (K) and write the bytes and the memory to folder/<rank>.json."""
    dist_utils.dist_init("cpu", config.timeout_minutes, config.port)
    if process_groups.HEARTBEAT:
        process_groups.HEARTBEAT.stop()  # its bytes would count
    ledger, results = wrap_communication(), []
    for bank in banks:
        results.append(train(config, bank, steps, ledger))
        results[-1]["memory"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    Path(folder, f"{rank}.json").write_text(json.dumps(results))
    dist_utils.any_rank(False)  # a barrier: no rank closes its connections while another one counts
    dist_utils.dist_end()


def count(world: int, config: Config, banks: list[int], steps: int) -> list[dict[str, Any]]:
    """Start `world` ranks -> for each of `banks` (K), "sent": bytes by cause of every step of every rank;
    "memory": the largest memory of a rank so far, in bytes; and `sizes`.
    """
    with tempfile.TemporaryDirectory() as folder:
        call_on_ranks(one_rank, world, config, banks, steps, folder)
        ranks = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(world)]
    return [
        {
            **results[0],
            "sent": [sent for result in results for sent in result["sent"]],
            "memory": max(result["memory"] for result in results),
        }
        for results in zip(*ranks)
    ]


def on_paper(world: int, config: Config, size: dict[str, int]) -> dict[str, float]:
    """The predicted bytes that a rank sends in a step, by cause, without the headers of messages; see
    docs/SCALE.md.
    """
    away = (world - 1) / world  # the share of rows that go to another rank
    n = (1 + config.mu) * config.batch_size
    return {
        "gradients": 2 * away * size["gradients"],  # a ring all-reduce
        "features": (world - 1) * config.batch_size * (4 * config.dim + 16),  # z, label, index
        "shuffle-BN out": 0 if config.eman else away * size["images"],
        "shuffle-BN home": 0 if config.eman else away * n * 4 * (config.cls + config.dim),
        "other": 2 * away * 4 * config.cls + (away * size["buffers"] if config.eman else 0),
        "unassigned": 0,
    }


def share_of_bound(sent: dict[str, float], images: int) -> float:
    """All bytes of a rank in a step, divided by 1.1 × gradients + 1 × its images. It must be at most 1."""
    return sum(sent.values()) / (1.1 * sent["gradients"] + images)


def row(world: int, teacher: str, bank: str, sent: dict[str, float], share: float) -> str:
    values = [*(sent[cause] for cause in CAUSES), sum(sent.values())]
    numbers = " | ".join(f"{value:,.0f}" for value in values)
    return f"| {world} | {teacher} | {bank} | {numbers} | {share:.3f} |"


def main() -> None:
    parser = Parser((__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--ranks",
        nargs="+",
        type=int,
        default=[2],
        help="numbers of gloo ranks; the last line shows their memory",
    )
    parser.add_argument("--bank", nargs="+", type=int, default=[13_000, 128_000], help="labeled images (K)")
    parser.add_argument("--teacher", nargs="+", choices=["ema", "eman"], default=["ema", "eman"])
    parser.add_argument("--steps", type=int, default=2, help="number of steps")
    parser.add_argument(
        "--paper",
        nargs="+",
        type=int,
        default=[],
        metavar="RANKS",
        help="print predictions for these numbers of ranks",
    )
    parser.add_argument("--config", default=str(ROOT / "configs" / "imagenet_10p.yaml"))
    args, rest = parser.parse_known_args()
    config = parse(["--config", args.config, *rest], "")
    if min(args.ranks + args.paper) < 2 or min(args.bank) < 1 or args.steps < 1:
        raise UserError("--ranks and --paper must be 2 or more, --bank and --steps 1 or more")

    print(
        f"{config.backbone}, C = {config.cls}, D = {config.dim}, {config.batch_size} + "
        f"{config.mu * config.batch_size} images of {config.image_size} px per rank\n\n"
        f"| ranks | teacher | K | {' | '.join(CAUSES)} | sum | of the bound |\n"
        f"|---|---|---|{'---|' * (len(CAUSES) + 2)}",
        flush=True,
    )
    for world in args.paper or args.ranks:
        for teacher in args.teacher:
            config.eman = teacher == "eman"
            if args.paper:
                size = sizes(config, build_method(config, 3, torch.zeros(1)))
                sent = on_paper(world, config, size)
                print(row(world, teacher, "any", sent, share_of_bound(sent, size["images"])), flush=True)
                continue
            for bank, result in zip(args.bank, count(world, config, args.bank, args.steps)):
                mean = {cause: statistics.mean(sent[cause] for sent in result["sent"]) for cause in CAUSES}
                share = max(share_of_bound(sent, result["images"]) for sent in result["sent"])
                print(row(world, teacher, f"{bank:,}", mean, share), flush=True)
                size = result
    print(
        "\nBytes per step and rank. The bound is 1.1 × gradients + 1 × the rank's images "
        f"({size['images']:,} bytes in fp32). The student's gradients are {size['gradients']:,} bytes, its "
        f"buffers {size['buffers']:,}."
    )
    if not args.paper:
        print(
            f"Means over the ranks and steps (--steps {args.steps}); the largest share of the bound of any "
            f"rank and step. The largest of the last ranks took {size['memory'] / 1e9:.1f} GB. {machine()}, "
            f"Linux {os.uname().release}, gloo."
        )


if __name__ == "__main__":
    cli_main(main)
