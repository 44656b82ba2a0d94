"""A lower bound of the memory that one step needs. It is compared with the memory that there is before the
networks are built and the workers start, since the system may kill a process that runs out of memory.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from util.errors import UserError


def check_memory(
    sides: Sequence[int], channels: int, n_x: int, n_u: int, available: int | None, place: str
) -> None:
    """Raise UserError if the images of a step, in fp32, need more than the bytes that are available in a
    `place`; None: not known. What the networks and the method need is not counted.

    sides: of the weak and the strong views, in pixels. n_x, n_u: labeled and unlabeled images in a step of
    the process.
    """
    weak, *strong = sides
    needed = 4 * channels * ((n_x + n_u) * weak**2 + n_u * sum(side**2 for side in strong))
    if available is not None and needed > available:
        raise UserError(
            f"the images of one step need {needed / 1e9:,.1f} GB, but {place} has {available / 1e9:,.1f} GB: "
            "lower --batch-size or --mu, or --image-size if the data set has it"
        )


def memory_of(device: torch.device) -> tuple[int | None, str]:
    """Return the bytes of memory of a device, and its name for a message."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory, "the GPU"
    return machine_memory(), "this machine"


def machine_memory(root: Path = Path("/")) -> int | None:
    """Return the bytes of memory of this machine or, if that is less, the limit of this process's cgroups,
    which a container or Slurm sets. None if Linux's files with these numbers cannot be read.
    """
    return min(_limits(root), default=None)


def _limits(root: Path) -> Iterator[int]:
    with suppress(OSError, ValueError):
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemTotal:"):
                yield 1024 * int(line.split()[1])
    with suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            base, name = root / "sys/fs/cgroup", "memory.max"  # version 2
            if controllers:
                base, name = base / "memory", "memory.limit_in_bytes"  # version 1
            if not controllers or "memory" in controllers.split(","):
                folder = base / group.strip("/")
                yield from _limits_of_groups(folder, base, name)


def _limits_of_groups(folder: Path, base: Path, name: str) -> Iterator[int]:
    """Read the limit of a cgroup and of all that contain it, up to `base`."""
    for group in (folder, *folder.parents):
        if group.is_relative_to(base):
            with suppress(OSError, ValueError):  # "max": it has no limit
                yield int((group / name).read_text())
