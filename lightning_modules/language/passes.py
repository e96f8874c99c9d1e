"""Clean and noisy passes of a language model in one batch, and what noise in single layers does to its predictions."""

import itertools
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.language.hooks import rewriting, widening
from lightning_modules.language.noise_policy import NoisePolicy

IGNORED = -100
NO_NOISE = NoisePolicy((), ())
AddNoise = Callable[[Tensor, Tensor, float], Tensor]
"""(hidden, N(0, 1) draw like hidden, scale) -> noisy hidden."""


def shifted(mask: Tensor) -> Tensor:
    """Positions whose *next* token is marked: (B, T) bool of (B, T) bool."""
    return torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], dim=1)


def targets(batch: Mapping[str, Tensor]) -> Tensor:
    """(n,) labels to predict, in the order of the positions kept."""
    labels = batch["labels"][:, 1:]
    return labels[labels != IGNORED]


def pass_logits(
    lm: nn.Module,
    layers: Mapping[int, nn.Module],
    batch: Mapping[str, Tensor],
    counts: tuple[int, int] = (1, 0),
    policy: NoisePolicy = NO_NOISE,
    add_noise: AddNoise | None = None,
    generator: torch.Generator | None = None,
    keep: Tensor | None = None,
    share_prefix: bool = False,
) -> list[Tensor]:
    """Logits (n, V) float32 of each pass, clean ones first; all passes run as one batch.

    Args:
        lm: (input_ids, keep, attention_mask) -> logits at the positions kept.
        layers: its decoder layers by number.
        batch: `input_ids` and `labels` (B, T) int64; `attention_mask` (B, T) int64 where padding is not on the right
            or a row holds several documents, see the language model.
        counts: clean passes, noisy passes.
        policy: where the noisy passes get noise, and how much.
        add_noise: applied to each noisy pass alone, so that statistics are those of a pass.
        generator: of the draws.
        keep: (B, T) bool; None keeps the positions before a label.
        share_prefix: what lies below the first noisy layer's noise is computed once for all passes (official option of
            v2); equal but for dropout, of which the passes there share one draw.
    """
    clean, passes = counts[0], sum(counts)
    keep = shifted(batch["labels"] != IGNORED) if keep is None else keep
    scales = dict(zip(policy.layers, policy.scales, strict=True)) if counts[1] and add_noise is not None else {}
    first = min(scales) if share_prefix and scales else None

    def change(layer: int, hidden: Tensor) -> Tensor | None:
        if add_noise is None:
            return None
        parts = [hidden] * passes if layer == first else list(hidden.chunk(passes))
        for number in range(clean, passes):
            eps = torch.randn(parts[number].shape, generator=generator, device=hidden.device).to(hidden.dtype)
            parts[number] = add_noise(parts[number], eps, scales[layer])
        return torch.cat(parts)

    mask = batch.get("attention_mask")
    times = passes if first is None else 1
    input_ids, mask = (None if part is None else part.repeat(times, 1) for part in (batch["input_ids"], mask))
    with ExitStack() as stack:
        stack.enter_context(rewriting({layer: layers[layer] for layer in scales}, change))
        if first is not None:
            tail = [layers[layer] for layer in layers if layer > first]
            stack.enter_context(widening(tail, len(batch["input_ids"]), passes))
        logits = lm(input_ids, keep.repeat(passes, 1), mask)
    return list(logits.float().chunk(passes))


def layer_outputs(lm: nn.Module, layers: Mapping[int, nn.Module], batch: Mapping[str, Tensor]) -> list[Tensor]:
    """Clean output (B, T, H) float32 of each decoder layer, before the final norm."""
    found: dict[int, Tensor] = {}

    def read(number: int, hidden: Tensor) -> None:
        found[number] = hidden.float()

    with rewriting(layers, read):
        pass_logits(lm, layers, batch)
    return [found[number] for number in sorted(found)]


def calibration_table(
    lm: nn.Module,
    layers: Mapping[int, nn.Module],
    batches: Iterable[Mapping[str, Tensor]],
    scales: list[float],
    add_noise: AddNoise,
    divergence: Callable[[Tensor, Tensor, Tensor], Tensor],
    generator: torch.Generator,
) -> Tensor:
    """(1 + 2 L F,): clean cross entropy, then for each layer and scale divergence and rise of the cross entropy.

    Means over the batches; 1 + L F forwards for each. Source: official code v2.
    """
    tables = []
    for batch in batches:
        (clean,), labels = pass_logits(lm, layers, batch), targets(batch)
        mask = torch.ones_like(labels, dtype=torch.bool)
        cross_entropy = F.cross_entropy(clean, labels)
        row = [cross_entropy]
        for layer, scale in itertools.product(layers, scales):
            policy = NoisePolicy((layer,), (scale,))
            (noisy,) = pass_logits(lm, layers, batch, (0, 1), policy, add_noise, generator)
            row += [divergence(clean, noisy, mask), (F.cross_entropy(noisy, labels) - cross_entropy).clamp_min(0)]
        tables.append(torch.stack(row))
    return torch.stack(tables).mean(0)
