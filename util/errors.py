"""Errors that a user can fix end in one line on stderr and exit code 2, never in a traceback."""

import argparse
import multiprocessing.util
import os
import sys
import threading
import traceback
from collections.abc import Callable
from typing import NoReturn


class UserError(Exception):
    """One line: what is wrong, where, and what to do about it."""


class Parser(argparse.ArgumentParser):
    """A command line whose errors are UserErrors, and whose flags cannot be abbreviated."""

    def __init__(self, description: str):
        super().__init__(description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists every flag")


def cli_main(
    main: Callable[[], object],
    interrupted: str = "interrupted",
    describe_error: Callable[[RuntimeError], str | None] = lambda error: None,
) -> None:
    """Call `main`. A UserError becomes one line and exit code 2; Ctrl-C becomes the line `interrupted` and
    exit code 130.

    describe_error: returns a line for a RuntimeError whose cause lies in another process, such as a lost
    rank, and None for any other error, whose traceback is printed. The exit code is 1 in both cases.
    """
    error: BaseException
    try:
        main()
        return
    except UserError as e:
        # PyTorch re-raises the UserError of a worker process with the worker's traceback before its message.
        message = str(e).rpartition("util.errors.UserError: ")[2].strip()
        _print_last_line(f"error: {message}")
        error, code = e, 2
    except KeyboardInterrupt as e:
        _print_last_line(interrupted)
        error, code = e, 130
    except Exception as e:  # not swallowed: described in a line or printed with its traceback
        line = describe_error(e) if isinstance(e, RuntimeError) else None
        if line is not None:
            _print_last_line(f"error: {line}")
            _exit_without_joining()
        traceback.print_exc()
        error, code = e, 1
    # The frames hold the data loader: freeing it now ends its workers at once, while at Python's exit it
    # takes long.
    traceback.clear_frames(error.__traceback__)
    sys.exit(code)


def _exit_without_joining() -> NoReturn:
    """Exit with code 1 without waiting for a lost rank; a checkpoint that is being written is completed."""
    for thread in threading.enumerate():
        if not thread.daemon and thread is not threading.main_thread():
            thread.join()  # it writes a checkpoint
    multiprocessing.util._run_finalizers()  # type: ignore[attr-defined]  # removes the files of the workers' queues
    os._exit(1)


def printable(text: str) -> str:
    """Return `text` with line ends, other control characters and bytes that are not UTF-8, all of which a
    file name may hold, written as escapes: \\n, \\xff.
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1].replace("\\udc", "\\x") for c in text)


def _print_last_line(line: str) -> None:
    line = printable(line)
    print(f"\n{line}" if sys.stdout.isatty() else line, file=sys.stderr, flush=True)
