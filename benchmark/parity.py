"""Compares the training step with a reference in float64: python benchmark/parity.py [--method NAME …]
[--only ROW …] [--free] [--write docs/results/parity.md]

The references, written with plain loops, are tests/reference.py and, for SimMatchV2, tests/reference_v2.py.
In every mode, each production step starts from the reference's state, cast to the mode's type, on the same
batches. With --free, it continues from its own state, which shows how rounding errors grow; bounds are not
checked then. A row holds the largest relative difference over the steps. For a loss term, it is
|a − b| / |b|; for tensors, max |a − b| / max |b| of the worst tensor; for SGD's momentum, which shows
gradients and weight decay, ‖a − b‖ / ‖b‖ over all parameters together. Exit code 1 if a bound is broken.
"""

import math
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils._pytree import tree_map  # noqa: E402

from benchmark import marked_file  # noqa: E402
from benchmark.digits import machine  # noqa: E402
from benchmark.parity_steps import LABELS, MU, PROBLEMS, SIDE, B, K, Step, settings, trajectory  # noqa: E402
from benchmark.ranks import call_on_ranks  # noqa: E402
from dataset.views import IMAGENET_NORM, photo_view, pipeline  # noqa: E402
from models import Batch, build_method, build_optimizer, configure_execution, train_step  # noqa: E402
from util import dist_utils  # noqa: E402
from util.config import Config  # noqa: E402
from util.errors import Parser, UserError, cli_main  # noqa: E402

MARKS = "<!-- parity of {}: written by benchmark/parity.py -->", "<!-- end of parity of {} -->"
VIEWS = "device views"  # the table whose marks do not name a method
SCALE = 2.0**10  # of the loss in fp16, small enough that the scaler skips no step
TYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
STATES = {"student": "student.", "teacher": "teacher.", "momentum": "momentum."}  # of every method
# These depend on one network. All others depend on the outputs of two networks, or on two terms of a softmax:
# their bound is twice as large.
ONCE = ("bank", "queue_z", "student", "teacher")
ROUNDINGS = 4 * 20  # four in each of ResNet-18's 18 layers and of the head's two


class Mode(NamedTuple):
    """One way to compute the step."""

    name: str
    eman: bool = False
    ranks: int = 1  # of a global step
    processes: int = 1  # which share the ranks
    precision: str = "fp32"
    channels_last: bool = False
    compiled: bool = False
    device: str = "cpu"
    tf32: bool = False  # on a GPU, convolutions round their inputs to 10 bits

    def bound(self, column: str) -> float:
        """fp64: 1e-10; momentum: `gradient_error`; fp32: 1e-5; other types: `rounding_error`."""
        dtype = torch.float16 if self.tf32 else TYPES[self.precision]
        if dtype == torch.float64:
            return 1e-10
        if column == "momentum":
            return gradient_error(dtype)
        return 1e-5 if dtype == torch.float32 else (1 if column in ONCE else 2) * rounding_error(dtype)


def rounding_error(dtype: torch.dtype) -> float:
    """The expected relative error of the worst of some hundred outputs: 36u.

    One rounding has an error of up to u, half the type's eps; 80 independent roundings have sqrt(80)·u; the
    worst of many outputs has four times as much.

    SimMatchV2 needs no other bound. L_ne has the log of n_s, a sum of positive products of the terms of a
    softmax, e_s, with constants of the queue. Nothing cancels, so that the relative error of n_s, which is
    the absolute error of its log, is at most that of the worst term of e_s, as in SimMatch's L_in; L_ne is
    above 1. n_s is far from underflow: e_s is at least exp(−2/t)/R = 3e-11 for t = 0.1 and R up to 64 rows.
    Where rounding exchanges the last of the nearest bank rows for another one, a pseudo-label changes by at
    most about alpha/topn = 0.006, since the smallest of topn weights is at most their mean. In fp16 that is
    below 72u = 0.035, and in float32 it takes two similarities that are equal to 1e-7.
    """
    return 4 * math.sqrt(ROUNDINGS) * torch.finfo(dtype).eps / 2


def gradient_error(dtype: torch.dtype) -> float:
    """The expected relative error of all gradients together.

    An activation that is as close to 0 as its rounding error may change its sign, and its gradient is then
    lost or added. Activations are normal, with a density of 0.4 at 0; the mean of their errors is
    0.8·sqrt(80)·u; 17 layers have a ReLU. This gives sqrt(17·0.4·0.8·9u), and twice that for the worst step.
    In any type, one activation of the last layer may change its sign: one of 2·2·512·12, of which half are
    above 0, has 1/sqrt(12,288) of the norm. small_encoder and SimMatchV2's further views have more.
    """
    flipped = 17 * 0.4 * 0.8 * math.sqrt(ROUNDINGS) * torch.finfo(dtype).eps / 2
    return 2 * math.sqrt(flipped) + 1 / math.sqrt(12288)


def replay(
    mode: Mode, config: Config, steps: Sequence[Step], free: bool = False
) -> Iterator[dict[str, float]]:
    """Run the production steps -> the `differences` of each. All processes of the mode must call it."""
    device, dtype = torch.device(mode.device), torch.float64 if mode.precision == "fp64" else torch.float32
    method = build_method(config, 3, LABELS, mode.ranks * config.mu * B).to(device, dtype)
    configure_execution(method, mode.precision.replace("fp64", "fp32"), mode.channels_last, mode.compiled)
    student = dist_utils.wrap_ddp(method.student)
    optimizer = build_optimizer(config, method.student)
    scaler = torch.amp.GradScaler(device.type, init_scale=SCALE, enabled=mode.precision == "fp16")
    names = dict(method.student.named_parameters())
    per_process = mode.ranks // mode.processes
    own_ranks = slice(dist_utils.rank() * per_process, (dist_utils.rank() + 1) * per_process)
    for k, step in enumerate(steps):
        if k == 0 or not free:
            method.load_state_dict(
                {key: value for key, value in step.before.items() if not key.startswith("momentum.")}
            )
            optimizer.state.clear()
            for name, p in names.items():
                if f"momentum.{name}" in step.before:
                    optimizer.state[p]["momentum_buffer"] = step.before[f"momentum.{name}"].to(p, copy=True)
        batches = [
            Batch(*tree_map(lambda v: v.to(device, dtype if v.is_floating_point() else None), tuple(batch)))
            for batch in step.batches[own_ranks]
        ]
        output = train_step(
            method, student, optimizer, batches, step=k, bank_ready=step.bank_ready, scaler=scaler
        )
        state = method.state_dict() | {
            f"momentum.{name}": optimizer.state[p]["momentum_buffer"]
            for name, p in names.items()
            if optimizer.state[p].get("momentum_buffer") is not None
        }
        assert output.pseudo_label is not None and output.mask is not None  # both methods have them
        yield differences(
            config.method,
            step,
            {name: dist_utils.all_mean(term).item() for name, term in output.losses.items()},
            dist_utils.all_gather(output.pseudo_label),
            dist_utils.all_gather(output.mask),
            state,
        )


def columns(method: str) -> list[str]:
    """The columns of a method's table that have a bound."""
    problem = PROBLEMS[method]
    return [*problem.losses, "pseudo", *problem.states, *STATES]


def differences(
    method: str,
    step: Step,
    terms: dict[str, float],
    pseudo: Tensor,
    mask: Tensor,
    state: dict[str, Tensor],
) -> dict[str, float]:
    """The relative difference of each of the columns; "argmax": the share of pseudo-labels with the same
    class; "flips": the number of images with another mask.

    With a flip, the masked loss and the gradients are not comparable, and their differences are nan.
    """
    problem = PROBLEMS[method]
    out = {name: loss_difference(terms.get(name), step.terms.get(name)) for name in problem.losses}
    out["pseudo"] = relative(pseudo, step.pseudo_label)
    for column, prefix in (problem.states | STATES).items():
        keys = [key for key in step.after if key.startswith(prefix)]
        same = keys and set(keys) == {key for key in state if key.startswith(prefix)}
        out[column] = math.inf
        if same and column == "momentum":
            out[column] = distance([state[key] for key in keys], [step.after[key] for key in keys])
        elif same:
            out[column] = max(relative(state[key], step.after[key]) for key in keys)
    out["argmax"] = (pseudo.cpu().argmax(1) == step.pseudo_label.argmax(1)).double().mean().item()
    out["flips"] = (mask.cpu() != step.mask).sum().item()
    incomparable = (problem.masked_loss, "student", "momentum") if out["flips"] else ()
    return out | dict.fromkeys(incomparable, math.nan)


def loss_difference(a: float | None, b: float | None) -> float:
    """|a − b| / |b|; nan if both steps leave the loss out, inf if only one of them does."""
    if a is None or b is None:
        return math.nan if a is b else math.inf
    return relative(torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64))


def relative(a: Tensor, b: Tensor) -> float:
    """max |a − b| / max |b|; inf if shapes or integers differ."""
    a = a.detach().cpu()
    if a.shape != b.shape or not b.is_floating_point() and not torch.equal(a, b):
        return math.inf
    error, size = (a.double() - b.double()).abs().max().item(), b.double().abs().max().item()
    return 0.0 if error == 0 else error / size if size and math.isfinite(error) else math.inf


def distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """‖a − b‖ / ‖b‖ of all tensors together."""
    x, y = (torch.cat([t.cpu().double().flatten() for t in tensors]) for tensors in (a, b))
    return ((x - y).norm() / y.norm()).nan_to_num(math.inf).item()


def worst(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """The largest differences over the steps; nan where no step was comparable."""
    out = {
        name: max((row[name] for row in rows if not math.isnan(row[name])), default=math.nan)
        for name in rows[0]
    }
    return out | {
        "argmax": sum(row["argmax"] for row in rows) / len(rows),
        "flips": sum(row["flips"] for row in rows),
    }


def holds(mode: Mode, row: dict[str, float]) -> bool:
    names = row.keys() - {"argmax", "flips"}
    return all(row[name] <= mode.bound(name) for name in names)  # nan does not hold


def play(
    mode: Mode, config: Config, steps: Sequence[Step], folder: Path, free: bool
) -> list[dict[str, float]]:
    """`replay` in the mode's number of processes, with gloo between CPUs and NCCL between GPUs."""
    if mode.processes == 1:
        allowed, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, mode.tf32
        out = list(replay(mode, config, steps, free))
        torch.backends.cudnn.allow_tf32 = allowed
        return out
    torch.save((mode, config, list(steps)), folder / "steps.pt")
    call_on_ranks(_rank, mode.processes, folder, free)
    return torch.load(folder / "rows.pt")


def _rank(rank: int, folder: Path, free: bool) -> None:
    mode, config, steps = torch.load(folder / "steps.pt", weights_only=False, mmap=True)
    dist_utils.dist_init(mode.device, 5, 0)
    torch.backends.cudnn.allow_tf32 = mode.tf32
    rows = list(replay(mode, config, steps, free))
    if rank == 0:
        torch.save(rows, folder / "rows.pt")
    dist_utils.dist_end()


def modes() -> list[Mode]:
    gpus = max(2, torch.cuda.device_count())
    out = []
    for eman in (False, True):
        for one in (
            Mode("1 rank, float64", precision="fp64"),
            Mode("1 rank"),
            Mode("2 virtual ranks", ranks=2),
            Mode("2 processes", ranks=2, processes=2),
            Mode("4 ranks on 2 processes", ranks=4, processes=2),
            Mode("4 processes", ranks=4, processes=4),
            Mode("1 rank, bf16", precision="bf16"),
            Mode("1 rank, fp16", precision="fp16"),
            Mode("2 virtual ranks, bf16", ranks=2, precision="bf16"),
            Mode("1 rank, channels-last", channels_last=True),
            Mode("1 rank, compiled", compiled=True),
            Mode("GPU, TF32 off", device="cuda"),
            Mode("GPU, TF32 on", device="cuda", tf32=True),
            Mode("GPU, bf16", device="cuda", precision="bf16"),
            Mode("GPU, fp16", device="cuda", precision="fp16"),
            Mode("GPU, channels-last, bf16", device="cuda", precision="bf16", channels_last=True),
            Mode("GPU, compiled", device="cuda", compiled=True),
            Mode("GPU, 2 virtual ranks", ranks=2, device="cuda"),
            Mode(f"{gpus} GPUs", ranks=gpus, processes=gpus, device="cuda"),
        ):
            out.append(one._replace(name=f"{'eman' if eman else 'ema'}, {one.name}", eman=eman))
    return out


def missing(mode: Mode) -> str | None:
    """Why the mode cannot run on this machine, or None."""
    if mode.device == "cuda" and torch.cuda.device_count() < mode.processes:
        return f"needs {mode.processes} GPU{'s' * (mode.processes > 1)}"
    if mode.device == "cpu" and mode.compiled and not (shutil.which("g++") or shutil.which("clang++")):
        return "needs a C++ compiler"
    return None


def not_run(chosen: Sequence[Mode]) -> list[str]:
    """An empty line and one that names the modes that cannot run here; [] if all of them can."""
    names: dict[str, list[str]] = {}  # by reason; each mode is chosen with both teachers
    for mode in chosen:
        if missing(mode) and not mode.eman:
            names.setdefault(str(missing(mode)), []).append(mode.name.partition(", ")[2])
    reasons = (f"{'; '.join(modes)} ({reason})" for reason, modes in names.items())
    return ["", f"Not run, with either teacher: {'; '.join(reasons)}."] if names else []


def line(mode: Mode, row: dict[str, float], judged: bool) -> str:
    cells = [f"{value:.0e}" for name, value in row.items() if name not in ("argmax", "flips")]
    cells += [f"{100 * row['argmax']:.0f} %", f"{row['flips']:.0f}"]
    verdict = ("holds" if holds(mode, row) else "BROKEN") if judged else "–"
    return f"| {mode.name} | {' | '.join(cells)} | {mode.bound('bank'):.0e} | {verdict} |"


def views(name: str, n: int = 8) -> tuple[float, float, float]:
    """Compare the same random view with device views on and off, on the CPU -> the share of equal values, the
    share within one level of 255, and the mean difference in levels.
    """
    rng, pixels = np.random.default_rng(0), []
    for _ in range(n):
        rough = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(
            (500, 375), Image.Resampling.BICUBIC
        )
        # Photographs have noise and saturated parts.
        noisy = np.asarray(rough).astype(int) * 3 // 2 - 60 + rng.integers(-12, 12, (375, 500, 3))
        pixels.append(Image.fromarray(noisy.clip(0, 255).astype(np.uint8)))
    both = [photo_view(pipeline(name), IMAGENET_NORM, on_device) for on_device in (False, True)]
    u = rng.random((n, both[0].num_uniforms))
    std = torch.tensor(IMAGENET_NORM[1]).view(3, 1, 1)
    off, on = (
        view.device_transform(view.cpu_transform(pixels, u)) * std * 255 for view in both
    )  # [n, 3, 224, 224]
    levels = (on - off).abs().round()
    return (
        (levels == 0).double().mean().item(),
        (levels <= 1).double().mean().item(),
        levels.double().mean().item(),
    )


def view_table() -> tuple[list[str], bool]:
    """The lines that compare the views, and whether they all hold their bounds."""
    lines = [
        "| view | equal values | within a level of 255 | mean difference in levels | bound | |",
        "|---|---|---|---|---|---|",
    ]
    hold = True
    for name in ("weak", "moco", "rand", "eval"):
        equal, near, mean = views(name)
        fine = near > 0.99 and mean < 0.1
        hold &= fine
        lines.append(
            f"| {name}, device views on against off | {100 * equal:.2f} % | {100 * near:.2f} % | "
            f"{mean:.4f} | 99 %, 0.1 | {'holds' if fine else 'BROKEN'} |"
        )
    return [*lines, "", f"8 images per view. {machine()}."], hold


def step_table(
    method: str, backbone: str, chosen: Sequence[Mode], n: int, free: bool
) -> tuple[list[str], bool]:
    """Print and return the lines that compare a method's steps, and whether they all hold their bounds."""
    names = columns(method)
    lines = [f"| mode | {' | '.join(names)} | same class | flips | bound | |"]
    lines.append("|---" * (len(names) + 5) + "|")
    hold = True
    print("\n".join([f"{method}:", *lines]), flush=True)
    for eman, ranks in sorted({(mode.eman, mode.ranks) for mode in chosen}):
        group = [mode for mode in chosen if (mode.eman, mode.ranks) == (eman, ranks)]  # with the same steps
        config = settings(backbone, method, eman=eman)
        steps = trajectory(config, ranks, n) if not all(map(missing, group)) else []
        for mode in group:
            if missing(mode):
                continue
            with tempfile.TemporaryDirectory() as folder:
                row = worst(play(mode, config, steps, Path(folder), free))
            hold &= free or holds(mode, row)
            lines.append(line(mode, row, not free))
            print(lines[-1], flush=True)
    sides = ", ".join(map(str, PROBLEMS[method].sides))
    rest = [
        *not_run(chosen),
        "",
        f"{method}, n = {n} steps per row, {backbone}, {SIDE} px (strong views: {sides}), C = 10, K = {K}, "
        f"D = 16, {B} labeled and {MU * B} unlabeled images per rank. {machine()}.",
    ]
    print("\n".join([*rest, ""]))
    return [*lines, *rest], hold


def main() -> None:
    parser = Parser(__doc__ or "")
    parser.add_argument("--method", nargs="+", default=list(PROBLEMS), choices=list(PROBLEMS))
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--backbone", default="small_encoder", choices=("small_encoder", "resnet18_encoder"))
    parser.add_argument(
        "--only", nargs="+", metavar="ROW", help="compute only the rows of these names (without ema or eman)"
    )
    parser.add_argument(
        "--free",
        action="store_true",
        help="do not start every step from the reference's state; bounds are not checked",
    )
    parser.add_argument("--write", type=Path, help="put the tables between their marks in this file")
    args = parser.parse_args()
    if args.steps < 2:
        raise UserError(
            "--steps must be at least 2: the first step is of the first epoch, without L_in or L_ne"
        )
    marks = {
        name: (MARKS[0].format(name), MARKS[1].format(name))
        for name in (*(f"{method}, {args.backbone}" for method in args.method), VIEWS)
    }
    if args.write:
        for own in marks.values():
            marked_file.check(args.write, own)
    chosen = [mode for mode in modes() if not args.only or mode.name.partition(", ")[2] in args.only]
    if not chosen:
        raise UserError(
            "--only knows " + "; ".join(dict.fromkeys(mode.name.partition(", ")[2] for mode in modes()))
        )
    lines, hold = view_table()
    print("\n".join([*lines, ""]))
    tables = {VIEWS: lines}
    for method in args.method:
        name = f"{method}, {args.backbone}"
        tables[name], fine = step_table(method, args.backbone, chosen, args.steps, args.free)
        hold &= fine
    if args.write:
        for name, lines in tables.items():
            marked_file.put(args.write, marks[name], "\n".join(lines))
    if not hold:
        raise SystemExit(1)


if __name__ == "__main__":
    cli_main(main)
