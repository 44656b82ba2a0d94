"""Export of checkpoints: the published layout, a plain ResNet for torchvision and timm, and ONNX."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from util.errors import UserError
from util.files import write_atomically
from util.formats import published_checkpoints, published_layouts, torch_files
from util.formats.opening import Contents, image_channels


def is_export(form: str) -> Callable[[Path], bool]:
    """Return a function for `util.files.check_output` that recognizes files of the layout `form`."""

    def recognizes(file: Path) -> bool:
        if form == "onnx":  # the first field is the version, the second one the name of the exporter
            with open(file, "rb") as content:
                start = content.read(32)
            return start.startswith(b"\x08") and b"pytorch" in start
        try:
            content = torch_files.load(file)
            if form == "published":
                return published_layouts.detect_kind(content) in published_checkpoints.FORMATS
        except UserError:
            return False
        return isinstance(content, dict) and {"conv1.weight", "fc.weight", "fc.bias"} <= content.keys()

    return recognizes


def write(file: Path, form: str, contents: Contents, network: nn.Module) -> str:
    """Write the checkpoint, or one network of it, to `file` in a layout. Return one line about it."""
    where, values, description = f"checkpoint {contents.path}", network.state_dict(), contents.config.backbone
    if form == "onnx":
        content, check = onnx(network, image_channels(values, "backbone."), contents.config.image_size)
        write_atomically(file, lambda out: out.write(content))
        return f"{file}: {form}, {description}; {check}"
    published = form == "published"
    value = published_state(contents, where) if published else plain_resnet(values, description, where)
    write_atomically(file, lambda out: torch_files.write(value, out))
    return f"{file}: {form}, {description}" + (f"; {value['epoch']} whole epochs" if published else "")


def published_state(contents: Contents, where: str) -> dict[str, Any]:
    """Convert the checkpoint to the layout of the published program, which counts finished epochs."""
    state, config, formats = contents.state, contents.config, published_checkpoints.FORMATS
    if contents.kind != "native":
        method, optimizer, epoch, _ = published_checkpoints.to_training_state(state, 0, where)
        best = state.get("best_acc1", 0.0), state.get("best_acc5", 0.0)
    elif config.method not in formats:
        raise UserError(
            f"{where} was trained with the method {config.method}, but the published layout is for "
            f"{' and '.join(formats)}"
        )
    else:
        method, optimizer = state["method"], state["optimizer"]
        epoch = state["step"] // state["steps_per_epoch"]
        best = state["best"].get("student_top1", 0.0), state["best"].get("student_top5", 0.0)
    scaler = state.get("scaler")
    return published_checkpoints.from_method_state(method, optimizer, epoch, where, scaler, best)


def plain_resnet(values: dict[str, Tensor], backbone: str, where: str) -> dict[str, Tensor]:
    """Return the backbone and classifier of a network's state_dict with torchvision's names, which are also
    timm's. The projection head is left out. Raises UserError if torchvision has no such network.
    """
    from torchvision.models import ResNet, get_model, list_models  # takes seconds

    classifier = {key: value for key, value in values.items() if key.startswith("fc.")}
    plain = published_layouts.below("backbone.", values) | classifier
    name = backbone.removesuffix("_encoder")
    with torch.device("meta"):
        shared = get_model(name, num_classes=len(values["fc.weight"])) if name in list_models() else None
    if not isinstance(shared, ResNet) or shared.state_dict().keys() != plain.keys():
        raise UserError(
            f"{where} has a {backbone}, which torchvision and timm do not have: use --format onnx"
        )
    channels = values["backbone.conv1.weight"].shape[1]
    if channels != 3:
        raise UserError(
            f"{where} is for images of {channels} channels; the networks of torchvision and timm need 3"
        )
    if "norm.weight" in values:
        raise UserError(
            f"{where} has a LayerNorm before its classifier, which torchvision and timm do not have"
        )
    return plain


@torch.no_grad()
def onnx(network: nn.Module, channels: int, size: int) -> tuple[bytes, str]:
    """Return (content of an ONNX file, how it was checked). The file's input is x [n, channels, size, size],
    normalized; its outputs are logits [n, C] and z [n, D].

    network: in eval mode, on the CPU. If onnxruntime is installed, its outputs are compared with the
    network's.
    """
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"--format onnx needs {' and '.join(missing)}: pip install onnx onnxscript onnxruntime"
        )
    example = torch.randn(2, channels, size, size)
    try:
        program = torch.onnx.export(
            network,
            (example,),
            dynamo=True,
            verbose=False,
            input_names=["x"],
            output_names=["logits", "z"],
            dynamic_shapes=({0: "n"},),
        )
    except torch.onnx.errors.OnnxExporterError as error:
        raise UserError(f"torch.onnx.export failed: {str(error).splitlines()[0]}") from None
    assert program is not None  # it is None only without dynamo=True
    content = program.model_proto.SerializeToString()
    if importlib.util.find_spec("onnxruntime") is None:
        return content, "not checked, because onnxruntime is not installed"
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    x = torch.randn(3, channels, size, size)
    worst = 0.0
    for expected, actual in zip(network(x), session.run(["logits", "z"], {"x": x.numpy()}), strict=True):
        worst = max(worst, ((expected - torch.from_numpy(actual)).abs().max() / expected.abs().max()).item())
    if not worst < 1e-3:
        raise UserError(
            f"onnxruntime's outputs differ from the network's by {worst:.1e} of the largest value: "
            "no file was written"
        )
    return content, f"onnxruntime's outputs differ by at most {worst:.1e} of the largest value"
