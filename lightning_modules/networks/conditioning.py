"""What the denoisers share: time and label embeddings, modulation, and channel masks. B batch, C channels, D condition.

Embeddings and modulation stay out of autocast: under bf16 they are computed in the dtype of their weights (float32),
because 8 bits of mantissa do not tell neighbouring time steps apart.
"""

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Layer = TypeVar("Layer", nn.Linear, nn.Conv2d)
Extras = Mapping[str, Any]
"""Further inputs of a denoiser. `mask`: bool (B, C), or one such mask per routed block."""


def sinusoidal(time: Tensor, dim: int, max_period: float = 1e4) -> Tensor:
    """Features [cos(t w_i), sin(t w_i)], w_i = max_period^(-2i / dim), i = 0 .. dim/2 - 1.

    Args:
        time: (B,) float or int; a spread of about 0..1000 suits the frequencies.
        dim: number of features, even.
        max_period: the lowest frequency is a little above 1 / max_period.

    Returns:
        (B, dim) float32 whatever the input dtype: the official codes compute them so, in float64 nets too.

    Source: official code facebookresearch/DiT `models.py`, openai/guided-diffusion `nn.py`.
    """
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=time.device)
    angles = time.float()[:, None] * torch.exp(-math.log(max_period) * steps / half)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def drop_labels(labels: Tensor, null_class: int, rate: float, generator: torch.Generator) -> Tensor:
    """Each label becomes the null class with probability `rate`: training for classifier-free guidance.

    Args:
        labels: (B,) int64.
        null_class: `num_classes` for the nets of this package.
        rate: probability in [0, 1]; the papers use 0.1.
        generator: a draw of the step, so ranks differ. One uniform per example is drawn at any rate.

    Returns:
        (B,) int64.

    Raises:
        ValueError: rate outside [0, 1].
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"label dropout rate must be in [0, 1], got {rate}")
    uniform = torch.rand(labels.shape, generator=generator, device=generator.device)
    return labels.masked_fill((uniform < rate).to(labels.device), null_class)


def block_masks(extras: Extras | None, num_blocks: int) -> list[Tensor | None]:
    """The mask of every routed block, None where there is no routing.

    Args:
        extras: `extras["mask"]` is one bool (B, C) for all blocks, or a list with one per block.
        num_blocks: number of blocks that can be routed.

    Raises:
        ValueError: the list has another length.
    """
    mask = extras.get("mask") if extras else None
    if mask is None or isinstance(mask, Tensor):
        return [mask] * num_blocks
    if len(mask) != num_blocks:
        raise ValueError(f"extras['mask'] must hold one mask for each of the {num_blocks} blocks, got {len(mask)}")
    return list(mask)


def read_channels(x: Tensor, mask: Tensor | None, channel_dim: int = -1) -> Tensor:
    """What a block reads: x on the channels of its task, 0 elsewhere; x itself without a mask.

    Args:
        x: (B, ..., C, ...) float.
        mask: bool (B, C).
        channel_dim: where C is in x.

    Raises:
        ValueError: the mask is not bool or does not fit x.
    """
    if mask is None:
        return x
    expected = (x.shape[0], x.shape[channel_dim])
    if mask.dtype != torch.bool or tuple(mask.shape) != expected:
        raise ValueError(f"extras['mask'] must be bool {expected}, got {mask.dtype} {tuple(mask.shape)}")
    shape = [1] * x.ndim
    shape[0], shape[channel_dim] = expected
    return torch.where(mask.view(shape), x, 0)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x * (1 + scale) + shift; the arguments broadcast."""
    return x * (1 + scale) + shift


class TimeEmbedding(nn.Module):
    """Sinusoidal features -> Linear -> SiLU -> Linear. Maps (B,) to (B, D).

    Args:
        features: number of sinusoidal features, even.
        dim: D, also the hidden width.
    """

    def __init__(self, features: int, dim: int) -> None:
        super().__init__()
        self.features = features
        self.first, self.second = nn.Linear(features, dim), nn.Linear(dim, dim)

    def forward(self, time: Tensor) -> Tensor:
        with outside_autocast(time.device):
            features = sinusoidal(time, self.features).to(self.first.weight.dtype)
            return self.second(F.silu(self.first(features)))


class Condition(nn.Module):
    """Time embedding plus, with classes, a label embedding whose last row is the null class.

    Args:
        features, dim: as in `TimeEmbedding`.
        num_classes: 0 for no label embedding at all; then labels are not looked at.
    """

    def __init__(self, features: int, dim: int, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.time = TimeEmbedding(features, dim)
        self.label = nn.Embedding(num_classes + 1, dim) if num_classes else None

    def forward(self, time: Tensor, y: Tensor | None) -> Tensor:
        """(B, D) of time (B,) and labels y (B,) int64; y None is the null class for every example."""
        if self.label is None:
            return self.time(time)
        if y is None:
            y = torch.full(time.shape, self.num_classes, device=time.device)
        return self.time(time) + self.label(y)


class Modulation(nn.Module):
    """SiLU -> Linear into `parts` pieces of `width` each: shifts, scales and gates of a block. Outside autocast.

    Args:
        dim: D.
        width: C of the block.
        parts: number of pieces.
        zero: start from 0, so that gated blocks start as the identity (adaLN-Zero).
    """

    def __init__(self, dim: int, width: int, parts: int, zero: bool = True) -> None:
        super().__init__()
        self.parts = parts
        self.linear = nn.Linear(dim, parts * width)
        if zero:
            zero_init(self.linear)

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        """`parts` tensors (B, C) of condition (B, D)."""
        with outside_autocast(condition.device):
            return self.linear(F.silu(condition)).chunk(self.parts, dim=1)


def outside_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Context in which autocast is off; the meta device, on which FLOPs are counted, has none."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def zero_init(layer: Layer) -> Layer:
    """The layer with weight and bias 0."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
