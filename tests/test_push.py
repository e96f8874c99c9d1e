"""`noisebench push`: only by this command, and what it would send."""

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml

from scripts.__main__ import main

MODEL = {"loss_mode": "full", "variant": "v2", "selection": "auto", "noise_std": 0.1}
LM = "lightning_modules.networks.pretrained_lm.PretrainedLM"


def run_folder(tmp_path: Path, lm: str = LM, source: str | None = "me/base") -> Path:
    """A finished run's folder, without a run."""
    folder = tmp_path / "noisefit" / "tiny" / "abc" / "seed0"
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"x" * 2_000_000)
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    (folder / "adapter" / "README.md").write_text("of peft")
    net = {"class_path": lm, "init_args": {"source": source}}
    config = {"model": {"class_path": "NoiseFiT", "init_args": {"lm": net, **MODEL}}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


class Hub:
    """Takes note of what is sent."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def __call__(self) -> "Hub":
        return self

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **options: self.calls.append((name, {"args": args, **options})) or "address"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    found = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", found)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return found


def test_dry_run_says_what_and_sends_nothing(tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_folder(tmp_path)
    assert main(["push", str(folder), "--to", "me/mine", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "would send README.md, adapter_config.json, adapter_model.safetensors (2.0 MB)" in said
    assert "base_model: me/base" in said
    assert "# noisefit/tiny" in said
    assert hub.calls == []


def test_adapter_and_card_are_sent_to_a_private_repository(tmp_path: Path, hub: Hub) -> None:
    folder = run_folder(tmp_path)
    assert main(["push", str(folder), "--to", "me/mine"]) == 0
    (made, repository), (sent, files), (_, card), _ = hub.calls
    assert (made, repository["args"], repository["private"]) == ("create_repo", ("me/mine",), True)
    assert (sent, files["folder_path"], files["repo_id"]) == ("upload_folder", folder / "adapter", "me/mine")
    assert b"Trained with noisebench" in card["path_or_fileobj"]


@pytest.mark.parametrize(("base", "sent"), [("me/base", "me/base"), ("/cache/gguf/abc", None)])
def test_a_folder_of_this_machine_is_not_sent(tmp_path: Path, hub: Hub, base: str, sent: str | None) -> None:
    folder = run_folder(tmp_path)
    settings = {"r": 8, "base_model_name_or_path": base}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    assert main(["push", str(folder), "--to", "me/mine"]) == 0
    name, last = hub.calls[-1]
    assert (name, last["path_in_repo"]) == ("upload_file", "adapter_config.json")
    assert json.loads(last["path_or_fileobj"]) == {"r": 8, "base_model_name_or_path": sent}
    assert "adapter_config.json" in hub.calls[1][1]["ignore_patterns"]


def test_a_file_of_this_machine_is_no_base_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "SmolLM2.gguf").touch()
    folder = run_folder(tmp_path, source="models/SmolLM2.gguf")
    assert main(["push", str(folder), "--to", "me/mine", "--dry-run"]) == 0
    assert "base_model" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["mine", "me/mine/too", "me/"])
def test_a_name_without_owner_is_refused(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", str(run_folder(tmp_path)), "--to", name]) == 1
    assert f"--to must be OWNER/NAME, got {name!r}" in capsys.readouterr().err


def test_a_run_without_adapter_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_folder(tmp_path)
    (folder / "adapter" / "adapter_model.safetensors").unlink()
    assert main(["push", str(folder), "--to", "me/mine"]) == 1
    assert "SaveAdapter writes them" in capsys.readouterr().err


def test_a_run_of_another_net_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_folder(tmp_path, lm="lightning_modules.networks.word_gpt.WordGPT")
    assert main(["push", str(folder), "--to", "me/mine"]) == 1
    assert "RUN must have trained a model of transformers" in capsys.readouterr().err


def test_the_hubs_own_switch_forbids_it(
    tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["push", str(run_folder(tmp_path)), "--to", "me/mine"]) == 1
    assert "HF_HUB_OFFLINE forbids" in capsys.readouterr().err
    assert hub.calls == []


def test_nothing_else_in_the_project_uploads() -> None:
    root = Path(__file__).parents[1]
    files = [
        file
        for place in ("scripts", "callbacks", "datamodules", "lightning_modules")
        for file in (root / place).rglob("*.py")
    ]
    words = ("push_to_hub", "upload_folder", "upload_file", "create_repo")
    assert [file.name for file in files if any(word in file.read_text() for word in words)] == ["push.py"]
