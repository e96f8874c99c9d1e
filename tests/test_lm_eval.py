"""`noisebench lm-eval` on a Llama of three layers, with one offline task of multiple choice."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from datamodules.facts import NUM_VALUES, KnowledgeFacts
from scripts.__main__ import main
from scripts.trained_lm import load_trained, write_lm_eval

QUIET = ["--wandb", "false", "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of `tiny-llama`, two batches long."""
    pytest.importorskip("peft", reason="pip install 'noisebench[llm]'")
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("lm-eval")
    words = ["--config", "noisefit/tiny-llama", "--runs", str(folder), "--trainer.limit_train_batches", "2"]
    assert main(["fit", *words, *QUIET, "--model.loss_mode", "basefit"]) == 0
    (found,) = folder.glob("*/*/*/seed*")
    return found


def task(folder: Path, count: int) -> Path:
    """The first questions of where people live, each with all sixteen homes to choose from, as a task of lm-eval."""
    folder.mkdir()
    homes = [fact for fact in KnowledgeFacts().facts() if fact["attribute"] == "home"][:count]
    with (folder / "homes.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["question", "answer"])
        table.writerows((f"? home {fact['name']} =", fact["value"].removeprefix("home")) for fact in homes)
    settings: dict[str, Any] = {"task": "homes", "dataset_path": "csv", "test_split": "test"}
    settings |= {
        "dataset_kwargs": {"data_files": {"test": str(folder / "homes.csv")}},
        "output_type": "multiple_choice",
    }
    settings |= {"doc_to_text": "{{question}}", "doc_to_target": "{{answer}}", "target_delimiter": " "}
    settings |= {"doc_to_choice": [f"home{k}" for k in range(NUM_VALUES)], "metric_list": [{"metric": "acc"}]}
    (folder / "homes.yaml").write_text(yaml.safe_dump(settings))
    return folder


def test_choices_are_those_of_the_largest_logit(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval", reason="pip install 'noisebench[eval]'")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    folder, count = task(tmp_path / "tasks", 20), 16
    words = ["--tasks", "homes", "--tasks-folder", str(folder), "--limit", str(count)]
    assert main(["lm-eval", str(run), *words]) == 0
    data, (lm, _) = KnowledgeFacts(), load_trained(run)
    right = 0
    for fact in [fact for fact in data.facts() if fact["attribute"] == "home"][:count]:
        ids = torch.tensor([data.words.index(word) for word in f"? home {fact['name']} =".split()])
        logits = lm(ids[None])[0, -1]
        choices = torch.tensor([data.words.index(f"home{k}") for k in range(NUM_VALUES)])
        right += data.words[int(choices[logits[choices].argmax()])] == fact["value"]
    assert json.loads((run / "lm_eval.json").read_text())["results"]["homes"]["acc,none"] == right / count
    assert json.loads((run / "record.json").read_text())["metrics"]["lm_eval/homes/acc"] == right / count
    assert f"lm_eval/homes/acc  {right / count:.4f}" in capsys.readouterr().out


def test_weights_are_those_of_the_last_checkpoint(run: Path) -> None:
    lm, tokenizer = load_trained(run)
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(value, state[f"lm.{name}"]) for name, value in lm.state_dict().items())
    assert tokenizer("? home name0 =")["input_ids"] == [2, 4, KnowledgeFacts().words.index("name0"), 3]


def test_numbers_go_into_the_record_and_nulls_stay(tmp_path: Path) -> None:
    (tmp_path / "record.json").write_text(json.dumps({"metrics": {"train/loss_last": None, "test/acc_last": 0.5}}))
    results = {"results": {"homes": {"alias": "homes", "acc,none": 0.25, "sample_len": 4, "f1,strict": math.nan}}}
    found = write_lm_eval(tmp_path, results)
    assert found["lm_eval/homes/acc"] == 0.25
    metrics = json.loads((tmp_path / "record.json").read_text())["metrics"]
    expected = {
        "train/loss_last": None,
        "test/acc_last": 0.5,
        "lm_eval/homes/acc": 0.25,
        "lm_eval/homes/f1_strict": None,
    }
    assert metrics == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere", "--tasks", "x"], "RUN must be a run's folder with config.yaml, there is no nowhere/config.yaml"),
        (["nowhere", "--tasks", "x", "--limit", "0"], "--batch-size and --limit must be positive, got 8 and 0"),
        (["nowhere", "--tasks", "x", "--tasks-folder", "no"], "--tasks-folder must be a folder, there is no no"),
    ],
)
def test_wrong_options_are_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lm-eval", *words]) == 1
    assert message in capsys.readouterr().err


def test_an_unknown_task_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lm_eval", reason="pip install 'noisebench[eval]'")
    folder = task(tmp_path / "tasks", 2)
    assert main(["lm-eval", str(run), "--tasks", "houses", "--tasks-folder", str(folder)]) == 1
    assert f"--tasks: no task houses in {folder}" in capsys.readouterr().err


def test_a_run_without_checkpoint_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lm_eval", reason="pip install 'noisebench[eval]'")
    (tmp_path / "config.yaml").write_text((run / "config.yaml").read_text())
    words = ["--tasks", "homes", "--tasks-folder", str(task(tmp_path / "tasks", 2))]
    assert main(["lm-eval", str(tmp_path), *words]) == 1
    assert (
        f"RUN must have a checkpoint, there is no {tmp_path / 'checkpoints' / 'last.ckpt'}" in capsys.readouterr().err
    )
