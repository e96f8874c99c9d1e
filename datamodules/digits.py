"""Handwritten digits of 8 x 8 pixels: the smallest real pictures, for runs of many steps."""

import numpy as np
import torch

from datamodules.sources import ImageSets, ImageSource


class Digits(ImageSource):
    """1,797 grey 8 x 8 digits that scikit-learn carries along, as pixels 0, 15, ..., 240.

    With `data.mean [0.0]` and `data.std [0.9411764705882353]` (240 / 255) pixels lie in [0, 1].

    Args:
        num_train, num_test: examples; the rest is the validation set.
        split_seed: of NumPy's permutation: first the training, then the test examples.
    """

    def __init__(self, num_train: int = 400, num_test: int = 400, split_seed: int = 0) -> None:
        self.num_train = num_train
        self.num_test = num_test
        self.split_seed = split_seed

    def read(self) -> ImageSets:
        """As in `ImageSource`."""
        from sklearn.datasets import load_digits

        digits = load_digits()
        if self.num_train < 1 or self.num_test < 1 or self.num_train + self.num_test >= len(digits.target):
            raise ValueError(
                f"data.source.num_train and num_test must be positive and leave some of {len(digits.target)} digits to "
                f"validate on, got {self.num_train} and {self.num_test}"
            )
        order = np.random.RandomState(self.split_seed).permutation(len(digits.target))
        images = torch.from_numpy((15 * digits.images[order]).astype(np.uint8))[:, None]
        labels = torch.from_numpy(digits.target[order]).long()
        sizes = [self.num_train, self.num_test, len(labels) - self.num_train - self.num_test]
        (train, test, val), (train_y, test_y, val_y) = images.split(sizes), labels.split(sizes)
        return ImageSets(train, train_y, test, test_y, 10, val, val_y)
