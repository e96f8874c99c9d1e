"""Local complexity, adversarial accuracy and linear regions: golden values, properties, and the callbacks."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from observed import fit, weights
from torch import Tensor, nn

from callbacks.adversarial import AdversarialAccuracy, logit_margins, pgd
from callbacks.layers import evaluating
from callbacks.linear_regions import LinearRegionPicture, plane_through, region_borders
from callbacks.local_complexity import (
    LocalComplexity,
    crossing_counts,
    hull_vertices,
    local_complexity,
    orthonormal_frame,
)
from callbacks.milestones import Milestones
from callbacks.rng import make_generator
from callbacks.step_probe import log_spaced_steps, window_means
from lightning_modules.networks.narrow_resnet import NarrowPreActResNet18

FILE = np.load(Path(__file__).parent / "golden" / "local_complexity.npz")


def golden(name: str) -> Tensor:
    return torch.from_numpy(FILE[name])


def golden_mlp(k: int) -> nn.Sequential:
    activation = {"relu": nn.ReLU, "gelu": nn.GELU}[str(FILE[f"m{k}_act"])]
    layers: list[nn.Module] = []
    for number in range(sum(name.startswith(f"m{k}_W") for name in FILE.files)):
        weight = golden(f"m{k}_W{number}")
        layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=torch.float64)
        layer.weight.data, layer.bias.data = weight, golden(f"m{k}_b{number}")
        layers += [layer, activation()]
    return nn.Sequential(*layers[:-1])


def linear_layers(net: nn.Module) -> dict[str, nn.Module]:
    return {name: layer for name, layer in net.named_modules() if isinstance(layer, nn.Linear)}


# 1. reference: the official functions


@pytest.mark.parametrize("k", [0, 1])
class TestGolden:
    @pytest.mark.parametrize("max_rows", [8, 1024])
    def test_counts(self, k: int, max_rows: int) -> None:
        net = golden_mlp(k)
        radii = FILE[f"m{k}_r"].tolist()
        counts, _ = local_complexity(
            net, golden(f"m{k}_x"), golden(f"m{k}_frame"), radii, linear_layers(net), max_rows=max_rows
        )
        assert torch.equal(counts.double(), golden(f"m{k}_counts"))

    def test_vertices(self, k: int) -> None:
        found = hull_vertices(golden(f"m{k}_x")[:2], golden(f"m{k}_frame"), float(FILE[f"m{k}_r"][0]))
        torch.testing.assert_close(found, golden(f"m{k}_hull2"), rtol=0, atol=1e-12)

    def test_attack(self, k: int) -> None:
        net, inputs, eps = golden_mlp(k), golden(f"m{k}_x"), float(FILE[f"m{k}_pgd_eps"])
        moved = pgd(net, inputs, torch.arange(len(inputs)) % 10, eps, eps / 4)
        torch.testing.assert_close(moved, golden(f"m{k}_pgd_adv"), rtol=0, atol=1e-10)
        assert torch.equal(net(moved).argmax(1), golden(f"m{k}_pgd_pred"))


def test_golden_counts_of_a_residual_net() -> None:
    net = NarrowPreActResNet18(width=2)
    net.load_state_dict({name[3:]: golden(name) for name in FILE.files if name.endswith(("weight", "bias"))})
    net = net.double()
    layers = {name: net.get_submodule(name) for name in (n.replace("::", ".") for n in FILE["rn_layers"].tolist())}
    counts, _ = local_complexity(net, golden("rn_x"), golden("rn_frame"), [float(FILE["rn_r"])], layers)
    assert torch.equal(counts[0].double(), golden("rn_counts"))


def test_golden_sign_changes_with_exact_zeros() -> None:
    assert torch.equal(crossing_counts(golden("prim_act"), 4), golden("prim_count"))


# 2. properties


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("count", "dim"), [(3, 8), (8, 8), (12, 5)])
def test_directions_have_length_one(count: int, dim: int) -> None:
    frame = orthonormal_frame(count, dim, generator())
    torch.testing.assert_close(frame.norm(dim=1), torch.ones(count, dtype=torch.float64))


def test_directions_are_orthogonal() -> None:
    frame = orthonormal_frame(5, 8, generator())
    torch.testing.assert_close(frame @ frame.T, torch.eye(5, dtype=torch.float64))


def test_one_unit_is_crossed_where_its_hyperplane_is_near() -> None:
    net = nn.Sequential(nn.Linear(2, 1, dtype=torch.float64), nn.ReLU())
    net[0].weight.data, net[0].bias.data = torch.tensor([[1.0, 0.0]]).double(), torch.zeros(1).double()
    points = torch.tensor([[0.04, 3.0], [0.06, 3.0]]).double()
    counts, units = local_complexity(net, points, torch.eye(2).double(), [0.05])
    assert counts[0, :, 0].tolist() == [1, 0]
    assert units == {"1": 1}


class Skip(nn.Module):
    """Uses its input twice: the first layer alone does not see it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.last = nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.first(x) + 3 * x))


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.last = nn.Linear(6, 9), nn.ReLU(inplace=True), nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.first(2 * x)))


def one_at_a_time(net: nn.Module, points: Tensor, frame: Tensor, radius: float, layer: nn.Module) -> list[int]:
    """The definition, point by point, vertex by vertex."""
    counts = []
    for point in points:
        signs = []
        handle = layer.register_forward_pre_hook(lambda _, args, signs=signs: signs.append(args[0].sign().flatten()))
        for direction in torch.cat([frame, -frame]):
            net((point.flatten() + radius * direction).reshape(1, *point.shape))
        handle.remove()
        counts.append(int((torch.stack(signs) != signs[0]).any(0).sum()))
    return counts


def convolution() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))


@pytest.mark.parametrize(
    ("build", "shape", "layer"), [(Skip, (6,), "act"), (InPlace, (6,), "act"), (convolution, (1, 2, 2), "2")]
)
def test_fast_form_equals_the_definition(build: Any, shape: tuple[int, ...], layer: str) -> None:
    torch.manual_seed(1)
    net = build().double().eval()
    points = torch.rand(7, *shape, generator=generator(), dtype=torch.float64)
    frame = orthonormal_frame(3, points[0].numel(), generator())
    counts, _ = local_complexity(net, points, frame, [0.3], max_rows=12)
    assert counts[0, :, 0].tolist() == one_at_a_time(net, points, frame, 0.3, net.get_submodule(layer))
    assert counts.sum() > 0


def test_modes_buffers_and_gradients_come_back() -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    net[1].eval()
    net[3].requires_grad_(False)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    inputs, labels = torch.rand(5, 6, generator=generator()), torch.tensor([0, 1, 2, 0, 1])
    local_complexity(net, inputs, orthonormal_frame(2, 6, generator()), [0.1])
    pgd(net, inputs, labels, 0.1, 0.025)
    assert [part.training for part in net] == [True, False, True, True]
    assert [p.requires_grad for p in net.parameters()] == [True] * 4 + [False] * 2
    assert all(p.grad is None for p in net.parameters())
    assert all(torch.equal(net.state_dict()[name], value) for name, value in before.items())
    assert "forward" not in vars(net[0])


def test_modes_come_back_after_an_error() -> None:
    net = nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), evaluating(net):
        net(torch.zeros(1, 3))
    assert net.training
    assert torch.is_grad_enabled()


def test_memory_does_not_grow_with_the_number_of_points() -> None:
    """The most rows a layer ever sees is the bound, and all points are counted."""
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU())
    rows: list[int] = []
    net[2].register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    for count in (10, 300):
        points = torch.rand(count, 6, generator=generator())
        counts, _ = local_complexity(net, points, orthonormal_frame(4, 6, generator()), [0.5], max_rows=64)
        assert counts.shape == (1, count, 2)
    assert max(rows) == 64


def test_attack_stays_in_the_ball_and_the_range() -> None:
    torch.manual_seed(0)
    net, inputs = nn.Linear(6, 3), torch.rand(20, 6, generator=generator())
    moved = pgd(net, inputs, torch.arange(20) % 3, eps=0.2, alpha=0.1, bounds=(0.0, 1.0), loss="margin")
    assert float((moved - inputs).abs().max()) == pytest.approx(0.2, abs=1e-6)
    assert float(moved.min()) >= 0
    assert float(moved.max()) <= 1


def test_attack_on_a_linear_net_reaches_the_closed_form() -> None:
    """The margin of two classes falls by eps times the L1 norm of the difference of their weights."""
    torch.manual_seed(0)
    net = nn.Linear(6, 2).double()
    inputs, labels = torch.rand(5, 6, generator=generator(), dtype=torch.float64), torch.zeros(5, dtype=torch.int64)
    moved = pgd(net, inputs, labels, 0.1, 0.05, bounds=(-9.0, 9.0), loss="margin")
    drop = logit_margins(net(inputs), labels) - logit_margins(net(moved), labels)
    expected = 0.1 * (net.weight[0] - net.weight[1]).abs().sum()
    torch.testing.assert_close(drop, expected.expand(5))


def test_cross_entropy_attack_in_float32_finds_no_gradient_where_margins_are_large() -> None:
    net = nn.Linear(4, 2, bias=False)
    net.weight.data = torch.tensor([[2000.0] * 4, [-2000.0] * 4])
    inputs, labels = torch.full((1, 4), 0.05), torch.zeros(1, dtype=torch.int64)
    stuck = pgd(net, inputs, labels, 0.2, 0.05, bounds=(-1.0, 1.0))
    moved = pgd(net, inputs, labels, 0.2, 0.05, bounds=(-1.0, 1.0), loss="margin")
    assert torch.equal(stuck, inputs)
    assert int(net(moved).argmax()) == 1


def test_plane_holds_its_points() -> None:
    points = torch.rand(3, 5, generator=generator(), dtype=torch.float64)
    inputs, places = plane_through(points, 101)
    for point, (column, row) in zip(points, places.round().long().tolist(), strict=True):
        step = (inputs[1] - inputs[0]).norm()
        assert float((inputs[row * 101 + column] - point).norm()) <= float(step)


def test_points_on_a_line_are_refused() -> None:
    with pytest.raises(ValueError, match="lie on a line"):
        plane_through(torch.tensor([[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]]), 10)


def test_border_of_one_unit_is_a_line() -> None:
    net = nn.Sequential(nn.Linear(2, 1), nn.ReLU())
    net[0].weight.data, net[0].bias.data = torch.tensor([[1.0, 0.0]]), torch.tensor([-0.5])
    line = torch.arange(10) / 9
    inputs = torch.stack(torch.meshgrid(line, line, indexing="xy"), dim=-1).reshape(-1, 2)
    borders, _ = region_borders(net, inputs, 10)
    assert borders[0].any(0).nonzero().flatten().tolist() == [4]
    assert borders[0].sum() == 10


def test_log_spaced_steps() -> None:
    assert log_spaced_steps(1000, 4) == [0, 1, 10, 100, 1000]


def test_window_means_take_both_ends() -> None:
    table = {0: {"a": 9.0}, 10: {"a": 1.0}, 20: {"a": 3.0}, 30: {"a": 9.0}}
    found = window_means(table, {"mid": [10, 20], "late": [30, None], "never": [11, 19]})
    assert found == {"a_mid": 2.0, "a_late": 9.0}


# 3. callbacks


def probes() -> list[Any]:
    return [
        LocalComplexity(num_points=10, vertices=6, radii=[0.1, 1.0], num_steps=4, every_n_steps=3),
        AdversarialAccuracy(num_points=12, eps=[0.1], bounds=[-3.0, 3.0], num_steps=4),
        LinearRegionPicture(size=16, num_steps=2),
    ]


def test_observers_change_nothing(tmp_path: Path) -> None:
    plain, observed = fit(tmp_path, []), fit(tmp_path, probes())
    for name, value in weights(plain).items():
        assert torch.equal(weights(observed)[name], value), name
    ours = {name: float(value) for name, value in plain.callback_metrics.items()}
    assert {name: float(observed.callback_metrics[name]) for name in ours} == ours


def test_values_of_the_last_step_are_logged_and_tabled(tmp_path: Path) -> None:
    callbacks = probes()
    trainer = fit(tmp_path, callbacks)
    complexity = callbacks[0]
    assert sorted(complexity.table) == [0, 1, 2, 3, 4, 6, 8]
    data: Any = trainer.datamodule
    chosen = complexity._batches["test"]["index"]
    points = data.as_evaluated(data.examples("test")[chosen])["image"]
    frame = orthonormal_frame(3, 36, make_generator("lc/frame", seed=0))
    counts, _ = local_complexity(trainer.lightning_module, points, frame, [0.1])
    expected = counts.sum() / len(points)
    assert float(trainer.callback_metrics["lc/test/r0.1"]) == pytest.approx(float(expected), abs=1e-6)
    lines = (tmp_path / "curves" / "local_complexity.csv").read_text().splitlines()
    assert len(lines) == 8
    assert (tmp_path / "figures" / "regions_0000008.png").read_bytes()[:4] == b"\x89PNG"


def test_resume_repeats_no_measurement(tmp_path: Path) -> None:
    whole = probes()[0]
    fit(tmp_path, [whole], epochs=2)
    first = probes()[0]
    # the schedule of a run of two epochs, cut off after the first
    trainer = fit(tmp_path, [first], epochs=2, max_steps=4)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed, seen = probes()[0], []
    measure = resumed.measure
    resumed.measure = lambda trainer, network: seen.append(trainer.global_step) or measure(trainer, network)
    fit(tmp_path, [resumed], epochs=2, ckpt_path=tmp_path / "half.ckpt")
    assert seen == [6, 8]
    assert resumed.table[8] == whole.table[8]


def test_unknown_layer_is_named_with_the_candidates(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"LocalComplexity.layers: no layer 'net.relu' in Classifier; it has net"):
        fit(tmp_path, [LocalComplexity(layers=["net.relu"])])


def test_net_without_activation_modules_needs_layers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="layers must be given: no activation modules among net"):
        fit(tmp_path, [LocalComplexity()], net=lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, 4)))


def test_milestone_is_the_first_step_at_the_value(tmp_path: Path) -> None:
    milestones = Milestones({"some": ("train/acc", 0.0), "none": ("train/acc", 2.0)})
    trainer = fit(tmp_path, [milestones], epochs=2, enable_checkpointing=True)
    assert float(trainer.callback_metrics["reached/some"]) == 4
    assert "reached/none" not in trainer.callback_metrics


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vertices": 5}, "vertices must be even and positive, got 5"),
        ({"radii": [0.0]}, "radii must be positive"),
        ({"num_points": 0}, "LocalComplexity.num_points must be at least 1, got 0"),
        ({"windows": {"late": [3]}}, "windows must have two ends each"),
    ],
)
def test_options_outside_their_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LocalComplexity(**options)


# 4. parallel


def plain_net() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 4))


def parallel_run(out: Path, devices: int) -> None:
    options: dict[str, Any] = {"devices": devices} | ({"strategy": "ddp"} if devices > 1 else {})
    callbacks = probes()[:2]
    trainer = fit(out.parent, callbacks, epochs=1, net=plain_net, augment=False, **options)
    if trainer.is_global_zero:
        torch.save([callback.table for callback in callbacks], out)


@pytest.mark.distributed
def test_two_processes_equal_one(tmp_path: Path) -> None:
    parallel_run(tmp_path / "one.pt", 1)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [*command, str(tmp_path / "two.pt")], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (torch.load(tmp_path / f"{name}.pt", weights_only=False) for name in ("one", "two"))
    for mine, theirs in zip(one, two, strict=True):
        assert theirs.keys() == mine.keys()
        for step, row in mine.items():
            assert theirs[step] == pytest.approx(row, rel=1e-5, abs=1e-6), step


if __name__ == "__main__":
    parallel_run(Path(sys.argv[1]), devices=2)
