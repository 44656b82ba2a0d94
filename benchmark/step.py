"""The cost of a SimMatchV2 step as a multiple of a SimMatch step: python benchmark/step.py [--turns 5]
[--side 224] [--labeled 12811] [--device cuda] [--parts]

The recipe's step of one rank: ResNet-50, 8 labeled and 40 unlabeled random images, five strong views against
one; the queue of SimMatchV2 has 81,920 rows, all written. Both methods take steps in turn. Predicted is the
ratio of the pixels that pass a network, of which those that have a backward count three times. --parts
instead times the parts of SimMatchV2's loss by themselves, and the node propagation in three ways.
"""

import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from benchmark.digits import machine  # noqa: E402
from models import Batch, Method, build_method, build_optimizer, configure_execution, train_step  # noqa: E402
from models.simmatchv2 import SimMatchV2, Targets, propagate, series_length  # noqa: E402
from util.config import Config, parse  # noqa: E402
from util.errors import Parser, UserError, cli_main  # noqa: E402

B, MU, RANKS = 8, 5, 8  # of the recipe; this process is one of the ranks
SHARES = (224, 192, 160, 120, 96)  # sides of the strong views, of 224


def recipe(name: str) -> Config:
    return parse(["--config", str(ROOT / "configs" / f"{name}.yaml")], "")


def seconds(call: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def full_queue(method: Method) -> None:
    """Write every row of the queue, if the method has one."""
    if queue := getattr(method, "queue", None):
        queue.p.uniform_()
        queue.p /= queue.p.sum(dim=1, keepdim=True)  # in place, so that no temporary sets the peak of memory
        queue.filled = len(queue.p)


def stepper(config: Config, sides: list[int], labeled: int, device: torch.device) -> Callable[[], object]:
    """Return a function that takes a training step on the same random images."""
    torch.manual_seed(0)
    labels = torch.arange(labeled) % config.cls  # [K]
    method = build_method(config, 3, labels, B * MU * RANKS).to(device)
    configure_execution(method, "fp32", channels_last=True, compiled=False)
    full_queue(method)
    optimizer = build_optimizer(config, method.student)
    weak, n = sides[0], B * MU
    x, u_weak = (torch.randn(count, 3, weak, weak, device=device) for count in (B, n))
    strong = tuple(torch.randn(n, 3, side, side, device=device) for side in sides)
    index = torch.arange(B)
    batch = Batch(x, labels[index].to(device), index.to(device), u_weak, strong)

    def step() -> object:
        return train_step(method, method.student, optimizer, [batch], step=0, bank_ready=True)

    return step


def predicted(sides: list[int]) -> float:
    """The pixels of a SimMatchV2 step over those of a SimMatch step."""
    n, area = B * MU, [side**2 for side in sides]
    one_view = (B + n) * area[0] * (1 + 3)  # the teacher's forward, and the student's with its backward
    return (one_view + 3 * n * sum(area[1:])) / one_view


class Outputs(nn.Module):
    """A student whose forwards return the given outputs one after the other."""

    def __init__(self, outputs: Iterable[tuple[Tensor, Tensor]]):
        super().__init__()
        self.outputs = iter(outputs)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return next(self.outputs)


def peak_megabytes(device: torch.device) -> float:
    """Return the most memory so far: of the device, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def parts(config: Config, labeled: int, device: torch.device, turns: int) -> None:
    """Print the times of the loss without the networks, and of propagation in three ways; and the memory."""
    torch.manual_seed(0)
    n, C, D, views = B * MU, config.cls, config.dim, len(SHARES)
    config.backbone = "small_encoder"
    labels = torch.arange(labeled) % C  # [K]
    method = build_method(config, 3, labels, n * RANKS).to(device)
    assert isinstance(method, SimMatchV2)
    bank, queue = method.bank, method.queue

    def unit(rows: int) -> Tensor:
        return F.normalize(torch.randn(rows, D, device=device), dim=1)  # [rows, D]

    z, p = unit(n), torch.softmax(torch.randn(n, C, device=device), dim=1)  # [n, D], [n, C]
    logits_s = torch.randn(B + views * n, C, device=device, requires_grad=True)  # [B+5n, C]
    z_s = unit(B + views * n).requires_grad_()  # [B+5n, D]
    sizes = [B + n, *[n] * (views - 1)]
    index = torch.arange(B, device=device)
    batch = Batch(z[:B], index, index, z, (z,) * views)
    targets = Targets(z[:B], z, p, None)
    full_queue(method)

    def loss() -> None:
        student = Outputs(zip(logits_s.split(sizes), z_s.split(sizes)))
        losses = method.losses(batch, targets, student, bank_ready=True).losses
        torch.stack([*losses.values()]).sum().backward()

    def explicit(solve: bool, alpha: float) -> None:
        nearest = (z @ bank.z.T).topk(config.topn, dim=1).indices  # [n, topn]
        nodes = torch.cat([z[:, None], bank.z[nearest]], dim=1)  # [n, topn+1, D]
        similarities = nodes @ nodes.transpose(1, 2) / config.t  # [n, topn+1, topn+1]
        similarities.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
        system = torch.eye(config.topn + 1, device=device) - alpha * similarities.softmax(dim=2)
        first = F.one_hot(torch.zeros(n, dtype=torch.long, device=device), config.topn + 1).float()
        if solve:
            torch.linalg.solve_ex(system.transpose(1, 2), first[..., None])
        else:
            torch.linalg.inv_ex(system)

    before = peak_megabytes(device)
    loss()
    temporaries = peak_megabytes(device) - before
    calls: dict[str, Callable[[], object]] = {"the loss of five views, with its backward": loss}
    for alpha in (0.1, 0.9):
        terms, settings = series_length(alpha, torch.float32), dict(topn=config.topn, t=config.t, alpha=alpha)
        calls |= {
            f"propagation, alpha {alpha}: series of {terms} terms (used)": partial(
                propagate, z, p, bank.z, bank.labels, **settings
            ),
            f"propagation, alpha {alpha}: one row solved": partial(explicit, True, alpha),
            f"propagation, alpha {alpha}: inverse": partial(explicit, False, alpha),
        }
    for name, values in in_turn(calls, device, turns).items():
        print(f"{1000 * statistics.median(values):8.1f} ms  {name}")
    print(f"medians of {turns} turns; topn {config.topn}, {n} images, K = {labeled:,}, R = {len(queue.z):,}")
    print(f"{sum(value.nbytes for value in bank.buffers()) / 1e6:8.1f} MB  bank")
    print(f"{sum(value.nbytes for value in queue.buffers()) / 1e6:8.1f} MB  queue")
    print(f"{temporaries:8.1f} MB  most memory in use during the first loss and backward, beyond that before")


def in_turn(
    calls: dict[str, Callable[[], object]], device: torch.device, turns: int
) -> dict[str, list[float]]:
    """Call each in turn -> the seconds of each, without the first turn."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(turns + 1):
        for name, call in calls.items():
            if (taken := seconds(call, device)) and turn:
                times[name].append(taken)
    return times


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--turns", type=int, default=5, help="steps of each method, after one that warms up")
    parser.add_argument("--side", type=int, default=224, help="of the largest view, in pixels")
    parser.add_argument("--labeled", type=int, default=12_811, help="number of labeled images (K)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--parts", action="store_true", help="time the parts of SimMatchV2's loss")
    args = parser.parse_args()
    if min(args.turns, args.side, args.labeled) < 1:
        raise UserError("--turns, --side and --labeled must be 1 or more")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no GPU here; leave the flag out")
    device = torch.device(args.device)
    if args.parts:
        parts(recipe("simmatchv2_1p"), args.labeled, device, args.turns)
        print(machine())
        return
    sides = [round(args.side * share / 224) for share in SHARES]
    steps = {
        "simmatch": stepper(recipe("imagenet_1p"), sides[:1], args.labeled, device),
        "simmatchv2": stepper(recipe("simmatchv2_1p"), sides, args.labeled, device),
    }
    times = in_turn(steps, device, args.turns)
    for name, values in times.items():
        print(f"{name}: {statistics.median(values):.3f} s a step ({min(values):.3f}–{max(values):.3f})")
    ratio = statistics.median(b / a for a, b in zip(*times.values()))
    print(
        f"ratio {ratio:.2f}, predicted {predicted(sides):.2f} from the pixels; medians of {args.turns} steps "
        f"of each in turn, channels-last, fp32, {B} + {B * MU} images of {args.side} px, "
        f"K = {args.labeled:,}; {machine()}"
    )


if __name__ == "__main__":
    cli_main(main)
