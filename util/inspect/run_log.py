"""A run, finished or not, read back from config.yaml and log.jsonl in its output directory."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from util.config import Config, read_yaml
from util.errors import UserError
from util.files import special_file

Event = dict[str, Any]

# Keys that readers of a log rely on, besides "event" and "step".
REQUIRED_KEYS = {
    "start": {"split", "sha256"},
    "train": {"epoch", "pseudo_acc"},
    "eval": {"student_top1", "teacher_top1"},
    "diagnostics": {"steps_per_epoch"},
    "stop": {"why"},
}


def _is_number(value: Any) -> bool:
    return type(value) is int and abs(value) < 2**63 or type(value) is float and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**63


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_list(value: Any, *parts: Callable[[Any], bool]) -> bool:
    """Return whether `value` is a list of lists whose entries are `parts`, or of texts if there are none."""
    if not isinstance(value, list):
        return False
    if not parts:
        return all(map(_is_text, value))
    return all(
        isinstance(entry, list) and len(entry) == len(parts) and all(p(v) for p, v in zip(parts, entry))
        for entry in value
    )


# What the value of a key must be, where that is not a number or null.
KINDS: dict[str, Callable[[Any], bool]] = {
    "step": lambda value: value == 0 and type(value) is int or _is_count(value),
    **dict.fromkeys(("epoch", "steps_per_epoch"), _is_count),
    **dict.fromkeys(("student_top1", "teacher_top1"), _is_number),
    **dict.fromkeys(("event", "split", "sha256", "why", "fate"), _is_text),
    **dict.fromkeys(("most", "least"), lambda value: value is None or _is_list(value, _is_text, _is_number)),
    "not_finite": _is_list,
    "images": lambda value: _is_list(value, _is_text, _is_text),
}


class RunLog(NamedTuple):
    """The config of a run and its events, each list in the order of the log."""

    name: str  # of the output directory
    config: Config
    events: list[Event]  # of every kind
    train_events: list[Event]
    eval_events: list[Event]
    diagnostic_events: list[Event]
    stop_events: list[Event]
    split: str  # id and SHA-256 of the labeled split
    steps_per_epoch: int | None  # None before the first evaluation or diagnostics event

    @classmethod
    def from_events(cls, name: str, config: Config, events: list[Event]) -> "RunLog":
        starts, trains, evals, diagnostics, stops = (
            [e for e in events if e["event"] == kind] for kind in REQUIRED_KEYS
        )
        split = f"{starts[0]['split']} (sha256 {starts[0]['sha256'][:12]})" if starts else "unknown"
        if diagnostics:
            steps_per_epoch = diagnostics[0]["steps_per_epoch"]
        else:  # an evaluation ends an epoch, and the train event of its step has the number of that epoch
            epochs = {e["step"]: e["epoch"] for e in trains}
            steps_per_epoch = next(
                (e["step"] // epochs[e["step"]] for e in evals if e["step"] in epochs), None
            )
        return cls(name, config, events, trains, evals, diagnostics, stops, split, steps_per_epoch)

    @property
    def total_steps(self) -> int | None:
        """The steps that the config asks for; None as long as the length of an epoch is unknown."""
        return self.steps_per_epoch and self.steps_per_epoch * self.config.epochs

    @property
    def finished(self) -> bool:
        """Whether the last event belongs to the last step that the config asks for, or to a later one."""
        return bool(self.total_steps) and self.events[-1]["step"] >= (self.total_steps or 0)

    def after_warmup(self, events: list[Event]) -> list[Event]:
        """Return the events after both the first epoch and the warm-up; earlier values may look unusual."""
        if self.steps_per_epoch is None:
            return []
        return [e for e in events if e["step"] > max(1, self.config.warmup_epoch) * self.steps_per_epoch]


def read_run_log(folder: Path) -> RunLog:
    """Read the run whose output directory is `folder`. Raises UserError if log or config cannot be read."""
    events = read_events(folder)
    return RunLog.from_events(folder.name, Config(**read_yaml(str(folder / "config.yaml"))), events)


def read_events(folder: Path) -> list[Event]:
    """Read the events of `folder`/log.jsonl, in order. Raises UserError if it is missing or damaged."""
    path = folder / "log.jsonl"
    if special := special_file(path):
        raise UserError(f"{folder} is not the output directory of a run: log.jsonl is {special}")
    try:
        text = path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]  # a crash may have cut the last line short
        events = [json.loads(line) for line in whole.splitlines()]
    except OSError as error:
        raise UserError(
            f"{folder} is not the output directory of a run: log.jsonl: {error.strerror}"
        ) from None
    except ValueError:
        raise UserError(f"{path} is damaged: a line is not JSON") from None
    for event in events:
        if not _is_event(event):
            raise UserError(f"{path} is damaged or of another version: unexpected event {str(event)[:80]}")
    return events


def _is_event(event: Any) -> bool:
    """Return whether an event has the keys that every reader needs, each with a value of its kind."""
    if not isinstance(event, dict) or not _is_text(event.get("event")):
        return False
    if not {"step"} | REQUIRED_KEYS.get(event["event"], set()) <= event.keys():
        return False
    return all(
        KINDS[key](value) if key in KINDS else value is None or _is_number(value)
        for key, value in event.items()
    )
