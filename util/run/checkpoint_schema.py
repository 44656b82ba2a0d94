"""Which values a checkpoint may have. Its file is not trusted: it may be damaged, or made by hand."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from util.errors import UserError

FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}  # may be converted to one another
MAX_STEP_IMAGES = 2**20  # labeled images of a step; more are a damaged number and would cost memory


def _count(least: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and least <= value < 2**40


def is_number(value: Any) -> bool:
    """Return whether `value` is a finite number, and no bool."""
    return type(value) is float and math.isfinite(value) or type(value) is int and abs(value) < 2**63


def is_dict(value: Any, is_value: Callable[[Any], bool] = lambda value: True) -> bool:
    """Return whether `value` is a dict whose keys are strings, and whose values have the type."""
    return isinstance(value, dict) and all(isinstance(k, str) and is_value(v) for k, v in value.items())


def is_list(value: Any, is_part: Callable[[Any], bool], length: int | None = None) -> bool:
    """Return whether `value` is a list or a tuple, of this length, whose parts have the type."""
    return isinstance(value, (list, tuple)) and length in (None, len(value)) and all(map(is_part, value))


def _is_str(value: Any) -> bool:
    return isinstance(value, str)


def _is_setting(value: Any) -> bool:
    return type(value) in (str, int, float, bool) or is_list(value, lambda part: type(part) is int)


# Every key of a checkpoint, and whether a value is valid.
KEYS: dict[str, Callable[[Any], bool]] = {
    "config": lambda value: is_dict(value, _is_setting),
    "step": _count(0),
    "world": _count(1),  # ranks of a step
    "processes": _count(1),
    "batch_size": _count(1),  # labeled images of a rank
    "steps_per_epoch": _count(1),
    "best": lambda value: is_dict(value, is_number),
    "split": lambda value: is_list(value, _is_str, length=2),
    "data": _is_str,  # fingerprint of the images
    "classes": lambda value: is_list(value, _is_str) and len(value) > 0,
    "method": lambda value: is_dict(value, lambda part: isinstance(part, torch.Tensor)),
    "optimizer": is_dict,
    "scaler": lambda value: is_dict(value, is_number),
    "meter": is_dict,
    "bad_images": lambda value: is_list(value, lambda pair: is_list(pair, _is_str, length=2)),
}


def check_values(content: Any, path: Path) -> None:
    """Raise UserError unless all tensors are plain ones, whose elements are all in the file. A damaged or
    forged file may have a tensor with more elements than any memory, or lists in endless lists.
    """
    parts, count = [(content, 0)], 0
    while parts:
        value, depth = parts.pop()
        count += 1
        if depth > 50 or count > 10**7:
            raise UserError(f"checkpoint {path} is damaged: its values are nested too deeply")
        if isinstance(value, dict):
            parts += [(part, depth + 1) for part in value.values()]
        elif isinstance(value, (list, tuple)):
            parts += [(part, depth + 1) for part in value]
        elif isinstance(value, torch.Tensor) and not (
            value.layout is torch.strided
            and value.device.type == "cpu"
            and not value.is_quantized
            and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
        ):
            raise UserError(
                f"checkpoint {path} is damaged or of another program: a tensor of {describe_shape(value)} is "
                "sparse, quantized, or without its data"
            )


def first_not_finite(values: dict[str, torch.Tensor]) -> str | None:
    """Return the name of the first tensor with a NaN or an infinite value, or None.

    Training waits for this check. It therefore reads every tensor once and synchronizes with a GPU once: all
    values of a tensor are finite if and only if its minimum and its maximum are.
    """
    floating = {name: value for name, value in values.items() if value.is_floating_point() and value.numel()}
    if not floating:
        return None
    extremes = torch.stack(
        [end for value in floating.values() for end in torch.aminmax(value.detach())]
    )  # [2·tensors]
    finite = torch.isfinite(extremes).view(-1, 2).all(dim=1).tolist()
    return next((name for name, fine in zip(floating, finite) if not fine), None)


def check_sgd_state(saved: Any, parameters: Sequence[torch.Tensor], where: str) -> None:
    """Raise UserError unless `saved` is the state_dict of an SGD over these parameters, in this order.

    where: the checkpoint, in words.
    """
    if not is_sgd_state(saved):
        raise UserError(f"{where} has no valid 'optimizer'")
    numbers = [k for group in saved["param_groups"] for k in group["params"]]
    if numbers != list(range(len(parameters))):
        raise UserError(
            f"{where} has an optimizer with {len(numbers)} parameters, but a student with {len(parameters)}"
        )
    for k, value in saved["state"].items():
        momentum = value.get("momentum_buffer")
        if momentum is None:
            continue
        if not 0 <= k < len(parameters) or momentum.shape != parameters[k].shape:
            raise UserError(f"{where} has an optimizer whose momentum {k} is {describe_shape(momentum)}")
        if first_not_finite({"": momentum}) is not None:
            raise UserError(f"{where} has an optimizer whose momentum {k} is not finite")


def is_sgd_state(value: Any) -> bool:
    """Return whether `value` has the structure of an SGD's state_dict."""
    return (
        is_dict(value)
        and is_list(value.get("param_groups"), _is_sgd_group)
        and isinstance(value.get("state"), dict)
        and all(type(k) is int and _is_sgd_buffer(part) for k, part in value["state"].items())
    )


def _is_sgd_group(value: Any) -> bool:
    return (
        is_dict(value)
        and is_list(value.get("params"), lambda part: type(part) is int)
        and all(is_number(value.get(key)) for key in ("lr", "momentum", "dampening", "weight_decay"))
        and all(
            type(option) in (int, float, bool, type(None)) for key, option in value.items() if key != "params"
        )
    )


def _is_sgd_buffer(value: Any) -> bool:
    momentum = value.get("momentum_buffer") if is_dict(value) else 0
    return momentum is None or isinstance(momentum, torch.Tensor) and momentum.dtype in FLOATS


def first_three(wrong: list[str]) -> str:
    """Join the first three entries of a list for a message, with the number of the others."""
    return "; ".join(wrong[:3]) + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else "")


def describe_shape(value: Any) -> Any:
    return list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__


def describe_dtype(value: torch.Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")
