"""Glimpses: the pixels are those of a plain loop at every size, scale and border; pictures show them."""

import numpy as np
import pytest
import torch

from foveal.vision.fixations import OPEN, boxes, draw_fixations, margin, zoom_of
from foveal.vision.glimpse import GlimpseEncoder, framed, glimpse, look

LOCATIONS = [(-1.0, -1.0), (0.0, 0.0), (1.0, 1.0), (-1.0, 1.0), (1.0, 0.0), (0.31, -0.77), (-0.999, 0.5)]


def by_loops(image: np.ndarray, location, patch: int, scales: int, background: float) -> np.ndarray:
    """A glimpse of one image (C, H, W), pixel by pixel, in float64."""
    channels, height, width = image.shape
    seen = np.empty((scales, channels, patch, patch))
    for scale in range(scales):
        side, step = patch * 2**scale, 2**scale
        left = int(np.floor((location[0] + 1) / 2 * width - (side - 1) / 2))
        top = int(np.floor((location[1] + 1) / 2 * height - (side - 1) / 2))
        for channel in range(channels):
            for row in range(patch):
                for column in range(patch):
                    total = 0.0
                    for y in range(top + row * step, top + (row + 1) * step):
                        for x in range(left + column * step, left + (column + 1) * step):
                            inside = 0 <= y < height and 0 <= x < width
                            total += image[channel, y, x] if inside else background
                    seen[scale, channel, row, column] = total / step**2
    return seen.reshape(scales * channels, patch, patch)


@pytest.mark.parametrize("patch", range(1, 10))
@pytest.mark.parametrize("scales", [1, 2, 3])
def test_pixels_are_those_of_a_plain_loop(patch, scales):
    torch.manual_seed(patch)
    images = torch.randint(0, 256, (len(LOCATIONS), 2, 11, 14), dtype=torch.uint8)
    seen = glimpse(images, torch.tensor(LOCATIONS), patch, scales, background=7)
    assert seen.dtype == torch.float32
    for image, location, one in zip(images, LOCATIONS, seen):
        expected = by_loops(image.numpy(), np.array(location, np.float32), patch, scales, 7)
        np.testing.assert_array_equal(one.numpy(), expected)  # means of 8-bit integers are exact in float32


@pytest.mark.parametrize("patch", [3, 8])
@pytest.mark.parametrize("scales", [1, 3])
def test_padding_equals_the_background(patch, scales):
    images = torch.full((len(LOCATIONS), 1, 9, 9), 0.3)
    seen = glimpse(images, torch.tensor(LOCATIONS), patch, scales, background=0.3)
    torch.testing.assert_close(seen, torch.full_like(seen, 0.3))
    differs = glimpse(images, torch.tensor(LOCATIONS), patch, scales)[0]
    assert differs.min() == 0  # half of it is outside


def test_one_image_is_seen_as_it_is_among_others():
    images = torch.randint(0, 256, (5, 1, 12, 12), dtype=torch.uint8)
    where = 2 * torch.rand(5, 2) - 1
    together = glimpse(images, where, 5, 2)
    for i in range(5):
        assert torch.equal(glimpse(images[i : i + 1], where[i : i + 1], 5, 2)[0], together[i])
    assert torch.equal(look(framed(images, 5, 2), where, 5, 2), together)


def test_scales_share_a_centre():
    """A single bright pixel in the middle of an even patch's four lies in the same quarter of all scales."""
    image = torch.zeros(1, 1, 16, 16)
    image[0, 0, 8, 7] = 64
    seen = glimpse(image, torch.zeros(1, 2), 4, 3)[0]
    assert [tuple(part.nonzero()[0].tolist()) for part in seen] == [(2, 1)] * 3
    assert seen.amax((1, 2)).tolist() == [64, 16, 4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patch": 13}, "patch must be from 1 to the shorter side of the 12x14 canvas, got 13"),
        ({"patch": 0}, "patch must be from 1"),
        ({"scales": 0}, "scales must be 1 or more, got 0"),
        ({"locations": torch.zeros(3, 2)}, r"locations must be \(2, 2\), one an image, got \(3, 2\)"),
    ],
)
def test_what_cannot_be_seen_is_refused(arguments, message):
    settings = {"locations": torch.zeros(2, 2), "patch": 4, "scales": 1, **arguments}
    with pytest.raises(ValueError, match=message):
        glimpse(torch.zeros(2, 1, 12, 14), **settings)


def test_encoder_combines_what_and_where():
    encoder = GlimpseEncoder(9, features_dim=7)
    seen, where = torch.rand(4, 1, 3, 3), 2 * torch.rand(4, 2) - 1
    features = encoder(seen, where)
    assert features.shape == (4, 7)
    with torch.no_grad():
        expected = encoder.what(3 * seen.flatten(1)).relu() * encoder.where(where).relu()
    assert expected.any()
    torch.testing.assert_close(features, expected)
    torch.testing.assert_close(encoder(seen[:1], where[:1])[0], features[0])


@pytest.mark.parametrize(("patch", "scales"), [(5, 1), (6, 2)])
def test_boxes_drawn_are_the_pixels_seen(patch, scales):
    """The last box's outline is found in the picture; what lies in it is the glimpse."""
    rng = np.random.default_rng(0)
    canvas = rng.integers(0, 256, (1, 20, 24)).astype(np.uint8)
    zoom, m = zoom_of(canvas), margin(canvas, patch, scales)
    where = np.array([(0.3, 0.1), (-0.2, -0.4), (0.5, 0.35)], np.float32)
    for t in range(1, 4):
        picture = draw_fixations(canvas, 255, where[:t], patch, scales)
        seen = glimpse(torch.from_numpy(canvas)[None], torch.from_numpy(where[t - 1 : t]), patch, scales)
        ys, xs = np.nonzero((picture == OPEN).all(-1))
        left, top, right, bottom = xs.min(), ys.min(), xs.max() + 1, ys.max() + 1
        side = patch << (scales - 1)  # the outermost box
        assert (right - left, bottom - top) == (side * zoom, side * zoom)
        first = (np.array([left, top]) - m) // zoom
        assert ((np.array([left, top]) - m) % zoom == 0).all()
        part = canvas[0, first[1] : first[1] + side, first[0] : first[0] + side].astype(np.float64)
        step = 1 << (scales - 1)
        means = part.reshape(patch, step, patch, step).mean((1, 3))
        np.testing.assert_array_equal(means, seen[0, -1].numpy())
        expected = boxes(torch.from_numpy(where[:t]), patch, scales, (20, 24))[-1, -1]
        np.testing.assert_array_equal(expected[:2], first)
    # The canvas itself is there, pixel for pixel, but for what is drawn over it.
    inner = picture[m:-m, m:-m][zoom // 2 :: zoom, zoom // 2 :: zoom]
    same = (inner == canvas[0][..., None]).all(-1)
    assert same.mean() > 0.8
