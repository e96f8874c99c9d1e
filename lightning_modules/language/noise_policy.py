"""Which decoder layers get noise, and how much: by signal-to-noise ratio, or by a calibration table.

Legend: L layers, F noise factors, N calibration batches. Pure functions of tables; who measures them is the module.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

FACTORS = (0.25, 0.5, 1.0, 1.5, 2.0)
"""Noise strengths tried per layer, in units of 1 / sqrt(hidden size)."""
MAX_DAMAGE = 0.02
"""Largest rise of the cross entropy, relative to the clean one, that a strength may cause."""
DISTANCE_PENALTY = 0.05
TARGET_SHARE = 0.75
"""Target divergence as a share of the median over the chosen layers; without a target, share of the best score 0.9."""
SCORE_SHARE = 0.9


@dataclass(frozen=True)
class NoisePolicy:
    """Noisy layers, counted from 0, and their base standard deviations."""

    layers: tuple[int, ...]
    scales: tuple[float, ...]


def layers_by_snr(snr: Tensor, count: int, which: Literal["largest", "lowest"]) -> list[int]:
    """The `count` layers of largest or lowest signal-to-noise ratio, best first; snr (L,).

    Raises:
        ValueError: more layers wanted than there are.

    Source: official code, `NoiseFiT_v1_manual_snr.py`.
    """
    if not 1 <= count <= len(snr):
        raise ValueError(f"model.num_layers must be between 1 and the model's {len(snr)} decoder layers, got {count}")
    return torch.topk(snr, count, largest=which == "largest").indices.tolist()


def strengths(hidden_size: int) -> Tensor:
    """(F,) float64 base standard deviations f / sqrt(hidden size). Source: official code v2."""
    return torch.tensor(FACTORS, dtype=torch.float64) / math.sqrt(hidden_size)


def calibration_scores(divergence: Tensor, rise: Tensor, clean: Tensor) -> Tensor:
    r"""Score of each layer and strength: KL / (1 + r) / (1 + 0.05 log2(f)^2), r = rise of the cross entropy / |clean|.

    Args:
        divergence: (L, F) symmetric KL between clean and noisy predictions, mean over batches, nats.
        rise: (L, F) max(0, noisy - clean cross entropy), mean over batches.
        clean: 0-d mean clean cross entropy.

    Returns:
        (L, F); -inf where r exceeds 0.02, unless that holds for a layer's every strength.

    Source: official code v2.
    """
    ratio = rise / clean.abs()
    penalty = 1 + DISTANCE_PENALTY * torch.tensor(FACTORS, dtype=divergence.dtype).log2() ** 2
    score = divergence / (1 + ratio) / penalty
    refused = ratio > MAX_DAMAGE
    refused &= ~refused.all(1, keepdim=True)
    return score.masked_fill(refused, -torch.inf)


def candidate_layers(best: Tensor, first: int = 0) -> tuple[list[int], float]:
    """Layers from `first` on whose best score reaches median + MAD over all layers, and that threshold; best (L,).

    Source: official code v2. No layer above the threshold: the single best one (derived).
    """
    median = best.median()
    threshold = median + (best - median).abs().median()
    chosen = [layer for layer in range(first, len(best)) if best[layer] >= threshold and best[layer] > 0]
    return chosen or [first + int(best[first:].argmax())], float(threshold)


def spread_over_depth(best: Tensor, candidates: list[int], count: int, bands: int) -> list[int]:
    """At most `count` candidates, the best of each depth band first; sorted by depth.

    A band gives up to ceil(count / bands). They are taken from early to late and cut to `count`: where bands overflow,
    late layers drop out.

    Args:
        best: (L,) best score of each layer.
        candidates: layers to choose from.
        count: layers wanted.
        bands: parts of the depth, equal up to rounding.

    Source: official code v2.
    """
    depth, quota = len(best), math.ceil(count / bands)
    ranked = sorted(candidates, key=lambda layer: -float(best[layer]))
    chosen: list[int] = []
    for band in range(bands):
        inside = [layer for layer in ranked if layer * bands // depth == band]
        chosen += inside[:quota]
    chosen += [layer for layer in ranked if layer not in chosen]
    return sorted(chosen[:count])


def choose_policy(
    divergence: Tensor, rise: Tensor, clean: Tensor, hidden_size: int, first: int = 0, target_kl: bool = True
) -> NoisePolicy:
    r"""Layers and strengths from a calibration table.

    Args:
        divergence, rise, clean: as in `calibration_scores`.
        hidden_size: H.
        first: no layer before it is eligible.
        target_kl: the smallest allowed strength whose divergence reaches 0.75 times the median (over the chosen layers)
            of the divergence at the best score, else the nearest in log KL; False takes the smallest strength with at
            least 0.9 of the layer's best score.

    Source: official code v2.
    """
    scores = calibration_scores(divergence, rise, clean)
    best, argbest = scores.max(1)
    candidates, _ = candidate_layers(best, first)
    layers = spread_over_depth(best, candidates, math.ceil(math.sqrt(len(best))), bands=3)
    target = TARGET_SHARE * divergence[layers, argbest[layers]].median()
    scale = strengths(hidden_size)
    chosen = []
    for layer in layers:
        allowed = scores[layer].isfinite()
        enough = divergence[layer] >= target if target_kl else scores[layer] >= SCORE_SHARE * best[layer]
        reached = allowed & enough
        if bool(reached.any()):
            index = int(reached.nonzero()[0])
        else:
            gap = (divergence[layer].clamp_min(1e-12).log() - target.clamp_min(1e-12).log()).abs()
            index = int(gap.masked_fill(~allowed, torch.inf).argmin())
        chosen.append(float(scale[index]))
    return NoisePolicy(tuple(layers), tuple(chosen))
