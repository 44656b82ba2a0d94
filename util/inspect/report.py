"""Compare runs: python -m util.report RUN_DIR… [--curves FILE.png] prints a table and draws the curves."""

import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from util.errors import Parser, UserError
from util.files import check_output, starts_with, user_path, write_atomically
from util.inspect.run_log import RunLog, read_run_log

# The colors of the curves are the Okabe-Ito palette, which color-blind readers can tell apart.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
SCALE = 2  # drawn at twice the size and scaled down, which makes the lines smooth


def read_evaluated_run(folder: Path) -> RunLog:
    """Read the run whose output directory is `folder`. Raises UserError if it has not been evaluated yet."""
    run = read_run_log(folder)
    if not run.eval_events:
        raise UserError(f"{folder} has no evaluation yet: let it train for an epoch first")
    return run


def check_same_split(runs: list[RunLog]) -> None:
    """Raise UserError unless all runs had the same labeled images: otherwise their accuracies are not
    comparable.
    """
    for run in runs:
        if run.split != runs[0].split:
            raise UserError(
                f"{runs[0].name} was trained on the split {runs[0].split} and {run.name} on {run.split}: "
                "their accuracies are not comparable; give runs on one split"
            )


def table(runs: list[RunLog]) -> str:
    """Return a Markdown table with one row per run: the accuracies of the last model, not of the best one,
    which would be selected on the test images.
    """
    rows = [
        "| method | labels a class | steps | student top-1 % | teacher top-1 % |",
        "|---|---|---|---|---|",
    ]
    for run in runs:
        last = run.eval_events[-1]
        rows.append(
            f"| {run.config.method} | {run.config.labels_per_class} | {last['step']} | "
            f"{last['student_top1']:.2f} | {last['teacher_top1']:.2f} |"
        )
    return "\n".join(rows)


def draw(runs: list[RunLog], path: Path) -> None:
    """Write a PNG with the test accuracy and the pseudo-label accuracy over the steps. Raises UserError if
    that is not possible.
    """
    image = Image.new("RGB", (1100 * SCALE, 420 * SCALE), "white")
    pen = ImageDraw.Draw(image)
    top1 = [[(e["step"], e["student_top1"]) for e in run.eval_events] for run in runs]
    pseudo_acc = [
        [(e["step"], 100 * e["pseudo_acc"]) for e in run.train_events if e["pseudo_acc"] is not None]
        for run in runs
    ]
    _draw_panel(pen, 60, "student top-1 on the test images (%)", top1)
    _draw_panel(pen, 610, "pseudo-label accuracy (%)", pseudo_acc)
    for i, run in enumerate(runs):
        x, y = (60 + 180 * i) * SCALE, 390 * SCALE
        pen.line((x, y, x + 24 * SCALE, y), fill=COLORS[i % len(COLORS)], width=3 * SCALE)
        _write(pen, x + 32 * SCALE, y, run.name, "lm", 14, "black")
    small = image.resize((1100, 420), Image.Resampling.LANCZOS)
    write_atomically(path, lambda file: small.save(file, format="PNG"))


def _draw_panel(
    pen: ImageDraw.ImageDraw, x: int, title: str, curves: list[list[tuple[float, float]]]
) -> None:
    """Draw axes, grid and one curve per run, a list of (step, percent), to the right of x."""
    left, top, right, bottom = x * SCALE, 50 * SCALE, (x + 470) * SCALE, 340 * SCALE
    points = [point for curve in curves for point in curve]
    x_max = max((x for x, _ in points), default=1)
    y_min = min(10 * (min((y for _, y in points), default=0) // 10), 90)
    _write(pen, left, top - 22 * SCALE, title, "lm", 15, "black")

    def to_pixels(x: float, y: float) -> tuple[float, float]:
        return left + (right - left) * x / x_max, bottom - (bottom - top) * (y - y_min) / (100 - y_min)

    for y in range(int(y_min), 101, 10):
        pen.line((*to_pixels(0, y), *to_pixels(x_max, y)), fill="#dddddd", width=SCALE)
        _write(pen, left - 8 * SCALE, to_pixels(0, y)[1], str(y), "rm")
    for part in range(5):
        step = x_max * part / 4
        _write(pen, to_pixels(step, y_min)[0], bottom + 12 * SCALE, f"{step:.0f}")
    _write(pen, (left + right) / 2, bottom + 28 * SCALE, "step")
    for i, curve in enumerate(curves):
        if curve:
            pixels = [to_pixels(*point) for point in curve]
            pen.line(pixels, fill=COLORS[i % len(COLORS)], width=2 * SCALE, joint="curve")


def _write(
    pen: ImageDraw.ImageDraw,
    x: float,
    y: float,
    text: str,
    anchor: str = "mm",
    size: int = 12,
    color: str = "#444444",
) -> None:
    try:
        font = ImageFont.load_default(size * SCALE)
    except TypeError:  # Pillow before 10.1 has only one size
        font = ImageFont.load_default()
    pen.text((x, y), text, fill=color, font=font, anchor=anchor)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument(
        "runs", nargs="+", type=user_path, metavar="RUN_DIR", help="output directories of train_semi.py"
    )
    parser.add_argument(
        "--curves", type=user_path, metavar="FILE.png", help="also draw the curves into FILE.png"
    )
    args = parser.parse_args(sys.argv[1:])
    if args.curves:
        curves, replaces = check_output(
            args.curves, "--curves", "a PNG image", starts_with(b"\x89PNG\r\n\x1a\n")
        )
    runs = [read_evaluated_run(folder) for folder in args.runs]
    check_same_split(runs)
    print(table(runs))
    if args.curves:
        draw(runs, curves)
        if replaces:
            print(replaces)
        print(f"curves: {args.curves}")
