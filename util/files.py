"""Files that a user names: which paths are possible, which files may be replaced, and how a file is written
completely or not at all.
"""

import errno
import os
import re
import stat
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from util.errors import UserError, printable

LEFTOVER_SECONDS = 3600  # a temporary file that was not written to for this long belongs to a killed process


def user_path(path: str | Path) -> Path:
    """Return `path`, whose file need not exist, with `~` and `~user` replaced by the home folder. Raises
    UserError if there is no such user, or if no file can have this path.
    """
    text = os.fspath(path)
    shown = printable(text if len(text) <= 100 else f"{text[:100]}...")
    try:
        expanded = os.path.expanduser(text)
        if expanded.startswith("~"):
            raise UserError(
                f"{shown}: {text.split('/')[0]} is not the home folder of a user; write ./{shown} for a file "
                "of that name"
            )
        os.stat(expanded)
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            raise UserError(f"{shown}: {error.strerror}; check the path") from None
    except ValueError as error:  # a NUL character
        raise UserError(f"{shown} cannot be a path: {error}") from None
    out = Path(expanded)
    return Path.cwd() / out if str(out).startswith("~") else out  # Path drops the ./ of ./~name


def special_file(path: str | bytes | Path) -> str:
    """Return what exists at `path` if that is not a regular file, such as "a FIFO", else "". Links are
    followed. Opening a FIFO would wait forever, and reading a device may not end.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError:  # open() will give the reason
        return ""
    kinds = ((stat.S_ISREG, ""), (stat.S_ISDIR, "a directory"), (stat.S_ISFIFO, "a FIFO"))
    return next((name for is_kind, name in kinds if is_kind(mode)), "a device or a socket")


def starts_with(start: bytes) -> Callable[[Path], bool]:
    """Return a function for `check_output` that recognizes files by their first bytes."""

    def recognizes(path: Path) -> bool:
        with open(path, "rb") as file:
            return file.read(len(start)) == start

    return recognizes


def check_output(
    path: str | Path, flag: str, kind: str, recognizes: Callable[[Path], bool], reads: Sequence[Path] = ()
) -> tuple[Path, str]:
    """Check, before a program works for long, that it may write its result to `path`: that there is no file
    yet, or an empty one, or one of the same kind.

    Return the file to write, with links resolved, and a line to print if it replaces a file, else "". Raises
    UserError if `path` cannot be written or has a file of another kind.

    flag: the one that names the file. kind: in words, with its article. recognizes: returns whether an
    existing file is of that kind. reads: the files that the program reads.
    """
    path = user_path(path)
    target = Path(os.path.realpath(path))
    special = special_file(target)
    problem = (
        f"it is {special}, not a regular file"
        if special
        else f"{target.parent} is not a folder"
        if not os.path.isdir(target.parent)
        else f"no permission to write to {target.parent}"
        if not os.access(target.parent, os.W_OK | os.X_OK)
        else ""
    )
    if problem:
        raise UserError(f"cannot write {path}: {problem}; choose another {flag}")
    try:
        if not target.exists() or not target.stat().st_size:
            return target, ""
        if any(os.path.exists(other) and target.samefile(other) for other in reads):
            raise UserError(f"cannot write {path}: it is the file that is read; choose another {flag}")
        known = recognizes(target)
    except OSError as error:
        raise UserError(f"cannot replace {path}: {error.strerror}; choose another {flag}") from None
    if not known:
        raise UserError(
            f"{path} exists and is not {kind}, so it is not replaced: choose another {flag}, or move it away"
        )
    return target, f"replaces {path}, {kind}"


def write_atomically(path: Path, write: Callable[[BinaryIO], object], keep_as: Path | None = None) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to the disk and rename it to `path`. Several
    processes may do this at once. Raises UserError instead of OSError.

    keep_as: the old file is kept under this name. At every moment there are at least as many complete files
    as before.
    """
    stem = os.fsdecode(os.fsencode(path.name)[:200])  # so that the temporary name is not too long
    temporary = path.with_name(f"{stem}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(temporary, "xb") as file:
            _remove_leftovers(path.parent, stem, os.fstat(file.fileno()).st_mtime)
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if keep_as is not None and path.exists():
            os.replace(path, keep_as)
        os.replace(temporary, path)
    except OSError as error:
        kept = "; the file that was there before is unchanged" if os.path.exists(path) else ""
        raise UserError(f"cannot write {path}: {reason(error)}{kept}") from None
    finally:
        with suppress(OSError):  # it was renamed, or the file system does not allow removing it
            temporary.unlink()


def _remove_leftovers(folder: Path, stem: str, now: float) -> None:
    """Remove temporary files that killed processes have left. now: by the clock of the file system."""
    leftover = re.compile(re.escape(stem) + r"\.\d+-[0-9a-f]{8}\.tmp")
    with suppress(OSError):  # another process has removed it, or the folder cannot be read
        for name in filter(leftover.fullmatch, os.listdir(folder)):
            if (folder / name).stat().st_mtime < now - LEFTOVER_SECONDS:
                (folder / name).unlink()


def reason(error: Exception) -> str:
    """Return why an operation on a file failed, in one line."""
    return getattr(error, "strerror", None) or " ".join(str(error).split())
