"""Keeps the result of a scan in a file, so that the next start only compares the folders' time stamps."""

import functools
import hashlib
import io
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from util.errors import UserError
from util.files import reason, user_path, write_atomically


class Tree(NamedTuple):
    """What a scan reads and the cache file stores."""

    classes: np.ndarray  # [C] bytes
    counts: np.ndarray  # numbers of their images    [C] int64
    names: np.ndarray  # [N] bytes
    folders: np.ndarray  # all that were read         [F] bytes
    mtimes: np.ndarray  # their time stamps          [F, 2] int64


def time_stamps(folder: bytes) -> tuple[int, int]:
    """Return mtime and ctime in ns, or −1, −1 if there is no such folder. An archiver may set back the mtime,
    but not the ctime.
    """
    try:
        status = os.stat(folder)
    except OSError:
        return -1, -1
    return status.st_mtime_ns, status.st_ctime_ns


def cache_file(root: bytes, recursive: bool, cache_dir: str | Path | None) -> Path | None:
    key = hashlib.sha256(b"format 2\0%d\0%s" % (recursive, root)).hexdigest()[:32]
    if chosen := cache_dir or os.environ.get("SIMMATCH_CACHE"):
        return user_path(chosen) / f"listing-{key}.npz"
    try:
        return Path("~/.cache/simmatch").expanduser() / f"listing-{key}.npz"
    except RuntimeError:  # the user has no home folder
        return None


def save(cache: Path, tree: Tree) -> None:
    """Write an npz file followed by its SHA-256."""
    stream = io.BytesIO()
    np.savez(stream, **tree._asdict())
    content = stream.getvalue()
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(cache, lambda file: file.writelines((content, hashlib.sha256(content).digest())))
    except (OSError, UserError) as error:
        _warn_once(
            f"listing: cannot write to {cache.parent} ({reason(error)}), so every start reads the whole "
            "tree; SIMMATCH_CACHE=DIR chooses another folder"
        )


def load(cache: Path, root: bytes, pool: ThreadPoolExecutor) -> Tree | None:
    """Read what `save` wrote. None if it is damaged, or if a folder has changed since."""
    try:
        data = cache.read_bytes()
    except OSError:
        return None
    if hashlib.sha256(memoryview(data)[:-32]).digest() != data[-32:]:
        return None
    tree = Tree(**np.load(io.BytesIO(data), allow_pickle=False))
    mtimes = pool.map(lambda folder: time_stamps(os.path.join(root, folder)), tree.folders)
    return tree if np.array_equal(tree.mtimes, list(mtimes)) else None


@functools.cache
def _warn_once(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
