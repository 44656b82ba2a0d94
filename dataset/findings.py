"""What `python -m dataset.check` found: cases of known problems, and lines about the data set. A new run
prints those that need no image to be read.
"""

import csv
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TextIO

import numpy as np

from dataset.listing import THREADS
from dataset.loader import Data
from dataset.source import Files
from util.config import Config
from util.errors import printable
from util.inspect.detectors import describe_start_in_teacher


class Problem(NamedTuple):
    severity: str  # BAD or note
    found: str  # printed before the number of cases
    none_found: str  # printed if there are no cases; "": nothing is printed


PROBLEMS = {
    "label": Problem("BAD", "labels that are not those of a class", "every label is that of a class"),
    "unreadable": Problem(
        "BAD", "images that cannot be used (fix or remove them)", "every image can be decoded"
    ),
    "class without labeled": Problem("BAD", "classes without a labeled image that can be used", ""),
    "class without test": Problem(
        "note", "classes without a test image, about which the accuracy says nothing", ""
    ),
    "labeled in test": Problem(
        "BAD", "labeled images that are also test images (remove them)", "no labeled image is a test image"
    ),
    "unlabeled in test": Problem(
        "BAD",
        "unlabeled images that are also test images (remove them)",
        "no unlabeled image is a test image",
    ),
    "labels differ": Problem(
        "BAD", "images with another label than their copies (keep one of each)", "copies have the same label"
    ),
    "hidden labels differ": Problem(
        "note", "images with another label than their copies, where one of the labels is not used", ""
    ),
    "labeled in unlabeled": Problem("note", "labeled images with copies among the unlabeled images", ""),
    "copy": Problem("note", "copies of other images in the same set", "no set holds an image twice"),
    "one color": Problem("note", "images of a single color", "no image is of a single color"),
    "tiny": Problem("note", "tiny images, whose shorter side is below a quarter of image_size", ""),
    "huge": Problem("note", "huge images, above 25 megapixels, which take long to load", ""),
    "misnamed": Problem(
        "note", "files of another format than their extension says (the content decides)", ""
    ),
}
COLUMNS = ["path", "problem", "detail"]  # of the report
MAX_PRINTED = 20  # cases of each problem
MAX_NAMED = 5  # cases in one line
ENOUGH_TEST_IMAGES = 10  # of a class


class Findings:
    """Collects cases of PROBLEMS and other lines. Each case is also written to `report`, as a line of CSV."""

    def __init__(self, report: TextIO):
        self.table = csv.writer(report)
        self.table.writerow(COLUMNS)
        self.lines: dict[str, list[str]] = {"ok": [], "note": [], "BAD": []}
        self.counts: Counter[str] = Counter()
        self.printed: dict[str, list[str]] = {problem: [] for problem in PROBLEMS}

    def add_case(self, name: str, problem: str, detail: str) -> None:
        self.table.writerow([name, problem, detail])
        self.counts[problem] += 1
        if self.counts[problem] <= MAX_PRINTED:
            self.printed[problem].append(printable(f"{name}: {detail}"))

    def print_summary(self) -> int:
        """Print all findings and return the number of BAD lines. Call it once."""
        for problem, (severity, found, none_found) in PROBLEMS.items():
            n = self.counts[problem]
            if n:
                parts = [f"{found}: {n:,}", *self.printed[problem]]
                if n > MAX_PRINTED:
                    parts.append(f"and {n - MAX_PRINTED:,} more; --report FILE lists all of them")
                self.lines[severity].append("\n        ".join(parts))
            elif none_found:
                self.lines["ok"].append(none_found)
        text = "\n".join(f"{severity:<6}{line}" for severity, lines in self.lines.items() for line in lines)
        print(os.fsencode(text).decode(errors="backslashreplace"))  # a file name may hold any bytes
        bad = len(self.lines["BAD"])
        print(f"bad: {bad} problem{'s' * (bad > 1)}" if bad else "good")
        return bad


def start_warnings(config: Config, data: Data, steps_per_epoch: int) -> list[str]:
    """Return lines about what makes the results of a new run mean little; no image is read for them."""
    per_class = np.bincount(data.test_labels, minlength=len(data.classes))  # [C]
    absent = [data.classes[c] for c in np.flatnonzero(per_class == 0).tolist()]
    leaked = [f"{data.images.name(x)} is {data.test_images.name(t)}" for x, t in same_files(data)]
    lines = [
        _in_one_line("class without test", absent),
        _in_one_line("labeled in test", leaked),
        *settings_notes(config, per_class, data.classes, steps_per_epoch),
    ]
    return [f"warning: {os.fsencode(line).decode(errors='backslashreplace')}" for line in lines if line]


def settings_notes(
    config: Config, per_class: np.ndarray, classes: Sequence[str], steps_per_epoch: int
) -> list[str]:
    """Return lines about results that mean little with these settings. per_class [C]: test images of each."""
    lines = [
        few_test_images(per_class, classes),
        few_train_events(steps_per_epoch, min(config.eval_freq, config.epochs), config.print_freq),
        describe_start_in_teacher(config.ema_m, config.epochs * steps_per_epoch) if steps_per_epoch else "",
    ]
    return [line for line in lines if line]


def _in_one_line(problem: str, cases: Sequence[str]) -> str:
    if not cases:
        return ""
    more = ", ..." * (len(cases) > MAX_NAMED)
    return f"{PROBLEMS[problem].found}: {len(cases):,} ({', '.join(cases[:MAX_NAMED])}{more})"


def standard_error(images: int) -> str:
    """Return the standard error, in points, of an accuracy over so many images, in two digits. It is that at
    50 %, where it is largest; at 90 % it is 0.6 times as large.
    """
    return f"{50 / images**0.5:.2g}"


def few_test_images(per_class: np.ndarray, classes: Sequence[str]) -> str:
    """Return a line if a class has test images, but fewer than ten. per_class [C]: test images of each."""
    order = np.argsort(per_class, kind="stable")  # [C]
    few = order[(per_class[order] > 0) & (per_class[order] < ENOUGH_TEST_IMAGES)].tolist()
    if not few:
        return ""
    fewest, total = int(per_class[few[0]]), int(per_class.sum())
    named = ", ".join(f"{classes[c]} {per_class[c]}" for c in few[:MAX_NAMED])
    return (
        f"{len(few):,} of {len(classes):,} classes have fewer than {ENOUGH_TEST_IMAGES} test images ({named}"
        f"{', ...' * (len(few) > MAX_NAMED)}): the standard error of the accuracy is up to "
        f"{standard_error(fewest)} points for a class of {fewest}, and up to {standard_error(total)} points "
        f"for all {total:,} test images; a smaller difference between runs says little"
    )


def few_train_events(steps_per_epoch: int, eval_freq: int, print_freq: int) -> str:
    """Return a line if there are fewer steps between two evaluations than between two train events."""
    steps = eval_freq * steps_per_epoch
    if not 0 < steps < print_freq:
        return ""
    return (
        f"evaluations are {steps} steps apart ({steps_per_epoch} steps an epoch), fewer than --print-freq "
        f"{print_freq}: the log has hardly any train event but those of evaluations; set --print-freq "
        f"{max(1, steps // 5)}"
    )


def same_files(data: Data) -> list[tuple[int, int]]:
    """Find labeled images and test images that are one file, perhaps by way of links: rows (labeled, test) of
    `data.images` and `data.test_images`. Files are looked up, but not read; missing files are left out.
    """
    if not (isinstance(data.images, Files) and isinstance(data.test_images, Files)):
        return []
    with ThreadPoolExecutor(THREADS) as pool:  # a file server answers many requests at once
        labeled = _file_ids(data.images, data.labeled, pool)
        tests = _file_ids(data.test_images, np.arange(len(data.test_images)), pool)
    row_of = {identity: row for row, identity in enumerate(tests) if identity}
    pairs = zip(data.labeled.tolist(), labeled)
    return [(row, row_of[identity]) for row, identity in pairs if identity in row_of]


def _file_ids(source: Files, rows: np.ndarray, pool: ThreadPoolExecutor) -> list[tuple[int, ...] | None]:
    """Return what identifies the file of each of these images, in their order; None: it does not exist."""

    def look_up(chunk: np.ndarray) -> list[tuple[int, ...] | None]:
        return [_file_id(os.path.join(source.root, source.names[row])) for row in chunk.tolist()]

    return sum(pool.map(look_up, np.array_split(rows, THREADS)), [])


def _file_id(path: str) -> tuple[int, ...] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    # The size, too, because some network file systems give two files the same number.
    return status.st_dev, status.st_ino, status.st_size
