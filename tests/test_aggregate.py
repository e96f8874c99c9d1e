"""Holm's adjustment, p-values, probability of improvement and its bootstrap."""

import math
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
from scipy.stats import mannwhitneyu, ttest_1samp

from scripts.aggregate import (
    aggregate,
    holm,
    holm_verdicts,
    mean_improvement,
    p_value,
    probability_of_improvement,
    stratified_bootstrap,
    why_none,
)
from scripts.claims import Claim
from scripts.records import ClaimResult
from scripts.verdicts import judge

GOOD, BASE = [0.9, 0.8, 0.85, 0.95], [0.7, 0.75, 0.72, 0.69]


def result(
    treatment: list[float | None], control: list[float | None] | None = None, *, id: str = "a", **changes: Any
) -> ClaimResult:
    """The result of a claim with these values for its seeds; a threshold of 0 without a control."""
    fields: dict[str, Any] = {"slug": "toy", "scale": "mini", "direction": "greater", "margin": 0.0} | changes
    claim = Claim(
        id=id,
        text=id,
        treatment="mini.yaml",
        metric="m",
        seeds=tuple(range(len(treatment))),
        control=None if control is None else "mini-ce.yaml",
        threshold=0.0 if control is None else None,
        **fields,
    )
    verdict = judge(treatment, control, threshold=claim.threshold, direction=claim.direction, margin=claim.margin)
    arm = None if control is None else tuple(control)
    return ClaimResult(claim, verdict, (), tuple(treatment), arm, (), (), ())


def test_holm_equals_values_worked_out_by_hand() -> None:
    # sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1: 0.02, 0.03, 0.06, 0.04, the last raised to 0.06
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_holm_of_equal_values_is_bonferroni_and_stops_at_one() -> None:
    assert holm([0.02, 0.02, 0.02]) == pytest.approx([0.06, 0.06, 0.06])
    assert holm([0.4, 0.5, 1.0]) == [1.0, 1.0, 1.0]


def test_holm_of_one_and_of_none() -> None:
    assert (holm([0.03]), holm([])) == ([0.03], [])


@pytest.mark.parametrize("wrong", [-0.1, 1.1, math.nan])
def test_holm_refuses_what_is_no_p_value(wrong: float) -> None:
    with pytest.raises(ValueError, match=r"p-values must be in \[0, 1\], got"):
        holm([0.5, wrong])


@pytest.mark.parametrize(("direction", "sign"), [("greater", 1), ("less", -1)])
def test_p_value_equals_scipys_one_sided_t_test(direction: str, sign: int) -> None:
    differences = sign * (np.array(GOOD) - np.array(BASE)) - 0.1
    expected = ttest_1samp(differences, 0, alternative="greater").pvalue
    assert p_value(result(GOOD, BASE, direction=direction, margin=0.1)) == pytest.approx(expected, rel=1e-12)


def test_p_value_against_a_threshold() -> None:
    values = [0.1, -0.05, 0.2]
    assert p_value(result(values)) == pytest.approx(ttest_1samp(values, 0, alternative="greater").pvalue, rel=1e-12)


def test_p_value_is_below_five_percent_just_where_the_claim_is_reproduced() -> None:
    for shift in np.linspace(-0.5, 0.5, 101):
        found = result([0.1 + shift, -0.05 + shift, 0.2 + shift])
        p = p_value(found)
        assert p is not None
        assert (p < 0.05) == (found.verdict.name == "reproduced")


@pytest.mark.parametrize(("value", "expected"), [(0.9, 0.0), (0.75, 1.0), (0.7, 1.0)])
def test_p_value_without_spread(value: float, expected: float) -> None:
    # 0.80 - 0.75 is a rounding error above the margin 0.05 and must not count as above
    assert p_value(result([value + 0.05] * 3, [0.75] * 3, margin=0.05)) == expected


def test_p_value_of_a_claim_that_is_not_run() -> None:
    assert p_value(result([0.9, None], [0.1, 0.2])) is None


def test_failed_seed_never_counts_as_reproduced() -> None:
    assert p_value(result([0.9, 0.91, math.nan], [0.1, 0.11, 0.1])) == 1.0


def test_holm_takes_reproduced_away_and_nothing_else() -> None:
    weak = result([0.17, 0.27, 0.09], id="weak")  # t = 3.4 with 2 degrees of freedom: p = 0.04
    assert weak.verdict.name == "reproduced"
    strong, against = result([0.1, 0.11, 0.1], id="strong"), result([-0.1, -0.11, -0.1], id="against")
    found = holm_verdicts([weak, strong, against, result([0.1, None], id="open")])
    assert [v.name for v in found] == ["inconclusive", "reproduced", "not reproduced", "not run"]
    assert found[0].adjusted == pytest.approx(2 * (found[0].p or 0))
    assert (found[3].p, found[3].adjusted) == (None, None)


def test_scales_are_families_of_their_own() -> None:
    weak = [0.13, 0.23, 0.05]
    mini, paper = holm_verdicts([result(weak), result(weak, scale="paper")])
    assert (mini.adjusted, paper.adjusted) == (mini.p, paper.p)


def test_probability_of_improvement_equals_brute_force() -> None:
    generator = np.random.default_rng(1)
    x, y = generator.integers(0, 6, 7), generator.integers(0, 6, 5)  # with ties
    expected = sum((a > b) + 0.5 * (a == b) for a, b in product(x, y)) / 35
    assert probability_of_improvement(x, y) == pytest.approx(expected)
    assert probability_of_improvement(x, y) == pytest.approx(mannwhitneyu(x, y).statistic / 35)


def test_probability_of_improvement_over_leading_axes() -> None:
    x, y = np.random.default_rng(2).normal(size=(2, 3, 4)), np.random.default_rng(3).normal(size=(2, 3, 5))
    found = probability_of_improvement(x, y)
    assert found.shape == (2, 3)
    assert found[1, 2] == probability_of_improvement(x[1, 2], y[1, 2])


def test_probability_of_improvement_of_swapped_arms_is_the_rest() -> None:
    assert probability_of_improvement(GOOD, [0.9, 0.1]) == 1 - probability_of_improvement([0.9, 0.1], GOOD)


@pytest.mark.parametrize("wrong", [[], [0.1, math.nan]])
def test_probability_of_improvement_refuses_empty_and_nan(wrong: list[float]) -> None:
    with pytest.raises(ValueError, match="must have values, none of them NaN"):
        probability_of_improvement(wrong, [1.0])


def test_papers_weigh_the_same_however_many_claims_they_have() -> None:
    win, loss = (np.array([1.0, 1.0]), np.zeros(2)), (np.zeros(2), np.array([1.0, 1.0]))
    assert mean_improvement({"many": [win, win, win], "one": [loss]}) == 0.5


def test_bootstrap_equals_a_loop_over_its_resamples() -> None:
    arms = (np.array([0.5, 0.9, 0.2]), np.array([0.4, 0.8, 0.6]))
    draws = np.random.default_rng(7).integers(3, size=(50, 3))
    values = [probability_of_improvement(arms[0][draw], arms[1][draw]) for draw in draws]
    expected = np.percentile(values, [2.5, 97.5])
    assert stratified_bootstrap({"toy": [arms]}, mean_improvement, num=50, seed=7) == pytest.approx(tuple(expected))


def test_bootstrap_of_means_has_the_known_spread() -> None:
    values = np.random.default_rng(0).normal(size=400)
    pairs = {"toy": [(values, np.zeros(400))]}
    low, high = stratified_bootstrap(pairs, lambda p: p["toy"][0][0].mean(-1), num=4000)
    # normal approximation: mean -+ 1.96 sd / sqrt(n)
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.01)


def test_bootstrap_keeps_a_seeds_arms_together() -> None:
    values = np.array([0.1, 0.5, 0.9])
    interval = stratified_bootstrap(
        {"toy": [(values, values - 0.25)]}, lambda p: np.ptp(p["toy"][0][0] - p["toy"][0][1], -1)
    )
    assert interval == pytest.approx((0, 0), abs=1e-12)


def test_bootstrap_refuses_arms_of_different_length() -> None:
    with pytest.raises(ValueError, match="toy: arms must have the same seeds, got 2 and 1"):
        stratified_bootstrap({"toy": [(np.zeros(2), np.zeros(1))]}, mean_improvement)


def test_aggregate_of_two_papers() -> None:
    mixed = result([0.3, 0.1], [0.2, 0.2], slug="b")
    worse = result([0.3, 0.2], [0.1, 0.0], slug="b", direction="less", id="less")
    other = [result([0.5, 0.6], slug="b"), result([0.5, None], [0.1, 0.1], slug="c"), result(GOOD, BASE, scale="paper")]
    found = aggregate([result(GOOD, BASE, slug="a"), mixed, worse, *other])
    assert found is not None
    assert found.per_paper == {"a": 1.0, "b": 0.25}
    assert found.improvement == 0.625
    assert (found.num_claims, found.num_left_out) == (3, 2)
    assert 0.5 <= found.low <= found.improvement <= found.high <= 0.75


def test_failed_seed_counts_against_the_claim_in_either_arm() -> None:
    failed_treatment = result([0.9, math.nan], [0.1, 0.2], slug="a")
    failed_control = result([0.9, 0.8], [0.1, math.nan], slug="b")
    found = aggregate([failed_treatment, failed_control])
    assert found is not None
    assert found.per_paper == {"a": 0.5, "b": 0.5}


def test_fewer_than_two_papers_have_no_aggregate_and_a_reason() -> None:
    one = [result(GOOD, BASE, slug="a"), result(GOOD, slug="b")]
    assert aggregate(one) is None
    assert "needs 2 papers with a claim against a control whose runs are all there, and only one paper has" in why_none(
        one
    )
    assert "no paper has" in why_none([])
    assert why_none([*one, result(GOOD, BASE, slug="c")]) == ""


def test_more_claims_make_adjusted_values_larger() -> None:
    one = result([0.13, 0.23, 0.05])
    sizes = [holm_verdicts([one] * count)[0].adjusted or 0 for count in (1, 2, 3)]
    assert all(small < large for small, large in pairwise(sizes))
