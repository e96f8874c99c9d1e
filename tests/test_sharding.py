"""FSDP2 over two processes equals one; sharded checkpoints, their consolidation, and a resume on another world size."""

import json
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from synthetic import SyntheticImages
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from two_processes import run_two

from callbacks.checkpoint_activations import CheckpointActivations, checkpoint_activations
from callbacks.ema import Ema
from callbacks.rng import RngState
from callbacks.run_record import RunRecord
from datamodules.images import ImageData
from datamodules.labels import Symmetric
from lightning_modules import elr
from lightning_modules.networks.image import SmallResNet, TimmNet
from lightning_modules.sharding import FSDP2, find_blocks, shard
from scripts import memory, train
from scripts.checkpoints import LastCheckpoint
from scripts.consolidate import consolidate

SMALL = SyntheticImages(num_classes=4, channels=1, size=8, per_class=30)


def vit() -> TimmNet:
    """A ViT whose width of 15 does not divide by two; its class token has one row only, which one rank holds."""
    options = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 15, "depth": 2, "num_heads": 3}
    return TimmNet("vit_tiny_patch16_224", 4, options=options)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def step_lr(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.1)


def full(module: nn.Module) -> dict[str, Tensor]:
    """Copies of whole parameters; every rank must call this."""
    pairs = [(name, p.detach()) for name, p in module.named_parameters()]
    return {name: (p.full_tensor() if isinstance(p, DTensor) else p).clone() for name, p in pairs}


class Watch(Callback):
    """Remembers the weights before the first step, and the dtypes in which blocks see their weights."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.initial = full(pl_module)
        self.seen: set[tuple[str, torch.dtype]] = set()
        for block in find_blocks(pl_module.net):
            block.register_forward_pre_hook(lambda block, _: self.seen.add(("weight", block.mlp.fc1.weight.dtype)))


def fit(
    out: Path, epochs: int, lam: float = 3.0, ckpt: Path | None = None, extra: list[Callback] | None = None, **options
) -> None:
    """Trains a ViT with ELR on a global batch of 12; what came of it goes to `out`.pt and `out`.ckpt."""
    L.seed_everything(3)
    module = elr.ELR(vit, sgd, step_lr, lam=lam)
    watch = Watch()
    callbacks = [RngState(), Ema(0.9), watch, *(extra or []), RunRecord(out, {"config": {}, "code_hash": "c0de"})]
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        gradient_clip_val=0.5,
        callbacks=[*callbacks, LastCheckpoint(out / "checkpoints")],
        **options,
    )
    data = ImageData(SMALL, 12, val_fraction=0.2, noise=Symmetric(0.4))
    trainer.fit(module, datamodule=data, ckpt_path=ckpt)
    trainer.save_checkpoint(out.with_suffix(".ckpt"))
    trained = [p for p in module.parameters() if p.requires_grad]
    result = {
        "initial": watch.initial,
        "weights": full(module),
        "local_bytes": memory.tensor_bytes(p.to_local() if isinstance(p, DTensor) else p for p in trained),
        "seen": watch.seen,
        "targets": module.targets,
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
    }
    if trainer.is_global_zero:
        torch.save(result, out.with_suffix(".pt"))


class Sums(TorchDispatchMode):
    """Notes in which dtype gradients are summed over the ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "reduce_scatter" in str(func):
            self.dtypes |= {value.dtype for value in args if isinstance(value, Tensor)}
        return func(*args, **(kwargs or {}))


def two_ranks(folder: Path) -> None:
    """What two processes do, in one start of the interpreter."""
    torch.set_num_threads(1)
    sharded = {"strategy": "fsdp2", "devices": 2}
    fit(folder / "two", 2, **sharded)
    fit(folder / "two-ce", 1, lam=0.0, **sharded)
    fit(folder / "two-checkpointed", 2, extra=[CheckpointActivations()], **sharded)
    fit(folder / "two-two", 3, ckpt=folder / "two.ckpt", **sharded)
    fit(folder / "one-two", 3, ckpt=folder / "one.ckpt", **sharded)
    with Sums() as sums:
        fit(folder / "two-bf16", 1, precision="bf16-mixed", **sharded)
    torch.save(sums.dtypes, folder / f"sums{torch.distributed.get_rank()}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of runs of one process and of two."""
    path = tmp_path_factory.mktemp("sharding")
    fit(path / "one", 2)
    fit(path / "one-ce", 1, lam=0.0)
    fit(path / "whole", 3)
    run_two(__file__, path)
    consolidate(path / "two.ckpt", path / "two-full.ckpt")
    fit(path / "two-one", 3, ckpt=path / "two-full.ckpt")
    return path


def result(folder: Path, name: str) -> dict[str, Any]:
    return torch.load(folder / f"{name}.pt")


def assert_same_run(ours: dict[str, Any], expected: dict[str, Any]) -> None:
    """Up to the order of float32 sums."""
    torch.testing.assert_close(ours["weights"], expected["weights"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours["targets"], expected["targets"], rtol=1e-5, atol=1e-6)
    assert ours["metrics"] == pytest.approx(expected["metrics"], rel=1e-5)


@pytest.mark.distributed
def test_initial_weights_are_those_of_one_process(folder: Path) -> None:
    torch.testing.assert_close(result(folder, "two")["initial"], result(folder, "one")["initial"], rtol=0, atol=0)


@pytest.mark.distributed
@pytest.mark.parametrize("loss", ["", "-ce"])
def test_two_shards_equal_one_process(folder: Path, loss: str) -> None:
    assert_same_run(result(folder, f"two{loss}"), result(folder, f"one{loss}"))


@pytest.mark.distributed
def test_averages_of_uneven_shards_equal_those_of_one_process(folder: Path) -> None:
    ours, expected = (
        {name: value for name, value in result(folder, run)["weights"].items() if name.startswith("ema_weights.")}
        for run in ("two", "one")
    )
    assert {1, 15, 45} <= {value.shape[0] for value in ours.values()}
    assert len(ours) == len(result(folder, "two")["weights"]) / 2
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.distributed
def test_a_rank_holds_the_bytes_that_a_plan_says(folder: Path) -> None:
    weights = {name: p for name, p in result(folder, "one")["weights"].items() if name.startswith("net.")}
    assert result(folder, "two")["local_bytes"] == memory.shard_bytes(weights.values(), 2)


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["parameters", "flops_per_step"])
def test_record_counts_the_whole_net_and_all_processes(folder: Path, name: str) -> None:
    two, one = (json.loads((folder / run / "record.json").read_text()) for run in ("two", "one"))
    assert two["world_size"] == 2
    assert two[name] == one[name]


@pytest.mark.distributed
def test_checkpointed_activations_change_no_bit(folder: Path) -> None:
    ours, expected = result(folder, "two-checkpointed"), result(folder, "two")
    torch.testing.assert_close(ours["weights"], expected["weights"], rtol=0, atol=0)


@pytest.mark.distributed
def test_bf16_gathers_bf16_weights_and_sums_gradients_in_float32(folder: Path) -> None:
    assert result(folder, "two")["seen"] == {("weight", torch.float32)}
    assert result(folder, "two-bf16")["seen"] == {("weight", torch.bfloat16)}
    assert torch.load(folder / "sums0.pt") == {torch.float32}


@pytest.mark.distributed
def test_consolidated_weights_and_targets_are_those_of_the_shards(folder: Path) -> None:
    checkpoint, expected = torch.load(folder / "two-full.ckpt"), result(folder, "two")
    weights = {name: checkpoint["state_dict"][name] for name in expected["weights"]}
    torch.testing.assert_close(weights, expected["weights"], rtol=0, atol=0)
    torch.testing.assert_close(checkpoint["targets"], expected["targets"], rtol=0, atol=0)


@pytest.mark.distributed
def test_consolidated_file_has_the_keys_of_an_unsharded_one(folder: Path) -> None:
    ours, expected = torch.load(folder / "two-full.ckpt"), torch.load(folder / "one.ckpt")
    assert ours.keys() == expected.keys()
    assert ours["optimizer_states"][0]["param_groups"] == expected["optimizer_states"][0]["param_groups"]
    assert ours["callbacks"].keys() == expected["callbacks"].keys()


@pytest.mark.distributed
@pytest.mark.parametrize("resumed", ["two-two", "one-two", "two-one"])
def test_resume_on_any_world_size_continues_the_run(folder: Path, resumed: str) -> None:
    assert_same_run(result(folder, resumed), result(folder, "whole"))


@pytest.mark.distributed
def test_last_checkpoint_is_a_whole_folder_after_several_saves(folder: Path) -> None:
    names = {path.name for path in (folder / "two" / "checkpoints").iterdir()}
    assert names == {"last.ckpt"}
    assert (folder / "two" / "checkpoints" / "last.ckpt" / "meta.pt").is_file()


def test_without_a_mesh_a_net_stays_as_it_is() -> None:
    net = vit()
    before = [type(module) for module in net.modules()]
    shard(net, None)
    assert [type(module) for module in net.modules()] == before


def test_blocks_are_found_by_name_and_by_class() -> None:
    net = vit()
    assert find_blocks(net) == list(net.net.blocks)
    assert find_blocks(net, ["net.blocks"]) == find_blocks(net, [type(net.net.blocks[0])])
    assert find_blocks(SmallResNet(), ["blocks.1"]) != []
    assert find_blocks(nn.Linear(2, 2)) == []


def test_missing_block_names_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"SmallResNet has no 'layers'; lists of blocks: stem, blocks, .*_BasicBlock"):
        find_blocks(SmallResNet(), ["layers"])


def test_checkpointed_blocks_give_the_same_gradients_bit_for_bit() -> None:
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        net = vit()
        if checkpointed:
            assert checkpoint_activations(net) == 2
        net(torch.randn(6, 1, 8, 8)).square().sum().backward()
        gradients.append({name: p.grad for name, p in net.named_parameters()})
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)


def test_checkpointing_without_blocks_is_refused() -> None:
    module: Any = L.LightningModule()
    with pytest.raises(ValueError, match="no net of LightningModule states block_names"):
        CheckpointActivations().setup(None, module, "fit")


@pytest.mark.parametrize(
    "words",
    [
        ["--trainer.strategy", "fsdp2"],
        ["--trainer.strategy.class_path", "lightning_modules.sharding.FSDP2"],
        [
            *("--trainer.strategy.class_path", "lightning.pytorch.strategies.ModelParallelStrategy"),
            *("--trainer.strategy.init_args.tensor_parallel_size", "1"),
        ],
    ],
)
def test_strategy_is_an_option_of_any_recipe(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train.RecipeCLI, "_run_subcommand", lambda self, name: None)
    options = ["--config", "elr/mini-sym40", "--runs", str(tmp_path), "--wandb", "false"]
    strategy = train.run("fit", [*options, *words]).trainer.strategy
    assert strategy._tensor_parallel_size == 1
    assert isinstance(strategy, FSDP2 if len(words) == 2 else L.pytorch.strategies.ModelParallelStrategy)


if __name__ == "__main__":
    two_ranks(Path(sys.argv[1]))
