"""Residual MLP for pictures of a few dozen pixels. B batch, C width, D condition."""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.networks.conditioning import (
    Condition,
    Extras,
    Modulation,
    block_masks,
    modulate,
    read_channels,
    zero_init,
)


class TinyResMLP(nn.Module):
    """Denoiser of the mini recipes on 8x8 pictures: 248,032 parameters at the defaults.

    Linear, adaLN blocks (LayerNorm without weights, shift and scale, C -> 2C -> C with GELU, gate), adaLN, Linear. As
    in a DiT all of adaLN and the last layer start at 0: the output starts at 0 and every block as the identity.

    Args:
        shape: of one picture.
        width: C, also the width D of the condition.
        depth: number of blocks.
        num_classes: 0 without labels; else labels are 0 .. num_classes, the last being the null class.
    """

    time_features = 128

    def __init__(
        self, shape: tuple[int, ...] = (1, 8, 8), width: int = 96, depth: int = 3, num_classes: int = 0
    ) -> None:
        super().__init__()
        self.shape, self.num_classes = tuple(shape), num_classes
        pixels = math.prod(shape)
        self.condition = Condition(self.time_features, width, num_classes)
        self.first = nn.Linear(pixels, width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(depth))
        self.final_modulation = Modulation(width, width, parts=2)
        self.last = zero_init(nn.Linear(width, pixels))

    def forward(self, x: Tensor, time: Tensor, y: Tensor | None = None, extras: Extras | None = None) -> Tensor:
        """Prediction (B, *shape).

        Args:
            x: (B, *shape) float.
            time: (B,) float; the index 0..999, or 1000 u with u = 1 noise.
            y: (B,) int64 labels; None is the null class.
            extras: `mask` routes the blocks, see `block_masks`.
        """
        condition = self.condition(time, y)
        h = self.first(x.flatten(1))
        for block, mask in zip(self.blocks, block_masks(extras, len(self.blocks)), strict=True):
            h = block(h, condition, mask)
        h = modulate(F.layer_norm(h, h.shape[-1:], eps=1e-6), *self.final_modulation(condition))
        return self.last(h).view_as(x)


class _Block(nn.Module):
    """x + gate MLP(LN(r) (1 + scale) + shift), r the channels of x that the mask lets it read."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.modulation = Modulation(width, width, parts=3)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor, condition: Tensor, mask: Tensor | None = None) -> Tensor:
        shift, scale, gate = self.modulation(condition)
        read = read_channels(x, mask)
        return x + gate * self.mlp(modulate(F.layer_norm(read, read.shape[-1:], eps=1e-6), shift, scale))
