"""SIGUSR1: a checkpoint between two steps, and a run that continues as if nothing had happened."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from synthetic import SyntheticImages
from torch import nn

from callbacks.memorization import Memorization
from callbacks.requeue import Requeue
from callbacks.rng import RngState
from callbacks.run_record import RunRecord
from datamodules.images import ImageData
from datamodules.labels import Symmetric
from lightning_modules import elr
from scripts import train
from scripts.checkpoints import LastCheckpoint, newest_checkpoint, own_checkpoint, set_aside
from scripts.errors import UserError

SMALL = SyntheticImages(num_classes=4, channels=1, size=4, per_class=30)
FACTS: dict[str, Any] = {"recipe": "toy/elr", "config": {}, "code_hash": "c0de", "seed": 0}
EPOCHS, STEPS = 3, 6


class SignalAt(Callback):
    """Sends SIGUSR1 to this process during the given steps (counted over the whole run, from 0), on one rank only."""

    def __init__(self, *steps: int, rank: int = 0) -> None:
        self.steps = steps
        self.rank = rank

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step in self.steps and trainer.global_rank == self.rank:
            os.kill(os.getpid(), signal.SIGUSR1)


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(16, 4)
    )


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def step_lr(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)


def plain() -> L.LightningModule:
    return elr.ELR(net, sgd, step_lr)


def plus() -> L.LightningModule:
    return elr.ELRPlus(net, sgd, step_lr, coef_step=10, ema_ramp_steps=20)


def job(folder: Path, *signals: int, build: Any = plain, rank: int = 0, workers: int = 0, **options: Any) -> Any:
    """One start of a run in its folder, as a job would do: continues what is there. Returns module and Trainer."""
    torch.set_num_threads(1)
    L.seed_everything(5)
    checkpoints = folder / "checkpoints"
    start = newest_checkpoint(checkpoints)
    if start is not None:
        # the process that resumes has drawn other numbers before
        torch.rand(7)
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        use_distributed_sampler=False,
        callbacks=[SignalAt(*signals, rank=rank), Memorization(), RngState()],
        **{"max_epochs": EPOCHS, **options},
    )
    trainer.callbacks += [Requeue(checkpoints), RunRecord(folder, FACTS), LastCheckpoint(checkpoints)]
    module = build()
    data = ImageData(
        SMALL,
        16,
        val_fraction=0.2,
        noise=Symmetric(0.4),
        crop=4,
        padding=1,
        flip=True,
        passes=module.num_passes,
        num_workers=workers,
    )
    trainer.fit(module, datamodule=data, ckpt_path=start)
    return module, trainer


def jobs(folder: Path, *signals: int, **options: Any) -> Any:
    """Starts the run again after each signal, until it is through."""
    for step in signals:
        with pytest.raises(SystemExit):
            job(folder, step, **options)
    return job(folder, **options)


def assert_equal_runs(one: tuple[Any, Path], other: tuple[Any, Path]) -> None:
    """Weights, targets, optimizer, random state and metrics agree bit for bit."""
    ours, theirs = (
        torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True) for folder in (one[1], other[1])
    )
    for name, value in theirs["state_dict"].items():
        assert torch.equal(ours["state_dict"][name], value), name
    for name in ("targets", "predicted", "epoch_sums"):
        assert torch.equal(ours[name], theirs[name]), name
    for left, right in zip(ours["optimizer_states"], theirs["optimizer_states"], strict=True):
        assert left["param_groups"] == right["param_groups"]
        for key, state in right["state"].items():
            assert torch.equal(left["state"][key]["momentum_buffer"], state["momentum_buffer"])
    assert torch.equal(ours["rng"][0]["torch"], theirs["rng"][0]["torch"])
    for key, value in theirs["rng"][0]["generators"].items():
        assert torch.equal(ours["rng"][0]["generators"][key], value), key
    assert (one[1] / "metrics.csv").read_text() == (other[1] / "metrics.csv").read_text()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("whole")
    return job(folder), folder


# stop and go on


@pytest.mark.parametrize(
    "steps",
    [(2,), (STEPS - 1,), (STEPS,), (2, 3, STEPS + 1), (STEPS - 1, STEPS + 2, 2 * STEPS)],
    ids=["mid-epoch", "last step of an epoch", "first step of an epoch", "three times", "epoch end, then mid-epoch"],
)
def test_stopped_run_ends_as_an_undisturbed_one(
    steps: tuple[int, ...], undisturbed: tuple[Any, Path], tmp_path: Path
) -> None:
    assert_equal_runs((jobs(tmp_path, *steps), tmp_path), undisturbed)


def test_weight_averages_of_elr_plus_are_complete(tmp_path: Path) -> None:
    whole = job(tmp_path / "whole", build=plus, max_epochs=2), tmp_path / "whole"
    parts = jobs(tmp_path / "parts", 3, 2 * STEPS + 8, build=plus, max_epochs=2), tmp_path / "parts"
    assert_equal_runs(parts, whole)


def test_run_that_counts_steps_continues_too(tmp_path: Path) -> None:
    options = {"max_epochs": -1, "max_steps": 2 * STEPS + 3}
    whole = job(tmp_path / "whole", **options), tmp_path / "whole"
    parts = jobs(tmp_path / "parts", 1, STEPS - 1, STEPS + 3, **options), tmp_path / "parts"
    assert_equal_runs(parts, whole)


def test_part_of_an_epoch_continues_too(tmp_path: Path) -> None:
    whole = job(tmp_path / "whole", limit_train_batches=4), tmp_path / "whole"
    parts = jobs(tmp_path / "parts", 3, 6, limit_train_batches=4), tmp_path / "parts"
    assert_equal_runs(parts, whole)


def test_batches_that_workers_have_prepared_are_not_lost(undisturbed: tuple[Any, Path], tmp_path: Path) -> None:
    assert_equal_runs((jobs(tmp_path, 1, STEPS + 1, workers=1), tmp_path), undisturbed)


def test_sums_of_two_ranks_go_on_in_one() -> None:
    module: Any = plain()
    sums = torch.tensor([[1.0, 2, 3, 4], [10, 20, 30, 40]])
    module.on_load_checkpoint({"targets": torch.zeros(1, 3, 4), "epoch_sums": sums})
    trainer = SimpleNamespace(world_size=1, global_rank=0)
    module.trainer = trainer
    module.on_train_start()
    assert module._sums.tolist() == [11, 22, 33, 44]


@pytest.mark.distributed
def test_two_processes_agree_on_the_step_when_one_sees_the_signal(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    words = [*command, str(tmp_path)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    # the second process sees it in step 8; the ranks compare flags behind step 9, and read the sum behind step 10
    assert f"step {STEPS + 4}: {tmp_path}/parts/checkpoints/requeue.ckpt is written" in done.stdout
    assert_equal_runs((None, tmp_path / "parts"), (None, tmp_path / "whole"))


# when a checkpoint may be written


def test_signal_in_a_step_changes_nothing_until_the_step_is_over(tmp_path: Path) -> None:
    callback = Requeue(tmp_path)
    trainer: Any = SimpleNamespace(world_size=1)
    callback.setup(trainer, plain(), "fit")
    try:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert callback.signalled_at is not None
        assert list(tmp_path.iterdir()) == []
    finally:
        callback.teardown(trainer, plain(), "fit")


def test_no_checkpoint_between_steps_of_the_optimizer(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        # two batches make a step, so global step 1 is batches 2 and 3; the signal comes in the first of them
        job(tmp_path, 1, accumulate_grad_batches=2)
    stored = torch.load(tmp_path / "checkpoints" / "requeue.ckpt", weights_only=True)
    assert stored["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["ready"] == 4


def test_signal_in_the_last_step_of_all_lets_the_run_finish(tmp_path: Path, undisturbed: tuple[Any, Path]) -> None:
    assert_equal_runs((job(tmp_path, EPOCHS * STEPS - 1), tmp_path), undisturbed)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["last.ckpt"]


def test_stopped_run_leaves_no_record(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        job(tmp_path, 2)
    assert not (tmp_path / "record.json").exists()


def test_process_and_module_are_as_before(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    module, _ = job(tmp_path, max_epochs=1)
    assert signal.getsignal(signal.SIGUSR1) == before
    assert "on_train_batch_end" not in vars(module)


# the command


FIT = ["--config", "elr/mini-sym40", "--trainer.max_epochs", "2", "--data.val_fraction", "0.5"]
FIT += ["--data.batch_size", "8"]
FIT += ["--data.source", "synthetic.SyntheticImages", "--data.source.num_classes", "10", "--data.source.channels", "1"]
FIT += ["--data.source.size", "28", "--data.source.per_class", "6", "--wandb", "false"]
FIT += ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]


def test_fit_resumes_in_its_own_folder(tmp_path: Path) -> None:
    whole = train.run("fit", [*FIT, "--runs", str(tmp_path / "whole")]).folder
    parts = [*FIT, "--runs", str(tmp_path / "parts"), "--resume", "true"]
    with pytest.raises(SystemExit):
        train.run("fit", parts, (SignalAt(1),))
    cli = train.run("fit", parts)
    assert Path(cli.ckpt_path).name == "requeue.ckpt"
    assert_equal_runs((None, cli.folder), (None, whole))
    assert json.loads((cli.folder / "record.json").read_text())["status"] == "finished"


def test_fit_without_resume_leaves_a_stopped_run_alone(tmp_path: Path) -> None:
    words = [*FIT, "--runs", str(tmp_path)]
    with pytest.raises(SystemExit):
        train.run("fit", words, (SignalAt(1),))
    with pytest.raises(UserError, match="holds this run already; --resume true continues it"):
        train.run("fit", words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--resume", "true", "--overwrite", "true"], "give it without --ckpt_path and --overwrite"),
        (["--fallback", "true"], "--fallback chooses among the checkpoints that --resume true may continue"),
    ],
)
def test_options_that_contradict_are_refused(words: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        train.run("fit", [*FIT, "--runs", str(tmp_path), *words])


# SLURM


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A scontrol that writes down its arguments; it refuses job 13."""
    script = tmp_path / "bin" / "scontrol"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n[ "$2" != 13 ] || {{ echo disabled >&2; exit 1; }}\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}{os.pathsep}{os.environ['PATH']}")
    return tmp_path / "asked"


@pytest.mark.parametrize(
    ("variables", "name"),
    [
        ({"SLURM_JOB_ID": "12"}, "12"),
        ({"SLURM_JOB_ID": "14", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "2"}, "12_2"),
    ],
)
def test_job_is_requeued_under_its_name(
    variables: dict[str, str], name: str, scontrol: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(SystemExit) as end:
        job(tmp_path / "run", 2)
    assert (end.value.code, scontrol.read_text()) == (0, f"requeue {name}\n")


def test_refused_requeue_says_why_and_is_no_success(
    scontrol: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "13")
    with pytest.raises(SystemExit, match="SLURM did not requeue job 13: disabled; submit the same script again"):
        job(tmp_path / "run", 2)


# which checkpoint continues a run


def checkpoint(folder: Path, name: str, age: int, whole: bool = True) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    facts = {"global_step": 1000 - age, "noisebench": {"code_hash": name}}
    torch.save({**facts, "weights": torch.zeros(1000)}, path)
    if not whole:
        path.write_bytes(path.read_bytes()[:2000])
    os.utime(path, (1000 + age, 1000 + age))  # a clock that went backwards
    return path


@pytest.mark.parametrize(("last", "stopped", "expected"), [(2, 1, "requeue.ckpt"), (1, 2, "last.ckpt")])
def test_checkpoint_after_more_steps_continues_whatever_the_clock_said(
    last: int, stopped: int, expected: str, tmp_path: Path
) -> None:
    checkpoint(tmp_path, "last.ckpt", last)
    checkpoint(tmp_path, "requeue.ckpt", stopped)
    checkpoint(tmp_path, "best.ckpt", 0)
    assert newest_checkpoint(tmp_path) == tmp_path / expected


def test_empty_folder_starts_anew(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None


def test_truncated_checkpoint_is_an_error_that_names_the_way_out(tmp_path: Path) -> None:
    checkpoint(tmp_path, "last.ckpt", 2)
    broken = checkpoint(tmp_path, "requeue.ckpt", 1, whole=False)
    with pytest.raises(UserError, match=rf"{broken} is not a readable .*; --fallback true continues from last.ckpt"):
        newest_checkpoint(tmp_path)


def test_fallback_takes_the_newest_good_one_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = checkpoint(tmp_path, "best.ckpt", 3)
    broken = [checkpoint(tmp_path, name, 1, whole=False) for name in ("last.ckpt", "requeue.ckpt")]
    assert newest_checkpoint(tmp_path, fallback=True) == good
    said = capsys.readouterr().err
    assert all(f"{path} is not a readable checkpoint" in said for path in broken)
    assert said.endswith(f"; continuing from {good}\n")


def test_fallback_without_a_good_one_is_an_error(tmp_path: Path) -> None:
    checkpoint(tmp_path, "last.ckpt", 2, whole=False)
    with pytest.raises(UserError, match="there is no other to fall back to, --overwrite true starts anew"):
        newest_checkpoint(tmp_path, fallback=True)


def test_checkpoint_of_other_code_is_no_start_and_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "seed0"
    folder.mkdir()
    path = checkpoint(folder / "checkpoints", "last.ckpt", 1)
    assert own_checkpoint(path.parent, "last.ckpt") == str(path)
    assert own_checkpoint(path.parent, "other code") is None
    set_aside(folder)
    assert (tmp_path / "seed0.old1" / "checkpoints" / "last.ckpt").exists()
    assert "cannot be continued by this code; kept as seed0.old1, starting anew" in capsys.readouterr().err


if __name__ == "__main__":
    pair: dict[str, Any] = {"rank": 1, "strategy": "ddp", "devices": 2}
    job(Path(sys.argv[1]) / "whole", **pair)
    jobs(Path(sys.argv[1]) / "parts", STEPS + 2, **pair)
