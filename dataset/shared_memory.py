"""Shared memory, in which worker processes send tensors: how much there is, and messages about it."""

import math
import os
import sys

SHARED_MEMORY = "/dev/shm"


def free_and_total() -> tuple[int, int]:
    """Return the free bytes of shared memory and all of them."""
    if not os.path.isdir(SHARED_MEMORY):  # not on Linux: unknown
        return sys.maxsize, sys.maxsize
    status = os.statvfs(SHARED_MEMORY)
    return status.f_bavail * status.f_frsize, status.f_blocks * status.f_frsize


def shared_memory_warning(needed: int, free: int, total: int) -> str:
    """Return a warning if `needed` bytes of shared memory are not `free`, else ""."""
    if needed <= free:
        return ""
    return f"warning: workers may run out of shared memory: {describe_shared_memory(needed, free, total)}"


def describe_shared_memory(needed: int, free: int, total: int) -> str:
    """Compare the bytes of shared memory that are needed with those there are, and say what to do."""
    return (
        f"the items that are loaded ahead need up to {needed / 1e6:,.1f} MB, and {SHARED_MEMORY} has "
        f"{total / 1e6:,.1f} MB, {free / 1e6:,.1f} MB of them free; give the container more (docker "
        f"run --shm-size {math.ceil(needed / 1e9)}g, or --ipc=host), or lower --workers (0 needs none)"
    )
