"""One run at a time writes to an output directory: a lock file in it names the process that does.

The file is locked with flock, which ends with the process, however that ends. So a start that gets the lock
on the host of the process named in the file knows that this process is gone. Between hosts, flock may have no
effect, depending on how the file system is mounted. So the owner also touches the file every TOUCH_SECONDS,
and a start on another host watches it for a while. A job that Slurm has requeued keeps its number and has a
larger start number; Slurm runs one start of a job at a time, so the later one takes over without watching. An
earlier start that still lives, on a node that Slurm has lost, finds its lock gone before it saves and stops.
"""

import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from util.errors import UserError

TOUCH_SECONDS = 5.0
WATCH_SECONDS = 4 * TOUCH_SECONDS  # network file systems show another host's changes late
EARLIER_START_SECONDS = 120.0  # how long to wait for the flock of an earlier start of the same job


class RunLock:
    """Holds lock files until it is closed, as a context manager."""

    def __init__(self, paths: Sequence[Path], say: Callable[[str], None]):
        """Lock the files, whose directories are made if necessary. Raises UserError if another process holds
        one. say: prints a line before a wait.
        """
        self.files: list[_LockFile] = []
        try:
            for path in paths:
                self.files.append(_LockFile(path, say))
        except UserError:
            self.close()
            raise
        self.closed = threading.Event()
        threading.Thread(target=self._touch, daemon=True).start()

    def check(self) -> None:
        """Raise UserError if another start has taken over a file."""
        for file in self.files:
            file.check()

    def close(self) -> None:
        """Remove the files, and those directories made for them that are empty."""
        for file in reversed(self.files):
            file.close()
        self.files = []

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.closed.set()
        self.close()

    def _touch(self) -> None:
        while not self.closed.wait(TOUCH_SECONDS):
            for file in list(self.files):
                with suppress(OSError):
                    os.utime(file.descriptor)


class _LockFile:
    def __init__(self, path: Path, say: Callable[[str], None]):
        self.path, self.say = path, say
        restarts = os.environ.get("SLURM_RESTART_COUNT", "")
        self.own = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "job": os.environ.get("SLURM_JOB_ID"),
            "start": int(restarts) if restarts.isdecimal() else 0,
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        self.made = [folder for folder in (path.parent, *path.parent.parents) if not folder.exists()]
        self.descriptor = -1
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._take()
        except OSError as error:
            self._remove_made()
            raise UserError(
                f"cannot write to output directory {path.parent}: {error.strerror}; choose another with "
                "--output-dir"
            ) from None

    def _take(self) -> None:
        deadline: float | None = None  # until which an earlier start of this job may keep the lock
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            locked = _flock(descriptor)
            if not _is_same_file(descriptor, self.path):  # it was removed meanwhile
                os.close(descriptor)
                continue
            owner = _read(descriptor)
            if not owner and os.fstat(descriptor).st_size:
                os.close(descriptor)
                raise UserError(
                    f"{self.path} is not the lock of a run: move it away, or choose another --output-dir"
                )
            earlier_start = _is_earlier_start(owner, self.own)
            if locked is False and earlier_start:
                os.close(descriptor)
                if deadline is None:
                    deadline = time.monotonic() + EARLIER_START_SECONDS
                    self.say(f"waits for start {owner['start']} of this job, on {owner.get('host')}, to end")
                if time.monotonic() > deadline:
                    self.path.unlink()
                time.sleep(1)
                continue
            gone = not owner or earlier_start or (locked and owner.get("host") == self.own["host"])
            if locked is False or not (gone or self._is_untouched(descriptor, owner)):
                os.close(descriptor)
                raise UserError(
                    f"another run writes to {self.path.parent}: {_describe(owner)}: wait for it, stop it, or "
                    f"choose another --output-dir (if it has ended, remove {self.path})"
                )
            content = json.dumps(self.own).encode()
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, content, 0)
            self.descriptor = descriptor
            return

    def _is_untouched(self, descriptor: int, owner: dict[str, Any]) -> bool:
        """Watch the file of a process on another host: whether that process does not touch it."""
        self.say(
            f"looks for {WATCH_SECONDS:.0f} s whether {_describe(owner)} still writes to {self.path.parent}"
        )
        before = os.fstat(descriptor).st_mtime_ns
        end = time.monotonic() + WATCH_SECONDS
        while time.monotonic() < end:
            time.sleep(1)
            # A network file system asks the server when a file is opened.
            with open(self.path, "rb") as file:
                if os.fstat(file.fileno()).st_mtime_ns != before:
                    return False
        return True

    def check(self) -> None:
        try:
            with open(self.path, "rb") as file:
                found = _read(file.fileno())
        except OSError:
            return  # it was removed by hand, or the file system does not answer, which the write will tell
        if found != self.own:
            raise UserError(
                f"{self.path} is no longer this run's: {_describe(found)} writes to {self.path.parent} now, "
                "so this start stops without saving"
            )

    def close(self) -> None:
        if self.descriptor < 0:
            return
        with suppress(OSError):
            if _is_same_file(self.descriptor, self.path) and _read(self.descriptor) == self.own:
                self.path.unlink()
        os.close(self.descriptor)
        self.descriptor = -1
        self._remove_made()

    def _remove_made(self) -> None:
        for folder in self.made:
            with suppress(OSError):  # it is not empty
                folder.rmdir()


def _flock(descriptor: int) -> bool | None:
    """Lock the file. Return False if another process holds the lock, and None if the file system has none."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError:
        return None


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _read(descriptor: int) -> dict[str, Any]:
    """Return what a lock file says of its owner; nothing if it says nothing that can be read."""
    try:
        owner = json.loads(os.pread(descriptor, 4096, 0))
    except (ValueError, RecursionError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _is_earlier_start(owner: dict[str, Any], own: dict[str, Any]) -> bool:
    start = owner.get("start")
    return (
        own["job"] is not None
        and owner.get("job") == own["job"]
        and isinstance(start, int)
        and (start < own["start"])
    )


def _describe(owner: dict[str, Any]) -> str:
    if not owner:
        return "a process that did not give its name"
    job = f", Slurm job {owner.get('job')}, start {owner.get('start')}" if owner.get("job") else ""
    return f"process {owner.get('pid')} on {owner.get('host')}{job}, since {owner.get('since')}"
