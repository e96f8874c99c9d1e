"""DDPM++, the UNet with which EDM was trained on CIFAR-10 and FFHQ. B batch, C channels, H, W pixels, D condition."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.networks.conditioning import Extras, Layer

HALF = math.sqrt(0.5)
"""Sums of a branch and its shortcut are multiplied by it, so that their variance does not grow with depth."""
SMALL = 1e-5
"""Factor of the weights that start near 0; those of attention's q, k and v have sqrt(0.2)."""


class DDPMPlusPlus(nn.Module):
    """Score network of Song et al. as EDM configures it: 61,804,419 parameters at the defaults (FFHQ, 64 pixels).

    CIFAR-10: `image_size` 32 and `multipliers` (2, 2, 2), 55,732,739 parameters. The official counts are higher by the
    1,152 weights that read the augmentation's settings; that augmentation is left out here.

    Args:
        in_channels: of the input and of the output.
        image_size: H = W, divisible by 2 for each level below the first.
        channels: C of the first level, also the number of time features; D is four times it.
        multipliers: C of each level, in units of `channels`.
        num_blocks: residual blocks per level on the way down; one more on the way up.
        attention_resolutions: image sizes that have attention, of one head; the middle always has.
        dropout: before the last convolution of a block.

    Raises:
        ValueError: the sizes do not divide.

    Source: arXiv 2206.00364, Table 7; official code NVlabs/edm, `SongUNet` with positional embedding, standard encoder
        and decoder.
    """

    def __init__(
        self,
        in_channels: int = 3,
        image_size: int = 64,
        channels: int = 128,
        multipliers: Sequence[int] = (1, 2, 2, 2),
        num_blocks: int = 4,
        attention_resolutions: Sequence[int] = (16,),
        dropout: float = 0.05,
    ) -> None:
        super().__init__()
        if image_size % 2 ** (len(multipliers) - 1):
            raise ValueError(f"net.image_size must divide by 2 for each of {len(multipliers)} levels, got {image_size}")
        self.time_features, dim = channels, 4 * channels
        self.time1, self.time2 = _linear(channels, dim), _linear(dim, dim)

        def block(before: int, after: int, attend: bool = False, size: float = 1.0) -> _Block:
            return _Block(before, after, dim, dropout, attend, size)

        levels = [(channels * m, image_size // 2**k in attention_resolutions) for k, m in enumerate(multipliers)]
        self.first = _conv(in_channels, channels)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        width, skips = channels, [channels]
        for level, (after, attend) in enumerate(levels):
            if level:
                self.down.append(block(width, width, size=0.5))
                skips.append(width)
            for _ in range(num_blocks):
                self.down.append(block(width, after, attend))
                width = after
                skips.append(width)
        self.middle = nn.ModuleList([block(width, width, True), block(width, width)])
        for level, (after, attend) in reversed([*enumerate(levels)]):
            for number in range(num_blocks + 1):
                self.up.append(block(width + skips.pop(), after, attend and number == num_blocks))
                width = after
            if level:
                self.up.append(block(width, width, size=2.0))
        self.norm = nn.GroupNorm(32, width, eps=1e-6)
        self.last = _conv(width, in_channels, gain=SMALL)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor, time: Tensor, y: Tensor | None = None, extras: Extras | None = None) -> Tensor:
        """F(x, c_noise), of the shape of x.

        Args:
            x: (B, C_in, H, W) float, scaled by c_in.
            time: (B,) float, c_noise = ln(sigma) / 4.
            y: not used: unconditional.
            extras: not used.
        """
        half = self.time_features // 2
        rates = 1e4 ** -(torch.arange(half, dtype=torch.float32, device=time.device) / (half - 1))
        angles = time.float()[:, None] * rates
        features = torch.cat([angles.sin(), angles.cos()], dim=1).to(self.time1.weight.dtype)
        condition = F.silu(self.time2(F.silu(self.time1(features))))
        h = self.first(x)
        skips = [h]
        for layer in self.down:
            h = layer(h, condition)
            skips.append(h)
        for layer in self.middle:
            h = layer(h, condition)
        for layer in self.up:
            h = layer(h if layer.size == 2 else torch.cat([h, skips.pop()], dim=1), condition)
        return self.last(F.silu(self.norm(h)))


class _Block(nn.Module):
    """norm-SiLU-(resize)-conv, condition added, norm-SiLU-dropout-conv, the shortcut, and attention if `attend`."""

    def __init__(self, before: int, after: int, dim: int, dropout: float, attend: bool, size: float) -> None:
        super().__init__()
        self.size, self.dropout = size, nn.Dropout(dropout)
        self.norm1, self.conv1 = nn.GroupNorm(32, before, eps=1e-6), _conv(before, after)
        self.condition = _linear(dim, after)
        self.norm2, self.conv2 = nn.GroupNorm(32, after, eps=1e-6), _conv(after, after, gain=SMALL)
        plain = before == after and size == 1
        self.shortcut = nn.Identity() if plain else _conv(before, after, kernel=1)
        self.attention = _Attention(after) if attend else nn.Identity()

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        h = self.conv1(self._resized(F.silu(self.norm1(x))))
        h = F.silu(self.norm2(h + self.condition(condition)[:, :, None, None]))
        return self.attention((self.conv2(self.dropout(h)) + self.shortcut(self._resized(x))) * HALF)

    def _resized(self, x: Tensor) -> Tensor:
        """Means of 2 x 2 pixels, or each pixel four times: the box filter of the official configuration."""
        if self.size == 1:
            return x
        return F.avg_pool2d(x, 2) if self.size < 1 else F.interpolate(x, scale_factor=2, mode="nearest")


class _Attention(nn.Module):
    """Self-attention of one head over pixels, with its residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.qkv = _conv(channels, 3 * channels, kernel=1, gain=math.sqrt(0.2))
        self.projection = _conv(channels, channels, kernel=1, gain=SMALL)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).unsqueeze(1).chunk(3, dim=-1)
        h = F.scaled_dot_product_attention(query, key, value)
        return (x + self.projection(h.squeeze(1).transpose(1, 2).reshape(x.shape))) * HALF


def _conv(before: int, after: int, kernel: int = 3, gain: float = 1.0) -> nn.Conv2d:
    """A convolution that keeps the size; weights start as Xavier's uniform ones times `gain`, biases at 0."""
    return _start(nn.Conv2d(before, after, kernel, padding=kernel // 2), gain)


def _linear(before: int, after: int) -> nn.Linear:
    return _start(nn.Linear(before, after), 1.0)


def _start(layer: Layer, gain: float) -> Layer:
    nn.init.xavier_uniform_(layer.weight, gain)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
