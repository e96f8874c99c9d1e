"""What the agreement on SIGUSR1 costs a step of two processes, and how long the checkpoint of a mini run takes."""

import os
import statistics
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.multiprocessing as mp

from callbacks.requeue import Requeue

STEPS = 1000
STEP_SECONDS = 0.002


def agree(rank: int, store: str, out: str) -> None:
    """Times the agreement between steps of 2 ms; rank 0 writes the median in microseconds."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    trainer: Any = SimpleNamespace(world_size=2)
    callback = Requeue(Path(out).parent)
    callback.setup(trainer, torch.nn.Module(), "fit")  # type: ignore[arg-type]
    seconds = []
    for _ in range(STEPS):
        time.sleep(STEP_SECONDS)
        start = time.perf_counter()
        callback._agree(trainer)
        seconds.append(time.perf_counter() - start)
    callback.on_train_end(SimpleNamespace(is_global_zero=False), torch.nn.Module())  # type: ignore[arg-type]
    torch.distributed.destroy_process_group()
    if rank == 0:
        Path(out).write_text(f"{statistics.median(seconds) * 1e6}")


def test_agreement_costs_less_than_a_millisecond_per_step(tmp_path: Path) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    mp.spawn(agree, (str(tmp_path / "store"), str(tmp_path / "out")), nprocs=2)
    microseconds = float((tmp_path / "out").read_text())
    print(f"\nagreement: {microseconds:.0f} us per step (median of {STEPS}, two gloo processes)")
    assert microseconds < 1000
