"""Precision, recall and inception score: by their definitions, one point at a time."""

import math

import pytest
import torch
from torch import Tensor

from lightning_modules.diffusion import manifold
from lightning_modules.diffusion.manifold import inception_score, precision_recall


def normal(count: int, seed: int, spread: float = 1.0) -> Tensor:
    return spread * torch.randn(count, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def share_inside(points: Tensor, centres: Tensor, k: int) -> float:
    radii = [sorted(float((c - other).norm()) for other in centres)[k] for c in centres]
    inside = [any(float((p - c).norm()) <= r for c, r in zip(centres, radii, strict=True)) for p in points]
    return sum(inside) / len(inside)


@pytest.mark.parametrize("chunk", [1000, 7])
def test_shares_are_those_of_the_definition(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifold, "CHUNK", chunk)
    real, made = normal(40, 0), normal(30, 1, spread=0.5)
    expected = share_inside(made, real, 3), share_inside(real, made, 3)
    assert precision_recall(real, made) == pytest.approx(expected)
    # narrow samples are precise and miss the real spread
    assert expected[0] > expected[1] + 0.2


def test_equal_sets_are_precise_and_complete_and_far_sets_neither() -> None:
    points = normal(20, 2)
    assert precision_recall(points, points) == (1.0, 1.0)
    assert precision_recall(points, points + 100) == (0.0, 0.0)


def test_too_few_pictures_are_named() -> None:
    with pytest.raises(ValueError, match="more than 3 pictures, got 20 and 3"):
        precision_recall(normal(20, 0), normal(3, 1))


def test_score_is_the_number_of_classes_if_sure_and_even_and_one_if_unsure() -> None:
    sure = 200 * torch.eye(5).repeat(4, 1)
    assert inception_score(sure) == pytest.approx(5, rel=1e-9)
    assert inception_score(torch.zeros(8, 5)) == pytest.approx(1, rel=1e-9)


def test_score_is_a_mean_over_parts() -> None:
    logits = torch.randn(60, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def score(part: Tensor) -> float:
        p = part.softmax(1)
        return math.exp(float((p * (p / p.mean(0)).log()).sum(1).mean()))

    expected = (score(logits[:25]) + score(logits[25:50]) + score(logits[50:])) / 3
    assert inception_score(logits, split=25) == pytest.approx(expected, rel=1e-9)
