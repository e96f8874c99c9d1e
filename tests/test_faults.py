"""What goes wrong outside of the training: processes die, disks are full, files are cut off, clocks jump, W&B ends."""

import signal
import time
from pathlib import Path

import pytest
import torch
from fit_command import EPOCHS, FIT, STEPS, TWO, command, last, record, run_folder

from scripts import train
from scripts.__main__ import main
from scripts.errors import UserError

slow = [pytest.mark.slow, pytest.mark.distributed]


def assert_ends_as(runs: Path, undisturbed: Path) -> None:
    """Metrics, weights, targets and optimizer agree bit for bit, and the run is recorded as finished."""
    assert record(runs)["status"] == "finished"
    assert (run_folder(runs) / "metrics.csv").read_text() == (run_folder(undisturbed) / "metrics.csv").read_text()
    ours, theirs = last(runs), last(undisturbed)
    for name, value in theirs["state_dict"].items():
        assert torch.equal(ours["state_dict"][name], value), name
    assert torch.equal(ours["targets"], theirs["targets"])
    for key, state in theirs["optimizer_states"][0]["state"].items():
        assert torch.equal(ours["optimizer_states"][0]["state"][key]["momentum_buffer"], state["momentum_buffer"])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two processes that nothing disturbs."""
    runs = tmp_path_factory.mktemp("whole") / "runs"
    done = command(runs, *TWO)
    assert done.returncode == 0, done.stdout
    return runs


def resume(runs: Path) -> str:
    done = command(runs, *TWO, "--resume", "true")
    assert done.returncode == 0, done.stdout
    return done.stdout


class TestTwoProcesses:
    pytestmark = slow

    @pytest.mark.parametrize("rank", [0, 1])
    def test_killed_within_a_step(self, rank: int, undisturbed: Path, tmp_path: Path) -> None:
        done = command(tmp_path / "runs", *TWO, fault=f"kill {rank} {STEPS + 3}")
        if rank == 0:
            assert done.returncode == -signal.SIGKILL
        else:
            assert done.returncode in (1, -signal.SIGKILL)  # Lightning kills rank 0 too, if it is still there
        assert last(tmp_path / "runs")["global_step"] == STEPS
        assert "checkpoints/last.ckpt" in resume(tmp_path / "runs")
        assert_ends_as(tmp_path / "runs", undisturbed)

    @pytest.mark.parametrize("rank", [0, 1])
    def test_terminated_within_a_step(self, rank: int, undisturbed: Path, tmp_path: Path) -> None:
        done = command(tmp_path / "runs", *TWO, fault=f"term {rank} {STEPS + 3}")
        assert done.returncode == 1
        assert "stopped by SIGTERM; the same command with --resume true continues" in done.stdout
        assert not (run_folder(tmp_path / "runs") / "record.json").exists()
        # the flag is raised in the 12th step, the ranks compare behind it, and read the result behind the 13th
        assert last(tmp_path / "runs", "requeue.ckpt")["global_step"] == STEPS + 5
        assert "checkpoints/requeue.ckpt" in resume(tmp_path / "runs")
        assert_ends_as(tmp_path / "runs", undisturbed)

    def test_disk_is_full_when_a_checkpoint_is_written(self, undisturbed: Path, tmp_path: Path) -> None:
        done = command(tmp_path / "runs", *TWO, fault=f"full 0 {STEPS}")
        assert done.returncode in (1, -signal.SIGKILL)
        assert "No space left on device" in done.stdout
        assert record(tmp_path / "runs")["reason"].startswith("OSError: [Errno 28] No space left on device")
        assert last(tmp_path / "runs")["global_step"] == STEPS
        resume(tmp_path / "runs")
        assert_ends_as(tmp_path / "runs", undisturbed)

    def test_loss_of_one_rank_is_nan(self, tmp_path: Path) -> None:
        done = command(tmp_path / "runs", *TWO, fault=f"nan 1 {STEPS + 3}")
        assert done.returncode in (1, -signal.SIGKILL)
        found = record(tmp_path / "runs")
        assert found["status"] == "failed"
        assert found["reason"].startswith("NonFiniteLossError: the training loss became NaN or infinite in epoch 1")
        assert last(tmp_path / "runs")["global_step"] == STEPS  # not of the epoch in which it diverged


@pytest.mark.slow
def test_killed_wandb_ends_the_mirror_and_not_the_run(tmp_path: Path) -> None:
    done = command(tmp_path / "runs", fault=f"wandb 0 {STEPS + 3}", WANDB_MODE="offline")
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("warning: W&B failed") == 1
    assert "Traceback" not in done.stdout
    assert (record(tmp_path / "runs")["status"], record(tmp_path / "runs")["epochs"]) == ("finished", EPOCHS)


def test_truncated_checkpoint_is_refused_and_passed_over_when_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.set_num_threads(1)
    words = [*FIT, "--wandb", "false", "--runs"]
    assert main([*words, str(tmp_path / "whole")]) == 0
    assert main([*words, str(tmp_path / "cut")]) == 0
    checkpoints = run_folder(tmp_path / "cut") / "checkpoints"
    best = last(tmp_path / "cut", "best.ckpt")["global_step"]
    broken = checkpoints / "last.ckpt"
    broken.write_bytes(broken.read_bytes()[:5000])
    again = [*words, str(tmp_path / "cut"), "--resume", "true"]
    assert main(again) == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith(f"noisebench fit: error: {broken} is not a readable checkpoint")
    assert message.endswith("; --fallback true continues from best.ckpt, the newest good one")
    assert main([*again, "--fallback", "true"]) == 0
    assert best < EPOCHS * STEPS
    assert_ends_as(tmp_path / "cut", tmp_path / "whole")


class JumpingClock:
    """A wall clock that is set back and forth by a day."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> float:
        self.calls += 1
        return 1.7e9 + 86400 * (-1) ** self.calls


def test_costs_of_a_record_know_nothing_of_the_wall_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    clock, start, cpu = JumpingClock(), time.monotonic(), time.process_time()
    monkeypatch.setattr(time, "time", clock)
    train.run("fit", [*FIT[1:], "--wandb", "false", "--runs", str(tmp_path), "--trainer.max_epochs", "1"])
    found = record(tmp_path)
    assert 0 < found["wall_seconds"] <= time.monotonic() - start + 0.01
    assert 0 < found["cpu_seconds"] <= time.process_time() - cpu + 0.01


def test_end_of_another_process_is_said_in_plain_words() -> None:
    def lose() -> None:
        raise RuntimeError("[gloo/transport/tcp/pair.cc:545] Read error [127.0.0.1]:1: Connection reset by peer. GLHF!")

    with pytest.raises(UserError, match="another process of this run has ended; --resume true continues"):
        train.explained(lose, "elr/mini-sym40")
