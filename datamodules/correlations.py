"""Input-output correlations Sigma_yx of whitened inputs: all that gradient descent on a linear net sees of its data."""

from abc import abstractmethod

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from callbacks.rng import make_generator
from datamodules.sources import ImageSource


def whitened_correlation(inputs: Tensor, targets: Tensor, dims: int) -> Tensor:
    r"""Sigma_yx = (1 / P) sum y x^T of centred targets and inputs whitened to their `dims` strongest directions.

    Args:
        inputs: (P, D) float64.
        targets: (P, C) float64.
        dims: number of principal directions kept; each gets variance 1.

    Returns:
        (C, dims).

    Raises:
        ValueError: fewer than `dims` directions vary.
    """
    inputs, targets = inputs - inputs.mean(0), targets - targets.mean(0)
    variances, directions = torch.linalg.eigh(inputs.T @ inputs / len(inputs))
    varying = int((variances > 1e-10 * variances[-1]).sum())
    if not 1 <= dims <= varying:
        raise ValueError(f"data.dims must be between 1 and the {varying} directions in which inputs vary, got {dims}")
    whitened = inputs @ (directions[:, -dims:] / variances[-dims:].sqrt())
    return targets.T @ whitened / len(inputs)


def tree_correlation(levels: int) -> Tensor:
    """(2^(levels + 1) - 1, 2^levels): leaves of a binary tree as one-hot inputs, "is below this node" as targets."""
    items = torch.arange(2**levels)
    rows = [(items >> (levels - level)) == node for level in range(levels + 1) for node in range(2**level)]
    # inputs sqrt(P) e_i have Sigma_xx = I
    return torch.stack(rows).double() / len(items) ** 0.5


class Correlation(L.LightningDataModule):
    """The one batch of an epoch is the problem: {`correlation` (outputs, inputs)} float64, the same on all ranks."""

    _correlation: Tensor | None = None

    @abstractmethod
    def make(self) -> Tensor:
        """Sigma_yx (outputs, inputs) float64."""

    def correlation(self) -> Tensor:
        """Sigma_yx, made on first use."""
        if self._correlation is None:
            self._correlation = self.make()
        return self._correlation

    def train_dataloader(self) -> DataLoader:
        """One batch, the problem itself."""
        problem = {"correlation": self.correlation()}
        return DataLoader([problem], batch_size=None, generator=make_generator("loader"))  # type: ignore[arg-type]


class RandomModes(Correlation):
    """U diag(s) V^T with random orthogonal U and V.

    Args:
        singular_values: s, positive; the strengths of the modes.
        num_inputs, num_outputs: shape.
        data_seed: seed of U and V; None takes the run's seed.
    """

    def __init__(
        self,
        singular_values: list[float],
        num_inputs: int = 8,
        num_outputs: int = 8,
        data_seed: int | None = None,
    ) -> None:
        super().__init__()
        if not singular_values or min(singular_values) <= 0:
            raise ValueError(f"data.singular_values must be positive numbers, at least one, got {singular_values}")
        if len(singular_values) > min(num_inputs, num_outputs):
            raise ValueError(
                f"data.singular_values: at most {min(num_inputs, num_outputs)} fit {num_inputs} inputs and "
                f"{num_outputs} outputs, got {len(singular_values)}"
            )
        self.singular_values = singular_values
        self.num_inputs = num_inputs
        self.num_outputs = num_outputs
        self.data_seed = data_seed

    def make(self) -> Tensor:
        """As in `Correlation`."""
        generator = make_generator("modes", seed=self.data_seed)
        values = torch.tensor(self.singular_values, dtype=torch.float64)
        shapes = [(size, len(values)) for size in (self.num_outputs, self.num_inputs)]
        left, right = (
            torch.nn.init.orthogonal_(torch.empty(shape, dtype=torch.float64), generator=generator) for shape in shapes
        )
        return left * values @ right.T


class Tree(Correlation):
    """Items and properties of a binary tree, see `tree_correlation`; singular values fall by level.

    Args:
        levels: 2^levels items.
    """

    def __init__(self, levels: int = 3) -> None:
        super().__init__()
        if not 1 <= levels <= 10:
            raise ValueError(f"data.levels must be between 1 and 10, got {levels}")
        self.levels = levels

    def make(self) -> Tensor:
        """As in `Correlation`."""
        return tree_correlation(self.levels)


class WhitenedImages(Correlation):
    """Training pictures whitened to `dims` directions, one-hot classes minus their mean.

    Args:
        source: where the pictures are.
        dims: directions kept.
    """

    def __init__(self, source: ImageSource, dims: int = 32) -> None:
        super().__init__()
        self.source = source
        self.dims = dims

    def prepare_data(self) -> None:
        """Downloads, on one process."""
        self.source.load()

    def make(self) -> Tensor:
        """As in `Correlation`."""
        sets = self.source.load()
        images = sets.train_images
        if not isinstance(images, Tensor):
            raise ValueError("data.source must hold its pictures in memory, these are decoded on demand")
        one_hot = torch.nn.functional.one_hot(sets.train_labels, sets.num_classes).double()
        return whitened_correlation(images.flatten(1).double() / 255, one_hot, self.dims)
