"""Stopping on a signal before a time limit or a preemption: all ranks save and stop after the same step.

This file imports no PyTorch, so that train_semi.py can catch signals during the seconds that this import
takes.
"""

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP)  # SIGHUP: the terminal was closed
REQUEUE_EXIT_CODE = 75  # EX_TEMPFAIL: the run has stopped and can resume; script/train.sh requeues its job
WORKER_GRACE_SECONDS = 30
_received: list[int] = []


def handle(numbers: Sequence[int], handler: Callable[[int, Any], object] | signal.Handlers) -> None:
    """Set the handler of signals, except those that are ignored from the start, as SIGHUP is under nohup and
    Ctrl-C is in the background of a script.
    """
    for number in numbers:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def catch_signals() -> None:
    """From now on SIGNALS do not end this process; `stop_requested` reports them."""
    handle(SIGNALS, lambda number, frame: _received.append(number))


def restore_default_handlers() -> None:
    """Let the signals end the process again, where `stop_requested` is not polled."""
    handle(SIGNALS, signal.SIG_DFL)


def stop_requested() -> bool:
    """Whether one of the signals has arrived."""
    return bool(_received)


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Block SIGNALS and Ctrl-C. Child processes that are started in the context inherit that; this process
    receives the signals after it.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (*SIGNALS, signal.SIGINT))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def interrupt_deferred() -> Iterator[None]:
    """Defer Ctrl-C until the block ends, because interrupting the start of workers leaves tracebacks."""
    received: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: received.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if received:
        raise KeyboardInterrupt


def ignore_signals() -> None:
    """Ignore the signals in a worker process: the training process needs its images until the ranks have
    stopped.

    SIGTERM still ends the worker, after WORKER_GRACE_SECONDS.
    """
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(WORKER_GRACE_SECONDS))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
