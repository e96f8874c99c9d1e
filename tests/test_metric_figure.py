"""Figures of a run's own metrics."""

import pytest

from callbacks.metric_figure import MetricFigure

HISTORY = [
    {"epoch": 0.0, "step": 10.0, "a": 4.0, "b": 1.0},
    {"epoch": 1.0, "step": 20.0, "a": 2.0, "c": 7.0},
]


def figure(**options) -> MetricFigure:
    return MetricFigure("shape", xlabel="x", ylabel="y", **options)


def test_last_values_stand_at_their_settings() -> None:
    assert figure(series={"line": ["a", "b", "c"]}, x=[1, 10, 100]).lines(HISTORY) == {
        "line": ([1, 10, 100], [2, 1, 7])
    }


def test_line_over_time_counts_steps_in_its_own_units() -> None:
    drawn = figure(series={"line": ["a"]}, x_from="step", x_scale=0.5).lines(HISTORY)
    assert drawn == {"line": ([5.0, 10.0], [4.0, 2.0])}


def test_line_skips_epochs_without_a_value() -> None:
    assert figure(series={"line": ["c"]}).lines(HISTORY) == {"line": ([1.0], [7.0])}


def test_line_of_an_unknown_metric_is_left_out_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="figure shape: no line 'other', for d was never logged"):
        assert list(figure(series={"other": ["d"], "line": ["a"]}).lines(HISTORY)) == ["line"]


def test_number_of_metrics_must_be_that_of_the_settings() -> None:
    with pytest.raises(ValueError, match="series 'line' must have 2 metrics, got 1"):
        figure(series={"line": ["a"]}, x=[1, 2])
