"""How long training waits for a checkpoint: python benchmark/saving.py [--rounds 7] [--folder DIR]

A state of the 1 % recipe's size (SimMatch, ResNet-50, K = 13,000, SGD momentum) is saved in turn as
train_semi.py does it, by a thread that writes a copy, and by the training thread itself. Between and beside
the saves run steps of a fixed size: ResNet-18, forward and backward, 2 images of 224 px, one thread. The
predictions come from the size of the state and from the rates of copying, checking, hashing and writing one
array of 64 MB, measured in every round: a save that the training thread writes is checked, hashed and
written, of the other kind training waits for the check and the copy alone.
"""

import hashlib
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torchvision  # noqa: E402

from benchmark.digits import machine  # noqa: E402
from models import build_method, parameter_groups  # noqa: E402
from util import checkpoint  # noqa: E402
from util.config import parse, to_dict  # noqa: E402
from util.errors import Parser, UserError, cli_main  # noqa: E402

PIECE = 64 * 2**20  # bytes
K = 13_000


def recipe_state() -> dict[str, Any]:
    """What train_semi.py saves, of a first step."""
    config = parse(["--config", str(ROOT / "configs" / "imagenet_1p.yaml")], "")
    method = build_method(config, 3, torch.arange(K) % config.cls)
    optimizer = torch.optim.SGD(
        parameter_groups(method.student, config.wd, config.no_decay_bn),
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
    )
    for p in method.student.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    return {
        "config": to_dict(config),
        "step": 1,
        "world": 8,
        "processes": 8,
        "batch_size": config.batch_size,
        "steps_per_epoch": 3962,
        "best": {"step": 0, "student_top1": -1.0},
        "split": ("simmatch-1p", "0"),
        "data": "",
        "classes": [str(c) for c in range(config.cls)],
        "method": method.state_dict(),
        "optimizer": optimizer.state_dict(),
        "meter": {},
        "bad_images": [],
    }


def tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for part in parts for tensor in tensors(part)]


def seconds(call: Callable[[], Any]) -> np.ndarray:
    """Of the clock, and of a core that this thread had: [2]. Where others share the cores, the second says
    what is due to us.
    """
    begun = time.perf_counter(), time.thread_time()
    call()
    return np.array([time.perf_counter(), time.thread_time()]) - begun  # [2]


def rates(folder: Path) -> dict[str, np.ndarray]:
    """`seconds` a byte of each part of a save."""
    piece = torch.randn(PIECE // 4)

    def write() -> None:
        with open(folder / "piece", "wb") as file:
            file.write(memoryview(piece.numpy()))
            file.flush()
            os.fsync(file.fileno())

    parts = {
        "copy": lambda: piece.clone(),
        "check": lambda: checkpoint.check_finite({"piece": piece}, 0),
        "hash": lambda: hashlib.sha256(piece.numpy()).digest(),
        "write": write,
    }
    out = {name: seconds(call) / PIECE for name, call in parts.items()}
    (folder / "piece").unlink()
    return out


def one_round(
    folder: Path, writer: checkpoint.Writer, state: dict[str, Any], step: Callable[[], np.ndarray], steps: int
) -> dict[str, np.ndarray]:
    """Steps alone, a save in the foreground, a save in the background with steps beside it: `seconds`, and
    predictions.
    """
    alone = np.median([step() for _ in range(steps)], axis=0)  # [2]
    rate, size = rates(folder), sum(t.nbytes for t in tensors(state))
    checked = sum(t.nbytes for t in tensors(state["method"]) if t.is_floating_point())
    check = seconds(lambda: checkpoint.check_finite(state["method"], 1))
    foreground = check + seconds(lambda: checkpoint.save(folder / "last.pth", state, keep_previous=True))
    check = seconds(lambda: checkpoint.check_finite(state["method"], 1))
    copy = seconds(lambda: writer.save(state, best=False))
    begun, beside = time.perf_counter(), []
    while writer.thread.is_alive():
        beside.append(step())
    took = time.perf_counter() - begun
    return {
        "alone": alone,
        "beside": np.median(beside, axis=0),
        "written": np.array([took, np.nan]),
        "check": check,
        "copy": copy,
        "foreground": foreground,
        "waits": check + copy,
        "predicted foreground": rate["check"] * checked + (rate["hash"] + rate["write"]) * size,
        "predicted waits": rate["check"] * checked + rate["copy"] * size,
        "predicted check": rate["check"] * checked,
        "predicted copy": rate["copy"] * size,
    }


def main() -> None:
    parser = Parser(__doc__.split("\n")[0])
    parser.add_argument(
        "--rounds", type=int, default=7, help="saves of each kind; one more before them warms up"
    )
    parser.add_argument("--steps", type=int, default=5, help="steps alone in each round")
    parser.add_argument(
        "--folder",
        type=Path,
        help="where files are written; default: the system's folder for temporary files",
    )
    args = parser.parse_args()
    if args.rounds < 1 or args.steps < 1:
        raise UserError("--rounds and --steps must be 1 or more")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    state = recipe_state()
    network, x = torchvision.models.resnet18(), torch.randn(2, 3, 224, 224)  # [2, 3, h, w]

    def step() -> np.ndarray:
        return seconds(lambda: network(x).sum().backward())

    try:
        work = tempfile.TemporaryDirectory(dir=args.folder, prefix="simmatch-saving-")
    except OSError as error:
        raise UserError(
            f"cannot make a folder in {args.folder}: {error.strerror}; choose another --folder"
        ) from None
    with work as name:
        folder = Path(name)
        writer = checkpoint.Writer(folder / "last.pth", folder / "best.pth", "stop", print)
        rounds = [one_round(folder, writer, state, step, args.steps) for _ in range(args.rounds + 1)][1:]
        writer.close()
        size = (folder / "last.pth").stat().st_size
    seen = {what: 1000 * np.array([each[what] for each in rounds]) for what in rounds[0]}  # ms, [rounds, 2]

    def cells(what: str) -> str:
        middle, low, high = (f(seen[what], axis=0) for f in (np.median, np.min, np.max))  # [2]
        return f"{middle[0]:,.0f} ({low[0]:,.0f}–{high[0]:,.0f}) | {middle[1]:,.0f} ({low[1]:,.0f}–{high[1]:,.0f})"

    print("| ms | predicted, clock | core | measured, clock | core |\n|---|---|---|---|---|")
    for label, what in (
        ("training waits, written by its thread", "foreground"),
        ("training waits, written beside it", "waits"),
        ("… of it: is all finite?", "check"),
        ("… of it: copy", "copy"),
    ):
        print(f"| {label} | {cells('predicted ' + what)} | {cells(what)} |")
    print(f"| a step alone | | | {cells('alone')} |\n| a step beside a write | | | {cells('beside')} |")
    times = np.median(seen["beside"] / seen["alone"], axis=0)  # [2]
    print(
        f"\nMedians (least–most) of {args.rounds} rounds. A step beside a write takes {times[0]:.2f} times as long by the clock and "
        f"{times[1]:.2f} times of a core; the write, {np.median(seen['written'][:, 0]):,.0f} ms. A file of {size / 1e6:.0f} MB; load "
        f"{os.getloadavg()[0]:.0f} at the end; {machine()}."
    )


if __name__ == "__main__":
    cli_main(main)
