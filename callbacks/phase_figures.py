"""Figures of a table of nets trained side by side: a phase diagram in (alpha, T), and power laws with their slopes."""

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from lightning_modules.stacks import analysis
from lightning_modules.stacks.analysis import Column, PhaseGrid

INK, EMPTY = "#1f2625", "#dfe3e1"
MARKERS = "osD^vP"


def read_members(path: Path) -> dict[str, Column]:
    """Columns of a parquet file, one row per net."""
    from pyarrow import parquet  # type: ignore[import-untyped]

    table = parquet.read_table(path)
    return {name: table[name].to_numpy() for name in table.column_names}


class MembersFigure(Callback):
    """Writes `figures/<name>.svg` into the run's folder from its `members.parquet`, when training has finished.

    The module must have written the file by the end of `on_train_end`: callbacks' `on_fit_end` comes before its own.
    A figure that cannot be drawn warns, for the run is not to fail.

    Args:
        name: of the file.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def draw(self, members: dict[str, Column]) -> Figure:
        """The figure of this table."""
        raise NotImplementedError

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draws."""
        if not trainer.is_global_zero:
            return
        folder = Path(trainer.default_root_dir)
        if not (folder / "members.parquet").exists():
            rank_zero_warn(f"figure {self.name}: not drawn, for {folder / 'members.parquet'} does not exist")
            return
        with rc_context({"svg.hashsalt": "noisebench", "font.size": 9}):
            try:
                figure = self.draw(read_members(folder / "members.parquet"))
            except ValueError as error:
                rank_zero_warn(f"figure {self.name}: not drawn, for {error}")
                return
            path = folder / "figures" / f"{self.name}.svg"
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, metadata={"Date": None}, facecolor="white")


class PhaseFigure(MembersFigure):
    """Heat map in (alpha, T): mean over the fitted nets of a cell, with marks where nets diverged or did not finish.

    Args:
        name: of the file.
        value: column to average.
        label: of the colour bar, with units.
    """

    def __init__(
        self, name: str = "phase_diagram", value: str = "test_error", label: str = "test error (share of points)"
    ) -> None:
        super().__init__(name)
        self.value, self.label = value, label

    def draw(self, members: dict[str, Column]) -> Figure:
        """The heat map."""
        return draw_phases(analysis.phase_grid(members, self.value), self.label)


class ScalingFigure(MembersFigure):
    """Log-log points of the fitted nets: mean and standard error over seeds, and the mean of the seeds' power laws.

    Args:
        name: of the file.
        x, y: columns.
        xlabel, ylabel: of the axes, with units.
        by: column that parts the lines.
        by_label: its name in the legend.
        fit_below: largest x that enters the power law; None takes all.
    """

    def __init__(
        self,
        name: str,
        x: str,
        y: str,
        xlabel: str,
        ylabel: str,
        by: str,
        by_label: str,
        fit_below: float | None = None,
    ) -> None:
        super().__init__(name)
        self.x, self.y, self.by, self.fit_below = x, y, by, fit_below
        self.xlabel, self.ylabel, self.by_label = xlabel, ylabel, by_label

    def draw(self, members: dict[str, Column]) -> Figure:
        """The points and lines."""
        fitted = analysis.fitted(members)
        groups = np.unique(fitted[self.by])
        figure = Figure(figsize=(4.8, 3.2 + 0.08 * len(groups)), layout="constrained")
        axes = figure.add_subplot()
        for number, group in enumerate(groups):
            rows = fitted[self.by] == group
            x, y, seeds = (fitted[name][rows] for name in (self.x, self.y, "seed"))
            # the yellow end is too pale for lines on white
            colour = colormaps["viridis"](0.85 * number / max(len(groups) - 1, 1))
            style = {"color": colour, "marker": MARKERS[number % len(MARKERS)]}
            _plot_scaling(axes, x, y, seeds, f"{self.by_label} = {_number(group)}", self.fit_below, style)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set(xlabel=self.xlabel, ylabel=self.ylabel)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#d9dddb", linewidth=0.5)
        figure.legend(loc="outside upper left", fontsize=7, frameon=False, ncols=2)
        return figure


def _plot_scaling(
    axes: Axes, x: Column, y: Column, seeds: Column, label: str, fit_below: float | None, style: dict[str, Any]
) -> None:
    """One line of a scaling figure."""
    settings = np.unique(x)
    points = [analysis.estimate(y[x == setting]) for setting in settings]
    use = x <= (np.inf if fit_below is None else fit_below)
    slope = analysis.slopes_over_seeds(x[use], y[use], seeds[use])
    if not np.isnan(slope.mean):
        error = "" if np.isnan(slope.error) else f" ± {slope.error:.2f}"
        label += f": slope {slope.mean:.2f}{error}"
        ends = np.array([x[use].min(), x[use].max()])
        centre_x, centre_y = (np.exp(np.log(column[use]).mean()) for column in (x, y))
        axes.plot(ends, centre_y * (ends / centre_x) ** slope.mean, "-", color=style["color"], linewidth=1)
    axes.errorbar(
        settings,
        [point.mean for point in points],
        [0 if np.isnan(point.error) else point.error for point in points],
        linestyle="none",
        markersize=3.5,
        elinewidth=0.8,
        label=label,
        **style,
    )


def draw_phases(grid: PhaseGrid, label: str) -> Figure:
    """Heat map of a phase grid.

    Args:
        grid: rows alpha, columns T.
        label: of the colour bar.

    Returns:
        The figure. Cells without fitted nets are grey; x marks those where most nets diverged, o those where most did
        not finish; n/m stands where only n of m nets were fitted.
    """
    rows, columns = grid.mean.shape
    figure = Figure(figsize=(max(4.4, 0.36 * columns + 1.4), max(2.6, 0.27 * rows + 1.1)), layout="constrained")
    axes = figure.add_subplot()
    colours = colormaps["viridis"].with_extremes(bad=EMPTY)
    known = grid.mean[~np.isnan(grid.mean)]
    low, high = (known.min(), known.max()) if len(known) else (0.0, 1.0)
    # a quantity that grows as a power of T would be all dark on a linear scale
    norm = LogNorm(low, high) if 0 < 30 * low < high else Normalize(low, high)
    image = axes.imshow(grid.mean, colours, norm, origin="lower", aspect="auto", interpolation="nearest")
    total = np.sum(list(grid.counts.values()), axis=0)
    for row, column in np.ndindex(rows, columns):
        fitted, diverged = (int(grid.counts[name][row, column]) for name in ("fitted", "diverged"))
        nets = int(total[row, column])
        if fitted == nets:
            continue
        if fitted:
            # white cannot be read on viridis' light end
            ink = INK if norm(grid.mean)[row, column] > 0.55 else "white"
            axes.text(column, row, f"{fitted}/{nets}", ha="center", va="center", fontsize=6, color=ink)
        else:
            axes.plot(column, row, "x" if 2 * diverged >= nets else "o", color=INK, markersize=4, fillstyle="none")
    for name, values in (("x", grid.temperatures), ("y", grid.alphas)):
        every = range(0, len(values), -(-len(values) // 12))
        getattr(axes, f"set_{name}ticks")(list(every), [_number(values[k]) for k in every])
        getattr(axes, f"{name}axis").set_minor_locator(NullLocator())
    axes.set_xlabel("temperature T = learning rate / batch size")
    axes.set_ylabel("output scale α")
    axes.plot([], [], "x", color=INK, markersize=4, label="diverged")
    axes.plot([], [], "o", color=INK, markersize=4, fillstyle="none", label="not finished")
    axes.plot([], [], " ", label="n/m: n of m nets fitted")
    figure.legend(loc="outside upper left", fontsize=7, frameon=False, ncols=3, handletextpad=0.2)
    figure.colorbar(image, ax=axes, label=label)
    return figure


def _number(value: float) -> str:
    """A power of two below 1 or beyond 4096 as such, other numbers as they are."""
    exponent = round(np.log2(value)) if value > 0 else 0
    if np.isclose(value, 2.0**exponent, rtol=1e-5) and not 0 <= exponent <= 12:
        return f"$2^{{{exponent}}}$"
    return f"{value:g}"
