"""Points of a linear factor model, many without and few with a label: the whole problem is one batch."""

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from callbacks.rng import make_generator


class FactorModel(L.LightningDataModule):
    """x = B z + factor_noise * N(0, I), y = <beta, z> + label_noise * N(0, 1), z ~ N(0, I_r), |beta| = 1. float64.

    The one batch of an epoch is a dict: `unlabelled` (m, d); `labelled` (n, d) and `label` (n,); and, for exact
    evaluation only, `loading` (d, r) and `beta` (r,). The factors z are seen by nobody. All draws are those of the
    data, the same on all ranks.

    Args:
        dim, rank: d and r, r < d.
        factor_noise: standard deviation of what hides the factors.
        label_noise: standard deviation on the label.
        num_unlabelled, num_labelled: m and n.
        data_seed: seed of the draws; None takes the run's seed.
    """

    def __init__(
        self,
        dim: int = 200,
        rank: int = 3,
        factor_noise: float = 3.0,
        label_noise: float = 0.3,
        num_unlabelled: int = 10000,
        num_labelled: int = 400,
        data_seed: int | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= rank < dim:
            raise ValueError(f"data.rank must be at least 1 and below data.dim {dim}, got {rank}")
        if factor_noise <= 0 or label_noise < 0:
            raise ValueError(
                "data.factor_noise must be positive and data.label_noise not negative, "
                f"got {factor_noise} and {label_noise}"
            )
        if num_unlabelled < 1 or num_labelled < 1:
            raise ValueError(
                f"data.num_unlabelled and data.num_labelled must be at least 1, got {num_unlabelled} and {num_labelled}"
            )
        self.dim = dim
        self.rank = rank
        self.factor_noise = factor_noise
        self.label_noise = label_noise
        self.num_unlabelled = num_unlabelled
        self.num_labelled = num_labelled
        self.data_seed = data_seed
        self._problem: dict[str, Tensor] | None = None

    def problem(self) -> dict[str, Tensor]:
        """The batch, drawn on first use."""
        if self._problem is None:
            truth = make_generator("factors/truth", seed=self.data_seed)
            loading = torch.randn(self.dim, self.rank, generator=truth, dtype=torch.float64)
            beta = torch.randn(self.rank, generator=truth, dtype=torch.float64)
            beta = beta / beta.norm()
            unlabelled, _ = self._points(loading, self.num_unlabelled, "unlabelled")
            labelled, factors = self._points(loading, self.num_labelled, "labelled")
            noise = make_generator("factors/label", seed=self.data_seed)
            label = factors @ beta
            label += self.label_noise * torch.randn(self.num_labelled, generator=noise, dtype=torch.float64)
            self._problem = {
                "unlabelled": unlabelled,
                "labelled": labelled,
                "label": label,
                "loading": loading,
                "beta": beta,
            }
        return self._problem

    def _points(self, loading: Tensor, count: int, name: str) -> tuple[Tensor, Tensor]:
        generators = (make_generator(f"factors/{name}/{part}", seed=self.data_seed) for part in ("z", "noise"))
        factors, noise = (
            torch.randn(count, size, generator=generator, dtype=torch.float64)
            for size, generator in zip((self.rank, self.dim), generators, strict=True)
        )
        return factors @ loading.T + self.factor_noise * noise, factors

    def train_dataloader(self) -> DataLoader:
        """One batch, the problem itself."""
        return DataLoader([self.problem()], batch_size=None, generator=make_generator("loader"))  # type: ignore[arg-type]
