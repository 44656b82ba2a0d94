"""Processes that load images: the items of a dataset, made ahead of time."""
import multiprocessing
import os
import threading
from multiprocessing import forkserver, resource_tracker
from typing import Any, Iterator, Sequence

import torch
from torch.utils.data import DataLoader, Dataset

from util import preempt
from util.errors import UserError

# What takes long to import; the repository's own files, imported in milliseconds, come with the dataset.
PRELOADED = ["numpy", "PIL.Image", "torch", "torchvision", "torch.utils.tensorboard"]


class Batches:
    """The items of `dataset` in `order`, made by `workers` processes; the same ones for every pass.

    They are copies of a helper process (Python's "forkserver"), never of this one. A fork copies locks as they are at that
    moment, held by threads that the copy does not have: of gloo, NCCL, a checkpoint on its way to the disk. A worker that
    then asks for one waits forever, and all ranks with it. (Seen with CPython 3.11: its list of threads was locked.)
    They start now, and not at the first pass, so that source files which are edited during a run change nothing in it.
    """

    def __init__(self, dataset: Dataset, order: Sequence[Any], workers: int, pin_memory: bool):
        """dataset: is sent to the workers, so it can be pickled. workers: with 0 the items are made here."""
        if workers:
            _start_helper()
        self.order, self.pass_ = order, _Pass()
        self.loader = DataLoader(dataset, batch_size=None, sampler=self.pass_, num_workers=workers, pin_memory=pin_memory,
                                 persistent_workers=workers > 0, worker_init_fn=_start_worker,
                                 multiprocessing_context="forkserver" if workers else None)
        if workers:
            iter(self.loader)           # a pass over nothing

    def __iter__(self) -> Iterator[Any]:
        """Raises UserError when a worker was killed."""
        self.pass_.order = self.order
        try:
            yield from self.loader
        except RuntimeError as error:
            if "exited unexpectedly" not in str(error) and "killed by signal" not in str(error):
                raise
            raise UserError("a process that loads images was killed, most likely for want of memory: lower --workers or "
                            "--batch-size; the same command continues") from None


class _Pass:
    """A sampler: what the next pass goes over."""

    def __init__(self) -> None:
        self.order: Sequence[Any] = ()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.order)

    def __len__(self) -> int:
        return len(self.order)


def _start_helper() -> None:
    """The process that workers are copied from; it runs until this one ends.

    Slurm sends its signals to every process of a job. The helper and Python's resource tracker would die of them, and take
    the workers along, so these are started with the signals blocked, and workers open themselves to them.
    """
    multiprocessing.set_forkserver_preload(PRELOADED)
    for start in (resource_tracker.ensure_running, forkserver.ensure_running):     # the former unblocks SIGTERM when it is done
        with preempt.blocked():
            start()


def _start_worker(_: int) -> None:
    torch.set_num_threads(1)            # workers are many; threads of each would only take the cores from the others
    preempt.spare_worker()
    # PyTorch's workers end with their parent, which here is the helper, which ends with the last of them.
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()


def _end_with(process: Any) -> None:
    process.join()
    os._exit(1)
