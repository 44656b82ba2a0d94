"""All methods on the digits: python benchmark/digits.py [--jobs 2] [--write README.md]

Trains every method with 10 and 40 labels and every seed by calling train_semi.py, and prints a table with the
mean ± standard deviation over seeds of the final student's top-1. Finished runs in --runs are not repeated.
"""

import os
import platform
import re
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy  # noqa: E402
import torch  # noqa: E402
import torchvision  # noqa: E402

from benchmark import marked_file  # noqa: E402
from util.config import changed_settings, parse, read_yaml  # noqa: E402
from util.errors import Parser, UserError, cli_main  # noqa: E402
from util.inspect.report import read_evaluated_run  # noqa: E402

METHODS = {
    "simmatch": "SimMatch",
    "simmatchv2": "SimMatchV2",
    "fixmatch": "FixMatch",
    "supervised": "supervised",
}
CONFIGS = dict.fromkeys(METHODS, "configs/digits.yaml") | {"simmatchv2": "configs/simmatchv2_digits.yaml"}
LABELS = {1: "10 labels", 4: "40 labels"}
MARKS = "<!-- digits table: written by benchmark/digits.py -->", "<!-- end of digits table -->"


def train(folder: Path, method: str, labels_per_class: int, seed: int, threads: int) -> tuple[float, float]:
    """Train one run, unless `folder` holds it -> (top-1 of the final student, seconds of the process)."""
    seconds = folder / "seconds"
    flags = [
        *("--config", str(ROOT / CONFIGS[method]), "--output-dir", str(folder)),
        *("--method", method, "--labels-per-class", str(labels_per_class), "--seed", str(seed)),
        *("--eval-freq", "1000000"),
    ]
    if seconds.exists():
        if changed_settings(read_yaml(str(folder / "config.yaml")), parse(flags, "")):
            raise UserError(
                f"{folder} holds a run with other settings than {CONFIGS[method]} has now: "
                "choose another --runs"
            )
    else:
        start = time.monotonic()
        done = subprocess.run(
            [sys.executable, "train_semi.py", *flags],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )
        if done.returncode:
            raise UserError(f"{folder}: {done.stderr.strip()}")
        seconds.write_text(f"{time.monotonic() - start:.1f}")
    return read_evaluated_run(folder).eval_events[-1]["student_top1"], float(seconds.read_text())


def machine() -> str:
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        cpu = (re.findall(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text()) or [cpu])[0]
    return (
        f"{os.cpu_count()} cores of {cpu}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"torchvision {torchvision.__version__}, numpy {numpy.__version__}"
    )


def main() -> None:
    parser = Parser(__doc__ or "")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument(
        "--runs", type=Path, default=ROOT / "checkpoints" / "benchmark_digits", help="folder of the runs"
    )
    parser.add_argument("--jobs", type=int, default=1, help="number of runs at a time; they share the cores")
    parser.add_argument("--write", type=Path, help="put the table between its marks in this file")
    args = parser.parse_args()

    if args.jobs < 1:
        raise UserError("--jobs must be 1 or more")
    if args.write:
        marked_file.check(args.write, MARKS)
    args.runs = args.runs.resolve()
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    jobs = [(method, n, seed) for method in METHODS for n in LABELS for seed in args.seeds]

    def run(job: tuple[str, int, int]) -> tuple[float, float]:
        method, n, seed = job
        score, seconds = train(args.runs / f"{method}-{n}-{seed}", method, n, seed, threads)
        print(f"{method}, {LABELS[n]}, seed {seed}: {score:.2f} % in {seconds:.0f} s", flush=True)
        return score, seconds

    with ThreadPoolExecutor(args.jobs) as pool:
        results = dict(zip(jobs, pool.map(run, jobs)))

    rows = []
    for method in METHODS:
        cells = []
        for n in LABELS:
            scores = [results[method, n, seed][0] for seed in args.seeds]
            spread = statistics.stdev(scores) if len(scores) > 1 else float("nan")
            cells.append(f"{statistics.mean(scores):.1f} ± {spread:.1f}")
        seconds = statistics.median(results[method, n, seed][1] for n in LABELS for seed in args.seeds)
        rows.append(f"| {METHODS[method]} | {' | '.join(cells)} | {seconds:.0f} s |")
    seeds = ", ".join(map(str, args.seeds))
    table = "\n".join(
        [
            f"| student top-1 % | {' | '.join(LABELS.values())} | one run |",
            "|---|---|---|---|",
            *rows,
            "",
            f"Mean ± standard deviation over seeds {seeds} (n = {len(args.seeds)}), which draw the labels, "
            "the initial weights, the order and the views; last epoch; 360 test images. "
            f'"One run" is the median time of the whole command, {args.jobs} at a time, {threads} '
            f"thread{'s' * (threads > 1)} each. On {machine()}.",
        ]
    )
    print(f"\n{table}")
    if args.write:
        marked_file.put(args.write, MARKS, table)


if __name__ == "__main__":
    cli_main(main)
