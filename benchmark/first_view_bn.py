"""What --bn-from-first-view changes for SimMatchV2: python benchmark/first_view_bn.py [--seeds 0 1 2]

The digits, as image files of 32×32 pixels in folders, with strong views of 32, 27 and 14 px (multicrop_224,
multicrop_192 and multicrop_96 at --image-size 32), 10 labels a class. Each seed is trained with and without
the flag: BN's running statistics, which the evaluation at 32 px reads, come from the first view alone, or
lean to the last and smallest one. It prints the top-1 of the last epoch of student and teacher.
"""

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

from benchmark.digits import machine  # noqa: E402
from util.errors import Parser, UserError, cli_main  # noqa: E402
from util.inspect.report import read_evaluated_run  # noqa: E402

FLAGS = (
    "--config configs/simmatchv2_folder.yaml --image-size 32 --labels-per-class 10 --backbone small_encoder "
    "--strong multicrop_224,multicrop_192,multicrop_96 --batch-size 10 --mu 7 --k 20 --ema-m 0.95 --lr 0.05 "
    "--warmup-epoch 1 --workers 0 --device cpu --eval-freq 1000 --print-freq 100"
)


def write_files(folder: Path) -> None:
    """Write the digits as PNG files into a folder for each class."""
    data = np.load(ROOT / "dataset" / "digits.npz")
    images, labels = (data[name] for name in data.files[:2])
    for number, (image, label) in enumerate(zip(images, labels)):
        path = folder / str(label) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = (image.reshape(8, 8).astype(float) * 255 / images.max()).astype(np.uint8)  # [8, 8]
        Image.fromarray(pixels).convert("RGB").resize((32, 32), Image.Resampling.BILINEAR).save(path)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=20)
    args = parser.parse_args()
    scores: dict[str, list[tuple[float, float]]] = {"every view": [], "the first view": []}
    with tempfile.TemporaryDirectory() as name:
        write_files(Path(name, "digits"))
        for seed in args.seeds:
            for kind, rows in scores.items():
                out = Path(name, f"{kind} {seed}".replace(" ", "-"))
                flags = [*FLAGS.split(), "--data", f"{name}/digits", "--output-dir", str(out)]
                flags += ["--seed", str(seed), "--epochs", str(args.epochs)]
                flags += ["--bn-from-first-view"] * (kind == "the first view")
                env = {**os.environ, "OMP_NUM_THREADS": "1", "SIMMATCH_CACHE": f"{name}/cache"}
                command = [sys.executable, "train_semi.py", *flags]
                done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
                if done.returncode:
                    raise UserError(done.stderr.strip())
                event = read_evaluated_run(out).eval_events[-1]
                rows.append((event["student_top1"], event["teacher_top1"]))
                print(
                    f"seed {seed}, {kind}: student {rows[-1][0]:.2f} %, teacher {rows[-1][1]:.2f} %",
                    flush=True,
                )
    print("\n| BN statistics from | student top-1 % | teacher top-1 % |\n|---|---|---|")
    for kind, rows in scores.items():
        cells = (" ".join(f"{value:.1f}" for value in column) for column in zip(*rows))
        print(f"| {kind} | {' | '.join(cells)} |")
    first, every = ([student for student, _ in scores[kind]] for kind in ("the first view", "every view"))
    difference = statistics.mean(a - b for a, b in zip(first, every))
    print(
        f"\nThe first view alone: {difference:+.2f} points of the student's top-1, mean of {len(first)} "
        f"seeds; {args.epochs} epochs; {machine()}"
    )


if __name__ == "__main__":
    cli_main(main)
