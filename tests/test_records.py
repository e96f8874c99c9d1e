"""Reading and writing run records, and choosing those that count for a claim."""

import errno
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from paper_room import add_arms, add_record, claim, write_paper

from callbacks.files import write_record
from scripts import code_hash, recipes
from scripts.aggregate import p_value
from scripts.claims import Claim, load_paper
from scripts.errors import UserError
from scripts.records import evaluate, read_records
from scripts.views import seed_rows


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of runs beside the recipes of paper `toy`."""
    monkeypatch.setattr(recipes, "ROOT", tmp_path / "recipes")
    write_paper(tmp_path / "recipes")
    return tmp_path / "runs"


def toy_claim(**changes: Any) -> Claim:
    write_paper(recipes.ROOT, claim(**changes))
    return load_paper("toy").claims[0]


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_roundtrip(runs: Path) -> None:
    path = add_record(runs, "mini", 4, 0.75, reason="none", cpu_seconds=12.5)
    found, problems = read_records(runs)
    assert problems == []
    assert (found[0].path, found[0].run, found[0].finished, found[0].cpu_seconds) == (path, ("toy/mini", 4), True, 12.5)
    assert found[0].data == json.loads(path.read_text())


def test_non_finite_metrics_are_null_in_the_file(runs: Path) -> None:
    path = add_record(runs, "mini", 0, 0.5, metrics={"a": math.nan, "b": math.inf, "c": 1.0})
    assert json.loads(path.read_text())["metrics"] == {"a": None, "b": None, "c": 1.0}


def test_null_metric_is_read_as_nan(runs: Path) -> None:
    add_record(runs, "mini", 0, 0.5, metrics={"a": math.nan})
    assert math.isnan(read_records(runs)[0][0].metrics["a"])


def test_full_disk_keeps_the_earlier_record_and_nothing_else(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = add_record(runs, "mini", 0, 0.5)
    before = path.read_text()

    def no_space(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        write_record(path.parent, json.loads(before))
    assert (path.read_text(), list(path.parent.iterdir())) == (before, [path])


def test_no_folder_has_no_records(runs: Path) -> None:
    assert read_records(runs) == ([], [])


def test_runs_that_is_no_folder_is_an_error(runs: Path) -> None:
    runs.write_text("")
    with pytest.raises(UserError, match=r"--runs: cannot read .*runs: Not a directory"):
        read_records(runs)


def test_unreadable_folder_below_is_a_problem_and_not_silence(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_record(runs, "mini", 0, 0.5)
    scandir = os.scandir

    def denied(folder: Any) -> Any:
        if Path(folder).name == "toy":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", denied)
    assert read_records(runs) == ([], [f"{runs / 'toy'}: Permission denied"])


def test_other_schema_is_skipped_and_left_alone(runs: Path) -> None:
    path = add_record(runs, "mini", 0, 0.5)
    add_record(runs, "mini", 1, 0.6)
    edit(path, schema=7)
    found, problems = read_records(runs)
    assert [record.run[1] for record in found] == [1]
    assert problems == [f"{path}: record of schema 7; this version of noisebench reads schema 1"]
    assert path.exists()


def test_broken_json_is_skipped(runs: Path) -> None:
    path = add_record(runs, "mini", 0, 0.5)
    path.write_text('{"schema": 1,')
    found, problems = read_records(runs)
    assert found == []
    assert problems[0].startswith(f"{path}: not readable as JSON: Expecting property name")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": "0"}, "seed"),
        ({"metrics": {"acc": "high"}}, "acc"),
        ({"config": None, "overrides": ""}, "overrides, config"),
    ],
)
def test_wrong_field_is_named(runs: Path, changes: dict[str, Any], named: str) -> None:
    path = add_record(runs, "mini", 0, 0.5)
    edit(path, **changes)
    assert read_records(runs) == ([], [f"{path}: missing or of the wrong type: {named}"])


def test_missing_field_is_named(runs: Path) -> None:
    path = add_record(runs, "mini", 0, 0.5)
    data = json.loads(path.read_text())
    del data["code_hash"]
    path.write_text(json.dumps(data))
    assert read_records(runs)[1] == [f"{path}: missing or of the wrong type: code_hash"]


def test_run_that_was_set_aside_does_not_count(runs: Path) -> None:
    path = add_record(runs, "mini", 0, 0.5)
    path.parent.rename(path.parent.with_name("seed0.old1"))
    assert read_records(runs) == ([], [])


def test_unchanged_recipe_and_code_are_not_stale(runs: Path) -> None:
    add_record(runs, "mini", 0, 0.5)
    assert not read_records(runs)[0][0].stale


def test_changed_recipe_makes_stale(runs: Path) -> None:
    add_record(runs, "mini", 0, 0.5)
    (recipes.ROOT / "toy" / "mini.yaml").write_text("name: changed\n")
    assert read_records(runs)[0][0].stale


def test_changed_comment_does_not_make_stale(runs: Path) -> None:
    add_record(runs, "mini", 0, 0.5)
    (recipes.ROOT / "toy" / "mini.yaml").write_text("# other words\nname: mini\n")
    assert not read_records(runs)[0][0].stale


def test_deleted_recipe_makes_stale(runs: Path) -> None:
    add_record(runs, "mini", 0, 0.5)
    (recipes.ROOT / "toy" / "mini.yaml").unlink()
    assert read_records(runs)[0][0].stale


def test_changed_code_makes_stale(runs: Path) -> None:
    add_record(runs, "mini", 0, 0.5, code_hash="0123456789ab")
    assert read_records(runs)[0][0].stale


def test_code_hash_finds_classes_behind_dotted_keys() -> None:
    noise = "datamodules.labels.Symmetric"
    nested = {"data": {"noise": {"class_path": noise}}}
    assert code_hash.code_hash({"data": {"noise.class_path": noise}}) == code_hash.code_hash(nested)
    assert code_hash.code_hash(nested) != code_hash.code_hash({})


def test_code_hash_of_a_half_edited_file_still_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code_hash, "SOURCE", tmp_path)
    file = tmp_path / "callbacks" / "new.py"
    file.parent.mkdir()
    config = {"class_path": "callbacks.new.Thing"}
    file.write_text("class Thing: ...\n")
    before = code_hash.code_hash(config)
    code_hash._imports.cache_clear()
    file.write_text("class Thing(: ...\n")
    assert code_hash.code_hash(config) != before


def test_evaluate_pairs_the_seeds(runs: Path) -> None:
    add_arms(runs, [0.80, 0.82, 0.81], [0.50, 0.51, 0.53])
    result = evaluate(toy_claim(), read_records(runs)[0])
    assert (result.treatment, result.control) == ((0.80, 0.82, 0.81), (0.50, 0.51, 0.53))
    assert (result.verdict.name, result.verdict.effect) == ("reproduced", pytest.approx(0.89 / 3))


def test_factor_scales_the_control(runs: Path) -> None:
    """At most 0.6 times the control: 0.6 * 1.0 - 0.5, 0.6 * 1.1 - 0.6, 0.6 * 1.2 - 0.6."""
    add_arms(runs, [0.5, 0.6, 0.6], [1.0, 1.1, 1.2])
    result = evaluate(toy_claim(direction="less", factor=0.6, margin=0.0), read_records(runs)[0])
    assert result.verdict.effect == pytest.approx((0.1 + 0.06 + 0.12) / 3, abs=1e-12)
    assert result.verdict.name == "reproduced"
    assert result.control == (1.0, 1.1, 1.2)
    assert [row.effect for row in seed_rows(result)] == pytest.approx([0.1, 0.06, 0.12], abs=1e-12)
    # mean 0.28 / 3, sd 0.030551, t^2 = 28, P(T_2 > t) = 1/2 - t / (2 sqrt(2 + t^2)) = 0.0169541
    assert p_value(result) == pytest.approx(0.0169541, abs=1e-7)


def test_control_metric_is_read_from_the_control(runs: Path) -> None:
    add_arms(runs, [0.80, 0.82, 0.81], [0.50, 0.51, 0.53])
    result = evaluate(toy_claim(control_metric="test/acc_best_oracle"), read_records(runs)[0])
    assert result.control == pytest.approx((0.51, 0.52, 0.54))


def test_one_recipe_in_both_arms_is_one_run(runs: Path) -> None:
    add_arms(runs, [0.80, 0.82, 0.81], [])
    same = toy_claim(control="mini.yaml", control_metric="test/acc_best_oracle")
    assert evaluate(same, read_records(runs)[0]).cpu_seconds == 30.0


def test_cost_is_the_sum_over_the_runs_used(runs: Path) -> None:
    add_arms(runs, [0.80, 0.82, 0.81], [0.50, 0.51, 0.53])
    add_record(runs, "full", 0, 0.9)
    assert evaluate(toy_claim(), read_records(runs)[0]).cpu_seconds == 60.0


def test_runs_without_a_record_are_missing_and_to_run(runs: Path) -> None:
    add_arms(runs, [0.80, 0.82, 0.81], [0.50])
    result = evaluate(toy_claim(), read_records(runs)[0])
    assert result.missing == result.to_run == (("toy/mini-ce", 1), ("toy/mini-ce", 2))


def test_record_with_overrides_does_not_count(runs: Path) -> None:
    add_record(runs, "mini", 0, 0.9, overrides=["--model.lam", "5"])
    assert ("toy/mini", 0) in evaluate(toy_claim(), read_records(runs)[0]).missing


def test_diverged_run_stays_failed_and_is_not_run_again(runs: Path) -> None:
    add_arms(runs, [0.80, 0.82, None], [0.50, 0.51, 0.53])
    result = evaluate(toy_claim(), read_records(runs)[0])
    assert (result.failed, result.to_run) == ((("toy/mini", 2),), ())


def test_run_that_failed_for_an_outside_reason_is_to_run(runs: Path) -> None:
    add_arms(runs, [0.80, 0.82], [0.50, 0.51, 0.53])
    add_record(runs, "mini", 2, None, reason="OSError: [Errno 28] No space left on device")
    result = evaluate(toy_claim(), read_records(runs)[0])
    assert result.failed == result.to_run == (("toy/mini", 2),)


def test_finished_run_with_a_nan_metric_counts_as_failed(runs: Path) -> None:
    add_arms(runs, [0.80, 0.82, math.nan], [0.50, 0.51, 0.53])
    result = evaluate(toy_claim(), read_records(runs)[0])
    assert (result.failed, result.verdict.name) == ((("toy/mini", 2),), "inconclusive")


def test_stale_record_counts_is_flagged_and_is_to_run(runs: Path) -> None:
    add_arms(runs, [0.80, 0.82, 0.81], [0.50, 0.51, 0.53])
    add_record(runs, "mini", 1, 0.82, code_hash="0123456789ab")
    result = evaluate(toy_claim(), read_records(runs)[0])
    assert (result.verdict.name, result.stale, result.to_run) == ("reproduced", True, (("toy/mini", 1),))


def test_current_record_comes_before_a_later_stale_one(runs: Path) -> None:
    add_arms(runs, [0.80, 0.82, 0.81], [0.50, 0.51, 0.53])
    later = {"config_hash": "0ther", "code_hash": "0123456789ab", "finished_at": "2026-02-01T00:00:00+00:00"}
    add_record(runs, "mini", 0, 0.1, **later)
    assert evaluate(toy_claim(), read_records(runs)[0]).treatment[0] == 0.80


def test_of_two_current_records_the_latest_counts(runs: Path) -> None:
    add_arms(runs, [0.80, 0.82, 0.81], [0.50, 0.51, 0.53])
    add_record(runs, "mini", 0, 0.7, config_hash="0ther", finished_at="2026-02-01T00:00:00+00:00")
    assert evaluate(toy_claim(), read_records(runs)[0]).treatment[0] == 0.7


def test_unknown_metric_names_claim_record_and_close_names_first(runs: Path) -> None:
    path = add_record(runs, "mini", 0, 0.8, metrics={"a": 1.0, "test/acc_last": 0.8})
    with pytest.raises(UserError) as caught:
        evaluate(toy_claim(metric="test/acc_lst"), read_records(runs)[0])
    assert str(caught.value) == (f"claim 'beats' of toy: no metric 'test/acc_lst' in {path}; it has test/acc_last, a")


def test_stale_record_without_the_metric_is_missing_and_no_error(runs: Path) -> None:
    add_record(runs, "mini", 0, 0.8, metrics={}, code_hash="0123456789ab")
    assert ("toy/mini", 0) in evaluate(toy_claim(), read_records(runs)[0]).missing
