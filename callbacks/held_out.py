"""Outputs of layers on fixed held-out examples, read from a validation pass that runs anyway."""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from callbacks.layers import reading
from callbacks.rng import make_generator


class HeldOutOutputs:
    """Reads layers while one validation loader is walked through, and joins what the ranks have read.

    Args:
        layers: by name; a layer called several times in a batch counts by its first output.
        loader: position among the validation loaders.
        num_points: examples, chosen once from the loader's; all where it has fewer.
        seed: of the choice: the same for all epochs, ranks and numbers of ranks.
        pool: mean over all axes after the first two instead of flattening.
    """

    def __init__(self, layers: Mapping[str, nn.Module], loader: int, num_points: int, seed: int, pool: bool) -> None:
        self.layers, self.loader, self.num_points = dict(layers), loader, num_points
        self.seed, self.pool = seed, pool
        self._hooks = ExitStack()
        self._found: dict[str, list[Tensor]] = {}
        self._rows: Tensor | None = None
        self._seen: set[str] = set()

    def start(self, trainer: L.Trainer) -> None:
        """Before the first batch."""
        self.stop()
        loaders: Any = trainer.val_dataloaders
        loaders = loaders if isinstance(loaders, list) else [loaders]
        if not -len(loaders) <= self.loader < len(loaders):
            raise ValueError(f"loader must be one of the {len(loaders)} validation loaders, got {self.loader}")
        self._which, size = self.loader % len(loaders), len(loaders[self.loader].dataset)
        chosen = torch.randperm(size, generator=make_generator("held_out", seed=self.seed))[: self.num_points]
        self._chosen = torch.zeros(size, dtype=torch.bool).index_fill_(0, chosen, True)
        self._found = {}
        self._hooks.enter_context(reading(self.layers, self._read))

    def before_batch(self, batch: Mapping[str, Any], dataloader_idx: int, fields: tuple[str, ...]) -> None:
        """Finds the chosen examples of a batch and keeps these fields of them, `index` always."""
        if dataloader_idx != self._which:
            return
        for field in ("index", *fields):
            if field not in batch:
                raise ValueError(f"batches need the field {field!r}, they have {', '.join(map(str, batch))}")
        rows = self._chosen[batch["index"].cpu()].nonzero()[:, 0]
        if len(rows):
            self._rows, self._seen = rows, set()
            for field in ("index", *fields):
                self._keep(f"batch/{field}", batch[field])

    def after_batch(self) -> None:
        """Nothing is read between batches."""
        self._rows = None

    def stop(self) -> None:
        """Removes the hooks."""
        self._hooks.close()
        self._rows = None

    def joined(self, trainer: L.Trainer) -> dict[str, Tensor] | None:
        """Layer (or `batch/<field>`) -> rows in the order of `index`, on the CPU of rank 0; None on other ranks."""
        self.stop()
        parts: list[Any] = [{name: torch.cat(tensors) for name, tensors in self._found.items()}]
        self._found = {}
        if trainer.world_size > 1:
            gathered = [None] * trainer.world_size if trainer.is_global_zero else None
            torch.distributed.gather_object(parts[0], gathered)
            if gathered is None:
                return None
            parts = [part for part in gathered if part]
        missing = [name for name in self.layers if not any(name in part for part in parts)]
        if missing:
            raise ValueError(f"validation loader {self.loader} did not call the layers {', '.join(missing)}")
        order = torch.cat([part["batch/index"] for part in parts]).argsort()
        return {name: torch.cat([part[name] for part in parts])[order] for name in parts[0]}

    def _read(self, layer: str, output: Tensor) -> None:
        if self._rows is None or layer in self._seen:
            return
        self._seen.add(layer)
        if self.pool and output.ndim > 2:
            output = output.flatten(2).mean(2)
        self._keep(layer, output.detach().flatten(1))

    def _keep(self, name: str, values: Tensor) -> None:
        # a copy at once: later layers may work in place
        if self._rows is not None:
            self._found.setdefault(name, []).append(values[self._rows.to(values.device)].cpu().clone())
