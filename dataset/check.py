"""A doctor for data: python -m dataset.check CONFIG [--field value ...] [--sample N] [--report FILE]

It builds the data set that train_semi.py would train on, looks at every image, and tells what is in order
(ok), what is worth knowing (note) and what has to be mended (BAD). Exit code 0: good, 1: bad, 2: the data set
cannot be built at all.
"""

import csv
import hashlib
import io
import os
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from dataset.build import build_data
from dataset.loader import Data
from dataset.source import BadImage, Files, Source
from dataset.workers import PrefetchLoader
from util.config import Config, parse
from util.errors import Parser, UserError, cli_main

PROBLEMS = {  # (how bad it is, what is said before the number of cases, what is said if there are none)
    "label": ("BAD", "labels that are not those of a class", "every label is that of a class"),
    "unreadable": ("BAD", "images that cannot be used (mend or remove them)", "every image can be decoded"),
    "class without labeled": ("BAD", "classes without a labeled image that can be used", ""),
    "class without test": ("note", "classes without a test image", ""),
    "labeled in test": (
        "BAD",
        "labeled images to remove, being test images",
        "no labeled image is a test image",
    ),
    "unlabeled in test": (
        "BAD",
        "unlabeled images to remove, being test images",
        "no unlabeled image is a test image",
    ),
    "labels differ": (
        "BAD",
        "images with another label than their copies (keep one of each)",
        "copies have the same label",
    ),
    "hidden labels differ": (
        "note",
        "images with another label than their copies, where one of the labels is not used",
        "",
    ),
    "labeled in unlabeled": ("note", "labeled images with copies among the unlabeled ones", ""),
    "copy": ("note", "copies of other images in the same set", "no set holds an image twice"),
    "one color": ("note", "images of one color all over", "no image is of one color all over"),
    "tiny": ("note", "tiny images, the shorter side being below a quarter of image_size", ""),
    "huge": ("note", "huge images, above 25 megapixels, that hold up the worker which loads them", ""),
    "misnamed": ("note", "files of another format than their extension says (the content counts)", ""),
}
SHOWN = 20  # cases of a problem that are printed
LABELED, REST, TEST = (
    1,
    2,
    3,
)  # REST: unlabeled and not labeled, since for CIFAR the labeled images are both
MOUNTS = Path("/proc/self/mountinfo")
NETWORK = tuple(
    "nfs cifs smb lustre gpfs beegfs ceph gluster afs 9p sshfs s3 gcs weka panfs pvfs orangefs".split()
)
LOOK = np.dtype(
    [
        ("digest", "u8", 2),
        ("bytes", "i8"),
        ("size", "i8", 2),
        ("kind", "S16"),
        ("good", "?"),
        ("flat", "?"),
        ("misnamed", "?"),
    ]
)  # what is kept of an image; kind: format and mode of its file; flat: of one color


class Images(Dataset):
    """All images under one number: the training images, then the test images. [numbers] is a worker's look at
    some of them.
    """

    def __init__(self, train: Source, test: Source):
        self.train, self.test = train, test

    def at(self, number: int) -> tuple[Source, int, str]:  # the last is what to call it
        test = number >= len(self.train)
        source, row = (self.test, number - len(self.train)) if test else (self.train, number)
        return (
            source,
            row,
            f"test {source.name(row)}" if test and not isinstance(source, Files) else source.name(row),
        )

    def __getitem__(self, numbers: np.ndarray) -> tuple[bytes, list[tuple[str, str]], set[str], float]:
        """-> LOOK of each, as bytes; (name, cause) of the bad ones; folders of the others; seconds of reading
        and decoding.
        """
        looks, bad, folders, seconds = np.zeros(len(numbers), LOOK), [], set(), 0.0
        for look, number in zip(looks, numbers.tolist()):
            source, row, name = self.at(number)
            start = time.perf_counter()
            try:
                image = source[row]
                seconds += time.perf_counter() - start
                pixels = np.asarray(image)  # [h, w] or [h, w, 3]
                content = _file(Path(name), look) if isinstance(source, Files) else pixels.tobytes()
            except (BadImage, OSError) as error:  # OSError: it could be decoded, and cannot be read again
                bad.append((name, str(error)))
            else:
                look["bytes"], look["size"], look["flat"] = (
                    len(content),
                    pixels.shape[1::-1],
                    (pixels == pixels[:1, :1]).all(),
                )
                look["good"], look["digest"] = (
                    True,
                    np.frombuffer(hashlib.blake2b(content, digest_size=16).digest(), np.uint64),
                )
                folders.add(os.path.dirname(name))
        return looks.tobytes(), bad, folders, seconds


def _file(path: Path, look: np.void) -> bytes:
    """The content of an image file; puts down what its header tells."""
    content = path.read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(content)) as header:
            kind = (
                "JPEG" if header.format == "MPO" else header.format
            )  # a JPEG file with more images behind the first
            look["kind"] = f"{kind} {header.mode}".encode()
    look["misnamed"] = Image.registered_extensions().get(path.suffix.lower(), kind) != kind
    return content


class Findings:
    """Cases of PROBLEMS, one by one, and lines about other things; `report` takes each case as a line of CSV."""

    def __init__(self, report: io.TextIOBase):
        self.table = csv.writer(report)
        self.table.writerow(["path", "problem", "detail"])
        self.lines: dict[str, list[str]] = {"ok": [], "note": [], "BAD": []}
        self.counts: Counter[str] = Counter()
        self.first: dict[str, list[str]] = {problem: [] for problem in PROBLEMS}

    def case(self, name: str, problem: str, detail: str) -> None:
        self.table.writerow([name, problem, detail])
        self.counts[problem] += 1
        if self.counts[problem] <= SHOWN:
            self.first[problem].append(f"{name}: {detail}")

    def conclude(self) -> int:
        """Print everything; the number of BAD lines."""
        for problem, (word, found, otherwise) in PROBLEMS.items():
            n = self.counts[problem]
            more = [f"and {n - SHOWN:,} more; --report FILE has them all"] * (n > SHOWN)
            if n:
                self.lines[word].append("\n        ".join([f"{found}: {n:,}", *self.first[problem], *more]))
            elif otherwise:
                self.lines["ok"].append(otherwise)
        text = "\n".join(f"{word:<6}{line}" for word, lines in self.lines.items() for line in lines)
        print(os.fsencode(text).decode(errors="backslashreplace"))  # the name of a file may be any bytes
        bad = len(self.lines["BAD"])
        print(f"bad: {bad} problem{'s' * (bad > 1)}" if bad else "good")
        return bad


def check(data: Data, config: Config, sample: int, findings: Findings) -> None:
    """All that is to be said of `data`; sample: how many images to look at, 0: all."""
    images = Images(data.images, data.test_images)
    part, labels = count(data, images, findings)  # [T], [T]
    numbers, total = np.flatnonzero(part), np.count_nonzero(part)  # [n]
    if 0 < sample < total:
        findings.lines["note"].append(
            f"only {sample:,} of {total:,} images were looked at, drawn by seed {config.seed}"
        )
        numbers = np.sort(np.random.default_rng(config.seed).choice(numbers, sample, replace=False))
    looks, folders, seconds = look_at(images, numbers, config.workers, findings)  # [n]
    usable = np.setdiff1d(np.flatnonzero(part == LABELED), numbers[~looks["good"]])
    for c in np.setdiff1d(np.arange(len(data.classes)), labels[usable]).tolist():
        findings.case(data.classes[c], "class without labeled", f"label {c}")

    numbers, looks = numbers[looks["good"]], looks[looks["good"]]  # [m], [m]
    duplicates(images, numbers, looks["digest"], part, labels, data.classes, findings)
    sides, is_file = looks["size"], isinstance(data.images, Files)  # [m, 2]
    for problem, those in (
        ("one color", looks["flat"]),
        ("misnamed", looks["misnamed"]),
        ("huge", sides.prod(1) > 25_000_000),
        ("tiny", is_file & (sides.min(1) * 4 < config.image_size)),
    ):
        for i in np.flatnonzero(those).tolist():
            detail = "{} {} x {} pixels".format(looks["kind"][i].decode(), *sides[i])
            findings.case(images.at(numbers[i])[2], problem, detail.strip())
    if is_file and len(looks):
        disk(looks, total, folders, seconds, config.workers, findings)


def count(data: Data, images: Images, findings: Findings) -> tuple[np.ndarray, np.ndarray]:
    """Sizes, labels, balance of classes -> part of each image [T] (0: none), label of each [T], also hidden
    ones (−1: none).
    """
    ok, n_classes, n_train = findings.lines["ok"], len(data.classes), len(data.images)
    part, labels = (
        np.zeros(n_train + len(data.test_images), np.int8),
        np.concatenate([data.labels, data.test_labels]),
    )
    part[data.unlabeled], part[n_train:] = REST, TEST
    both = " (the labeled ones among them)" if (part[data.labeled] == REST).any() else ""
    part[data.labeled] = LABELED
    ok += [
        f"split {data.split.id}, sha256 {data.split.sha256}",
        f"{len(data.labeled):,} labeled, {len(data.unlabeled):,} "
        f"unlabeled{both}, {len(data.test_labels):,} test images; {n_classes:,} classes",
    ]
    wrong = (labels >= n_classes) | (labels < np.where(part == REST, -1, 0)) & (part > 0)
    for number in np.flatnonzero(wrong).tolist():
        findings.case(images.at(number)[2], "label", f"label {labels[number]}, of {n_classes} classes from 0")
    labels[wrong] = -1
    for name, which in (("labeled", LABELED), ("test", TEST)):
        per_class = np.bincount(labels[(part == which) & (labels >= 0)], minlength=n_classes)  # [C]
        ok.append(f"each class has {per_class.min():,} to {per_class.max():,} {name} images")
    for c in np.flatnonzero(per_class == 0).tolist():
        findings.case(data.classes[c], "class without test", f"label {c}")
    return part, labels


def look_at(
    images: Images, numbers: np.ndarray, workers: int, findings: Findings
) -> tuple[np.ndarray, set[str], float]:
    """LOOK of each image [n], the folders they are in, and the workers' seconds of reading and decoding."""
    looks, folders, seconds, done = np.zeros(len(numbers), LOOK), set(), 0.0, 0
    size = max(1, min(64, len(numbers) // (4 * max(1, workers))))  # a few chunks for each worker at least
    begun = said = time.monotonic()
    for raw, bad, where, spent in PrefetchLoader(
        images, np.split(numbers, range(size, len(numbers), size)), workers, False
    ):
        chunk = np.frombuffer(raw, LOOK)
        looks[done : done + len(chunk)] = chunk
        done, seconds, now = done + len(chunk), seconds + spent, time.monotonic()
        folders |= where
        for name, cause in bad:
            findings.case(name, "unreadable", cause)
        if now - said > 5 or done == len(numbers):
            said, left = now, (now - begun) / done * (len(numbers) - done)
            print(f"{done:,} of {len(numbers):,} images, {left:,.0f} s to go", file=sys.stderr, flush=True)
    return looks, folders, seconds


def duplicates(
    images: Images, numbers, digests, part, labels, classes: list[str], findings: Findings
) -> None:
    """Images of the same content. numbers [m], digests [m, 2]; part, labels [T]"""
    order = np.lexsort(digests.T)  # [m]; copies stay in the order of their numbers
    new = np.ones(len(order) + 1, bool)  # not a copy of the one before
    new[1:-1] = (digests[order[1:]] != digests[order[:-1]]).any(1)
    twice = ~(new[1:] & new[:-1])  # [m]
    for copies in np.split(numbers[order[twice]], np.flatnonzero(new[:-1][twice])[1:]):
        labeled, rest, test = (copies[part[copies] == which] for which in (LABELED, REST, TEST))
        for problem, those, other in (
            ("labeled in test", labeled, test),
            ("unlabeled in test", rest, test),
            ("labeled in unlabeled", labeled, rest),
            ("copy", labeled[1:], labeled),
            ("copy", rest[1:], rest),
            ("copy", test[1:], test),
        ):
            for number in those if len(other) else ():
                findings.case(images.at(number)[2], problem, f"the same as {images.at(other[0])[2]}")
        known = copies[labels[copies] >= 0]
        used = known[part[known] != REST]
        problem, those = (
            ("labels differ", used) if len(np.unique(labels[used])) > 1 else ("hidden labels differ", known)
        )
        for number in those[labels[those] != labels[those[:1]]]:
            other = f"{classes[labels[those[0]]]} as {images.at(those[0])[2]}"
            findings.case(images.at(number)[2], problem, f"{classes[labels[number]]}, but {other}")


def disk(
    looks: np.ndarray, total: int, folders: set[str], seconds: float, workers: int, findings: Findings
) -> None:
    """Formats, bytes, where the `total` files are, and how fast the [m] that were looked at came from there."""
    size, rate = looks["bytes"].mean(), len(looks) / seconds
    devices = {
        f"{os.major(device)}:{os.minor(device)}" for device in {os.stat(folder).st_dev for folder in folders}
    }
    mounts = (
        MOUNTS.read_text(errors="surrogateescape").splitlines() if MOUNTS.exists() else []
    )  # Linux has it
    kinds = sorted({line.partition(" - ")[2].split()[0] for line in mounts if line.split()[2] in devices})
    findings.lines["ok"] += [
        "formats: "
        + ", ".join(f"{kind.decode()} {n:,}" for kind, n in Counter(looks["kind"].tolist()).most_common()),
        f"{size * total / 1e9:,.3f} GB in {len(folders):,} folders, {size / 1e3:,.1f} kB an image"
        + ", on ".join(["", *kinds]),
        f"read and decoded {rate:,.0f} images a second and process (processes: {max(1, workers)}, CPUs: {os.cpu_count()}); "
        f"estimate for 1,000 a second: {1000 / rate:,.1f} processes, more for views and for files read for the first time",
    ]
    findings.lines["note"] += [
        f"{kind} is a network file system; copy the images to a local disk if workers wait for it"
        for kind in kinds
        if kind.removeprefix("fuse.").startswith(NETWORK)
    ]


def main() -> None:
    own = Parser(
        f"{__doc__.partition(': ')[2]} CONFIG and the fields are those of train_semi.py, whose --help describes them."
    )
    own.usage = "python -m dataset.check CONFIG [--field value ...] [--sample N] [--report FILE]"
    own.add_argument(
        "--sample", type=int, default=0, metavar="N", help="look at N images only, drawn by the seed"
    )
    own.add_argument(
        "--report", default=os.devnull, metavar="FILE", help="every case, as CSV: path, problem, detail"
    )
    args, rest = own.parse_known_args()
    config = parse(["--config", *rest] if rest and not rest[0].startswith("-") else rest, __doc__)
    if args.sample < 0:
        raise UserError(f"--sample must be 1 or more, or 0 for all images, got {args.sample}")
    data = build_data(config, gpu=False)  # before the report is opened: an older one stays if this fails
    try:
        stream = open(args.report, "w", newline="", encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        raise UserError(
            f"cannot write report {args.report}: {error.strerror}; choose another --report"
        ) from None
    with stream:
        findings = Findings(stream)
        check(data, config, args.sample, findings)
    sys.exit(1 if findings.conclude() else 0)


if __name__ == "__main__":
    cli_main(main, interrupted="interrupted: not every image was looked at")
