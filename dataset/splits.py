"""Splits, which are lists of labeled images: the published lists, any list file, and random draws.

`python -m dataset.splits` is the command of dataset/split_command.py.

Results on different splits are not comparable, so a split always carries its name and its SHA-256.
"""

import hashlib
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dataset import listing
from dataset.source import LabeledFiles
from util.errors import UserError, cli_main, printable
from util.files import user_path

FOLDER = Path(__file__).with_name("semi_files")


class Published(NamedTuple):
    sha256: str
    images: int
    source: str  # owner/repository/file on GitHub; script/get_splits.sh downloads it


PUBLISHED = {
    "simmatch-1p": Published(
        "90c1450521fa511c3c7e94f75c35a51bd8f63297ecc3727b85feb34d3b8652f2",
        13_000,
        "mingkai-zheng/SimMatch/semi_files/split_1p_index.txt",
    ),
    "simmatch-10p": Published(
        "cca8b3da723940fa66c491763ae34d4493ef2b552545cc8e83aaff3b2cb9377d",
        128_000,
        "mingkai-zheng/SimMatch/semi_files/split_10p_index.txt",
    ),
    "simclr-1p": Published(
        "71e82a48ba78252683ae334c4d019ebd5c6e855b9599c1389fbe83eb9549cf17",
        12_811,
        "mingkai-zheng/SimMatchV2/semi_files/split_1p_index.txt",
    ),
    "simclr-10p": Published(
        "6d09de11e7bdaf5b1f3b1f249b6183695f97310cdd20f0c03e7235b6b9392091",
        128_116,
        "mingkai-zheng/SimMatchV2/semi_files/split_10p_index.txt",
    ),
}


class Split(NamedTuple):
    id: str
    sha256: str  # of the bytes of the list file
    names: np.ndarray  # file names, or paths relative to the data folder, in the list's order     [K] bytes


def load(name_or_path: str | Path, folder: str | Path = FOLDER) -> Split:
    """Load a published list by its id, from `folder`, and verify its checksum; or load any list file
    (`dataset.listing.entries` describes the format). Raises UserError.
    """
    published = PUBLISHED.get(str(name_or_path))
    file = user_path(folder) / f"{name_or_path}.txt" if published else user_path(name_or_path)
    if published and not os.path.exists(file):
        raise UserError(f"split {name_or_path}: {file} is missing; run: bash script/get_splits.sh")
    if not published and not os.path.exists(file):
        raise UserError(
            f"{name_or_path} is neither a list file nor a published split; "
            f"the published splits are {', '.join(PUBLISHED)}"
        )
    data = listing.read_bytes(file)
    sha = hashlib.sha256(data).hexdigest()
    if published and sha != published.sha256:
        raise UserError(
            f"split {name_or_path}: {file} is not the published list (its SHA-256 is {sha}, not "
            f"{published.sha256}); run: bash script/get_splits.sh"
        )
    return Split(file.stem, sha, np.array([name.encode() for name in listing.entries(data, str(file))[1]]))


def make(
    names_by_class: Mapping[str, Collection[str | bytes]],
    per_class: int | None = None,
    percent: float | None = None,
    seed: int = 0,
) -> Split:
    """Draw `per_class` images of each class, or a share `percent` of each (0.01 is 1 %), at least one image.

    The draw depends on the names and the seed only: the images of a class are ranked by a hash of seed, class
    and name. Neither the order of folders, nor other classes, nor the version of NumPy changes it, and a
    smaller draw is contained in a larger draw of the same seed. The list is sorted by class, then by name, as
    bytes; the SHA-256 is that of its text, with a line feed after every name. Raises UserError if a class has
    too few images, or if a list cannot hold one of the names.
    """
    if per_class is not None and percent is None:
        if per_class < 1:
            raise UserError(f"{per_class} images per class: every class needs at least 1 labeled image")
        split_id = f"balanced-{per_class}-seed{seed}"
    elif percent is not None and per_class is None:
        if not 0 < percent <= 1:
            raise UserError(f"percent is {percent}, but it is a share, above 0 and at most 1: 0.01 is 1 %")
        split_id = f"percent-{percent}-seed{seed}"
    else:
        raise UserError("a draw needs either a number of images per class or a share (percent), not both")
    drawn: list[bytes] = []
    for class_name, names in sorted((os.fsencode(c), names) for c, names in names_by_class.items()):
        count = per_class or max(1, round((percent or 0) * len(names)))
        if count > len(names):
            raise UserError(
                f"class {os.fsdecode(class_name)} has only {len(names)} images, {count} are to be drawn; "
                "draw fewer"
            )
        key = b"%d\0%s\0" % (seed, class_name)
        ranked = sorted(map(os.fsencode, names), key=lambda name: hashlib.sha256(key + name).digest())
        drawn += sorted(ranked[:count])
    text = list_text(drawn)
    if not drawn or read_back(text) != drawn:
        for name in drawn:
            if read_back(name) != [name]:
                raise UserError(
                    f"a list cannot hold the name {printable(os.fsdecode(name))}: it is not UTF-8, or would "
                    "be read back as another name; rename the image or its folder"
                )
        listing.entries(text, split_id)  # raises UserError: there is no name, or one occurs twice
    return Split(split_id, hashlib.sha256(text).hexdigest(), np.array(drawn))


def read_back(text: bytes) -> list[bytes]:
    """Return the names in the text of a list file; none if it is not valid."""
    try:
        return [name.encode() for name in listing.entries(text, "")[1]]
    except UserError:
        return []


def draw_rows(labels: np.ndarray, per_class: int, seed: int) -> tuple[np.ndarray, str]:
    """Call `make` for images without names: labels [N] -> rows of the drawn images [C·per_class], SHA-256."""
    names = {str(c): [b"%d" % row for row in np.flatnonzero(labels == c)] for c in np.unique(labels)}
    split = make(names, per_class=per_class, seed=seed)
    return split.names.astype(np.int64), split.sha256


def find_rows(split: Split, names: np.ndarray, where: str = "the data set") -> np.ndarray:
    """Find the rows of the split's images among `names` [N] bytes, in the order of the list: [K] int64.

    An entry with a folder is compared with the whole names, an entry without (`n01440764_10026.JPEG`) with
    the names without folders. Raises UserError for an image that is missing or not unique; `where` names the
    data set in the message.
    """
    rows = np.full(len(split.names), -1, np.int64)  # [K]
    has_folder = np.char.find(split.names, b"/") >= 0  # [K]
    for entries in (has_folder, ~has_folder):
        if not entries.any():
            continue
        candidates = names if entries is has_folder else basenames(names)  # [N]
        order = np.flatnonzero(entries)[np.argsort(split.names[entries])]  # [k]
        wanted = split.names[order]  # [k]; sorting these few names is faster than sorting the candidates
        index = np.searchsorted(wanted, candidates).clip(max=len(order) - 1)  # [N]
        matches = np.flatnonzero(wanted[index] == candidates)
        counts = np.bincount(index[matches], minlength=len(order))  # [k]
        if counts.max() > 1:
            raise UserError(
                f"split {split.id}: {os.fsdecode(wanted[counts.argmax()])} is the name of {counts.max()} "
                f"images in {where}; write the list with folders"
            )
        rows[order[index[matches]]] = matches
    missing = split.names[rows < 0]
    if len(missing):
        raise UserError(
            f"split {split.id}: {len(missing):,} of its {len(rows):,} images are not in {where}, the first "
            f"is {os.fsdecode(missing[0])}; was the list made for other images?"
        )
    return rows


def complement(rows: np.ndarray, n: int) -> np.ndarray:
    """Return the rows among 0 … n − 1 that are not in `rows`, in order: int64."""
    return np.delete(np.arange(n), rows)


def basenames(names: np.ndarray) -> np.ndarray:
    """Cut paths [N] bytes after their last "/" -> file names [N] bytes."""
    return np.array([name.rpartition(b"/")[2] for name in names.tolist()], bytes)


def names_by_class(images: LabeledFiles) -> dict[str, np.ndarray]:
    """Return a dict of class -> names [n] bytes, for `make`. Classes without images are left out."""
    order = np.argsort(images.labels, kind="stable")
    counts = np.bincount(images.labels, minlength=len(images.classes))  # [C]
    groups = np.split(images.names.array[order], np.cumsum(counts)[:-1])
    return {c: names for c, names in zip(images.classes, groups) if len(names)}


def list_text(names: Sequence[bytes]) -> bytes:
    """Return the content of a list file."""
    return b"".join(name + b"\n" for name in names)


if __name__ == "__main__":
    from dataset.split_command import main

    cli_main(main)
