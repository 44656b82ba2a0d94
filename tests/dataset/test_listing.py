"""Trees of class folders and list files: which images are listed, in which order, and that the cache is never
out of date.
"""

import os
import pickle
import random
import time
from contextlib import nullcontext

import numpy as np
import pytest

from dataset import listing, listing_cache
from dataset.listing import list_images, read_list, scan
from dataset.source import Names
from util.errors import UserError


@pytest.fixture(autouse=True)
def patience(monkeypatch, tmp_path):
    """Do not wait 2 s until a tree is cached: the tests wait for the next time stamp instead."""
    monkeypatch.setattr(listing, "TIMESTAMP_NS", 0)
    monkeypatch.setenv("SIMMATCH_CACHE", str(tmp_path / "cache"))


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    time.sleep(0.02)  # a tick
    return root


def refused(words):
    return pytest.raises(UserError, match=rf"^[^\n]*{words}[^\n]*$")


TREE = (["a", "b"], ["a/x.jpg", "a/y.JpG", "a/z.webp", "b/1.JPEG", "b/2.png"], [0, 0, 0, 1, 1])


@pytest.fixture
def tree(tmp_path):
    return touch(tmp_path / "train", *reversed(TREE[1]))


def content(found):
    return found.classes, list(found.names), found.labels.tolist()


@pytest.fixture
def looked(monkeypatch):
    """Scan and return whether the tree was read, and the listing."""

    def call(*args, **how):
        read, walk = [], listing._walk_tree
        with monkeypatch.context() as patch:
            patch.setattr(listing, "_walk_tree", lambda *a: read.append(1) or walk(*a))
            found = scan(*args, **how)
        return bool(read), found

    return call


@pytest.fixture
def scandir(monkeypatch):
    """os.scandir returns what `change(folder, entries)` makes of its entries."""

    def call(change, real=os.scandir):
        monkeypatch.setattr(os, "scandir", lambda folder: nullcontext(change(folder, list(real(folder)))))

    return call


def test_a_scan_finds_images_and_nothing_else(tree):
    touch(
        tree,
        ".hidden/1.png",
        "a/.hidden.png",
        "a/notes.txt",
        "a/png",
        "a/x.jpg.part",
        "README.png",
        "a/.git/1.png",
    )
    found = scan(tree)
    assert content(found) == TREE and found.root == tree.resolve() and found.labels.dtype == np.int64
    some = sorted(
        f"a/1{e}" for e in ".jpg .jpeg .png .webp .gif .bmp .tif .tiff .ppm .pgm .JPEG .Png".split()
    )
    assert list(scan(touch(tree.parent / "t", *some)).names) == some


def test_the_order_is_by_class_then_name_as_bytes(tmp_path, scandir):
    classes = ["Z", "a", "a-b", "a.c", "é"]  # "a-b/1" < "a/1": paths as a whole would sort otherwise
    names = ["10.png", "2.png", "B.png", "a.png", "é.png"]
    root, seed = touch(tmp_path / "t", *(f"{c}/{n}" for c in classes for n in names)), random.Random(0)
    scandir(lambda _, entries: seed.sample(entries, len(entries)))
    found = scan(root)
    assert found.classes == classes and list(found.names) == [f"{c}/{n}" for c in classes for n in names]


def test_links_are_followed(tree, tmp_path):
    (tree / "c").symlink_to(touch(tmp_path / "elsewhere", "3.png"))
    (tree / "b" / "link.png").symlink_to(tree / "a" / "x.jpg")
    (tree / "b" / "no image").symlink_to(tmp_path / "nowhere")
    (tmp_path / "link").symlink_to(tree)
    found = scan(tmp_path / "link")
    assert list(found.names) == TREE[1] + ["b/link.png", "c/3.png"] and found.root == tree.resolve()
    (tree / "b" / "gone.png").symlink_to(tmp_path / "nowhere")
    with refused("b/gone.png is a broken link"):
        scan(tree)


def test_folders_below_class_folders_need_recursive(tree, looked):
    touch(tree, "a/deep/er/0.png", "a/w.png")
    with refused("/a/deep is a folder in a class folder; move its images up"):
        scan(tree)
    found = scan(tree, recursive=True)
    assert (
        list(found.names)[:3] == ["a/deep/er/0.png", "a/w.png", "a/x.jpg"]
        and found.labels.tolist() == [0] * 5 + [1] * 2
    )
    assert not looked(tree, recursive=True)[0]
    touch(tree, "a/deep/er/1.png")
    assert "a/deep/er/1.png" in list(scan(tree, recursive=True).names)
    with refused("a/deep is a folder"):  # what one form remembers is not for the other
        scan(tree)
    (tree / "a" / "deep" / "up").symlink_to(tree / "a")
    with refused("a/deep/up is a link to a folder above it"):
        scan(tree, recursive=True)


def test_names_may_hold_any_bytes(tmp_path):
    names = pickle.loads(
        pickle.dumps(Names(np.array([b"a/1.png", b"b/22.png"])))
    )  # as it goes to a spawned worker
    assert len(names) == 2 and list(names) == ["a/1.png", "b/22.png"] and type(names[np.int64(1)]) is str
    (tmp_path / os.fsdecode(b"t/\xff")).mkdir(parents=True)  # not UTF-8
    (tmp_path / os.fsdecode(b"t/\xff/\xfe.png")).write_text("here")
    found = scan(tmp_path / "t")
    assert (found.root / found.names[0]).read_text() == "here" and os.fsencode(found.classes[0]) == b"\xff"


@pytest.mark.parametrize(
    "files, root, words",
    [
        (["a/1.png"], "nothing", "data folder .*/nothing does not exist"),
        (["1.png"], "1.png", "1.png is not a folder"),
        (["1.png"], "", "has no class folders; expected <class>/<image>"),
        (["a/1.png", "e/notes.txt"], "", "class folder .*/t/e holds no images"),
    ],
)
def test_trees_of_another_form_are_refused(tmp_path, files, root, words):
    with refused(words):
        scan(touch(tmp_path / "t", *files) / root)


def refusing(closed):
    return lambda folder, entries: os.listdir("/nothing") if folder == os.fsencode(closed) else entries


def test_folders_that_cannot_be_read(tree, scandir):
    for closed in (tree.resolve() / "a", tree.resolve()):
        scandir(refusing(closed))
        with refused(f"cannot read folder {closed}: No such file or directory"):
            scan(tree)


def added_time_put_back(tree):
    """Add a file and set the time of the folder back, as archivers do."""
    before = os.stat(tree / "b")
    os.utime(touch(tree, "b/3.png") / "b", ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize(
    "change",
    [
        lambda t: touch(t, "b/3.png"),
        added_time_put_back,
        lambda t: (t / "b/2.png").unlink(),
        lambda t: (t / "b/2.png").rename(t / "b/3.png"),
        lambda t: (t / "b/2.png").rename(t / "a/2.png"),
        lambda t: touch(t, "c/1.png"),
        lambda t: (t / "b").rename(t / "c"),
        lambda t: (t / "b").rename(t.parent / "c"),
        lambda t: [(t / old).rename(t / new) for old, new in (("a", "c"), ("b", "a"), ("c", "b"))],
    ],
    ids="added added_time_put_back removed renamed moved class_added class_renamed class_removed "
    "classes_swapped".split(),
)
def test_the_second_start_reads_no_folder_but_notices_every_change(tree, looked, change):
    assert looked(tree)[0]
    read, found = looked(tree)
    assert not read and content(found) == TREE and found.labels.dtype == np.int64
    change(tree)
    time.sleep(0.02)
    read, found = looked(tree)
    assert read and content(found) == content(scan(tree, tree.parent / "other cache")) != TREE
    assert not looked(tree)[0]


def test_a_tree_that_has_just_changed_is_not_cached(tree, tmp_path, looked, monkeypatch):
    monkeypatch.setattr(listing, "TIMESTAMP_NS", 2 * 10**9)
    scan(tree)
    assert not (tmp_path / "cache").exists()
    now = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: now + 3 * 10**9)
    assert looked(tree)[0] and not looked(tree)[0]


def test_a_folder_that_changes_while_it_is_read_is_read_again(tree, scandir):
    scandir(lambda folder, entries: entries if not folder.endswith(b"/b") or touch(tree, "b/3.png") else [])
    assert content(scan(tree)) == TREE
    assert list(scan(tree).names) == [*TREE[1], "b/3.png"]


def test_a_damaged_cache_is_rewritten(tree, tmp_path, looked):
    scan(tree)
    (file,) = (tmp_path / "cache").iterdir()
    whole = file.read_bytes()
    flipped = (
        whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :]
        for i in [*range(0, len(whole), 29), len(whole) - 1]
    )
    for damaged in (
        b"",
        b"x",
        whole[: len(whole) // 2],
        whole[:-1],
        whole + b"x",
        pickle.dumps(os.getcwd),
        *flipped,
    ):
        file.write_bytes(damaged)
        read, found = looked(tree)
        assert read and content(found) == TREE
        assert not looked(tree)[0] and os.listdir(file.parent) == [file.name]


def test_the_cache_folder_can_be_chosen(tree, tmp_path, looked, monkeypatch, capsys):
    other = touch(tmp_path / "val", "b/9.png")
    assert (
        list(scan(other).names) == ["b/9.png"]
        and content(scan(tree)) == content(scan(tree, tmp_path / "given")) == TREE
    )
    monkeypatch.chdir(tree.parent)
    assert not looked("train")[0]  # the same folder by another name
    monkeypatch.setenv("SIMMATCH_CACHE", "")
    monkeypatch.setenv("HOME", str(tmp_path / "given"))
    scan("~/../train")
    assert [len(os.listdir(tmp_path / folder)) for folder in ("cache", "given", "given/.cache/simmatch")] == [
        2,
        2,
        1,
    ]
    listing_cache._warn_once.cache_clear()
    for _ in range(2):  # where it cannot be
        assert content(scan(tree, tree / "a" / "x.jpg" / "below")) == TREE
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "cannot write to" in said and "SIMMATCH_CACHE" in said


def test_a_file_that_is_no_image_is_named_for_what_it_is(tree, tmp_path):
    """A FIFO would be waited for, and a device read without end."""
    for make, words in (
        (lambda path: os.mkfifo(path), "is a FIFO, not an image"),
        (lambda path: path.symlink_to("/dev/zero"), "is a device or a socket, not an image"),
    ):
        make(tree / "b" / "odd.png")
        with refused(f"b/odd.png {words}"):
            scan(tree)
        with refused(f"b/odd.png {words}"):
            list_images(tree)
        (tree / "b" / "odd.png").unlink()
    os.mkfifo(tmp_path / "list.txt")
    with refused("cannot read list file .*list.txt: it is a FIFO"):
        read_list(tmp_path / "list.txt", tree)


@pytest.mark.parametrize(
    "name, shown", [("a\nb", r"a\\nb"), ("  ", "  "), ("a\x1b[2J", r"a\\x1b\[2J"), ("a\u2028", r"a\\u2028")]
)
def test_a_class_name_that_cannot_be_read_is_refused(tree, name, shown):
    touch(tree, f"{name}/1.png")
    with refused(f'the class name "{shown}" is blank or has control characters; rename it'):
        scan(tree)


def test_a_class_name_in_a_list_that_cannot_be_read_is_refused(tmp_path):
    with refused(r'list.txt: the class name "a\\x1b" is blank or has control characters; rename it'):
        read_list_of(tmp_path, "a\x1b/1.png 0\n")


def read_list_of(tmp_path, text):
    (tmp_path / "list.txt").write_text(text)
    return read_list(tmp_path / "list.txt", touch(tmp_path / "d", *(text.split(" ")[:1])))


IMAGES = ["n02/my cat.png", "n01/1.png", "n01/2.png"]


def a_list(tmp_path, data):
    if data is not None:
        (tmp_path / "list.txt").write_bytes(data)
    return read_list(tmp_path / "list.txt", touch(tmp_path / "d", *IMAGES, "1.png", "2.png"))


@pytest.mark.parametrize(
    "data, expected",
    [
        (b"n02/my cat.png 1\nn01/1.png 0\nn01/2.png 0\n", (["n01", "n02"], IMAGES, [1, 0, 0])),
        (b"n02/my cat.png\t1\r\n\r\n\n  n01/1.png   0 \r\nn01/2.png 0", (["n01", "n02"], IMAGES, [1, 0, 0])),
        (b"\xef\xbb\xbfn02/my cat.png 1\nn01/1.png 0\nn01/2.png +0", (["n01", "n02"], IMAGES, [1, 0, 0])),
        (b"../d/n02/my cat.png 0", (["n02"], ["../d/n02/my cat.png"], [0])),
        (
            b"n02/my cat.png 2\nn01/1.png 0\nn01/2.png 0",
            (["n01", "1", "n02"], IMAGES, [2, 0, 0]),
        ),  # nothing labeled 1
        (b"2.png 2\n1.png 0\n", (["0", "1", "2"], ["2.png", "1.png"], [2, 0])),  # no folders
        (b"1.png 0", (["0"], ["1.png"], [0])),
        (b"n01/1.png 0\nn01/2.png 1", (["0", "1"], IMAGES[1:], [0, 1])),
        (b"n02/my cat.png 0\nn01/1.png 0\nn01/2.png 0", (["0"], IMAGES, [0, 0, 0])),
    ],
)
def test_list_files_are_parsed(tmp_path, data, expected):
    found = a_list(tmp_path, data)
    assert (
        content(found) == expected
        and found.root == (tmp_path / "d").resolve()
        and found.labels.dtype == np.int64
    )


@pytest.mark.parametrize(
    "data, words",
    [
        (b"n01/1.png 0\nn01/2.png\n", "list.txt, line 2: expected `path label`.*`n01/2.png`, label missing"),
        (b"n01/1.png 0\nn01/2.png cat\n", "list.txt, line 2: .*label missing"),
        (b"n01/1.png 0\n\nn01/2.png -1\n", "list.txt, line 3: .*label -1"),
        (b"n01/1.png 0\nn01/2.png 1.5\n", "list.txt, line 2: .*label missing"),
        (b"n01/1.png 1000000\n", "list.txt, line 1: .*label 1000000"),
        (b"3\n", "list.txt, line 1: .*label missing"),
        (b"n01/1.png 0\nn01/2.png 1\nn01/1.png 0\n", "list.txt, line 3: n01/1.png is already on line 1"),
        (b"\n \n", "list.txt is empty"),
        (b"", "list.txt is empty"),
        (None, "cannot read list file .*/list.txt: No such file"),
        (
            b"n01/1.png 0\nn01/\xff.png 0\n",
            r"list.txt, line 2: this is not text.* Rename .*: n01/\\xff.png 0",
        ),
        (b"n01/1.png 0\n\n\0\1", "list.txt, line 3: this is not text"),
    ],
)
def test_mistakes_in_a_list_file_are_named(tmp_path, data, words):
    with refused(words):
        a_list(tmp_path, data)
