"""Checkpoints of this repository: what they contain, and how they are written and read."""

import hashlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn

from util.errors import UserError
from util.files import write_atomically
from util.formats import torch_files
from util.run.checkpoint_schema import (
    FLOATS,
    KEYS,
    conforms,
    describe_dtype,
    describe_shape,
    first_not_finite,
    first_three,
    mismatches,
)

FORMAT = 3
MAX_STEP_IMAGES = 2**20  # labeled images of a step; more are a damaged number and would cost memory


def save(path: Path, state: dict[str, Any], keep_previous: bool = False) -> None:
    """Write `state`, which has the KEYS, to `path` as `write_atomically` does, with its checksum.

    keep_previous: the old file is kept as `previous(path)`.
    """
    content = {**state, "format": FORMAT, "sha256": digest(state)}
    write_atomically(
        path, lambda file: torch_files.write(content, file), previous(path) if keep_previous else None
    )


class Writer:
    """Writes last.pth and best.pth in a thread: training waits for a copy of the state in memory, but not for
    the disk.

    There is one write at a time, and the next one waits for it. After a failed write the run stops or, with
    on_error `continue`, warns and tries again with the next checkpoint.
    """

    def __init__(
        self,
        last: Path,
        best: Path,
        on_error: str,
        warn: Callable[[str], None],
        last_is_whole: bool = True,
        resumed: dict[str, Any] | None = None,
        may_write: Callable[[], None] = lambda: None,
    ):
        """on_error: stop or continue. last_is_whole: False if the file at `last` must not become
        `previous(last)`, because it is damaged or was published by others. resumed: the state that the run
        resumes from. may_write: is called before each write and raises UserError if this process must not
        write any more.
        """
        self.paths, self.on_error, self.warn, self.may_write = (last, best), on_error, warn, may_write
        self.last_is_whole = last_is_whole
        self.last_step = resumed["step"] if resumed and last_is_whole else None  # of the file at `last`
        self.pending: Future[None] | None = None  # the one that was started last
        self.best: dict[str, Any] | None = None  # the state for best.pth until it is written
        # The state whose evaluation is due. Copied, because an optimizer may share a loaded state's tensors.
        self.unscored = copy_to_cpu(resumed) if resumed and resumed.get("evaluation_due") else None

    def save(self, state: dict[str, Any], best: bool = False) -> None:
        """Start to write `state`, which has the KEYS, to last.pth, and with `best` also to best.pth. Raises
        UserError if the previous write failed.
        """
        self._wait()
        state = copy_to_cpu(state)
        self.unscored = state if state.get("evaluation_due") else None
        self._start(state, best)

    def add_score(self, best_score: dict[str, Any], best: bool) -> None:
        """Start to write the state of the last `save`, whose evaluation was due, once more, with the best
        score after that evaluation.
        """
        assert self.unscored is not None
        state = {**self.unscored, "best": best_score, "evaluation_due": False}
        self._wait()
        self.unscored = None
        self._start(state, best)

    def close(self) -> None:
        """Wait until everything is written. Raises UserError if the last write failed, for any on_error."""
        self.on_error = "stop"
        self._wait()

    def _start(self, state: dict[str, Any], best: bool) -> None:
        if best:
            self.best = state
        thread = ThreadPoolExecutor(1)
        self.pending = thread.submit(self._write, state)
        thread.shutdown(wait=False)  # it ends after this write, so that no worker is forked beside it

    def _write(self, state: dict[str, Any]) -> None:
        self.may_write()
        # best.pth first: a run killed between the two writes resumes from the old last.pth and writes both
        # again
        if self.best is not None:
            save(self.paths[1], self.best)
            self.best = None
        same_step = state["step"] == self.last_step  # `previous(last)` stays that of an earlier step
        save(self.paths[0], state, keep_previous=self.last_is_whole and not same_step)
        self.last_is_whole, self.last_step = True, state["step"]

    def _wait(self) -> None:
        pending, self.pending = self.pending, None
        try:
            if pending is not None:
                pending.result()
        except UserError as error:
            if self.on_error == "stop":
                raise
            self.warn(f"{error}; training goes on and tries again with the next checkpoint")


def copy_to_cpu(value: Any) -> Any:
    """Return a deep copy of a state, with tensors on the CPU that later steps do not change."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: copy_to_cpu(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(copy_to_cpu, value))
    return value


def previous(path: Path) -> Path:
    """last.pth -> last.previous.pth"""
    return path.with_suffix(f".previous{path.suffix}")


def digest(value: Any) -> str:
    """SHA-256 of a state, except its format and checksum: of its keys and values, and of the type, shape and
    bytes of every tensor.
    """
    total = hashlib.sha256()

    def feed(v: Any) -> None:
        if isinstance(v, torch.Tensor):
            total.update(f"tensor {list(v.shape)} {v.dtype}".encode())
            total.update(v.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        elif isinstance(v, (dict, list, tuple)):
            total.update(f"{type(v).__name__} {len(v)}".encode())
            for part in v.items() if isinstance(v, dict) else v:
                feed(part)
        else:
            total.update(repr(v).encode())

    feed({key: part for key, part in value.items() if key not in ("format", "sha256")})
    return total.hexdigest()


def load(path: Path) -> dict[str, Any]:
    """Return the state that `save` wrote to `path`, on the CPU. Raises UserError if the file is missing or
    damaged or was not written by `save`.
    """
    return verify(torch_files.load(path), path)


def verify(state: Any, path: Path) -> dict[str, Any]:
    """Check the content of `path` against its checksum, remove that from `state` and return `state`. Raises
    UserError if `save` did not write it, or if it was changed since.
    """
    foreign = f"checkpoint {path} was not written by train_semi.py"
    version = state.get("format", FORMAT) if isinstance(state, dict) else FORMAT
    if type(version) is not int or version != FORMAT:
        raise UserError(
            f"checkpoint {path} has format {version!r:.50}, but this version reads format {FORMAT}"
        )
    if isinstance(state, dict) and not conforms(state, dict[str, Any]):
        raise UserError(f"{foreign}: a key is not a string")
    for key, kind in KEYS.items():
        if not (isinstance(state, dict) and key in state and conforms(state[key], kind)):
            raise UserError(f"{foreign}: it has no valid {key!r}")
    ranks, processes, batch_size = (state[key] for key in ("world", "processes", "batch_size"))
    if ranks % processes or ranks * batch_size > MAX_STEP_IMAGES:
        raise UserError(
            f"checkpoint {path} is damaged: a step of {ranks} ranks in {processes} processes with "
            f"{batch_size} labeled images each is not possible"
        )
    if state.pop("sha256", None) != digest(state):
        raise UserError(
            f"checkpoint {path} is damaged: its content does not match its checksum; use another one"
        )
    return state


def check_finite(values: dict[str, Any], step: int) -> None:
    """Raise UserError with the name of the first tensor of a state_dict that is not finite: such a state is
    never saved. step: the number of finished steps.
    """
    name = first_not_finite(values)
    if name is not None:
        raise UserError(
            f"{name} is not finite after step {step}; training stops and keeps the last checkpoint: "
            "try a lower --lr"
        )


def load_module(module: nn.Module, values: dict[str, Any], path: Path, prefix: str = "") -> None:
    """Call module.load_state_dict after `check_module`, which has the same arguments."""
    module.load_state_dict(check_module(module, values, path, prefix))


def check_module(
    module: nn.Module, values: dict[str, Any], path: Path, prefix: str = ""
) -> dict[str, torch.Tensor]:
    """Return the module's part of `values`. Raises UserError unless that has exactly the module's keys and
    shapes, and finite values of the module's types: load_state_dict would convert integers silently.

    prefix: what the module's keys start with in `values`; other keys of `values` are ignored.
    """
    own = {prefix + key: value for key, value in module.state_dict().items()}
    values = {key: value for key, value in values.items() if key.startswith(prefix)}
    wrong = mismatches(values, own, describe_shape)
    if wrong:
        raise UserError(f"checkpoint {path} has another network or number of classes: {first_three(wrong)}")
    integers = {key: value for key, value in values.items() if not {value.dtype, own[key].dtype} <= FLOATS}
    wrong = mismatches(integers, {key: own[key] for key in integers}, describe_dtype)
    if not wrong and (name := first_not_finite(values)) is not None:
        wrong = [f"{name} is not finite"]
    if wrong:
        raise UserError(f"checkpoint {path} is damaged: {first_three(wrong)}; use another one")
    return {key.removeprefix(prefix): value for key, value in values.items()}
