"""LoRA on decoder layers that are sharded over two processes (FSDP2): weights, metrics and adapter are those of one."""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from two_processes import run_two

from callbacks.save_adapter import SaveAdapter
from datamodules.facts import KnowledgeFacts
from lightning_modules import noisefit
from lightning_modules.networks.pretrained_lm import PretrainedLM

pytest.importorskip("transformers", reason="pip install 'noisebench[llm]'")
safetensors = pytest.importorskip("safetensors.torch", reason="pip install 'noisebench[llm]'")
peft = pytest.importorskip("peft", reason="pip install 'noisebench[llm]'")

SMALL = {"vocab_size": 78, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
SMALL |= {"num_attention_heads": 2, "num_key_value_heads": 2}
KINDS: dict[str, dict[str, Any]] = {
    "float32": {"lora_dropout": 0.0},
    "checkpointed": {"lora_dropout": 0.0, "gradient_checkpointing": True},
}
MIXED = {"lora_dropout": 0.0, "dtype": "bfloat16"}


def fit(folder: Path, lm: dict[str, Any], options: dict[str, Any] | None = None, **settings: Any) -> Any:
    """Two epochs of statements of 5 to 7 words: the ranks' numbers of labels differ."""
    L.seed_everything(3)
    optimizer = partial(torch.optim.SGD, lr=0.5, momentum=0.9)
    made = partial(PretrainedLM, config=SMALL, **lm)
    module = noisefit.NoiseFiT(made, optimizer, **{"loss_mode": "basefit", "probe_draws": 0, **settings})
    trainer = L.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
        callbacks=[SaveAdapter()],
        **(options or {}),
    )
    trainer.fit(module, datamodule=KnowledgeFacts("statements", num_people=6, num_tuned=8, batch_size=8))
    return module, {key: float(value) for key, value in trainer.callback_metrics.items()}


def _two_ranks(folder: Path) -> None:
    for name, lm in KINDS.items():
        place = folder / name
        module, metrics = fit(place, lm, {"devices": 2, "strategy": "fsdp2"})
        kinds = {type(p).__name__ for p in module.lm.parameters()}
        if torch.distributed.get_rank() == 0:
            torch.save({"metrics": metrics, "kinds": sorted(kinds)}, place / "found.pt")
    options = {"devices": 2, "strategy": "fsdp2", "precision": "bf16-mixed"}
    module, _ = fit(folder / "mixed", MIXED, options, loss_mode="full")
    if torch.distributed.get_rank() == 0:
        torch.save(sorted({str(p.dtype) for p in module.lm.parameters()}), folder / "mixed.pt")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("language")
    run_two(__file__, folder)
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize("name", KINDS)
def test_sharded_adapter_and_metrics_are_those_of_one_process(two_ranks: Path, tmp_path: Path, name: str) -> None:
    module, metrics = fit(tmp_path, KINDS[name])
    found = torch.load(two_ranks / name / "found.pt")
    assert found["kinds"] == ["DTensor"]
    assert found["metrics"] == pytest.approx(metrics, rel=1e-4, abs=1e-6)
    base = noisefit.NoiseFiT(partial(PretrainedLM, config=SMALL, lora_rank=0), torch.optim.SGD).lm
    loaded = peft.PeftModel.from_pretrained(base.model, two_ranks / name / "adapter").eval()
    ids = torch.arange(12).view(2, 6)
    torch.testing.assert_close(loaded(ids).logits, module.lm.eval()(ids), rtol=1e-4, atol=1e-5)


@pytest.mark.distributed
def test_float32_adapters_of_a_sharded_bf16_model_learn(two_ranks: Path) -> None:
    assert torch.load(two_ranks / "mixed.pt") == ["torch.bfloat16", "torch.float32"]
    weights = safetensors.load_file(two_ranks / "mixed" / "adapter" / "adapter_model.safetensors")
    second = [value for name, value in weights.items() if "lora_B" in name]
    assert len(second) == 2 * 3
    assert all(value.dtype == torch.float32 and float(value.abs().min(-1).values.max()) > 0 for value in second)


if __name__ == "__main__":
    torch.set_num_threads(1)
    target = Path(sys.argv[1])
    _two_ranks(target)
