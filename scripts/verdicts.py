r"""From the seeds of a claim to its verdict: pure functions. Imports no torch, and SciPy only when there is a spread.

Legend: for seed s with treatment metric m_s and control metric c_s (or the threshold), sign +1 for `greater`, -1 for
`less`:

    effect_s = sign * (m_s - c_s)        d_s = effect_s - margin
    L, U     = mean(d) -+ t_{0.95, n-1} * sd(d) / sqrt(n)        one-sided 95 % bounds, n finished pairs
"""

import math
import statistics
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

Name = Literal["reproduced", "not reproduced", "inconclusive", "not run"]
VERDICTS: tuple[Name, ...] = get_args(Name)

CONFIDENCE = 0.95
MOST_SEEDS = 10_000
"""Beyond this many seeds the number needed is not looked for."""


@dataclass(frozen=True)
class Verdict:
    """What the seeds say of a claim.

    Args:
        name: the verdict.
        effect: mean of sign * (treatment - control or threshold) in the metric's own units, so that positive is what
            the claim says; None without a finished pair, and while runs are missing.
        lower, upper: one-sided 95 % t bounds of `effect`; infinite for a single pair; None where `effect` is.
        num_seeds: seeds that finished (in both arms).
        num_failed: seeds that failed in either arm.
        needed_seeds: for an inconclusive claim the seeds that would decide it if mean and spread stayed as observed;
            None if no number up to 10,000 does, or if a failed run stands in the way.
        reason: the rule that decided, in a few words.
    """

    name: Name
    effect: float | None
    lower: float | None
    upper: float | None
    num_seeds: int
    num_failed: int
    needed_seeds: int | None
    reason: str


def judge(
    treatment: Sequence[float | None],
    control: Sequence[float | None] | None = None,
    *,
    threshold: float | None = None,
    direction: Literal["greater", "less"] = "greater",
    margin: float = 0.0,
) -> Verdict:
    """Verdict of one claim.

    - *not run*: a seed has no record.
    - *reproduced*: every seed finished and L > 0.
    - *not reproduced*: U < 0 over the finished pairs, or more than one treatment seed failed.
    - *inconclusive*: otherwise. A failed seed is never dropped: it rules out *reproduced*.

    Args:
        treatment: the metric for each seed; None for a run without a record, NaN or infinite for one that failed.
        control: likewise for the same seeds in the same order; None for a claim against a threshold.
        threshold: what the metric is held against where there is no control.
        direction: whether the claim says that the treatment's metric is greater or less.
        margin: least effect that the claim asserts, in the metric's units; negative for "not worse by more than".

    Raises:
        ValueError: both or neither of control and threshold, or arms of different length.
    """
    if (control is None) == (threshold is None):
        raise ValueError("give either control or threshold")
    other = [threshold] * len(treatment) if control is None else list(control)
    if len(other) != len(treatment):
        raise ValueError(f"treatment and control must have the same seeds, got {len(treatment)} and {len(other)}")
    runs = [*treatment, *([] if control is None else control)]
    sign = 1 if direction == "greater" else -1
    pairs = list(zip(treatment, other, strict=True))
    differences = [
        beyond_margin(m, c, sign, margin)
        for m, c in pairs
        if m is not None and c is not None and math.isfinite(m) and math.isfinite(c)
    ]
    failed = sum(_failed(m) or _failed(c) for m, c in pairs)
    if not runs or None in runs:
        missing = f"{runs.count(None)} of {len(runs)} runs have no record"
        return Verdict("not run", None, None, None, len(differences), failed, None, missing)
    return _decide(differences, margin, failed, sum(map(_failed, treatment)))


def t_bounds(values: Sequence[float]) -> tuple[float, float]:
    """One-sided 95 % t bounds of the mean: mean -+ t_{0.95, n-1} sd / sqrt(n).

    Returns:
        Lower and upper bound; the mean twice for values without spread, infinite bounds for a single value.
    """
    if len(values) < 2:
        return -math.inf, math.inf
    mean, spread = statistics.fmean(values), statistics.stdev(values)
    if spread == 0:
        return values[0], values[0]
    half = _t_quantile(len(values) - 1) * spread / math.sqrt(len(values))
    return mean - half, mean + half


def needed_seeds(mean: float, spread: float) -> int | None:
    """Smallest n with |mean| > t_{0.95, n-1} * spread / sqrt(n), the right side falling with n.

    Returns:
        None for mean 0 or if more than 10,000 seeds would be needed.
    """
    if mean == 0:
        return None
    counts = range(2, MOST_SEEDS + 1)
    index = bisect_left(counts, True, key=lambda n: abs(mean) > _t_quantile(n - 1) * spread / math.sqrt(n))
    return counts[index] if index < len(counts) else None


def _decide(differences: list[float], margin: float, failed: int, treatment_failed: int) -> Verdict:
    """The rule, once every seed has either finished or failed."""
    count = len(differences)
    low, high = t_bounds(differences) if differences else (None, None)
    needed = None
    name: Name
    if treatment_failed > 1:
        name, reason = "not reproduced", f"{treatment_failed} treatment runs failed"
    elif high is not None and high < 0:
        name, reason = "not reproduced", "the upper bound stays below the margin"
    elif low is not None and low > 0 and not failed:
        name, reason = "reproduced", "every seed finished and the lower bound exceeds the margin"
    else:
        name = "inconclusive"
        needed, reason = _undecided(differences, failed)
    if low is None or high is None:
        return Verdict(name, None, None, None, count, failed, needed, reason)
    effect = statistics.fmean(differences) + margin
    return Verdict(name, effect, low + margin, high + margin, count, failed, needed, reason)


def _undecided(differences: list[float], failed: int) -> tuple[int | None, str]:
    """Needed seeds, and why there is no decision."""
    if not differences:
        return None, "no seed finished in both arms"
    mean = statistics.fmean(differences)
    if failed and (mean >= 0 or len(differences) < 2):
        return None, f"{failed} failed {'seed' if failed == 1 else 'seeds'}: cannot count as reproduced"
    if len(differences) < 2:
        return None, "one seed has no spread to judge by"
    if mean == 0:
        return None, "the effect equals the margin"
    needed = needed_seeds(mean, statistics.stdev(differences))
    number = f"more than {MOST_SEEDS:,}" if needed is None else str(needed)
    return needed, f"the bounds enclose the margin; this spread would need {number} seeds"


def beyond_margin(metric: float, other: float, sign: int, margin: float) -> float:
    """d_s; zero where only rounding keeps it from zero, so that 0.80 - 0.75 does not exceed a margin of 0.05."""
    difference = sign * (metric - other) - margin
    return 0.0 if abs(difference) <= 1e-14 * max(abs(metric), abs(other), abs(margin)) else difference


def _t_quantile(degrees: int) -> float:
    from scipy.special import stdtrit  # 0.2 s that `list` without records need not pay

    return float(stdtrit(degrees, CONFIDENCE))


def _failed(value: float | None) -> bool:
    return value is not None and not math.isfinite(value)
