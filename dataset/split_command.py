"""Show, draw and compare splits:
python -m dataset.splits list | make SOURCE (--per-class N | --percent P) | describe FILE_OR_ID…
"""

import argparse
import hashlib
import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from dataset import listing
from dataset.splits import (
    FOLDER,
    PUBLISHED,
    Split,
    basenames,
    list_text,
    load,
    make,
    names_by_class,
    read_back,
)
from util.errors import Parser, UserError
from util.files import check_output, user_path, write_atomically


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
    pairs = [*zip(splits, sets)]
    width = max(9, max(len(s.id) for s in splits)) + 2
    if len(splits) > 1:
        lines += ["images in common:", " " * width + "".join(s.id.rjust(width) for s in splits)]
        lines += [a.id.ljust(width) + "".join(f"{len(x & y):,}".rjust(width) for y in sets) for a, x in pairs]
        lines += [
            f"{a.id} is contained in {b.id}" for a, x in pairs for b, y in pairs if a is not b and x <= y
        ]
    return "\n".join(lines)


def _is_list(file: Path) -> bool:
    """Return whether a file is a list of images: all of its names have the extension of an image."""
    names = read_back(file.read_bytes()) if file.stat().st_size < 2**30 else []
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
    write_atomically(out, lambda file: file.write(list_text(split.names.tolist())))
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
