"""The Weights & Biases mirror of a run."""

import contextlib
import os
import secrets
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from scripts.checkpoints import read_checkpoint_facts


class Mirror(WandbLogger):
    """Where W&B fails (its process is killed, no network at the start), the mirror ends and the training goes on."""

    @property
    def experiment(self) -> Any:
        """W&B's run; one that does nothing on other ranks and after a failure."""
        return self._or_end(lambda: WandbLogger.experiment.fget(self))  # type: ignore[attr-defined]

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """As WandbLogger's."""
        self._or_end(lambda: WandbLogger.log_hyperparams(self, *args, **kwargs))

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """As WandbLogger's."""
        self._or_end(lambda: WandbLogger.log_metrics(self, metrics, step))

    def _or_end(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except Exception as error:  # a mirror has no failure that is worth the run
            import wandb

            print(f"warning: W&B failed ({type(error).__name__}: {error}); the run goes on without it", file=sys.stderr)
            # else its own hook at exit would meet the same failure
            with contextlib.suppress(Exception):
                wandb.teardown()
            self._experiment = wandb.init(mode="disabled")
            return self._experiment


def wandb_logger(folder: Path, name: str, ckpt_path: str | None) -> Mirror:
    """A W&B run that never asks: offline without credentials, and the same run again after a resume."""
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    mode = os.environ.get("WANDB_MODE")
    offline = mode == "offline" or (mode is None and not wandb.login(prompt=False, verify=False))
    identity = read_checkpoint_facts(Path(ckpt_path)).get("wandb_id") if ckpt_path else None
    # WandbLogger's own `offline` sets an environment variable that wandb has already read by now
    more: dict[str, Any] = {"mode": "offline"} if offline else {}
    if offline and getattr(rank_zero_only, "rank", 0) in (None, 0):
        print(f"W&B: no login, writing offline to {folder}/wandb (--wandb false turns it off)", file=sys.stderr)
    return Mirror(
        name=name,
        save_dir=folder,
        project="noisebench",
        offline=offline,
        id=identity or secrets.token_hex(4),
        resume="allow",
        **more,
    )
