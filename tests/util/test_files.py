"""Paths that a user names, files that may be replaced, and files that are written as a whole."""

import os
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from util import files
from util.errors import UserError, printable


def refused(words):
    return pytest.raises(UserError, match=rf"^[^\n]*{words}[^\n]*$")


@pytest.mark.parametrize(
    "path, words",
    [
        ("a/" + "x" * 300, r"a/x{98}\.\.\.: File name too long"),
        ("x/" * 3000, "File name too long"),
        ("a\0b", r"a\\x00b cannot be a path: embedded null byte"),
        ("a\ud800", "cannot be a path"),
        ("~no-such-user/a", "~no-such-user is not the home folder of a user; write ./~no-such-user/a"),
    ],
)
def test_a_path_that_no_file_can_have_is_refused(path, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    with refused(words):
        files.user_path(path)


def test_a_path_may_begin_with_a_tilde(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    assert [str(files.user_path(path)) for path in ("~/a", "a/~", "", "none/b")] == [
        "/home/me/a",
        "a/~",
        ".",
        "none/b",
    ]
    path = files.user_path("./~no-such-user")
    assert path == tmp_path / "~no-such-user" == files.user_path(path)
    (tmp_path / "loop").symlink_to("loop")
    with refused("Too many levels of symbolic links"):
        files.user_path("loop")


def test_special_files_are_named(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "file").touch()
    found = [files.special_file(tmp_path / name) for name in ("", "fifo", "zero", "file", "none")]
    assert found == ["a directory", "a FIFO", "a device or a socket", "", ""]


def check(path, reads=()):
    return files.check_output(path, "--output", "a CSV file", files.starts_with(b"a,b"), reads)


def test_a_missing_or_empty_file_may_be_written(tmp_path):
    (tmp_path / "empty").touch()
    (tmp_path / "link").symlink_to(tmp_path / "none")
    assert check(tmp_path / "none") == (tmp_path / "none", "") == check(tmp_path / "link")
    assert check(tmp_path / "empty") == (tmp_path / "empty", "")


def test_a_file_of_the_same_kind_is_replaced_and_another_one_is_not(tmp_path):
    (tmp_path / "table").write_bytes(b"a,b\n1,2\n")
    (tmp_path / "link").symlink_to(tmp_path / "table")
    assert check(tmp_path / "table") == (
        tmp_path / "table",
        f"replaces {tmp_path / 'table'}, a CSV file",
    )
    assert check(tmp_path / "link")[0] == tmp_path / "table"
    for content in (b"a", b"a,", b"\0a,b", b"a;b\n1;2"):
        (tmp_path / "other").write_bytes(content)
        with refused("other exists and is not a CSV file, so it is not replaced: choose another --output"):
            check(tmp_path / "other")


def test_the_file_that_is_read_is_not_replaced(tmp_path):
    (tmp_path / "read").write_bytes(b"a,b\n")
    (tmp_path / "symbolic").symlink_to(tmp_path / "read")
    os.link(tmp_path / "read", tmp_path / "hard")
    for name in ("read", "symbolic", "hard"):
        with refused("cannot write .*: it is the file that is read"):
            check(tmp_path / name, [tmp_path / "none", tmp_path / "read"])


@pytest.mark.parametrize(
    "name, words",
    [
        ("", "it is a directory, not a regular file; choose another --output"),
        ("fifo", "it is a FIFO, not a regular file"),
        ("zero", "it is a device or a socket, not a regular file"),
        ("none/a", "none is not a folder"),
        ("file/a", "file is not a folder"),
        ("~nobody\0", "cannot be a path"),
    ],
)
def test_what_cannot_be_written_is_refused_before_the_work(name, words, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "file").write_bytes(b"a,b")
    with refused(words):
        check(tmp_path / name)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_refused_before_the_work(tmp_path):
    tmp_path.chmod(0o500)
    with refused("no permission to write to"):
        check(tmp_path / "a")


@pytest.mark.parametrize("stopped", [UserError("a bad image"), KeyboardInterrupt(), OSError(28, "full")])
def test_an_interrupted_write_leaves_only_the_old_file(stopped, tmp_path):
    def write(file):
        file.write(b"half")
        raise stopped

    (tmp_path / "a.csv").write_bytes(b"before")
    with pytest.raises(UserError if isinstance(stopped, OSError) else type(stopped)) as error:
        files.write_atomically(tmp_path / "a.csv", write)
    if isinstance(stopped, OSError):
        assert "a.csv: full; the file that was there before is unchanged" in str(error.value)
    assert (tmp_path / "a.csv").read_bytes() == b"before" and os.listdir(tmp_path) == ["a.csv"]
    files.write_atomically(tmp_path / "a.csv", lambda file: file.write(b"after"))
    assert (tmp_path / "a.csv").read_bytes() == b"after" and os.listdir(tmp_path) == ["a.csv"]
    with refused("cannot write .*a.csv/b: Not a directory$"):
        files.write_atomically(tmp_path / "a.csv" / "b", lambda file: None)


def test_a_failed_rename_leaves_only_the_old_file(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    (tmp_path / "a").write_bytes(b"before")
    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch, refused("No space left on device"):
            patch.setattr(os, name, full)
            files.write_atomically(tmp_path / "a", lambda file: file.write(b"after"))
        assert (tmp_path / "a").read_bytes() == b"before" and os.listdir(tmp_path) == ["a"]


def test_the_longest_file_name_can_be_written(tmp_path):
    for name in ("x" * 255, "é" * 127):
        files.write_atomically(tmp_path / name, lambda file: file.write(b"all"))
        assert (tmp_path / name).read_bytes() == b"all"


def test_two_writes_at_once_do_not_mix(tmp_path):
    def write(file):
        file.write(b"first, ")
        files.write_atomically(tmp_path / "a", lambda inner: inner.write(b"inner"))
        assert (tmp_path / "a").read_bytes() == b"inner"
        file.write(b"second")

    files.write_atomically(tmp_path / "a", write)
    assert (tmp_path / "a").read_bytes() == b"first, second" and os.listdir(tmp_path) == ["a"]


def test_what_a_killed_process_left_is_removed_after_a_while(tmp_path):
    code = (
        "import os, sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path\n"
        "from util.files import write_atomically\n"
        "write_atomically(Path(sys.argv[2]), lambda file: os.kill(os.getpid(), 9))"
    )
    subprocess.run([sys.executable, "-c", code, str(ROOT), str(tmp_path / "a")])
    (left,) = tmp_path.iterdir()
    (tmp_path / "a.1.tmp").touch()  # of another program
    os.utime(tmp_path / "a.1.tmp", (0, 0))
    for age, there in ((1800, True), (7200, False)):
        os.utime(left, (time.time() - age,) * 2)
        files.write_atomically(tmp_path / "a", lambda file: None)
        assert left.exists() == there
    assert sorted(os.listdir(tmp_path)) == ["a", "a.1.tmp"]


def test_names_are_printed_in_one_line_without_control_characters():
    assert printable("é \\ a\n\r\t\x1b[31m\u2028") == r"é \ a\n\r\t\x1b[31m\u2028"
    assert printable(os.fsdecode(b"caf\xe9.png")) == r"caf\xe9.png"
