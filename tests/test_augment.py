"""Augmentation: every image against a naive loop over what is allowed, and how often each outcome comes."""

import numpy as np
import pytest
import torch

from foveal.vision.augment import (
    AUGMENTATIONS,
    _symmetric_beta,
    cutout,
    make_augment,
    mixup,
    random_crop,
    random_flip,
    random_shift,
)

stats = pytest.importorskip("scipy.stats")  # comes with scikit-learn
LIKELY = 1e-3
"""Chi-square and Kolmogorov-Smirnov tests must not find less than this; seeds are fixed."""


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(count, channels=3, height=7, width=9):
    return torch.randint(1, 256, (count, channels, height, width), dtype=torch.uint8, generator=seeded(1))


def windows(image, pad, mode):
    """Every window of an image, padded by NumPy: {(top, left): (C, H, W)}."""
    padded = np.pad(image.numpy(), ((0, 0), (pad, pad), (pad, pad)), mode=mode)
    _, height, width = image.shape
    places = [(y, x) for y in range(2 * pad + 1) for x in range(2 * pad + 1)]
    return {(y, x): padded[:, y : y + height, x : x + width] for y, x in places}


@pytest.mark.parametrize(("augment", "mode"), [(random_crop, "constant"), (random_shift, "edge")])
@pytest.mark.parametrize("pad", [0, 1, 3])
def test_crop_and_shift_give_a_window_of_each_image(augment, mode, pad):
    images = noise(40)
    out = augment(images, pad, seeded())
    assert (out.dtype, out.shape, out.is_contiguous()) == (torch.uint8, images.shape, True)
    seen = set()
    for image, result in zip(images, out.numpy()):
        (place,) = [at for at, window in windows(image, pad, mode).items() if np.array_equal(window, result)]
        seen.add(place)
    assert len(seen) > 3 * pad, "each image has a draw of its own"


@pytest.mark.parametrize("augment", [random_crop, random_shift])
def test_offsets_are_uniform_and_independent(augment):
    image = torch.zeros(1, 1, 8, 6, dtype=torch.uint8)
    image[0, 0, 4, 3] = 1  # still inside after a shift by up to 2
    out = augment(image.expand(5000, -1, -1, -1), 2, seeded())
    at = out.flatten(1).int().argmax(1)
    counts = np.zeros((5, 5))
    np.add.at(counts, (at // 6 - 2, at % 6 - 1), 1)
    assert stats.chisquare(counts.ravel()).pvalue > LIKELY


def test_flip_mirrors_half_of_the_images():
    images = noise(400)
    out = random_flip(images, seeded())
    flipped = [torch.equal(result, image.flip(-1)) for image, result in zip(images, out)]
    kept = [torch.equal(result, image) for image, result in zip(images, out)]
    assert [a != b for a, b in zip(flipped, kept)] == [True] * 400
    assert stats.binomtest(sum(flipped), 400).pvalue > LIKELY
    assert out.dtype == torch.uint8


def hole(image, y, x, size):
    """The image with a square of zeros whose centre is (y, x)."""
    result = image.clone()
    top, left = y - size // 2, x - size // 2
    result[:, max(top, 0) : max(top + size, 0), max(left, 0) : max(left + size, 0)] = 0
    return result


@pytest.mark.parametrize("size", [0, 1, 3, 4])
def test_cutout_is_a_square_with_its_centre_in_the_image(size):
    images = noise(40)
    out = cutout(images, size, seeded())
    assert out.dtype == torch.uint8
    seen = set()
    for image, result in zip(images, out):
        found = [(y, x) for y in range(7) for x in range(9) if torch.equal(hole(image, y, x, size), result)]
        assert len(found) == (1 if size else 63)
        seen.add(found[0])
    assert len(seen) > 20 or size == 0


def test_cutout_centres_are_uniform():
    out = cutout(torch.ones(6400, 1, 8, 8, dtype=torch.uint8), 3, seeded())
    holes = {
        hole(torch.ones(1, 8, 8, dtype=torch.uint8), y, x, 3).numpy().tobytes(): 0
        for y in range(8)
        for x in range(8)
    }
    assert len(holes) == 64
    for image in out.numpy():
        holes[image.tobytes()] += 1
    assert stats.chisquare(list(holes.values())).pvalue > LIKELY


def test_mixup_mixes_pairs_and_their_labels_alike():
    images = noise(50)
    mixed, soft = mixup(images, torch.arange(50), 50, 1.0, seeded())
    assert mixed.dtype == soft.dtype == torch.float32
    shares, partners = [], []
    for i in range(50):
        share = soft[i, i].item()
        others = [j for j in range(50) if j != i and soft[i, j] > 0]
        partner = others[0] if others else i
        assert len(others) <= 1
        assert soft[i].sum().item() == pytest.approx(1)
        expected = share * images[i].double() + (1 - share) * images[partner].double()
        assert (mixed[i] - expected).abs().max() < 1e-3
        shares.append(share)
        partners.append(partner)
    assert sorted(partners) == list(range(50))
    _, other = mixup(images, torch.arange(50), 50, 1.0, seeded(2))
    assert not torch.equal(other > 0, soft > 0), "partners are drawn"
    assert len(set(shares)) > 40, "each pair has a share of its own"
    assert mixed.max() > 2, "not scaled"


@pytest.mark.parametrize("alpha", [0.2, 0.5, 1.0, 4.0])
def test_mixup_shares_are_beta(alpha):
    drawn = _symmetric_beta(alpha, 4000, seeded()).numpy()
    assert stats.kstest(drawn, stats.beta(alpha, alpha).cdf).pvalue > LIKELY


def test_tiny_alpha_mixes_nothing():
    drawn = _symmetric_beta(1e-6, 1000, seeded())
    assert set(drawn.tolist()) == {0.0, 1.0}
    assert 400 < drawn.sum() < 600


def every(images, generator):
    """The result of each augmentation."""
    return {
        **{
            name: make_augment(name.replace("N", "2"))(images, generator if generator else seeded(5))
            for name in AUGMENTATIONS
        },
        "mixup": mixup(images, torch.arange(len(images)), len(images), 0.4, generator or seeded(5))[0],
    }


def test_pure_and_fixed_by_the_generator():
    images = noise(16)
    before, state = images.clone(), torch.get_rng_state()
    first, again = every(images, None), every(images, None)
    assert torch.equal(images, before)
    assert torch.equal(torch.get_rng_state(), state), "no other random state moves"
    for name, result in first.items():
        assert torch.equal(result, again[name]), name
        assert not torch.equal(result.byte(), images), name
    generator = seeded(5)
    every(images, generator)
    for name, result in every(images, generator).items():
        assert not torch.equal(result, first[name]), f"{name}: the generator moved on"


def test_views_that_are_not_contiguous():
    images = noise(16)
    channels_last = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    for name, result in every(channels_last, None).items():
        assert torch.equal(result, every(images, None)[name]), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_same_draws_on_the_gpu():
    images = noise(16)
    for name, result in every(images.cuda(), None).items():
        assert result.device.type == "cuda"
        torch.testing.assert_close(result.cpu(), every(images, None)[name])
    assert random_crop(images.cuda(), 2, torch.Generator("cuda").manual_seed(0)).shape == images.shape


@pytest.mark.parametrize("spec", ["flip, crop:2,cutout:3", ["flip", "crop:2", "cutout:3"]])
def test_named_augmentations_run_in_order(spec):
    images, generator = noise(8), seeded()
    expected = cutout(random_crop(random_flip(images, generator), 2, generator), 3, generator)
    assert torch.equal(make_augment(spec)(images, seeded()), expected)


@pytest.mark.parametrize("spec", ["", []])
def test_no_augmentation_changes_nothing(spec):
    images = noise(8)
    assert torch.equal(make_augment(spec)(images, seeded()), images)


@pytest.mark.parametrize(
    "spec", ["crp:4", "crop", "crop:", "crop:0", "crop:-1", "crop:x", "flip:2", "flip,,x"]
)
def test_unknown_names_are_refused_with_the_list(spec):
    with pytest.raises(ValueError, match="is none of crop:N, cutout:N, flip, shift:N") as error:
        make_augment(spec)
    assert "\n" not in str(error.value)
    assert repr(spec.split(",")[-1]) in str(error.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: random_crop(noise(2)[0], 1, seeded()),
            r"images must be \(B, C, H, W\), got shape \(3, 7, 9\)",
        ),
        (lambda: random_flip(noise(2)[0], seeded()), r"images must be \(B, C, H, W\)"),
        (lambda: random_crop(noise(2), -1, seeded()), "padding must be 0 or more, got -1"),
        (lambda: random_shift(noise(2), -2, seeded()), "pixels must be 0 or more, got -2"),
        (lambda: cutout(noise(2), -3, seeded()), "size must be 0 or more, got -3"),
        (lambda: mixup(noise(2), torch.arange(2), 2, 0.0, seeded()), "alpha must be greater than 0, got 0.0"),
        (lambda: mixup(noise(2), torch.arange(3), 3, 1.0, seeded()), r"labels must be \(2,\), .* got \(3,\)"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
