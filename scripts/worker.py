"""What a worker process of `reproduce` does. Imports torch only once it works."""

import importlib
import os
import threading
from multiprocessing import parent_process
from typing import Any

_events: Any = None


def quiet(events: Any) -> None:
    """Starts a worker: one thread per run, no chatter, and it ends with its parent even if that is killed."""
    global _events
    _events = events
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"
    parent = parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)


def train_one(number: int, recipe: str, seed: int, runs: str, wandb: bool, where: list[str]) -> str | None:
    """Trains one recipe with one seed.

    Args:
        number: position among the runs, for progress events `(number, epochs done)`.
        recipe, seed, runs, wandb: as the options of `noisebench fit`.
        where: further words of that command line: devices, place of data.

    Returns:
        None when the run finished, else one line that says why not. Its record, if it got so far, says `failed`.
    """
    import logging
    import warnings

    import torch
    from lightning.pytorch.callbacks import LambdaCallback

    from scripts import train
    from scripts.errors import UserError

    torch.set_num_threads(1)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning.*")

    def tell(trainer: Any, module: Any) -> None:
        _events.put((number, trainer.current_epoch + 1))

    words = ["--config", recipe, "--seed_everything", str(seed), "--runs", runs, "--wandb", str(wandb).lower()]
    words += ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false", *where]
    ticker = LambdaCallback(on_train_epoch_end=tell)
    try:
        train.explained(lambda: train.run("fit", words, (ticker,), resume=True), recipe)
    except UserError as error:
        return str(error)
    finally:
        if wandb:
            # or the next run of this process would write into this one's W&B run
            importlib.import_module("wandb").finish()
    return None
