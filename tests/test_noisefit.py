"""NoiseFiT on a tiny GPT: reference, property, gradient, parallel, resume, recipes, bad input."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from two_processes import run_two

from callbacks.rng import RngState
from datamodules.facts import WORDS, KnowledgeFacts
from lightning_modules import noisefit
from lightning_modules.language import answers, hooks, noise_policy
from lightning_modules.language.passes import layer_outputs, pass_logits
from lightning_modules.networks.word_gpt import WordGPT
from scripts import recipes, train

GOLDEN = np.load(Path(__file__).parent / "golden" / "noisefit.npz")
"""Outputs of the official functions (akhadangi/NoiseFiT), float64, with the Gaussian draws as inputs."""


def golden(name: str) -> Tensor:
    return torch.from_numpy(GOLDEN[name])


def single(value: float) -> float:
    """The official gate is a float32 tensor, which rounds base_std."""
    return float(np.float32(value))


# 1. reference


@pytest.mark.parametrize(
    ("name", "base_std", "beta"),
    [
        ("out_std0.1", single(0.1), 0.1),
        ("out_std1.0", 1.0, 0.1),
        # noise scale 2, gate 0.7
        ("out_beta0.5_scale2_gate0.7", single(0.2 * single(0.7)), 0.5),
    ],
)
def test_adaptive_noise_equals_the_official_one(name: str, base_std: float, beta: float) -> None:
    hidden = golden("ani/h")
    ours = hidden + noisefit.adaptive_scale(hidden, base_std, beta) * golden("ani/eps")
    torch.testing.assert_close(ours, golden(f"ani/{name}"), rtol=1e-10, atol=1e-10)


def test_noise_scale_equals_the_official_one_in_float32() -> None:
    ours = noisefit.adaptive_scale(golden("ani/h").float(), 1.0)
    torch.testing.assert_close(ours, golden("ani/scale_std1").float(), rtol=1e-5, atol=1e-5)


def test_entropy_factor_equals_the_official_one() -> None:
    hidden = golden("ani/h")
    scale = noisefit.adaptive_scale(hidden, single(0.1), factor=noisefit.entropy_factor(golden("ani/logits")))
    ours = hidden + scale * golden("ani/eps")
    torch.testing.assert_close(ours, golden("ani/out_logits_std0.1"), rtol=1e-10, atol=1e-10)


def test_noise_of_v1_equals_the_official_hook() -> None:
    ours = noisefit.layer_noise(golden("ani/h"), golden("ani/eps"), 0.1, "v1")
    # base_std passes through float32 there
    torch.testing.assert_close(ours, golden("hook_v1/out"), rtol=1e-7, atol=1e-7)


def golden_snrs() -> Tensor:
    eps = golden("snr_v1/eps").double()
    layers = [0.5 * (i + 1) * golden("ani/h") + 0.1 * i for i in range(4)]
    return torch.stack([noisefit.layer_snr(hidden, eps[:, i], 0.1) for i, hidden in enumerate(layers)])


def test_layer_snr_equals_the_official_one() -> None:
    torch.testing.assert_close(golden_snrs(), golden("snr_v1/snr"), rtol=1e-7, atol=0)


@pytest.mark.parametrize("which", ["largest", "lowest"])
def test_layers_by_snr_are_the_official_ones(which: Any) -> None:
    assert noise_policy.layers_by_snr(golden_snrs(), 2, which) == golden(f"snr_v1/top2_{which}").tolist()


LOSSES = ["v1_T1", "v1_T2", "v2_T1", "v2_T2", "v2_ce_kl", "v2_kl_only", "v2_consistency_only"]


def golden_total(case: str, clean: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """The loss of a golden case with the official, unshifted mask in soft and consistency loss."""
    labels, variant = golden(f"loss_{case}/labels"), case[:2]
    tau, mask = float(GOLDEN[f"loss_{case}/temperature"]), labels != -100
    lam = 0.1 if variant == "v1" else 0.05
    if case.endswith("kl_only"):
        return noisefit.soft_loss(clean, [first], mask, 1.0, "v1")
    if case.endswith("consistency_only"):
        return noisefit.consistency_loss(first, second, mask, 1.0, "v1")
    cross_entropy = F.cross_entropy(clean[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    single_pass = case.endswith("ce_kl")
    soft = noisefit.soft_loss(clean, [first] if single_pass else [first, second], mask, tau, variant)
    consistency = 0 * soft if single_pass else noisefit.consistency_loss(first, second, mask, tau, variant)
    return noisefit.hybrid_loss(cross_entropy, soft, consistency, 0.5, lam)


@pytest.mark.parametrize("case", LOSSES)
def test_loss_equals_the_official_one(case: str) -> None:
    logits = [golden(f"loss_{case}/{name}") for name in ("logits", "logits1", "logits2")]
    torch.testing.assert_close(golden_total(case, *logits), golden(f"loss_{case}/total"), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", LOSSES)
def test_gradient_flows_where_the_official_one_does(case: str) -> None:
    logits = [golden(f"loss_{case}/{name}").requires_grad_() for name in ("logits", "logits1", "logits2")]
    found = torch.autograd.grad(golden_total(case, *logits), logits, allow_unused=True, materialize_grads=True)
    for gradient, name in zip(found, ("g_clean", "g_noisy1", "g_noisy2"), strict=True):
        torch.testing.assert_close(gradient, golden(f"loss_{case}/{name}"), rtol=1e-12, atol=1e-12)


def test_symmetric_divergence_equals_the_official_one() -> None:
    ours = noisefit.symmetric_kl(golden("symkl/a"), golden("symkl/b"), golden("symkl/mask"))
    torch.testing.assert_close(ours, golden("symkl/out"), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", range(5))
def test_layers_over_depth_are_the_official_ones(case: int) -> None:
    """In case 4 every layer is a candidate, the bands overflow, and the late layers drop out."""
    count, bands = golden(f"depthsel/{case}/max_layers_bands").tolist()
    candidates = golden(f"depthsel/{case}/cand").tolist()
    ours = noise_policy.spread_over_depth(golden(f"depthsel/{case}/scores"), candidates, count, bands)
    assert ours == golden(f"depthsel/{case}/selected").tolist()


def calibrated(case: int) -> tuple[Tensor, Tensor, Tensor, int]:
    divergence, clean = golden(f"auto/{case}/kl"), golden(f"auto/{case}/ce_clean")
    rise = (golden(f"auto/{case}/ce_noisy") - clean[:, None, None]).clamp_min(0).mean(0)
    layers = divergence.shape[1]
    first = max(4, -(-layers // 4)) if GOLDEN[f"auto/{case}/prefix_sharing"] else 0
    return divergence.mean(0), rise, clean.mean(), first


@pytest.mark.parametrize("case", range(4))
def test_calibrated_layers_and_scales_are_the_official_ones(case: int) -> None:
    divergence, rise, clean, first = calibrated(case)
    hidden_size, target_kl = int(GOLDEN[f"auto/{case}/hidden_dim"]), bool(GOLDEN[f"auto/{case}/target_kl"])
    policy = noise_policy.choose_policy(divergence, rise, clean, hidden_size, first, target_kl)
    assert list(policy.layers) == golden(f"auto/{case}/selected").tolist()
    assert policy.scales == pytest.approx(golden(f"auto/{case}/scales").tolist(), rel=1e-6)


@pytest.mark.parametrize("case", range(4))
def test_threshold_of_candidates_is_the_official_one(case: int) -> None:
    divergence, rise, clean, first = calibrated(case)
    best = noise_policy.calibration_scores(divergence, rise, clean).max(1).values
    _, threshold = noise_policy.candidate_layers(best, first)
    assert threshold == pytest.approx(float(GOLDEN[f"auto/{case}/score_threshold"]), rel=1e-6)


# 2. property


def test_noise_is_zero_where_a_token_is_constant() -> None:
    hidden = torch.full((1, 2, 8), 3.0, dtype=torch.float64)
    hidden[0, 1] = torch.arange(8)
    scale = noisefit.adaptive_scale(hidden, 1.0)
    # mad floor: 1e-6 ||h||, and no variance: factor 1
    assert float(scale[0, 0].max()) == pytest.approx(1e-6 * 3 * 8**0.5, rel=1e-9)
    assert float(scale[0, 1].min()) > 0.1


def test_alpha_one_and_lambda_zero_are_cross_entropy() -> None:
    value = noisefit.hybrid_loss(torch.tensor(2.0), torch.tensor(5.0), torch.tensor(7.0), 1.0, 0.0)
    assert float(value) == 2.0


def tiny() -> WordGPT:
    return WordGPT(vocab_size=72 + 6, dim=16, heads=2, num_layers=3, context=8)


def small_data(**options: Any) -> KnowledgeFacts:
    return KnowledgeFacts(**{"num_people": 6, "num_tuned": 8, "batch_size": 4, **options})


def batch_of(data: KnowledgeFacts, part: str = "tuned") -> dict[str, Tensor]:
    data.setup()
    return data.examples(part)[torch.arange(4)]


def test_passes_in_one_batch_equal_passes_alone() -> None:
    torch.manual_seed(0)
    lm, batch = tiny().double(), batch_of(small_data())
    layers = dict(enumerate(lm.decoder_layers))
    policy = noise_policy.NoisePolicy((0, 2), (0.5, 0.25))

    def add(hidden: Tensor, eps: Tensor, scale: float) -> Tensor:
        return noisefit.layer_noise(hidden, torch.ones_like(eps), scale, "v2")

    clean, noisy = pass_logits(lm, layers, batch, (1, 1), policy, add)
    (alone,) = pass_logits(lm, layers, batch)
    (noisy_alone,) = pass_logits(lm, layers, batch, (0, 1), policy, add)
    torch.testing.assert_close(clean, alone, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(noisy, noisy_alone, rtol=1e-5, atol=1e-6)
    assert float((noisy - clean).abs().max().detach()) > 1e-3


@pytest.mark.parametrize("first", [0, 1, 2])
def test_a_shared_prefix_changes_no_logit_and_no_gradient(first: int) -> None:
    torch.manual_seed(0)
    lm, batch = tiny().double(), batch_of(small_data())
    layers = dict(enumerate(lm.decoder_layers))
    policy = noise_policy.NoisePolicy(tuple({first, 2}), (0.5,) * len({first, 2}))
    add, found = partial(noisefit.layer_noise, variant="v1"), []
    for shared in (False, True):
        generator = torch.Generator().manual_seed(1)
        logits = pass_logits(lm, layers, batch, (1, 2), policy, add, generator, share_prefix=shared)
        found.append(
            (torch.stack(logits), torch.autograd.grad(logits[0].sum() + logits[2].square().sum(), lm.positions))
        )
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-7)


def test_layers_below_the_noise_run_once_for_all_passes() -> None:
    lm, batch, rows = tiny(), batch_of(small_data()), []
    for layer in lm.decoder_layers:
        layer.register_forward_hook(lambda module, inputs, output: rows.append(len(inputs[0])))
    policy, add = noise_policy.NoisePolicy((1,), (0.5,)), partial(noisefit.layer_noise, variant="v2")
    pass_logits(lm, dict(enumerate(lm.decoder_layers)), batch, (1, 2), policy, add, share_prefix=True)
    assert rows == [4, 4, 12]


def test_hooks_are_gone_after_an_error() -> None:
    lm = tiny()

    def fail(number: int, hidden: Tensor) -> Tensor:
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"), hooks.rewriting(dict(enumerate(lm.decoder_layers)), fail):
        lm(torch.zeros(1, 3, dtype=torch.long))
    assert not any(layer._forward_hooks for layer in lm.decoder_layers)


def test_a_training_run_leaves_no_hooks() -> None:
    module, _ = fit(1, layers=[1], prefix_sharing=True)
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in module.lm.modules())


def test_a_tuple_stays_a_tuple_of_the_whole_batch() -> None:
    class Old(nn.Module):
        def forward(self, hidden: Tensor) -> tuple[Tensor, str]:
            return hidden, "cache"

    layer = Old()
    with hooks.rewriting({0: layer}, lambda _, hidden: hidden + 1):
        changed = layer(torch.zeros(3, 2, 4))
    assert changed[1] == "cache"
    assert torch.equal(changed[0], torch.ones(3, 2, 4))


def test_last_layers_output_is_read_before_the_final_norm() -> None:
    torch.manual_seed(0)
    lm, batch = tiny(), batch_of(small_data())
    last = layer_outputs(lm, dict(enumerate(lm.decoder_layers)), batch)[-1]
    logits = lm.norm(last) @ lm.embedding.weight.T
    torch.testing.assert_close(logits, lm(batch["input_ids"]))


def test_answer_metrics_are_those_of_a_worked_example() -> None:
    """Three answers: right at 0.8, wrong at 0.7, and one of two tokens, both right at 0.5 and 0.9: confidence 0.45."""
    probability = torch.tensor([[0.8, 0.2], [0.7, 0.3], [0.5 + 1e-6, 0.5 - 1e-6], [0.9, 0.1]])
    targets, row = torch.tensor([0, 1, 0, 0]), torch.tensor([0, 4, 7, 7])
    metrics = answers.AnswerMetrics(torch.device("cpu"))
    metrics.update(probability.log(), [probability.flip(1).log()], targets, row)
    strategy = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False).strategy
    found = {name: float(value) for name, value in metrics.compute(strategy, probed=True).items()}
    kl = sum(p * np.log(p / (1 - p)) + (1 - p) * np.log((1 - p) / p) for p in (0.8, 0.7, 0.5, 0.9)) / 4
    expected = {
        "acc": 2 / 3,
        "confident_wrong": 1 / 3,
        "nll": -float(np.log([0.8, 0.3, 0.5, 0.9]).mean()),
        "ece": (0.2 + 0.7 + 0.55) / 3,
        "noise_kl": kl,
        "noisy_acc": 1 / 3,
        "flips": 1.0,
    }
    assert found == pytest.approx(expected, abs=1e-5)


def test_questions_label_the_value_and_the_stop_only() -> None:
    batch = batch_of(small_data())
    assert (batch["labels"] != -100).sum(1).tolist() == [2] * 4
    assert batch["key"].sum(1).tolist() == [1] * 4
    assert torch.equal(batch["labels"][:, 5], torch.full((4,), WORDS.index(".")))


def test_tested_facts_are_the_others() -> None:
    data = small_data()
    data.setup()
    asked = {tuple(row) for row in data.examples("tuned").fields["input_ids"].tolist()}
    tested = {tuple(row) for row in data.examples("test").fields["input_ids"].tolist()}
    assert (len(asked), len(tested), len(asked & tested)) == (8, 10, 0)


# 3. gradient


def test_noise_of_v2_has_no_gradient_and_that_of_v1_has() -> None:
    eps = torch.ones(2, 3, 8, dtype=torch.float64)
    torch.manual_seed(0)
    hidden = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    (plain,) = torch.autograd.grad(noisefit.layer_noise(hidden, eps, 0.5, "v2").sum(), hidden)
    (through,) = torch.autograd.grad(noisefit.layer_noise(hidden, eps, 0.5, "v1").sum(), hidden)
    assert torch.equal(plain, torch.ones_like(plain))
    assert float((through - 1).abs().max()) > 1e-3


def test_gradient_of_the_scale_is_that_of_finite_differences() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(1, 2, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda h: noisefit.adaptive_scale(h, 0.5), hidden)


# 4. parallel and 5. resume


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def fit(epochs: int, ckpt: Path | None = None, trainer_options: Any = None, data: Any = None, **options: Any) -> Any:
    """A tiny model on the CPU."""
    L.seed_everything(3)
    module = noisefit.NoiseFiT(**{"lm": tiny, "optimizer": sgd, "probe_draws": 1, **options})
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        callbacks=[RngState()],
        **(trainer_options or {}),
    )
    trainer.fit(module, datamodule=data or small_data(), ckpt_path=ckpt)
    return module, trainer


def metrics_of(trainer: L.Trainer) -> dict[str, float]:
    return {key: float(value) for key, value in trainer.callback_metrics.items()}


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The noise policy is written to the run's folder."""
    monkeypatch.chdir(tmp_path)


def test_three_epochs_equal_one_and_a_resume_of_two(tmp_path: Path) -> None:
    options = {"selection": "lowest", "num_layers": 2, "variant": "v1"}
    whole, whole_trainer = fit(3, **options)
    fit(1, **options)[1].save_checkpoint(tmp_path / "one.ckpt")
    resumed, trainer = fit(3, tmp_path / "one.ckpt", **options)
    for ours, expected in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, expected)
    assert metrics_of(trainer) == metrics_of(whole_trainer)


def test_resumed_run_keeps_the_noisy_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, trainer = fit(1, selection="auto")
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    monkeypatch.setattr(noisefit.NoiseFiT, "_choose_policy", lambda self: pytest.fail("chosen anew"))
    resumed, _ = fit(2, tmp_path / "one.ckpt", selection="auto")
    assert resumed.policy == first.policy
    assert resumed.policy_record == first.policy_record


def test_noise_policy_is_written_with_what_it_was_chosen_by(tmp_path: Path) -> None:
    module, _ = fit(1, selection="lowest", num_layers=2, variant="v1")
    written = json.loads((tmp_path / "noise_policy.json").read_text())
    snr = written["table"]["snr"]
    assert sorted(written["layers"]) == sorted(sorted(range(3), key=snr.__getitem__)[:2])
    assert written["scales"] == [0.1, 0.1]
    assert written["kl_start"] == module.policy_record["kl_start"]


def test_noise_to_hidden_is_the_ratio_of_standard_deviations(tmp_path: Path) -> None:
    """Without learning: of the noise that the hook adds to that of what it is added to, here by a long draw."""
    module, _ = fit(1, layers=[1], noise_std=0.3, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    (found,) = json.loads((tmp_path / "noise_policy.json").read_text())["noise_to_hidden"]
    data = small_data()
    data.setup()
    hidden = layer_outputs(module.lm, module.decoder_layers, next(iter(data.train_dataloader())))[1]
    scale = noisefit.adaptive_scale(hidden, 0.3)
    assert found == pytest.approx(float((scale.square().mean().sqrt() / hidden.std()).detach()), rel=0.15)


def test_basefit_is_a_plain_loop_of_cross_entropy() -> None:
    module, _ = fit(1, loss_mode="basefit")
    L.seed_everything(3)
    plain = noisefit.NoiseFiT(tiny, sgd).lm
    optimizer, data = sgd(plain.parameters()), small_data()
    data.setup()
    for batch in data.train_dataloader():
        logits = plain(batch["input_ids"])[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for ours, expected in zip(module.lm.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("mode", noisefit.PASSES)
def test_logged_loss_is_made_of_its_parts(mode: Any) -> None:
    _, trainer = fit(1, loss_mode=mode)
    found = metrics_of(trainer)
    parts = [found[f"train/{name}"] for name in ("ce", "soft", "consistency")]
    weights = {"basefit_half": (0.5, 0, 0), "ce_kl": (0.5, 0.5, 0), "full": (0.5, 0.5, 0.05)}
    weights |= {"kl_only": (0, 1, 0), "consistency_only": (0, 0, 1)}
    expected = sum(w * p for w, p in zip(weights.get(mode, (1, 0, 0)), parts, strict=True))
    if mode == "rdrop":
        # without dropout both passes agree
        assert found["train/loss"] == pytest.approx(found["train/ce"], rel=1e-5)
    assert found["train/loss"] == pytest.approx(expected, rel=1e-5)


def _two_ranks(folder: Path) -> None:
    common = {"devices": 2, "default_root_dir": folder}
    ddp, sharded = common | {"strategy": "ddp"}, common | {"strategy": "fsdp2"}
    for name, options in (("ddp", ddp), ("fsdp2", sharded)):
        module, trainer = fit(2, trainer_options=options, loss_mode="basefit", data=small_data(form="statements"))
        whole = {k: getattr(p, "full_tensor", lambda p=p: p)().detach() for k, p in module.lm.named_parameters()}
        noisy, _ = fit(1, trainer_options=options, selection="lowest", num_layers=2, variant="v1")
        policies: list[Any] = [None, None]
        torch.distributed.all_gather_object(policies, (noisy.policy, noisy.noise_generator.initial_seed()))
        if trainer.is_global_zero:
            torch.save({"weights": whole, "metrics": metrics_of(trainer)}, folder / f"{name}.pt")
            (folder / f"{name}.json").write_text(json.dumps([[list(p.layers), seed] for p, seed in policies]))


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("noisefit")
    run_two(__file__, folder)
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_two_processes_equal_one(two_ranks: Path, name: str) -> None:
    """Sentences of 5 to 7 words: the ranks' numbers of labels differ."""
    module, trainer = fit(2, loss_mode="basefit", data=small_data(form="statements"))
    found = torch.load(two_ranks / f"{name}.pt")
    for key, expected in module.lm.named_parameters():
        torch.testing.assert_close(found["weights"][key], expected.detach(), rtol=1e-4, atol=1e-6)
    # each rank has its own probe noise
    probed = ("noise_kl", "noisy_acc", "flips")
    ours, wanted = (
        {k: v for k, v in found.items() if not k.endswith(probed)} for found in (found["metrics"], metrics_of(trainer))
    )
    assert ours == pytest.approx(wanted, rel=1e-4, abs=1e-6)


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_ranks_agree_on_layers_and_draw_their_own_noise(two_ranks: Path, name: str) -> None:
    (first, seed), (second, other_seed) = json.loads((two_ranks / f"{name}.json").read_text())
    assert first == second
    assert seed != other_seed


# 6. recipes


RECIPES = recipes.recipe_files("noisefit")


@pytest.mark.parametrize("path", RECIPES, ids=recipes.recipe_name)
def test_settings_are_accepted(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(train.RecipeCLI, "instantiate_classes", lambda self: None)
    monkeypatch.setattr(train.RecipeCLI, "_run_subcommand", lambda self, name: None)
    cli = train.run("fit", ["--config", str(path), "--runs", str(tmp_path)])
    assert cli.plain["model"]["class_path"] == "lightning_modules.noisefit.NoiseFiT"


def test_the_start_of_the_mini_recipes_knows_every_fact() -> None:
    """`pretrained.pt` is what `pretrain.yaml` gave: all 600 values in all four sentences."""
    lm, data = WordGPT(), KnowledgeFacts(form="statements")
    noisefit.load_start(lm, "recipes/noisefit/pretrained.pt", None)
    data.setup()
    fields = data.examples("statements").fields
    with torch.no_grad():
        guess = lm(fields["input_ids"]).argmax(-1)[:, :-1]
    key = fields["key"][:, 1:]
    assert torch.equal(guess[key], fields["input_ids"][:, 1:][key])


# 7. bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1.5}, r"model.alpha must be in \[0, 1\], got 1.5"),
        ({"temperature": 0.0}, "model.temperature must be positive, got 0.0"),
        ({"lam": -1.0}, "model.lam, noise_std, probe_std and probe_draws must not be negative, got -1.0"),
        ({"layers": [3]}, r"model.layers must be different numbers from 0 to 2, got \[3\]"),
        ({"selection": "auto", "variant": "v1"}, "model.selection auto belongs to model.variant v2, got v1"),
    ],
)
def test_settings_outside_their_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        noisefit.NoiseFiT(tiny, sgd, **options)


def test_more_noisy_layers_than_layers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"model.num_layers must be between 1 and the model's 3 decoder layers, got 4"):
        fit(1, selection="largest", num_layers=4)


def test_calibration_above_a_shared_prefix_needs_layers() -> None:
    with pytest.raises(ValueError, match="needs more than 4 decoder layers, the model has 3"):
        fit(1, selection="auto", prefix_sharing=True)


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear must have one list of decoder layers"):
        noisefit.NoiseFiT(lambda: nn.Linear(2, 2), sgd)


def test_noise_that_destroys_the_predictions_is_announced() -> None:
    def confident() -> WordGPT:
        lm = tiny()
        lm.embedding.weight.data *= 50
        return lm

    with pytest.warns(UserWarning, match="moves the predictions by .* nats a token"):
        fit(1, lm=confident, noise_std=100.0)


@pytest.mark.parametrize(
    ("file", "sha256", "error", "message"),
    [
        ("nowhere.pt", None, FileNotFoundError, "model.start: no file nowhere.pt here or in"),
        ("recipes/noisefit/pretrained.pt", "0" * 12, ValueError, "model.start_sha256 must be that of model.start"),
        ("recipes/noisefit/pretrained.pt", None, ValueError, "holds the weights of another net"),
    ],
)
def test_a_wrong_start_is_refused(file: str, sha256: str | None, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        noisefit.NoiseFiT(tiny, sgd, start=file, start_sha256=sha256)


def test_a_sentence_beyond_the_context_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sequences may have at most lm.context 8 tokens, got 9"):
        tiny()(torch.zeros(1, 9, dtype=torch.long))


@pytest.mark.parametrize("count", [0, 18])
def test_an_impossible_split_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"data.num_tuned must be above 0 and below the 18 facts, got {count}"):
        small_data(num_tuned=count)


if __name__ == "__main__":
    torch.set_num_threads(1)
    target = Path(sys.argv[1])
    _two_ranks(target)
