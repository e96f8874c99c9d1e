"""Text UNet on captions of class names: a step of training, the null caption, the captions' command."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_modules.networks.stable_diffusion import TextUNet
from scripts import train
from scripts.__main__ import main

pytest.importorskip("diffusers")
TINY = {"block_out_channels": [8, 8, 8, 8], "layers_per_block": 1, "cross_attention_dim": 6, "attention_head_dim": 2}
TINY |= {"norm_num_groups": 4, "sample_size": 8}


@pytest.fixture
def captions(tmp_path: Path) -> str:
    rows = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(0)).half()
    save_file({"rows": rows}, tmp_path / "captions.safetensors")
    return str(tmp_path / "captions.safetensors")


def test_no_label_is_the_empty_text(captions: str) -> None:
    torch.manual_seed(0)
    net = TextUNet(captions, config=TINY).eval()
    x, time = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 900.0])
    with torch.no_grad():
        assert torch.equal(net(x, time), net(x, time, torch.tensor([3, 3])))
        assert not torch.equal(net(x, time), net(x, time, torch.tensor([0, 3])))


def test_captions_are_no_state_of_the_net(captions: str) -> None:
    net = TextUNet(captions, config=TINY)
    net(torch.randn(1, 4, 8, 8), torch.tensor([3.0]))
    assert all(name.startswith("unet.") for name in net.state_dict())


def test_missing_captions_are_named(tmp_path: Path) -> None:
    net = TextUNet(str(tmp_path / "none.safetensors"), config=TINY)
    with pytest.raises(ValueError, match=r"net.captions: no file .*none.safetensors; noisebench encode-latents"):
        net(torch.randn(1, 4, 8, 8), torch.tensor([3.0]))


@pytest.mark.parametrize("recipe", ["sd-scratch", "sd-scratch-linear", "sd-scratch-knn"])
def test_recipe_trains_a_step_with_a_small_net(recipe: str, captions: str, tmp_path: Path) -> None:
    words = ["--config", f"immiscible/{recipe}", "--runs", str(tmp_path / "runs"), "--wandb", "false"]
    words += ["--data", "latent_folders.SyntheticLatents", "--data.num_classes", "3", "--data.size", "8"]
    words += ["--data.batch_size", "4", "--data.num_workers", "0", "--trainer.callbacks", "null"]
    words += ["--trainer.max_steps", "1", "--trainer.accelerator", "cpu", "--trainer.precision", "32"]
    words += ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
    words += ["--model.num_classes", "3", "--model.net.captions", captions]
    words += ["--model.net.config", str(TINY).replace("'", '"')]
    cli = train.run("fit", words)
    assert cli.trainer.global_step == 1
    before = TextUNet(captions, config=TINY)
    assert len(cli.model.net.state_dict()) == len(before.state_dict())


def test_command_writes_the_hidden_states_of_the_text_encoder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "clip"
    vocabulary = ["<|startoftext|>", "<|endoftext|>", *(f"{letter}</w>" for letter in "abcdefghij"), *"abcdefghij"]
    folder.mkdir()
    (folder / "vocab.json").write_text("{" + ", ".join(f'"{word}": {n}' for n, word in enumerate(vocabulary)) + "}")
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    tokenizer.save_pretrained(folder)
    config = transformers.CLIPTextConfig(
        vocab_size=len(vocabulary), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=6, eos_token_id=1, bos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.CLIPTextModel(config).eval()
    model.save_pretrained(folder)
    (tmp_path / "names.txt").write_text("a b\nc\n")
    words = ["--class-names", str(tmp_path / "names.txt"), "--text-encoder", str(folder), "--out", str(tmp_path)]
    assert main(["encode-latents", *words]) == 0
    rows = load_file(tmp_path / "captions.safetensors")["rows"]
    tokens = tokenizer(["c"], padding="max_length", max_length=6, truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = model(tokens).last_hidden_state[0]
    assert rows.shape == (3, 6, 8)
    torch.testing.assert_close(rows[1].float(), expected, rtol=2e-3, atol=2e-3)
