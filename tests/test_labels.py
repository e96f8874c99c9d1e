"""Label noise and splits: the official draws, their rates, human label files, bad input."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.random import RandomState

from datamodules.labels import (
    Asymmetric,
    Human,
    LabelNoise,
    Labels,
    Symmetric,
    asymmetric_noise_cifar10,
    asymmetric_noise_cifar100,
    human_labels,
    stratified_split,
    symmetric_noise,
)

GOLDEN = np.load(Path(__file__).parent / "golden" / "elr.npz")
"""Outputs of the official loaders (shengliu66/ELR) on fixed labels, integers."""

BALANCED = np.arange(20_000) % 10
"""2,000 labels of each of ten classes: shares below are exact, or have a standard deviation under 0.4 %."""


def golden_rng() -> RandomState:
    return RandomState(int(GOLDEN["noise_seed"]))


# 1. reference


@pytest.mark.parametrize("percent", [40, 60])
def test_symmetric_noise_equals_the_official_draw(percent: int) -> None:
    ours = symmetric_noise(GOLDEN["noise_labels"], percent / 100, 10, golden_rng())
    np.testing.assert_array_equal(ours, GOLDEN[f"noise_sym_{percent}"])


@pytest.mark.parametrize("percent", [40, 60])
def test_symmetric_noise_touches_only_the_officially_chosen(percent: int) -> None:
    ours = symmetric_noise(GOLDEN["noise_labels"], percent / 100, 10, golden_rng())
    changed = np.flatnonzero(ours != GOLDEN["noise_labels"])
    assert set(changed) <= set(GOLDEN[f"noise_sym_{percent}_chosen"])


@pytest.mark.parametrize("percent", [40, 60])
def test_asymmetric_noise_equals_the_official_draw(percent: int) -> None:
    ours = asymmetric_noise_cifar10(GOLDEN["noise_labels"], percent / 100, golden_rng())
    np.testing.assert_array_equal(ours, GOLDEN[f"noise_asym_{percent}"])


def test_symmetric_noise_of_100_classes_equals_the_official_draw() -> None:
    ours = symmetric_noise(GOLDEN["noise100_labels"], 0.4, 100, golden_rng())
    np.testing.assert_array_equal(ours, GOLDEN["noise100_sym_40"])


def test_asymmetric_noise_of_100_classes_equals_the_official_draw() -> None:
    ours = asymmetric_noise_cifar100(GOLDEN["noise100_labels"], 0.4, RandomState(0))
    np.testing.assert_array_equal(ours, GOLDEN["noise100_asym_40"])


@pytest.mark.parametrize(("part", "name"), [(0, "split_train"), (1, "split_val")])
def test_split_equals_the_official_one(part: int, name: str) -> None:
    split = stratified_split(GOLDEN["noise_labels"], 0.1, RandomState(int(GOLDEN["split_seed"])))
    np.testing.assert_array_equal(split[part], GOLDEN[name])


# 2. properties


@pytest.mark.parametrize("rate", [0.2, 0.4, 0.6, 0.8])
def test_symmetric_noise_may_draw_the_true_class(rate: float) -> None:
    wrong = (symmetric_noise(BALANCED, rate, 10, RandomState(0)) != BALANCED).mean()
    assert wrong == pytest.approx(rate * 9 / 10, abs=0.01)


@pytest.mark.parametrize("rate", [0.1, 0.2, 0.3, 0.4])
def test_in_place_rule_turns_some_dogs_back_into_cats(rate: float) -> None:
    """Paper's code: (5p - p^2) / 10 wrong, since a share p of the cats made dogs returns."""
    wrong = (asymmetric_noise_cifar10(BALANCED, rate, RandomState(0)) != BALANCED).mean()
    assert wrong == pytest.approx((5 * rate - rate**2) / 10, abs=0.005)


@pytest.mark.parametrize("rate", [0.1, 0.25, 0.4])
def test_plain_rule_flips_exactly_the_rate_of_five_classes(rate: float) -> None:
    noisy = asymmetric_noise_cifar10(BALANCED, rate, RandomState(0), in_place=False)
    shares = [(noisy[label == BALANCED] != label).mean() for label in range(10)]
    assert shares == [0, 0, rate, rate, rate, rate, 0, 0, 0, rate]


def test_plain_rule_follows_the_map() -> None:
    noisy = asymmetric_noise_cifar10(BALANCED, 1.0, RandomState(0), in_place=False)
    assert [int(noisy[label == BALANCED][0]) for label in range(10)] == [0, 1, 0, 5, 7, 3, 6, 7, 8, 1]


def test_noise_of_100_classes_stays_in_its_block_of_five() -> None:
    labels = np.arange(1000) % 100
    noisy = asymmetric_noise_cifar100(labels, 1.0, RandomState(0))
    np.testing.assert_array_equal(noisy, labels // 5 * 5 + (labels % 5 + 1) % 5)


@pytest.mark.parametrize(("noise", "classes"), [(Symmetric(0.0), 10), (Asymmetric(0.0), 10), (Asymmetric(0.0), 100)])
def test_rate_zero_changes_nothing(noise: LabelNoise, classes: int) -> None:
    labels = np.arange(1000) % classes
    np.testing.assert_array_equal(noise(labels, np.arange(1000), labels, classes, RandomState(0)), labels)


@pytest.mark.parametrize("noise", [Symmetric(0.5), Asymmetric(0.5), Asymmetric(0.5, in_place=False)])
def test_input_labels_are_kept(noise: LabelNoise) -> None:
    labels = np.arange(100) % 10
    noise(labels, np.arange(100), labels, 10, RandomState(0))
    np.testing.assert_array_equal(labels, np.arange(100) % 10)


def test_noise_of_100_classes_does_not_depend_on_the_seed() -> None:
    """The official code passes RandomState(0) whatever the run's seed."""
    labels = np.arange(500) % 100
    first, second = (Asymmetric(0.4)(labels, np.arange(500), labels, 100, RandomState(seed)) for seed in (1, 2))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(("labels", "expected"), [(np.arange(50_000) % 10, 500), (np.arange(50_000) % 100, 50)])
def test_split_keeps_the_papers_validation_images_per_class(labels: Labels, expected: int) -> None:
    _, val = stratified_split(labels, 0.1, RandomState(0))
    assert set(np.bincount(labels[val])) == {expected}


def test_split_is_a_partition() -> None:
    train, val = stratified_split(BALANCED, 1 / 6, RandomState(0))
    np.testing.assert_array_equal(np.sort(np.concatenate([train, val])), np.arange(len(BALANCED)))


# 3. human labels

CLEAN = np.array([0, 1, 2, 0, 1, 2], dtype=np.int64)
WORSE = np.array([0, 1, 1, 2, 1, 2], dtype=np.int64)


@pytest.fixture
def human_file(tmp_path: Path) -> Path:
    """Laid out as CIFAR-10_human.pt: a dict of NumPy arrays."""
    path = tmp_path / "human.pt"
    torch.save({"clean_label": CLEAN, "worse_label": WORSE}, path)
    return path


def test_human_labels_are_those_of_the_subset(human_file: Path) -> None:
    rows = np.array([3, 0, 2])
    noise = Human(str(human_file), "worse_label")
    np.testing.assert_array_equal(noise(CLEAN[rows], rows, CLEAN, 3, RandomState(0)), [2, 0, 1])


def test_human_labels_of_more_classes_are_refused(human_file: Path) -> None:
    with pytest.raises(ValueError, match=r"human\.pt holds labels of 3 classes, the data set has 2"):
        human_labels(human_file, "worse_label", CLEAN.clip(max=1), 2)


def test_human_labels_in_another_order_are_refused(human_file: Path) -> None:
    with pytest.raises(ValueError, match=r"differs from the data set's labels in 4 places; .* torchvision's order"):
        human_labels(human_file, "worse_label", CLEAN[[1, 0, 2, 4, 3, 5]], 3)


def test_human_labels_of_another_length_are_refused(human_file: Path) -> None:
    with pytest.raises(ValueError, match="has 6 labels, the training set 5"):
        human_labels(human_file, "worse_label", CLEAN[:5], 3)


def test_unknown_human_labels_are_named_with_those_there_are(human_file: Path) -> None:
    with pytest.raises(ValueError, match="no labels 'worst'; it has clean_label, worse_label"):
        human_labels(human_file, "worst", CLEAN, 3)


def test_missing_human_file_says_where_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.pt; expected CIFAR-10_human\.pt .*github\.com/UCSC-REAL"):
        human_labels(tmp_path / "none.pt", "worse_label", CLEAN, 3)


def test_broken_human_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.pt"
    path.write_bytes(b"no pickle")
    with pytest.raises(ValueError, match=r"broken\.pt is not a CIFAR-N label file"):
        human_labels(path, "worse_label", CLEAN, 3)


# 4. bad input


@pytest.mark.parametrize("kind", [Symmetric, Asymmetric])
@pytest.mark.parametrize("rate", [1.4, -0.1])
def test_rate_outside_zero_to_one_is_refused(kind: type[Symmetric] | type[Asymmetric], rate: float) -> None:
    with pytest.raises(ValueError, match=rf"noise\.rate must be in \[0, 1\], got {rate}"):
        kind(rate)


def test_asymmetric_noise_of_other_data_is_refused() -> None:
    labels = np.zeros(3, dtype=np.int64)
    with pytest.raises(ValueError, match=r"defined for 10 or 100 classes \(CIFAR\), the data have 14"):
        Asymmetric(0.4)(labels, np.arange(3), labels, 14, RandomState(0))


@pytest.mark.parametrize("fraction", [1.0, -0.1])
def test_split_outside_its_range_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match=rf"data\.val_fraction must be in \[0, 1\), got {fraction}"):
        stratified_split(BALANCED, fraction, RandomState(0))
