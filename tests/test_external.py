"""Results that others report: reading, checking, appending."""

from pathlib import Path

import pytest
from paper_room import write_paper

from scripts import recipes
from scripts.errors import UserError
from scripts.external import External, add_external, read_external

HEADER = "paper,claim,recipe,metric,treatment,control,source,url\n"
ROW = "toy,beats,,test/acc_last,0.9,0.8,Table 1,https://example.org/a\n"


@pytest.fixture(autouse=True)
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes of paper `toy` only."""
    monkeypatch.setattr(recipes, "ROOT", tmp_path / "recipes")
    write_paper(tmp_path / "recipes")


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "results.csv"
    path.write_text(text)
    return path


def test_every_column_is_read(tmp_path: Path) -> None:
    expected = External("toy", "beats", None, "test/acc_last", 0.9, 0.8, "Table 1", "https://example.org/a")
    assert read_external(written(tmp_path, HEADER + ROW)) == [expected]


def test_columns_in_other_order_spaces_blank_lines_byte_order_mark_and_absent_ones(tmp_path: Path) -> None:
    text = '\ufeffsource, recipe,paper,metric,treatment\n\n"Smith, Table 3",mini.yaml, toy,acc, 1e-1\n,,,,\n'
    assert read_external(written(tmp_path, text)) == [
        External("toy", None, "mini", "acc", 0.1, None, "Smith, Table 3", None)
    ]


def test_repeated_rows_count_once(tmp_path: Path) -> None:
    assert len(read_external(written(tmp_path, HEADER + ROW + ROW))) == 1


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (",0.9,", ",89 %,", r"results.csv, line 2: treatment must be a finite number with a decimal point, got '89 %'"),
        (",0.9,", ",nan,", r"line 2: treatment must be a finite number .*, got 'nan'"),
        (",0.8,", ",inf,", r"line 2: control must be a finite number .*, got 'inf'"),
        (",0.8,", ",1_0,", r"line 2: control must be a finite number .*, got '1_0'"),
        (",0.9,", ",,", r"line 2: treatment must not be empty"),
        ("Table 1", " ", r"line 2: source must not be empty"),
        ("beats", "beat", r"line 2: unknown claim 'beat'; did you mean beats\?"),
        ("beats,", ",min", r"line 2: unknown recipe 'min'; did you mean mini"),
        ("toy,", "tony,", r"line 2: unknown paper 'tony'; did you mean toy\?"),
        ("beats,", "beats,mini", r"line 2: give either claim or recipe, got 'beats' and 'mini'"),
        ("beats,", ",", r"line 2: give either claim or recipe, got '' and ''"),
        ("https:", "javascript:", r"line 2: url must start with http:// or https://, got 'javascript:"),
        ("toy,", "", r"line 2: must have 8 values as the first line has, got 7"),
        ("metric", "metrik", r"line 1: unknown column 'metrik'; did you mean metric\?"),
        ("claim", "paper", r"line 1: column 'paper' is there twice"),
        (HEADER, "paper,claim,metric,treatment\n", r"line 1: missing column source"),
        (HEADER, "paper,metric,treatment,source\n", r"line 1: missing column claim or recipe"),
        (HEADER + ROW, "", r"line 1: missing column paper, metric, treatment, source"),
        ("Table 1", '"Table', r"cannot read .*results.csv as CSV in UTF-8"),
    ],
)
def test_mistake_is_named_with_its_place(tmp_path: Path, old: str, new: str, message: str) -> None:
    text = HEADER + ROW
    assert old in text
    with pytest.raises(UserError, match=message):
        read_external(written(tmp_path, text.replace(old, new, 1)))


def test_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*none.csv: No such file"):
        read_external(tmp_path / "none.csv")


def test_file_in_another_encoding(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    path.write_bytes((HEADER + ROW.replace("Table", "Tablé")).encode("latin-1"))
    with pytest.raises(UserError, match=r"cannot read .*results.csv as CSV in UTF-8"):
        read_external(path)


def test_adding_twice_adds_once_and_keeps_earlier_rows(tmp_path: Path) -> None:
    target = tmp_path / "leaderboard"
    path = add_external(written(tmp_path, HEADER + ROW), target)
    assert (path, path.read_text()) == (target / "reported.csv", HEADER + ROW)
    other = 'toy,,mini,test/acc_last,0.5,,"A, ""B""",\n'
    add_external(written(tmp_path, HEADER + other + ROW), target)
    assert path.read_text() == HEADER + ROW + other
    assert len(read_external(path)) == 2


def test_adding_a_broken_file_changes_nothing(tmp_path: Path) -> None:
    path = add_external(written(tmp_path, HEADER + ROW), tmp_path)
    with pytest.raises(UserError, match="line 3: treatment"):
        add_external(written(tmp_path, HEADER + ROW.replace("0.9", "0.7") + ROW.replace("0.9", "x")), tmp_path)
    assert path.read_text() == HEADER + ROW


def test_adding_no_rows_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no rows below its first line"):
        add_external(written(tmp_path, HEADER), tmp_path)
    assert not (tmp_path / "reported.csv").exists()
