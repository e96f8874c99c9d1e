"""A decoder-only transformer on bytes. B batch, T places, D width."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ByteTransformer(nn.Module):
    """Bytes (B, T) -> logits (B * T, 256) of the next byte at each place.

    Pre-norm blocks of causal attention (`attn.qkv`, `attn.proj`) and a GELU MLP (`mlp.fc1`, `mlp.fc2`), named as in
    timm's ViTs. Initial weights normal with standard deviation 0.02, biases 0.

    Args:
        dim, depth, num_heads, mlp_ratio: of the transformer.
        length: largest T.
    """

    block_names = ("blocks",)

    def __init__(self, dim: int = 64, depth: int = 2, num_heads: int = 4, mlp_ratio: int = 4, length: int = 64) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"net.dim must be a multiple of net.num_heads, got {dim} and {num_heads}")
        self.embed = nn.Embedding(256, dim)
        self.positions = nn.Parameter(torch.empty(1, length, dim))
        self.blocks = nn.Sequential(*(_Block(dim, num_heads, mlp_ratio * dim) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 256)
        nn.init.normal_(self.positions, std=0.02)
        for layer in self.modules():
            if isinstance(layer, nn.Linear | nn.Embedding):
                nn.init.normal_(layer.weight, std=0.02)
            if isinstance(layer, nn.Linear):
                nn.init.zeros_(layer.bias)

    def forward(self, codes: Tensor) -> Tensor:
        """Logits."""
        x = self.blocks(self.embed(codes) + self.positions[:, : codes.shape[1]])
        return self.head(self.norm(x)).flatten(0, 1)


class _Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class _Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class _Block(nn.Module):
    def __init__(self, dim: int, num_heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim), _Attention(dim, num_heads)
        self.norm2, self.mlp = nn.LayerNorm(dim), _Mlp(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))
