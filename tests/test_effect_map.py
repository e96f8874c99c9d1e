"""Effect map: cells from records, its file, the page, what is not published; a smoke run of the real command."""

import csv
import dataclasses
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from page_reader import Reader
from paper_room import CLEAN, CONFIG, add_record, write_paper

from scripts import effect_map, leaderboard, maps, provenance, recipes
from scripts.__main__ import main
from scripts.effect_map import Run
from scripts.errors import UserError
from scripts.maps import Cell

STUDY: dict[str, Any] = {
    "title": "FD of the method minus FD of the control",
    "metric": "fd/nfe{nfe}",
    "rows": {
        "flow": {"treatment": "mini", "control": "mini-ce"},
        "eps": {"treatment": "full", "control": "mini-ce"},
    },
    "batches": [8, 16],
    "nfes": [2, 5],
    "overrides": {"trainer.max_steps": 7},
}
SEEDS = [0, 1]
BASE = {"mini": 1.0, "mini-ce": 2.0, "full": 5.0}
MINUS = "\N{MINUS SIGN}"


def value(recipe: str, batch: int, seed: int, nfe: int) -> float:
    """The method is better by 1 (0.5 with seed 1), `full` worse by 3; at 16, 5 its seeds disagree with `mini-ce`."""
    if (recipe, batch, nfe) == ("full", 16, 5):
        return value("mini-ce", batch, seed, nfe) + (0.25 if seed else -0.125)
    return BASE[recipe] + (0.5 * seed if recipe == "mini" else 0) + batch / 8 + nfe / 16


def add_run(runs: Path, recipe: str, batch: int, seed: int, **changes: Any) -> Path:
    """The record of one run of the grid."""
    words = ["--trainer.max_steps", "7", "--model.evaluation.nfes", "[2, 5]", "--data.batch_size", str(batch)]
    facts = {
        "overrides": words,
        "metrics": {f"fd/nfe{nfe}_last": value(recipe, batch, seed, nfe) for nfe in (2, 5)},
        "config_hash": f"c{batch}",
        "config": CONFIG,
        "git": CLEAN,
    }
    return add_record(runs, recipe, seed, 0.0, **{**facts, **changes})


def add_grid(runs: Path) -> None:
    """Records of all runs of the grid."""
    for recipe in BASE:
        for batch in (8, 16):
            for seed in SEEDS:
                add_run(runs, recipe, batch, seed)


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with a paper that has a grid, and the finished runs of the grid."""
    monkeypatch.setattr(recipes, "ROOT", tmp_path / "recipes")
    monkeypatch.chdir(tmp_path)
    write_paper(recipes.ROOT)
    write_paper(recipes.ROOT, slug="other")
    write_grid(STUDY)
    markers = [f"<!-- noisebench:{name} -->\n<!-- /noisebench:{name} -->\n" for name in ("verdicts", "picture")]
    (tmp_path / "README.md").write_text("".join(markers))
    add_grid(tmp_path / "runs")
    return tmp_path / "runs"


def write_grid(study: dict[str, Any]) -> None:
    (recipes.ROOT / "toy" / "_effect_map.yaml").write_text(yaml.safe_dump(study, sort_keys=False))


def built(runs: Path) -> maps.EffectMap:
    """The map of the records in `runs`."""
    records = effect_map.measure("toy", STUDY, SEEDS, runs, lambda: pytest.fail("nothing is to be trained"))
    return effect_map.build("toy", STUDY, SEEDS, records, "noisebench effect-map toy --seeds 0..1", None)


def site(runs: Path, *found: maps.EffectMap) -> dict[str, str]:
    """The pages with these maps, by name."""
    board = dataclasses.replace(leaderboard.board_of_runs(runs), maps=list(found))
    leaderboard.write_pages(board, runs.parent / "site", "--runs")
    return {file.name: file.read_text() for file in (runs.parent / "site").iterdir()}


# from records to cells


def test_cells_hold_every_seed_in_the_order_of_the_grid(runs: Path) -> None:
    cells = built(runs).cells
    assert [(cell.row, cell.batch, cell.nfe) for cell in cells] == [
        (row, batch, nfe) for row in ("flow", "eps") for batch in (8, 16) for nfe in (2, 5)
    ]
    assert cells[0] == Cell("flow", 8, 2, treatment=(2.125, 2.625), control=(3.125, 3.125))
    assert [cell.difference for cell in cells] == [-0.75] * 4 + [3.0, 3.0, 3.0, 0.0625]


def test_map_knows_where_it_comes_from(runs: Path) -> None:
    add_run(runs, "full", 16, 1, cpu_seconds=20.5, finished_at="2026-02-02T00:00:00+00:00")
    found = built(runs)
    # 12 runs, as both rows share a control: 11 of 10 s and this one
    assert (found.cpu_seconds, found.finished_at, found.git) == (130.5, "2026-02-02T00:00:00+00:00", [CLEAN])
    assert sorted(found.recipes) == ["full", "mini", "mini-ce"]
    assert found.recipes["mini"]["classes"] == [CONFIG["model"]["class_path"]]


def test_only_what_is_missing_is_trained_and_a_shared_run_once(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[tuple[str, int]] = []

    def train(recipe: str, words: list[str], seed: int, folder: Path) -> None:
        trained.append((recipe, int(words[-1])))
        add_run(folder, recipe.partition("/")[2], int(words[-1]), seed)

    monkeypatch.setattr(effect_map, "_train", train)
    add_run(runs, "mini-ce", 8, 1, code_hash="0123456789ab")
    add_run(runs, "mini", 16, 1, overrides=["--trainer.max_steps", "8"])
    before = (runs / "toy/full/c8/seed0/record.json").read_bytes()
    effect_map.measure("toy", STUDY, SEEDS, runs, lambda: None)
    assert sorted(trained) == [("toy/mini", 16), ("toy/mini-ce", 8)]
    assert (runs / "toy/full/c8/seed0/record.json").read_bytes() == before


def test_code_that_changes_while_runs_are_trained_is_an_error(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(effect_map, "_train", lambda *_: None)
    add_run(runs, "mini", 16, 1, code_hash="0123456789ab")
    with pytest.raises(UserError, match=r"1 runs, e\.g\. mini with batch 16 and seed 1, are stale"):
        effect_map.measure("toy", STUDY, SEEDS, runs, lambda: None)


def test_run_that_diverged_stays_in(runs: Path) -> None:
    add_run(runs, "mini", 8, 1, status="failed", reason="NonFiniteLossError: diverged", metrics={})
    cell = built(runs).cells[0]
    assert cell.treatment[0] == 2.125
    assert math.isnan(cell.treatment[1])
    assert (cell.complete, cell.colour) == (False, "")


def test_missing_metric_is_named(runs: Path) -> None:
    path = add_run(runs, "mini", 8, 1, metrics={"fd/nfe2_last": 1.0})
    with pytest.raises(UserError, match=rf"no metric 'fd/nfe5_last' in {path}; it has fd/nfe2_last"):
        built(runs)


@pytest.mark.parametrize(
    ("treatment", "control", "colour"),
    [
        ((0.4, 0.4), (1.0, 1.0), "most-lower"),
        ((0.6, 0.6), (1.0, 1.0), "much-lower"),
        ((0.8, 0.8), (1.0, 1.0), "some-lower"),
        ((1.1, 1.1), (1.0, 1.0), "within"),
        ((1.2, 1.4), (1.0, 1.0), "some-higher"),
        ((2.0, 2.0), (1.0, 1.0), "much-higher"),
        ((2.0, 9.0), (1.0, 1.0), "most-higher"),
        ((1.0, 1.0), (0.0, 0.0), ""),
    ],
)
def test_colour_follows_the_ratio_of_the_means(treatment: tuple, control: tuple, colour: str) -> None:
    assert Cell("flow", 8, 2, treatment, control).colour == colour


@pytest.mark.parametrize(
    ("treatment", "mixed"), [((0.5, 0.9), False), ((1.1, 1.2), False), ((0.5, 1.5), True), ((0.5, 1.0), True)]
)
def test_seeds_disagree_unless_all_have_one_sign(treatment: tuple, mixed: bool) -> None:
    assert Cell("flow", 8, 2, treatment, (1.0, 1.0)).mixed == mixed


# files


def test_map_comes_back_from_its_file(runs: Path) -> None:
    found = built(runs)
    assert maps.from_json(maps.as_json(found)) == found


def test_diverged_run_comes_back_and_the_file_is_strict_json(runs: Path) -> None:
    add_run(runs, "mini", 8, 1, status="failed", reason="NonFiniteLossError: diverged", metrics={})
    text = maps.as_json(built(runs))
    assert json.loads(text, parse_constant=pytest.fail)["cells"][0]["treatment"] == [2.125, None]
    assert math.isnan(maps.from_json(text).cells[0].treatment[1])


def test_every_cell_has_a_line(runs: Path) -> None:
    lines = maps.as_json(built(runs)).splitlines()
    assert sum(line.startswith('  {"process": ') for line in lines) == 8
    assert max(map(len, lines)) < 150


def test_table_holds_means_and_every_seed(runs: Path) -> None:
    rows = list(csv.DictReader(maps.as_csv(built(runs)).splitlines()))
    first = {"process": "flow", "batch": "8", "evaluations": "2", "treatment": "2.375", "control": "3.125"}
    seeds = {"treatment_seed0": "2.125", "control_seed0": "3.125", "treatment_seed1": "2.625", "control_seed1": "3.125"}
    assert rows[0] == first | {"difference": "-0.75"} | seeds
    assert len(rows) == 8


def test_picture_shows_every_difference_and_marks_disagreement(runs: Path) -> None:
    page = effect_map.draw(built(runs), "svg").decode()
    # one panel for each process, a comment for each text that is drawn as paths
    texts = re.findall(r"<!-- (.*?) -->", page)
    assert {"flow", "eps", "8", "16"} <= set(texts)
    assert [text for text in texts if text.startswith(("+", MINUS, "-")) and "." in text][:8] == (
        ["-0.75"] * 4 + ["+3.00"] * 3 + ["+0.06*"]
    )


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (lambda data: data | {"schema": 9}, "not of schema 1"),
        (lambda data: data | {"paper": "other"}, "effect map of 'other', which is not its name or not a paper"),
        (lambda data: data | {"cells": data["cells"][1:]}, "its cells are not those of its grid"),
        (lambda data: data | {"seeds": [0]}, "2 values for 1 seeds"),
        (lambda data: data | {"recipes": {}}, "recipes those of its rows"),
        (lambda data: {key: data[key] for key in data if key != "git"}, "missing 1 required positional argument"),
        (lambda data: [], "no effect map"),
    ],
)
def test_broken_map_is_named_and_the_pages_are_still_built(
    runs: Path, edit: Callable[[dict], Any], problem: str
) -> None:
    file = runs / "toy" / "effect_map.json"
    file.write_text(json.dumps(edit(json.loads(maps.as_json(built(runs))))))
    board = leaderboard.board_of_runs(runs)
    assert board.maps == []
    assert [line for line in board.problems if problem in line and str(file) in line] == board.problems != []


# stale


def test_map_of_today_is_not_stale(runs: Path) -> None:
    assert built(runs).changes() == []


def test_what_has_changed_is_named(runs: Path) -> None:
    found = built(runs)
    (recipes.ROOT / "toy" / "mini.yaml").write_text("name: other\n")
    found.recipes["full"]["code_hash"] = "0123456789ab"
    write_grid(STUDY | {"batches": [8, 32]})
    assert found.changes() == ["the grid", "code of full", "recipe mini"]


def test_other_title_or_comment_makes_nothing_stale(runs: Path) -> None:
    found = built(runs)
    write_grid(STUDY | {"title": "Other words"})
    assert found.changes() == []


# the page


def test_page_shows_each_difference_with_its_range_and_ratio(runs: Path) -> None:
    rows = [row for row in Reader(site(runs, built(runs))["effect_map.html"]).rows if row[0] in ("8", "16")]
    # -1 and -0.5 of 3.125, 3.3125, 4.125, 4.3125; +3 of the same; 4.375 against 4.3125
    assert rows == [
        ["8", f"{MINUS}0.75 [ {MINUS}1.00 , {MINUS}0.50 ] × 0.76", f"{MINUS}0.75 [ {MINUS}1.00 , {MINUS}0.50 ] × 0.77"],
        [
            "16",
            f"{MINUS}0.75 [ {MINUS}1.00 , {MINUS}0.50 ] × 0.82",
            f"{MINUS}0.75 [ {MINUS}1.00 , {MINUS}0.50 ] × 0.83",
        ],
        ["8", "+3.00 [ +3.00 , +3.00 ] × 1.96", "+3.00 [ +3.00 , +3.00 ] × 1.91"],
        ["16", "+3.00 [ +3.00 , +3.00 ] × 1.73", f"+0.06 [ {MINUS}0.12 , +0.25 ] × 1.01 ± signs differ"],
    ]


def test_page_colours_by_class_and_frames_disagreement(runs: Path) -> None:
    text = site(runs, built(runs))["effect_map.html"]
    cells = re.findall(r'<td class="num ((?:some|much|most|within)[^"]*)">', text)
    assert cells == ["some-lower"] * 4 + ["much-higher"] * 3 + ["within mixed"]
    assert "style=" not in text


def test_page_holds_the_exact_values_of_every_seed(runs: Path) -> None:
    values = Reader(site(runs, built(runs))["effect_map.html"]).values
    assert {value(r, b, s, n) for r in BASE for b in (8, 16) for s in SEEDS for n in (2, 5)} <= set(values)


def test_page_says_what_two_seeds_do_not_show(runs: Path) -> None:
    text = site(runs, built(runs))["effect_map.html"]
    assert "Nothing here is tested for significance." in text
    assert "two seeds show whether a sign repeats once, no more" in text


def test_page_says_commit_cost_command_and_that_it_is_current(runs: Path) -> None:
    text = site(runs, built(runs))["effect_map.html"]
    assert f'<span class="mono">{str(CLEAN["commit"])[:12]}</span>' in text
    assert '<data value="120.0">120</data> CPU-s' in text
    assert "<code>noisebench effect-map toy --seeds 0..1</code>" in text
    assert "stale" not in text[text.index("</style>") :]


def test_stale_map_is_flagged_with_what_has_changed(runs: Path) -> None:
    found = built(runs)
    (recipes.ROOT / "toy" / "mini.yaml").write_text("name: other\n")
    text = site(runs, found)["effect_map.html"]
    assert 'A Toy Paper</a> <span class="flag">stale</span></h2>' in text
    assert "other numbers: recipe mini.</dd>" in text


def test_diverged_run_and_quick_look_are_said(runs: Path) -> None:
    add_run(runs, "mini", 8, 1, status="failed", reason="NonFiniteLossError: diverged", metrics={})
    text = site(runs, dataclasses.replace(built(runs), steps=3))["effect_map.html"]
    assert Reader(text).rows[2] == ["8", "diverged", "diverged"]
    assert "A quick look: 3 optimizer steps for each run" in text


def test_pages_link_to_the_map_and_back(runs: Path) -> None:
    pages = {name: Reader(text) for name, text in site(runs, built(runs)).items()}
    assert {"index.html", "toy.html"} <= set(pages["effect_map.html"].links)
    assert "effect_map.html#map-toy" in pages["index.html"].links
    assert "effect_map.html#map-toy" in pages["toy.html"].links
    assert not any("effect_map" in link for link in pages["other.html"].links)
    assert "map-toy" in pages["effect_map.html"].ids


def test_without_maps_there_is_no_page_and_no_link(runs: Path) -> None:
    pages = site(runs)
    assert sorted(pages) == ["index.html", "other.html", "toy.html"]
    assert "effect_map.html" not in pages["index.html"]


def test_text_of_a_map_is_text(runs: Path) -> None:
    nasty = "<script>alert('x')</script>"
    found = dataclasses.replace(built(runs), title=nasty, command=nasty, finished_at=nasty, metric=nasty)
    text = site(runs, found)["effect_map.html"]
    assert "script" not in Reader(text).tags
    assert text.count("&lt;script&gt;") == 5


def test_slug_effect_map_is_refused(runs: Path) -> None:
    write_paper(recipes.ROOT, slug="effect_map")
    with pytest.raises(UserError, match="must not be named 'effect_map'"):
        site(runs)


# the command


def test_command_writes_picture_table_and_map_which_the_local_pages_show(runs: Path) -> None:
    assert main(["effect-map", "toy"]) == 0
    assert sorted(file.name for file in (runs / "toy").iterdir() if file.is_file()) == [
        "effect_map.csv",
        "effect_map.json",
        "effect_map.svg",
    ]
    assert leaderboard.board_of_runs(runs).maps == [built(runs)]
    assert not (runs.parent / "docs").exists()


def test_publish_writes_the_map_and_all_pages(runs: Path) -> None:
    assert main(["effect-map", "toy", "--publish"]) == 0
    docs = runs.parent / "docs/leaderboard"
    assert maps.from_json((docs / "effect_maps/toy.json").read_text()) == built(runs)
    assert {"index.html", "toy.html", "other.html", "effect_map.html"} <= {file.name for file in docs.iterdir()}


def test_published_pages_need_no_runs(runs: Path) -> None:
    main(["effect-map", "toy", "--publish"])
    page = runs.parent / "docs/leaderboard/effect_map.html"
    before = page.read_bytes()
    (runs.parent / "docs/leaderboard/records").mkdir()
    page.unlink()
    assert leaderboard.verb(["--runs", "none"]) == 0
    assert page.read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"git": {**CLEAN, "dirty": True}}, "from a tree with changes that are in no commit"),
        ({"git": {"commit": None, "dirty": None}}, "unknown commit"),
    ],
)
def test_runs_of_a_changed_tree_are_not_published_unless_forced(
    runs: Path, capsys: pytest.CaptureFixture, changes: dict[str, Any], reason: str
) -> None:
    path = add_run(runs, "mini", 16, 1, **changes)
    file = runs.parent / "docs/leaderboard/effect_maps/toy.json"
    assert main(["effect-map", "toy", "--publish"]) == 1
    error = capsys.readouterr().err
    assert "--publish: 1 of 12 records are not fit to be published" in error
    assert f"{path.relative_to(runs.parent)}: {reason}" in error
    assert not file.exists()
    assert main(["effect-map", "toy", "--publish", "--force"]) == 0
    assert changes["git"] in json.loads(file.read_text())["git"]


def test_stale_runs_are_not_published_unless_forced(runs: Path) -> None:
    records = effect_map.measure("toy", STUDY, SEEDS, runs, lambda: None)
    stale = dataclasses.replace(records[Run("mini", 8, 0)], stale=True)
    with pytest.raises(UserError, match="stale: recipe or code have changed since"):
        effect_map.refuse([stale], force=False)
    effect_map.refuse([stale], force=True)


def test_nothing_is_trained_for_publishing_in_a_changed_tree(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(provenance, "git_state", lambda: {**CLEAN, "dirty": True})
    monkeypatch.setattr(effect_map, "_train", lambda *_: pytest.fail("trained"))
    (runs / "toy/mini/c8/seed0/record.json").unlink()
    assert main(["effect-map", "toy", "--publish"]) == 1
    assert (
        "--publish: runs made now would come from an unknown commit or a tree with changes" in capsys.readouterr().err
    )


def test_publishing_outside_a_checkout_is_refused(runs: Path, capsys: pytest.CaptureFixture) -> None:
    (runs.parent / "README.md").unlink()
    assert main(["effect-map", "toy", "--publish"]) == 1
    assert "it works in a checkout of noisebench" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["elr"], "no effect map of 'elr'; there are curriculum_diffusion, dtr, immiscible"),
        (["immiscible", "--out", "map.pdf"], "--out must end in .svg or .png, got 'map.pdf'"),
        (["immiscible", "--publish", "--steps", "3"], "--publish shows the grid as it is; give it without --steps"),
    ],
)
def test_bad_options_are_named(words: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["effect-map", *words]) == 1
    assert message in capsys.readouterr().err


# grids of this project


def test_grids_name_recipes_that_exist() -> None:
    papers = sorted(path.parent.name for path in recipes.ROOT.glob("*/_effect_map.yaml"))
    assert papers == ["curriculum_diffusion", "dtr", "immiscible"]
    for paper in papers:
        for arms in maps.load_study(paper)["rows"].values():
            assert sorted(arms) == ["control", "treatment"]
            for recipe in arms.values():
                assert (recipes.ROOT / paper / f"{recipe}.yaml").is_file()


@pytest.mark.slow
def test_command_trains_once_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "map.png"
    words = ["effect-map", "immiscible", "--steps", "3", "--runs", str(tmp_path / "runs"), "--out", str(out)]
    assert main(words) == 0
    assert len(out.with_suffix(".csv").read_text().splitlines()) == 1 + 2 * 3 * 3
    assert out.read_bytes().startswith(b"\x89PNG")
    found = maps.from_json(out.with_suffix(".json").read_text())
    assert (found.steps, found.changes()) == (3, [])
    # the records are found again by their settings
    assert main(words) == 0
    assert "24 are there, 0 to run" in capsys.readouterr().out
