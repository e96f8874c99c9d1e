r"""What many claims say together: verdicts adjusted for their number, and one figure over papers. Imports no torch.

Legend: seed s of a claim has treatment metric m_s, control metric c_s (or the threshold), sign +1 for `greater` and -1
for `less`, and d_s = sign * (m_s - c_s) - margin, as in verdicts.py. S seeds, N and M runs of two arms, B resamples.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scripts.claims import Claim
from scripts.records import ClaimResult
from scripts.verdicts import CONFIDENCE, Name, beyond_margin

Arrays = NDArray[np.floating[Any]]
Pairs = Mapping[str, Sequence[tuple[Arrays, Arrays]]]
"""For each paper its claims: treatment and control, (..., S) each, seeds in the same order, greater being better."""

LEAST_PAPERS = 2


@dataclass(frozen=True)
class HolmVerdict:
    """A claim's verdict within the family of claims of its scale.

    Args:
        claim: the claim.
        p: its own p-value; None while it is not run.
        adjusted: Holm's p-value; None where `p` is.
        name: its verdict where *reproduced* also asks for `adjusted` < 0.05; otherwise it becomes *inconclusive*.
    """

    claim: Claim
    p: float | None
    adjusted: float | None
    name: Name


@dataclass(frozen=True)
class Aggregate:
    """Probability of improvement over the papers of one scale.

    Args:
        scale: mini or paper.
        improvement: mean over papers of the mean over their claims, in [0, 1]; above 0.5 the treatments
            do better, in the directions that the claims say.
        low, high: 95 % percentile bootstrap interval of it.
        per_paper: the mean over each paper's claims.
        num_claims: claims that count.
        num_left_out: claims of this scale that do not: held against a threshold, or not run.
    """

    scale: str
    improvement: float
    low: float
    high: float
    per_paper: dict[str, float]
    num_claims: int
    num_left_out: int


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment, exact: with p_(1) <= ... <= p_(m), adjusted_(i) = max_{j<=i} min(1, (m-j+1) p_(j)).

    Rejecting where adjusted < a keeps the chance of even one false rejection among the m below a, however the tests
    depend on each other. It is not the chance that a claim is false, and it grows with m: more claims, less proof each.

    Returns:
        Adjusted values in the order given.

    Raises:
        ValueError: a value outside [0, 1].
    """
    for p in p_values:
        if not 0 <= p <= 1:
            raise ValueError(f"p-values must be in [0, 1], got {p}")
    count, highest = len(p_values), 0.0
    adjusted = [0.0] * count
    for rank, index in enumerate(sorted(range(count), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (count - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def p_value(result: ClaimResult) -> float | None:
    """One-sided paired t-test of mean d > 0: P(T_{n-1} >= t) with t = mean(d) / (sd(d) / sqrt(n)).

    It is below 0.05 just where the verdict is *reproduced*. It is the chance of seeds at least as favourable if the
    effect equalled the margin; not the chance that the claim is false, and a large one does not show that there is no
    effect. Differences without spread give 0 or 1, which a test of so few seeds cannot promise.

    Returns:
        None for a claim that is not run; 1 if a seed failed, as then nothing counts as reproduced.
    """
    claim = result.claim
    differences = []
    for metric, against in zip(result.treatment, result.against, strict=True):
        if metric is None or against is None:
            return None
        sign = 1 if claim.direction == "greater" else -1
        differences.append(beyond_margin(metric, against, sign, claim.margin))
    if len(differences) < 2 or not all(map(math.isfinite, differences)):
        return 1.0
    mean, spread = statistics.fmean(differences), statistics.stdev(differences)
    if spread == 0:
        return 0.0 if mean > 0 else 1.0
    from scipy.special import stdtr  # 0.2 s that a page without records need not pay

    return float(stdtr(len(differences) - 1, -mean / (spread / math.sqrt(len(differences)))))


def holm_verdicts(results: Sequence[ClaimResult]) -> list[HolmVerdict]:
    """The verdicts adjusted for the number of claims, in the order given.

    A family is all claims of one scale that have a p-value: one scale never colours the other. The adjustment only
    takes *reproduced* away; *not reproduced* and *inconclusive* stay what each claim's own seeds say.
    """
    p_values = [p_value(result) for result in results]
    adjusted: list[float | None] = [None] * len(results)
    for scale in {result.claim.scale for result in results}:
        family = {i: p for i, p in enumerate(p_values) if p is not None and results[i].claim.scale == scale}
        for index, value in zip(family, holm(list(family.values())), strict=True):
            adjusted[index] = value
    return [
        HolmVerdict(result.claim, p, value, _name(result, value))
        for result, p, value in zip(results, p_values, adjusted, strict=True)
    ]


def probability_of_improvement(treatment: ArrayLike, control: ArrayLike) -> Any:
    """P(X > Y) + P(X = Y) / 2 over all N * M pairs of a treatment run X and a control run Y.

    The chance that a run of the method beats a run of the control, greater being better; 0.5 for equal arms. It says
    nothing of how much better, and knows neither margin nor pairing of seeds.

    Args:
        treatment: (..., N) values; infinite ones count, such as -inf for a run that failed.
        control: (..., M).

    Returns:
        (...) values in [0, 1]; a float for two samples.

    Raises:
        ValueError: an empty sample, or NaN.

    Source: Agarwal et al. 2021, arXiv 2108.13264: mean over all pairs of S(x, y), which is 1, 1/2 or 0 for x > y, x = y
    or x < y: the Mann-Whitney statistic divided by N * M.
    """
    x, y = np.asarray(treatment, dtype=float)[..., :, None], np.asarray(control, dtype=float)[..., None, :]
    if not x.size or not y.size or np.isnan(x).any() or np.isnan(y).any():
        raise ValueError("treatment and control must have values, none of them NaN")
    wins = np.mean((x > y) + 0.5 * (x == y), axis=(-2, -1))
    return float(wins) if wins.ndim == 0 else wins


def mean_improvement(pairs_by_paper: Pairs) -> Any:
    """Mean over papers of the mean over their claims of the probability of improvement, so papers weigh the same."""
    papers = [
        np.mean([probability_of_improvement(x, y) for x, y in claims], axis=0) for claims in pairs_by_paper.values()
    ]
    return np.mean(papers, axis=0)


def stratified_bootstrap(
    pairs_by_paper: Pairs, statistic: Callable[[Pairs], Any], num: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile bootstrap interval of a statistic; each claim is a stratum.

    Each of B resamples draws, within each claim and independently of the others, its S seeds with replacement; a seed's
    treatment and control stay together, as they share split, noise and initial weights. The interval covers the chance
    of the seeds alone: not that of which papers are here, nor that claims may share runs. From few seeds it is too
    narrow, and one of no width (every run beats every other) is not certainty.

    Args:
        pairs_by_paper: for each paper its claims as (S,) treatment and control.
        statistic: from arms of shape (B, S) to (B,) values.
        num: B.
        seed: of the draws.

    Returns:
        2.5 % and 97.5 % quantile.

    Raises:
        ValueError: arms of a claim with different numbers of seeds.
    """
    generator = np.random.default_rng(seed)
    resampled: dict[str, list[tuple[Arrays, Arrays]]] = {}
    for paper, claims in pairs_by_paper.items():
        resampled[paper] = []
        for treatment, control in claims:
            if len(treatment) != len(control):
                raise ValueError(f"{paper}: arms must have the same seeds, got {len(treatment)} and {len(control)}")
            drawn = generator.integers(len(treatment), size=(num, len(treatment)))
            resampled[paper].append((np.asarray(treatment)[drawn], np.asarray(control)[drawn]))
    low, high = np.quantile(statistic(resampled), [0.025, 0.975])
    return float(low), float(high)


def aggregate(results: Sequence[ClaimResult], scale: str = "mini", num: int = 2000, seed: int = 0) -> Aggregate | None:
    """Probability of improvement over papers, after `rliable`; None if there is too little, see `why_none`.

    Claims with a control and all their runs count. A run that failed, in whichever arm, counts as one that loses every
    comparison for the claim: a failed seed is never dropped, nor does it ever help.
    """
    pairs = _pairs(results, scale)
    if why_none(results, scale):
        return None
    low, high = stratified_bootstrap(pairs, mean_improvement, num, seed)
    num_claims = sum(map(len, pairs.values()))
    return Aggregate(
        scale=scale,
        improvement=float(mean_improvement(pairs)),
        low=low,
        high=high,
        per_paper={paper: float(mean_improvement({paper: claims})) for paper, claims in pairs.items()},
        num_claims=num_claims,
        num_left_out=sum(result.claim.scale == scale for result in results) - num_claims,
    )


def why_none(results: Sequence[ClaimResult], scale: str = "mini") -> str:
    """Why `aggregate` has nothing to say, as a sentence for the reader; empty if it has."""
    found = len(_pairs(results, scale))
    if found >= LEAST_PAPERS:
        return ""
    papers = {0: "no paper has", 1: "only one paper has"}[found]
    return (
        f"No aggregate over papers at {scale} scale: it needs {LEAST_PAPERS} papers with a claim against a control "
        f"whose runs are all there, and {papers} one."
    )


def _pairs(results: Sequence[ClaimResult], scale: str) -> dict[str, list[tuple[Arrays, Arrays]]]:
    """The claims that count, signed so that greater is better."""
    pairs: dict[str, list[tuple[Arrays, Arrays]]] = {}
    for result in results:
        if result.claim.scale != scale or result.control is None or None in (*result.treatment, *result.control):
            continue
        sign = 1 if result.claim.direction == "greater" else -1
        treatment, control = (sign * np.array(arm, dtype=float) for arm in (result.treatment, result.control))
        treatment[~np.isfinite(treatment)] = -np.inf
        control[~np.isfinite(control)] = np.inf
        pairs.setdefault(result.claim.slug, []).append((treatment, control))
    return pairs


def _name(result: ClaimResult, adjusted: float | None) -> Name:
    if result.verdict.name != "reproduced" or adjusted is None or adjusted < 1 - CONFIDENCE:
        return result.verdict.name
    return "inconclusive"
