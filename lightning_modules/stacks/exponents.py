"""Exponents and means of a grid of finished nets: lazy regime, edge of stability, regions of the phase diagram.

Legend: alpha output scale, dt learning rate, B batch, T = dt / B temperature, P training points, D hidden layers,
t* = dt * (last step with a gradient), dw = ||w - w_0|| / ||w_0||.
"""

import itertools
import math

import numpy as np

from lightning_modules.stacks import analysis


def lazy_exponents(members: analysis.Members, max_lr: float, thresholds: list[float]) -> dict[str, analysis.Estimate]:
    """Exponents of the lazy regime: dw ~ T^delta P^gamma, t* ~ T P^b, T_c ~ P^-a, lambda ~ P^(1 / (1 + chi)).

    Args:
        members: columns of nets of one alpha and one B; only the fitted ones count.
        max_lr: delta, gamma and b are fitted over dt up to here; beyond, dw saturates.
        thresholds: values of dw that define T_c.

    Returns:
        What the grid allows: `delta`, `gamma`, `b`, `lambda` (perceptron), `a<threshold>`; fitted for each replica on
        its own, then over replicas.

    Source: arXiv 2301.13703, scaling of the relative weight change, of t* and of the cross-over temperature.
    """
    low = {name: column[members["dt"] <= max_lr] for name, column in members.items()}
    several_lrs, several_sizes = (len(np.unique(low[name])) > 1 for name in ("dt", "n_train"))
    perceptrons = bool((members["depth"] == 0).all())
    low, known = analysis.fitted(low), analysis.fitted(members)
    lrs, sizes, seeds = low["dt"], low["n_train"], low["seed"]
    found = {}
    if several_lrs:
        found["delta"] = analysis.slopes_over_seeds(lrs, low["dw"], seeds, within=sizes)
    if several_sizes:
        names = {"gamma": "dw", "b": "t_star", **({"lambda": "lambda"} if perceptrons else {})}
        for exponent, name in names.items():
            found[exponent] = analysis.slopes_over_seeds(sizes, low[name], seeds, within=lrs)
    if several_lrs and several_sizes:
        size, temperature, dw, seed = (known[name] for name in ("n_train", "temperature", "dw", "seed"))
        for value in thresholds:
            found[f"a{value:g}"] = (
                analysis.crossings_over_seeds(size, temperature, dw, seed, value) if len(dw) else analysis.estimate([])
            )
    return found


def edge_exponent(members: analysis.Members) -> analysis.Estimate:
    """k of dt_max ~ alpha^k, dt_max the last dt below the first one that diverged.

    Args:
        members: columns of all nets, whatever their status.

    Returns:
        k over replicas; NaN where no net diverged.

    Source: arXiv 2301.13703, T_opt ~ alpha^k with k = (D - 1) / (D + 1). That the largest stable dt obeys the same
        exponent is derived from f ~ w^(D + 1).
    """
    cells = []
    for replica, alpha in itertools.product(np.unique(members["seed"]), np.unique(members["alpha"])):
        rows = (members["seed"] == replica) & (members["alpha"] == alpha)
        stable, first = analysis.stability_edge(members["dt"][rows], members["status"][rows] == "diverged")
        cells.append((alpha, math.nan if math.isnan(first) else stable, replica))
    alphas, edges, replicas = (np.array(column) for column in zip(*cells, strict=True))
    return analysis.slopes_over_seeds(alphas, edges, replicas)


def region_means(members: analysis.Members, box: list[float]) -> tuple[float, float]:
    """Mean test error and geometric mean of dw over the fitted nets of a box; NaN for an empty one.

    Args:
        members: columns of all nets.
        box: [least alpha, largest alpha, least dt, largest dt], borders included.
    """
    rows = members["status"] == "fitted"
    rows = rows & (members["alpha"] >= box[0]) & (members["alpha"] <= box[1])
    rows = rows & (members["dt"] >= box[2]) & (members["dt"] <= box[3])
    if not rows.any():
        return math.nan, math.nan
    return float(members["test_error"][rows].mean()), float(np.exp(np.log(members["dw"][rows]).mean()))
