"""Which values a checkpoint may have. Its file is not trusted: it may be damaged, or made by hand."""

import math
from collections.abc import Callable, Mapping
from types import UnionType
from typing import Annotated, Any, get_args, get_origin

import torch
from torch import Tensor

from util.errors import UserError

FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}  # may be converted to one another

# Every key of a checkpoint, and the type that `conforms` requires. An evaluation needs no more; what only a
# resumed run needs is below. `TrainState` and `RunIdentity` say what the values mean.
KEYS: dict[str, Any] = {
    "config": dict[str, str | bool | float | list[float]],
    "step": int,
    "world": Annotated[int, 1],
    "processes": Annotated[int, 1],
    "batch_size": Annotated[int, 1],
    "steps_per_epoch": Annotated[int, 1],
    "best": dict[str, float],
    "split": tuple[str, str],
    "data": str,
    "classes": Annotated[list[str], 1],
    "method": dict[str, Tensor],
    "optimizer": dict[str, Any],
    "scaler": dict[str, float],
    "meter": dict[str, Any],
    "bad_images": list[tuple[str, str]],
}
METER = {"names": list[str], "steps": list[int], "rows": Tensor, "counts": Tensor | None}
# Of torch.optim.SGD, also in published files.
SGD_GROUP = {"params": list[int], "lr": float, "momentum": float, "dampening": float, "weight_decay": float}
SGD = {
    "state": dict[int, dict[str, Tensor | None]],  # the number of a parameter -> its momentum_buffer
    "param_groups": list[dict[str, bool | float | None | list[int]]],
}


def conforms(value: Any, kind: Any) -> bool:
    """Return whether `value` has the type `kind`, at any depth.

    An int is not negative, a float is any finite number, and neither is a bool. A list may be a tuple, and a
    tuple a list. Annotated[kind, n] is a number of at least n, or a list of at least n entries. A dict of
    types describes a dict that may have further keys, and None may be missing.
    """
    origin, args = get_origin(kind), get_args(kind)
    if isinstance(kind, dict):
        return isinstance(value, dict) and all(conforms(value.get(key), kind[key]) for key in kind)
    if kind is int:
        return type(value) is int and 0 <= value < 2**40
    if kind is float:
        return type(value) is float and math.isfinite(value) or type(value) is int and abs(value) < 2**63
    if origin is Annotated:
        return conforms(value, args[0]) and (value if args[0] is int else len(value)) >= args[1]
    if origin is UnionType:
        return any(conforms(value, part) for part in args)
    if origin is dict:
        return isinstance(value, dict) and conforms([*value.items()], list[tuple[args]])  # type: ignore[valid-type]
    if origin is list:
        return isinstance(value, (list, tuple)) and all(conforms(part, args[0]) for part in value)
    if origin is tuple:
        return conforms(value, list[Any]) and len(value) == len(args) and all(map(conforms, value, args))
    return kind is Any or isinstance(value, kind)


def first_not_finite(values: dict[str, Tensor]) -> str | None:
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


def is_sgd_state(value: Any) -> bool:
    """Return whether `value` has the structure of an SGD's state_dict."""
    return conforms(value, SGD) and all(conforms(group, SGD_GROUP) for group in value["param_groups"])


def check_sgd_state(saved: Any, parameters: Mapping[str, Tensor], where: str) -> None:
    """Raise UserError unless `saved` is the state_dict of an SGD over these parameters, in this order.

    where: the checkpoint, in words.
    """
    if not is_sgd_state(saved):
        raise UserError(f"{where} has no valid 'optimizer'")
    names = list(parameters)
    numbers = [k for group in saved["param_groups"] for k in group["params"]]
    if numbers != list(range(len(names))):
        raise UserError(
            f"{where} has an optimizer with {len(numbers)} parameters, but a student with {len(names)}"
        )
    for k, buffers in saved["state"].items():
        momentum, name = buffers.get("momentum_buffer"), names[k] if k < len(names) else "the teacher"
        if momentum is None:
            continue
        if k >= len(names) or momentum.shape != parameters[name].shape or momentum.dtype not in FLOATS:
            found = describe_tensor(momentum)
            raise UserError(f"{where} has an optimizer whose momentum for {name} is {found}")
        if first_not_finite({name: momentum}) is not None:
            raise UserError(f"{where} has an optimizer whose momentum for {name} is not finite")


def first_three(wrong: list[str]) -> str:
    """Join the first three entries of a list for a message, with the number of the others."""
    return "; ".join(wrong[:3]) + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else "")


def mismatches(
    values: dict[str, Any], expected: dict[str, Tensor], describe: Callable[[Any], str]
) -> list[str]:
    """Return what distinguishes the keys and the descriptions of `values` from those of `expected`."""
    return [
        *(f"{key} is missing" for key in expected if key not in values),
        *(f"{key} is unknown" for key in values if key not in expected),
        *(
            f"{key} is {describe(values[key])}, not {describe(own)}"
            for key, own in expected.items()
            if key in values and describe(values[key]) != describe(own)
        ),
    ]


def describe_shape(value: Any) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def describe_dtype(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def describe_tensor(value: Tensor) -> str:
    return f"{describe_shape(value)} {describe_dtype(value)}"
