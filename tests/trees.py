"""Small real data sets on disk, for tests."""

import pickle
from pathlib import Path

import numpy as np
from PIL import Image


def picture(seed: int, size=(80, 60)) -> Image.Image:
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def imagenet(root: Path, classes=3, train=8, val=2, flat_val=False) -> Path:
    """train/<wnid>/<wnid>_<k>.JPEG, and val/<wnid>/… or, flat, val/ILSVRC_….JPEG with val.txt."""
    lines = []
    for c in range(classes):
        wnid = f"n{c:08d}"
        for part, count in (("train", train), ("val", val)):
            flat = part == "val" and flat_val
            folder = root / part / ("" if flat else wnid)
            folder.mkdir(parents=True, exist_ok=True)
            for k in range(count):
                name = f"ILSVRC2012_val_{c}{k}.JPEG" if flat else f"{wnid}_{k}.JPEG"
                picture(1000 * c + 10 * k + (part == "val")).save(folder / name)
                if flat:
                    lines.append(f"{name} {c}\n")
    if flat_val:
        (root / "val.txt").write_text("".join(lines))
    return root


def cifar10(root: Path, train=200, test=20) -> Path:
    """Files in CIFAR-10's format with made-up images. Tests must replace torchvision's checksums."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)

    def write(name, count):
        labels = [k % 10 for k in range(count)]
        data = rng.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)
        data[:, 0] = (data[:, 0] // 4 + np.array(labels)[:, None, None] * 19).astype(
            np.uint8
        )  # the classes differ in red
        (folder / name).write_bytes(pickle.dumps({"data": data.reshape(count, -1), "labels": labels}))

    for k in range(1, 6):
        write(f"data_batch_{k}", train // 5)
    write("test_batch", test)
    names = "airplane automobile bird cat deer dog frog horse ship truck".split()
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    return root
