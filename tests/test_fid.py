"""FID by torchmetrics with a small feature net in the place of Inception: value, references, log, errors."""

import sys
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from synthetic import SyntheticImages
from torch import Tensor, nn

from callbacks.fid import FID, _Outputs, to_uint8
from datamodules.images import ImageData
from lightning_modules.diffusion.evaluation import SampleEvaluation
from lightning_modules.diffusion.frechet import Moments, frechet_distance, moments
from lightning_modules.diffusion.manifold import precision_recall
from lightning_modules.diffusion.module import DiffusionModule
from lightning_modules.diffusion.processes import LinearFlow
from lightning_modules.diffusion.samplers import FlowSampler
from lightning_modules.networks.mlp_denoiser import TinyResMLP


class Means(nn.Module):
    """Mean of each channel and of the left half."""

    num_features = 2

    def forward(self, images: Tensor) -> Tensor:
        x = images.double() / 255
        return torch.stack([x.mean((1, 2, 3)), x[..., : x.shape[-1] // 2].mean((1, 2, 3)) ** 2], dim=1)


def pictures() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (60, 8, 8, 3), np.uint8)


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    np.savez(tmp_path / "pictures.npz", arr_0=pictures())
    return tmp_path / "pictures.npz"


def fit(callback: FID, **options) -> tuple[DiffusionModule, L.Trainer]:
    L.seed_everything(1)
    evaluation = SampleEvaluation(FlowSampler(), nfes=[2, 3], num_samples=30)
    model = DiffusionModule(
        lambda: TinyResMLP((3, 8, 8), width=8, depth=1),
        LinearFlow(),
        lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        parameterization="flow",
        evaluation=options.pop("evaluation", evaluation),
    )
    data = ImageData(SyntheticImages(4, size=8), batch_size=8, val_fraction=0.2, mean=[0.5] * 3, std=[0.5] * 3)
    trainer = L.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0, callbacks=[callback], use_distributed_sampler=False, **options,
    )  # fmt: skip
    trainer.fit(model, datamodule=data)
    return model, trainer


def expected(model: DiffusionModule, nfe: int) -> float:
    """Written out from the samples, with our own Frechet distance."""
    samples = model.evaluation.sample(model.denoiser(), model.image_shape, 0, nfe)
    made = moments(Means()(to_uint8(samples)))
    return float(frechet_distance(moments(Means()(torch.from_numpy(pictures()).permute(0, 3, 1, 2))), made))


def test_value_is_the_frechet_distance_of_the_samples(reference: Path) -> None:
    model, trainer = fit(FID(str(reference), feature=Means()))
    for nfe in (2, 3):
        assert float(trainer.callback_metrics[f"fid/nfe{nfe}"]) == pytest.approx(expected(model, nfe), rel=1e-4)


def test_stored_statistics_equal_those_of_their_pictures(reference: Path, tmp_path: Path) -> None:
    features = Means()(torch.from_numpy(pictures()).permute(0, 3, 1, 2))
    real: Moments = moments(features)
    np.savez(tmp_path / "stats.npz", mu=real.mean.numpy(), sigma=real.cov.numpy())
    values = [
        fit(FID(str(path), feature=Means()))[1].callback_metrics["fid/nfe2"]
        for path in (reference, tmp_path / "stats.npz")
    ]
    assert float(values[1]) == pytest.approx(float(values[0]), rel=1e-4)


def test_folder_of_pictures_equals_their_array(reference: Path, tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "folder").mkdir()
    for number, picture in enumerate(pictures()):
        Image.fromarray(picture).save(tmp_path / "folder" / f"{number:02d}.png")
    values = [
        fit(FID(str(path), feature=Means()))[1].callback_metrics["fid/nfe2"]
        for path in (reference, tmp_path / "folder")
    ]
    assert float(values[1]) == pytest.approx(float(values[0]), rel=1e-4)


def test_steps_are_measured_and_stay(reference: Path) -> None:
    callback = FID(str(reference), steps=[3], every=4, feature=Means())
    _, trainer = fit(callback)
    steps = {name for name in trainer.callback_metrics if "_step" in name and "nfe2" in name}
    last = trainer.global_step
    assert steps == {"fid/nfe2_step3"} | {f"fid/nfe2_step{n}" for n in range(4, last + 1, 4)} | {f"fid/nfe2_step{last}"}


def test_latents_are_decoded_after_their_scale_is_undone() -> None:
    class Decoder(nn.Module):
        def decode(self, latents: Tensor):
            return type("Decoded", (), {"sample": latents[:, :3]})

    callback = FID("unused", scale=0.5)
    callback._decoder = Decoder()
    assert callback._pictures(torch.full((1, 4, 2, 2), 0.25))[0, 0, 0, 0] == int(0.5 * 127.5 + 128)


def test_pictures_are_clipped_and_truncated() -> None:
    assert to_uint8(torch.tensor([-2.0, -1.0, 0.0, 0.999, 3.0])).tolist() == [0, 0, 128, 255, 255]


def test_others_are_those_of_the_samples_features(reference: Path) -> None:
    model, trainer = fit(FID(str(reference), others=True, feature=Means()))
    real = Means()(torch.from_numpy(pictures()).permute(0, 3, 1, 2))
    made = Means()(to_uint8(model.evaluation.sample(model.denoiser(), model.image_shape, 0, 2)))
    found = [float(trainer.callback_metrics[f"{name}/nfe2"]) for name in ("precision", "recall")]
    assert found == pytest.approx(precision_recall(real, made))
    assert "is/nfe2" not in trainer.callback_metrics


def test_inception_gives_features_and_logits_of_one_pass(
    reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inception with random weights, as the true ones have to be fetched."""
    kind = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3").FeatureExtractorInceptionV3
    monkeypatch.setattr(kind, "load_state_dict", lambda self, weights: None)
    torch.save({}, tmp_path / "none.pth")
    torch.manual_seed(0)
    outputs = _Outputs(2048, str(tmp_path / "none.pth"))
    batch = torch.from_numpy(pictures()[:4]).permute(0, 3, 1, 2)
    features = outputs(batch)
    assert features.shape == (4, 2048)
    torch.testing.assert_close(features, outputs.net(batch))
    kept, logits = outputs.last
    assert torch.equal(kept, features)
    torch.testing.assert_close(logits, features @ outputs.net.fc.weight.T)


def test_measuring_does_not_move_training(reference: Path) -> None:
    with_fid, _ = fit(FID(str(reference), every=2, feature=Means()))
    without, _ = fit(FID(str(reference), feature=Means()))
    assert torch.equal(with_fid.net.last.weight, without.net.last.weight)


def test_missing_parts_are_found_before_training(reference: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"fid.reference: there is no nowhere.npz"):
        fit(FID("nowhere.npz", feature=Means()))
    with pytest.raises(ValueError, match=r"FID needs a module with `denoiser` and model.evaluation"):
        fit(FID(str(reference), feature=Means()), evaluation=None)
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ValueError, match=r"needs torch-fidelity: pip install 'noisebench\[fid\]'"):
        fit(FID(str(reference)))


def test_others_need_pictures(tmp_path: Path) -> None:
    np.savez(tmp_path / "stats.npz", mu=np.zeros(2), sigma=np.eye(2))
    with pytest.raises(ValueError, match=r"fid.others needs pictures in fid.reference, .*stats.npz has none"):
        fit(FID(str(tmp_path / "stats.npz"), others=True, feature=Means()))


def test_file_without_statistics_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", weights=np.zeros(3))
    with pytest.raises(ValueError, match=r"must hold mu and sigma, or pictures arr_0; it has \['weights'\]"):
        fit(FID(str(tmp_path / "other.npz"), feature=Means()))
