"""Members of a grid of nets, what they share, the sets they see, and the row that one leaves when it has finished."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_modules.stacks import observables
from lightning_modules.stacks.architectures import Architecture
from lightning_modules.stacks.dynamics import Dynamics, Loss, margin_loss

TILE = 256
"""Points of one product in passes over whole sets, the last tile filled up: a point's bits do not depend on the set."""


@dataclass(frozen=True)
class Member:
    """One net of the grid.

    Args:
        replica: which initial weights, training set and stream of batches it has.
        alpha: output scale.
        lr: learning rate (code: dt).
        points: P.
    """

    replica: int
    alpha: float
    lr: float
    points: int

    def id(self, common: dict[str, Any]) -> str:
        """Twelve hexadecimal digits of all that its result depends on; `common` is what the grid shares."""
        text = json.dumps({**common, **asdict(self)}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def expected_steps(self, max_steps: int) -> float:
        """Guess of its steps, to order members and to estimate costs.

        In the lazy regime t* ~ T P^1.7, so the steps do not depend on T; with small alpha the time to fit does not
        depend on T, so the steps go as 1/T. The constants are those of Fashion-MNIST's parity with batches of 16.
        """
        steps = 4600 * (self.points / 1024) ** 1.7
        return min(steps if self.alpha >= 512 else steps * max(1.0, 1 / self.lr), float(max_steps))


@dataclass(frozen=True)
class Rules:
    """What all members of a sweep share.

    Args:
        batch: B.
        check: steps of a burst, after which members may leave.
        max_steps: steps after which a member counts as unfinished, a multiple of `check`.
        dynamics: sgd, gd (all points in each step), gd_sde (all points, and noise as of batches of B), or only_unfit
            (batches of points that are not fitted).
        loss: see `margin_loss`.
        kernel_points: m, on how many training and test points `kernel_columns` are measured; 0 leaves them out.
    """

    batch: int
    check: int
    max_steps: int
    dynamics: Dynamics = "sgd"
    loss: Loss = "hinge"
    kernel_points: int = 0


@dataclass(frozen=True)
class Points:
    """The sets on the sweep's device, in the architecture's shape, and what the nets give at the start.

    Args:
        pool, label, rows, test, test_label: as in `datamodules.member_sets.MemberSets`.
        starts: weights of the R replicas, a stack.
        keys: (R,) int64, the replicas' streams of batches.
        offset, test_offset: f(w_0, x) of each replica, (R, P) and (R, K).
        first_seed: number of the first replica among all of a study's runs.
    """

    pool: Tensor
    label: Tensor
    rows: Tensor
    test: Tensor
    test_label: Tensor
    starts: list[Tensor]
    keys: Tensor
    offset: Tensor
    test_offset: Tensor
    first_seed: int


def outputs_in_tiles(arch: Architecture, weights: list[Tensor], pool: Tensor, rows: Tensor) -> Tensor:
    """f(w, x), (N, n), for points `pool[rows]`, rows (N, n), in tiles of TILE points."""
    count = rows.shape[1]
    tiles = -(-count // TILE)
    places = torch.arange(tiles * TILE, device=rows.device).clamp_max(count - 1)
    parts = [arch.forward(weights, pool[rows[:, at]]) for at in places.split(TILE)]
    return torch.cat(parts, 1)[:, :count]


def make_points(arch: Architecture, sets: Any, starts: list[Tensor], keys: list[int], first_seed: int = 0) -> Points:
    """Puts the sets beside the starts, in their type and on their device, and computes f(w_0, x)."""
    device, dtype = starts[0].device, starts[0].dtype
    pool, test = (arch.prepare(part).to(device, dtype) for part in (sets.pool, sets.test))
    rows = sets.rows.to(device)
    label, test_label = sets.label.to(device, dtype), sets.test_label.to(device, dtype)
    all_test = torch.arange(len(test), device=device).expand(1, -1)
    offsets, test_offsets = [], []
    for replica in range(len(rows)):
        one = [layer[replica : replica + 1] for layer in starts]
        offsets.append(outputs_in_tiles(arch, one, pool, rows[replica : replica + 1]))
        test_offsets.append(outputs_in_tiles(arch, one, test, all_test))
    streams = torch.tensor(keys, device=device)
    both = torch.cat(offsets), torch.cat(test_offsets)
    return Points(pool, label, rows, test, test_label, starts, streams, *both, first_seed)


def result_row(
    arch: Architecture,
    rules: Rules,
    points: Points,
    member: Member,
    weights: list[Tensor],
    product: Tensor,
    outcome: dict[str, Any],
    last: int,
) -> dict[str, Any]:
    """Results of one net.

    Args:
        arch, rules, points, member: see there.
        weights: a stack of one.
        product: (P,) o y on its training set.
        outcome: `member_id`, `status` and `steps`.
        last: number of the last step with a gradient.

    Returns:
        Column -> value. What is not finite counts as unfitted and as an error.
    """
    test = arch_outputs(arch, weights, points, member) * points.test_label
    margin = member.alpha * product
    starts = [layer[member.replica].double() for layer in points.starts]
    moves = [layer[0].double() - start for layer, start in zip(weights, starts, strict=True)]
    row = {
        **outcome,
        "seed": points.first_seed + member.replica,
        "alpha": member.alpha,
        "dt": member.lr,
        "temperature": member.lr / rules.batch,
        "batch_size": rules.batch,
        "n_train": member.points,
        "depth": arch.depth,
        "t": member.lr * outcome["steps"],
        "t_star": member.lr * last,
        "train_loss": float(margin_loss(margin, rules.loss).double().mean()) / member.alpha,
        "n_unfitted": int((~(margin >= 1)).sum()),
        "min_margin": float(product.min()),
        "train_error": _error(product),
        "test_error": _error(test),
        "dw": _norm(moves) / _norm(starts),
        # of a perceptron: how far the weights have turned towards the coordinate that decides
        "lambda": _turn(moves),
    }
    for number, (move, start) in enumerate(zip(moves, starts, strict=True)):
        row |= {f"w2_{number}": _norm([start + move]) ** 2, f"dw2_{number}": _norm([move]) ** 2}
    if rules.kernel_points:
        row |= kernel_columns(arch, rules, points, member, weights)
    return row


def arch_outputs(arch: Architecture, weights: list[Tensor], points: Points, member: Member) -> Tensor:
    """o (K,) of a stack of one on the test set."""
    rows = torch.arange(len(points.test), device=points.test.device).expand(1, -1)
    return outputs_in_tiles(arch, weights, points.test, rows)[0] - points.test_offset[member.replica]


def kernel_columns(
    arch: Architecture, rules: Rules, points: Points, member: Member, weights: list[Tensor]
) -> dict[str, float]:
    """Neural tangent kernel and gradient statistics on the first points of the training and of the test set.

    Columns: `kernel_change` (relative to the mean of K_0^2), `kernel_norm`, `kernel_yky`, `kernel_y_inv`,
    `grad_f_norm`, `grad_f_var`, `grad_l_norm`, `grad_l_var` with `_train` or `_test`, and `overlap_f`, `overlap_l`.

    Source: arXiv 2301.13703, official code: `observable.py`.
    """
    count, replica = min(rules.kernel_points, member.points, len(points.test)), member.replica
    rows = points.rows[replica, :count]
    inputs = torch.cat([points.pool[rows], points.test[:count]]).unsqueeze(0)
    labels = torch.cat([points.label[rows], points.test_label[:count]]).unsqueeze(0)
    offset = torch.cat([points.offset[replica, :count], points.test_offset[replica, :count]])
    output = arch.forward(weights, inputs) - offset
    alpha = torch.tensor([member.alpha], dtype=output.dtype, device=output.device)
    slopes = observables.loss_slopes(output, labels, alpha)
    now = arch.kernel(weights, inputs)
    start = arch.kernel([layer[replica : replica + 1] for layer in points.starts], inputs)
    columns: dict[str, Tensor] = {}
    sides = {"train": slice(0, count), "test": slice(count, None)}
    for name, side in sides.items():
        found = observables.kernel_statistics(now[:, side, side], start[:, side, side], labels[:, side])
        columns[f"kernel_change_{name}"] = found.change / start[:, side, side].square().mean()
        columns[f"kernel_norm_{name}"], columns[f"kernel_yky_{name}"] = found.norm, found.alignment
        columns[f"kernel_y_inv_{name}"] = found.inverse_alignment
        for kind, weight in (("f", None), ("l", slopes[:, side])):
            signal, noise = observables.gradient_statistics(now[:, side, side], weight)
            columns |= {f"grad_{kind}_norm_{name}": signal, f"grad_{kind}_var_{name}": noise}
    train, test = sides.values()
    blocks = now[:, train, train], now[:, test, test], now[:, train, test]
    columns["overlap_f"] = observables.gradient_overlap(*blocks)
    columns["overlap_l"] = observables.gradient_overlap(*blocks, slopes[:, train], slopes[:, test])
    return {name: float(value) for name, value in columns.items()}


def _turn(moves: list[Tensor]) -> float:
    """lambda of a perceptron that has turned to the right side, else NaN."""
    value = float(observables.signal_to_spread(moves[0].unsqueeze(0))) if len(moves) == 1 else 0.0
    return value if value > 0 else float("nan")


def _error(product: Tensor) -> float:
    return float((~(product > 0) | ~product.isfinite()).double().mean())


def _norm(tensors: Sequence[Tensor]) -> float:
    return float(torch.stack([tensor.square().sum() for tensor in tensors]).sum().sqrt())
