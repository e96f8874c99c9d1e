"""SGD noise in the lazy and the feature regime: a grid of nets over (alpha, dt, P) in one program (arXiv 2301.13703).

Legend: alpha output scale, dt learning rate, B batch, T = dt / B temperature, P training points, t* = dt * (last step
with a gradient), dw = ||w - w_0|| / ||w_0||. The centred predictor is o = f(w) - f(w_0), the loss relu(1 - alpha o y) /
alpha. The nets themselves are in `stacks`.
"""

import itertools
import math
import time
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from callbacks.rng import make_generator, run_seed, seed_for
from lightning_modules.stacks import analysis
from lightning_modules.stacks.architectures import Architecture
from lightning_modules.stacks.dynamics import Dynamics, Loss
from lightning_modules.stacks.exponents import edge_exponent, lazy_exponents, region_means
from lightning_modules.stacks.grid import Member, Rules, make_points
from lightning_modules.stacks.sweep import Sweep
from lightning_modules.stacks.table import as_columns, read_members, write_members

CACHE = 4e6
"""Bytes of weights that a stack on a CPU should not exceed, so that a step stays in the cache; measured by
`tests/benchmarks/test_stacks.py`."""
MOST_SLOTS = {"cpu": 256, "cuda": 4096}


def nets_in_cache(net_bytes: int) -> int:
    """Nets that stand side by side on a CPU; `net_bytes` of weights each."""
    return max(16, min(MOST_SLOTS["cpu"], int(CACHE / net_bytes)))


class SGDNoise(L.LightningModule):
    """Trains every net of the grid replicas x alphas x dt x P, as many side by side as the cache or device holds.

    A batch of the loader is a burst: `check` SGD steps of the whole stack, after which finished nets leave a row and
    waiting ones enter. An epoch ends with the rows in `members.parquet` in the run's folder; the run ends when no net
    is alive, with the fitted exponents as metrics. A net's result does not depend on the stack, shard or number of
    processes; processes share the grid by member, `shard` of `shards` does so between jobs (a SLURM array).

    Metrics: `fit/<exponent>` and, with several replicas, its standard error `fit/<exponent>_se`; `err/<region>` and
    `dw/<region>`; `members/fitted`, `diverged`, `unfinished`; `work/net_steps`, and `work/saved`, the share of
    `max_steps` of the nets trained here that was not needed.

    Args:
        stack: the net.
        log2_alphas: alpha = 2^x.
        log2_lrs: dt = 2^x.
        train_sizes: P, each a prefix of the replica's points.
        batch_size: B; for `gd` it is not used, for `gd_sde` it sets the noise.
        replicas: initial weights with training set and batches of their own (paper: seeds) in this run.
        max_steps: steps after which a net is unfinished, a multiple of `check`.
        check: steps of a burst.
        dynamics, loss, kernel_points: see `stacks.grid.Rules`.
        fits: lazy for `lazy_exponents`, edge for `edge_exponent`.
        lazy_alpha: nets of at least this alpha are lazy.
        fit_max_lr, thresholds: see `lazy_exponents`; None fits over all dt.
        regions: name -> box, see `region_means`.
        slots: nets side by side; None fits the weights into 4 MB on a CPU, and takes up to 4,096 on a GPU.
        shard, shards: this job's part of the grid.
        done: `members.parquet` files of other jobs. Their members do not train and count as results: with all of them
            a run only gathers.

    Source: arXiv 2301.13703; official code: AntonioScl/SGD_learning_regimes.
    """

    def __init__(
        self,
        stack: Architecture,
        log2_alphas: list[float],
        log2_lrs: list[float],
        train_sizes: list[int],
        batch_size: int = 16,
        replicas: int = 1,
        max_steps: int = 10000,
        check: int = 100,
        dynamics: Dynamics = "sgd",
        loss: Loss = "hinge",
        kernel_points: int = 0,
        fits: list[Literal["lazy", "edge"]] | None = None,
        lazy_alpha: float = 4096.0,
        fit_max_lr: float | None = None,
        thresholds: list[float] | None = None,
        regions: dict[str, list[float]] | None = None,
        slots: int | None = None,
        shard: int = 0,
        shards: int = 1,
        done: list[str] | None = None,
    ) -> None:
        super().__init__()
        _check_grid(log2_alphas, log2_lrs, train_sizes, batch_size, dynamics)
        _check_counts(max_steps, check, replicas, slots, shard, shards, regions or {})
        self.save_hyperparameters(ignore=["stack"])
        self.automatic_optimization = False
        self.stack, self.replicas = stack, replicas
        self.rules = Rules(batch_size, check, max_steps, dynamics, loss, kernel_points)
        self.fits: list[Literal["lazy", "edge"]] = ["lazy"] if fits is None else fits
        self.lazy_alpha = lazy_alpha
        self.fit_max_lr = math.inf if fit_max_lr is None else fit_max_lr
        self.thresholds, self.regions = thresholds or [0.02], regions or {}
        self.slots, self.shard, self.shards, self.done = slots, shard, shards, done or []
        grid = itertools.product(range(replicas), log2_alphas, log2_lrs, train_sizes)
        self.grid = [Member(replica, 2.0**alpha, 2.0**lr, size) for replica, alpha, lr, size in grid]
        self.sweep: Sweep | None = None
        self._pending: dict[str, Any] | None = None

    def setup(self, stage: str) -> None:
        """Draws the initial weights; the same on every rank."""
        data: Any = getattr(self.trainer, "datamodule", None)
        if not hasattr(data, "member_sets"):
            raise ValueError(
                f"SGDNoise needs a datamodule with member_sets(), got {type(data).__name__}; "
                "datamodules.member_sets.SignPoints and PictureClasses have it"
            )
        if self.trainer.precision not in ("32-true", "64-true") or torch.get_float32_matmul_precision() != "highest":
            raise ValueError(
                "SGDNoise needs trainer.precision 32-true or 64-true and no TF32: at large alpha the margin is as "
                f"small as the rounding of shorter numbers; got {self.trainer.precision}"
            )
        if self.sweep is not None:
            return
        self.sets = data.member_sets(self.replicas, max(member.points for member in self.grid))
        shape = tuple(self.stack.prepare(self.sets.pool[:1]).shape[1:])
        drawn = [self.stack.draw(shape, make_generator(f"start/{replica}")) for replica in range(self.replicas)]
        # what the record counts as parameters: the starts, which never change
        self.starts = nn.ParameterList([nn.Parameter(torch.stack(layer)) for layer in zip(*drawn, strict=True)])
        common = {
            "seed": seed_for("member"),
            "stack": self.stack.describe(),
            "data": data.describe(),
            "rules": vars(self.rules),
        }
        ordered = sorted(self.grid, key=lambda m: -m.expected_steps(self.rules.max_steps))
        self.members = {member.id(common): member for member in ordered}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Nothing to optimize: its steps count the bursts."""
        return torch.optim.SGD(self.starts.parameters(), lr=0.0)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the members' state until the device is known."""
        self._pending = checkpoint["sweep"]

    def on_fit_start(self) -> None:
        """Builds this process's part of the sweep, on the device, anew or where a checkpoint left it."""
        starts = [layer.detach() for layer in self.starts]
        keys = [seed_for(f"batches/{replica}") for replica in range(self.replicas)]
        points = make_points(self.stack, self.sets, starts, keys, run_seed() * self.replicas)
        parts = self.shards * self.trainer.world_size
        part = self.shard * self.trainer.world_size + self.trainer.global_rank
        found = read_members(self.done)
        self._gathered = found.keys()
        own = {n: m for at, (n, m) in enumerate(self.members.items()) if at % parts == part or n in found}
        slots = self.slots or self._room(sum(layer[0].numel() * layer.element_size() for layer in starts))
        self.sweep = Sweep(self.stack, self.rules, points, own, slots, found)
        if self._pending is not None:
            self.sweep.load_state_dict(self._pending)
            if self.trainer.global_rank > 0:
                # the steps of all processes are counted once
                self.sweep.net_steps = 0
            self._pending = None
        self._started = time.monotonic(), self.sweep.net_steps

    def _room(self, net_bytes: int) -> int:
        """Nets side by side."""
        if self.device.type != "cuda":
            return nets_in_cache(net_bytes)
        # weights, and as much again for a step's gradients and points
        return max(16, min(MOST_SLOTS["cuda"], int(torch.cuda.mem_get_info(self.device)[0] / (4 * net_bytes))))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """One burst; the loss is alpha times a net's mean batch loss, median over the nets."""
        assert self.sweep is not None  # for the type checker: on_fit_start made it
        optimizer: Any = self.optimizers()
        loss = self.sweep.burst()
        optimizer.step()
        alive = self._sum(self.sweep.alive)
        self.log("train/loss", loss, prog_bar=True)
        self._progress(alive)
        if alive == 0:
            self.trainer.should_stop = True
        return {"loss": torch.tensor(loss, device=self.device)}

    def _sum(self, count: int) -> int:
        if self.trainer.world_size == 1:
            return count
        return int(self.trainer.strategy.reduce(torch.tensor(count, device=self.device), reduce_op="sum"))

    def _progress(self, alive: int) -> None:
        """Members alive, net-steps per second and the time left by the guess of each member's steps."""
        assert self.sweep is not None
        began, before = self._started
        rate = (self.sweep.net_steps - before) / max(time.monotonic() - began, 1e-9)
        limit = self.rules.max_steps
        running = {name: int(step) for name, step in zip(self.sweep.names, self.sweep.steps.tolist(), strict=True)}
        left = sum(
            max(self.members[name].expected_steps(limit) - running.get(name, 0), self.rules.check)
            for name in (*running, *self.sweep.queue)
        )
        self.log_dict(
            {"members/alive": float(alive), "time/net_steps_per_s": rate, "time/eta_s": left / max(rate, 1)},
            prog_bar=True,
        )

    def on_train_epoch_end(self) -> None:
        """Gathers the rows of all processes, writes them, and logs the fits when no net is alive."""
        assert self.sweep is not None
        rows = {row["member_id"]: row for part in self._gather(list(self.sweep.rows.values())) for row in part}
        found = [rows[name] for name in self.members if name in rows]
        if not found:
            return
        if self.trainer.is_global_zero:
            write_members(Path(self.trainer.default_root_dir) / "members.parquet", found)
        steps = self._sum(self.sweep.net_steps)
        columns = as_columns(found)
        values = {f"members/{status}": float((columns["status"] == status).sum()) for status in analysis.STATUSES}
        values |= {"work/net_steps": float(steps)}
        trained = sum(row["member_id"] not in self._gathered for row in found)
        if trained and self._sum(self.sweep.alive) == 0:
            values["work/saved"] = 1 - steps / (self.rules.max_steps * trained)
        if len(found) == len(self.members):
            values |= self.summary(columns)
        self.log_dict(values)

    def _gather(self, mine: Any) -> list[Any]:
        if self.trainer.world_size == 1:
            return [mine]
        everyone: list[Any] = [None] * self.trainer.world_size
        torch.distributed.all_gather_object(everyone, mine)
        return everyone

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Members in training and results of all processes, in one; any number of processes can take it up."""
        assert self.sweep is not None
        states = self._gather(self.sweep.state_dict())
        checkpoint["sweep"] = {
            "running": {name: state for part in states for name, state in part["running"].items()},
            "rows": [row for part in states for row in part["rows"]],
            # of this job, on whichever process
            "net_steps": sum(part["net_steps"] for part in states),
        }

    def cost(self, shape: tuple[int, ...]) -> dict[str, float]:
        """What the grid takes, for `noisebench plan`: a stack of random points takes steps for about a second.

        Args:
            shape: of a point.

        Returns:
            `nets`, `parameters` of each, `steps` (net-steps by `Member.expected_steps`), `most_steps`, `flops` of a
            net-step (three times those of a forward), and `core_rate`, net-steps per second of one core here.
        """
        inputs = self.stack.prepare(torch.zeros(1, *shape))
        net = [layer.unsqueeze(0) for layer in self.stack.draw(tuple(inputs.shape[1:]), torch.Generator())]
        full = self.rules.dynamics in ("gd", "gd_sde")
        points = torch.randn(max(self.hparams["train_sizes"]) if full else self.rules.batch, *inputs.shape[1:])
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            self.stack.forward(net, points.unsqueeze(0))
        parameters, flops = sum(layer.numel() for layer in net), 3.0 * counter.get_total_flops()
        # of a CNN, whose step takes long, a single net
        together = max(1, min(nets_in_cache(4 * parameters), len(self.grid), int(2e9 / flops)))
        return {
            "nets": len(self.grid),
            "parameters": parameters,
            "steps": sum(member.expected_steps(self.rules.max_steps) for member in self.grid),
            "most_steps": float(self.rules.max_steps * len(self.grid)),
            "flops": flops,
            "core_rate": step_rate(self.stack, net, points, together),
        }

    def summary(self, members: analysis.Members) -> dict[str, float]:
        """Exponents and region means of finished members.

        Args:
            members: columns of all nets.
        """
        values: dict[str, float] = {}
        estimates: dict[str, analysis.Estimate] = {}
        if "lazy" in self.fits:
            lazy = {name: column[members["alpha"] >= self.lazy_alpha] for name, column in members.items()}
            estimates |= lazy_exponents(lazy, self.fit_max_lr, self.thresholds)
        if "edge" in self.fits:
            estimates["k"] = edge_exponent(members)
        for name, found in estimates.items():
            values[f"fit/{name}"] = found.mean
            if self.replicas > 1:
                values[f"fit/{name}_se"] = found.error
        if "fit/delta" in values and "fit/gamma" in values:
            values["fit/gamma_over_delta"] = values["fit/gamma"] / values["fit/delta"]
        for name, box in self.regions.items():
            values[f"err/{name}"], values[f"dw/{name}"] = region_means(members, box)
        return values


def step_rate(stack: Architecture, net: list[Tensor], points: Tensor, nets: int) -> float:
    """Net-steps per second of a stack on one core of this machine, measured for a second; draws of points left out.

    Args:
        stack: the architecture.
        net: weights of one net, a stack of one.
        points: (B, ...) of a step.
        nets: how many side by side.
    """
    weights = [layer.repeat(nets, *[1] * (layer.ndim - 1)) for layer in net]
    inputs = points.expand(nets, *points.shape)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    steps, start = -1, time.process_time()
    with torch.no_grad():
        while steps < 1 or time.process_time() - start < 1.0:
            if steps == 0:
                # the first step makes ready
                start = time.process_time()
            stack.update_(weights, inputs, torch.zeros(()), torch.zeros_like)
            steps += 1
    torch.set_num_threads(threads)
    return nets * steps / (time.process_time() - start)


def _check_grid(
    log2_alphas: list[float], log2_lrs: list[float], train_sizes: list[int], batch_size: int, dynamics: Dynamics
) -> None:
    """Refuses an impossible grid."""
    for name, values in (("log2_alphas", log2_alphas), ("log2_lrs", log2_lrs), ("train_sizes", train_sizes)):
        if not values or len(set(values)) < len(values):
            raise ValueError(f"model.{name} must be different numbers, at least one, got {values}")
    if not 1 <= batch_size <= min(train_sizes):
        raise ValueError(
            f"model.batch_size must be between 1 and the smallest of model.train_sizes {min(train_sizes)}, "
            f"got {batch_size}"
        )
    if dynamics in ("gd", "gd_sde") and len(train_sizes) > 1:
        raise ValueError(f"model.dynamics {dynamics} takes all points in a step: one of train_sizes, got {train_sizes}")


def _check_counts(
    max_steps: int,
    check: int,
    replicas: int,
    slots: int | None,
    shard: int,
    shards: int,
    regions: dict[str, list[float]],
) -> None:
    """Refuses impossible numbers."""
    if check < 1 or max_steps < check or max_steps % check:
        raise ValueError(f"model.max_steps must be a multiple of model.check {check}, got {max_steps}")
    if replicas < 1 or (slots is not None and slots < 1):
        raise ValueError(f"model.replicas and model.slots must be at least 1, got {replicas} and {slots}")
    if not 0 <= shard < shards:
        raise ValueError(f"model.shard must be between 0 and model.shards - 1, got {shard} of {shards}")
    for name, box in regions.items():
        if len(box) != 4:
            raise ValueError(f"model.regions {name} must be [alpha, alpha, dt, dt], least and largest, got {box}")
