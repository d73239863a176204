"""How good samples are: distances between sets of features, and nearest neighbours. All in float64.

FID: Heusel et al. 2017 (1706.08500). KID: Binkowski et al. 2018 (1801.01401). Precision and recall:
Kynkaanniemi et al. 2019 (1904.06991). Density and coverage: Naeem et al. 2020 (2002.09797). Features are
those of a classifier of the same data, so that figures compare only with others of the same extractor, whose
digest is in every result.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..vision import Classifier, Split

CHUNK = 1_000
"""Rows of a matrix of all pairs that are in memory at once."""


@dataclass(frozen=True, eq=False)
class Extractor:
    """What makes images comparable: uint8 (N, C, H, W) -> features (N, F)."""

    name: str
    digest: str
    """sha256 of its weights, in hex."""
    size: int
    """F."""
    resize: str
    """What is done to images before, in words."""
    function: Callable[[Tensor], Tensor]
    classifier: Classifier | None = None
    """Where it is one of the lab's: it also tells which class a sample is of."""

    @torch.no_grad()
    def __call__(self, images: Tensor, batch_size: int = 500) -> Tensor:
        """Raw images (N, C, H, W) -> features (N, F) float64 on the CPU."""
        return torch.cat([self.function(part).double().cpu() for part in images.split(batch_size)])

    def describe(self) -> str:
        return f"{self.name}, sha256 {self.digest[:16]}"


def classifier_extractor(classifier: Classifier) -> Extractor:
    """The input of a classifier's last linear layer.

    Raises ValueError for a classifier that does not end in one (SqueezeNet's and NiN's convolutions).
    """
    linear = [module for module in classifier.network.modules() if isinstance(module, nn.Linear)]
    config = classifier.config
    name = config.encoder or config.backbone
    if not linear or linear[-1].out_features != len(classifier.classes):
        raise ValueError(f"extractor must be a classifier that ends in a linear layer, got {name}")
    seen: list[Tensor] = []

    def function(images: Tensor) -> Tensor:
        handle = linear[-1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            classifier.scores(images, batch_size=len(images))
        finally:
            handle.remove()
        return seen.pop()

    digest = digest_of(classifier.weights())
    return Extractor(f"classifier {name}", digest, linear[-1].in_features, "none", function, classifier)


def inception_extractor(device: torch.device) -> Extractor:
    """torchvision's Inception v3 with its ImageNet weights: the mean of its last map, 2048 numbers.

    The original FID is defined on another port of the weights: published figures are near, not the same.
    Raises ValueError where torchvision or the weights are not to be had.
    """
    from ..vision.adapters import adapt

    network = adapt("torchvision/inception_v3", 3, pretrained=True).to(device).eval()

    def function(images: Tensor) -> Tensor:
        pixels = images.to(device).float() / 255
        pixels = pixels.expand(-1, 3, -1, -1) if pixels.shape[1] == 1 else pixels
        pixels = F.interpolate(pixels, size=(299, 299), mode="bilinear", antialias=True)
        return network.feature_map(pixels).mean((2, 3))

    digest = digest_of(network.state_dict())
    return Extractor("torchvision/inception_v3", digest, 2048, "bilinear, antialiased, to 299x299", function)


def digest_of(tensors: dict[str, Tensor]) -> str:
    """sha256 of names and values, in hex."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()


# Distances between sets of features, (N, F) and (M, F).


def fid(x: Tensor, y: Tensor) -> float:
    """Frechet distance of the normal distributions with the sets' means and covariances:
    |m - n|^2 + tr(S + T - 2 (S T)^(1/2)).

    Raises ValueError where a set has no more members than there are features: its covariance is singular, and
    the distance then tells the number of images rather than what is in them.
    """
    for features in (x, y):
        if len(features) <= features.shape[1]:
            raise ValueError(
                f"fid needs more images than the extractor has features ({features.shape[1]}), "
                f"got {len(features)}"
            )
    x, y = x.double(), y.double()
    apart = (x.mean(0) - y.mean(0)).square().sum()
    s, t = torch.cov(x.T), torch.cov(y.T)
    # tr (S T)^(1/2) is the sum of the singular values of S^(1/2) T^(1/2): no root of an unsymmetric matrix.
    cross = torch.linalg.svdvals(_root(s) @ _root(t)).sum()
    return float(apart + s.trace() + t.trace() - 2 * cross)


def _root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def kid(x: Tensor, y: Tensor) -> float:
    """Squared maximum mean discrepancy with the kernel (a.b / F + 1)^3: unbiased, so that it may be negative,
    and over all pairs."""
    if min(len(x), len(y)) < 2:
        raise ValueError(f"kid needs two images of each set or more, got {len(x)} and {len(y)}")
    x, y = x.double(), y.double()

    def total(a: Tensor, b: Tensor) -> Tensor:
        return sum(((part @ b.T / a.shape[1] + 1) ** 3).sum() for part in a.split(CHUNK))

    def own(a: Tensor) -> Tensor:
        alone = ((a.square().sum(1) / a.shape[1] + 1) ** 3).sum()
        return (total(a, a) - alone) / (len(a) * (len(a) - 1))

    return float(own(x) + own(y) - 2 * total(x, y) / (len(x) * len(y)))


def distances(x: Tensor, y: Tensor) -> Tensor:
    """Euclidean distances (N, M) of all pairs."""
    squares = x.square().sum(1, keepdim=True) + y.square().sum(1) - 2 * x @ y.T
    return squares.clamp(min=0).sqrt()


def radii(x: Tensor, k: int) -> Tensor:
    """Distance (N,) of each member of a set to its k-th nearest other one."""
    if len(x) <= k:
        raise ValueError(f"the {k} nearest of others need {k + 1} images or more, got {len(x)}")
    parts = []
    for start in range(0, len(x), CHUNK):
        near = distances(x[start : start + CHUNK], x)
        rows = torch.arange(len(near))
        near[rows, start + rows] = torch.inf  # itself, whatever rounding makes of that distance
        parts.append(near.kthvalue(k, dim=1).values)
    return torch.cat(parts)


def support(real: Tensor, fake: Tensor, k: int) -> dict[str, float]:
    """Precision, recall, density and coverage, with balls around each image that reach to its k-th nearest.

    precision: made images in a real one's ball. recall: real ones in a made one's. density: in how many real
    balls a made image is, divided by k (real images get 1). coverage: real balls with a made image inside.
    """
    real, fake = real.double(), fake.double()
    of_real, of_fake = radii(real, k), radii(fake, k)
    inside = torch.zeros(len(fake), dtype=torch.int64)
    recalled = covered = 0
    for part, radius in zip(real.split(CHUNK), of_real.split(CHUNK)):
        apart = distances(part, fake)
        in_real = apart <= radius.unsqueeze(1)
        inside += in_real.sum(0)
        covered += int(in_real.any(1).sum())
        recalled += int((apart <= of_fake).any(1).sum())
    return {
        "precision": (inside > 0).double().mean().item(),
        "recall": recalled / len(real),
        "density": inside.double().mean().item() / k,
        "coverage": covered / len(real),
    }


# Models.


def compare(real: Tensor, fake: Tensor, extractor: Extractor, split: str) -> dict[str, Any]:
    """All of the above for raw images (N, C, H, W) and (M, C, H, W), and what it was measured with.

    Precision and recall have k = 3, density and coverage k = 5, as in their papers. Raises ValueError where
    there are too few images.
    """
    x, y = extractor(real), extractor(fake)
    three, five = support(x, y, 3), support(x, y, 5)
    return {
        "fid": fid(x, y),
        "kid": kid(x, y),
        **{name: three[name] for name in ("precision", "recall")},
        **{name: five[name] for name in ("density", "coverage")},
        "fid_extractor": extractor.describe(),
        "fid_images": [len(real), len(fake)],
        "fid_split": split,
        "fid_resize": extractor.resize,
    }


def class_shares(images: Tensor, classifier: Classifier) -> Tensor:
    """Which share of raw images a classifier takes for each class: (K,) float64."""
    classes = len(classifier.classes)
    return torch.bincount(classifier.predict(images), minlength=classes).double() / len(images)


def class_accuracy(images: Tensor, labels: Tensor, classifier: Classifier) -> float:
    """Share of raw images that a classifier takes for what they were made as, (N,)."""
    return (classifier.predict(images) == labels.cpu()).double().mean().item()


def nearest(images: Tensor, among: Tensor) -> tuple[Tensor, Tensor]:
    """Of each raw image (N, C, H, W) the nearest of others (M, C, H, W) in pixels: root mean square
    difference (N,) float64, in pixel values, and index (N,)."""
    x = images.flatten(1).double()
    best, index = (
        torch.full((len(x),), torch.inf, dtype=torch.float64),
        torch.zeros(len(x), dtype=torch.int64),
    )
    for start in range(0, len(among), CHUNK):
        apart = distances(x, among[start : start + CHUNK].flatten(1).double()).min(1)
        closer = apart.values < best
        best = torch.where(closer, apart.values, best)
        index = torch.where(closer, apart.indices + start, index)
    return best / x.shape[1] ** 0.5, index


def memorised(samples: Tensor, test: Split, train: Split, most: int = 500) -> dict[str, float]:
    """Whether samples are copies: the median distance of samples to the nearest training image, and what it
    is for images of the test split, in shares of the latter's. Far below 1 means copies."""
    own = nearest(samples[:most], train.images)[0].median()
    others = nearest(test.images[:most], train.images)[0].median()
    return {"nearest_train": own.item(), "nearest_train_of_test": others.item()}
