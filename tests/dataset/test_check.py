"""python -m dataset.check: one fault at a time in a small tree of real files, and its findings."""

import csv
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmark.kill_campaign import has_workers
from dataset import check, findings, inspection
from dataset.build import build_data
from util import errors

ROOT = Path(__file__).resolve().parents[2]
DIGITS = ROOT / "configs/digits.yaml"
NAMES = [f"{part}/{c}/{k}.jpg" for part, n in (("train", 5), ("val", 10)) for c in "ab" for k in range(n)]
SPLIT = "a/0.jpg\na/1.jpg\nb/0.jpg\nb/1.jpg\n"


def photo(seed, size=(48, 40)):
    rough = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(rough).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """train/ with 5 images a class, of which split.txt takes 2, and val/ with 10; all different and good."""
    monkeypatch.setenv("SIMMATCH_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "images"
    for seed, name in enumerate(NAMES):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        photo(seed).save(root / name)
    (tmp_path / "split.txt").write_text(SPLIT)
    (tmp_path / "own.yaml").write_text(
        f"dataset: folder\ncls: 2\nimage_size: 32\nworkers: 0\ndata: {root}\n"
        f"split: {tmp_path / 'split.txt'}\n"
    )
    return root


@pytest.fixture
def doctor(tree, monkeypatch, capsys):
    """Check the tree, or another config, in this process: (lines of ok, note and BAD,
    lines of CSV).
    """

    def call(*flags, file=tree.parent / "own.yaml"):
        report = tree.parent / "report.csv"
        monkeypatch.setattr(sys, "argv", ["check", str(file), "--report", str(report), *map(str, flags)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            errors.cli_main(check.main)
        *lines, last = capsys.readouterr().out.splitlines()
        said, words = {"ok": [], "note": [], "BAD": []}, []
        for line in lines:
            if line[0] == " ":
                said[words[-1]][-1] += "\n" + line.strip()
            else:
                words.append(line.split()[0])
                said[words[-1]].append(line[6:])
        assert words == sorted(words, key=list(said).index)
        bad = len(said["BAD"])
        assert (stop.value.code, last) == (
            (1, f"bad: {bad} problem{'s' * (bad > 1)}") if bad else (0, "good")
        )
        with open(report, newline="", encoding="utf-8", errors="surrogateescape") as table:
            rows = [(path.removeprefix(f"{tree}/"), *rest) for path, *rest in csv.reader(table)]
        assert rows.pop(0) == ("path", "problem", "detail")
        return said, rows

    return call


def one(lines, words):
    """The line with these words."""
    hits = [line for line in lines if words in line]
    assert len(hits) == 1, (words, lines)
    return hits[0]


def test_a_correct_tree_has_no_findings(doctor, tree):
    said, rows = doctor()
    assert not said["BAD"] and not said["note"] and not rows
    sha256, size = (
        hashlib.sha256(SPLIT.encode()).hexdigest(),
        sum((tree / name).stat().st_size for name in NAMES),
    )
    assert said["ok"][:6] == [
        f"split split, sha256 {sha256}",
        "4 labeled, 6 unlabeled, 20 test images; 2 classes",
        "each class has 2 to 2 labeled images",
        "each class has 10 to 10 test images",
        "the standard error of an accuracy over all test images is up to 11 points",
        "formats: JPEG RGB 30",
    ]
    assert said["ok"][6].startswith(f"{size / 1e9:,.3f} GB in 4 folders, {size / 30e3:,.1f} kB per image")
    assert "(processes: 1, CPUs: " in said["ok"][7] and "estimate for 1,000 per second: " in said["ok"][7]
    assert [problem[2] for problem in findings.PROBLEMS.values() if problem[2]] == said["ok"][8:]


# Each of these functions makes a fault in the tree.


def cut(name):
    return lambda tree: (tree / name).write_bytes((tree / name).read_bytes()[:300])


def write(data, *names):
    return lambda tree: [(tree / name).write_bytes(data) for name in names]


def save(image, name, **how):
    return lambda tree: image.save(tree / name, **how)


def same(a, *others):
    return lambda tree: [shutil.copyfile(tree / a, tree / b) for b in others]


def all_of(*faults):
    return lambda tree: [fault(tree) for fault in faults]


def ramp(*shape):
    return Image.fromarray(np.broadcast_to(np.arange(40, dtype=np.uint8).reshape(shape), (40, 40, 3)).copy())


FAULTS = {  # name: (the fault, [(severity, problem, image, words of the detail)])
    "cut short": (cut("train/a/2.jpg"), [("BAD", "unreadable", "train/a/2.jpg", "cut short")]),
    "empty": (write(b"", "val/a/0.jpg"), [("BAD", "unreadable", "val/a/0.jpg", "empty")]),
    "text": (write(b"<html>", "train/a/0.jpg"), [("BAD", "unreadable", "train/a/0.jpg", "not an image")]),
    "any bytes": (
        write(b"", "train/a/\udcff,\udce9.jpg"),
        [("BAD", "unreadable", "train/a/\udcff,\udce9.jpg", "empty")],
    ),
    "no label left": (
        write(b"", "train/b/0.jpg", "train/b/1.jpg"),
        [
            ("BAD", "unreadable", "train/b/0.jpg", "empty"),
            ("BAD", "unreadable", "train/b/1.jpg", "empty"),
            ("BAD", "class without labeled", "b", "label 1"),
        ],
    ),
    "labeled in test": (
        same("train/a/1.jpg", "val/a/1.jpg"),
        [("BAD", "labeled in test", "train/a/1.jpg", "/val/a/1.jpg")],
    ),
    "unlabeled in test": (
        same("train/a/4.jpg", "val/a/1.jpg"),
        [("BAD", "unlabeled in test", "train/a/4.jpg", "/val/a/1.jpg")],
    ),
    "labels differ": (
        same("train/a/0.jpg", "train/b/1.jpg"),
        [
            ("note", "copy", "train/b/1.jpg", "/train/a/0.jpg"),
            ("BAD", "labels differ", "train/b/1.jpg", "b, but a as /"),
        ],
    ),
    "labels differ in test": (
        same("train/a/0.jpg", "val/b/1.jpg"),
        [
            ("BAD", "labeled in test", "train/a/0.jpg", "/val/b/1.jpg"),
            ("BAD", "labels differ", "val/b/1.jpg", "b, but a as /"),
        ],
    ),
    "hidden labels differ": (
        same("train/a/3.jpg", "train/b/4.jpg"),
        [
            ("note", "copy", "train/b/4.jpg", "/train/a/3.jpg"),
            ("note", "hidden labels differ", "train/b/4.jpg", "b, but a as /"),
        ],
    ),
    "one label hidden": (
        same("train/a/0.jpg", "train/b/4.jpg"),
        [
            ("note", "labeled in unlabeled", "train/a/0.jpg", "/train/b/4.jpg"),
            ("note", "hidden labels differ", "train/b/4.jpg", "b, but a as /"),
        ],
    ),
    "groups of copies": (
        all_of(
            same("train/b/2.jpg", "train/b/4.jpg"),
            same("val/a/0.jpg", "val/a/1.jpg"),
            same("train/a/2.jpg", "train/a/3.jpg", "train/a/4.jpg"),
        ),
        [
            ("note", "copy", "train/a/3.jpg", "/train/a/2.jpg"),
            ("note", "copy", "train/a/4.jpg", "/train/a/2.jpg"),
            ("note", "copy", "train/b/4.jpg", "/train/b/2.jpg"),
            ("note", "copy", "val/a/1.jpg", "/val/a/0.jpg"),
        ],
    ),
    "one color": (
        all_of(
            save(Image.new("RGB", (48, 40), "teal"), "train/a/2.png"),
            save(ramp(40, 1, 1), "train/a/3.png"),
            save(ramp(1, 40, 1), "train/a/4.png"),
        ),
        [("note", "one color", "train/a/2.png", "PNG RGB 48 x 40 pixels")],
    ),
    "tiny": (
        all_of(save(photo(50, (200, 7)), "train/a/2.jpg"), save(photo(51, (8, 8)), "train/a/3.jpg")),
        [("note", "tiny", "train/a/2.jpg", "JPEG RGB 200 x 7 pixels")],
    ),
    "huge": (
        save(Image.linear_gradient("L").resize((5001, 5000)), "train/a/2.jpg"),
        [("note", "huge", "train/a/2.jpg", "JPEG L 5001 x 5000 pixels")],
    ),
    "misnamed": (
        save(photo(50).quantize(16), "train/a/5.JPEG", format="PNG"),
        [("note", "misnamed", "train/a/5.JPEG", "PNG P 48 x 40 pixels")],
    ),
    "no test image": (
        lambda tree: shutil.rmtree(tree / "val/a"),
        [("note", "class without test", "a", "label 0")],
    ),
}


@pytest.mark.parametrize("fault, expected", FAULTS.values(), ids=FAULTS)
def test_each_fault_is_printed_and_reported_alone(doctor, tree, fault, expected):
    """The fault is printed and in the report, and nothing else is."""
    fault(tree)
    said, rows = doctor()
    assert sorted(row[:2] for row in rows) == sorted((image, problem) for _, problem, image, _ in expected)
    for word, problem, image, words in expected:
        detail = next(row[2] for row in rows if row[:2] == (image, problem))
        assert words.replace("as /", f"as {tree}/") in detail
        line = one(said[word], findings.PROBLEMS[problem][1])
        assert line.split("\n")[0].endswith(f": {sum(other == problem for _, other, _, _ in expected)}")
        assert f"{image}: {detail}".encode(errors="surrogateescape").decode(errors="backslashreplace") in line
    assert len(said["BAD"] + said["note"]) == len({problem for _, problem, _, _ in expected})


def test_twenty_cases_are_printed_and_all_are_reported(doctor, tree):
    write(b"", *[f"train/a/more{k}.jpg" for k in range(25)])(tree)
    said, rows = doctor()
    lines = one(said["BAD"], "cannot be used").split("\n")
    assert (
        len(lines) == 22
        and lines[0].endswith(": 25")
        and lines[-1].startswith("and 5 more")
        and len(rows) == 25
    )


def test_all_images_may_be_unreadable(doctor, tree):
    write(b"", *NAMES)(tree)
    _, rows = doctor()
    assert len(rows) == 32 and rows[30:] == [
        (c, "class without labeled", f"label {k}") for k, c in enumerate("ab")
    ]


def test_balance_is_given_by_the_smallest_and_the_largest_class(doctor, tree):
    (tree.parent / "split.txt").write_text(SPLIT + "b/2.jpg\n")
    (tree / "val/a/1.jpg").unlink()
    said, _ = doctor()
    assert said["ok"][2:4] == ["each class has 2 to 3 labeled images", "each class has 9 to 10 test images"]


def test_few_test_images_are_noted_with_their_standard_error(doctor, tree):
    for name in ["val/a/9.jpg", *(f"val/b/{k}.jpg" for k in range(2, 10))]:
        (tree / name).unlink()
    said, rows = doctor()
    assert said["note"] == [
        "2 of 2 classes have fewer than 10 test images (b 2, a 9): the standard error of the accuracy is up "
        "to 35 points for a class of 2, and up to 15 points for all 11 test images; a smaller difference "
        "between runs says little"
    ]
    assert not rows and not said["BAD"]
    shutil.rmtree(tree / "val/b")
    said, rows = doctor()
    assert one(said["note"], "1 of 2 classes have fewer than 10 test images (a 9)")
    assert one(said["note"], findings.PROBLEMS["class without test"].found).endswith(": 1\nb: label 1")
    assert rows == [("b", "class without test", "label 1")]


@pytest.mark.parametrize("flags, noted", [([], False), (["--virtual-ranks", 2], True), (["--mu", 2], True)])
def test_settings_with_few_steps_are_noted(doctor, flags, noted):
    """6 unlabeled images: 6, 3 or 3 steps an epoch."""
    said, _ = doctor("--batch-size", 1, "--mu", 1, "--print-freq", 4, "--eval-freq", 1, *flags)
    lines = [line for line in said["note"] if "--print-freq" in line]
    assert lines == noted * [
        "evaluations are 3 steps apart (3 steps an epoch), fewer than --print-freq 4: the log has hardly any "
        "train event but those of evaluations; set --print-freq 1"
    ]
    said, _ = doctor("--batch-size", 1, "--mu", 1, "--epochs", 5, "--ema-m", 0.999)
    assert one(said["note"], "--ema-m 0.999 the teacher still holds 97 % of the network it started from")


def test_a_labeled_file_among_the_test_images_is_found_outside_of_a_sample_too(doctor, tree):
    (tree / "val/a/1.jpg").unlink()
    os.link(tree / "train/a/1.jpg", tree / "val/a/1.jpg")
    for n in (0, 1, 29):
        _, rows = doctor("--sample", n)
        assert rows == [("train/a/1.jpg", "labeled in test", f"the same as {tree}/val/a/1.jpg")], n


def test_formats_and_modes_are_counted(doctor, tree):
    photo(50).convert("CMYK").save(tree / "train/a/2.jpg")
    photo(51).convert("L").save(tree / "train/a/3.jpg")
    photo(53).save(tree / "train/b/5.WEBP")
    photo(54).save(
        tree / "train/b/6.jpg", "MPO", save_all=True, append_images=[photo(55)]
    )  # a JPEG file all the same
    Image.effect_noise((2000, 1000), 100).save(tree / "train/b/7.BMP")
    said, rows = doctor()
    assert (
        one(said["ok"], "formats:") == "formats: JPEG RGB 29, JPEG CMYK 1, JPEG L 1, WEBP RGB 1, BMP L 1"
        and not rows
    )
    assert one(said["ok"], " GB in ").startswith("0.002 GB in 4 folders, ")


def test_labels_out_of_range_are_reported(doctor, monkeypatch):
    def broken(*args, **how):
        data = build_data(*args, **how)
        data.labels[:] = [
            0,
            7,
            0,
            0,
            -1,
            1,
            1,
            -2,
            1,
            1,
        ]  # rows 0, 1, 5 and 6 are labeled; −1 is right for the others
        data.test_labels[0] = -1
        return data

    monkeypatch.setattr("dataset.build.build_data", broken)
    said, rows = doctor()
    assert said["ok"][2:4] == ["each class has 1 to 2 labeled images", "each class has 9 to 10 test images"]
    wrong = {"train/a/1.jpg": 7, "train/b/2.jpg": -2, "val/a/0.jpg": -1}
    assert one(said["BAD"], "of a class: 3")
    assert rows == [(name, "label", f"label {label}, of 2 classes from 0") for name, label in wrong.items()]


def test_the_number_of_workers_changes_only_the_speed(doctor, tree):
    write(b"", "train/a/3.jpg")(tree)
    same("train/b/0.jpg", "val/b/0.jpg")(tree)
    (alone, rows), (together, same_rows) = (doctor("--workers", n) for n in (0, 2))
    assert "processes: 2" in one(together["ok"], "images per second")
    for said in (alone, together):
        said["ok"].remove(one(said["ok"], "images per second"))
    assert alone == together and rows == same_rows and len(rows) == 2


def test_images_of_the_unlabeled_folder_are_checked(doctor, tree):
    unlabeled = tree.parent / "unlabeled"
    (unlabeled / "deep").mkdir(parents=True)
    photo(99).save(unlabeled / "deep/x.jpg")
    shutil.copyfile(tree / "val/a/0.jpg", unlabeled / "leak.jpg")
    said, rows = doctor("--unlabelled", unlabeled)
    assert said["ok"][1].startswith("4 labeled, 8 unlabeled, 20 test images")
    assert rows == [(str(unlabeled / "leak.jpg"), "unlabeled in test", f"the same as {tree}/val/a/0.jpg")]


def test_missing_files_of_a_list_are_reported(doctor, tree):
    for part in ("train", "val"):
        names = [name.partition("/")[2] for name in NAMES if name.startswith(part)]
        (tree / f"{part}.txt").write_text("".join(f"{name} {'ab'.index(name[0])}\n" for name in names))
    (tree / "train/a/3.jpg").unlink()
    assert doctor("--dataset", "imagenet")[1] == [("train/a/3.jpg", "unreadable", "the file does not exist")]


@pytest.mark.parametrize(
    "kind, network", [("nfs4", True), ("fuse.sshfs", True), ("ext4", False), ("ntfs", False), ("", False)]
)
def test_network_file_systems_are_named(doctor, tree, tmp_path, monkeypatch, kind, network):
    """kind "": a system without a list of mounts."""
    device = os.stat(tree).st_dev
    if kind:
        (tmp_path / "mounts").write_text(
            f"20 1 99:999 / /elsewhere rw shared:1 - beegfs other rw\n"
            f"36 35 {os.major(device)}:{os.minor(device)} / {tree} rw - {kind} server:/x rw\n"
        )
    monkeypatch.setattr(inspection, "MOUNTS", tmp_path / "mounts")
    said, _ = doctor()
    assert one(said["ok"], " GB in ").endswith(f"kB per image, on {kind}" if kind else "kB per image")
    assert [line.partition(";")[0] for line in said["note"]] == [f"{kind} is a network file system"] * network


def test_a_sample_is_announced_and_drawn_by_the_seed(doctor, tree):
    write(b"", *NAMES)(tree)
    seen = []
    for seed in (0, 0, 1):
        said, rows = doctor("--sample", 5, "--seed", seed)
        assert one(said["note"], f"only 5 of 30 images were read, drawn by seed {seed}")
        seen.append([row for row in rows if row[1] == "unreadable"])
    assert len(seen[0]) == 5 and seen[0] == seen[1] != seen[2]
    assert not doctor("--sample", 30)[0]["note"]


def test_labeled_images_outside_of_a_sample_count_as_usable(doctor):
    assert not doctor("--sample", 1)[1]


def test_images_in_memory_are_checked(doctor, monkeypatch):
    said, rows = doctor(file=DIGITS)
    assert (
        not rows
        and not said["note"]
        and not any(word in " ".join(said["ok"]) for word in ("GB", "formats", "per second"))
    )
    assert (
        said["ok"][1]
        == "10 labeled, 1,437 unlabeled (the labeled images among them), 360 test images; 10 classes"
    )

    def broken(*args, **how):
        data = build_data(*args, **how)
        data.images.images[data.labeled[0]] = data.test_images.images[3]
        data.images.images[data.labeled[1]] = 5
        return data

    monkeypatch.setattr("dataset.build.build_data", broken)
    rows = doctor(file=DIGITS)[1]
    assert [row[1:] for row in rows] == [
        ("labeled in test", "the same as test image 3"),
        ("labels differ", rows[1][2]),
        ("one color", "8 x 8 pixels"),
    ]


def test_mistakes_of_the_command_line_are_named(mistake, tree, tmp_path):
    own = tree.parent / "own.yaml"
    mistake(check.main, [], "--config")
    mistake(check.main, ["nothing.yaml"], "nothing.yaml", "configs/")
    mistake(check.main, [own, "--dataa", "x"], "'--dataa'", "'--data'")
    mistake(check.main, [own, "--sample", "-1"], "--sample", "-1")
    mistake(check.main, [own, "--sample", "few"], "--sample", "few")
    mistake(check.main, [own, "--report", tmp_path / "no/such/file.csv"], "no/such/file.csv", "--report")
    before = own.read_bytes()
    mistake(check.main, [own, "--report", own], "own.yaml exists and is not a report", "--report")
    assert own.read_bytes() == before
    mistake(check.main, [own, "--split", "none"], "none", "published")
    mistake(check.main, [own, "--data", tmp_path / "nowhere"], "nowhere", "does not exist")
    (tree.parent / "split.txt").write_text("a/0.jpg\n")
    mistake(check.main, [own], "class b has no labeled image")


def start(*flags, **how):
    return subprocess.Popen(
        [sys.executable, "-m", "dataset.check", *map(str, flags)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        **how,
    )


def test_the_command_prints_findings_and_progress(tree):
    write(b"", "train/a/2.jpg")(tree)
    process = start(tree.parent / "own.yaml", "--workers", 1)
    out, err = process.communicate(timeout=300)
    assert (
        process.returncode == 1
        and out.splitlines()[-1] == "bad: 1 problem"
        and "a/2.jpg: the file is empty" in out
    ), err
    assert err.splitlines()[-1] == "30 of 30 images, 0 s to go" and "Traceback" not in err


@pytest.mark.slow(10)
def test_ctrl_c_at_a_terminal_prints_one_line(tree):
    """The terminal sends the signal to the workers, too."""
    for k in range(20_000):
        os.link(tree / "train/a/0.jpg", tree / f"train/a/copy{k}.jpg")
    process = start(tree.parent / "own.yaml", "--workers", 2, start_new_session=True)
    until = time.monotonic() + 120
    while process.poll() is None and not has_workers(process.pid) and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (
        process.returncode == 130
        and out == ""
        and err.splitlines()[-1] == "interrupted: some images were not read"
    ), err
    assert "Traceback" not in err
