"""Evaluate a checkpoint: python eval.py --checkpoint checkpoints/digits/best.pth [--per-class]

It may also be a published SimMatch, SimMatchV2 or FixMatch checkpoint. --predict DIR classifies your own
images, and --export FILE converts the checkpoint for other programs.
"""

import argparse
import csv
import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from util.errors import Parser, UserError, cli_main, printable, start_program
from util.files import check_output, user_path, write_atomically
from util.formats import predictions

# Settings of the training run that the command line of an evaluation may override.
OVERRIDES = ("device", "data", "val", "unlabelled", "workers", "on_bad_image", "image_size")


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the flags. Raises UserError for those that do not go together."""
    parser = Parser(__doc__)
    parser.add_argument(
        "--checkpoint",
        required=True,
        type=user_path,
        metavar="FILE",
        help="best.pth or last.pth of a run, or a published checkpoint",
    )
    parser.add_argument(
        "--per-class", action="store_true", help="also print the student's top-1 accuracy of each class"
    )
    parser.add_argument(
        "--predict",
        type=user_path,
        metavar="DIR",
        help="instead classify all images below DIR and write a CSV file",
    )
    parser.add_argument(
        "--output",
        type=user_path,
        metavar="FILE",
        help=f"CSV file that --predict writes (default: {predictions.DEFAULT})",
    )
    parser.add_argument(
        "--export", type=user_path, metavar="FILE", help="instead convert the checkpoint for another program"
    )
    parser.add_argument(
        "--format",
        choices=("published", "torchvision", "timm", "onnx"),
        help="layout of the file that --export writes",
    )
    parser.add_argument(
        "--teacher", action="store_true", help="--predict and --export use the teacher instead of the student"
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    for name in OVERRIDES[1:]:
        parser.add_argument(
            f"--{name.replace('_', '-')}", help="as in train_semi.py (default: the value used in training)"
        )
    args = parser.parse_args(argv)
    if bool(args.export) != bool(args.format):
        raise UserError("--export FILE and --format need each other: give both or neither")
    if args.export and args.predict:
        raise UserError("--export and --predict cannot be combined: call eval.py once for each")
    if args.output and not args.predict:
        raise UserError("--output needs --predict DIR: an evaluation writes no file")
    if args.per_class and (args.predict or args.export):
        raise UserError("--per-class is for an evaluation: it has no effect with --predict or --export")
    if args.teacher and (args.format == "published" or not (args.predict or args.export)):
        raise UserError(
            "--teacher needs --predict or an --export of one network; otherwise both networks are used"
        )
    return args


if __name__ == "__main__":
    # Importing PyTorch takes seconds, for which --help and a wrong flag need not wait.
    start_program(lambda: parse_args(sys.argv[1:]))

import numpy as np
import torch

from dataset.build import build_data, build_validation, eval_view_for_files
from dataset.listing import list_images
from dataset.loader import EvalData, EvalLoader, ImageLoader, SplitId
from dataset.source import Files
from dataset.workers import check_shared_memory
from models import METHODS, build_network
from models.network import Network
from util import dist_utils
from util.config import Config, coerce_values, to_dict, validate
from util.formats import export, published_checkpoints
from util.run import checkpoint
from util.run.metrics import evaluate
from util.run.train_state import BadImages


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate, predict or export. argv: the flags; None: those of this process."""
    args = parse_args(sys.argv[1:] if argv is None else argv)
    if args.export:
        kind, recognizes = f"a file of --format {args.format}", export.is_export(args.format)
        file, replaces = check_output(args.export, "--export", kind, recognizes, reads=[args.checkpoint])
    elif args.predict:
        kind, recognizes = "a CSV file of predictions", predictions.is_predictions
        output = args.output or predictions.DEFAULT
        file, replaces = check_output(output, "--output", kind, recognizes, reads=[args.checkpoint])
    opened = open_checkpoint(args.checkpoint, vars(args))
    config = opened.config
    network = opened.teacher if args.teacher else opened.student
    if network is None:
        raise UserError(f"{args.checkpoint} has no teacher")
    if args.export:
        export_to(file, args.format, opened, network, args.checkpoint)
        print_line(replaces)
        return
    device = dist_utils.dist_init(config.device, config.timeout_minutes, config.port)
    rank, world = dist_utils.rank(), dist_utils.world_size()
    if args.predict:
        if world > 1:
            raise UserError("--predict runs in a single process: start it without torchrun or srun")
        predict(network.to(device), opened, args.predict, file, device, args.checkpoint)
        print_line(replaces)
        return

    data = load_test_set(opened, args.checkpoint, device)
    bad = BadImages(config.on_bad_image)
    networks = [
        checked(net.to(device), args.checkpoint)
        for net in (opened.student, opened.teacher)
        if net is not None
    ]
    eval_loader = EvalLoader(data, rank, world, config.workers, device)
    if rank == 0 and (warning := check_shared_memory()):
        print(warning, flush=True)
    results = evaluate(networks, eval_loader.batches(bad), len(data.classes), device)
    left_out = bad.take()
    dist_utils.dist_end()
    if rank > 0:
        return
    print_line(f"{opened.description}; {len(data.test_labels)} test images")
    for name, cause in left_out:
        print_line(f"left out: {name}: {cause}")
    if args.per_class:
        for name, value in zip(data.classes, results[0].per_class):
            print_line(f"class {name}: {value:.3f}")
    for name, result in zip(("student", "teacher"), results):
        print(f"{name}: top-1 {result.top1:.3f} %, top-5 {result.top5:.3f} %")
    print(f"* Acc@1 {results[0].top1:.3f} Acc@5 {results[0].top5:.3f}")


def print_line(line: str) -> None:
    """Print a line, which may have any name of a file or a class in it; nothing if it is empty."""
    if line:
        print(printable(line))


def checked(network: Network, path: Path) -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """Return `network` as a function that raises UserError if its logits are not finite: an argmax of NaN
    would look like a prediction. Finite weights can give them, such as a negative variance of BN.
    """

    def call(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits, z = network(x)  # [n, C], [n, D]
        if not torch.isfinite(logits).all():
            raise UserError(f"checkpoint {path} is damaged: its network gives logits that are not finite")
        return logits, z

    return call


class Opened(NamedTuple):
    """A checkpoint of any layout, ready for evaluation."""

    kind: str  # from published_checkpoints.detect_kind
    state: dict[str, Any]  # the content of the file
    config: Config  # of a published file: ImageNet and the detected architecture
    description: str  # one line
    classes: list[str]  # names; of a published file: numbers  [C]
    student: Network  # both networks are in eval mode and on the CPU
    teacher: Network | None


def open_checkpoint(path: Path, flags: dict[str, Any]) -> Opened:
    """Load a checkpoint of any layout and build its networks. Raises UserError if that is not possible.

    flags: of the command line; those in OVERRIDES override the checkpoint's config.
    """
    where = f"checkpoint {path}"
    state = checkpoint.load_file(path)
    kind = published_checkpoints.detect_kind(state, where)
    if kind == "moco":
        raise UserError(
            f"{where} is a MoCo checkpoint, which has no classifier: use it to start training, with "
            "train_semi.py --moco-path"
        )
    if kind == "native":
        state = checkpoint.verify(state, path)
        config = _override(state["config"], flags, path)
        classes, tensors = list(state["classes"]), state["method"]
        description = f"{config.method}, {config.backbone}, {SplitId(*state['split'])}; step {state['step']}"
        prefixes = ("student.", "teacher.net.")
    else:
        spec = published_checkpoints.network_spec(state, where)
        values = to_dict(Config(dataset="imagenet", backbone=spec.backbone, cls=spec.num_classes))
        config = _override(values, flags, path)
        classes, tensors = [str(c) for c in range(spec.num_classes)], published_checkpoints.tensors(state)
        description = published_checkpoints.describe(state, kind, spec)
        prefixes = ("main.", "ema.")
    if config.cls != len(classes):
        raise UserError(f"the config in {path}: cls is {config.cls}, but there are {len(classes)} classes")
    if config.method not in METHODS:
        raise UserError(
            f"the config in {path}: unknown method {config.method!r}; known: {', '.join(METHODS)}"
        )
    # Compared before a network of that size is built.
    weight = tensors.get(f"{prefixes[0]}head.2.weight")
    if kind == "native" and (weight is None or weight.shape[:1] != (config.dim,)):
        raise UserError(
            f"{where} has another network than its config says, which has dim {config.dim}: "
            f"{prefixes[0]}head.2.weight is {'missing' if weight is None else list(weight.shape)}"
        )

    def load_network(prefix: str) -> Network:
        try:
            if kind == "native":
                network = build_network(config, channels(tensors, f"{prefix}backbone."))
            else:
                network = Network(spec.backbone, spec.channels, spec.num_classes, spec.dim, spec.norm)
        except ValueError as error:
            raise UserError(f"the config in {path}: {error}") from None
        checkpoint.load_module(network, tensors, path, prefix)
        return network.eval()

    student, teacher = load_network(prefixes[0]), None
    if kind != "fixmatch" or any(key.startswith(prefixes[1]) for key in tensors):
        teacher = load_network(prefixes[1])
    return Opened(kind, state, config, description, classes, student, teacher)


def _override(values: dict[str, Any], flags: dict[str, Any], path: Path) -> Config:
    """Return the config with these values, overridden by the flags that are given."""
    where, given = f"the config in {path}", {key: flags[key] for key in OVERRIDES if flags[key] is not None}
    stored = coerce_values(values, where)
    try:
        validate(Config(**stored))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return validate(Config(**{**stored, **coerce_values(given, "the command line")}))


def load_test_set(opened: Opened, path: Path, device: torch.device) -> EvalData:
    """Return the images to evaluate a checkpoint on: the test images of its run, or ImageNet's val/ for a
    published one. Raises UserError if they do not match the checkpoint.
    """
    gpu = device.type == "cuda"
    if opened.kind != "native":
        val = build_validation(opened.config, gpu)
        if len(val.classes) != len(opened.classes):
            raise UserError(
                f"{path} has {len(opened.classes)} classes, but {val.test_images.root} has {len(val.classes)}"
            )
        return val
    data = build_data(opened.config, gpu)
    split = SplitId(*opened.state["split"])
    if data.split != split:
        raise UserError(f"{path} was trained on the split {split}, but the data have the split {data.split}")
    if data.classes != opened.classes:
        expected, found = next((a, b) for a, b in zip(opened.classes, data.classes) if a != b)
        raise UserError(f"{path} has a class {expected} where the data have {found}")
    return data


def export_to(file: Path, form: str, opened: Opened, network: Network, path: Path) -> None:
    """Write the checkpoint loaded from `path`, or one network of it, to `file` in the layout `form`."""
    where, values, description = f"checkpoint {path}", network.state_dict(), opened.config.backbone
    if form == "onnx":
        content, check = export.onnx(network, channels(values, "backbone."), opened.config.image_size)
        write_atomically(file, lambda out: out.write(content))
        description += f"; {check}"
    else:
        value = (
            published_state(opened, where)
            if form == "published"
            else export.plain_resnet(values, opened.config.backbone, where)
        )
        write_atomically(file, lambda out: checkpoint.write_torch(value, out))
        description += f"; {value['epoch']} whole epochs" if form == "published" else ""
    print(f"{file}: {form}, {description}")


def published_state(opened: Opened, where: str) -> dict[str, Any]:
    """Convert the checkpoint to the layout of the published SimMatch, which counts finished epochs."""
    state, config = opened.state, opened.config
    if opened.kind != "native":
        method, optimizer, epoch, _ = published_checkpoints.to_training_state(state, 0, where)
    elif config.method != "simmatch":
        raise UserError(
            f"{where} was trained with the method {config.method}, but the published layout is for simmatch"
        )
    else:
        method, optimizer = state["method"], state["optimizer"]
        epoch = state["step"] // state["steps_per_epoch"]
    return published_checkpoints.from_method_state(method, optimizer, epoch, where)


def channels(values: dict[str, torch.Tensor], prefix: str) -> int:
    """Return the number of image channels, from the first convolution below `prefix`; 3 if there is none,
    which `load_module` will report.
    """
    return next(
        (
            value.shape[1]
            for key, value in values.items()
            if key.startswith(prefix) and value.ndim == 4 and value.numel()
        ),
        3,
    )


@torch.no_grad()
def predict(
    network: Network, opened: Opened, folder: Path, output: Path, device: torch.device, path: Path
) -> None:
    """Classify every image below `folder` into a CSV file, with a network of the checkpoint `path`."""
    view, _ = eval_view_for_files(opened.config, gpu=device.type == "cuda")
    images, classes, bad = list_images(folder), opened.classes, BadImages(opened.config.on_bad_image)
    logits_of, count = checked(network, path), 0

    def write(out: BinaryIO) -> None:
        nonlocal count
        file = io.TextIOWrapper(
            out, encoding="utf-8", errors="surrogateescape", newline="", write_through=True
        )
        lines = csv.writer(file)
        lines.writerow(predictions.COLUMNS)
        loader = ImageLoader(
            Files(images.root, images.names),
            view,
            np.arange(len(images.names)),
            opened.config.workers,
            device,
        )
        if warning := check_shared_memory():
            print(warning, flush=True)
        for x, rows in loader.batches(bad):
            p = torch.softmax(logits_of(x)[0].float(), dim=1)  # [n, C]
            best = p.topk(min(5, len(classes)), dim=1)  # [n, 5] each
            for row, values, labels in zip(rows.tolist(), best.values.tolist(), best.indices.tolist()):
                lines.writerow(predictions.row(images.names[row], [classes[c] for c in labels], values))
                count += 1
        file.detach()  # otherwise it would close `out`

    write_atomically(output, write)
    for name, cause in bad.take():
        print_line(f"left out: {name}: {cause}")
    print_line(predictions.note_other_encodings(images.names))
    print_line(f"{count} images below {folder} classified: {output}")


if __name__ == "__main__":
    cli_main(main, describe_error=dist_utils.describe_lost_ranks)
