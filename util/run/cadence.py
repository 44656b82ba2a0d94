"""When something is due during a run, apart from what it is."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from util.config import Config


class Due(NamedTuple):
    """What is due after a step."""

    log: bool  # a train event
    diagnose: bool  # a diagnostics event
    evaluate: bool
    save: bool  # a checkpoint
    end_of_epoch: bool


def due_after(step: int, steps_per_epoch: int, config: Config) -> Due:
    """Return what is due when `step` steps are finished."""

    def every(steps: int) -> bool:
        return steps > 0 and step % steps == 0

    epoch, rest = divmod(step, steps_per_epoch)
    evaluate = rest == 0 and (epoch % config.eval_freq == 0 or epoch == config.epochs)
    return Due(
        log=every(config.print_freq) or evaluate,
        diagnose=every(config.diagnose_freq) if config.diagnose_freq else evaluate,
        evaluate=evaluate,
        save=every(config.save_freq) or evaluate,
        end_of_epoch=rest == 0,
    )


class Throughput:
    """Images per second between two train events."""

    def __init__(self, images_per_step: int, step: int):
        self.images_per_step = images_per_step
        self.restart(step)

    def restart(self, step: int) -> None:
        """Count from now on, with `step` finished steps."""
        self.time, self.step = time.monotonic(), step

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The time in this context does not count."""
        before = time.monotonic()
        yield
        self.time += time.monotonic() - before

    def take(self, step: int) -> float:
        """Return the images per second until `step` steps are finished, and restart."""
        images_per_s = (step - self.step) * self.images_per_step / (time.monotonic() - self.time)
        self.restart(step)
        return round(images_per_s, 1)
