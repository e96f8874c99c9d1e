"""What a grid of nets costs (`noisebench plan` of a recipe with an ensemble): steps, hours and memory, guessed."""

import importlib
from dataclasses import dataclass
from typing import Any

from scripts import recipes
from scripts.errors import UserError

GPU_FLOPS, GPU_BYTES = 10e12, 2e12
"""Per second: a GPU in float32 and its memory (stated, not measured)."""
TRAFFIC = 12
"""Bytes of memory traffic per weight and step: a gradient is added in place, and the forward reads once more."""


@dataclass(frozen=True)
class SweepCost:
    """A grid's cost.

    Args:
        nets, parameters: number of nets, and weights of each.
        steps, most_steps: net-steps by the guess of each net's steps, and with every net at `max_steps`.
        flops: of a net-step.
        core_rate: net-steps per second of a CPU core, measured here.
    """

    nets: int
    parameters: int
    steps: float
    most_steps: float
    flops: float
    core_rate: float

    @property
    def gpu_rate(self) -> float:
        """Net-steps per second of a GPU that does nothing else, at best."""
        return min(GPU_FLOPS / self.flops, GPU_BYTES / (TRAFFIC * self.parameters))

    def lines(self, gpus: int, memory: int) -> list[str]:
        """What is printed."""
        together = int(0.9 * memory / (16 * self.parameters))
        core, gpu = (steps / 3600 for steps in (self.steps / self.core_rate, self.steps / self.gpu_rate / gpus))
        most = self.most_steps / self.gpu_rate / gpus / 3600
        return [
            f"{self.nets:,} nets of {self.parameters:,} parameters, {self.flops:.3g} FLOP per net-step",
            f"net-steps: {self.steps:.3g} guessed from mini runs (t* ~ T P^1.7, a factor 1/dt below alpha 512), "
            f"at most {self.most_steps:.3g} (every net at model.max_steps)",
            f"a CPU core here, measured in a second: {self.core_rate:,.0f} net-steps/s "
            f"({self.core_rate * self.flops / 1e9:.3g} GFLOP/s), {_hours(core)} guessed",
            f"{gpus} GPUs, each at best {GPU_FLOPS:.0e} FLOP/s and {GPU_BYTES:.0e} bytes/s (not measured): "
            f"{self.gpu_rate * gpus:,.0f} net-steps/s, {_hours(gpu)} guessed, at most {_hours(most)}",
            f"weights with gradients, starts and a step's points: about {16 * self.parameters / 1e6:.3g} MB per net, "
            f"{together:,} nets side by side in nine tenths of a GPU",
        ]


def is_sweep(name: str) -> bool:
    """Whether the recipe's module trains an ensemble, which it says with a method `cost`."""
    found = ""
    for document in recipes.expand(recipes.find_recipe(name)):
        found = (document.get("model") or {}).get("class_path", found)
    module, _, kind = found.rpartition(".")
    try:
        return hasattr(getattr(importlib.import_module(module), kind), "cost")
    except (ImportError, AttributeError, ValueError):
        # a recipe of one's own with a mistake: the parser says what is wrong
        return False


def sweep_cost(name: str, overrides: list[str], shape: str | None) -> SweepCost:
    """Cost of a recipe's grid; a stack of its nets takes steps for about a second.

    Args:
        name: of the recipe.
        overrides: further options of `noisebench fit`.
        shape: of a training picture, where the data are not at hand.

    Raises:
        UserError: an option is wrong, or the data are not at hand.
    """
    from scripts.plan_recipe import build

    cli = build(name, overrides)
    try:
        picture = None if shape is None else tuple(int(size) for size in shape.split(","))
    except ValueError as error:
        raise UserError(f"--shape must be numbers with commas, e.g. 1,28,28, got {shape!r}") from error
    try:
        inputs: Any = cli.datamodule.point_shape(picture)
    except (OSError, ValueError) as error:
        raise UserError(f"the training data are not at hand: {error}; give --shape to plan without them") from error
    return SweepCost(**cli.model.cost(inputs))


def _hours(hours: float) -> str:
    if hours < 1 / 60:
        return f"{hours * 3600:.2g} seconds"
    return f"{hours * 60:.2g} minutes" if hours < 1 else f"{hours:,.3g} hours"
