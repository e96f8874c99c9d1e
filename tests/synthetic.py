"""Random pictures of any shape, for tests of recipes whose data are not at hand."""

import torch

from datamodules.sources import ImageSets, ImageSource


class SyntheticImages(ImageSource):
    """Random uint8 pictures with balanced labels.

    Args:
        num_classes, channels, size: shape of the data set that a recipe expects.
        per_class: training images per class; half as many for test (and validation).
        official_val: whether there is an official validation set.
    """

    def __init__(
        self, num_classes: int, channels: int = 3, size: int = 32, per_class: int = 10, official_val: bool = False
    ) -> None:
        self.num_classes = num_classes
        self.channels = channels
        self.size = size
        self.per_class = per_class
        self.official_val = official_val

    def read(self) -> ImageSets:
        """As in `ImageSource`."""
        generator = torch.Generator().manual_seed(0)

        def part(per_class: int) -> tuple[torch.Tensor, torch.Tensor]:
            labels = torch.arange(self.num_classes * per_class) % self.num_classes
            shape = (len(labels), self.channels, self.size, self.size)
            noise = torch.randint(0, 128, shape, dtype=torch.uint8, generator=generator)
            # the class shows in the brightness, so that a few steps can learn it
            return noise + (labels * 127 // self.num_classes).to(torch.uint8)[:, None, None, None], labels

        train, test = part(self.per_class), part(max(1, self.per_class // 2))
        val = part(max(1, self.per_class // 2)) if self.official_val else (None, None)
        return ImageSets(*train, *test, self.num_classes, *val)
