"""One process at a time trains in a run's folder."""

import multiprocessing
import os
import signal
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from scripts.__main__ import main
from scripts.errors import UserError
from scripts.run_folder import lock_run

SMALL = ["fit", "--config", "elr/mini-sym40", "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "1"]
SMALL += ["--trainer.limit_val_batches", "1", "--wandb", "false", "--trainer.enable_progress_bar", "false"]


def hold(folder: Path, said: Connection) -> None:
    lock = lock_run(folder)
    said.send(lock.name)
    signal.pause()


@pytest.fixture
def holder(tmp_path: Path) -> BaseProcess:
    """Another process that holds the lock of `run`."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=hold, args=(tmp_path / "run", there), daemon=True)
    process.start()
    assert here.poll(60)
    return process


def test_second_process_is_refused_and_told_who_is_there(holder: BaseProcess, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"run is in use by process {holder.pid} on "):
        lock_run(tmp_path / "run")
    holder.kill()


def test_killed_process_leaves_no_lock_behind(holder: BaseProcess, tmp_path: Path) -> None:
    os.kill(holder.pid or 0, signal.SIGKILL)
    holder.join()
    assert f"process {os.getpid()} on" in Path(lock_run(tmp_path / "run").name).read_text()


def test_closed_lock_can_be_taken_again(tmp_path: Path) -> None:
    lock_run(tmp_path / "run").close()
    lock_run(tmp_path / "run").close()


def test_fit_refuses_a_folder_in_use_and_touches_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--runs", str(tmp_path)]) == 0
    (record,) = tmp_path.rglob("record.json")
    before = {path: path.stat().st_mtime_ns for path in record.parent.rglob("*")}
    with lock_run(record.parent):
        assert main([*SMALL, "--runs", str(tmp_path), "--overwrite", "true"]) == 1
    assert f"{record.parent} is in use by process {os.getpid()}" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in record.parent.rglob("*")} == before
    assert main([*SMALL, "--runs", str(tmp_path), "--overwrite", "true"]) == 0


def test_resume_of_a_finished_run_leaves_its_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The record names the commit that trained the run, not the one from which somebody looked at it again."""
    assert main([*SMALL, "--runs", str(tmp_path)]) == 0
    (record,) = tmp_path.rglob("record.json")
    before = {path: path.read_bytes() for path in record.parent.rglob("*") if path.is_file()}
    assert main([*SMALL, "--runs", str(tmp_path), "--resume", "true"]) == 0
    assert {path: path.read_bytes() for path in record.parent.rglob("*") if path.is_file()} == before
    assert f"run finished: {record.parent}" in capsys.readouterr().out
