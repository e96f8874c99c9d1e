"""A figure of a run's own metrics: a quantity against a setting, or against time."""

from pathlib import Path
from typing import Literal

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn

from callbacks.run_record import RunRecord

DASHES = ("-", "--", "-.", ":")


class MetricFigure(Callback):
    """Writes `figures/<name>.svg` into the run's folder when training has finished.

    Args:
        name: of the file.
        series: label of a line -> names of logged metrics. With `x` the k-th metric stands at x[k], with its last
            value; without, the line runs over the epochs and has one metric.
        xlabel, ylabel: of the axes, with units.
        x: settings at which the metrics were measured.
        x_scale: time of a step (or of an epoch) in the units of `xlabel`, for lines over time.
        x_from: whether time counts steps or epochs.
        log: axes with a logarithmic scale.
    """

    def __init__(
        self,
        name: str,
        series: dict[str, list[str]],
        xlabel: str,
        ylabel: str,
        x: list[float] | None = None,
        x_scale: float = 1.0,
        x_from: Literal["step", "epoch"] = "epoch",
        log: Literal["", "x", "y", "xy"] = "",
    ) -> None:
        wanted = 1 if x is None else len(x)
        for label, keys in series.items():
            if len(keys) != wanted:
                raise ValueError(f"series {label!r} must have {wanted} metrics, got {len(keys)}")
        self.name, self.series, self.x = name, series, x
        self.xlabel, self.ylabel, self.log_axes = xlabel, ylabel, log
        self.x_scale, self.x_from = x_scale, x_from

    def lines(self, history: list[dict[str, float]]) -> dict[str, tuple[list[float], list[float]]]:
        """Label -> x and y of each line that can be drawn; a warning names the others, for the run is not to fail.

        Args:
            history: one row per epoch, as `RunRecord.history`.
        """
        known = {key for row in history for key in row}
        found = {}
        for label, keys in self.series.items():
            if missing := [key for key in keys if key not in known]:
                rank_zero_warn(f"figure {self.name}: no line {label!r}, for {', '.join(missing)} was never logged")
                continue
            values = [[row[key] for row in history if key in row] for key in keys]
            if self.x is not None:
                found[label] = (list(self.x), [column[-1] for column in values])
            else:
                at = [row[self.x_from] * self.x_scale for row in history if keys[0] in row]
                found[label] = (at, values[0])
        return found

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draws."""
        records = [callback for callback in trainer.callbacks if isinstance(callback, RunRecord)]  # type: ignore[attr-defined]
        if not trainer.is_global_zero or not records:
            return
        lines = self.lines(records[0].history)
        if not lines:
            return
        import matplotlib
        from matplotlib.figure import Figure

        with matplotlib.rc_context({"svg.hashsalt": "noisebench", "font.size": 9}):
            figure = Figure(figsize=(4.4, 3.0), layout="constrained")
            axes = figure.add_subplot()
            for number, (label, (x, y)) in enumerate(lines.items()):
                marker = "o" if self.x is not None else ""
                axes.plot(x, y, DASHES[number % 4], marker=marker, markersize=3, linewidth=1.3, label=label)
            axes.spines[["top", "right"]].set_visible(False)
            axes.set_xlabel(self.xlabel)
            axes.set_ylabel(self.ylabel)
            if "x" in self.log_axes:
                axes.set_xscale("log")
            if self.x is not None:
                axes.set_xticks(self.x, [f"{value:g}" for value in self.x])
                axes.minorticks_off()
            if "y" in self.log_axes:
                axes.set_yscale("log")
            axes.grid(color="#d9dddb", linewidth=0.5)
            figure.legend(loc="outside upper left", fontsize=7, frameon=False, ncols=2)
            path = Path(trainer.default_root_dir) / "figures" / f"{self.name}.svg"
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, metadata={"Date": None}, facecolor="white")
