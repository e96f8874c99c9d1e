"""Stop at a step boundary on SIGUSR1 or SIGTERM; SIGUSR1 also puts the SLURM job back into the queue."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

CHECKPOINT = "requeue.ckpt"
ORDER = (0, signal.SIGTERM, signal.SIGUSR1)
"""No signal, then those that are heard; where ranks saw different ones the later counts."""


def job_id() -> str | None:
    """The SLURM job as scontrol names it, `<array job>_<task>` within an array; None outside SLURM."""
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID")


class Requeue(Callback):
    """On SIGUSR1 writes `requeue.ckpt` between two steps, requeues the SLURM job and ends the process.

    SIGTERM does the same without the requeue. It takes the place of Lightning's handler, whose broadcast within the
    handler may meet another collective of the step on the other ranks.

    The handler sets a flag and nothing else: a checkpoint written in it would hold half a step, and its collectives
    would meet those of the step. SLURM sends the signal to every task, but tasks may see it one step apart, so the
    ranks agree: each step starts an asynchronous sum of the flags on a gloo group of its own, and the next step's end
    reads it. All ranks read the same sum after the same step, whatever the device, without a race and without waiting
    for this step's slowest rank. The cost is one small CPU message per step (`tests/benchmarks/test_requeue.py`), and
    the answer is one step late.

    A boundary is the end of a step after which the optimizer has stepped and no validation follows. When the flag is
    raised in an epoch's last step, validation runs first; the epoch's own `last.ckpt` is then the one to resume from.
    Training that is complete is not stopped.

    Outside SLURM the process writes the checkpoint and ends; rank 0, which is the command, with exit code 1.

    Args:
        folder: the run's checkpoints.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / CHECKPOINT
        self.signalled_at: float | None = None
        self._signal = 0
        self._agreed = 0
        self._group: Any = None
        self._work: Any = None
        self._flags: Tensor | None = None
        self._handlers: dict[int, Any] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Installs the handler, and a gloo group where there are several ranks."""
        self._handlers[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, self._on_signal)
        if trainer.world_size > 1:
            self._group = torch.distributed.new_group(backend="gloo")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Appends itself to the module's `on_train_batch_end`, and takes SIGTERM from Lightning."""
        self._handlers[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._on_signal)
        step_end = pl_module.on_train_batch_end

        # Lightning calls the module's hook after those of all callbacks; only behind it the step is complete
        def then_check(outputs: Any, batch: Any, batch_idx: int) -> None:
            step_end(outputs, batch, batch_idx)
            self._after_step(trainer, batch_idx)

        pl_module.on_train_batch_end = then_check  # type: ignore[method-assign]

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leaves the module as it was; the checkpoint is of no more use."""
        vars(pl_module).pop("on_train_batch_end", None)
        if self._work is not None:
            self._work.wait()
        if trainer.is_global_zero and self.path.exists():
            shutil.rmtree(self.path) if self.path.is_dir() else self.path.unlink()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Puts the former handlers back."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leaves between two epochs: `last.ckpt` has just been written."""
        if self._agreed:
            self._leave(trainer, self.path.with_name("last.ckpt"))

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.signalled_at is None:
            self.signalled_at = time.monotonic()
        self._signal = max(self._signal, ORDER.index(number))

    def _after_step(self, trainer: L.Trainer, batch_idx: int) -> None:
        self._agreed = self._agreed or self._agree(trainer)
        if not self._agreed or trainer.global_step == trainer.max_steps:
            return
        steps = batch_idx + 1
        counted = trainer.fit_loop.total_batch_idx + 1 if trainer.check_val_every_n_epoch is None else steps
        validates = trainer.val_check_batch is not None and counted % trainer.val_check_batch == 0
        ends = steps == trainer.num_training_batches
        if steps % trainer.accumulate_grad_batches == 0 and not validates and not ends:
            trainer.save_checkpoint(self.path)
            self._leave(trainer, self.path)

    def _agree(self, trainer: L.Trainer) -> int:
        """Place in ORDER of what any rank had seen one step ago."""
        if self._group is None:
            return self._signal
        agreed = 0
        if self._work is not None and self._flags is not None:
            self._work.wait()
            agreed = int(self._flags.item())
        self._flags = torch.tensor([self._signal])
        op = torch.distributed.ReduceOp.MAX
        self._work = torch.distributed.all_reduce(self._flags, op, group=self._group, async_op=True)
        return agreed

    def _leave(self, trainer: L.Trainer, path: Path) -> None:
        # requeueing sends SIGTERM to tasks that are about to end anyway
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if not trainer.is_global_zero:
            # a failure of one rank makes launchers kill the others, and rank 0 has something left to do
            raise SystemExit(0)
        name = signal.Signals(ORDER[self._agreed]).name
        since = "" if self.signalled_at is None else f" {time.monotonic() - self.signalled_at:.2f} s after {name}"
        print(f"step {trainer.global_step}: {path} is written{since}", flush=True)
        job = job_id()
        if job is None or name == "SIGTERM":
            raise SystemExit(f"stopped by {name}; the same command with --resume true continues")
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr or done.stdout).strip()
            raise SystemExit(f"SLURM did not requeue job {job}: {reason}; submit the same script again to continue")
        print(f"job {job} is requeued", flush=True)
        raise SystemExit(0)
