"""What `python -m dataset.check` found: cases of known problems, and lines about the data set."""

import csv
import os
from collections import Counter
from typing import NamedTuple, TextIO

from util.errors import printable


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
    "class without test": Problem("note", "classes without a test image", ""),
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
