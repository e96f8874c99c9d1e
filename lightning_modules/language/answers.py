"""How well a language model gives answers when forced along the right text, and how noise changes them."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BINS = 10
CONFIDENT = 0.5


def answer_statistics(logits: Tensor, targets: Tensor, row: Tensor, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Per answer of some tokens: all right, confidence, negative log-likelihood.

    Args:
        logits: (n, V) at the key tokens.
        targets: (n,) int64.
        row: (n,) int64, which answer each token belongs to.
        num_rows: answers.

    Returns:
        `right` (num_rows,) bool; `confidence` (num_rows,), product of the largest probabilities; `nll` (n,) nats.
    """
    log_probability = logits.float().log_softmax(-1)
    top, guess = log_probability.max(-1)
    wrong = torch.zeros(num_rows, device=row.device).index_add(0, row, (guess != targets).float())
    confidence = torch.zeros(num_rows, device=row.device).index_add(0, row, top).exp()
    return wrong == 0, confidence, F.nll_loss(log_probability, targets, reduction="none")


def calibration_error(counts: Tensor, confidence: Tensor, right: Tensor) -> Tensor:
    """Expected calibration error from sums per bin of confidence, (BINS,) each: sum |confidence - right| / count."""
    return (confidence - right).abs().sum() / counts.sum().clamp_min(1)


class AnswerMetrics:
    """Sums over an evaluation; every rank adds its own, `compute` joins them.

    Metrics: `acc` share of answers with all key tokens right, `nll` per key token, `ece` in 10 bins, `confident_wrong`
    share of answers that are wrong at a confidence above 0.5; and under probe noise `noise_kl` KL(clean || noisy) per
    key token, `noisy_acc`, `flips` share of key tokens whose argmax changes.
    """

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(8, dtype=torch.float64, device=device)
        self.bins = torch.zeros(3, BINS, dtype=torch.float64, device=device)

    def update(self, logits: Tensor, noisy: list[Tensor], targets: Tensor, row: Tensor) -> None:
        """Adds a batch; logits (n, V) clean and of each noisy pass, targets and row as in `answer_statistics`."""
        _, row = row.unique(return_inverse=True)
        num_rows = int(row.max()) + 1
        right, confidence, nll = answer_statistics(logits, targets, row, num_rows)
        confident_wrong = (~right & (confidence > CONFIDENT)).sum()
        zero = torch.zeros((), device=logits.device)
        divergence = noisy_right = flips = zero
        clean = logits.float().log_softmax(-1)
        for other in noisy:
            log_probability = other.float().log_softmax(-1)
            divergence = divergence + F.kl_div(log_probability, clean, reduction="sum", log_target=True)
            noisy_right = noisy_right + answer_statistics(other, targets, row, num_rows)[0].sum()
            flips = flips + (other.argmax(-1) != logits.argmax(-1)).sum()
        passes = max(len(noisy), 1)
        parts = [right.sum(), confident_wrong, nll.sum(), divergence / passes, noisy_right / passes, flips / passes]
        counts = torch.tensor([num_rows, len(targets)], device=logits.device)
        self.sums += torch.cat([torch.stack([part.double() for part in parts]), counts.double()])
        which = (confidence * BINS).long().clamp(max=BINS - 1)
        for sums, values in zip(self.bins, (torch.ones_like(confidence), confidence, right), strict=True):
            sums.index_add_(0, which, values.double())

    def compute(self, strategy: Any, probed: bool) -> dict[str, Tensor]:
        """The metrics over all ranks."""
        right, confident_wrong, nll, divergence, noisy_right, flips, rows, tokens = strategy.reduce(
            self.sums.clone(), reduce_op="sum"
        )
        metrics = {
            "acc": right / rows,
            "nll": nll / tokens,
            "ece": calibration_error(*strategy.reduce(self.bins.clone(), reduce_op="sum")),
            "confident_wrong": confident_wrong / rows,
        }
        if probed:
            metrics |= {"noise_kl": divergence / tokens, "noisy_acc": noisy_right / rows, "flips": flips / tokens}
        return {name: value.float() for name, value in metrics.items()}
