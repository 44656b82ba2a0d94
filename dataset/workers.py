"""Worker processes that load the items of a dataset ahead of time."""

import contextlib
import mmap
import multiprocessing
import multiprocessing.util
import os
import pickle
import resource
import signal
import socket
import sys
import tempfile
import threading
import warnings
import weakref
from collections.abc import Iterator, Sequence
from multiprocessing import connection, forkserver, queues, resource_tracker
from multiprocessing.reduction import ForkingPickler
from typing import Any, NamedTuple

from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader, Dataset, default_convert

from dataset.shared_memory import describe_shared_memory, free_and_total, shared_memory_warning
from util import dist_utils
from util.errors import UserError
from util.run import preempt

# Modules that take long to import. The helper process imports those that this process has imported, once for
# all workers; the repository's own files are imported quickly, when the dataset is unpickled.
PRELOADED = ("numpy", "PIL.Image", "torch", "torchvision")
LOADERS: weakref.WeakSet["PrefetchLoader"] = weakref.WeakSet()  # those of this process


class Undelivered(NamedTuple):
    """What the training process gets in place of an item that could not be sent or received."""

    cause: str
    free: int  # shared memory at that time, in bytes
    total: int
    lost_worker: bool = False  # the connection to the worker broke


class PrefetchLoader:
    """A DataLoader over `dataset` in `order` whose worker processes start once and serve every pass.

    The workers are forked from a helper process (Python's "forkserver"), never from this one. A fork copies
    locks in their current state, including those held by threads that the copy does not have, such as gloo's,
    NCCL's, or the one that writes a checkpoint. A worker that needs such a lock waits forever, and all ranks
    with it. (This happened with CPython 3.11, on the lock of its list of threads.) The workers start in the
    constructor and not at the first pass, so that editing a source file during a run does not change the run.
    """

    def __init__(
        self, dataset: Dataset, order: Sequence[Any], workers: int, pin_memory: bool, item_bytes: int = 0
    ):
        """dataset: must be picklable. order: of the items. workers: with 0, this process loads the items
        itself. item_bytes: of the tensors of an item. Raises UserError if the workers cannot start.
        """
        self.shared_bytes = 0  # most bytes of shared memory in use at a time
        self.processes: list[Any] = []
        if workers:
            # A lock of the queues takes a page. DataLoader keeps two items per worker ahead of that in use.
            lock_bytes = mmap.PAGESIZE * (16 + 4 * workers)
            self.shared_bytes = lock_bytes + min(2 * workers + 1, len(order)) * item_bytes
            LOADERS.add(self)
            _check_start(workers, lock_bytes)
            _start_helper()
        self.order, self.sampler = order, ResettableSampler()
        # More workers than cores are the user's choice, as with a slow network file system.
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        self.loader = DataLoader(
            dataset,
            batch_size=None,
            sampler=self.sampler,
            num_workers=workers,
            pin_memory=pin_memory,
            persistent_workers=workers > 0,
            worker_init_fn=_init_worker,
            collate_fn=_Item if workers else None,
            multiprocessing_context="forkserver" if workers else None,
        )
        if workers:
            earlier = multiprocessing.active_children()
            with preempt.interrupt_deferred():
                iter(self.loader)  # an empty pass, which starts the workers
            self.processes = [p for p in multiprocessing.active_children() if p not in earlier]
            weakref.finalize(self, _end_workers, self.loader._iterator).atexit = False

    def __iter__(self) -> Iterator[Any]:
        """Raises UserError when a worker has ended, or when an item cannot be sent or received."""
        self.sampler.order = self.order
        try:
            for item in self.loader:
                if isinstance(item, Undelivered):
                    lost = item.lost_worker and self._wait_for_end(seconds=5)
                    raise UserError(self._lost_worker() if lost else describe_undelivered(item))
                yield item
        except RuntimeError as error:
            if "exited unexpectedly" not in str(error) and "killed by signal" not in str(error):
                raise
            raise UserError(self._lost_worker()) from None

    def _wait_for_end(self, seconds: float) -> bool:
        """Return whether a worker ends within this time, or has ended."""
        return bool(connection.wait([process.sentinel for process in self.processes], seconds))

    def _lost_worker(self) -> str:
        """Return the message about a worker that has ended."""
        if any(process.exitcode == -signal.SIGBUS for process in self.processes):
            return (
                "a worker process that loads images was killed by SIGBUS, most likely because shared memory "
                f"is full: {describe_shared_memory(needed_shared_memory(), *free_and_total())}"
            )
        return (
            "a worker process that loads images has ended: the lines above say why; if there are none, "
            "it was killed, most likely out of memory (lower --workers or --batch-size). The same "
            "command continues"
        )


class ResettableSampler:
    """The order of the next pass. Persistent workers need one sampler for all passes."""

    def __init__(self) -> None:
        self.order: Sequence[Any] = ()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.order)


def _end_workers(iterator: Any) -> None:
    """End the workers, and the threads that send them the numbers of the items.

    A thread that ends late frees the locks of its queue itself. If Python exits in between, the resource
    tracker prints warnings about locks that are gone.
    """
    threads = [queue._thread for queue in iterator._index_queues if queue._thread is not None]
    iterator._shutdown_workers()
    for thread in threads:
        thread.join(timeout=5)


def check_shared_memory() -> str:
    """Return a warning if there is less shared memory than the loaders of this process need, else ""."""
    return shared_memory_warning(needed_shared_memory(), *free_and_total())


def needed_shared_memory() -> int:
    """Return the bytes that items may take at a time: of all loaders, of all ranks on this machine."""
    ranks = max(1, dist_utils.HOSTNAMES.count(socket.gethostname()))
    return ranks * sum(loader.shared_bytes for loader in LOADERS)


def describe_undelivered(item: Undelivered) -> str:
    """Return the message about an item that could not be sent or received."""
    # A living worker that breaks the connection has no file number left, and "ancdata" is how Python words
    # the same in the receiver.
    if item.lost_worker or "Too many open files" in item.cause or "ancdata" in item.cause:
        return _too_many_open_files()
    if "No space left" in item.cause or "unable to allocate shared memory" in item.cause:
        memory = describe_shared_memory(needed_shared_memory(), item.free, item.total)
        return f"a worker process cannot send images, because shared memory is full: {memory}"
    return f"an item cannot be sent from a worker process: {item.cause}"


def _too_many_open_files() -> str:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return (
        f"workers need more than the {limit} open files that a process may have: raise the limit (ulimit -n "
        f"{max(4096, 2 * limit)}), or lower --workers (0 needs none)"
    )


def _check_start(workers: int, lock_bytes: int) -> None:
    """Raise UserError if the workers cannot start; PyTorch's DataLoader would print tracebacks."""
    try:
        with contextlib.ExitStack() as stack:
            for _ in range(16 + 8 * workers):  # twice the number of the pipes
                stack.enter_context(open(os.devnull))
    except OSError:
        raise UserError(_too_many_open_files()) from None
    free, total = free_and_total()
    if free < lock_bytes:
        memory = describe_shared_memory(needed_shared_memory(), free, total)
        raise UserError(f"workers cannot start, because shared memory is full: {memory}")


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
    signal.signal(signal.SIGBUS, signal.SIG_DFL)  # the training process reports it, in place of PyTorch
    # The thread that sends tensors' files calls it; the training process reports that a file did not arrive.
    sys.excepthook = lambda *error: None
    queues.Queue._on_queue_feeder_error = _send_error  # type: ignore[attr-defined]
    # PyTorch's workers watch their parent, which here is the helper, and the helper waits for the workers. So
    # each worker also watches the training process.
    threading.Thread(target=_exit_with, args=(multiprocessing.parent_process(),), daemon=True).start()


def _exit_with(process: Any) -> None:
    process.join()
    os._exit(1)


def _send_error(queue: queues.Queue, error: Exception, result: Any) -> None:
    """Send the reason why `result` cannot be sent.

    Python's queue calls it in the thread that pickles and sends. By default it would print the error and drop
    the result, which the training process would wait for forever.
    """
    if isinstance(error, BrokenPipeError):
        os._exit(1)  # the training process has ended
    index, data = result
    if isinstance(data, ExceptionWrapper):  # an error of the dataset, whose class cannot be pickled
        data.exc_type = RuntimeError
        queue.put((index, data))
    else:
        queue.put((index, _undelivered(error)))


class _Item:
    """An item of a worker; it arrives as the item itself, or as Undelivered."""

    def __init__(self, item: Any):
        self.item = default_convert(item)

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickle, (bytes(ForkingPickler.dumps(self.item)),)


def _unpickle(data: bytes) -> Any:
    """Unpickle an item in the training process, which receives the files of its tensors from the worker."""
    try:
        return pickle.loads(data)
    except (OSError, RuntimeError, EOFError) as error:
        lost_worker = isinstance(error, (ConnectionError, EOFError, FileNotFoundError))
        return _undelivered(error)._replace(lost_worker=lost_worker)


def _undelivered(error: Exception) -> Undelivered:
    return Undelivered(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}", *free_and_total())
