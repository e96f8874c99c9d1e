"""From a table of finished nets to exponents, cross-overs and phase diagrams.

Columns are one-dimensional, one entry per net (member). NaN means "not measured" and is left out; what diverged or was
not finished never enters a mean: callers take `fitted(members)` or let `phase_grid` count.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Column = NDArray[Any]
Members = Mapping[str, Column]
STATUSES = ("fitted", "diverged", "unfinished")


class PowerLaw(NamedTuple):
    """y = exp(intercept) x^slope; `error` is the slope's standard error from the residuals, NaN below three points."""

    slope: float
    intercept: float
    error: float

    def at(self, x: Column) -> Floats:
        """The fitted y."""
        return np.exp(self.intercept) * np.asarray(x, float) ** self.slope


class Estimate(NamedTuple):
    """Mean and standard error over seeds (NaN for one seed), and each seed's value in the order of the seeds."""

    mean: float
    error: float
    values: Floats


class PhaseGrid(NamedTuple):
    """Rows are alpha, columns T, both ascending; `mean` is over fitted nets, NaN in a cell without one."""

    alphas: Floats
    temperatures: Floats
    mean: Floats
    counts: dict[str, NDArray[np.int64]]


def fitted(members: Members) -> dict[str, NDArray]:
    """The rows whose status is `fitted`."""
    keep = np.asarray(members["status"]) == "fitted"
    return {name: np.asarray(column)[keep] for name, column in members.items()}


def power_law_fit(x: Column, y: Column) -> PowerLaw:
    """Least squares of log y against log x.

    Args:
        x, y: (n,) positive; pairs with a NaN are left out.

    Returns:
        The power law; all NaN when fewer than two distinct x remain.

    Raises:
        ValueError: a value is not positive or not finite.
    """
    pairs = np.stack([np.asarray(x, float), np.asarray(y, float)])
    pairs = pairs[:, ~np.isnan(pairs).any(0)]
    if (pairs <= 0).any() or np.isinf(pairs).any():
        raise ValueError(f"a power law needs positive finite numbers, got {pairs.min():g} to {pairs.max():g}")
    a, b = np.log(pairs)
    if len(np.unique(a)) < 2:
        return PowerLaw(np.nan, np.nan, np.nan)
    centred = a - a.mean()
    spread = centred @ centred
    slope = centred @ b / spread
    intercept = b.mean() - slope * a.mean()
    residuals = b - intercept - slope * a
    error = np.sqrt(residuals @ residuals / (len(a) - 2) / spread) if len(a) > 2 else np.nan
    return PowerLaw(float(slope), float(intercept), float(error))


def estimate(values: Column | list[float]) -> Estimate:
    """Mean and standard error of one value per seed; NaN values do not count.

    Args:
        values: (seeds,).

    Returns:
        The estimate; `values` still holds the NaN.
    """
    column = np.asarray(values, float)
    known = column[~np.isnan(column)]
    mean = float(known.mean()) if len(known) else np.nan
    error = float(known.std(ddof=1) / np.sqrt(len(known))) if len(known) > 1 else np.nan
    return Estimate(mean, error, column)


def slopes_over_seeds(x: Column, y: Column, seeds: Column, within: Column | None = None) -> Estimate:
    """Exponent of y ~ x^slope, fitted for each seed on its own.

    Args:
        x, y: (n,) positive, as in `power_law_fit`.
        seeds: (n,) which seed a net belongs to.
        within: (n,) a further setting (dt, P); each of its values is fitted apart and a seed's slope is their mean.

    Returns:
        The estimate over seeds; a seed without two distinct x has NaN.
    """
    x, y, seeds = np.asarray(x, float), np.asarray(y, float), np.asarray(seeds)
    settings = _rounded(np.zeros(len(seeds)) if within is None else within)
    slopes = []
    for seed in np.unique(seeds):
        groups = [(seeds == seed) & (settings == value) for value in np.unique(settings[seeds == seed])]
        slopes.append(estimate([power_law_fit(x[rows], y[rows]).slope for rows in groups]).mean)
    return estimate(slopes)


def means_over_seeds(values: Column, seeds: Column, rows: Column) -> Estimate:
    """Mean of a part of the table for each seed, such as the test error of a region of the phase diagram.

    Args:
        values: (n,).
        seeds: (n,).
        rows: (n,) bool, the part.

    Returns:
        The estimate over all seeds of the table; a seed without a value in the part has NaN.
    """
    values, seeds, rows = np.asarray(values, float), np.asarray(seeds), np.asarray(rows, bool)
    return estimate([estimate(values[rows & (seeds == seed)]).mean for seed in np.unique(seeds)])


def threshold_crossing(temperatures: Column, values: Column, threshold: float) -> float:
    """Temperature T_c at which a quantity first reaches a threshold from below, interpolated in both logarithms.

    Args:
        temperatures: (n,) positive, one value each, in any order.
        values: (n,) positive; NaN is left out.
        threshold: such as 0.02 for the relative weight change.

    Returns:
        T_c; NaN when the threshold is not reached, or exceeded at the lowest temperature already.
    """
    temperatures, values = np.asarray(temperatures, float), np.asarray(values, float)
    order = np.argsort(temperatures)
    order = order[~np.isnan(values[order])]
    temperatures, values = temperatures[order], values[order]
    reached = np.flatnonzero(values >= threshold)
    if not len(reached) or (reached[0] == 0 and values[0] > threshold):
        return np.nan
    above = int(reached[0])
    if values[above] == threshold:
        return float(temperatures[above])
    low, high = np.log(temperatures[above - 1 : above + 1])
    below, beyond = np.log(values[above - 1 : above + 1])
    return float(np.exp(low + (np.log(threshold) - below) / (beyond - below) * (high - low)))


def crossings_over_seeds(x: Column, temperatures: Column, values: Column, seeds: Column, threshold: float) -> Estimate:
    """Exponent a of T_c ~ x^-a, T_c the threshold crossing of each seed and x.

    Args:
        x: (n,) positive setting such as P.
        temperatures, values, seeds: (n,) as in `threshold_crossing`; a table has one net per (x, T, seed).
        threshold: of the values.

    Returns:
        The estimate of a over seeds; an x whose T_c is unknown is left out of the seed's fit.

    Source: arXiv 2301.13703, T_c ~ P^-a.
    """
    x, temperatures, values = (np.asarray(column, float) for column in (x, temperatures, values))
    seeds, cells = np.asarray(seeds), []
    for seed in np.unique(seeds):
        for setting in np.unique(x):
            rows = (seeds == seed) & (x == setting)
            cells.append((setting, threshold_crossing(temperatures[rows], values[rows], threshold), seed))
    settings, found, owners = (np.array(column) for column in zip(*cells, strict=True))
    slopes = slopes_over_seeds(settings, found, owners)
    return Estimate(-slopes.mean, slopes.error, -slopes.values)


def collapse_ratios(
    temperatures: Column, batches: Column, values: Column, batch: int, reference: int
) -> dict[float, float]:
    """Whether T = eta / B governs alone: a quantity at one batch size over that at another, at equal T.

    Args:
        temperatures, batches, values: (n,) of fitted nets; means are taken over what else differs (seeds).
        batch, reference: B above and below the fraction bar.

    Returns:
        T -> ratio of the means, ascending; only temperatures at which both batch sizes have values.
    """
    temperatures, batches, values = _rounded(temperatures), np.asarray(batches), np.asarray(values, float)
    ratios = {}
    for temperature in np.unique(temperatures):
        above, below = (
            estimate(values[(temperatures == temperature) & (batches == size)]).mean for size in (batch, reference)
        )
        if not np.isnan(above / below):
            ratios[float(temperature)] = above / below
    return ratios


def stability_edge(lr: Column, diverged: Column) -> tuple[float, float]:
    """Largest stable and smallest diverged learning rate of one setting.

    Nets beyond the edge may die (all relus off) without blowing up, so stable means: below the first that diverged.

    Args:
        lr: (n,) dt, in any order.
        diverged: (n,) bool.

    Returns:
        The last stable dt (NaN when the smallest diverged) and the first diverged dt (NaN when none did).
    """
    lr, diverged = np.asarray(lr, float), np.asarray(diverged, bool)
    first = lr[diverged].min() if diverged.any() else np.inf
    stable = lr[lr < first]
    return float(stable.max()) if len(stable) else np.nan, float(first) if diverged.any() else np.nan


def phase_grid(members: Members, value: str = "test_error") -> PhaseGrid:
    """Means over the fitted nets of each cell (alpha, T), and how many nets of each status it has.

    Args:
        members: columns `alpha`, `temperature`, `status` and the value's.
        value: column to average.

    Returns:
        The grid over all alpha and T of the table. A combination without nets has counts 0 and mean NaN.

    Raises:
        ValueError: a status is not of STATUSES.
    """
    status = np.asarray(members["status"])
    if unknown := set(status.tolist()) - set(STATUSES):
        raise ValueError(f"status must be one of {', '.join(STATUSES)}, got {', '.join(map(str, sorted(unknown)))}")
    alphas, row = np.unique(_rounded(members["alpha"]), return_inverse=True)
    temperatures, column = np.unique(_rounded(members["temperature"]), return_inverse=True)
    shape = len(alphas), len(temperatures)
    cells, values = row * shape[1] + column, np.asarray(members[value], float)
    counts = {
        name: np.bincount(cells[status == name], minlength=shape[0] * shape[1]).reshape(shape) for name in STATUSES
    }
    known = (status == "fitted") & ~np.isnan(values)
    size = shape[0] * shape[1]
    sums = np.bincount(cells[known], weights=values[known], minlength=size)
    number = np.bincount(cells[known], minlength=size)
    mean = np.divide(sums, number, out=np.full(size, np.nan), where=number > 0).reshape(shape)
    return PhaseGrid(alphas, temperatures, mean, counts)


def _rounded(column: Column) -> Floats:
    """To six digits: equal settings computed in different ways (dt / B) fall together."""
    return np.array([float(f"{value:.6g}") for value in np.asarray(column, float)])
