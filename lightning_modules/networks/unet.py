"""UNet denoisers of 14 to 32 pixels. B batch, C channels, H, W pixels, D condition.

Weights lie in channels-last order, as those of the image classifiers do and for the same reason.
"""

from collections.abc import Sequence
from functools import partial

import torch
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


class DDPMUNet(nn.Module):
    """UNet of guided-diffusion as torchcfm configures it for CIFAR-10: 35,746,307 parameters at the defaults.

    `diffusers.UNet2DModel` can be given the same layers and count, but starts differently (here the last convolution of
    every branch and of the net is 0) and takes no masks; the package is therefore not required.

    Args:
        in_channels: of the input and of the output.
        image_size: H = W, divisible by 2 for each level below the first.
        channels: C of the first level, also the number of time features; D is four times it.
        multipliers: C of each level, in units of `channels`.
        num_res_blocks: residual blocks per level on the way down; one more on the way up.
        attention_resolutions: image sizes that have attention; the lowest level's middle always has.
        head_channels: channels per attention head.
        groups: of the group norms.
        dropout: before the last convolution of a residual block.
        num_classes: 0 without labels; else labels are 0 .. num_classes, the last being the null class.

    `routed_channels` lists C of the residual blocks that can be routed: those that keep their channels.

    Raises:
        ValueError: the sizes do not divide.

    Source: openai/guided-diffusion `unet.py` with `use_scale_shift_norm` False; configuration of atong01/conditional-
    flow-matching, `examples/images/cifar10`.
    """

    def __init__(
        self,
        in_channels: int = 3,
        image_size: int = 32,
        channels: int = 128,
        multipliers: Sequence[int] = (1, 2, 2, 2),
        num_res_blocks: int = 2,
        attention_resolutions: Sequence[int] = (16,),
        head_channels: int = 64,
        groups: int = 32,
        dropout: float = 0.1,
        num_classes: int = 0,
    ) -> None:
        super().__init__()
        if image_size % 2 ** (len(multipliers) - 1):
            raise ValueError(f"net.image_size must divide by 2 for each of {len(multipliers)} levels, got {image_size}")
        self.condition = Condition(channels, 4 * channels, num_classes)
        widths = [channels * multiplier for multiplier in multipliers]
        levels = [(width, image_size // 2**k in attention_resolutions) for k, width in enumerate(widths)]
        stage = partial(_Stage, dim=4 * channels, head_channels=head_channels, groups=groups, dropout=dropout)

        self.first = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.down, self.middle, self.up = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        width, skips = widths[0], [widths[0]]
        for level, (after, attend) in enumerate(levels):
            for _ in range(num_res_blocks):
                self.down.append(stage(width, after, attend))
                width = after
                skips.append(width)
            if level < len(levels) - 1:
                self.down.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
                skips.append(width)
        self.middle.extend([stage(width, width, True), stage(width, width, False)])
        for level, (after, attend) in reversed([*enumerate(levels)]):
            for _ in range(num_res_blocks + 1):
                self.up.append(stage(width + skips.pop(), after, attend))
                width = after
            if level:
                self.up.append(_Upsample(width))
        self.norm = nn.GroupNorm(groups, width)
        self.last = zero_init(nn.Conv2d(width, in_channels, 3, padding=1))
        self.routed_channels = _routed_channels(self)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor, time: Tensor, y: Tensor | None = None, extras: Extras | None = None) -> Tensor:
        """Prediction, of the shape of x.

        Args:
            x: (B, C_in, H, W) float.
            time: (B,) float; the index 0..999, or 1000 u with u = 1 noise.
            y: (B,) int64 labels; None is the null class.
            extras: `mask` routes the blocks of `routed_channels`, see `block_masks`.
        """
        condition = self.condition(time, y)
        masks = iter(block_masks(extras, len(self.routed_channels)))

        def run(layer: nn.Module, h: Tensor) -> Tensor:
            if not isinstance(layer, _Stage):
                return layer(h)
            return layer(h, condition, next(masks) if layer.block.keeps_channels else None)

        h = self.first(x)
        skips = [h]
        for layer in self.down:
            h = run(layer, h)
            skips.append(h)
        for layer in self.middle:
            h = run(layer, h)
        for layer in self.up:
            h = run(layer, torch.cat([h, skips.pop()], dim=1) if isinstance(layer, _Stage) else h)
        return self.last(F.silu(self.norm(h)))


class TinyUNet(DDPMUNet):
    """The same UNet for a laptop, 16 to 32 pixels: two levels of 32 and 64 channels, no attention above the middle.

    651,041 parameters at the defaults.

    Args:
        in_channels, image_size, num_classes: as in `DDPMUNet`.
    """

    def __init__(self, in_channels: int = 1, image_size: int = 16, num_classes: int = 0) -> None:
        super().__init__(
            in_channels,
            image_size,
            channels=32,
            multipliers=(1, 2),
            num_res_blocks=1,
            attention_resolutions=(),
            head_channels=32,
            groups=8,
            dropout=0.0,
            num_classes=num_classes,
        )


class LeanUNet(nn.Module):
    """Net of the shared mini prior, 14x14 pictures of one channel: 368,929 parameters at the defaults.

    Two resolutions, scale and shift after the second norm, no attention, no dropout. Its output is v, and the caller
    makes eps of it: eps = sqrt(abar) v + sqrt(1 - abar) x.

    Args:
        num_classes: labels are 0 .. num_classes, the last being the null class, an ordinary row.
        channels: of the upper and the lower resolution.

    `routed_channels` as in `DDPMUNet`.
    """

    def __init__(self, num_classes: int = 10, channels: tuple[int, int] = (24, 64)) -> None:
        super().__init__()
        high, low, dim = *channels, 128

        def block(before: int, after: int) -> ResBlock:
            return ResBlock(before, after, dim, groups=8, scale_shift=True)

        self.condition = Condition(64, dim, num_classes)
        self.first = nn.Conv2d(1, high, 3, padding=1)
        self.down_high = block(high, high)
        self.downsample = nn.Conv2d(high, high, 3, stride=2, padding=1)
        self.down_low, self.middle, self.up_low = block(high, low), block(low, low), block(2 * low, low)
        self.narrow = nn.Conv2d(low, high, 1)
        self.up_high = block(2 * high, high)
        self.norm = nn.GroupNorm(8, high)
        self.last = zero_init(nn.Conv2d(high, 1, 3, padding=1))
        self.routed_channels = _routed_channels(self)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor, time: Tensor, y: Tensor | None = None, extras: Extras | None = None) -> Tensor:
        """v, (B, 1, H, W); arguments as in `DDPMUNet.forward`, time being the index 0..999."""
        condition = self.condition(time, y)
        mask_high, mask_middle = block_masks(extras, len(self.routed_channels))
        high = self.down_high(self.first(x), condition, mask_high)
        low = self.down_low(self.downsample(high), condition)
        h = self.up_low(torch.cat([self.middle(low, condition, mask_middle), low], dim=1), condition)
        h = F.interpolate(self.narrow(h), size=high.shape[-2:], mode="nearest")
        h = self.up_high(torch.cat([h, high], dim=1), condition)
        return self.last(F.silu(self.norm(h)))


class ResBlock(nn.Module):
    """norm-SiLU-conv, condition, norm-SiLU-dropout-conv (0 at the start), plus the shortcut.

    Args:
        before, after: channels of input and output; the shortcut is a 1x1 convolution where they differ.
        dim: D.
        groups: of the group norms.
        dropout: before the second convolution.
        scale_shift: the condition scales and shifts the second norm; False adds it before that norm.
    """

    def __init__(
        self, before: int, after: int, dim: int, groups: int, dropout: float = 0.0, scale_shift: bool = False
    ) -> None:
        super().__init__()
        self.after, self.keeps_channels, self.scale_shift = after, before == after, scale_shift
        self.norm1 = nn.GroupNorm(groups, before)
        self.conv1 = nn.Conv2d(before, after, 3, padding=1)
        self.modulation = Modulation(dim, after, parts=2 if scale_shift else 1, zero=False)
        self.norm2 = nn.GroupNorm(groups, after)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_init(nn.Conv2d(after, after, 3, padding=1))
        self.shortcut = nn.Identity() if before == after else nn.Conv2d(before, after, 1)

    def forward(self, x: Tensor, condition: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, C_after, H, W) of x, condition (B, D), and mask bool (B, C), which only the branch reads through."""
        parts = [part[:, :, None, None] for part in self.modulation(condition)]
        h = self.conv1(F.silu(self.norm1(read_channels(x, mask, channel_dim=1))))
        if self.scale_shift:
            scale, shift = parts
            h = modulate(self.norm2(h), shift, scale)
        else:
            h = self.norm2(h + parts[0])
        return self.shortcut(x) + self.conv2(self.dropout(F.silu(h)))


class _Attention(nn.Module):
    """Self-attention over pixels with a residual; the projection starts at 0."""

    def __init__(self, channels: int, head_channels: int, groups: int) -> None:
        super().__init__()
        if channels % head_channels:
            raise ValueError(f"net.head_channels must divide the {channels} channels, got {head_channels}")
        self.heads = channels // head_channels
        self.norm = nn.GroupNorm(groups, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.projection = zero_init(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        # heads first, then q, k, v: the order of the official checkpoints
        qkv = self.qkv(self.norm(x)).flatten(2).unflatten(1, (self.heads, 3, -1)).transpose(-1, -2)
        h = F.scaled_dot_product_attention(*qkv.unbind(2))
        return x + self.projection(h.transpose(-1, -2).reshape(x.shape))


class _Stage(nn.Module):
    """A residual block and, if `attend`, attention."""

    def __init__(
        self, before: int, after: int, attend: bool, dim: int, head_channels: int, groups: int, dropout: float
    ) -> None:
        super().__init__()
        self.block = ResBlock(before, after, dim, groups, dropout)
        self.attention = _Attention(after, head_channels, groups) if attend else nn.Identity()

    def forward(self, x: Tensor, condition: Tensor, mask: Tensor | None) -> Tensor:
        return self.attention(self.block(x, condition, mask))


class _Upsample(nn.Module):
    """Twice the size by nearest neighbours, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


def _routed_channels(net: nn.Module) -> list[int]:
    """C of the blocks that keep their channels, in the order of construction, which is that of the forward pass."""
    return [block.after for block in net.modules() if isinstance(block, ResBlock) and block.keeps_channels]
