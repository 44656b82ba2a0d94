"""Runs side by side: python -m util.report RUN_DIR… [--curves FILE.png] prints a table and draws the curves."""

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont

from util.config import Config, read_yaml
from util.errors import Parser, UserError, cli_main

COLORS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
)  # distinct to color-blind readers too


class Run(NamedTuple):
    name: str
    config: Config
    trains: list[dict[str, Any]]  # train events
    evals: list[dict[str, Any]]  # eval events, at least one
    split: str  # id and SHA-256 of the labeled images


def read_events(folder: Path) -> list[dict[str, Any]]:
    """The events of a run's log.jsonl, in order. Raises UserError if there is none, or it is damaged."""
    try:
        text = (folder / "log.jsonl").read_text(encoding="utf-8")
        events = [
            json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()
        ]  # a crash may cut the last line
    except OSError as error:
        raise UserError(
            f"{folder} is not the output directory of a run: log.jsonl: {error.strerror}"
        ) from None
    except ValueError:
        raise UserError(f"{folder / 'log.jsonl'} is damaged: a line is not JSON") from None
    needs = {"train": {"pseudo_acc"}, "eval": {"student_top1", "teacher_top1"}}
    for event in events:
        if (
            not isinstance(event, dict)
            or not {"event", "step"} | needs.get(event.get("event"), set()) <= event.keys()
        ):
            raise UserError(
                f"{folder / 'log.jsonl'} is damaged: an event is not one of ours, or of another version: {str(event)[:80]}"
            )
    return events


def read(folder: Path) -> Run:
    """A run from its config.yaml and log.jsonl. Raises UserError if it has not been evaluated yet."""
    events = read_events(folder)
    trains, evals = ([e for e in events if e["event"] == kind] for kind in ("train", "eval"))
    if not evals:
        raise UserError(f"{folder} has no evaluation yet: let it train for an epoch first")
    split = next(
        (f"{e['split']} (sha256 {e['sha256'][:12]})" for e in events if e["event"] == "start"), "unknown"
    )
    return Run(folder.name, Config(**read_yaml(str(folder / "config.yaml"))), trains, evals, split)


def check_same_split(runs: list[Run]) -> None:
    """Raise UserError unless all runs had the same labeled images: otherwise their accuracies do not
    compare.
    """
    for r in runs:
        if r.split != runs[0].split:
            raise UserError(
                f"{runs[0].name} was trained on the split {runs[0].split} and {r.name} on {r.split}: these do not "
                "compare; give runs on one split"
            )


def table(runs: list[Run]) -> str:
    """Markdown: final accuracies, one row a run. (The final model's, not the best seen: the test images chose
    nothing.)
    """
    rows = [
        "| method | labels a class | steps | student top-1 % | teacher top-1 % |",
        "|---|---|---|---|---|",
    ]
    for r in runs:
        last = r.evals[-1]
        rows.append(
            f"| {r.config.method} | {r.config.labels_per_class} | {last['step']} | {last['student_top1']:.2f} | "
            f"{last['teacher_top1']:.2f} |"
        )
    return "\n".join(rows)


def draw(runs: list[Run], path: Path) -> None:
    """A PNG with test accuracy and pseudo-label accuracy over the steps."""
    scale = 2  # drawn twice as large and halved: smooth lines
    image = Image.new("RGB", (1100 * scale, 420 * scale), "white")
    pen = ImageDraw.Draw(image)
    panels = (
        (
            "student top-1 on the test images (%)",
            [[(e["step"], e["student_top1"]) for e in r.evals] for r in runs],
        ),
        (
            "pseudo-label accuracy (%)",
            [
                [(e["step"], 100 * e["pseudo_acc"]) for e in r.trains if e["pseudo_acc"] is not None]
                for r in runs
            ],
        ),
    )
    for place, (title, curves) in enumerate(panels):
        _panel(pen, scale, (60 + 550 * place, 50, 530 + 550 * place, 340), title, curves)
    for place, r in enumerate(runs):
        x, y = (60 + 180 * place) * scale, 390 * scale
        pen.line((x, y, x + 24 * scale, y), fill=COLORS[place % len(COLORS)], width=3 * scale)
        pen.text((x + 32 * scale, y), r.name, fill="black", font=_font(14 * scale), anchor="lm")
    image.resize((1100, 420), Image.Resampling.LANCZOS).save(path, format="PNG")


def _panel(
    pen: ImageDraw.ImageDraw,
    scale: int,
    box: tuple[int, int, int, int],
    title: str,
    curves: list[list[tuple[float, float]]],
) -> None:
    left, top, right, bottom = (v * scale for v in box)
    points = [point for curve in curves for point in curve]
    most = max((x for x, _ in points), default=1)
    least = min(10 * (min((y for _, y in points), default=0) // 10), 90)
    pen.text((left, top - 22 * scale), title, fill="black", font=_font(15 * scale), anchor="lm")

    def at(x: float, y: float) -> tuple[float, float]:
        return left + (right - left) * x / most, bottom - (bottom - top) * (y - least) / (100 - least)

    for y in range(int(least), 101, 10):
        pen.line((*at(0, y), *at(most, y)), fill="#dddddd", width=scale)
        pen.text((left - 8 * scale, at(0, y)[1]), str(y), fill="#444444", font=_font(12 * scale), anchor="rm")
    for part in range(5):
        x = most * part / 4
        pen.text(
            (at(x, least)[0], bottom + 12 * scale),
            f"{x:.0f}",
            fill="#444444",
            font=_font(12 * scale),
            anchor="mm",
        )
    pen.text(
        ((left + right) / 2, bottom + 28 * scale), "step", fill="#444444", font=_font(12 * scale), anchor="mm"
    )
    for place, curve in enumerate(curves):
        if curve:
            pen.line(
                [at(*point) for point in curve],
                fill=COLORS[place % len(COLORS)],
                width=2 * scale,
                joint="curve",
            )


def _font(size: int) -> ImageFont.ImageFont:
    try:
        return ImageFont.load_default(size)
    except TypeError:  # Pillow before 10.1 has one size only
        return ImageFont.load_default()


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN_DIR", help="output directories of train_semi.py"
    )
    parser.add_argument("--curves", type=Path, metavar="FILE.png", help="also draw the curves")
    args = parser.parse_args(sys.argv[1:])
    runs = [read(folder) for folder in args.runs]
    check_same_split(runs)
    print(table(runs))
    if args.curves:
        try:
            draw(runs, args.curves)
        except OSError as error:
            raise UserError(f"cannot write {args.curves}: {error.strerror}") from None
        print(f"curves: {args.curves}")


if __name__ == "__main__":
    cli_main(main)
