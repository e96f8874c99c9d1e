"""The table of verdicts and the terminal text of a claim."""

import html
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from paper_room import CLEAN, add_arms, add_record, claim, write_paper

from scripts import leaderboard, recipes
from scripts.__main__ import main
from scripts.claims import load_paper
from scripts.errors import UserError
from scripts.markdown import render, verdict_lines
from scripts.records import evaluate, read_records

HIGH: list[float | None] = [0.80, 0.82, 0.81]
LOW: list[float | None] = [0.50, 0.51, 0.53]


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(recipes, "ROOT", tmp_path / "recipes")
    write_paper(tmp_path / "recipes")
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)  # away from the pages that are committed here
    return tmp_path / "runs"


def markdown(runs: Path) -> str:
    board = leaderboard.board_of_runs(runs)
    return render(board.papers, board.results, board.reported, board.problems)


@pytest.fixture
def row(runs: Path) -> Callable[[], dict[str, str]]:
    """Cells of the one claim in the written table, by column."""

    def read() -> dict[str, str]:
        lines = markdown(runs).splitlines()
        head = next(line for line in lines if line.startswith("| Paper |"))
        body = next(line for line in lines if line.startswith("| toy |"))
        columns, cells = ([cell.strip() for cell in line.strip("|").split("|")] for line in (head, body))
        return dict(zip(columns, cells, strict=True))

    return read


def test_row_of_a_reproduced_claim(runs: Path, row: Callable[[], dict[str, str]]) -> None:
    add_arms(runs, HIGH, LOW)
    # d + margin: 0.30, 0.31, 0.28, sd 0.015275, t_{0.95, 2} = 2.919986, half width 0.025752
    assert row() == {
        "Paper": "toy",
        "Claim": "`beats` The method beats the control",
        "Scale": "mini",
        "Verdict": "**reproduced**: every seed finished and the lower bound exceeds the margin",
        "Effect [L, U], margin": "+0.2967 [+0.2709, +0.3224], margin 0.05",
        "Treatment mean ± sd (n)": "0.81 ± 0.01 (3) `mini` test/acc_last",
        "Control mean ± sd (n)": "0.5133 ± 0.015 (3) `mini-ce` test/acc_last",
        "Paper's numbers": "treatment 0.89, control 0.81 (Table 1)",
        "Cost (CPU-s)": "60",
    }


def test_claim_that_fails_is_as_visible(runs: Path, row: Callable[[], dict[str, str]]) -> None:
    add_arms(runs, LOW, HIGH)
    found = row()
    assert found["Verdict"].startswith("**not reproduced**: ")
    assert found["Effect [L, U], margin"] == "-0.2967 [-0.3224, -0.2709], margin 0.05"


def test_failed_seed_is_named_in_its_arm(runs: Path, row: Callable[[], dict[str, str]]) -> None:
    add_arms(runs, [0.80, 0.82, None], LOW)
    found = row()
    assert found["Treatment mean ± sd (n)"] == "0.81 ± 0.014 (2, 1 failed) `mini` test/acc_last"
    assert found["Verdict"] == "**inconclusive**: 1 failed seed: cannot count as reproduced"


def test_two_failed_treatment_seeds(runs: Path, row: Callable[[], dict[str, str]]) -> None:
    add_arms(runs, [0.80, None, None], LOW)
    found = row()
    assert found["Verdict"] == "**not reproduced**: 2 treatment runs failed"
    assert found["Treatment mean ± sd (n)"] == "0.8 (1, 2 failed) `mini` test/acc_last"


def test_stale_verdict_is_flagged(runs: Path, row: Callable[[], dict[str, str]]) -> None:
    add_arms(runs, HIGH, LOW)
    add_record(runs, "mini", 0, 0.80, code_hash="0123456789ab")
    assert row()["Verdict"].startswith("**reproduced** *stale*: ")


def test_claim_that_nobody_ran(row: Callable[[], dict[str, str]]) -> None:
    found = row()
    assert found["Verdict"] == "**not run**: 6 of 6 runs have no record"
    assert (found["Effect [L, U], margin"], found["Cost (CPU-s)"]) == ("–, margin 0.05", "–")


def test_threshold_stands_in_the_place_of_the_control(runs: Path, row: Callable[[], dict[str, str]]) -> None:
    write_paper(recipes.ROOT, claim(control=None, threshold=0.6))
    assert row()["Control mean ± sd (n)"] == "threshold 0.6"


def test_bar_in_a_text_does_not_break_the_table(runs: Path) -> None:
    write_paper(recipes.ROOT, claim(text="a | b"))
    assert "`beats` a \\| b |" in markdown(runs)


def test_scales_have_tables_and_counts_of_their_own(runs: Path) -> None:
    write_paper(recipes.ROOT, claim(), claim(id="full", scale="paper", treatment="full.yaml"))
    add_arms(runs, HIGH, LOW)
    mini, paper = markdown(runs).split("## Mini scale")[1].split("## Paper scale")
    assert "1 reproduced, 0 not reproduced, 0 inconclusive, 0 not run." in mini
    assert "0 reproduced, 0 not reproduced, 0 inconclusive, 1 not run." in paper
    assert ("`beats`" in mini, "`full`" in mini) == (True, False)


def test_terminal_text_of_a_claim(runs: Path) -> None:
    add_arms(runs, HIGH, LOW)
    assert verdict_lines(evaluate(load_paper("toy").claims[0], read_records(runs)[0])) == (
        "REPRODUCED  toy/beats: The method beats the control\n"
        "    test/acc_last: mini 0.81 ± 0.01 (3), mini-ce 0.5133 ± 0.015 (3); "
        "effect +0.2967 [+0.2709, +0.3224], margin 0.05\n"
        "    every seed finished and the lower bound exceeds the margin; 60 CPU-s"
    )


def test_terminal_text_of_a_claim_that_nobody_ran(runs: Path) -> None:
    assert verdict_lines(evaluate(load_paper("toy").claims[0], [])) == (
        "NOT RUN  toy/beats: The method beats the control\n    6 of 6 runs have no record; 0 CPU-s"
    )


def test_command_prints_the_verdicts_and_the_path_of_the_page(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add_arms(runs, HIGH, LOW)
    assert main(["leaderboard", "--runs", str(runs)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "REPRODUCED  toy/beats: The method beats the control"
    assert printed[-2:] == [
        "1 claims: 1 reproduced, 0 not reproduced, 0 inconclusive, 0 not run",
        f"page of all claims: {runs / 'leaderboard' / 'index.html'}",
    ]


def test_record_of_another_version_is_reported_with_exit_code_1(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add_arms(runs, HIGH, LOW)
    path = add_record(runs, "mini", 0, 0.80)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 9}))
    problem = f"{path}: record of schema 9; this version of noisebench reads schema 1"
    assert main(["leaderboard", "--runs", str(runs)]) == 1
    assert capsys.readouterr().err == f"skipped: {problem}\n"
    assert markdown(runs).endswith(f"## Records that could not be used\n\n- {problem}\n")
    assert html.escape(problem) in (runs / "leaderboard" / "index.html").read_text()


def test_missing_folder_is_an_error_and_is_not_made(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    absent = runs / "absent"
    assert main(["leaderboard", "--runs", str(absent)]) == 1
    assert f"--runs: no folder {absent}" in capsys.readouterr().err
    assert not absent.exists()


def test_read_only_folder_still_prints_the_verdicts(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    add_arms(runs, HIGH, LOW)
    index = runs / "leaderboard" / "index.html"
    index.parent.mkdir()
    index.write_text("old")

    def denied(*names: Any) -> None:
        raise PermissionError(13, os.strerror(13))

    monkeypatch.setattr(os, "replace", denied)
    assert main(["leaderboard", "--runs", str(runs)]) == 1
    printed = capsys.readouterr()
    assert printed.out.startswith("REPRODUCED")
    assert f"--runs: cannot write {index}: Permission denied" in printed.err
    assert index.read_text() == "old"


# the committed pages


@pytest.fixture
def checkout(runs: Path) -> Path:
    """A checkout with a README and three finished pairs of runs from a clean tree."""
    root = runs.parent
    (root / "README.md").write_text(
        "# Toy\n\n"
        + "".join(f"<!-- noisebench:{name} -->\n<!-- /noisebench:{name} -->\n" for name in ("verdicts", "picture"))
        + "\nEnd.\n"
    )
    for seed, (method, control) in enumerate(zip([0.80, 0.81, 0.82], [0.60, 0.62, 0.61], strict=True)):
        add_record(runs, "mini", seed, method, git=CLEAN)
        add_record(runs, "mini-ce", seed, control, git=CLEAN)
    return root


def test_publish_writes_records_page_and_readme(checkout: Path) -> None:
    assert leaderboard.verb(["--publish"]) == 0
    assert len(list((checkout / "docs/leaderboard/records").rglob("seed*.json"))) == 6
    readme = (checkout / "README.md").read_text()
    assert "A Toy Paper, ToyConf 2020, arXiv 2001.00001; toys | 1 reproduced | – |" in readme
    assert readme.startswith("# Toy\n")
    assert readme.endswith("\n\nEnd.\n")
    assert "0.81 ± 0.01 (3) `mini`" in (checkout / "docs/leaderboard/README.md").read_text()


def test_committed_pages_are_made_from_published_records_alone(checkout: Path) -> None:
    leaderboard.verb(["--publish"])
    before = (checkout / "README.md").read_text()
    shutil.rmtree(checkout / "runs")
    assert leaderboard.verb([]) == 0
    assert (checkout / "README.md").read_text() == before


def test_claim_that_does_not_hold_is_named_in_the_readme(checkout: Path) -> None:
    write_paper(recipes.ROOT, claim(treatment="mini-ce.yaml", control="mini.yaml"))
    leaderboard.verb(["--publish"])
    readme = (checkout / "README.md").read_text()
    assert "Not reproduced:\n\n- `toy` (mini) The method beats the control: effect -0.2 [" in readme


def test_changed_recipe_shows_as_stale_in_the_readme(checkout: Path) -> None:
    leaderboard.verb(["--publish"])
    (recipes.ROOT / "toy" / "mini.yaml").write_text("name: other\n")
    leaderboard.verb([])
    assert "| 1 reproduced, *1 stale* |" in (checkout / "README.md").read_text()


def test_reported_results_stand_apart(checkout: Path) -> None:
    table = checkout / "others.csv"
    table.write_text("paper,claim,metric,treatment,control,source\ntoy,beats,test/acc_last,0.9,0.7,Someone 2025\n")
    assert leaderboard.verb(["--add", str(table)]) == 0
    page = (checkout / "docs/leaderboard/README.md").read_text()
    assert "| toy | beats | test/acc_last | 0.9 | 0.7 | Someone 2025 |" in page.split("## Reported by others")[1]
    assert "0.9" not in page.split("## Reported by others")[0]


def test_publishing_outside_a_checkout_is_refused(checkout: Path) -> None:
    (checkout / "README.md").unlink()
    with pytest.raises(UserError, match="they work in a checkout of noisebench"):
        leaderboard.verb(["--publish"])


def test_holms_correction_takes_a_weak_verdict_away(runs: Path) -> None:
    claims = [claim(id=f"c{number}") for number in range(5)]
    write_paper(recipes.ROOT, *claims)
    add_arms(runs, [0.80, 0.82, 0.90], [0.70, 0.69, 0.70])
    text = markdown(runs)
    assert text.count("**reproduced**: every seed") == 5
    assert "Holm's correction over the claims of each scale leaves 0 reproduced." in text
    assert "`toy/c0` (p 0.04" in text


def test_committed_pages_are_up_to_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a change of code or recipes: `noisebench leaderboard` writes them anew, `--publish` adds new records.

    Charts are compared by what they show: another version of Matplotlib draws the same in other words.
    """
    root = Path(__file__).parents[1]
    names = ["README.md", *(str(p.relative_to(root)) for p in (root / "docs/leaderboard").iterdir() if p.is_file())]
    shutil.copytree(root / "docs", tmp_path / "docs")
    shutil.copy(root / "README.md", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert leaderboard.verb(["--runs", "none"]) == 0
    assert {"docs/leaderboard/index.html", "docs/leaderboard/elr.html", "docs/leaderboard/effects.svg"} <= set(names)
    for name in names:
        assert without_drawings((tmp_path / name).read_text()) == without_drawings((root / name).read_text()), name


def without_drawings(text: str) -> str:
    """Charts give way to the hash of what they show."""
    return re.sub(r"( |<!-- )(\w{20}) \w{20}(\"| -->)", r"\2", re.sub(r"<svg.*?</svg>", "", text, flags=re.DOTALL))
