"""Measurements at chosen optimizer steps on fixed examples: schedule, points, table, means over windows of steps."""

import csv
import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from callbacks.files import write_atomic
from callbacks.layers import submodule
from callbacks.rng import make_generator

Windows = dict[str, list[int | None]]


def log_spaced_steps(last: int, count: int) -> list[int]:
    """0 and up to `count` distinct whole numbers, evenly spaced in the logarithm, from 1 to `last`.

    Source: arXiv 2402.15555, official code (unique integers of logspace).
    """
    if last < 1 or count < 1:
        raise ValueError(f"last and count must be at least 1, got {last} and {count}")
    spaced = [round(last ** (k / max(count - 1, 1))) for k in range(count)]
    return sorted({0, *spaced, last})


def window_means(table: Mapping[int, Mapping[str, float]], windows: Windows) -> dict[str, float]:
    """`<key>_<window>`: mean over the measurements at steps first..last of each window, both ends in it; null is open.

    Args:
        table: step -> measured values.
        windows: name -> [first, last]; windows without a measurement give nothing.
    """
    means = {}
    for window, (first, last) in windows.items():
        rows = [r for step, r in table.items() if step >= (first or 0) and step <= (math.inf if last is None else last)]
        for key in dict.fromkeys(key for row in rows for key in row):
            values = [row[key] for row in rows if key in row]
            means[f"{key}_{window}"] = sum(values) / len(values)
    return means


class StepProbe(Callback):
    """Base of observers that put points of their own through the net at chosen steps.

    Draws from generators of its own, in evaluation mode, and leaves modes, buffers, gradients and random states as they
    were. Values go to `curves/<name>.csv` in the run's folder, the latest ones and the means over windows to the log of
    each epoch. The table is in the checkpoint: a resumed run repeats no measurement.

    The datamodule must have `examples(part)`, fields of `train` and `test` by position, and `as_evaluated(batch)`, a
    batch without augmentation.

    Args:
        num_points: examples of each part, chosen once; all where it has fewer.
        num_steps: log-spaced measurements over the run, the start included.
        every_n_steps: further, evenly spaced ones; null for none.
        windows: name -> [first, last] step; see `window_means`.
        network: submodule that is observed, e.g. `net`; null for the module itself.
        constants: further arguments of the network, equal for all points (a diffusion net: time, label).
        encoder: submodule through which points go first, e.g. an embedding; null for none.
        field: batch field of the network's inputs.
        seed: of all draws, the same in all runs.
    """

    name = "probe"
    summarized: tuple[str, ...] = ("",)
    """Prefixes of the values whose means over windows are logged."""
    log2_floor: float | None = None
    """Log binary logarithms of these means too, of no less than this; None for none."""

    def __init__(
        self,
        num_points: int,
        num_steps: int = 50,
        every_n_steps: int | None = None,
        windows: Windows | None = None,
        network: str | None = None,
        constants: list[int | float] | None = None,
        encoder: str | None = None,
        field: str = "image",
        seed: int = 0,
    ) -> None:
        self.kind = type(self).__name__
        for option, value in (("num_points", num_points), ("num_steps", num_steps), ("every_n_steps", every_n_steps)):
            if value is not None and value < 1:
                raise ValueError(f"{self.kind}.{option} must be at least 1, got {value}")
        for window, ends in (windows or {}).items():
            if len(ends) != 2:
                raise ValueError(f"{self.kind}.windows must have two ends each, got {window}: {ends}")
        self.num_points, self.num_steps, self.every_n_steps = num_points, num_steps, every_n_steps
        self.windows = windows or {}
        self.paths = {"network": network, "encoder": encoder}
        self.constants, self.field, self.seed = constants or [], field, seed
        self.table: dict[int, dict[str, float]] = {}

    def measure(self, trainer: L.Trainer, network: nn.Module) -> dict[str, float]:
        """Values at this step, equal on all ranks."""
        raise NotImplementedError

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Names unknown submodules and a datamodule that does not fit."""
        for option, path in self.paths.items():
            submodule(pl_module, path, f"{self.kind}.{option}")
        data: Any = getattr(trainer, "datamodule", None)
        if not (hasattr(data, "examples") and hasattr(data, "as_evaluated")):
            raise ValueError(
                f"{self.kind} needs a datamodule with examples() and as_evaluated(), got {type(data).__name__}; "
                "datamodules.images.ImageData has them"
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Schedule and points."""
        last = max(1, int(trainer.estimated_stepping_batches))
        self.schedule = set(log_spaced_steps(last, self.num_steps))
        if self.every_n_steps is not None:
            self.schedule |= set(range(0, last + 1, self.every_n_steps))
        self._batches = {part: self._choose(trainer, part) for part in ("train", "test")}

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Measures where a step of the schedule has been reached: before the next one, outside all that times steps."""
        self._probe(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measures after the epoch's last step; logs the latest values and the means over windows; writes the table."""
        self._probe(trainer, pl_module)
        means = {
            name: value
            for name, value in window_means(self.table, self.windows).items()
            if name.startswith(self.summarized)
        }
        if self.log2_floor is not None:
            means |= {f"{name}_log2": math.log2(max(value, self.log2_floor)) for name, value in means.items()}
        pl_module.log_dict(self.table[max(self.table)] | means, rank_zero_only=False)
        if trainer.is_global_zero:
            write_atomic(Path(trainer.default_root_dir) / "curves" / f"{self.name}.csv", _as_csv(self.table))

    def state_dict(self) -> dict[str, Any]:
        """What has been measured."""
        return {"table": self.table}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes it back."""
        self.table = dict(state_dict["table"])

    def points(self, part: str, pl_module: nn.Module) -> Tensor:
        """The chosen inputs of a part, as the network takes them; in its dtype, on its device."""
        like = next(pl_module.parameters())
        values = self._batches[part][self.field].to(like.device)
        encoder = self.paths["encoder"]
        if encoder is not None:
            with torch.no_grad():
                values = submodule(pl_module, encoder, "encoder")(values)
        return values.to(like.dtype)

    def labels(self, part: str, device: torch.device) -> Tensor:
        """Labels of the same examples."""
        return self._batches[part]["label"].to(device)

    def network_of(self, pl_module: nn.Module) -> nn.Module:
        """What is observed, as a module of one argument."""
        network = submodule(pl_module, self.paths["network"], "network")
        return _WithConstants(network, self.constants) if self.constants else network

    def _probe(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        step = trainer.global_step
        if step in self.schedule and step not in self.table:
            self._module = pl_module
            self.table[step] = self.measure(trainer, self.network_of(pl_module))

    def _choose(self, trainer: L.Trainer, part: str) -> dict[str, Any]:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        examples = data.examples(part)
        chosen = torch.randperm(len(examples), generator=make_generator(f"{self.name}/{part}", seed=self.seed))
        return data.as_evaluated(examples[chosen[: self.num_points].sort().values])


class _WithConstants(nn.Module):
    """The network with its further arguments filled in: whole numbers as int64, others in the dtype of the inputs."""

    def __init__(self, network: nn.Module, constants: list[int | float]) -> None:
        super().__init__()
        self.network, self.constants = network, constants

    def forward(self, inputs: Tensor) -> Any:
        dtypes = [torch.int64 if isinstance(value, int) else inputs.dtype for value in self.constants]
        rest = [inputs.new_full((len(inputs),), c, dtype=d) for c, d in zip(self.constants, dtypes, strict=True)]
        return self.network(inputs, *rest)


def share_of_rank(values: Tensor, trainer: L.Trainer) -> Tensor:
    """Every world_size-th row, beginning with this rank's."""
    return values[trainer.global_rank :: trainer.world_size]


def _as_csv(table: Mapping[int, Mapping[str, float]]) -> str:
    keys = sorted({key for row in table.values() for key in row})
    text = io.StringIO()
    writer = csv.DictWriter(text, ["step", *keys], lineterminator="\n")
    writer.writeheader()
    writer.writerows({"step": step, **table[step]} for step in sorted(table))
    return text.getvalue()
