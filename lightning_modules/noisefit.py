"""NoiseFiT: fine-tuning of language models with adaptive noise on hidden states (arXiv 2504.03302).

Legend: B batch, T positions, H hidden size, V vocabulary. Where paper and official code differ, the code decides; its
two versions are called v1 (the paper's first) and v2 (calibrated noise, detached teachers).
"""

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from callbacks.files import write_atomic
from callbacks.rng import make_generator, seed_for
from lightning_modules.language.answers import AnswerMetrics
from lightning_modules.language.hooks import find_decoder_layers, rewriting
from lightning_modules.language.noise_policy import NoisePolicy, choose_policy, layers_by_snr, strengths
from lightning_modules.language.passes import NO_NOISE, calibration_table, layer_outputs, pass_logits, shifted, targets
from lightning_modules.language.weights import load_start
from lightning_modules.sharding import shard

EPS = 1e-6
MAX_FACTOR = 5.0
SNR_PASSES = 10
NEFTUNE_ALPHA = 5.0
PARTS = ("loss", "ce", "soft", "consistency")
PASSES = {
    "basefit": (1, 0),
    "basefit_half": (1, 0),
    "neftune": (1, 0),
    "rdrop": (2, 0),
    "ce_noisy": (0, 1),
    "ce_kl": (1, 1),
    "kl_only": (1, 1),
    "consistency_only": (0, 2),
    "full": (1, 2),
}
"""Clean and noisy passes of each loss."""
Variant = Literal["v1", "v2"]
LossMode = Literal[
    "basefit", "basefit_half", "neftune", "rdrop", "ce_noisy", "ce_kl", "kl_only", "consistency_only", "full"
]


def variance_factor(hidden: Tensor) -> Tensor:
    """min(exp(var / mean var), 5) per token, (B, T, 1) of (B, T, H); the mean runs over the batch, padding included.

    Source: official code, both versions.
    """
    variance = hidden.var(-1, keepdim=True)
    return (variance / (variance.mean() + EPS)).exp().clamp_max(MAX_FACTOR)


def entropy_factor(logits: Tensor) -> Tensor:
    """min(exp(entropy of softmax(z) in nats), 5) per token, (B, T, 1) of (B, T, V); unused by the official trainers."""
    probability = logits.softmax(-1)
    return (-(probability * (probability + EPS).log()).sum(-1, keepdim=True)).exp().clamp_max(MAX_FACTOR)


def adaptive_scale(hidden: Tensor, base_std: float | Tensor, beta: float = 0.1, factor: Tensor | None = None) -> Tensor:
    r"""Standard deviation of the noise on each coordinate: base_std * mad * exp(-beta |h - med| / mad) * factor.

    Median and median absolute deviation run over H (torch's lower median); mad is at least 1e-6 ||h||. Noise is so
    smallest on outlier coordinates and largest on tokens of high variance.

    Args:
        hidden: (B, T, H) float, output of a decoder layer.
        base_std: number or 0-d.
        beta: how fast it falls away from the median.
        factor: (B, T, 1); None takes `variance_factor`.

    Returns:
        (B, T, H); gradient flows through mad, weight and factor.

    Source: arXiv 2504.03302; official code, both versions.
    """
    center = hidden.median(-1, keepdim=True).values
    distance = (hidden - center).abs()
    mad = distance.median(-1, keepdim=True).values
    mad = torch.maximum(mad, EPS * hidden.norm(dim=-1, keepdim=True))
    weight = (-beta * distance / (mad + EPS)).exp()
    return base_std * mad * weight * (variance_factor(hidden) if factor is None else factor)


def layer_noise(hidden: Tensor, eps: Tensor, scale: float, variant: Variant) -> Tensor:
    r"""Hidden state plus adaptive noise, as the hook on a decoder layer adds it.

    v1: base_std = scale^2 std(h) (the official hook multiplies twice), std over the whole tensor and detached; gradient
    flows through the noise. v2: base_std = scale, noise detached.

    Args:
        hidden: (B, T, H).
        eps: like hidden, N(0, 1).
        scale: noise_std of v1, calibrated scale of v2.
        variant: which.

    Source: official code.
    """
    if variant == "v1":
        return hidden + adaptive_scale(hidden, scale**2 * hidden.detach().std()) * eps
    return hidden + adaptive_scale(hidden.detach(), scale) * eps


def layer_snr(hidden: Tensor, eps: Tensor, noise_std: float) -> Tensor:
    r"""mean|h| / mean|noise| of one layer, noise at base_std = noise_std * std(h).

    Args:
        hidden: (B, T, H) clean output of the layer.
        eps: (P, B, T, H) N(0, 1) of P passes, which are averaged.
        noise_std: as in v1.

    Returns:
        0-d.

    Source: official code v1, which takes the state after the final norm for the last layer; we take the layer's own.
    """
    scale = adaptive_scale(hidden, noise_std * hidden.std())
    return hidden.abs().mean() / ((scale * eps).abs().mean((1, 2, 3)).mean() + EPS)


def masked_kl(target: Tensor, prediction: Tensor, mask: Tensor) -> Tensor:
    """Mean over the mask of KL(softmax(target) || softmax(prediction)) in nats; logits (..., V), mask (...) bool."""
    divergence = F.kl_div(prediction.log_softmax(-1), target.log_softmax(-1), reduction="none", log_target=True)
    return (divergence.sum(-1) * mask).sum() / mask.sum().clamp_min(1)


def symmetric_kl(first: Tensor, second: Tensor, mask: Tensor) -> Tensor:
    """Mean of both directions of `masked_kl`."""
    return (masked_kl(first, second, mask) + masked_kl(second, first, mask)) / 2


def soft_loss(clean: Tensor, noisy: list[Tensor], mask: Tensor, temperature: float, variant: Variant) -> Tensor:
    r"""Mean over noisy passes of KL(softmax(z / tau) || softmax(z~)): the paper's soft cross entropy is a divergence.

    v1: the teacher is not detached, students know no temperature. v2: teacher detached, students z~ / tau, times tau^2.

    Args:
        clean, noisy: logits (..., V).
        mask: (...) bool.
        temperature: tau.
        variant: which.

    Source: official code.
    """
    if variant == "v1":
        return torch.stack([masked_kl(clean / temperature, z, mask) for z in noisy]).mean()
    teacher = clean.detach() / temperature
    return temperature**2 * torch.stack([masked_kl(teacher, z / temperature, mask) for z in noisy]).mean()


def consistency_loss(first: Tensor, second: Tensor, mask: Tensor, temperature: float, variant: Variant) -> Tensor:
    r"""KL(softmax(z~_2) || softmax(z~_1)); v2 detaches z~_2, divides both by tau and multiplies by tau^2.

    Args, Source: as in `soft_loss`.
    """
    if variant == "v1":
        return masked_kl(second, first, mask)
    return temperature**2 * masked_kl(second.detach() / temperature, first / temperature, mask)


def hybrid_loss(cross_entropy: Tensor, soft: Tensor, consistency: Tensor, alpha: float, lam: float) -> Tensor:
    """alpha CE + (1 - alpha) soft + lam consistency. Source: arXiv 2504.03302; alpha and lam are constants."""
    return alpha * cross_entropy + (1 - alpha) * soft + lam * consistency


class NoiseFiT(L.LightningModule):
    """Fine-tuning of a causal language model with one of NoiseFiT's losses; `basefit` is plain fine-tuning.

    A batch is a dict: `input_ids` (B, T) int64; `labels` (B, T) int64, the token itself where it counts and -100
    elsewhere; for evaluation `key` (B, T) bool, tokens of the answer that must be right; where padding is not on the
    right `attention_mask`. Position t predicts token t + 1, and masks are shifted like that in every loss (the official
    code does not shift them in soft and consistency loss). Clean and noisy passes run as one batch.

    Logged: `train/loss`, `train/ce`, `train/soft`, `train/consistency`, and for noise `noise/kl_start`, divergence
    before the first step; for each part of the data's `eval_parts`, e.g. `test`, the metrics of `AnswerMetrics`, the
    noisy ones under the probe.

    Args:
        lm: makes the language model: (input_ids, keep, attention_mask) -> logits at the positions kept.
        optimizer, scheduler: callables of the recipe; the scheduler steps with the optimizer.
        loss_mode: basefit (CE), basefit_half (CE / 2), neftune, rdrop, ce_noisy (CE of a noisy pass), ce_kl (one noisy
            pass, no consistency), kl_only, consistency_only, full.
        variant: v1 of the paper, or v2 (2026), see `layer_noise` and `soft_loss`.
        alpha, lam, temperature: constants of the loss (official: 0.5; 0.1 in v1, 0.05 in v2; 1).
        selection: given layers; those of largest or lowest signal-to-noise ratio; or auto, the calibration of v2.
        layers: for `given`, counted from 0; None for all.
        num_layers: for largest and lowest.
        prefix_sharing: True computes what lies below the first noisy layer once per step; the calibration then looks
            for noisy layers above the first quarter (v2).
        noise_std: noise_std of v1, base standard deviation of v2; auto chooses its own.
        probe_std, probe_draws, probe_layers: noise of the evaluation, as in v2; None for all layers, 0 draws for none.
        start, start_sha256: weights to start from, see `load_start`; None keeps the model's own.

    Source: arXiv 2504.03302; official code akhadangi/NoiseFiT.
    """

    def __init__(
        self,
        lm: Callable[[], nn.Module],
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None = None,
        loss_mode: LossMode = "full",
        variant: Variant = "v2",
        alpha: float = 0.5,
        lam: float = 0.05,
        temperature: float = 1.0,
        selection: Literal["given", "largest", "lowest", "auto"] = "given",
        layers: list[int] | None = None,
        num_layers: int = 3,
        prefix_sharing: bool = False,
        noise_std: float = 0.1,
        probe_std: float = 1.0,
        probe_draws: int = 4,
        probe_layers: list[int] | None = None,
        start: str | None = None,
        start_sha256: str | None = None,
    ) -> None:
        super().__init__()
        _check(alpha, lam, temperature, noise_std, probe_std, probe_draws)
        if selection == "auto" and variant == "v1":
            raise ValueError("model.selection auto belongs to model.variant v2, got v1; v1 has largest and lowest")
        self.save_hyperparameters(ignore=["lm", "optimizer", "scheduler"])
        self.optimizer, self.scheduler = optimizer, scheduler
        self.variant: Variant = variant
        self.clean_passes, self.noisy_passes = PASSES[loss_mode]
        self.policy: NoisePolicy | None = None
        self.policy_record: dict[str, Any] = {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_for("weights/lm"))
            self.lm = lm()
        if start is not None:
            load_start(self.lm, start, start_sha256)
        self.decoder_layers = dict(enumerate(find_decoder_layers(self.lm)))
        self.given_layers = self._numbers("layers", layers)
        self.probe_layers = self._numbers("probe_layers", probe_layers)

    def _numbers(self, name: str, layers: list[int] | None) -> tuple[int, ...]:
        """Layers that an option names, checked; all for None."""
        depth = len(self.decoder_layers)
        chosen = tuple(range(depth)) if layers is None else tuple(layers)
        if not chosen or len(set(chosen)) < len(chosen) or not set(chosen) <= set(range(depth)):
            raise ValueError(f"model.{name} must be different numbers from 0 to {depth - 1}, got {layers}")
        return chosen

    def configure_model(self) -> None:
        """Shards the language model under FSDP2, one decoder layer at a time."""
        kinds = {type(layer) for layer in self.decoder_layers.values()}
        shard(self.lm, self.device_mesh, blocks=kinds, precision=self.trainer.precision)

    def on_fit_start(self) -> None:
        """Seeds the draws of the step, which differ between ranks, and chooses the noisy layers unless resumed."""
        self.noise_generator = make_generator("noise", rank=self.global_rank, device=self.device)
        # dropout of library layers draws from the global state
        torch.manual_seed(seed_for("dropout", rank=self.global_rank))
        if self.noisy_passes == 0:
            return
        if self.policy is None:
            training = self.lm.training
            self.lm.eval()
            with torch.no_grad():
                self.policy, table = self._choose_policy()
                self.policy_record = {**asdict(self.policy), **self._noise_at_start(), "table": table}
            self.lm.train(training)
        if self.trainer.is_global_zero:
            path = Path(self.trainer.default_root_dir) / "noise_policy.json"
            write_atomic(path, json.dumps(self.policy_record, indent=1))
        if (moved := self.policy_record["kl_start"]) > 1:
            rank_zero_warn(
                f"noise in layers {[*self.policy.layers]} moves the predictions by {moved:.2g} nats a token: "
                f"more than 1 destroys them: lower model.noise_std {self.hparams['noise_std']} or choose other layers"
            )

    def _first_batches(self, count: int) -> list[dict[str, Tensor]]:
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        batches = itertools.islice(data.train_dataloader(), count)
        return [{k: v.to(self.device) for k, v in batch.items() if isinstance(v, Tensor)} for batch in batches]

    def _choose_policy(self) -> tuple[NoisePolicy, dict[str, Any]]:
        """The policy, and by layer what it was chosen by."""
        selection, std = self.hparams["selection"], self.hparams["noise_std"]
        if selection == "auto":
            return self._calibrated_policy()
        chosen, table = self.given_layers, dict[str, Tensor]()
        if selection != "given":
            table = {"snr": self._layer_snrs(std)}
            chosen = tuple(layers_by_snr(table["snr"], self.hparams["num_layers"], selection))
        return NoisePolicy(chosen, (std,) * len(chosen)), {name: values.tolist() for name, values in table.items()}

    def _layer_snrs(self, noise_std: float) -> Tensor:
        """(L,) ratios on the first batch, mean over ranks: so all ranks choose alike."""
        outputs = layer_outputs(self.lm, self.decoder_layers, self._first_batches(1)[0])
        ratios = [layer_snr(hidden, self._normal((SNR_PASSES, *hidden.shape)), noise_std) for hidden in outputs]
        return self._mean_over_ranks(torch.stack(ratios))

    def _calibrated_policy(self) -> tuple[NoisePolicy, dict[str, Any]]:
        """Every layer at every strength on the first two batches: 2 (1 + 5 L) forwards."""
        batches, layers = self._first_batches(2), self.decoder_layers
        hidden_size = layer_outputs(self.lm, layers, batches[0])[0].shape[-1]
        scales, add = strengths(hidden_size).tolist(), partial(layer_noise, variant="v2")
        table = calibration_table(self.lm, layers, batches, scales, add, symmetric_kl, self.noise_generator)
        table = self._mean_over_ranks(table).cpu()
        divergence, rise = table[1:].view(len(layers), len(scales), 2).unbind(-1)
        first = max(4, -(-len(layers) // 4)) if self.hparams["prefix_sharing"] else 0
        if first >= len(layers):
            raise ValueError(
                f"model.prefix_sharing with model.selection auto needs more than {first} decoder layers, "
                f"the model has {len(layers)}"
            )
        policy = choose_policy(divergence, rise, table[0], hidden_size, first)
        found = {"scales": scales, "kl": divergence.tolist(), "ce_rise": rise.tolist(), "ce_clean": float(table[0])}
        return policy, found

    def _noise_at_start(self) -> dict[str, Any]:
        """How far noise moves the predictions, and its standard deviation over that of each noisy layer's output."""
        policy, batch = self.policy or NO_NOISE, self._first_batches(1)[0]
        clean, noisy = self._logits(batch, 1, 1)
        moved = masked_kl(clean, noisy, torch.ones(len(clean), dtype=torch.bool, device=self.device))
        outputs = layer_outputs(self.lm, self.decoder_layers, batch)
        generator = make_generator("noise/ratio", rank=self.global_rank, device=self.device)
        ratios = [moved]
        for layer, scale in zip(policy.layers, policy.scales, strict=True):
            eps = torch.randn(outputs[layer].shape, generator=generator, device=self.device)
            noise = layer_noise(outputs[layer], eps, scale, self.variant) - outputs[layer]
            ratios.append(noise.std() / outputs[layer].std())
        kl_start, *found = self._mean_over_ranks(torch.stack(ratios)).tolist()
        return {"kl_start": kl_start, "noise_to_hidden": found}

    def _mean_over_ranks(self, value: Tensor) -> Tensor:
        return self.trainer.strategy.reduce(value.clone(), reduce_op="mean")

    def _normal(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self.noise_generator, device=self.device)

    def _logits(self, batch: dict[str, Tensor], clean: int = 1, noisy: int = 0) -> list[Tensor]:
        """Logits (n, V) of each pass at the positions before a label, clean ones first."""
        policy, add = self.policy or NO_NOISE, partial(layer_noise, variant=self.variant)
        counts, shared = (clean, noisy), self.hparams["prefix_sharing"]
        return pass_logits(
            self.lm, self.decoder_layers, batch, counts, policy, add, self.noise_generator, share_prefix=shared
        )

    def on_train_epoch_start(self) -> None:
        """Starts the sums of this epoch: total, CE, soft, consistency, steps."""
        self._sums = torch.zeros(len(PARTS) + 1, device=self.device, dtype=torch.float64)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The loss of the batch; ranks weigh by their number of labels."""
        if self.hparams["loss_mode"] == "neftune":
            embedding: Any = self.lm.embedding
            with rewriting({0: embedding}, lambda _, hidden: hidden + self._embedding_noise(hidden)):
                logits = self._logits(batch)
        else:
            logits = self._logits(batch, self.clean_passes, self.noisy_passes)
        parts = self._losses(logits, targets(batch))
        weight = self._token_weight(len(logits[0]))
        self._sums += torch.stack([*(weight * part.detach().double() for part in parts), weight.new_ones(())])
        return (weight * parts[0]).to(parts[0].dtype)

    def _token_weight(self, count: int) -> Tensor:
        """Labels of this rank over the mean of the ranks: the mean of the ranks' losses is that of the whole batch."""
        mine = torch.tensor(float(count), dtype=torch.float64, device=self.device)
        return mine / self._mean_over_ranks(mine)

    def _embedding_noise(self, hidden: Tensor) -> Tensor:
        uniform = 2 * torch.rand(hidden.shape, generator=self.noise_generator, device=self.device) - 1
        return (uniform * NEFTUNE_ALPHA / math.sqrt(hidden.shape[1] * hidden.shape[2])).to(hidden.dtype)

    def _losses(self, logits: list[Tensor], labels: Tensor) -> list[Tensor]:
        """Total, cross entropy, soft and consistency loss."""
        mode, variant, tau = self.hparams["loss_mode"], self.variant, self.hparams["temperature"]
        alpha, lam = self.hparams["alpha"], self.hparams["lam"]
        mask = torch.ones_like(labels, dtype=torch.bool)
        clean, noisy = logits[: self.clean_passes], logits[self.clean_passes :]
        cross_entropy = F.cross_entropy(logits[0], labels)
        soft = consistency = torch.zeros_like(cross_entropy)
        if mode == "full":
            consistency = consistency_loss(noisy[0], noisy[1], mask, tau, variant)
        if mode in ("full", "ce_kl"):
            soft = soft_loss(clean[0], noisy, mask, tau, variant)
            total = hybrid_loss(cross_entropy, soft, consistency, alpha, lam)
        elif mode == "kl_only":
            # the official code detaches nothing in these two, in either version
            total = soft = soft_loss(clean[0], noisy, mask, tau, "v1")
        elif mode == "consistency_only":
            total = consistency = consistency_loss(noisy[0], noisy[1], mask, 1.0, "v1")
        elif mode == "rdrop":
            cross_entropy = (cross_entropy + F.cross_entropy(clean[1], labels)) / 2
            total = cross_entropy + symmetric_kl(clean[0], clean[1], mask)
        else:
            total = cross_entropy / 2 if mode == "basefit_half" else cross_entropy
        return [total, cross_entropy, soft, consistency]

    def on_train_epoch_end(self) -> None:
        """Logs the epoch's means."""
        sums = self.trainer.strategy.reduce(self._sums.clone(), reduce_op="sum")
        self.log_dict({f"train/{name}": (sums[k] / sums[-1]).float() for k, name in enumerate(PARTS)})
        if self.noisy_passes:
            self.log("noise/kl_start", self.policy_record["kl_start"])

    def on_validation_epoch_start(self) -> None:
        """Fresh sums, and the same probe noise in each evaluation."""
        self.metrics: dict[int, AnswerMetrics] = {}
        self.probe_generator = make_generator("probe", rank=self.global_rank, device=self.device)

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Answers forced along the right text, clean and under probe noise."""
        keep = shifted(batch["key"])
        draws = self.hparams["probe_draws"]
        probe = NoisePolicy(self.probe_layers, (self.hparams["probe_std"],) * len(self.probe_layers))
        add = partial(layer_noise, variant="v2")
        clean, *noisy = pass_logits(
            self.lm, self.decoder_layers, batch, (1, draws), probe, add, self.probe_generator, keep
        )
        wanted = batch["input_ids"][:, 1:][keep[:, :-1]]
        metrics = self.metrics.setdefault(dataloader_idx, AnswerMetrics(self.device))
        metrics.update(clean, noisy, wanted, keep.nonzero()[:, 0])

    def on_validation_epoch_end(self) -> None:
        """Logs the metrics of each part."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        self._log_parts(data.eval_parts)

    def _log_parts(self, names: tuple[str, ...]) -> None:
        probed = self.hparams["probe_draws"] > 0
        for number, metrics in sorted(self.metrics.items()):
            values = metrics.compute(self.trainer.strategy, probed)
            self.log_dict({f"{names[number]}/{name}": value for name, value in values.items()})

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """As the validation."""
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """Logs the test metrics."""
        self._log_parts(("test",))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the noise policy: a resumed run never chooses anew."""
        if self.policy is not None:
            checkpoint["noise_policy"] = self.policy_record

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores the noise policy."""
        if (stored := checkpoint.get("noise_policy")) is not None:
            self.policy_record = stored
            self.policy = NoisePolicy(tuple(stored["layers"]), tuple(stored["scales"]))

    def configure_optimizers(self) -> Any:
        """Optimizer over what is trained (adapters, or everything); the scheduler steps with every step."""
        optimizer = self.optimizer([p for p in self.lm.parameters() if p.requires_grad])
        if self.scheduler is None:
            return optimizer
        return [optimizer], [{"scheduler": self.scheduler(optimizer), "interval": "step"}]


def _check(alpha: float, lam: float, temperature: float, noise_std: float, probe_std: float, probe_draws: int) -> None:
    if not 0 <= alpha <= 1:
        raise ValueError(f"model.alpha must be in [0, 1], got {alpha}")
    if temperature <= 0:
        raise ValueError(f"model.temperature must be positive, got {temperature}")
    if min(lam, noise_std, probe_std, probe_draws) < 0:
        raise ValueError(
            "model.lam, noise_std, probe_std and probe_draws must not be negative, "
            f"got {lam}, {noise_std}, {probe_std} and {probe_draws}"
        )
