"""Pictures of runs: which are shown and published."""

import base64
import re
from pathlib import Path
from urllib.parse import unquote

import pytest
from paper_room import CLEAN, add_arms, add_record, write_paper

from scripts import leaderboard, pictures, recipes
from scripts.pictures import LARGEST, read_pictures
from scripts.published import publish, read_published
from scripts.records import read_records

PNG = b"\x89PNG\r\n\x1a\nnot really"


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(recipes, "ROOT", tmp_path / "recipes")
    write_paper(tmp_path / "recipes")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


def add_picture(record: Path, name: str = "samples_20_evaluations.png", content: bytes = PNG) -> None:
    (record.parent / "figures").mkdir(exist_ok=True)
    (record.parent / "figures" / name).write_bytes(content)


def test_picture_of_the_first_seed_stands_on_the_papers_page(runs: Path) -> None:
    add_arms(runs, [0.8, 0.8, 0.8], [0.5, 0.5, 0.5])
    for seed, content in ((0, PNG), (1, b"other")):
        add_picture(add_record(runs, "mini", seed, 0.8), content=content)
    leaderboard.write_pages(leaderboard.board_of_runs(runs), runs.parent / "site", "--runs")
    page = (runs.parent / "site" / "toy.html").read_text()
    assert f'src="data:image/png;base64,{base64.b64encode(PNG).decode()}"' in page
    assert "mini, seed 0: samples 20 evaluations" in page
    assert base64.b64encode(b"other").decode() not in page


def test_other_kinds_and_large_files_are_left_in_the_folder(runs: Path) -> None:
    record = add_record(runs, "mini", 0, 0.8)
    add_picture(record, "notes.txt")
    add_picture(record, "large.png", b"0" * (LARGEST + 1))
    assert read_pictures(read_records(runs)[0], runs) == ([], [])


def test_pictures_beyond_the_budget_are_links(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "EMBEDDED", len(PNG))
    add_arms(runs, [0.8, 0.8, 0.8], [0.5, 0.5, 0.5])
    record = add_record(runs, "mini", 0, 0.8)
    add_picture(record, "a.png")
    add_picture(record, "b c.png", b"second")
    leaderboard.write_pages(leaderboard.board_of_runs(runs), runs.parent / "site", "--runs")
    page = (runs.parent / "site" / "toy.html").read_text()
    address = re.search(r'<a href="([^"]*)">mini, seed 0: b c</a>', page)[1]
    assert (runs.parent / "site" / unquote(address)).read_bytes() == b"second"
    assert "1 more picture, beside" in page


def test_pictures_are_published_and_read_back(runs: Path) -> None:
    for seed in range(2):
        add_picture(add_record(runs, "mini", seed, 0.8, git=CLEAN))
    target = runs.parent / "published"
    publish(read_records(runs)[0], target)
    assert [file.name for file in target.rglob("*.png")] == ["samples_20_evaluations.png"]
    records, problems = read_published(target)
    assert problems == []
    (picture,), broken = read_pictures(records, runs)
    assert (picture.caption, broken) == ("mini, seed 0: samples 20 evaluations", [])


def test_unreadable_picture_is_named(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_picture(add_record(runs, "mini", 0, 0.8))
    records = read_records(runs)[0]

    def denied(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", denied)
    found, (problem,) = read_pictures(records, runs)
    assert found == []
    assert problem.endswith("samples_20_evaluations.png: Permission denied")
