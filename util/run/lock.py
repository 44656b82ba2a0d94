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
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from util.errors import UserError
from util.run.output_dir import cannot_write

TOUCH_SECONDS = 5.0
WATCH_SECONDS = 4 * TOUCH_SECONDS  # network file systems show another host's changes late
EARLIER_START_SECONDS = 120.0  # how long to wait for the flock of an earlier start of the same job


class RunLock(ExitStack):
    """Holds lock files until it is closed."""

    def __init__(self, paths: Sequence[Path], say: Callable[[str], None]):
        """Lock the files, whose directories are made if necessary. Raises UserError if another process holds
        one. say: prints a line before a wait.
        """
        super().__init__()
        self.files: list[_LockFile] = []
        with ExitStack() as on_error:
            on_error.callback(self.close)
            for path in paths:
                self.files.append(_LockFile(path, say))
                self.callback(self.files[-1].close)
            on_error.pop_all()
        closed = threading.Event()
        self.callback(closed.set)
        threading.Thread(target=self._touch, args=(closed,), daemon=True).start()

    def check(self) -> None:
        """Raise UserError if another start has taken over a file."""
        for file in self.files:
            file.check()

    def _touch(self, closed: threading.Event) -> None:
        while not closed.wait(TOUCH_SECONDS):
            for file in self.files:
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
        self.descriptor = -1
        self.deadline = 0.0  # until which an earlier start of this job may keep the lock; 0: there is none
        self.made = [folder for folder in (path.parent, *path.parent.parents) if not folder.exists()]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            while not self._take():
                time.sleep(1)
        except OSError as error:
            self._remove_made()
            raise cannot_write(path.parent, error) from None

    def _take(self) -> bool:
        """Try to become the owner of the file; False: try again. Raises UserError if it has another owner."""
        with ExitStack() as on_failure:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            on_failure.callback(os.close, descriptor)
            locked = _flock(descriptor)
            if not _is_same_file(descriptor, self.path):  # it was removed meanwhile
                return False
            owner = _read(descriptor)
            if not owner and os.fstat(descriptor).st_size:
                raise UserError(
                    f"{self.path} is not the lock of a run: move it away, or choose another --output-dir"
                )
            earlier_start = _is_earlier_start(owner, self.own)
            if locked is False and earlier_start:
                if not self.deadline:
                    self.deadline = time.monotonic() + EARLIER_START_SECONDS
                    self.say(f"waits for start {owner['start']} of this job, on {owner.get('host')}, to end")
                elif time.monotonic() > self.deadline:
                    self.path.unlink()
                return False
            gone = not owner or earlier_start or (locked and owner.get("host") == self.own["host"])
            if locked is False or not (gone or self._is_untouched(descriptor, owner)):
                raise UserError(
                    f"another run writes to {self.path.parent}: {_describe(owner)}: wait for it, stop it, or "
                    f"choose another --output-dir (if it has ended, remove {self.path})"
                )
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(self.own).encode(), 0)
            self.descriptor = descriptor
            on_failure.pop_all()
        return True

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
