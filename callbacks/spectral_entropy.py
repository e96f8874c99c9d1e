r"""Diffusion spectral entropy (DSE) and mutual information (DSMI) of a net's representations.

Legend: n points z_i in R^d, B categories, s bandwidth, t diffusion time. Everything in float64, entropies in bits.

    G_ij = exp(-|z_i - z_j|^2 / (2 s^2)),  K = D^-1/2 G D^-1/2,  D = diag(row sums of G)
    p_i = |lambda_i(K)|^t / sum_j |lambda_j(K)|^t,  DSE = -sum_i p_i log2 p_i
"""

import math
import random
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from callbacks.categories import spectral_clusters
from callbacks.held_out import HeldOutOutputs
from callbacks.layers import find_layers

EPS = torch.finfo(torch.float64).eps
"""Added to each normalised eigenvalue before the logarithm: official code."""

Normalisation = Literal["official", "anisotropic"]
Bandwidth = float | Literal["sqrt_dim", "median"]


class Information(NamedTuple):
    """Mutual information in bits, and the entropy that random subsets of the categories' sizes have (its ceiling)."""

    value: float
    subset_entropy: float


def squared_distances(points: Tensor) -> Tensor:
    """(n, d) -> (n, n) float64 squared Euclidean distances, one matrix product; diagonal 0, none negative."""
    # centring changes no distance and keeps the difference of large norms exact
    wide = points.double()
    centred = wide - wide.mean(0)
    norms = torch.linalg.vecdot(centred, centred)
    squared = torch.addmm(norms[:, None] + norms, centred, centred.T, alpha=-2).clamp_min_(0)
    return squared.fill_diagonal_(0)


def bandwidth(sigma: Bandwidth, points: Tensor, squared: Tensor) -> float:
    """s: a number as it is, `sqrt_dim` the root of d, `median` the median distance between two points."""
    if sigma == "sqrt_dim":
        return math.sqrt(points.shape[1])
    if sigma == "median":
        return median_distance(squared)
    return float(sigma)


def median_distance(squared: Tensor) -> float:
    """Median of the distances between different points, from (n, n) squared distances."""
    rows, columns = torch.triu_indices(len(squared), len(squared), 1, device=squared.device)
    return float(squared[rows, columns].median().sqrt())


def diffusion_matrix(gauss: Tensor, normalisation: Normalisation = "official") -> Tensor:
    r"""Symmetric matrix whose eigenvalues are those of the diffusion operator.

    Args:
        gauss: (..., n, n) float64 G.
        normalisation: `official` is K: the eigenvalues of the isotropic walk D^-1 G, which the official code takes for
            those of the paper's operator and from which all published numbers come. `anisotropic` is the paper's
            D_K^-1 K, here as D_K^-1/2 K D_K^-1/2.

    Returns:
        (..., n, n) float64.

    Source: arXiv 2312.04823, section on diffusion geometry; package dse_dsmi.
    """
    if normalisation not in ("official", "anisotropic"):
        raise ValueError(f"normalisation must be official or anisotropic, got {normalisation!r}")
    matrix = gauss
    for _ in range(1 if normalisation == "official" else 2):
        scale = matrix.sum(-1).rsqrt()
        matrix = (matrix * scale[..., :, None]).mul_(scale[..., None, :])
    return matrix


def eigenvalue_entropy(eigenvalues: Tensor, t: float = 1.0) -> Tensor:
    """(..., n) eigenvalues -> (...) entropy in bits of |lambda|^t / sum |lambda|^t. Source: package dse_dsmi."""
    powers = eigenvalues.abs() ** t
    shares = powers / powers.sum(-1, keepdim=True) + EPS
    return -(shares * shares.log2()).sum(-1)


def diffusion_spectral_entropy(
    points: Tensor,
    sigma: Bandwidth = 10.0,
    t: float = 1.0,
    max_points: int = 10_000,
    seed: int = 0,
    normalisation: Normalisation = "official",
) -> float:
    """DSE of points.

    Args:
        points: (n, d) float, finite; computed in float64 where they are.
        sigma: bandwidth s in the units of the points, `sqrt_dim` or `median`.
        t: diffusion time.
        max_points: of more points a sample of this size is taken.
        seed: of that sample.
        normalisation: see `diffusion_matrix`.

    Returns:
        Bits, from 0 (all points equal) to log2 n (all far apart).

    Raises:
        ValueError: not (n, d), fewer than one point, or values that are not finite.

    Source: arXiv 2312.04823, definition of DSE; package dse_dsmi.
    """
    _check_points(points)
    if len(points) > max_points:
        points = points[random.Random(seed).sample(range(len(points)), k=max_points)]
    return float(_entropies(gaussian_kernel(points, sigma), t, normalisation))


def diffusion_spectral_mutual_information(
    points: Tensor,
    categories: Tensor,
    sigma: Bandwidth = 10.0,
    t: float = 1.0,
    repetitions: int = 5,
    seed: int = 0,
    normalisation: Normalisation = "official",
) -> Information:
    """DSMI of points and the category of each: sum_b n_b / n (mean_r DSE(random n_b points) - DSE(points of b)).

    Args:
        points: (n, d) float, finite.
        categories: (n,) integers: labels, `categories.equal_width_bins` of a number, or
            `categories.spectral_clusters` of a vector.
        sigma, t, normalisation: as in `diffusion_spectral_entropy`; `sqrt_dim` and `median` are those of all points.
        repetitions: random subsets per size.
        seed: of the subsets; categories of equal size share theirs, as in the official code.

    Returns:
        Bits; small negative values occur. At most log2 of the size of the largest category.

    Source: arXiv 2312.04823, definition of DSMI; package dse_dsmi.
    """
    _check_points(points)
    return kernel_mutual_information(gaussian_kernel(points, sigma), categories, t, repetitions, seed, normalisation)


def gaussian_kernel(points: Tensor, sigma: Bandwidth) -> Tensor:
    """(n, d) -> (n, n) float64 G."""
    squared = squared_distances(points)
    # in place: at n = 10,000 each copy is 0.8 GB
    return squared.div_(-2 * bandwidth(sigma, points, squared) ** 2).exp_()


def kernel_mutual_information(
    gauss: Tensor,
    categories: Tensor,
    t: float = 1.0,
    repetitions: int = 5,
    seed: int = 0,
    normalisation: Normalisation = "official",
) -> Information:
    """DSMI from the (n, n) float64 G of all points, of which every term needs a block; other arguments as above."""
    return _mutual_information(
        categories, lambda rows: _entropies(_blocks(gauss, rows), t, normalisation), repetitions, seed
    )


def mutual_information(
    points: Tensor, categories: Tensor, entropy: Callable[[Tensor], float], repetitions: int = 5, seed: int = 0
) -> float:
    """The same difference of entropies as in DSMI with another entropy of (n, d) points, e.g. Shannon's of bins."""
    return _mutual_information(
        categories,
        lambda rows: torch.tensor([entropy(points[r]) for r in rows], dtype=torch.float64),
        repetitions,
        seed,
    ).value


def _mutual_information(
    categories: Tensor, entropies: Callable[[Tensor], Tensor], repetitions: int, seed: int
) -> Information:
    """`entropies` maps rows (r, k) to (r,). Categories of equal size are taken together."""
    count = len(categories)
    by_category = [(categories == value).nonzero()[:, 0].tolist() for value in categories.unique().tolist()]
    value = ceiling = 0.0
    for size in sorted({len(rows) for rows in by_category}):
        members = [rows for rows in by_category if len(rows) == size]
        draw = random.Random(seed)
        subsets = [draw.sample(range(count), k=size) for _ in range(repetitions)]
        found = entropies(torch.tensor(subsets + members))
        unconditional = float(found[:repetitions].mean())
        value += size / count * float((unconditional - found[repetitions:]).sum())
        ceiling += size * len(members) / count * unconditional
    return Information(value, ceiling)


def _blocks(gauss: Tensor, rows: Tensor) -> Tensor:
    rows = rows.to(gauss.device)
    return gauss[rows[:, :, None], rows[:, None, :]]


def _entropies(gauss: Tensor, t: float, normalisation: Normalisation) -> Tensor:
    return eigenvalue_entropy(torch.linalg.eigvalsh(diffusion_matrix(gauss, normalisation)), t)


def _check_points(points: Tensor) -> None:
    if points.ndim != 2 or len(points) == 0:
        raise ValueError(f"points must have shape (n, d) with n > 0, got {tuple(points.shape)}")
    if not points.isfinite().all():
        raise ValueError("points must be finite, got NaN or infinity")


class SpectralEntropy(Callback):
    """DSE and DSMI of chosen layers on fixed held-out examples, read from the validation pass that runs anyway.

    Works on any module whose `validation_step` calls the layers, with batches that carry `index`; DSMI needs `label`
    or the inputs in the batch. No forward pass of its own: hooks read the outputs, each rank's part goes to rank 0 by
    `index`, rank 0 computes. With `trainer.num_sanity_val_steps: -1` the state before training is measured too.

    Logged for each layer: `dse/<layer>`; `dse_share/...`, its share of log2 n; `dsmi_y/...` and `dsmi_x/...`;
    `dsmi_ceiling/...`, the entropy of random subsets as a share of log2 of their mean size: near 1, DSMI is squeezed to
    0 whatever the classes do; `feature/norm/...` and `feature/distance/...`, medians (s = 10 does not adapt to them);
    with a start, `dse_start/...` and `dse_rise/...`.

    Args:
        layers: names or globs of submodules; a layer called several times in a batch counts by its first output.
        num_points: examples of the loader, chosen once; all where it has fewer. The cost grows with the cube.
        sigma, t, normalisation: as in `diffusion_spectral_entropy`.
        every_n_epochs: between measurements.
        loader: position among the validation loaders; -1 is the last, by convention clean test examples.
        label: batch field of the classes; null for none.
        inputs: batch field whose spectral clusters give DSMI with the inputs; null for none. Needs scikit-learn.
        num_clusters: of the inputs.
        pool: mean over all axes after the first two (convolutions) instead of flattening.
        seed: of the choice of examples, the same in all runs.

    Source: arXiv 2312.04823.
    """

    def __init__(
        self,
        layers: list[str],
        num_points: int = 500,
        sigma: Bandwidth = 10.0,
        t: float = 1.0,
        normalisation: Normalisation = "official",
        every_n_epochs: int = 1,
        loader: int = -1,
        label: str | None = "label",
        inputs: str | None = None,
        num_clusters: int = 10,
        pool: bool = False,
        seed: int = 0,
    ) -> None:
        if not layers:
            raise ValueError("SpectralEntropy.layers must name at least one layer, got []")
        for name, value, least in (("num_points", num_points, 2), ("every_n_epochs", every_n_epochs, 1)):
            if value < least:
                raise ValueError(f"SpectralEntropy.{name} must be at least {least}, got {value}")
        if not isinstance(sigma, str) and sigma <= 0:
            raise ValueError(f"SpectralEntropy.sigma must be positive, sqrt_dim or median, got {sigma}")
        self.patterns = layers
        self.sigma, self.t, self.normalisation = sigma, t, normalisation
        self.every_n_epochs, self.num_clusters = every_n_epochs, num_clusters
        self.label, self.inputs = label, inputs
        self.choice = {"loader": loader, "num_points": num_points, "seed": seed, "pool": pool}
        self.start: dict[str, float] = {}
        self.clusters: Tensor | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Names unknown layers before anything is trained."""
        layers = find_layers(pl_module, self.patterns, "SpectralEntropy.layers")
        self.outputs = HeldOutOutputs(layers, **self.choice)  # type: ignore[arg-type]

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts to read, if this epoch is to be measured."""
        self._due = trainer.sanity_checking or (trainer.current_epoch + 1) % self.every_n_epochs == 0
        if self._due:
            self.outputs.start(trainer)

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Finds the chosen examples of this batch."""
        if self._due:
            inputs = self.inputs if self.clusters is None else None
            self.outputs.before_batch(batch, dataloader_idx, tuple(filter(None, (self.label, inputs))))

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Reads nothing between batches."""
        self.outputs.after_batch()

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Joins the ranks' parts, measures on rank 0 and logs there as everywhere."""
        if not self._due:
            return
        points = self.outputs.joined(trainer)
        metrics: list[Any] = [None if points is None else self._measure(points)]
        if trainer.world_size > 1:
            torch.distributed.broadcast_object_list(metrics)
        if trainer.sanity_checking:
            self.start = {name: value for name, value in metrics[0].items() if name.startswith("dse/")}
            return
        for name, value in self.start.items():
            layer = name.removeprefix("dse/")
            metrics[0] |= {f"dse_start/{layer}": value, f"dse_rise/{layer}": metrics[0][name] - value}
        pl_module.log_dict(metrics[0], rank_zero_only=False)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leaves no hooks behind."""
        if hasattr(self, "outputs"):
            self.outputs.stop()

    def state_dict(self) -> dict[str, Any]:
        """The start and the clusters of the inputs, so that a resumed run measures against the same."""
        return {"start": self.start, "clusters": self.clusters}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes them back."""
        self.start, self.clusters = dict(state_dict["start"]), state_dict["clusters"]

    def _measure(self, points: Mapping[str, Tensor]) -> dict[str, float]:
        """Metrics of all layers."""
        categories = {} if self.label is None else {"y": points[f"batch/{self.label}"]}
        if self.inputs is not None:
            if self.clusters is None:
                self.clusters = spectral_clusters(_shrunk(points[f"batch/{self.inputs}"]), self.num_clusters)
            categories["x"] = self.clusters
        metrics: dict[str, float] = {}
        for name in self.outputs.layers:
            metrics |= {f"{key}/{name}": value for key, value in self._of_layer(points[name], categories).items()}
        return metrics

    def _of_layer(self, points: Tensor, categories: Mapping[str, Tensor]) -> dict[str, float]:
        _check_points(points)
        squared = squared_distances(points)
        distance = median_distance(squared)
        gauss = squared.div_(-2 * bandwidth(self.sigma, points, squared) ** 2).exp_()
        dse = float(_entropies(gauss, self.t, self.normalisation))
        found = {
            "dse": dse,
            "dse_share": dse / math.log2(len(points)),
            "feature/norm": float(torch.linalg.vector_norm(points.double(), dim=1).median()),
            "feature/distance": distance,
        }
        for kind, values in categories.items():
            information = kernel_mutual_information(gauss, values, self.t, normalisation=self.normalisation)
            found[f"dsmi_{kind}"] = information.value
            if kind == "y":
                mean_size = len(values) / len(values.unique())
                found["dsmi_ceiling"] = information.subset_entropy / math.log2(mean_size) if mean_size > 1 else 0.0
        return found


def _shrunk(inputs: Tensor) -> Tensor:
    """(B, ...) -> (B, d); pictures of more than 64 x 64 pixels are made smaller first (official code: nearest)."""
    if inputs.ndim == 4 and max(inputs.shape[2:]) > 64:
        inputs = torch.nn.functional.interpolate(inputs, size=(64, 64))
    return inputs.float().flatten(1)
