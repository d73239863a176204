"""Likelihoods of images: from what a decoder puts out to nats, means and draws.

`x` are images scaled to [0, 1], (B, C, H, W) float32; `parameters` are (B, P * C, H, W), of which the first C
channels are locations. Log-probabilities are per pixel, in nats, and computed in float32: a sum over pixels
(never a mean) is an image's.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..vision import Dataset


class Likelihood(NamedTuple):
    """One kind of distribution of a pixel."""

    parameters: int
    """Numbers that the decoder gives for each pixel."""
    log_prob: Callable[[Tensor, Tensor, int], Tensor]
    """(parameters, x, high) -> nats, x's shape."""
    mean: Callable[[Tensor], Tensor]
    """parameters -> the mean, in [0, 1]."""
    draw: Callable[[Tensor, int, torch.Generator | None], Tensor]
    """(parameters, high, generator) -> scaled images drawn from it."""
    discrete: bool
    """Whether only the levels 0 to high have probability; else it is a density of the scaled values."""


def bernoulli_log_prob(logits: Tensor, x: Tensor, high: int = 1) -> Tensor:
    """log p of pixels 0 and 1, from the logit of 1."""
    return x * logits - F.softplus(logits)


def log_normalizer(logits: Tensor) -> Tensor:
    """log C of the continuous Bernoulli (Loaiza-Ganem and Cunningham 2019, 1907.06845, eq. 4), from logits.

    C = (2 artanh(1 - 2p)) / (1 - 2p), which is l / tanh(l / 2); by Taylor's series where both go to 0.
    """
    small = logits.abs() < 0.05
    safe = torch.where(small, 1.0, logits)
    return torch.where(small, math.log(2) + logits.square() / 12, (safe / torch.tanh(safe / 2)).log())


def continuous_bernoulli_log_prob(logits: Tensor, x: Tensor, high: int = 1) -> Tensor:
    """Log-density on [0, 1] of the continuous Bernoulli."""
    return x * logits - F.softplus(logits) + log_normalizer(logits)


def continuous_bernoulli_mean(logits: Tensor) -> Tensor:
    """p / (2p - 1) + 1 / (2 artanh(1 - 2p)) = 1 / (1 - exp(-l)) - 1 / l; Taylor around 0."""
    small = logits.abs() < 0.05
    safe = torch.where(small, 1.0, logits)
    return torch.where(small, 0.5 + logits / 12, -1 / torch.expm1(-safe) - 1 / safe).clamp(0, 1)


def continuous_bernoulli_draw(logits: Tensor, high: int, generator: torch.Generator | None) -> Tensor:
    """By inverting the distribution function: log(1 + u (e^l - 1)) / l; l > 0 is l < 0 mirrored."""
    u = torch.rand(logits.shape, device=logits.device, generator=generator)
    down = -logits.abs()
    safe = torch.where(down > -1e-3, -1e-3, down)
    x = (torch.log1p(u * torch.expm1(safe)) / safe).clamp(0, 1)
    return torch.where(logits > 0, 1 - x, x)


LEAST_LOG_SIGMA = -6.0


def gaussian_log_prob(parameters: Tensor, x: Tensor, high: int = 1) -> Tensor:
    """Log-density of a Gaussian with mean and log standard deviation."""
    mean, log_sigma = parameters.float().chunk(2, dim=1)
    log_sigma = log_sigma.clamp(min=LEAST_LOG_SIGMA)
    return -0.5 * ((x - mean) * (-log_sigma).exp()).square() - log_sigma - 0.5 * math.log(2 * math.pi)


def gaussian_draw(parameters: Tensor, high: int, generator: torch.Generator | None) -> Tensor:
    mean, log_sigma = parameters.float().chunk(2, dim=1)
    noise = torch.randn(mean.shape, device=mean.device, generator=generator)
    return (mean + log_sigma.clamp(min=LEAST_LOG_SIGMA).exp() * noise).clamp(0, 1)


LEAST_LOG_SCALE = -7.0
"""Of logistics, in units of half the range of values, as in PixelCNN++ (Salimans et al. 2017, 1701.05517)."""


def discretized_logistic_log_prob(mean: Tensor, log_scale: Tensor, x: Tensor, high: int) -> Tensor:
    """log p of the levels 0 to high under a logistic cut into bins; the outer bins reach to infinity.

    `mean` and `x` are in [-1, 1], where levels are 2 / high apart; `log_scale` is the log of the logistic's
    scale there. All three broadcast. Computed in float32 whatever comes in (float64 stays).
    """
    if mean.dtype != torch.float64:
        mean, log_scale, x = mean.float(), log_scale.float(), x.float()
    inverse = (-log_scale.clamp(min=LEAST_LOG_SCALE)).exp()
    centered = x - mean
    plus, minus = inverse * (centered + 1 / high), inverse * (centered - 1 / high)
    # sigmoid(plus) - sigmoid(minus) = sigmoid(plus) sigmoid(-minus) (1 - exp(minus - plus)), whose log loses
    # nothing in either tail.
    width = (2 / high) * inverse
    inside = F.logsigmoid(plus) + F.logsigmoid(-minus) + torch.log(-torch.expm1(-width))
    lowest, highest = F.logsigmoid(plus), F.logsigmoid(-minus)
    return torch.where(x < -1 + 0.5 / high, lowest, torch.where(x > 1 - 0.5 / high, highest, inside))


def logistic_log_prob(parameters: Tensor, x: Tensor, high: int) -> Tensor:
    """`discretized_logistic_log_prob` of scaled images, whose means are scaled like them."""
    mean, log_scale = parameters.float().chunk(2, dim=1)
    return discretized_logistic_log_prob(2 * mean - 1, log_scale, 2 * x - 1, high)


def logistic_draw(parameters: Tensor, high: int, generator: torch.Generator | None) -> Tensor:
    mean, log_scale = parameters.float().chunk(2, dim=1)
    u = torch.rand(mean.shape, device=mean.device, generator=generator).clamp(1e-6, 1 - 1e-6)
    x = mean + 0.5 * log_scale.clamp(min=LEAST_LOG_SCALE).exp() * torch.logit(u)
    return (x.clamp(0, 1) * high).round() / high


def _location(parameters: Tensor) -> Tensor:
    return parameters.float().chunk(2, dim=1)[0].clamp(0, 1)


def _bernoulli_draw(logits: Tensor, high: int, generator: torch.Generator | None) -> Tensor:
    u = torch.rand(logits.shape, device=logits.device, generator=generator)
    return (u < torch.sigmoid(logits)).float()


LIKELIHOODS: dict[str, Likelihood] = {
    "bernoulli": Likelihood(1, bernoulli_log_prob, torch.sigmoid, _bernoulli_draw, True),
    "continuous-bernoulli": Likelihood(
        1, continuous_bernoulli_log_prob, continuous_bernoulli_mean, continuous_bernoulli_draw, False
    ),
    "gaussian": Likelihood(2, gaussian_log_prob, _location, gaussian_draw, False),
    "logistic": Likelihood(2, logistic_log_prob, _location, logistic_draw, True),
}


def independent_pixels(dataset: Dataset) -> float:
    """Nats of a test image, on average, where each pixel is drawn for itself with the frequencies of the
    training images (each level counted once more than it was seen): the trivial model to beat.
    """
    levels = dataset.high + 1
    train = dataset.train.images.flatten(1)  # (N, D)
    test = dataset.test.images.flatten(1).long()
    if dataset.grey is not None:  # expected counts of the draws
        ones = train.double().mean(0) / dataset.grey * len(train)
        counts = torch.stack([len(train) - ones, ones])
    else:
        counts = torch.stack([(train == level).sum(0) for level in range(levels)]).double()  # (L, D)
    log_p = (counts + 1).log() - (len(train) + levels + torch.zeros(())).double().log()
    return -log_p.gather(0, test).sum(1).mean().item()


def bits_per_dim(nats: float, dims: int) -> float:
    """Nats of an image of `dims` pixels and channels, in bits for each of them."""
    return nats / (dims * math.log(2))
