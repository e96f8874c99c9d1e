"""Assignment in the background: every number as in the foreground, also when a run is cut within an epoch."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from synthetic import SyntheticImages
from torch import nn

from callbacks.assign_ahead import AheadLoader, AssignAhead
from callbacks.epoch_sums import EpochSums
from callbacks.rng import RngState
from datamodules.images import ImageData
from lightning_modules.diffusion.couplings import Coupling
from lightning_modules.diffusion.module import DiffusionModule
from lightning_modules.diffusion.processes import LinearFlow
from lightning_modules.immiscible import ExactOT, LinearAssignment, NearestOfK
from lightning_modules.networks.mlp_denoiser import TinyResMLP

COUPLINGS = {"linear": LinearAssignment, "knn": NearestOfK, "transport": ExactOT}


def run(
    coupling: Coupling, ahead: bool, ckpt: Path | None = None, more: Sequence[L.Callback] = (), **options
) -> tuple[DiffusionModule, L.Trainer]:
    L.seed_everything(3)
    model = DiffusionModule(
        lambda: TinyResMLP((1, 8, 8), width=8, depth=1, num_classes=4),
        LinearFlow(),
        lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        parameterization="flow",
        coupling=coupling,
        num_classes=4,
    )
    source = SyntheticImages(num_classes=4, channels=1, size=8, per_class=20)
    data = ImageData(source, batch_size=16, val_fraction=0.2, mean=[0.5], std=[0.5], flip=True)
    trainer = L.Trainer(
        accelerator="cpu",
        callbacks=[RngState(), EpochSums(), *([AssignAhead()] if ahead else []), *more],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        limit_val_batches=0,
        **{"max_epochs": 2, **options},
    )
    trainer.fit(model, datamodule=data, ckpt_path=ckpt)
    return model, trainer


@pytest.mark.parametrize("limit", [1.0, 3], ids=["whole epochs", "cut epochs"])
@pytest.mark.parametrize("name", COUPLINGS)
def test_weights_equal_those_of_the_foreground(name: str, limit: float) -> None:
    models = [run(COUPLINGS[name](), ahead, limit_train_batches=limit)[0] for ahead in (False, True)]
    for key, value in models[0].state_dict().items():
        assert torch.equal(models[1].state_dict()[key], value), key
    assert torch.equal(models[0].noise_generator.get_state(), models[1].noise_generator.get_state())


class SaveAtTwo(L.Callback):
    """A checkpoint within the epoch, after the second step."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: L.Trainer, *rest) -> None:
        if trainer.global_step == 2 and not self.path.exists():
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("first", [True, False], ids=["ahead first", "foreground first"])
def test_checkpoint_within_an_epoch_continues_in_either_way(first: bool, tmp_path: Path) -> None:
    """Two steps in one way, the rest in the other."""
    path = tmp_path / "two.ckpt"
    whole, trainer = run(LinearAssignment(), first, more=[SaveAtTwo(path)], max_epochs=1)
    rest, resumed = run(LinearAssignment(), not first, path, max_epochs=1)
    assert torch.equal(rest.net.last.weight, whole.net.last.weight)
    # means over the whole epoch, the steps before the cut among them
    for name in ("train/loss", "coupling/distance"):
        assert torch.equal(resumed.callback_metrics[name], trainer.callback_metrics[name]), name


def test_batches_keep_their_order_and_only_handed_out_ones_count() -> None:
    position = {"batches": 0}

    def numbers():
        for number in range(3):
            position["batches"] += 1
            yield {"number": number}

    class Loader:
        sampler = None

        def __iter__(self):
            return numbers()

        def state_dict(self) -> dict[str, int]:
            return dict(position)

    handed: list[int] = []

    class Twice:
        def __call__(self, batch: dict[str, int]) -> tuple[int, int]:
            return 2 * batch["number"], batch["number"]

        def hand_out(self, state: int) -> None:
            handed.append(state)

    ahead = AheadLoader(Loader(), Twice)
    seen = [(batch["number"], batch["pairs"], ahead.state_dict()["batches"]) for batch in ahead]
    assert seen == [(0, 0, 1), (1, 2, 2), (2, 4, 3)]
    assert handed == [0, 1, 2]


def test_global_scope_on_several_processes_is_refused() -> None:
    module = nn.Module()
    module.coupling, module.encoder = LinearAssignment(scope="global"), nn.Identity()
    trainer = SimpleNamespace(world_size=2, datamodule=object())
    with pytest.raises(ValueError, match=r"coupling.scope local on several processes, got global"):
        AssignAhead().setup(trainer, module, "fit")
