"""Studies of diffusion spectral entropy that train nothing: estimators on known points, nets as they are."""

import csv
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from callbacks.entropy_baselines import adjacency_entropy, matrix_entry_entropy, shannon_entropy
from callbacks.rng import seed_for
from callbacks.spectral_entropy import (
    Bandwidth,
    bandwidth,
    diffusion_spectral_entropy,
    diffusion_spectral_mutual_information,
    mutual_information,
    squared_distances,
)


def correlations(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Pearson's and Spearman's correlation of (n,) values; NaN where one of them is constant."""
    from scipy.stats import pearsonr, spearmanr

    first, second = x.double().numpy(), y.double().numpy()
    return float(pearsonr(first, second).statistic), float(spearmanr(first, second).statistic)


class Measurement(L.LightningModule):
    """Base of studies that measure once and train nothing: one batch, one epoch, values in the record.

    `train/loss`, which every run logs, is the first of the values.
    """

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.found: dict[str, float] = {}

    def measure(self, batch: dict[str, Tensor]) -> dict[str, float]:
        """Values of the only batch."""
        raise NotImplementedError

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Measures; the first batch only."""
        if batch_idx == 0:
            with torch.no_grad():
                self.found = self.measure(batch)
        return {"loss": torch.tensor(next(iter(self.found.values())))}

    def on_train_epoch_end(self) -> None:
        """Logs what was found."""
        self.log_dict({"train/loss": next(iter(self.found.values())), **self.found})

    def configure_optimizers(self) -> None:
        """None: nothing is trained."""
        return None


class EstimatorStudy(Measurement):
    """Entropies of a batch's `point`s, and their mutual information with `label`, by all estimators.

    Logged: `dse`, `shannon`, `matrix_entry`, `ase_gauss`, `ase_knn` in bits; with more than one class `dsmi`, `csmi`.

    Args:
        sigma, t: as in `diffusion_spectral_entropy`.
        bins: per feature, of the binned Shannon entropy.

    Source: arXiv 2312.04823, toy studies.
    """

    def __init__(self, sigma: Bandwidth = 10.0, t: float = 1.0, bins: int = 2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.sigma, self.t, self.bins = sigma, t, bins

    def measure(self, batch: dict[str, Tensor]) -> dict[str, float]:
        """As in the class."""
        points, labels = batch["point"].double(), batch["label"]
        sigma = bandwidth(self.sigma, points, squared_distances(points))
        found = {
            "dse": diffusion_spectral_entropy(points, sigma, self.t),
            "shannon": shannon_entropy(points, self.bins),
            "matrix_entry": matrix_entry_entropy(points, sigma),
            "ase_gauss": adjacency_entropy(points, "gauss", sigma),
            "ase_knn": adjacency_entropy(points, "knn"),
        }
        if len(labels.unique()) > 1:
            found["dsmi"] = diffusion_spectral_mutual_information(points, labels, sigma, self.t).value
            found["csmi"] = mutual_information(points, labels, lambda p: shannon_entropy(p, self.bins))
            found["abs/dsmi"], found["abs/csmi"] = abs(found["dsmi"]), abs(found["csmi"])
        return found


class TimmStudy(Measurement):
    """DSE and DSMI of the penultimate features of timm's nets on one batch, and their correlation with accuracy.

    Logged for each net: `dse/<net>`, `dsmi_y/<net>`; with `accuracies` and three nets or more `pearson/<metric>` and
    `spearman/<metric>`.

    Args:
        nets: names of timm.
        pretrained: with timm's weights (from the hub or its cache); false measures random weights.
        checkpoints: files with the weights of some of the nets, by their names: a run's checkpoint, whose net is the
            timm net (anywhere in it), or a state dict.
        accuracies: CSV with the columns `model` and `column`, e.g. timm's results-imagenet.csv; null for none.
        column: accuracy, in that file.
        sigma, t: as in `diffusion_spectral_entropy`; the paper takes the root of d.

    Source: arXiv 2312.04823, study of 962 nets.
    """

    def __init__(
        self,
        nets: list[str],
        pretrained: bool = True,
        checkpoints: dict[str, str] | None = None,
        accuracies: str | None = None,
        column: str = "top1",
        sigma: Bandwidth = "sqrt_dim",
        t: float = 1.0,
    ) -> None:
        super().__init__()
        if not nets:
            raise ValueError("model.nets must name at least one net of timm, got []")
        self.save_hyperparameters()
        self.nets, self.pretrained, self.sigma, self.t = nets, pretrained, sigma, t
        self.checkpoints = {name: Path(file) for name, file in (checkpoints or {}).items()}
        unknown = [name for name in self.checkpoints if name not in nets]
        if unknown:
            raise ValueError(
                f"model.checkpoints names {', '.join(unknown)}, which model.nets does not: {', '.join(nets)}"
            )
        self.accuracy = {} if accuracies is None else _read_accuracies(Path(accuracies), column)
        missing = [name for name in nets if self.accuracy and name not in self.accuracy]
        if missing:
            raise ValueError(f"model.accuracies: {accuracies} has no row for {', '.join(missing)}")

    def measure(self, batch: dict[str, Tensor]) -> dict[str, float]:
        """As in the class."""
        found: dict[str, float] = {}
        for name in self.nets:
            features = self._features(name, batch["image"]).double()
            found[f"dse/{name}"] = diffusion_spectral_entropy(features, self.sigma, self.t)
            information = diffusion_spectral_mutual_information(features, batch["label"], self.sigma, self.t)
            found[f"dsmi_y/{name}"] = information.value
        if self.accuracy and len(self.nets) > 2:
            accuracy = torch.tensor([self.accuracy[name] for name in self.nets])
            for metric in ("dse", "dsmi_y"):
                values = torch.tensor([found[f"{metric}/{name}"] for name in self.nets])
                found[f"pearson/{metric}"], found[f"spearman/{metric}"] = correlations(values, accuracy)
        return found

    def _features(self, name: str, images: Tensor) -> Tensor:
        import timm

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_for(f"weights/{name}"))
            channels = images.shape[1]
            own = name in self.checkpoints
            net: Any = timm.create_model(name, pretrained=self.pretrained and not own, num_classes=0, in_chans=channels)
        if own:
            net.load_state_dict(_weights_of(net, self.checkpoints[name]))
        net = net.eval().to(images.device)
        return torch.cat([net(part) for part in images.split(64)])


def _weights_of(net: nn.Module, file: Path) -> dict[str, Tensor]:
    """The part of a checkpoint that holds the net's weights, whatever module the net is in there."""
    if not file.is_file():
        raise FileNotFoundError(f"model.checkpoints: no file {file}")
    loaded = torch.load(file, map_location="cpu", weights_only=True)
    state = loaded.get("state_dict", loaded)
    wanted = net.state_dict()
    first = next(iter(wanted))
    for prefix in (key.removesuffix(first) for key in state if key.endswith(first)):
        found = {name: state[prefix + name] for name in wanted if prefix + name in state}
        if len(found) == len(wanted) and all(found[name].shape == wanted[name].shape for name in wanted):
            return found
    raise ValueError(
        f"model.checkpoints: {file} does not hold the {len(wanted)} weights of this net of timm ({first}, ...)"
    )


def _read_accuracies(path: Path, column: str) -> dict[str, float]:
    if not path.is_file():
        raise FileNotFoundError(f"model.accuracies: no file {path}; timm's repository has results/results-imagenet.csv")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or "model" not in rows[0] or column not in rows[0]:
        raise ValueError(f"model.accuracies: {path} must have the columns model and {column}")
    return {row["model"]: float(row[column]) for row in rows}
