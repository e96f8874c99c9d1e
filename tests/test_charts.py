"""Charts: what is drawn equals the numbers given; the SVG is text, safe, small and always the same."""

import dataclasses
import io
import math
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from scripts.charts import COLOURS, ForestRow, curves, forest, panels, to_png, to_svg

RUNS = {
    "method": [{"epoch": [0, 1, 2], "acc": [0.5, 0.6, 0.9]}, {"epoch": [0, 1, 2], "acc": [0.7, 0.8, 0.7]}],
    "control": [{"epoch": [0, 1, 2], "acc": [0.4, 0.3, 0.2]}, {"epoch": [0, 1, 2], "acc": [0.2, 0.3, 0.4]}],
}
ROWS = [
    ForestRow("toy/holds", 0.26, 0.25, 0.27, 0.18, "reproduced"),
    ForestRow("toy/fails", -0.05, -0.07, -0.03, 0.02, "not reproduced"),
    ForestRow("toy/open", 0.03, -0.02, 0.08, 0.05, "inconclusive"),
]
SVG = "{http://www.w3.org/2000/svg}"


def axes_of(figure: Figure) -> Axes:
    return figure.axes[0]


def lines(axes: Axes) -> list[tuple[list[float], list[float]]]:
    return [(list(map(float, line.get_xdata())), list(map(float, line.get_ydata()))) for line in axes.lines]


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def test_curves_draw_mean_of_seeds() -> None:
    means = [line for line in axes_of(curves(RUNS, "acc", "Accuracy")).lines if line.get_linewidth() > 1]
    assert [line.get_ydata() for line in means] == [pytest.approx([0.6, 0.7, 0.8]), pytest.approx([0.3, 0.3, 0.3])]
    assert [line.get_color() for line in means] == [COLOURS["arm1"], COLOURS["arm2"]]
    assert len({line.get_linestyle() for line in means}) == 2


def test_curves_draw_each_seed() -> None:
    """Seeds of an arm are one line with gaps."""
    drawn = [line for line in axes_of(curves(RUNS, "acc", "Accuracy")).lines if line.get_linewidth() == 0.5]
    for line, runs in zip(drawn, RUNS.values(), strict=True):
        x, y = [], []
        for run in runs:
            x += [*run["epoch"], math.nan]
            y += [*run["acc"], math.nan]
        assert list(map(float, line.get_xdata())) == pytest.approx(x, nan_ok=True)
        assert list(map(float, line.get_ydata())) == pytest.approx(y, nan_ok=True)


def test_legend_can_stand_in_another_chart() -> None:
    assert curves(RUNS, "acc", "Accuracy", legend=False).legends == []


def test_band_spans_lowest_to_highest_seed() -> None:
    figure = curves({"method": RUNS["method"]}, "acc", "Accuracy")
    corners = {tuple(map(float, corner)) for corner in axes_of(figure).collections[0].get_paths()[0].vertices}
    assert corners == {(0, 0.5), (0, 0.7), (1, 0.6), (1, 0.8), (2, 0.7), (2, 0.9)}
    assert legend(figure) == ["method: mean of 2 seeds", "band: lowest to highest seed; thin lines: each seed"]


def test_mean_ends_with_the_first_run_that_ends() -> None:
    diverged = {"epoch": [0, 1], "acc": [0.1, math.nan]}
    figure = curves({"method": [*RUNS["method"], diverged, {}]}, "acc", "Accuracy")
    (mean,) = [line for line in axes_of(figure).lines if line.get_linewidth() > 1]
    assert list(mean.get_xdata()) == [0]
    assert legend(figure)[0] == "method: mean of 3 seeds, 1 without values, 1 ended early"


def test_single_run_has_no_band() -> None:
    figure = curves({"method": RUNS["method"][:1]}, "acc", "Accuracy")
    assert legend(figure) == ["method: 1 seed"]
    assert not axes_of(figure).collections


def test_curves_name_axes() -> None:
    axes = axes_of(curves(RUNS, "acc", "Test accuracy (fraction of 1)"))
    assert (axes.get_xlabel(), axes.get_title(loc="left")) == ("epoch", "Test accuracy (fraction of 1)")


def test_panels_draw_one_metric_each() -> None:
    runs = [{"epoch": [0, 1], "acc": [0.1, 0.2], "loss": [3.0, 4.0]}]
    figure = panels({"method": runs}, {"acc": "Accuracy", "loss": "Loss (nats)"})
    assert [lines(axes) for axes in figure.axes] == [[([0, 1], [0.1, 0.2])], [([0, 1], [3, 4])]]


def test_forest_draws_effect_bounds_and_margin() -> None:
    drawn = lines(axes_of(forest(ROWS)))
    for place, row in enumerate(ROWS):
        assert ([row.effect], [place]) in drawn
        assert ([row.lower, row.upper], [place, place]) in drawn
        assert ([row.margin], [place]) in drawn


def test_forest_tells_verdicts_by_colour_and_marker() -> None:
    effects = {row.effect: row.verdict for row in ROWS}
    points = [line for line in axes_of(forest(ROWS)).lines if line.get_xdata()[0] in effects]
    looks = {effects[line.get_xdata()[0]]: (line.get_color(), line.get_marker()) for line in points}
    assert looks == {
        "reproduced": (COLOURS["good"], "o"),
        "not reproduced": (COLOURS["bad"], "X"),
        "inconclusive": (COLOURS["unsure"], "D"),
    }


def test_forest_writes_names_and_numbers() -> None:
    found = texts(to_svg(forest(ROWS), "Effects"))
    assert {"toy/holds", "toy/fails", "toy/open", "reproduced", "margin"} <= set(found)
    assert "−0.05 [−0.07, −0.03]" in found


def test_forest_grows_with_its_rows() -> None:
    heights = [forest(ROWS * times).get_figheight() for times in (1, 2, 30)]
    assert heights[1] - heights[0] == pytest.approx((heights[2] - heights[0]) / 29)
    assert heights[1] - heights[0] == pytest.approx(3 * 0.26)


def test_forest_marks_infinite_bounds_by_arrows() -> None:
    axes = axes_of(forest([ForestRow("toy/one", 0.1, -math.inf, math.inf, 0.05, "inconclusive")]))
    low, high = axes.get_xlim()
    assert {(line.get_xdata()[0], line.get_marker()) for line in axes.lines} >= {(low, "<"), (high, ">")}


def test_forest_names_claims_without_effect() -> None:
    figure = forest([ForestRow("toy/none", None, None, None, 0.05, "not run")])
    assert {"toy/none", "not run"} <= set(texts(to_svg(figure, "Effects")))


def test_forest_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        forest([])


def test_forest_shows_each_seed() -> None:
    row = ForestRow("toy/holds", 0.26, 0.25, 0.27, 0.18, "reproduced", seeds=(0.24, 0.26, 0.28, math.inf))
    dots = [line for line in axes_of(forest([row])).lines if line.get_marker() == "."]
    assert [list(map(float, line.get_xdata())) for line in dots] == [[0.24, 0.26, 0.28]]
    assert legend(forest([row])) == ["reproduced", "margin", "each seed"]


def test_svg_line_maps_to_the_numbers() -> None:
    """Up to the line's own scale and offset, which three points over-determine."""
    svg = ElementTree.fromstring(to_svg(curves({"method": RUNS["method"][:1]}, "acc", "Accuracy"), "Accuracy"))
    thick = [path for path in svg.iter(f"{SVG}path") if path.get("stroke-width") == "1.6"]
    words = (thick[0].get("d") or "").split()
    x, y = [float(word) for word in words[1::3]], [float(word) for word in words[2::3]]
    assert (x[1] - x[0]) / (x[2] - x[0]) == pytest.approx(1 / 2, abs=1e-3)
    assert (y[1] - y[0]) / (y[2] - y[0]) == pytest.approx((0.6 - 0.5) / (0.9 - 0.5), abs=1e-3)
    assert y[2] < y[0]


def test_svg_fits_any_width_and_names_itself() -> None:
    root = ElementTree.fromstring(to_svg(curves(RUNS, "acc", "Accuracy"), "Accuracy by epoch", "It falls"))
    assert "viewBox" in root.attrib
    assert not {"width", "height"} & root.attrib.keys()
    assert (root.get("role"), root.get("aria-label"), root[0].text) == ("img", "It falls", "Accuracy by epoch")


def test_svg_colours_follow_the_page() -> None:
    svg = to_svg(forest(ROWS), "Effects") + to_svg(curves(RUNS, "acc", "Accuracy"), "Curves")
    for name in ("ink", "grid", "arm1", "arm2", "good", "bad", "unsure"):
        assert f"var(--{name}, {COLOURS[name]})" in svg
        assert f'"{COLOURS[name]}"' not in svg


def test_svg_leaks_no_style_into_the_page() -> None:
    svg = to_svg(curves(RUNS, "acc", "Accuracy"), "Curves")
    assert not any(word in svg for word in ("<style", "style=", "<?xml", "<!DOCTYPE", "<metadata"))


def test_svg_ids_differ_between_charts_and_resolve() -> None:
    found: list[set[str]] = []
    for title in ("One", "Two"):
        svg = to_svg(curves(RUNS, "acc", "Accuracy"), title)
        ids = [element.attrib["id"] for element in ElementTree.fromstring(svg).iter() if "id" in element.attrib]
        assert all(svg.count(f"#{name}") for name in ids)
        assert svg.count("#c") == sum(svg.count(f"#{name}") for name in ids)
        found.append(set(ids))
    assert not found[0] & found[1]


def test_svg_shows_markup_as_text() -> None:
    bad = "<script>alert(1)</script>&\"'"
    svg = to_svg(curves({bad: RUNS["method"]}, "acc", bad), bad, bad)
    assert "<script" not in svg
    assert {bad, f"{bad}: mean of 2 seeds"} <= set(texts(svg))


@pytest.mark.parametrize("name", ["$a^{", "_hidden", "two\nlines", "\x00\x1b[1m", "\ud800", "字", "a%s{}\\alpha"])
def test_any_name_can_be_drawn(name: str) -> None:
    svg = to_svg(curves({name: RUNS["method"]}, "acc", name), name)
    shown = "".join(" " if c == "\n" else c if c >= " " and c != "\ud800" else "\ufffd" for c in name)
    assert f"{shown}: mean of 2 seeds" in texts(svg)


def test_long_names_keep_both_ends() -> None:
    name = "paper/" + "x" * 100 + "-sym40"
    (row,) = [text for text in texts(to_svg(forest([ForestRow(name, 1, 0, 2, 0, "reproduced")]), "E")) if "xx" in text]
    assert len(row) <= 56
    assert (row[:6], row[-6:]) == ("paper/", "-sym40")


@pytest.mark.parametrize("value", [1e308, -1e308, 5e-324, math.inf])
def test_extreme_values_do_not_break_a_chart(value: float) -> None:
    run = {"epoch": [0, 1], "acc": [0.5, value]}
    for figure in (curves({"m": [run, run]}, "acc", "A"), forest([dataclasses.replace(ROWS[0], seeds=(0.5, value))])):
        assert to_svg(figure, "A").startswith("<svg")
    assert to_svg(forest([ForestRow("m", value, -value, value, 0.1, "reproduced")]), "A").startswith("<svg")


def test_chart_of_thirty_epochs_is_small() -> None:
    runs = [{"epoch": list(range(30)), "acc": [math.sin(seed + 3 * e) for e in range(30)]} for seed in range(5)]
    assert len(to_svg(curves({"method": runs, "control": runs}, "acc", "Accuracy"), "Curves").encode()) < 40_000


def test_user_settings_change_nothing() -> None:
    before = to_svg(curves(RUNS, "acc", "Accuracy"), "Curves")
    with matplotlib.rc_context({"font.size": 30, "axes.grid": False, "svg.fonttype": "path"}):
        assert to_svg(curves(RUNS, "acc", "Accuracy"), "Curves") == before
        assert matplotlib.rcParams["font.size"] == 30


def test_same_data_give_same_bytes_in_any_process() -> None:
    code = (
        "from scripts.charts import *\nimport hashlib, test_charts as t\n"
        "figure = forest(t.ROWS)\n"
        "print(hashlib.sha256(to_svg(figure, 'E').encode() + to_png(figure)).hexdigest())"
    )
    made = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]), "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert made[0] == made[1] != ""


def test_png_has_the_figures_size_on_white() -> None:
    figure = forest(ROWS)
    with Image.open(io.BytesIO(to_png(figure, dpi=100))) as image:
        assert image.size == pytest.approx(100 * figure.get_size_inches(), abs=1)
        assert image.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
