"""The first step at which a logged metric reaches a value."""

import math
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint


class Milestones(Checkpoint):
    """Logs `reached/<name>`, the optimizer step after whose epoch a metric first was at least a value, and its log2.

    A `Checkpoint` only because those come after the module, and so see what it logs at an epoch's end. Before the value
    is reached nothing is logged, so that a run which never gets there has no such metric. Works on any module; the
    resolution is an epoch.

    Args:
        reach: name -> [metric, value], e.g. `{interpolated: [train/acc, 0.99]}`.
    """

    def __init__(self, reach: dict[str, tuple[str, float]]) -> None:
        self.reach = reach
        self.steps: dict[str, int] = {}

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Looks at the epoch's metrics."""
        for name, (metric, value) in self.reach.items():
            if metric not in trainer.callback_metrics:
                known = ", ".join(trainer.callback_metrics)
                raise ValueError(f"Milestones.reach: {name} needs the metric {metric!r}; logged are {known}")
            if name not in self.steps and float(trainer.callback_metrics[metric]) >= value:
                self.steps[name] = trainer.global_step
        found = {f"reached/{name}": float(step) for name, step in self.steps.items()}
        pl_module.log_dict(found | {f"{key}_log2": math.log2(step) for key, step in found.items()})

    def state_dict(self) -> dict[str, Any]:
        """Milestones so far."""
        return {"steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes them back."""
        self.steps = dict(state_dict["steps"])
