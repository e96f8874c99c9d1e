"""The Weights & Biases mirror of a run."""

import os
import secrets
import sys
from pathlib import Path
from typing import Any

from scripts.checkpoints import read_checkpoint_facts


def wandb_logger(folder: Path, name: str, ckpt_path: str | None) -> Any:
    """A W&B run that never asks: offline without credentials, and the same run again after a resume."""
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb
    from lightning.pytorch.loggers import WandbLogger

    mode = os.environ.get("WANDB_MODE")
    offline = mode == "offline" or (mode is None and not wandb.login(prompt=False, verify=False))
    identity = read_checkpoint_facts(Path(ckpt_path)).get("wandb_id") if ckpt_path else None
    # WandbLogger's own `offline` sets an environment variable that wandb has already read by now
    more: dict[str, Any] = {"mode": "offline"} if offline else {}
    if offline:
        print(f"W&B: no login, writing offline to {folder}/wandb (--wandb false turns it off)", file=sys.stderr)
    return WandbLogger(
        name=name,
        save_dir=folder,
        project="noisebench",
        offline=offline,
        id=identity or secrets.token_hex(4),
        resume="allow",
        **more,
    )
