"""Figures of a table of nets: what they show, and where they are written."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from callbacks.phase_figures import PhaseFigure, ScalingFigure, read_members

PHASES = {
    "alpha": [0.125, 0.125, 0.125, 8.0, 8.0, 8.0],
    "temperature": [0.5, 0.5, 1.0, 0.5, 0.5, 1.0],
    "status": ["fitted", "diverged", "diverged", "fitted", "fitted", "unfinished"],
    "test_error": [0.1, 1.0, 1.0, 0.2, 0.4, 0.6],
}


def columns(table: dict[str, list[Any]]) -> dict[str, np.ndarray]:
    return {name: np.array(column) for name, column in table.items()}


def scaling() -> tuple[ScalingFigure, dict[str, np.ndarray]]:
    """dw = T^0.8 and T^1.0 of two seeds up to T = 2, where it jumps; a net that diverged lies far off."""
    x = np.array([0.5, 1.0, 2.0, 8.0])
    dw = np.concatenate([x**0.8, x, [1e9]])
    dw[[3, 7]] = 1e3
    table = {"temperature": np.append(np.tile(x, 2), 1.0), "dw": dw, "seed": np.append(np.repeat([0, 1], 4), 1)}
    status = np.append(np.repeat("fitted", 8), "diverged")
    figure = ScalingFigure("dw", "temperature", "dw", "T", "dw", by="n_train", by_label="P", fit_below=2)
    return figure, table | {"status": status, "n_train": np.full(9, 64)}


def fake_run(folder: Path, members: dict[str, np.ndarray] | None) -> Any:
    if members is not None:
        parquet.write_table(pyarrow.table(members), folder / "members.parquet")
    return SimpleNamespace(is_global_zero=True, default_root_dir=str(folder))


def test_heat_map_shows_means_of_fitted_nets_over_alpha_and_temperature() -> None:
    axes = PhaseFigure().draw(columns(PHASES)).axes[0]
    shown = np.ma.filled(axes.images[0].get_array(), np.nan)
    np.testing.assert_allclose(shown, [[0.1, np.nan], [0.3, np.nan]])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["$2^{-3}$", "8"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["$2^{-1}$", "1"]


def test_cells_that_are_not_wholly_fitted_are_marked() -> None:
    axes = PhaseFigure().draw(columns(PHASES)).axes[0]
    assert [(*text.get_position(), text.get_text()) for text in axes.texts] == [(0, 0, "1/2")]
    marks = [(line.get_marker(), *map(int, line.get_xydata()[0])) for line in axes.lines if len(line.get_xydata())]
    assert marks == [("x", 1, 0), ("o", 1, 1)]


@pytest.mark.parametrize(("largest", "shade"), [(0.4, 1 / 3), (10.0, 0.5)], ids=["linear", "logarithmic"])
def test_colours_are_logarithmic_over_more_than_a_decade_and_a_half(largest: float, shade: float) -> None:
    """Of 0.1 to 0.4, 0.2 is at a third; of 0.1 to 10, 1 is in the middle of a logarithmic scale."""
    middle = 0.2 if largest < 1 else 1.0
    table = {"alpha": [1.0] * 3, "temperature": [1.0, 2.0, 4.0], "status": ["fitted"] * 3}
    axes = PhaseFigure(value="dw").draw(columns({**table, "dw": [0.1, middle, largest]})).axes[0]
    assert float(axes.images[0].norm(middle)) == pytest.approx(shade)


def test_diagram_without_a_fitted_net_is_drawn_all_grey() -> None:
    axes = PhaseFigure().draw({**columns(PHASES), "status": np.repeat("diverged", 6)}).axes[0]
    assert np.ma.getmaskarray(axes.images[0].get_array()).all()


def test_legend_has_the_slope_of_the_fitted_part_and_its_error_over_seeds() -> None:
    figure, members = scaling()
    texts = [text.get_text() for text in figure.draw(members).legends[0].get_texts()]
    assert texts == ["P = 64: slope 0.90 ± 0.10"]


def test_line_is_the_mean_power_law_over_the_fitted_part() -> None:
    """T^0.9 through the geometric mean of the points, from 0.5 to 2."""
    figure, members = scaling()
    line = figure.draw(members).axes[0].lines[0]
    np.testing.assert_allclose(line.get_xydata(), [[0.5, 0.5**0.9], [2, 2**0.9]])


def test_figure_is_written_into_the_runs_folder_and_repeats_byte_for_byte(tmp_path: Path) -> None:
    trainer = fake_run(tmp_path, columns(PHASES))
    PhaseFigure().on_fit_end(trainer, None)
    written = tmp_path / "figures" / "phase_diagram.svg"
    first = written.read_bytes()
    PhaseFigure().on_fit_end(trainer, None)
    assert first.startswith(b"<?xml")
    assert written.read_bytes() == first


def test_columns_come_back_from_the_file(tmp_path: Path) -> None:
    fake_run(tmp_path, columns(PHASES))
    assert {name: column.tolist() for name, column in read_members(tmp_path / "members.parquet").items()} == PHASES


def test_run_without_a_table_warns(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="figure phase_diagram: not drawn, for .*members.parquet does not exist"):
        PhaseFigure().on_fit_end(fake_run(tmp_path, None), None)


def test_run_whose_values_have_no_logarithm_warns(tmp_path: Path) -> None:
    figure, members = scaling()
    trainer = fake_run(tmp_path, members | {"dw": -members["dw"]})
    with pytest.warns(UserWarning, match="figure dw: not drawn, for a power law needs positive finite numbers"):
        figure.on_fit_end(trainer, None)
    assert not (tmp_path / "figures").exists()
