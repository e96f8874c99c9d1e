"""Stochastic interpolants between two data sets: x = alpha x0 + sigma x1 + gamma z, z ~ N(0, I)."""

import torch
from torch import Tensor, nn

from lightning_modules.diffusion.processes import Process, along


class StochasticInterpolant(nn.Module):
    """Bridge between data x0 (u = 0) and a base x1 (u = 1), which may be data too; gamma = scale sqrt(u (1 - u)).

    The path's coefficients are those of a `Process`. With scale 0 and Gaussian base it is that process.

    Args:
        path: continuous process that gives alpha and sigma, e.g. `LinearFlow`.
        scale: of gamma; the paper's sqrt(2 t (1 - t)) is sqrt(2).

    Source: arXiv 2303.08797, Eq. 2.1, with t = 1 - u.
    """

    def __init__(self, path: Process, scale: float = 1.0) -> None:
        super().__init__()
        if path.discrete:
            raise ValueError(f"process.path must be a continuous process, got {type(path).__name__}")
        if scale < 0:
            raise ValueError(f"process.scale must not be negative, got {scale}")
        self.path, self.scale = path, scale

    def gamma(self, unit: Tensor) -> Tensor:
        """(B,) float64 factor of z; 0 at both ends."""
        unit = unit.double()
        return self.scale * (unit * (1 - unit)).sqrt()

    def dgamma(self, unit: Tensor) -> Tensor:
        """d gamma / d u; infinite at both ends, so keep times off them."""
        unit = unit.double()
        return self.scale * (1 - 2 * unit) / (2 * (unit * (1 - unit)).sqrt())

    def marginal(self, data: Tensor, base: Tensor, noise: Tensor, unit: Tensor) -> Tensor:
        """x at unit times (B,); all others (B, ...) in one dtype."""
        return self.path.marginal(data, base, unit) + along(self.gamma(unit), data) * noise

    def flow(self, data: Tensor, base: Tensor, noise: Tensor, unit: Tensor) -> Tensor:
        """Target of the velocity, d x / d(1 - u): towards the data."""
        terms = ((self.path.dalpha(unit), data), (self.path.dsigma(unit), base), (self.dgamma(unit), noise))
        return -torch.stack([along(factor, part) * part for factor, part in terms]).sum(0)

    def score(self, noise: Tensor, unit: Tensor) -> Tensor:
        """Target of the score, -z / gamma."""
        return -noise / along(self.gamma(unit), noise)
