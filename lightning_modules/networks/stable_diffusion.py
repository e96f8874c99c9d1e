"""The UNet of Stable Diffusion 1.x from diffusers, with class names as captions. B batch, L tokens, D text width."""

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.networks.conditioning import Extras

SD1 = {
    "sample_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
"""Configuration of SD-1.4's UNet; 32 x 32 latents belong to pictures of 256 pixels."""


class TextUNet(nn.Module):
    """(x, time, label) -> like x: `UNet2DConditionModel`, whose text is the caption of the label.

    859,520,964 parameters at the defaults. Captions are a fixed table (no text encoder runs while training), written by
    `noisebench encode-latents --class-names`; its last row, the empty text, is the null label.

    Args:
        captions: `captions.safetensors`, `rows` (number of classes + 1, L, D); read with the first batch.
        weights: hub id or folder of a Stable Diffusion pipeline whose `unet` is fine-tuned; None starts from scratch.
        gradient_checkpointing: halves the memory of activations or better, a third slower.
        config: further arguments of `UNet2DConditionModel`.

    Raises:
        ValueError: diffusers is missing.
    """

    def __init__(
        self,
        captions: str = "captions.safetensors",
        weights: str | None = None,
        gradient_checkpointing: bool = False,
        config: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if importlib.util.find_spec("diffusers") is None:
            raise ValueError("TextUNet needs diffusers: pip install 'noisebench[latents]'")
        from diffusers import UNet2DConditionModel

        if weights is None:
            self.unet = UNet2DConditionModel(**{**SD1, **(config or {})})
        else:
            self.unet = UNet2DConditionModel.from_pretrained(weights, subfolder="unet")
        if gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        self.captions = captions
        self._rows: Tensor | None = None

    def forward(self, x: Tensor, time: Tensor, y: Tensor | None = None, extras: Extras | None = None) -> Tensor:
        """Prediction, of the shape of x.

        Args:
            x: (B, 4, H, W) float.
            time: (B,) float, the index 0..999.
            y: (B,) int64 labels; None is the empty text.
            extras: not used; there is no routing here.
        """
        rows = self._table(x)
        text = rows[torch.full_like(time, len(rows) - 1, dtype=torch.int64) if y is None else y]
        return self.unet(x, time, encoder_hidden_states=text).sample

    def _table(self, x: Tensor) -> Tensor:
        """Captions where x is."""
        if self._rows is None:
            from safetensors.torch import load_file

            if not Path(self.captions).is_file():
                raise ValueError(
                    f"net.captions: no file {self.captions}; noisebench encode-latents --class-names writes it"
                )
            self._rows = load_file(self.captions)["rows"]
        if self._rows.device != x.device or self._rows.dtype != x.dtype:
            self._rows = self._rows.to(x)
        return self._rows
