"""Which noise goes with which image. Papers bring their own `Coupling`."""

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Pairs(NamedTuple):
    """Noise (B, ...) for the images of a batch.

    `rows` (B,) int64 is None where every image keeps its place; else image (and label) `rows[i]` goes with noise i.
    """

    noise: Tensor
    rows: Tensor | None = None


class Coupling(nn.Module):
    """Draws the noise of a batch; runs without gradients, after augmentation and encoding, before times are drawn.

    Attributes:
        shared_noise: True where all ranks must draw from the same stream, because they solve one global problem.
    """

    shared_noise: bool = False

    def forward(self, data: Tensor, generator: torch.Generator) -> Pairs:
        """Pairs for (B, ...) images."""
        raise NotImplementedError


class Independent(Coupling):
    """Fresh noise for each image."""

    def forward(self, data: Tensor, generator: torch.Generator) -> Pairs:
        """As in `Coupling`."""
        return Pairs(draw_noise(data, generator))


def draw_noise(data: Tensor, generator: torch.Generator, count: int | None = None) -> Tensor:
    """Standard normal noise like `data` (B, ...), or `count` rows of it."""
    shape = data.shape if count is None else (count, *data.shape[1:])
    return torch.randn(shape, generator=generator, device=data.device, dtype=data.dtype)
