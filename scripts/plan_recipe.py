"""A recipe built on the meta device, and the bytes of its training step under each setting."""

import logging
import math
import os
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import lightning as L
import torch
from jsonargparse import ArgumentParser, Namespace
from torch import Tensor, nn

from callbacks.ema import Ema
from lightning_modules.sharding import find_blocks
from scripts import memory, recipes
from scripts.errors import UserError
from scripts.plan import Row, Setting
from scripts.train import RecipeCLI, explained

PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")


class PlannedRecipe:
    """Module, optimizer and batch of a recipe without values.

    Args:
        module: on the meta device, set up, in training mode.
        trainer: of the recipe, on one CPU process.
        batch: a training batch, tensors of any number of rows on the meta device.
        batch_size: global batch.
        steps: training batches per epoch.
    """

    def __init__(
        self, module: L.LightningModule, trainer: L.Trainer, batch: dict[str, Any], batch_size: int, steps: int
    ) -> None:
        if trainer.precision not in PRECISIONS:
            raise UserError(f"plan knows trainer.precision {', '.join(PRECISIONS)}; the recipe has {trainer.precision}")
        self.module, self.batch, self.batch_size, self.steps = module, batch, batch_size, steps
        self.precision, self.accumulate = str(trainer.precision), trainer.accumulate_grad_batches
        self.epochs = trainer.max_epochs
        if self.precision == "bf16-true":
            module.to(torch.bfloat16)
        self.parameters = list(module.parameters())
        self.trained = [p for p in self.parameters if p.requires_grad]
        nets = [m for m in module.modules() if hasattr(m, "block_names")]
        self.blocks = [block for net in nets for block in find_blocks(net)]
        blocks = [_parameters([block]) for block in self.blocks]
        # a net that states no blocks is gathered whole
        rests = [_parameters([net]) - _parameters(find_blocks(net)) for net in nets] or [_parameters([module])]
        self.rest, self.largest_block = max(rests), max(blocks, default=0)
        self.optimizer = memory.optimizer_state(_optimizers(module))
        own = {id(t) for t in (*self.parameters, *module.buffers())}
        self.state = [t for t in vars(module).values() if isinstance(t, Tensor) and id(t) not in own]
        self._measured: dict[tuple[int, torch.dtype], memory.Activations] = {}

    def describe(self) -> str:
        """Parameters and steps."""
        trained, averaged = (sum(p.numel() for p in part) for part in (self.trained, self.parameters))
        more = f" (+ {averaged - trained:,} averaged or frozen)" if averaged > trained else ""
        a_step = -(-self.steps // self.accumulate)
        epochs = f", {a_step * self.epochs:,} in {self.epochs} epochs" if self.epochs and self.epochs > 0 else ""
        return f"{trained:,} trained parameters{more}; {a_step:,} optimizer steps per epoch{epochs}"

    def row(self, setting: Setting, processes: int) -> Row:
        """Bytes per process under one setting."""
        processes = 1 if setting.strategy == "1 device" else processes
        batch = self.batch_size // processes // setting.accumulate
        half = setting.precision.startswith("bf16")
        dtype = torch.bfloat16 if half else torch.float32
        found = self._activations(batch, dtype)
        shards = processes if setting.strategy == "FSDP2" else 1
        weights, gradients, optimizer = (
            memory.shard_bytes(part, shards) for part in (self.parameters, self.trained, self.optimizer)
        )
        return Row(
            setting,
            batch,
            weights + memory.tensor_bytes(self.module.buffers()),
            gradients,
            optimizer,
            memory.tensor_bytes(self.state),
            found.bytes(setting.checkpointed) + memory.tensor_bytes(self._batch_of(batch, dtype)[1]),
            self._of_strategy(setting),
        )

    def _of_strategy(self, setting: Setting) -> int:
        """Bytes that the strategy and the precision add to shards and activations."""
        mixed = setting.precision == "bf16-mixed"
        width = 2 if setting.precision.startswith("bf16") else 4
        if setting.strategy == "FSDP2":
            # gathered: the rest of the net, a block, and the next one on its way; then the float32 gradient of a unit
            return (self.rest + 2 * self.largest_block) * width + max(self.rest, self.largest_block) * 4
        buckets = memory.tensor_bytes(self.trained) if setting.strategy == "DDP" else 0
        # autocast keeps bf16 copies of the matrices from the forward to the backward
        return buckets + (2 * sum(p.numel() for p in self.trained if p.ndim > 1) if mixed else 0)

    def _batch_of(self, rows: int, dtype: torch.dtype) -> tuple[dict[str, Any], list[Tensor]]:
        batch = {
            name: torch.empty(
                (rows, *value.shape[1:]), dtype=dtype if value.is_floating_point() else value.dtype, device="meta"
            )
            if isinstance(value, Tensor)
            else value
            for name, value in self.batch.items()
        }
        return batch, [value for value in batch.values() if isinstance(value, Tensor)]

    def _activations(self, rows: int, dtype: torch.dtype) -> memory.Activations:
        if (rows, dtype) in self._measured:
            return self._measured[rows, dtype]
        own = self.trained[0].dtype
        batch, tensors = self._batch_of(rows, dtype)
        self.module.to(dtype)
        try:
            found = memory.activations(lambda: self.module.training_step(batch, 0), self.module, tensors, self.blocks)
        except (RuntimeError, NotImplementedError) as error:
            name = type(self.module).__name__
            raise UserError(
                f"plan cannot follow {name}.training_step without values: {error}".splitlines()[0]
            ) from error
        finally:
            self.module.to(own)
        self._measured[rows, dtype] = found
        return found


class _PlanCLI(RecipeCLI):
    """Builds the model on the meta device and the data module as it is; runs and writes nothing."""

    def _claim_folder(self) -> None:
        """A plan has no folder."""

    def _run_subcommand(self, subcommand: str) -> None:
        """A plan does not train."""

    def instantiate_classes(self) -> None:
        """The model without values, and without pretrained weights."""
        config: Namespace = self.config[self.verb]
        for key in [key for key in config.model.keys() if key.endswith(".pretrained")]:  # noqa: SIM118
            config.model[key] = False
        with torch.device("meta"):
            super().instantiate_classes()
        # its constants must have values
        parser = ArgumentParser()
        parser.add_subclass_arguments(L.LightningDataModule, "data")
        self.datamodule = parser.instantiate_classes(Namespace(data=config.data)).data


def build(name: str, overrides: list[str]) -> Any:
    """The recipe's module on the meta device, its trainer on one CPU process and its data module; nothing runs."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    for package in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(package).setLevel(logging.ERROR)
    words = [*overrides, "--wandb", "false", "--trainer.accelerator", "cpu", "--trainer.devices", "1"]
    words += ["--trainer.strategy", "auto", "--trainer.num_nodes", "1"]
    return explained(lambda: _PlanCLI(recipes.find_recipe(name), "fit", words, []), name)


def plan_recipe(
    name: str, overrides: list[str], shape: str | None, examples: int | None, classes: int | None
) -> PlannedRecipe:
    """Builds a recipe for planning.

    Args:
        name: of the recipe.
        overrides: further options of `noisebench fit`.
        shape, examples, classes: of the training data where these are not at hand, all or none of them.

    Raises:
        UserError: an option is wrong, the data are not at hand, or the module cannot be followed without values.
    """
    cli = build(name, overrides)
    module, trainer = cli.model, cli.trainer
    module.trainer, trainer.training = trainer, True
    if (shape, examples, classes) == (None, None, None):
        data, batch, steps = _real(cli.datamodule, trainer)
    else:
        data, batch, steps = _stand_in(cli.datamodule, shape, examples, classes)
    trainer.datamodule = data
    trainer.fit_loop.max_batches = steps
    # nothing collects what is logged
    module.log = module.log_dict = lambda *args, **kwargs: None
    module.to("meta")
    with torch.device("meta"):
        explained(lambda: module.setup("fit"), name)
        for callback in trainer.callbacks:
            if isinstance(callback, Ema):
                callback.setup(trainer, module, "fit")
        module.train()
        module.on_train_start()
        module.on_train_epoch_start()
    return PlannedRecipe(module, trainer, batch, int(data.batch_size), steps)


def _real(data: Any, trainer: L.Trainer) -> tuple[Any, dict[str, Any], int]:
    """The recipe's data, its first batch without values, batches per epoch."""
    data.trainer = trainer
    try:
        data.setup("fit")
        loader = data.train_dataloader()
        batch = data.on_after_batch_transfer(next(iter(loader)), 0)
    except (OSError, ValueError, RuntimeError) as error:
        hint = "give --shape, --examples and --classes to plan without the data"
        raise UserError(f"the training data are not at hand: {error}; {hint}") from error
    limit = trainer.limit_train_batches
    steps = min(len(loader), limit) if isinstance(limit, int) else math.ceil(len(loader) * limit)
    return data, {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in batch.items()}, steps


def _stand_in(data: Any, shape: str | None, examples: int | None, classes: int | None) -> tuple[Any, Any, int]:
    """Data of the stated sizes for image modules."""
    if shape is None or examples is None or classes is None:
        raise UserError(f"--shape, --examples and --classes go together, got {shape}, {examples} and {classes}")
    try:
        sizes = [int(size) for size in shape.split(",")]
    except ValueError as error:
        raise UserError(f"--shape must be numbers with commas, e.g. 3,224,224, got {shape!r}") from error
    passes = getattr(data, "passes", 1)
    stand_in = SimpleNamespace(
        batch_size=data.batch_size,
        num_train=examples,
        num_classes=classes,
        passes=passes,
        train_labels=dict,
    )
    numbers = {name: torch.empty(1, dtype=torch.int64, device="meta") for name in ("label", "clean_label", "index")}
    batch = {"image": torch.empty((1, *sizes), device="meta"), **numbers}
    per_pass = getattr(data, "batches_per_epoch", None) or -(-examples // data.batch_size)
    return stand_in, batch | ({"pass": 0} if passes > 1 else {}), per_pass * passes


def _parameters(modules: Sequence[nn.Module]) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def _optimizers(module: L.LightningModule) -> list[torch.optim.Optimizer]:
    """What `configure_optimizers` gives, without schedulers."""
    found: Any = module.configure_optimizers()
    if isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], list | tuple):
        found = found[0]
    entries = list(found) if isinstance(found, list | tuple) else [found]
    return [entry["optimizer"] if isinstance(entry, dict) else entry for entry in entries]
