"""The finished net with its N:M weights compressed, in one file."""

from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import Callback

from lightning_modules.networks.nm_sparse import dense_weight, sparse_layers
from lightning_modules.networks.nm_storage import compressed_bytes, save_compressed


class SparseExport(Callback):
    """Writes `sparse.safetensors` into the run's folder when training has finished; see `networks.nm_storage`.

    The weights are those of the last step, with the final masks. Logs `storage/bytes` of the sparse weights and
    `storage/share` of their dense size. Works on any module with N:M weights.

    Args:
        network: submodule that is written.
    """

    def __init__(self, network: str = "net") -> None:
        self.network = network

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuses what it cannot write."""
        if not sparse_layers(pl_module.get_submodule(self.network)):
            raise ValueError(f"SparseExport needs layers with N:M weights, {self.network!r} has none")
        if pl_module.device_mesh is not None:
            raise ValueError(
                "SparseExport does not write sharded weights; leave it out and use `noisebench consolidate`"
            )

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Logs the bytes."""
        dense = compressed = 0
        net = pl_module.get_submodule(self.network)
        for name, layer in sparse_layers(net).items():
            weight = dense_weight(net.get_submodule(name))
            dense += weight.nbytes
            compressed += compressed_bytes(weight.numel(), weight.itemsize, *layer.target)
        pl_module.log_dict({"storage/bytes": float(compressed), "storage/share": compressed / dense})

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes the file."""
        if trainer.is_global_zero:
            folder = Path(trainer.default_root_dir)
            save_compressed(pl_module.get_submodule(self.network), folder / "sparse.safetensors")
