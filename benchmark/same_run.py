"""Compares the results of two runs of train_semi.py bit for bit, however often they were interrupted."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from util.effect import without_effect
from util.fields import defaults_of

# Settings that do not change what a run computes.
WITHOUT_EFFECT = ("output_dir", "workers", "save_freq")


def events(folder: Path) -> list[dict[str, Any]]:
    """The events of the log, without the speed, which differs from run to run."""
    return [
        {key: value for key, value in json.loads(line).items() if key != "images_per_s"}
        for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def weights(folder: Path, name: str = "last.pth") -> dict[str, Any]:
    return torch.load(folder / name, weights_only=True)


def difference(a: Path, b: Path) -> str:
    """The first difference between the runs in the folders `a` and `b`, or "". Their logs are compared,
    without the speed, and best.pth and last.pth: weights, bank, prior, teacher, optimizer, meter, best score.
    """
    events_a, events_b = events(a), events(b)
    for number, (event_a, event_b) in enumerate(zip(events_a, events_b), 1):
        if event_a != event_b:
            return f"log.jsonl, line {number}: {event_a} and {event_b}"
    if len(events_a) != len(events_b):
        return f"log.jsonl: {len(events_a)} and {len(events_b)} lines"
    found = (first_difference(_state(a, name), _state(b, name), name) for name in ("best.pth", "last.pth"))
    return next(filter(None, found), "")


def _state(folder: Path, name: str) -> dict[str, Any]:
    state = weights(folder, name)
    # A checkpoint of before has no value of a setting that came later.
    config = {**defaults_of(state["config"]["method"]), **state["config"]}
    unused = {*WITHOUT_EFFECT, *without_effect(SimpleNamespace(**config))}
    config = {key: value for key, value in config.items() if key not in unused}
    return {**state, "config": config, "sha256": ""}  # the checksum depends on them


def first_difference(a: Any, b: Any, where: str) -> str:
    """The first difference between two states, or "". where: the name of the states in the result."""
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
