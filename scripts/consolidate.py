"""`noisebench consolidate`: a sharded checkpoint (a folder) as one file for one device or DDP."""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

from scripts.errors import UserError


def verb(argv: list[str]) -> int:
    """Entry of `noisebench consolidate`."""
    parser = argparse.ArgumentParser(
        prog="noisebench consolidate",
        description="Writes a sharded checkpoint (a folder, from --trainer.strategy fsdp2) as one file, which "
        "`fit --ckpt_path` and `test --ckpt_path` load on one device, under DDP and under FSDP2. Everything in it is "
        "kept: weights, averages, optimizer, callbacks, state of the method. Needs memory for the whole checkpoint.",
        epilog="example: noisebench consolidate runs/elr/mini-sym40/HASH/seed10/checkpoints/last.ckpt",
        allow_abbrev=False,
    )
    parser.add_argument("folder", type=Path, metavar="CKPT_FOLDER", help="the sharded checkpoint")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: beside it, last.ckpt -> last-full.ckpt")
    options = parser.parse_args(argv)
    folder = options.folder
    output = options.output or folder.with_name(f"{folder.name.removesuffix('.ckpt')}-full.ckpt")
    consolidate(folder, output)
    print(f"written: {output}")
    return 0


def consolidate(folder: Path, output: Path) -> None:
    """Joins the shards of `folder` in the new file `output`; the folder stays.

    Raises:
        UserError: not a sharded checkpoint, an incomplete one, or `output` exists or cannot be written.
    """
    if output.exists():
        raise UserError(f"--output: {output} exists; nothing is overwritten, give another name")
    check_complete(folder)
    checkpoint = _load(folder)
    checkpoint["optimizer_states"] = [
        _by_number(checkpoint.pop(f"optimizer_{number}"))
        for number in range(sum(key.startswith("optimizer_") for key in checkpoint))
    ]
    _save(checkpoint, output)


def check_complete(folder: Path) -> None:
    """Every shard has the bytes that the index speaks of.

    Raises:
        UserError: one has not, or there is no index.
    """
    from torch.distributed.checkpoint import FileSystemReader

    if not (folder / "meta.pt").is_file() or not (folder / ".metadata").is_file():
        kind = "a file, which one device loads as it is" if folder.is_file() else "without meta.pt and .metadata"
        there = f"{folder} is {kind}" if folder.exists() else f"there is no {folder}"
        raise UserError(f"CKPT_FOLDER must be a complete sharded checkpoint; {there}")
    try:
        places = FileSystemReader(folder).read_metadata().storage_data.values()
    except Exception as error:
        raise UserError(f"{folder / '.metadata'} is not readable: {error}") from error
    needed: dict[str, int] = {}
    for place in places:
        needed[place.relative_path] = max(needed.get(place.relative_path, 0), place.offset + place.length)
    for name, size in needed.items():
        shard = folder / name
        found = shard.stat().st_size if shard.is_file() else 0
        if found < size:
            raise UserError(f"{shard} is cut off: {found} of {size} bytes; use another checkpoint of the run")


def _load(folder: Path) -> dict[str, Any]:
    """The parts of a sharded checkpoint in memory: what Lightning's own converter does."""
    import torch
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.format_utils import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    tensors: dict[str, Any] = {}
    try:
        _load_state_dict(tensors, FileSystemReader(folder), planner=_EmptyStateDictLoadPlanner(), no_dist=True)
        # the run's own file: plain tensors and numbers
        return torch.load(folder / "meta.pt", map_location="cpu", weights_only=True) | tensors
    except Exception as error:
        raise UserError(f"{folder} is not readable: {error}".splitlines()[0]) from error


def _by_number(state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state with numbers for names, as an unsharded run saves it."""
    names = [name for group in state["param_groups"] for name in group["params"]]
    numbers = {name: number for number, name in enumerate(names)}
    groups = [{**group, "params": [numbers[name] for name in group["params"]]} for group in state["param_groups"]]
    return {"state": {numbers[name]: value for name, value in state["state"].items()}, "param_groups": groups}


def _save(checkpoint: dict[str, Any], output: Path) -> None:
    """All of it or nothing."""
    import torch

    temporary = None
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=output.parent, prefix=f".{output.name}.")
        with os.fdopen(handle, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, output)
    except (OSError, RuntimeError) as error:
        raise UserError(f"--output: cannot write {output}: {error}".splitlines()[0]) from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
