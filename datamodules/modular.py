"""Sums modulo a number: the algorithmic data set on which grokking was found."""

from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from callbacks.rng import make_generator
from datamodules.batches import BatchOrder, FieldDataset, Passes, loader


def addition_table(modulus: int) -> tuple[Tensor, Tensor]:
    """All pairs as tokens (p * p, 3) int64, a, b and p for "=", and their sums modulo p (p * p,) int64."""
    a, b = torch.meshgrid(torch.arange(modulus), torch.arange(modulus), indexing="ij")
    equals = torch.full_like(a, modulus)
    return torch.stack([a, b, equals], dim=-1).reshape(-1, 3), ((a + b) % modulus).flatten()


class ModularAddition(L.LightningDataModule):
    """a + b modulo p, a random share of all pairs to train on, a tenth of the rest to validate, the others to test.

    A batch is a dict: `input_ids` (B, 3), `label` (B,), `index` (B,), all int64. As pairs (a, b) and (b, a) are split
    independently, about half of the test sums are in the training set the other way round.

    Args:
        modulus: p.
        train_fraction: share of the pairs.
        batch_size: global; null takes all training pairs at once.
        passes: over the training pairs in an epoch.
        split_seed: null takes the run's seed.
    """

    def __init__(
        self,
        modulus: int = 113,
        train_fraction: float = 0.3,
        batch_size: int | None = None,
        passes: int = 1,
        split_seed: int | None = None,
    ) -> None:
        super().__init__()
        if modulus < 2:
            raise ValueError(f"data.modulus must be at least 2, got {modulus}")
        if not 0 < train_fraction < 1:
            raise ValueError(f"data.train_fraction must be in (0, 1), got {train_fraction}")
        if passes < 1:
            raise ValueError(f"data.passes must be at least 1, got {passes}")
        self.num_classes = modulus
        self.train_fraction, self.batch_size = train_fraction, batch_size
        self.passes, self.split_seed = passes, split_seed
        self._parts: dict[str, FieldDataset] = {}

    def setup(self, stage: str | None = None) -> None:
        """Splits; the same on every rank."""
        if self._parts:
            return
        tokens, sums = addition_table(self.num_classes)
        order = torch.randperm(len(sums), generator=make_generator("split", seed=self.split_seed))
        num_train = round(self.train_fraction * len(sums))
        num_val = (len(sums) - num_train) // 10
        parts = order.split([num_train, num_val, len(sums) - num_train - num_val])
        if min(len(rows) for rows in parts) == 0:
            raise ValueError(f"data.train_fraction {self.train_fraction} leaves an empty part of {len(sums)} pairs")
        self._parts = {
            name: FieldDataset({"input_ids": tokens[rows], "label": sums[rows]})
            for name, rows in zip(("train", "val", "test"), parts, strict=True)
        }

    def examples(self, part: Literal["train", "val", "test"]) -> FieldDataset:
        """Fields of a part by position."""
        return self._parts[part]

    def as_evaluated(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Nothing is augmented."""
        return batch

    def train_dataloader(self) -> DataLoader:
        """Training pairs; the order is a function of (seed, epoch)."""
        train = self._parts["train"]
        data = train if self.passes == 1 else Passes([train] * self.passes)
        return loader(data, self._order(train, self.batch_size or len(train), True, self.passes))

    def val_dataloader(self) -> list[DataLoader]:
        """Validation and test pairs."""
        return [self._whole(self._parts[part]) for part in ("val", "test")]

    def test_dataloader(self) -> DataLoader:
        """Test pairs."""
        return self._whole(self._parts["test"])

    def _whole(self, data: FieldDataset) -> DataLoader:
        replicas = 1 if self.trainer is None else self.trainer.world_size
        return loader(data, self._order(data, -(-len(data) // replicas) * replicas, False, 1))

    def _order(self, data: FieldDataset, batch_size: int, shuffle: bool, passes: int) -> BatchOrder:
        rank, replicas = (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
        return BatchOrder(len(data), batch_size, shuffle, passes, rank, replicas)
