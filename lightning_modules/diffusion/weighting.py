"""Weights of the loss by time, and how a batch of per-sample losses becomes one number. All per sample, (B,)."""

import torch
from torch import Tensor, nn

from lightning_modules.diffusion.parameterization import Kind, edm_coefficients
from lightning_modules.diffusion.processes import Process


class Weighting(nn.Module):
    """Constant 1."""

    def forward(self, process: Process, kind: Kind, time: Tensor) -> Tensor:
        """Weights (B,) float64 of the mean squared error of `kind` at these times."""
        return torch.ones_like(time, dtype=torch.float64)


class SNRWeighting(Weighting):
    """SNR = alpha^2 / sigma^2."""

    def forward(self, process: Process, kind: Kind, time: Tensor) -> Tensor:
        """As in `Weighting`."""
        return process.log_snr(time).exp()


class MinSNR(Weighting):
    """min(SNR, k), expressed for the parameterisation: over SNR for eps, over SNR + 1 for v, as it is for x0.

    Args:
        k: cap.

    Raises:
        ValueError: parameterisation is flow or score.

    Source: arXiv 2303.09556.
    """

    def __init__(self, k: float = 5.0) -> None:
        super().__init__()
        if k <= 0:
            raise ValueError(f"model.weighting.k must be positive, got {k}")
        self.k = k

    def forward(self, process: Process, kind: Kind, time: Tensor) -> Tensor:
        """As in `Weighting`."""
        snr = process.log_snr(time).exp()
        capped = snr.clamp(max=self.k)
        if kind == "x0":
            return capped
        if kind == "eps":
            return capped / snr
        if kind == "v":
            return capped / (snr + 1)
        raise ValueError(f"MinSNR is defined for model.parameterization eps, x0 and v, got {kind!r}")


class P2(Weighting):
    """1 / (k + SNR)^gamma, on the eps loss.

    Args:
        k, gamma: constants.

    Source: arXiv 2204.00227.
    """

    def __init__(self, k: float = 1.0, gamma: float = 1.0) -> None:
        super().__init__()
        self.k, self.gamma = k, gamma

    def forward(self, process: Process, kind: Kind, time: Tensor) -> Tensor:
        """As in `Weighting`."""
        return (self.k + process.log_snr(time).exp()) ** -self.gamma


class EDMWeighting(Weighting):
    """(sigma^2 + sigma_data^2) / (sigma sigma_data)^2, on the x0 loss.

    Args:
        sigma_data: standard deviation of the data.
    """

    def __init__(self, sigma_data: float = 0.5) -> None:
        super().__init__()
        self.sigma_data = sigma_data

    def forward(self, process: Process, kind: Kind, time: Tensor) -> Tensor:
        """As in `Weighting`."""
        return edm_coefficients(process.sigma(time), self.sigma_data)[-1]


class Mean(nn.Module):
    """The plain mean of the weighted losses."""

    def forward(self, losses: Tensor, unit: Tensor) -> Tensor:
        """Scalar loss from per-sample losses (B,) at unit times (B,)."""
        return losses.mean()


def uncertainty_loss(losses: Tensor, unit: Tensor, log_variances: Tensor) -> Tensor:
    """sum_k 0.5 (exp(-s_k) l_k + s_k), l_k = mean loss of the k-th of K equal intervals of u, divided by K.

    Args:
        losses, unit: (B,) float; an interval without samples contributes only its s_k.
        log_variances: (K,) s_k.

    Source: gohyojun15/ANT_diffusion and byeongjun-park/DTR (official code): "UW" loss weighting.
    """
    num = len(log_variances)
    which = (unit * num).long().clamp(0, num - 1)
    sums = torch.zeros_like(log_variances).index_add(0, which, losses.to(log_variances))
    means = sums / which.bincount(minlength=num).clamp_min(1) / num
    return (0.5 * ((-log_variances).exp() * means + log_variances)).sum()


class UncertaintyWeighting(nn.Module):
    """Learned weights by interval of time; use with `StratifiedTimes` of as many strata.

    Args:
        intervals: K.
        lr: learning rate of s_k, which form a parameter group of their own, without weight decay.
    """

    def __init__(self, intervals: int = 8, lr: float = 0.025) -> None:
        super().__init__()
        self.lr = lr
        self.log_variances = nn.Parameter(torch.zeros(intervals))

    def forward(self, losses: Tensor, unit: Tensor) -> Tensor:
        """As `uncertainty_loss`."""
        return uncertainty_loss(losses, unit, self.log_variances)
