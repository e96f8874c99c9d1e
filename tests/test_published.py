"""Published records: writing, refusing, reading back; curves of local and published runs."""

import errno
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from paper_room import CLEAN, add_curves, add_record, write_paper

from scripts import recipes
from scripts.claims import load_paper
from scripts.errors import UserError
from scripts.published import curves_of, publish, read_published, thin
from scripts.records import Record, evaluate, read_records

FILE = Path("toy/mini/c0ffee/seed0.json")


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of runs beside the recipes of paper `toy`."""
    monkeypatch.setattr(recipes, "ROOT", tmp_path / "recipes")
    write_paper(tmp_path / "recipes")
    return tmp_path / "runs"


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """Where records are published; not there yet."""
    return tmp_path / "records"


def local(runs: Path) -> list[Record]:
    found, problems = read_records(runs)
    assert problems == []
    return found


def one(runs: Path, **changes: Any) -> Record:
    """The record of a clean run."""
    add_record(runs, "mini", 0, 0.5, **{"git": CLEAN, **changes})
    return local(runs)[0]


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_published_record_comes_back_with_its_curves(runs: Path, target: Path) -> None:
    record = one(runs)
    add_curves(record.path, **{"test/acc": [0.25, 0.5], "train/loss": [2.0, math.nan]})
    assert publish([record], target) == [target / FILE]
    found, problems = read_published(target)
    assert problems == []
    assert {key: value for key, value in found[0].data.items() if key != "curves"} == record.data
    assert found[0].data["curves"] == {"epoch": [0, 1], "test/acc": [0.25, 0.5], "train/loss": [2, None]}
    assert (found[0].path, found[0].stale) == (target / FILE, False)


def test_published_records_decide_claims_as_local_ones(runs: Path, target: Path) -> None:
    for recipe, shift in (("mini", 0.3), ("mini-ce", 0.0)):
        for seed in range(3):
            add_record(runs, recipe, seed, 0.5 + shift + 0.01 * seed, git=CLEAN)
    claim = load_paper("toy").claims[0]
    publish(local(runs), target)
    assert evaluate(claim, read_published(target)[0]).verdict == evaluate(claim, local(runs)).verdict


def test_same_run_gives_the_same_text_whatever_the_order_of_its_keys(runs: Path, target: Path) -> None:
    record = one(runs)
    publish([record], target)
    before = (target / FILE).read_text()
    turned = Record(record.path, dict(reversed(record.data.items())), record.stale)
    publish([turned], target)
    assert (target / FILE).read_text() == before
    publish(read_published(target)[0], target)
    assert (target / FILE).read_text() == before


def test_every_value_and_every_curve_has_a_line_and_the_text_is_strict_json(runs: Path, target: Path) -> None:
    record = one(runs, metrics={"test/acc_last": 0.5, "bad": math.nan})
    add_curves(record.path, a=[0.1, math.inf, math.nan])
    publish([record], target)
    text = (target / FILE).read_text()
    assert text.endswith(' "curves": {\n  "epoch": [0, 1, 2],\n  "a": [0.1, null, null]\n }\n}\n')
    assert '\n  "bad": null,\n' in text
    assert "NaN" not in text
    assert "Infinity" not in text


def test_curves_are_rounded_to_six_digits_and_final_metrics_are_not(runs: Path, target: Path) -> None:
    record = one(runs, metrics={"test/acc_last": 0.578000009059906})
    add_curves(record.path, a=[0.578000009059906, 1234567.8, 1.23456789e-9])
    publish([record], target)
    found = read_published(target)[0][0]
    assert curves_of(found)["a"] == [0.578, 1234570.0, 1.23457e-9]
    assert found.metrics["test/acc_last"] == 0.578000009059906


@pytest.mark.parametrize("length", [61, 100, 1000])
def test_thinned_curves_have_sixty_points_and_both_ends(length: int) -> None:
    values = [float(index) for index in range(length)]
    found = thin({"epoch": values, "a": values})
    assert found["a"] == found["epoch"]
    assert len(found["a"]) == 60
    assert (found["a"][0], found["a"][-1]) == (0, length - 1)
    steps = [after - before for before, after in zip(found["a"], found["a"][1:], strict=False)]
    assert max(steps) <= 2 * length / 60 + 1


def test_thinning_prefers_epochs_of_a_metric_that_is_logged_now_and_then() -> None:
    epochs = [float(index) for index in range(300)]
    rare = [value if index % 20 == 7 else math.nan for index, value in enumerate(epochs)]
    found = thin({"epoch": epochs, "rare": rare})
    assert [value for value in found["rare"] if not math.isnan(value)] == [float(index) for index in range(7, 300, 20)]
    assert len(found["epoch"]) <= 60


def test_short_curves_are_left_whole() -> None:
    curves = {"epoch": [0.0, 1.0], "a": [math.nan, 2.0]}
    assert thin(curves) is curves


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"git": {"commit": "abc", "dirty": True}}, "from a tree with changes that are in no commit"),
        ({"git": {"commit": "abc", "dirty": None}}, "from a tree with changes that are in no commit"),
        ({"git": {"commit": None, "dirty": None}}, "unknown commit"),
        ({"git": "main"}, "unknown commit"),
        ({"status": "failed", "reason": "OSError: disk full"}, r"failed \(OSError: disk full\)"),
        ({"code_hash": "older"}, "stale: recipe or code have changed since"),
        ({"overrides": ["--model.lam", "5"]}, "other settings than its recipe's: --model.lam 5"),
    ],
)
def test_unfit_record_is_refused_and_force_publishes_it(
    runs: Path, target: Path, changes: dict[str, Any], reason: str
) -> None:
    add_record(runs, "mini-ce", 1, 0.4, git=CLEAN)
    record = one(runs, **changes)
    with pytest.raises(UserError, match=rf"1 of 2 records .*\n  {record.path}: {reason}\n.*--force"):
        publish(local(runs), target)
    assert not target.exists()
    assert len(publish(local(runs), target, force=True)) == 2


def test_every_refused_record_is_named_with_all_its_reasons(runs: Path, target: Path) -> None:
    failed = {"status": "failed", "reason": "MemoryError: none left"}
    paths = [add_record(runs, "mini", seed, None, overrides=["a"], **failed) for seed in range(2)]
    with pytest.raises(UserError) as refusal:
        publish(local(runs), target)
    reason = "unknown commit, failed (MemoryError: none left), other settings than its recipe's: a"
    assert [f"  {path}: {reason}" in str(refusal.value) for path in paths] == [True, True]


def test_run_that_diverged_is_a_result_and_is_published(runs: Path, target: Path) -> None:
    add_record(runs, "mini", 0, None, git=CLEAN)
    assert len(publish(local(runs), target)) == 1


@pytest.mark.parametrize("recipe", ["mini", "../mini", "toy/..", "toy/a/b", "/mini", "toy/a\\b"])
def test_record_cannot_be_published_outside_the_target(runs: Path, target: Path, recipe: str) -> None:
    record = one(runs)
    bad = Record(record.path, record.data | {"recipe": recipe}, stale=False)
    with pytest.raises(UserError, match="recipe must read <paper>/<recipe>"):
        publish([bad], target, force=True)


def test_of_two_records_of_a_run_the_later_is_published(runs: Path, target: Path) -> None:
    older, newer = one(runs), one(runs.with_name("more"), finished_at="2026-02-01T00:00:00+00:00", cpu_seconds=2.0)
    publish([newer, older], target)
    assert read_published(target)[0][0].cpu_seconds == 2.0


def test_published_record_of_higher_rank_stays(runs: Path, target: Path) -> None:
    older, newer = one(runs), one(runs.with_name("more"), finished_at="2026-02-01T00:00:00+00:00", cpu_seconds=2.0)
    publish([newer], target)
    assert publish([older], target) == []
    assert read_published(target)[0][0].cpu_seconds == 2.0


def test_publishing_leaves_other_files_alone(runs: Path, target: Path) -> None:
    other = target / "toy" / "mini" / "old" / "seed0.json"
    other.parent.mkdir(parents=True)
    other.write_text("mine")
    publish([one(runs)], target)
    assert other.read_text() == "mine"


def test_full_disk_keeps_what_was_published(runs: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish([one(runs)], target)
    before = (target / FILE).read_text()
    newer = one(runs, finished_at="2027-01-01T00:00:00+00:00")

    def no_space(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(UserError, match=r"--publish: cannot write .*seed0.json: No space left"):
        publish([newer], target)
    assert [path.name for path in (target / FILE).parent.iterdir()] == ["seed0.json"]
    assert (target / FILE).read_text() == before


def test_nothing_published_yet(target: Path) -> None:
    assert read_published(target) == ([], [])


def test_target_that_is_no_folder(target: Path) -> None:
    target.write_text("")
    with pytest.raises(UserError, match=r"published records: cannot read .*records: Not a directory"):
        read_published(target)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"seed": 3}, "names another run than its path: seed 3, path says 0"),
        ({"recipe": "toy/mini-ce"}, "names another run than its path: recipe 'toy/mini-ce', path says toy/mini"),
        ({"config_hash": "x"}, "names another run than its path: config_hash 'x', path says c0ffee"),
        ({"schema": 2}, "record of schema 2; this version of noisebench reads schema 1"),
        ({"metrics": []}, "missing or of the wrong type: metrics"),
        ({"curves": [1]}, "curves must map names to lists"),
        ({"curves": {"a": [1]}}, "curves need a list named epoch"),
        ({"curves": {"epoch": [0], "a": ["1"]}}, "curves: a must hold numbers or null"),
        ({"curves": {"epoch": [0], "a": [1, 2]}}, "curves: a has 2 values for 1 epochs"),
        ({"curves": {"epoch": [None], "a": [1]}}, "curves: epoch must hold finite numbers"),
    ],
)
def test_edited_record_is_named_and_skipped(runs: Path, target: Path, changes: dict[str, Any], problem: str) -> None:
    add_record(runs, "mini", 1, 0.6, git=CLEAN)
    one(runs)
    publish(local(runs), target)
    edit(target / FILE, **changes)
    found, problems = read_published(target)
    assert [record.run for record in found] == [("toy/mini", 1)]
    assert problems == [f"{target / FILE}: {problem}"]


def test_merge_conflict_is_named_and_skipped(runs: Path, target: Path) -> None:
    publish([one(runs)], target)
    (target / FILE).write_text("<<<<<<< HEAD\n" + (target / FILE).read_text())
    assert read_published(target)[1][0].startswith(f"{target / FILE}: not readable as JSON")


def test_copied_file_is_named_and_a_temporary_one_is_not(runs: Path, target: Path) -> None:
    publish([one(runs)], target)
    copy = (target / FILE).with_name("seed0 (copy).json")
    copy.write_text((target / FILE).read_text())
    (target / FILE).with_name(".seed0.json.tmp").write_text("{")
    found, problems = read_published(target)
    assert (len(found), problems) == (1, [f"{copy}: not named seed<k>.json"])


def test_curves_of_a_local_run_are_whole(runs: Path) -> None:
    record = one(runs)
    values = [0.1234567890123 + epoch for epoch in range(100)]
    add_curves(record.path, a=values)
    assert curves_of(record) == {"epoch": list(map(float, range(100))), "a": values}


def test_metric_that_was_not_logged_is_nan(runs: Path) -> None:
    record = one(runs)
    record.path.with_name("metrics.csv").write_text("epoch,step,a\n0,80,\n1,160,0.5\n")
    found = curves_of(record)["a"]
    assert math.isnan(found[0])
    assert found[1] == 0.5


def test_run_without_curves_has_none(runs: Path, target: Path) -> None:
    record = one(runs)
    assert curves_of(record) == {}
    publish([record], target)
    assert curves_of(read_published(target)[0][0]) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"metrics.csv, line 1: must name epoch and each metric once, got ''"),
        ("step,a\n", r"metrics.csv, line 1: must name epoch and each metric once, got 'step,a'"),
        ("epoch,a,a\n", r"metrics.csv, line 1: must name epoch and each metric once, got 'epoch,a,a'"),
        ("epoch,a\n0,1\n1,\x00x\n", r"metrics.csv"),
        ("epoch,a\n0,1\n1,x\n", r"metrics.csv, line 3: a must be a number, got 'x'"),
        ("epoch,a\n0,1\n1\n", r"metrics.csv, line 3: must have 2 values as its first line has, got 1"),
        ("epoch,a\n,1\n", r"metrics.csv, line 2: epoch must be a number, got ''"),
        ("epoch,a\nnan,1\n", r"metrics.csv, line 2: epoch must be finite, got 'nan'"),
    ],
)
def test_broken_curves_are_named_and_nothing_is_published(runs: Path, target: Path, text: str, message: str) -> None:
    record = one(runs)
    record.path.with_name("metrics.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        curves_of(record)
    with pytest.raises(UserError, match=message):
        publish([record], target)
    assert not target.exists()
