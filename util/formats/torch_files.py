"""Files of torch.save: written so that a failure keeps its reason, and read without running code that a file
may contain. A file is not trusted: it may be damaged, or made by hand.
"""

import errno
import pickle
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from util.errors import UserError
from util.files import reason, special_file

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
    *(ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, TypeError, ValueError),
    *(RuntimeError, struct.error, zipfile.BadZipFile),
    MemoryError,  # the damaged size of a tensor
)
ZIP_START = b"PK\x03\x04"
LEGACY_START = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)  # before PyTorch 1.6


def write(value: Any, file: BinaryIO) -> None:
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


def load(path: Path) -> Any:
    """Return the content of a file that torch.save wrote, on the CPU. Raises UserError if the file is missing
    or damaged or contains anything but tensors and plain values.
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
        if "weights_only" in str(error) and ("Unsupported" in str(error) or "GLOBAL" in str(error)):
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
    if problem := _impossible_value(content):
        raise UserError(f"checkpoint {path} is damaged{problem}")
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
                    return (
                        "is a TorchScript program; save the state_dict of its model with torch.save instead"
                    )
                pickles = [name for name in names if name.endswith("data.pkl")]
                for name in pickles:
                    archive.read(name)  # checks its CRC, unlike torch.load: a changed name looks like code
            return "" if pickles else "is a zip file, not a PyTorch checkpoint"
    if start == LEGACY_START:
        return ""
    if ZIP_START.startswith(start) or LEGACY_START.startswith(start):
        raise EOFError
    if start.startswith(b"\x80"):
        return "is refused: it is a pickle that torch.save did not write, and could run code"
    return "is not a PyTorch checkpoint, or it is damaged"


def _impossible_value(content: Any) -> str:
    """Return "", or what is wrong, to complete "is damaged…": a damaged or forged file may have a tensor with
    more elements than any memory, or lists in endless lists.
    """
    parts, count = [(content, 0)], 0
    while parts:
        value, depth = parts.pop()
        count += 1
        if depth > 50 or count > 10**7:
            return ": its values are nested too deeply"
        if isinstance(value, (dict, list, tuple)):
            parts += [(part, depth + 1) for part in (value.values() if isinstance(value, dict) else value)]
        elif isinstance(value, torch.Tensor) and not (
            value.layout is torch.strided
            and value.device.type == "cpu"
            and not value.is_quantized
            and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
        ):
            kinds = "sparse, quantized, or without its data"
            return f" or of another program: a tensor of {list(value.shape)} is {kinds}"
    return ""
