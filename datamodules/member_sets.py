"""Two-class points for ensembles of nets, each with its own training set: synthetic ones, and classes of pictures."""

from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from callbacks.rng import make_generator
from datamodules.sources import ImageSource


@dataclass(frozen=True)
class MemberSets:
    """Training sets of R replicas over one pool of points, and the test set that all share.

    Attributes:
        pool: (M, ...) float32.
        label: (M,) float32 in {-1, +1}.
        rows: (R, P) int64, the training points of each replica in the pool. A net with fewer points takes the first.
        test, test_label: (K, ...) float32 and (K,) float32.
    """

    pool: Tensor
    label: Tensor
    rows: Tensor
    test: Tensor
    test_label: Tensor


def depleted_sign(count: int, dim: int, chi: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Points whose label is the sign of their first coordinate, which is rare near zero.

    Args:
        count: n.
        dim: d.
        chi: density of x1 is proportional to |x1|^chi exp(-x1^2 / 2); 0 gives a Gaussian.
        generator: of these draws.

    Returns:
        (n, d) float32 points, the other coordinates N(0, 1), and (n,) float32 labels in {-1, +1}.

    Source: arXiv 2301.13703, official code: `dataset.py`, which draws sign * sqrt(2 g), g ~ Gamma((chi + 1) / 2).
    """
    points = torch.randn(count, dim, generator=generator)
    shape = torch.full((count,), (chi + 1) / 2, dtype=torch.float64)
    size = (2 * torch._standard_gamma(shape, generator=generator)).sqrt().float()
    # a draw of zero would have no label
    points[:, 0] = points[:, 0].sign() * size.clamp_min(torch.finfo(torch.float32).tiny)
    return points, points[:, 0].sign()


class MemberData(L.LightningDataModule):
    """What the two kinds of data share. An epoch is `bursts` empty batches: the nets draw their own.

    Args:
        num_test: test points.
        bursts: batches of an epoch, after which there is a checkpoint and a row of metrics.
    """

    def __init__(self, num_test: int, bursts: int) -> None:
        super().__init__()
        if num_test < 1 or bursts < 1:
            raise ValueError(f"data.num_test and data.bursts must be at least 1, got {num_test} and {bursts}")
        self.num_test = num_test
        self.bursts = bursts

    def member_sets(self, replicas: int, points: int) -> MemberSets:
        """The points of so many replicas with so many training points each; a function of the run's seed."""
        raise NotImplementedError

    def point_shape(self, picture: tuple[int, ...] | None = None) -> tuple[int, ...]:
        """Shape of a point; `picture` is that of a stored picture where the data are not at hand."""
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """All settings that the points depend on, apart from the run's seed."""
        raise NotImplementedError

    def train_dataloader(self) -> DataLoader:
        """Numbers of the bursts."""
        numbers: Any = [{"burst": torch.tensor(number)} for number in range(self.bursts)]
        # a generator of its own keeps the global random state untouched
        return DataLoader(numbers, batch_size=None, generator=make_generator("loader"))


class SignPoints(MemberData):
    """`depleted_sign` points; each replica draws its own, the test set does not depend on the run's seed.

    Args:
        dim: d.
        chi: see `depleted_sign`.
        num_test: test points.
        test_seed: seed of the test points.
        bursts: see `MemberData`.
    """

    def __init__(
        self, dim: int = 32, chi: float = 1.0, num_test: int = 4096, test_seed: int = 0, bursts: int = 50
    ) -> None:
        super().__init__(num_test, bursts)
        if dim < 2 or chi <= -1:
            raise ValueError(f"data.dim must be at least 2 and data.chi above -1, got {dim} and {chi}")
        self.dim, self.chi, self.test_seed = dim, chi, test_seed

    def describe(self) -> dict[str, Any]:
        """As in `MemberData`."""
        test = {"num_test": self.num_test, "test_seed": self.test_seed}
        return {"points": "sign", "dim": self.dim, "chi": self.chi, **test}

    def point_shape(self, picture: tuple[int, ...] | None = None) -> tuple[int, ...]:
        """As in `MemberData`."""
        return (self.dim,)

    def member_sets(self, replicas: int, points: int) -> MemberSets:
        """As in `MemberData`; fewer points are the first of more."""
        drawn = [self._draw(f"points/{replica}", None, points) for replica in range(replicas)]
        test = self._draw("test points", self.test_seed, self.num_test)
        pool, label = (torch.cat(parts) for parts in zip(*drawn, strict=True))
        return MemberSets(pool, label, torch.arange(replicas * points).view(replicas, points), *test)

    def _draw(self, purpose: str, seed: int | None, count: int) -> tuple[Tensor, Tensor]:
        """In blocks of 1,024 with a generator each: how many are drawn changes none of them."""
        blocks = [
            depleted_sign(1024, self.dim, self.chi, make_generator(f"{purpose}/{number}", seed=seed))
            for number in range(-(-count // 1024))
        ]
        points, labels = (torch.cat(parts)[:count] for parts in zip(*blocks, strict=True))
        return points, labels


class PictureClasses(MemberData):
    """Pictures of two groups of classes. Each replica shuffles the training pool and takes its first points.

    Args:
        source: the pictures.
        positive: classes with label +1; the others have -1.
        pool: edge of the squares that are averaged (1 leaves the pictures as they are).
        merge: True pools training and test file, shuffles them and cuts the test set off (the paper); False takes the
            first pictures of the test file.
        num_test: test pictures.
        test_seed: seed of that shuffle.
        bursts: see `MemberData`.
    """

    def __init__(
        self,
        source: ImageSource,
        positive: list[int],
        pool: int = 1,
        merge: bool = False,
        num_test: int = 2000,
        test_seed: int = 0,
        bursts: int = 50,
    ) -> None:
        super().__init__(num_test, bursts)
        if not positive or pool < 1:
            raise ValueError(f"data.positive must name a class and data.pool be at least 1, got {positive} and {pool}")
        self.source, self.positive, self.pool = source, positive, pool
        self.merge, self.test_seed = merge, test_seed

    def describe(self) -> dict[str, Any]:
        """As in `MemberData`; where the files lie does not count."""
        settings = {key: value for key, value in vars(self.source).items() if key != "root"}
        own = {key: getattr(self, key) for key in ("positive", "pool", "merge", "num_test", "test_seed")}
        return {"points": type(self.source).__name__, **settings, **own}

    def point_shape(self, picture: tuple[int, ...] | None = None) -> tuple[int, ...]:
        """As in `MemberData`."""
        if picture is None:
            images: Any = self.source.load().train_images
            picture = tuple(images.shape[1:])
        return (picture[0], *(size // self.pool for size in picture[1:]))

    def member_sets(self, replicas: int, points: int) -> MemberSets:
        """As in `MemberData`."""
        images, labels, test_from = self._merged() if self.merge else self._apart()
        train, test = slice(0, test_from), slice(test_from, test_from + self.num_test)
        if points > test_from or self.num_test > len(images) - test_from:
            raise ValueError(
                f"model.train_sizes and data.num_test must be at most {test_from} and {len(images) - test_from}, the "
                f"pictures there are, got {points} and {self.num_test}"
            )
        orders = [
            torch.randperm(test_from, generator=make_generator(f"points/{replica}"))[:points]
            for replica in range(replicas)
        ]
        return MemberSets(images[train], labels[train], torch.stack(orders), images[test], labels[test])

    def _apart(self) -> tuple[Tensor, Tensor, int]:
        """Training file, then test file; and where the second begins."""
        sets: Any = self.source.load()
        images, labels = (
            torch.cat([sets.train_images, sets.test_images]),
            torch.cat([sets.train_labels, sets.test_labels]),
        )
        return *self._scaled(images, labels), len(sets.train_images)

    def _merged(self) -> tuple[Tensor, Tensor, int]:
        """All pictures shuffled, the test set last."""
        images, labels, _ = self._apart()
        order = torch.randperm(len(images), generator=make_generator("test points", seed=self.test_seed))
        return images[order], labels[order], max(len(images) - self.num_test, 0)

    def _scaled(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Averaged over squares, one mean and one standard deviation for all; labels in {-1, +1}."""
        values = images.float()
        if self.pool > 1:
            values = F.avg_pool2d(values, self.pool)
        mean = values.mean(dtype=torch.float64)
        values -= mean
        values /= values.square().mean(dtype=torch.float64).sqrt()
        return values, torch.where(torch.isin(labels, torch.tensor(self.positive)), 1.0, -1.0)
