"""Virgo: reference, property, gradient, graphs, resume, bad input. Recipes are run by test_recipes.py."""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import networkx
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from callbacks.rng import RngState
from datamodules import graphs
from lightning_modules import virgo
from scripts import recipes
from scripts.__main__ import main
from scripts.claims import load_paper

GOLDEN = np.load(Path(__file__).parent / "golden" / "virgo.npz")
"""Transcription of the official `utils.py` on dense-checked matrices, float64; g has 4 layers, s has 2."""
PRECISIONS = [(torch.float64, 1e-10), (torch.float32, 1e-5)]
CASES = ["g", "s"]


def golden(name: str, dtype: torch.dtype = torch.float64) -> Tensor:
    value = torch.from_numpy(GOLDEN[name])
    return value.to(dtype) if value.is_floating_point() else value


def messages(case: str) -> Tensor:
    return virgo.message_matrix(golden(f"{case}_edge_index"), int(GOLDEN[f"{case}_dims"][0]))


def sizes(case: str) -> list[int]:
    _, features, width, depth, classes = GOLDEN[f"{case}_dims"].tolist()
    return [features, *[width] * (depth - 1), classes]


def golden_run(case: str, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Weights (1, in, out), outputs and loss of the stored net."""
    bounds, matrix = golden(f"{case}_a_virgo", dtype), messages(case).to(dtype)
    weights = [(golden(f"{case}_U{layer}", dtype) * bound)[None].requires_grad_() for layer, bound in enumerate(bounds)]
    outputs = virgo.graph_net((matrix, matrix.t()), golden(f"{case}_x", dtype), weights)
    return weights, outputs, F.cross_entropy(outputs[-1][0], golden(f"{case}_y"))


# 1. reference


@pytest.mark.parametrize("case", CASES)
def test_message_matrix_equals_the_dense_one(case: str) -> None:
    torch.testing.assert_close(messages(case).to_dense(), golden(f"{case}_A"), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", CASES)
def test_energies_equal_the_official_values(case: str) -> None:
    depth, features = int(GOLDEN[f"{case}_dims"][3]), golden(f"{case}_x")
    forward = virgo.channel_energy(messages(case), features.mean(1), depth)
    backward = virgo.channel_energy(messages(case), torch.ones(len(features)), depth)
    torch.testing.assert_close(forward, golden(f"{case}_c_for"), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(backward, golden(f"{case}_c_back"), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("init", "mean", "stored"),
    [
        ("virgofor", "harmonic", "virgofor"),
        ("virgoback", "harmonic", "virgoback"),
        ("virgo", "harmonic", "virgo"),
        ("virgo", "arithmetic", "virgo_arith"),
        ("xavier", "harmonic", "xavier"),
    ],
)
@pytest.mark.parametrize("case", CASES)
def test_bounds_equal_the_official_values(case: str, init: virgo.Init, mean: virgo.Mean, stored: str) -> None:
    ours = virgo.init_bounds(messages(case), golden(f"{case}_x"), sizes(case), init, mean)
    torch.testing.assert_close(ours, golden(f"{case}_a_{stored}"), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ours**2 / 3, golden(f"{case}_v_{stored}"), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("case", CASES)
def test_net_and_its_gradient_equal_the_reference(case: str, dtype: torch.dtype, tolerance: float) -> None:
    weights, outputs, loss = golden_run(case, dtype)
    loss.backward()
    pairs = [(outputs[-1][0], "logits"), (loss, "loss")]
    pairs += [(weight.grad[0], f"gW{layer}") for layer, weight in enumerate(weights)]
    for ours, name in pairs:
        torch.testing.assert_close(ours.detach(), golden(f"{case}_{name}", dtype), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("case", CASES)
def test_variances_of_outputs_and_gradients_equal_the_reference(case: str) -> None:
    _, outputs, loss = golden_run(case, torch.float64)
    gradients = torch.autograd.grad(loss, outputs)
    for values, name in ((outputs, "var_h"), (gradients, "var_gh")):
        ours = torch.stack([value.detach().var() for value in values])
        torch.testing.assert_close(ours, golden(f"{case}_{name}"), rtol=1e-10, atol=1e-12)
    expected = np.log(GOLDEN[f"{case}_var_h"][-1] / GOLDEN[f"{case}_var_h"][0])
    assert float(virgo.log_ratio(outputs[-1], outputs[0]).detach()) == pytest.approx(expected, rel=1e-10)


# 2. property


def karate() -> Tensor:
    edges = torch.tensor(list(networkx.karate_club_graph().edges())).T
    return graphs.both_ways(edges, 34)


def test_regular_graph_gives_kaiming_behind_the_first_layer() -> None:
    """On a ring every node has the same degree, the constant channel passes unchanged and c_{l-1} / c_l is 1."""
    ring = torch.arange(12)
    matrix = virgo.message_matrix(graphs.both_ways(torch.stack([ring, ring.roll(1)]), 12), 12)
    widths = [5, 8, 8, 3]
    kaiming = virgo.init_bounds(matrix, torch.ones(12, 5), widths, "kaifor")
    torch.testing.assert_close(virgo.init_bounds(matrix, torch.ones(12, 5), widths, "virgofor"), kaiming)
    backward = virgo.init_bounds(matrix, torch.ones(12, 5), widths, "virgoback")
    torch.testing.assert_close(backward[:2], torch.full((2,), (6 / 8) ** 0.5, dtype=torch.float64))
    assert float(backward[2]) == pytest.approx((3 / (3 - 1)) ** 0.5)


def test_relabelling_the_nodes_keeps_the_bounds() -> None:
    order = torch.randperm(34, generator=torch.Generator().manual_seed(0))
    features = torch.rand(34, 4, generator=torch.Generator().manual_seed(1))
    moved = torch.empty_like(features)
    moved[order] = features
    for init in ("virgofor", "virgoback"):
        one = virgo.init_bounds(virgo.message_matrix(karate(), 34), features, [4, 6, 6, 2], init)
        two = virgo.init_bounds(virgo.message_matrix(order[karate()], 34), moved, [4, 6, 6, 2], init)
        torch.testing.assert_close(two, one)


def test_directed_edge_is_scaled_by_out_degree_of_its_source_and_in_degree_of_its_end() -> None:
    """0 -> 1 and 0 -> 2, with self-loops: node 0 has out-degree 3, nodes 1 and 2 in-degree 2."""
    matrix = virgo.message_matrix(torch.tensor([[0, 0], [1, 2]]), 3).to_dense()
    assert float(matrix[1, 0]) == pytest.approx(1 / 6**0.5)
    assert float(matrix[0, 1]) == 0


def test_isolated_node_keeps_its_own_value() -> None:
    matrix = virgo.message_matrix(torch.tensor([[0, 1], [1, 0]]), 3).to_dense()
    assert matrix[2].tolist() == [0, 0, 1]


# 3. gradient


def test_gradient_of_the_stacked_net() -> None:
    """On a directed graph, where the transpose in the backward pass matters."""
    matrix = virgo.message_matrix(torch.tensor([[0, 0, 1, 3], [1, 2, 3, 2]]), 4)
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(4, 3, generator=generator, dtype=torch.float64)
    shapes = [(2, 3, 3), (2, 3, 2)]
    weights = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    assert torch.autograd.gradcheck(lambda *w: virgo.graph_net((matrix, matrix.t()), features, w)[-1], weights)


# 4. graphs


def drawn(**options: Any) -> graphs.NodeGraph:
    return graphs.SkewedBlocks(**{"num_nodes": 120, **options}).read(torch.Generator().manual_seed(0))


def test_digits_graph_is_the_prototypes_up_to_ties() -> None:
    """The prototype counted 24,680 directed edges and a largest degree of 35; distances tie among whole pixels."""
    graph = graphs.DigitsGraph().read(torch.Generator())
    assert abs(graph.edges.shape[1] - 24_680) <= 40
    assert int(graph.edges[0].bincount().max()) == 35


def test_block_model_is_symmetric_without_loops_or_isolated_nodes() -> None:
    graph = drawn()
    torch.testing.assert_close(graphs.both_ways(graph.edges, 120), graph.edges)
    assert len(graphs.isolated(graph.edges, 120)) == 0
    assert float(graph.features.min()) >= 0


def test_block_model_prefers_its_own_class() -> None:
    shares = []
    for within in (0.0, 1.0):
        graph = drawn(within=within, num_nodes=2000)
        shares.append(float((graph.labels[graph.edges[0]] == graph.labels[graph.edges[1]]).double().mean()))
    # without preference a quarter, and the edges of nodes that had none
    assert shares[0] < 0.5
    assert shares[1] == 1


def test_split_has_the_stated_numbers_of_each_class() -> None:
    L.seed_everything(0)
    data = graphs.GraphNodes(graphs.SkewedBlocks(num_nodes=120), train_per_class=5, val_per_class=7)
    data.setup()
    counts = [(data.labels[data.split == part]).bincount().tolist() for part in range(3)]
    assert counts == [[5] * 4, [7] * 4, [18] * 4]


def test_graph_file_is_read_without_its_self_loops(tmp_path: Path) -> None:
    path = tmp_path / "graph.npz"
    split = np.array([0, 1, 2])
    edges = np.array([[0, 1, 1, 2, 2], [1, 0, 1, 1, 0]])
    np.savez(path, edges=edges, features=np.eye(3), labels=np.array([0, 1, 1]), split=split)
    data = graphs.GraphNodes(graphs.GraphFile(str(path)))
    data.setup()
    assert data.edges.T.tolist() == [[0, 1], [1, 0], [2, 0], [2, 1]]
    assert data.split.tolist() == [0, 1, 2]


# 5. stack, module and resume


def fit(
    inits: list[virgo.Init], epochs: int = 2, ckpt: Path | None = None, **options: Any
) -> tuple[virgo.Virgo, L.Trainer]:
    L.seed_everything(5)
    module = virgo.Virgo(inits, partial(torch.optim.Adam, lr=1e-2), **{"width": 8, "depth": 4, **options})
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[RngState()],
    )
    data = graphs.GraphNodes(graphs.SkewedBlocks(num_nodes=120), train_per_class=5, val_per_class=7)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt)
    return module, trainer


def test_members_of_a_stack_train_like_nets_of_their_own() -> None:
    stacked, _ = fit(["xavier", "virgo"], 2)
    for position, init in enumerate(("xavier", "virgo")):
        alone, _ = fit([init], 2)
        for together, single in zip(stacked.weights, alone.weights, strict=True):
            torch.testing.assert_close(together[position], single[0], rtol=1e-3, atol=1e-4)


def test_members_differ_by_their_bounds_alone() -> None:
    module, _ = fit(["xavier", "kaifor"], 0)
    for weight, fan_in, fan_out in zip(module.weights, [32, 8, 8, 8], [8, 8, 8, 4], strict=True):
        torch.testing.assert_close(weight[1] / weight[0], torch.full_like(weight[0], (1 + fan_out / fan_in) ** 0.5))


def test_start_is_measured_before_the_first_update() -> None:
    module, _ = fit(["xavier", "virgo"], 0)
    outputs = virgo.graph_net(module._messages, module.trainer.datamodule.features, list(module.weights))
    expected = virgo.log_ratio(outputs[-2], outputs[0]).detach()
    _, trainer = fit(["xavier", "virgo"], 1)
    logged = trainer.callback_metrics
    assert [float(logged[f"init/fwd_{init}"]) for init in ("xavier", "virgo")] == pytest.approx(expected.tolist())
    ratio = float(logged["init/fwd_virgo"] / logged["init/fwd_xavier"])
    assert float(logged["init/fwd_to_xavier_virgo"]) == pytest.approx(abs(ratio), rel=1e-5)


def test_mean_accuracy_is_that_of_all_epochs() -> None:
    single = [float(fit(["virgo"], epochs)[1].callback_metrics["test/acc_virgo"]) for epochs in (1, 2)]
    _, trainer = fit(["virgo"], 2)
    assert float(trainer.callback_metrics["test/acc_mean_virgo"]) == pytest.approx(sum(single) / 2, rel=1e-5)


def test_patience_keeps_the_test_accuracy_of_the_best_validation_epoch() -> None:
    module, _ = fit(["xavier", "virgo"], 0, patience=2)
    validation = torch.tensor([[0.5, 0.5], [0.6, 0.4], [0.5, 0.4], [0.5, 0.9], [0.9, 0.9]])
    test = torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6], [0.7, 0.8], [0.9, 1.0]])
    stops = []
    for val, held in zip(validation, test, strict=True):
        module._keep(val, held)
        stops.append(module.trainer.should_stop)
    # the first member is best in its second epoch, the other in its first; both have then waited twice
    torch.testing.assert_close(module.best_test, torch.tensor([0.3, 0.2]))
    assert stops == [False, False, False, True, True]


def test_three_epochs_equal_one_and_a_resume_of_two(tmp_path: Path) -> None:
    whole, whole_trainer = fit(["xavier", "virgo"], 3)
    _, first = fit(["xavier", "virgo"], 1)
    first.save_checkpoint(tmp_path / "one.ckpt")
    resumed, resumed_trainer = fit(["xavier", "virgo"], 3, tmp_path / "one.ckpt")
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    later = {k: v for k, v in whole_trainer.callback_metrics.items() if not k.startswith("init/")}
    assert resumed_trainer.callback_metrics == later


def test_testing_after_training_keeps_the_weights() -> None:
    module, trainer = fit(["virgo"], 1)
    weights = [weight.detach().clone() for weight in module.weights]
    trainer.test(module, datamodule=trainer.datamodule, verbose=False)
    for before, after in zip(weights, module.weights, strict=True):
        assert torch.equal(after, before)


# 6. recipes of paper scale

SLUG = "virgo"


def run_recipe(name: str, words: list[str], runs: Path) -> dict[str, Any]:
    """Record of one epoch of a paper-scale recipe on stand-ins of the right shape, through the real entry point."""
    words = ["--config", f"{SLUG}/{name}", "--runs", str(runs), *words, "--trainer.max_epochs", "1", "--wandb", "false"]
    quiet = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
    assert main(["fit", *words, "--trainer.accelerator", "cpu", *quiet]) == 0
    (file,) = runs.glob(f"{SLUG}/{name}/*/seed*/record.json")
    return json.loads(file.read_text())


def check_recipe(name: str, record: dict[str, Any]) -> None:
    """Parameters as the header says, and every metric that a claim names."""
    header = "\n".join(recipes.header(recipes.find_recipe(f"{SLUG}/{name}")))
    ((nets, each),) = re.findall(r"Net: +(\d) x \w+, ([\d,]+) parameters each", header)
    assert record["parameters"] == int(nets) * int(each.replace(",", ""))
    arms = [arm for claim in load_paper(SLUG).claims for arm in claim.arms]
    assert {metric for recipe, metric in arms if recipe == f"{SLUG}/{name}"} <= record["metrics"].keys()


@pytest.mark.parametrize(
    ("name", "features", "classes"),
    [("cora", 1433, 7), ("citeseer", 3703, 6), ("pubmed", 500, 3), ("arxiv", 128, 40)],
)
def test_paper_scale_recipe_trains_on_a_small_graph(name: str, features: int, classes: int, tmp_path: Path) -> None:
    graph = drawn(num_nodes=3 * classes, num_classes=classes, num_features=features)
    parts = {name: getattr(graph, name).numpy() for name in ("edges", "features", "labels")}
    np.savez(tmp_path / "graph.npz", **parts, split=np.arange(3 * classes) % 3)
    words = ["--data.source.init_args.path", str(tmp_path / "graph.npz")]
    check_recipe(name, run_recipe(name, words, tmp_path / "runs"))


# 7. bad input


class Path3(graphs.GraphSource):
    """Three nodes in a row, and one without an edge."""

    def read(self, generator: torch.Generator) -> graphs.NodeGraph:
        edges = graphs.both_ways(torch.tensor([[0, 1], [1, 2]]), 4)
        return graphs.NodeGraph(edges, torch.eye(4), torch.tensor([0, 1, 0, 1]), torch.tensor([0, 0, 1, 2]))


def test_isolated_nodes_are_refused_unless_allowed() -> None:
    with pytest.raises(ValueError, match=r"1 of 4 nodes have no edge \(first: \[3\]\); data.allow_isolated true keeps"):
        graphs.GraphNodes(Path3()).setup()
    graphs.GraphNodes(Path3(), allow_isolated=True).setup()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: graphs.DigitsGraph(0), "data.source.neighbours must be from 1 to 1796, got 0"),
        (lambda: graphs.SkewedBlocks(num_nodes=7), "at least 2 classes of 2 nodes, got num_nodes 7, num_classes 4"),
        (lambda: graphs.SkewedBlocks(within=1.5), r"data.source.within must be in \[0, 1\]"),
        (lambda: graphs.GraphFile("nowhere.npz"), "data.source.path must name an .npz file; there is no .*nowhere.npz"),
        (
            lambda: graphs.GraphNodes(graphs.SkewedBlocks(num_nodes=100), 20, 30).setup(),
            "data.train_per_class 20 and val_per_class 30 leave no test node of class 0, which has 25",
        ),
        (lambda: virgo.message_matrix(torch.tensor([[0], [0]]), 1), "edges must not hold self-loops"),
        (
            lambda: virgo.init_bounds(virgo.message_matrix(karate(), 34), torch.zeros(34, 4), [4, 6, 2], "virgo"),
            "model.inits virgo needs features whose mean over channels does not vanish",
        ),
        (lambda: virgo.Virgo([], torch.optim.Adam), r"model.inits must name at least one initialisation.*got \[\]"),
        (lambda: virgo.Virgo(["virgo"], torch.optim.Adam, depth=2), "model.depth must be at least 3"),
        (lambda: virgo.Virgo(["virgo"], torch.optim.Adam, patience=0), "model.patience must be at least 1, got 0"),
    ],
)
def test_settings_and_data_outside_their_range_are_refused(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
