"""Labeled subsets by name: the published lists, any list file, and balanced draws.

python -m dataset.splits list | make SOURCE (--per-class N | --percent P) | describe FILE_OR_ID…   (--help
says more)

Results on different subsets do not compare, so a subset carries its name and its SHA-256 wherever it goes.
"""

import argparse
import hashlib
import os
from collections import Counter
from pathlib import Path
from typing import Mapping, NamedTuple, Optional, Sequence, Union

import numpy as np

from dataset import listing
from util.errors import Parser, UserError, cli_main

FOLDER = Path(__file__).with_name("semi_files")


class Published(NamedTuple):
    sha256: str
    images: int
    source: str  # owner/repository/file on GitHub; script/get_splits.sh fetches it


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
    sha256: str  # of the list file's bytes
    names: (
        np.ndarray
    )  # file names, or paths relative to the data folder, in the order of the list    [K] bytes


def load(name_or_path: Union[str, Path], folder: Union[str, Path] = FOLDER) -> Split:
    """A published list by its id, from `folder` and verified, or any list file (dataset.listing.entries has
    its form).
    """
    published = PUBLISHED.get(str(name_or_path))
    file = Path(folder, f"{name_or_path}.txt") if published else Path(name_or_path)
    if published and not os.path.exists(file):
        raise UserError(f"split {name_or_path}: {file} is missing; run: bash script/get_splits.sh")
    if not published and not os.path.exists(file):
        raise UserError(
            f"{name_or_path} is neither a list file nor a published split; those are {', '.join(PUBLISHED)}"
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
    names_by_class: Mapping[str, Sequence[Union[str, bytes]]],
    per_class: Optional[int] = None,
    percent: Optional[float] = None,
    seed: int = 0,
) -> Split:
    """A random subset with `per_class` images of each class, or a share `percent` of each (0.01: 1 %), at
    least one.

    Only names and seed decide. The images of a class are ranked by a hash of seed, class and name: no order
    of folders, other class or release of NumPy changes the draw, and a smaller draw is contained in a larger
    one of the same seed. In the list, classes and then names are sorted as bytes; the SHA-256 is that of its
    text, a line feed after every name. Raises UserError if that many images are not there, or a name cannot
    stand in a list.
    """
    if (per_class is None) == (percent is None):
        raise UserError("a draw needs either a number of images per class or a share (percent), not both")
    if per_class is not None and per_class < 1:
        raise UserError(f"{per_class} images per class: every class needs at least 1 labeled image")
    if percent is not None and not 0 < percent <= 1:
        raise UserError(f"percent is {percent}, but it is a share, above 0 and at most 1: 0.01 is 1 %")
    drawn: list[bytes] = []
    for label, names in sorted((os.fsencode(c), names) for c, names in names_by_class.items()):
        count = per_class or max(1, round(percent * len(names)))
        if count > len(names):
            raise UserError(
                f"class {os.fsdecode(label)} has only {len(names)} images, {count} are to be drawn; draw fewer"
            )
        key = b"%d\0%s\0" % (seed, label)
        ranked = sorted(map(os.fsencode, names), key=lambda name: hashlib.sha256(key + name).digest())
        drawn += sorted(ranked[:count])
    name = f"balanced-{per_class}-seed{seed}" if per_class else f"percent-{percent}-seed{seed}"
    text = _text(drawn)
    odd = next((a for a, b in zip(drawn, listing.entries(text, name)[1]) if a != b.encode()), None)
    if odd is not None:
        raise UserError(
            f"the name {odd!r} cannot stand in a list: it would be read as something else; rename the image"
        )
    return Split(name, hashlib.sha256(text).hexdigest(), np.array(drawn))


def draw(labels: np.ndarray, per_class: int, seed: int) -> tuple[np.ndarray, str]:
    """`make` for images that have no names but their rows: labels [N] -> rows of the drawn images
    [C·per_class], SHA-256.
    """
    names = {str(c): [b"%d" % row for row in np.flatnonzero(labels == c)] for c in np.unique(labels)}
    split = make(names, per_class=per_class, seed=seed)
    return split.names.astype(np.int64), split.sha256


def rows(split: Split, names: np.ndarray, where: str = "the data set") -> np.ndarray:
    """Rows of the split's images among `names` [N] bytes, in the order of the list: [K] int64.

    An entry with a folder is looked for as it stands, one without (`n01440764_10026.JPEG`) among the names
    without folders. Raises UserError for images that are not there, or there more than once; `where` names
    the data set in it.
    """
    found = np.full(len(split.names), -1, np.int64)  # [K]
    whole = np.char.find(split.names, b"/") >= 0  # [K]
    for kind, strip in ((whole, False), (~whole, True)):
        if not kind.any():
            continue
        candidates = basenames(names) if strip else names  # [N]
        order = np.flatnonzero(kind)[np.argsort(split.names[kind])]  # [k]
        wanted = split.names[
            order
        ]  # the few are sorted and the many looked up in them: the other way round is slower
        place = np.searchsorted(wanted, candidates).clip(max=len(order) - 1)  # [N]
        hits = np.flatnonzero(wanted[place] == candidates)
        times = np.bincount(place[hits], minlength=len(order))  # [k]
        if times.max() > 1:
            raise UserError(
                f"split {split.id}: {os.fsdecode(wanted[times.argmax()])} is the name of {times.max()} images in "
                f"{where}; write the list with folders"
            )
        found[order[place[hits]]] = hits
    missing = split.names[found < 0]
    if len(missing):
        raise UserError(
            f"split {split.id}: {len(missing):,} of its {len(found):,} images are not in {where}, the first is "
            f"{os.fsdecode(missing[0])}; was the list made for other images?"
        )
    return found


def complement(rows: np.ndarray, n: int) -> np.ndarray:
    """The rows among 0 … n − 1 that are not in `rows`, in order: the unlabeled images, unless told
    otherwise. int64.
    """
    rest = np.ones(n, bool)
    rest[rows] = False
    return np.flatnonzero(rest)


def basenames(names: np.ndarray) -> np.ndarray:
    """[N] bytes, paths -> [N] bytes, what follows the last "/"."""
    names = np.ascontiguousarray(names)
    letters = names.view(np.uint8).reshape(len(names), -1)  # [N, width]
    row, column = np.divmod(np.flatnonzero(letters.reshape(-1) == ord("/")), letters.shape[1])
    start = np.zeros(len(names), np.int64)  # [N]
    start[row] = column + 1  # of several in a row of letters, the last one stays
    out = np.empty_like(names)
    for first in np.flatnonzero(np.bincount(start)):  # few: as many as there are different lengths of folders
        these = start == first
        out[these] = np.ascontiguousarray(letters[these, first:]).view(f"S{letters.shape[1] - first}")[:, 0]
    return out


def by_class(data: listing.Listing) -> dict[str, np.ndarray]:
    """Class -> names [n], for `make`."""
    order = np.argsort(data.labels, kind="stable")
    parts = np.split(
        data.names.array[order], np.cumsum(np.bincount(data.labels, minlength=len(data.classes)))[:-1]
    )
    return {c: part for c, part in zip(data.classes, parts) if len(part)}


def class_of(name: bytes) -> str:
    """Of an entry with a folder, the folder; else, as in ImageNet, what stands before the last "_"; ""
    without either.
    """
    folder, _, last = name.rpartition(b"/")
    return os.fsdecode(folder or last.rpartition(b"_")[0])


def describe(splits: Sequence[Split]) -> str:
    """Sizes, images per class, and how the splits overlap, as text. Folders are left out where one of the
    lists has none.
    """
    lines = []
    for s in splits:
        per_class = Counter(map(class_of, s.names.tolist()))
        sizes = np.array(list(per_class.values()))  # [C]
        least, most = min(per_class.values()), max(per_class.values())
        lines += [
            f"{s.id}: {len(s.names):,} images of {len(sizes):,} classes, {least} to {most} a class",
            f"  sha256 {s.sha256}",
        ]
        step = -(-(most - least + 1) // 8)  # a histogram of at most 8 bars
        for low in range(least, most + 1, step):
            high = min(low + step - 1, most)
            lines.append(
                f"  {((low <= sizes) & (sizes <= high)).sum():,} classes with {low}"
                + f" to {high}" * (high > low)
            )
    bare = any(not (np.char.find(s.names, b"/") >= 0).all() for s in splits)
    sets = [set((basenames(s.names) if bare else s.names).tolist()) for s in splits]
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


def _text(names: Sequence[bytes]) -> bytes:
    """What a list file holds."""
    return b"".join(name + b"\n" for name in names)


def _list(args: argparse.Namespace) -> None:
    for name, published in PUBLISHED.items():
        file = args.folder / f"{name}.txt"
        state = "missing: bash script/get_splits.sh"
        if os.path.exists(file):
            right = hashlib.sha256(listing.read_bytes(file)).hexdigest() == published.sha256
            state = "present, verified" if right else "WRONG CHECKSUM: bash script/get_splits.sh"
        print(f"{name:14}{published.images:>8,} images  {state}  (github.com/{published.source})")


def _make(args: argparse.Namespace) -> None:
    if os.path.isdir(args.source):
        names = by_class(listing.scan(args.source, recursive=args.recursive))
    else:
        names = {}
        for name in load(args.source, args.folder).names.tolist():
            names.setdefault(class_of(name), []).append(name)
        if "" in names:
            raise UserError(
                f"{args.source}: {os.fsdecode(names[''][0])} has neither a folder nor a class before a _; draw "
                "from a tree of class folders instead"
            )
    split = make(names, args.per_class, args.percent, args.seed)
    out = args.out or args.folder / f"{split.id}.txt"
    try:
        listing.write_bytes(out, _text(split.names.tolist()))
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}; choose another file with --out") from None
    print(f"{out}: {len(split.names):,} images of {len(names):,} classes, sha256 {split.sha256}")


def _describe(args: argparse.Namespace) -> None:
    print(describe([load(name, args.folder) for name in args.lists]))


def main() -> None:
    parser = Parser("Labeled subsets by name: the published lists, any list file, and balanced draws.")
    parser.prog = "python -m dataset.splits"
    commands = parser.add_subparsers(
        required=True, metavar="COMMAND", parser_class=lambda prog, **_: _named(prog)
    )
    published = commands.add_parser("list", help="the published lists, and which of them are here")
    drawn = commands.add_parser("make", help="draw a balanced subset and write it as a list")
    drawn.add_argument(
        "source", type=Path, metavar="SOURCE", help="folder with <class>/<image>, or a list of names"
    )
    size = drawn.add_mutually_exclusive_group(required=True)
    size.add_argument("--per-class", type=int, metavar="N", help="images of each class")
    size.add_argument(
        "--percent", type=float, metavar="P", help="share of each class: 0.01 is 1 %%; at least one image"
    )
    drawn.add_argument("--seed", type=int, default=0, help="default: 0")
    drawn.add_argument(
        "--recursive", action="store_true", help="images may lie in folders below their class folder"
    )
    drawn.add_argument("--out", type=Path, metavar="FILE", help="default: <name of the draw>.txt in --folder")
    compared = commands.add_parser(
        "describe", help="sizes of lists, images per class, and what they have in common"
    )
    compared.add_argument("lists", nargs="+", metavar="FILE_OR_ID")
    for command, call in ((published, _list), (drawn, _make), (compared, _describe)):
        command.set_defaults(call=call)
        command.add_argument(
            "--folder", type=Path, default=FOLDER, help="of the published lists; default: %(default)s"
        )
    args = parser.parse_args()
    args.call(args)


def _named(prog: str) -> Parser:
    parser = Parser("")
    parser.prog = prog
    return parser


if __name__ == "__main__":
    cli_main(main)
