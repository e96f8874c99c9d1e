"""How a net of a stack moves in a step: losses of the margin, which points it sees, noise instead of batches.

Legend: N nets, B points of a step, P training points; z = alpha o y the scaled margin of a point, fitted at z >= 1.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from lightning_modules.stacks.batches import splitmix64

Dynamics = Literal["sgd", "gd", "gd_sde", "only_unfit"]
Loss = Literal["hinge", "quadhinge", "softhinge", "mse"]
MSE_FITTED = 1e-9
"""alpha * loss below which `mse` ends; the others end at zero."""


def margin_loss(margin: Tensor, loss: Loss) -> Tensor:
    """L(z), of which the loss is L(alpha o y) / alpha.

    Args:
        margin: (...) z.
        loss: hinge relu(1 - z), quadhinge its square, softhinge u exp(-1 / (2 u)) of u = relu(1 - z), or mse
            (z - 1)^2 / 2.

    Returns:
        (...) L.

    Source: arXiv 2301.13703, official code: `train.py`.
    """
    if loss == "mse":
        return (margin - 1).square() / 2
    below = (1 - margin).relu()
    if loss == "hinge":
        return below
    return below.square() if loss == "quadhinge" else below * _smooth(below)


def descent(margin: Tensor, loss: Loss) -> Tensor:
    """-dL/dz, the force on a point's margin; arguments as in `margin_loss`."""
    if loss == "hinge":
        return (margin < 1).to(margin.dtype)
    if loss == "mse":
        return 1 - margin
    below = (1 - margin).relu()
    if loss == "quadhinge":
        return 2 * below
    return _smooth(below) * (1 + 0.5 / torch.where(below > 0, below, 1))


def _smooth(below: Tensor) -> Tensor:
    """exp(-1 / (2 u)), 0 at u = 0."""
    return torch.where(below > 0, torch.exp(-0.5 / torch.where(below > 0, below, 1)), 0)


def is_fitted(margin: Tensor, loss: Loss) -> Tensor:
    """Whether training ends, (N,) bool, from the margins (N, P) of the whole training set."""
    if loss == "mse":
        return margin_loss(margin, loss).mean(-1) < MSE_FITTED
    return (margin >= 1).all(-1)


def counter_normals(keys: Tensor, first: Tensor, steps: int, count: int) -> Tensor:
    """Standard normal numbers that are a function of (key, step, place) alone.

    Args:
        keys: (N,) int64, one stream of each net.
        first: (N,) int64, number of the first step.
        steps: S.
        count: P.

    Returns:
        (S, N, P) float64, by Box and Muller on hashed counters.
    """
    counters = first + torch.arange(steps, device=keys.device).unsqueeze(-1)
    base = splitmix64(splitmix64(~keys) + counters).unsqueeze(-1)
    places = torch.arange(count, device=keys.device) * 2
    # 53 bits, never 0
    radius, turn = (((splitmix64(base + places + k) >> 11) & (2**53 - 1)).double().add(0.5) / 2**53 for k in (0, 1))
    return (-2 * radius.log()).sqrt() * torch.cos(2 * math.pi * turn)


def sde_delta(force: Tensor, labels: Tensor, lr: Tensor, batch: int, normal: Tensor) -> Tensor:
    """delta of full-batch descent with Gaussian noise in the span of the features.

    w <- w - lr grad L + lr sigma grad_w mean_mu f(x_mu) xi_mu, sigma^2 = (sum_mu (dl/do_mu)^2) (1/B - 1/P).
    sigma is global: fitted points' features are excited too.

    Args:
        force: (N, P) -dL/dz, so that -dl/do = force * y.
        labels: (N, P).
        lr: (N,).
        batch: B whose noise this stands for.
        normal: (N, P) xi.

    Returns:
        (N, P), to be put into `update_`.

    Source: arXiv 2301.13703, official code: dynamics `gd_sde`.
    """
    points = labels.shape[1]
    sigma = (force.square().sum(-1) * (1 / batch - 1 / points)).sqrt()
    return (force * labels + sigma.unsqueeze(-1) * normal) * (lr / points).unsqueeze(-1)


def unfitted_first(margin: Tensor, keys: Tensor, steps: Tensor, points: Tensor, batch: int) -> Tensor:
    """B random points of each net, the unfitted before the fitted.

    Args:
        margin: (N, P) z of all points; places beyond a net's own P are passed over.
        keys, steps: (N,) int64, stream and step of each net.
        points: (N,) int64, each net's own P.
        batch: B.

    Returns:
        (N, B) int64.

    Source: arXiv 2301.13703, official code: `sgd` with `only_unfit_marg`.
    """
    places = torch.arange(margin.shape[1], device=margin.device)
    order = splitmix64(splitmix64(splitmix64(keys) + steps).unsqueeze(-1) + places) >> 3
    # three classes in the two highest of 63 bits: unfitted, fitted, absent
    kind = torch.where(places < points.unsqueeze(-1), (margin >= 1).long(), 2)
    rank = (order & ((1 << 60) - 1)) + (kind << 60)
    return rank.topk(batch, dim=-1, largest=False).indices
