"""Immiscible diffusion: noise near each image, by assignment in the batch (arXiv 2406.12303) or by choice among k draws
(arXiv 2505.18521). Only the noise moves; images, labels and times keep their order, and sampling is unchanged.

Legend: B batch of a rank, W ranks, D numbers in an image. Official code: yhli123/Immiscible-Diffusion.
"""

from typing import Literal, get_args

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from lightning_modules.diffusion.couplings import Coupling, Pairs, draw_noise
from lightning_modules.diffusion.ranks import gather_rows, sizes_of_ranks

Cost = Literal["l2", "l1", "sql2"]
Precision = Literal["fp16", "fp32"]

SHRINK = 0.1
"""Factor before the difference: guards the official fp16 sum of squares against overflow."""


def pair_costs(data: Tensor, noise: Tensor, cost: Cost = "l2", precision: Precision = "fp16") -> Tensor:
    r"""Distance of every image to every noise.

    `fp16`: both are rounded to fp16, multiplied by 0.1 in fp16, and the distance is rounded to fp16. The official code
    also rounds each difference to fp16, which needs a (B, N, D) tensor; here differences and sums are float32 in matrix
    form, so an entry may differ from the official one by an fp16 rounding step. `fp32`: no rounding, no factor.

    Args:
        data: (B, ...) float, what is diffused (pixels in [-1, 1], or scaled latents).
        noise: (N, ...) float.
        cost: `l2` the norm (official), `l1` the sum of absolute differences, `sql2` the squared norm.
        precision: see above.

    Returns:
        (B, N), fp16 or float32 (float64 for float64 inputs with `fp32`).

    Raises:
        ValueError: unknown cost or precision.

    Source: arXiv 2406.12303, Algorithm 1; factor and rounding from the official code.
    """
    _check("cost", cost, Cost)
    _check("precision", precision, Precision)
    x, e = data.flatten(1), noise.flatten(1)
    if precision == "fp16":
        x, e = ((SHRINK * part.half()).float() for part in (x, e))
    else:
        wide = torch.promote_types(x.dtype, torch.float32)
        x, e = x.to(wide), e.to(wide)
    costs = torch.cdist(x, e, p=1.0) if cost == "l1" else torch.cdist(x, e, compute_mode="use_mm_for_euclid_dist")
    costs = costs.square() if cost == "sql2" else costs
    return costs.half() if precision == "fp16" else costs


def assign(costs: Tensor) -> Tensor:
    """(B,) int64 permutation of least total cost of square costs (B, B), on their device; waits for the device."""
    return torch.from_numpy(linear_sum_assignment(costs.double().cpu().numpy())[1]).to(costs.device)


def assign_globally(data: Tensor, noise: Tensor, cost: Cost = "l2", precision: Precision = "fp16") -> Tensor:
    """This rank's part of the noise, assigned over the images of all ranks.

    Images are gathered once and every rank solves the same problem, which equals the official scheme (rank 0 solves and
    sends). Rows are in rank order.

    Args:
        data: (B, ...) images of this rank; B may differ between ranks.
        noise: (sum of all B, ...), the same on all ranks.
        cost, precision: as in `pair_costs`.

    Returns:
        (B, ...) noise for the images of this rank.
    """
    sizes = sizes_of_ranks(data)
    everyone = gather_rows(data, sizes)
    order = assign(pair_costs(everyone, noise, cost, precision))
    first = sum(sizes[: torch.distributed.get_rank()]) if len(sizes) > 1 else 0
    return noise[order[first : first + len(data)]]


def nearer(data: Tensor, noise: Tensor, distance: Tensor, candidate: Tensor) -> tuple[Tensor, Tensor]:
    r"""Replaces the noise of an image where a candidate is strictly nearer: ties keep the first.

    Args:
        data, noise, candidate: (B, ...) float.
        distance: (B,) fp16 of `noise`; inf where there is none yet.

    Returns:
        New noise and distance. Distances are || fp16(x) - fp16(n) ||_2 with the difference in fp16, the sum in float32
        and the result rounded to fp16; no factor 0.1.

    Source: official code of arXiv 2505.18521.
    """
    difference = (data.half() - candidate.half()).flatten(1)
    new = torch.linalg.vector_norm(difference, dim=1, dtype=torch.float32).half()
    closer = new < distance
    kept = closer.view(-1, *[1] * (data.ndim - 1))
    return torch.where(kept, candidate, noise), torch.where(closer, new, distance)


def pair_distance(data: Tensor, noise: Tensor) -> Tensor:
    """Mean over the batch of || x - e ||_2, 0-d float32 or wider: falls when a coupling works."""
    difference = (data - noise).flatten(1)
    return torch.linalg.vector_norm(difference, dim=1).mean()


class LinearAssignment(Coupling):
    """Permutes the noise so that the summed distance to the images is least; at a batch of 1 it changes nothing.

    Args:
        cost: see `pair_costs`.
        precision: see `pair_costs`; images and noise themselves are never rounded.
        scope: `local` assigns within a rank's batch; `global` over all ranks (official), which needs each rank to draw
            the noise of all. On one process they are the same.
        flip: negate the assigned noise: the ablation that is immiscible but not optimal transport.

    Source: arXiv 2406.12303.
    """

    def __init__(
        self,
        cost: Cost = "l2",
        precision: Precision = "fp16",
        scope: Literal["local", "global"] = "local",
        flip: bool = False,
    ) -> None:
        super().__init__()
        _check("cost", cost, Cost)
        _check("precision", precision, Precision)
        _check("scope", scope, Literal["local", "global"])
        self.cost, self.precision, self.flip = cost, precision, flip
        self.shared_noise = scope == "global"

    @torch.no_grad()
    def forward(self, data: Tensor, generator: torch.Generator) -> Pairs:
        """As in `Coupling`."""
        if self.shared_noise:
            noise = draw_noise(data, generator, count=sum(sizes_of_ranks(data)))
            chosen = assign_globally(data, noise, self.cost, self.precision)
        else:
            noise = draw_noise(data, generator)
            chosen = noise[assign(pair_costs(data, noise, self.cost, self.precision))]
        return Pairs(-chosen if self.flip else chosen)


class NearestOfK(Coupling):
    """The nearest of k draws for each image. Does not keep the noise standard normal: its norm shrinks.

    Args:
        k: draws; official 64 for Stable Diffusion, 4 for flow matching.

    Source: arXiv 2505.18521.
    """

    def __init__(self, k: int = 4) -> None:
        super().__init__()
        if k < 1:
            raise ValueError(f"coupling.k must be at least 1, got {k}")
        self.k = k

    @torch.no_grad()
    def forward(self, data: Tensor, generator: torch.Generator) -> Pairs:
        """As in `Coupling`; holds two draws at a time."""
        noise = torch.zeros_like(data)
        distance = torch.full((len(data),), torch.inf, dtype=torch.float16, device=data.device)
        for _ in range(self.k):
            noise, distance = nearer(data, noise, distance, draw_noise(data, generator))
        return Pairs(noise)


class ExactOT(Coupling):
    """Minibatch optimal transport for the squared distance; B pairs of its plan are drawn with replacement.

    With equal weights the plan is a permutation, found by assignment. Images repeat or drop out, with their labels.

    Args:
        replacement: False keeps each pair once.

    Source: arXiv 2302.00482 (torchcfm draws with replacement); control of arXiv 2505.18521.
    """

    def __init__(self, replacement: bool = True) -> None:
        super().__init__()
        self.replacement = replacement

    @torch.no_grad()
    def forward(self, data: Tensor, generator: torch.Generator) -> Pairs:
        """As in `Coupling`."""
        noise = draw_noise(data, generator)
        order = assign(pair_costs(data, noise, "sql2", "fp32"))
        if not self.replacement:
            return Pairs(noise[order])
        rows = torch.randint(len(data), (len(data),), generator=generator, device=data.device)
        return Pairs(noise[order[rows]], rows)


def _check(name: str, value: str, accepted: object) -> None:
    if value not in get_args(accepted):
        raise ValueError(f"coupling.{name} must be one of {', '.join(get_args(accepted))}, got {value!r}")
