"""WINNER: reference, property, gradient, data, resume, bad input. Recipes are run by test_recipes.py."""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import wavfile
from torch import Tensor

from callbacks.rng import RngState
from datamodules import signals
from lightning_modules import winner
from lightning_modules.winner import Member
from scripts import recipes
from scripts.__main__ import main
from scripts.claims import load_paper

GOLDEN = np.load(Path(__file__).parent / "golden" / "winner.npz")
"""Hand transcription of the official functions, float64; net1 fits one channel in 1-D, net2 three channels in 2-D."""
PRECISIONS = [(torch.float64, 1e-10), (torch.float32, 1e-5)]
OMEGA = 30.0


def golden(name: str, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.from_numpy(GOLDEN[name]).to(dtype)


def golden_net(net: str, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], list[Tensor]]:
    """Perturbed weights, and biases, with gradients on."""
    names = [f"{net}_W0_pert", f"{net}_W1_pert", *(f"{net}_W{layer}" for layer in (2, 3, 4))]
    weights = [golden(name, dtype).clone().requires_grad_() for name in names]
    return weights, [golden(f"{net}_b{layer}", dtype).clone().requires_grad_() for layer in range(5)]


def golden_loss(net: str, weights: list[Tensor], biases: list[Tensor], dtype: torch.dtype) -> Tensor:
    output = winner.siren(golden(f"{net}_x", dtype), weights, biases, OMEGA, OMEGA)
    return (output - golden(f"{net}_y", dtype)).square().mean()


# 1. reference


@pytest.mark.parametrize("case", range(4))
def test_centroid_and_scales_equal_the_official_values(case: int) -> None:
    target = golden(f"sc{case}_x")
    psi = float(winner.spectral_centroid(target))
    assert psi == pytest.approx(float(GOLDEN[f"sc{case}_psi"]), rel=1e-10)
    for dims in (1, 2):
        ours = winner.noise_scales(psi, dims, target.shape[-1])
        assert ours == pytest.approx(GOLDEN[f"sc{case}_s_in{dims}"].tolist(), rel=1e-10)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("net", ["net1", "net2"])
def test_noise_on_two_layers_equals_the_official_weights(net: str, dtype: torch.dtype, tolerance: float) -> None:
    for layer in (0, 1):
        scale = float(GOLDEN[f"{net}_s"][layer])
        ours = winner.perturbed(golden(f"{net}_W{layer}", dtype), golden(f"{net}_eps{layer}", dtype), scale, OMEGA)
        torch.testing.assert_close(ours, golden(f"{net}_W{layer}_pert", dtype), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("net", ["net1", "net2"])
def test_output_loss_and_gradient_equal_the_official_net(net: str) -> None:
    weights, biases = golden_net(net)
    output = winner.siren(golden(f"{net}_x"), weights, biases, OMEGA, OMEGA)
    loss = golden_loss(net, weights, biases, torch.float64)
    loss.backward()
    pairs = [(output, "out"), (loss, "loss"), (winner.psnr(loss), "psnr")]
    pairs += [(weights[0].grad, "gW0"), (weights[1].grad, "gW1"), (biases[0].grad, "gb0")]
    for ours, name in pairs:
        torch.testing.assert_close(ours.detach(), golden(f"{net}_{name}"), rtol=1e-10, atol=1e-10)


# net1's first phases reach 4,000 rad, where float32 rounds to 2e-4: its output is off by 1.4e-5
def test_float32_net_equals_the_official_one() -> None:
    weights, biases = golden_net("net2", torch.float32)
    output = winner.siren(golden("net2_x", torch.float32), weights, biases, OMEGA, OMEGA)
    torch.testing.assert_close(output.detach(), golden("net2_out", torch.float32), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("net", ["net1", "net2"])
def test_five_steps_of_adam_equal_the_official_losses(net: str) -> None:
    weights, biases = golden_net(net)
    optimizer = torch.optim.Adam([*weights, *biases], lr=1e-4)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.99)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = golden_loss(net, weights, biases, torch.float64)
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    assert losses == pytest.approx(GOLDEN[f"{net}_adam_losses"].tolist(), rel=1e-10)


# 2. property


def test_centroid_of_a_sine_is_its_frequency() -> None:
    """16 of 64 cycles per sample: a quarter of the sampling rate, half of Nyquist."""
    wave = torch.sin(2 * torch.pi * 16 * torch.arange(64, dtype=torch.float64) / 64)
    assert float(winner.spectral_centroid(3 * wave[:, None])) == pytest.approx(0.5, abs=1e-10)
    assert float(winner.spectral_centroid(torch.zeros(64, 1))) == 0


def test_rules_of_text_and_code_are_as_written() -> None:
    assert winner.noise_scales(0.5, 1, 1, "paper") == pytest.approx((3500 * (1 - np.exp(-5 * 0.5**0.5)), 1.5))
    assert winner.noise_scales(0.1, 2, 3, "paper") == pytest.approx(
        (50 * (1 - np.exp(-5 * 0.3**0.5 / 3)), 0.12 / 3**0.5)
    )


def test_weights_fill_their_intervals() -> None:
    weights, biases = winner.siren_weights([2, 64, 64, 1], OMEGA, torch.Generator().manual_seed(0))
    limits = [1 / 2, (6 / 64) ** 0.5 / 30, (6 / 64) ** 0.5 / 30, 2**-0.5, 1 / 8, 1 / 8]
    for values, limit in zip([*weights, *biases], limits, strict=True):
        assert float(values.abs().max()) <= limit
    assert float(weights[1].abs().max()) > 0.99 * limits[1]


def test_power_by_band_finds_a_sine_and_keeps_the_total() -> None:
    wave = torch.sin(2 * torch.pi * 33 * torch.arange(100, dtype=torch.float64) / 100)[:, None]
    power = winner.band_power(wave)
    assert int(power.argmax()) == 6
    assert float(power.sum()) == pytest.approx(2500, rel=1e-10)


# 3. gradient


def test_gradient_of_the_sine_net() -> None:
    generator = torch.Generator().manual_seed(1)
    weights, biases = winner.siren_weights([1, 3, 3, 1], 2.0, generator)
    values = [tensor.double().requires_grad_() for tensor in (*weights, *biases)]
    position = torch.linspace(-1, 1, 5, dtype=torch.float64)[:, None]
    assert torch.autograd.gradcheck(lambda *v: winner.siren(position, v[:3], v[3:], 2.0, 2.0), values)


# 4. stack, module and resume

HI = signals.BandNoise(64, 0.6, 0.8)
MEMBERS = {"winner": Member("winner"), "siren": Member(), "fast": Member(first_omega=300.0)}


def fit(members: dict[str, Member], epochs: int = 2, ckpt: Path | None = None) -> tuple[winner.Winner, L.Trainer]:
    L.seed_everything(5)
    schedule = partial(torch.optim.lr_scheduler.StepLR, step_size=2, gamma=0.9)
    module = winner.Winner(members, partial(torch.optim.Adam, lr=1e-3), schedule, width=8, depth=3)
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
    trainer.fit(module, datamodule=signals.Signal(HI, steps_per_epoch=3), ckpt_path=ckpt)
    return module, trainer


def test_members_of_a_stack_train_like_nets_of_their_own() -> None:
    stacked, trainer = fit(MEMBERS)
    for name, member in MEMBERS.items():
        _, alone = fit({name: member})
        for key in (f"psnr/{name}", f"power/{name}_6", f"init_power/{name}_6"):
            assert float(trainer.callback_metrics[key]) == pytest.approx(float(alone.callback_metrics[key]), rel=1e-4)
    assert float(stacked.first_omega[2]) == 300


def test_members_differ_by_the_noise_alone() -> None:
    module, _ = fit(
        {"winner": Member("winner"), "siren": Member(), "first": Member("winner", layers="first")}, epochs=0
    )
    first, second, *later = [weight.detach() for weight in module.weights]
    assert torch.equal(first[0], first[2])
    assert torch.equal(second[1], second[2])
    assert float((first[0] - first[1]).abs().max()) > 10
    assert all(torch.equal(weight[0], weight[1]) for weight in (*later, *module.biases))


def test_reference_length_scales_the_first_layer_only() -> None:
    module, _ = fit({"one": Member("winner"), "scaled": Member("winner", reference_length=640)}, epochs=0)
    (first, second), (scaled_first, scaled_second) = module.scales
    assert scaled_first == pytest.approx(first / 10)
    assert scaled_second == second


def test_three_epochs_equal_one_and_a_resume_of_two(tmp_path: Path) -> None:
    whole, whole_trainer = fit(MEMBERS, 3)
    _, first = fit(MEMBERS, 1)
    first.save_checkpoint(tmp_path / "one.ckpt")
    resumed, resumed_trainer = fit(MEMBERS, 3, tmp_path / "one.ckpt")
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    assert resumed_trainer.callback_metrics == whole_trainer.callback_metrics


def test_testing_after_training_keeps_the_weights() -> None:
    module, trainer = fit(MEMBERS)
    trained = float(trainer.callback_metrics["psnr/winner"])
    (tested,) = trainer.test(module, datamodule=trainer.datamodule, verbose=False)
    assert tested["psnr/winner"] == pytest.approx(trained, rel=1e-6)


# 5. data


def read(source: signals.SignalSource) -> Tensor:
    return source.read(torch.Generator().manual_seed(0))


def test_band_noise_has_no_power_outside_its_band() -> None:
    power = winner.band_power(read(signals.BandNoise(1000, 0.6, 0.8)))
    assert float(power[6:8].sum() / power.sum()) > 0.99
    assert float(power[:6].sum() / power.sum()) < 1e-20


def test_clicks_have_the_centroid_of_the_prototype() -> None:
    """psi of the prototype's clips was 0.33 to 0.40."""
    assert 0.3 < float(winner.spectral_centroid(read(signals.Clicks(1024)))) < 0.43


def test_signal_is_scaled_and_placed_from_minus_one_to_one() -> None:
    L.seed_everything(0)
    data = signals.Signal(HI)
    data.setup()
    assert float(data.target.abs().max()) == 1
    assert data.position[[0, -1], 0].tolist() == [-1, 1]


def test_grid_is_in_raster_order() -> None:
    assert signals.grid((2, 3)).tolist() == [[-1, -1], [-1, 0], [-1, 1], [1, -1], [1, 0], [1, 1]]


def test_picture_and_sound_files_are_read(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 255], [255, 0]], dtype=np.uint8)).save(tmp_path / "grey.png")
    assert read(signals.Picture(str(tmp_path / "grey.png"))).squeeze().tolist() == [[-1, 1], [1, -1]]
    Image.new("RGB", (2, 2), (255, 0, 0)).save(tmp_path / "red.png")
    assert read(signals.Picture(str(tmp_path / "red.png"), size=1)).flatten().tolist() == [1, -1, -1]
    wavfile.write(tmp_path / "stereo.wav", 8000, np.array([[1, 3], [2, 4], [9, 9]], dtype=np.int16))
    assert read(signals.WavFile(str(tmp_path / "stereo.wav"), length=2)).flatten().tolist() == [2, 3]


# 6. recipes of paper scale

SLUG = "winner"


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


@pytest.mark.parametrize("name", ["audio", "image", "image-noise"])
def test_paper_scale_recipe_trains_on_a_small_signal(name: str, tmp_path: Path) -> None:
    wavfile.write(tmp_path / "clip.wav", 8000, np.arange(-32, 32, dtype=np.int16))
    Image.effect_noise((9, 9), 50).save(tmp_path / "picture.png")
    source = {
        "audio": ["path", str(tmp_path / "clip.wav")],
        "image": ["path", str(tmp_path / "picture.png")],
        "image-noise": ["size", "8"],
    }
    option, value = source[name]
    words = [f"--data.source.init_args.{option}", value, "--data.steps_per_epoch", "1"]
    words += ["--data.source.init_args.size", "8"] if name == "image" else []
    check_recipe(name, run_recipe(name, words, tmp_path / "runs"))


# 7. bad input


class Silence(signals.SignalSource):
    def read(self, generator: torch.Generator) -> Tensor:
        return torch.zeros(8, 1)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: signals.BandNoise(64, 0.8, 0.6), "the spectrum of 64 samples is empty"),
        (lambda: signals.Signal(Silence()).setup(), "data.source gives a signal that is 0 everywhere"),
        (
            lambda: signals.Signal(signals.UniformPicture(513)).setup(),
            "263,169 points; one batch holds at most 262,144",
        ),
        (lambda: signals.Signal(HI, steps_per_epoch=0), "data.steps_per_epoch must be at least 1, got 0"),
        (lambda: signals.WavFile("nowhere.wav"), "data.source.path must name a WAV file; there is no .*nowhere.wav"),
        (lambda: winner.noise_scales(0.5, 3, 1), "1 or 2 coordinates for WINNER's scales, got 3"),
    ],
)
def test_data_outside_their_range_are_refused(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("members", "options", "message"),
    [
        ({}, {}, r"model.members must name at least one net in letters and digits, got \[\]"),
        ({"a/b": Member()}, {}, "model.members must name at least one net"),
        ({"a": Member("winner")}, {"depth": 1}, "model.width and depth must be at least 1, depth 2 for winner"),
        ({"a": Member(first_omega=-1.0)}, {}, "model.omega and first_omega must be positive"),
    ],
)
def test_settings_outside_their_range_are_refused(
    members: dict[str, Member], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        winner.Winner(members, torch.optim.Adam, **options)
