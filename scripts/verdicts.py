"""Verdicts from per-seed values: pure functions. Imports scipy only when a bound is needed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95
"""Of each one-sided bound."""
MAX_SEEDS = 10_000
"""Beyond this the number of needed seeds is not searched."""

REPRODUCED = "reproduced"
NOT_REPRODUCED = "not reproduced"
INCONCLUSIVE = "inconclusive"
NOT_RUN = "not run"


@dataclass(frozen=True)
class Verdict:
    """What the seeds say of a claim.

    Attributes:
        name: reproduced, not reproduced, inconclusive or not run.
        reason: one short phrase.
        effect: mean of sign * (treatment - control or threshold), in the metric's unit; None without a value.
        lower, upper: one-sided 95 % t bounds of the effect, before the margin is taken off; None with fewer than two.
        num_seeds: seeds with a finite value in every arm.
        num_failed: seeds of which an arm failed.
        needed_seeds: seeds that the observed mean and spread would need for a decision, if inconclusive and known.
    """

    name: str
    reason: str
    effect: float | None = None
    lower: float | None = None
    upper: float | None = None
    num_seeds: int = 0
    num_failed: int = 0
    needed_seeds: int | None = None


def t_bounds(values: Sequence[float]) -> tuple[float, float]:
    """One-sided 95 % bounds mean -+ t_{0.95, n-1} * s / sqrt(n) of the mean; infinite for fewer than two values."""
    n = len(values)
    if n < 2:
        return -math.inf, math.inf
    mean = math.fsum(values) / n
    half = _t_quantile(n - 1) * _spread(values) / math.sqrt(n)
    return mean - half, mean + half


def needed_seeds(values: Sequence[float]) -> int | None:
    """Smallest n with |mean| > t_{0.95, n-1} * s / sqrt(n) for the observed mean and s; None beyond `MAX_SEEDS`."""
    if len(values) < 2:
        return None
    mean, spread = abs(math.fsum(values) / len(values)), _spread(values)

    def enough(n: int) -> bool:
        return mean > _t_quantile(n - 1) * spread / math.sqrt(n)

    if not enough(MAX_SEEDS):
        return None
    low, high = 1, MAX_SEEDS
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def judge(
    treatment: Sequence[float | None],
    control: Sequence[float | None] | None,
    *,
    threshold: float = 0.0,
    sign: int = 1,
    margin: float = 0.0,
    missing: int = 0,
) -> Verdict:
    """Verdict of a claim from paired seeds.

    d_s = sign * (treatment_s - control_s) - margin, or sign * (treatment_s - threshold) - margin without a control;
    L and U are the one-sided 95 % t bounds of the mean of d. *Reproduced* if all seeds finished and L > 0; *not
    reproduced* if U < 0 or more than one treatment seed failed; *not run* while seeds are missing; else *inconclusive*.

    Args:
        treatment, control: one value per seed that has run; None or NaN is a failed run and is never dropped.
        threshold: stands for the control where `control` is None.
        sign: +1 if greater is claimed, -1 if less.
        margin: by which the effect must exceed zero.
        missing: seeds without a record.

    Raises:
        ValueError: arms of different length.
    """
    others: Sequence[float | None] = [threshold] * len(treatment) if control is None else control
    if len(others) != len(treatment):
        raise ValueError(f"treatment has {len(treatment)} seeds, control {len(others)}")
    pairs = [(_finite(a), _finite(b)) for a, b in zip(treatment, others, strict=True)]
    effects = [sign * (a - b) for a, b in pairs if a is not None and b is not None]
    failed, failed_treatment = len(pairs) - len(effects), sum(a is None for a, _ in pairs)
    low, high = t_bounds(effects)
    numbers = {
        "effect": math.fsum(effects) / len(effects) if effects else None,
        "lower": low if math.isfinite(low) else None,
        "upper": high if math.isfinite(high) else None,
        "num_seeds": len(effects),
        "num_failed": failed,
    }

    def verdict(name: str, reason: str, needed: int | None = None) -> Verdict:
        return Verdict(name, reason, needed_seeds=needed, **numbers)  # type: ignore[arg-type]

    if missing:
        return verdict(NOT_RUN, f"{missing} of {missing + len(pairs)} seeds have no record")
    if failed_treatment > 1:
        return verdict(NOT_REPRODUCED, f"{failed_treatment} treatment seeds failed")
    if high < margin:
        return verdict(NOT_REPRODUCED, "the upper bound is below the margin")
    if low > margin and not failed:
        return verdict(REPRODUCED, "the lower bound is above the margin")
    if failed:
        return verdict(INCONCLUSIVE, f"{failed} seed{'s' if failed > 1 else ''} failed")
    needed = needed_seeds([effect - margin for effect in effects])
    if needed is None:
        return verdict(INCONCLUSIVE, f"the observed spread would need more than {MAX_SEEDS:,} seeds")
    return verdict(INCONCLUSIVE, f"the observed spread would need {needed} seeds", needed)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _spread(values: Sequence[float]) -> float:
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))


def _t_quantile(degrees: int) -> float:
    # scipy.special alone loads three times as fast as scipy.stats
    from scipy.special import stdtrit

    return float(stdtrit(degrees, CONFIDENCE))
