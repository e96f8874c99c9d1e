"""A small transformer without layer norm for sums of two numbers."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ModularTransformer(nn.Module):
    """Three tokens a, b, "=" -> logits of the sum, read at the last token.

    `embed` maps tokens to vectors, `body` vectors to logits: observers that move inputs look at `body`.

    Args:
        modulus: p; tokens 0..p-1 are numbers, p is "=".
        dim, heads, mlp_dim, num_layers: of the transformer; ReLU, no layer norm, causal attention.

    Source: setting of arXiv 2301.05217; initial weights normal with standard deviation fan_in^-1/2.
    """

    def __init__(
        self, modulus: int = 113, dim: int = 128, heads: int = 4, mlp_dim: int = 512, num_layers: int = 1
    ) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"net.dim must be a multiple of net.heads, got {dim} and {heads}")
        self.embed = _Embedding(modulus + 1, dim)
        blocks = [_Block(dim, heads, mlp_dim, last=number == num_layers - 1) for number in range(num_layers)]
        self.body = nn.Sequential(*blocks, nn.Linear(dim, modulus, bias=False))
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
            else:
                nn.init.zeros_(parameter)

    def forward(self, input_ids: Tensor) -> Tensor:
        """(B, 3) int64 -> (B, modulus)."""
        return self.body(self.embed(input_ids))


class _Embedding(nn.Module):
    def __init__(self, num_tokens: int, dim: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(num_tokens, dim)
        self.positions = nn.Parameter(torch.empty(3, dim))

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.tokens(input_ids) + self.positions


class _Block(nn.Module):
    """Attention, then an MLP, each added; the last block continues with the last token only."""

    def __init__(self, dim: int, heads: int, mlp_dim: int, last: bool) -> None:
        super().__init__()
        self.heads, self.last = heads, last
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.mlp = nn.Sequential(nn.Linear(dim, mlp_dim), nn.ReLU(), nn.Linear(mlp_dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        x = x[:, -1] if self.last else x
        return x + self.mlp(x)
