"""T5 of transformers on bytes. B batch, T places."""

import importlib.util
from typing import Any

from torch import Tensor, nn


class ByteT5(nn.Module):
    """Bytes (B, T) -> logits (B * predict, 256) of the next byte at the last `predict` places.

    The encoder reads the places before them, the decoder the places themselves: T5's prefix language model. Sparse
    layers of the feed-forward blocks are named `*.DenseReluDense.w?` (T5 1.0) or `*.DenseReluDense.w*` (1.1).

    Args:
        predict: as `predict` of `datamodules.text.ByteText`.
        options: arguments of `transformers.T5Config`; its defaults are those of T5-Small 1.0.

    Raises:
        ValueError: transformers is not installed.
    """

    block_names = ("net.encoder.block", "net.decoder.block")

    def __init__(self, predict: int = 256, options: dict[str, Any] | None = None) -> None:
        super().__init__()
        if importlib.util.find_spec("transformers") is None:
            raise ValueError("ByteT5 needs transformers: pip install 'noisebench[llm]'")
        from transformers import T5Config, T5ForConditionalGeneration

        self.predict = predict
        config = T5Config(vocab_size=256, pad_token_id=0, decoder_start_token_id=0, **(options or {}))
        self.net = T5ForConditionalGeneration(config)

    def forward(self, codes: Tensor) -> Tensor:
        """Logits."""
        if codes.shape[1] <= self.predict:
            raise ValueError(f"net.predict {self.predict} leaves none of {codes.shape[1]} bytes for the encoder")
        known, told = codes[:, : -self.predict], codes[:, -self.predict :]
        logits = self.net(input_ids=known, decoder_input_ids=told, use_cache=False).logits
        return logits.flatten(0, 1)
