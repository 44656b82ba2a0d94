"""Images per second and core with two or six views each: python benchmark/loader.py [--photos A.jpg B.jpg]

These pipelines read the same JPEG files in turn, in one process with one thread: torchvision's transforms on
PIL images, written as usual; this project's views without device views; and the CPU part of its views with
device views. Two views are weak and moco, six are weak and the five of --multicrop. The files are made from
the given photographs, resized to 500×375 and encoded again. Without --photos, scikit-learn's two sample
photographs are used if it is installed.
"""

import itertools
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import PIL  # noqa: E402
import torch  # noqa: E402
import torchvision.transforms as T  # noqa: E402
from PIL import Image, ImageFilter  # noqa: E402

from benchmark.digits import machine  # noqa: E402
from dataset import device_views  # noqa: E402
from dataset.listing import list_images  # noqa: E402
from dataset.loader import Data, HostTensors, SplitId, Stream, View  # noqa: E402
from dataset.rng import uniforms  # noqa: E402
from dataset.source import Files, decode  # noqa: E402
from dataset.stages import Stage  # noqa: E402
from dataset.views import IMAGENET_NORM, MULTICROP, photo_view, pipeline  # noqa: E402
from dataset.workers import PrefetchLoader  # noqa: E402
from util.errors import Parser, UserError, cli_main  # noqa: E402


class GaussianBlur:
    """The blur of MoCo v2's recipe."""

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(radius=torch.empty(1).uniform_(0.1, 2.0).item()))


USUAL_WEAK = T.Compose(
    [
        T.RandomResizedCrop(224, scale=(0.2, 1.0)),
        T.RandomHorizontalFlip(),
        T.ToTensor(),
        T.Normalize(*IMAGENET_NORM),
    ]
)
USUAL_STRONG = T.Compose(
    [
        T.RandomResizedCrop(224, scale=(0.2, 1.0)),
        T.RandomHorizontalFlip(),
        T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        T.RandomGrayscale(p=0.2),
        T.RandomApply([GaussianBlur()], p=0.5),
        T.ToTensor(),
        T.Normalize(*IMAGENET_NORM),
    ]
)


def make_files(folder: Path, photos: list[Path], count: int) -> None:
    """Make `count` JPEG files of 500×375 and quality 90: crops of the photographs in turn."""
    random = np.random.default_rng(0)
    originals = [decode(photo) for photo in photos]
    for k, original in zip(range(count), itertools.cycle(originals)):
        w, h = original.size
        x, y = (int(v) for v in random.integers(0, [w // 8, h // 8]))
        part = original.crop((x, y, x + w * 7 // 8, y + h * 7 // 8)).resize(
            (500, 375), Image.Resampling.BICUBIC
        )
        part.save(folder / f"{k:06d}.jpg", quality=90)


def torchvision_views(path: str) -> tuple[torch.Tensor, torch.Tensor]:
    with open(path, "rb") as file:
        image = Image.open(file).convert("RGB")
    return USUAL_WEAK(image), USUAL_STRONG(image)


def make_views(views: Sequence[View], images: list[Any], rows: np.ndarray) -> list[HostTensors]:
    passes = np.zeros(len(rows), np.int64)
    return [
        view.cpu_transform(images, uniforms(rows, view.num_uniforms, 0, k, passes))
        for k, view in enumerate(views)
    ]


def time_parts(paths: list[str]) -> list[tuple[str, float]]:
    """Name and ms per image of each part of the views, with and without device views."""
    images = [decode(Path(path)) for path in paths]
    random = np.random.default_rng(0)
    parts = []

    def clock(name: str, call: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        out = call()
        parts.append((name, 1000 * (time.perf_counter() - start) / len(images)))
        return out

    clock("read the file", lambda: [Path(path).read_bytes() for path in paths])
    clock("read and decode", lambda: [decode(Path(path)) for path in paths])
    crop = pipeline("weak")[0]
    sizes = np.array([image.size for image in images], float)
    boxes = clock(
        "draw one crop", lambda: crop.sample(random.random((len(images), crop.num_uniforms)), sizes)
    )
    clock("crop and resize, Pillow", lambda: [crop.pil(image, box) for image, box in zip(images, boxes)])
    crops = clock(
        "crop and resize, with device views",
        lambda: [device_views.crop_resize(i, b, 224) for i, b in zip(images, boxes)],
    )
    clock("stack", lambda: torch.from_numpy(np.stack(crops)))
    cropped = [Image.fromarray(c) for c in crops]
    for stage in pipeline("moco")[1:]:
        params = stage.sample(random.random((len(images), stage.num_uniforms)), sizes)
        clock(f"{type(stage).__name__.lower()}, Pillow", partial(apply_stage, stage, cropped, params))
    clock(
        "to tensor and normalize, torchvision",
        lambda: [T.functional.normalize(T.functional.to_tensor(i), *IMAGENET_NORM) for i in cropped],
    )
    return parts


def apply_stage(stage: Stage, images: list[Image.Image], params: np.ndarray) -> None:
    for image, p in zip(images, params):
        stage.pil(image, p)


def private_memory(pid: int) -> float:
    """MB of memory that a process shares with no other process."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    private = [line for line in lines if line.startswith(("Private_Clean", "Private_Dirty"))]
    return sum(int(line.split()[1]) for line in private) / 1024


def print_memory(source: Files, count: int) -> None:
    """Run the loader with two workers over `count` unlabeled images and print the workers' memory."""
    n = len(source)
    weak, strong, eval_view = (
        photo_view(pipeline(name), IMAGENET_NORM, on_device=True) for name in ("weak", "moco", "eval")
    )
    labels = np.zeros(n, np.int64)
    data = Data(
        images=source,
        labels=labels,
        labeled=np.arange(8),
        unlabeled=np.arange(n),
        test_images=source,
        test_labels=labels,
        weak_view=weak,
        strong_views=(strong,),
        eval_view=eval_view,
        classes=["all"],
        channels=3,
        split=SplitId("benchmark", "0"),
    )
    stream = Stream(data, 8, 5, seed=0)
    steps, measured = count // 40, []
    loader = iter(PrefetchLoader(stream, range(steps), 2, pin_memory=False))
    for step in range(steps):
        next(loader)
        if step in (steps // 10, steps // 2, steps - 5):
            pids = [worker.pid for worker in multiprocessing.active_children() if worker.pid]
            megabytes = " and ".join(f"{private_memory(pid):.0f}" for pid in pids)
            measured.append(f"{(step + 1) * 40:,} images: {megabytes} MB")
    print("private memory of the two workers after", "; ".join(measured))


def main() -> None:
    parser = Parser(__doc__ or "")
    parser.add_argument(
        "--photos", nargs="+", type=Path, metavar="FILE", help="photographs from which the files are made"
    )
    parser.add_argument("--images", type=int, default=2000, help="number of files")
    parser.add_argument("--rounds", type=int, default=7, help="number of turns of every pipeline")
    parser.add_argument("--a-round", type=int, default=120, help="images per pipeline and turn")
    parser.add_argument(
        "--memory",
        type=int,
        default=0,
        metavar="N",
        help="also measure the memory of workers that load N images",
    )
    args = parser.parse_args()
    photos = args.photos
    if not photos:
        try:
            import sklearn.datasets
        except ImportError:
            raise UserError(
                "give photographs with --photos, or install scikit-learn, which has two of them"
            ) from None
        photos = sorted((Path(sklearn.datasets.__file__).parent / "images").glob("*.jpg"))

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_files(folder, photos, args.images)
        source = list_images(folder)
        paths = [source.name(row) for row in range(len(source))]
        pil_views, device, pil_six, six = (
            [photo_view(pipeline(name), IMAGENET_NORM, on_device) for name in ("weak", *strong)]
            for strong in (["moco"], MULTICROP)
            for on_device in (False, True)
        )

        def use_torchvision(rows: np.ndarray) -> None:
            for row in rows.tolist():
                torchvision_views(paths[row])

        def use(views: Sequence[View], rows: np.ndarray) -> None:
            for start in range(0, len(rows), 40):  # the recipe has 40 unlabeled images per rank and step
                chunk = rows[start : start + 40]
                make_views(views, [source[row] for row in chunk.tolist()], chunk)

        pipelines: dict[str, Callable[[np.ndarray], None]] = {
            "torchvision on PIL, as usual": use_torchvision,
            "device views off (PIL)": partial(use, pil_views),
            "device views on, CPU part": partial(use, device),
            "six views, device views off (PIL)": partial(use, pil_six),
            "six views, device views on, CPU part": partial(use, six),
        }
        speeds: dict[str, list[float]] = {label: [] for label in pipelines}
        chunks = itertools.cycle(np.array_split(np.arange(len(paths)), max(1, len(paths) // args.a_round)))
        for _ in range(args.rounds + 1):
            rows = next(chunks)  # all pipelines read the same files
            for label, call in pipelines.items():
                start = time.perf_counter()
                call(rows)
                speeds[label].append(len(rows) / (time.perf_counter() - start))
        base = next(iter(speeds.values()))  # torchvision's
        print("| pipeline | images/s per core | relative to torchvision |\n|---|---|---|")
        for label, values in speeds.items():
            ratio = statistics.median(v / b for v, b in zip(values[1:], base[1:]))  # the first turn warms up
            print(f"| {label} | {statistics.median(values[1:]):.0f} | {ratio:.2f} |")
        _, *two_and_six = (values[1:] for values in speeds.values())
        off, on = (statistics.median(two / six for two, six in zip(*two_and_six[k::2])) for k in range(2))
        print(f"\nSix views take {off:.2f} (off) and {on:.2f} (on) times as long as two.")
        print(f"Medians of {args.rounds} turns of {args.a_round} images with two views or six, one thread.\n")
        print("| part | ms |\n|---|---|")
        rounds = [time_parts(paths[:100]) for _ in range(3)]
        for k, (part, _) in enumerate(rounds[0]):
            print(f"| {part} | {statistics.median(r[k][1] for r in rounds):.2f} |")
        if args.memory:
            print_memory(source, args.memory)
    print(f"\n{machine()}, Pillow {PIL.__version__}")


if __name__ == "__main__":
    cli_main(main)
