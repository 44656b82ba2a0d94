"""Images a second and core of the two-view unlabeled path: python benchmark/loader.py [--photos A.jpg B.jpg]
[--images 2000]

Three pipelines take turns over the same JPEG files in one process with one thread: torchvision's transforms
on PIL written the usual way, this project's exact PIL path, and the host side of its fast path, whose other
half runs on the training device. The files are made from the given photographs, resized to 500×375 and
re-encoded; without --photos, scikit-learn's two sample photographs are used if it is installed.
"""

import itertools
import multiprocessing
import statistics
import sys
import tempfile
import time
from pathlib import Path

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
from dataset.loader import Data, SplitId, Stream  # noqa: E402
from dataset.rng import uniforms  # noqa: E402
from dataset.source import Files, decode  # noqa: E402
from dataset.views import IMAGENET_NORM, photo_view, pipeline  # noqa: E402
from dataset.workers import PrefetchLoader  # noqa: E402
from util.errors import Parser, UserError, cli_main  # noqa: E402


class GaussianBlur:
    """As MoCo v2's recipe has it."""

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
    """`count` JPEG files of 500×375: the photographs in turn, each cropped a little differently, quality 90."""
    random = np.random.default_rng(0)
    originals = [decode(photo) for photo in photos]
    for k, original in zip(range(count), itertools.cycle(originals)):
        w, h = original.size
        x, y = (int(v) for v in random.integers(0, [w // 8, h // 8]))
        part = original.crop((x, y, x + w * 7 // 8, y + h * 7 // 8)).resize(
            (500, 375), Image.Resampling.BICUBIC
        )
        part.save(folder / f"{k:06d}.jpg", quality=90)


def usual(path: str) -> None:
    with open(path, "rb") as file:
        image = Image.open(file).convert("RGB")
    USUAL_WEAK(image), USUAL_STRONG(image)


def two_views(weak, strong, images, rows):
    passes = np.zeros(len(rows), np.int64)
    return [
        view.cpu_transform(images, uniforms(rows, view.num_uniforms, 0, k, passes))
        for k, view in enumerate((weak, strong))
    ]


def stages(paths: list[str]) -> list[tuple[str, float]]:
    """ms an image of each part of the fast path, and of the parts that it leaves to the device."""
    images = [decode(Path(path)) for path in paths]
    random = np.random.default_rng(0)
    parts, boxes = [], None

    def clock(name, call, count=len(images)):
        begun = time.perf_counter()
        out = call()
        parts.append((name, 1000 * (time.perf_counter() - begun) / count))
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
        "crop and resize, fast path",
        lambda: [device_views.crop_resize(i, b, 224) for i, b in zip(images, boxes)],
    )
    clock("stack", lambda: torch.from_numpy(np.stack(crops)))
    pictures = [Image.fromarray(c) for c in crops]
    for stage in pipeline("moco")[1:]:
        params = stage.sample(random.random((len(images), stage.num_uniforms)), sizes)
        clock(
            f"{type(stage).__name__.lower()}, Pillow",
            lambda: [stage.pil(i, p) for i, p in zip(pictures, params)],
        )
    clock(
        "to tensor and normalize, torchvision",
        lambda: [T.functional.normalize(T.functional.to_tensor(i), *IMAGENET_NORM) for i in pictures],
    )
    return parts


def resident(pid: int) -> float:
    """MB of memory of a process that no other process shares."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return (
        sum(
            int(line.split()[1])
            for line in text.splitlines()
            if line.startswith(("Private_Clean", "Private_Dirty"))
        )
        / 1024
    )


def memory(source: Files, count: int) -> None:
    """Run the loader with two workers over `count` unlabeled images and print what each worker holds."""
    n = len(source)
    views = [photo_view(pipeline(name), IMAGENET_NORM, on_device=True) for name in ("weak", "moco", "eval")]
    labels = np.zeros(n, np.int64)
    data = Data(
        source,
        labels,
        np.arange(8),
        np.arange(n),
        source,
        labels,
        *views,
        classes=["all"],
        channels=3,
        split=SplitId("benchmark", "0"),
    )
    stream = Stream(data, 8, 5, seed=0)
    steps, seen = count // 40, []
    loader = iter(PrefetchLoader(stream, range(steps), 2, pin_memory=False))
    for step in range(steps):
        next(loader)
        if step in (steps // 10, steps // 2, steps - 5):
            seen.append(
                f"{(step + 1) * 40:,} images: "
                + " and ".join(f"{resident(w.pid):.0f}" for w in multiprocessing.active_children())
                + " MB"
            )
    print("private memory of the two workers after", "; ".join(seen))


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument(
        "--photos", nargs="+", type=Path, metavar="FILE", help="photographs to make the files of"
    )
    parser.add_argument("--images", type=int, default=2000, help="files to make")
    parser.add_argument("--rounds", type=int, default=7, help="turns of every pipeline")
    parser.add_argument("--a-round", type=int, default=120, help="images a pipeline and turn")
    parser.add_argument(
        "--memory", type=int, default=0, metavar="N", help="also run the workers over N images"
    )
    args = parser.parse_args()
    photos = args.photos
    if not photos:
        try:
            import sklearn.datasets
        except ImportError:
            raise UserError(
                "give photographs with --photos, or install scikit-learn, whose two samples serve"
            ) from None
        photos = sorted((Path(sklearn.datasets.__file__).parent / "images").glob("*.jpg"))

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_files(folder, photos, args.images)
        source = Files(folder, list_images(folder).names)
        paths = [source.name(row) for row in range(len(source))]
        exact, fast = (
            [photo_view(pipeline(view), IMAGENET_NORM, on_device) for view in ("weak", "moco")]
            for on_device in (False, True)
        )

        def ours(views):
            def call(rows):
                for start in range(0, len(rows), 40):  # as many as a rank of the recipe takes in a step
                    part = rows[start : start + 40]
                    two_views(*views, [source[row] for row in part.tolist()], part)

            return call

        pipelines = {
            "torchvision on PIL, the usual way": lambda rows: [usual(paths[row]) for row in rows.tolist()],
            "exact path (PIL)": ours(exact),
            "fast path, host side": ours(fast),
        }
        speed = {label: [] for label in pipelines}
        chunks = itertools.cycle(np.array_split(np.arange(len(paths)), max(1, len(paths) // args.a_round)))
        for _ in range(args.rounds + 1):
            rows = next(chunks)  # the same files for all, in turn
            for label, call in pipelines.items():
                begun = time.perf_counter()
                call(rows)
                speed[label].append(len(rows) / (time.perf_counter() - begun))
        base = None
        print("| pipeline | images/s a core | times the usual way |\n|---|---|---|")
        for label, values in speed.items():
            base = base or values
            ratio = statistics.median(v / b for v, b in zip(values[1:], base[1:]))  # the first turn warms up
            print(f"| {label} | {statistics.median(values[1:]):.0f} | {ratio:.2f} |")
        print(f"\nMedians of {args.rounds} turns of {args.a_round} images with two views each, one thread.\n")
        print("| part | ms |\n|---|---|")
        rounds = [stages(paths[:100]) for _ in range(3)]
        for k, (part, _) in enumerate(rounds[0]):
            print(f"| {part} | {statistics.median(r[k][1] for r in rounds):.2f} |")
        if args.memory:
            memory(source, args.memory)
    print(f"\n{machine()}, Pillow {PIL.__version__}")


if __name__ == "__main__":
    cli_main(main)
