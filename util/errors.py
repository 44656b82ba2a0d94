"""How a program starts and ends. An error that a user can fix is one line on stderr and exit code 2; only a
bug of ours has a traceback, which --debug shows.
"""

import argparse
import io
import multiprocessing.util
import os
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from util.run import preempt

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LOST_OUTPUT_EXIT_CODE = 128 + signal.SIGPIPE  # as a shell reports it for other programs
OUT_OF_MEMORY = ("MemoryError", "OutOfMemoryError", "DefaultCPUAllocator: can't allocate memory")


class UserError(Exception):
    """One line: what is wrong, where, and what to do about it."""


class Parser(argparse.ArgumentParser):
    """A command line whose errors are UserErrors, and whose flags cannot be abbreviated."""

    def __init__(self, description: str | None):
        super().__init__(description=description, allow_abbrev=False)
        self.add_argument("--debug", action="store_true", help="show the traceback of an unexpected error")

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists every flag")


def start_program(parse: Callable[[], object], output_may_be_lost: bool = False) -> None:
    """Check the command line with `parse` before a program imports PyTorch, which takes seconds: --help and a
    wrong flag need not wait for it. From now on Ctrl-C prints one line, during the imports too.

    output_may_be_lost: the program goes on without a word when its output cannot be written, as when the
    terminal is closed or `head` has ended.
    """
    _open_closed_streams()
    if output_may_be_lost:
        sys.stdout, sys.stderr = _without_write_errors(sys.stdout), _without_write_errors(sys.stderr)
    # DDP warns if a step uses all parameters, although it cannot know that the next one does so too. PyTorch
    # reads the variable when it is imported.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    cli_main(parse)
    preempt.handle([signal.SIGINT], _end_at_once)


def cli_main(
    main: Callable[[], object],
    interrupted: Callable[[], str] = lambda: "interrupted",
    describe_error: Callable[[RuntimeError], str | None] = lambda error: None,
) -> None:
    """Call `main`. A UserError becomes one line and exit code 2; Ctrl-C becomes the line `interrupted()` and
    exit code 130; output that is not read any more becomes exit code 141 without a line.

    describe_error: returns a line for a RuntimeError whose cause lies in another process, such as a lost
    rank, and None for any other error, which is a bug of ours. The exit code is 1 in both cases.
    """
    error: BaseException
    _open_closed_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):  # file names may have bytes that are not UTF-8
        sys.stdout.reconfigure(errors="backslashreplace")
    preempt.handle([signal.SIGINT], signal.default_int_handler)
    try:
        try:
            main()
        except SystemExit:
            _flush_output()
            raise
        _flush_output()
        return
    except UserError as e:
        # PyTorch re-raises the UserError of a worker process with the worker's traceback before its message.
        line, code = f"error: {str(e).rpartition('util.errors.UserError: ')[2].strip()}", 2
        error = e
    except KeyboardInterrupt as e:
        line, code, error = interrupted(), 130, e
    except Exception as e:  # not swallowed: described in a line, and printed with its traceback on request
        if isinstance(e, BrokenPipeError) and _output_is_lost():
            os._exit(LOST_OUTPUT_EXIT_CODE)  # not sys.exit, which writes the rest of the output once more
        if isinstance(e, RuntimeError) and (lost := describe_error(e)) is not None:
            exit_at_once(lost)
        if "--debug" in sys.argv:
            traceback.print_exc()
        (line, code), error = _describe(e), e
    _print_last_line(line)
    # The frames hold the data loader: freeing it now ends its workers at once, while at Python's exit it
    # takes long.
    traceback.clear_frames(error.__traceback__)
    sys.exit(code)


def _describe(error: Exception) -> tuple[str, int]:
    """Return one line about an unexpected error, with the place in this repository that it came from, and the
    exit code.
    """
    last_line = traceback.format_exception_only(error)[-1].strip().splitlines()[-1]
    if any(name in last_line for name in OUT_OF_MEMORY):
        advice = "lower --batch-size, --mu, --image-size, --workers or, with simmatchv2, --k"
        return f"error: out of memory ({last_line[:200]}): {advice}", 2
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename.startswith(ROOT) and "site-packages" not in frame.filename
    ]
    place = f" ({os.path.relpath(frames[-1].filename, ROOT)}, line {frames[-1].lineno})" if frames else ""
    if isinstance(error, OSError) and not isinstance(error, ConnectionError):
        return f"error: the operating system refused an operation: {last_line[:300]}{place}", 2
    advice = "it is printed above" if "--debug" in sys.argv else "--debug shows it"
    return (
        f"error: this is a bug, please report it with its traceback ({advice}): {last_line[:300]}{place}",
        1,
    )


def _open_closed_streams() -> None:
    """Open /dev/null for a standard stream that is closed. Otherwise the next file that the program opens
    gets its number, and what libraries print goes to that file.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # as Python starts with a closed one
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))


def _flush_output() -> None:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UserError(f"cannot write the output: {error.strerror}") from None


def _output_is_lost() -> bool:
    """Return whether no process reads the standard output any more."""
    poller = select.poll()
    poller.register(1, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poller.poll(0))


def _end_at_once(number: int, frame: Any) -> NoReturn:
    _print_last_line("interrupted")
    os._exit(130)


class _WithoutWriteErrors(io.FileIO):
    """A file whose writes drop what cannot be written."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def _without_write_errors(stream: Any) -> io.TextIOWrapper:
    """Return a text file for the descriptor of `stream` that drops what cannot be written."""
    stream.flush()
    raw = io.BufferedWriter(_WithoutWriteErrors(os.dup(stream.fileno()), "w"))
    newline, buffering = None, (stream.line_buffering, stream.write_through)
    return io.TextIOWrapper(raw, stream.encoding, stream.errors, newline, *buffering)


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


def printable(text: str) -> str:
    """Return `text` with line ends, other control characters and bytes that are not UTF-8, all of which a
    file name may hold, written as escapes: \\n, \\xff.
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1].replace("\\udc", "\\x") for c in text)


def _print_last_line(line: str) -> None:
    line = printable(line)
    print(f"\n{line}" if sys.stdout.isatty() else line, file=sys.stderr, flush=True)
