"""Worker processes that load the items of a dataset ahead of time."""

import multiprocessing
import multiprocessing.util
import os
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from multiprocessing import forkserver, resource_tracker
from typing import Any

from torch.utils.data import DataLoader, Dataset

from util import preempt
from util.errors import UserError

# Modules that take long to import. The helper process imports those that this process has imported, once for
# all workers; the repository's own files are imported quickly, when the dataset is unpickled.
PRELOADED = ("numpy", "PIL.Image", "torch", "torchvision")


class PrefetchLoader:
    """A DataLoader over `dataset` in `order` whose worker processes start once and serve every pass.

    The workers are forked from a helper process (Python's "forkserver"), never from this one. A fork copies
    locks in their current state, including those held by threads that the copy does not have, such as gloo's,
    NCCL's, or the one that writes a checkpoint. A worker that needs such a lock waits forever, and all ranks
    with it. (This happened with CPython 3.11, on the lock of its list of threads.) The workers start in the
    constructor and not at the first pass, so that editing a source file during a run does not change the run.
    """

    def __init__(self, dataset: Dataset, order: Sequence[Any], workers: int, pin_memory: bool):
        """dataset: must be picklable. order: of the items. workers: with 0, this process loads the items
        itself.
        """
        if workers:
            _start_helper()
        self.order, self.sampler = order, ResettableSampler()
        self.loader = DataLoader(
            dataset,
            batch_size=None,
            sampler=self.sampler,
            num_workers=workers,
            pin_memory=pin_memory,
            persistent_workers=workers > 0,
            worker_init_fn=_init_worker,
            multiprocessing_context="forkserver" if workers else None,
        )
        if workers:
            with preempt.interrupt_deferred():
                iter(self.loader)  # an empty pass, which starts the workers

    def __iter__(self) -> Iterator[Any]:
        """Raises UserError when a worker has ended."""
        self.sampler.order = self.order
        try:
            yield from self.loader
        except (RuntimeError, ConnectionError, EOFError) as error:
            ended = "exited unexpectedly" in str(error) or "killed by signal" in str(error)
            # The connection to an ended worker breaks while a tensor is received. Errors that a worker itself
            # raised begin with "Caught".
            cut_off = isinstance(error, (ConnectionError, EOFError)) and not str(error).startswith("Caught")
            if not ended and not cut_off:
                raise
            raise UserError(
                "a worker process that loads images has ended: the lines above say why; if there are none, "
                "it was killed, most likely out of memory (lower --workers or --batch-size). The same "
                "command continues"
            ) from None


class ResettableSampler:
    """The order of the next pass. Persistent workers need one sampler for all passes."""

    def __init__(self) -> None:
        self.order: Sequence[Any] = ()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.order)


def _start_helper() -> None:
    """Start the process that workers are forked from; it runs until this process ends.

    Slurm sends its signals to every process of a job. They would end the helper, and the workers with it, and
    Python's resource tracker, with a message. So both start with the signals blocked; `_init_worker` unblocks
    them in workers.
    """
    _keep_socket_paths_short()
    multiprocessing.set_forkserver_preload([name for name in PRELOADED if name in sys.modules])
    # Each start in a context of its own, because the resource tracker unblocks SIGTERM when it has started.
    for start in (resource_tracker.ensure_running, forkserver.ensure_running):
        with preempt.signals_blocked():
            start()


def _keep_socket_paths_short() -> None:
    """Put the sockets of the helper and the workers below /tmp if TMPDIR is too long for that."""
    if len(os.fsencode(tempfile.gettempdir())) > 107 - len("/pymp-12345678/listener-12345678"):
        before, tempfile.tempdir = tempfile.tempdir, "/tmp"
        multiprocessing.util.get_temp_dir()  # this process and its workers keep the directory that it creates
        tempfile.tempdir = before


def _init_worker(_: int) -> None:
    preempt.ignore_signals()
    # PyTorch's workers watch their parent, which here is the helper, and the helper waits for the workers. So
    # each worker also watches the training process.
    threading.Thread(target=_exit_with, args=(multiprocessing.parent_process(),), daemon=True).start()


def _exit_with(process: Any) -> None:
    process.join()
    os._exit(1)
