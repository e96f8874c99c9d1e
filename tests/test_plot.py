"""`noisebench plot`: which runs become which arm, what is written, what is refused."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
from paper_room import CLEAN, add_curves, add_record, write_paper
from PIL import Image

from scripts import recipes
from scripts.__main__ import main
from scripts.plot import find_runs, group, read_run
from scripts.published import publish
from scripts.records import read_records

Plot = Callable[..., tuple[int, str]]


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two finished seeds of `mini` and of `mini-ce`, below the working directory."""
    monkeypatch.setattr(recipes, "ROOT", tmp_path / "recipes")
    monkeypatch.chdir(tmp_path)
    write_paper(tmp_path / "recipes")
    for recipe, value in (("mini", 0.8), ("mini-ce", 0.5)):
        for seed in (0, 1):
            record = add_record(Path("runs"), recipe, seed, value, git=CLEAN)
            add_curves(record, **{"test/acc": [0.3, 0.4, value], "train/loss": [2.0, 1.0, 0.5 + seed]})
    return Path("runs/toy")


@pytest.fixture
def plot(runs: Path, capsys: pytest.CaptureFixture[str]) -> Plot:
    """Runs the command; exit code and everything that it printed."""

    def call(*argv: str) -> tuple[int, str]:
        code = main(["plot", *argv])
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return call


def texts(file: str) -> list[str]:
    return [element.text or "" for element in ElementTree.parse(file).iter("{http://www.w3.org/2000/svg}text")]


def arms(*names: str) -> dict[str, list[str]]:
    """Arms of these arguments, with the folders of their runs."""
    found = group([read_run(path) for path in find_runs(names)])
    return {name: [run.folder.name for run in members] for name, members in found.items()}


def test_png_holds_both_arms(plot: Plot) -> None:
    code, said = plot("runs/toy/*/*/seed*")
    assert (code, said) == (0, "curves.png: test/acc of 4 runs of 2 recipes\n")
    with Image.open("curves.png") as image:
        assert (image.format, image.width) == ("PNG", 840)


def test_several_metrics_stand_side_by_side(plot: Plot) -> None:
    assert plot("runs/toy/*/*/seed*", "--metric", "test/acc", "train/loss", "--out", "two.png")[0] == 0
    with Image.open("two.png") as image:
        assert image.width == 2 * 840


def test_svg_is_a_file_of_its_own(plot: Plot) -> None:
    assert plot("runs/toy/*/*/seed*", "--out", "new/folder/curves.SVG")[0] == 0
    text = Path("new/folder/curves.SVG").read_text()
    assert "var(" not in text
    assert 'width="302.4pt"' in text
    assert {"toy/mini: mean of 2 seeds", "toy/mini-ce: mean of 2 seeds"} <= set(texts("new/folder/curves.SVG"))


def test_runs_are_grouped_by_recipe(runs: Path) -> None:
    assert arms("runs/toy/mini/*/seed*", "runs/toy/mini-ce/c0ffee/seed1") == {
        "toy/mini": ["seed0", "seed1"],
        "toy/mini-ce": ["seed1"],
    }


def test_run_named_twice_counts_once(runs: Path) -> None:
    names = ("runs/toy/mini/c0ffee/seed0", "runs/toy/mini/c0ffee/seed0/record.json", "runs/toy/mini/*/seed0/")
    assert arms(*names) == {"toy/mini": ["seed0"]}


def test_other_settings_are_another_arm(runs: Path) -> None:
    record = add_record(Path("runs"), "mini", 0, 0.9, config_hash="beef", overrides=["--model.lam", "5"])
    add_curves(record, **{"test/acc": [0.9]})
    assert list(arms("runs/toy/mini/*/seed0")) == ["toy/mini --model.lam 5", "toy/mini"]


def test_other_hash_is_another_arm(runs: Path) -> None:
    add_curves(add_record(Path("runs"), "mini", 0, 0.9, config_hash="beef"), **{"test/acc": [0.9]})
    assert list(arms("runs/toy/mini/*/seed0")) == ["toy/mini (beef)", "toy/mini (c0ffee)"]


def test_unfinished_run_takes_its_recipe_from_its_folder(runs: Path) -> None:
    (runs / "mini/c0ffee/seed1/record.json").unlink()
    assert arms("runs/toy/mini/*/seed*") == {"toy/mini": ["seed0", "seed1"]}


def test_published_records_draw_the_same_values(plot: Plot, runs: Path) -> None:
    publish(read_records(Path("runs"))[0], Path("records"))
    published = [read_run(path).curves["test/acc"] for path in find_runs(["records/toy/mini/*/*.json"])]
    assert published == [[0.3, 0.4, 0.8]] * 2
    assert plot("records/toy/*/*/*.json")[1] == "curves.png: test/acc of 4 runs of 2 recipes\n"


def test_run_that_failed_at_once_is_counted(plot: Plot, runs: Path) -> None:
    add_record(Path("runs"), "mini", 2, None)
    code, said = plot("runs/toy/mini/*/seed*", "--out", "a.svg")
    assert code == 0
    assert "note: 1 of 3 runs of toy/mini without test/acc" in said
    assert "toy/mini: mean of 2 seeds, 1 without values" in texts("a.svg")


def test_unknown_metric_lists_close_ones_first(plot: Plot) -> None:
    code, said = plot("runs/toy/*/*/seed*", "--metric", "train/los")
    assert code == 1
    assert said.endswith("--metric: no 'train/los' in these runs; there are train/loss, test/acc\n")


def test_metric_without_finite_values_is_refused(plot: Plot, runs: Path) -> None:
    add_curves(runs / "mini/c0ffee/seed0/record.json", **{"test/acc": [float("nan")]})
    assert plot("runs/toy/mini/*/seed0")[1].endswith("--metric: 'test/acc' has no finite value in these runs\n")


def test_missing_run_is_named(plot: Plot, tmp_path: Path) -> None:
    assert plot("runs/toy/mini/c0ffee/seed9")[1].endswith(
        f"no such run: nothing at 'runs/toy/mini/c0ffee/seed9' in {tmp_path}\n"
    )
    assert "nothing matches 'runs/nope/*'" in plot("runs/nope/*")[1]


def test_folder_above_runs_points_to_them(plot: Plot) -> None:
    code, said = plot("runs/toy/mini")
    assert code == 1
    assert "runs/toy/mini: no metrics.csv" in said
    assert "runs lie below it, e.g. runs/toy/mini/c0ffee/seed" in said


def test_folder_without_run_is_refused(plot: Plot) -> None:
    Path("empty").mkdir()
    assert plot("empty")[1].endswith("empty: no metrics.csv, which a run writes after its first epoch\n")


@pytest.mark.parametrize("name", ["curves.pdf", "curves", ".png"])
def test_unsupported_suffix_is_refused(plot: Plot, name: str) -> None:
    code, said = plot("runs/toy/*/*/seed*", "--out", name)
    assert code == 1
    assert said.endswith(f"--out must end in .png or .svg, got {name!r}\n")


def test_broken_files_are_named(plot: Plot, runs: Path) -> None:
    folder = runs / "mini/c0ffee/seed0"
    (folder / "metrics.csv").write_text("epoch,step,test/acc\n0,80,0.3\n1,160,high\n")
    assert "seed0/metrics.csv, line 3: test/acc must be a number, got 'high'" in plot(str(folder))[1]
    (folder / "record.json").write_text("{")
    assert "seed0/record.json: not readable as JSON" in plot(str(folder))[1]
    (folder / "record.json").write_text(json.dumps([1]))
    assert "seed0/record.json: must hold a record, got list" in plot(str(folder))[1]


def test_failing_run_leaves_the_old_picture(
    plot: Plot, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("curves.png").write_bytes(b"old")

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert plot("runs/toy/*/*/seed*") == (
        1,
        "noisebench plot: error: --out: cannot write curves.png: No space left on device\n",
    )
    assert Path("curves.png").read_bytes() == b"old"
    assert not list(Path().glob(".curves*"))


def test_help_has_an_example(plot: Plot, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        plot("--help")
    assert stop.value.code == 0
    assert "example: noisebench plot" in capsys.readouterr().out
