"""Copies to the training device for which the CPU does not wait."""

import torch
from torch import Tensor


def copy_async(x: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor from the CPU to `device`. A GPU may copy it later, before the next work that it is given.

    Only a copy from pinned and contiguous memory lets the CPU go on at once. The loader returns its batches
    in such memory; other tensors are copied there first.
    """
    if device.type == "cuda":
        x = x.contiguous().pin_memory()
    return x.to(device, non_blocking=True)
