"""The study of timm's nets: random weights, weights of own runs, correlation with accuracy."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from callbacks.spectral_entropy import diffusion_spectral_entropy
from lightning_modules.spectral_entropy import TimmStudy

NET = "resnet10t"


def _batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"image": torch.rand(24, 1, 32, 32, generator=generator), "label": torch.arange(24) % 3}


def _trained(seed: int) -> Any:
    """A net with a head, as a run would have it, and its features in `eval` mode."""
    torch.manual_seed(seed)
    return timm.create_model(NET, num_classes=10, in_chans=1).eval()


def test_weights_of_a_run_are_measured(tmp_path: Path) -> None:
    net = _trained(5)
    state = {f"net.net.{name}": value for name, value in net.state_dict().items()}
    torch.save({"state_dict": state | {"other.conv1.0.weight": torch.zeros(1)}, "epoch": 3}, tmp_path / "last.ckpt")
    study = TimmStudy([NET], pretrained=False, checkpoints={NET: str(tmp_path / "last.ckpt")})
    with torch.no_grad():
        found = study.measure(_batch())
        features = net.forward_head(net.forward_features(_batch()["image"]), pre_logits=True).double()
    assert found[f"dse/{NET}"] == pytest.approx(diffusion_spectral_entropy(features, "sqrt_dim", 1.0), abs=1e-9)


def test_random_weights_do_not_depend_on_the_global_state() -> None:
    values = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        with torch.no_grad():
            values.append(TimmStudy([NET], pretrained=False).measure(_batch())[f"dse/{NET}"])
    assert values[0] == values[1]


def test_weights_of_another_net_are_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": timm.create_model("resnet18", num_classes=10).state_dict()}, tmp_path / "other.ckpt")
    study = TimmStudy([NET], pretrained=False, checkpoints={NET: str(tmp_path / "other.ckpt")})
    with pytest.raises(ValueError, match=r"other\.ckpt does not hold the"):
        study.measure(_batch())


def test_checkpoint_of_a_net_that_is_not_listed_is_refused() -> None:
    with pytest.raises(ValueError, match=r"names resnet18, which model\.nets does not: resnet10t"):
        TimmStudy([NET], pretrained=False, checkpoints={"resnet18": "x.ckpt"})


def test_checkpoint_that_is_not_there_is_named() -> None:
    study = TimmStudy([NET], pretrained=False, checkpoints={NET: "nowhere.ckpt"})
    with pytest.raises(FileNotFoundError, match=r"model\.checkpoints: no file nowhere\.ckpt"):
        study.measure(_batch())


def test_correlation_with_accuracies(tmp_path: Path) -> None:
    nets = [NET, "resnet18", "mobilenetv3_small_050"]
    with torch.no_grad():
        plain = TimmStudy(nets, pretrained=False).measure(_batch())
        ranks = sorted(nets, key=lambda name: plain[f"dse/{name}"])
        rows = "\n".join(f"{name},{10 * (1 + ranks.index(name))}" for name in nets)
        (tmp_path / "results.csv").write_text(f"model,top1\n{rows}\n")
        found = TimmStudy(nets, pretrained=False, accuracies=str(tmp_path / "results.csv")).measure(_batch())
    assert found["spearman/dse"] == pytest.approx(1.0)
