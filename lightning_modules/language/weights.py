"""Weights of an earlier run as the start of another, named by file and hash."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

PROJECT = Path(__file__).parents[2]


def load_start(net: nn.Module, file: str, sha256: str | None, prefix: str = "lm.") -> None:
    """Copies the weights of a file into a net.

    Args:
        net: gets every one of its weights from the file.
        file: written by `callbacks.save_net.SaveNet`, or a Lightning checkpoint, of which the part under `prefix`
            counts. Looked for here, then beside the project's folders (`recipes/noisefit/pretrained.pt`).
        sha256: first digits of the file's hash; None takes any file.
        prefix: of the net in a checkpoint.

    Raises:
        ValueError: another file than the one named, or weights of another net.
        FileNotFoundError: no such file.
    """
    path = next((p for p in (Path(file), PROJECT / file) if p.is_file()), None)
    if path is None:
        raise FileNotFoundError(
            f"model.start: no file {file} here or in {PROJECT}; recipes/noisefit/pretrain.yaml makes one"
        )
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if sha256 is not None and not found.startswith(sha256):
        raise ValueError(f"model.start_sha256 must be that of model.start {file}: {found[:12]}, got {sha256}")
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    if "state_dict" in state:
        state = {k.removeprefix(prefix): v for k, v in state["state_dict"].items() if k.startswith(prefix)}
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"model.start {file} holds the weights of another net: {error}") from error
