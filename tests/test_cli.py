"""The command as a user meets it: what it writes, and what it says to bad input."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts import recipes, train
from scripts.__main__ import main
from scripts.errors import UserError
from scripts.options import overrides

ROOT = Path(__file__).parents[1]
SMALL = ["--data.source", "synthetic.SyntheticImages", "--data.source.num_classes", "10", "--data.source.channels", "1"]
SMALL += ["--data.source.size", "28", "--data.source.per_class", "6", "--data.val_fraction", "0.5"]
QUIET = ["--wandb", "false", "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]


def fit(runs: Path, *options: str, recipe: str = "elr/mini-sym40", epochs: int = 1) -> int:
    words = ["fit", "--config", recipe, "--runs", str(runs), "--trainer.max_epochs", str(epochs), *SMALL, *QUIET]
    return main([*words, *options])


def only(runs: Path, name: str) -> Path:
    (path,) = runs.glob(f"*/*/*/seed*/{name}")
    return path


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.strip().splitlines()[-1]


# what it writes


def test_fit_writes_config_metrics_checkpoints_and_record(tmp_path: Path) -> None:
    assert fit(tmp_path, "--seed_everything", "7") == 0
    folder = only(tmp_path, "record.json").parent
    found = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    assert found == ["checkpoints/best.ckpt", "checkpoints/last.ckpt", "config.yaml", "metrics.csv", "record.json"]
    record = json.loads((folder / "record.json").read_text())
    assert (record["status"], record["recipe"], record["seed"]) == ("finished", "elr/mini-sym40", 7)
    assert folder.relative_to(tmp_path) == Path("elr/mini-sym40") / record["config_hash"] / "seed7"
    assert str(tmp_path) not in (folder / "record.json").read_text()


def test_same_settings_go_to_the_same_folder_whatever_the_place_of_data_and_device(tmp_path: Path) -> None:
    words = ["--config", "elr/cifar10-sym40"]
    hashes = {_config_hash([*words, *more]) for more in ([], ["--data.source.root", "x"], ["--trainer.devices", "2"])}
    assert len(hashes) == 1
    assert _config_hash([*words, "--model.lam", "5"]) not in hashes


def test_options_of_place_are_no_overrides() -> None:
    words = [
        "--seed_everything=3",
        "--data.source.root",
        "x",
        "--trainer.devices",
        "2",
        "--model.lam",
        "5",
        "--runs",
        "r",
    ]
    assert overrides(words) == ["--model.lam", "5"]


def _config_hash(words: list[str]) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.RecipeCLI, "instantiate_classes", lambda self: None)
        patch.setattr(train.RecipeCLI, "_run_subcommand", lambda self, name: None)
        patch.setattr(train.RecipeCLI, "_claim_folder", lambda self: None)
        return train.run("fit", words).config_hash


def test_second_fit_refuses_to_touch_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path)
    before = only(tmp_path, "record.json").read_text()
    assert fit(tmp_path) == 1
    assert "holds this run already" in last_line(capsys)
    assert only(tmp_path, "record.json").read_text() == before


def test_overwrite_starts_anew(tmp_path: Path) -> None:
    fit(tmp_path)
    stray = only(tmp_path, "record.json").with_name("stray.txt")
    stray.touch()
    assert fit(tmp_path, "--overwrite", "true") == 0
    assert not stray.exists()


def test_test_and_predict_read_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path)
    ckpt = str(only(tmp_path, "checkpoints/last.ckpt"))
    accuracy = json.loads(only(tmp_path, "record.json").read_text())["metrics"]["test/acc_last"]
    words = ["--config", "elr/mini-sym40", "--ckpt_path", ckpt, *SMALL, *QUIET]
    cli = train.run("test", words)
    assert float(cli.trainer.callback_metrics["test/acc"]) == pytest.approx(accuracy)
    assert main(["predict", *words]) == 0
    assert main(["validate", *words]) == 0


def test_wandb_is_offline_without_login_and_never_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    words = ["--config", "elr/mini-sym40", "--runs", str(tmp_path / "runs"), "--trainer.max_epochs", "1", *SMALL]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    command = [sys.executable, "-m", "scripts", "fit", *words]
    done = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "W&B: no login, writing offline" in done.stderr
    assert only(tmp_path / "runs", "wandb").is_dir()
    checkpoint = torch.load(only(tmp_path / "runs", "checkpoints/last.ckpt"), weights_only=True)
    assert (
        json.loads(only(tmp_path / "runs", "record.json").read_text())["wandb_id"]
        == checkpoint["noisebench"]["wandb_id"]
    )


@pytest.mark.parametrize("words", [["--help"], ["list"], ["leaderboard", "--help"], ["reproduce", "--help"]])
def test_quick_verbs_do_not_import_torch(words: list[str], tmp_path: Path) -> None:
    code = f"import sys; from scripts.__main__ import main\ntry: main({words!r})\nexcept SystemExit: pass\n"
    code += "sys.exit('torch' in sys.modules)"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}
        ).returncode
        == 0
    )


def test_one_batch_is_not_all_batches_whatever_was_imported_before(tmp_path: Path) -> None:
    code = (
        "from typing import Union; import lightning as L\n"
        "L.Trainer.__init__.__annotations__['limit_train_batches'] = Union[float, int, None]\n"
        "from scripts import train\n"
        "train.RecipeCLI.instantiate_classes = train.RecipeCLI._run_subcommand = lambda self, *words: None\n"
        "cli = train.run('fit', ['--config', 'elr/mini-sym40', '--trainer.limit_train_batches', '1'])\n"
        "print(repr(cli.plain['trainer']['limit_train_batches']))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "1", done.stderr


# resume and its guard


def test_resume_with_other_settings_lists_the_differing_keys(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(tmp_path)
    ckpt = str(only(tmp_path, "checkpoints/last.ckpt"))
    assert fit(tmp_path, "--ckpt_path", ckpt, "--model.lam", "5", "--data.noise.rate", "0.2", epochs=2) == 1
    message = last_line(capsys)
    assert "data.noise.rate: 0.4 -> 0.2" in message
    assert "model.lam: 3.0 -> 5.0" in message


def test_resume_on_other_noisy_labels_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path)
    ckpt = str(only(tmp_path, "checkpoints/last.ckpt"))
    assert fit(tmp_path, "--ckpt_path", ckpt, "--seed_everything", "11", epochs=2) == 1
    assert "other noisy labels" in last_line(capsys)


def test_fit_continued_by_ckpt_path_equals_an_undisturbed_fit(tmp_path: Path) -> None:
    fit(tmp_path / "whole", epochs=3)
    fit(tmp_path / "parts", epochs=1)
    ckpt = str(only(tmp_path / "parts", "checkpoints/last.ckpt"))
    fit(tmp_path / "parts", "--ckpt_path", ckpt, epochs=3)
    records = [json.loads(p.read_text()) for p in tmp_path.glob("*/*/*/*/seed10/record.json")]
    metrics = [record["metrics"] for record in records if record["epochs"] == 3]
    assert len(metrics) == 2
    assert metrics[0] == metrics[1]


# bad input: one clear message, exit code 1, nothing earlier lost


FIT = ["fit", "--config", "elr/mini-sym40", "--wandb", "false", "--trainer.enable_progress_bar", "false"]
BAD: dict[str, tuple[list[str], str]] = {
    "unknown verb": (["reproduc", "elr"], "did you mean 'reproduce'?"),
    "unknown recipe": (["fit", "--config", "elr/mini-sym4"], "did you mean elr/mini-sym40"),
    "config without a name": (["fit", "--config"], "--config needs the name of a recipe"),
    "no recipe": (["fit"], "--config is missing; name a recipe"),
    "test without a checkpoint": (["test", *FIT[1:]], "--ckpt_path is missing"),
    "misspelt option": ([*FIT, "--model.lamm", "3"], "--model.lamm is not an option; did you mean lam?"),
    "misspelt option of a part": (
        [*FIT, "--data.noise.rat", "3"],
        "--data.noise.rat is not an option; did you mean rate?",
    ),
    "number expected": ([*FIT, "--model.lam", "much"], "--model.lam must be float, got 'much'"),
    "choice expected": ([*FIT, "--model.reg", "l2"], "--model.reg must be one of 'elr', 'kl', got 'l2'"),
    "noise rate above 1": ([*FIT, "--data.noise.rate", "1.4"], "noise.rate must be in [0, 1], got 1.4"),
    "missing data": ([*FIT, "--config", "elr/cifar10-sym40", "--data.source.root", "/nowhere"], "looked for /nowhere"),
    "missing checkpoint": ([*FIT, "--ckpt_path", "none.ckpt"], "--ckpt_path: no checkpoint none.ckpt"),
    "unknown paper": (["reproduce", "els"], "no paper 'els'; there are "),
    "no paper": (["reproduce"], "name a paper or --all"),
    "unknown claim": (
        ["reproduce", "elr", "--claim", "ce-memorises"],
        "no claim 'ce-memorises'; did you mean ce-memorizes",
    ),
    "one seed": (["reproduce", "elr", "--seeds", "3"], "--seeds must name at least two seeds"),
    "settings to reproduce": (["reproduce", "elr", "--model.lam", "5"], "so it takes no --model.lam 5"),
    "no jobs": (["reproduce", "elr", "--jobs", "0"], "--jobs must be at least 1, got 0"),
    "unknown paper to list": (["list", "els"], "no paper 'els'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_clear_message(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words, message = BAD[case]
    assert main(words) == 1
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err
    assert len(err.strip().splitlines()[-1]) < 600
    assert not list(tmp_path.glob("runs/*/*/*/*/checkpoints/*"))


@pytest.fixture
def read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A runs folder that cannot be written, also for root, whom permissions do not stop."""
    blocked = tmp_path / "runs"
    blocked.mkdir()
    mkdir, touch = Path.mkdir, Path.touch

    def refuse(real: Any) -> Any:
        def call(self: Path, *args: Any, **kwargs: Any) -> None:
            if blocked in (self, *self.parents) and not self.exists():
                raise PermissionError(13, "Permission denied", str(self))
            real(self, *args, **kwargs)

        return call

    monkeypatch.setattr(Path, "mkdir", refuse(mkdir))
    monkeypatch.setattr(Path, "touch", refuse(touch))
    return blocked


@pytest.mark.parametrize("words", [["fit", "--config", "elr/mini-sym40", "--wandb", "false"], ["reproduce", "elr"]])
def test_read_only_runs_folder(words: list[str], read_only: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--runs", str(read_only)]) == 1
    assert f"--runs: cannot write {read_only}" in last_line(capsys)


def test_full_disk_while_training_keeps_the_last_checkpoint(
    tmp_path: Path, full_disk: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(tmp_path)
    ckpt = only(tmp_path, "checkpoints/last.ckpt")
    before = ckpt.read_bytes()
    full_disk(".ckpt")
    assert (
        main(
            [
                "fit",
                "--config",
                "elr/mini-sym40",
                "--runs",
                str(tmp_path),
                "--trainer.max_epochs",
                "2",
                "--ckpt_path",
                str(ckpt),
                *SMALL,
                *QUIET,
                "--checkpoint.dirpath",
                str(ckpt.parent),
            ]
        )
        == 1
    )
    assert "No space left on device" in last_line(capsys)
    assert ckpt.read_bytes() == before


def test_broken_checkpoint_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken.ckpt"
    broken.write_bytes(b"PK\x03\x04 not a zip")
    assert fit(tmp_path / "runs", "--ckpt_path", str(broken)) == 1
    assert f"{broken} is not a readable checkpoint" in last_line(capsys)


# base:


def test_bases_come_first_and_the_recipe_wins(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("trainer: {max_epochs: 1}\nmodel: {lam: 1}\n")
    (tmp_path / "b.yaml").write_text("base: [a.yaml]\nmodel: {lam: 2}\n")
    (tmp_path / "c.yaml").write_text("base: [b.yaml]\ndata: {x: 1}\n")
    documents = recipes.expand(tmp_path / "c.yaml")
    assert documents == [{"trainer": {"max_epochs": 1}, "model": {"lam": 1}}, {"model": {"lam": 2}}, {"data": {"x": 1}}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: [me.yaml]", "leads back to itself: me.yaml -> me.yaml"),
        ("base: [gone.yaml]", "names 'gone.yaml', which is not there"),
        ("base: other.yaml", "must be a list of file names, got 'other.yaml'"),
        ("- 1", "must hold a YAML mapping, got list"),
        ("a: [", "cannot read"),
    ],
)
def test_broken_recipe_is_explained(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "me.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        recipes.expand(tmp_path / "me.yaml")


def test_hash_of_a_recipe_ignores_comments_but_not_bases(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("x: 1\n")
    (tmp_path / "b.yaml").write_text("base: [a.yaml]\ny: 2\n")
    before = recipes.recipe_hash(tmp_path / "b.yaml")
    (tmp_path / "b.yaml").write_text("# more\nbase: [a.yaml]\ny:   2\n")
    assert recipes.recipe_hash(tmp_path / "b.yaml") == before
    (tmp_path / "a.yaml").write_text("x: 3\n")
    assert recipes.recipe_hash(tmp_path / "b.yaml") != before
