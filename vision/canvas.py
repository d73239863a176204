"""The tasks of "Recurrent Models of Visual Attention" (Mnih et al. 2014, 1406.6247, section 4.1), made of any
data set: images somewhere on a larger canvas, alone (translated) or among pieces of others (cluttered).
"""

from dataclasses import replace

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view

from .datasets import Dataset
from .readers import Split

PIECE = 8
"""Side of a piece of clutter in pixels, the paper's."""


def on_canvas(
    dataset: Dataset,
    side: int,
    seed: int = 0,
    pieces: int = 0,
    piece: int = PIECE,
    canvases: int = 60_000,
    background: int = 0,
) -> Dataset:
    """The same data set with every image at a random place of a canvas of `side` x `side` pixels.

    The paper places its training images anew each time one is shown. Here that is done once, as often as
    makes `canvases` of them: each image lies on as many, give or take one. Validation and test images are
    placed once each; where the test images lie does not depend on the seed.

    Args:
        side: of the canvas in pixels, no less than the images'.
        seed: of everything random, 0 or more.
        pieces: squares from other images of the same split, each from a random place of a random one, at
            random places of the canvas. Where things overlap the value farther from the background is seen.
        piece: their side in pixels, no more than the images'.
        canvases: of the training split; never less than its images.
        background: value of the empty canvas, in the images' units.

    Raises ValueError for whatever of these cannot be.
    """
    height, width = dataset.space.shape[1:]
    if side < max(height, width):
        raise ValueError(
            f"canvas must be {max(height, width)} pixels or more, to hold the images of {height}x{width}, "
            f"got {side}"
        )
    if not 0 <= background <= dataset.high:
        raise ValueError(f"background must be from 0 to {dataset.high}, got {background}")
    if pieces < 0:
        raise ValueError(f"clutter_pieces must be 0 or more, got {pieces}")
    if pieces and not 1 <= piece <= min(height, width):
        raise ValueError(f"clutter_size must be from 1 to {min(height, width)}, the images', got {piece}")
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, got {seed}")

    def placed(split: Split, count: int, stream: int, seed: int) -> Split:
        draws = np.random.PCG64(np.random.SeedSequence((seed, stream)))
        return place(split, max(count, len(split)), side, draws, pieces, piece, background)

    return replace(
        dataset,
        train=placed(dataset.train, canvases, 0, seed),
        validation=placed(dataset.validation, 0, 1, seed),
        test=placed(dataset.test, 0, 2, 0),
    )


def place(
    split: Split,
    count: int,
    side: int,
    draws: np.random.PCG64,
    pieces: int = 0,
    piece: int = PIECE,
    background: int = 0,
) -> Split:
    """`count` canvases (count, C, side, side), the images on them in turn: the n-th holds image n modulo
    their number, whose label it has."""
    images = split.images.cpu().numpy()
    canvas = np.full((count, images.shape[1], side, side), background, np.uint8)
    if not len(images):
        return Split(torch.from_numpy(canvas[:0]), split.labels)

    def random(below: int) -> np.ndarray:
        # NumPy promises that a bit generator's integers stay the same for ever; of integers() it does not.
        return (draws.random_raw(count) % np.uint64(below)).astype(np.int64)

    def put(what: np.ndarray) -> None:
        """Lay squares (count, C, h, w) on the canvases, each at a random place."""
        high, wide = what.shape[2:]
        rows, columns = random(side - high + 1), random(side - wide + 1)
        windows = sliding_window_view(canvas, (high, wide), axis=(2, 3), writeable=True)
        at = (np.arange(count), slice(None), rows, columns)
        before = windows[at]
        farther = distance(what) > distance(before)
        windows[at] = np.where(farther, what, before)

    def distance(values: np.ndarray) -> np.ndarray:
        return np.abs(values.astype(np.int16) - background)

    which = np.arange(count) % len(images)
    put(images[which])
    if pieces:
        cuts = sliding_window_view(images, (piece, piece), axis=(2, 3))
        for _ in range(pieces):
            # Another image than the one on the canvas, where there is another.
            other = (which + 1 + random(max(1, len(images) - 1))) % len(images)
            rows, columns = (random(length - piece + 1) for length in images.shape[2:])
            put(cuts[other, :, rows, columns])
    labels = split.labels.cpu()[torch.from_numpy(which)]
    return Split(torch.from_numpy(canvas), labels)


def clutter_pieces(side: int) -> int:
    """The paper's number of pieces, 4 on a canvas of 60x60 and 8 on one of 100x100, and in between."""
    return max(1, round(side / 10) - 2)
