"""Label noise: pure functions that draw in the official order, and the classes that recipes name.

Draws come from NumPy's legacy `RandomState`, as in the official loaders of ELR (shengliu66/ELR); given the same seed
the noisy labels are equal to theirs, integer for integer.
"""

from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np
import torch
from numpy.random import RandomState
from numpy.typing import NDArray

Labels = NDArray[np.int64]

CIFAR10_MAP = {9: 1, 2: 0, 3: 5, 5: 3, 4: 7}
"""Asymmetric CIFAR-10: truck -> automobile, bird -> airplane, cat <-> dog, deer -> horse."""


def stratified_split(labels: Labels, val_fraction: float, rng: RandomState) -> tuple[Labels, Labels]:
    """Class-balanced split into training and validation positions.

    Args:
        labels: (n,) classes.
        val_fraction: share of each class that goes to validation, in [0, 1).
        rng: draws one shuffle per class, then one of each list (the official order).

    Returns:
        (train, val) positions into `labels`; of each shuffled class the first (1 - val_fraction) of its images train.
    """
    if not 0 <= val_fraction < 1:
        raise ValueError(f"data.val_fraction must be in [0, 1), got {val_fraction}")
    train: list[Labels] = []
    val: list[Labels] = []
    for label in np.unique(labels):
        positions = np.flatnonzero(labels == label)
        rng.shuffle(positions)
        # rounding first: 1 - 0.1 is 0.9 minus an ulp, and the paper's 4500 of 5000 must stay 4500
        num_train = int(round((1 - val_fraction) * len(positions), 6))
        train.append(positions[:num_train])
        val.append(positions[num_train:])
    train_positions, val_positions = np.concatenate(train), np.concatenate(val)
    rng.shuffle(train_positions)
    rng.shuffle(val_positions)
    return train_positions, val_positions


def symmetric_noise(labels: Labels, rate: float, num_classes: int, rng: RandomState) -> Labels:
    """Relabels the first ceil(rate * n) of a permutation uniformly over all classes, the true one included.

    The share of wrong labels is therefore rate * (C - 1) / C. Labels (n,) int64 in and out; the input is kept.
    Source: arXiv 2007.00151 and shengliu66/ELR data loaders: permutation(n), then randint(C) per chosen position.
    """
    _check_rate(rate)
    noisy = labels.copy()
    chosen = rng.permutation(len(labels))[: _ceil_share(rate, len(labels))]
    # one int32 call consumes the generator exactly as the official one-by-one randint(C, dtype=int32) does
    noisy[chosen] = rng.randint(num_classes, size=len(chosen), dtype=np.int32)
    return noisy


def asymmetric_noise_cifar10(labels: Labels, rate: float, rng: RandomState, in_place: bool = True) -> Labels:
    """Flips a share of five CIFAR-10 classes to a similar class (`CIFAR10_MAP`).

    Args:
        labels: (n,) int64 in 0..9; kept.
        rate: share of each of these classes that flips.
        rng: one shuffle of the positions of each class 0..9, whether it flips or not.
        in_place: True as the official code: each class is looked up among the *current* labels, so cats that became
            dogs may turn back (18.4 % wrong overall at rate 0.4). False maps the clean labels (20 % at 0.4).

    Source: shengliu66/ELR data loaders.
    """
    _check_rate(rate)
    noisy = labels.copy()
    for label in range(10):
        positions = np.flatnonzero((noisy if in_place else labels) == label)
        rng.shuffle(positions)
        if label in CIFAR10_MAP:
            noisy[positions[: _ceil_share(rate, len(positions))]] = CIFAR10_MAP[label]
    return noisy


def asymmetric_noise_cifar100(labels: Labels, rate: float, rng: RandomState) -> Labels:
    """Flips each label with probability `rate` to the next fine class inside its block of five consecutive ids.

    One multinomial draw per example. The official code always passes `RandomState(0)`, so that its flips depend on the
    split only; the blocks are consecutive ids, not CIFAR-100's semantic superclasses. Source: shengliu66/ELR.
    """
    _check_rate(rate)
    transition = np.zeros((100, 100))
    classes = np.arange(100)
    transition[classes, classes] = 1 - rate
    transition[classes, classes // 5 * 5 + (classes + 1) % 5] += rate
    return np.array([rng.multinomial(1, transition[label]).argmax() for label in labels], dtype=np.int64)


def human_labels(path: str | Path, key: str, clean_labels: Labels, num_classes: int) -> Labels:
    """Human labels of CIFAR-N, for a training set in torchvision's order.

    Args:
        path: `CIFAR-10_human.pt` or `CIFAR-100_human.pt` (UCSC-REAL/cifar-10-100n, CC BY-NC 4.0, not shipped here).
        key: e.g. `worse_label`, `aggre_label`, `random_label1`, `noisy_label`.
        clean_labels: (n,) the data set's own labels; must equal the file's `clean_label`.
        num_classes: classes of the data set.

    Raises:
        FileNotFoundError, ValueError: no such file or key, wrong number of rows or classes, other order of images.

    Source: arXiv 2110.12088.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"noise.path: no file {path}; expected CIFAR-10_human.pt or CIFAR-100_human.pt from "
            "https://github.com/UCSC-REAL/cifar-10-100n (data/)"
        )
    try:
        # the published files pickle NumPy arrays, which weights_only refuses
        table = torch.load(path, weights_only=False)
        columns = {name: np.asarray(values, dtype=np.int64) for name, values in table.items()}
    except Exception as error:
        raise ValueError(f"noise.path: {path} is not a CIFAR-N label file: {error}") from error
    for name in (key, "clean_label"):
        if name not in columns:
            raise ValueError(f"noise.key: {path} has no labels {name!r}; it has {', '.join(columns)}")
    labels = columns[key]
    if len(labels) != len(clean_labels):
        raise ValueError(f"noise.path: {path} has {len(labels)} labels, the training set {len(clean_labels)}")
    found = int(max(labels.max(), columns["clean_label"].max())) + 1
    if found > num_classes:
        raise ValueError(f"noise.path: {path} holds labels of {found} classes, the data set has {num_classes}")
    if not np.array_equal(columns["clean_label"], clean_labels):
        differing = int((columns["clean_label"] != clean_labels).sum())
        raise ValueError(
            f"noise.path: clean_label of {path} differs from the data set's labels in {differing} places; "
            "CIFAR-N needs the training images in torchvision's order"
        )
    return labels


class LabelNoise(ABC):
    """Label noise as a recipe names it."""

    @abstractmethod
    def __call__(self, labels: Labels, rows: Labels, all_labels: Labels, num_classes: int, rng: RandomState) -> Labels:
        """Noisy labels of one subset.

        Args:
            labels: (n,) clean labels of the subset, `all_labels[rows]`.
            rows: (n,) positions of the subset in the full training set.
            all_labels: (N,) clean labels of the full training set.
            num_classes: number of classes C.
            rng: shared by the training and then the validation subset.
        """


class Symmetric(LabelNoise):
    """Uniform noise over all classes; see `symmetric_noise`.

    Args:
        rate: share of relabelled examples, in [0, 1].
    """

    def __init__(self, rate: float) -> None:
        self.rate = _check_rate(rate)

    def __call__(self, labels: Labels, rows: Labels, all_labels: Labels, num_classes: int, rng: RandomState) -> Labels:
        """As in `LabelNoise`."""
        return symmetric_noise(labels, self.rate, num_classes, rng)


class Asymmetric(LabelNoise):
    """Class-dependent noise of CIFAR-10 or CIFAR-100; see `asymmetric_noise_cifar10` and `..._cifar100`.

    Args:
        rate: flipping probability, in [0, 1].
        in_place: CIFAR-10 only; True is the official rule, False maps the clean labels.
    """

    def __init__(self, rate: float, in_place: bool = True) -> None:
        self.rate = _check_rate(rate)
        self.in_place = in_place

    def __call__(self, labels: Labels, rows: Labels, all_labels: Labels, num_classes: int, rng: RandomState) -> Labels:
        """As in `LabelNoise`."""
        if num_classes == 10:
            return asymmetric_noise_cifar10(labels, self.rate, rng, self.in_place)
        if num_classes == 100:
            return asymmetric_noise_cifar100(labels, self.rate, RandomState(0))
        raise ValueError(
            f"data.noise: Asymmetric is defined for 10 or 100 classes (CIFAR), the data have {num_classes}"
        )


class Permuted(LabelNoise):
    """One permutation of all labels: nothing is left to learn, and the classes keep their sizes.

    Source: arXiv 2312.04823, official code (`wronglabel`).
    """

    def __call__(self, labels: Labels, rows: Labels, all_labels: Labels, num_classes: int, rng: RandomState) -> Labels:
        """As in `LabelNoise`."""
        return labels[rng.permutation(len(labels))]


class Human(LabelNoise):
    """Human labels of CIFAR-N; see `human_labels`.

    Args:
        path: the `.pt` file.
        key: which labels of the file.
    """

    def __init__(self, path: str, key: str) -> None:
        self.path = path
        self.key = key

    def __call__(self, labels: Labels, rows: Labels, all_labels: Labels, num_classes: int, rng: RandomState) -> Labels:
        """As in `LabelNoise`."""
        return human_labels(self.path, self.key, all_labels, num_classes)[rows]


def _check_rate(rate: float) -> float:
    if not 0 <= rate <= 1:
        raise ValueError(f"noise.rate must be in [0, 1], got {rate}")
    return rate


def _ceil_share(rate: float, count: int) -> int:
    """ceil(rate * count), as `math.ceil` of the float product in the official code."""
    return int(np.ceil(rate * count))
