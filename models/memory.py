"""What SimMatch remembers between steps: the labeled bank and the prior of distribution alignment, all as
buffers.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LabelBank(nn.Module):
    """One embedding and one label for every labeled image (paper, section 3.4).

    z [K, D]: unit rows. labels [K]: known from the labeled list. A row's index is the image's place in that
    list.
    m: share of the old row that a write keeps. m = 0: a row is the newest embedding, random until written. m
    > 0: a temporal ensemble, zero until written, so that its first write is the embedding itself, and no
    noise lingers in it.
    """

    def __init__(self, labels: Tensor, dim: int, m: float = 0.0):
        super().__init__()
        z = torch.zeros(len(labels), dim) if m > 0 else F.normalize(torch.randn(len(labels), dim), dim=1)
        self.register_buffer("z", z)  # [K, D]
        self.register_buffer("labels", labels.clone().long())  # [K]
        self.m = m

    @torch.no_grad()
    def write(self, index: Tensor, z: Tensor, y: Tensor) -> None:
        """bank[index] = normalize(m·bank[index] + (1 − m)·z), labels[index] = y: index, y [n]; z [n, D], unit
        rows.

        For the labeled images of all ranks. Where an index stands more than once, its last row wins, on
        every device and rank.
        """
        place = torch.arange(len(index), device=index.device)  # [n]
        last = ((index[:, None] == index) * place).amax(dim=1)  # [n]
        rows = z[last].to(self.z.dtype)  # [n, D]
        if self.m > 0:
            rows = F.normalize(self.m * self.z[index] + (1 - self.m) * rows, dim=1)  # [n, D]
        self.z[index] = rows
        self.labels[index] = y[last]


class DistributionAlignment(nn.Module):
    """Divides predictions on weak views by their recent mean (ReMixMatch, arXiv 1911.09785), over a ring of
    steps.

    ring [da_len, C]: one global-batch mean a row, zeros at the start. Zero rows only scale the mean of the
    ring, and renormalizing takes that out again.
    """

    def __init__(self, num_classes: int, length: int):
        super().__init__()
        self.register_buffer("ring", torch.zeros(length, num_classes))  # [da_len, C]
        self.register_buffer("ptr", torch.zeros(1, dtype=torch.long))  # [1]

    def forward(self, log_p: Tensor, mean: Tensor) -> Tensor:
        """log p [n, C] -> log of p / prior, each row renormalized [n, C]. Writes nothing.

        mean [C]: of p over the global batch; it counts in the prior as if it were in the ring already.
        """
        prior = self.prior(mean)  # [C]
        tiny = torch.finfo(
            prior.dtype
        ).tiny  # a class that p underflows on has a prior of 0: keep its log finite
        return torch.log_softmax(log_p - prior.clamp_min(tiny).log(), dim=1)  # [n, C]

    def prior(self, mean: Tensor) -> Tensor:
        """Mean of the ring [C] with this step's mean of p in it; it sums to 1 once the ring is full."""
        return self._ring_with(mean).mean(dim=0)

    @torch.no_grad()
    def write(self, mean: Tensor) -> None:
        """Put this step's mean of p over the global batch, [C], into the ring."""
        self.ring.copy_(self._ring_with(mean))
        self.ptr.copy_((self.ptr + 1) % len(self.ring))

    def _ring_with(self, mean: Tensor) -> Tensor:
        here = torch.arange(len(self.ring), device=self.ptr.device) == self.ptr  # [da_len]
        return torch.where(here[:, None], mean.to(self.ring.dtype), self.ring)  # [da_len, C]
