"""The cost of a SimMatchV2 step as a multiple of a SimMatch step: python benchmark/step.py [--turns 5]
[--side 224] [--labeled 12811] [--device cuda] [--parts]

The recipe's step of one rank: ResNet-50, 8 labeled and 40 unlabeled random images, five strong views against
one; the queue of SimMatchV2 has 81,920 rows, all written. Both methods take steps in turn. Predicted is the
ratio of the pixels that pass a network, of which those that have a backward count three times. --parts
instead times the parts of SimMatchV2's loss by themselves, and the node propagation in three ways.
"""

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmark.digits import machine  # noqa: E402
from models import Batch, Method, build_method, build_optimizer, configure_execution, train_step  # noqa: E402
from models.simmatchv2 import propagate, series_length  # noqa: E402
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
        queue.p.copy_(torch.softmax(torch.randn_like(queue.p), dim=1))
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


def parts(config: Config, labeled: int, device: torch.device, turns: int) -> None:
    """Print the times of the parts of the loss, and the memory of the state."""
    torch.manual_seed(0)
    n, C, D, R = B * MU, config.cls, config.dim, config.k * B * MU * RANKS

    def unit(rows: int) -> Tensor:
        return F.normalize(torch.randn(rows, D, device=device), dim=1)  # [rows, D]

    z, p = unit(n), torch.softmax(torch.randn(n, C, device=device), dim=1)  # [n, D], [n, C]
    bank, labels = unit(labeled), torch.arange(labeled, device=device) % C  # [K, D], [K]
    queue, queue_p = unit(R), torch.softmax(torch.randn(R, C, device=device), dim=1)  # [R, D], [R, C]
    z_s = unit(5 * n).requires_grad_()  # [5n, D]

    def edges() -> None:
        e_w = torch.softmax(z @ queue.T / config.t, dim=1)  # [n, R]
        log_e_s = torch.log_softmax(z_s @ queue.T / config.t, dim=1)  # [5n, R]
        loss = -(e_w * log_e_s.unflatten(0, (-1, n))).sum(-1).mean()
        n_s = log_e_s.exp() @ queue_p  # [5n, C]
        (loss - (p * n_s.clamp_min(1e-38).log().unflatten(0, (-1, n))).sum(-1).mean()).backward()

    def explicit(solve: bool, alpha: float) -> None:
        nearest = (z @ bank.T).topk(config.topn, dim=1).indices  # [n, topn]
        nodes = torch.cat([z[:, None], bank[nearest]], dim=1)  # [n, topn+1, D]
        similarities = nodes @ nodes.transpose(1, 2) / config.t  # [n, topn+1, topn+1]
        similarities.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
        system = torch.eye(config.topn + 1, device=device) - alpha * similarities.softmax(dim=2)
        first = F.one_hot(torch.zeros(n, dtype=torch.long), config.topn + 1).float()[..., None].to(device)
        if solve:
            torch.linalg.solve_ex(system.transpose(1, 2), first)
        else:
            torch.linalg.inv_ex(system)

    calls: dict[str, Callable[[], object]] = {"edges of six views, with their backward": edges}
    for alpha in (0.1, 0.9):
        terms = series_length(alpha, torch.float32)
        calls |= {
            f"propagation, alpha {alpha}: series of {terms} terms (used)": partial(
                propagate, z, p, bank, labels, topn=config.topn, t=config.t, alpha=alpha
            ),
            f"propagation, alpha {alpha}: one row solved": partial(explicit, True, alpha),
            f"propagation, alpha {alpha}: inverse": partial(explicit, False, alpha),
        }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(turns + 1):
        for name, call in calls.items():
            if (taken := seconds(call, device)) and turn:
                times[name].append(taken)
    for name, values in times.items():
        print(f"{1000 * statistics.median(values):8.1f} ms  {name}")
    print(f"medians of {turns} turns; topn {config.topn}, {n} images, K = {labeled:,}, R = {R:,}")
    megabytes = {
        "bank": bank.nbytes + labels.nbytes,
        "queue": queue.nbytes + queue_p.nbytes,
        "edges of a strong view [muB, R], of which the backward keeps two for each view": 4 * n * R,
        "similarities of the graph [muB, topn+1, topn+1]": 4 * n * (config.topn + 1) ** 2,
    }
    for name, size in megabytes.items():
        print(f"{size / 1e6:8.1f} MB  {name}")
    if device.type == "cuda":
        print(f"{torch.cuda.max_memory_allocated() / 1e6:8.1f} MB  most of the device's memory in use")


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
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(args.turns + 1):
        for name, step in steps.items():
            if (taken := seconds(step, device)) and turn:
                times[name].append(taken)
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
