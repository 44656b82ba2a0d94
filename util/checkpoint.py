"""Checkpoints: written whole or not at all, read without running any code that a file may hold."""

import hashlib
import os
import pickle
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import nn

from util.errors import UserError

FORMAT = 3
KEYS = {
    "config": dict,
    "step": int,
    "world": int,
    "processes": int,
    "batch_size": int,
    "steps_per_epoch": int,
    "best": dict,
    "split": tuple,
    "data": str,
    "classes": list,
    "method": dict,
    "optimizer": dict,
    "scaler": dict,
    "meter": dict,
    "bad_images": list,
}  # world: ranks of a step; batch_size: labeled images of a rank
# EMAN's files hold their best accuracy as a number of NumPy, whose module has had two names. It is made
# without running code.
NUMPY_NUMBERS = [
    *((np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    np.dtype,
    type(np.dtype(np.float64)),
]


def save(path: Path, state: dict[str, Any], keep_previous: bool = False) -> None:
    """Write `state` (the KEYS) to `path`, whole or not at all; keep_previous: see `write_whole`."""
    write_whole(
        path,
        lambda file: write_torch({**state, "format": FORMAT, "sha256": digest(state)}, file),
        keep_previous,
    )


def write_whole(path: Path, write: Callable[[BinaryIO], None], keep_previous: bool = False) -> None:
    """Have `write` fill a temporary file beside `path`, flush it, then rename it over `path`. OSError becomes
    a UserError.

    keep_previous: what stood there becomes `previous(path)`; at no moment are there fewer whole files than
    before.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if keep_previous and path.exists():
            os.replace(path, previous(path))
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {_reason(error)}; what stood there before is intact") from None
    finally:
        with suppress(OSError):  # gone after the renaming; and nothing can be done where removing it fails
            temporary.unlink()


def write_torch(value: Any, file: BinaryIO) -> None:
    """torch.save, with its failures as OSError."""
    sink = _ErrorKeepingFile(file)
    try:
        torch.save(value, sink)
    except RuntimeError as error:  # torch's way to report a full disk, without the reason
        raise (sink.error or OSError(str(error))) from None


class _ErrorKeepingFile:
    """A file as torch.save wants it, that remembers why a write failed."""

    def __init__(self, file: BinaryIO):
        self.file, self.flush = file, file.flush
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise


class Writer:
    """Writes last.pth and best.pth in a thread of its own: training waits for a copy of the state in memory,
    not for the disk.

    One write at a time; the next one waits for it. What could not be written is told, and then stops the run
    or, with on_error `continue`, is tried again at the next checkpoint.
    """

    def __init__(
        self, last: Path, best: Path, on_error: str, warn: Callable[[str], None], last_is_whole: bool = True
    ):
        """on_error: stop or continue. last_is_whole: False where `last` is damaged and must not become the
        previous one.
        """
        self.paths, self.on_error, self.warn, self.last_is_whole = (last, best), on_error, warn, last_is_whole
        self.thread: threading.Thread | None = None
        self.best: dict[str, Any] | None = None  # the state of best.pth while it is not written
        self.error: UserError | None = None

    def save(self, state: dict[str, Any], best: bool) -> None:
        """state: the KEYS; best: whether it is the best so far too. Raises UserError if the write before
        failed.
        """
        self._wait()
        state = copy_to_cpu(state)
        if best:
            self.best = state
        self.thread = threading.Thread(target=self._write, args=(state,))
        self.thread.start()

    def close(self) -> None:
        """Wait until all is written. Raises UserError if the last state is not, whatever on_error says."""
        self.on_error = "stop"
        self._wait()

    def _write(self, state: dict[str, Any]) -> None:
        try:
            if (
                self.best is not None
            ):  # best first: a run killed between the two repeats this stretch and writes it again
                save(self.paths[1], self.best)
                self.best = None
            save(self.paths[0], state, keep_previous=self.last_is_whole)
            self.last_is_whole = True
        except UserError as error:
            self.error = error

    def _wait(self) -> None:
        if self.thread is not None:
            self.thread.join()
        error, self.thread, self.error = self.error, None, None
        if error is not None and self.on_error == "stop":
            raise error
        if error is not None:
            self.warn(f"{error}; training goes on, and the next checkpoint is tried as planned")


def copy_to_cpu(value: Any) -> Any:
    """A copy of a state that no further step changes, its tensors on the CPU."""
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
    """SHA-256 of a state: of keys, shapes, types and the bytes of every tensor."""
    total = hashlib.sha256()

    def feed(v: Any) -> None:
        if isinstance(v, torch.Tensor):
            total.update(f"tensor {list(v.shape)} {v.dtype}".encode())
            total.update(v.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        elif isinstance(v, (dict, list, tuple)):
            total.update(f"{type(v).__name__} {len(v)}".encode())
            for part in v.items() if isinstance(v, dict) else v:
                feed(part)
        else:
            total.update(repr(v).encode())

    feed(dict(value))
    return total.hexdigest()


def load_newest(path: Path) -> tuple[dict[str, Any] | None, str]:
    """(state, remark): of `path`, or, where that is damaged or gone, of the one before it; (None, "") if
    there is neither.
    """
    before = previous(path)
    if not os.path.lexists(path) and not before.exists():
        return None, ""
    try:
        return load(path), ""
    except UserError as error:
        if not before.exists():
            raise
        return load(before), f"{error}; going on from the one before it, {before}"


def load(path: Path) -> dict[str, Any]:
    """The state saved at `path`, on the CPU. Raises UserError when it is missing, damaged or not one of ours."""
    return check(read(path), path)


def read(path: Path) -> Any:
    """What torch.save has put into the file at `path`, ours or not, on the CPU. Raises UserError when it is
    missing or damaged, or holds anything but tensors and plain values.
    """
    try:
        with torch.serialization.safe_globals(NUMPY_NUMBERS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(
            f"checkpoint {path} does not exist; train_semi.py writes best.pth and last.pth"
        ) from None
    except OSError as error:
        raise UserError(f"checkpoint {path} cannot be read: {_reason(error)}") from None
    except pickle.UnpicklingError as error:
        with open(path, "rb") as file:
            pickled = file.read(2)[:1] in (b"\x80", b"P")  # of pickle, or of a zip file with one
        if (
            pickled
            and "weights_only" in str(error)
            and ("Unsupported" in str(error) or "GLOBAL" in str(error))
        ):
            raise UserError(
                f"checkpoint {path} is refused: it holds objects that could run code, "
                "not only tensors and plain values"
            ) from None
        raise UserError(f"checkpoint {path} is not a PyTorch checkpoint, or damaged") from None
    except (
        RuntimeError,
        EOFError,
        ValueError,
        KeyError,
        IndexError,
        AttributeError,
        TypeError,
        AssertionError,
    ):
        raise UserError(
            f"checkpoint {path} is damaged or cut short; take another one, such as best.pth"
        ) from None


def check(state: Any, path: Path) -> dict[str, Any]:
    """`state`, read from `path`, without its checksum. Raises UserError when it is not one of ours, whole and
    unchanged.
    """
    if isinstance(state, dict) and state.get("format", FORMAT) != FORMAT:
        raise UserError(f"checkpoint {path} has format {state['format']!r}, this version reads {FORMAT}")
    missing = [
        key
        for key, kind in KEYS.items()
        if not isinstance(state, dict) or not isinstance(state.get(key), kind)
    ]
    if missing:
        raise UserError(
            f"checkpoint {path} was not written by train_semi.py: it has no proper {missing[0]!r}"
        )
    if state.pop("sha256", None) != digest({key: value for key, value in state.items() if key != "format"}):
        raise UserError(
            f"checkpoint {path} is damaged: its content does not agree with its checksum; take another one"
        )
    return state


def check_finite(values: dict[str, Any], step: int) -> None:
    """Raise UserError, naming the first, if a tensor of a module's state is not finite: such a state is never
    saved.

    Training waits for this, so that it reads every tensor once, and a GPU is asked once: the smallest and the
    largest value of a tensor are finite, and not NaN, if and only if all are.
    """
    floating = {name: value for name, value in values.items() if value.is_floating_point() and value.numel()}
    if not floating:
        return
    extremes = torch.stack(
        [end for value in floating.values() for end in torch.aminmax(value.detach())]
    )  # [2·tensors]
    finite = torch.isfinite(extremes).view(-1, 2).all(dim=1).tolist()
    for name, fine in zip(floating, finite):
        if not fine:
            raise UserError(
                f"{name} is not finite after step {step - 1}; training stops, and the last checkpoint stays as "
                "it was: try a lower --lr"
            )


def load_module(module: nn.Module, values: dict[str, Any], path: Path, prefix: str = "") -> None:
    """module.load_state_dict with exact keys and shapes; a UserError names the first that differ.

    prefix: what the module's keys start with in `values`; other keys there are left alone.
    """
    own = {prefix + key: value for key, value in module.state_dict().items()}
    values = {key: value for key, value in values.items() if key.startswith(prefix)}
    wrong = [f"{key} is missing" for key in own if key not in values]
    wrong += [f"{key} is unknown" for key in values if key not in own]
    wrong += [
        f"{key} is {_shape(values[key])}, not {_shape(own[key])}"
        for key in own
        if key in values and _shape(values[key]) != _shape(own[key])
    ]
    if wrong:
        raise UserError(f"checkpoint {path} is of another network or class count: {first_three(wrong)}")
    module.load_state_dict({key[len(prefix) :]: value for key, value in values.items()})


def first_three(wrong: list[str]) -> str:
    """The first three of a list of what is wrong, and the number of the rest."""
    return "; ".join(wrong[:3]) + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else "")


def _shape(value: Any) -> Any:
    return list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error).splitlines()[0]
