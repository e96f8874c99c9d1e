"""A small GPT over whole words: pre-norm blocks, learned positions, tied embeddings."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class WordGPT(nn.Module):
    """Tokens (B, T) int64 -> logits (B, T, V), or (n, V) at the n positions marked in `keep`.

    `decoder_layers` and `embedding` are what methods hook into.

    Args:
        vocab_size: V.
        dim, heads, num_layers: of the transformer; MLPs are four times as wide, GELU.
        context: longest input.
        dropout: after the embedding, in attention and after each branch.
    """

    block_names = ("blocks",)

    def __init__(
        self,
        vocab_size: int = 272,
        dim: int = 96,
        heads: int = 4,
        num_layers: int = 3,
        context: int = 16,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"lm.dim must be a multiple of lm.heads, got {dim} and {heads}")
        self.context, self.hidden_size = context, dim
        self.embedding = nn.Embedding(vocab_size, dim)
        self.positions = nn.Parameter(torch.empty(context, dim))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(_Block(dim, heads, dropout) for _ in range(num_layers))
        self.norm = nn.LayerNorm(dim)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    @property
    def decoder_layers(self) -> list[nn.Module]:
        """Layers whose outputs are the residual stream."""
        return list(self.blocks)

    def forward(self, input_ids: Tensor, keep: Tensor | None = None, attention_mask: Tensor | None = None) -> Tensor:
        """Padding must be on the right: causal attention never sees it, so `attention_mask` is not needed."""
        length = input_ids.shape[1]
        if length > self.context:
            raise ValueError(f"sequences may have at most lm.context {self.context} tokens, got {length}")
        hidden = self.dropout(self.embedding(input_ids) + self.positions[:length])
        for block in self.blocks:
            hidden = block(hidden)
        hidden = self.norm(hidden if keep is None else hidden[keep])
        return hidden @ self.embedding.weight.T


class _Block(nn.Module):
    """Causal attention, then an MLP, each on the normed stream and added."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norms = nn.ModuleList([nn.LayerNorm(dim), nn.LayerNorm(dim)])
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, hidden: Tensor) -> Tensor:
        parts = self.qkv(self.norms[0](hidden)).chunk(3, dim=-1)
        query, key, value = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts)
        rate = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, dropout_p=rate)
        hidden = hidden + F.dropout(self.out(mixed.transpose(1, 2).flatten(2)), rate)
        return hidden + F.dropout(self.mlp(self.norms[1](hidden)), rate)
