"""A lower bound of the memory that one step needs. It is compared with the memory that there is before the
networks are built and the workers start, since the system may kill a process that runs out of memory.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

from util.effect import without_effect
from util.errors import UserError
from util.fields import Config


class Need(NamedTuple):
    what: str
    bytes: int
    fields: tuple[str, ...]  # of the config, which lower it


def least_needs(
    config: Config, sides: Sequence[int], channels: int, n_x: int, n_u: int, labeled: int
) -> list[Need]:
    """Return what one process certainly needs in a step, in fp32: its images, the bank and the prior. The
    networks and what they compute are not counted.

    sides: of the weak and the strong views, in pixels. n_x, n_u: labeled and unlabeled images in a step of
    the process. labeled: the number of all labeled images (K).
    """
    weak, *strong = sides
    unused = without_effect(config)
    pixels = (n_x + n_u) * weak**2 + n_u * sum(side**2 for side in strong)
    needs = [Need("images", 4 * channels * pixels, ("batch_size", "mu", "image_size"))]
    if "bank_m" not in unused:
        needs.append(Need("bank", 4 * labeled * config.dim, ("dim",)))
    if "da_len" not in unused:
        needs.append(Need("prior", 4 * config.da_len * config.cls, ("da_len",)))
    return [need._replace(fields=tuple(f for f in need.fields if f not in unused)) for need in needs]


def check_memory(needs: Sequence[Need], available: int | None, place: str) -> None:
    """Raise UserError if `needs` are more than the bytes that are available in a `place`; None: not known."""
    total = sum(need.bytes for need in needs)
    if available is None or total <= available:
        return
    largest = max(needs, key=lambda need: need.bytes)
    *flags, last = (f"--{name.replace('_', '-')}" for name in largest.fields)
    raise UserError(
        f"one step needs at least {total / 1e9:,.1f} GB, most of it for its {largest.what}, but {place} has "
        f"{available / 1e9:,.1f} GB: lower {' or '.join(filter(None, [', '.join(flags), last]))}"
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
