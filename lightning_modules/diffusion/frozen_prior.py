"""Priors that a paper's recipe names: a checkpoint of this project by its recipe, or a pipeline of diffusers.

Both are a `Prior`: `eps(x, t, y)`, `denoiser`, `alphas_cumprod`. At laptop scale a recipe says

    prior: {class_path: lightning_modules.diffusion.frozen_prior.FrozenPrior, init_args: {recipe: prior/mini}}

and at paper scale the same with `PipelinePrior`; nothing else of the paper's module changes.
"""

import hashlib
import importlib
import json
from pathlib import Path
from typing import Any

import torch

from lightning_modules.diffusion.parameterization import Kind
from lightning_modules.diffusion.prior import Prior
from lightning_modules.diffusion.processes import DiscreteProcess, cosine_betas, linear_betas

KINDS: dict[str, Kind] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
"""diffusers' `prediction_type` and ours."""


class FrozenPrior(Prior):
    """The averaged weights of a finished run of a recipe of this project, which is trained once if there is none.

    Args:
        recipe: e.g. `prior/mini`.
        seed: of its training.
        runs: folder of runs that is looked through before the cache.
        cache: folder of the runs that were trained on first need.

    Attributes:
        digest: first 16 hex digits of the SHA-256 of the weights, for the record of whoever used them.
    """

    def __init__(
        self,
        recipe: str = "prior/mini",
        seed: int = 10,
        runs: str = "runs",
        cache: str = "~/.cache/noisebench/priors",
    ) -> None:
        # the command's own search; this package stays importable without it
        find = importlib.import_module("scripts.prior").prior_checkpoint
        path = find(recipe, seed, Path(runs), Path(cache))
        model = json.loads((path.parents[1] / "record.json").read_text())["config"]["model"]["init_args"]
        made = Prior.from_checkpoint(path, _built(model["net"]), _built(model["process"]))
        super().__init__(made.net, made.process, made.kind, made.null_label)
        self.digest = weights_digest(self.net)


class PipelinePrior(Prior):
    """UNet and noise schedule of a Stable Diffusion pipeline; labels are rows of a table of captions.

    Args:
        pipeline: hub id or folder with `unet` and `scheduler`.
        captions: `captions.safetensors`, see `TextUNet`; its last row, the empty text, is the null label.

    Raises:
        ValueError: diffusers or a file is missing, or the schedule is unknown.
    """

    def __init__(self, pipeline: str = "CompVis/stable-diffusion-v1-4", captions: str = "captions.safetensors") -> None:
        from lightning_modules.networks.stable_diffusion import TextUNet

        net = TextUNet(captions, weights=pipeline)
        from diffusers import DDPMScheduler
        from safetensors import safe_open

        settings = DDPMScheduler.load_config(pipeline, subfolder="scheduler")
        if not Path(captions).is_file():
            raise ValueError(f"prior.captions: no file {captions}; noisebench encode-latents --class-names writes it")
        with safe_open(captions, framework="pt") as content:
            null_label = content.get_slice("rows").get_shape()[0] - 1
        kind = settings.get("prediction_type", "epsilon")
        if kind not in KINDS:
            raise ValueError(f"prior.pipeline: prediction_type must be one of {', '.join(KINDS)}, got {kind!r}")
        super().__init__(net, DiscreteProcess(betas_of(settings)), KINDS[kind], null_label)
        self.digest = weights_digest(self.net)


def betas_of(settings: dict[str, Any]) -> torch.Tensor:
    """(T,) float64 betas of a scheduler's settings, from their formula: the scheduler's own table is float32.

    Raises:
        ValueError: unknown schedule.
    """
    steps, first, last = (settings[name] for name in ("num_train_timesteps", "beta_start", "beta_end"))
    schedule = settings["beta_schedule"]
    if schedule == "scaled_linear":
        return torch.linspace(first**0.5, last**0.5, steps, dtype=torch.float64) ** 2
    if schedule == "linear":
        same = steps == 1000 and (first, last) == (1e-4, 0.02)
        return linear_betas(1000) if same else torch.linspace(first, last, steps, dtype=torch.float64)
    if schedule == "squaredcos_cap_v2":
        return cosine_betas(steps)
    raise ValueError(
        f"prior.pipeline: beta_schedule must be linear, scaled_linear or squaredcos_cap_v2, got {schedule!r}"
    )


def weights_digest(net: torch.nn.Module) -> str:
    """First 16 hex digits of the SHA-256 over names, shapes and bytes of the weights."""
    digest = hashlib.sha256()
    for name, value in net.state_dict().items():
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _built(spec: dict[str, Any]) -> Any:
    """The object of `class_path` and `init_args`."""
    module, _, name = spec["class_path"].rpartition(".")
    return getattr(importlib.import_module(module), name)(**spec.get("init_args", {}))
