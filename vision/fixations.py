"""Pictures of where a canvas was looked at: the boxes drawn are the pixels that glimpses consist of."""

from collections.abc import Sequence

import numpy as np
import torch

from .glimpse import patch_corners

RIGHT, WRONG, OPEN = (52, 199, 89), (255, 69, 58), (255, 196, 61)
"""Colours of boxes: the answer is right, it is wrong, there is none yet."""
OUTSIDE = (44, 48, 56)
ZOOM_TO = 240
"""Pictures are enlarged until their shorter side has so many pixels or more."""


def boxes(locations: torch.Tensor, patch: int, scales: int, size: tuple[int, int]) -> np.ndarray:
    """The pixels of glimpses at `locations` (T, 2) of a canvas of `size` (H, W): int64 (T, scales, 4), left,
    top, right, bottom, the last two exclusive; parts of it may lie outside."""
    sides = [patch << scale for scale in range(scales)]
    corners = torch.stack([patch_corners(locations, side, size) for side in sides], 1)  # (T, scales, 2)
    return torch.cat([corners, corners + torch.tensor(sides)[:, None]], -1).numpy()


def zoom_of(canvas: np.ndarray) -> int:
    """How many pixels of the picture a pixel of the canvas is wide: 3 or more, so that a box one pixel thin
    leaves the middle of every one free."""
    return max(3, -(-ZOOM_TO // min(canvas.shape[1:])))


def draw_fixations(
    canvas: np.ndarray,
    high: float,
    locations: Sequence[np.ndarray] | np.ndarray,
    patch: int,
    scales: int = 1,
    color: tuple[int, int, int] = OPEN,
) -> np.ndarray:
    """A canvas (C, H, W) with the glimpses at `locations` (T, 2), in order, as (H', W', 3) uint8.

    The canvas is enlarged by `zoom_of` and framed, since boxes may stick out: its upper left corner lies at
    (m, m), where m is `margin`. The last glimpse has a box for each of its scales in `color`; those before
    it one box for their finest, faint; a line goes from centre to centre.
    """
    from PIL import Image, ImageDraw

    zoom, m = zoom_of(canvas), margin(canvas, patch, scales)
    pixels = np.rint(canvas.astype(np.float64) * (255 / high)).astype(np.uint8)
    rgb = np.moveaxis(pixels if len(pixels) == 3 else pixels[:1].repeat(3, 0), 0, -1)
    rgb = rgb.repeat(zoom, 0).repeat(zoom, 1)
    framed = np.full((rgb.shape[0] + 2 * m, rgb.shape[1] + 2 * m, 3), OUTSIDE, np.uint8)
    framed[m:-m, m:-m] = rgb
    picture = Image.fromarray(framed)
    draw = ImageDraw.Draw(picture)
    where = torch.as_tensor(np.asarray(locations, np.float32)).view(-1, 2)
    all_boxes = boxes(where, patch, scales, canvas.shape[1:])
    faint = tuple(int(0.55 * part) for part in color)

    def outline(box: np.ndarray, ink: tuple[int, ...]) -> None:
        left, top, right, bottom = (int(edge) * zoom + m for edge in box)
        draw.rectangle((left, top, right - 1, bottom - 1), outline=ink)

    centres = [tuple(((box[:2] + box[2:]) / 2 * zoom + m).tolist()) for box in all_boxes[:, 0]]
    for before in all_boxes[:-1, 0]:
        outline(before, faint)
    if len(centres) > 1:
        draw.line(centres, fill=faint, width=1)
    for scale in range(scales):
        outline(all_boxes[-1, scale], color)
    x, y = centres[-1]
    draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill=color)
    return np.asarray(picture)


def margin(canvas: np.ndarray, patch: int, scales: int = 1) -> int:
    """Width of the frame around the enlarged canvas: half the largest patch, but at most a quarter of the
    canvas."""
    side = patch << (scales - 1)
    return max(1, min(side - side // 2, min(canvas.shape[1:]) // 4)) * zoom_of(canvas)
