"""Random numbers: one generator per (seed, rank, purpose), and their state in checkpoints."""

import hashlib
import os
import random
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback


def run_seed() -> int:
    """Seed of this run: what `seed_everything` was last given, 0 if it was never called."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))


def seed_for(purpose: str, *, seed: int | None = None, rank: int = 0) -> int:
    """Independent 63-bit seed for one purpose.

    Args:
        purpose: what the draws are for, e.g. `"order"`; different purposes give independent streams.
        seed: base seed; None takes `run_seed()`.
        rank: 0 for draws that all ranks must share (data, initial weights), the global rank for draws of the step.
    """
    text = f"{run_seed() if seed is None else seed}/{rank}/{purpose}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def make_generator(
    purpose: str, *, seed: int | None = None, rank: int = 0, device: torch.device | str = "cpu"
) -> torch.Generator:
    """Generator seeded from (seed, rank, purpose); arguments as in `seed_for`."""
    return torch.Generator(device=device).manual_seed(seed_for(purpose, seed=seed, rank=rank))


class RngState(Callback):
    """Saves every rank's random state in the checkpoint and restores it, so that a resumed run is bit-equal on CPU.

    Covers Python, NumPy, torch (CPU and the rank's CUDA device) and each `torch.Generator` that is an attribute of the
    LightningModule, of one of its submodules or of the datamodule. Plain Lightning saves none of these.
    """

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Gathers the states of all ranks into `checkpoint["rng"]`; plain tensors, tuples and numbers only."""
        numpy_state: Any = np.random.get_state(legacy=True)
        state: dict[str, Any] = {
            "python": random.getstate(),
            "numpy": (numpy_state[0], torch.from_numpy(numpy_state[1].astype(np.int64)), *numpy_state[2:]),
            "torch": torch.get_rng_state(),
            "generators": {name: gen.get_state() for name, gen in _generators(trainer, pl_module).items()},
        }
        if torch.cuda.is_available():
            state["cuda"] = torch.cuda.get_rng_state(pl_module.device)
        states: list[Any] = [state]
        if trainer.world_size > 1:
            states = [None] * trainer.world_size
            torch.distributed.all_gather_object(states, state)
        checkpoint["rng"] = states

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keeps this rank's state until training starts; a rank that the checkpoint does not know starts fresh."""
        states = checkpoint.get("rng", [])
        self._pending = states[trainer.global_rank] if trainer.global_rank < len(states) else None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restores after all set-up, so that no draw of the set-up shifts the streams."""
        state = getattr(self, "_pending", None)
        if state is None:
            return
        self._pending = None
        random.setstate(_tuples(state["python"]))
        name, keys, *rest = state["numpy"]
        np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
        torch.set_rng_state(state["torch"])
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"], pl_module.device)
        for key, generator in _generators(trainer, pl_module).items():
            if key in state["generators"]:
                generator.set_state(state["generators"][key])


def _generators(trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, torch.Generator]:
    owners: dict[str, object] = {f"model.{name}": module for name, module in pl_module.named_modules()}
    owners["data"] = getattr(trainer, "datamodule", None)
    return {
        f"{owner}.{name}": value
        for owner, thing in owners.items()
        if thing is not None
        for name, value in vars(thing).items()
        if isinstance(value, torch.Generator)
    }


def _tuples(value: Any) -> Any:
    """Python's `random.setstate` insists on tuples, also nested."""
    return tuple(_tuples(v) for v in value) if isinstance(value, list | tuple) else value
