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
            exit_at_once(line)
        traceback.print_exc()
        error, code = e, 1
    # The frames hold the data loader: freeing it now ends its workers at once, while at Python's exit it
    # takes long.
    traceback.clear_frames(error.__traceback__)
    sys.exit(code)


def exit_at_once(line: str) -> NoReturn:
    """Print `line` as an error and exit with code 1, from any thread, without waiting for a lost rank. A
    checkpoint that is being written is completed.
    """
    _print_last_line(f"error: {line}")
    for thread in threading.enumerate():
        if not thread.daemon and thread is not threading.main_thread():
            thread.join()  # it writes a checkpoint
    multiprocessing.util._run_finalizers()  # type: ignore[attr-defined]  # removes the files of the workers' queues
    os._exit(1)


def _print_last_line(line: str) -> None:
    print(f"\n{line}" if sys.stdout.isatty() else line, file=sys.stderr, flush=True)
