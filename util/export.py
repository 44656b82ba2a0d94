"""Networks written for other programs: a plain ResNet, as torchvision and timm load it, and ONNX."""

import importlib.util

import torch
from torch import Tensor, nn

from util.errors import UserError

SHARED_RESNETS = (
    "resnet18_encoder",
    "resnet34_encoder",
    "resnet50_encoder",
    "resnet101_encoder",
)  # torchvision's and timm's own


def plain_resnet(values: dict[str, Tensor], backbone: str, where: str) -> dict[str, Tensor]:
    """Backbone and classifier of a network's state_dict, under torchvision's names, which are timm's too; no
    head.
    """
    if backbone not in SHARED_RESNETS:
        raise UserError(
            f"{where} holds a {backbone}, which torchvision and timm do not have; they have {', '.join(SHARED_RESNETS)}"
        )
    channels = values["backbone.conv1.weight"].shape[1]
    if channels != 3:
        raise UserError(
            f"{where} is for images of {channels} channels; torchvision's and timm's networks are for 3"
        )
    if "norm.weight" in values:
        raise UserError(
            f"{where} has a LayerNorm before its classifier, which torchvision's and timm's networks do not have"
        )
    return {
        key.removeprefix("backbone."): value
        for key, value in values.items()
        if key.startswith(("backbone.", "fc."))
    }


@torch.no_grad()
def onnx(network: nn.Module, channels: int, size: int) -> tuple[bytes, str]:
    """(an ONNX file's content, how it was checked): x [n, channels, size, size], normalized -> logits [n, C],
    z [n, D].

    network: in eval mode, on the CPU. Where onnxruntime is there, its outputs are compared with the
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
        raise UserError(f"torch.onnx.export fails: {str(error).splitlines()[0]}") from None
    content = program.model_proto.SerializeToString()
    if importlib.util.find_spec("onnxruntime") is None:
        return content, "not checked, since onnxruntime is not installed"
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    x = torch.randn(3, channels, size, size)
    worst = 0.0
    for own, theirs in zip(network(x), session.run(["logits", "z"], {"x": x.numpy()}), strict=True):
        worst = max(worst, ((own - torch.from_numpy(theirs)).abs().max() / own.abs().max()).item())
    if not worst < 1e-3:
        raise UserError(
            f"onnxruntime's outputs differ from the network's by {worst:.1e} of the largest: nothing is written"
        )
    return content, f"onnxruntime's outputs differ by at most {worst:.1e} of the largest"
