"""Verdicts from known samples."""

import math

import pytest
import scipy.stats

from scripts.verdicts import judge, needed_seeds, t_bounds

NAN = math.nan
TREATMENT = [0.82, 0.81, 0.83, 0.80, 0.82]
CONTROL = [0.55, 0.56, 0.54, 0.57, 0.55]


def test_bounds_equal_a_textbook_sample() -> None:
    # n 4, mean 2.5, sd sqrt(5/3) = 1.290994; table value t_{0.95, 3} = 2.353363
    half = 2.353363 * 1.290994 / 2
    assert t_bounds([1.0, 2.0, 3.0, 4.0]) == pytest.approx((2.5 - half, 2.5 + half), abs=1e-5)


def test_bounds_of_the_effect_equal_scipys_paired_test() -> None:
    verdict = judge(TREATMENT, CONTROL, margin=0.1)
    test = scipy.stats.ttest_rel(TREATMENT, CONTROL)
    # a two-sided 90 % interval has the one-sided 95 % bounds as its ends
    expected = test.confidence_interval(0.90)
    assert (verdict.lower, verdict.upper) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_effect_is_the_mean_difference_without_the_margin() -> None:
    # 0.27, 0.25, 0.29, 0.23, 0.27
    assert judge(TREATMENT, CONTROL, margin=0.1).effect == pytest.approx(0.262)


def test_reproduced_above_the_margin() -> None:
    verdict = judge(TREATMENT, CONTROL, margin=0.2)
    assert (verdict.name, verdict.num_seeds, verdict.num_failed, verdict.needed_seeds) == ("reproduced", 5, 0, None)


def test_not_reproduced_below_the_margin() -> None:
    assert judge(TREATMENT, CONTROL, margin=0.3).name == "not reproduced"


def test_inconclusive_when_the_bounds_enclose_the_margin() -> None:
    assert judge(TREATMENT, CONTROL, margin=0.26).name == "inconclusive"


def test_less_turns_the_sign() -> None:
    verdict = judge(CONTROL, TREATMENT, direction="less", margin=0.2)
    assert (verdict.name, verdict.effect) == ("reproduced", pytest.approx(0.262))


def test_threshold_claim_that_holds() -> None:
    verdict = judge([0.10, 0.12, 0.11], threshold=0.15, direction="less")
    assert (verdict.name, verdict.effect) == ("reproduced", pytest.approx(0.04))


def test_threshold_claim_that_fails() -> None:
    assert judge([0.10, 0.12, 0.11], threshold=0.15).name == "not reproduced"


def test_negative_margin_means_not_worse() -> None:
    assert judge([0.800, 0.801, 0.799], [0.802, 0.802, 0.803], margin=-0.01).name == "reproduced"


def test_one_failed_treatment_seed_rules_out_reproduced() -> None:
    verdict = judge([*TREATMENT[:4], NAN], CONTROL, margin=0.1)
    assert (verdict.name, verdict.num_seeds, verdict.num_failed) == ("inconclusive", 4, 1)


def test_no_number_of_seeds_mends_a_failed_one() -> None:
    verdict = judge([*TREATMENT[:4], NAN], CONTROL, margin=0.25)
    assert (verdict.needed_seeds, verdict.reason) == (None, "1 failed seed: cannot count as reproduced")


def test_failed_control_seed_rules_out_reproduced() -> None:
    assert judge(TREATMENT, [NAN, *CONTROL[1:]], margin=0.1).name == "inconclusive"


def test_two_failed_control_seeds_do_not_refute() -> None:
    assert judge(TREATMENT, [NAN, NAN, *CONTROL[2:]], margin=0.1).name == "inconclusive"


def test_two_failed_treatment_seeds_refute() -> None:
    verdict = judge([*TREATMENT[:3], NAN, NAN], CONTROL, margin=0.1)
    assert (verdict.name, verdict.reason) == ("not reproduced", "2 treatment runs failed")


def test_failed_seed_with_upper_bound_below_the_margin_refutes() -> None:
    assert judge([*TREATMENT[:4], NAN], CONTROL, margin=0.5).name == "not reproduced"


def test_infinite_metric_counts_as_failed() -> None:
    assert judge([*TREATMENT[:4], math.inf], CONTROL, margin=0.1).num_failed == 1


def test_seed_failed_in_both_arms_counts_once() -> None:
    assert judge([*TREATMENT[:4], NAN], [*CONTROL[:4], NAN]).num_failed == 1


def test_missing_record_means_not_run() -> None:
    verdict = judge([*TREATMENT[:4], None], CONTROL, margin=0.1)
    assert (verdict.name, verdict.effect, verdict.reason) == ("not run", None, "1 of 10 runs have no record")


def test_missing_record_outweighs_failed_seeds() -> None:
    assert judge([NAN, NAN, None], threshold=0.5).name == "not run"


def test_no_seeds_mean_not_run() -> None:
    assert judge([], threshold=0.5).name == "not run"


def test_all_seeds_failed_have_no_effect() -> None:
    verdict = judge([NAN, NAN], [0.5, 0.5])
    assert (verdict.name, verdict.effect, verdict.lower, verdict.upper) == ("not reproduced", None, None, None)


def test_failed_controls_alone_are_inconclusive_without_effect() -> None:
    verdict = judge([0.5, 0.5], [NAN, NAN])
    assert (verdict.name, verdict.effect) == ("inconclusive", None)


def test_one_pair_is_inconclusive() -> None:
    verdict = judge([0.9], [0.5])
    assert (verdict.name, verdict.lower, verdict.upper) == ("inconclusive", -math.inf, math.inf)


def test_no_spread_gives_the_mean_as_both_bounds() -> None:
    verdict = judge([0.75, 0.75], [0.5, 0.5], margin=0.125)
    assert (verdict.name, verdict.lower, verdict.upper) == ("reproduced", 0.25, 0.25)


def test_no_spread_below_the_margin_refutes() -> None:
    assert judge([0.75, 0.75], [0.5, 0.5], margin=0.5).name == "not reproduced"


def test_effect_equal_to_the_margin_is_inconclusive_despite_rounding() -> None:
    # 0.80 - 0.75 - 0.05 is 4e-17 in floating point
    verdict = judge([0.80, 0.80], [0.75, 0.75], margin=0.05)
    assert (verdict.name, verdict.needed_seeds) == ("inconclusive", None)


def test_needed_seeds_is_the_smallest_number_that_decides() -> None:
    # scipy.stats.t.ppf as the independent quantile
    mean, spread = 0.4, 1.0
    decides = [n for n in range(2, 100) if mean > scipy.stats.t.ppf(0.95, n - 1) * spread / math.sqrt(n)]
    assert needed_seeds(mean, spread) == decides[0] == 19


def test_needed_seeds_of_a_negative_mean_is_the_same() -> None:
    assert needed_seeds(-0.4, 1.0) == 19


def test_inconclusive_claim_says_how_many_seeds_it_needs() -> None:
    verdict = judge([0.5, 0.7, 0.6], threshold=0.55)
    # d = -0.05, 0.15, 0.05: mean 0.05, sd 0.1
    assert (verdict.needed_seeds, "would need 13 seeds" in verdict.reason) == (13, True)


def test_hopeless_number_of_seeds_is_named_as_such() -> None:
    verdict = judge([1.0, -1.0 + 1e-4], threshold=0.0)
    assert (verdict.needed_seeds, verdict.reason) == (
        None,
        "the bounds enclose the margin; this spread would need more than 10,000 seeds",
    )


def test_effect_of_zero_needs_no_number() -> None:
    assert needed_seeds(0.0, 1.0) is None


def test_arms_of_different_length_are_an_error() -> None:
    with pytest.raises(ValueError, match="same seeds, got 2 and 1"):
        judge([0.1, 0.2], [0.1])


def test_control_and_threshold_together_are_an_error() -> None:
    with pytest.raises(ValueError, match="either control or threshold"):
        judge([0.1, 0.2], [0.1, 0.2], threshold=0.5)
