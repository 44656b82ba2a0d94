"""The time to list the images of a data set: python benchmark/listing.py [--images N] [--folder DIR]

Makes a tree of 1,000 class folders with N empty files, scans it, scans it again with the cache, and looks up
a split with a tenth of the images. The tree is made below --folder and removed afterwards. Its folders are in
the operating system's memory; otherwise, the first scan also waits for the disk or the file server.
"""

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from benchmark.digits import machine  # noqa: E402
from dataset import listing, splits  # noqa: E402
from util.errors import Parser, UserError, cli_main  # noqa: E402

CLASSES = 1000


def make_tree(root: Path, images: int) -> None:
    """Make `images` names in CLASSES folders. They are links to one file per folder, which saves inodes."""
    for c in range(CLASSES):
        folder = root / f"n{c:08d}"
        folder.mkdir(parents=True)
        first = os.path.join(folder, f"n{c:08d}_0.JPEG")
        os.close(os.open(first, os.O_CREAT | os.O_WRONLY))
        for i in range(1, images // CLASSES + (c < images % CLASSES)):
            os.link(first, os.path.join(folder, f"n{c:08d}_{7 * i}.JPEG"))


def timed(label: str, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
    start = time.perf_counter()
    result = call(*args, **options)
    print(f"{label:58} {time.perf_counter() - start:6.2f} s", flush=True)
    return result


def main() -> None:
    parser = Parser(__doc__ or "")
    parser.add_argument("--images", type=int, default=1_281_167, help="default: %(default)s, as in ImageNet")
    parser.add_argument(
        "--folder", type=Path, help="folder of the tree; default: the system's folder for temporary files"
    )
    args = parser.parse_args()
    if args.images < CLASSES:
        raise UserError(f"--images must be at least {CLASSES}, one per class")
    try:
        work = Path(tempfile.mkdtemp(prefix="simmatch-listing-", dir=args.folder))
    except OSError as error:
        raise UserError(
            f"cannot make a folder in {args.folder}: {error.strerror}; choose another --folder"
        ) from None
    try:
        measure(work, args.images)
    finally:
        shutil.rmtree(work)


def measure(work: Path, images: int) -> None:
    tree, cache = work / "train", work / "cache"
    print(machine())
    timed(f"making {images:,} names in {CLASSES:,} folders", make_tree, tree, images)
    time.sleep(listing.TIMESTAMP_NS / 1e9 + 0.1)  # a scan is not cached while the tree may change unnoticed
    found = timed("first start: scan, and write the cache", listing.scan, tree, cache)
    size = sum(file.stat().st_size for file in cache.iterdir())
    again = timed(f"next start: cache of {size / 1e6:.0f} MB", listing.scan, tree, cache)
    assert np.array_equal(found.names.array, again.names.array) and len(again.names) == images
    split = timed(
        "drawing 10 % of each class", lambda: splits.make(splits.names_by_class(again), percent=0.1)
    )
    rng = np.random.default_rng(0)
    for kind, names in (("paths", split.names), ("names", splits.basenames(split.names))):
        shuffled = split._replace(names=rng.permutation(names))
        rows = timed(f"looking up {len(names):,} {kind}", splits.find_rows, shuffled, again.names.array)
        assert np.array_equal(
            again.labels[np.sort(rows)], again.labels[splits.find_rows(split, again.names.array)]
        )
    timed("finding the unlabeled images", splits.complement, rows, images)


if __name__ == "__main__":
    cli_main(main)
