"""Evaluate a checkpoint: python eval.py --checkpoint checkpoints/digits/best.pth [--per-class]"""
from pathlib import Path

import torch

from dataset import build_data
from dataset.loader import evaluation_batches
from models import build_method
from util import checkpoint, dist_utils
from util.config import Config, from_dict, validate
from util.errors import Parser, UserError, run
from util.metrics import evaluate


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--checkpoint", required=True, type=Path, metavar="FILE", help="best.pth or last.pth of a run")
    parser.add_argument("--per-class", action="store_true", help="also print the student's top-1 of each class")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    args = parser.parse_args()

    state = checkpoint.load(args.checkpoint)
    config = validate(Config(**from_dict(state["config"], f"the config in {args.checkpoint}")))
    device = dist_utils.dist_init(args.device)
    data = build_data(config)
    if data.split != state["split"]:
        raise UserError(f"{args.checkpoint} was trained on the split {state['split']!r}, but the data here give "
                        f"{data.split!r}")
    labels = torch.from_numpy(data.labels[data.labelled])
    try:
        method = build_method(config, data.channels, labels)
    except ValueError as error:
        raise UserError(f"the config in {args.checkpoint}: {error}") from None
    checkpoint.load_module(method, state["method"], args.checkpoint)
    method.to(device).eval()

    print(f"{config.method}, {config.backbone}, {data.split}; step {state['step']}; {len(data.test_labels)} test images")
    student = evaluate(method.student, evaluation_batches(data), len(data.classes), device)
    teacher = evaluate(method.teacher.net, evaluation_batches(data), len(data.classes), device)
    if args.per_class:
        for name, value in zip(data.classes, student.per_class):
            print(f"class {name}: {value:.3f}")
    for name, result in (("student", student), ("teacher", teacher)):
        print(f"{name}: top-1 {result.top1:.3f} %, top-5 {result.top5:.3f} %")
    print(f"* Acc@1 {student.top1:.3f} Acc@5 {student.top5:.3f}")


if __name__ == "__main__":
    run(main)
