"""Points whose structure is known, for studies of estimators."""

from abc import abstractmethod

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from callbacks.rng import make_generator, run_seed
from datamodules.batches import BatchOrder, FieldDataset, loader


class PointCloud(L.LightningDataModule):
    """All points in one batch: `point` (n, d) float64, `label` and `index` (n,) int64."""

    num_classes = 1

    @abstractmethod
    def draw(self) -> tuple[Tensor, Tensor]:
        """Points and labels, a function of the run's seed."""

    def train_dataloader(self) -> DataLoader:
        """One batch."""
        points, labels = self.draw()
        return loader(FieldDataset({"point": points, "label": labels}), BatchOrder(len(points), len(points), False))


class Blobs(PointCloud):
    """Three Gaussian blobs of scikit-learn plus uniform noise; a share of the labels is permuted among themselves.

    Args:
        num_points, dim: n, d.
        corruption: share of permuted labels, in [0, 1].
        noise: half width of the uniform noise.

    Source: arXiv 2312.04823, official code (toy study of mutual information).
    """

    num_classes = 3

    def __init__(self, num_points: int = 600, dim: int = 20, corruption: float = 0.0, noise: float = 0.1) -> None:
        super().__init__()
        if not 0 <= corruption <= 1:
            raise ValueError(f"data.corruption must be in [0, 1], got {corruption}")
        self.num_points, self.dim, self.corruption, self.noise = num_points, dim, corruption, noise

    def draw(self) -> tuple[Tensor, Tensor]:
        """As in `PointCloud`."""
        from sklearn.datasets import make_blobs

        centres, labels = make_blobs(self.num_points, self.dim, centers=3, random_state=run_seed())
        points, labels = torch.from_numpy(centres), torch.from_numpy(labels).long()
        points = points + self.noise * _uniform(points.shape, "blobs/noise")
        generator = make_generator("blobs/corruption")
        count = round(self.corruption * self.num_points)
        chosen = torch.randperm(self.num_points, generator=generator)[:count]
        labels[chosen] = labels[chosen[torch.randperm(count, generator=generator)]]
        return points, labels


class IntrinsicDimension(PointCloud):
    """Uniform points of which only the first coordinates vary, the others are one constant, plus uniform noise.

    Args:
        num_points, dim: n, d.
        intrinsic_dim: coordinates that vary, uniform in [-1, 1).
        noise: half width of the uniform noise.

    Source: arXiv 2312.04823, official code (toy study of entropy).
    """

    def __init__(self, num_points: int = 300, dim: int = 512, intrinsic_dim: int = 8, noise: float = 0.1) -> None:
        super().__init__()
        if not 1 <= intrinsic_dim <= dim:
            raise ValueError(f"data.intrinsic_dim must be in 1..{dim}, got {intrinsic_dim}")
        self.num_points, self.dim, self.intrinsic_dim, self.noise = num_points, dim, intrinsic_dim, noise

    def draw(self) -> tuple[Tensor, Tensor]:
        """As in `PointCloud`."""
        points = torch.zeros(self.num_points, self.dim, dtype=torch.float64)
        varying = (self.num_points, self.intrinsic_dim)
        points[:, : self.intrinsic_dim] = _uniform(varying, "dimension/points")
        points += self.noise * _uniform(points.shape, "dimension/noise")
        return points, torch.zeros(self.num_points, dtype=torch.int64)


def _uniform(shape: tuple[int, ...] | torch.Size, purpose: str) -> Tensor:
    """Uniform in [-1, 1), float64."""
    return 2 * torch.rand(shape, generator=make_generator(purpose), dtype=torch.float64) - 1
