"""Measures of samples: against closed forms, an independent computation, and the papers' definitions, pair by
pair."""

import numpy as np
import pytest
import torch
from scipy import linalg  # type: ignore[import-untyped]

from foveal.generative import metrics
from foveal.generative.metrics import (
    class_accuracy,
    class_shares,
    classifier_extractor,
    compare,
    digest_of,
    fid,
    kid,
    memorised,
    nearest,
    support,
)
from foveal.vision import Classifier, ClassifierConfig, Split, load_dataset


def normal(n: int, size: int, seed: int) -> torch.Tensor:
    return torch.randn(n, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exact(n: int, mean: torch.Tensor, root: torch.Tensor, seed: int) -> torch.Tensor:
    """(n, F) whose own mean and covariance are `mean` and root @ root.T, to rounding."""
    x = normal(n, len(mean), seed)
    x = x - x.mean(0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T
    return x @ root.T + mean


# FID


def test_fid_of_a_set_with_itself_is_0() -> None:
    x = normal(300, 20, 0)
    assert abs(fid(x, x)) < 1e-10
    assert abs(fid(1e3 * x, 1e3 * x[torch.randperm(300)])) < 1e-4


def test_fid_of_normal_sets_is_the_closed_form() -> None:
    mean = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    x = exact(50, mean, torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)), 0)
    y = exact(70, torch.zeros(3, dtype=torch.float64), torch.diag(torch.tensor([2.0, 2.0, 0.5]).double()), 1)
    # Where covariances commute: |m|^2 + the sum of the squared differences of standard deviations.
    assert fid(x, y) == pytest.approx(1 + 4 + 0.25 + 1 + 0 + 6.25, abs=1e-9)
    assert fid(y, x) == pytest.approx(fid(x, y), abs=1e-9)
    turn = torch.linalg.qr(normal(3, 3, 2)).Q
    assert fid(x @ turn, y @ turn) == pytest.approx(12.5, abs=1e-9)


def scipy_fid(x: np.ndarray, y: np.ndarray) -> float:
    s, t = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = linalg.sqrtm(s @ t)
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s + t - 2 * root.real))


def test_fid_is_that_of_an_independent_computation_on_a_classifiers_features(digits_judge) -> None:
    digits, judge = digits_judge
    extractor = classifier_extractor(judge)
    x = extractor(digits.test.images)
    noise = 3 * torch.randn(digits.test.images.shape, generator=torch.Generator().manual_seed(0))
    y = extractor((digits.test.images.float() + noise).clamp(0, 16).byte())
    alive = (x.std(0) > 0) & (y.std(0) > 0)  # others add nothing, and scipy's root wants regular matrices
    assert alive.sum() > 60
    ours, theirs = fid(x, y), scipy_fid(x[:, alive].numpy(), y[:, alive].numpy())
    assert theirs > 1
    assert abs(ours - theirs) < 1e-6 * theirs


def test_fid_is_refused_for_no_more_images_than_features() -> None:
    many, few = normal(100, 20, 0), normal(20, 20, 1)
    for pair in ((many, few), (few, many)):
        with pytest.raises(ValueError, match=r"more images than the extractor has features \(20\), got 20"):
            fid(*pair)
    assert fid(many, normal(21, 20, 1)) > 0


# KID


def test_kid_is_the_mean_over_pairs() -> None:
    x, y = normal(9, 4, 0), 0.5 + normal(7, 4, 1)

    def k(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a @ b / 4 + 1) ** 3)

    own = [np.mean([k(a, b) for i, a in enumerate(s) for j, b in enumerate(s) if i != j]) for s in (x, y)]
    across = np.mean([k(a, b) for a in x for b in y])
    assert kid(x, y) == pytest.approx(own[0] + own[1] - 2 * across, abs=1e-12)


def test_kid_has_no_bias_where_fid_has_one() -> None:
    draws = [(normal(60, 10, 2 * i), normal(60, 10, 2 * i + 1)) for i in range(60)]
    kids = np.array([kid(x, y) for x, y in draws])
    assert abs(kids.mean()) < 3 * kids.std() / 60**0.5
    assert np.mean([fid(x, y) for x, y in draws]) > 0.5


# Precision, recall, density, coverage


def by_definition(real: torch.Tensor, fake: torch.Tensor, k: int) -> dict[str, float]:
    def radius(s: torch.Tensor) -> list[float]:
        return [sorted(float((a - b).norm()) for b in s)[k] for a in s]

    of_real, of_fake = radius(real), radius(fake)
    near = [[float((r - f).norm()) for f in fake] for r in real]
    inside = [[near[i][j] <= of_real[i] for j in range(len(fake))] for i in range(len(real))]
    return {
        "precision": float(np.mean(np.any(inside, 0))),
        "recall": float(
            np.mean([any(near[i][j] <= r for j, r in enumerate(of_fake)) for i in range(len(real))])
        ),
        "density": float(np.sum(inside) / (k * len(fake))),
        "coverage": float(np.mean(np.any(inside, 1))),
    }


@pytest.mark.parametrize("k", [1, 3])
def test_support_is_as_defined(k: int, monkeypatch) -> None:
    monkeypatch.setattr(metrics, "CHUNK", 7)
    real, fake = normal(25, 3, 0), 0.7 * normal(31, 3, 1) + 1.5
    assert support(real, fake, k) == pytest.approx(by_definition(real, fake, k))
    assert 0 < support(real, fake, k)["recall"] < support(real, fake, k)["precision"] < 1


def test_support_tells_collapse_from_bad_pictures() -> None:
    real = normal(400, 4, 0)
    collapsed, scattered = (
        support(real, real[:5].repeat(60, 1) + 0.01, 3),
        support(real, 4 * normal(400, 4, 1), 3),
    )
    assert collapsed["precision"] > 0.9 > 0.1 > collapsed["recall"]
    assert scattered["precision"] < 0.5 < scattered["recall"]
    assert collapsed["coverage"] < 0.1
    same = support(real, normal(400, 4, 2), 5)
    assert same["density"] == pytest.approx(1, abs=0.15)
    assert same["coverage"] > 0.9


# Extractors


@pytest.fixture(scope="module")
def digits_judge():
    torch.manual_seed(0)
    digits = load_dataset("digits")
    config = ClassifierConfig(encoder="minatar", optimizer="adam", learning_rate=3e-3, batch_size=64)
    return digits, Classifier(digits.space, digits.classes, config, device="cpu").fit(digits, 4)


def test_features_are_what_the_last_layer_sees(digits_judge) -> None:
    digits, judge = digits_judge
    extractor = classifier_extractor(judge)
    features = extractor(digits.test.images, batch_size=100)
    assert features.shape == (360, extractor.size)
    assert features.dtype == torch.float64
    last = judge.network.head
    logits = features.float() @ last.weight.T + last.bias
    torch.testing.assert_close(logits, judge.scores(digits.test.images), rtol=1e-4, atol=1e-4)


def test_a_digest_is_of_the_weights(digits_judge) -> None:
    _, judge = digits_judge
    digest = classifier_extractor(judge).digest
    assert digest == digest_of(judge.weights())
    changed = {**judge.weights(), "head.bias": judge.weights()["head.bias"] + 1e-6}
    assert digest != digest_of(changed)


def test_a_result_says_what_it_was_measured_with(digits_judge) -> None:
    digits, judge = digits_judge
    extractor = classifier_extractor(judge)
    same = compare(digits.test.images, digits.test.images, extractor, "test")
    assert same["fid"] == pytest.approx(0, abs=1e-8)
    assert same["precision"] == same["recall"] == same["coverage"] == 1
    assert same["fid_images"] == [360, 360]
    assert same["fid_split"] == "test"
    assert same["fid_resize"] == "none"
    assert "minatar" in same["fid_extractor"]
    assert extractor.digest[:16] in same["fid_extractor"]
    with pytest.raises(ValueError, match="more images than the extractor has features"):
        compare(digits.test.images, digits.test.images[:50], extractor, "test")


def test_a_classifier_without_a_last_linear_layer_is_refused() -> None:
    digits = load_dataset("digits", size=32)
    judge = Classifier(digits.space, digits.classes, ClassifierConfig(backbone="nin"), device="cpu")
    with pytest.raises(ValueError, match="ends in a linear layer, got nin"):
        classifier_extractor(judge)


def test_classes_of_samples(digits_judge) -> None:
    digits, judge = digits_judge
    test = digits.test
    assert class_accuracy(test.images, test.labels, judge) == pytest.approx(1 - judge.evaluate(test).error)
    assert class_accuracy(test.images, (test.labels + 1) % 10, judge) < 0.1
    sevens = test.images[judge.predict(test.images) == 7]
    assert class_shares(sevens, judge).tolist() == [0.0] * 7 + [1.0, 0.0, 0.0]


# Memorisation


def test_nearest_images() -> None:
    digits = load_dataset("digits")
    images = digits.train.images[[5, 1200]].clone()
    images[1, 0, 0, 0] += 8
    apart, index = nearest(images, digits.train.images)
    assert index.tolist() == [5, 1200]
    assert apart.tolist() == pytest.approx([0, 1.0])  # root of 8^2 / 64


def test_copies_are_told_from_new_images() -> None:
    digits = load_dataset("digits")
    copies = memorised(digits.train.images[:100], digits.test, digits.train)
    new = memorised(digits.validation.images, digits.test, digits.train)
    assert copies["nearest_train"] == 0
    assert new["nearest_train"] == pytest.approx(new["nearest_train_of_test"], rel=0.1)
    assert new["nearest_train_of_test"] > 1
    assert isinstance(digits.test, Split)
