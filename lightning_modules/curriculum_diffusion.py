"""Easy-to-hard curriculum over noise levels (arXiv 2403.10348): noisiest times first, less noisy ones join by and by.

Legend: T indices (0 = least noise), N clusters, cluster 1 hardest (least noise) to N easiest; stage n trains the n
easiest clusters, stage N + 1 is plain training after all have converged. There is no official code; what the paper
leaves open is said at each place.
"""

from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from lightning_modules.diffusion.processes import DiscreteProcess, Process
from lightning_modules.diffusion.ranks import is_parallel
from lightning_modules.diffusion.times import TimeSampler

Order = Literal["none", "e2h", "h2e", "naive", "static_bias"]


class Pacing(NamedTuple):
    """State of the pacing, 0-d tensors: stage 1 to N + 1, lowest loss and steps without a new one, smoothed loss."""

    stage: Tensor
    best: Tensor
    patience: Tensor
    smoothed: Tensor


def uniform_clusters(timesteps: int, num: int) -> Tensor:
    """(N, 2) int64 half-open ranges [(i - 1) T / N, i T / N), row 0 = least noise. Source: arXiv 2403.10348."""
    edges = torch.arange(num + 1) * timesteps // num
    return torch.stack([edges[:-1], edges[1:]], dim=1)


def snr_clusters(curve: Tensor, num: int) -> Tensor:
    r"""Cuts 0..T-1 into k intervals of least summed distance of a curve to its value at the interval's centre.

    The official dynamic programme, with its habits: the centre of [l, r] is round((l + r + 1) / 2), halves to even; an
    interval of one costs 0; a total of 0 counts as infinite; and interval j is reported to start at the last index of
    interval j - 1 of the optimum (the two are off by one).

    Args:
        curve: (T,) float64, monotone: log-SNR (raw SNR puts nearly all cuts at the clean end).
        num: k.

    Returns:
        (k, 2) int64 inclusive bounds, row 0 = least noise; the last right bound is T - 1.

    Raises:
        ValueError: curve not monotone, or fewer than k indices.

    Source: gohyojun15/ANT_diffusion (arXiv 2306.00354), `interval_clustering.py`.
    """
    f = curve.detach().double().cpu().numpy()
    total = len(f)
    if not (np.all(np.diff(f) <= 0) or np.all(np.diff(f) >= 0)):
        raise ValueError("time_sampler.clusters snr needs a monotone log-SNR")
    if not 1 <= num <= total:
        raise ValueError(f"time_sampler.num_clusters must be in 1..{total}, got {num}")
    costs = _interval_costs(f)
    best, cut = costs[0].copy(), np.zeros((total, num), dtype=np.int64)
    for j in range(1, num):
        new = np.zeros(total)
        for i in range(j + 1, total):
            items = np.full(i, np.inf)
            items[j:] = best[j:i] + costs[j + 1 : i + 1, i]
            items[items == 0] = np.inf
            new[i], cut[i, j] = items.min(), items.argmin()
        best = new
    starts, at = [], total - 1
    for j in reversed(range(num)):
        at = int(cut[at, j])
        starts.append(at)
    left = torch.tensor(starts[::-1])
    return torch.stack([left, torch.cat([left[1:] - 1, torch.tensor([total - 1])])], dim=1)


def _interval_costs(f: np.ndarray) -> np.ndarray:
    """(T, T) cost of [l, r] for l <= r; sums of a monotone curve from prefix sums."""
    prefix = np.concatenate([[0.0], f.cumsum()])
    left, right = np.meshgrid(np.arange(len(f)), np.arange(len(f)), indexing="ij")
    centre = np.clip(np.round((left + right + 1) / 2).astype(np.int64), 0, len(f) - 1)
    before = prefix[centre + 1] - prefix[left] - (centre + 1 - left) * f[centre]
    after = (right - centre) * f[centre] - (prefix[right + 1] - prefix[centre + 1])
    costs = np.abs(before + after)
    return np.where(left < right, costs, 0.0)


def pace(
    state: Pacing, loss: Tensor, num_clusters: int, tau: int, smoothing: float = 0.0, min_delta: float = 0.0
) -> Pacing:
    r"""State after a step: a new lowest loss resets the patience; after tau steps without one the next stage begins.

    Args:
        state: 0-d tensors; stage, patience int64, losses float.
        loss: 0-d, batch loss of this step, the same on every rank.
        num_clusters: N; in stage N + 1 nothing changes any more.
        tau: patience in optimizer steps.
        smoothing: decay of an exponential average of the loss within a stage; 0 takes the raw loss.
        min_delta: a new lowest loss must be lower by more than this.

    Returns:
        New state; lowest loss, patience and smoothed loss start anew at a transition.

    Source: arXiv 2403.10348, Algorithm 1, in the reading `patience >= tau`, strict improvement, raw loss.
    """
    current = torch.where(state.smoothed.isinf(), loss, smoothing * state.smoothed + (1 - smoothing) * loss)
    improved = current < state.best - min_delta
    best = torch.where(improved, current, state.best)
    patience = torch.where(improved, 0, state.patience + 1)
    over, done = patience >= tau, state.stage > num_clusters
    infinite = torch.full_like(best, torch.inf)
    return Pacing(
        torch.where(over & ~done, state.stage + 1, state.stage),
        torch.where(over | done, infinite, best),
        torch.where(over | done, 0, patience),
        torch.where(over | done, infinite, current),
    )


def start_of_pacing() -> Pacing:
    """Stage 1, nothing seen."""
    infinite = torch.tensor(torch.inf, dtype=torch.float64)
    return Pacing(torch.tensor(1), infinite, torch.tensor(0), infinite.clone())


def active_range(edges: Tensor, stage: Tensor, order: Order) -> tuple[Tensor, Tensor]:
    """Ends of what a stage trains: edges (N + 1,) from least to most noise, stage 0-d int64; after stage N everything.

    `e2h` the n noisiest clusters, `h2e` the n least noisy, `naive` only the n-th noisiest.
    """
    num = len(edges) - 1
    n = stage.clamp(max=num)
    everything = stage > num
    low = edges[num - n] if order in ("e2h", "naive") else edges[0]
    high = {"e2h": edges[num], "h2e": edges[n], "naive": edges[num + 1 - n]}[order]
    return torch.where(everything, edges[0], low), torch.where(everything, edges[num], high)


def static_shares(num: int, share: float) -> Tensor:
    """(N,) float64 probabilities of the clusters over a run whose curriculum takes `share` of it, equally per stage."""
    stages = torch.arange(1, num + 1, dtype=torch.float64)
    member = stages[None, :] > num - 1 - torch.arange(num, dtype=torch.float64)[:, None]
    mixed = (member / stages).mean(1)
    return share * mixed + (1 - share) / num


class CurriculumTimes(TimeSampler):
    """The process's training distribution restricted to the active clusters.

    Clusters lie on the mass of that distribution, so `equal` means equal ranges of the index or of u, and quantiles of
    the log-normal sigma for EDM. The pacing sees the mean (weighted) loss of an optimizer step over micro-batches and
    ranks, so that all ranks change stage together.

    Args:
        curriculum: `e2h` (the method), `h2e` reversed, `naive` one cluster at a time, `static_bias` the mixture of an
            e2h run without its order, `none` all times.
        num_clusters: N.
        tau: patience in optimizer steps; scale it so that the curriculum ends within 10-25 % of the budget.
        clusters: `equal`, or `snr` (`snr_clusters` of the log-SNR; discrete processes).
        smoothing, min_delta: as in `pace`.
        cap_fraction: the curriculum ends at the latest after this share of the budget; None for no limit.
        static_share: share of the budget that the imitated curriculum takes; only for `static_bias`.

    Attributes:
        stage, best, patience, smoothed: state of the pacing, in the checkpoint.
        stage_steps: (N + 1,) int64, optimizer steps spent in each stage so far.
    """

    stage: Tensor
    best: Tensor
    patience: Tensor
    smoothed: Tensor
    stage_steps: Tensor
    seen: Tensor
    edges: Tensor
    shares: Tensor

    def __init__(
        self,
        curriculum: Order = "e2h",
        num_clusters: int = 20,
        tau: int = 200,
        clusters: Literal["equal", "snr"] = "equal",
        smoothing: float = 0.0,
        min_delta: float = 0.0,
        cap_fraction: float | None = None,
        static_share: float = 0.24,
    ) -> None:
        super().__init__()
        if curriculum not in get_args(Order):
            raise ValueError(f"time_sampler.curriculum must be one of {', '.join(get_args(Order))}, got {curriculum!r}")
        if num_clusters < 1 or tau < 1:
            raise ValueError(f"time_sampler.num_clusters and tau must be at least 1, got {num_clusters} and {tau}")
        if not 0 <= smoothing < 1:
            raise ValueError(f"time_sampler.smoothing must be in [0, 1), got {smoothing}")
        for name, value in (("cap_fraction", cap_fraction), ("static_share", static_share)):
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"time_sampler.{name} must be in (0, 1], got {value}")
        self.curriculum, self.tau, self.clusters = curriculum, tau, clusters
        self.num_clusters, self.smoothing, self.min_delta = num_clusters, smoothing, min_delta
        self.cap_fraction = cap_fraction
        self.cap_steps: float | None = None
        for name, value in start_of_pacing()._asdict().items():
            self.register_buffer(name, value)
        self.register_buffer("stage_steps", torch.zeros(num_clusters + 1, dtype=torch.int64))
        self.register_buffer("seen", torch.zeros(2, dtype=torch.float64))
        edges = torch.arange(num_clusters + 1, dtype=torch.float64) / num_clusters
        self.register_buffer("edges", edges, persistent=False)
        self.register_buffer("shares", static_shares(num_clusters, static_share), persistent=False)

    def start(self, process: Process, total_steps: float) -> None:
        """Fixes the cap and, for `snr`, the edges."""
        if self.cap_fraction is not None:
            self.cap_steps = self.cap_fraction * total_steps
        if self.clusters == "equal":
            return
        if not isinstance(process, DiscreteProcess):
            raise ValueError(f"time_sampler.clusters snr needs a discrete process, got {type(process).__name__}")
        index = torch.arange(process.timesteps, device=self.edges.device)
        left = snr_clusters(process.log_snr(index), self.num_clusters)[:, 0]
        self.edges[:-1] = left.double() / process.timesteps

    def draw_mass(self, count: int, generator: torch.Generator) -> Tensor:
        """As in `TimeSampler`."""
        uniform = super().draw_mass(count, generator)
        if self.curriculum == "none":
            return uniform
        if self.curriculum == "static_bias":
            # inverse of the piecewise linear distribution function
            ends = torch.cat([self.shares.new_zeros(1), self.shares.cumsum(0)])
            which = (torch.searchsorted(ends, uniform, right=True) - 1).clamp(0, self.num_clusters - 1)
            within = (uniform - ends[which]) / self.shares[which]
            return self.edges[which] + within * (self.edges[which + 1] - self.edges[which])
        low, high = active_range(self.edges, self.stage, self.curriculum)
        return low + uniform * (high - low)

    def observe(self, process: Process, time: Tensor, losses: Tensor) -> None:
        """Adds a micro-batch to the loss of this optimizer step."""
        self.seen += torch.stack([losses.double().sum(), losses.new_full((), len(losses)).double()])

    def step(self, num_steps: int) -> None:
        """Moves the pacing by one optimizer step."""
        seen = self.seen.clone()
        self.seen.zero_()
        if self.curriculum in ("none", "static_bias"):
            return
        if is_parallel():
            torch.distributed.all_reduce(seen)
        self.stage_steps.index_add_(0, (self.stage - 1).view(1), self.stage_steps.new_ones(1))
        old = Pacing(self.stage, self.best, self.patience, self.smoothed)
        new = pace(old, seen[0] / seen[1], self.num_clusters, self.tau, self.smoothing, self.min_delta)
        for name, value in new._asdict().items():
            getattr(self, name).copy_(value)
        if self.cap_steps is not None and num_steps >= self.cap_steps:
            self.stage.fill_(self.num_clusters + 1)

    def progress(self) -> dict[str, Tensor]:
        """What to log: the stage, and the steps spent in the curriculum proper."""
        return {"curriculum/stage": self.stage.float(), "curriculum/steps": self.stage_steps[:-1].sum().float()}
