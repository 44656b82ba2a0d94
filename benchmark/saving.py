"""The time that training waits for a checkpoint: python benchmark/saving.py [--rounds 7] [--folder DIR]

A state of the 1 % recipe's size (SimMatch, ResNet-50, K = 13,000, SGD momentum) is saved in two ways in turn:
in the background, as train_semi.py does it, where a thread writes a copy; and in the foreground. Between the
saves, and during those in the background, steps of a fixed size run: ResNet-18, forward and backward, 2
images of 224 px, one thread. The predictions are computed from the size of the state and the rates of
copying, checking, hashing and writing an array of 64 MB, which are measured in every round: in the
foreground, training waits for the check, the hash and the write; in the background, for the check and the
copy only.
"""

import hashlib
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torchvision  # noqa: E402

from benchmark.digits import machine  # noqa: E402
from models import build_method, build_optimizer  # noqa: E402
from util.config import parse  # noqa: E402
from util.errors import Parser, UserError, cli_main  # noqa: E402
from util.run import checkpoint  # noqa: E402
from util.run.metrics import Meter  # noqa: E402
from util.run.ranks import RankLayout  # noqa: E402
from util.run.train_state import BadImages, RunIdentity, TrainState  # noqa: E402

PIECE = 64 * 2**20  # bytes of the array that rates are measured with
K = 13_000  # labeled images


def recipe_state() -> dict[str, Any]:
    """The state of a checkpoint after the first step."""
    config = parse(["--config", str(ROOT / "configs" / "imagenet_1p.yaml")], "")
    method = build_method(config, 3, torch.arange(K) % config.cls)
    optimizer = build_optimizer(config, method.student)
    for p in method.student.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    scaler = torch.amp.GradScaler(enabled=False)
    state = TrainState(method, optimizer, scaler, Meter(), BadImages(config.on_bad_image), step=1)
    classes = [str(c) for c in range(config.cls)]
    ranks = RankLayout(8, 8, config.batch_size)
    identity = RunIdentity(config, ranks, 3963, ("simmatch-1p", "0"), classes, "")
    return {**identity.state_dict(), **state.state_dict()}


def tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for part in parts for tensor in tensors(part)]


def seconds(call: Callable[[], Any]) -> np.ndarray:
    """Wall-clock and CPU seconds of this thread [2]. Other programs on the machine change the first only."""
    start = time.perf_counter(), time.thread_time()
    call()
    return np.array([time.perf_counter(), time.thread_time()]) - start  # [2]


def rates(folder: Path) -> dict[str, np.ndarray]:
    """`seconds` per byte of each part of a save."""
    piece = torch.randn(PIECE // 4)

    def write() -> None:
        with open(folder / "piece", "wb") as file:
            file.write(piece.numpy().data)
            file.flush()
            os.fsync(file.fileno())

    parts = {
        "copy": lambda: piece.clone(),
        "check": lambda: checkpoint.check_finite({"piece": piece}, 0),
        "hash": lambda: hashlib.sha256(piece.numpy().data).digest(),
        "write": write,
    }
    out = {name: seconds(call) / PIECE for name, call in parts.items()}
    (folder / "piece").unlink()
    return out


def one_round(
    folder: Path, writer: checkpoint.Writer, state: dict[str, Any], step: Callable[[], np.ndarray], steps: int
) -> dict[str, np.ndarray]:
    """Run steps alone, a save in the foreground, and a save in the background during steps -> `seconds` of
    each, and predictions.
    """
    alone = np.median([step() for _ in range(steps)], axis=0)  # [2]
    rate, size = rates(folder), sum(t.nbytes for t in tensors(state))
    checked = sum(t.nbytes for t in tensors(state["method"]) if t.is_floating_point())
    check = seconds(lambda: checkpoint.check_finite(state["method"], 1))
    foreground = check + seconds(lambda: checkpoint.save(folder / "last.pth", state, keep_previous=True))
    check = seconds(lambda: checkpoint.check_finite(state["method"], 1))
    copy = seconds(lambda: writer.save(state, best=False))
    start, during = time.perf_counter(), []
    while writer.pending is not None and not writer.pending.done():
        during.append(step())
    written = time.perf_counter() - start
    return {
        "alone": alone,
        "during": np.median(during, axis=0),
        "written": np.array([written, np.nan]),
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
    parser = Parser((__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7, help="saves of each kind, after one that warms up")
    parser.add_argument("--steps", type=int, default=5, help="steps without a save in each round")
    parser.add_argument(
        "--folder",
        type=Path,
        help="folder of the files; default: the system's folder for temporary files",
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
    times = {key: 1000 * np.array([each[key] for each in rounds]) for key in rounds[0]}  # ms, [rounds, 2]

    def cells(key: str) -> str:
        median, low, high = (f(times[key], axis=0) for f in (np.median, np.min, np.max))  # [2]
        return " | ".join(f"{m:,.0f} ({a:,.0f}–{b:,.0f})" for m, a, b in zip(median, low, high))

    print("| ms | predicted, wall clock | CPU | measured, wall clock | CPU |\n|---|---|---|---|---|")
    for label, key in (
        ("training waits, save in the foreground", "foreground"),
        ("training waits, save in the background", "waits"),
        ("… of which: check that all values are finite", "check"),
        ("… of which: copy", "copy"),
    ):
        print(f"| {label} | {cells('predicted ' + key)} | {cells(key)} |")
    print(f"| a step alone | | | {cells('alone')} |\n| a step during a write | | | {cells('during')} |")
    ratio = np.median(times["during"] / times["alone"], axis=0)  # [2]
    print(
        f"\nMedians (minimum–maximum) of {args.rounds} rounds. A step during a write takes {ratio[0]:.2f} "
        f"times as long by the wall clock and {ratio[1]:.2f} times the CPU time; a write takes "
        f"{np.median(times['written'][:, 0]):,.0f} ms. The file has {size / 1e6:.0f} MB; load "
        f"{os.getloadavg()[0]:.0f} at the end; {machine()}."
    )


if __name__ == "__main__":
    cli_main(main)
