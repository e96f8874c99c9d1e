"""The pages without a browser: numbers, text from files, problems, size, the same bytes each time."""

import dataclasses
import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from page_reader import Reader
from paper_room import CLEAN, CONFIG, add_arms, add_curves, add_record, claim, write_paper

from scripts import drawings, leaderboard, page, recipes
from scripts.aggregate import Aggregate
from scripts.errors import UserError
from scripts.external import External

HIGH: list[float | None] = [0.80123456, 0.82, 0.81]
LOW: list[float | None] = [0.50, 0.51, 0.53]
NASTY = "<script>alert('x')</script><img src=x onerror=alert(1)>\"'&"
Build = Callable[..., dict[str, str]]


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(recipes, "ROOT", tmp_path / "recipes")
    write_paper(tmp_path / "recipes")
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs"


@pytest.fixture
def built(runs: Path, tmp_path: Path) -> Build:
    """Builds the pages from the records and returns their text by name."""

    def make(**more: Any) -> dict[str, str]:
        board = leaderboard.board_of_runs(runs)
        board = dataclasses.replace(board, **more)
        leaderboard.write_pages(board, tmp_path / "site", "--runs")
        return {file.name: file.read_text() for file in sorted((tmp_path / "site").iterdir())}

    return make


def test_there_is_an_index_and_a_page_for_each_paper(built: Build) -> None:
    assert list(built()) == ["index.html", "toy.html"]


def test_row_of_the_index_equals_the_records(runs: Path, built: Build) -> None:
    add_arms(runs, HIGH, LOW)
    row = next(row for row in Reader(built()["index.html"]).rows if row[0].endswith("reproduced") and row[1] == "toy")
    # effects 0.30123456, 0.31, 0.28: mean 0.2970782, sd 0.0154278, t_{0.95, 2} = 2.919986, half width 0.0260091
    assert row == [
        "✓ reproduced",
        "toy",
        "The method beats the control beats",
        "mini",
        "+0.2971 [ +0.2711 , +0.3231 ] margin 0.05",
        "0.8104 ± 0.0094 (3) test/acc_last",
        "0.5133 ± 0.015 (3)",
        "0.89 vs 0.81 Table 1",
        "3/3",
        "60",
    ]


def test_exact_values_of_every_seed_are_on_the_papers_page(runs: Path, built: Build) -> None:
    add_arms(runs, HIGH, LOW)
    values = Reader(built()["toy.html"]).values
    assert {0.80123456, 0.82, 0.81, 0.50, 0.51, 0.53} <= set(values)
    assert {0.80123456 - 0.50, 0.82 - 0.51, 0.81 - 0.53} <= set(values)
    assert statistics.fmean([0.80123456 - 0.50, 0.82 - 0.51, 0.81 - 0.53]) == pytest.approx(values[1], abs=1e-12)


def test_failed_claim_has_the_same_row(runs: Path, built: Build) -> None:
    add_arms(runs, LOW, HIGH)
    text = built()["index.html"]
    assert [row[0] for row in Reader(text).rows if row[1:2] == ["toy"]] == ["✕ not reproduced"]
    assert re.search(r'<tr class="not-reproduced-row"[^>]* data-verdict="not reproduced"', text)


def test_failed_and_missing_seeds_are_rows(runs: Path, built: Build) -> None:
    add_arms(runs, [0.80, None], LOW)
    rows = Reader(built()["toy.html"]).rows
    assert ["1", "failed: NonFiniteLossError: diverged", "0.51", "–", "mini seed 1 , mini-ce seed 1"] in rows
    assert ["2", "no record", "0.53", "–", "mini-ce seed 2"] in rows


def test_stale_is_said_on_both_pages(runs: Path, built: Build) -> None:
    add_arms(runs, HIGH, LOW)
    add_record(runs, "mini", 0, 0.80, code_hash="0123456789ab")
    pages = built()
    assert any(row[0] == "✓ reproduced stale" for row in Reader(pages["index.html"]).rows if row)
    assert any(row[0] == "mini seed 0 stale" for row in Reader(pages["toy.html"]).rows if row)


def test_text_of_claims_and_records_is_text(runs: Path, built: Build) -> None:
    write_paper(recipes.ROOT, claim(text=NASTY, paper={"treatment": NASTY, "source": NASTY}))
    for recipe in ("mini", "mini-ce"):
        for seed in range(3):
            add_record(
                runs, recipe, seed, 0.8, command=NASTY, hardware={NASTY: NASTY}, versions={"torch": NASTY},
                git={"commit": NASTY, "dirty": True}, finished_at=NASTY, config=CONFIG | {NASTY: recipe + NASTY},
            )  # fmt: skip
    add_record(runs, "mini", 2, None, reason=NASTY)
    reported = External("toy", "beats", None, NASTY, 0.9, None, NASTY, "javascript:alert(1)")
    for name, text in built(reported=[reported]).items():
        reader = Reader(text)
        assert reader.tags.count("script") == (name == "index.html")
        assert "img" not in reader.tags
        assert not any(link.lower().startswith("javascript") for link in reader.links)
        assert "&lt;script&gt;alert(" in text


def test_optional_parts_of_a_record_may_hold_anything(runs: Path, built: Build) -> None:
    add_arms(runs, HIGH, LOW)
    add_record(runs, "mini", 0, 0.8, command=None, git=[1], hardware="none", versions=3, reason={"a": 1})
    bare = add_record(runs, "mini", 1, 0.8)
    data = json.loads(bare.read_text())
    del data["reason"]
    bare.write_text(json.dumps(data))
    text = built()["toy.html"]
    assert "not recorded" in text
    assert "unknown" in text


def test_script_is_the_one_that_the_policy_allows(built: Build) -> None:
    import base64
    import hashlib

    text = built()["index.html"]
    script = text.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text


def test_pages_load_nothing_from_elsewhere(runs: Path, built: Build) -> None:
    add_arms(runs, HIGH, LOW)
    for text in built().values():
        assert "default-src 'none'" in text
        assert "@import" not in text
        assert not re.search(r"url\((?!#)", text)
        assert not re.search(r'<(link|script|img)[^>]+(href|src)="(?!data:)', text)


def test_ids_of_a_page_are_unique(runs: Path, built: Build) -> None:
    write_paper(recipes.ROOT, claim(), claim(id="again", margin=0.9))
    add_arms(runs, HIGH, LOW)
    for text in built().values():
        ids = Reader(text).ids
        assert sorted(set(ids)) == sorted(ids)


def test_links_to_records_lead_to_them(runs: Path, built: Build, tmp_path: Path) -> None:
    add_arms(runs, HIGH, LOW)
    links = [link for link in Reader(built()["toy.html"]).links if link.endswith("record.json")]
    assert len(set(links)) == 6
    assert all((tmp_path / "site" / link).is_file() for link in links)


def test_dirty_tree_is_marked(runs: Path, built: Build) -> None:
    for seed in range(3):
        add_record(runs, "mini", seed, 0.8, git=CLEAN)
        add_record(runs, "mini-ce", seed, 0.5, git=CLEAN | {"dirty": True})
    text = built()["toy.html"]
    assert text.count("0123456789ab (uncommitted changes)") == 3
    assert text.count("0123456789ab<") == 3


def test_settings_that_differ_and_no_others(runs: Path, built: Build) -> None:
    both = {"trainer": {"max_epochs": 3, "callbacks": ["a", "b"]}}
    for seed in range(3):
        add_record(runs, "mini", seed, 0.8, config=both | {"model": {"lam": 3.0, "only": [1]}})
        add_record(runs, "mini-ce", seed, 0.5, config=both | {"model": {"lam": 0.0}})
    rows = Reader(built()["toy.html"]).rows
    place = rows.index(["Setting", "Treatment", "Control"])
    assert rows[place + 1 : place + 3] == [["model.lam", "3.0", "0.0"], ["model.only.0", "1", "–"]]
    assert rows[place + 3][0] == "Record"


def test_problems_are_shown_and_the_page_is_still_built(runs: Path, built: Build) -> None:
    add_arms(runs, HIGH, LOW)
    broken = add_record(runs, "mini", 0, 0.80)
    broken.write_text(broken.read_text()[:40])
    newer = add_record(runs, "mini", 1, 0.80)
    newer.write_text(json.dumps(json.loads(newer.read_text()) | {"schema": 9}))
    for text in built().values():
        assert "2 files were skipped" in text
        assert "not readable as JSON" in text
        assert "record of schema 9" in text
    assert "not run" in text


def test_broken_curves_are_a_problem_not_a_crash(runs: Path, built: Build) -> None:
    add_arms(runs, HIGH, LOW)
    add_record(runs, "mini", 0, 0.80).with_name("metrics.csv").write_text("epoch,test/acc\n0,many\n")
    for text in built().values():
        assert "test/acc must be a number" in text


def test_curves_of_the_same_runs_are_drawn_once(runs: Path, built: Build) -> None:
    write_paper(recipes.ROOT, claim(), claim(id="again", margin=0.9))
    for recipe, values in (("mini", HIGH), ("mini-ce", LOW)):
        for seed, value in enumerate(values):
            assert value is not None
            add_curves(add_record(runs, recipe, seed, value), **{"test/acc": [0.1, 0.4, value]})
    text = built()["toy.html"]
    assert text.count("<title>Test accuracy (fraction of 1) by epoch</title>") == 1
    assert re.search(r'Learning curves of the same runs: <a href="#claim-beats">beats</a>', text)


def test_reported_numbers_stand_apart(runs: Path, built: Build) -> None:
    add_arms(runs, HIGH, LOW)
    reported = External("toy", "beats", None, "test/acc_last", 0.9, 0.7, "Smith 2021", "https://example.org/a?b&c")
    pages = built(reported=[reported])
    table = pages["index.html"].partition('id="external"')[2].partition("</table>")[0]
    row = ["reported", "toy", "beats", "test/acc_last", "0.9", "0.7", "Smith 2021"]
    assert Reader(f"<table>{table}").rows[1] == row
    assert "Smith 2021" not in pages["index.html"].partition('id="external"')[0]
    assert "not verified" in pages["toy.html"]


def test_aggregate_is_shown_with_its_bounds(runs: Path, built: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    add_arms(runs, HIGH, LOW)
    text = built()["index.html"]
    assert "Probability of improvement" not in text
    assert "No aggregate over papers at mini scale" in text
    given = Aggregate("mini", 0.75, 0.625, 0.875, {"toy": 0.75, "other": 0.75}, 4, 2)
    monkeypatch.setattr(page, "aggregate", lambda results, scale: given)
    assert {0.75, 0.625, 0.875} <= set(Reader(built()["index.html"]).values)


def test_same_arguments_same_bytes(runs: Path, built: Build) -> None:
    add_arms(runs, HIGH, LOW)
    assert built() == built()


def test_charts_are_drawn_again_only_where_they_change(
    runs: Path, built: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_arms(runs, HIGH, LOW)
    first = built()
    kinds: list[str] = []
    draw = drawings._svg

    def counted(plan: drawings.Plan) -> str:
        kinds.append(plan.kind)
        return draw(plan)

    monkeypatch.setattr(drawings, "_svg", counted)
    assert built() == first
    assert kinds == []
    (tmp_path / "site" / "toy.html").write_text(first["toy.html"].replace("margin</text>", "edited</text>"))
    assert built() == first
    assert kinds == ["forest"]


def test_slug_index_is_refused(built: Build) -> None:
    write_paper(recipes.ROOT, slug="index")
    with pytest.raises(UserError, match="must not be named 'index'"):
        built()


def test_unwritable_target_is_an_error(runs: Path, built: Build, tmp_path: Path) -> None:
    (tmp_path / "site").write_text("a file")
    with pytest.raises(UserError, match="cannot write"):
        built()


def test_index_of_fifty_papers_stays_small(runs: Path, built: Build) -> None:
    text = "The method beats the control in a sentence of usual length"
    claims = [claim(id=f"claim-{number}", text=text) for number in range(10)]
    for number in range(50):
        write_paper(recipes.ROOT, *claims, slug=f"paper{number:02d}")
        for recipe, base in (("mini", 0.8), ("mini-ce", 0.5)):
            for seed in range(3):
                add_record(runs, recipe, seed, base + seed / 100, slug=f"paper{number:02d}")
    text = built()["index.html"]
    assert text.count('data-verdict="reproduced"') == 500
    assert len(text.encode()) < 2_000_000
