"""claims.yaml: what is read, and every way in which it can be wrong."""

from pathlib import Path
from typing import Any

import pytest
from paper_room import claim, write_paper

from scripts import recipes
from scripts.claims import load_paper
from scripts.errors import UserError


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(recipes, "ROOT", tmp_path)
    return tmp_path


def error_of(root: Path, *claims: dict[str, Any], **document: Any) -> str:
    path = write_paper(root, *claims, **document)
    with pytest.raises(UserError) as caught:
        load_paper("toy")
    message = str(caught.value)
    assert str(path) in message
    return message.removeprefix(f"{path}: ")


def test_paper_and_claims_in_order(root: Path) -> None:
    write_paper(root, claim(id="b"), claim(id="a"))
    paper = load_paper("toy")
    assert (paper.title, paper.arxiv, paper.venue) == ("A Toy Paper", "2001.00001", "ToyConf 2020")
    assert [c.id for c in paper.claims] == ["b", "a"]


def test_defaults(root: Path) -> None:
    write_paper(root, claim(control=None, margin=None, paper=None, threshold=0.5))
    found = load_paper("toy").claims[0]
    assert (found.margin, found.control, found.paper, found.extra) == (0.0, None, {}, False)


def test_runs_are_named_by_paper_and_recipe_pair_by_pair(root: Path) -> None:
    write_paper(root, claim(seeds=[3, 1]))
    assert load_paper("toy").claims[0].runs() == [
        ("toy/mini", 3),
        ("toy/mini-ce", 3),
        ("toy/mini", 1),
        ("toy/mini-ce", 1),
    ]


def test_control_metric_belongs_to_the_control(root: Path) -> None:
    write_paper(root, claim(control_metric="test/acc_best_oracle"))
    assert load_paper("toy").claims[0].arms == [
        ("toy/mini", "test/acc_last"),
        ("toy/mini-ce", "test/acc_best_oracle"),
    ]


def test_other_seeds(root: Path) -> None:
    write_paper(root)
    assert load_paper("toy").claims[0].with_seeds([7, 8]).seeds == (7, 8)


def test_claims_can_be_keys(root: Path) -> None:
    write_paper(root)
    assert {load_paper("toy").claims[0]: 1}[load_paper("toy").claims[0]] == 1


def test_unknown_paper_lists_the_papers(root: Path) -> None:
    write_paper(root)
    with pytest.raises(UserError, match=r"no paper 'toi'.*papers: toy"):
        load_paper("toi")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale": "medium"}, "claim 'beats': scale must be mini or paper, got 'medium'"),
        ({"direction": "more"}, "claim 'beats': direction must be greater or less, got 'more'"),
        ({"margin": float("nan")}, "claim 'beats': margin must be a finite number"),
        ({"margin": "1e-3"}, "claim 'beats': margin must be a finite number (YAML reads 1.0e-3 as one, 1e-3 not)"),
        ({"margin": True}, "got True"),
        ({"control": None, "threshold": float("inf")}, "claim 'beats': threshold must be a finite number"),
        ({"control": None}, "claim 'beats': give either control (a recipe) or threshold (a number), got neither"),
        ({"threshold": 0.5}, "got both"),
        ({"control": None, "threshold": 0.5, "control_metric": "m"}, "control_metric needs a control, got 'm' alone"),
        ({"control": None, "threshold": 0.5, "factor": 0.6}, "factor needs a control, got 0.6 alone"),
        ({"factor": 0}, "factor must be above 0, got 0"),
        ({"treatment": "mimi.yaml"}, "got 'mimi.yaml'; did you mean mini.yaml"),
        ({"control": "nothing"}, "claim 'beats': control must be the file name of a recipe in"),
        ({"control": "claims.yaml"}, "got 'claims.yaml'"),
        ({"seeds": [0]}, "claim 'beats': seeds must be at least two, all different, got [0]"),
        ({"seeds": [0, 1, 1]}, "got [0, 1, 1]"),
        ({"seeds": [0, 1.5]}, "seeds must be a list of whole numbers, none below 0, got [0, 1.5]"),
        ({"seeds": [0, -1]}, "got [0, -1]"),
        ({"seeds": 5}, "got 5"),
        ({"metric": 3}, "claim 'beats': metric must be text (in quotes if it looks like a number), got 3"),
        ({"text": None}, "claim 'beats': key 'text' is missing; required: id, text, scale"),
        ({"id": None}, "claim number 1: key 'id' is missing"),
        ({"id": "all"}, "id must be one word other than 'all'"),
        ({"id": "two words"}, "got 'two words'"),
        ({"marign": 0.1}, "claim 'beats': unknown key 'marign'; did you mean 'margin'? accepted: id, text"),
        ({"paper": [0.9]}, "claim 'beats': paper must be a mapping"),
        ({"extra": "yes please"}, "claim 'beats': extra must be true or false, got 'yes please'"),
    ],
)
def test_bad_claim_names_key_value_and_rule(root: Path, changes: dict[str, Any], message: str) -> None:
    assert message in error_of(root, claim(**changes))


def test_duplicate_id(root: Path) -> None:
    assert error_of(root, claim(), claim()) == "claim 'beats': id is used twice; each claim needs its own"


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"claims": []}, "claims must be a list of at least one claim, got []"),
        ({"claims": ["x"]}, "claim number 1 must be a mapping with id"),
        ({"note": 1}, "unknown key 'note'; accepted: paper, claims"),
        ({"paper": "ELR"}, "paper must be a mapping with title, arxiv, venue, family, got 'ELR'"),
        ({"paper": {"title": "T", "venue": "V"}}, "paper: key 'arxiv' is missing"),
        ({"paper": {"title": "T", "arxiv": 2001.1, "venue": "V", "family": "F"}}, "arxiv must be text (in quotes"),
        ({"paper": {"title": "T", "arxiv": "1", "venue": "V", "year": 2020}}, "unknown key 'year'"),
    ],
)
def test_bad_document(root: Path, document: dict[str, Any], message: str) -> None:
    assert message in error_of(root, **document)


def test_broken_yaml(root: Path) -> None:
    path = write_paper(root)
    path.write_text("claims: [")
    with pytest.raises(UserError, match=r"cannot read .*claims\.yaml"):
        load_paper("toy")
