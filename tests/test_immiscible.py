"""Immiscible diffusion: reference, property, parallel."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_modules import immiscible
from lightning_modules.diffusion.couplings import Independent

GOLDEN = np.load(Path(__file__).parent / "golden" / "immiscible.npz")
"""Outputs of the official lines (yhli123/Immiscible-Diffusion) on fixed inputs, float32 and fp16."""


def golden(name: str) -> Tensor:
    return torch.from_numpy(GOLDEN[name])


# 1. reference


@pytest.mark.parametrize("case", ["la16", "la32"])
def test_distances_are_within_one_fp16_step_of_the_official_ones(case: str) -> None:
    """Neighbouring positive fp16 numbers have neighbouring bit patterns."""
    ours = immiscible.pair_costs(golden(f"{case}_x"), golden(f"{case}_noise"))
    steps = ours.view(torch.int16).int() - golden(f"{case}_dist_fp16").view(torch.int16).int()
    assert int(steps.abs().max()) <= 1


@pytest.mark.parametrize("case", ["la16", "la32"])
def test_assigned_noise_equals_the_official_one(case: str) -> None:
    data, noise = golden(f"{case}_x"), golden(f"{case}_noise")
    order = immiscible.assign(immiscible.pair_costs(data, noise))
    assert torch.equal(order, golden(f"{case}_col"))
    assert torch.equal(noise[order], golden(f"{case}_assigned"))


@pytest.mark.parametrize("case", ["la16", "la32"])
def test_exact_costs_equal_the_reference(case: str) -> None:
    data, noise = golden(f"{case}_x").double(), golden(f"{case}_noise").double()
    costs = immiscible.pair_costs(data, noise, precision="fp32")
    order = immiscible.assign(costs)
    assert torch.equal(order, golden(f"{case}_col_fp64"))
    for chosen, name in (
        (torch.arange(len(data)), "before"),
        (order, "opt"),
        (golden(f"{case}_col"), "after_fp16assign"),
    ):
        total = costs[torch.arange(len(data)), chosen].sum()
        torch.testing.assert_close(total, golden(f"{case}_cost_fp64_{name}"), rtol=1e-10, atol=0.0)  # fmt: skip


def test_nearest_candidate_equals_the_official_one() -> None:
    data, candidates = golden("knn_x"), golden("knn_cand")
    noise, distance = torch.zeros_like(data), torch.full((len(data),), torch.inf, dtype=torch.float16)
    for number in range(candidates.shape[1]):
        noise, distance = immiscible.nearer(data, noise, distance, candidates[:, number])
    assert torch.equal(noise, golden("knn_sel"))


# 2. property


@pytest.fixture
def data() -> Tensor:
    return torch.rand(32, 1, 6, 6, generator=torch.Generator().manual_seed(1)) * 2 - 1


def draw(coupling, data: Tensor):
    return coupling(data, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("cost", ["l2", "l1", "sql2"])
@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_assignment_never_costs_more_than_the_order_of_the_draw(cost: str, precision: str, data: Tensor) -> None:
    noise = draw(Independent(), data).noise
    assigned = draw(immiscible.LinearAssignment(cost, precision), data).noise
    before, after = (
        immiscible.pair_costs(data, part, cost, precision).double().diagonal().sum() for part in (noise, assigned)
    )
    assert after < before


@pytest.mark.parametrize("scope", ["local", "global"])
def test_assignment_keeps_the_noises_of_the_batch(scope: str, data: Tensor) -> None:
    noise = draw(Independent(), data).noise
    pairs = draw(immiscible.LinearAssignment(scope=scope), data)
    assert pairs.rows is None
    order, expected = (part.flatten(1)[:, 0].sort().indices for part in (pairs.noise, noise))
    assert torch.equal(pairs.noise[order], noise[expected])


def test_flip_negates_the_assigned_noise(data: Tensor) -> None:
    plain, flipped = (draw(immiscible.LinearAssignment(flip=flip), data).noise for flip in (False, True))
    assert torch.equal(flipped, -plain)


def test_batch_of_one_is_independent(data: Tensor) -> None:
    one = data[:1]
    assert torch.equal(draw(immiscible.LinearAssignment(), one).noise, draw(Independent(), one).noise)


def test_one_of_one_is_independent(data: Tensor) -> None:
    assert torch.equal(draw(immiscible.NearestOfK(1), data).noise, draw(Independent(), data).noise)


def test_nearest_of_k_is_the_argmin_over_the_same_draws(data: Tensor) -> None:
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([torch.randn(data.shape, generator=generator) for _ in range(5)], dim=1)
    distance = (data.half()[:, None] - draws.half()).flatten(2).float().norm(dim=2).half()
    expected = draws[torch.arange(len(data)), distance.argmin(1)]
    assert torch.equal(draw(immiscible.NearestOfK(5), data).noise, expected)


def test_nearest_of_k_shrinks_the_noise() -> None:
    """About c_k 2 / S of |n|^2 with S = sqrt(2 D + 4 |x|^2), c_8 = 1.42: 17 % here, up to the normal approximation."""
    data = torch.zeros(2000, 64)
    noise = draw(immiscible.NearestOfK(8), data).noise
    assert float(noise.square().mean()) == pytest.approx(1 - 1.42 * 2 / (2 * 64) ** 0.5, abs=0.03)


def test_ties_keep_the_first_candidate() -> None:
    data, inf = torch.zeros(1, 2), torch.full((1,), torch.inf, dtype=torch.float16)
    noise, distance = immiscible.nearer(data, data, inf, torch.tensor([[1.0, 0.0]]))
    noise, _ = immiscible.nearer(data, noise, distance, torch.tensor([[0.0, 1.0]]))
    assert noise.tolist() == [[1.0, 0.0]]


def test_transport_pairs_are_pairs_of_the_plan(data: Tensor) -> None:
    """With replacement rows repeat; each noise stays with the image it was matched to."""
    matched = draw(immiscible.ExactOT(replacement=False), data).noise
    pairs = draw(immiscible.ExactOT(), data)
    assert torch.equal(pairs.noise, matched[pairs.rows])
    assert 0.5 < len(pairs.rows.unique()) / len(data) < 0.8  # 1 - 1/e = 0.63 of the images remain


def test_transport_without_replacement_is_assignment_of_squares(data: Tensor) -> None:
    squares = immiscible.LinearAssignment("sql2", "fp32")
    assert torch.equal(draw(immiscible.ExactOT(replacement=False), data).noise, draw(squares, data).noise)


def test_coupling_leaves_the_precision_of_images_and_noise(data: Tensor) -> None:
    drawn = draw(Independent(), data.double()).noise
    chosen = draw(immiscible.LinearAssignment(), data.double()).noise
    assert set(chosen.flatten().tolist()) == set(drawn.flatten().tolist())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cost": "cosine"}, "coupling.cost must be one of l2, l1, sql2, got 'cosine'"),
        ({"precision": "bf16"}, "coupling.precision must be one of fp16, fp32, got 'bf16'"),
        ({"scope": "node"}, "coupling.scope must be one of local, global, got 'node'"),
    ],
)
def test_unknown_options_are_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        immiscible.LinearAssignment(**options)


# 4. parallel


def parallel_run(out: str) -> None:
    """Both ranks: official two-process case, and a global coupling of uneven batches."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    noise = torch.cat([golden("w2_noise_rank0"), golden("w2_noise_rank1")])
    official = immiscible.assign_globally(golden(f"w2_x_rank{rank}"), noise)
    images = torch.cat([golden("w2_x_rank0"), golden("w2_x_rank1")])[:15]
    uneven = draw(immiscible.LinearAssignment(scope="global"), images.tensor_split(2)[rank]).noise
    torch.save({"official": official, "uneven": uneven}, f"{out}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.distributed
def test_global_assignment_on_two_processes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([*command, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for rank, found in enumerate(ranks):
        assert torch.equal(found["official"], golden(f"w2_assigned_rank{rank}"))
    # batches of 8 and 7: one process with all 15 images gives the same
    images = torch.cat([golden("w2_x_rank0"), golden("w2_x_rank1")])[:15]
    whole = draw(immiscible.LinearAssignment(), images).noise
    assert torch.equal(torch.cat([found["uneven"] for found in ranks]), whole)


if __name__ == "__main__":
    parallel_run(sys.argv[1])
