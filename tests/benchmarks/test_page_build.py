"""Time to build all pages from n records, cold and again: `make bench`, or with -k 'and 20000'.

Of a paper: four claims, each with a treatment and a control of five seeds (40 records), curves of two metrics over 40
epochs. Reading and judging the records is part of it.
"""

import math
import shutil
from pathlib import Path

import pytest
from paper_room import add_curves, add_record, claim, write_paper
from pytest_benchmark.fixture import BenchmarkFixture

from scripts import leaderboard, recipes

CLAIMS = 4
SEEDS = 5


def write_records(root: Path, num: int) -> Path:
    """Papers and `num` records below `root`; returns the folder of runs."""
    for number in range(num // (2 * CLAIMS * SEEDS)):
        slug = f"paper{number:03d}"
        arms = [f"arm{k}" for k in range(2 * CLAIMS)]
        pairs = [(arms[2 * k], arms[2 * k + 1]) for k in range(CLAIMS)]
        claims = [
            claim(id=f"{a}-{b}", treatment=f"{a}.yaml", control=f"{b}.yaml", seeds=list(range(SEEDS))) for a, b in pairs
        ]
        for arm in arms:
            file = recipes.ROOT / slug / f"{arm}.yaml"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"# Recipe {arm}\nname: {arm}\n")
        write_paper(recipes.ROOT, *claims, slug=slug)
        for k, arm in enumerate(arms):
            for seed in range(SEEDS):
                wave = [0.5 + 0.3 * math.sin(0.05 * epoch + 0.1 * seed + k + number) for epoch in range(40)]
                record = add_record(root / "runs", arm, seed, wave[-1], slug=slug)
                add_curves(record, **{"test/acc": wave, "wrong/memorized": wave[::-1]})
    return root / "runs"


@pytest.mark.parametrize("num", [200, 2000, pytest.param(20000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("cold", [True, False], ids=["cold", "again"])
def test_build(
    benchmark: BenchmarkFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num: int, cold: bool
) -> None:
    monkeypatch.setattr(recipes, "ROOT", tmp_path / "recipes")
    runs = write_records(tmp_path, num)
    target = tmp_path / "site"

    def build() -> None:
        leaderboard.write_pages(leaderboard.board_of_runs(runs), target, "--runs")

    if not cold:
        build()
    benchmark.pedantic(build, setup=lambda: shutil.rmtree(target, ignore_errors=True) if cold else None, rounds=2)
    board = leaderboard.board_of_runs(runs)
    assert sum(len(result.records) for result in board.results) == num
    assert len(list(target.iterdir())) == num // (2 * CLAIMS * SEEDS) + 1
