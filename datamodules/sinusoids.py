"""Sine waves on [0, 1]: regression targets of known frequency content."""

import math

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules.batches import BatchOrder, FieldDataset, loader


def midpoints(count: int) -> Tensor:
    """(count,) float64 midpoints (i + 1/2) / count of equal cells of [0, 1]."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def sinusoids(position: Tensor, frequencies: list[int]) -> Tensor:
    """(P, K) float64, sin(2 pi k x) for each frequency k, at positions x (P,)."""
    return torch.sin(2 * math.pi * position[:, None] * torch.tensor(frequencies, dtype=position.dtype))


class Sinusoids(L.LightningDataModule):
    """sin(2 pi k x) for several k at once; training and test points are the midpoints of different grids.

    A batch is everything: `position` (P,) and `target` (P, K) float64, `index` (P,) int64. Nothing is drawn.

    Args:
        frequencies: k of each of the K targets, in periods per unit length.
        num_train, num_test: points of the two grids.

    Raises:
        ValueError: no frequency, one below 1, or grids that share a point (both numbers odd multiples of a divisor).
    """

    def __init__(self, frequencies: list[int], num_train: int = 400, num_test: int = 1000) -> None:
        super().__init__()
        if not frequencies or min(frequencies) < 1 or len(set(frequencies)) < len(frequencies):
            raise ValueError(f"data.frequencies must be different whole numbers of at least 1, got {frequencies}")
        if min(num_train, num_test) < 1:
            raise ValueError(f"data.num_train and num_test must be at least 1, got {num_train} and {num_test}")
        shared = math.gcd(num_train, num_test)
        if num_train // shared % 2 and num_test // shared % 2:
            raise ValueError(f"data.num_train {num_train} and num_test {num_test} give grids that share points")
        self.frequencies = frequencies
        self.num_train = num_train
        self.num_test = num_test

    def train_dataloader(self) -> DataLoader:
        """One batch: the training grid."""
        return self._loader(self.num_train)

    def val_dataloader(self) -> DataLoader:
        """One batch: the test grid, evaluated after each epoch."""
        return self._loader(self.num_test)

    test_dataloader = val_dataloader

    def _loader(self, count: int) -> DataLoader:
        position = midpoints(count)
        fields = {"position": position, "target": sinusoids(position, self.frequencies)}
        return loader(FieldDataset(fields), BatchOrder(count, count, shuffle=False))
