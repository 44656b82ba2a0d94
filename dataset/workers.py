"""Processes that load images: the items of a dataset, made ahead of time."""

import multiprocessing
import os
import threading
from multiprocessing import forkserver, resource_tracker
from typing import Any, Iterator, Sequence

from torch.utils.data import DataLoader, Dataset

from util import preempt
from util.errors import UserError

# What takes long to import; the repository's own files, imported in milliseconds, come with the dataset.
PRELOADED = ["numpy", "PIL.Image", "torch", "torchvision", "torch.utils.tensorboard"]


class PrefetchLoader:
    """The items of `dataset` in `order`, made by `workers` processes; the same ones for every pass.

    They are copies of a helper process (Python's "forkserver"), never of this one. A fork copies locks as
    they are at that moment, held by threads that the copy does not have: of gloo, NCCL, a checkpoint on its
    way to the disk. A worker that then asks for one waits forever, and all ranks with it. (Seen with CPython
    3.11: its list of threads was locked.) They start now, and not at the first pass, so that source files
    which are edited while a run trains change nothing in it.
    """

    def __init__(self, dataset: Dataset, order: Sequence[Any], workers: int, pin_memory: bool):
        """dataset: is sent to the workers, so it can be pickled. workers: with 0 the items are made here."""
        if workers:
            _start_helper()
        self.order, self.pass_ = order, ResettableSampler()
        self.loader = DataLoader(
            dataset,
            batch_size=None,
            sampler=self.pass_,
            num_workers=workers,
            pin_memory=pin_memory,
            persistent_workers=workers > 0,
            worker_init_fn=_start_worker,
            multiprocessing_context="forkserver" if workers else None,
        )
        if workers:
            with preempt.interrupt_deferred():
                iter(self.loader)  # a pass over nothing

    def __iter__(self) -> Iterator[Any]:
        """Raises UserError when a worker has ended."""
        self.pass_.order = self.order
        try:
            yield from self.loader
        except (RuntimeError, ConnectionError) as error:
            ended = "exited unexpectedly" in str(error) or "killed by signal" in str(error)
            # A tensor on its way from a process that is no more; what a worker raises itself begins with
            # "Caught".
            cut_off = isinstance(error, ConnectionError) and not str(error).startswith("Caught")
            if not ended and not cut_off:
                raise
            raise UserError(
                "a process that loads images has ended: see above why, or, if nothing is there, it was killed, most likely "
                "for want of memory (lower --workers or --batch-size); the same command continues"
            ) from None


class ResettableSampler:
    """A sampler: what the next pass goes over."""

    def __init__(self) -> None:
        self.order: Sequence[Any] = ()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.order)


def _start_helper() -> None:
    """The process that workers are copied from; it runs until this one ends.

    Slurm sends its signals to every process of a job. The helper would die of them, and its end is that of
    the workers; Python's resource tracker would die of SIGUSR1, and say so. So both start with the signals
    blocked; workers open themselves to them.
    """
    multiprocessing.set_forkserver_preload(PRELOADED)
    for start in (
        resource_tracker.ensure_running,
        forkserver.ensure_running,
    ):  # the former unblocks SIGTERM when it is done
        with preempt.signals_blocked():
            start()


def _start_worker(_: int) -> None:
    preempt.ignore_signals()
    # PyTorch's workers end with their parent, which here is the helper, which ends with the last of them.
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()


def _end_with(process: Any) -> None:
    process.join()
    os._exit(1)
