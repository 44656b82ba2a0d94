"""Mistakes a user can mend end in one line on stderr and exit code 2, never in a traceback."""

import argparse
import multiprocessing.util
import os
import sys
import threading
import traceback
from typing import Callable, NoReturn, Optional


class UserError(Exception):
    """One line: what is wrong, where, and what to do about it."""


class Parser(argparse.ArgumentParser):
    """A command line whose mistakes are UserErrors, and whose flags are never abbreviated."""

    def __init__(self, description: str):
        super().__init__(description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists every flag")


def cli_main(
    main: Callable[[], None],
    interrupted: str = "interrupted",
    describe_error: Callable[[RuntimeError], Optional[str]] = lambda error: None,
) -> None:
    """Call `main`; a UserError becomes one line and exit code 2, Ctrl-C the line `interrupted` and exit code
    130.

    describe_error: a line for a RuntimeError that is nobody's mistake in this process, such as another one that was
    lost; exit code 1.
    """
    try:
        main()
        return
    except UserError as error:  # from a worker process, PyTorch hands it on with the traceback before it
        message = str(error).rpartition("util.errors.UserError: ")[2].strip()
        end, code = error, _print_last_line(f"error: {message}", 2)
    except KeyboardInterrupt as error:
        end, code = error, _print_last_line(interrupted, 130)
    except Exception as error:
        line = describe_error(error) if isinstance(error, RuntimeError) else None
        if line is not None:
            _exit_now(line)
        traceback.print_exc()
        end, code = error, 1
    traceback.clear_frames(
        end.__traceback__
    )  # ends workers that a frame still holds; asked by Python's exit, they take long
    sys.exit(code)


def _exit_now(line: str) -> NoReturn:
    """End, exit code 1, without what still waits for a lost rank, which would not let the process end."""
    _print_last_line(f"error: {line}", 1)
    for thread in threading.enumerate():
        if not thread.daemon and thread is not threading.main_thread():
            thread.join()  # a checkpoint on its way to the disk
    multiprocessing.util._run_finalizers()  # files of the workers' queues
    os._exit(1)


def _print_last_line(line: str, code: int) -> int:
    print(f"\n{line}" if sys.stdout.isatty() else line, file=sys.stderr, flush=True)
    return code
