"""The images of a data set by name, from a tree of class folders or from a list file, and files written whole
or not at all.

A scan of a tree is remembered in a cache file, so that the next start only looks at the time stamps of the
folders.
"""

import functools
import hashlib
import io
import os
import re
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Optional, Sequence, Union

import numpy as np

from util.errors import UserError

EXTENSIONS = tuple(b".jpg .jpeg .jfif .jpe .png .webp .gif .bmp .tif .tiff .ppm .pgm".split())  # in any case
RACY = 2 * 10**9  # ns: the coarsest time stamp of a file system in use (FAT) is 2 s
THREADS = 16  # folders read at a time: file servers answer many at once, and a local disk loses nothing
MOST_CLASSES = 10**6  # a larger label is a slip, and would only cost memory
INTEGER = re.compile("[+-]?[0-9]{1,18}")


class Names(Sequence[str]):
    """File names in one array, which goes to a worker as one piece; a list of texts would take three times
    the memory there.
    """

    def __init__(self, array: np.ndarray):
        self.array = array  # [N] bytes, as wide as the longest name

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, row: int) -> str:
        return os.fsdecode(self.array[row])


class Listing(NamedTuple):
    root: Path
    classes: list[str]  # names, in the order of the labels     [C]
    names: Names  # paths relative to root                [N]
    labels: np.ndarray  #                                       [N] int64


def scan(
    root: Union[str, Path], cache_dir: Optional[Union[str, Path]] = None, recursive: bool = False
) -> Listing:
    """The tree root/<class>/<image>, sorted by class, then by name (as bytes); `recursive`:
    root/<class>/…/<image>.

    Links are followed; hidden files and names without an image extension do not count. The cache is in
    `cache_dir`, else $SIMMATCH_CACHE, else ~/.cache/simmatch. Raises UserError for a tree that is not of this
    form or cannot be read.
    """
    begun = time.time_ns()
    root = _folder(root)
    start = os.fsencode(root)
    cache = _cache_file(start, recursive, cache_dir)
    with ThreadPoolExecutor(THREADS) as pool:
        found = cache and _load_cache(cache, start, pool)
        if not found:
            found = _walk_tree(start, recursive, pool)
            # A folder changed this recently may change again without a new time stamp, so this scan would not
            # notice.
            if cache and found["stamps"].max() < begun - RACY:
                _save_cache(cache, found)
    labels = np.repeat(np.arange(len(found["classes"]), dtype=np.int64), found["counts"])  # [N]
    return Listing(root, [os.fsdecode(c) for c in found["classes"]], Names(found["names"]), labels)


def list_images(root: Union[str, Path]) -> Listing:
    """All images below root, in any nesting, sorted (as bytes), without labels: they are −1. Not cached."""
    root = _folder(root)
    names = sorted(_walk(os.fsencode(root), b"", True, ())[0])
    if not names:
        raise UserError(f"folder {root} holds no images; check the path")
    return Listing(root, [], Names(np.array(names)), np.full(len(names), -1, np.int64))


def read_list(file: Union[str, Path], root: Union[str, Path]) -> Listing:
    """The images of a list file, in its order: lines `path label`, paths relative to root, labels from 0.

    A class is called by the folder of its images, or the part of their names before "_", where these and
    labels correspond one to one, else by its number. Raises UserError naming file and line.
    """
    root, file = _folder(root), Path(file)
    numbers, paths, texts = entries(read_bytes(file), str(file))
    for number, path, text in zip(numbers, paths, texts):
        if text is None or not 0 <= int(text) < MOST_CLASSES:
            raise UserError(
                f"{file}, line {number}: expected `path label`, the label a whole number from 0; got `{path}`, "
                f"label {text or 'missing'}"
            )
    if not os.path.exists(
        os.path.join(root, paths[0])
    ):  # one look tells a wrong root; the loader sees the rest
        raise UserError(
            f"{file}, line {numbers[0]}: there is no {os.path.join(root, paths[0])}; paths are relative to {root}"
        )
    labels = np.array([int(text) for text in texts], np.int64)  # [N]
    parts = [
        path.rpartition("/") for path in paths
    ]  # without folders, what stands before "_": n01440764_10026.JPEG
    pairs = {
        (label, a.rpartition("/")[2] or c.rpartition("_")[0])
        for label, (a, _, c) in zip(labels.tolist(), parts)
    }
    folders = dict(pairs)
    named = len(pairs) == len(folders) == len(set(folders.values())) and "" not in folders.values()
    classes = [folders.get(c, str(c)) if named else str(c) for c in range(labels.max() + 1)]
    return Listing(root, classes, Names(np.array([path.encode() for path in paths])), labels)


def entries(data: bytes, where: str) -> tuple[list[int], list[str], list[Optional[str]]]:
    """Line numbers, names and labels (None where a line has none) of a list: one name a line, blank lines
    left out.

    An integer after the last space is a label: names of images end in letters. Raises UserError naming
    `where` and line.
    """
    text = data.decode("utf-8-sig", "replace")
    if bad := re.search("[\0\ufffd]", text):
        number = text.count("\n", 0, bad.start()) + 1
        raise UserError(f"{where}, line {number}: this is not text; a list has one name a line")
    lines: dict[str, int] = {}
    labels = []
    for number, line in enumerate(text.split("\n"), 1):
        parts = line.rsplit(None, 1)
        label = parts.pop() if len(parts) == 2 and INTEGER.fullmatch(parts[1]) else None
        name = (line if label is None else parts[0]).strip()
        if not name:
            continue
        if name in lines:
            raise UserError(
                f"{where}, line {number}: {name} is already on line {lines[name]}; remove one of them"
            )
        lines[name] = number
        labels.append(label)
    if not lines:
        raise UserError(f"{where} is empty; a list has one name a line")
    return list(lines.values()), list(lines), labels


def read_bytes(file: Path) -> bytes:
    """Raises UserError if there is no such file or it cannot be read."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read list file {file}: {error.strerror}; check the path") from None


def write_bytes(file: Path, *parts: bytes) -> None:
    """Write `file` whole or not at all, also when several processes do so at once. Raises OSError."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as stream:
            stream.writelines(parts)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def _folder(root: Union[str, Path]) -> Path:
    path = os.path.expanduser(root)
    if not os.path.isdir(path):
        raise UserError(
            f"data folder {path} {'is not a folder' if os.path.exists(path) else 'does not exist'}; check the path"
        )
    return Path(path).resolve()


def _walk_tree(root: bytes, recursive: bool, pool: ThreadPoolExecutor) -> dict[str, np.ndarray]:
    """classes [C], counts of their images [C], names [N]; folders that were read [F] and their time stamps
    [F, 2].
    """
    names, counts, read = (
        [],
        [],
        [(b"", _mtimes(root))],
    )  # before reading: a change meanwhile shows on the next start
    try:
        with os.scandir(root) as found:
            classes = sorted(
                entry.name for entry in found if not entry.name.startswith(b".") and entry.is_dir()
            )
    except OSError as error:
        raise _unreadable(root, error) from None
    if not classes:
        raise UserError(
            f"data folder {os.fsdecode(root)} has no class folders; expected <class>/<image> below it"
        )
    for c, (images, seen) in zip(classes, pool.map(lambda c: _walk(root, c, recursive, ()), classes)):
        if not images:
            raise UserError(
                f"class folder {os.fsdecode(os.path.join(root, c))} holds no images; add some or remove it"
            )
        names += sorted(images)
        counts.append(len(images))
        read += seen
    folders, mtimes = zip(*read)
    return {
        "classes": np.array(classes),
        "counts": np.array(counts, np.int64),
        "names": np.array(names),
        "folders": np.array(folders),
        "stamps": np.array(mtimes, np.int64),
    }


def _walk(
    root: bytes, folder: bytes, recursive: bool, above: tuple
) -> tuple[list[bytes], list[tuple[bytes, tuple[int, int]]]]:
    """Images below root/folder, and every folder read with its stamp, all relative to root; above: real paths
    of parents.
    """
    here = os.path.join(root, folder)
    images, seen, real = [], [(folder, _mtimes(here))], os.path.realpath(here)
    if real in above:
        raise UserError(f"{os.fsdecode(here)} is a link to a folder above it; remove it")
    try:
        with os.scandir(here) as found:
            for entry in found:
                if entry.name.startswith(b"."):
                    continue
                image, name = entry.name.lower().endswith(EXTENSIONS), os.path.join(folder, entry.name)
                if image and entry.is_file():
                    images.append(name)
                elif entry.is_dir():
                    if not recursive:
                        raise UserError(
                            f"{os.fsdecode(entry.path)} is a folder in a class folder; move its images up"
                        )
                    more = _walk(root, name, recursive, (*above, real))
                    images += more[0]
                    seen += more[1]
                elif image:
                    raise UserError(f"{os.fsdecode(entry.path)} is a broken link; mend or remove it")
    except OSError as error:
        raise _unreadable(here, error) from None
    return images, seen


def _unreadable(folder: bytes, error: OSError) -> UserError:
    return UserError(f"cannot read folder {os.fsdecode(folder)}: {error.strerror}; check its permissions")


def _mtimes(folder: bytes) -> tuple[int, int]:
    """Times of modification and of change, ns: archivers put the first one back, nobody the second. −1: no
    such folder.
    """
    try:
        status = os.stat(folder)
    except OSError:
        return -1, -1
    return status.st_mtime_ns, status.st_ctime_ns


def _cache_file(root: bytes, recursive: bool, cache_dir: Optional[Union[str, Path]]) -> Optional[Path]:
    key = hashlib.sha256(b"format 2\0%d\0%s" % (recursive, root)).hexdigest()[:32]
    try:
        return (
            Path(cache_dir or os.environ.get("SIMMATCH_CACHE") or "~/.cache/simmatch").expanduser()
            / f"listing-{key}.npz"
        )
    except RuntimeError:  # no home folder
        return None


def _save_cache(cache: Path, found: dict[str, np.ndarray]) -> None:
    """Write an npz file followed by its SHA-256."""
    stream = io.BytesIO()
    np.savez(stream, **found)
    try:
        write_bytes(cache, stream.getvalue(), hashlib.sha256(stream.getbuffer()).digest())
    except OSError as error:
        _warn_once(
            f"listing: cannot write to {cache.parent} ({error.strerror}), so every start reads the whole tree; "
            "SIMMATCH_CACHE=DIR chooses another folder"
        )


def _load_cache(cache: Path, root: bytes, pool: ThreadPoolExecutor) -> Optional[dict[str, np.ndarray]]:
    """What `_remember` wrote, if it is undamaged and no folder has changed since."""
    try:
        data = cache.read_bytes()
    except OSError:
        return None
    if hashlib.sha256(memoryview(data)[:-32]).digest() != data[-32:]:
        return None
    found = dict(np.load(io.BytesIO(data), allow_pickle=False))
    mtimes = pool.map(lambda folder: _mtimes(os.path.join(root, folder)), found["folders"])
    return found if np.array_equal(found["stamps"], list(mtimes)) else None


@functools.lru_cache(maxsize=None)
def _warn_once(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
