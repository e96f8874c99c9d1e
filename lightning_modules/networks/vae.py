"""The VAE of latent diffusion, from diffusers."""

import importlib.util
from typing import Any


def load_vae(name: str) -> Any:
    """Frozen `AutoencoderKL`.

    Args:
        name: hub id or folder; `ID#vae` for the subfolder of a pipeline.

    Raises:
        ValueError: diffusers or the weights are missing.
    """
    if importlib.util.find_spec("diffusers") is None:
        raise ValueError("a VAE needs diffusers: pip install 'noisebench[latents]'")
    from diffusers import AutoencoderKL

    place, _, subfolder = name.partition("#")
    try:
        vae = AutoencoderKL.from_pretrained(place, subfolder=subfolder or None)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load the VAE {name!r}, neither a folder nor a model of the hub: {error}") from error
    return vae.eval().requires_grad_(False)
