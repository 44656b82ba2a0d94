"""Tables between two marks in a Markdown file, which the benchmarks' --write replaces."""

import os
from pathlib import Path

from util.errors import UserError
from util.files import special_file, write_atomically


def check(file: Path, marks: tuple[str, str]) -> None:
    """Raise UserError unless the file has each of the two marks once, in this order."""
    _split(file, marks)


def put(file: Path, marks: tuple[str, str], table: str) -> None:
    """Replace what is between the marks. Raises UserError."""
    before, after = _split(file, marks)
    text = f"{before}{marks[0]}\n{table}\n{marks[1]}{after}"
    write_atomically(Path(os.path.realpath(file)), lambda out: out.write(text.encode()))


def _split(file: Path, marks: tuple[str, str]) -> tuple[str, str]:
    """Return the text before the first mark and that after the second one."""
    try:
        if special := special_file(file):
            raise UserError(f"--write {file}: it is {special}, not a file")
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--write {file}: {getattr(error, 'strerror', 'this is not text')}") from None
    before, _, rest = text.partition(marks[0])
    _, end, after = rest.partition(marks[1])
    if not end or marks[0] in rest or marks[1] in before + after:
        raise UserError(f"{file} has no place for the table: it needs the lines {marks[0]} and {marks[1]}")
    return before, after
