"""Effect map: table, colours and numbers from cells; a smoke run of the real command."""

import csv
import re
from pathlib import Path

import pytest

from scripts import effect_map
from scripts.__main__ import main
from scripts.effect_map import Cell

STUDY = {
    "title": "Title",
    "metric": "fd/nfe{nfe}",
    "rows": {"flow": {"treatment": "t", "control": "c"}, "eps": {"treatment": "u", "control": "d"}},
    "batches": [8, 16],
    "nfes": [2, 5],
    "overrides": {},
}


def fake(recipe: str, study: dict, batch: int, seed: int, runs: Path) -> dict[str, float]:
    base = {"t": 1.0, "c": 2.0, "u": 5.0, "d": 4.0}[recipe.split("/")[1]]
    return {f"fd/nfe{nfe}_last": base + batch + 100 * seed + nfe / 10 for nfe in study["nfes"]}


def test_cells_are_means_over_seeds_in_the_order_of_the_grid(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(effect_map, "_metrics", fake)
    cells = effect_map.measure("paper", STUDY, [0, 1], tmp_path)
    assert [(cell.row, cell.batch, cell.nfe) for cell in cells] == [
        (row, batch, nfe) for row in ("flow", "eps") for batch in (8, 16) for nfe in (2, 5)
    ]
    assert cells[0] == Cell("flow", 8, 2, treatment=pytest.approx(59.2), control=pytest.approx(60.2))
    assert [round(cell.difference, 6) for cell in cells] == [-1.0] * 4 + [1.0] * 4


def test_table_and_page_show_every_difference() -> None:
    cells = [Cell(row, b, n, 3.0 + b / 10, 3.0 + n / 100) for row in ("flow", "eps") for b in (8, 16) for n in (2, 5)]
    rows = list(csv.DictReader(effect_map.table(cells).splitlines()))
    assert [float(row["difference"]) for row in rows] == pytest.approx([cell.difference for cell in cells])
    page = effect_map.draw(cells, STUDY, "svg").decode()
    # one panel for each process, a comment for each text that is drawn as paths
    texts = re.findall(r"<!-- (.*?) -->", page)
    assert {"flow", "eps", "Title", "8", "16"} <= set(texts)
    assert sum(text.startswith(("+", "\N{MINUS SIGN}", "-")) for text in texts) >= len(cells)


def test_grids_name_recipes_that_exist() -> None:
    for paper in ("immiscible", "curriculum_diffusion"):
        study = effect_map.load_study(paper)
        for arms in study["rows"].values():
            for recipe in arms.values():
                assert (effect_map.recipes.ROOT / paper / f"{recipe}.yaml").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["elr"], "no effect map of 'elr'; there are curriculum_diffusion, immiscible"),
        (["immiscible", "--out", "map.pdf"], "--out must end in .svg or .png, got 'map.pdf'"),
    ],
)
def test_bad_options_are_named(words: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["effect-map", *words]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_command_trains_and_draws(tmp_path: Path) -> None:
    out = tmp_path / "map.png"
    assert main(["effect-map", "immiscible", "--steps", "3", "--runs", str(tmp_path / "runs"), "--out", str(out)]) == 0
    assert len(out.with_suffix(".csv").read_text().splitlines()) == 1 + 2 * 3 * 3
    assert out.read_bytes().startswith(b"\x89PNG")
