"""Evaluate a checkpoint: python eval.py --checkpoint checkpoints/digits/best.pth [--per-class]

It may also be a published SimMatch, SimMatchV2 or FixMatch checkpoint. --predict DIR classifies your own
images, and --export FILE converts the checkpoint for other programs.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from util.errors import Parser, UserError, cli_main, printable, start_program
from util.files import check_output, user_path
from util.formats import predictions

# Settings of the training run that the command line of an evaluation may override.
OVERRIDES = ("device", "data", "val", "unlabelled", "workers", "on_bad_image", "image_size")


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the flags. Raises UserError for those that do not go together."""
    parser = Parser(__doc__)
    for name, metavar, words in (
        ("checkpoint", "FILE", "best.pth or last.pth of a run, or a published checkpoint"),
        ("predict", "DIR", "instead classify all images below DIR and write a CSV file"),
        ("output", "FILE", f"CSV file that --predict writes (default: {predictions.DEFAULT})"),
        ("export", "FILE", "instead convert the checkpoint for another program"),
    ):
        required = name == "checkpoint"
        parser.add_argument(f"--{name}", required=required, type=user_path, metavar=metavar, help=words)
    layouts = ("published", "torchvision", "timm", "onnx")
    parser.add_argument("--format", choices=layouts, help="layout of the file that --export writes")
    for name, words in (
        ("per-class", "also print the student's top-1 accuracy of each class"),
        ("teacher", "--predict and --export use the teacher instead of the student"),
    ):
        parser.add_argument(f"--{name}", action="store_true", help=words)
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
from dataset.eval_loader import EvalLoader, ImageLoader
from dataset.listing import list_images
from dataset.loader import Data, EvalData, SplitId
from dataset.workers import check_shared_memory
from models import METHODS, build_network
from models.network import BACKBONES, Network
from util import dist_utils
from util.formats import export
from util.formats.opening import Contents, image_channels, read_checkpoint
from util.run import checkpoint
from util.run.metrics import count_hits, join_hits
from util.run.train_state import BadImages


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate, predict or export. argv: the flags; None: those of this process."""
    args = parse_args(sys.argv[1:] if argv is None else argv)
    overrides = {name: value for name in OVERRIDES if (value := getattr(args, name)) is not None}
    if not args.export and not args.predict:
        evaluate_checkpoint(args.checkpoint, overrides, args.per_class)
        return
    if args.export:
        output, flag = args.export, "--export"
        kind, recognizes = f"a file of --format {args.format}", export.is_export(args.format)
    else:
        output, flag = args.output or predictions.DEFAULT, "--output"
        kind, recognizes = "a CSV file of predictions", predictions.is_predictions
    file, replaces = check_output(output, flag, kind, recognizes, reads=[args.checkpoint])
    contents, networks = open_checkpoint(args.checkpoint, overrides)
    if args.teacher and not contents.teacher:
        raise UserError(f"{args.checkpoint} has no teacher")
    network = networks[args.teacher]
    if args.export:
        print(export.write(file, args.format, contents, network))
    else:
        predict(contents, network, args.predict, file)
    print_line(replaces)


def evaluate_checkpoint(path: Path, overrides: Mapping[str, Any], per_class: bool = False) -> None:
    """Print the accuracies of a checkpoint of any layout, on all ranks together. Raises UserError.

    overrides: values of the settings in OVERRIDES that replace those of the training run.
    per_class: also print the student's accuracy of each class.
    """
    contents, networks = open_checkpoint(path, {"device": "auto", **overrides})
    config = contents.config
    device = dist_utils.dist_init(config.device, config.timeout_minutes, config.port)
    rank, world = dist_utils.rank(), dist_utils.world_size()
    data = load_test_set(contents, device)
    bad = BadImages(config.on_bad_image)
    classifiers = [checked(network.to(device), path) for network in networks]
    eval_loader = EvalLoader(data, rank, world, config.workers, device)
    if rank == 0 and (warning := check_shared_memory()):
        print(warning, flush=True)
    results = join_hits(count_hits(classifiers, eval_loader.batches(bad), len(data.classes), device))
    left_out = bad.take()
    dist_utils.dist_end()
    if rank > 0:
        return
    print_line(f"{contents.description}; {len(data.test_labels)} test images")
    for name, cause in left_out:
        print_line(f"left out: {name}: {cause}")
    if per_class:
        for name, value in zip(data.classes, results[0].per_class):
            print_line(f"class {name}: {value:.3f}")
    for name, result in zip(("student", "teacher"), results):
        print(f"{name}: top-1 {result.top1:.3f} %, top-5 {result.top5:.3f} %")
    print(f"* Acc@1 {results[0].top1:.3f} Acc@5 {results[0].top5:.3f}")


def print_line(line: str) -> None:
    """Print a line, which may have any name of a file or a class in it; nothing if it is empty."""
    if line:
        print(printable(line))


def open_checkpoint(path: Path, overrides: Mapping[str, Any]) -> tuple[Contents, list[Network]]:
    """Load a checkpoint of any layout and build its student and, if it has one, its teacher, in eval mode
    and on the CPU. Raises UserError if that is not possible.
    """
    contents = read_checkpoint(path, overrides, BACKBONES)
    config, spec = contents.config, contents.spec
    if config.method not in METHODS:
        raise UserError(
            f"the config in {path}: unknown method {config.method!r}; known: {', '.join(METHODS)}"
        )
    networks = []
    for prefix in filter(None, (contents.student, contents.teacher)):
        try:
            if spec is None:
                channels = image_channels(contents.tensors, f"{prefix}backbone.")
                network = build_network(config, channels)
            else:
                network = Network(config.backbone, spec.channels, spec.num_classes, spec.dim, spec.norm)
        except ValueError as error:
            raise UserError(f"the config in {path}: {error}") from None
        checkpoint.load_module(network, contents.tensors, path, prefix)
        networks.append(network.eval())
    return contents, networks


def load_test_set(contents: Contents, device: torch.device) -> Data | EvalData:
    """Return the images to evaluate a checkpoint on: the test images of its run, or ImageNet's val/ for a
    published one. Raises UserError if they do not match the checkpoint.
    """
    gpu, path, classes = device.type == "cuda", contents.path, contents.classes
    if contents.spec:
        val = build_validation(contents.config, gpu)
        if len(val.classes) != len(classes):
            raise UserError(
                f"{path} has {len(classes)} classes, but {val.test_images.root} has {len(val.classes)}"
            )
        return val
    data = build_data(contents.config, gpu)
    split = SplitId(*contents.state["split"])
    if data.split != split:
        raise UserError(f"{path} was trained on the split {split}, but the data have the split {data.split}")
    if data.classes != classes:
        expected, found = next((a, b) for a, b in zip(classes, data.classes) if a != b)
        raise UserError(f"{path} has a class {expected} where the data have {found}")
    return data


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


@torch.no_grad()
def predict(contents: Contents, network: Network, folder: Path, output: Path) -> None:
    """Classify every image below `folder` into a CSV file, with a network of the checkpoint."""
    config = contents.config
    device = dist_utils.dist_init(config.device, config.timeout_minutes, config.port)
    if dist_utils.world_size() > 1:
        raise UserError("--predict runs in a single process: start it without torchrun or srun")
    view = eval_view_for_files(config, gpu=device.type == "cuda")
    images, bad = list_images(folder), BadImages(config.on_bad_image)
    logits_of = checked(network.to(device), contents.path)

    def predicted() -> Iterator[tuple[str, list[float], list[int]]]:
        loader = ImageLoader(images, view, np.arange(len(images)), config.workers, device)
        if warning := check_shared_memory():
            print(warning, flush=True)
        for x, rows in loader.batches(bad):
            p = torch.softmax(logits_of(x)[0].float(), dim=1)  # [n, C]
            best = p.topk(min(5, len(contents.classes)), dim=1)  # [n, 5] each
            names = map(images.names.__getitem__, rows.tolist())
            yield from zip(names, best.values.tolist(), best.indices.tolist())

    count = predictions.write(output, contents.classes, predicted())
    for name, cause in bad.take():
        print_line(f"left out: {name}: {cause}")
    print_line(predictions.note_other_encodings(images.names))
    print_line(f"{count} images below {folder} classified: {output}")


if __name__ == "__main__":
    cli_main(main, describe_error=dist_utils.describe_lost_ranks)
