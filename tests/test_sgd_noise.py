"""SGD noise in ensembles: reference, property, gradient, parallel, resume, recipe, bad input."""

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor
from two_processes import run_two

from datamodules.member_sets import PictureClasses, SignPoints, depleted_sign
from datamodules.sources import ImageSets, ImageSource
from lightning_modules import sgd_noise
from lightning_modules.sgd_noise import SGDNoise
from lightning_modules.stacks import dynamics, nets
from lightning_modules.stacks.architectures import MLP
from lightning_modules.stacks.batches import counter_subsets
from lightning_modules.stacks.table import as_columns, read_members
from scripts import recipes
from scripts.__main__ import main

GOLDEN = Path(__file__).parent / "golden"
POINTS = np.load(GOLDEN / "sgd_noise_points.npz")
"""Statistics of 20,000 points of the official `depleted_sign`."""
WEIGHTS, SDE = np.load(GOLDEN / "sgd_noise.npz"), np.load(GOLDEN / "sgd_noise_observables.npz")
"""Official functions (AntonioScl/SGD_learning_regimes), float64."""


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Bit-equality is promised for one thread."""
    torch.set_num_threads(1)


class Blobs(ImageSource):
    """Noisy pictures of ten classes, the even ones brighter on the left."""

    def read(self) -> ImageSets:
        """600 for training, 200 for tests, 4 x 4."""
        generator = torch.Generator().manual_seed(0)
        labels = torch.arange(800) % 10
        images = torch.randint(120, (800, 1, 4, 4), generator=generator)
        images[labels % 2 == 0, :, :, :2] += 60
        return ImageSets(images[:600].byte(), labels[:600], images[600:].byte(), labels[600:], 10)


OPTIONS: dict[str, Any] = {
    "log2_alphas": [15, 0],
    "log2_lrs": [-2, 3, 9],
    "train_sizes": [40, 64],
    "batch_size": 8,
    "max_steps": 400,
    "check": 20,
    "replicas": 2,
}
"""Twenty-four nets; some fit, some diverge, some do not finish."""


def fit(folder: Path, epochs: int = -1, ckpt: Path | None = None, bursts: int = 5, **options: Any) -> SGDNoise:
    """Trains a small grid on pictures; two processes under torchrun's variables."""
    L.seed_everything(3)
    module = SGDNoise(**{"stack": MLP(width=8, depth=2), **OPTIONS, **options})
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=int(os.environ.get("WORLD_SIZE", 1)),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    data = PictureClasses(Blobs(), positive=[0, 2, 4, 6, 8], num_test=100, bursts=bursts)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt)
    trainer.save_checkpoint(folder / "end.ckpt")
    return module


def rows_of(folder: Path) -> dict[str, dict[str, Any]]:
    return read_members([str(folder / "members.parquet")])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A grid trained in one stack."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole")
    fit(folder, slots=24)
    return folder


def assert_same(ours: dict[str, dict[str, Any]], theirs: dict[str, dict[str, Any]]) -> None:
    """Every column of every net, bit for bit; NaN equals NaN."""
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert repr(ours[name]) == repr(theirs[name])


# 1. reference


@pytest.mark.parametrize("phi", ["relu", "gelu"])
def test_noise_in_place_of_batches_equals_the_golden_step(phi: Any) -> None:
    def stack(source: Any, part: str) -> list[Tensor]:
        return [torch.from_numpy(source[f"mlp_{phi}_{part}_{layer}"]).unsqueeze(0) for layer in range(4)]

    inputs, labels = (torch.from_numpy(WEIGHTS[name]).unsqueeze(0) for name in ("x", "y"))
    scales = nets.layer_scales(6, 8, 3, float(WEIGHTS[f"act_c_{phi}"]))
    offset = nets.forward(stack(WEIGHTS, "w0"), inputs, scales, phi)
    weights, normal = stack(WEIGHTS, "w1"), torch.from_numpy(SDE[f"mlp_{phi}_sde_noise"]).unsqueeze(0)
    lr = torch.from_numpy(WEIGHTS["dt"]).view(1)

    def delta(output: Tensor) -> Tensor:
        force = dynamics.descent(float(WEIGHTS["alpha"]) * output * labels, "hinge")
        return dynamics.sde_delta(force, labels, lr, 4, normal)

    nets.update_(weights, inputs, offset, delta, scales, phi)
    for ours, theirs in zip(weights, stack(SDE, "sde_w"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_depleted_points_have_the_golden_quantiles() -> None:
    points, labels = depleted_sign(20_000, 6, float(POINTS["dep_chi"]), torch.Generator().manual_seed(0))
    found = points[:, 0].abs().double().quantile(torch.from_numpy(POINTS["dep_absx1_quantiles_p"]))
    torch.testing.assert_close(found, torch.from_numpy(POINTS["dep_absx1_quantiles_20k"]), rtol=0.03, atol=0)
    assert float(points[:, 1].std()) == pytest.approx(float(POINTS["dep_x2_std_20k"]), rel=0.03)
    assert torch.equal(labels, points[:, 0].sign())


@pytest.mark.parametrize(("loss", "value"), [("hinge", 0.75), ("quadhinge", 0.5625), ("mse", 0.28125)])
def test_loss_of_a_quarter_margin(loss: Any, value: float) -> None:
    """z = 1/4: 1 - z, its square, half of it (official code: `train.py`)."""
    assert float(dynamics.margin_loss(torch.tensor(0.25), loss)) == value


def test_soft_hinge_of_a_half_margin() -> None:
    """u = 1/2: u exp(-1 / (2 u)) (official code: `srelu`)."""
    assert float(dynamics.margin_loss(torch.tensor(0.5), "softhinge")) == pytest.approx(0.5 * np.exp(-1), rel=1e-6)


# 2. property


@pytest.mark.parametrize(
    "options", [{"slots": 1}, {"slots": 5}, {"train_sizes": [64]}], ids=["alone", "chunks", "grid"]
)
def test_nets_are_bit_equal_in_any_stack_and_grid(options: dict[str, Any], whole: Path, tmp_path: Path) -> None:
    fit(tmp_path, **options)
    ours, theirs = rows_of(tmp_path), rows_of(whole)
    assert_same(ours, {name: row for name, row in theirs.items() if name in ours})
    assert len(ours) == (12 if "train_sizes" in options else 24)


def test_grid_has_nets_of_every_status(whole: Path) -> None:
    assert {row["status"] for row in rows_of(whole).values()} == {"fitted", "diverged", "unfinished"}


def test_shards_gathered_from_their_files_are_the_whole(whole: Path, tmp_path: Path) -> None:
    folders = [tmp_path / f"shard{shard}" for shard in range(3)]
    for shard, folder in enumerate(folders):
        fit(folder, shard=shard, shards=3)
    parts = [rows_of(folder) for folder in folders]
    assert [len(part) for part in parts] == [8, 8, 8]
    module = fit(tmp_path, done=[str(folder / "members.parquet") for folder in folders])
    assert_same(rows_of(tmp_path), rows_of(whole))
    assert module.sweep is not None
    assert module.sweep.net_steps == 0
    assert "work/saved" not in module.trainer.callback_metrics


def test_work_saved_is_of_the_nets_that_trained_here(whole: Path, tmp_path: Path) -> None:
    fit(tmp_path / "first", shard=0, shards=3)
    module = fit(tmp_path, done=[str(tmp_path / "first" / "members.parquet")])
    here = rows_of(whole).keys() - rows_of(tmp_path / "first").keys()
    steps = [rows_of(whole)[name]["steps"] for name in here]
    found = float(module.trainer.callback_metrics["work/saved"])
    assert found == pytest.approx(1 - sum(steps) / (400 * 16), rel=1e-6)


def test_time_to_fit_does_not_depend_on_the_checks(whole: Path, tmp_path: Path) -> None:
    fit(tmp_path, check=50)
    keys = ("seed", "alpha", "dt", "n_train", "t_star", "test_error", "dw", "min_margin")
    found = [
        {tuple(row[key] for key in keys) for row in rows_of(folder).values() if row["status"] == "fitted"}
        for folder in (whole, tmp_path)
    ]
    assert found[0] == found[1]
    assert len(found[0]) > 5


def test_time_to_fit_is_that_of_a_plain_loop(whole: Path) -> None:
    """One net by autograd-free steps, its whole training set looked at after each of them."""
    row = next(r for r in rows_of(whole).values() if r["status"] == "fitted" and r["alpha"] == 1 and r["dt"] == 8)
    L.seed_everything(3)
    stack, replica = MLP(width=8, depth=2), row["seed"] - 3 * 2
    sets = PictureClasses(Blobs(), positive=[0, 2, 4, 6, 8], num_test=100).member_sets(2, 64)
    rows = sets.rows[replica, : row["n_train"]]
    inputs, labels = stack.prepare(sets.pool)[rows].unsqueeze(0), sets.label[rows].unsqueeze(0)
    weights = [w.unsqueeze(0) for w in stack.draw((16,), sgd_noise.make_generator(f"start/{replica}"))]
    offset = stack.forward(weights, inputs)
    key = torch.tensor([sgd_noise.seed_for(f"batches/{replica}")])
    zero, count, ones = torch.zeros(1, dtype=torch.int64), torch.tensor([len(rows)]), torch.ones(1)
    scales, last = nets.layer_scales(16, 8, 2, nets.activation_norm("relu")), 0
    for step, chosen in enumerate(counter_subsets(key, zero, 400, count, 8)[:, 0], start=1):
        if bool((row["alpha"] * (stack.forward(weights, inputs) - offset) * labels >= 1).all()):
            break
        batch = inputs[:, chosen], labels[:, chosen], offset[:, chosen]
        _, unfitted = nets.sgd_step_(weights, *batch, row["alpha"] * ones, row["dt"] * ones, scales, "relu")
        last = step if bool(unfitted.any()) else last
    assert row["t_star"] == row["dt"] * last


def test_normal_numbers_depend_on_the_step_alone_and_are_normal() -> None:
    keys = torch.arange(4)
    drawn = dynamics.counter_normals(keys, torch.zeros_like(keys), 50, 100)
    late = dynamics.counter_normals(keys[2:3], torch.tensor([30]), 20, 60)
    assert torch.equal(late[:, 0], drawn[30:, 2, :60])
    # standard errors of 20,000 draws: 0.007, 0.01, 0.035; four of them
    moments = [float((drawn**power).mean()) for power in (1, 2, 4)]
    assert moments == pytest.approx([0, 1, 3], abs=0.14)
    assert abs(moments[0]) < 0.03


def test_batches_of_unfitted_points_hold_fitted_ones_only_to_fill_up() -> None:
    margin = torch.full((1, 20), 2.0)
    margin[0, [3, 7, 11, 18]] = 0.5
    keys, points = torch.tensor([5]), torch.tensor([16])
    for step in range(30):
        few = dynamics.unfitted_first(margin, keys, torch.tensor([step]), points, 2)
        assert set(few[0].tolist()) <= {3, 7, 11}
        more = set(dynamics.unfitted_first(margin, keys, torch.tensor([step]), points, 5)[0].tolist())
        assert {3, 7, 11} < more <= set(range(16))


ONE: dict[str, Any] = {"log2_alphas": [0], "log2_lrs": [1], "train_sizes": [40], "replicas": 1, "check": 100}


@pytest.mark.parametrize("name", ["gd", "gd_sde", "only_unfit"])
def test_other_dynamics_fit_the_training_set(name: Any, tmp_path: Path) -> None:
    fit(tmp_path, dynamics=name, **{**ONE, "max_steps": 4000})
    (row,) = rows_of(tmp_path).values()
    assert (row["status"], row["n_unfitted"], row["train_error"]) == ("fitted", 0, 0.0)


@pytest.mark.parametrize("name", ["quadhinge", "softhinge"])
def test_losses_whose_force_vanishes_classify_the_training_set(name: Any, tmp_path: Path) -> None:
    """At the start every point counts as an error; the margin itself is only approached."""
    fit(tmp_path, loss=name, **{**ONE, "max_steps": 1000})
    (row,) = rows_of(tmp_path).values()
    assert row["train_error"] == 0.0


def test_kernel_of_a_lazy_net_stays_and_of_a_feature_learner_changes(tmp_path: Path) -> None:
    grid: dict[str, Any] = {"log2_alphas": [15, -6], "log2_lrs": [-3], "train_sizes": [64], "replicas": 1}
    fit(tmp_path, kernel_points=16, max_steps=2000, **grid)
    changes = {row["alpha"]: row["kernel_change_train"] for row in rows_of(tmp_path).values()}
    assert changes[2.0**15] < 0.1 * changes[2.0**-6]


def members(**columns: list[Any]) -> dict[str, np.ndarray]:
    return {name: np.array(column) for name, column in columns.items()}


def test_exponents_of_made_up_power_laws_are_found() -> None:
    """dw = T^1 P^(1/2), t* = T P^1.7, lambda = P^(1/2); T_c ~ P^(-1/2) follows."""
    grid = [(seed, lr, size) for seed in (0, 1) for lr in (1.0, 2.0, 4.0, 8.0) for size in (64, 128, 256)]
    rows = [
        {
            "seed": seed,
            "dt": lr,
            "temperature": lr / 16,
            "n_train": size,
            "dw": 0.001 * (seed + 1) * lr * size**0.5,
            "t_star": lr * size**1.7,
            "lambda": 3 * size**0.5,
            "depth": 0,
            "status": "fitted",
        }
        for seed, lr, size in grid
    ]
    found = sgd_noise.lazy_exponents(as_columns(rows), 4.0, [0.05])
    means = {name: estimate.mean for name, estimate in found.items()}
    assert means == pytest.approx({"delta": 1, "gamma": 0.5, "b": 1.7, "lambda": 0.5, "a0.05": 0.5}, abs=1e-9)


def test_edge_of_divergence_grows_as_made_up() -> None:
    """The first diverged dt is 4 alpha, on a grid of octaves."""
    rows = [
        {"seed": 0, "alpha": alpha, "dt": lr, "status": "diverged" if lr >= 4 * alpha else "unfinished"}
        for alpha in (1.0, 2.0, 4.0)
        for lr in 2.0 ** np.arange(-1, 6)
    ]
    assert sgd_noise.edge_exponent(as_columns(rows)).mean == pytest.approx(1, abs=1e-9)


def test_region_means_leave_out_what_is_not_fitted() -> None:
    table = members(
        alpha=[1.0, 1.0, 1.0, 8.0],
        dt=[1.0, 2.0, 2.0, 1.0],
        status=["fitted", "fitted", "diverged", "fitted"],
        test_error=[0.1, 0.3, 1.0, 0.9],
        dw=[1.0, 4.0, 9.0, 9.0],
    )
    assert sgd_noise.region_means(table, [0, 1, 1, 2]) == pytest.approx((0.2, 2.0))


def test_fewer_sign_points_are_the_first_of_more() -> None:
    data = SignPoints(dim=4, num_test=10)
    few, many = data.member_sets(2, 50), data.member_sets(2, 1500)
    assert torch.equal(few.pool[few.rows[1]], many.pool[many.rows[1, :50]])
    assert not torch.equal(many.pool[many.rows[0]], many.pool[many.rows[1]])


def test_pictures_are_scaled_as_one_and_labelled_by_class() -> None:
    sets = PictureClasses(Blobs(), positive=[0, 2], num_test=100).member_sets(1, 64)
    both = torch.cat([sets.pool, sets.test])
    assert sets.rows.unique().numel() == 64
    assert set(sets.label[torch.arange(600) % 10 == 2].tolist()) == {1.0}
    assert set(sets.label[torch.arange(600) % 10 == 1].tolist()) == {-1.0}
    assert float(both.mean()) == pytest.approx(0, abs=0.02)


def test_merged_test_set_is_apart_from_every_training_set() -> None:
    data = PictureClasses(Blobs(), positive=[0], merge=True, num_test=300)
    sets = data.member_sets(2, 500)
    assert len(sets.test) == 300
    assert len(sets.pool) == 500


# 3. gradient


@pytest.mark.parametrize("loss", ["hinge", "quadhinge", "softhinge", "mse"])
def test_force_is_the_derivative_of_the_loss(loss: Any) -> None:
    margin = torch.linspace(-3, 3, 60, dtype=torch.float64).requires_grad_()
    (slope,) = torch.autograd.grad(dynamics.margin_loss(margin, loss).sum(), margin)
    torch.testing.assert_close(dynamics.descent(margin.detach(), loss), -slope, rtol=1e-12, atol=1e-12)


# 4. parallel


@pytest.mark.distributed
def test_two_processes_share_the_grid_and_change_no_bit(whole: Path, tmp_path: Path) -> None:
    run_two(__file__, tmp_path)
    assert_same(rows_of(tmp_path), rows_of(whole))
    # a checkpoint of both is taken up by one
    fit(tmp_path / "resumed", ckpt=tmp_path / "early" / "end.ckpt")
    assert_same(rows_of(tmp_path / "resumed"), rows_of(whole))


# 5. resume


@pytest.mark.parametrize("slots", [24, 7], ids=["same", "other"])
def test_resume_amid_the_sweep_changes_no_bit(slots: int, whole: Path, tmp_path: Path) -> None:
    early = fit(tmp_path / "early", epochs=1, slots=10)
    assert early.sweep is not None
    assert 0 < early.sweep.alive < 24
    resumed = fit(tmp_path, ckpt=tmp_path / "early" / "end.ckpt", slots=slots)
    assert_same(rows_of(tmp_path), rows_of(whole))
    assert resumed.sweep is not None
    assert resumed.sweep.net_steps == sum(row["steps"] for row in rows_of(whole).values())


# 6. recipe


def test_run_ends_by_itself_with_fits_and_a_table(tmp_path: Path) -> None:
    words = ["--config", "sgd_noise/mini-perceptron-chi1", "--runs", str(tmp_path), "--wandb", "false"]
    words += ["--trainer.enable_progress_bar", "false", "--model.train_sizes", "[32, 64]", "--model.log2_lrs", "[1, 3]"]
    words += ["--data.dim", "4", "--trainer.callbacks", "null"]
    assert main(["fit", *words]) == 0
    (record,) = tmp_path.glob("*/*/*/seed0/record.json")
    metrics = json.loads(record.read_text())["metrics"]
    table = as_columns(rows_of(record.parent).values())
    expected = sgd_noise.lazy_exponents(table, float("inf"), [0.02])
    assert metrics["members/fitted_last"] == len(table["dw"]) == 16
    assert metrics["fit/delta_last"] == pytest.approx(expected["delta"].mean, rel=1e-6)
    assert metrics["fit/lambda_se_last"] == pytest.approx(expected["lambda"].error, rel=1e-6)
    assert metrics["work/saved_last"] == pytest.approx(1 - table["steps"].sum() / (16 * 400_000), rel=1e-5)


def settings(path: Path) -> dict[str, Any]:
    """Model and data of a recipe, documents folded into one."""

    def fold(old: Any, new: Any) -> Any:
        if isinstance(old, dict) and isinstance(new, dict):
            return {key: fold(old.get(key), new[key]) if key in new else old[key] for key in {**old, **new}}
        return new

    found: dict[str, Any] = {}
    for document in recipes.expand(path):
        found = fold(found, document)
    return found


@pytest.mark.parametrize("path", recipes.recipe_files("sgd_noise"), ids=recipes.recipe_name)
def test_recipe_is_accepted_with_the_stated_nets(path: Path) -> None:
    model, data = (settings(path)[part]["init_args"] for part in ("model", "data"))
    kind = model["stack"]["class_path"].rsplit(".", 1)
    stack = getattr(__import__(kind[0], fromlist=[kind[1]]), kind[1])(**model["stack"]["init_args"])
    module = SGDNoise(**{**model, "stack": stack})
    name = str(data.get("source"))
    picture = (3, 32, 32) if "CIFAR" in name else (1, 28, 28)
    shape = SignPoints(**data).point_shape() if "dim" in data else pictures(data).point_shape(picture)
    found = re.fullmatch(r"Net:\s+(\d) x [\w ]+, ([\d,]+) parameters each", recipes.header(path)[4])
    assert found
    cost = module.cost(shape)
    assert cost["parameters"] == int(found[2].replace(",", ""))
    assert module.replicas == int(found[1])
    stated = re.search(r"([\d,]+) nets", recipes.header(path)[0])
    assert stated is None or int(stated[1].replace(",", "")) == cost["nets"]


def pictures(data: dict[str, Any]) -> PictureClasses:
    return PictureClasses(**{**data, "source": Blobs()})


def test_plan_states_the_cost_of_the_papers_phase_diagram(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "sgd_noise/fc5-mnist-phase", "--gpus", "8", "--memory", "80GB", "--shape", "1,28,28"]
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    # 26 x 31 x 9 nets (README of the official code); 6 B n_w FLOP
    assert lines[0] == "sgd_noise/fc5-mnist-phase: 7,254 nets of 166,016 parameters, 1.59e+07 FLOP per net-step"
    assert f"at most {7254 * 4_000_000:.3g} (every net at model.max_steps)" in lines[1]
    found = re.search(r"measured in a second: ([\d,]+) net-steps/s \((\S+) GFLOP/s\)", lines[2])
    assert found
    assert float(found[1].replace(",", "")) * 1.59e7 == pytest.approx(float(found[2]) * 1e9, rel=0.01)


def test_full_batches_cost_the_whole_set() -> None:
    cost = {d: SGDNoise(MLP(8, 2), [0], [0], [64], 8, dynamics=d).cost((16,))["flops"] for d in ("sgd", "gd")}
    assert cost["gd"] == 64 / 8 * cost["sgd"]


class ManyBlobs(ImageSource):
    """Pictures of noise, as many and as large as asked for."""

    def __init__(self, shape: tuple[int, int, int], count: int) -> None:
        self.shape, self.count = shape, count

    def read(self) -> ImageSets:
        """`count` for training, 200 for tests."""
        images = torch.randint(256, (self.count + 200, *self.shape), generator=torch.Generator().manual_seed(0)).byte()
        labels = torch.arange(len(images)) % 10
        return ImageSets(images[:-200], labels[:-200], images[-200:], labels[-200:], 10)


PAPER = [path for path in recipes.recipe_files("sgd_noise") if path.stem.startswith(("fc5", "mnas", "perceptron"))]


@pytest.mark.slow
@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_grid_of_the_paper_takes_steps_and_leaves_rows(path: Path, tmp_path: Path) -> None:
    """The recipe's nets, batches and rules, on a part of the grid and few points: two bursts of two steps."""
    model, data = (settings(path)[part]["init_args"] for part in ("model", "data"))
    kind = model["stack"]["class_path"].rsplit(".", 1)
    stack = getattr(__import__(kind[0], fromlist=[kind[1]]), kind[1])(**model["stack"]["init_args"])
    small = {"check": 2, "max_steps": 4, "kernel_points": 8, "train_sizes": [128], "replicas": 1}
    shards = len(model["log2_alphas"]) * len(model["log2_lrs"]) // 3
    module = SGDNoise(**{**model, **small, "stack": stack, "shards": shards})
    source = ManyBlobs((3, 32, 32) if "CIFAR" in str(data.get("source")) else (1, 28, 28), 128)
    points = SignPoints(**data) if "dim" in data else PictureClasses(**{**data, "source": source, "num_test": 100})
    trainer = L.Trainer(
        max_epochs=-1, accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path
    )
    trainer.fit(module, datamodule=points)
    rows = rows_of(tmp_path).values()
    assert {row["steps"] for row in rows} == {4}
    assert len(rows) >= 3
    assert all(row["dw"] > 0 for row in rows if row["status"] != "diverged")


# 7. bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"log2_lrs": []}, r"model.log2_lrs must be different numbers, at least one, got \[\]"),
        ({"batch_size": 41}, "must be between 1 and the smallest of model.train_sizes 40, got 41"),
        ({"max_steps": 410}, "model.max_steps must be a multiple of model.check 20, got 410"),
        ({"dynamics": "gd"}, r"model.dynamics gd takes all points in a step: one of train_sizes, got \[40, 64\]"),
        ({"shard": 2, "shards": 2}, "model.shard must be between 0 and model.shards - 1, got 2 of 2"),
        ({"replicas": 0}, "model.replicas and model.slots must be at least 1, got 0 and None"),
        ({"regions": {"hot": [1, 2]}}, r"model.regions hot must be \[alpha, alpha, dt, dt\], least and largest"),
    ],
)
def test_impossible_grids_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SGDNoise(**{"stack": MLP(width=8, depth=2), **OPTIONS, **options})


def test_more_points_than_pictures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be at most 600 and 200, the pictures there are, got 700 and 100"):
        fit(tmp_path, train_sizes=[700])


def test_missing_file_of_members_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model.done must name members.parquet files of runs, got .*absent.parquet"):
        fit(tmp_path, done=[str(tmp_path / "absent.parquet")])


def test_other_data_are_refused() -> None:
    module = SGDNoise(**{"stack": MLP(width=8, depth=2), **OPTIONS})
    trainer = L.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match="SGDNoise needs a datamodule with member_sets"):
        trainer.fit(module, datamodule=L.LightningDataModule())


if __name__ == "__main__":
    torch.set_num_threads(1)
    fit(Path(sys.argv[1]) / "early", epochs=1, slots=3)
    fit(Path(sys.argv[1]))
