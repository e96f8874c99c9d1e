"""Points labelled by a linear teacher: the whole problem is one batch."""

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from callbacks.rng import make_generator


class LinearTeacher(L.LightningDataModule):
    """y = <beta, x>, x ~ N(0, I), beta ~ N(0, I / d). Everything is float64.

    The one batch of an epoch is {`input` (P, d), `target` (P,), `teacher` (d,)}, the same on all ranks.

    Args:
        dim: d.
        count: number of points P.
        data_seed: seed of the draws; None takes the run's seed.
    """

    def __init__(self, dim: int = 20, count: int = 400, data_seed: int | None = None) -> None:
        super().__init__()
        if dim < 1 or count < 1:
            raise ValueError(f"data.dim and data.count must be at least 1, got {dim} and {count}")
        self.dim = dim
        self.count = count
        self.data_seed = data_seed
        self._problem: dict[str, Tensor] | None = None

    def problem(self) -> dict[str, Tensor]:
        """The batch, drawn on first use."""
        if self._problem is None:
            generator = make_generator("teacher", seed=self.data_seed)
            teacher = torch.randn(self.dim, generator=generator, dtype=torch.float64) / self.dim**0.5
            points = torch.randn(self.count, self.dim, generator=generator, dtype=torch.float64)
            self._problem = {"input": points, "target": points @ teacher, "teacher": teacher}
        return self._problem

    def train_dataloader(self) -> DataLoader:
        """One batch, the problem itself."""
        return DataLoader([self.problem()], batch_size=None, generator=make_generator("loader"))  # type: ignore[arg-type]
