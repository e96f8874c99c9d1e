"""Exponents, cross-overs and phase diagrams from a table of nets: values that follow by hand."""

import numpy as np
import pytest

from lightning_modules.stacks import analysis

SIZES = np.array([128.0, 256.0, 512.0, 1024.0])


def table(*rows: tuple[float, float, str, float]) -> dict[str, np.ndarray]:
    """Columns from (alpha, T, status, test error)."""
    names = ("alpha", "temperature", "status", "test_error")
    return {name: np.array(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}


# 1. power laws


def test_exact_power_law_is_recovered() -> None:
    law = analysis.power_law_fit(SIZES, 3 * SIZES**0.538)
    assert law.slope == pytest.approx(0.538, abs=1e-12)
    assert np.exp(law.intercept) == pytest.approx(3, rel=1e-12)
    assert law.error == pytest.approx(0, abs=1e-12)
    np.testing.assert_allclose(law.at(SIZES), 3 * SIZES**0.538, rtol=1e-12)


def test_standard_error_is_that_of_the_normal_equations() -> None:
    """NumPy's covariance of a fitted line, scaled by the residuals."""
    y = SIZES**0.5 * np.array([1.1, 0.8, 1.3, 0.9])
    line, covariance = np.polyfit(np.log(SIZES), np.log(y), 1, cov=True)
    law = analysis.power_law_fit(SIZES, y)
    np.testing.assert_allclose(law, (*line, np.sqrt(covariance[0, 0])), rtol=1e-10)


def test_pairs_with_nan_are_left_out() -> None:
    y = SIZES**2
    y[1] = np.nan
    assert analysis.power_law_fit(SIZES, y).slope == pytest.approx(2, abs=1e-12)


def test_two_points_have_a_slope_without_error() -> None:
    law = analysis.power_law_fit([1, 4], [1, 2])
    assert law.slope == pytest.approx(0.5, abs=1e-12)
    assert np.isnan(law.error)


@pytest.mark.parametrize("x", [[], [2.0], [2.0, 2.0]], ids=["none", "one", "ties"])
def test_slope_without_two_distinct_settings_is_nan(x: list[float]) -> None:
    assert np.isnan(analysis.power_law_fit(x, np.arange(len(x)) + 1.0)).all()


@pytest.mark.parametrize("bad", [0.0, -1.0, np.inf])
def test_number_without_a_logarithm_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="a power law needs positive finite numbers"):
        analysis.power_law_fit([1.0, 2.0], [1.0, bad])


# 2. over seeds


def test_slopes_of_seeds_give_their_mean_and_standard_error() -> None:
    """Slopes 0.4 and 0.6: mean 0.5, standard error 0.1; prefactors differ and do not matter."""
    x, seeds = np.tile(SIZES, 2), np.repeat([7, 3], 4)
    y = np.concatenate([5 * SIZES**0.6, 0.1 * SIZES**0.4])
    found = analysis.slopes_over_seeds(x, y, seeds)
    np.testing.assert_allclose(found.values, [0.4, 0.6], rtol=1e-10)
    np.testing.assert_allclose(found[:2], [0.5, 0.1], rtol=1e-10)


def test_settings_within_a_seed_are_fitted_apart() -> None:
    """One fit over both settings would see the jump between them."""
    x = np.array([1.0, 2.0, 2.0, 4.0])
    y, within = np.array([1.0, 2.0, 50.0, 200.0]), np.array([1, 1, 2, 2])
    found = analysis.slopes_over_seeds(x, y, np.zeros(4), within)
    assert found.mean == pytest.approx(1.5, abs=1e-12)
    assert np.isnan(found.error)


def test_seed_without_a_slope_does_not_count() -> None:
    found = analysis.slopes_over_seeds([1, 2, 1], [1, 2, 5], [0, 0, 1])
    assert found.mean == pytest.approx(1, abs=1e-12)
    assert np.isnan(found.values).tolist() == [False, True]


def test_region_is_averaged_for_each_seed() -> None:
    found = analysis.means_over_seeds([1, 3, 100, 4, 100], [0, 0, 0, 1, 2], [True, True, False, True, False])
    np.testing.assert_allclose(found.values, [2, 4, np.nan])
    assert found.mean == 3
    assert found.error == pytest.approx(1)


# 3. cross-over temperature


def test_crossing_of_a_power_law_is_exact() -> None:
    """dw = 0.01 T^0.9 reaches 0.03 at 3^(1/0.9); temperatures in any order."""
    temperatures = np.array([4.0, 0.25, 16.0, 1.0])
    found = analysis.threshold_crossing(temperatures, 0.01 * temperatures**0.9, 0.03)
    assert found == pytest.approx(3 ** (1 / 0.9), rel=1e-12)


def test_crossing_at_a_grid_point_is_that_point() -> None:
    assert analysis.threshold_crossing([1, 2, 4], [0.1, 0.2, 0.2], 0.2) == 2
    assert analysis.threshold_crossing([1, 2], [0.1, 0.2], 0.1) == 1


def test_crossing_is_the_first_of_several() -> None:
    assert analysis.threshold_crossing([1, 2, 4, 8], [1, 4, 1, 4], 2) == pytest.approx(2**0.5)


def test_crossing_skips_what_was_not_measured() -> None:
    assert analysis.threshold_crossing([1, 2, 4], [1, np.nan, 4], 2) == pytest.approx(2)


@pytest.mark.parametrize("values", [[1, 1.5, 1.9], [3, 4, 5], [np.nan] * 3], ids=["never", "before", "unknown"])
def test_crossing_outside_the_grid_is_nan(values: list[float]) -> None:
    assert np.isnan(analysis.threshold_crossing([1, 2, 4], values, 2))


def test_exponent_of_the_crossing_is_gamma_over_delta() -> None:
    """dw = c T^0.9 P^0.45 crosses at T_c ~ P^-0.5 in each seed; at P = 1024 every T is beyond, and it is left out."""
    cells = np.array(np.meshgrid(SIZES, 2.0 ** np.arange(-3, 6), [0, 1])).reshape(3, -1)
    sizes, temperatures, seeds = cells
    dw = 0.001 * (1 + seeds) * temperatures**0.9 * sizes**0.45
    dw[(sizes == 1024)] = 1
    found = analysis.crossings_over_seeds(sizes, temperatures, dw, seeds, 0.02)
    np.testing.assert_allclose(found.values, [0.5, 0.5], rtol=1e-10)


# 4. collapse and stability


def test_ratio_at_equal_temperature_is_of_means_over_seeds() -> None:
    """dt / B = 0.1 comes out as two neighbouring floats."""
    temperatures = np.array([0.1, 1.6 / 16, 0.1 + 1e-15, 0.5])
    ratios = analysis.collapse_ratios(temperatures, [4, 4, 16, 16], [1.0, 3.0, 3.0, 9.0], 16, 4)
    assert ratios == {0.1: 1.5}


def test_stable_is_below_the_first_that_diverged() -> None:
    """At dt = 4 the net died without diverging."""
    assert analysis.stability_edge([8, 1, 2, 4], [True, False, True, False]) == (1, 2)


def test_edge_outside_the_grid_is_nan() -> None:
    np.testing.assert_equal(analysis.stability_edge([1, 2], [False, False]), (2, np.nan))
    np.testing.assert_equal(analysis.stability_edge([1, 2], [True, False]), (np.nan, 1))


# 5. phase diagram


def test_cell_averages_fitted_nets_alone() -> None:
    grid = analysis.phase_grid(
        table(
            (8, 0.5, "fitted", 0.2),
            (8, 0.5, "fitted", 0.4),
            (8, 0.5, "diverged", 1.0),
            (8, 0.25, "unfinished", 0.9),
            (1, 0.5, "diverged", 1.0),
        )
    )
    np.testing.assert_array_equal(grid.alphas, [1, 8])
    np.testing.assert_array_equal(grid.temperatures, [0.25, 0.5])
    np.testing.assert_allclose(grid.mean, [[np.nan, np.nan], [np.nan, 0.3]])
    assert grid.counts["fitted"].tolist() == [[0, 0], [0, 2]]
    assert grid.counts["diverged"].tolist() == [[0, 1], [0, 1]]
    assert grid.counts["unfinished"].tolist() == [[0, 0], [1, 0]]


def test_unknown_status_is_refused() -> None:
    with pytest.raises(ValueError, match="status must be one of fitted, diverged, unfinished, got running"):
        analysis.phase_grid(table((1, 1, "running", 0.1)))


def test_fitted_keeps_whole_rows() -> None:
    kept = analysis.fitted(table((1, 2, "diverged", 0.5), (3, 4, "fitted", 0.1)))
    assert {name: column.tolist() for name, column in kept.items()} == {
        "alpha": [3],
        "temperature": [4],
        "status": ["fitted"],
        "test_error": [0.1],
    }
