"""Diffusion spectral entropy: golden values of the official functions, properties, and the callback."""

import math
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from observed import fit, weights
from torch import Tensor

from callbacks.categories import equal_width_bins, spectral_clusters
from callbacks.entropy_baselines import adjacency_entropy, matrix_entry_entropy, shannon_entropy
from callbacks.spectral_entropy import (
    SpectralEntropy,
    diffusion_matrix,
    diffusion_spectral_entropy,
    diffusion_spectral_mutual_information,
    gaussian_kernel,
    mutual_information,
    squared_distances,
)

GOLDEN = {k: torch.from_numpy(v) for k, v in np.load(Path(__file__).parent / "golden" / "spectral_entropy.npz").items()}
SIGMAS = (10.0, 1.0, 2.0, "sqrt_dim")
EXACT: dict[str, Any] = {"rel": 0, "abs": 1e-9}


# 1. reference: the official functions


@pytest.mark.parametrize("k", [0, 1])
class TestGolden:
    def test_entropy(self, k: int) -> None:
        points = GOLDEN[f"X{k}"]
        found = [[diffusion_spectral_entropy(points, s, t) for t in (1, 2, 5)] for s in SIGMAS]
        assert found == pytest.approx(GOLDEN[f"dse{k}"].numpy(), **EXACT)

    def test_eigenvalues(self, k: int) -> None:
        matrix = diffusion_matrix(gaussian_kernel(GOLDEN[f"X{k}"], 2.0))
        torch.testing.assert_close(torch.linalg.eigvalsh(matrix).flip(0), GOLDEN[f"eig{k}"], rtol=0, atol=1e-10)

    def test_anisotropic_entropy(self, k: int) -> None:
        found = diffusion_spectral_entropy(GOLDEN[f"X{k}"], 2.0, normalisation="anisotropic")
        assert found == pytest.approx(float(GOLDEN[f"dse_trueanis{k}"]), **EXACT)

    def test_entropy_of_a_sample(self, k: int) -> None:
        points = GOLDEN[f"X{k}"]
        found = diffusion_spectral_entropy(points, 2.0, max_points=len(points) // 2)
        assert found == pytest.approx(float(GOLDEN[f"dse_maxN{k}"]), **EXACT)

    def test_mutual_information_with_labels(self, k: int) -> None:
        points, labels = GOLDEN[f"X{k}"], GOLDEN[f"y{k}"]
        found = [[diffusion_spectral_mutual_information(points, labels, s, t).value for t in (1, 2)] for s in SIGMAS]
        assert found == pytest.approx(GOLDEN[f"dsmi_label{k}"].numpy(), **EXACT)

    def test_mutual_information_with_another_seed(self, k: int) -> None:
        points, labels = GOLDEN[f"X{k}"], GOLDEN[f"y{k}"]
        found = diffusion_spectral_mutual_information(points, labels, 2.0, repetitions=3, seed=7)
        assert found.value == pytest.approx(float(GOLDEN[f"dsmi_seed7_{k}"]), **EXACT)

    def test_mutual_information_with_a_number(self, k: int) -> None:
        bins = equal_width_bins(GOLDEN[f"cont{k}"], 4)
        # NumPy's digitize counts from 1
        assert torch.equal(bins + 1, GOLDEN[f"cont_bins{k}"])
        found = diffusion_spectral_mutual_information(GOLDEN[f"X{k}"], bins, 2.0)
        assert found.value == pytest.approx(float(GOLDEN[f"dsmi_cont{k}"]), **EXACT)

    def test_mutual_information_with_clusters(self, k: int) -> None:
        found = diffusion_spectral_mutual_information(GOLDEN[f"X{k}"], GOLDEN[f"ref_clusters{k}"], 2.0)
        assert found.value == pytest.approx(float(GOLDEN[f"dsmi_ref{k}"]), **EXACT)

    def test_binned_shannon_entropy(self, k: int) -> None:
        found = [shannon_entropy(GOLDEN[f"X{k}"], bins) for bins in (2, 5)]
        assert found == pytest.approx(GOLDEN[f"cse{k}"].numpy(), **EXACT)

    def test_binned_mutual_information(self, k: int) -> None:
        found = mutual_information(GOLDEN[f"X{k}"], GOLDEN[f"y{k}"], lambda p: shannon_entropy(p, 2))
        assert found == pytest.approx(float(GOLDEN[f"csmi_label{k}"]), **EXACT)

    def test_matrix_entries(self, k: int) -> None:
        found = matrix_entry_entropy(GOLDEN[f"X{k}"], 2.0)
        assert found == pytest.approx(float(GOLDEN[f"matrix_entry{k}"]), **EXACT)

    def test_adjacency(self, k: int) -> None:
        points, golden = GOLDEN[f"X{k}"], GOLDEN[f"ase{k}"].tolist()
        assert adjacency_entropy(points, "gauss", 2.0) == pytest.approx(golden[0], **EXACT)
        assert adjacency_entropy(points, "anisotropic", 2.0) == pytest.approx(golden[1], **EXACT)

    def test_neighbour_adjacency(self, k: int) -> None:
        """The matrix is defective: eigenvalues that are 0 come out as 1e-8 or so, differently for each LAPACK."""
        found = adjacency_entropy(GOLDEN[f"X{k}"], "knn", neighbours=5)
        assert found == pytest.approx(float(GOLDEN[f"ase{k}"][2]), rel=0, abs=1e-6)


def test_private_stream_is_that_of_the_standard_library() -> None:
    assert random.Random(0).sample(range(60), k=10) == GOLDEN["sample_n60_k10"].tolist()


# 2. properties


def cloud(count: int = 40, dim: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_equal_points_have_no_entropy() -> None:
    assert diffusion_spectral_entropy(torch.ones(20, 3)) == pytest.approx(0, abs=1e-9)


def test_isolated_points_have_all_entropy() -> None:
    assert diffusion_spectral_entropy(1000 * cloud(32), sigma=1.0) == pytest.approx(5, abs=1e-9)


def test_one_point_has_no_entropy() -> None:
    assert diffusion_spectral_entropy(torch.ones(1, 3)) == pytest.approx(0, abs=1e-9)


def test_shift_rotation_and_order_change_nothing() -> None:
    points = cloud()
    rotation = torch.linalg.qr(cloud(6, 6, 1)).Q
    moved = (points @ rotation + 1e4)[torch.randperm(40, generator=torch.Generator().manual_seed(2))]
    expected = diffusion_spectral_entropy(points, 1.0)
    assert diffusion_spectral_entropy(moved, 1.0) == pytest.approx(expected, abs=1e-8)


def test_distances_are_the_plain_ones() -> None:
    points = cloud()
    torch.testing.assert_close(squared_distances(points), torch.cdist(points, points).square(), rtol=1e-9, atol=1e-9)


def test_median_bandwidth_ignores_the_scale() -> None:
    entropies = [diffusion_spectral_entropy(scale * cloud(), "median") for scale in (1.0, 37.0)]
    assert entropies[0] == pytest.approx(entropies[1], abs=1e-9)


def test_official_normalisation_is_the_isotropic_walk() -> None:
    gauss = gaussian_kernel(cloud(), 1.0)
    walk = torch.linalg.eigvals(gauss / gauss.sum(1, keepdim=True)).real.sort().values
    torch.testing.assert_close(torch.linalg.eigvalsh(diffusion_matrix(gauss)), walk, rtol=0, atol=1e-10)


def test_information_of_separated_classes_is_what_they_split() -> None:
    labels = torch.arange(4).repeat_interleave(16)
    # four heaps of equal points, far apart: 0 bits within a class
    points = 1000.0 * torch.nn.functional.one_hot(labels, 4)
    information = diffusion_spectral_mutual_information(points, labels, 1.0)
    assert information.value == pytest.approx(information.subset_entropy, abs=1e-9)
    assert information.value > 1


def test_global_random_state_is_left_alone() -> None:
    random.seed(3)
    expected = random.Random(3).random()
    diffusion_spectral_mutual_information(cloud(), torch.arange(40) % 4)
    assert random.random() == expected


def test_spectral_clusters_find_separated_heaps() -> None:
    labels = torch.arange(3).repeat_interleave(20)
    heaps = 10.0 * torch.nn.functional.one_hot(labels, 3) + 0.1 * cloud(60, 3)
    assert diffusion_spectral_mutual_information(heaps, spectral_clusters(heaps, 3), 1.0).value > 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    points = cloud()
    points[3, 2] = bad
    with pytest.raises(ValueError, match="points must be finite"):
        diffusion_spectral_entropy(points)


def test_unknown_normalisation_is_refused() -> None:
    with pytest.raises(ValueError, match="normalisation must be official or anisotropic, got 'none'"):
        diffusion_spectral_entropy(cloud(), normalisation="none")  # type: ignore[arg-type]


# 3. callback


def entropy(**options: Any) -> SpectralEntropy:
    return SpectralEntropy(**{"layers": ["net.2"], "num_points": 24, "sigma": 1.0, **options})


def test_observer_changes_nothing(tmp_path: Path) -> None:
    plain = fit(tmp_path, [], num_sanity_val_steps=-1)
    observed = fit(tmp_path, [entropy(layers=["net.*"], inputs="image", num_clusters=3)], num_sanity_val_steps=-1)
    for name, value in weights(plain).items():
        assert torch.equal(weights(observed)[name], value), name
    ours = {name: float(value) for name, value in plain.callback_metrics.items()}
    assert {name: float(observed.callback_metrics[name]) for name in ours} == ours


def test_logged_value_is_that_of_the_layer_on_the_chosen_examples(tmp_path: Path) -> None:
    callback = entropy(num_points=1000)
    trainer = fit(tmp_path, [callback])
    module: Any = trainer.lightning_module.eval()
    data: Any = trainer.datamodule
    batch = data.as_evaluated(data.examples("test")[torch.arange(40)])
    with torch.no_grad():
        points = module.net[:3](batch["image"]).flatten(1)
    metrics = trainer.callback_metrics
    assert float(metrics["dse/net.2"]) == pytest.approx(diffusion_spectral_entropy(points, 1.0), abs=1e-5)
    expected = diffusion_spectral_mutual_information(points, batch["label"], 1.0).value
    assert float(metrics["dsmi_y/net.2"]) == pytest.approx(expected, abs=1e-5)


def test_rise_is_counted_from_before_training(tmp_path: Path) -> None:
    metrics = fit(tmp_path, [entropy()], num_sanity_val_steps=-1).callback_metrics
    assert float(metrics["dse_rise/net.2"]) == pytest.approx(
        float(metrics["dse/net.2"]) - float(metrics["dse_start/net.2"]), abs=1e-5
    )


def test_no_hook_is_left_and_values_have_no_gradient(tmp_path: Path) -> None:
    seen: list[Tensor] = []
    callback = entropy()
    measure = callback._measure
    callback._measure = lambda points: seen.extend(points.values()) or measure(points)  # type: ignore[method-assign,func-returns-value]
    trainer = fit(tmp_path, [callback], epochs=1)
    assert not any(layer._forward_hooks for layer in trainer.lightning_module.modules())
    assert seen
    assert not any(value.requires_grad for value in seen)


def test_epochs_between_measurements(tmp_path: Path) -> None:
    callback = entropy(every_n_epochs=2)
    count: list[int] = []
    measure = callback._measure
    callback._measure = lambda points: count.append(1) or measure(points)  # type: ignore[method-assign,func-returns-value]
    fit(tmp_path, [callback], epochs=5)
    assert len(count) == 2


def test_unknown_layer_is_named_with_the_candidates(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"SpectralEntropy.layers: no layer 'net.9' in Classifier; it has net, net.0"):
        fit(tmp_path, [entropy(layers=["net.9"])])


def test_layer_that_validation_does_not_call_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"validation loader -1 did not call the layers net\.unused"):
        fit(tmp_path, [entropy(layers=["net.unused"])], net=WithUnusedLayer)


def test_loader_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="loader must be one of the 2 validation loaders, got 2"):
        fit(tmp_path, [entropy(loader=2)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": []}, "layers must name at least one layer"),
        ({"num_points": 1}, "num_points must be at least 2, got 1"),
        ({"sigma": 0.0}, "sigma must be positive, sqrt_dim or median, got 0.0"),
    ],
)
def test_options_outside_their_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        entropy(**options)


class WithUnusedLayer(torch.nn.Sequential):
    def __init__(self) -> None:
        super().__init__(torch.nn.Flatten(), torch.nn.Linear(36, 4))
        self.add_module("unused", torch.nn.Linear(2, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self[1](self[0](x))


# 4. parallel


def parallel_run(out: Path, devices: int) -> None:
    options: dict[str, Any] = {"devices": devices} | ({"strategy": "ddp"} if devices > 1 else {})
    callback = entropy(inputs="image", num_clusters=3)
    computed: list[int] = []
    measure = callback._measure
    callback._measure = lambda points: computed.append(len(points["net.2"])) or measure(points)  # type: ignore[method-assign,func-returns-value]
    trainer = fit(out.parent, [callback], epochs=1, net=plain_net, augment=False, num_sanity_val_steps=-1, **options)
    parts: list[Any] = [(computed, {k: float(v) for k, v in trainer.callback_metrics.items()})]
    if devices > 1:
        parts = [None] * devices
        torch.distributed.all_gather_object(parts, (computed, dict(trainer.callback_metrics)))
        parts = [(c, {k: float(v) for k, v in m.items()}) for c, m in parts]
    if trainer.is_global_zero:
        torch.save(parts, out)


def plain_net() -> torch.nn.Module:
    nn = torch.nn
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 4))


@pytest.mark.distributed
def test_two_processes_gather_once_and_equal_one(tmp_path: Path) -> None:
    parallel_run(tmp_path / "one.pt", 1)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [*command, str(tmp_path / "two.pt")], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (torch.load(tmp_path / f"{name}.pt", weights_only=False) for name in ("one", "two"))
    assert [computed for computed, _ in two] == [[24, 24], []]
    expected = {k: v for k, v in one[0][1].items() if k.startswith(("dse", "dsmi", "feature"))}
    for _, metrics in two:
        assert {k: metrics[k] for k in expected} == pytest.approx(expected, rel=1e-4, abs=1e-5)


if __name__ == "__main__":
    L.seed_everything(5)
    parallel_run(Path(sys.argv[1]), devices=2)
