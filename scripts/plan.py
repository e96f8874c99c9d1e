"""`noisebench plan`: does a recipe fit into the memory, and with which strategy, batch and accumulation."""

import argparse
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from scripts.errors import UserError

if TYPE_CHECKING:
    from scripts.plan_recipe import PlannedRecipe

SHARE = 0.9
"""Part of the memory that a plan may fill: CUDA's context, kernels' workspaces and fragmentation are not counted."""

DESCRIPTION = """Memory of one training step on each GPU, from shapes alone (nothing is computed, no weights are made).

Counted: weights with the averages that the recipe keeps; gradients; optimizer state; state of the method (for example
ELR's targets, on every process); activations that autograd saves for the backward at this batch per process, attention
as a fused kernel does it, the batch included; what a strategy adds (DDP: buckets of all gradients; FSDP2: what is
gathered at a time, two blocks and the rest of the net, and one float32 gradient; bf16 without FSDP2: bf16 copies of
matrices). With checkpointing: inputs of the blocks and the largest block. bf16 activations are those of a forward in
bf16 throughout, as FSDP2 runs it; autocast keeps a few operations in float32.

Not counted: CUDA's context, workspaces, fragmentation; a tenth of the memory is left to these.

Of a recipe that trains a grid of nets: how many steps and hours it may take, guessed from small runs."""


@dataclass(frozen=True)
class Setting:
    """One way to run: strategy, precision, activation checkpointing, accumulation."""

    strategy: str
    precision: str
    checkpointed: bool
    accumulate: int = 1


@dataclass(frozen=True)
class Row:
    """Bytes per process under one setting."""

    setting: Setting
    batch: int
    weights: int
    gradients: int
    optimizer: int
    method: int
    activations: int
    strategy: int

    @property
    def total(self) -> int:
        """Bytes in all."""
        parts = (self.weights, self.gradients, self.optimizer, self.method, self.activations, self.strategy)
        return sum(parts)


def verb(argv: list[str]) -> int:
    """Entry of `noisebench plan`; 1 if nothing fits."""
    options, overrides = _parser().parse_known_args(argv)
    if options.gpus < 1 or options.nodes < 1:
        raise UserError(f"--gpus and --nodes must be at least 1, got {options.gpus} and {options.nodes}")
    memory, processes = parse_bytes(options.memory), options.gpus * options.nodes
    from scripts.plan_sweep import is_sweep, sweep_cost

    if is_sweep(options.recipe):
        cost = sweep_cost(options.recipe, overrides, options.shape)
        print(f"{options.recipe}: {cost.lines(processes, memory)[0]}", *cost.lines(processes, memory)[1:], sep="\n")
        return 0
    from scripts.plan_recipe import plan_recipe

    recipe = plan_recipe(options.recipe, overrides, options.shape, options.examples, options.classes)
    batch = recipe.batch_size
    if batch % processes:
        raise UserError(f"data.batch_size is global and must be a multiple of the {processes} processes, got {batch}")
    rows = [recipe.row(setting, processes) for setting in settings(recipe, processes)]
    print(f"{options.recipe}: {recipe.describe()}")
    print(f"{options.gpus} GPUs of {human(memory)} on each of {options.nodes} nodes: global batch {batch}")
    print(*table(rows, memory, options.markdown), sep="\n")
    chosen = choose(recipe, processes, memory)
    print(advice(chosen, options.gpus, options.nodes, batch, recipe, memory))
    return 0 if chosen is not None else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="noisebench plan",
        description=DESCRIPTION,
        epilog="example: noisebench plan elr/clothing1m --gpus 8 --memory 80GB --shape 3,224,224 --examples 1000000 "
        "--classes 14 --data.batch_size 512",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("recipe", metavar="RECIPE", help="followed by any options of `noisebench fit`")
    parser.add_argument("--gpus", type=int, required=True, help="GPUs per node")
    parser.add_argument("--nodes", type=int, default=1, help="nodes (default: 1)")
    parser.add_argument("--memory", required=True, help="memory of a GPU, e.g. 80GB (10^9 bytes each) or 80GiB (2^30)")
    parser.add_argument("--markdown", action="store_true", help="the table in Markdown")
    away = "where the data are not at hand (nothing is fetched): "
    parser.add_argument("--shape", help=f"{away}shape of a training picture, e.g. 3,224,224")
    parser.add_argument("--examples", type=int, help=f"{away}number of training examples")
    parser.add_argument("--classes", type=int, help=f"{away}number of classes")
    return parser


def parse_bytes(text: str) -> int:
    """Bytes of `80GB`, `24GiB`, `500MB`.

    Raises:
        UserError: another form.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT])(i?)B", text)
    if not found or float(found[1]) == 0:
        raise UserError(f"--memory must be a positive number with a unit, e.g. 80GB or 80GiB, got {text!r}")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** ("KMGT".index(found[2]) + 1))


def human(count: int) -> str:
    """Bytes in three digits: 1.24 GB."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def settings(recipe: "PlannedRecipe", processes: int, accumulate: int = 1) -> list[Setting]:
    """What is worth trying, simplest first; sharding needs more than one process, checkpointing a net with blocks."""
    strategies = ["1 device"] if processes == 1 else ["1 device", "DDP", "FSDP2"]
    precisions = ["32-true", "bf16-mixed"] if recipe.precision == "32-true" else [recipe.precision]
    return [
        Setting(strategy, precision, checkpointed, accumulate)
        for precision in precisions
        for checkpointed in ([False, True] if recipe.blocks else [False])
        for strategy in strategies
    ]


def choose(recipe: "PlannedRecipe", processes: int, memory: int) -> Row | None:
    """The first setting that fits on all processes; the recipe's precision before bf16, whole batches before parts."""
    per_process = recipe.batch_size // processes
    for accumulate in _divisors(per_process):
        for setting in settings(recipe, processes, accumulate):
            if processes > 1 and setting.strategy == "1 device":
                continue
            row = recipe.row(setting, processes)
            if row.total <= SHARE * memory:
                return row
    return None


def _divisors(number: int) -> Iterator[int]:
    """1, the next larger divisor, ... at most doubling the work of the search: each at least 1.5 times the last."""
    last = 0.0
    for candidate in range(1, number + 1):
        if number % candidate == 0 and (candidate >= 1.5 * last or candidate == number):
            last = candidate
            yield candidate


def table(rows: list[Row], memory: int, markdown: bool) -> list[str]:
    """Lines of the table, in columns or in Markdown."""
    head = ["strategy", "precision", "checkpointing", "batch", "weights", "gradients", "optimizer", "method"]
    head += ["activations", "strategy's", "total", "fits"]
    cells = [
        [row.setting.strategy, row.setting.precision, "yes" if row.setting.checkpointed else "no", str(row.batch)]
        + [human(v) for v in (row.weights, row.gradients, row.optimizer, row.method, row.activations, row.strategy)]
        + [human(row.total), "yes" if row.total <= SHARE * memory else "no"]
        for row in rows
    ]
    if markdown:
        return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *cells)]
    widths = [max(len(line[k]) for line in (head, *cells)) for k in range(len(head))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in (head, *cells)]


def advice(row: Row | None, gpus: int, nodes: int, batch: int, recipe: "PlannedRecipe", memory: int) -> str:
    """What to add to the command."""
    if row is None:
        least = "more GPUs, a smaller net or more memory"
        return f"nothing fits into {SHARE:.0%} of {human(memory)}, not even one example at a time: {least}"
    setting, words = row.setting, [f"--trainer.devices {gpus}"]
    words += [f"--trainer.num_nodes {nodes}"] if nodes > 1 else []
    words += [f"--trainer.strategy {setting.strategy.lower()}"] if setting.strategy != "1 device" else []
    words += [f"--trainer.precision {setting.precision}"] if setting.precision != recipe.precision else []
    if setting.checkpointed:
        words += ["--trainer.callbacks+=callbacks.checkpoint_activations.CheckpointActivations"]
    if setting.accumulate > 1:
        total = setting.accumulate * recipe.accumulate
        words += [f"--data.batch_size {batch // setting.accumulate}", f"--trainer.accumulate_grad_batches {total}"]
    return (
        f"use: {' '.join(words)}   ({human(row.total)} of {human(memory)} on each GPU, {row.batch} examples at a time)"
    )
