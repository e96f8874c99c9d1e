"""A trained model as a frozen noise predictor: what sampling, inversion and editing papers start from."""

from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_modules.diffusion.guidance import ClassifierFree
from lightning_modules.diffusion.parameterization import Denoiser, Kind
from lightning_modules.diffusion.processes import DiscreteProcess


class Prior(nn.Module):
    """eps(x, t, y) of a frozen network in eval mode; gradients with respect to x are allowed.

    `.double()` gives a float64 copy in place. Ends of sampling belong to the grid: `Trailing` ends at abar = 1,
    `Leading(final_clean=False)` at abar[0].

    Args:
        net: network (x, time, label) -> like x.
        process: discrete process it was trained for.
        kind: what it predicts.
        null_label: label that stands for none.
    """

    def __init__(self, net: nn.Module, process: DiscreteProcess, kind: Kind, null_label: int) -> None:
        super().__init__()
        self.net = net.eval().requires_grad_(False)
        self.process, self.kind, self.null_label = process, kind, null_label

    @classmethod
    def from_checkpoint(cls, path: str | Path, net: nn.Module, process: DiscreteProcess) -> "Prior":
        """The averaged weights of a `DiffusionModule`, put into `net`, which must have the trained one's shape.

        Raises:
            ValueError: the file is not a checkpoint of a `DiffusionModule`.
        """
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        start = "average.module."
        state = {name: value for name, value in checkpoint.get("state_dict", {}).items() if name.startswith(start)}
        if not state:
            raise ValueError(f"prior.path must be a checkpoint of a DiffusionModule, {path} has no averaged weights")
        net.load_state_dict({name.removeprefix(start): value for name, value in state.items()})
        settings = checkpoint["hyper_parameters"]
        return cls(net, process, settings["parameterization"], settings["num_classes"])

    @property
    def alphas_cumprod(self) -> Tensor:
        """(T,) float64."""
        return self.process.alphas_cumprod

    def denoiser(self, label: Tensor, guidance: float = 1.0) -> Denoiser:
        """For the samplers: labels (B,) int64, classifier-free guidance of scale w."""
        plain = Denoiser(self.net, self.process, self.kind, label=label)
        return plain if guidance == 1 else ClassifierFree(plain, label, self.null_label, guidance)

    def eps(self, x: Tensor, time: Tensor, label: Tensor, guidance: float = 1.0) -> Tensor:
        """Predicted noise (B, ...) at x (B, ...), time (B,) int64, label (B,) int64.

        Guidance w is eps_null + w (eps_label - eps_null), one call on 2 B rows.
        """
        return self.denoiser(label, guidance)(x, time).eps
