"""Whether two runs of train_semi.py ended bit for bit the same, whatever interrupted them on the way."""

import json
from pathlib import Path
from typing import Any

import torch

HOW = ("output_dir", "workers", "save_freq")  # how a run is carried out, not what it computes


def events(folder: Path) -> list[dict[str, Any]]:
    """The log, without what differs from run to run: speed."""
    return [
        {key: value for key, value in json.loads(line).items() if key != "images_per_s"}
        for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def weights(folder: Path, name: str = "last.pth") -> dict[str, Any]:
    return torch.load(folder / name, weights_only=True)


def difference(a: Path, b: Path) -> str:
    """Where the runs in the folders `a` and `b` first differ, or "": in their logs (apart from speed), or in
    best.pth and last.pth, in any bit of weights, bank, prior, teacher, optimizer, meter or best score.
    """
    first, second = events(a), events(b)
    for number, (one, other) in enumerate(zip(first, second), 1):
        if one != other:
            return f"log.jsonl, line {number}: {one} and {other}"
    if len(first) != len(second):
        return f"log.jsonl: {len(first)} and {len(second)} lines"
    found = (first_difference(_state(a, name), _state(b, name), name) for name in ("best.pth", "last.pth"))
    return next(filter(None, found), "")


def _state(folder: Path, name: str) -> dict[str, Any]:
    state = weights(folder, name)
    config = {key: value for key, value in state["config"].items() if key not in HOW}
    return {**state, "config": config, "sha256": ""}  # the checksum covers how, too


def first_difference(a: Any, b: Any, where: str) -> str:
    """Where two states first differ, or ""; `where` is what they are called."""
    if isinstance(a, (list, tuple)) and type(a) is type(b):
        a, b = dict(enumerate(a)), dict(enumerate(b))
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return f"{where}: has {sorted(map(str, a.keys() ^ b.keys()))[0]!r} in one of them only"
        return next(filter(None, (first_difference(a[key], b[key], f"{where}[{key!r}]") for key in a)), "")
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return "" if (a.shape, a.dtype) == (b.shape, b.dtype) and torch.equal(_bits(a), _bits(b)) else where
    return "" if repr(a) == repr(b) else f"{where}: {a!r} and {b!r}"


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().flatten().view(torch.uint8)
