"""Checkpoints: written completely or not at all, and read without running code that a file may contain."""

import errno
import hashlib
import os
import pickle
import struct
import threading
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import nn

from util.errors import UserError
from util.files import reason, special_file, write_atomically
from util.run.checkpoint_schema import (
    FLOATS,
    KEYS,
    MAX_STEP_IMAGES,
    check_values,
    describe_dtype,
    describe_shape,
    first_not_finite,
    first_three,
    is_dict,
)

FORMAT = 3
# EMAN's files store their best accuracy as a NumPy scalar. Its module has two names, depending on the version
# of NumPy; creating one runs no code of the file.
_numpy_scalar: Any = np.float64(0).__reduce__()[0]
NUMPY_SCALARS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (_numpy_scalar, "numpy.core.multiarray.scalar"),
    (_numpy_scalar, "numpy._core.multiarray.scalar"),
    np.dtype,
    type(np.dtype(np.float64)),
]
# What torch.load and zipfile raise for damaged files, besides OSError.
DAMAGE = (
    RuntimeError,  # includes NotImplementedError
    EOFError,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
    AssertionError,
    ArithmeticError,
    MemoryError,  # the damaged size of a tensor
    struct.error,
    zipfile.BadZipFile,
)
ZIP_START = b"PK\x03\x04"
LEGACY_START = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)  # before PyTorch 1.6


def save(path: Path, state: dict[str, Any], keep_previous: bool = False) -> None:
    """Write `state`, which has the KEYS, to `path` as `write_atomically` does, with its checksum.

    keep_previous: the old file is kept as `previous(path)`.
    """
    content = {key: value for key, value in state.items() if key != "format"}  # which a loaded state has
    write_atomically(
        path,
        lambda file: write_torch({**content, "format": FORMAT, "sha256": digest(content)}, file),
        previous(path) if keep_previous else None,
    )


def write_torch(value: Any, file: BinaryIO) -> None:
    """torch.save, but a failed write raises OSError."""
    wrapped = _ErrorKeepingFile(file)
    try:
        torch.save(value, wrapped)  # type: ignore[arg-type]  # it needs no more than write and flush
    except RuntimeError as error:  # torch reports a full disk like this, without the reason
        raise (wrapped.error or OSError(str(error))) from None


class _ErrorKeepingFile:
    """A file for torch.save that remembers why a write failed."""

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
        self.thread: threading.Thread | None = None
        self.best: dict[str, Any] | None = None  # the state for best.pth until it is written
        # The state whose evaluation is due. Copied, because an optimizer may share a loaded state's tensors.
        self.unscored = copy_to_cpu(resumed) if resumed and resumed.get("evaluation_due") else None
        self.error: Exception | None = None

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
        self.thread = threading.Thread(target=self._write, args=(state,))
        self.thread.start()

    def _write(self, state: dict[str, Any]) -> None:
        try:
            self.may_write()
            # best.pth first: a run killed between the two writes resumes from the old last.pth and writes
            # both again
            if self.best is not None:
                save(self.paths[1], self.best)
                self.best = None
            same_step = state["step"] == self.last_step  # `previous(last)` stays that of an earlier step
            save(self.paths[0], state, keep_previous=self.last_is_whole and not same_step)
            self.last_is_whole, self.last_step = True, state["step"]
        except Exception as error:  # not swallowed: `_wait` raises it in the main thread
            self.error = error

    def _wait(self) -> None:
        if self.thread is not None:
            self.thread.join()
        error, self.thread, self.error = self.error, None, None
        if error is None:
            return
        if self.on_error == "stop" or not isinstance(error, UserError):
            raise error
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
    """SHA-256 of a state: of its keys and values, and of the type, shape and bytes of every tensor."""
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

    feed(dict(value))
    return total.hexdigest()


def load_newest(path: Path) -> tuple[dict[str, Any] | None, str]:
    """Return (state, warning) from `path`, or from `previous(path)` if `path` is damaged or missing;
    (None, "") if neither exists.
    """
    before = previous(path)
    if not os.path.lexists(path) and not before.exists():
        return None, ""
    try:
        return load(path), ""
    except UserError as error:
        if not before.exists():
            raise
        return load(before), f"{error}; resuming from the previous one, {before}"


def load(path: Path) -> dict[str, Any]:
    """Return the state that `save` wrote to `path`, on the CPU. Raises UserError if the file is missing or
    damaged or was not written by `save`.
    """
    return verify(load_file(path), path)


def load_file(path: Path) -> Any:
    """Return the content of any file that torch.save wrote, on the CPU. Raises UserError if the file is
    missing or damaged or contains anything but tensors and plain values.
    """
    damaged = UserError(f"checkpoint {path} is damaged or incomplete; use another one, such as best.pth")
    try:
        if special := special_file(path):
            raise UserError(f"checkpoint {path} cannot be read: it is {special}, not a regular file")
        if problem := _foreign_format(path):
            raise UserError(f"checkpoint {path} {problem}")
        with warnings.catch_warnings(), torch.serialization.safe_globals(NUMPY_SCALARS):
            warnings.simplefilter("ignore")  # of PyTorch, about layouts that are refused below
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(
            f"checkpoint {path} does not exist; train_semi.py writes best.pth and last.pth"
        ) from None
    except pickle.UnpicklingError as error:
        forbidden = "weights_only" in str(error) and ("Unsupported" in str(error) or "GLOBAL" in str(error))
        if forbidden and not _has_damaged_pickle(path):
            raise UserError(
                f"checkpoint {path} is refused: it contains objects that could run code, "
                "not only tensors and plain values"
            ) from None
        raise damaged from None
    except OSError as error:
        if error.errno in (None, errno.EINVAL):  # PyTorch has looked for data where the file has none
            raise damaged from None
        raise UserError(f"checkpoint {path} cannot be read: {reason(error)}") from None
    except DAMAGE:
        raise damaged from None
    check_values(content, path)
    return content


def _foreign_format(path: Path) -> str:
    """Return "", or why torch.save did not write the file, to complete "checkpoint FILE …"; for some formats
    PyTorch prints warnings. Raises one of DAMAGE if the file is only a part of one that torch.save wrote.
    """
    with open(path, "rb") as file:
        start = file.read(len(LEGACY_START))
        if start.startswith(ZIP_START):
            with zipfile.ZipFile(file) as archive:  # raises BadZipFile if the end of the file is missing
                names = archive.namelist()
            if any(name.endswith("/constants.pkl") or "/code/" in name for name in names):
                return "is a TorchScript program; save the state_dict of its model with torch.save instead"
            return (
                ""
                if any(n.endswith("data.pkl") for n in names)
                else "is a zip file, not a PyTorch checkpoint"
            )
    if ZIP_START.startswith(start) or LEGACY_START.startswith(start):
        if start != LEGACY_START:
            raise EOFError
        return ""
    if start.startswith(b"\x80"):
        return "is refused: it is a pickle that torch.save did not write, and could run code"
    return "is not a PyTorch checkpoint, or it is damaged"


def _has_damaged_pickle(path: Path) -> bool:
    """Return whether the pickle in a zip file does not match its checksum, which torch.load ignores: a name
    with a changed letter looks like code.
    """
    if not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith("data.pkl"):
                    archive.read(name)
    except DAMAGE:
        return True
    return False


def verify(state: Any, path: Path) -> dict[str, Any]:
    """Check the content of `path` against its checksum, remove that from `state` and return `state`. Raises
    UserError if `save` did not write it, or if it was changed since.
    """
    version = state.get("format", FORMAT) if isinstance(state, dict) else FORMAT
    if type(version) is not int or version != FORMAT:
        raise UserError(
            f"checkpoint {path} has format {version!r:.50}, but this version reads format {FORMAT}"
        )
    if isinstance(state, dict) and not is_dict(state):
        raise UserError(f"checkpoint {path} was not written by train_semi.py: a key is not a string")
    invalid = [key for key in KEYS if not (is_dict(state) and key in state and KEYS[key](state[key]))]
    if invalid:
        raise UserError(f"checkpoint {path} was not written by train_semi.py: it has no valid {invalid[0]!r}")
    ranks, processes, batch_size = (state[key] for key in ("world", "processes", "batch_size"))
    if ranks % processes or ranks * batch_size > MAX_STEP_IMAGES:
        raise UserError(
            f"checkpoint {path} is damaged: a step of {ranks} ranks in {processes} processes with "
            f"{batch_size} labeled images each is not possible"
        )
    if state.pop("sha256", None) != digest({key: value for key, value in state.items() if key != "format"}):
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
    check_module(module, values, path, prefix)
    module.load_state_dict(
        {key[len(prefix) :]: value for key, value in values.items() if key.startswith(prefix)}
    )


def check_module(module: nn.Module, values: dict[str, Any], path: Path, prefix: str = "") -> None:
    """Raise UserError unless `values` has exactly the module's keys and shapes, and finite values of the
    module's types: load_state_dict would convert integers silently.

    prefix: what the module's keys start with in `values`; other keys of `values` are ignored.
    """
    own = {prefix + key: value for key, value in module.state_dict().items()}
    values = {key: value for key, value in values.items() if key.startswith(prefix)}
    wrong = [f"{key} is missing" for key in own if key not in values]
    wrong += [f"{key} is unknown" for key in values if key not in own]
    wrong += [
        f"{key} is {describe_shape(values[key])}, not {describe_shape(own[key])}"
        for key in own
        if key in values and describe_shape(values[key]) != describe_shape(own[key])
    ]
    if wrong:
        raise UserError(f"checkpoint {path} has another network or number of classes: {first_three(wrong)}")
    wrong = [
        f"{key} is {describe_dtype(values[key])}, not {describe_dtype(own[key])}"
        for key in own
        if values[key].dtype != own[key].dtype and not {values[key].dtype, own[key].dtype} <= FLOATS
    ]
    if not wrong and (name := first_not_finite(values)) is not None:
        wrong = [f"{name} is not finite"]
    if wrong:
        raise UserError(f"checkpoint {path} is damaged: {first_three(wrong)}; use another one")
