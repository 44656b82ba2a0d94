"""Copies to the training device for which the CPU does not wait."""

import torch
from torch import Tensor


def copy_async(x: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor on the CPU to `device`: a GPU copies it when its earlier work is done, and this function
    returns before.

    Only memory that is pinned and contiguous can be copied without waiting, so `x` is made so first if it is
    not. The loader pins its batches.
    """
    if device.type == "cuda":
        x = x.contiguous().pin_memory()
    return x.to(device, non_blocking=True)
