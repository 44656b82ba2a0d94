"""What the methods keep between steps, in buffers: bank, queue, and the priors of distribution alignment."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LabelBank(nn.Module):
    """One embedding and one label for every labeled image (paper, section 3.4).

    z [K, D]: unit vectors. labels [K]: known from the labeled list. Row i belongs to image i of that list.
    m: the share of the old row that a write keeps. With m = 0 a row holds the newest embedding, and a random
    unit vector before its first write. With m > 0 a row is a temporal ensemble that starts at zero, so that
    the first write sets it to the embedding itself: a random start would stay in the average as noise.
    """

    def __init__(self, labels: Tensor, dim: int, m: float = 0.0):
        super().__init__()
        z = torch.zeros(len(labels), dim) if m > 0 else F.normalize(torch.randn(len(labels), dim), dim=1)
        self.z: Tensor
        self.labels: Tensor
        self.register_buffer("z", z)  # [K, D]
        self.register_buffer("labels", labels.clone().long())  # [K]
        self.m = m

    @torch.no_grad()
    def write(self, index: Tensor, z: Tensor, y: Tensor) -> None:
        """Update rows: z[index] ← normalize(m·z[index] + (1 − m)·new z), labels[index] ← y.

        index [n], z [n, D], unit vectors, y [n]: those of all ranks. If an index occurs more than once,
        its last row wins, on every device and rank.
        """
        position = torch.arange(len(index), device=index.device)  # [n]
        last = ((index[:, None] == index) * position).amax(dim=1)  # [n]
        rows = z[last].to(self.z.dtype)  # [n, D]
        if self.m > 0:
            rows = F.normalize(self.m * self.z[index] + (1 - self.m) * rows, dim=1)  # [n, D]
        self.z[index] = rows
        self.labels[index] = y[last]


class DistributionAlignment(nn.Module):
    """Divides predictions on weak views by their recent mean, the prior (ReMixMatch, arXiv 1911.09785).

    ring [da_len, C]: a ring buffer with one global-batch mean in each row; it starts as zeros. Zero rows only
    scale the mean of the ring, and the renormalization cancels that.
    """

    def __init__(self, num_classes: int, length: int):
        super().__init__()
        self.ring: Tensor
        self.ptr: Tensor
        self.register_buffer("ring", torch.zeros(length, num_classes))  # [da_len, C]
        self.register_buffer("ptr", torch.zeros(1, dtype=torch.long))  # [1]

    def forward(self, log_p: Tensor, mean: Tensor) -> Tensor:
        """log p [n, C] -> log of the renormalized p / prior [n, C]. The ring does not change.

        mean [C]: the mean of p over the global batch of this step. The prior includes it, as if it were
        already in the ring.
        """
        prior = self.prior(mean)  # [C]
        # p can underflow on a class, whose prior is then 0: keep its log finite.
        tiny = torch.finfo(prior.dtype).tiny
        return torch.log_softmax(log_p - prior.clamp_min(tiny).log(), dim=1)  # [n, C]

    def prior(self, mean: Tensor) -> Tensor:
        """Return the prior [C]: the mean of the ring with this step's `mean` [C] in it. Its sum is 1 once the
        ring is full.
        """
        return self._ring_with(mean).mean(dim=0)

    @torch.no_grad()
    def write(self, mean: Tensor) -> None:
        """Write this step's mean of p over the global batch, [C], into the ring."""
        self.ring.copy_(self._ring_with(mean))
        self.ptr.copy_((self.ptr + 1) % len(self.ring))

    def _ring_with(self, mean: Tensor) -> Tensor:
        is_current = torch.arange(len(self.ring), device=self.ptr.device) == self.ptr  # [da_len]
        return torch.where(is_current[:, None], mean.to(self.ring.dtype), self.ring)  # [da_len, C]


class Queue(nn.Module):
    """The newest unlabeled images, first in, first out: the nodes that the edges lead to (SimMatchV2).

    z [R, D]: unit vectors, random until a row is written. p [R, C]: class distributions, zeros until then.
    ptr [1]: the row that is written next. filled: the number of written rows; it is not a buffer, so that no
    step waits for the device to know it.
    """

    def __init__(self, rows: int, dim: int, num_classes: int):
        super().__init__()
        self.z: Tensor
        self.p: Tensor
        self.ptr: Tensor
        self.register_buffer("z", F.normalize(torch.randn(rows, dim), dim=1))  # [R, D]
        self.register_buffer("p", torch.zeros(rows, num_classes))  # [R, C]
        self.register_buffer("ptr", torch.zeros(1, dtype=torch.long))  # [1]
        self.filled = 0

    @torch.no_grad()
    def write(self, z: Tensor, p: Tensor) -> None:
        """Replace the oldest rows. z [n, D], p [n, C]: of all ranks, n ≤ R."""
        rows = (self.ptr + torch.arange(len(z), device=self.ptr.device)) % len(self.z)  # [n]
        self.z[rows] = z.to(self.z.dtype)
        self.p[rows] = p.to(self.p.dtype)
        self.ptr.copy_((self.ptr + len(z)) % len(self.z))
        self.filled = min(self.filled + len(z), len(self.z))

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.filled = int((self.p.sum(dim=1) > 0).sum())


class EMAPrior(nn.Module):
    """Distribution alignment by a moving average of the mean predictions (SimMatchV2).

    da [C]: the prior; it starts as the uniform distribution.
    """

    def __init__(self, num_classes: int, m: float):
        super().__init__()
        self.da: Tensor
        self.register_buffer("da", torch.ones(num_classes) / num_classes)  # [C]
        self.m = m

    def forward(self, log_p: Tensor) -> Tensor:
        """log p [n, C] -> log of the renormalized p / da [n, C]."""
        tiny = torch.finfo(self.da.dtype).tiny
        return torch.log_softmax(log_p - self.da.clamp_min(tiny).log(), dim=1)  # [n, C]

    @torch.no_grad()
    def write(self, mean: Tensor) -> None:
        """Average this step's mean of p over the global batch, [C], into the prior."""
        self.da.lerp_(mean.to(self.da.dtype), 1 - self.m)
