"""benchmark/marked_file.py: a table is put between its marks, and nothing else of a file changes."""

import os

import pytest

from benchmark import marked_file
from util.errors import UserError

MARKS = ("<!-- table -->", "<!-- end -->")


def test_only_the_table_changes(tmp_path):
    file, link = tmp_path / "a.md", tmp_path / "link.md"
    file.write_text("before\n<!-- table -->\nold\n<!-- end -->\nafter é\n", encoding="utf-8")
    link.symlink_to(file)
    for table in ("new", "| a |\n|---|"):
        marked_file.check(link, MARKS)
        marked_file.put(link, MARKS, table)
        text = f"before\n<!-- table -->\n{table}\n<!-- end -->\nafter é\n"
        assert file.read_text(encoding="utf-8") == text and link.is_symlink()


@pytest.mark.parametrize(
    "content, words",
    [
        (b"no marks", "has no place for the table"),
        (b"<!-- end --><!-- table -->", "has no place for the table"),
        (b"<!-- table --><!-- end --><!-- table --><!-- end -->", "has no place for the table"),
        (b"\xff\xfe", "this is not text"),
        (None, "it is a directory, not a file"),
    ],
)
def test_a_file_without_the_marks_is_refused(content, words, tmp_path):
    file = tmp_path / "a.md"
    if content is None:
        file.mkdir()
    else:
        file.write_bytes(content)
    with pytest.raises(UserError, match=words):
        marked_file.check(file, MARKS)
    with pytest.raises(UserError, match="No such file or directory"):
        marked_file.check(tmp_path / "none", MARKS)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UserError, match="it is a FIFO"):
        marked_file.put(tmp_path / "fifo", MARKS, "table")
