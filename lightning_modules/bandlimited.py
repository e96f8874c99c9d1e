"""Shallow nets with bandlimited random weights: what width cannot buy (arXiv 2008.08427).

Legend: L bandwidth, n width, P points, K targets. Everything in float64: float32 moves each plateau.
"""

import itertools
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor, nn

from callbacks.rng import make_generator

Activation = Literal["tanh", "sigmoid", "gauss", "relu"]
Solver = Literal["ridge", "tsvd"]

RANK_TOLERANCE = 1e-8
"""Singular values above this share of the largest count towards the numerical rank."""
FITS = 0.05
"""Test RMSE below which a bandwidth counts as sufficient; the zero function has 0.707."""


def activate(values: Tensor, activation: Activation) -> Tensor:
    """tanh z, 1 / (1 + e^-z), exp(-z^2) or max(z, 0), elementwise."""
    if activation == "gauss":
        return torch.exp(-(values**2))
    return getattr(torch, activation)(values)


def unit_draws(width: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(n,) float64 draws of U[-1, 1] for the weights and U[0, 1] for the biases; the first m serve a net of width m."""
    weight, bias = torch.rand(width, 2, generator=generator, dtype=torch.float64).unbind(1)
    return 2 * weight - 1, bias


def hidden_parameters(
    unit_weight: Tensor, unit_bias: Tensor, bandwidth: float, bias: Literal["centre", "box"]
) -> tuple[Tensor, Tensor]:
    r"""Frozen weights w ~ U[-L, L] and biases of one net.

    Args:
        unit_weight, unit_bias: (n,) draws of `unit_draws`; nets of all bandwidths share them.
        bandwidth: L, in radians per unit length (paper: lambda).
        bias: `centre` takes b = -w u with u ~ U[0, 1], so that the unit's centre lies inside the data; `box` takes
            b ~ U[-L, L].

    Returns:
        w and b, each (n,).

    Source: arXiv 2008.08427, random weights on a bounded domain; `centre` is our choice.
    """
    weight = bandwidth * unit_weight
    return weight, -weight * unit_bias if bias == "centre" else bandwidth * (2 * unit_bias - 1)


def hidden_features(position: Tensor, weight: Tensor, bias: Tensor, activation: Activation) -> Tensor:
    """(P, n) features s(w_j x_i + b_j) of positions (P,) under weights and biases (n,)."""
    return activate(position[:, None] * weight + bias, activation)


def output_weights(features: Tensor, target: Tensor, solver: Solver, lam: float, rcond: float) -> tuple[Tensor, Tensor]:
    r"""Least-squares output layer from the singular value decomposition H = U diag(S) V^T.

    `ridge`: c = V diag(S / (S^2 + lam P)) U^T y, the minimiser of mean (H c - y)^2 + lam |c|^2.
    `tsvd`:  c = V_k diag(1 / S_k) U_k^T y over the S_k > rcond S_max.

    Args:
        features: (..., P, n) float64. The normal equations would square its condition number.
        target: (..., P, K) float64.
        solver: which of the two.
        lam: weight decay of `ridge`.
        rcond: cut-off of `tsvd`.

    Returns:
        c (..., n, K) and the singular values (..., min(P, n)), largest first.

    Source: ridge and truncated least squares; the paper leaves the solver open.
    """
    left, singular, right = torch.linalg.svd(features, full_matrices=False)
    if solver == "ridge":
        gain = singular / (singular**2 + lam * features.shape[-2])
    else:
        gain = torch.where(singular > rcond * singular[..., :1], 1 / singular, 0.0)
    return right.mT @ (gain[..., None] * (left.mT @ target)), singular


def numerical_rank(singular: Tensor, rcond: float = RANK_TOLERANCE) -> Tensor:
    """(...) int64 number of singular values (..., r) above rcond times the largest."""
    return (singular > rcond * singular[..., :1]).sum(-1)


def rmse(prediction: Tensor, target: Tensor) -> Tensor:
    """(..., K) root mean square error over the points (..., P, K)."""
    return (prediction - target).square().mean(-2).sqrt()


def failed_bandwidths(errors: Tensor, limit: float = FITS) -> Tensor:
    """(K,) int64: bandwidths below the first whose error (num_L, K) is under `limit`; num_L where none is."""
    return (errors < limit).cumsum(0).eq(0).sum(0)


class BandlimitedFeatures(L.LightningModule):
    """Nets of every bandwidth and width on every target, solved together; one epoch is the whole fit.

    Logs for each (k, L, n) `test/rmse_k8_L1_n50` and `coef/norm_...` (log10 of the norm); for each (L, n) the
    numerical rank `rank/L1_n50`; for each (k, n) `test/failed_bandwidths_k8_n50` (how many L of the list fail before
    the first with RMSE below 0.05) and `test/rmse_ratio_k8_n50` (largest over smallest RMSE of all L); for each n
    `test/staircase_drops_n50` (how often a higher k needs a smaller L).

    Args:
        bandwidths: L of each net, rising.
        widths: n of each net; a wider net contains the narrower one.
        activation: s.
        bias: see `hidden_parameters`.
        solver, lam, rcond: see `output_weights`. They bound the coefficients, and so are part of the claim.

    Raises:
        ValueError: a list that is empty, does not rise or is not positive; lam or rcond that is not positive.

    Source: arXiv 2008.08427; the constants are ours, the paper's simulations were not at hand.
    """

    unit_weight: Tensor
    unit_bias: Tensor

    def __init__(
        self,
        bandwidths: list[float],
        widths: list[int],
        activation: Activation = "tanh",
        bias: Literal["centre", "box"] = "centre",
        solver: Solver = "ridge",
        lam: float = 1e-10,
        rcond: float = 1e-8,
    ) -> None:
        super().__init__()
        for name, values in (("bandwidths", bandwidths), ("widths", widths)):
            if not values or values[0] <= 0 or any(a >= b for a, b in itertools.pairwise(values)):
                raise ValueError(f"model.{name} must be positive numbers in rising order, got {values}")
        if lam <= 0 or rcond <= 0:
            raise ValueError(f"model.lam and model.rcond must be positive, got {lam} and {rcond}")
        self.save_hyperparameters()
        self.automatic_optimization = False
        weight, unit_bias = unit_draws(max(widths), make_generator("features"))
        self.register_buffer("unit_weight", weight)
        self.register_buffer("unit_bias", unit_bias)

    def setup(self, stage: str) -> None:
        """Sizes the output layers by the data, once: (num_L, n, K) for each width n."""
        if hasattr(self, "coefficients"):
            return
        data: Any = getattr(self.trainer, "datamodule", None)
        if not hasattr(data, "frequencies"):
            raise ValueError(f"BandlimitedFeatures needs a datamodule with frequencies, got {type(data).__name__}")
        self.frequencies: list[int] = sorted(data.frequencies)
        if self.frequencies != list(data.frequencies):
            raise ValueError(f"data.frequencies must rise, got {data.frequencies}")
        count, targets = len(self.hparams["bandwidths"]), len(self.frequencies)
        shapes = [(count, width, targets) for width in self.hparams["widths"]]
        self.coefficients = nn.ParameterList(torch.zeros(shape, dtype=torch.float64) for shape in shapes)

    def features(self, position: Tensor, width: int) -> Tensor:
        """(num_L, P, n) hidden layers of all bandwidths at one width."""
        unit = self.unit_weight[:width], self.unit_bias[:width]
        parameters = [hidden_parameters(*unit, bandwidth, self.hparams["bias"]) for bandwidth in self._bandwidths]
        return torch.stack([hidden_features(position, w, b, self.hparams["activation"]) for w, b in parameters])

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Solves every output layer: one Newton step of a quadratic is its minimiser."""
        optimizer: Any = self.optimizers()
        losses = []
        for width, parameter in zip(self.hparams["widths"], self.coefficients, strict=True):
            features = self.features(batch["position"], width)
            solution, singular = output_weights(features, batch["target"], *self._solver)
            parameter.grad = parameter.detach() - solution
            losses.append((features @ solution - batch["target"]).square().mean())
            ranks = numerical_rank(singular).double()
            self.log_dict({f"rank/L{bw:g}_n{width}": r for bw, r in zip(self._bandwidths, ranks, strict=True)})
        optimizer.step()
        loss = torch.stack(losses).mean()
        self.log("train/loss", loss)
        return {"loss": loss}

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Errors on the test grid."""
        for width, coefficients in zip(self.hparams["widths"], self.coefficients, strict=True):
            errors = rmse(self.features(batch["position"], width) @ coefficients, batch["target"])
            norms = coefficients.norm(dim=1).log10()
            for (i, bandwidth), (j, k) in itertools.product(enumerate(self._bandwidths), enumerate(self.frequencies)):
                name = f"k{k}_L{bandwidth:g}_n{width}"
                self.log_dict({f"test/rmse_{name}": errors[i, j], f"coef/norm_{name}": norms[i, j]})
            failed = failed_bandwidths(errors)
            ratios = errors.amax(0) / errors.amin(0)
            for j, k in enumerate(self.frequencies):
                self.log(f"test/failed_bandwidths_k{k}_n{width}", failed[j].double())
                self.log(f"test/rmse_ratio_k{k}_n{width}", ratios[j])
            self.log(f"test/staircase_drops_n{width}", (failed.diff() < 0).sum().double())

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """A step of length 1: `training_step` writes the Newton direction into the gradients."""
        return torch.optim.SGD(self.coefficients, lr=1.0)

    @property
    def _bandwidths(self) -> list[float]:
        return self.hparams["bandwidths"]

    @property
    def _solver(self) -> tuple[Solver, float, float]:
        return self.hparams["solver"], self.hparams["lam"], self.hparams["rcond"]
