"""Learned variance of the reverse steps: a second head of the network, trained by the variational bound alone.

The head s in [-1, 1] (not clamped) interpolates log-variances between the posterior's and beta's. Discrete processes.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_modules.diffusion.parameterization import Prediction
from lightning_modules.diffusion.processes import DiscreteProcess, Process, along


class Posterior(NamedTuple):
    """q(x_after | x_time, x0), a Gaussian of mean `from_data` x0 + `from_x` x; all float64, shaped like the times.

    `log_small` is the log of its variance, `log_large` that of beta = 1 - (alpha / alpha_after)^2. Where `after` is the
    clean end the variance is 0 and `log_small` is -inf.
    """

    from_data: Tensor
    from_x: Tensor
    log_small: Tensor
    log_large: Tensor


def posterior(process: Process, time: Tensor, after: Tensor) -> Posterior:
    """Posterior of a step from `time` to `after`, of any length. Source: arXiv 2006.11239, Eqs. 6 and 7."""
    a, s = process.alpha(time), process.sigma(time)
    a_after, s_after = process.alpha(after), process.sigma(after)
    beta = 1 - (a / a_after) ** 2
    log_small = (beta * s_after**2 / s**2).log()
    return Posterior(a_after * beta / s**2, a / a_after * s_after**2 / s**2, log_small, beta.log())


def learned_log_variance(spread: Tensor, log_small: Tensor, log_large: Tensor) -> Tensor:
    """f log_large + (1 - f) log_small, f = (s + 1) / 2.

    Args:
        spread: (B, ...) head s.
        log_small, log_large: (B,) or 0-d, nats.

    Returns:
        (B, ...) in the dtype of `spread`.

    Source: arXiv 2102.09672, Eq. 15; openai/improved-diffusion `p_mean_variance` (LEARNED_RANGE).
    """
    share = (spread + 1) / 2
    return share * along(log_large, spread) + (1 - share) * along(log_small, spread)


def gaussian_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N(mean1, e^log_variance1) || N(mean2, e^log_variance2)) of each element, nats; arguments broadcast."""
    ratio = (log_variance1 - log_variance2).exp()
    return 0.5 * (log_variance2 - log_variance1 + ratio - 1 + (mean1 - mean2) ** 2 * (-log_variance2).exp())


def discretized_log_likelihood(data: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log-probability, nats, that a Gaussian puts on the bin of width 2 / 255 around each element; the bins of -1 and 1
    reach to infinity. The normal distribution function is the tanh approximation of the official code.

    Args:
        data: (B, ...) float, in [-1, 1] (latents, as in the official DiT, too).
        mean, log_scale: (B, ...) of the Gaussian; log of its standard deviation.

    Source: openai/improved-diffusion `losses.py`, `discretized_gaussian_log_likelihood`.
    """
    inverse = (-log_scale).exp()
    above = _normal_cdf(inverse * (data - mean + 1 / 255))
    below = _normal_cdf(inverse * (data - mean - 1 / 255))
    inside = (above - below).clamp_min(1e-12).log()
    right = torch.where(data > 0.999, (1 - below).clamp_min(1e-12).log(), inside)
    return torch.where(data < -0.999, above.clamp_min(1e-12).log(), right)


def variance_bound(process: Process, prediction: Prediction, data: Tensor) -> Tensor:
    """(B,) terms of the variational bound, bits per dimension, with gradients for the variance head only.

    KL of the posterior to the predicted step; at index 0 the negative log-likelihood of the data. Not rescaled, as in
    DiT and DTR (`LossType.MSE`; improved-diffusion's RESCALED_MSE divides by 1000 / T).

    Args:
        process: discrete; neighbouring indices are one step apart.
        prediction: with `spread`, at times (B,).
        data: (B, ...) float, x0.

    Raises:
        ValueError: the process is continuous.

    Source: arXiv 2102.09672, section 3.1; openai/improved-diffusion `_vb_terms_bpd`.
    """
    if not isinstance(process, DiscreteProcess):
        raise ValueError(f"a network with a variance head needs a discrete process, got {type(process).__name__}")
    if prediction.spread is None:
        raise ValueError("the variance bound needs a network with twice the channels of the images")
    time = prediction.time
    # index 0 has no variance of its own: the official code gives it that of index 1
    small = posterior(process, time.clamp_min(1), time.clamp_min(1) - 1).log_small
    step = posterior(process, time, time - 1)
    wide = torch.promote_types(data.dtype, torch.float32)
    x0, x, spread, real = (part.to(wide) for part in (prediction.x0.detach(), prediction.x, prediction.spread, data))
    means = [along(step.from_data, x) * start + along(step.from_x, x) * x for start in (real, x0)]
    log_variance = learned_log_variance(spread, small, step.log_large)
    kl = gaussian_kl(means[0], along(small, x), means[1], log_variance)
    likelihood = discretized_log_likelihood(real, means[1], 0.5 * log_variance)
    terms = torch.where(along(time == 0, x).bool(), -likelihood, kl)
    return terms.flatten(1).mean(1) / math.log(2.0)


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
