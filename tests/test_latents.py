"""Latents: shards, draws from the posterior, order, and the command that writes them with a tiny VAE."""

import json
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from latent_folders import write_latents
from PIL import Image
from torch import Tensor

from callbacks.rng import RngState
from datamodules.latents import LatentData, Shards, WholeBatches, draw_latents, open_rows
from lightning_modules.diffusion.module import DiffusionModule
from lightning_modules.diffusion.processes import DDPMLinear
from lightning_modules.networks.mlp_denoiser import TinyResMLP
from scripts.__main__ import main
from scripts.encode_latents import read_square


def rows(count: int, start: int = 0, channels: int = 4) -> np.ndarray:
    """Row i holds i."""
    return np.broadcast_to(np.arange(start, start + count)[:, None, None, None], (count, channels, 2, 2)).astype(
        "float16"
    )


# shards


def test_rows_of_several_shards_come_in_the_order_asked_for(tmp_path: Path) -> None:
    for number, shard in enumerate([rows(3), rows(2, 3), rows(4, 5)]):
        np.save(tmp_path / f"{number}.npy", shard)
    shards = Shards([tmp_path / f"{number}.npy" for number in range(3)])
    wanted = torch.tensor([8, 0, 4, 2, 3, 0])
    assert len(shards) == 9
    assert torch.equal(shards[wanted][:, 0, 0, 0].long(), wanted)


def test_safetensors_shard_equals_the_npy_one(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    np.save(tmp_path / "a.npy", rows(3))
    save_file({"rows": torch.from_numpy(rows(3))}, tmp_path / "a.safetensors")
    assert torch.equal(open_rows(tmp_path / "a.safetensors"), open_rows(tmp_path / "a.npy"))


def test_what_is_done_with_a_row_does_not_reach_the_file(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", rows(3))
    open_rows(tmp_path / "a.npy")[0] = 7
    assert np.array_equal(np.load(tmp_path / "a.npy"), rows(3))


def test_order_leaves_out_the_rest_and_covers_all_rows_over_epochs() -> None:
    order = WholeBatches(10, 4)
    seen = set()
    for epoch in range(8):
        order.set_epoch(epoch)
        batches = list(order)
        assert [len(batch) for batch in batches] == [4, 4]
        assert len(torch.cat(batches).unique()) == 8
        seen |= set(torch.cat(batches).tolist())
    assert seen == set(range(10))


# draws


def test_posterior_is_drawn_with_its_mean_and_deviation() -> None:
    stored = torch.cat([torch.full((4000, 1, 2, 2), 3.0), torch.full((4000, 1, 2, 2), 0.5)], dim=1)
    drawn = draw_latents(stored, "moments", 2.0, torch.Generator().manual_seed(0))
    # 16,000 draws of deviation 1: the mean is good to 0.008
    assert drawn.mean().item() == pytest.approx(6.0, abs=0.03)
    assert drawn.std().item() == pytest.approx(1.0, abs=0.03)


def test_without_a_generator_the_mean_is_taken() -> None:
    stored = torch.from_numpy(rows(3))
    assert torch.equal(draw_latents(stored, "moments", 0.5, None), 0.5 * stored.float()[:, :2])


def test_pixels_are_scaled_to_the_model_range() -> None:
    found = draw_latents(torch.tensor([[[[0, 255]]]], dtype=torch.uint8), "pixels", 1.0, None)
    assert found.flatten().tolist() == [-1, 1]


# data module


def fit(folder: Path, epochs: int = 2, ckpt: Path | None = None, **options) -> tuple[L.Trainer, DiffusionModule]:
    L.seed_everything(1)
    model = DiffusionModule(
        lambda: TinyResMLP((2, 2, 2), width=8, depth=1, num_classes=3),
        DDPMLinear(),
        lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        num_classes=3,
    )
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[RngState()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(model, datamodule=LatentData(str(folder), batch_size=4, **options), ckpt_path=ckpt)
    return trainer, model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_latents(tmp_path / "latents", [rows(6), rows(5, 6)], [-rows(6), -rows(5, 6)])


def test_half_of_the_rows_are_mirrored_ones_while_training(folder: Path) -> None:
    seen: list[Tensor] = []
    step = DiffusionModule.training_step

    class Spy(DiffusionModule):
        def training_step(self, batch, batch_idx):
            seen.append(batch["image"][:, 0, 0, 0] / 0.18215)
            assert torch.equal(batch["label"], batch["index"] % 3)
            return step(self, batch, batch_idx)

    # a deviation of 0 leaves the mean
    for file in folder.glob("*.npy"):
        if "labels" not in file.name:
            content = np.load(file)
            content[:, 2:] = 0
            np.save(file, content)
    L.seed_everything(1)
    model = Spy(lambda: TinyResMLP((2, 2, 2), width=8, depth=1), DDPMLinear(), lambda p: torch.optim.SGD(p, lr=0.1))
    trainer = L.Trainer(
        max_epochs=20, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(model, datamodule=LatentData(str(folder), batch_size=4))
    values = torch.cat(seen)
    assert len(values) == 160
    # 160 coins: standard deviation 0.04
    assert 0.38 < (values < -0.5).float().mean() / (values.abs() > 0.5).float().mean() < 0.62


def test_three_epochs_equal_one_and_a_resume_of_two(folder: Path, tmp_path: Path) -> None:
    _, whole = fit(folder, 3)
    fit(folder, 1)[0].save_checkpoint(tmp_path / "one.ckpt")
    _, resumed = fit(folder, 3, tmp_path / "one.ckpt")
    assert torch.equal(resumed.net.first.weight, whole.net.first.weight)


def test_validation_part_is_found(folder: Path) -> None:
    np.save(folder / "val-00000.npy", rows(4))
    np.save(folder / "val-00000-labels.npy", np.zeros(4, dtype=np.int64))
    trainer, _ = fit(folder, 1)
    assert "probe/loss" in trainer.callback_metrics


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "latents.json").unlink(), r"cannot read .*latents.json.*noisebench encode-latents"),
        (lambda folder: (folder / "latents.json").write_text("{}"), "must name kind"),
        (lambda folder: (folder / "train-00001-flipped.npy").unlink(), "data.flip needs mirrored latents"),
        (lambda folder: (folder / "train-00001.npy").write_bytes(b"no"), "cannot read the shard"),
    ],
)
def test_missing_parts_are_named(folder: Path, change, message: str) -> None:
    change(folder)
    with pytest.raises(ValueError, match=message):
        LatentData(str(folder)).setup()


def test_batches_above_the_number_of_rows_are_refused() -> None:
    with pytest.raises(ValueError, match=r"data.batch_size must be at most the 10 rows of data.root, got 11"):
        WholeBatches(10, 11)


# the command


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for label, name in enumerate(["cat", "dog"]):
        folder = tmp_path / "pictures" / name
        folder.mkdir(parents=True)
        for number in range(2 + label):
            Image.fromarray(rng.integers(0, 255, (40, 50, 3), np.uint8)).save(folder / f"{number}.png")
    return tmp_path / "pictures"


@pytest.fixture
def vae(tmp_path: Path) -> Path:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    net = diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.3,
    )
    net.save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def test_command_writes_the_moments_of_the_vae(pictures: Path, vae: Path, tmp_path: Path) -> None:
    import diffusers

    out = tmp_path / "out"
    words = ["--images", str(pictures), "--vae", str(vae), "--size", "16", "--batch", "2", "--shard", "3"]
    assert main(["encode-latents", *words, "--out", str(out)]) == 0
    data = LatentData(str(out), batch_size=2)
    data.setup()
    batch = data._parts["train"][torch.arange(5)]
    assert batch["label"].tolist() == [0, 0, 1, 1, 1]
    assert data.scale == 0.3
    net = diffusers.AutoencoderKL.from_pretrained(vae).eval()
    square = torch.from_numpy(read_square(pictures / "dog" / "1.png", 16).copy()).permute(2, 0, 1)[None]
    with torch.no_grad():
        for name, picture in (("image", square), ("flipped", square.flip(-1))):
            posterior = net.encode(picture.float() / 127.5 - 1).latent_dist
            expected = torch.cat([posterior.mean, posterior.std], dim=1)
            # float16 in the file
            torch.testing.assert_close(batch[name][3:4].float(), expected, rtol=2e-3, atol=2e-3)


def test_command_continues_with_the_first_missing_shard(pictures: Path, tmp_path: Path) -> None:
    words = ["encode-latents", "--images", str(pictures), "--vae", "none", "--size", "8", "--shard", "2"]
    words += ["--out", str(tmp_path / "out")]
    assert main(words) == 0
    shards = sorted((tmp_path / "out").glob("train-?????.npy"))
    before = [shard.read_bytes() for shard in shards]
    kept = shards[0].stat().st_mtime_ns
    (tmp_path / "out" / "train-00001-labels.npy").unlink()
    shards[1].unlink()
    assert main(words) == 0
    assert [shard.read_bytes() for shard in shards] == before
    assert shards[0].stat().st_mtime_ns == kept
    assert json.loads((tmp_path / "out" / "latents.json").read_text())["kind"] == "pixels"


def test_command_refuses_to_mix_two_settings(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["encode-latents", "--images", str(pictures), "--vae", "none", "--out", str(tmp_path / "out")]
    assert main([*words, "--size", "8"]) == 0
    assert main([*words, "--size", "16"]) == 1
    assert "give another folder" in capsys.readouterr().err


def test_pictures_are_halved_resized_and_cut_in_the_middle(tmp_path: Path) -> None:
    """Twice as wide as high, left half black: the middle square is half black."""
    content = np.zeros((64, 128, 3), np.uint8)
    content[:, 64:] = 200
    Image.fromarray(content).save(tmp_path / "a.png")
    square = read_square(tmp_path / "a.png", 16)
    assert square.shape == (16, 16, 3)
    assert square[:, :7].max() <= 10
    assert square[:, 9:].min() >= 190


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give --images, --class-names or both"),
        (["--images", "nowhere"], "--images: no folder nowhere"),
        (["--images", ".", "--size", "0"], "must be at least 1"),
        (["--images", "{pictures}", "--vae", "/no/such/vae"], "--vae: cannot load the VAE '/no/such/vae'"),
    ],
)
def test_bad_options_are_named(
    words: list[str], message: str, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = [word.replace("{pictures}", str(pictures)) for word in words]
    assert main(["encode-latents", *words, "--out", str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err
