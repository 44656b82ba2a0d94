"""Splits: the published lists and the script that downloads them, list files, draws, and rows in a data set.

If the environment variable SIMMATCH_SPLITS names a folder with the published lists, their contents are
tested, too.
"""

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from hashlib import sha256

import numpy as np
import pytest
from conftest import ROOT, one_line

from dataset import split_command
from dataset.source import LabeledFiles, Names
from dataset.split_command import class_of, describe
from dataset.splits import (
    PUBLISHED,
    Published,
    Split,
    basenames,
    complement,
    find_rows,
    load,
    make,
    names_by_class,
)
from util.errors import UserError, printable

CLASSES = {f"n{c:02}": [f"n{c:02}_{i}.JPEG" for i in range(10 + c)] for c in range(5)}
FETCH = b"""#!/bin/bash
case $0 in *curl) to=-o;; *) to=-O;; esac
while [ $# -gt 1 ]; do [ "$1" != $to ] || out=$2; shift; done
echo half >"$out"
cat "$WEB/${1//\\//_}" >"$out" 2>/dev/null || { echo one line; echo no route >&2; exit 6; }
"""


def refused(words):
    return pytest.raises(UserError, match=rf"^[^\n]*{words}[^\n]*$")


def a_file(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


@pytest.fixture
def said(monkeypatch, capsys):
    """What `python -m dataset.splits` with these flags prints."""

    def call(*flags):
        monkeypatch.setattr(sys, "argv", ["splits", *map(str, flags)])
        split_command.main()
        return capsys.readouterr().out

    return call


class Script:
    """A copy of script/get_splits.sh below `home`, and for a network a curl or wget that reads the files of
    home/web.
    """

    def __init__(self, home, tools=("curl", "sha256sum")):
        self.home, self.lists, self.file = (
            home,
            home / "dataset" / "semi_files",
            home / "script" / "get_splits.sh",
        )
        shutil.copytree(ROOT / "script", home / "script")
        a_file(home / "fetch", FETCH).chmod(0o755)
        (home / "bin").mkdir()
        for tool in ["bash", "cat", "cut", "dirname", "mkdir", "mv", "rm", *tools]:
            (home / "bin" / tool).symlink_to(
                home / "fetch" if tool in ("curl", "wget") else shutil.which(tool)
            )

    def publish(self):
        """Four little lists in place of the published ones; returns id -> bytes."""
        lists = {name: f"n01_{i}.JPEG".encode() for i, name in enumerate(PUBLISHED)}
        for name, facts in PUBLISHED.items():
            self.file.write_text(self.file.read_text().replace(facts.sha256, sha256(lists[name]).hexdigest()))
            url = "https://raw.githubusercontent.com/" + facts.source.replace(
                "/semi_files", "/HEAD/semi_files"
            )
            a_file(self.home / "web" / url.replace("/", "_"), lists[name])
        return lists

    def run(self, *flags):
        return subprocess.run(
            ["bash", self.file, *flags],
            cwd="/",
            capture_output=True,
            text=True,
            env={"PATH": str(self.home / "bin"), "WEB": str(self.home / "web")},
        )

    def has(self):
        return {path.stem: path.read_bytes() for path in self.lists.iterdir()}  # hidden leftovers too


@pytest.mark.parametrize(
    "tools",
    [
        ("curl", "sha256sum"),
        ("wget", "sha256sum"),
        pytest.param(
            ("curl", "shasum", "perl"),
            marks=pytest.mark.skipif(not shutil.which("shasum"), reason="shasum is not installed here"),
        ),
    ],
)
def test_the_script_downloads_keeps_and_replaces_lists(tmp_path, tools):
    script = Script(tmp_path, tools)
    lists, (moved,) = script.publish(), (tmp_path / "web").glob("*V2*_1p_*")
    moved.rename(
        f"{tmp_path}/web/https:__raw.githubusercontent.com_google-research_simclr_HEAD_imagenet_subsets_1percent.txt"
    )
    for there in (0, 4, 3):
        done = script.run()
        assert done.returncode == 0 and script.has() == lists, done
        assert (done.stdout.count(" is there"), done.stdout.count(" from https:")) == (there, 4 - there)
        if there == 4:
            a_file(script.lists / "simclr-1p.txt", b"wrong")


def test_the_script_takes_lists_of_any_name_from_a_folder(tmp_path):
    script = Script(tmp_path, ["sha256sum"])
    (tmp_path / "my lists" / "0 a folder").mkdir(parents=True)
    for i, data in enumerate([b"something else", *script.publish().values()]):
        a_file(tmp_path / "my lists" / f"{i} {i}", data).chmod(0o400)
    done = script.run("--from", tmp_path / "my lists")
    assert (done.returncode, done.stderr, len(script.has())) == (0, "", 4)
    assert (script.lists / "simclr-1p.txt").stat().st_mode & 0o200  # not read-only as its source
    (script.lists / "simclr-1p.txt").unlink()
    (tmp_path / "my lists" / "3 3").unlink()
    done = script.run("--from", tmp_path / "my lists")
    one_line(done.returncode, done.stderr, "simclr-1p: ", "my lists has no file with SHA-256 ")


def test_the_script_leaves_no_wrong_file(tmp_path):
    script = Script(tmp_path)
    for flags, words in (
        ((), "(no route)"),
        (("--from", "/no such folder"), "no such folder"),
        (("--form", "/"), "usage"),
    ):
        done = script.run(*flags)
        one_line(done.returncode, done.stderr, words)
        assert not script.lists.exists() or not script.has()
    script.publish()
    for page in (tmp_path / "web").iterdir():
        page.write_bytes(b"<html>Please log in</html>")
    a_file(script.lists / "simmatch-1p.txt", b"wrong")
    done = script.run()
    one_line(
        done.returncode,
        done.stderr,
        "simmatch-1p: https://raw.githubusercontent.com/",
        "another SHA-256",
        "--from",
    )
    assert not script.has()
    (tmp_path / "bin" / "curl").unlink()
    done = script.run()
    one_line(done.returncode, done.stderr, "neither curl nor wget")


def test_the_script_and_PUBLISHED_agree():
    found = re.findall(
        r"^get (\S+) (\w{64}) \\\n  (\S+)", (ROOT / "script" / "get_splits.sh").read_text(), re.M
    )
    assert found == [
        (name, p.sha256, p.source.replace("/semi_files", "/HEAD/semi_files")) for name, p in PUBLISHED.items()
    ]


@pytest.mark.skipif(
    "SIMMATCH_SPLITS" not in os.environ, reason="SIMMATCH_SPLITS names no folder with the published lists"
)
def test_the_published_lists_have_their_contents(tmp_path, said):
    script, sets = Script(tmp_path), {}
    assert script.run("--from", os.path.abspath(os.environ["SIMMATCH_SPLITS"])).returncode == 0
    for (name, facts), per_class in zip(PUBLISHED.items(), ({13}, {128}, {12, 13}, {128, 129})):
        split = load(name, script.lists)
        sets[name], counts = set(split.names.tolist()), Counter(map(class_of, split.names.tolist()))
        assert (split.id, split.sha256, len(split.names)) == (name, facts.sha256, facts.images)
        assert len(counts) == 1000 and set(counts.values()) == per_class
    assert [len(sets["simmatch-1p"] & sets[name]) for name in PUBLISHED] == [13000, 1305, 124, 1285]
    text = said("describe", *PUBLISHED, "--folder", script.lists)
    assert "\n  189 classes with 12\n  811 classes with 13\n" in text
    assert re.findall(".*contained.*", text) == ["simclr-1p is contained in simclr-10p"]
    assert said("list", "--folder", script.lists).count("present, verified") == 4


def test_a_published_list_is_verified(tmp_path, monkeypatch, said):
    data = b"n01_1.JPEG\nn02_7.JPEG"
    monkeypatch.setitem(
        PUBLISHED, "simclr-1p", Published(sha256(data).hexdigest(), 2, "owner/repository/file")
    )
    file = a_file(tmp_path / "simclr-1p.txt", data)
    split = load("simclr-1p", tmp_path)
    assert (*split[:2], split.names.tolist()) == ("simclr-1p", sha256(data).hexdigest(), data.split())
    assert re.findall("verified|WRONG|missing", said("list", "--folder", tmp_path)) == 2 * ["missing"] + [
        "verified",
        "missing",
    ]
    file.write_bytes(data + b"\n")
    with refused("simclr-1p.txt is not the published list.*bash script/get_splits.sh"):
        load("simclr-1p", tmp_path)
    assert "WRONG" in said("list", "--folder", tmp_path)
    file.unlink()
    with refused("split simclr-1p: .*simclr-1p.txt is missing; run: bash script/get_splits.sh"):
        load("simclr-1p", tmp_path)


def test_list_files_are_loaded_or_refused(tmp_path):
    for data in (
        b"n01/my cat.png\nn02/1.png",
        b"\xef\xbb\xbf\n n01/my cat.png \r\n\n\nn02/1.png\r\n",
        b"n01/my cat.png 0\nn02/1.png 1\n",
        b"n01/my cat.png\t-1\nn02/1.png   12\n",
    ):
        split = load(a_file(tmp_path / "list.txt", data))
        assert (*split[:2], split.names.tolist()) == (
            "list",
            sha256(data).hexdigest(),
            [b"n01/my cat.png", b"n02/1.png"],
        )
    for data, words in (
        (b"a.png\nb.png\n\na.png\n", "list.txt, line 4: a.png is already on line 1"),
        (b"\n", "list.txt is empty"),
        (b"a.png\n\xff\xd8\n", "list.txt, line 2: this is not text"),
    ):
        with refused(words):
            load(a_file(tmp_path / "list.txt", data))
    with refused(
        "simmatch-2p is neither a list file nor a published split; the published splits are simmatch-1p, "
    ):
        load("simmatch-2p")


def test_a_draw_depends_on_names_and_seed_only():
    drawn = make(CLASSES, per_class=3, seed=7)
    assert (
        Counter(map(class_of, drawn.names.tolist())) == dict.fromkeys(CLASSES, 3)
        and drawn.id == "balanced-3-seed7"
    )
    other_order = {c: np.array(names[::-1], bytes) for c, names in reversed(CLASSES.items())}
    assert (
        make(other_order, per_class=3, seed=7).names.tolist()
        == drawn.names.tolist()
        == sorted(drawn.names.tolist())
    )
    more = make(
        {**CLASSES, "n02a": ["n02a_1.JPEG", "n02a_2.JPEG", "n02a_3.JPEG"]}, per_class=3, seed=7
    ).names.tolist()
    assert [name for name in more if class_of(name) != "n02a"] == drawn.names.tolist()
    assert set(make(CLASSES, 2, seed=7).names) < set(drawn.names) < set(make(CLASSES, 9, seed=7).names)
    assert make(CLASSES, per_class=3, seed=8).names.tolist() != drawn.names.tolist()
    assert drawn.sha256 == sha256(b"".join(name + b"\n" for name in drawn.names.tolist())).hexdigest()
    assert drawn.sha256[:16] == "a10a10a76fe6e318", "this would change the labeled subset of everybody's runs"


def test_a_share_of_each_class_is_drawn():
    for percent, expected in ((0.01, [1] * 5), (0.35, [4, 4, 4, 5, 5]), (1, [10, 11, 12, 13, 14])):
        split = make(CLASSES, percent=percent, seed=3)
        assert [
            *Counter(map(class_of, split.names.tolist())).values()
        ] == expected and split.id == f"percent-{percent}-seed3"
    gap = LabeledFiles("", Names(np.array([b"b/1.png"])), np.array([1]), ["none", "b"])
    assert make(names_by_class(gap), percent=1).names.tolist() == [b"b/1.png"]


@pytest.mark.parametrize(
    "how, words",
    [
        ({"per_class": 0}, "every class needs at least 1"),
        ({"per_class": 11}, "class n00 has only 10 images, 11 are to be drawn"),
        ({"percent": 0.0}, "a share, above 0"),
        ({"percent": 10}, "0.01 is 1 %"),
        ({}, "not both"),
        ({"per_class": 1, "percent": 1}, "not both"),
        *(
            ({"names_by_class": {"a": [odd]}, "per_class": 1}, "a list cannot hold the name")
            for odd in ("a\nb.png", " a.png", "a.png 3")
        ),
    ],
)
def test_impossible_draws_are_refused(how, words):
    with refused(words):
        make(**{"names_by_class": CLASSES, **how})


def test_the_command_line_makes_and_describes_splits(tmp_path, said, mistake, monkeypatch):
    monkeypatch.setenv("SIMMATCH_CACHE", str(tmp_path / "cache"))
    tree = {c: [f"{c}/x/{name}" for name in names] for c, names in CLASSES.items()}
    for name in sum(tree.values(), []):
        a_file(tmp_path / "train" / name, b"")
    text = said(
        "make",
        tmp_path / "train",
        "--recursive",
        "--per-class",
        "2",
        "--seed",
        "5",
        "--folder",
        tmp_path / "lists",
    )
    split, expected = load(tmp_path / "lists" / "balanced-2-seed5.txt"), make(tree, per_class=2, seed=5)
    assert split[:2] == expected[:2] and split.names.tolist() == expected.names.tolist()
    assert "balanced-2-seed5.txt: 10 images of 5 classes" in text and split.sha256 in text
    names = a_file(tmp_path / "names.txt", "\n".join(sum(CLASSES.values(), [])).encode())
    said("make", names, "--percent", "0.5", "--out", tmp_path / "half.txt")
    assert load(tmp_path / "half.txt").sha256 == make(CLASSES, percent=0.5).sha256
    text = said("describe", names, tmp_path / "half.txt", tmp_path / "lists" / "balanced-2-seed5.txt")
    assert (
        "names: 60 images of 5 classes, 10 to 14 per class" in text
        and "half is contained in names\nbalanced" in text
    )
    text = describe([make({f"{i}": [f"{i}/{j}" for j in range(i + 1)] for i in range(20)}, percent=1)])
    assert (
        "1 to 20 per class" in text
        and "\n  3 classes with 1 to 3\n" in text
        and text.endswith("\n  2 classes with 19 to 20")
    )
    odd = a_file(tmp_path / "odd.txt", b"1.png")
    for flags, words in (
        ("x --percent 1 --per-class 1", "not allowed"),
        ("x", "is required"),
        ("x --per 1", "--help lists"),
        (f"{names} --per-class 1 --out {odd}/x", "cannot write"),
        (f"{odd} --per-class 1", "has neither"),
    ):
        mistake(split_command.main, ["make", *flags.split()], words)
    call = [sys.executable, "-m", "dataset.splits", "describe", "none"]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True)
    one_line(done.returncode, done.stderr, "none is neither a list file nor a published split")


def test_make_replaces_only_lists_of_images(tmp_path, said, mistake):
    names = a_file(tmp_path / "names.txt", b"a/1.png\na/2.png\nb/1.png\n")
    flags, out = ["make", names, "--per-class", "1", "--out"], tmp_path / "new" / "half.txt"
    assert "replaces /" not in said(*flags, out)
    assert f"replaces {out}, a list of images" in said(*flags, out) and len(load(out).names) == 2
    for content in (b"my notes\n", b"\xff\0"):
        other = a_file(tmp_path / "other", content)
        mistake(
            split_command.main, [*flags, other], "is not a list of images, so it is not replaced", "--out"
        )
        assert other.read_bytes() == content
    mistake(split_command.main, [*flags, names], "it is the file that is read")
    mistake(split_command.main, [*flags, tmp_path], "it is a directory")
    mistake(split_command.main, [*flags, "x" * 300], "File name too long")
    mistake(split_command.main, ["describe", "~no-such-user"], "is not the home folder of a user")


@pytest.mark.parametrize(
    "name", [b"a/caf\xe9.png", b"a\nb/1.png", b" a/1.png", b"a/1.png ", "a/\ufffd.png".encode()]
)
def test_a_name_that_a_list_cannot_hold_is_named(name):
    shown = re.escape(printable(os.fsdecode(name)))
    with refused(f"a list cannot hold the name {shown}: it is not UTF-8, or would .*; rename the image"):
        make({"a": [b"a/0.png", name]}, per_class=2)


def test_rows_are_found_by_paths_and_by_names():
    rng = np.random.default_rng(0)
    paths = [f"n{c:0{2 + c % 3}}/deep/n{c:02}_{i}.JPEG".encode() for c in range(20) for i in range(c + 5)]
    names = rng.permutation(np.array(paths))
    last = [name.rsplit(b"/", 1)[1] for name in names.tolist()]
    assert basenames(names).tolist() == last and basenames(np.array(last)).tolist() == last
    for entries in (names.tolist(), last, [*last[:50], *names.tolist()[50:]]):
        order = rng.permutation(len(names))[:60]
        found = find_rows(Split("s", "", np.array(entries)[order]), names)
        assert found.tolist() == order.tolist() and found.dtype == np.int64
    rest = complement(found, len(names))
    assert rest.tolist() == sorted(set(range(len(names))) - set(order.tolist())) and rest.dtype == np.int64


@pytest.mark.parametrize(
    "entries, words",
    [
        (["2.png", "4.png", "5.png"], "split s: 2 of its 3 images are not in /data, the first is 4.png"),
        (["2.pn"], "is 2.pn;"),
        (["a/2.png"], "the first is a/2.png"),
        (["1.png"], "split s: 1.png is the name of 2 images in /data; write the list with"),
    ],
)
def test_entries_of_no_image_or_several_are_refused(entries, words):
    with refused(words):
        find_rows(
            Split("s", "", np.array(entries, bytes)),
            np.array([b"a/1.png", b"b/1.png", b"b/2.png"]),
            where="/data",
        )
