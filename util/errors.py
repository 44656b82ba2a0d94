"""Mistakes a user can mend end in one line on stderr and exit code 2, never in a traceback."""
import argparse
import sys
import traceback
from typing import Callable, NoReturn


class UserError(Exception):
    """One line: what is wrong, where, and what to do about it."""


class Parser(argparse.ArgumentParser):
    """A command line whose mistakes are UserErrors, and whose flags are never abbreviated."""

    def __init__(self, description: str):
        super().__init__(description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists every flag")


def run(main: Callable[[], None], interrupted: str = "interrupted") -> None:
    """Call `main`; a UserError becomes one line and exit code 2, Ctrl-C the line `interrupted` and exit code 130."""
    try:
        main()
    except UserError as error:      # from a worker process, PyTorch hands it on with the traceback before it
        message = str(error).rpartition("util.errors.UserError: ")[2].strip()
        traceback.clear_frames(error.__traceback__)     # ends the workers that a loop there still holds
        sys.exit(_last_words(f"error: {message}", 2))
    except KeyboardInterrupt:
        sys.exit(_last_words(interrupted, 130))


def _last_words(line: str, code: int) -> int:
    print(f"\n{line}" if sys.stdout.isatty() else line, file=sys.stderr, flush=True)
    return code
