"""Linear measurements of a low-rank matrix, part of them corrupted: the whole problem is one batch."""

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from callbacks.rng import make_generator


def low_rank_truth(dim: int, rank: int, generator: torch.Generator) -> Tensor:
    """(d, d) float64: random orthogonal projector of rank r, i.e. PSD with r eigenvalues 1."""
    basis = torch.linalg.qr(torch.randn(dim, rank, generator=generator, dtype=torch.float64)).Q
    return basis @ basis.T


def corruption(
    count: int, share: float, outlier_scale: float, dense_scale: float, generator: torch.Generator
) -> Tensor:
    """What is added to the measurements.

    Args:
        count: number of measurements m.
        share: share of them with a gross outlier, exactly round(share * m) of them (paper: p).
        outlier_scale: standard deviation of an outlier.
        dense_scale: standard deviation of the Gaussian noise on every measurement.
        generator: of these draws.

    Returns:
        (m,) float64.
    """
    values = dense_scale * torch.randn(count, generator=generator, dtype=torch.float64)
    hit = torch.randperm(count, generator=generator)[: round(share * count)]
    values[hit] += outlier_scale * torch.randn(len(hit), generator=generator, dtype=torch.float64)
    return values


class MatrixMeasurements(L.LightningDataModule):
    """y_i = <A_i, X*> + s_i with iid N(0, 1) entries of A_i, not symmetric. Everything is float64.

    The one batch of an epoch is a dict: `matrix` (m, d, d), `value` (m,) the measurements y, and, for diagnostics only,
    `truth` (d, d) and `corruption` (m,). All draws are those of the data: a function of the seed, equal on all ranks.

    Args:
        dim: d.
        rank: rank of the truth X* (paper: r), a projector.
        count: number of measurements m.
        share, outlier_scale, dense_scale: see `corruption`.
        data_seed: seed of the draws; None takes the run's seed.
    """

    def __init__(
        self,
        dim: int = 20,
        rank: int = 2,
        count: int = 400,
        share: float = 0.0,
        outlier_scale: float = 10.0,
        dense_scale: float = 0.0,
        data_seed: int | None = None,
    ) -> None:
        super().__init__()
        if dim < 1 or count < 1:
            raise ValueError(f"data.dim and data.count must be at least 1, got {dim} and {count}")
        if not 1 <= rank <= dim:
            raise ValueError(f"data.rank must be between 1 and data.dim {dim}, got {rank}")
        if not 0 <= share <= 1:
            raise ValueError(f"data.share, the share of corrupted measurements, must be in [0, 1], got {share}")
        if outlier_scale < 0 or dense_scale < 0:
            raise ValueError(
                f"data.outlier_scale and data.dense_scale must not be negative, got {outlier_scale} and {dense_scale}"
            )
        self.dim = dim
        self.rank = rank
        self.count = count
        self.share = share
        self.outlier_scale = outlier_scale
        self.dense_scale = dense_scale
        self.data_seed = data_seed
        self._problem: dict[str, Tensor] | None = None

    def problem(self) -> dict[str, Tensor]:
        """The batch, drawn on first use."""
        if self._problem is None:
            generator = make_generator("measurements", seed=self.data_seed)
            truth = low_rank_truth(self.dim, self.rank, generator)
            matrix = torch.randn(self.count, self.dim, self.dim, generator=generator, dtype=torch.float64)
            noise = corruption(self.count, self.share, self.outlier_scale, self.dense_scale, generator)
            value = matrix.flatten(1) @ truth.flatten() + noise
            self._problem = {"matrix": matrix, "value": value, "truth": truth, "corruption": noise}
        return self._problem

    def train_dataloader(self) -> DataLoader:
        """One batch, the problem itself."""
        # a generator of its own keeps the global random state untouched
        return DataLoader([self.problem()], batch_size=None, generator=make_generator("loader"))  # type: ignore[arg-type]
