"""The picture of samples at the end of training."""

from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from synthetic import SyntheticImages
from torch import nn

from callbacks.sample_grid import SampleGrid
from datamodules.images import ImageData
from lightning_modules.diffusion import samplers
from lightning_modules.diffusion.evaluation import SampleEvaluation
from lightning_modules.diffusion.module import DiffusionModule
from lightning_modules.diffusion.processes import LinearFlow


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor, time: torch.Tensor, label: torch.Tensor | None = None) -> torch.Tensor:
        return self.layer(x.flatten(1)).view_as(x)


def fit(folder: Path, callbacks: list[L.Callback], evaluation: SampleEvaluation | None) -> DiffusionModule:
    L.seed_everything(1)
    model = DiffusionModule(Net, LinearFlow(), torch.optim.SGD, parameterization="flow", evaluation=evaluation)
    source = SyntheticImages(num_classes=4, channels=1, size=4, per_class=10)
    data = ImageData(source, batch_size=8, val_fraction=0.2, mean=[0.5], std=[0.5])
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = L.Trainer(max_epochs=1, default_root_dir=folder, callbacks=callbacks, **options)  # type: ignore[arg-type]
    trainer.fit(model, datamodule=data)
    return model


def test_grid_shows_the_samples_of_the_averaged_weights(tmp_path: Path) -> None:
    model = fit(tmp_path, [SampleGrid([3], count=20)], SampleEvaluation(samplers.FlowSampler()))
    # pictures of four by four, a pixel between them
    picture = torch.tensor(np.asarray(Image.open(tmp_path / "figures/samples_3_evaluations.png").convert("L")))
    assert picture.shape == (2 * 5 + 1, 10 * 5 + 1)
    assert model.evaluation is not None
    expected = model.evaluation.sample(model.denoiser(), (1, 4, 4), 0, 3, count=20).clamp(-1, 1)
    first = picture[1:5, 1:5].float() / 127.5 - 1
    torch.testing.assert_close(first, expected[0, 0], atol=1.01 / 127.5, rtol=0)


def test_training_does_not_notice(tmp_path: Path) -> None:
    with_grid, without = (
        fit(tmp_path, callbacks, SampleEvaluation(samplers.FlowSampler())) for callbacks in ([SampleGrid([2])], [])
    )
    assert all(
        torch.equal(a, b) for a, b in zip(with_grid.state_dict().values(), without.state_dict().values(), strict=True)
    )


def test_module_that_cannot_sample_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"SampleGrid needs a module with `denoiser` and model\.evaluation"):
        fit(tmp_path, [SampleGrid([2])], None)
