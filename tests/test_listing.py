"""`noisebench list`: what it shows, and that it stays light."""

import subprocess
import sys
from pathlib import Path

import pytest
from paper_room import add_arms, claim, write_paper

from scripts import recipes
from scripts.__main__ import main


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(recipes, "ROOT", tmp_path / "recipes")
    write_paper(
        tmp_path / "recipes",
        claim(),
        claim(id="slow", extra=True),
        claim(id="full", scale="paper", treatment="full.yaml", control=None, threshold=0.9),
    )
    return tmp_path / "runs"


def test_overview_has_verdicts_and_hides_paper_scale_claims_without_runs(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add_arms(runs, [0.80, 0.82, 0.81], [0.50, 0.51, 0.53])
    assert main(["list", "--runs", str(runs)]) == 0
    assert capsys.readouterr().out == (
        "toy: A Toy Paper (ToyConf 2020, arXiv 2001.00001)\n"
        "  3 recipes, 3 claims: 2 reproduced, 0 not reproduced, 0 inconclusive, 1 not run\n"
        "  mini   reproduced              beats  The method beats the control\n"
        "  mini   reproduced              slow   The method beats the control [extra]\n"
        "  1 paper-scale claims without runs: `noisebench list toy`\n"
    )


def test_one_paper_has_recipes_with_costs_and_all_claims(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "toy", "--runs", str(runs)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[2:5] == [
        "  toy/full: Recipe full; cost: 1 CPU-minute",
        "  toy/mini-ce: Recipe mini-ce; cost: 1 CPU-minute",
        "  toy/mini: Recipe mini; cost: 1 CPU-minute",
    ]
    assert printed[-1] == "  paper  not run                 full   The method beats the control"


def test_unknown_paper(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "tyo", "--runs", str(runs)]) == 1
    assert "no paper 'tyo'; there are toy" in capsys.readouterr().err


def test_unusable_record_gives_exit_code_1(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = runs / "toy" / "mini" / "c0ffee" / "seed0" / "record.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"schema": 9}')
    assert main(["list", "--runs", str(runs)]) == 1
    assert capsys.readouterr().err.startswith(f"skipped: {path}: record of schema 9")


def test_list_imports_neither_torch_nor_scipy(tmp_path: Path) -> None:
    heavy = "sorted({'torch', 'lightning', 'scipy', 'numpy'} & set(sys.modules))"
    program = f"import sys; from scripts.__main__ import main; print(main(['list']), {heavy}, file=sys.stderr)"
    root = Path(__file__).parents[1]
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env={"PYTHONPATH": str(root)}, capture_output=True, text=True
    )
    assert ended.stderr.splitlines()[-1] == "0 []"
