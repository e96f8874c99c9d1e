"""Cost of a fine-tuning step: against a loop of transformers and peft by hand, and what noise adds to it.

CPU time of one thread, in alternating epochs of one process; reported are ratios of medians.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from datamodules.facts import KnowledgeFacts
from lightning_modules import noisefit
from lightning_modules.networks.pretrained_lm import PretrainedLM

pytest.importorskip("peft", reason="pip install 'noisebench[llm]'")

EPOCHS = 7
STEPS = 30
CONFIG = {"vocab_size": 272, "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 6}
CONFIG |= {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64}
ARMS: dict[str, dict[str, Any]] = {
    "basefit": {"loss_mode": "basefit"},
    "ce_noisy": {"loss_mode": "ce_noisy", "layers": [4, 5]},
    "full": {"layers": [4, 5]},
    "full, shared prefix": {"layers": [4, 5], "prefix_sharing": True},
}
FORWARDS = {"basefit": 1, "ce_noisy": 1, "full": 3, "full, shared prefix": (5 + 3 * 1) / 6}
"""Passes through a layer, mean over layers: noise in layers 4 and 5 is added to their outputs, so layer 5 alone runs
three times where the prefix is shared."""


def lm() -> PretrainedLM:
    return PretrainedLM(config=CONFIG)


def data() -> KnowledgeFacts:
    return KnowledgeFacts(num_tuned=64, batch_size=32, passes=STEPS // 2)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)


class Turns(Callback):
    """Times each epoch of the Trainer, and after it one of something else."""

    def __init__(self, other: Callable[[], object]) -> None:
        self.other = other
        self.ours: list[float] = []
        self.others: list[float] = []

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.start = time.process_time()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.ours.append(time.process_time() - self.start)
        start = time.process_time()
        self.other()
        self.others.append(time.process_time() - start)


class PlainLoop:
    """One epoch by hand: model of peft, loss of transformers, clipping, AdamW."""

    def __init__(self) -> None:
        self.model = lm().model.train()
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = adamw(self.trained)
        self.data = data()
        self.data.setup()

    def __call__(self) -> None:
        for batch in self.data.train_dataloader():
            loss = self.model(input_ids=batch["input_ids"], labels=batch["labels"], use_cache=False).loss
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
            self.optimizer.step()


def trained(folder: Path, other: Callable[[], object], **arm: Any) -> Turns:
    turns = Turns(other)
    module = noisefit.NoiseFiT(lm, adamw, probe_draws=0, **arm)
    trainer = L.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        default_root_dir=folder,
        callbacks=[turns],
    )
    trainer.fit(module, datamodule=data())
    return turns


def median(seconds: list[float]) -> float:
    """Milliseconds of a step; the first epoch warms up."""
    return 1e3 * statistics.median(seconds[1:]) / STEPS


def test_control_against_a_plain_loop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_num_threads(1)
    L.seed_everything(0)
    turns = trained(tmp_path, PlainLoop(), loss_mode="basefit")
    ours, plain = median(turns.ours), median(turns.others)
    with capsys.disabled():
        print(f"\nstep of plain fine-tuning: {ours:.2f} ms, of a plain loop {plain:.2f} ms, ratio {ours / plain:.3f}")


def test_noise_against_the_count_of_forwards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_num_threads(1)
    L.seed_everything(0)
    found = {name: median(trained(tmp_path, lambda: None, **arm).ours) for name, arm in ARMS.items()}
    with capsys.disabled():
        for name, cost in found.items():
            ratio = cost / found["basefit"]
            print(f"\n{name}: {cost:.2f} ms, {ratio:.2f} times plain fine-tuning, {FORWARDS[name]:.2f} passes", end="")
        print()
