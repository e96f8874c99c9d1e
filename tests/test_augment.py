"""Batched augmentation against per-image definitions."""

import pytest
import torch
from torch import Tensor
from torchvision.transforms import functional as tv

from datamodules.augment import center_crop, normalize, random_crop, random_flip


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(count: int = 64, channels: int = 3, height: int = 8, width: int = 8) -> Tensor:
    return torch.randint(1, 256, (count, channels, height, width), dtype=torch.uint8, generator=generator(1))


def test_each_image_becomes_one_window_of_its_padded_picture() -> None:
    images = pictures(16)
    padded = torch.nn.functional.pad(images, (2,) * 4)
    for crop, picture in zip(random_crop(images, 8, 2, generator()), padded, strict=True):
        windows = [picture[:, y : y + 8, x : x + 8] for y in range(5) for x in range(5)]
        assert sum(torch.equal(crop, window) for window in windows) == 1


def test_every_window_is_equally_likely() -> None:
    """One bright pixel shows the offset: 9 windows, 9,000 draws, so 1,000 each with a standard deviation of 30."""
    images = torch.zeros(9000, 1, 3, 3, dtype=torch.uint8)
    images[:, :, 1, 1] = 1
    positions = random_crop(images, 3, 1, generator()).flatten(1).int().argmax(1)
    assert (positions.bincount(minlength=9) - 1000).abs().max() < 150


def test_crop_of_a_wide_picture_without_padding() -> None:
    images = pictures(8, height=4, width=9)
    for crop, picture in zip(random_crop(images, 4, 0, generator()), images, strict=True):
        assert any(torch.equal(crop, picture[:, :, x : x + 4]) for x in range(6))


def test_crop_of_the_whole_picture_changes_nothing() -> None:
    images = pictures()
    assert torch.equal(random_crop(images, 8, 0, generator()), images)


def test_crop_is_a_function_of_its_generator() -> None:
    images = pictures()
    assert torch.equal(random_crop(images, 8, 2, generator(5)), random_crop(images, 8, 2, generator(5)))


def test_flip_mirrors_left_and_right_only() -> None:
    images = pictures()
    for flipped, picture in zip(random_flip(images, generator()), images, strict=True):
        assert torch.equal(flipped, picture) or torch.equal(flipped, picture.flip(-1))


def test_half_of_the_pictures_is_flipped() -> None:
    """4,000 draws: standard deviation of the share is 0.8 %."""
    images = torch.tensor([0, 1], dtype=torch.uint8).expand(4000, 1, 1, 2)
    share = random_flip(images, generator())[:, 0, 0, 0].float().mean()
    assert float(share) == pytest.approx(0.5, abs=0.03)


def test_flip_is_a_function_of_its_generator() -> None:
    images = pictures()
    assert torch.equal(random_flip(images, generator(5)), random_flip(images, generator(5)))


def test_input_is_kept() -> None:
    images = pictures()
    before = images.clone()
    random_flip(random_crop(images, 8, 2, generator()), generator())
    normalize(images, torch.full((3,), 0.5), torch.full((3,), 0.25))
    assert torch.equal(images, before)


@pytest.mark.parametrize("size", [3, 4, 5, 8])
def test_center_crop_equals_torchvisions(size: int) -> None:
    images = pictures(height=9)
    assert torch.equal(center_crop(images, size), tv.center_crop(images, [size, size]))


def test_normalize_equals_torchvisions() -> None:
    images, mean, std = pictures(), [0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]
    expected = tv.normalize(images.float() / 255, mean, std)
    torch.testing.assert_close(normalize(images, torch.tensor(mean), torch.tensor(std)), expected, rtol=1e-5, atol=1e-5)


def test_random_crop_beyond_the_padded_picture_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.crop 13 exceeds the padded image of 12 x 12 pixels"):
        random_crop(pictures(), 13, 2, generator())


def test_center_crop_beyond_the_picture_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.crop 9 exceeds the image of 8 x 8 pixels"):
        center_crop(pictures(), 9)
