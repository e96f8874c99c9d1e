"""Batches that are a function of (key, step) alone: a net's draws do not depend on the nets beside it."""

import torch
from torch import Tensor

_GOLDEN_RATIO = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64
_MIX = (-4658895280553007687, -7723592293110705685)  # 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _shift(value: Tensor, bits: int) -> Tensor:
    """Logical shift to the right: torch's keeps the sign."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def splitmix64(value: Tensor) -> Tensor:
    """Finaliser of splitmix64, int64 in and out; products wrap around. Source: Steele et al., OOPSLA 2014."""
    value = value + _GOLDEN_RATIO
    value = (value ^ _shift(value, 30)) * _MIX[0]
    value = (value ^ _shift(value, 27)) * _MIX[1]
    return value ^ _shift(value, 31)


def counter_subsets(keys: Tensor, first: Tensor, steps: int, points: Tensor, batch: int) -> Tensor:
    """Uniform subsets without replacement, by Floyd's algorithm on hashed counters.

    Args:
        keys: (N,) int64, one stream of each net.
        first: (N,) int64, number of the first step.
        steps: S, how many steps to draw for.
        points: (N,) int64 P, the numbers drawn are 0..P-1.
        batch: B, at most the smallest P. The mean over a batch does not see its order, which is not uniform.

    Returns:
        (S, N, B) int64.

    Raises:
        ValueError: batch is larger than the smallest P.
    """
    if batch > int(points.min()):
        raise ValueError(f"a batch must not be larger than the training set {int(points.min())}, got {batch}")
    counters = first + torch.arange(steps, device=keys.device).unsqueeze(-1)
    # two rounds: neighbouring steps of one key, and equal steps of neighbouring keys, are unrelated
    base = splitmix64(splitmix64(keys) + counters).unsqueeze(-1)
    draws = splitmix64(base + torch.arange(batch, device=keys.device)) & ((1 << 63) - 1)
    chosen = torch.empty_like(draws)
    for slot in range(batch):
        largest = points - batch + slot
        drawn = draws[..., slot] % (largest + 1)
        taken = (chosen[..., :slot] == drawn.unsqueeze(-1)).any(-1)
        chosen[..., slot] = torch.where(taken, largest, drawn)
    return chosen


def take_points(pool: Tensor, rows: Tensor, out: Tensor) -> Tensor:
    """pool[rows], a row copied at once: at 784 inputs a quarter of the time of indexing, which goes number by number.

    Args:
        pool: (M, ...) points.
        rows: (N, B) int64.
        out: memory of the result: empty, which is made to fit, or `out` of a call with as many rows.

    Returns:
        (N, B, ...), a view of `out`: it holds until the next call.
    """
    return torch.index_select(pool, 0, rows.flatten(), out=out).view(*rows.shape, *pool.shape[1:])
