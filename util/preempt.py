"""A polite end: a signal before a time limit or a preemption, after which all ranks stop at the same step."""
import signal
from typing import Optional

from util import dist_utils

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
CODE = 75                   # exit code of a run that was asked to stop and can go on (EX_TEMPFAIL): script/train.sh requeues it


class Preempt:
    """Listens for SIGUSR1 and SIGTERM. They end the run at the next step on which all ranks agree."""

    def __init__(self) -> None:
        self.signal: Optional[int] = None
        for number in SIGNALS:
            signal.signal(number, self._take)

    def _take(self, number: int, frame: object) -> None:
        self.signal = number

    def asked(self, done: int, every: int) -> bool:
        """Whether to stop after `done` steps, the same answer on all ranks; these ask each other once in `every` steps."""
        if dist_utils.world_size() > 1 and done % every:
            return False
        return dist_utils.anywhere(self.signal is not None)


GRACE = 30                  # s


def spare_worker() -> None:
    """In a worker process: the signal is meant for the process that trains, which needs its images until the ranks have
    agreed on a last step. SIGTERM ends the worker all the same, after GRACE seconds.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(GRACE))
