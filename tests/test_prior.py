"""Frozen priors: found by recipe, code and seed, trained once on first need, and diffusers' pipelines alike."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from lightning_modules.diffusion.frozen_prior import FrozenPrior, PipelinePrior, betas_of, weights_digest
from lightning_modules.diffusion.module import DiffusionModule
from lightning_modules.diffusion.processes import DDPMLinear, ScaledLinear
from lightning_modules.networks.unet import LeanUNet
from scripts import prior, recipes
from scripts.code_hash import code_hash
from scripts.errors import UserError

MODEL = {
    "net": {"class_path": "lightning_modules.networks.unet.LeanUNet", "init_args": {"channels": [8, 16]}},
    "process": {"class_path": "lightning_modules.diffusion.processes.DDPMLinear", "init_args": {}},
}
CONFIG = {"model": {"class_path": "lightning_modules.diffusion.module.DiffusionModule", "init_args": MODEL}}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A small relative of prior/mini, two steps long."""
    (document,) = recipes.expand(recipes.find_recipe("prior/mini"))
    document["trainer"] |= {"max_epochs": 1, "limit_train_batches": 2, "limit_val_batches": 0, "callbacks": None}
    document["model"]["init_args"] |= {"evaluation": None}
    document["model"]["init_args"]["net"]["init_args"] = {"channels": [8, 16]}
    path = tmp_path / "mine" / "small.yaml"
    path.parent.mkdir()
    path.write_text(yaml.safe_dump(document))
    return path


def finished(runs: Path, recipe: Path, **changed: Any) -> Path:
    """A finished run as `noisebench fit` leaves it, with a fresh net."""
    torch.manual_seed(0)
    folder = runs / "mine" / "small" / f"{len(list(runs.rglob('record.json'))):012d}" / "seed10"
    (folder / "checkpoints").mkdir(parents=True)
    model = DiffusionModule(
        lambda: LeanUNet(channels=(8, 16)), DDPMLinear(), torch.optim.SGD, parameterization="v", num_classes=10
    )
    content = {"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams)}
    torch.save(content, folder / "checkpoints" / "last.ckpt")
    facts = {"recipe": "mine/small", "recipe_hash": recipes.recipe_hash(recipe), "seed": 10, "overrides": []}
    facts |= {"status": "finished", "config": CONFIG, "code_hash": code_hash(CONFIG)} | changed
    (folder / "record.json").write_text(json.dumps(facts))
    return folder / "checkpoints" / "last.ckpt"


@pytest.fixture
def lenient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Records with only the fields that the search looks at."""

    def records(runs: Path) -> tuple[list[SimpleNamespace], list[str]]:
        files = sorted(runs.rglob("record.json"))
        data = [json.loads(file.read_text()) for file in files]
        return [
            SimpleNamespace(path=file, data=facts, finished=facts["status"] == "finished")
            for file, facts in zip(files, data, strict=True)
        ], []

    monkeypatch.setattr(prior, "read_records", records)


# the search


@pytest.mark.usefixtures("lenient")
def test_finished_run_of_the_same_code_is_taken(recipe: Path, tmp_path: Path) -> None:
    checkpoint = finished(tmp_path / "runs", recipe)
    assert prior.prior_checkpoint(str(recipe), 10, tmp_path / "runs", tmp_path / "cache") == checkpoint
    assert not (tmp_path / "cache").exists()


@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize(
    "changed",
    [
        {"code_hash": "0" * 12},
        {"recipe_hash": "0" * 12},
        {"seed": 11},
        {"status": "failed"},
        {"overrides": ["--trainer.max_epochs 1"]},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_runs_of_other_code_settings_or_seed_are_not_taken(recipe: Path, tmp_path: Path, changed: dict) -> None:
    finished(tmp_path / "runs", recipe, **changed)
    assert prior.find_prior(recipe, 10, (tmp_path / "runs",)) is None


@pytest.mark.usefixtures("lenient")
def test_two_at_once_train_once(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = []

    def train(path: Path, seed: int, cache: Path) -> None:
        trained.append(seed)
        finished(cache, path)

    monkeypatch.setattr(prior, "_train", train)
    with ThreadPoolExecutor(4) as pool:
        jobs = [
            pool.submit(prior.prior_checkpoint, str(recipe), 10, tmp_path / "runs", tmp_path / "cache")
            for _ in range(4)
        ]
        found = {job.result() for job in jobs}
    assert trained == [10]
    assert len(found) == 1


def test_command_trains_on_first_need_and_finds_it_then(recipe: Path, tmp_path: Path) -> None:
    """The real thing, in processes of its own."""
    words = [sys.executable, "-m", "scripts", "prior", str(recipe), "--runs", str(tmp_path / "runs")]
    words += ["--cache", str(tmp_path / "cache")]
    root = Path(__file__).parents[1]
    done = [subprocess.run(words, cwd=root, capture_output=True, text=True, timeout=300) for _ in range(2)]
    assert [run.returncode for run in done] == [0, 0], done[0].stderr[-2000:]
    assert done[0].stdout.splitlines()[-1] == done[1].stdout.splitlines()[-1]
    assert "training it into" in done[0].stderr
    assert "training it into" not in done[1].stderr
    made = FrozenPrior(str(recipe), runs=str(tmp_path / "runs"), cache=str(tmp_path / "cache"))
    assert (made.kind, made.null_label) == ("v", 10)


def test_unknown_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no recipe 'prior/minni'"):
        prior.prior_checkpoint("prior/minni", 10, tmp_path, tmp_path)


# the interface


@pytest.mark.usefixtures("lenient")
def test_frozen_prior_gives_eps_of_the_averaged_weights(recipe: Path, tmp_path: Path) -> None:
    checkpoint = finished(tmp_path / "runs", recipe)
    made = FrozenPrior(str(recipe), runs=str(tmp_path / "runs"), cache=str(tmp_path / "cache"))
    x, t, y = torch.randn(2, 1, 14, 14), torch.tensor([3, 900]), torch.tensor([1, 10])
    net = LeanUNet(channels=(8, 16)).eval()
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    start = "average.module."
    net.load_state_dict({k.removeprefix(start): v for k, v in state.items() if k.startswith(start)})
    bar = DDPMLinear().alphas_cumprod[t].float()[:, None, None, None]
    torch.testing.assert_close(made.eps(x, t, y), bar.sqrt() * net(x, t.float(), y) + (1 - bar).sqrt() * x)
    assert made.digest == weights_digest(net)
    assert not any(parameter.requires_grad for parameter in made.parameters())


@pytest.mark.usefixtures("lenient")
def test_gradient_reaches_the_input(recipe: Path, tmp_path: Path) -> None:
    finished(tmp_path / "runs", recipe)
    made = FrozenPrior(str(recipe), runs=str(tmp_path / "runs")).double()
    with torch.no_grad():
        made.net.last.weight.normal_()
    x = torch.randn(1, 1, 14, 14, dtype=torch.float64, requires_grad=True)
    made.eps(x, torch.tensor([500]), torch.tensor([2]), guidance=2.0).sum().backward()
    assert x.grad is not None
    assert (x.grad - (1 - made.alphas_cumprod[500]).sqrt()).abs().max() > 1e-6


def test_pipeline_has_the_same_interface(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    from safetensors.torch import save_file

    torch.manual_seed(0)
    net = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 8), layers_per_block=1, cross_attention_dim=6, attention_head_dim=2,
        norm_num_groups=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()  # fmt: skip
    net.save_pretrained(tmp_path / "unet")
    diffusers.DDPMScheduler(1000, 0.00085, 0.012, "scaled_linear").save_pretrained(tmp_path / "scheduler")
    captions = torch.randn(3, 5, 6)
    save_file({"rows": captions}, tmp_path / "captions.safetensors")
    made = PipelinePrior(str(tmp_path), str(tmp_path / "captions.safetensors"))
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), torch.tensor([1, 0])
    with torch.no_grad():
        conditional, null = (
            net(x, t, encoder_hidden_states=captions[rows]).sample for rows in (y, torch.tensor([2, 2]))
        )
        torch.testing.assert_close(made.eps(x, t, y), conditional, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            made.eps(x, t, y, guidance=7.5), null + 7.5 * (conditional - null), rtol=1e-3, atol=1e-4
        )
    assert torch.equal(made.alphas_cumprod, ScaledLinear().alphas_cumprod)
    assert made.null_label == 2


def test_unknown_schedule_is_named() -> None:
    settings = {"num_train_timesteps": 10, "beta_start": 0.1, "beta_end": 0.2, "beta_schedule": "sigmoid"}
    with pytest.raises(
        ValueError, match="beta_schedule must be linear, scaled_linear or squaredcos_cap_v2, got 'sigmoid'"
    ):
        betas_of(settings)
