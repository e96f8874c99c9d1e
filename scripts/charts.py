"""Charts from plain data: forest of effects, learning curves with bands. Imports no torch.

Colours are Okabe and Ito's, told apart by colour-blind readers, and never the only sign: verdicts have their own
markers, arms their own dashes. Each colour stands for a CSS custom property, which `to_svg` puts in its place.
"""

import functools
import io
import itertools
import math
import statistics
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ParamSpec

from scripts import svg

if TYPE_CHECKING:  # half a second that the other verbs need not pay
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

P = ParamSpec("P")

COLOURS = {
    "ink": "#1c2126",
    "grid": "#d9dddb",
    "arm1": "#0072b2",
    "arm2": "#d55e00",
    "arm3": "#009e73",
    "arm4": "#cc79a7",
    "arm5": "#56b4e9",
    "arm6": "#a87400",
    "good": "#009e74",
    "bad": "#d55e01",
    "unsure": "#a87401",
}
"""By CSS custom property. All differ, so that each can be found again in an SVG; orange is darkened to be seen."""

DASHES: tuple[str, ...] = ("-", "--", "-.", ":")
MARKERS = {"reproduced": ("good", "o"), "not reproduced": ("bad", "X"), "inconclusive": ("unsure", "D")}
LARGEST = 1e100
"""From here on a value counts as infinite."""
SANS = "system-ui, -apple-system, Segoe UI, Roboto, Helvetica Neue, Arial, sans-serif"

STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "text.color": COLOURS["ink"],
    "axes.labelcolor": COLOURS["ink"],
    "axes.edgecolor": COLOURS["ink"],
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": COLOURS["grid"],
    "grid.linewidth": 0.6,
    "xtick.color": COLOURS["ink"],
    "ytick.color": COLOURS["ink"],
    "xtick.bottom": False,  # labels and grid lines suffice
    "ytick.left": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "svg.fonttype": "none",
    "svg.hashsalt": "noisebench",
}


@dataclass(frozen=True)
class ForestRow:
    """One line of a forest plot.

    Args:
        label: what stands at its left, e.g. the claim's id.
        effect: positive is what the claim says; None draws only the verdict's name.
        lower, upper: bounds of the effect; infinite ones end in an arrow.
        margin: least effect that the claim asserts, in the same units.
        verdict: reproduced, not reproduced, inconclusive or not run.
        seeds: effect of each seed, small dots.
    """

    label: str
    effect: float | None
    lower: float | None
    upper: float | None
    margin: float
    verdict: str
    seeds: tuple[float, ...] = ()


_styles: list[dict[Any, Any]] = []
"""Not empty while our settings hold."""
_forever = ExitStack()


@contextmanager
def _style() -> Iterator[None]:
    """Our settings on top of matplotlib's own: a user's matplotlibrc changes nothing."""
    import matplotlib

    if _styles:
        yield
        return
    with matplotlib.rc_context(), warnings.catch_warnings():
        # a browser has the glyphs that the layout's font lacks
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        warnings.simplefilter("ignore", matplotlib.MatplotlibDeprecationWarning)
        # rc_context does not bring the backend back
        settings: dict[Any, Any] = {k: v for k, v in matplotlib.rcParamsDefault.items() if "backend" not in k}
        matplotlib.rcParams.update(settings | STYLE)
        _styles.append(settings)
        try:
            yield
        finally:
            _styles.clear()


def stay_styled() -> None:
    """Our settings for the rest of this process, which draws many charts: setting them anew costs a tenth of each."""
    _forever.enter_context(_style())


def _styled(draw: "Callable[P, Figure]") -> "Callable[P, Figure]":
    @functools.wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> "Figure":
        with _style():
            return draw(*args, **kwargs)

    return styled


@_styled
def forest(rows: Sequence[ForestRow], label: str = "effect (units of the claim's metric)") -> "Figure":
    """Effects with their bounds, one line each, first row at the top; height grows with the rows.

    Args:
        rows: what to draw; one unit should fit all of them.
        label: of the horizontal axis.

    Raises:
        ValueError: no rows.
    """
    from matplotlib.figure import Figure

    if not rows:
        raise ValueError("a forest plot needs at least one row")
    names = [_shortened(row.label, 56) for row in rows]
    numbers = [_interval(row) for row in rows]
    left, right = 0.2 + 0.075 * max(map(len, names)), 0.2 + 0.075 * max(map(len, numbers))
    width, height, above, below = left + 3.6 + right, 0.26 * len(rows), 0.35, 0.42
    figure = Figure(figsize=(width, height + above + below))
    total = height + above + below
    axes = figure.add_axes((left / width, below / total, 3.6 / width, height / total))
    _limits(axes, rows)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.axvline(0, color=COLOURS["ink"], linewidth=0.6)
    for place, row in enumerate(rows):
        _forest_row(axes, place, row)
    axes.set_yticks(range(len(rows)), names)
    axes.tick_params(axis="y", pad=8)
    axes.locator_params(axis="x", nbins=8)
    axes.grid(False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(svg.plain(label))
    beside = axes.get_yaxis_transform()
    for place, number in enumerate(numbers):
        axes.text(1.04, place, number, transform=beside, va="center_baseline")
    handles = [_forest_handle(verdict) for verdict in MARKERS if any(row.verdict == verdict for row in rows)]
    margin = _line(marker="|", markersize=9, markeredgewidth=1.4, color=COLOURS["ink"], label="margin")
    handles.append(margin)
    if any(row.seeds for row in rows):
        handles.append(_line(marker=".", markersize=3, alpha=0.7, color=COLOURS["ink"], label="each seed"))
    figure.legend(handles=handles, loc="upper center", ncols=5, borderaxespad=0.3, columnspacing=1.2)
    return figure


def curves(
    arms: Mapping[str, Sequence[Mapping[str, Sequence[float]]]], metric: str, label: str, legend: bool = True
) -> "Figure":
    """Learning curves of one metric: see `panels`."""
    return panels(arms, {metric: label}, legend)


@_styled
def panels(
    arms: Mapping[str, Sequence[Mapping[str, Sequence[float]]]], metrics: Mapping[str, str], legend: bool = True
) -> "Figure":
    """Learning curves, one panel for each metric: the mean over seeds, a band from the lowest to the highest seed.

    Mean and band are drawn where every run has a finite value: they end where the first run does, and the legend says
    how many ended early and how many have no value at all.

    Args:
        arms: for each arm its runs; a run maps `epoch` and metrics to values of equal length.
        metrics: for each metric the heading of its panel, with the unit.
        legend: False beside a chart of the same arms that has it.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    columns = min(len(metrics), 3)
    lines = -(-len(metrics) // columns)
    above, below = 0.05 + 0.17 * (len(arms) + 1) * legend, 0.4
    width, height = 4.2 * columns, lines * 2.5 + above
    figure = Figure(figsize=(width, height))
    handles: list[Line2D | Patch] = []
    for index, (metric, label) in enumerate(metrics.items()):
        column, line = index % columns, index // columns
        place = (4.2 * column + 0.6, height - above - 2.5 * (line + 1) + below, 3.45, 2.5 - below - 0.35)
        axes = figure.add_axes((place[0] / width, place[1] / height, place[2] / width, place[3] / height))
        drawn = [_arm(axes, *arm, metric, number, room=34 * columns) for number, arm in enumerate(arms.items())]
        handles = handles or [*drawn]
        axes.set_title("\n".join(textwrap.wrap(svg.plain(label), 52)), loc="left", x=-0.15, y=1)
        axes.set_xlabel("epoch", labelpad=2)
        axes.locator_params(nbins=5)
        axes.locator_params(axis="x", integer=True)
        axes.margins(x=0.01)
    if not legend:
        return figure
    if any(len(runs) > 1 for runs in arms.values()):
        text = "band: lowest to highest seed; thin lines: each seed"
        handles.append(Patch(facecolor=COLOURS["ink"], alpha=0.2, linewidth=0, label=text))
    figure.legend(handles=handles, loc="upper left", borderaxespad=0.3, handlelength=2.6, labelspacing=0.25)
    return figure


def to_png(figure: "Figure", dpi: int = 200) -> bytes:
    """PNG on white; the same figure gives the same bytes."""
    with _style():
        data = io.BytesIO()
        figure.savefig(data, format="png", dpi=dpi, facecolor="white", metadata={"Software": None})
    return data.getvalue()


def to_svg(figure: "Figure", title: str, label: str | None = None, *, inline: bool = True) -> str:
    """SVG with text as text; the same figure and words give the same text.

    Args:
        figure: what to draw.
        title: for the tooltip and screen readers.
        label: what screen readers say instead, e.g. the numbers in words; the title by default.
        inline: for a page: no size, for the page sets it, and colours as `var(--arm1, #0072b2)`. Otherwise a file for
            other programs.
    """
    with _style():
        data = io.BytesIO()
        figure.savefig(data, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return svg.clean(data.getvalue(), title, label or title, SANS, COLOURS if inline else None)


def _shortened(text: str, most: int) -> str:
    """Both ends of a name that is longer: what tells two names apart often stands last."""
    text = svg.plain(text)
    return text if len(text) <= most else f"{text[: most // 2 - 1]}…{text[-(most // 2) :]}"


def _drawable(value: float | None) -> bool:
    """Whether there is a finite value, and none so large that the axis would overflow."""
    return value is not None and abs(value) < LARGEST


def _or_nan(value: float | None) -> float:
    return value if value is not None and _drawable(value) else math.nan


def _arm_colour(number: int) -> str:
    return COLOURS[f"arm{number % 6 + 1}"]


def _arm(
    axes: "Axes", name: str, runs: Sequence[Mapping[str, Sequence[float]]], metric: str, number: int, room: int
) -> "Line2D":
    """Draws one arm and returns its mean line, labelled; the name gets `room` characters."""
    points = [_points(run, metric) for run in runs]
    points = [run for run in points if run]
    colour, dash = _arm_colour(number), DASHES[number % len(DASHES)]
    epochs = sorted(set.intersection(*map(set, points))) if points else []
    columns = [[run[epoch] for run in points] for epoch in epochs]
    last = max((max(run) for run in points), default=0)
    early = sum(max(run) < last for run in points)
    if len(points) > 1:
        apart = [*itertools.chain.from_iterable([*run.items(), (math.nan, math.nan)] for run in points)]
        axes.plot(*zip(*apart, strict=True), color=colour, linewidth=0.5, alpha=0.55)
        axes.fill_between(
            epochs, list(map(min, columns)), list(map(max, columns)), color=colour, alpha=0.2, linewidth=0
        )
    count = f"{len(points)} seed{'' if len(points) == 1 else 's'}"
    text = f"{_shortened(name, room)}: {f'mean of {count}' if len(points) > 1 else count}"
    text += f", {len(runs) - len(points)} without values" if len(points) < len(runs) else ""
    text += f", {early} ended early" if early else ""
    means = list(map(statistics.fmean, columns))
    marker = "o" if len(epochs) == 1 else ""
    return axes.plot(epochs, means, dash, marker=marker, markersize=4, color=colour, linewidth=1.6, label=text)[0]


def _points(run: Mapping[str, Sequence[float]], metric: str) -> dict[float, float]:
    """Finite values by epoch."""
    pairs = zip(run.get("epoch", ()), run.get(metric, ()), strict=False)
    return {epoch: value for epoch, value in pairs if _drawable(value)}


def _line(**looks: object) -> "Line2D":
    from matplotlib.lines import Line2D

    return Line2D([], [], **{"linestyle": "none", **looks})  # type: ignore[arg-type]


def _forest_handle(verdict: str) -> "Line2D":
    colour, marker = MARKERS[verdict]
    return _line(marker=marker, markersize=6, color=COLOURS[colour], label=verdict)


def _limits(axes: "Axes", rows: Sequence[ForestRow]) -> None:
    """Room for every finite number and for zero."""
    given = [v for row in rows for v in (row.effect, row.lower, row.upper, row.margin, *row.seeds) if v is not None]
    numbers = [0.0, *filter(_drawable, given)]
    low, high = min(numbers), max(numbers)
    room = 0.06 * (high - low) or 1.0
    axes.set_xlim(low - room, high + room)


def _forest_row(axes: "Axes", place: int, row: ForestRow) -> None:
    axes.plot([row.margin], [place], "|", markersize=12, markeredgewidth=1.4, color=COLOURS["ink"])
    if row.effect is None or row.lower is None or row.upper is None or not _drawable(row.effect):
        return
    colour, marker = MARKERS.get(row.verdict, ("ink", "s"))
    low, high = axes.get_xlim()
    ends = [max(row.lower, low), min(row.upper, high)]
    axes.plot(ends, [place, place], color=COLOURS[colour], linewidth=1.8)
    for end, bound, arrow in zip(ends, (row.lower, row.upper), "<>", strict=True):
        if not _drawable(bound):
            axes.plot([end], [place], arrow, color=COLOURS[colour], markersize=5, clip_on=False)
    if found := list(filter(_drawable, row.seeds)):
        axes.plot(found, [place + 0.27] * len(found), ".", color=COLOURS["ink"], markersize=3, alpha=0.7)
    axes.plot([row.effect], [place], marker, color=COLOURS[colour], markersize=6)


def _interval(row: ForestRow) -> str:
    """`+0.26 [+0.25, +0.27]`, or the verdict's name where there is no effect."""
    if row.effect is None or row.lower is None or row.upper is None:
        return row.verdict
    text = f"{row.effect:+.3g} [{row.lower:+.3g}, {row.upper:+.3g}]"
    return text.replace("-", "−").replace("inf", "∞")
