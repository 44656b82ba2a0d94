"""Splits, which are lists of labeled images: the published lists, any list file, and random draws.

python -m dataset.splits list | make SOURCE (--per-class N | --percent P) | describe FILE_OR_ID…

Results on different splits are not comparable, so a split always carries its name and its SHA-256.
"""

import argparse
import hashlib
import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dataset import listing
from dataset.source import LabeledFiles
from util.errors import Parser, UserError, cli_main, printable
from util.files import check_output, user_path, write_atomically

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
    text = _list_text(drawn)
    if not drawn or _read_back(text) != drawn:
        for name in drawn:
            if _read_back(name) != [name]:
                raise UserError(
                    f"a list cannot hold the name {printable(os.fsdecode(name))}: it is not UTF-8, or would "
                    "be read back as another name; rename the image or its folder"
                )
        listing.entries(text, split_id)  # raises UserError: there is no name, or one occurs twice
    return Split(split_id, hashlib.sha256(text).hexdigest(), np.array(drawn))


def _read_back(text: bytes) -> list[bytes]:
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
    rest = np.ones(n, bool)
    rest[rows] = False
    return np.flatnonzero(rest)


def basenames(names: np.ndarray) -> np.ndarray:
    """Cut paths [N] bytes after their last "/" -> file names [N] bytes."""
    names = np.ascontiguousarray(names)
    letters = names.view(np.uint8).reshape(len(names), -1)  # [N, width]
    row, column = np.divmod(np.flatnonzero(letters.reshape(-1) == ord("/")), letters.shape[1])
    start = np.zeros(len(names), np.int64)  # [N]
    start[row] = column + 1  # the last "/" of a row is assigned last, and stays
    out = np.empty_like(names)
    for first in np.flatnonzero(np.bincount(start)):  # the folders have only a few different lengths
        same = start == first
        out[same] = np.ascontiguousarray(letters[same, first:]).view(f"S{letters.shape[1] - first}")[:, 0]
    return out


def names_by_class(images: listing.Listing | LabeledFiles) -> dict[str, np.ndarray]:
    """Return a dict of class -> names [n] bytes, for `make`. Classes without images are left out."""
    order = np.argsort(images.labels, kind="stable")
    counts = np.bincount(images.labels, minlength=len(images.classes))  # [C]
    groups = np.split(images.names.array[order], np.cumsum(counts)[:-1])
    return {c: names for c, names in zip(images.classes, groups) if len(names)}


def class_of(name: bytes) -> str:
    """Return the class of an entry: its folder; without a folder, the part before the last "_", as in
    ImageNet; without both, "".
    """
    folder, _, last = name.rpartition(b"/")
    return os.fsdecode(folder or last.rpartition(b"_")[0])


def describe(splits: Sequence[Split]) -> str:
    """Describe sizes, images per class and overlaps in a text. Images are compared without their folders if
    one of the lists has entries without folders.
    """
    lines = []
    for s in splits:
        per_class = Counter(map(class_of, s.names.tolist()))
        sizes = np.array(list(per_class.values()))  # [C]
        least, most = min(per_class.values()), max(per_class.values())
        lines += [
            f"{s.id}: {len(s.names):,} images of {len(sizes):,} classes, {least} to {most} per class",
            f"  sha256 {s.sha256}",
        ]
        width = -(-(most - least + 1) // 8)  # of a bin, so that the histogram has at most 8
        for low in range(least, most + 1, width):
            high = min(low + width - 1, most)
            lines.append(
                f"  {((low <= sizes) & (sizes <= high)).sum():,} classes with {low}"
                + f" to {high}" * (high > low)
            )
    without_folders = any(not (np.char.find(s.names, b"/") >= 0).all() for s in splits)
    sets = [set((basenames(s.names) if without_folders else s.names).tolist()) for s in splits]
    width = max(9, max(len(s.id) for s in splits)) + 2
    if len(splits) > 1:
        lines += ["images in common:", " " * width + "".join(s.id.rjust(width) for s in splits)]
        lines += [
            a.id.ljust(width) + "".join(f"{len(x & y):,}".rjust(width) for y in sets)
            for a, x in zip(splits, sets)
        ]
        lines += [
            f"{a.id} is contained in {b.id}"
            for a, x in zip(splits, sets)
            for b, y in zip(splits, sets)
            if a is not b and x <= y
        ]
    return "\n".join(lines)


def _list_text(names: Sequence[bytes]) -> bytes:
    """Return the content of a list file."""
    return b"".join(name + b"\n" for name in names)


def _is_list(file: Path) -> bool:
    """Return whether a file is a list of images: all of its names have the extension of an image."""
    names = _read_back(file.read_bytes()) if file.stat().st_size < 2**30 else []
    return bool(names) and all(name.lower().endswith(listing.EXTENSIONS) for name in names)


def _list(args: argparse.Namespace) -> None:
    for name, published in PUBLISHED.items():
        file = args.folder / f"{name}.txt"
        state = "missing: bash script/get_splits.sh"
        if os.path.exists(file):
            matches = hashlib.sha256(listing.read_bytes(file)).hexdigest() == published.sha256
            state = "present, verified" if matches else "WRONG CHECKSUM: bash script/get_splits.sh"
        print(f"{name:14}{published.images:>8,} images  {state}  (github.com/{published.source})")


def _make(args: argparse.Namespace) -> None:
    names: Mapping[str, Collection[bytes]]
    if os.path.isdir(args.source):
        names = names_by_class(listing.scan(args.source, recursive=args.recursive))
    else:
        names = _group_by_class(load(args.source, args.folder), args.source)
    split = make(names, args.per_class, args.percent, args.seed)
    out = args.out or args.folder / f"{split.id}.txt"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}; choose another file with --out") from None
    out, replaces = check_output(out, "--out", "a list of images", _is_list, reads=[args.source])
    write_atomically(out, lambda file: file.write(_list_text(split.names.tolist())))
    if replaces:
        print(replaces)
    print(f"{out}: {len(split.names):,} images of {len(names):,} classes, sha256 {split.sha256}")


def _group_by_class(split: Split, where: Path) -> dict[str, list[bytes]]:
    groups: dict[str, list[bytes]] = {}
    for name in split.names.tolist():
        groups.setdefault(class_of(name), []).append(name)
    if "" in groups:
        raise UserError(
            f"{where}: {os.fsdecode(groups[''][0])} has neither a folder nor a class before a _; "
            "draw from a tree of class folders instead"
        )
    return groups


def _describe(args: argparse.Namespace) -> None:
    print(describe([load(name, args.folder) for name in args.lists]))


def main() -> None:
    parser = Parser("Splits, which are lists of labeled images: published, drawn, or any list file.")
    parser.prog = "python -m dataset.splits"
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_CommandParser)
    published = commands.add_parser("list", help="show the published lists and which of them are present")
    drawn = commands.add_parser("make", help="draw a split at random and write it to a list file")
    drawn.add_argument(
        "source", type=user_path, metavar="SOURCE", help="folder with <class>/<image>, or a list file"
    )
    size = drawn.add_mutually_exclusive_group(required=True)
    size.add_argument("--per-class", type=int, metavar="N", help="number of images of each class")
    size.add_argument(
        "--percent", type=float, metavar="P", help="share of each class, at least one image: 0.01 is 1 %%"
    )
    drawn.add_argument("--seed", type=int, default=0, help="default: 0")
    drawn.add_argument(
        "--recursive", action="store_true", help="look for images in folders below the class folders, too"
    )
    drawn.add_argument(
        "--out", type=user_path, metavar="FILE", help="default: <name of the split>.txt in --folder"
    )
    compared = commands.add_parser("describe", help="show sizes, images per class, and overlaps of lists")
    compared.add_argument("lists", nargs="+", metavar="FILE_OR_ID")
    for command, call in ((published, _list), (drawn, _make), (compared, _describe)):
        command.set_defaults(call=call)
        command.add_argument(
            "--folder",
            type=user_path,
            default=FOLDER,
            help="folder of the published lists; default: %(default)s",
        )
    args = parser.parse_args()
    args.call(args)


class _CommandParser(Parser):
    """The parser of one command. argparse passes `prog` and, in some versions of Python, further options."""

    def __init__(self, prog: str, **_: object):
        super().__init__("")
        self.prog = prog


if __name__ == "__main__":
    cli_main(main)
