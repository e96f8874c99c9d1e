"""Rows of all ranks. Without a process group there is one rank."""

import torch
from torch import Tensor


def is_parallel() -> bool:
    """Whether there is a process group."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def sizes_of_ranks(rows: Tensor) -> list[int]:
    """Number of rows of each rank, in rank order; the last batch of an epoch need not be even."""
    if not is_parallel():
        return [len(rows)]
    mine = torch.tensor([len(rows)], device=rows.device)
    sizes = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(sizes, mine)
    return torch.cat(sizes).tolist()


def gather_rows(rows: Tensor, sizes: list[int] | None = None) -> Tensor:
    """Rows (B, ...) of all ranks in rank order, without gradients; `sizes` as from `sizes_of_ranks`."""
    sizes = sizes_of_ranks(rows) if sizes is None else sizes
    if len(sizes) == 1:
        return rows
    # shorter parts are padded for the transfer
    padded = torch.cat([rows, rows.new_zeros(max(sizes) - len(rows), *rows.shape[1:])]).contiguous()
    parts = [torch.empty_like(padded) for _ in sizes]
    torch.distributed.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
