"""Export of networks: a plain ResNet that torchvision and timm can load, and ONNX."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from util.errors import UserError
from util.formats import published_checkpoints
from util.run import checkpoint

# torchvision and timm have these, too.
SHARED_RESNETS = (
    "resnet18_encoder",
    "resnet34_encoder",
    "resnet50_encoder",
    "resnet101_encoder",
)


def is_export(form: str) -> Callable[[Path], bool]:
    """Return a function for `util.files.check_output` that recognizes files of the layout `form`."""

    def recognizes(file: Path) -> bool:
        if form == "onnx":  # the first field is the version, the second one the name of the exporter
            with open(file, "rb") as content:
                start = content.read(32)
            return start.startswith(b"\x08") and b"pytorch" in start
        try:
            content = checkpoint.load_file(file)
            if form == "published":
                return published_checkpoints.detect_kind(content) == "simmatch"
        except UserError:
            return False
        return isinstance(content, dict) and {"conv1.weight", "fc.weight", "fc.bias"} <= content.keys()

    return recognizes


def plain_resnet(values: dict[str, Tensor], backbone: str, where: str) -> dict[str, Tensor]:
    """Return the backbone and classifier of a network's state_dict with torchvision's names, which are also
    timm's. The projection head is left out. Raises UserError if torchvision has no such network.
    """
    if backbone not in SHARED_RESNETS:
        raise UserError(
            f"{where} has a {backbone}, which torchvision and timm do not have; they have "
            f"{', '.join(SHARED_RESNETS)}"
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
    return {
        key.removeprefix("backbone."): value
        for key, value in values.items()
        if key.startswith(("backbone.", "fc."))
    }


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
