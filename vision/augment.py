"""Augmentation of image batches where they lie, each image of a batch with random draws of its own.

Pure functions: (B, C, H, W) in, a new batch of the same shape, dtype and device out (mixup: float images and
soft labels). Where they differ from their papers is said in each. The `torch.Generator` may be on the CPU,
which gives the same draws on every device, or on the images' device, which spares the copy.
"""

import functools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Generator, Tensor


def random_crop(images: Tensor, padding: int, generator: Generator) -> Tensor:
    """Pad with `padding` zeros on each side and crop the old size anywhere, all offsets equally likely.

    The augmentation of CIFAR since "Deeply-Supervised Nets" (Lee et al. 2014, 1409.5185) and "Deep Residual
    Learning for Image Recognition" (He et al. 2015, 1512.03385, section 4.2), with 4 pixels.
    """
    _check(images, padding=padding)
    return _random_window(F.pad(images, (padding,) * 4), images.shape, generator)


def random_shift(images: Tensor, pixels: int, generator: Generator) -> Tensor:
    """Shift by up to `pixels` both ways, whole pixels, all equally likely; the border's pixels are repeated.

    From "Image Augmentation Is All You Need" (DrQ, Kostrikov et al. 2020, 2004.13649), with 4 pixels on
    84x84. All channels move together: a stack of frames stays aligned.
    """
    _check(images, pixels=pixels)
    height, width = images.shape[2:]
    # Not F.pad's mode "replicate", which does not take every dtype on every device.
    rows = torch.arange(-pixels, height + pixels, device=images.device).clamp(0, height - 1)
    columns = torch.arange(-pixels, width + pixels, device=images.device).clamp(0, width - 1)
    padded = images.index_select(2, rows).index_select(3, columns)
    return _random_window(padded, images.shape, generator)


def random_flip(images: Tensor, generator: Generator) -> Tensor:
    """Mirror left and right with probability 1/2 ("ImageNet Classification with Deep Convolutional Neural
    Networks", Krizhevsky et al. 2012, section 4.1)."""
    _check(images)
    flipped = _draw(2, len(images), generator, images.device).bool()
    return torch.where(flipped[:, None, None, None], images.flip(3), images)


def cutout(images: Tensor, size: int, generator: Generator) -> Tensor:
    """Set a square of `size` x `size` pixels to zero in all channels; its centre is anywhere in the image, so
    that it may stick out over the border.

    From "Improved Regularization of Convolutional Neural Networks with Cutout" (DeVries and Taylor 2017,
    1708.04552), with 16 pixels on CIFAR-10. Where we deviate: an odd size is that size, which in
    the authors' code is one less.
    """
    _check(images, size=size)
    inside = []
    for length in images.shape[2:]:
        first = _draw(length, len(images), generator, images.device)[:, None] - size // 2
        position = torch.arange(length, device=images.device)
        inside.append((position >= first) & (position < first + size))  # (B, length)
    rows, columns = inside
    hole = rows[:, None, :, None] & columns[:, None, None, :]  # (B, 1, H, W)
    return images.masked_fill(hole, 0)


def mixup(
    images: Tensor, labels: Tensor, num_classes: int, alpha: float, generator: Generator
) -> tuple[Tensor, Tensor]:
    """Mix each image with a partner from the batch, and their labels by the same share.

    From "mixup: Beyond Empirical Risk Minimization" (Zhang et al. 2017, 1710.09412, section 2); the partners
    are a permutation of the batch. Where we deviate: the share is drawn anew for each pair, as the paper has
    it, which in the authors' code is one for a batch.

    Args:
        images: (B, C, H, W), any dtype. Not scaled: 0 to 255 stays 0 to 255.
        labels: (B,) integers in [0, num_classes).
        num_classes: length of the soft labels.
        alpha: both parameters of the share's Beta distribution, greater than 0; the paper has 0.1 to 0.4 on
            ImageNet and 1 on CIFAR-10.
        generator: of the draws.

    Returns:
        Images (B, C, H, W) float32 and labels (B, num_classes) float32, whose rows sum to 1.
    """
    _check(images)
    if not alpha > 0:
        raise ValueError(f"alpha must be greater than 0, got {alpha!r}")
    if labels.shape != images.shape[:1]:
        raise ValueError(f"labels must be ({len(images)},), one an image, got {tuple(labels.shape)}")
    device = images.device
    share = _symmetric_beta(alpha, len(images), generator).to(device, torch.float32)  # (B,)
    partner = torch.randperm(len(images), generator=generator, device=generator.device).to(device)
    one_hot = (labels[:, None] == torch.arange(num_classes, device=device)).float()
    return (
        torch.lerp(images[partner].float(), images.float(), share[:, None, None, None]),
        torch.lerp(one_hot[partner], one_hot, share[:, None]),
    )


AUGMENTATIONS: dict[str, Callable[..., Tensor]] = {
    "crop:N": random_crop,
    "cutout:N": cutout,
    "flip": random_flip,
    "shift:N": random_shift,
}
"""What `make_augment` takes; N is a number of pixels."""


def make_augment(spec: str | Sequence[str]) -> Callable[[Tensor, Generator], Tensor]:
    """Augmentations by name, in order: `"crop:4,flip"`, or `["crop:4", "flip"]`; none changes nothing.

    Raises ValueError, with the list of names, for what is none of `AUGMENTATIONS`.

    >>> images = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    >>> make_augment("crop:4,flip")(images, torch.Generator()).shape
    torch.Size([2, 1, 8, 8])
    """
    names = [name for name in spec.split(",") if name] if isinstance(spec, str) else spec
    steps: list[Callable[[Tensor, Generator], Tensor]] = []
    for name in map(str.strip, names):
        kind, colon, number = name.partition(":")
        key = f"{kind}:N" if colon else kind
        if key not in AUGMENTATIONS or (colon and not (number.isdecimal() and int(number) > 0)):
            raise ValueError(
                f"augmentation {name!r} is none of {', '.join(AUGMENTATIONS)} (N: pixels, 1 or more)"
            )
        function = AUGMENTATIONS[key]
        steps.append(functools.partial(_with_pixels, function, int(number)) if colon else function)

    def augment(images: Tensor, generator: Generator) -> Tensor:
        for step in steps:
            images = step(images, generator)
        return images

    return augment


def _with_pixels(
    function: Callable[..., Tensor], pixels: int, images: Tensor, generator: Generator
) -> Tensor:
    return function(images, pixels, generator)


def _check(images: Tensor, **pixels: int) -> None:
    if images.ndim != 4:
        raise ValueError(f"images must be (B, C, H, W), got shape {tuple(images.shape)}")
    for name, value in pixels.items():
        if value < 0:
            raise ValueError(f"{name} must be 0 or more, got {value!r}")


def _draw(high: int, count: int, generator: Generator, device: torch.device) -> Tensor:
    """(count,) int64 in [0, high)."""
    return torch.randint(high, (count,), generator=generator, device=generator.device).to(device)


def _random_window(padded: Tensor, shape: torch.Size, generator: Generator) -> Tensor:
    """(B, C, H + a, W + b) -> (B, C, H, W), a window of each image, every place equally likely."""
    batch, channels, height, width = shape
    rows, columns = padded.shape[2:]
    device = padded.device
    top = _draw(rows - height + 1, batch, generator, device)
    left = _draw(columns - width + 1, batch, generator, device)
    # Every run of `width` pixels is a row of an overlapping view of the flat pixels. Choosing among these
    # copies whole rows, which is two to three times as fast as gathering pixels.
    first = torch.arange(batch * channels, device=device).view(batch, channels, 1) * rows
    row = first + top[:, None, None] + torch.arange(height, device=device)  # (B, C, H)
    start = row * columns + left[:, None, None]
    return padded.flatten().unfold(0, width, 1).index_select(0, start.flatten()).view(shape)


def _symmetric_beta(alpha: float, count: int, generator: Generator) -> Tensor:
    """(count,) float64 draws of Beta(alpha, alpha), for any alpha, on the generator's device.

    Exact, from two uniform numbers a draw: t is Student's with 2 alpha degrees of freedom ("Polar Generation
    of Random Variates with the t-Distribution", Bailey 1994), and (1 + t / sqrt(2 alpha + t^2)) / 2 is the
    Beta ("Random Variate Generation in One Line", Devroye 1996). torch's own takes no generator.
    """
    uniform = torch.rand(2, count, generator=generator, device=generator.device, dtype=torch.float64)
    radius = uniform[0] ** (1 / alpha)  # 0 where alpha is tiny: the share is then 0 or 1
    cosine = torch.cos(2 * math.pi * uniform[1])
    squared = (1 - radius) * cosine**2
    return (1 + cosine.sign() * torch.sqrt(squared / (radius + squared))) / 2
