"""`noisebench consolidate`, and what meets a checkpoint that is a folder. Real shards of two ranks: test_sharding."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch.strategies import SingleDeviceStrategy

from lightning_modules.sharding import FSDP2, replace
from scripts.__main__ import main
from scripts.checkpoints import (
    FileInPlaceOfFolder,
    newest_checkpoint,
    own_checkpoint,
    read_checkpoint_facts,
    refuse_folder,
)
from scripts.errors import UserError

WEIGHT = torch.arange(12.0).reshape(4, 3)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A folder as ModelParallelStrategy writes it, with one rank; the optimizer's parameters have names."""
    folder = tmp_path / "last.ckpt"
    groups = [{"lr": 0.1, "params": ["net.weight", "net.bias"]}]
    optimizer = {"state": {"net.bias": {"momentum_buffer": WEIGHT + 1}}, "param_groups": groups}
    parts = {"state_dict": {"net.weight": WEIGHT}, "optimizer_0": optimizer}
    dcp.save(parts, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    torch.save({"epoch": 3, "targets": WEIGHT * 2, "noisebench": {"code_hash": "c0de"}}, folder / "meta.pt")
    return folder


def error_of(capsys: pytest.CaptureFixture, *words: object) -> str:
    assert main(["consolidate", *map(str, words)]) == 1
    return capsys.readouterr().err


def test_everything_is_in_the_file_and_optimizer_state_has_numbers(sharded: Path) -> None:
    assert main(["consolidate", str(sharded)]) == 0
    checkpoint = torch.load(sharded.with_name("last-full.ckpt"))
    assert checkpoint.keys() == {"epoch", "targets", "noisebench", "state_dict", "optimizer_states"}
    assert torch.equal(checkpoint["state_dict"]["net.weight"], WEIGHT)
    assert torch.equal(checkpoint["targets"], WEIGHT * 2)
    (optimizer,) = checkpoint["optimizer_states"]
    assert optimizer["param_groups"] == [{"lr": 0.1, "params": [0, 1]}]
    assert torch.equal(optimizer["state"][1]["momentum_buffer"], WEIGHT + 1)
    assert read_checkpoint_facts(sharded.with_name("last-full.ckpt")) == {"code_hash": "c0de"}


def test_existing_output_is_kept(sharded: Path, capsys: pytest.CaptureFixture) -> None:
    output = sharded.with_name("mine.ckpt")
    output.write_text("mine")
    assert f"--output: {output} exists" in error_of(capsys, sharded, "--output", output)
    assert output.read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "message"),
    [("file.ckpt", "a file, which one device loads"), ("empty", "without meta.pt"), ("absent", "there is no")],
)
def test_other_things_are_refused(name: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "file.ckpt").write_text("x")
    (tmp_path / "empty").mkdir()
    assert message in error_of(capsys, tmp_path / name)


def test_cut_off_shard_is_named_and_nothing_is_written(sharded: Path, capsys: pytest.CaptureFixture) -> None:
    (shard,) = sharded.glob("*.distcp")
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[: size // 2])
    assert f"{shard} is cut off: {size // 2} of {size} bytes" in error_of(capsys, sharded)
    assert [path.name for path in sharded.parent.iterdir()] == ["last.ckpt"]


def test_cut_off_shard_is_nothing_to_resume_from(sharded: Path) -> None:
    assert newest_checkpoint(sharded.parent) == sharded
    (shard,) = sharded.glob("*.distcp")
    shard.write_bytes(shard.read_bytes()[:10])
    with pytest.raises(UserError, match=f"{shard} is cut off: 10 of .* there is no other to fall back to"):
        newest_checkpoint(sharded.parent)


def test_kill_between_the_renames_of_a_save_loses_nothing(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new = sharded.with_name(".last.ckpt.partial")
    shutil.copytree(sharded, new)
    rename = Path.rename

    def killed(self: Path, target: Path) -> Path:
        if self == new:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        replace(new, sharded)
    assert not sharded.exists()
    assert own_checkpoint(sharded.parent, "c0de") == str(sharded.with_name(".last.ckpt.old"))


def test_broken_index_is_an_error(sharded: Path, capsys: pytest.CaptureFixture) -> None:
    (sharded / ".metadata").write_bytes(b"broken")
    assert ".metadata is not readable" in error_of(capsys, sharded)


def test_failed_write_leaves_nothing(
    sharded: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(checkpoint: Any, file: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    assert "No space left on device" in error_of(capsys, sharded)
    assert [path.name for path in sharded.parent.iterdir()] == ["last.ckpt"]


def test_facts_of_a_folder_are_read(sharded: Path) -> None:
    assert read_checkpoint_facts(sharded) == {"code_hash": "c0de"}


def test_one_device_refuses_a_folder_and_says_what_to_do(sharded: Path) -> None:
    with pytest.raises(UserError, match=r"--trainer.strategy fsdp2, or .*noisebench consolidate .*last.ckpt"):
        refuse_folder(sharded, SingleDeviceStrategy())
    refuse_folder(sharded, FSDP2())
    refuse_folder(None, SingleDeviceStrategy())


def test_file_takes_the_place_of_a_folder(sharded: Path) -> None:
    FileInPlaceOfFolder().save_checkpoint({"epoch": 4}, sharded)
    assert torch.load(sharded) == {"epoch": 4}
    assert [path.name for path in sharded.parent.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("older", ["file", "folder", None])
def test_replacing_leaves_only_the_new_folder(older: str | None, tmp_path: Path) -> None:
    new, path = tmp_path / "new", tmp_path / "last.ckpt"
    new.mkdir()
    (new / "shard").write_text("new")
    if older == "file":
        path.write_text("old")
    elif older == "folder":
        path.mkdir()
        (path / "stale").write_text("old")
    replace(new, path)
    assert [p.relative_to(tmp_path).as_posix() for p in sorted(tmp_path.rglob("*"))] == ["last.ckpt", "last.ckpt/shard"]
