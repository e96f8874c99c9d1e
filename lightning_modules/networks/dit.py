"""DiT, the diffusion transformer (arXiv 2212.09748), with the channel routing of arXiv 2310.07138.

B batch, N tokens, C width, H, W pixels (of a picture or latent), P patch size.
"""

from functools import partial
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.networks.conditioning import (
    Extras,
    Modulation,
    TimeEmbedding,
    block_masks,
    modulate,
    read_channels,
)

PRESETS = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
"""Depth, width and heads. Source: arXiv 2212.09748, Table 1."""


class DiT(nn.Module):
    """Diffusion transformer; initialisation and arithmetic of the official code.

    Parameters with 32x32x4 latents, 1000 classes and `learn_sigma`: S/2 32,963,360, B/2 130,512,416, L/2 458,102,816,
    XL/2 675,129,632, the frozen table of positions among them.

    Patch embedding, attention and MLP are timm's, which the official code uses as well. Mixed precision: run under
    `torch.autocast`; embeddings, adaLN and the residual stream stay in float32, matrix products take bf16. Construction
    under `torch.device("meta")` works; after `to_empty` call `reset_parameters`.

    Args:
        preset: `S`, `B`, `L`, `XL`, or [depth, width, heads].
        image_size: H = W.
        patch_size: P; the papers use 2, 4 and 8.
        in_channels: of the input; the output has twice as many if `learn_sigma`.
        num_classes: labels are 0 .. num_classes, the last being the null class; 0 leaves only that one.
        learn_sigma: predict the variance head too.

    Raises:
        ValueError: the sizes do not divide.

    Source: official code facebookresearch/DiT `models.py`; routing: byeongjun-park/DTR.
    """

    time_features = 256

    def __init__(
        self,
        preset: Literal["S", "B", "L", "XL"] | tuple[int, int, int] = "S",
        image_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        num_classes: int = 1000,
        learn_sigma: bool = True,
    ) -> None:
        super().__init__()
        from timm.layers import PatchEmbed

        depth, width, heads = PRESETS[preset] if isinstance(preset, str) else preset
        _check_sizes(width, heads, image_size, patch_size)
        self.num_classes, self.width, self.patch_size = num_classes, width, patch_size
        self.side = image_size // patch_size
        self.out_channels = in_channels * (2 if learn_sigma else 1)
        self.patches = PatchEmbed(image_size, patch_size, in_channels, width)
        self.positions = nn.Parameter(torch.empty(1, self.side**2, width), requires_grad=False)
        self.time = TimeEmbedding(self.time_features, width)
        self.label = nn.Embedding(num_classes + 1, width)
        self.blocks = nn.ModuleList(DiTBlock(width, heads) for _ in range(depth))
        self.final_modulation = Modulation(width, width, parts=2)
        self.last = nn.Linear(width, patch_size**2 * self.out_channels)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Official initialisation: Xavier linears, zero biases, N(0, 0.02) embeddings, zero adaLN and last layer."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        nn.init.xavier_uniform_(self.patches.proj.weight.flatten(1))
        nn.init.zeros_(self.patches.proj.bias)
        for weight in (self.time.first.weight, self.time.second.weight, self.label.weight):
            nn.init.normal_(weight, std=0.02)
        for layer in self.modules():
            if isinstance(layer, Modulation):
                nn.init.zeros_(layer.linear.weight)
        nn.init.zeros_(self.last.weight)
        self.positions.copy_(sincos_positions(self.side, self.width))

    def forward(self, x: Tensor, time: Tensor, y: Tensor | None = None, extras: Extras | None = None) -> Tensor:
        """Prediction (B, C_out, H, W); with `learn_sigma` the second half of the channels is the variance head.

        Args:
            x: (B, C_in, H, W) float.
            time: (B,) float; the index 0..999, or 1000 u with u = 1 noise.
            y: (B,) int64 labels; None is the null class.
            extras: `mask` routes the blocks, see `block_masks`.
        """
        if y is None or not self.num_classes:
            y = torch.full(time.shape, self.num_classes, device=time.device)
        condition = self.time(time) + self.label(y)
        h = self.patches(x) + self.positions
        for block, mask in zip(self.blocks, block_masks(extras, len(self.blocks)), strict=True):
            h = block(h, condition, mask)
        shift, scale = (part[:, None] for part in self.final_modulation(condition))
        return self._to_image(self.last(modulate(_layer_norm(h), shift, scale)))

    def _to_image(self, tokens: Tensor) -> Tensor:
        """(B, N, P P C_out) -> (B, C_out, H, W)."""
        batch, side, patch = tokens.shape[0], self.side, self.patch_size
        tokens = tokens.view(batch, side, side, patch, patch, self.out_channels)
        return tokens.permute(0, 5, 1, 3, 2, 4).reshape(batch, self.out_channels, side * patch, side * patch)


class DiTBlock(nn.Module):
    """Attention and MLP branches with adaLN-Zero, reading only the channels of the task.

    The routed block (r = m x; r += branches of r; out = r + (1 - m) x) is computed as out = x + attention + MLP, where
    the attention reads m x and the MLP reads m x + attention: outputs are not masked.

    Args:
        width: C.
        heads: number of attention heads.

    Source: arXiv 2310.07138, official code byeongjun-park/DTR; without a mask the block of arXiv 2212.09748.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        from timm.layers import Mlp
        from timm.models.vision_transformer import Attention

        self.modulation = Modulation(width, width, parts=6)
        self.attention = Attention(width, num_heads=heads, qkv_bias=True)
        self.mlp = Mlp(width, 4 * width, act_layer=partial(nn.GELU, approximate="tanh"))

    def forward(self, x: Tensor, condition: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, N, C) of x (B, N, C), condition (B, C) and mask bool (B, C)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (part[:, None] for part in self.modulation(condition))
        read = read_channels(x, mask)
        attention = gate1 * self.attention(modulate(_layer_norm(read), shift1, scale1))
        return x + attention + gate2 * self.mlp(modulate(_layer_norm(read + attention), shift2, scale2))


def sincos_positions(side: int, width: int) -> Tensor:
    """Fixed 2-D positions of side^2 tokens, row by row: [sin, cos] of the column, then [sin, cos] of the row.

    Args:
        side: tokens per row.
        width: C, divisible by 4.

    Returns:
        (side^2, width) float32.

    Source: official code facebookresearch/DiT `models.py`, `get_2d_sincos_pos_embed`.
    """
    frequencies = 1e4 ** -(np.arange(width // 4) / (width / 4))
    angles = np.outer(np.arange(side), frequencies)
    axis = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    table = np.concatenate([np.tile(axis, (side, 1)), np.repeat(axis, side, axis=0)], axis=1)
    return torch.from_numpy(table).float()


def _layer_norm(x: Tensor) -> Tensor:
    """Over channels, without weights."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def _check_sizes(width: int, heads: int, image_size: int, patch_size: int) -> None:
    if width % heads or width % 4:
        raise ValueError(f"net.preset: width must divide by 4 and by the number of heads, got {width} and {heads}")
    if image_size % patch_size:
        raise ValueError(f"net.patch_size must divide net.image_size {image_size}, got {patch_size}")
