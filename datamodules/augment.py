"""Batched augmentation on the device of the batch, with explicit generators. B batch, C channels, H, W pixels."""

import torch
import torch.nn.functional as F
from torch import Tensor


def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(B, C, H, W) uint8 -> float32 (x / 255 - mean) / std; mean and std are (C,) in units of the full scale."""
    scale = (1 / (255 * std)).view(-1, 1, 1)
    return images.float().mul_(scale).sub_((mean / std).view(-1, 1, 1))


def random_crop(images: Tensor, size: int, padding: int, generator: torch.Generator) -> Tensor:
    """Each image's own random (size, size) window of the zero-padded picture.

    Args:
        images: (B, C, H, W), any dtype; zeros pad the raw pixels, as torchvision's RandomCrop before normalisation.
        size: edge length of the window; H + 2 * padding and W + 2 * padding must reach it.
        padding: zeros on each side.
        generator: on the device of the images.
    """
    padded = F.pad(images, (padding,) * 4) if padding else images
    _, channels, height, width = padded.shape
    if min(height, width) < size:
        raise ValueError(f"data.crop {size} exceeds the padded image of {height} x {width} pixels")
    top = torch.randint(height - size + 1, (len(images),), generator=generator, device=images.device)
    left = torch.randint(width - size + 1, (len(images),), generator=generator, device=images.device)
    # each row of a window is `size` neighbouring elements: a view of all such runs, of which index_select copies whole
    # ones (a fifth of the time of an index over the windows)
    flat = padded.contiguous().view(-1)
    runs = flat.as_strided((flat.numel() - size + 1, size), (1, 1))
    plane = torch.arange(len(images) * channels, device=images.device).view(-1, channels, 1) * height
    row = plane + top.view(-1, 1, 1) + torch.arange(size, device=images.device)
    starts = row * width + left.view(-1, 1, 1)
    return runs.index_select(0, starts.view(-1)).view(-1, channels, size, size)


def center_crop(images: Tensor, size: int) -> Tensor:
    """The (size, size) window in the middle of (B, C, H, W) images."""
    _, _, height, width = images.shape
    if min(height, width) < size:
        raise ValueError(f"data.crop {size} exceeds the image of {height} x {width} pixels")
    top, left = round((height - size) / 2), round((width - size) / 2)
    return images[:, :, top : top + size, left : left + size]


def random_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirrors each image left-right with probability 1/2; (B, C, H, W), any dtype."""
    flip = torch.rand(len(images), generator=generator, device=images.device) < 0.5
    # picks whole pictures: a quarter of the time of torch.where on a CPU
    picked = torch.arange(len(images), device=images.device) + len(images) * flip
    return torch.cat([images, images.flip(-1)]).index_select(0, picked)
