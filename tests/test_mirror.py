"""W&B: one run whatever the number of starts and processes, a folder to upload later, and no failure that counts."""

import json
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from fit_command import EPOCHS, STEPS, TWO, command, last, record, run_folder
from wandb.proto.wandb_internal_pb2 import Record

from scripts.mirror import wandb_logger

BLOCK = 32768


def records(file: Path) -> Iterator[Record]:
    """What a .wandb file holds: a LevelDB log of protocol buffers behind seven bytes of header."""
    data, position, parts = file.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while position + 7 <= len(data):
        if BLOCK - position % BLOCK < 7:
            position += BLOCK - position % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield Record.FromString(parts)
            parts = b""


def epochs(file: Path) -> list[int]:
    """Epochs whose training loss was logged."""
    rows = [
        {item.key or item.nested_key[0]: json.loads(item.value_json) for item in one.history.item}
        for one in records(file)
        if one.WhichOneof("record_type") == "history"
    ]
    return [row["epoch"] for row in rows if "train/loss" in row]


@pytest.fixture(scope="module")
def stopped_and_resumed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path], list[str]]:
    """Run folder of two processes with two starts, the .wandb files in order, and what the starts said."""
    runs = tmp_path_factory.mktemp("mirror") / "runs"
    words = [*TWO[:-2], "--wandb", "true"]
    first = command(runs, *words, fault=f"term 0 {STEPS + 3}", WANDB_MODE="offline")
    stopped = last(runs, "requeue.ckpt")["noisebench"]["wandb_id"]
    second = command(runs, *words, "--resume", "true", WANDB_MODE="offline")
    assert (first.returncode, second.returncode) == (1, 0), first.stdout + second.stdout
    files = sorted(run_folder(runs).glob("wandb/offline-run-*/*.wandb"))
    return runs, files, [first.stdout, second.stdout, stopped]


@pytest.mark.slow
@pytest.mark.distributed
class TestOneRun:
    def test_both_starts_have_the_id_of_checkpoint_and_record(self, stopped_and_resumed: Any) -> None:
        runs, files, (_, _, stopped) = stopped_and_resumed
        assert [file.name for file in files] == [f"run-{stopped}.wandb"] * 2
        assert {one.run.run_id for file in files for one in records(file) if one.run.run_id} == {stopped}
        assert record(runs)["wandb_id"] == last(runs)["noisebench"]["wandb_id"] == stopped

    def test_one_of_two_processes_writes_and_says_so(self, stopped_and_resumed: Any) -> None:
        _, files, (first, second, _) = stopped_and_resumed
        assert len(files) == 2  # one for each start
        assert [first.count("writing offline"), second.count("writing offline")] == [1, 1]

    def test_each_epoch_is_logged_once(self, stopped_and_resumed: Any) -> None:
        _, files, _ = stopped_and_resumed
        assert [epochs(file) for file in files] == [[0], list(range(1, EPOCHS))]

    def test_folder_can_be_uploaded_later(self, stopped_and_resumed: Any) -> None:
        _, files, _ = stopped_and_resumed
        words = [sys.executable, "-m", "wandb", "sync", "--dry-run", *(str(file.parent) for file in files)]
        done = subprocess.run(words, capture_output=True, text=True, cwd=files[0].parents[2], timeout=120)
        assert done.returncode == 0, done.stderr
        assert all(f"{file.parent.name}/{file.name}" in done.stdout + done.stderr for file in files)


def test_mirror_that_cannot_start_is_given_up_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    init = wandb.init

    def refuse(**options: Any) -> Any:
        if options.get("mode") != "disabled":
            raise wandb.errors.CommError("no route to host")
        return init(**options)

    monkeypatch.setattr(wandb, "init", refuse)
    monkeypatch.setenv("WANDB_MODE", "online")
    mirror = wandb_logger(tmp_path, "toy seed 0", None)
    mirror.log_hyperparams({"lam": 3.0})
    mirror.log_metrics({"train/loss": 1.0}, step=1)
    assert capsys.readouterr().err.count("warning: W&B failed (CommError: no route to host)") == 1
