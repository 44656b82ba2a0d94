"""How the ranks meet, notice a lost one, and end."""

import atexit
import os
import socket
import threading
import time
from concurrent.futures import Future, wait
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# Imported before there is a group: its functions have the default group as their default argument. If DDP
# imported it, they would keep that group and gloo's threads until Python exits (see `_close_groups`).
import torch.distributed.nn  # noqa: F401

from util.errors import UserError
from util.heartbeat import Heartbeat
from util.rendezvous import Rendezvous, find_rendezvous
from util.run.preempt import signals_blocked

# Two groups: the default one for tensors (NCCL between GPUs), and gloo for control messages.
GLOO_GROUP: Any = None
HEARTBEAT: Heartbeat | None = None
HOSTNAMES: list[str] = []  # by rank


def dist_init(device: str, timeout_minutes: float, port: int) -> torch.device:
    """Join the other ranks, if there are any, and choose this rank's device.

    device: auto, cpu or cuda. timeout_minutes: how long a rank waits for another one, now and in any step.
    port: see util/rendezvous.py. Raises UserError if there is no such device, or if the ranks do not meet.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: there is no usable GPU here; use cpu or auto")
    rendezvous = find_rendezvous(os.environ, port)
    gpu = _choose_gpu(rendezvous) if device != "cpu" and torch.cuda.is_available() else ""
    if rendezvous.world > 1 and not dist.is_initialized():
        _meet(rendezvous, gpu, timeout_minutes)
    return torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")


def _choose_gpu(rendezvous: Rendezvous) -> str:
    """Choose the GPU of this rank and return its UUID."""
    gpus = torch.cuda.device_count()
    if gpus > 1 and rendezvous.local_rank >= gpus:
        raise UserError(
            f"rank {rendezvous.rank} is process number {rendezvous.local_rank + 1} on "
            f"{socket.gethostname()}, which has {gpus} GPUs: start at most one process for each GPU"
        )
    # Where a scheduler shows each task only its own GPU, that GPU has index 0.
    index = rendezvous.local_rank if gpus > 1 else 0
    torch.cuda.set_device(index)
    return str(torch.cuda.get_device_properties(index).uuid)


def _meet(rendezvous: Rendezvous, gpu: str, timeout_minutes: float) -> None:
    """Create the groups together with the other ranks, and start the heartbeat.

    gpu: UUID of this rank's GPU; "": it uses the CPU. Raises UserError if the ranks do not meet within the
    timeout, or if two of them use the same GPU.
    """

    def failed(reason: str) -> UserError:
        absent = HEARTBEAT.absent if HEARTBEAT else []
        reason = f"{', '.join(f'rank {r}' for r in absent)} did not come" if absent else reason
        address = f"{rendezvous.host}:{rendezvous.port}"
        return UserError(
            f"rank {rendezvous.rank} of {rendezvous.world}, on {socket.gethostname()}, did not meet the "
            f"others at {address} within {timeout_minutes:g} minutes ({reason}): "
            "look for the rank that ended or never started, and whether that port is open between the nodes"
        )

    def create() -> None:
        try:
            done.set_result(_create_groups(rendezvous, gpu, timedelta(minutes=timeout_minutes)))
        except BaseException as error:  # raised again below
            done.set_exception(error)

    # torchrun and srun end after the ranks that they started, unless they are killed.
    launched = "TORCHELASTIC_RUN_ID" in os.environ or "SLURM_STEP_ID" in os.environ
    parent, end = os.getppid() if launched else 0, time.monotonic() + 60 * timeout_minutes
    atexit.register(_close_groups)
    # In a thread, because these calls ignore Ctrl-C, and some of them their timeout.
    done: Future[list[tuple[str, str]]] = Future()
    with signals_blocked():  # the threads of the groups inherit it, so that the main thread gets all signals
        threading.Thread(target=create, daemon=True).start()
    while not wait([done], timeout=0.2).done:
        if parent and os.getppid() != parent:
            raise UserError(
                "this rank no longer waits for others, because the process that started it has ended"
            )
        if time.monotonic() > end:
            raise failed("no connection")
    try:
        facts = done.result()
    except (RuntimeError, ValueError) as error:
        raise failed(str(error).splitlines()[0][:200]) from None
    HOSTNAMES[:] = [hostname for hostname, _ in facts]
    _refuse_shared_gpus(facts)
    if HEARTBEAT:
        HEARTBEAT.start(HOSTNAMES, parent)


def _create_groups(rendezvous: Rendezvous, gpu: str, timeout: timedelta) -> list[tuple[str, str]]:
    """Return (hostname, UUID of the GPU) of every rank."""
    global GLOO_GROUP, HEARTBEAT
    # torchrun runs a store of its own; otherwise rank 0 does.
    runs_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"

    def connect(runs_store: bool) -> dist.Store:
        address = rendezvous.host, rendezvous.port
        # `_meet` keeps the timeout; here it would print a C++ stack.
        store = dist.TCPStore(*address, rendezvous.world, runs_store, 2 * timeout, wait_for_workers=False)
        # When torchrun starts the ranks again, its store still has the keys of the earlier start.
        return dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)

    store = connect(runs_store and rendezvous.rank == 0)
    HEARTBEAT = Heartbeat(
        connect(False), rendezvous.rank, rendezvous.world, timeout.total_seconds(), runs_store
    )
    HEARTBEAT.wait_for_all()
    dist.init_process_group(
        "nccl" if gpu else "gloo",
        store=dist.PrefixStore("group", store),
        rank=rendezvous.rank,
        world_size=rendezvous.world,
        # NCCL's timeout ends the process without naming the lost rank, so the heartbeat must come first.
        timeout=2 * timeout if gpu else timeout,
    )
    GLOO_GROUP = dist.new_group(backend="gloo", timeout=timeout)
    return all_gather_object((socket.gethostname(), gpu))


def _refuse_shared_gpus(facts: list[tuple[str, str]]) -> None:
    """facts: (hostname, UUID of the GPU) of every rank."""
    first: dict[str, int] = {}
    for number, (hostname, gpu) in enumerate(facts):
        if gpu and first.setdefault(gpu, number) != number:
            raise UserError(
                f"rank {first[gpu]} and rank {number} on {hostname} use the same GPU: start at most one "
                "process for each GPU, or let the scheduler show each task another GPU"
            )


def _close_groups() -> None:
    """End the heartbeat, destroy the process groups, and end gloo's threads with them.

    A thread of gloo that frees a tensor while Python exits aborts the process, even after a finished run. It
    ends when the last reference to its group is gone. NCCL's group is left to the exit after an error,
    because destroying it may wait for a lost rank.
    """
    global GLOO_GROUP, HEARTBEAT
    if HEARTBEAT:
        HEARTBEAT.stop()
    if dist.is_initialized():
        dist.destroy_process_group(GLOO_GROUP if dist.get_backend() == "nccl" else None)
    GLOO_GROUP = HEARTBEAT = None


def begin_phase(name: str) -> None:
    """Report what this rank does from now on, which is named if the rank is lost. All ranks must call it."""
    if HEARTBEAT:
        HEARTBEAT.advance(name)


def begin_collective() -> bool:
    """Report that this rank waits for others from now on. False if there are none."""
    if HEARTBEAT:
        HEARTBEAT.advance()
    return world_size() > 1


def describe_lost_ranks(error: RuntimeError) -> str | None:
    """Return a line that names the lost ranks if `error` says that communication with other ranks failed,
    else None. The caller must end this process.
    """
    text = str(error)
    markers = ("gloo", "NCCL", "Connection closed", "Connection reset", "Timed out", "pair closure")
    if HEARTBEAT is None or not any(marker in text for marker in markers):
        return None
    if line := HEARTBEAT.explain(timed_out="imed out" in text):
        return line
    this_rank, lines = f"rank {rank()} on {HOSTNAMES[rank()]}", text.strip().splitlines()
    if "NCCL" in text:  # its last line is the cause
        return f"NCCL failed on {this_rank}, although all ranks are alive: {lines[-1][:200]}"
    return (
        f"{this_rank} lost the connection to the other ranks, which are still alive "
        f"({lines[0][:200]}): check the network between them"
    )


def dist_end() -> None:
    """Barrier, then destroy the process group: no rank ends before rank 0 has written its last checkpoint."""
    if dist.is_initialized():
        begin_phase("the end of the run")
        all_gather_object(None)
        _close_groups()
        if dist.is_initialized():  # NCCL's
            dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def all_gather_object(x: Any) -> list[Any]:
    """Collect a small Python object of every rank -> a list in rank order, on every rank."""
    if not begin_collective():
        return [x]
    out = [None] * world_size()
    dist.all_gather_object(out, x, group=GLOO_GROUP)
    return out
