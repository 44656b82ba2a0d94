"""The checks of `python -m dataset.check`. Images have numbers: the training images, then the test images."""

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

from dataset.findings import Findings, same_files, settings_notes, standard_error
from dataset.loader import Data, Stream
from dataset.source import BadImage, Files, Source
from dataset.workers import PrefetchLoader
from util.config import Config

# The set of an image. For CIFAR, labeled images are also unlabeled images; here, they are LABELED only.
UNUSED, LABELED, UNLABELED, TEST = range(4)
MOUNTS = Path("/proc/self/mountinfo")
NETWORK_FILE_SYSTEMS = tuple(
    "nfs cifs smb lustre gpfs beegfs ceph gluster afs 9p sshfs s3 gcs weka panfs pvfs orangefs".split()
)
RECORD = np.dtype(  # what is stored for each image
    [
        ("digest", "u8", 2),  # of the file's bytes, or the pixels of an image in memory
        ("bytes", "i8"),
        ("size", "i8", 2),  # width and height
        ("format", "S16"),  # format and mode of the file, such as "JPEG RGB"
        ("readable", "?"),
        ("one_color", "?"),
        ("misnamed", "?"),
    ]
)


class NumberedImages(Dataset):
    """The training images, then the test images. [numbers] reads several images, in a worker."""

    def __init__(self, train: Source, test: Source):
        self.train, self.test = train, test

    def find(self, number: int) -> tuple[Source, int]:
        """Return the source of an image and its row there."""
        n_train = len(self.train)
        return (self.train, number) if number < n_train else (self.test, number - n_train)

    def name(self, number: int) -> str:
        source, row = self.find(number)
        in_memory_test = number >= len(self.train) and not isinstance(source, Files)
        return f"test {source.name(row)}" if in_memory_test else source.name(row)

    def __getitem__(self, numbers: np.ndarray) -> tuple[bytes, list[tuple[str, str]], float]:
        """Return a RECORD of each image, as bytes; (name, cause) of each unreadable image; and the seconds of
        reading and decoding.
        """
        records, unreadable, seconds = np.zeros(len(numbers), RECORD), [], 0.0
        for record, number in zip(records, numbers.tolist()):
            source, row = self.find(number)
            start = time.perf_counter()
            try:
                image = source[row]
                seconds += time.perf_counter() - start
                pixels = np.asarray(image)  # [h, w] or [h, w, 3]
                content = _read_file(source, row, record) if isinstance(source, Files) else pixels.tobytes()
            except (BadImage, OSError) as error:  # OSError: it was decoded, but cannot be read a second time
                unreadable.append((self.name(number), str(error)))
            else:
                digest = hashlib.blake2b(content, digest_size=16).digest()
                record["digest"] = np.frombuffer(digest, np.uint64)
                record["bytes"], record["size"] = len(content), pixels.shape[1::-1]
                record["one_color"] = (pixels == pixels[:1, :1]).all()
                record["readable"] = True
        return records.tobytes(), unreadable, seconds


def _read_file(source: Files, row: int, record: np.void) -> bytes:
    """Return the content of an image file, and fill in the fields `format` and `misnamed`."""
    encoded, suffix = source.encoded(row), Path(source.names[row]).suffix.lower()
    content = encoded if isinstance(encoded, bytes) else encoded.read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(content)) as header:
            # MPO is JPEG with more images behind the first.
            file_format = "JPEG" if header.format == "MPO" else header.format
            record["format"] = f"{file_format} {header.mode}".encode()
    record["misnamed"] = Image.registered_extensions().get(suffix, file_format) != file_format
    return content


def check_data(data: Data, config: Config, sample: int, findings: Findings) -> None:
    """Run all checks. sample: the number of images to read, or 0 for all images."""
    images = NumberedImages(data.images, data.test_images)
    sets, labels = check_sets(data, images, findings)  # [T], [T]
    check_settings(data, config, labels[sets == TEST], findings)
    numbers = np.flatnonzero(sets)  # [n]
    total = len(numbers)
    if 0 < sample < total:
        findings.lines["note"].append(
            f"only {sample:,} of {total:,} images were read, drawn by seed {config.seed}"
        )
        numbers = np.sort(np.random.default_rng(config.seed).choice(numbers, sample, replace=False))
        for labeled, test in same_files(data):
            if not np.isin([labeled, len(data.images) + test], numbers).all():  # else it is found below
                name = data.test_images.name(test)
                findings.add_case(images.name(labeled), "labeled in test", f"the same as {name}")
    records, seconds = read_images(images, numbers, config.workers, findings)  # [n]
    usable = np.setdiff1d(np.flatnonzero(sets == LABELED), numbers[~records["readable"]])
    for c in np.setdiff1d(np.arange(len(data.classes)), labels[usable]).tolist():
        findings.add_case(data.classes[c], "class without labeled", f"label {c}")

    numbers, records = numbers[records["readable"]], records[records["readable"]]  # [m], [m]
    check_duplicates(images, numbers, records["digest"], sets, labels, data.classes, findings)
    sides, is_file = records["size"], isinstance(data.images, Files)  # [m, 2]
    for problem, has_problem in (
        ("one color", records["one_color"]),
        ("misnamed", records["misnamed"]),
        ("huge", sides.prod(1) > 25_000_000),
        ("tiny", is_file & (sides.min(1) * 4 < config.image_size)),
    ):
        for i in np.flatnonzero(has_problem).tolist():
            detail = "{} {} x {} pixels".format(records["format"][i].decode(), *sides[i])
            findings.add_case(images.name(int(numbers[i])), problem, detail.strip())
    if is_file and len(records):
        folders = {os.path.dirname(images.name(number)) for number in numbers.tolist()}
        describe_files(records, total, folders, seconds, config.workers, findings)


def check_sets(data: Data, images: NumberedImages, findings: Findings) -> tuple[np.ndarray, np.ndarray]:
    """Check sizes, labels and balance. Return the set of each image [T] and its label [T], −1 if unknown; the
    labels of unlabeled images are included.
    """
    ok, n_classes, n_train = findings.lines["ok"], len(data.classes), len(data.images)
    sets = np.full(n_train + len(data.test_images), UNUSED, np.int8)  # [T]
    labels = np.concatenate([data.labels, data.test_labels])  # [T]
    sets[data.unlabeled], sets[n_train:] = UNLABELED, TEST
    both = " (the labeled images among them)" if (sets[data.labeled] == UNLABELED).any() else ""
    sets[data.labeled] = LABELED
    ok += [
        f"split {data.split.id}, sha256 {data.split.sha256}",
        f"{len(data.labeled):,} labeled, {len(data.unlabeled):,} unlabeled{both}, "
        f"{len(data.test_labels):,} test images; {n_classes:,} classes",
    ]
    lowest = np.where(sets == UNLABELED, -1, 0)  # [T]
    wrong = (labels >= n_classes) | (labels < lowest) & (sets != UNUSED)  # [T]
    for number in np.flatnonzero(wrong).tolist():
        detail = f"label {labels[number]}, of {n_classes} classes from 0"
        findings.add_case(images.name(number), "label", detail)
    labels[wrong] = -1
    for name, which in (("labeled", LABELED), ("test", TEST)):
        per_class = np.bincount(labels[(sets == which) & (labels >= 0)], minlength=n_classes)  # [C]
        ok.append(f"each class has {per_class.min():,} to {per_class.max():,} {name} images")
    for c in np.flatnonzero(per_class == 0).tolist():
        findings.add_case(data.classes[c], "class without test", f"label {c}")
    return sets, labels


def check_settings(data: Data, config: Config, test_labels: np.ndarray, findings: Findings) -> None:
    """Report how exact the accuracy can be, and settings with which results mean little. test_labels [M]: −1
    if they are wrong.
    """
    per_class = np.bincount(test_labels[test_labels >= 0], minlength=len(data.classes))  # [C]
    error = standard_error(len(test_labels))
    findings.lines["ok"].append(
        f"the standard error of an accuracy over all test images is up to {error} points"
    )
    # The number of processes is not known: this is one. With more of them an epoch has fewer steps.
    batch_size = config.batch_size * max(1, config.virtual_ranks)
    stream = Stream(data, batch_size, config.mu, config.seed, steps_per_epoch=config.steps_per_epoch)
    findings.lines["note"] += settings_notes(config, per_class, data.classes, stream.steps_per_epoch)


def read_images(
    images: NumberedImages, numbers: np.ndarray, workers: int, findings: Findings
) -> tuple[np.ndarray, float]:
    """Read the images in workers -> RECORDs [n], and the seconds that workers spent."""
    records, seconds, done = np.zeros(len(numbers), RECORD), 0.0, 0
    size = max(1, min(64, len(numbers) // (4 * max(1, workers))))  # at least a few chunks for each worker
    chunks = np.split(numbers, range(size, len(numbers), size))
    start = last_print = time.monotonic()
    for raw, unreadable, chunk_seconds in PrefetchLoader(images, chunks, workers, False):
        chunk = np.frombuffer(raw, RECORD)
        records[done : done + len(chunk)] = chunk
        done, seconds, now = done + len(chunk), seconds + chunk_seconds, time.monotonic()
        for name, cause in unreadable:
            findings.add_case(name, "unreadable", cause)
        if now - last_print > 5 or done == len(numbers):
            last_print, left = now, (now - start) / done * (len(numbers) - done)
            print(f"{done:,} of {len(numbers):,} images, {left:,.0f} s to go", file=sys.stderr, flush=True)
    return records, seconds


def check_duplicates(
    images: NumberedImages,
    numbers: np.ndarray,
    digests: np.ndarray,
    sets: np.ndarray,
    labels: np.ndarray,
    classes: list[str],
    findings: Findings,
) -> None:
    """Find images of the same content. numbers [m], digests [m, 2], sets [T], labels [T]."""
    order = np.lexsort(digests.T)  # [m]; stable, so that copies stay in the order of their numbers
    differs = np.ones(len(order) + 1, bool)  # [m + 1]: whether an image differs from the one before it
    differs[1:-1] = (digests[order[1:]] != digests[order[:-1]]).any(1)
    has_copy = ~(differs[1:] & differs[:-1])  # [m]
    for copies in np.split(numbers[order[has_copy]], np.flatnonzero(differs[:-1][has_copy])[1:]):
        labeled, unlabeled, test = (copies[sets[copies] == which] for which in (LABELED, UNLABELED, TEST))
        for problem, cases, others in (
            ("labeled in test", labeled, test),
            ("unlabeled in test", unlabeled, test),
            ("labeled in unlabeled", labeled, unlabeled),
            ("copy", labeled[1:], labeled),
            ("copy", unlabeled[1:], unlabeled),
            ("copy", test[1:], test),
        ):
            for number in cases if len(others) else ():
                findings.add_case(images.name(number), problem, f"the same as {images.name(others[0])}")
        problem = "hidden labels differ"
        cases = copies[labels[copies] >= 0]
        used = cases[sets[cases] != UNLABELED]
        if len(np.unique(labels[used])) > 1:
            problem, cases = "labels differ", used
        for number in cases[labels[cases] != labels[cases[:1]]]:
            first = f"{classes[labels[cases[0]]]} as {images.name(cases[0])}"
            findings.add_case(images.name(number), problem, f"{classes[labels[number]]}, but {first}")


def describe_files(
    records: np.ndarray, total: int, folders: set[str], seconds: float, workers: int, findings: Findings
) -> None:
    """Report formats, sizes and file systems of the `total` files, and the speed of reading, from the records
    [m] of those that were read.
    """
    size, rate = records["bytes"].mean(), len(records) / seconds
    device_ids = {os.stat(folder).st_dev for folder in folders if os.path.isdir(folder)}
    devices = {f"{os.major(device)}:{os.minor(device)}" for device in device_ids}
    # Only Linux has this file.
    mounts = MOUNTS.read_text(errors="surrogateescape").splitlines() if MOUNTS.exists() else []
    file_systems = sorted(
        {line.partition(" - ")[2].split()[0] for line in mounts if line.split()[2] in devices}
    )
    formats = Counter(records["format"].tolist()).most_common()
    findings.lines["ok"] += [
        "formats: " + ", ".join(f"{name.decode()} {n:,}" for name, n in formats),
        f"{size * total / 1e9:,.3f} GB in {len(folders):,} folders, {size / 1e3:,.1f} kB per image"
        + ", on ".join(["", *file_systems]),
        f"{rate:,.0f} images per second and process were read and decoded (processes: {max(1, workers)}, "
        f"CPUs: {os.cpu_count()}); estimate for 1,000 per second: {1000 / rate:,.1f} processes, and more for "
        "views and for files that are read for the first time",
    ]
    findings.lines["note"] += [
        f"{name} is a network file system; copy the images to a local disk if workers wait for it"
        for name in file_systems
        if name.removeprefix("fuse.").startswith(NETWORK_FILE_SYSTEMS)
    ]
