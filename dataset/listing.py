"""The names of a data set's images, from a tree of class folders or from a list file.

dataset/listing_cache.py keeps the result of a scan.
"""

import os
import re
import time
import unicodedata
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from dataset import listing_cache
from dataset.listing_cache import Tree, time_stamps
from dataset.source import Files, LabeledFiles, Names
from util.errors import UserError, printable
from util.files import special_file, user_path

# Upper case is accepted, too.
EXTENSIONS = tuple(b".jpg .jpeg .jfif .jpe .png .webp .gif .bmp .tif .tiff .ppm .pgm".split())
TIMESTAMP_NS = 2 * 10**9  # the coarsest time stamps of a file system in use: FAT's, of 2 s
THREADS = 16  # folders read at a time: a file server answers many requests at once, a local disk is as fast
MAX_CLASSES = 10**6  # a larger label is a mistake in the list, and would cost memory
INTEGER = re.compile("[+-]?[0-9]{1,18}")


def scan(root: str | Path, cache_dir: str | Path | None = None, recursive: bool = False) -> LabeledFiles:
    """List the tree root/<class>/<image> (root/<class>/…/<image> if `recursive`), sorted by class, then by
    name, as bytes.

    Symbolic links are followed; hidden files and files without an image extension are left out. The cache is
    in `cache_dir`, else $SIMMATCH_CACHE, else ~/.cache/simmatch. Raises UserError if the tree does not have
    this form or cannot be read.
    """
    start_ns = time.time_ns()
    root = _folder(root)
    top = os.fsencode(root)
    cache = listing_cache.cache_file(top, recursive, cache_dir)
    with ThreadPoolExecutor(THREADS) as pool:
        tree = listing_cache.load(cache, top, pool) if cache else None
        if tree is None:
            tree = _walk_tree(top, recursive, pool)
            # A folder that changed this recently may change again without getting a new time stamp.
            if cache and tree.mtimes.max() < start_ns - TIMESTAMP_NS:
                listing_cache.save(cache, tree)
    labels = np.repeat(np.arange(len(tree.classes), dtype=np.int64), tree.counts)  # [N]
    return LabeledFiles(root, Names(tree.names), labels, [os.fsdecode(c) for c in tree.classes])


def list_images(root: str | Path) -> Files:
    """List all images below root, in any nesting, sorted as bytes. There is no cache."""
    root = _folder(root)
    names = sorted(_walk(os.fsencode(root), b"", True, ())[0])
    if not names:
        raise UserError(f"folder {root} holds no images; check the path")
    return Files(root, Names(np.array(names)))


def read_list(file: str | Path, root: str | Path) -> LabeledFiles:
    """Read a list file with lines `path label`: paths are relative to root, labels count from 0. No image is
    looked up.

    A class is named after the folder of its images, or the part of their names before "_", if these and the
    labels correspond one to one, else by its label. Raises UserError with the file and the line.
    """
    root, file = Path(root).resolve(), user_path(file)
    numbers, paths, texts = entries(read_bytes(file), str(file))
    values = []
    for number, path, text in zip(numbers, paths, texts):
        if text is None or not 0 <= int(text) < MAX_CLASSES:
            raise UserError(
                f"{file}, line {number}: expected `path label`, the label a whole number from 0; "
                f"got `{path}`, label {text or 'missing'}"
            )
        values.append(int(text))
    labels = np.array(values, np.int64)  # [N]
    pairs = set()  # (label, name of its class): the folder, or "n01440764" of "n01440764_10026.JPEG"
    for label, path in zip(values, paths):
        folder, _, name = path.rpartition("/")
        pairs.add((label, folder.rpartition("/")[2] or name.rpartition("_")[0]))
    class_names = dict(pairs)
    one_to_one = len(pairs) == len(class_names) == len(set(class_names.values()))
    if not one_to_one or "" in class_names.values():
        class_names = {}
    classes = [class_names.get(c, str(c)) for c in range(max(values) + 1)]
    _check_class_names(classes, str(file))
    return LabeledFiles(root, Names(np.array([path.encode() for path in paths])), labels, classes)


def entries(data: bytes, where: str) -> tuple[list[int], list[str], list[str | None]]:
    """Parse the content of a list file: line numbers, names, and labels (None for a line without one).

    Blank lines are skipped. An integer after the last space is a label, since names of images end in letters.
    Raises UserError with `where`, the name of the file, and the line.
    """
    text = data.decode("utf-8-sig", "replace")
    if bad := re.search("[\0\ufffd]", text):
        number = text.count("\n", 0, bad.start()) + 1
        name = printable(os.fsdecode(data.split(b"\n")[number - 1].strip()))
        raise UserError(
            f"{where}, line {number}: this is not text; a list has one name a line, in UTF-8. Rename the "
            f"image, or choose another list: {name:.80}"
        )
    lines: dict[str, int] = {}
    labels: list[str | None] = []
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
    """Read the content of a list file. Raises UserError if that is not possible."""
    if special := special_file(file):
        raise UserError(f"cannot read list file {file}: it is {special}; check the path")
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read list file {file}: {error.strerror}; check the path") from None


def _folder(root: str | Path) -> Path:
    path = user_path(root)
    if not os.path.isdir(path):
        problem = "is not a folder" if os.path.exists(path) else "does not exist"
        raise UserError(f"data folder {path} {problem}; check the path")
    return path.resolve()


def _check_class_names(classes: Iterable[str], where: str) -> None:
    """Raise UserError if the name of a class cannot be read in a log or a table: if it is blank, or has line
    ends or other control characters.
    """
    for name in classes:
        if not name.strip() or any(unicodedata.category(c) in ("Cc", "Zl", "Zp") for c in name):
            raise UserError(
                f'{where}: the class name "{printable(name)}" is blank or has control characters; rename it'
            )


def _walk_tree(root: bytes, recursive: bool, pool: ThreadPoolExecutor) -> Tree:
    names: list[bytes] = []
    counts: list[int] = []
    # Time stamps are taken before a folder is read, so that the next start notices a change in between.
    visited = [(b"", time_stamps(root))]
    try:
        with os.scandir(root) as found:
            classes = sorted(e.name for e in found if not e.name.startswith(b".") and e.is_dir())
    except OSError as error:
        raise _unreadable(root, error) from None
    _check_class_names(map(os.fsdecode, classes), f"data folder {os.fsdecode(root)}")
    if not classes:
        raise UserError(
            f"data folder {os.fsdecode(root)} has no class folders; expected <class>/<image> below it"
        )
    for c, (images, below) in zip(classes, pool.map(lambda c: _walk(root, c, recursive, ()), classes)):
        if not images:
            raise UserError(
                f"class folder {os.fsdecode(os.path.join(root, c))} holds no images; add some or remove it"
            )
        names += sorted(images)
        counts.append(len(images))
        visited += below
    folders, mtimes = zip(*visited)
    return Tree(
        classes=np.array(classes),
        counts=np.array(counts, np.int64),
        names=np.array(names),
        folders=np.array(folders),
        mtimes=np.array(mtimes, np.int64),
    )


def _walk(
    root: bytes, folder: bytes, recursive: bool, parents: tuple[bytes, ...]
) -> tuple[list[bytes], list[tuple[bytes, tuple[int, int]]]]:
    """Return the images below root/folder, and the folders that were read with their time stamps. All paths
    are relative to root.

    parents: the real paths of the folders above, by which a cycle of links is detected.
    """
    path = os.path.join(root, folder)
    images, visited, real = [], [(folder, time_stamps(path))], os.path.realpath(path)
    if real in parents:
        raise UserError(f"{os.fsdecode(path)} is a link to a folder above it; remove it")
    try:
        with os.scandir(path) as found:
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
                    more_images, more_visited = _walk(root, name, recursive, (*parents, real))
                    images += more_images
                    visited += more_visited
                elif image:
                    kind = special_file(entry.path) or "a broken link"
                    raise UserError(f"{os.fsdecode(entry.path)} is {kind}, not an image; remove it")
    except OSError as error:
        raise _unreadable(path, error) from None
    return images, visited


def _unreadable(folder: bytes, error: OSError) -> UserError:
    return UserError(f"cannot read folder {os.fsdecode(folder)}: {error.strerror}; check its permissions")
