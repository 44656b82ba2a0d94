"""The CSV file of predictions that eval.py writes (docs/DATA.md)."""

import csv
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

from util.files import starts_with, write_atomically

DEFAULT = Path("predictions.csv")
COLUMNS = ["path", "class", "probability", "top5"]
is_predictions = starts_with(",".join(COLUMNS).encode())


def write(
    output: Path, classes: Sequence[str], images: Iterable[tuple[str, Sequence[float], Sequence[int]]]
) -> int:
    """Write the file and return the number of images.

    images: path, probabilities and labels of the most probable classes, in this order.
    """
    count = 0

    def write_lines(out: BinaryIO) -> None:
        nonlocal count
        file = io.TextIOWrapper(
            out, encoding="utf-8", errors="surrogateescape", newline="", write_through=True
        )
        lines = csv.writer(file)
        lines.writerow(COLUMNS)
        for path, probabilities, labels in images:
            lines.writerow(row(path, [classes[c] for c in labels], probabilities))
            count += 1
        file.detach()  # otherwise it would close `out`

    write_atomically(output, write_lines)
    return count


def row(path: str, names: Sequence[str], probabilities: Sequence[float]) -> list[str]:
    """Return the line of an image. names, probabilities: of the most probable classes, in this order."""
    top5 = [[name, round(p, 4)] for name, p in zip(names, probabilities)]
    return [
        _not_a_formula(path, "./"),
        _not_a_formula(names[0], "'"),
        f"{probabilities[0]:.4f}",
        json.dumps(top5, ensure_ascii=False),
    ]


def _not_a_formula(cell: str, prefix: str) -> str:
    """Return `cell`, after the prefix if a spreadsheet would otherwise take it for a formula."""
    return prefix + cell if cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell


def note_other_encodings(paths: Iterable[str]) -> str:
    """Return a line about the paths that are not UTF-8, or "". Python reads their bytes as surrogates."""
    others = [path for path in paths if any("\ud800" <= c <= "\udfff" for c in path)]
    if not others:
        return ""
    return (
        f"{len(others)} of the paths are not UTF-8, the first is {others[0]}: the CSV file has their bytes. "
        "Rename the files, or read it with the error handler surrogateescape"
    )
