"""Evaluate a checkpoint, or use it: python eval.py --checkpoint checkpoints/digits/best.pth [--per-class] [--predict DIR]"""
import csv
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dataset.build import build_data, plain_view
from dataset.listing import pile
from dataset.loader import BadImages, SplitId, evaluation_batches, image_batches
from dataset.source import Files
from models import build_method, build_network
from util import checkpoint, dist_utils
from util.config import Config, from_dict, validate
from util.errors import Parser, UserError, run
from util.metrics import evaluate


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--checkpoint", required=True, type=Path, metavar="FILE", help="best.pth or last.pth of a run")
    parser.add_argument("--per-class", action="store_true", help="also print the student's top-1 of each class")
    parser.add_argument("--predict", type=Path, metavar="DIR", help="classify all images below DIR instead, into a CSV file")
    parser.add_argument("--output", type=Path, default=Path("predictions.csv"), metavar="FILE", help="where --predict writes "
                        "(default: predictions.csv)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    for name in ("data", "val", "unlabelled", "workers", "on_bad_image"):
        parser.add_argument(f"--{name.replace('_', '-')}", help="as in train_semi.py (default: as in training)")
    args = parser.parse_args()

    state = checkpoint.load(args.checkpoint)
    values = {**state["config"], **{k: v for k, v in vars(args).items() if k in state["config"] and v is not None}}
    config = validate(Config(**from_dict(values, f"the config in {args.checkpoint}")))
    device = dist_utils.dist_init(config.device, config.timeout_minutes)
    if args.predict:
        predict(state, config, args.checkpoint, args.predict, args.output, device)
        return
    data = build_data(config, gpu=device.type == "cuda")
    if data.split != SplitId(*state["split"]):
        raise UserError(f"{args.checkpoint} was trained on the split {SplitId(*state['split'])}, but the data here give "
                        f"{data.split}")
    if data.classes != state["classes"]:
        odd = next((a, b) for a, b in zip(state["classes"], data.classes) if a != b)
        raise UserError(f"{args.checkpoint} knows a class {odd[0]} where the data here have {odd[1]}")
    try:
        method = build_method(config, data.channels, torch.from_numpy(data.labels[data.labelled]))
    except ValueError as error:
        raise UserError(f"the config in {args.checkpoint}: {error}") from None
    checkpoint.load_module(method, state["method"], args.checkpoint)
    method.to(device).eval()

    print(f"{config.method}, {config.backbone}, {data.split}; step {state['step']}; {len(data.test_labels)} test images")
    bad = BadImages(config.on_bad_image)
    x_and_y = evaluation_batches(data, 0, 1, config.workers, device, bad)
    student, teacher = evaluate([method.student, method.teacher.net], x_and_y, len(data.classes), device)
    for name, cause in bad.take():
        print(f"left out: {name}: {cause}")
    if args.per_class:
        for name, value in zip(data.classes, student.per_class):
            print(f"class {name}: {value:.3f}")
    for name, result in (("student", student), ("teacher", teacher)):
        print(f"{name}: top-1 {result.top1:.3f} %, top-5 {result.top5:.3f} %")
    print(f"* Acc@1 {student.top1:.3f} Acc@5 {student.top5:.3f}")


@torch.no_grad()
def predict(state: dict[str, Any], config: Config, path: Path, folder: Path, output: Path, device: torch.device) -> None:
    """Classify every image below `folder` with the student. A line of `output`: path, class, probability, the five likeliest."""
    view, channels = plain_view(config, gpu=device.type == "cuda")
    try:
        student = build_network(config, channels)
    except ValueError as error:
        raise UserError(f"the config in {path}: {error}") from None
    own = {key.removeprefix("student."): value for key, value in state["method"].items() if key.startswith("student.")}
    checkpoint.load_module(student, own, path)
    student.to(device).eval()
    images, classes, bad = pile(folder), state["classes"], BadImages(config.on_bad_image)
    count, temporary = 0, output.with_name(output.name + ".tmp")
    try:
        with open(temporary, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            lines = csv.writer(file)
            lines.writerow(["path", "class", "probability", "top5"])
            for x, rows in image_batches(Files(images.root, images.names), view, np.arange(len(images.names)), config.workers,
                                         device, bad):
                p = torch.softmax(student(x)[0].float(), dim=1)                         # [n, C]
                best = p.topk(min(5, len(classes)), dim=1)                              # [n, 5] each
                for row, values, places in zip(rows.tolist(), best.values.tolist(), best.indices.tolist()):
                    top = [f"{classes[c]}={value:.4f}" for value, c in zip(values, places)]
                    lines.writerow([images.names[row], classes[places[0]], f"{values[0]:.4f}", ";".join(top)])
                    count += 1
        os.replace(temporary, output)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror}; choose another place with --output") from None
    finally:
        temporary.unlink(missing_ok=True)
    for name, cause in bad.take():
        print(f"left out: {name}: {cause}")
    print(f"{count} images below {folder} classified: {output}")


if __name__ == "__main__":
    run(main)
