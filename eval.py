"""Evaluate a checkpoint, or use it: python eval.py --checkpoint checkpoints/digits/best.pth [--per-class]
[--predict DIR]

Files of the published SimMatch, SimMatchV2 and FixMatch serve as well; --export writes for other programs.
"""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch

from dataset.build import build_data, build_validation, eval_view_for_files
from dataset.imagenet import Validation
from dataset.listing import list_images
from dataset.loader import BadImages, Data, EvalLoader, ImageLoader, SplitId
from dataset.source import Files
from models import METHODS, build_network
from models.network import Network
from util import checkpoint, dist_utils, export, published_checkpoints
from util.config import Config, from_dict, to_dict, validate
from util.errors import Parser, UserError, cli_main
from util.metrics import evaluate

# Fields of the training's config that the command line of an evaluation may replace.
OVERRIDES = ("device", "data", "val", "unlabelled", "workers", "on_bad_image", "image_size")


def main(argv: Sequence[str] | None = None) -> None:
    """argv: the command line; None: this program's own."""
    parser = Parser(__doc__)
    parser.add_argument(
        "--checkpoint",
        required=True,
        type=Path,
        metavar="FILE",
        help="best.pth or last.pth of a run, or a published file",
    )
    parser.add_argument(
        "--per-class", action="store_true", help="also print the student's top-1 of each class"
    )
    parser.add_argument(
        "--predict", type=Path, metavar="DIR", help="classify all images below DIR instead, into a CSV file"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("predictions.csv"),
        metavar="FILE",
        help="where --predict writes (default: predictions.csv)",
    )
    parser.add_argument(
        "--export", type=Path, metavar="FILE", help="write the checkpoint for another program instead"
    )
    parser.add_argument("--format", choices=("published", "torchvision", "timm", "onnx"), help="for --export")
    parser.add_argument(
        "--teacher", action="store_true", help="--predict and --export use the teacher, not the student"
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    for name in OVERRIDES[1:]:
        parser.add_argument(
            f"--{name.replace('_', '-')}", help="as in train_semi.py (default: as in training)"
        )
    args = parser.parse_args(argv)
    if bool(args.export) != bool(args.format):
        raise UserError("--export FILE and --format go together")
    if args.export and args.predict:
        raise UserError("--export and --predict are two things: call eval.py once for each")
    if args.teacher and (args.format == "published" or not (args.predict or args.export)):
        raise UserError(
            "--teacher is for --predict and for exporting one network; else both are there anyway"
        )

    opened = open_checkpoint(args.checkpoint, vars(args))
    config = opened.config
    network = opened.teacher if args.teacher else opened.student
    if network is None:
        raise UserError(f"{args.checkpoint} holds no teacher")
    if args.export:
        export_to(args.export, args.format, opened, network, args.checkpoint)
        return
    device = dist_utils.dist_init(config.device, config.timeout_minutes, config.port)
    rank, world = dist_utils.rank(), dist_utils.world_size()
    if args.predict:
        if world > 1:
            raise UserError("--predict runs in one process: start it without torchrun or srun")
        predict(network.to(device), opened, args.predict, args.output, device)
        return

    data = test_images(opened, args.checkpoint, device)
    bad = BadImages(config.on_bad_image)
    networks = [net.to(device) for net in (opened.student, opened.teacher) if net is not None]
    tests = EvalLoader(data, rank, world, config.workers, device)
    results = evaluate(networks, tests.batches(bad), len(data.classes), device)
    left_out = sum(dist_utils.all_gather_object(bad.take()), [])
    dist_utils.dist_end()
    if rank > 0:
        return
    print(f"{opened.what}; {len(data.test_labels)} test images")
    for name, cause in left_out:
        print(f"left out: {name}: {cause}")
    if args.per_class:
        for name, value in zip(data.classes, results[0].per_class):
            print(f"class {name}: {value:.3f}")
    for name, result in zip(("student", "teacher"), results):
        print(f"{name}: top-1 {result.top1:.3f} %, top-5 {result.top5:.3f} %")
    print(f"* Acc@1 {results[0].top1:.3f} Acc@5 {results[0].top5:.3f}")


class Opened(NamedTuple):
    """A checkpoint of any layout, as evaluation uses it."""

    kind: str  # as told by published.recognize
    state: dict[str, Any]  # the file's content
    config: Config  # of a published file: what its tensors tell, and ImageNet
    what: str  # a line that says what it is
    classes: list[str]  # names; of a published file: numbers                               [C]
    student: Network  # both in eval mode, on the CPU
    teacher: Network | None


def open_checkpoint(path: Path, flags: dict[str, Any]) -> Opened:
    """Read a checkpoint of any layout and build its networks. flags: fields of the config that the command
    line overrides.
    """
    where = f"checkpoint {path}"
    state = checkpoint.read(path)
    kind = published_checkpoints.detect_kind(state, where)
    if kind == "moco":
        raise UserError(
            f"{where} is of MoCo and has no classifier: it is what a training starts from, by train_semi.py "
            "--moco-path"
        )
    if kind == "ours":
        state = checkpoint.check(state, path)
        values, classes, tensors = state["config"], state["classes"], state["method"]
        prefixes = ("student.", "teacher.net.")
    else:
        found, tensors, prefixes = (
            published_checkpoints.network_spec(state, where),
            published_checkpoints.tensors(state),
            ("main.", "ema."),
        )
        values = to_dict(Config(dataset="imagenet", backbone=found.backbone, cls=found.num_classes))
        classes = [str(label) for label in range(found.num_classes)]
    values = {**values, **{key: flags[key] for key in OVERRIDES if flags[key] is not None}}
    config = validate(Config(**from_dict(values, f"the config in {path}")))
    if config.cls != len(classes):
        raise UserError(f"the config in {path}: cls is {config.cls}, but there are {len(classes)} classes")
    if config.method not in METHODS:
        raise UserError(
            f"the config in {path}: unknown method {config.method!r}; known: {', '.join(METHODS)}"
        )

    networks: list[Network | None] = []
    for prefix in prefixes:
        if kind == "fixmatch" and not any(key.startswith(prefix) for key in tensors):
            networks.append(None)
            continue
        try:
            network = (
                build_network(config, channels(tensors, f"{prefix}backbone."))
                if kind == "ours"
                else Network(found.backbone, found.channels, found.num_classes, found.dim, found.norm)
            )
        except ValueError as error:
            raise UserError(f"the config in {path}: {error}") from None
        checkpoint.load_module(network, tensors, path, prefix)
        networks.append(network.eval())
    what = (
        f"{config.method}, {config.backbone}, {SplitId(*state['split'])}; step {state['step']}"
        if kind == "ours"
        else published_checkpoints.describe(state, kind, found)
    )
    return Opened(kind, state, config, what, classes, *networks)


def test_images(opened: Opened, path: Path, device: torch.device) -> Data | Validation:
    """The images that a checkpoint is evaluated on: those of its run, or, for a published one, ImageNet's
    val/ alone.
    """
    gpu = device.type == "cuda"
    if opened.kind != "ours":
        data = build_validation(opened.config, gpu)
        if len(data.classes) != len(opened.classes):
            raise UserError(
                f"{path} knows {len(opened.classes)} classes, but {data.test_images.root} has "
                f"{len(data.classes)}"
            )
        return data
    data = build_data(opened.config, gpu)
    if data.split != SplitId(*opened.state["split"]):
        raise UserError(
            f"{path} was trained on the split {SplitId(*opened.state['split'])}, but the data here give "
            f"{data.split}"
        )
    if data.classes != opened.classes:
        odd = next((a, b) for a, b in zip(opened.classes, data.classes) if a != b)
        raise UserError(f"{path} knows a class {odd[0]} where the data here have {odd[1]}")
    return data


def export_to(file: Path, form: str, opened: Opened, network: Network, path: Path) -> None:
    """Write the checkpoint read from `path`, or one network of it, to `file` for another program."""
    where, values, said = f"checkpoint {path}", network.state_dict(), opened.config.backbone
    if form == "onnx":
        content, checked = export.onnx(network, channels(values, "backbone."), opened.config.image_size)
        checkpoint.write_atomically(file, lambda out: out.write(content))
        said += f"; {checked}"
    else:
        value = (
            published_state(opened, where)
            if form == "published"
            else export.plain_resnet(values, said, where)
        )
        checkpoint.write_atomically(file, lambda out: checkpoint.write_torch(value, out))
        said += f"; {value['epoch']} whole epochs" if form == "published" else ""
    print(f"{file}: {form}, {said}")


def published_state(opened: Opened, where: str) -> dict[str, Any]:
    """What the published SimMatch loads. It counts whole epochs."""
    state, config = opened.state, opened.config
    if opened.kind != "ours":
        method, optimizer, epoch, _ = published_checkpoints.to_training_state(state, 0, where)
    elif config.method != "simmatch":
        raise UserError(f"{where} is of the method {config.method}; the published layout is for simmatch")
    else:
        method, optimizer = state["method"], state["optimizer"]
        epoch = state["step"] // state["steps_per_epoch"]
    return published_checkpoints.from_method_state(method, optimizer, epoch, where)


def channels(values: dict[str, torch.Tensor], prefix: str) -> int:
    """Of the images, from the first convolution below `prefix`; 3 where there is none, which loading then
    reports.
    """
    return next(
        (value.shape[1] for key, value in values.items() if key.startswith(prefix) and value.ndim == 4), 3
    )


@torch.no_grad()
def predict(network: Network, opened: Opened, folder: Path, output: Path, device: torch.device) -> None:
    """Classify every image below `folder`. A line of `output`: path, class, probability, the five likeliest."""
    view, _ = eval_view_for_files(opened.config, gpu=device.type == "cuda")
    images, classes, bad = list_images(folder), opened.classes, BadImages(opened.config.on_bad_image)
    count = 0

    def write(out: BinaryIO) -> None:
        nonlocal count
        file = io.TextIOWrapper(
            out, encoding="utf-8", errors="surrogateescape", newline="", write_through=True
        )
        lines = csv.writer(file)
        lines.writerow(["path", "class", "probability", "top5"])
        found = ImageLoader(
            Files(images.root, images.names),
            view,
            np.arange(len(images.names)),
            opened.config.workers,
            device,
        )
        for x, rows in found.batches(bad):
            p = torch.softmax(network(x)[0].float(), dim=1)  # [n, C]
            best = p.topk(min(5, len(classes)), dim=1)  # [n, 5] each
            for row, values, places in zip(rows.tolist(), best.values.tolist(), best.indices.tolist()):
                top = [f"{classes[c]}={value:.4f}" for value, c in zip(values, places)]
                lines.writerow([images.names[row], classes[places[0]], f"{values[0]:.4f}", ";".join(top)])
                count += 1
        file.detach()  # or it would close `out`

    checkpoint.write_atomically(output, write)
    for name, cause in bad.take():
        print(f"left out: {name}: {cause}")
    print(f"{count} images below {folder} classified: {output}")


if __name__ == "__main__":
    cli_main(main, describe_error=dist_utils.describe_lost_ranks)
