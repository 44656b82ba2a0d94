"""Ranks on this machine, which meet as those of torchrun do."""

import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as mp


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def environment(rank: int, world: int, port: int) -> dict[str, str]:
    """Return the variables from which util/rendezvous.py reads the rank of a process."""
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in values.items()}}


def call_on_ranks(function: Callable[..., None], world: int, *args: Any) -> None:
    """Call function(rank, *args) in `world` processes with one thread each, and wait for them."""
    mp.spawn(_call, (function, world, free_port(), args), nprocs=world)


def _call(rank: int, function: Callable[..., None], world: int, port: int, args: tuple) -> None:
    torch.set_num_threads(1)
    os.environ.update(environment(rank, world, port))
    function(rank, *args)
