"""A polite end: a signal before a time limit or a preemption, after which all ranks stop at the same step.

It imports no PyTorch, so that train_semi.py can listen before the seconds which that takes.
"""

import signal
from contextlib import contextmanager
from typing import Iterator

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
REQUEUE_EXIT_CODE = (
    75  # exit code of a run that was asked to stop and can go on (EX_TEMPFAIL): script/train.sh requeues it
)
WORKER_GRACE_SECONDS = 30  # s
_received: list[int] = []


def catch_signals() -> None:
    """From now on SIGUSR1 and SIGTERM do not end this process, but are remembered."""
    for number in SIGNALS:
        signal.signal(number, lambda number, frame: _received.append(number))


def restore_default_handlers() -> None:
    """They end this process again, which nobody will ask."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def stop_requested() -> bool:
    """Whether one has come."""
    return bool(_received)


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Processes started here never notice these signals and Ctrl-C, unless they ask for them. This one gets
    them afterwards.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (*SIGNALS, signal.SIGINT))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def interrupt_deferred() -> Iterator[None]:
    """Ctrl-C is heard when this is over: what is half begun could not be ended without a noise."""
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        raise KeyboardInterrupt


def ignore_signals() -> None:
    """In a worker process: a signal is meant for the process that trains, which needs its images until the
    ranks have agreed on a last step. SIGTERM ends the worker all the same, after GRACE seconds.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(WORKER_GRACE_SECONDS))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
