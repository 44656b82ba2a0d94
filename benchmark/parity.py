"""The training step against plain loops in float64: python benchmark/parity.py [--backbone resnet18_encoder]
[--free] [--write docs/results/parity.md]

The reference is tests/reference.py. Every mode of the production step starts each step from the reference's
state, cast to the mode's type, on the same batches; --free lets it run on from its own state, which shows how
rounding grows, and judges nothing. A row holds the largest relative difference over the steps: |a − b| / |b|
of a loss term; of tensors, the largest |a − b| of one by the largest |b| of the same one, the worst of them;
of SGD's momentum, which shows gradients and weight decay, the norm of a − b by that of b, over all parameters
together. Exit code 1 if a bound is broken.
"""

import math
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Optional

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.multiprocessing as mp  # noqa: E402
from PIL import Image  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmark.digits import machine  # noqa: E402
from benchmark.parity_steps import LABELS, SIDE, B, K, Step, settings, trajectory  # noqa: E402
from dataset.views import IMAGENET_NORM, photo_view, pipeline  # noqa: E402
from models import Batch, build_method, configure_execution, parameter_groups, train_step  # noqa: E402
from util import dist_utils  # noqa: E402
from util.config import Config  # noqa: E402
from util.errors import Parser, UserError, cli_main  # noqa: E402

MARKS = "<!-- parity of {}: written by benchmark/parity.py -->", "<!-- end of parity of {} -->"
SCALE = 2.0**10  # of the loss in fp16: small enough that no step of this size is left out
TYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LOSSES = ("loss_x", "loss_u", "loss_in")
STATES = {
    "prior": ("align.",),
    "bank": ("bank.",),
    "student": ("student.",),
    "teacher": ("teacher.",),
    "momentum": ("momentum.",),
}
COLUMNS = (*LOSSES, "pseudo", *STATES)
TWICE = (*LOSSES, "pseudo", "prior")  # two networks' outputs, or two ends of a softmax, enter
ROUNDINGS = 4 * 20  # four in each of ResNet-18's 18 layers and the head's two


class Mode(NamedTuple):
    """A way to compute the step."""

    name: str
    eman: bool = False
    ranks: int = 1  # of a global step
    processes: int = 1  # that share them
    precision: str = "fp32"
    channels_last: bool = False
    compiled: bool = False
    device: str = "cpu"
    tf32: bool = False  # on a GPU: convolutions round their inputs to 10 bits

    def bound(self, column: str) -> float:
        """From the type alone: fp64 1e-10, fp32 1e-5, otherwise by `rounding`; momentum's by `turned`."""
        dtype = torch.float16 if self.tf32 else TYPES[self.precision]
        if dtype == torch.float64:
            return 1e-10
        if column == "momentum":
            return turned(dtype)
        return 1e-5 if dtype == torch.float32 else (2 if column in TWICE else 1) * rounding(dtype)


def rounding(dtype: torch.dtype) -> float:
    """Relative error of the largest of some hundred outputs. Each rounding errs by up to u, half the type's
    eps; 80 of them one after the other, independent, by sqrt(80)·u; the largest of many by four times that:
    36u.
    """
    return 4 * math.sqrt(ROUNDINGS) * torch.finfo(dtype).eps / 2


def turned(dtype: torch.dtype) -> float:
    """Relative error of all gradients together. An activation as near to 0 as its rounding error may fall on
    the other side of its ReLU, and its gradient is lost or comes in whole. Activations are normal, 0.4 of
    them in a unit around 0; their errors are 0.8·sqrt(80)·u in the mean; 17 layers have a ReLU:
    sqrt(17·0.4·0.8·9u), and twice that for the worst step. In any type one may turn in the last layer, where
    1 of 2·2·512·12 (small: 4·4·128·12), half of them above 0, is 1/sqrt(12,288) of the norm.
    """
    return 2 * math.sqrt(17 * 0.4 * 0.8 * math.sqrt(ROUNDINGS) * torch.finfo(dtype).eps / 2) + 1 / math.sqrt(
        12288
    )


def replay(
    mode: Mode, config: Config, steps: Sequence[Step], free: bool = False
) -> Iterator[dict[str, float]]:
    """Differences of each step, on every process of the mode; all of them must call it."""
    device, dtype = torch.device(mode.device), torch.float64 if mode.precision == "fp64" else torch.float32
    method = build_method(config, 3, LABELS).to(device, dtype)
    configure_execution(method, mode.precision.replace("fp64", "fp32"), mode.channels_last, mode.compiled)
    student = dist_utils.wrap_ddp(method.student)
    optimizer = torch.optim.SGD(
        parameter_groups(method.student, config.wd, config.no_decay_bn),
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
    )
    scaler = torch.amp.GradScaler(device.type, init_scale=SCALE, enabled=mode.precision == "fp16")
    names = dict(method.student.named_parameters())
    here = mode.ranks // mode.processes
    mine = slice(dist_utils.rank() * here, (dist_utils.rank() + 1) * here)
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
            Batch(*(field.to(device, dtype if field.is_floating_point() else None) for field in batch))
            for batch in step.batches[mine]
        ]
        terms, output = train_step(
            method, student, optimizer, batches, step=k, bank_ready=step.bank_ready, scaler=scaler
        )
        state = method.state_dict() | {
            f"momentum.{name}": optimizer.state[p]["momentum_buffer"]
            for name, p in names.items()
            if optimizer.state[p].get("momentum_buffer") is not None
        }
        yield differences(
            step,
            {name: dist_utils.all_mean(term).item() for name, term in terms.items()},
            dist_utils.all_gather(output.pseudo_label),
            dist_utils.all_gather(output.mask),
            state,
        )


def differences(
    step: Step, terms: dict[str, float], pseudo: Tensor, mask: Tensor, state: dict[str, Tensor]
) -> dict[str, float]:
    """By column; `argmax`: share of pseudo-labels with the same class; `flips`: images on the other side of
    the threshold.

    A flip makes L_u, and so gradients, another number altogether: there is nothing to compare then (nan).
    """
    out = {
        name: relative(
            torch.tensor(terms[name], dtype=torch.float64), torch.tensor(value, dtype=torch.float64)
        )
        for name, value in step.terms.items()
    }
    out["pseudo"] = relative(pseudo, step.pseudo_label)
    for column, starts in STATES.items():
        keys = [key for key in step.after if key.startswith(starts)]
        same = keys and set(keys) == {key for key in state if key.startswith(starts)}
        out[column] = math.inf
        if same and column == "momentum":
            out[column] = distance([state[key] for key in keys], [step.after[key] for key in keys])
        elif same:
            out[column] = max(relative(state[key], step.after[key]) for key in keys)
    out["argmax"] = (pseudo.cpu().argmax(1) == step.pseudo_label.argmax(1)).double().mean().item()
    out["flips"] = (mask.cpu() != step.mask).sum().item()
    return out | (dict.fromkeys(("loss_u", "student", "momentum"), math.nan) if out["flips"] else {})


def relative(a: Tensor, b: Tensor) -> float:
    """max |a − b| / max |b|; whole numbers must be equal."""
    a = a.detach().cpu()
    if a.shape != b.shape or not b.is_floating_point() and not torch.equal(a, b):
        return math.inf
    error, size = (a.double() - b.double()).abs().max().item(), b.double().abs().max().item()
    return 0.0 if error == 0 else error / size if size and math.isfinite(error) else math.inf


def distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """‖a − b‖ / ‖b‖ of all tensors together."""
    a, b = (torch.cat([x.cpu().double().flatten() for x in tensors]) for tensors in (a, b))
    return ((a - b).norm() / b.norm()).nan_to_num(math.inf).item()


def worst(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Over steps; nan where no step could be compared."""
    out = {
        name: max((row[name] for row in rows if not math.isnan(row[name])), default=math.nan)
        for name in COLUMNS
    }
    return out | {
        "argmax": sum(row["argmax"] for row in rows) / len(rows),
        "flips": sum(row["flips"] for row in rows),
    }


def holds(mode: Mode, row: dict[str, float]) -> bool:
    return all(row[name] <= mode.bound(name) for name in COLUMNS)  # nan holds nothing


def play(
    mode: Mode, config: Config, steps: Sequence[Step], folder: Path, free: bool
) -> list[dict[str, float]]:
    """`replay` in as many processes as the mode has: gloo between CPUs, NCCL between GPUs."""
    if mode.processes == 1:
        allowed, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, mode.tf32
        out = list(replay(mode, config, steps, free))
        torch.backends.cudnn.allow_tf32 = allowed
        return out
    torch.save((mode, config, list(steps)), folder / "steps.pt")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(_rank, (mode.processes, port, folder, free), nprocs=mode.processes)
    return torch.load(folder / "rows.pt")


def _rank(rank: int, world: int, port: int, folder: Path, free: bool) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
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
    """Why a mode cannot run here."""
    if mode.device == "cuda" and torch.cuda.device_count() < mode.processes:
        return f"needs {mode.processes} GPU{'s' * (mode.processes > 1)}"
    if mode.device == "cpu" and mode.compiled and not (shutil.which("g++") or shutil.which("clang++")):
        return "needs a C++ compiler"
    return None


def not_run(chosen: Sequence[Mode]) -> list[str]:
    """One line of text, after an empty one, that names the modes that cannot run here; [] if all of them can."""
    names: dict[str, list[str]] = {}  # by reason; each mode is chosen with both teachers
    for mode in chosen:
        if missing(mode) and not mode.eman:
            names.setdefault(str(missing(mode)), []).append(mode.name.partition(", ")[2])
    reasons = (f"{'; '.join(modes)} ({reason})" for reason, modes in names.items())
    return ["", f"Not run, with either teacher: {'; '.join(reasons)}."] if names else []


def line(mode: Mode, row: dict[str, float], judged: bool) -> str:
    cells = [f"{row[name]:.0e}" for name in COLUMNS] + [f"{100 * row['argmax']:.0f} %", f"{row['flips']:.0f}"]
    bounds = f"{mode.bound('bank'):.0e}"
    return f"| {mode.name} | {' | '.join(cells)} | {bounds} | {('holds' if holds(mode, row) else 'BROKEN') if judged else '–'} |"


def views(name: str, n: int = 8) -> tuple[float, float, float]:
    """The same random view with device views on and off, on the CPU: share of equal values, and within one
    level of 255, the mean difference in levels.
    """
    rng, pixels = np.random.default_rng(0), []
    for _ in range(n):
        rough = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(
            (500, 375), Image.Resampling.BICUBIC
        )
        noisy = (
            np.asarray(rough).astype(int) * 3 // 2 - 60 + rng.integers(-12, 12, (375, 500, 3))
        )  # with saturated parts
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


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--backbone", default="small_encoder", choices=("small_encoder", "resnet18_encoder"))
    parser.add_argument(
        "--only", nargs="+", metavar="ROW", help="rows of these names, without the teacher's kind"
    )
    parser.add_argument(
        "--free",
        action="store_true",
        help="do not start every step from the reference's state; judges nothing",
    )
    parser.add_argument("--write", type=Path, help="put the table between its marks in this file")
    args = parser.parse_args()
    if args.steps < 2:
        raise UserError("--steps must be at least 2: the first is of the first epoch, without L_in")
    start, end = (mark.format(args.backbone) for mark in MARKS)
    if args.write and not all(mark in args.write.read_text(encoding="utf-8") for mark in (start, end)):
        raise UserError(f"{args.write} has no place for the table: it needs the lines {start} and {end}")
    chosen = [mode for mode in modes() if not args.only or mode.name.partition(", ")[2] in args.only]
    if not chosen:
        raise UserError(
            "--only knows " + "; ".join(dict.fromkeys(mode.name.partition(", ")[2] for mode in modes()))
        )
    table, broken = (
        [
            f"| mode | {' | '.join(COLUMNS)} | same class | flips | bound | |",
            "|---" * (len(COLUMNS) + 5) + "|",
        ],
        False,
    )
    print("\n".join(table), flush=True)
    for eman, ranks in sorted({(mode.eman, mode.ranks) for mode in chosen}):
        here = [mode for mode in chosen if (mode.eman, mode.ranks) == (eman, ranks)]
        config = settings(args.backbone, eman=eman)
        steps = trajectory(config, ranks, args.steps) if not all(map(missing, here)) else []
        for mode in here:
            if missing(mode):
                continue
            with tempfile.TemporaryDirectory() as folder:
                row = worst(play(mode, config, steps, Path(folder), args.free))
            broken |= not args.free and not holds(mode, row)
            table.append(line(mode, row, not args.free))
            print(table[-1], flush=True)
    lines = [
        *not_run(chosen),
        "",
        "| view | equal values | within a level of 255 | mean difference in levels | bound | |",
        "|---|---|---|---|---|---|",
    ]
    for name in ("weak", "moco", "rand", "eval"):
        equal, near, mean = views(name)
        fine = near > 0.99 and mean < 0.1
        broken |= not fine
        lines.append(
            f"| {name}, device views on against off | {100 * equal:.2f} % | {100 * near:.2f} % | {mean:.4f} | 99 %, 0.1 | "
            f"{'holds' if fine else 'BROKEN'} |"
        )
    lines += [
        "",
        f"n = {args.steps} steps a row, {args.backbone}, {SIDE} px, C = 10, K = {K}, D = 16, {B} labeled and {2 * B} unlabeled "
        f"images a rank; 8 images a view. {machine()}.",
    ]
    print("\n".join(lines))
    if args.write:
        text = args.write.read_text(encoding="utf-8")
        before, rest = text.split(start)
        args.write.write_text(
            "\n".join([before + start, *table, *lines, end + rest.split(end)[1]]), encoding="utf-8"
        )
    if broken:
        raise SystemExit(1)


if __name__ == "__main__":
    cli_main(main)
